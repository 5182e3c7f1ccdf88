"""Copies of a trained adapter with a fault, each against the error it must get; and files that want to do harm."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_folders import CONFIG, hydra_tensors, name_of, write
from malformed_adapters import CONTROLS, NAMED, named

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.errors import (
    AdapterConfigError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    DtypeError,
    LimitError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnreadableFileError,
    UnsafeFileError,
)

LAYERS = "base_model.model.model.layers."
# fault -> the error, and what its message must name
FAULTS: dict[str, tuple[type[AdapterError], str]] = {
    "head_missing": (MissingTensorError, f"{LAYERS}7.mlp.up_proj.lora_B1.weight (head 1 of 2)"),
    "too_few_heads_in_tensors": (AdapterConfigError, "lora_nums: got 4, expected 2"),
    "router_rows": (ShapeError, f"{LAYERS}3.mlp.gate_proj.lora_route.weight: got 3 rows, expected 2"),
    "in_features": (ShapeError, f"{LAYERS}5.mlp.down_proj.lora_A.weight"),
    "nan": (NonFiniteError, f"{LAYERS}10.mlp.gate_proj.lora_B0.weight: got nan"),
    "config_invalid_json": (AdapterConfigError, "adapter_config.json"),
    "rank_zero": (AdapterConfigError, "r: got 0"),
    "heads_million": (LimitError, "lora_nums: got 1,000,000"),
    "config_only": (AdapterNotFoundError, "weights file"),
    "truncated": (UnreadableFileError, "adapter_model.safetensors"),
    "pickle": (UnsafeFileError, "adapter_model.bin: got a pickle with the import"),
}


@pytest.fixture(scope="module")
def malformed(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("malformed") / "out"
    named(oracle / "adapters" / "mlp_r2_e2", out)
    return out


def test_every_fault_has_its_error(malformed: Path) -> None:
    assert {path.name for path in malformed.iterdir()} == set(FAULTS) | set(CONTROLS)
    assert set(NAMED) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault(malformed: Path, fault: str) -> None:
    error, text = FAULTS[fault]
    with pytest.raises(error) as caught:
        load_adapter(malformed / fault)
    assert type(caught.value) is error
    assert text in str(caught.value)
    assert not (malformed / "PWNED").exists()


def test_the_controls_load_and_are_the_same(malformed: Path) -> None:
    a, b = load_adapter(malformed / "control_bin"), load_adapter(malformed / "control_safetensors")
    assert a.digest == b.digest
    assert (a.format, a.rank, a.heads, len(a.modules)) == ("hydralora", 2, 2, 90)


# ---- pickles and archives


class Payload:
    """Its pickle calls `function(*arguments)` when it is read."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def bin_folder(folder: Path, data: bytes) -> Path:
    write(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(data)
    return folder


def archive(pickled: bytes, *, compression: int = zipfile.ZIP_STORED, extra: dict[str, bytes] | None = None) -> bytes:
    """What torch.save writes, around any pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", **(extra or {})}.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare"])
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, protocol: int, zipped: bool) -> None:
    pickled = pickle.dumps({"a": Payload(os.mkdir, str(tmp_path / "PWNED"))}, protocol=protocol)
    folder = bin_folder(tmp_path / "a", archive(pickled) if zipped else pickled)
    for read in (inspect_adapter, load_adapter):
        with pytest.raises(UnsafeFileError, match=r"posix\.mkdir"):
            read(folder)
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "payload",
    [
        Payload(bytearray, 2**45),
        Payload(torch.zeros, 2**45),
        Payload(torch._utils._rebuild_sparse_tensor, torch.sparse_coo, ()),
        Payload(getattr, "x", "upper"),
    ],
    ids=["bytearray", "zeros", "sparse", "getattr"],
)
def test_calls_that_a_dict_of_tensors_does_not_need(tmp_path: Path, payload: Payload) -> None:
    folder = bin_folder(tmp_path, archive(pickle.dumps({"a": payload}, protocol=2)))
    with pytest.raises(UnsafeFileError, match="the import"):
        load_adapter(folder)


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    folder = bin_folder(
        tmp_path, archive(pickle.dumps({}), compression=zipfile.ZIP_DEFLATED, extra={"data/0": bytes(10**7)})
    )
    assert (folder / "adapter_model.bin").stat().st_size < 10**5
    with pytest.raises(UnsafeFileError, match="compressed"):
        load_adapter(folder)


def test_tensors_larger_than_their_file_are_not_made(tmp_path: Path) -> None:
    """A stride of zero makes 16 TiB out of four bytes."""
    tensors = hydra_tensors() | {name_of("x", "A"): torch.zeros(1).expand(2**22, 2**20)}
    folder = write(tmp_path, CONFIG, tensors, binary=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UnsafeFileError, match="every tensor with data of its own"):
        load_adapter(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18, "KiB"


@pytest.mark.parametrize(
    ("content", "error", "text"),
    [
        ([1, 2], AdapterFormatError, "a list"),
        ({"a": 1}, AdapterFormatError, "a dict of other things"),
        ({1: torch.ones(1)}, AdapterFormatError, "a dict of other things"),
        ({"state": {"a": torch.ones(1)}}, AdapterFormatError, "a dict of other things"),
        ({"a": torch.ones(2).to_sparse()}, UnsafeFileError, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, DtypeError, "complex64"),
    ],
    ids=["list", "number", "numbered", "nested", "sparse", "complex"],
)
def test_other_things_that_torch_saves(tmp_path: Path, content: object, error: type[AdapterError], text: str) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with pytest.raises(error) as caught:
        load_adapter(bin_folder(tmp_path, buffer.getvalue()))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"PK\x03\x04", b"garbage", bytes(1000), b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(range(256)) * 40],
    ids=["empty", "magic", "text", "zeros", "bare pickle", "noise"],
)
def test_garbage(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UnreadableFileError, match=r"adapter_model\.bin"):
        load_adapter(bin_folder(tmp_path, data))


def test_an_archive_without_a_pickle_or_with_two(tmp_path: Path) -> None:
    for i, extra in enumerate(({"more/data.pkl": b"x"}, {})):
        data = archive(pickle.dumps({}, protocol=2), extra=extra)
        data = data if extra else data.replace(b"data.pkl", b"date.pkl")
        with pytest.raises(UnreadableFileError, match=r"entries named data\.pkl"):
            load_adapter(bin_folder(tmp_path / str(i), data))


def test_a_file_of_an_old_pytorch(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(hydra_tensors(), buffer, _use_new_zipfile_serialization=False)
    with pytest.raises(UnreadableFileError, match=r"PyTorch 1\.6"):
        load_adapter(bin_folder(tmp_path, buffer.getvalue()))


def test_a_damaged_bin_file_is_noticed_by_its_checksum(tmp_path: Path) -> None:
    folder = write(tmp_path, CONFIG, hydra_tensors(), binary=True)
    path = folder / "adapter_model.bin"
    data = bytearray(path.read_bytes())
    where = data.index(hydra_tensors()[name_of("model.layers.0.mlp.gate_proj", "A")].numpy().tobytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableFileError, match="checksum"):
        load_adapter(folder)
