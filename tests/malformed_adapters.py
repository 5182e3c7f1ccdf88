"""Adapters that must be refused: faulty variants of a good one, as many as wanted, the same ones for the same seed."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

Tensors = dict[str, torch.Tensor]
CONFIG, SAFETENSORS, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Good:
    """A good adapter's configuration and tensors, and how to write them."""

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        self.tensors: Tensors = torch.load(folder / BIN, weights_only=True)

    def copy(self) -> Tensors:
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


def write(folder: Path, config: bytes | dict[str, Any], tensors: Tensors | None, binary: bool) -> Path:
    """An adapter's folder; returns the file of tensors."""
    folder.mkdir()
    (folder / CONFIG).write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    weights = folder / (BIN if binary else SAFETENSORS)
    if tensors is not None and binary:
        torch.save(tensors, weights)
    elif tensors is not None:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
    return weights


Fault = Callable[[Path, Good, random.Random], None]


def truncated(folder: Path, good: Good, rng: random.Random) -> None:
    weights = write(folder, good.config, good.tensors, rng.random() < 0.5)
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * rng.random() * 0.99)])


def extended(folder: Path, good: Good, rng: random.Random) -> None:
    weights = write(folder, good.config, good.tensors, False)
    weights.write_bytes(weights.read_bytes() + rng.randbytes(rng.randint(1, 5000)))


def flipped_header(folder: Path, good: Good, rng: random.Random) -> None:
    """One bit of what describes the tensors. (A bit of the weights themselves only makes another adapter.)"""
    weights = write(folder, good.config, good.tensors, False)
    data = bytearray(weights.read_bytes())
    place = rng.randrange(8 + int.from_bytes(data[:8], "little"))
    data[place] ^= 1 << rng.randrange(8)
    weights.write_bytes(data)


def overwritten(folder: Path, good: Good, rng: random.Random) -> None:
    """A run of random bytes over the header of safetensors, or over the end of a zip, where its directory is."""
    binary = rng.random() < 0.5
    weights = write(folder, good.config, good.tensors, binary)
    data = bytearray(weights.read_bytes())
    count = rng.randint(64, 200)
    place = len(data) - count if binary else rng.randrange(8, 400)
    data[place : place + count] = rng.randbytes(count)
    weights.write_bytes(data)


def random_bytes(folder: Path, good: Good, rng: random.Random) -> None:
    weights = write(folder, good.config, None, rng.random() < 0.5)
    weights.write_bytes(rng.randbytes(rng.randrange(4000)))


def renamed(folder: Path, good: Good, rng: random.Random) -> None:
    tensors = good.copy()
    name = rng.choice(list(tensors))
    place = rng.randrange(len(name))
    new = name[:place] + rng.choice("xyzQ_.9") + name[place + 1 :]
    tensors[new if new not in tensors and new != name else name + "x"] = tensors.pop(name)
    write(folder, good.config, tensors, rng.random() < 0.5)


def dropped(folder: Path, good: Good, rng: random.Random) -> None:
    tensors = good.copy()
    del tensors[rng.choice(list(tensors))]
    write(folder, good.config, tensors, rng.random() < 0.5)


def resized(folder: Path, good: Good, rng: random.Random) -> None:
    tensors = good.copy()
    name = rng.choice(list(tensors))
    rows, columns = tensors[name].shape
    other = rng.choice(
        [(rows + 1, columns), (rows, columns + 1), (rows, columns - 1), (columns + 1, rows), (0, columns)]
    )
    tensors[name] = torch.zeros(rng.choice([other, (rows * columns,), (1, rows, columns)]))
    write(folder, good.config, tensors, rng.random() < 0.5)


def wrong_values(folder: Path, good: Good, rng: random.Random) -> None:
    tensors = good.copy()
    name = rng.choice(list(tensors))
    flat = tensors[name].view(-1)
    flat[rng.randrange(len(flat))] = rng.choice([float("nan"), float("inf"), float("-inf")])
    write(folder, good.config, tensors, rng.random() < 0.5)


def wrong_type(folder: Path, good: Good, rng: random.Random) -> None:
    tensors = good.copy()
    name = rng.choice(list(tensors))
    tensors[name] = tensors[name].to(rng.choice([torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]))
    write(folder, good.config, tensors, rng.random() < 0.5)


def wrong_setting(folder: Path, good: Good, rng: random.Random) -> None:
    wrong: dict[str, list[Any]] = {
        "r": [0, -1, "8", 2**40, 1.5, None, [4], good.config["r"] + 1],
        "lora_nums": [0, -1, 10**6, "3", None, good.config["lora_nums"] + 1, good.config["lora_nums"] - 1],
        "lora_alpha": ["x", None, [1], {}, True],
        "peft_type": ["IA3", "", 7, None, "MOELORA", "ADALORA"],
        "bias": ["all", "lora_only", 3],
        "use_dora": [True],
        "target_modules": [7, {"a": 1}, [1, 2]],
        "modules_to_save": [["lm_head"]],
    }
    field = rng.choice(list(wrong))
    write(folder, {**good.config, field: rng.choice(wrong[field])}, good.tensors, rng.random() < 0.5)


