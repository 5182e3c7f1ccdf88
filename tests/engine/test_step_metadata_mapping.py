"""From vLLM's adapter ids per token to slots."""

from __future__ import annotations

from vllm.lora.layers import LoRAMapping

from hydraserve.engine.punica import token_slots


def test_ids_become_slots_and_the_base_is_minus_one() -> None:
    mapping = LoRAMapping(index_mapping=(7, 7, 0, 3, 0, 9), prompt_mapping=(7, 3), is_prefill=True)
    assert token_slots(mapping, [3, None, 7, 9]).tolist() == [2, 2, -1, 0, -1, 3]


def test_an_id_without_a_slot_is_computed_by_the_base() -> None:
    mapping = LoRAMapping(index_mapping=(5,), prompt_mapping=(5,), is_prefill=True)
    assert token_slots(mapping, [None, 2]).tolist() == [-1]
