"""From a folder on disk to an adapter, and back.

    path -> locate (two files) -> config, tensor names and shapes -> a format's plan -> weights -> HydraAdapter
             `------------------ inspect_adapter stops here ------------------'

Everything up to the plan is checked before memory for the weights is taken. A format is a module in `formats` with

    NAME: str
    recognise(config, names) -> str | None       why the folder is of this format; by content, never by its name
    plan(config, infos) -> {module path: ModulePlan}
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from hydraserve.adapters.config import AdapterConfig, read_config
from hydraserve.adapters.formats import hydralora, lora
from hydraserve.adapters.formats.plan import ModulePlan
from hydraserve.adapters.formats.relatives import refuse_relatives
from hydraserve.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from hydraserve.adapters.locate import AdapterFiles, locate
from hydraserve.adapters.tensors import TensorFile, TensorInfo, open_tensors
from hydraserve.adapters.weights import AdapterSummary, HydraAdapter
from hydraserve.errors import AdapterError, AdapterFormatError, EmptyTensorError, NonFiniteError

__all__ = ["DEFAULT_LIMITS", "AdapterLimits", "AdapterSummary", "HydraAdapter", "inspect_adapter", "load_adapter"]

logger = logging.getLogger(__name__)


class Format(Protocol):
    """One file format of adapters; see the top of this file."""

    NAME: str

    def recognise(self, config: AdapterConfig, names: Collection[str]) -> str | None: ...
    def plan(self, config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]: ...


_HOW_TO_GATHER = (
    "this was saved under DeepSpeed ZeRO-3 (or FSDP) without gathering the parameters: a checkpoint-N folder of the "
    "run may hold them gathered in pytorch_model.bin, so copy that file here as adapter_model.bin; or save again inside "
    "deepspeed.zero.GatheredParameters(model.parameters())"
)

FORMATS: tuple[Format, ...] = (hydralora, lora)


def load_adapter(path: Path | str, *, limits: AdapterLimits = DEFAULT_LIMITS) -> HydraAdapter:
    """Read an adapter: its folder, or the folder (or a checkpoint) of the training run that made it.

    The weights come as they are stored (on the CPU, float32, bfloat16, ...; within a module all in the widest type of
    its tensors), finite, and of shapes that agree with one another. Against a base model: `check_base`.

    Raises AdapterError's subclasses; `where` names the path.
    """
    path = Path(path)
    with _naming(path):
        summary, plans, file = _open(path, limits)
        tensors = file.load()
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
        modules = {module: plan.build(tensors) for module, plan in plans.items()}
        return HydraAdapter.of(modules, format=summary.format, base_model=summary.base_model, source=summary.source)


def inspect_adapter(path: Path | str, *, limits: AdapterLimits = DEFAULT_LIMITS) -> AdapterSummary:
    """Format, sizes and modules of an adapter, from its config and the header of its tensor file alone.

    Raises what `load_adapter` raises, but for what only the weights themselves can show (NonFiniteError, damaged data).
    """
    path = Path(path)
    with _naming(path):
        return _open(path, limits)[0]


def _open(path: Path, limits: AdapterLimits) -> tuple[AdapterSummary, dict[str, ModulePlan], TensorFile]:
    files = locate(path)
    if files.note:
        logger.info("adapter %s: %s", path, files.note)
    config = read_config(files.config, limits)
    file = open_tensors(files.weights, limits)
    _check_gathered(files, file.infos)
    format, reason = _recognise(config, file.infos)
    plans = format.plan(config, file.infos)
    summary = AdapterSummary(
        format=format.NAME,
        reason=reason,
        modules={module: plan.summary() for module, plan in plans.items()},
        base_model=config.base_model,
        nbytes=sum(file.infos[name].nbytes for plan in plans.values() for name in plan.names()),
        source=files.folder,
        weights_file=files.weights,
        note=files.note,
    )
    return summary, plans, file


def _recognise(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> tuple[Format, str]:
    """The one format that recognises the folder, and why it does."""
    refuse_relatives(config, infos)
    reasons = [(format, reason) for format in FORMATS if (reason := format.recognise(config, infos))]
    if len(reasons) == 1:
        return reasons[0]
    sample = ", ".join(list(infos)[:3]) or "no tensors"
    if reasons:
        got = "; or ".join(f"{format.NAME} ({reason})" for format, reason in reasons)
        raise AdapterFormatError("format", got=got, expected="one format", fix="remove what does not belong to it")
    raise AdapterFormatError(
        "format",
        got=f"peft_type {config.peft_type!r} with {sample}",
        expected="HydraLoRA in the authors' layout, or LoRA as PEFT saves it (peft_type 'LORA')",
        fix="check that this is the adapter you mean",
    )


def _check_gathered(files: AdapterFiles, infos: Mapping[str, TensorInfo]) -> None:
    """Raises EmptyTensorError when tensors were saved from a rank that did not hold them."""
    empty = [name for name, info in infos.items() if 0 in info.shape]
    if empty:
        shape = list(infos[empty[0]].shape)
        raise EmptyTensorError(
            empty[0],
            got=f"shape {shape} in {files.weights.name} ({len(empty)} of {len(infos)} such tensors)",
            expected="the whole tensor",
            fix=_HOW_TO_GATHER,
        )


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    low, high = torch.aminmax(tensor)  # NaN wins both; needs no second tensor as isfinite does
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = tensor[~torch.isfinite(tensor)]
        raise NonFiniteError(
            name,
            got=f"{bad[0].item()} ({bad.numel()} of {tensor.numel()} values are not finite)",
            expected="finite values",
            fix="the training diverged: take an earlier checkpoint",
        )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in any error which adapter it is about."""
    try:
        yield
    except AdapterError as error:
        error.where = error.where or f"adapter {path}"
        raise
