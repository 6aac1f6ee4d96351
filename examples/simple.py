"""Tensors are paused by tag: their memory is released, their addresses stay.

python examples/simple.py preload|torch
"""

from __future__ import annotations

from common import check, fitting, hook_mode, show

MODE = hook_mode()

import torch  # noqa: E402
from sire.torch_memory_saver import torch_memory_saver  # noqa: E402


def main() -> None:
    torch_memory_saver.hook_mode = MODE
    size = fitting(1_000_000_000)
    normal = torch.full((size // 4,), 7, dtype=torch.uint8, device="cuda")
    before = show("before the regions")

    with torch_memory_saver.region(tag="type1"):
        one = torch.full((size,), 100, dtype=torch.uint8, device="cuda")
    with torch_memory_saver.region(tag="type2"):
        two = torch.full((size,), 101, dtype=torch.uint8, device="cuda")
    addresses = one.data_ptr(), two.data_ptr()
    full = show("both tensors made")
    check(full - before >= 2 * size, "both tensors occupy memory")

    torch_memory_saver.pause("type1")
    check(full - show("type1 paused") >= size, "pausing type1 released its memory")
    check(bool((two == 101).all()), "type2 is untouched")
    torch_memory_saver.pause("type2")
    check(full - show("type2 paused too") >= 2 * size, "pausing type2 released its memory")
    check(bool((normal == 7).all()), "a tensor outside of regions is untouched")

    torch_memory_saver.resume("type2")
    torch_memory_saver.resume("type1")
    show("both resumed")
    check((one.data_ptr(), two.data_ptr()) == addresses, "addresses are unchanged")
    one.fill_(1)
    two.fill_(2)
    check(int(one[-1]) == 1 and int(two[-1]) == 2, "the memory can be used again")


main()
