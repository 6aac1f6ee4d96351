"""Prints what one run of `turns` measured."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20


def print_rows(rows: list[dict[str, Any]]) -> None:
    """One line for each model."""
    times = f"{'pause':>8}{'resume':>9}{'copy':>9}"
    print(f"\n    {'model':<18}{'bytes':>9}{'before':>9}{'resident':>10}{'paused':>9}{'resumed':>9}   {'address':<16}{times}  exact")
    for row in rows:
        sizes = "".join(f"{row[key] / MIB:>{width},.0f}" for key, width in (("model_bytes", 9), ("before", 9), ("resident", 10), ("paused", 9), ("resumed", 9)))
        times = f"{row['seconds_pause']:>7.3f}s{row['seconds_resume']:>8.3f}s{row['seconds_copy']:>8.3f}s"
        exact = "bit-identical" if row["exact"] else "DIFFERENT"
        print(f"    {row['model']:<18}{sizes}   {row['address']:<16}{times}  {exact}, {row['max_difference_from_cpu']:.1e} from CPU")
    print("    (MiB of physical device memory, by the operating system's count on the software device and by the driver's on a GPU;")
    print("    copy: what a plain copy of the same bytes takes, by one thread in the same process)", flush=True)
