"""Probe, reserve, train: finds out what a job needs, reserves that much of the GPU among all processes of the machine, and runs it.

Start it twice at once: the second waits for its turn where both do not fit. Without a GPU it just trains.
"""

from __future__ import annotations

import time

import torch
from sire.torchtools import get_device_from_env, make_probe_fn, reserve_gpu_for_training, run_training_with_reservation

MIB = 1024**2


def make_model() -> torch.nn.Module:
    """A model for the probe: anything importable will do."""
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 30 * 30, 10))


def train(steps: int = 5) -> float:
    """Training as one likes it; it knows nothing of reservations."""
    torch.manual_seed(0)
    device = get_device_from_env()
    model = make_model().to(device)
    batch = torch.randn(16, 3, 32, 32).to(device)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = torch.zeros(())
    for step in range(steps):
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")
    return loss.item()


def main() -> None:
    """Both ways."""
    probe_fn = make_probe_fn(make_model, input_shape=(16, 3, 32, 32), forward_and_backward=True)
    begun = time.perf_counter()
    reserve = {"safety_margin_bytes": 20 * MIB, "timeout": 200}
    run_training_with_reservation(train, train_args=(5,), probe_fn=probe_fn, reserve_kwargs=reserve)
    print(f"probed, reserved and trained in {time.perf_counter() - begun:.1f} s")

    with reserve_gpu_for_training(training_reserved_bytes=64 * MIB, safety_margin_bytes=0, timeout=200) as reservation:
        print(f"{reservation.reserved_bytes // MIB} MiB reserved, behind the fence of kind {reservation.fence}")
        train(2)


if __name__ == "__main__":
    main()
