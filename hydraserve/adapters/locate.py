"""From the path a user gives to the two files of an adapter: its configuration and its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from hydraserve.errors import AdapterNotFoundError, AmbiguousAdapterError, UnreadableFileError

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
# In the order of preference. safetensors first: it cannot carry code. The last two are what transformers'
# Trainer calls the same tensors in checkpoint-N of a training run with the authors' code.
WEIGHTS_NAMES = (SAFETENSORS_NAME, BIN_NAME)
TRAINER_NAMES = ("model.safetensors", "pytorch_model.bin")
# The sub-folder into which the authors' training saves the adapter.
SAVED_NAME = "sft_lora_model"
# Further files of an adapter that LLaVA's training splits up: weights, and the numbers of MLLM-HydraLoRA's training.
OTHER_WEIGHTS_NAME = "non_lora_trainables.bin"
ARGUMENTS_NAMES = ("moe_args.json", "moe_args.pth")
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,12})")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Where an adapter's files are.

    folder:  the one with adapter_config.json.
    config:  that file.
    weights: the file with the tensors, .safetensors or .bin.
    note:    which folder or file was chosen, where there was a choice; else "".
    """

    folder: Path
    config: Path
    weights: Path
    note: str = ""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that is read."""
        others = [self.folder / name for name in (OTHER_WEIGHTS_NAME, *ARGUMENTS_NAMES)]
        return self.config, self.weights, *(path for path in others if path.exists())


def locate(path: Path) -> AdapterFiles:
    """Find the adapter at `path`: its own folder, or the folder or a checkpoint of the training run that made it.

    In a run's folder the adapter saved at the end of training comes first, then the newest checkpoint.

    Raises AdapterNotFoundError when there is none or a file of it is missing, AmbiguousAdapterError when the folder
    merely contains several adapters, UnreadableFileError when it cannot be looked into.
    """
    try:
        if not path.exists():
            raise AdapterNotFoundError("path", got=str(path), expected="a folder that exists", fix="check its spelling")
        if not path.is_dir():
            raise AdapterNotFoundError(
                "path", got=f"{path}, not a folder", expected=f"the folder with {CONFIG_NAME}", fix="give that folder"
            )
        found = _in_folder(path) or _in_newest_checkpoint(path)
        if found is None:
            raise _nothing_at(path)
    except OSError as error:
        raise UnreadableFileError(
            f"folder {path}", got=error.strerror or error, expected="a readable folder", fix="check its permissions"
        ) from error
    if found.folder == path:
        return found
    notes = [f"took {found.folder.relative_to(path)}", found.note]
    return replace(found, note="; ".join(filter(None, notes)))


def _in_folder(folder: Path, levels: int = 2) -> AdapterFiles | None:
    """The adapter in the folder itself, or in the sub-folder that the authors' training makes. None: neither.

    levels: how deep to look for that sub-folder. Two, because transformers nests it in itself when it also keeps
    the best checkpoint.
    """
    config = folder / CONFIG_NAME
    if config.exists():
        weights, note = _weights(folder, WEIGHTS_NAMES + TRAINER_NAMES)
        if weights is None:
            raise AdapterNotFoundError(
                "weights file",
                got=f"only {CONFIG_NAME} in {folder.name or folder}",
                expected=f"{SAFETENSORS_NAME} or {BIN_NAME} beside it",
                fix="copy the adapter again, with all its files",
            )
        return AdapterFiles(folder, config, weights, note)
    saved = folder / SAVED_NAME
    if levels == 0 or not saved.is_dir():
        return None
    if (saved / CONFIG_NAME).exists() and _weights(saved, WEIGHTS_NAMES)[0] is None:
        # A checkpoint whose callback saved no tensors still has them under the Trainer's name, one level up.
        weights, _ = _weights(folder, TRAINER_NAMES)
        if weights is not None:
            return AdapterFiles(saved, saved / CONFIG_NAME, weights, f"with {weights.name} from one level up")
    return _in_folder(saved, levels - 1)


def _weights(folder: Path, names: tuple[str, ...]) -> tuple[Path | None, str]:
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        return None, ""
    ignored = ", ".join(path.name for path in present[1:])
    return present[0], f"took {present[0].name} and ignored {ignored}" if ignored else ""


def _in_newest_checkpoint(folder: Path) -> AdapterFiles | None:
    numbered = [(int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT.fullmatch(p.name)) and p.is_dir()]
    for _, checkpoint in sorted(numbered, reverse=True):
        found = _in_folder(checkpoint)
        if found is not None:
            return found
    return None


def _nothing_at(path: Path) -> AdapterNotFoundError:
    below = sorted(_adapters_below(path))
    if len(below) > 1:
        return AmbiguousAdapterError(
            "path",
            got=f"{path}, with adapters in {', '.join(below)}",
            expected="one adapter",
            fix="give one of these sub-folders",
        )
    fix = f"give {path / below[0]}" if below else f"give the folder that has {CONFIG_NAME} in it"
    return AdapterNotFoundError("path", got=f"{path}, without {CONFIG_NAME}", expected="an adapter's folder", fix=fix)


def _adapters_below(path: Path) -> Iterator[str]:
    for child in path.iterdir():
        if child.is_dir() and ((child / CONFIG_NAME).exists() or (child / SAVED_NAME).is_dir()):
            yield child.name
