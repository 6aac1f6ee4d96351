"""With a backup, content survives a pause; without one it is thrown away.

python examples/cpu_backup.py preload|torch
"""

from __future__ import annotations

from common import check, fitting, hook_mode, show

MODE = hook_mode()

import sire  # noqa: E402
import torch  # noqa: E402
from sire.torch_memory_saver import torch_memory_saver  # noqa: E402


def main() -> None:
    torch_memory_saver.hook_mode = MODE
    size = fitting(1_000_000_000)
    with torch_memory_saver.region(tag="kept", enable_cpu_backup=True):
        kept = torch.arange(size // 4, dtype=torch.int32, device="cuda")
    with torch_memory_saver.region(tag="thrown away"):
        thrown_away = torch.full((size,), 42, dtype=torch.uint8, device="cuda")
    expected = kept.cpu()
    full = show("both tensors made")

    report = sire.pause()
    print(report)
    check(full - show("paused") >= 2 * (size // 4 * 4), "the pause released both")
    check(report.bytes_discarded > 0, "the report counts what was thrown away")
    backup = torch_memory_saver.get_cpu_backup(kept)
    check(backup is not None and torch.equal(backup, expected), "the backup can be read during the pause")
    check(torch_memory_saver.get_cpu_backup(thrown_away) is None, "the other tensor has none")

    print(sire.resume())
    show("resumed")
    check(torch.equal(kept.cpu(), expected), "content is kept unchanged")
    thrown_away.fill_(43)
    check(int(thrown_away[0]) == 43, "the other tensor's memory can be used again")


main()
