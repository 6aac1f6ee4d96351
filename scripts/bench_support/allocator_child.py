"""One side of the allocator figures, in a process of its own with PyTorch: ``allocator_child.py native|sire``. It does what each line of standard
input says, and begins each with an empty cache.

Commands: ``pairs CALLS SIZE...`` (an allocation and its free), ``empty CALLS SIZE...`` (torch.empty, and the same on the meta
device), ``threads COUNT CALLS SIZE``, ``blocks COUNT`` (so many live ones), ``record NAME FILE`` (a workload's allocations; native
only), ``replay FILE``. Answers in JSON.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20
BEAMS = 4


def best(work: Callable[[], None], calls: int, rounds: int = 3) -> float:
    """Nanoseconds of this thread's processor time per call, of the fastest round: what disturbs only ever adds, and nothing here waits."""
    found = []
    for _ in range(rounds):
        started = time.thread_time()
        work()
        found.append(time.thread_time() - started)
    return min(found) / calls * 1e9


def pairs(calls: int, sizes: list[int]) -> dict[str, float]:
    """The cost of a loop that does nothing is in it, on both sides."""
    take, give = torch._C._cuda_cudaCachingAllocator_raw_alloc, torch._C._cuda_cudaCachingAllocator_raw_delete
    answer = {}
    for size in sizes:
        give(take(size, 0))

        def work(size: int = size) -> None:
            for _ in range(calls):
                give(take(size, 0))

        answer[str(size)] = best(work, calls)
    return answer


def empty(calls: int, sizes: list[int]) -> dict[str, float]:
    """Less what PyTorch does around every allocation: the same call on the meta device."""
    answer = {}
    for size in sizes:

        def work(device: str, size: int = size) -> None:
            for _ in range(calls):
                torch.empty(size, dtype=torch.uint8, device=device)

        answer[str(size)] = best(partial(work, "cuda"), calls) - best(partial(work, "meta"), calls)
    return answer


def threads(count: int, calls: int, size: int) -> dict[str, float]:
    """Seconds until all threads are done; each holds some blocks."""
    take, give = torch._C._cuda_cudaCachingAllocator_raw_alloc, torch._C._cuda_cudaCachingAllocator_raw_delete
    gate = threading.Barrier(count + 1)

    def work(number: int) -> None:
        held = [take(size + 512 * (number % 4), 0) for _ in range(8)]
        gate.wait()
        for turn in range(calls):
            give(held[turn % 8])
            held[turn % 8] = take(size + 512 * (turn % 4), 0)
        gate.wait()
        for each in held:
            give(each)

    runners = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for each in runners:
        each.start()
    gate.wait()
    started = time.perf_counter()
    gate.wait()
    seconds = time.perf_counter() - started
    for each in runners:
        each.join()
    return {"seconds": seconds}


def blocks(count: int) -> dict[str, float]:
    """Nanoseconds per block: to make them all, and to free and make half of them in an order of their own while the rest lives."""
    take, give = torch._C._cuda_cudaCachingAllocator_raw_alloc, torch._C._cuda_cudaCachingAllocator_raw_delete
    sizes = [512 * (1 + number % 3) for number in range(count)]
    started = time.thread_time()
    held = [take(size, 0) for size in sizes]
    made = time.thread_time() - started
    order = list(range(0, count, 2))
    random.Random(0).shuffle(order)
    started = time.thread_time()
    for number in order:
        give(held[number])
    again = {number: take(sizes[number], 0) for number in range(0, count, 2)}
    churned = time.thread_time() - started
    for number, address in again.items():
        held[number] = address
    placed = sorted(zip(held, sizes, strict=True))
    assert all(first + size <= second for (first, size), (second, _) in itertools.pairwise(placed)), "two blocks overlap"
    live = torch.cuda.memory_stats()["allocation.all.current"]
    assert live >= count, f"{live} blocks are live"
    for address in held:
        give(address)
    return {"made": made / count * 1e9, "churned": churned / (count / 2) * 1e9}


# --- traces ----------------------------------------------------------------------------------------------------------


def transformer(layers: int = 2, width: int = 128) -> Any:
    layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def training(checkpointed: bool = False) -> str:
    """Forward, backward and AdamW, a few steps; with ``checkpointed``, activations are computed again for the backward pass."""
    from torch.utils.checkpoint import checkpoint

    model = transformer().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for _ in range(4):
        hidden = torch.randn(8, 96, 128).cuda()
        for layer in model.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False) if checkpointed else layer(hidden)
        optimizer.zero_grad()
        hidden.square().mean().backward()
        optimizer.step()
    return "a transformer's training, activations computed again" if checkpointed else "a transformer's training"


