"""Every fault of a folder is its own typed error, and the message names what is wrong. Also without the weights."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import (
    CONFIG,
    LORA_CONFIG,
    Tensors,
    edited,
    hydra_module,
    hydra_tensors,
    lora_tensors,
    name_of,
    write,
)

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    DtypeError,
    DuplicateModuleError,
    EmptyTensorError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnexpectedTensorError,
    UnreadableFileError,
    UnsupportedFeatureError,
)

Q = "model.layers.2.self_attn.q_proj"
GATE = "model.layers.0.mlp.gate_proj"


def refused(folder: Path, error: type[AdapterError], *texts: str) -> str:
    """Both ways of reading raise exactly this class; the message holds the texts and says which adapter."""
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(AdapterError) as caught:
            read(folder)
        message = str(caught.value)
        assert type(caught.value) is error, message
        for text in (*texts, f"adapter {folder}", "To fix:"):
            assert text in message, message
    return message


# ---- files


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "none", AdapterNotFoundError, "a folder that exists")
    refused(tmp_path, AdapterNotFoundError, "adapter_config.json")
    write(tmp_path)
    refused(tmp_path / "adapter_model.safetensors", AdapterNotFoundError, "not a folder")


def test_no_weights_file(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    refused(tmp_path, AdapterNotFoundError, "only adapter_config.json", "adapter_model.bin")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, name: str) -> None:
    """A named pipe would make the reader wait for ever."""
    write(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, UnreadableFileError, name, "not a regular file")
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused(tmp_path, UnreadableFileError, name)


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)

    def denied(path: Path, *_: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("hydraserve.adapters.files.os.open", denied)
    refused(tmp_path, UnreadableFileError, "adapter_config.json", "Permission denied")


# ---- adapter_config.json


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (json.dumps(CONFIG).encode()[:120], "adapter_config.json"),
        (b"", "adapter_config.json"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"[1]", "a JSON array"),
        (b'"x"', "a JSON string"),
        (b"null", "a JSON null"),
        (b"3", "a JSON number"),
        (b'{"r": 1, "r": 2}', "'r' twice"),
        (b'{"r": NaN}', "NaN"),
        (b"[" * 200_000, "nested"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "digits"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_a_config_that_is_no_json_object(tmp_path: Path, data: bytes, text: str) -> None:
    refused(write(tmp_path, data), AdapterConfigError, "adapter_config.json", text)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_nums"])
def test_a_missing_field(tmp_path: Path, field: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != field}
    refused(write(tmp_path, config), AdapterConfigError, f"{field}: got no such field")


def test_a_missing_peft_type(tmp_path: Path) -> None:
    config = {key: value for key, value in CONFIG.items() if key != "peft_type"}
    refused(write(tmp_path, config), AdapterConfigError, "peft_type: got no such field")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -4),
        ("r", 4.0),
        ("r", "4"),
        ("r", True),
        ("r", None),
        ("r", [4]),
        ("lora_nums", 0),
        ("lora_nums", "3"),
        ("lora_nums", {}),
        ("lora_alpha", "6"),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("lora_alpha", 10**400),
        ("target_modules", 3),
        ("target_modules", ["q_proj", 3]),
        ("target_modules", {"q_proj": 1}),
        ("base_model_name_or_path", 7),
        ("use_rslora", "yes"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": 2.5}),
        ("lora_nums_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {"q_proj": "2"}),
        ("alpha_pattern", {"q_proj": 10**400}),
        ("alpha_pattern", {"(": 2}),
        ("alpha_pattern", {"(a{1000}){1000}": 2}),
        ("alpha_pattern", {"(?i)Q_PROJ": 2}),
        ("alpha_pattern", {"x" * 10_000: 2}),
    ],
    ids=lambda v: str(v)[:30],
)
def test_a_field_of_the_wrong_kind(tmp_path: Path, field: str, value: Any) -> None:
    refused(write(tmp_path, {**CONFIG, field: value}), AdapterConfigError, field)


def test_targets_that_do_not_name_a_module_with_tensors(tmp_path: Path) -> None:
    config = {"target_modules": ["gate_proj", "down_proj"]}
    refused(write(tmp_path / "a", {**CONFIG, **config}), AdapterConfigError, "target_modules", Q)
    folder = write(tmp_path / "b", {**LORA_CONFIG, **config, "target_modules": ["proj"]}, lora_tensors())
    refused(folder, AdapterConfigError, "target_modules")  # PEFT wants whole components
    assert load_adapter(write(tmp_path / "c", {**CONFIG, "target_modules": ["proj"]})).rank == 4  # the authors do not


def test_patterns_cannot_stall_the_server(tmp_path: Path) -> None:
    path = "model.layers.0." + "a" * 60 + ".q_proj"
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 3), f"{path}.lora_B.weight": torch.ones(3, 4)}
    config = {**LORA_CONFIG, "alpha_pattern": {r"model.layers.0.(a|aa|aaa)+\.(x|y)+": 2}}
    folder = write(tmp_path, config, tensors)
    with pytest.raises(LimitError, match="takes too long"):
        inspect_adapter(folder, limits=AdapterLimits(pattern_seconds=0.2))


# ---- limits, before anything is allocated


@pytest.mark.parametrize("field", ["r", "lora_nums"])
def test_absurd_sizes_in_the_config(tmp_path: Path, field: str) -> None:
    refused(write(tmp_path, {**CONFIG, field: 10**6}), LimitError, f"{field}: got 1,000,000, expected at most")


@pytest.mark.parametrize(
    ("limit", "value", "text"),
    [
        ("file_bytes", 1000, "size of adapter_model"),
        ("config_bytes", 100, "size of adapter_config.json"),
        ("header_bytes", 100, "adapter_model"),
        ("tensors", 19, "tensors in adapter_model"),
        ("rank", 3, "r: got 4"),
        ("heads", 2, "lora_nums: got 3"),
    ],
)
@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
def test_limits(tmp_path: Path, limit: str, value: int, text: str, binary: bool) -> None:
    folder = write(tmp_path, CONFIG, hydra_tensors(), binary=binary)
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(LimitError, match="expected at most") as caught:
            read(folder, limits=AdapterLimits(**{limit: value}))  # type: ignore[arg-type]
        assert text in str(caught.value)


def test_limits_hold_for_what_the_tensors_say_too(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, hydra_tensors() | hydra_module(Q, 7, 6))
    for limits, text in (
        (AdapterLimits(rank=6), f"rank of {Q}: got 7"),
        (AdapterLimits(heads=5), f"heads of {Q}: got 6"),
    ):
        with pytest.raises(LimitError, match=text):
            inspect_adapter(folder, limits=limits)


def test_a_head_with_an_absurd_number(tmp_path: Path) -> None:
    tensors = hydra_tensors()
    tensors[name_of(Q, "B123456789")] = tensors.pop(name_of(Q, "B2"))
    refused(write(tmp_path, CONFIG, tensors), MissingTensorError, name_of(Q, "B2"), "head 2")


# ---- tensors that do not fit together


def drop(*parts: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for part in parts:
            del tensors[name_of(Q, part)]

    return change


@pytest.mark.parametrize(
    ("parts", "missing"),
    [
        (["B0"], "B0"), (["B1"], "B1"), (["B2"], "B2"), (["B0", "B1"], "B0"), (["B0", "B1", "B2"], "B0"),
        (["A"], "A"), (["route"], "route"), (["A", "B1"], "A"),
    ],
    ids=str,
)  # fmt: skip
def test_a_missing_tensor_is_named(tmp_path: Path, parts: list[str], missing: str) -> None:
    folder = write(tmp_path, CONFIG, edited(hydra_tensors(), drop(*parts)))
    message = refused(folder, MissingTensorError, name_of(Q, missing))
    if missing.startswith("B"):
        assert f"head {missing[1:]} of 3" in message


@pytest.mark.parametrize("part", ["A", "B"])
def test_half_of_a_lora_module(tmp_path: Path, part: str) -> None:
    folder = write(tmp_path, LORA_CONFIG, edited(lora_tensors(), drop(part)))
    refused(folder, MissingTensorError, f"{Q}.lora_{part}.weight")


def test_lora_nums_that_no_layer_has(tmp_path: Path) -> None:
    refused(write(tmp_path, {**CONFIG, "lora_nums": 5}), AdapterConfigError, "lora_nums: got 5, expected 3")


def test_a_rank_that_no_layer_has(tmp_path: Path) -> None:
    refused(write(tmp_path, {**CONFIG, "r": 8}), AdapterConfigError, "r: got 8, expected 4")


@pytest.mark.parametrize("pattern", ["rank_pattern", "lora_nums_pattern"])
def test_patterns_are_declarations(tmp_path: Path, pattern: str) -> None:
    """With any pattern, every layer must be what the configuration says."""
    folder = write(tmp_path, {**CONFIG, pattern: {"q_proj": 2}})
    refused(
        folder, AdapterConfigError, {"rank_pattern": "r: got 2", "lora_nums_pattern": "lora_nums: got 2"}[pattern], Q
    )
    others = {name: tensor for name, tensor in hydra_tensors().items() if Q not in name}
    folder = write(tmp_path, {**CONFIG, pattern: {"no_such": 2}}, others | hydra_module(Q, 2, 3))
    refused(folder, AdapterConfigError, "r: got 4, expected 2", Q)


def reshape(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__setitem__(name_of(Q, part), change(tensors[name_of(Q, part)]).contiguous())


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("route", lambda t: torch.cat([t, t[:1]]), "4 rows"),
        ("route", lambda t: t.repeat(4, 1), "mtLoRA"),
        ("route", lambda t: t[:, :-1], "12 and 11 columns"),
        ("route", lambda t: t[0], "a matrix"),
        ("A", lambda t: t[:, :-2], "10 and 12 columns"),
        ("A", lambda t: t.T, "4 and 12 columns"),
        ("A", lambda t: t[:3], name_of(Q, "B0")),
        ("B0", lambda t: t[:-1], name_of(Q, "B1")),
        ("B1", lambda t: t[:-1], "[11, 4]"),
        ("B2", lambda t: t[:, :2], "[12, 2]"),
        ("B1", lambda t: t.T, "[4, 12]"),
        ("B2", lambda t: t[None], "a matrix"),
    ],
)
def test_shapes_that_disagree(
    tmp_path: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor], text: str
) -> None:
    folder = write(tmp_path, CONFIG, edited(hydra_tensors(), reshape(part, change)))
    refused(folder, ShapeError, Q, text)


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("A", lambda t: t[:3], "4 rows, the rank"),
        ("A", lambda t: t.T, "4 rows, the rank"),
        ("B", lambda t: t[:, :3], "4 columns, the rank"),
        ("B", lambda t: t[0], "a matrix"),
    ],
)
def test_lora_shapes_that_disagree(
    tmp_path: Path, part: str, change: Callable[[torch.Tensor], torch.Tensor], text: str
) -> None:
    folder = write(tmp_path, LORA_CONFIG, edited(lora_tensors(), reshape(part, change)))
    refused(folder, ShapeError, name_of(Q, part), text)


def test_a_head_numbered_in_another_way(tmp_path: Path) -> None:
    folder = write(
        tmp_path, CONFIG, edited(hydra_tensors(), lambda t: t.update({name_of(Q, "B01"): torch.ones(12, 4)}))
    )
    refused(folder, UnexpectedTensorError, name_of(Q, "B01"))


def test_a_head_more_than_the_router_has(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, edited(hydra_tensors(), lambda t: t.update({name_of(Q, "B3"): torch.ones(12, 4)})))
    refused(folder, UnexpectedTensorError, name_of(Q, "B3"), "3 heads")


@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
def test_tensors_that_were_never_gathered(tmp_path: Path, binary: bool) -> None:
    tensors = {name: torch.empty(0) for name in hydra_tensors()}
    refused(
        write(tmp_path, CONFIG, tensors, binary=binary), EmptyTensorError, "ZeRO-3", "pytorch_model.bin", "20 of 20"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = edited(hydra_tensors(dtype=dtype), lambda t: t[name_of(Q, "B1")].view(-1)[7:9].fill_(value))
    with pytest.raises(NonFiniteError, match=str(value)) as caught:
        load_adapter(write(tmp_path, CONFIG, tensors))
    assert name_of(Q, "B1") in str(caught.value)
    assert "2 of 48 values" in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
def test_types_that_are_no_weights(tmp_path: Path, dtype: torch.dtype, binary: bool) -> None:
    tensors = edited(hydra_tensors(), reshape("A", lambda t: t.to(dtype)))
    refused(write(tmp_path, CONFIG, tensors, binary=binary), DtypeError, name_of(Q, "A"), "float32")


def test_one_module_twice(tmp_path: Path) -> None:
    tensors = hydra_tensors() | hydra_module(Q, 4, 3, prefix="")
    refused(write(tmp_path, CONFIG, tensors), DuplicateModuleError, f"{Q}: got both", f"{Q}.lora_A.weight")


@pytest.mark.parametrize("binary", [True, False], ids=["bin", "safetensors"])
def test_no_tensors(tmp_path: Path, binary: bool) -> None:
    refused(write(tmp_path, CONFIG, {"x": torch.ones(1)}), UnexpectedTensorError, "x")
    folder = write(tmp_path / "b", CONFIG, {}, binary=binary)
    refused(folder, MissingTensorError, "no tensors")


# ---- what is understood and cannot be served


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("base_model.model.model.embed_tokens.weight", UnsupportedFeatureError, "embeddings"),
        ("base_model.model.lm_head.weight", UnsupportedFeatureError, "output head"),
        ("base_model.model.lm_head.lora_A.weight", UnsupportedFeatureError, "output head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", UnsupportedFeatureError, "embeddings"),
        (f"base_model.model.{Q}.bias", UnsupportedFeatureError, "a bias"),
        (f"base_model.model.{Q}.lora_A.bias", UnsupportedFeatureError, "a bias"),
        (f"base_model.model.{Q}.lora_magnitude_vector", UnsupportedFeatureError, "DoRA"),
        ("base_model.model.score.weight", UnsupportedFeatureError, "full weight matrix"),
        ("base_model.model.score.modules_to_save.weight", UnsupportedFeatureError, "full weight matrix"),
        ("base_model.model.model.layers.0.mlp.experts.3.gate_proj.lora_A.weight", UnsupportedFeatureError, "experts"),
        (f"base_model.model.{Q}.lora_A.default.weight", AdapterFormatError, "'default'"),
        (f"base_model.model.{Q}.lora_C.weight", UnexpectedTensorError, "lora_C"),
    ],
)
@pytest.mark.parametrize("kind", ["hydralora", "lora"])
def test_tensors_of_other_features(tmp_path: Path, name: str, error: type[AdapterError], text: str, kind: str) -> None:
    config, tensors = (CONFIG, hydra_tensors()) if kind == "hydralora" else (LORA_CONFIG, lora_tensors())
    refused(write(tmp_path, config, tensors | {name: torch.ones(2, 12)}), error, name, text)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("use_dora", True, "DoRA"),
        ("lora_bias", True, "bias"),
        ("bias", "all", "bias"),
        ("bias", "lora_only", "bias"),
        ("modules_to_save", ["embed_tokens"], "full weight"),
        ("alora_invocation_tokens", [1, 2], "activated LoRA"),
        ("layer_replication", [[0, 4], [2, 5]], "replicated"),
        ("target_parameters", ["experts.gate_up_proj"], "mixture-of-experts"),
        ("trainable_token_indices", [1], "token embeddings"),
        ("megatron_config", {"x": 1}, "Megatron"),
        ("use_qalora", True, "QALoRA"),
        ("use_bdlora", {"nblocks": 2}, "block-diagonal"),
        ("arrow_config", {"top_k": 2}, "Arrow"),
        ("enable_lora", [True, False], "merged projection"),
        ("init_lora_weights", "pissa", "changes the base model"),
        ("init_lora_weights", "pissa_niter_16", "changes the base model"),
        ("init_lora_weights", "olora", "changes the base model"),
    ],
)
@pytest.mark.parametrize("kind", ["hydralora", "lora"])
def test_fields_of_other_features(tmp_path: Path, field: str, value: Any, text: str, kind: str) -> None:
    config, tensors = (CONFIG, hydra_tensors()) if kind == "hydralora" else (LORA_CONFIG, lora_tensors())
    refused(write(tmp_path, {**config, field: value}, tensors), UnsupportedFeatureError, f"{field}: got", text)


def test_neither_format(tmp_path: Path) -> None:
    refused(write(tmp_path / "a", {**CONFIG, "peft_type": "IA3"}), AdapterFormatError, "'IA3'")
    names = {name: tensor for name, tensor in lora_tensors().items() if "lora_A" in name}
    refused(write(tmp_path / "b", LORA_CONFIG, names), AdapterFormatError, "lora_A")


def test_both_formats(tmp_path: Path) -> None:
    tensors = lora_tensors() | hydra_module(GATE, 4, 3)
    refused(write(tmp_path, LORA_CONFIG, tensors), AdapterFormatError, "hydralora", "; or lora")


def test_plain_lora_tensors_under_a_hydralora_config(tmp_path: Path) -> None:
    refused(write(tmp_path, CONFIG, lora_tensors()), UnexpectedTensorError, "lora_B.weight")


def test_a_safetensors_header_that_lies(tmp_path: Path) -> None:
    good = write(tmp_path / "good") / "adapter_model.safetensors"
    data = good.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    name = name_of(Q, "A")
    lies: dict[str, tuple[bytes, str]] = {
        "too_long": (struct.pack("<Q", 2**60) + data[8:], "a header of"),
        "no_header": (data[:5], "a header of"),
        "not_json": (data[:8] + b"x" * length + body, "not JSON"),
        "cut": (data[:-10], "by its header"),
        "longer": (data + b"0" * 10, "by its header"),
    }
    for key, entry in {
        "negative": {"shape": [-4, 12]},
        "huge": {"shape": [2**40, 2**40]},
        "other_shape": {"shape": [4, 11]},
        "no_dtype": {"dtype": None},
        "offsets": {"data_offsets": [0]},
        "string": {"shape": "4x12"},
    }.items():
        changed = json.dumps({**header, name: {**header[name], **entry}}).encode()
        lies[key] = (struct.pack("<Q", len(changed)) + changed + body, name)
    twice = json.dumps(header)[:-1].encode() + b', "' + name.encode() + b'": {}}'
    lies["twice"] = (struct.pack("<Q", len(twice)) + twice + body, "twice")
    for key, (content, text) in lies.items():
        folder = write(tmp_path / key)
        (folder / "adapter_model.safetensors").write_bytes(content)
        refused(folder, UnreadableFileError, "adapter_model.safetensors", text)


def test_overlapping_tensors_are_left_to_the_library(tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header[name_of(GATE, "A")]["data_offsets"] = header[name_of("model.layers.10.mlp.gate_proj", "A")]["data_offsets"]
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
    with pytest.raises(UnreadableFileError, match=r"adapter_model\.safetensors"):
        load_adapter(folder)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydraserve.adapters import tensors as module

    folder = write(tmp_path)
    read = module.SafetensorsFile._read_tensors

    def replaced(self: module.SafetensorsFile) -> Tensors:
        write(folder, CONFIG, hydra_tensors(rank=2))
        self.size = (folder / "adapter_model.safetensors").stat().st_size
        return read(self)

    monkeypatch.setattr(module.SafetensorsFile, "_read_tensors", replaced)
    with pytest.raises(UnreadableFileError, match="being written"):
        load_adapter(folder)
