"""Random damage to good folders: an adapter that is refused, or one that is whole; nothing else ever comes out."""

from __future__ import annotations

import contextlib
import json
import random
from pathlib import Path

import pytest
import torch
from adapter_folders import CONFIG, hydra_tensors, write

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import AdapterError

CASES = 100


def read(folder: Path) -> HydraAdapter | None:
    """None: refused, with a message of sensible length. Any exception that is not ours fails the test."""
    with contextlib.suppress(AdapterError):
        inspect_adapter(folder)
    adapter, message = None, ""
    try:
        adapter = load_adapter(folder)
    except AdapterError as error:
        message = str(error)
    if adapter is None:
        assert f"adapter {folder}: " in message
        assert len(message) < 3000
        return None
    for weights in adapter.modules.values():
        for tensor in (weights.a, weights.b, weights.router):
            assert tensor is not None
            assert torch.isfinite(tensor).all()
    return adapter


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, or with a few bytes flipped, overwritten, removed or doubled."""
    result = bytearray(data)
    kind = rng.choice(["cut", "flip", "overwrite", "remove", "double"])
    start = rng.randrange(len(result))
    length = rng.randrange(1, 64)
    if kind == "cut":
        return bytes(result[:start])
    if kind == "flip":
        for _ in range(rng.randrange(1, 4)):
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        result[start : start + length] = rng.randbytes(length)
    elif kind == "remove":
        del result[start : start + length]
    else:
        result[start:start] = result[start : start + length]
    return bytes(result)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_random_damage(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, CONFIG, hydra_tensors(), binary=name.endswith(".bin"))
    good, digest = (folder / name).read_bytes(), load_adapter(folder).digest
    rng = random.Random(name)
    refused = 0
    for _ in range(CASES):
        bad = damaged(good, rng)
        (folder / name).write_bytes(bad)
        adapter = read(folder)
        refused += adapter is None
        if adapter is not None and name.endswith(".bin"):
            assert adapter.digest == digest, "a checksum protects every byte of the weights"
    assert refused > CASES // 3
    (folder / name).write_bytes(good)
    assert read(folder) is not None


def test_random_values_in_the_config(tmp_path: Path) -> None:
    rng = random.Random(0)
    odd = [None, True, False, 0, -1, 1, 3, 4, 2**63, 1e308, "", "x", "LORA", [], [1], ["q_proj"], {}, {"a": 1}]
    fields = [*CONFIG, "rank_pattern", "lora_nums_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"]
    folder = write(tmp_path)
    for _ in range(CASES):
        config = {**CONFIG, **{rng.choice(fields): rng.choice(odd) for _ in range(rng.randrange(1, 3))}}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        read(folder)


def test_random_changes_of_the_tensors(tmp_path: Path) -> None:
    """Renamed, dropped, resized or swapped tensors."""
    rng = random.Random(1)
    good = hydra_tensors()
    names = list(good)
    loaded = 0
    for i in range(CASES):
        tensors = dict(good)
        name, other = rng.sample(names, 2)
        change = rng.choice(["rename", "drop", "resize", "swap", "transpose"])
        if change == "rename":
            old, new = rng.choice([("lora_", "lora"), ("B1", "B4"), (".mlp", ""), ("weight", "bias"), ("0", "7")])
            tensors[name.replace(old, new)] = tensors.pop(name)
        elif change == "drop":
            del tensors[name]
        elif change == "resize":
            tensors[name] = torch.ones(rng.randrange(1, 30), rng.randrange(1, 30))
        elif change == "swap":
            tensors[name], tensors[other] = tensors[other], tensors[name]
        else:
            tensors[name] = tensors[name].T
        loaded += read(write(tmp_path, CONFIG, tensors, binary=i % 2 == 0)) is not None
        for path in tmp_path.glob("adapter_model.*"):
            path.unlink()
    assert loaded < CASES // 3