def inference() -> str:
    """Sequences of many lengths, one after the other."""
    model = transformer().cuda().eval()
    lengths = [17 + 13 * (n * n % 29) for n in range(24)]
    with torch.no_grad():
        kept = [model(torch.randn(1 + n % 5, length, 128).cuda()).mean(dim=1) for n, length in enumerate(lengths)]
    assert len(kept) == len(lengths)
    return "a transformer's forward passes of many lengths"


def beams() -> str:
    """A small Llama writes with four beams, by transformers' own `generate`; without transformers, what its cache does."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        gathered()
        return "keys and values that are gathered as for beams (transformers is not installed)"
    sizes = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=256)).cuda().eval()
    prompts = torch.randint(3, 512, (2, 24)).cuda()
    with torch.no_grad():
        written = model.generate(prompts, num_beams=BEAMS, do_sample=False, min_new_tokens=24, max_new_tokens=24, pad_token_id=0)
    assert written.shape == (2, 48)
    return f"a small Llama's generate(num_beams={BEAMS})"


def gathered() -> None:
    """Keys and values that grow by a token per step, and are gathered anew for each choice of beams."""
    keys = [torch.zeros(4, 8, 1, 64).cuda() for _ in range(6)]
    for step in range(40):
        token = torch.randn(4, 8, 1, 64).cuda()
        order = torch.tensor([(step + n) % 4 for n in range(4)]).cuda()
        keys = [torch.cat([key, token], dim=2).index_select(0, order) for key in keys]


# Each says what it was.
WORKLOADS: dict[str, Callable[[], str]] = {
    "training": training,
    "checkpointed": lambda: training(checkpointed=True),
    "inference": inference,
    "beams": beams,
}


def record(name: str, file: Path) -> dict[str, Any]:
    """A workload's allocations in their order: ``+ number bytes`` and ``- number``."""
    torch.manual_seed(1)
    torch.empty(1, device="cuda")
    torch.cuda.memory._record_memory_history(max_entries=1_000_000, context=None)
    what = WORKLOADS[name]()
    [trace, *_] = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    lines, alive, count = [], {}, 0
    for event in trace:
        if event["action"] == "alloc":
            alive[event["addr"]] = count
            lines.append(f"+ {count} {event['size']}")
            count += 1
        elif event["action"] == "free_requested" and event["addr"] in alive:
            lines.append(f"- {alive.pop(event['addr'])}")
    file.write_text("\n".join(lines) + "\n")
    return {"allocations": count, "what": what}


def replay(file: Path, scale: int = 16) -> dict[str, float]:
    """Twice, so that the second is what a program that goes on would see. Sizes are ``scale`` times those of the small model."""
    take, give = torch._C._cuda_cudaCachingAllocator_raw_alloc, torch._C._cuda_cudaCachingAllocator_raw_delete
    steps = [(words[0], int(words[1]), int(words[2]) * scale if len(words) > 2 else 0) for words in map(str.split, file.read_text().splitlines())]
    seconds = []
    for _ in range(4):
        alive: dict[int, int] = {}
        started = time.perf_counter()
        for what, number, size in steps:
            if what == "+":
                alive[number] = take(size, 0)
            else:
                give(alive.pop(number))
        for each in alive.values():
            give(each)
        seconds.append(time.perf_counter() - started)
    stats = torch.cuda.memory_stats()
    peaks = {name: stats[f"{name}_bytes.all.peak"] for name in ("reserved", "allocated")}
    return {"first": seconds[0], "later": min(seconds[1:]), **peaks, "calls": len(steps)}


def run(command: str, *rest: str) -> dict[str, Any]:
    """One line of standard input."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if command == "pairs":
        return pairs(int(rest[0]), [int(size) for size in rest[1:]])
    if command == "empty":
        return empty(int(rest[0]), [int(size) for size in rest[1:]])
    if command == "threads":
        return threads(*(int(each) for each in rest))
    if command == "blocks":
        return blocks(int(rest[0]))
    if command == "record":
        return record(rest[0], Path(rest[1]))
    return replay(Path(rest[0]))


def main() -> None:
    if sys.argv[1] == "sire":
        import sire

        sire.use_allocator()
    torch.empty(1, device="cuda")
    for line in sys.stdin:
        print(json.dumps(run(*line.split())), flush=True)


if __name__ == "__main__":
    main()
