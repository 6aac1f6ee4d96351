"""What the software device knowingly does not do, and that the list of it (unsupported.txt) is exact."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")


def _listed() -> dict[str, str]:
    lines = Path(__file__).with_name("unsupported.txt").read_text().splitlines()
    entries = [line.split(maxsplit=2) for line in lines if line and not line.startswith("#")]
    return {name: reason for name, release, reason in entries if release == "all" or torch.__version__.startswith(release)}


def test_the_list_is_exact() -> None:
    """Every operation of this release that is refused is listed, and every listed one that exists is refused."""
    from sire_software_device import registry

    refused, known = set(registry.unsupported()), set(registry.candidates())
    listed = _listed()
    assert refused - set(listed) == set(), "newly refused"
    assert (set(listed) & known) - refused == set(), "these work now: take them off the list"
    assert all(listed.values()), "each needs a reason"


def test_each_is_refused_by_its_name() -> None:
    """The registered function raises NotImplementedError that names the operation."""
    from sire_software_device import registry

    functions = dict(registry.kernels())
    for name in sorted(set(_listed()) & set(registry.candidates())):
        with pytest.raises(NotImplementedError, match=name.replace(".", r"\.") + " has no CPU kernel"):
            functions[name]()


def test_a_refusal_reaches_the_caller() -> None:
    """Through the dispatcher the name still shows."""
    x = torch.ones(2, 2, device="cuda")
    with pytest.raises(NotImplementedError, match="aten::cudnn_grid_sampler"):
        torch.cudnn_grid_sampler(x[None, None], torch.zeros(1, 2, 2, 2, device="cuda"))


def test_sparse_layouts_are_refused() -> None:
    """COO and CSR results have no place on the device yet; a refusal, not a crash."""
    x = torch.eye(3, device="cuda")
    for convert in (x.to_sparse, x.to_sparse_csr):
        with pytest.raises((NotImplementedError, RuntimeError)):
            convert()


def test_operations_that_only_the_cpu_has() -> None:
    """PyTorch itself has no CUDA kernel for these; the device must not be kinder."""
    with pytest.raises(NotImplementedError, match="aten::histogram"):
        torch.histogram(torch.ones(3, device="cuda"), 2)
