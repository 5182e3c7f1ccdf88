"""The server's own copies of adapters: read and checked once, then kept under the digest of their content.

An adapter that is served is never read from where it came from again. What was validated is written here in one plain
layout, whatever format it had, and every later load compares the content with the digest in the file's name. So a
folder that changes or vanishes while its adapter is served changes nothing, and the process that runs the model never
parses a file that somebody else wrote.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from select import select
from typing import Any, BinaryIO

import safetensors.torch
import torch
from hydra_kernels import HydraWeights, Layout

from hydraserve.adapters.files import open_regular, unreadable
from hydraserve.adapters.tensors import SAFETENSORS_DTYPES
from hydraserve.adapters.weights import HydraAdapter
from hydraserve.errors import StorageError, UnreadableFileError

_SUFFIX = ".safetensors"
_PIECE, _PAUSE_S = 2 << 20, 0.002  # how files are read, see `_read_gently`
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HEADER = "hydraserve"
_TENSORS = ("a", "b", "router", "bias")


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """One version of an adapter: its content, by digest, and what is told about it.

    digest:     `HydraAdapter.digest`.
    path:       the file in the store.
    format:     of the files it was read from: "hydralora", "lora".
    rank, heads: the largest of any module.
    targets:    last components of the module paths.
    modules:    how many.
    nbytes:     of the weights as stored.
    dtypes:     names of the weights' types.
    base_model: the base model's name as the adapter states it.
    """

    digest: str
    path: str
    format: str
    rank: int
    heads: int
    targets: tuple[str, ...]
    modules: int
    nbytes: int
    dtypes: tuple[str, ...]
    base_model: str | None

    @classmethod
    def of(cls, adapter: HydraAdapter, path: Path) -> StoredAdapter:
        dtypes = {str(weights.b.dtype).removeprefix("torch.") for weights in adapter.modules.values()}
        return cls(
            digest=adapter.digest,
            path=str(path),
            format=adapter.format,
            rank=adapter.rank,
            heads=adapter.heads,
            targets=adapter.targets,
            modules=len(adapter.modules),
            nbytes=adapter.nbytes,
            dtypes=tuple(sorted(dtypes)),
            base_model=adapter.base_model,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> StoredAdapter:
        fields = json.loads(text)
        return cls(**{**fields, "targets": tuple(fields["targets"]), "dtypes": tuple(fields["dtypes"])})


class AdapterStore:
    """A folder of adapters by digest. Safe for several processes: files appear whole, under their final name."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, digest: str) -> Path:
        """Where the adapter of this digest is, or would be."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"digest: got {digest!r}, expected 64 hexadecimal digits")
        return self.root / f"{digest}{_SUFFIX}"

    def add(self, adapter: HydraAdapter) -> StoredAdapter:
        """Write an adapter, unless its content is there already. Raises StorageError when that fails."""
        path = self.path(adapter.digest)
        if not path.exists():
            part = self.root / f".{uuid.uuid4().hex}.part"
            try:
                write_stored(adapter, part)
                os.replace(part, path)
            except OSError as error:
                raise StorageError(
                    f"store {self.root}",
                    got=error.strerror or error,
                    expected=f"{adapter.nbytes:,} bytes written",
                    fix="make room on this disk, or choose another with --state-dir",
                ) from error
            finally:
                part.unlink(missing_ok=True)
        return StoredAdapter.of(adapter, path)

    def remove(self, digest: str) -> None:
        """Forget an adapter; nothing happens when it is not there."""
        self.path(digest).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        """Of all adapters that are there."""
        for path in self.root.glob(f"*{_SUFFIX}"):
            if _DIGEST.fullmatch(path.stem):
                yield path.stem

    def sweep(self, keep: set[str]) -> None:
        """Remove what is unfinished and all adapters but those in `keep`. Only for the one owner of the store."""
        for part in self.root.glob(".*.part"):
            with contextlib.suppress(OSError):
                shutil.rmtree(part) if part.is_dir() else part.unlink()
        for digest in set(self.digests()) - keep:
            self.remove(digest)


def is_stored(path: Path | str) -> bool:
    """Whether a path names a file of some store."""
    name = Path(path).name
    return name.endswith(_SUFFIX) and _DIGEST.fullmatch(name.removesuffix(_SUFFIX)) is not None


def write_stored(adapter: HydraAdapter, path: Path) -> None:
    """Write `adapter` in the store's layout, and make sure that it is on the disk. Raises OSError."""
    tensors: dict[str, torch.Tensor] = {}
    modules = {}
    for module, weights in adapter.modules.items():
        modules[module] = {"layout": weights.layout.record(), "scaling": float(weights.scaling).hex()}
        for part in _TENSORS:
            tensor = getattr(weights, part)
            if tensor is not None:
                tensors[f"{module}.{part}"] = tensor.detach().to("cpu").contiguous()
    header = {"format": adapter.format, "base_model": adapter.base_model, "modules": modules}
    data = safetensors.torch.save(tensors, metadata={_HEADER: json.dumps(header)})
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_stored(path: Path | str, digest: str | None = None) -> HydraAdapter:
    """The adapter in a file of the store.

    digest: what the content has to be; default: what the file's name says.

    Raises AdapterNotFoundError when there is no such file, UnreadableFileError when its content is not what was stored.
    """
    path = Path(path)
    expected = path.name.removesuffix(_SUFFIX) if digest is None else digest
    try:
        with open_regular(path) as file:
            data = _read_gently(file)
        adapter = _parse(data, path)
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(path, f"a file that cannot be read ({error})") from error
    if adapter.digest != expected:
        raise _damaged(path, f"content with digest {adapter.digest}")
    return adapter