def wrong_json(folder: Path, good: Good, rng: random.Random) -> None:
    text = json.dumps(good.config).encode()
    place = rng.randrange(1, len(text) - 1)
    config = rng.choice(
        [
            text[:place],
            text[:place] + b"\0\xff" + text[place:],
            b'{"r": 4, ' + text[1:],
            b"[" * 100_000,
            b"null",
            b"[]",
            b"",
            rng.randbytes(200),
            b'{"r": NaN}',
            b" " * (1 << 20) + text,
            text[:-1] + b', "r": ' + b"9" * 5000 + b"}",
        ]
    )
    write(folder, config, good.tensors, rng.random() < 0.5)


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def pickled_code(folder: Path, good: Good, rng: random.Random) -> None:
    """Code that would make a file PWNED beside the folder: as a bare pickle, or inside torch's zip."""
    weights = write(folder, good.config, None, True)
    payload = pickle.dumps(_Payload(str(folder.parent / "PWNED")), protocol=rng.choice([0, 2, 4]))
    if rng.random() < 0.5:
        weights.write_bytes(payload)
        return
    whole = io.BytesIO()
    torch.save(good.tensors, whole)
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(weights, "w") as new:
        for item in old.infolist():
            new.writestr(item, payload if item.filename.endswith("data.pkl") else old.read(item))


def not_a_file(folder: Path, good: Good, rng: random.Random) -> None:
    weights = write(folder, good.config, None, rng.random() < 0.5)
    match rng.randrange(5):
        case 0:
            weights.mkdir()
        case 1:
            os.mkfifo(weights)
        case 2:
            weights.symlink_to(weights.name)
        case 3:
            weights.symlink_to("/dev/zero")
        case 4:
            (folder / CONFIG).unlink()
            os.mkfifo(folder / CONFIG)


def huge_claim(folder: Path, good: Good, rng: random.Random) -> None:
    """A small file that speaks of large tensors, or a large file with nothing in it."""
    weights = write(folder, good.config, good.tensors, False)
    if rng.random() < 0.3:
        with weights.open("r+b") as file:
            file.truncate(rng.choice([1 << 30, 1 << 36]))  # a hole: takes no disk
        return
    name = next(iter(good.tensors))
    size = rng.choice([1 << 31, 1 << 47, 1 << 62, 10**30])
    header = json.dumps({name: {"dtype": "F32", "shape": [size, 1], "data_offsets": [0, 4 * size]}}).encode()
    length = rng.choice([len(header), len(header), 1 << 40, (1 << 64) - 1])
    weights.write_bytes(length.to_bytes(8, "little") + header)


FAULTS: tuple[Fault, ...] = (
    *(truncated, extended, flipped_header, overwritten, random_bytes, renamed, dropped, resized, wrong_values),
    *(wrong_type, wrong_setting, wrong_json, pickled_code, not_a_file, huge_claim),
)


def malformed(good: Path, folder: Path, count: int, seed: int = 0) -> Iterator[tuple[str, Path]]:
    """(name of the fault, adapter's folder) of `count` faulty adapters below `folder`, each written when asked for."""
    adapter = Good(good)
    for i in range(count):
        fault = FAULTS[i % len(FAULTS)]
        path = folder / f"{i}-{fault.__name__}"
        fault(path, adapter, random.Random(f"{seed}-{i}"))
        yield fault.__name__, path


# Of the adapter in tests/oracle: each fault, and what the error must name.
_LAYERS = "base_model.model.model.layers."
NAMED: dict[str, str] = {
    "head_missing": f"{_LAYERS}7.mlp.up_proj.lora_B1.weight",
    "too_few_heads_in_tensors": "lora_nums",
    "router_rows": f"{_LAYERS}3.mlp.gate_proj.lora_route.weight",
    "in_features": f"{_LAYERS}5.mlp.down_proj.lora_A.weight",
    "nan": f"{_LAYERS}10.mlp.gate_proj.lora_B0.weight",
    "config_invalid_json": CONFIG,
    "rank_zero": "r: got 0",
    "heads_million": "lora_nums",
    "config_only": "weights file",
    "truncated": SAFETENSORS,
    "pickle": BIN,
}
CONTROLS = ("control_bin", "control_safetensors")


def named(good: Path, folder: Path) -> None:
    """A folder for each of NAMED, and for each of CONTROLS, which have no fault."""
    adapter = Good(good)
    config, tensors = adapter.config, adapter.copy()
    router, a, b = (NAMED[fault] for fault in ("router_rows", "in_features", "nan"))
    with_nan = adapter.copy()
    with_nan[b].view(-1)[0] = float("nan")
    changed: dict[str, tuple[dict[str, Any], Tensors]] = {
        "head_missing": (config, {name: t for name, t in tensors.items() if name != NAMED["head_missing"]}),
        "too_few_heads_in_tensors": ({**config, "lora_nums": config["lora_nums"] + 2}, tensors),
        "router_rows": (config, {**tensors, router: torch.cat([tensors[router], tensors[router][:1]])}),
        "in_features": (config, {**tensors, a: tensors[a][:, :576]}),
        "nan": (config, with_nan),
        "rank_zero": ({**config, "r": 0}, tensors),
        "heads_million": ({**config, "lora_nums": 10**6}, tensors),
        "control_safetensors": (config, tensors),
    }
    folder.mkdir()
    for fault, (fields, content) in changed.items():
        write(folder / fault, fields, content, binary=False)
    write(folder / "control_bin", config, tensors, binary=True)
    write(folder / "config_invalid_json", json.dumps(config).encode()[:120], tensors, binary=False)
    write(folder / "config_only", config, None, binary=False)
    weights = write(folder / "truncated", config, tensors, binary=False)
    os.truncate(weights, weights.stat().st_size * 6 // 10)
    weights = write(folder / "pickle", config, None, binary=True)
    weights.write_bytes(pickle.dumps(_Payload(str(folder / "PWNED"))))
