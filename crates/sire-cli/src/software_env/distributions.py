"""Empty local distributions for the NVIDIA and triton packages that an installed torch asks for.

Run by the environment's own Python: ``distributions.py torch light EMPTY_VERSION_TAG`` prints, as JSON, what it did:
``{"torch": version, "empty": ["name==version", ...], "light": [requirement, ...], "real": [name, ...]}``. ``real`` names
packages that brought real NVIDIA libraries; the caller removes them and runs this again.
"""

import json
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

try:
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version
except ImportError:
    from packaging.requirements import Requirement
    from packaging.version import Version

INSTALLER = "sire"
REPLACED = re.compile(r"(nvidia-.+|cuda-.+|triton|pytorch-triton)$")
REAL_FILES = re.compile(r"(nvidia/[^/]+/lib/|triton/_C/|cuda/bindings/)")


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def version_for(requirement):
    """The newest version that the requirement names and accepts."""
    named = [Version(s.version.removesuffix(".*")) for s in requirement.specifier if s.operator not in ("!=", "<")]
    fitting = [v for v in named if requirement.specifier.contains(v, prereleases=True)]
    return str(max(fitting)) if fitting else "0"


def contents(name, version, extras):
    """The files of an empty distribution, but for RECORD."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += ["Summary: Empty: Sire's software CUDA device stands in for this package"]
    lines += [f"Provides-Extra: {extra}" for extra in sorted(extras)]
    wheel = "Wheel-Version: 1.0\nGenerator: sire software-env\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {"METADATA": "\n".join(lines) + "\n", "INSTALLER": INSTALLER + "\n", "WHEEL": wheel}


def write_empty(site, name, version, extras):
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    files = contents(name, version, extras)
    record = "".join(f"{info.name}/{file},,\n" for file in [*files, "RECORD"])
    for file, text in [*files.items(), ("RECORD", record)]:
        (info / file).write_text(text, encoding="utf-8")
    return info


def is_ours(distribution):
    return (distribution.read_text("INSTALLER") or "").strip() == INSTALLER


def is_real(distribution):
    name = normalized(distribution.metadata["Name"] or "")
    if not REPLACED.match(name) or is_ours(distribution):
        return False
    return any(REAL_FILES.match(str(file)) for file in distribution.files or [])


def main():
    torch = metadata.distribution("torch")
    site = Path(torch.locate_file("")).resolve()
    requirements = [Requirement(text) for text in torch.requires or []]
    wanted = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    replaced = [r for r in wanted if REPLACED.match(normalized(r.name))]
    names = {normalized(r.name) for r in replaced}
    here = list(metadata.distributions(path=[str(site)]))
    real = [d.metadata["Name"] for d in here if is_real(d) or (normalized(d.metadata["Name"] or "") in names and not is_ours(d))]
    if not real:
        written = [write_empty(site, normalized(r.name), version_for(r), r.extras) for r in replaced]
        for distribution in here:
            old = Path(str(getattr(distribution, "_path", "")))
            if normalized(distribution.metadata["Name"] or "") in names and is_ours(distribution) and old not in written:
                shutil.rmtree(old, ignore_errors=True)
    report = {
        "torch": torch.version,
        "empty": sorted(f"{normalized(r.name)}=={version_for(r)}" for r in replaced),
        "light": [f"{r.name}{r.specifier}" for r in wanted if r not in replaced],
        "real": sorted(real),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
