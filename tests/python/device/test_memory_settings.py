"""The settings of `sire.memory`: those of its document, on its page, and refused by name where they make no sense."""

from __future__ import annotations

import re
from ast import literal_eval
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sire.memory import MemoryConfig

DOCUMENTED = {
    "gpu_offload_threshold": 0.85,
    "gpu_emergency_threshold": 0.95,
    "gpu_reload_threshold": 0.70,
    "cpu_offload_threshold": 0.90,
    "memory_check_interval": 0.1,
    "enable_cpu_offload": True,
    "enable_disk_offload": True,
    "compress_disk_cache": True,
    "eager_offload_on_wrap": True,
    "offload_1d_parameters": False,
    "max_disk_usage_gb": 50.0,
    "offload_batch_size": 10,
    "prefetch_enabled": True,
}
"""The seed's table."""


def test_defaults_are_those_of_the_document() -> None:
    config = MemoryConfig()
    assert {name: getattr(config, name) for name in DOCUMENTED} == DOCUMENTED
    assert all(type(getattr(config, name)) is type(value) for name, value in DOCUMENTED.items())


def test_the_page_says_what_every_setting_is() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "memory.md").read_text()
    rows = re.findall(r"^\| (`[a-z0-9_`, ]+) \| ([A-Za-z0-9.]+) \|", page, re.MULTILINE)
    said = {name: literal_eval(value) for names, value in rows for name in re.findall(r"`(\w+)`", names)}
    assert said == asdict(MemoryConfig())


def test_presets_are_on_both_sides_of_the_defaults() -> None:
    low, usual, high = MemoryConfig.for_low_memory(), MemoryConfig(), MemoryConfig.for_high_performance()
    for name in ("gpu_offload_threshold", "gpu_emergency_threshold", "gpu_reload_threshold", "cpu_offload_threshold"):
        assert getattr(low, name) < getattr(usual, name) < getattr(high, name)
    assert low.offload_batch_size > usual.offload_batch_size > high.offload_batch_size, "as the document advises"
    assert (low.max_disk_usage_gb, high.memory_check_interval) == (20.0, 0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 1.5) for name, value in DOCUMENTED.items() if isinstance(value, float) and value < 1),
        *((name, "yes") for name in DOCUMENTED),
        ("memory_check_interval", 0),
        ("offload_batch_size", 0),
        ("offload_batch_size", 2.5),
        ("max_disk_usage_gb", -1.0),
        ("vram_cap_gb", 0),
        ("disk_cache_dir", 3),
        ("gpu_reload_threshold", 0.86),
        ("gpu_offload_threshold", 0.96),
        ("cpu_offload_threshold", 0.99),
        ("prediction_window", 0),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    if field == "memory_check_interval" and value == 1.5:
        return
    with pytest.raises(ValueError, match=field):
        MemoryConfig(**{field: value})


def test_each_threshold_may_be_as_high_as_the_next_one() -> None:
    for low, high in (
        ("gpu_reload", "gpu_offload"),
        ("gpu_offload", "gpu_emergency"),
        ("cpu_offload", "cpu_emergency"),
    ):
        value = getattr(MemoryConfig(), f"{high}_threshold")
        assert getattr(MemoryConfig(**{f"{low}_threshold": value}), f"{low}_threshold") == value
