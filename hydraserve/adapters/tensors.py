"""Files of tensors: first names, types and shapes, without the data; then, if those are right, the data.

Two kinds: .safetensors, whose header is JSON, and .bin, a zip made by torch.save, whose header is a pickle.
"""

from __future__ import annotations

import contextlib
import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError

from hydraserve.adapters.files import JsonError, open_regular, parse_object, unreadable
from hydraserve.adapters.limits import AdapterLimits
from hydraserve.adapters.pickles import forbidden_pickle
from hydraserve.adapters.weights import natural_order
from hydraserve.errors import (
    AdapterError,
    AdapterFormatError,
    DtypeError,
    DuplicateModuleError,
    MissingTensorError,
    UnreadableFileError,
    UnsafeFileError,
)

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FLOATING = frozenset(SAFETENSORS_DTYPES.values())
_DAMAGED = "the file is damaged or was not copied whole: copy it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Type and shape of one stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile(ABC):
    """One opened file of tensors. `infos` holds names in the file's order (.bin) or in natural order."""

    def __init__(self, path: Path, limits: AdapterLimits) -> None:
        self.path, self.limits = path, limits
        with open_regular(path) as file:
            self.size = file.seek(0, 2)
        limits.check(f"size of {path.name}", self.size, limits.file_bytes, unit=" bytes")
        try:
            self.infos: Mapping[str, TensorInfo] = self._read_infos()
        except OSError as error:
            raise unreadable(path, error) from error
        limits.check(f"tensors in {path.name}", len(self.infos), limits.tensors)
        if not self.infos:
            raise MissingTensorError(path.name, got="no tensors", expected="an adapter's weights", fix=_DAMAGED)

    def load(self) -> dict[str, torch.Tensor]:
        """The tensors, on the CPU, each contiguous in memory of its own.

        Raises UnreadableFileError when they are not what `infos` promised.
        """
        try:
            tensors = self._read_tensors()
        except OSError as error:
            raise unreadable(self.path, error) from error
        if {name: TensorInfo(t.dtype, tuple(t.shape)) for name, t in tensors.items()} != dict(self.infos):
            raise self._fault("other tensors than a moment ago", "a file that is not being written to")
        return tensors

    @abstractmethod
    def _read_infos(self) -> Mapping[str, TensorInfo]: ...

    @abstractmethod
    def _read_tensors(self) -> dict[str, torch.Tensor]: ...

    def _fault(self, got: object, expected: object, fix: str = _DAMAGED) -> UnreadableFileError:
        return UnreadableFileError(self.path.name, got=got, expected=expected, fix=fix)


class JoinedFiles:
    """Two files of tensors as one. Raises DuplicateModuleError for a name that both have."""

    def __init__(self, first: TensorFile, second: TensorFile) -> None:
        self._files = first, second
        if both := sorted(set(first.infos) & set(second.infos)):
            raise DuplicateModuleError(
                both[0], got=f"in {first.path.name} and in {second.path.name}", expected="in one", fix="remove one"
            )
        self.infos: Mapping[str, TensorInfo] = {**first.infos, **second.infos}

    def load(self) -> dict[str, torch.Tensor]:
        """As `TensorFile.load`."""
        return {name: tensor for file in self._files for name, tensor in file.load().items()}


def open_tensors(path: Path, limits: AdapterLimits) -> TensorFile:
    """Open a .safetensors or .bin file and read what describes its tensors.

    Raises UnreadableFileError, UnsafeFileError, LimitError, DtypeError, AdapterFormatError.
    """
    return (SafetensorsFile if path.suffix == ".safetensors" else BinFile)(path, limits)


class SafetensorsFile(TensorFile):
    """8 bytes of header length, a JSON header, the data. The library checks it again when the data is read."""

    def _read_infos(self) -> Mapping[str, TensorInfo]:
        with open_regular(self.path) as file:
            length = int.from_bytes(file.read(8), "little")
            if self.size < 8 or length > self.size - 8:
                raise self._fault(f"{self.size:,} bytes", f"a header of {length:,} bytes and the tensors after it")
            self.limits.check(f"header of {self.path.name}", length, self.limits.header_bytes, unit=" bytes")
            data = file.read(length)
        try:
            header = parse_object(data)
        except JsonError as error:
            raise self._fault(f"a header that is not JSON: {error}", "a safetensors header") from error
        header.pop("__metadata__", None)
        self.limits.check(f"tensors in {self.path.name}", len(header), self.limits.tensors)
        infos, end = {}, 0
        for name in natural_order(header):
            infos[name], stop = self._entry(name, header[name])
            end = max(end, stop)
        if 8 + length + end != self.size:
            raise self._fault(f"{self.size:,} bytes", f"{8 + length + end:,} bytes, by its header")
        return infos

    def _entry(self, name: str, entry: Any) -> tuple[TensorInfo, int]:
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
        if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
            raise self._fault(f"{entry!r} for {name}", "dtype, shape and data_offsets")
        if dtype not in SAFETENSORS_DTYPES:
            raise _wrong_dtype(name, dtype)
        info = TensorInfo(SAFETENSORS_DTYPES[dtype], shape)
        if offsets[1] - offsets[0] != info.nbytes:
            raise self._fault(f"{offsets[1] - offsets[0]:,} bytes for {name}", f"{info.nbytes:,} bytes by its shape")
        return info, offsets[1]

    def _read_tensors(self) -> dict[str, torch.Tensor]:
        # Read, not mapped: a mapped file that someone cuts short while it is read kills the process.
        with open_regular(self.path) as file:
            data = file.read(self.size)
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise self._fault(str(error), "a safetensors file") from error
        return {name: tensors[name] for name in natural_order(tensors)}


