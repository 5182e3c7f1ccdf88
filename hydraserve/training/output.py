"""The folder of a training run: what may go on there, what it began with, and the finished adapter.

A kill at any moment leaves either no adapter or a whole one: the configuration, without which a folder is no adapter,
is written last, and what was there before is taken away first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from hydraserve.adapters.formats.writing import write_folder
from hydraserve.adapters.locate import CONFIG_NAME, SAFETENSORS_NAME
from hydraserve.errors import ConfigError
from hydraserve.training.data import Example
from hydraserve.training.settings import RESUMED, TrainSettings

RECORD_NAME = "run.json"
_DATA = "data"  # the digest's key, beside the settings'; paths of the files may change


def open_output(settings: TrainSettings) -> Path | None:
    """Make the folder; the checkpoint to go on from, None for a new run.

    Raises ConfigError for a folder that cannot be written or that holds what the settings do not speak of.
    """
    writable_folder(settings.output, "--output")
    found = newest_checkpoint(settings.checkpoints)
    if settings.resume and found is None:
        raise ConfigError(
            "--resume",
            got=f"no checkpoint in {settings.checkpoints}",
            expected="one",
            fix="start without --resume; --save-every N writes checkpoints",
        )
    if not settings.resume and not settings.overwrite:
        _refuse_what_is_there(settings, found)
    return found if settings.resume else None


def writable_folder(path: Path, option: str) -> None:
    """Make a folder, and see that files can be made in it. Raises ConfigError naming the option."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        raise ConfigError(option, got=f"{path}: {e.strerror or e}", expected="a folder that can be written") from e


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The last checkpoint that was written to its end, of those in a run's folder of checkpoints."""
    # The trainer's state is the last file that a checkpoint gets: without one, or half of one, it was interrupted.
    complete = [path.parent for path in checkpoints.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2])) if complete else None


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _refuse_what_is_there(settings: TrainSettings, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        raise ConfigError(
            "--output",
            got=f"{settings.output}, which holds checkpoints of an earlier run",
            expected="a new folder",
            fix="--resume to go on with that run, --overwrite to begin anew, or name another folder",
        )
    if (settings.output / CONFIG_NAME).exists():
        raise ConfigError(
            "--output",
            got=f"{settings.output}, which holds an adapter",
            expected="a new folder",
            fix="--overwrite to replace it, or name another folder",
        )


def keep_record(settings: TrainSettings, examples: Sequence[Example]) -> None:
    """Note what a new run begins with beside its checkpoints, of which none are left; a resumed one must have the same.

    Raises ConfigError naming the first setting that differs.
    """
    path = settings.checkpoints / RECORD_NAME
    record = _record(settings, examples)
    if not settings.resume:
        shutil.rmtree(settings.checkpoints, ignore_errors=True)
        if settings.save_every:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        return
    if not _is_json(path):
        raise ConfigError(
            "--resume",
            got=f"no readable {path}",
            expected="the file in which the run noted its settings",
            fix="--overwrite to begin anew, or name another folder",
        )
    begun = json.loads(path.read_bytes())
    for name, value in record.items():
        if begun.get(name) != value:
            digests = name == _DATA
            raise ConfigError(
                f"--resume, --{name.replace('_', '-')}",
                got="other examples" if digests else value,
                expected="those that the run began with" if digests else f"{begun.get(name)}, as the run began",
                fix="the same as before, --overwrite to begin anew, or another --output",
            )


def _record(settings: TrainSettings, examples: Sequence[Example]) -> dict[str, Any]:
    """What decides the course of a run, as JSON has it."""
    values = {name: value for name, value in asdict(settings).items() if name in RESUMED}
    turns = json.dumps([[(turn.role, turn.content) for turn in example.turns] for example in examples])
    record: dict[str, Any] = json.loads(json.dumps(values | {_DATA: hashlib.sha256(turns.encode()).hexdigest()}))
    return record


def save_adapter(settings: TrainSettings, model: PeftModel, base_name: str) -> None:
    """The adapter in `save_dtype`, under the base model's public name. Other files of the folder stay."""
    model.peft_config["default"].base_model_name_or_path = base_name
    dtype = getattr(torch, settings.save_dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks the hub about the base
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(Path(folder) / SAFETENSORS_NAME).items()}
        config = json.loads((Path(folder) / CONFIG_NAME).read_bytes())
    write_folder(settings.output, config, tensors, as_safetensors=True)
    # safetensors makes files that only their owner can read; the server often runs as another user.
    (settings.output / SAFETENSORS_NAME).chmod((settings.output / CONFIG_NAME).stat().st_mode)
