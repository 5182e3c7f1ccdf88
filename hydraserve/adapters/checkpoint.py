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
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from hydraserve.adapters.config import AdapterConfig, read_config
from hydraserve.adapters.formats import (
    hydralora,
    lease,
    lora,
    loramoe,
    mllm,
    moe_peft,
    molora,
    peft,
    peft_fork,
    transposed,
)
from hydraserve.adapters.formats.plan import ModulePlan
from hydraserve.adapters.formats.relatives import refuse_companions, refuse_unrecognised
from hydraserve.adapters.limits import DEFAULT_LIMITS, AdapterLimits
from hydraserve.adapters.locate import OTHER_WEIGHTS_NAME, AdapterFiles, locate
from hydraserve.adapters.save import save_adapter, save_hydralora, save_lora
from hydraserve.adapters.tensors import JoinedFiles, TensorFile, TensorInfo, open_tensors
from hydraserve.adapters.validate import check_base, check_finite, check_gathered
from hydraserve.adapters.weights import AdapterSummary, HydraAdapter, HydraWeights
from hydraserve.errors import AdapterError, AdapterFormatError

__all__ = [
    "DEFAULT_LIMITS",
    "AdapterLimits",
    "AdapterSummary",
    "HydraAdapter",
    "check_base",
    "inspect_adapter",
    "load_adapter",
    "save_adapter",
    "save_hydralora",
    "save_lora",
]

logger = logging.getLogger(__name__)


class Format(Protocol):
    """One file format of adapters; see the top of this file."""

    NAME: str

    def recognise(self, config: AdapterConfig, names: Collection[str]) -> str | None: ...
    def plan(self, config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]: ...


FORMATS: tuple[Format, ...] = (hydralora, peft, lora, loramoe, lease, moe_peft, peft_fork, transposed, molora, mllm)


def load_adapter(path: Path | str, *, limits: AdapterLimits = DEFAULT_LIMITS) -> HydraAdapter:
    """Read an adapter: its folder, or the folder (or a checkpoint) of the training run that made it.

    The weights come as they are stored (on the CPU; within a module all in the type that holds each of its tensors
    exactly), finite, and of shapes that agree with one another. Against a base model: `check_base`.

    Raises AdapterError's subclasses; `where` names the path.
    """
    path = Path(path)
    with _naming(path):
        summary, plans, file = _open(path, limits)
        modules = _build(plans, file.load())
        return HydraAdapter.of(modules, format=summary.format, base_model=summary.base_model, source=summary.source)


def inspect_adapter(path: Path | str, *, limits: AdapterLimits = DEFAULT_LIMITS) -> AdapterSummary:
    """Format, sizes and modules of an adapter, from its config and the header of its tensor file alone.

    Raises what `load_adapter` raises, but for what only the weights themselves can show (NonFiniteError, damaged data).
    """
    path = Path(path)
    with _naming(path):
        return _open(path, limits)[0]


def _open(path: Path, limits: AdapterLimits) -> tuple[AdapterSummary, dict[str, ModulePlan], TensorFile | JoinedFiles]:
    files = locate(path)
    if files.note:
        logger.info("adapter %s: %s", path, files.note)
    config, file = _read(files, limits)
    check_gathered(file.infos)
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


def _read(files: AdapterFiles, limits: AdapterLimits) -> tuple[AdapterConfig, TensorFile | JoinedFiles]:
    """The configuration and the tensors, those in a second file included."""
    config, file = read_config(files.config, limits), open_tensors(files.weights, limits)
    companion = files.folder / OTHER_WEIGHTS_NAME
    if companion.exists() and mllm.is_mixture((second := open_tensors(companion, limits)).infos):
        return mllm.with_arguments(config, files.folder), JoinedFiles(file, second)
    refuse_companions(files.folder)
    return config, file


def _build(plans: Mapping[str, ModulePlan], tensors: dict[str, torch.Tensor]) -> dict[str, HydraWeights]:
    """The modules' weights; each tensor is let go when no later module needs it."""
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    uses = Counter(name for plan in plans.values() for name in set(plan.names()))
    modules = {}
    for module, plan in plans.items():
        names = set(plan.names())
        # A tensor that a later module shares is copied: each module owns its memory.
        modules[module] = plan.build({n: tensors[n].clone() if uses[n] > 1 else tensors[n] for n in names})
        for name in names:
            uses[name] -= 1
            if not uses[name]:
                del tensors[name]
    return modules


def _recognise(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> tuple[Format, str]:
    """The one format that recognises the folder, and why it does."""
    reasons = [(format, reason) for format in FORMATS if (reason := format.recognise(config, infos))]
    if len(reasons) == 1:
        return reasons[0]
    if reasons:
        got = "; or ".join(f"{format.NAME} ({reason})" for format, reason in reasons)
        raise AdapterFormatError("format", got=got, expected="one format", fix="remove what does not belong to it")
    refuse_unrecognised(config, infos)
    sample = ", ".join(list(infos)[:3]) or "no tensors"
    raise AdapterFormatError(
        "format",
        got=f"peft_type {config.peft_type!r} with {sample}",
        expected="a format that docs/formats.md lists, such as LoRA as PEFT saves it (peft_type 'LORA')",
        fix="check that this is the adapter you mean",
    )


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in any error which adapter it is about."""
    try:
        yield
    except AdapterError as error:
        error.where = error.where or f"adapter {path}"
        raise
