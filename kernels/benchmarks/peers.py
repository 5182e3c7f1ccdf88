"""What the kernels are measured against: vLLM's LoRA kernels, and the layer of HydraLoRA's authors.

vLLM's kernels are taken from its own files, without importing vLLM: five files of `vllm/lora/ops/triton_ops`, and
stand-ins for the little that they import from the rest.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from hydra_kernels.slots import StackedSlots
from hydra_kernels.tuning.shapes import LayerShape
from hydra_kernels.weights import HydraWeights

VLLM_FILES = Path("lora/ops/triton_ops")


def find_vllm() -> Path | None:
    """The folder with vLLM's Triton LoRA files, where vLLM is installed for this Python."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / VLLM_FILES
    return folder if (folder / "lora_shrink_op.py").is_file() else None


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def load_vllm(folder: Path) -> SimpleNamespace:
    """vLLM's `lora_shrink`, `lora_expand` and `LoRAKernelMeta`, with vLLM's defaults (one stream, no tuned folder).

    Not for a process that uses vLLM itself: its modules are replaced by stand-ins.
    """
    import triton
    import triton.language as tl

    logger = logging.getLogger("vllm")
    logger.warning_once = logger.info_once = logger.debug  # type: ignore[attr-defined]
    flags = {"VLLM_BATCH_INVARIANT": False, "VLLM_LORA_ENABLE_DUAL_STREAM": False, "VLLM_TUNED_CONFIG_FOLDER": None}
    _stand_in("vllm")
    _stand_in("vllm.envs", **flags)
    _stand_in("vllm.logger", init_logger=lambda _: logger)
    _stand_in("vllm.platforms", current_platform=SimpleNamespace(is_cuda=lambda: False))  # asked for the second stream
    _stand_in("vllm.triton_utils", tl=tl, triton=triton)
    _stand_in("vllm.utils")
    _stand_in("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    _stand_in("vllm.utils.torch_utils", async_tensor_h2d=torch.tensor, direct_register_custom_op=_not_registered)
    for package in ("vllm.lora", "vllm.lora.ops", "vllm.lora.ops.triton_ops"):
        _stand_in(package)
    sys.modules["vllm.lora.ops.triton_ops"].__path__ = [str(folder)]
    names = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata")
    shrink, expand, meta = (importlib.import_module(f"vllm.lora.ops.triton_ops.{name}") for name in names)
    return SimpleNamespace(shrink=shrink.lora_shrink, expand=expand.lora_expand, meta=meta.LoRAKernelMeta)


def _not_registered(**_: Any) -> None:
    raise AttributeError  # then vLLM's files offer the plain function


class VllmPair:
    """vLLM's lora_shrink and lora_expand, as its layers call them, for plain LoRA of one rank in every slot."""

    def __init__(self, ops: SimpleNamespace, held: StackedSlots, rank: int) -> None:
        """held: one-headed adapters of this rank without a router, whose weights are taken over."""
        self.ops, self.rank, slots = ops, rank, held.num_slots
        bounds = held.slice_start.tolist()
        self.a = tuple(held.a[:, i : i + 1, :rank].contiguous() for i in range(len(held.out_slices)))
        self.b = tuple(
            held.b[:, begin:end, :rank].reshape(slots, 1, end - begin, rank).contiguous()
            for begin, end in pairwise(bounds)
        )

    def prepare(self, token_slots: Sequence[int]) -> None:
        """Once per step."""
        device = self.a[0].device
        self.meta = self.ops.meta.make(self.a[0].shape[0], len(token_slots), device)
        self.meta.prepare_tensors(torch.tensor(list(token_slots), dtype=torch.int32, device=device))

    def add_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += delta."""
        step = self.meta.meta_args(x.shape[0], False)
        z = torch.empty(len(self.a), x.shape[0], self.rank, dtype=torch.float32, device=x.device)
        self.ops.shrink(x, self.a, z, *step, 1.0)
        self.ops.expand(z, self.b, y, *step, 0, True)


class AuthorsLayer:
    """The layer of HydraLoRA's authors, head by head in torch, for each adapter of the batch after the other.

    Their code serves one adapter; to several it is taken group by group.
    """

    def __init__(self, shape: LayerShape, adapters: Sequence[Sequence[HydraWeights]]) -> None:
        self.shape, self.adapters = shape, adapters

    def prepare(self, token_slots: Sequence[int]) -> None:
        """Once per step."""
        device = self.adapters[0][0].a.device
        slots = torch.tensor(list(token_slots), device=device)
        self.rows = [(adapter, (slots == i).nonzero()[:, 0]) for i, adapter in enumerate(self.adapters)]

    def add_(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """y += delta."""
        for adapter, rows in self.rows:
            group, start = x[rows], 0
            for weights, out in zip(adapter, self.shape.out_slices, strict=True):
                assert weights.router is not None, "the authors' layer has a router"
                result = y[rows, start : start + out]
                route = torch.softmax(group @ weights.router.T, dim=-1, dtype=torch.float32).to(result.dtype)
                for i, b in enumerate(weights.b):
                    result = result + route[:, i, None] * ((group @ weights.a.T) @ b.T) * weights.scaling
                y[rows, start : start + out] = result
                start += out
