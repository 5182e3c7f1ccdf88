"""Step metadata: from vLLM's token -> adapter mapping to `hydra_kernels.StepMetadata`, once per step."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from hydra_kernels import StepMetadata
from vllm.lora.layers import LoRAMapping

from hydraserve.engine.layers import carried_heads


class PunicaWrapper(Protocol):
    """What our layers need of the wrapper that vLLM hands to every LoRA layer of a model."""

    step: StepMetadata
    native_layers: bool


def with_step_metadata(base: type) -> type:
    """A subclass of the platform's wrapper that also keeps a `StepMetadata`.

    `native_layers` says whether the model has LoRA layers that are vLLM's own (embeddings, lm_head, experts):
    only then is vLLM's metadata computed too, which costs a Python loop over the tokens of each step.
    """

    class HydraPunicaWrapper(base):  # type: ignore[misc]
        def __init__(
            self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
        ) -> None:
            super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
            slots = kwargs["lora_config"].max_loras
            self.step = StepMetadata(max_num_batched_tokens, slots, device, carried_heads())
            self.native_layers = True

        def update_metadata(
            self,
            mapping: LoRAMapping,
            lora_index_to_id: list[int | None],
            max_loras: int,
            vocab_size: int,
            **kwargs: Any,
        ) -> None:
            if self.native_layers:
                super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
            self.step.update(token_slots(mapping, lora_index_to_id))

    HydraPunicaWrapper.__name__ = f"Hydra{base.__name__}"
    return HydraPunicaWrapper


def token_slots(mapping: LoRAMapping, lora_index_to_id: list[int | None]) -> np.ndarray:
    """[tokens] slot of each token, -1 for the base model; vLLM's adapter ids start at 1, 0 is the base."""
    ids = np.asarray(mapping.index_mapping, dtype=np.int64)
    slots = np.full(ids.shape, -1, dtype=np.int32)
    for slot, adapter_id in enumerate(lora_index_to_id):
        if adapter_id is not None:
            slots[ids == adapter_id] = slot
    return slots
