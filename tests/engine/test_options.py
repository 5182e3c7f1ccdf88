"""What the command line hands to the workers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hydra_kernels import SlotCapacity

from hydraserve.engine.options import EngineOptions, default_capacity, legal_max_rank


def test_options_survive_vllms_additional_config() -> None:
    options = EngineOptions(SlotCapacity(rows=20, k=96, heads=6))
    config = SimpleNamespace(additional_config=json.loads(json.dumps(options.to_config())))
    assert EngineOptions.from_vllm_config(config) == options


def test_without_our_command_line_the_largest_rank_sets_the_capacity() -> None:
    config = SimpleNamespace(additional_config={}, lora_config=SimpleNamespace(max_lora_rank=32))
    assert EngineOptions.from_vllm_config(config).capacity == default_capacity(32)


@pytest.mark.parametrize(("rank", "legal"), [(1, 1), (2, 8), (8, 8), (24, 32), (300, 320), (4000, 512)])
def test_legal_rank_is_the_next_that_vllm_takes(rank: int, legal: int) -> None:
    assert legal_max_rank(rank) == legal
