"""Fifty rounds of generate, pause, train, resume: addresses stay, and nothing grows."""

from __future__ import annotations

import sire
import torch
from measure import MIB, device_blocks, device_used, host_used, open_files, region_bytes

ROUNDS = 50


def test_an_rl_loop_has_constant_addresses_and_does_not_grow(tag: str) -> None:
    torch.manual_seed(0)
    with sire.region(f"{tag}/weights", backup="cpu"):
        actor = torch.nn.Linear(512, 512, bias=False).cuda()
    with sire.region(f"{tag}/cache"):
        cache = torch.zeros(8 * MIB, device="cuda")
    prompt = torch.randn(16, 512, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), sire.cuda_graph(graph, tag=f"{tag}/graph"):
        output = torch.tanh(actor(prompt)) * 2
    with sire.region(f"{tag}/trainer", backup="cpu"):
        trainer = torch.nn.Linear(512, 512, bias=False).cuda()
        optimizer = torch.optim.SGD(trainer.parameters(), lr=0.1, momentum=0.9)
    sire.pause(f"{tag}/trainer")

    reference = torch.nn.Linear(512, 512, bias=False)
    figures = []
    addresses = set()
    with torch.no_grad():
        reference.weight.copy_(actor.weight.cpu())
    for _ in range(ROUNDS):
        graph.replay()
        with torch.no_grad():
            assert torch.equal(output, torch.tanh(actor(prompt)) * 2)
            cache.fill_(1)
        weights = actor.weight.detach().cpu()
        for part in ("weights", "cache", "graph"):
            sire.pause(f"{tag}/{part}")
        sire.resume(f"{tag}/trainer")
        loss = trainer(prompt).square().mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        updated = trainer.weight.detach().cpu()
        sire.pause(f"{tag}/trainer")
        for part in ("weights", "cache", "graph"):
            sire.resume(f"{tag}/{part}")
        assert torch.equal(actor.weight.detach().cpu(), weights)
        with torch.no_grad():
            actor.weight.copy_(updated)
        addresses.add((actor.weight.data_ptr(), cache.data_ptr(), output.data_ptr(), trainer.weight.data_ptr()))
        figures.append((device_used(), host_used(), open_files(), device_blocks()))
    assert len(addresses) == 1
    settled, last = figures[ROUNDS // 5], figures[-1]
    assert last[0] <= settled[0]
    # A backup that leaks would grow by 3 MiB in every round; the allocator of the host wavers by a few MiB.
    assert last[1] - settled[1] < 12 * MIB
    assert last[2] <= settled[2]
    if last[3] is not None:
        # The kernel's count of the device's memory, in which nobody can hide a page.
        assert settled[3] is not None
        assert last[3] <= settled[3]
        held = {round_[3] for round_ in figures[ROUNDS // 5 :]}
        assert len(held) == 1, f"device memory wavers between rounds: {held}"
        resident = sum(region_bytes(f"{tag}/{part}")["resident_bytes"] for part in ("weights", "cache", "graph"))
        assert last[3] >= resident > 0
