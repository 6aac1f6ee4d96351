"""What a pause costs others while it runs (stall), what a tag costs among very many (scale), and what recording costs (trace)."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from .child import call, talking
from .figures import MIB, Figure, Target, spread, ways
from .plan import Sizes
from .workshop import Workshop

P99_LIMIT_MS = 1.0
MAX_LIMIT_MS = 20.0
# A loop's p99 hangs on a few calls: beside the same copy it may vary by this much.
STEADY_LOOP = 3.0
PROPORTIONAL = 2.0


def worst(results: dict[str, float], beside: str, whose: str, mark: str) -> float:
    """Milliseconds, of allocations and frees together."""
    return max(results[f"stall/beside {beside}/{whose}/{call}/{mark}"] for call in ("allocate", "free")) / 1e3


def stall(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """The open loop of benches/stall.c, a process per repetition."""
    runs: list[dict[str, float]] = []
    memory = (sizes.stall_mib + 256) * MIB
    for _ in range(sizes.repeats):
        lines = call(shop, "stall", str(sizes.stall_mib), saver=shop.sire, memory=memory, more={"SIRE_SIM_ENGINES": "1"})
        runs.append({str(line["name"]): float(line["value"]) for line in lines})

    def series(beside: str, whose: str, mark: str) -> list[float]:
        return [worst(run, beside, whose, mark) for run in runs]

    def measured(name: str, whose: str, mark: str, target: Target | None = None) -> Figure:
        values, copies = series("pause", whose, mark), series("pieces", whose, mark)
        # Of which a wait may leave nothing.
        ratios = [value / max(copy, 1e-3) for value, copy in zip(values, copies, strict=True)]
        return Figure(name, "ms", values, copies, ratios, target)

    def against(name: str, whose: str, mark: str, target: Target) -> tuple[Figure, Figure]:
        figure, running = (measured(name, whose, each, target) for each in (mark, f"{mark}_running"))
        for each in (figure, running):
            each.notes.append("ceiling: the same beside a plain copy in pieces of 4 MiB; less is better")
        figure.notes.append(f"without the wait for a processor: {running.value:.2f} ms, {median(running.ratios or []):.2f} of the ceiling's")
        # On a GPU an engine copies, here a thread: with the pausing one and the loop's they are more than two processors.
        if target.met_by(figure) is False and target.met_by(running):
            figure.meaningless.append("the loop's thread waited for a processor")
        return figure, running

    p99, _ = against("stall.own.p99_ms", "own", "p99", Target("value", at_most=P99_LIMIT_MS))
    longest, _ = against("stall.own.max_ms", "own", "worst", Target("max", at_most=MAX_LIMIT_MS))
    forwarded = steadier(*against("stall.forwarded.vs_copy", "forwarded", "p99", Target("ratio", at_most=1.0)))
    # A machine on which the same loop stalls beside nothing at all cannot tell.
    for figure, mark, limit in ((p99, "p99", P99_LIMIT_MS), (longest, "worst", MAX_LIMIT_MS)):
        idle = median(series("nothing", "own", mark))
        figure.notes.append(f"beside nothing: {idle:.2f} ms")
        if idle > limit / 2:
            figure.meaningless.append(f"the machine stalls the same calls {idle:.2f} ms beside nothing")
    seldom, most = (measured("stall.seldom.vs_copy", "seldom", mark) for mark in ("median", "worst"))
    longest_of_run = f"{most.value:.2f} ms, {median(most.ratios or []):.2f} of the ceiling's"
    seldom.notes.append(f"forwarded calls, one each 25 ms, medians; the longest of a run: {longest_of_run}")
    seldom.notes.append("ceiling: the same beside a plain copy in pieces of 4 MiB; less is better")
    return [p99, longest, forwarded, seldom]


def steadier(figure: Figure, running: Figure) -> Figure:
    """The one to judge by: `running`, which leaves out the wait for a processor, where that is what made the loop beside the copy unsteady."""
    if spread(figure.ceilings or [1]) <= STEADY_LOOP or spread(running.ceilings or [1]) > STEADY_LOOP:
        figure.doubt(figure.ceilings or [1], "the loop beside the copy", STEADY_LOOP)
        return figure
    varied = f"with it the loop beside the copy varied by {spread(figure.ceilings or [1]):.1f}x, and the ratio was {figure.ratio:.2f}"
    running.notes.append(f"judged without the wait for a processor: {varied}")
    return running


def scale(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """A pause and a resume of one tag, among very many and in a process that has no other, in turns."""
    each, step = sizes.allocations // sizes.tags, sizes.tags // sizes.repeats
    memory = sizes.tags * 4 * MIB + 256 * MIB
    among: list[float] = []
    alone: list[float] = []
    counts = (str(sizes.allocations), str(sizes.tags))
    with talking(shop, "scale", *counts, memory=memory) as many, talking(shop, "scale", str(each), "1", memory=256 * MIB) as one:
        made_at = many.said()
        one.said()
        for number, swapped in enumerate(ways(sizes.repeats)):
            pair = [(many, number * step, among), (one, 0, alone)]
            for program, tag, found in reversed(pair) if swapped else pair:
                found.append(program.ask(str(tag))["seconds"] / each * 1e9)
    # In proportion to the tag: what else is alive may not double it.
    goal = Target("ratio", at_most=PROPORTIONAL)
    cost = Figure("scale.ns_per_allocation", "ns", among, alone, target=goal)
    cost.notes.append(
        f"pause and resume of one tag of {each} allocations, {sizes.allocations:,} allocations and {sizes.tags:,} tags alive; "
        "ceiling: a tag that is alone in its process; less is better"
    )
    made = Figure("scale.allocate_ns", "ns", [made_at["allocate_ns"]], notes=["making an allocation of 512 bytes, new tags and slabs included"])
    held = Figure("scale.bytes_per_allocation", "B", [made_at["bytes_per_allocation"]], notes=["private memory of the process per allocation"])
    return [cost, made, held]


def trace(shop: Workshop, sizes: Sizes, folder: Path) -> list[Figure]:
    """One allocation and its free, recorded in a file and not, in turns."""
    recorded: list[float] = []
    plain: list[float] = []
    for number in range(max(sizes.repeats, 2)):
        for tracing in (number % 2 == 1, number % 2 == 0):
            more = {"SIRE_TRACE": str(folder / "calls.trace")} if tracing else {}
            lines = call(shop, "hooks", "own", "1000", str(sizes.calls), "512", "trace", saver=shop.sire, memory=256 * MIB, more=more)
            pair = sum(float(line["value"]) for line in lines if line["unit"] == "ns")
            (recorded if tracing else plain).append(pair)
    figure = Figure("trace.pair_ns", "ns", recorded, plain)
    figure.notes.append("an allocation of 512 bytes and its free with SIRE_TRACE; ceiling: without; less is better")
    return [figure]