def _sizes(value: object) -> tuple[int, ...] | None:
    """A JSON array of sizes, or None when it is something else."""
    if isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value):
        return tuple(value)
    return None


class BinFile(TensorFile):
    """What torch.save writes. Only torch.load's weights_only mode ever interprets the pickle, and only after a
    look through it found nothing that a plain dict of tensors does not need."""

    def _read_infos(self) -> Mapping[str, TensorInfo]:
        self._check_zip()
        infos = {}
        for name, tensor in self._torch_load("meta").items():  # shapes only: no memory is taken for the data
            self._check_tensor(name, tensor)
            infos[name] = TensorInfo(tensor.dtype, tuple(tensor.shape))
        total = sum(info.nbytes for info in infos.values())
        if total > self.size:
            # Views of one storage with strides of zero: a small file that takes any amount of memory.
            raise UnsafeFileError(
                self.path.name,
                got=f"tensors of {total:,} bytes in a file of {self.size:,}",
                expected="every tensor with data of its own",
                fix="save it with {name: tensor.clone() ...}, or as safetensors",
            )
        return infos

    def _read_tensors(self) -> dict[str, torch.Tensor]:
        with self._whatever_damage_raises(), open_regular(self.path) as file, zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise self._fault(f"a wrong checksum of {damaged}", "the data that was saved")
        return {name: _own(tensor) for name, tensor in self._torch_load("cpu").items()}

    def _torch_load(self, device: str) -> dict[str, torch.Tensor]:
        with self._whatever_damage_raises():
            content = torch.load(self.path, weights_only=True, map_location=device)
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items()
        ):
            raise AdapterFormatError(
                self.path.name,
                got=f"a {type(content).__name__} of other things than named tensors",
                expected="a dict of names and tensors",
                fix="save the state dict alone",
            )
        return content

    @contextlib.contextmanager
    def _whatever_damage_raises(self) -> Iterator[None]:
        """A damaged archive or pickle can make the libraries raise almost anything: say that it is damaged."""
        try:
            yield
        except (AdapterError, OSError):
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise self._fault(reason, "a file written by torch.save") from error

    def _check_zip(self) -> None:
        """Raises unless the file is an uncompressed zip with one pickle, which only builds tensors."""
        with open_regular(self.path) as file:
            if file.read(4) != b"PK\x03\x04":
                file.seek(0)
                self._refuse_bare(file.read(self.limits.header_bytes))
            with self._whatever_damage_raises(), zipfile.ZipFile(file) as archive:
                reason = forbidden_pickle(self._pickle_of(archive))
        if reason:
            raise self._unsafe(reason)

    def _pickle_of(self, archive: zipfile.ZipFile) -> bytes:
        entries = archive.infolist()
        self.limits.check(f"entries of {self.path.name}", len(entries), self.limits.tensors + 100)
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > self.size:
            raise UnsafeFileError(
                self.path.name,
                got="a compressed zip",
                expected="an uncompressed one, as torch.save writes it",
                fix="load it where it is trusted and save it again with torch.save",
            )
        pickles = [entry for entry in entries if entry.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise self._fault(f"{len(pickles)} entries named data.pkl", "one, as torch.save writes it")
        size = pickles[0].file_size
        self.limits.check(f"pickle in {self.path.name}", size, self.limits.header_bytes, unit=" bytes")
        return archive.read(pickles[0])

    def _refuse_bare(self, data: bytes) -> NoReturn:
        """A pickle outside a zip, or no pickle at all."""
        with contextlib.suppress(ValueError):
            if reason := forbidden_pickle(data):
                raise self._unsafe(reason)
        raise self._fault(
            "no zip archive",
            "a file written by torch.save (PyTorch 1.6 or later)",
            "copy it again; a file of an older PyTorch: load it where it is trusted and save it again",
        )

    def _unsafe(self, reason: str) -> UnsafeFileError:
        return UnsafeFileError(
            self.path.name,
            got=f"a pickle with {reason}",
            expected="a pickle that only builds tensors; this one was not run",
            fix="do not trust this file; ask for the adapter as adapter_model.safetensors",
        )

    def _check_tensor(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
            raise _wrong_dtype(name, f"a {tensor.layout} or quantised tensor")
        if tensor.dtype not in FLOATING:
            raise _wrong_dtype(name, str(tensor.dtype).removeprefix("torch."))


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied if it is a view of something larger that it would keep in memory."""
    tensor = tensor.detach()
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone(memory_format=torch.contiguous_format)


def _wrong_dtype(name: str, got: str) -> DtypeError:
    return DtypeError(
        name, got=got, expected="float32, float16, bfloat16 or float64", fix="save the adapter's weights unquantised"
    )
