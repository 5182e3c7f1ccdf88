"""Checks of what only becomes known late: gathered tensors, finite values, the base model's own sizes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hydraserve.adapters.tensors import TensorInfo
from hydraserve.adapters.weights import AdapterSummary, HydraAdapter
from hydraserve.errors import BaseMismatchError, BaseShapeError, EmptyTensorError, NonFiniteError

_HOW_TO_GATHER = (
    "this was saved under DeepSpeed ZeRO-3 (or FSDP) without gathering the parameters: a checkpoint-N folder of the "
    "run may hold them gathered in pytorch_model.bin, so copy that file here as adapter_model.bin; or save again "
    "inside deepspeed.zero.GatheredParameters(model.parameters())"
)


def check_gathered(infos: Mapping[str, TensorInfo]) -> None:
    """Raises EmptyTensorError when tensors were saved from a process that did not hold them."""
    empty = [name for name, info in infos.items() if 0 in info.shape]
    if empty:
        raise EmptyTensorError(
            empty[0],
            got=f"shape {list(infos[empty[0]].shape)} ({len(empty)} of {len(infos)} tensors are empty)",
            expected="the whole tensor",
            fix=_HOW_TO_GATHER,
        )


def check_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises NonFiniteError when a tensor, which must not be empty, holds a NaN or an infinity."""
    low, high = torch.aminmax(tensor)  # a NaN wins both; unlike isfinite(tensor), it needs no memory
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = tensor[~torch.isfinite(tensor)]
        raise NonFiniteError(
            name,
            got=f"{bad[0].item()} ({bad.numel()} of {tensor.numel()} values are not finite)",
            expected="finite values",
            fix="the training diverged or the file is damaged: take an earlier checkpoint",
        )


def check_range(adapter: HydraAdapter, dtype: torch.dtype) -> None:
    """Raises NonFiniteError when a number of the adapter is infinite in the engine's dtype: float16 ends at 65,504."""
    largest = torch.finfo(dtype).max
    for path, weights in adapter.modules.items():
        factor = max(1.0, abs(weights.scaling))  # B counts as it is and with its scaling, as it lies in the slot
        for name, tensor, times in (("A", weights.a, 1.0), ("router", weights.router, 1.0), ("B", weights.b, factor)):
            if tensor is None:
                continue
            low, high = torch.aminmax(tensor)
            size = max(-low.item(), high.item()) * times
            if size > largest:
                raise NonFiniteError(
                    f"{name} of {path}",
                    got=f"values up to {size:.3g}" + (f", {times:.3g} being the scaling" if times > 1 else ""),
                    expected=f"at most {largest:.6g}, the largest number of {str(dtype).removeprefix('torch.')}",
                    fix="serve with --dtype bfloat16 or float32, or check that the training converged",
                )


def check_base(adapter: HydraAdapter | AdapterSummary, base_shapes: Mapping[str, tuple[int, int]]) -> None:
    """Whether a base model has every module of the adapter, in the same size.

    base_shapes: path of every linear layer of the base model -> (in_features, out_features).

    Raises BaseMismatchError for a module that the base does not have, BaseShapeError for one of another size.
    """
    absent = [path for path in adapter.modules if path not in base_shapes]
    if absent:
        last = absent[0].rpartition(".")[2]
        alike = next((path for path in base_shapes if path.rpartition(".")[2] == last), None)
        raise BaseMismatchError(
            f"module {absent[0]}",
            got=f"weights for it{_others(absent)}",
            expected=f"a linear layer of the base model{f', such as {alike}' if alike else ''}; it has no such layer",
            fix=_right_base(adapter),
        )
    wrong = [
        path
        for path, module in adapter.modules.items()
        if base_shapes[path] != (module.in_features, module.out_features)
    ]
    if wrong:
        module = adapter.modules[wrong[0]]
        in_features, out_features = base_shapes[wrong[0]]
        raise BaseShapeError(
            f"module {wrong[0]}",
            got=f"weights for {module.in_features} inputs and {module.out_features} outputs{_others(wrong)}",
            expected=f"{in_features} inputs and {out_features} outputs, as the base model has",
            fix=_right_base(adapter),
        )


def _others(paths: list[str]) -> str:
    return f" (and {len(paths) - 1} more such modules)" if len(paths) > 1 else ""


def _right_base(adapter: HydraAdapter | AdapterSummary) -> str:
    trained_on = f"; it says it was trained on {adapter.base_model}" if adapter.base_model else ""
    return f"serve the adapter on the base model it was trained on{trained_on}"
