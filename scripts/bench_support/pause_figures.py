"""Pause and resume with host backup: cold, warm, and beside torch_memory_saver, each as a share of what a plain copy reaches."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from . import simulated_figures
from .child import Cycles, Sample, Setup, cycles
from .figures import MIB, Figure, Target, Unmeasurable, rates, ways
from .plan import Sizes
from .workshop import Place, Workshop

# Below this share of huge pages, a first pause measures the kernel's clearing of small pages.
HUGE_ENOUGH = 0.9


def column(samples: list[Sample], name: str) -> list[float]:
    return [sample[name] for sample in samples]


def phases(samples: list[Sample], call: str) -> str:
    """How long the parts took, as Sire reports them."""
    prepare, transfer, whole = (median(column(samples, name)) for name in (f"{call}_prepare", f"{call}_transfer", call))
    return f"prepare {prepare * 1e3:.1f} ms, transfer {transfer * 1e3:.1f} ms, whole {whole * 1e3:.1f} ms"


def beside_copy(name: str, samples: list[Sample], call: str, amount: int, target: float) -> Figure:
    """A rate as a share of the plain copy in the same direction."""
    copies = rates(column(samples, "out" if call == "pause" else "in"), amount)
    figure = Figure(name, "GiB/s", rates(column(samples, call), amount), copies, target=Target("ratio", at_least=target))
    figure.doubt(copies, "the plain copy")
    figure.stay_below("the plain copy")
    step = samples[0]["out_step" if call == "pause" else "in_step"] / MIB
    figure.notes.append(f"{phases(samples, call)}; ceiling in pieces of {step:.0f} MiB")
    return figure


def cold(shop: Workshop, sizes: Sizes) -> list[Figure]:
    """The first pause of a process, once per process."""
    setup = Setup(sizes.amount, 32)
    samples = []
    for last in ways(sizes.repeats):
        with cycles(shop, shop.sire, setup) as program:
            samples.append(program.cycle(last, fault=True))
    figure = beside_copy("pause.cold", samples, "pause", sizes.amount, 0.55)
    huge = median(column(samples, "huge"))
    figure.notes.append(f"{huge:.0%} of the backup is in huge pages")
    if huge < HUGE_ENOUGH:
        figure.meaningless.append(f"the kernel granted huge pages for {huge:.0%} only")
    # What it costs at least when memory must be brought in by one thread first and then be copied to by one thread.
    both = [sample["fault"] + sample["out"] for sample in samples]
    limit = Figure("pause.cold.vs_fault_in", "GiB/s", figure.values, rates(both, sizes.amount))
    limit.notes.append("ceiling: one thread brings the memory in, then copies")
    limit.doubt(column(samples, "fault"), "bringing memory in")
    return [figure, limit]


def warm(shop: Workshop, sizes: Sizes, pieces: int) -> list[Figure]:
    """Pauses and resumes after the first, with the backup's memory kept."""
    with cycles(shop, shop.sire, Setup(sizes.amount, pieces)) as program:
        program.cycle(False)
        samples = [program.cycle(last) for last in ways(sizes.repeats)]
    return [beside_copy(f"{call}.warm.{pieces}", samples, call, sizes.amount, 0.9) for call in ("pause", "resume")]


def pairs(ours: Cycles, theirs: Cycles, repeats: int, turned: bool = False) -> tuple[list[Sample], list[Sample]]:
    """The two, one right after the other, in the order ABBA, or if `turned` BAAB; before that the first of either process."""
    left: list[Sample] = []
    right: list[Sample] = []
    for number, swapped in enumerate([False, *ways(repeats)]):
        last = (number % 2 == 0) != turned and number > 0
        sides = [(left, ours), (right, theirs)]
        for samples, program in reversed(sides) if swapped != turned else sides:
            samples.append(program.cycle(last))
    return left, right


@dataclass(frozen=True)
class Often:
    """How often two are compared: pairs in each pair of processes. The pairs of two processes have something in common that another two do not; so what two
    processes say is one sample, however many pairs they do. Where it takes too long to start more than two, each pair is a sample: that tells less."""

    pairs: int
    processes: int = 1


Pairs = tuple[list[Sample], list[Sample]]