def read_layouts(path: Path | str) -> dict[str, Layout]:
    """How each module of the adapter in a file of the store is laid out; only the header is read.

    Raises as `read_stored`.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(size, os.fstat(file.fileno()).st_size)))
        header = json.loads(entries["__metadata__"][_HEADER])
        return {module: Layout.of_record(record["layout"]) for module, record in header["modules"].items()}
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"a file that cannot be read ({error})") from error


def _read_gently(file: BinaryIO) -> torch.Tensor:
    """The file's bytes, uint8. Read in pieces with pauses: a model that runs meanwhile needs the same memory's
    bandwidth, and one step would wait for all of it."""
    data = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
    for start in range(0, len(data), _PIECE):
        file.readinto(data[start : start + _PIECE].numpy())  # type: ignore[attr-defined]
        select((), (), (), _PAUSE_S)  # time.sleep fails under a faked clock
    return data


def _parse(data: torch.Tensor, path: Path) -> HydraAdapter:
    """The adapter, its tensors views of `data`.

    safetensors' own `load` copies everything in one call that holds Python's lock: a model that runs in another
    thread of the process would stand still for tens of milliseconds. For the same reason, one operation per tensor.
    """
    text = data.numpy().data
    start = 8 + int.from_bytes(text[:8], "little")
    entries = json.loads(bytes(text[8:start]))
    header = json.loads(entries.pop("__metadata__")[_HEADER])
    by_dtype = {name: _as(data[start:], SAFETENSORS_DTYPES[name]) for name in {e["dtype"] for e in entries.values()}}
    tensors = {name: _view(by_dtype[entry["dtype"]], entry) for name, entry in entries.items()}
    modules = {
        module: _weights({part: tensors.get(f"{module}.{part}") for part in _TENSORS}, record)
        for module, record in header["modules"].items()
    }
    return HydraAdapter.of(modules, format=header["format"], base_model=header["base_model"], source=path)


def _as(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 data as `dtype`, without what is left at the end when its length does not divide."""
    return data[: len(data) // dtype.itemsize * dtype.itemsize].view(dtype)


def _view(data: torch.Tensor, entry: Mapping[str, Any]) -> torch.Tensor:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    offset, rest = divmod(begin, data.itemsize)
    if rest or end - begin != math.prod(shape) * data.itemsize:
        raise ValueError(f"data at {begin} to {end} for shape {shape}")
    return data.as_strided(shape, strides, data.storage_offset() + offset)


def _weights(tensors: Mapping[str, Any], record: Mapping[str, Any]) -> HydraWeights:
    return HydraWeights(**tensors, layout=Layout.of_record(record["layout"]), scaling=float.fromhex(record["scaling"]))


def _damaged(path: Path, got: str) -> UnreadableFileError:
    return UnreadableFileError(
        f"stored adapter {path.name}",
        got=got,
        expected="the content that was validated; it was changed on the disk since",
        fix="load the adapter again from its source",
    )
