"""MLLM-HydraLoRA: one biased router for each feed-forward block, whose weights serve gate, up and down.

Source: Clin0212/HydraLoRA, MLLM-HydraLoRA (a LLaVA). The folder holds an ordinary PEFT LoRA for the attention, and in
`non_lora_trainables.bin` for each block ({mlp} ends in .mlp, p is gate, up or down)

    {mlp}.router.weight [E, d], .bias [E]    {mlp}.shared_LoRA_A_p [r, in]    {mlp}.moe_p.{i}.LoRA_B [out, r]

    w = softmax(router(x)) of the block's input x, for all three projections; s = lora_alpha / r
    dense_moe: all heads with their weights; otherwise the largest one alone, with weight 1

Down sees another input than the block, so its layer takes the logits that gate's layer leaves (`hydra_kernels.Carry`).

lora_alpha and dense_moe stand in moe_args.pth, which is a pickle of the training's arguments: never unpickled, its two
numbers are found among its opcodes. `moe_args.json` beside it is read instead where there is one:
{"lora_alpha": 16, "dense_moe": true, "language_model_only": true}.

The same file holds the projector of the images (mm_projector), which belongs to the base model: such a folder is
refused unless `language_model_only` says to serve the language model's part alone.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hydra_kernels import Carry, Layout

from hydraserve.adapters.config import AdapterConfig, read_config
from hydraserve.adapters.files import open_regular
from hydraserve.adapters.formats import lora
from hydraserve.adapters.formats.mixture import MixtureParts, expect, mixture_plan, numbered, required
from hydraserve.adapters.formats.plan import ModulePlan, group, matrix, widest
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.locate import ARGUMENTS_NAMES, OTHER_WEIGHTS_NAME
from hydraserve.adapters.tensors import TensorInfo
from hydraserve.errors import AdapterConfigError, UnsupportedFeatureError

NAME = "mllm-hydralora"
ARGS_JSON, ARGS_PICKLE = ARGUMENTS_NAMES
ARGS_FIELD = "moe_args"
_NUMBERS = ("lora_alpha", "dense_moe")
_TENSOR = re.compile(
    r"(?P<module>.+\.mlp)\."
    r"(?P<part>router\.weight|router\.bias|shared_LoRA_A_(?:gate|up|down)|moe_(?:gate|up|down)\.(?:0|[1-9]\d{0,8})\.LoRA_B)"
)
_PROJECTOR = ".mm_projector."


def is_mixture(names: Collection[str]) -> bool:
    """Whether these are the tensors of such blocks (and not only a projector's)."""
    return any(".shared_LoRA_A_" in name for name in names)


def recognise(config: AdapterConfig, names: Collection[str]) -> str | None:
    """Why this is MLLM-HydraLoRA, or None."""
    if config.fields.get("peft_type") != "LORA" or not is_mixture(names):
        return None
    return f"tensors mlp.router and shared_LoRA_A_gate, _up, _down in {OTHER_WEIGHTS_NAME}"


def with_arguments(config: AdapterConfig, folder: Path) -> AdapterConfig:
    """The configuration with the training's own numbers under `moe_args`.

    Raises AdapterConfigError when they are neither in moe_args.json nor found in moe_args.pth.
    """
    if (folder / ARGS_JSON).exists():
        found: Mapping[str, Any] = read_config(folder / ARGS_JSON, config.limits).fields
    else:
        found = _literals(folder / ARGS_PICKLE, config.limits) if (folder / ARGS_PICKLE).exists() else {}
    absent = [name for name in _NUMBERS if found.get(name) is None]
    if absent:
        raise AdapterConfigError(
            ARGS_JSON,
            got=f"no {' and no '.join(absent)} there or in {ARGS_PICKLE}",
            expected="the training's lora_alpha and dense_moe",
            fix=f'write {ARGS_JSON} beside the adapter: {{"lora_alpha": ..., "dense_moe": true}}',
        )
    return AdapterConfig({**config.fields, ARGS_FIELD: dict(found)}, config.limits)


def plan(config: AdapterConfig, infos: Mapping[str, TensorInfo]) -> dict[str, ModulePlan]:
    """Module path -> plan: attention first, then the blocks.

    Raises AdapterError's subclasses for whatever does not fit together.
    """
    arguments = AdapterConfig(config.fields[ARGS_FIELD], config.limits)
    attention = {name: info for name, info in infos.items() if ".lora_A." in name or ".lora_B." in name}
    plans = lora.plan(config, attention) if attention else {}
    rest = {name: info for name, info in infos.items() if name not in attention}
    projector = [name for name in rest if _PROJECTOR in name]
    if projector and not arguments.flag("language_model_only"):
        raise UnsupportedFeatureError(
            projector[0],
            got="the projector of the images, trained together with the adapter",
            expected="the language model's adapter alone",
            fix=f'write "language_model_only": true into {ARGS_JSON}, to serve the language model without images',
        )
    blocks = group([name for name in rest if name not in projector], _TENSOR)
    for path, parts in blocks.items():
        plans |= _block(arguments, infos, path, parts)
    return plans


def _block(
    arguments: AdapterConfig, infos: Mapping[str, TensorInfo], path: str, parts: Mapping[str, str]
) -> dict[str, ModulePlan]:
    router, bias = required(path, parts, "router.weight", "router.weight"), parts.get("router.bias")
    heads, _ = matrix(infos, router)
    arguments.limits.check(f"heads of {path}", heads, arguments.limits.heads)
    top_k = 0 if arguments.flag("dense_moe") else 1
    plans = {}
    for name in ("gate", "up", "down"):
        a = required(path, parts, f"shared_LoRA_A_{name}", f"shared_LoRA_A_{name}")
        rank, _ = matrix(infos, a)
        arguments.limits.check(f"rank of {path}", rank, arguments.limits.rank)
        scaling = float(arguments.number("lora_alpha")) / rank
        heads_of = {part.removesuffix(".LoRA_B"): tensor for part, tensor in parts.items() if part.endswith(".LoRA_B")}
        b = numbered(path, heads_of or parts, f"moe_{name}.", heads, f"moe_{name}.{{}}.LoRA_B")
        module = f"{path}.{name}_proj"
        if name == "down":
            plans[module] = _down(infos, a, b, rank, scaling, top_k)
            wide, narrow = plans[f"{path}.gate_proj"].out_features, plans[f"{path}.gate_proj"].in_features
            expect(infos, a, (rank, wide), "the columns being gate's outputs")
            expect(infos, b[0], (narrow, rank), "the rows being gate's inputs")
        else:
            carry = Carry.GIVES if name == "gate" else Carry.NONE
            found = MixtureParts((a,), b, router, bias)
            plans[module] = mixture_plan(infos, found, rank=rank, scaling=scaling, top_k=top_k, carry=carry)
            outputs = plans[f"{path}.gate_proj"].out_features
            expect(infos, b[0], (outputs, rank), "gate and up having as many outputs")
    return plans


def _down(
    infos: Mapping[str, TensorInfo], a: str, heads: tuple[str, ...], rank: int, scaling: float, top_k: int
) -> ModulePlan:
    _, in_features = matrix(infos, a)
    out_features, _ = matrix(infos, heads[0])
    for name in heads:
        expect(infos, name, (out_features, rank), "[out, r] by the first head and shared_LoRA_A_down")
    return ModulePlan(
        layout=Layout(rank, len(heads), top_k=0 if top_k >= len(heads) else top_k, carry=Carry.TAKES),
        scaling=scaling,
        in_features=in_features,
        out_features=out_features,
        dtype=widest(infos, (a, *heads)),
        a=(a,),
        heads=heads,
    )


def _literals(path: Path, limits: AdapterLimits) -> dict[str, int | float | bool]:
    """The numbers that a pickle of an object stores under the names in _NUMBERS; the pickle is read, not run.

    Raises AdapterConfigError when a name has several values, or for a file that is no pickle in a zip.
    """
    values: dict[str, set[int | float | bool]] = {}
    key: str | None = None
    try:
        for opcode, argument, _ in pickletools.genops(_pickle(path, limits)):
            if opcode.name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
                continue
            value = {"NEWTRUE": True, "NEWFALSE": False}.get(opcode.name, argument)
            if key is not None and isinstance(value, int | float):
                values.setdefault(key, set()).add(value)
            key = argument if isinstance(argument, str) and argument in _NUMBERS else None
    except Exception as error:  # pickletools and zipfile raise whatever a damaged file leads to
        raise _unreadable(str(error)) from error
    if several := [name for name, found in values.items() if len(found) > 1]:
        raise _unreadable(f"several values of {several[0]}")
    return {name: found.pop() for name, found in values.items()}


def _pickle(path: Path, limits: AdapterLimits) -> bytes:
    with open_regular(path) as file:
        if file.read(2) != b"PK":
            file.seek(0)
            return file.read(limits.config_bytes)
        with zipfile.ZipFile(file) as archive:
            entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
            limits.check(f"pickle in {path.name}", entry.file_size, limits.config_bytes, unit=" bytes")
            return archive.read(entry)


def _unreadable(reason: str) -> AdapterConfigError:
    return AdapterConfigError(
        ARGS_PICKLE,
        got=reason,
        expected="lora_alpha and dense_moe among the training's arguments",
        fix=f'write {ARGS_JSON} beside it: {{"lora_alpha": ..., "dense_moe": true}}',
    )
