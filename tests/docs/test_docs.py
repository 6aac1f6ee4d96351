"""The documentation keeps its promises: links lead somewhere, tables match the sources, quoted messages exist."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
TROUBLESHOOTING = DOCS / "troubleshooting.md"


@cache
def tracked() -> list[Path]:
    """The repository's files: what git tracks or would; without git, everything outside build folders."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=300).stdout.split("\0")
        found = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        skipped = {"target", ".sire", ".git", "__pycache__", "dist", "build"}
        found = [path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)]
    return [path for path in found if path.is_file()]


def text_of(path: Path) -> str:
    """The file's text; nothing if it is not text."""
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


MARKDOWN = [path for path in tracked() if path.suffix == ".md"]
SOURCES = [
    path
    for path in tracked()
    if path.suffix in {".rs", ".py", ".c", ".cpp", ".h", ".sh", ".toml", ".pth"}
    or (path.parent.name in {"scripts", ".ci"} and not path.suffix)
]


def without_code(text: str) -> str:
    """Markdown without fenced blocks and code spans, where brackets mean something else."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchor(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", MARKDOWN, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            broken.append(target)
        elif fragment and file.suffix == ".md":
            anchors = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)}
            if fragment not in anchors:
                broken.append(target)
    assert not broken, f"{relative(page)} links to {broken}"


NAMED = sorted(
    {
        (page, name)
        for page in MARKDOWN
        for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:rs|py|c|cpp|h))`", text_of(page))
    }
)


@pytest.mark.parametrize(("page", "name"), NAMED, ids=lambda each: each if isinstance(each, str) else relative(each))
def test_sources_that_are_named_are_there(page: Path, name: str) -> None:
    """Whole, or shortened by their first folders, as a reader finds them by searching."""
    assert any(f"/{relative(path)}".endswith(f"/{name}") for path in tracked()), f"{relative(page)} names {name}"


# --- environment variables ---------------------------------------------------------------------------------

VARIABLE = re.compile(r"\b(?:SIRE|TMS)_[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)*\b(?!\*)")
# Names of C constants, compile-time names of builds, and variables of our own test and demo programs.
NOT_FOR_USERS = re.compile(
    r"SIRE_(STATUS|TEST|DEMO|EXAMPLE|BUILD|UPDATE|WHEEL|BENCH|ALLOC_SO|SIM_SO|DRIVER_SO|H\b|PREBUILT|ABI)|SIRE_SIM_?$"
)


def used_in(paths: list[Path]) -> dict[str, str]:
    """Every variable that the files name, with one file that does."""
    found: dict[str, str] = {}
    for path in paths:
        for name in VARIABLE.findall(text_of(path)):
            if not NOT_FOR_USERS.match(name):
                found.setdefault(name, relative(path))
    return found


def documented() -> set[str]:
    return set(VARIABLE.findall((DOCS / "environment.md").read_text()))


def product_sources() -> list[Path]:
    """What a user runs: not the tests, whose fixtures name variables that do not exist."""
    return [
        path
        for path in SOURCES
        if relative(path).split("/")[0] not in {"tests", "fuzz"}
        and "/tests/" not in relative(path)
        and path.name != "tests.rs"
    ]


def test_every_variable_that_is_read_is_documented() -> None:
    missing = {name: file for name, file in used_in(product_sources()).items() if name not in documented()}
    assert not missing, f"docs/environment.md does not know {missing}"


def test_every_documented_variable_is_read() -> None:
    stale = documented() - set(used_in(product_sources()))
    assert not stale, f"no source reads {sorted(stale)}, which docs/environment.md lists"


def test_the_documentation_names_no_variable_that_does_not_exist() -> None:
    unknown = {name: file for name, file in used_in(MARKDOWN).items() if name not in documented()}
    assert not unknown, unknown


# --- statuses and messages ----------------------------------------------------------------------------------


def statuses() -> dict[str, int]:
    """Names (in C) and numbers, from the engine's error type."""
    source = (ROOT / "crates" / "sire-core" / "src" / "error.rs").read_text()
    numbers = dict(re.findall(r"^    (\w+) = (\d+),$", source, re.MULTILINE))
    names = dict(re.findall(r"Status::(\w+) => \"(SIRE_STATUS_\w+)\"", source))
    assert len(numbers) >= 19
    assert set(numbers) == set(names)
    return {names[variant]: int(number) for variant, number in numbers.items()}


def test_every_status_is_explained_with_its_number() -> None:
    page = TROUBLESHOOTING.read_text()
    missing = [name for name, number in statuses().items() if f"`{name}` ({number})" not in page]
    assert not missing


def test_every_exception_is_explained() -> None:
    source = (ROOT / "python-shim" / "src" / "sire" / "_errors.py").read_text()
    page = TROUBLESHOOTING.read_text()
    assert not [name for name in re.findall(r"^class (\w+)\(", source, re.MULTILINE) if name not in page]


@cache
def all_sources() -> str:
    """The sources as one text, with strings that are split over lines joined."""
    text = "\n".join(text_of(path) for path in SOURCES if not relative(path).startswith("tests/docs"))
    text = re.sub(r"\"\s*\n\s*f?\"", "", text)
    text = re.sub(r"\\\n\s*", "", text)
    return text.replace('\\"', '"')


def quoted() -> list[str]:
    """The messages that the page quotes."""
    return re.findall(r"^> (.+)$", TROUBLESHOOTING.read_text(), re.MULTILINE)


# PyTorch says this one.
FOREIGN = {"Expected all tensors to be on the same device"}


@pytest.mark.parametrize("message", quoted())
def test_quoted_messages_exist(message: str) -> None:
    assert message in all_sources() or message in FOREIGN, f"nothing says {message!r} any more"


def test_the_page_quotes_messages() -> None:
    assert len(quoted()) > 30


# --- what must not be in the repository -----------------------------------------------------------------------

# Spelt so that this file does not contain them.
PRIVATE = [r"/wo" r"rk/", r"(?<![\w$}/])/tm" r"p/\w", r"/ro" r"ot/", r"/ho" r"me/\w", r"\bissues (?:show|list)\b"]
REGISTRIES = [
    r"py" r"pi\.org",
    r"files\.python" r"hosted",
    r"crates" r"\.io/",
    r"index\.crates",
    r"static\.rust-" r"lang",
]


@pytest.mark.parametrize("pattern", PRIVATE + REGISTRIES)
def test_no_private_path_and_no_registry_host(pattern: str) -> None:
    lock_files = {"Cargo.lock", "uv.lock"}
    found = [
        relative(path)
        for path in tracked()
        if path.name not in lock_files and path != Path(__file__).resolve() and re.search(pattern, text_of(path))
    ]
    assert not found, f"{pattern} occurs in {found}"


# --- the README --------------------------------------------------------------------------------------------------

README = ROOT / "README.md"


@pytest.mark.skipif(not README.exists(), reason="there is no README yet")
@pytest.mark.parametrize(
    "line",
    [
        "./scripts/demo",
        "./scripts/test",
        "LD_PRELOAD=$(sire path) python train.py",
        '"sire_torch_malloc", "sire_torch_free"',
    ],
)
def test_the_readme_names_the_commands(line: str) -> None:
    assert line in README.read_text()


def test_the_gpu_results_are_honest() -> None:
    # Either a result is there, or the page says that there is none.
    page = (DOCS / "gpu-results" / "README.md").read_text()
    results = list((DOCS / "gpu-results").glob("*.json"))
    assert bool(results) != ("There are none yet" in page)
