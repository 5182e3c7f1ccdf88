"""Block sizes measured on a GPU: JSON files, one for each GPU, written by `python -m hydra_kernels.tuning.tune`.

    {"gpu": "NVIDIA H200", ..., "entries": [
        {"op": "shrink", "in": 4096, "rows": 24, "slices": 3, "tokens": 64, "config": {"tile": 16, ...}},
        {"op": "expand", "out": 6144, "k": 128, "slices": 3, "tokens": 64, "config": {...}}]}

A table only changes the speed: configurations keep to the limits in `tuning.config`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra_kernels.tuning.config import ExpandConfig, ShrinkConfig

CONFIGS: Mapping[str, type[ShrinkConfig] | type[ExpandConfig]] = {"shrink": ShrinkConfig, "expand": ExpandConfig}

# The fields of an entry that a layer must match, by op.
SHAPE_FIELDS = {"shrink": ("in", "rows", "slices"), "expand": ("out", "k", "slices")}

# A folder with tables of one's own, looked into before the ones that come with the package.
FOLDER_VARIABLE = "HYDRA_KERNELS_TUNING"


@dataclass(frozen=True)
class Table:
    """The measured configurations of one GPU: for (op, *shape), pairs (tokens, configuration), fewest tokens first."""

    configs: Mapping[tuple[str | int, ...], Sequence[tuple[int, ShrinkConfig | ExpandConfig]]]

    def find(self, op: str, shape: tuple[int, ...], tokens: int) -> ShrinkConfig | ExpandConfig | None:
        """What was measured for the next larger number of tokens (else the largest); None for an unknown shape."""
        known = self.configs.get((op, *shape))
        if not known:
            return None
        return next((config for limit, config in known if tokens <= limit), known[-1][1])


def file_name(gpu: str) -> str:
    """The table's file for the name that the driver gives a GPU: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def parse(text: str, source: str) -> Table:
    """A table from its JSON. Raises ValueError, naming `source` and the entry, for what no configuration can be."""
    configs: dict[tuple[str | int, ...], list[tuple[int, ShrinkConfig | ExpandConfig]]] = {}
    for i, item in enumerate(_entries(text, source)):
        try:
            op = item["op"]
            config = CONFIGS[op](**item["config"])
            configs.setdefault((op, *_shape(item)), []).append((int(item["tokens"]), config))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: entry {i} is not a configuration ({error!r}); write it with tune") from error
    return Table({key: sorted(known, key=lambda pair: pair[0]) for key, known in configs.items()})


def _shape(item: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(item[name]) for name in SHAPE_FIELDS[item["op"]])


def _entries(text: str, source: str) -> Iterator[dict[str, Any]]:
    try:
        yield from json.loads(text)["entries"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{source}: got no JSON object with a list 'entries' ({error!r}); write it with tune"
        ) from error


def entries_by_key(text: str, source: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """The entries of a table as they are written, by (op, shape, tokens). Raises ValueError as `parse`."""
    parse(text, source)
    return {(item["op"], _shape(item), int(item["tokens"])): item for item in _entries(text, source)}


def dump(header: Mapping[str, str], entries: Sequence[Mapping[str, Any]]) -> str:
    """The JSON of a table: one line an entry, so that two tables can be compared by eye and by diff."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in header.items()]
    lines.append('"entries": [\n  ' + ",\n  ".join(json.dumps(item) for item in entries) + "\n ]")
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def entry(
    op: str, shape: tuple[int, ...], tokens: int, config: ShrinkConfig | ExpandConfig, **more: Any
) -> dict[str, Any]:
    """One entry of a table; `more` (a measured time, say) is for the reader."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {"op": op, **dict(zip(SHAPE_FIELDS[op], shape, strict=True)), "tokens": tokens, "config": values, **more}


@lru_cache
def load(gpu: str) -> Table | None:
    """The table for a GPU by its name, or None: from the folder in HYDRA_KERNELS_TUNING, else from the package."""
    own = os.environ.get(FOLDER_VARIABLE)
    folders = [Path(__file__).parent] if own is None else [Path(own), Path(__file__).parent]
    for folder in folders:
        path = folder / file_name(gpu)
        if path.is_file():
            return parse(path.read_text(), str(path))
    return None