def by_process(found: list[Pairs], call: str, amount: int) -> tuple[list[list[float]], list[float]]:
    """The rates of either side and the ratio between them, one each per pair of processes: medians of its pairs. Of a single one, one each per pair."""
    sides = [[rates(column(side, call), amount) for side in pairs] for pairs in found]
    ratios = [[value / other for value, other in zip(*pair, strict=True)] for pair in sides]
    if len(found) == 1:
        return sides[0], ratios[0]
    return [[median(pair[side]) for pair in sides] for side in (0, 1)], [median(each) for each in ratios]


def against(shop: Workshop, peer: Place, name: str, setup: Setup, often: Often, targets: tuple[float, float]) -> list[Figure]:
    """How many times faster than the peer, the same calls on both sides."""
    found: list[Pairs] = []
    firsts: list[tuple[Sample, Sample]] = []
    for number in range(often.processes):
        with cycles(shop, shop.sire, setup) as ours, cycles(shop, peer, setup) as theirs:
            (first, *left), (other_first, *right) = pairs(ours, theirs, often.pairs, turned=number % 2 == 1)
        found.append((left, right))
        firsts.append((first, other_first))
    left, right = ([sample for pair in found for sample in pair[side]] for side in (0, 1))
    figures = []
    for call, target, way in zip(("pause", "resume"), targets, ("out", "in"), strict=True):
        (values, others), ratios = by_process(found, call, setup.amount)
        goal = Target("ratio", at_least=target)
        size = name.partition("@")[2]
        figure = Figure(f"{name.partition('@')[0]}.{call}{'.' if size else ''}{size}", "GiB/s", values, others, ratios, target=goal)
        copies = rates(column(left, way) + column(right, way), setup.amount)
        figure.doubt(copies, "the plain copy", 2.0)
        bare = [theirs / copy for theirs, copy in zip(column(right, call), column(right, way), strict=True)]
        figure.tell_limit(bare, "a plain copy")
        at_first = median(other[call] / own[call] for own, other in firsts)
        figure.notes.append(f"ceiling: {peer.name}; plain copy {median(copies):.1f} GiB/s; the first of a process: {at_first:.2f} times")
        if not setup.profile:
            figure.tell_tie("pairs" if often.processes == 1 else "pairs of processes")
            figure.notes.append(f"ours: {phases(left, call)}")
        figures.append(figure)
    return figures


def tms_default(shop: Workshop, sizes: Sizes, peer: Place) -> list[Figure]:
    """Both as they are without any setting."""
    return against(shop, peer, "tms.default", Setup(sizes.amount, 32, retain=False), Often(sizes.repeats), (4.0, 2.0))


def tms_retained(shop: Workshop, sizes: Sizes, peer: Place) -> list[Figure]:
    """Both with their backups kept: at full size, and where the calls begin to count. They are so near one another that it takes many pairs to tell, and
    many processes below the full size, where they start soon."""
    figures = against(shop, peer, "tms.retained", Setup(sizes.amount, 32), Often(2 * sizes.repeats + 1), (1.0, 1.0))
    for amount, target, count in ((64 * MIB, 1.0, 5), (16 * MIB, 0.95, 9)):
        if amount < sizes.amount:
            often = Often(count, 2 * sizes.repeats + 1)
            figures += against(shop, peer, f"tms.retained@{amount // MIB}MiB", Setup(amount, 1), often, (target, target))
    return figures


def tms_simulated(shop: Workshop, sizes: Sizes, peer: Place) -> list[Figure]:
    """The same on the model clock, where pinning costs what others have measured, and no processor's cache helps a copy. Simulated time hardly varies: two
    repetitions tell."""
    if not shop.software:
        raise Unmeasurable("only the software device keeps virtual time: --device software")
    figures = []
    for profile in sizes.profiles or simulated_figures.profiles():
        default = Setup(sizes.amount // 8, 4, retain=False, profile=profile)
        retained = Setup(sizes.amount // 2, 16, profile=profile)
        setups = [("default", default, (4.0, 2.0)), ("retained", retained, (1.0, 1.0))]
        for amount, target in ((64 * MIB, 1.0), (16 * MIB, 0.95)):
            if amount < sizes.amount:
                setups.append((f"retained@{amount // MIB}MiB", Setup(amount, 1, profile=profile), (target, target)))
        for name, setup, targets in setups:
            found = against(shop, peer, f"sim.tms.{profile}.{name}", setup, Often(2), targets)
            figures += [simulated_figures.of_model(figure, profile) for figure in found]
    return figures
