"""Which files are read for a path: the adapter's own folder, a training run's, a checkpoint's."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from adapter_folders import CONFIG, hydra_tensors, write, write_tensors

from hydraserve.adapters.checkpoint import inspect_adapter, load_adapter
from hydraserve.errors import AdapterNotFoundError, AmbiguousAdapterError, EmptyTensorError


def training_run(folder: Path, *, final: bool = True, steps: tuple[int, ...] = (20, 100, 40)) -> Path:
    """As the authors' training leaves it. Each saved adapter differs, so that tests can tell which was read."""
    for seed, step in enumerate(steps, 1):
        write(folder / f"checkpoint-{step}" / "sft_lora_model", CONFIG, hydra_tensors(seed=seed), binary=True)
        write_tensors(folder / f"checkpoint-{step}", hydra_tensors(seed=seed), binary=True, name="pytorch_model.bin")
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"never read")
    if final:
        write(folder / "sft_lora_model", CONFIG, hydra_tensors(), binary=True)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_the_adapter_at_the_end_of_training_comes_first(tmp_path: Path) -> None:
    run = training_run(tmp_path)
    summary = inspect_adapter(run)
    assert summary.source == run / "sft_lora_model"
    assert summary.note == "took sft_lora_model"
    assert load_adapter(run).digest == load_adapter(run / "sft_lora_model").digest
    assert inspect_adapter(run / "sft_lora_model").note == ""


def test_else_the_newest_checkpoint_by_number(tmp_path: Path) -> None:
    run = training_run(tmp_path, final=False)
    assert inspect_adapter(run).source == run / "checkpoint-100" / "sft_lora_model"
    assert inspect_adapter(run).note == "took checkpoint-100/sft_lora_model"


def test_what_was_chosen_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        load_adapter(training_run(tmp_path))
    assert f"adapter {tmp_path}: took sft_lora_model" in caplog.text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_checkpoint_whose_tensors_have_the_trainers_name(tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint-5"
    weights = write(checkpoint / "sft_lora_model") / "adapter_model.safetensors"
    weights.unlink()
    write_tensors(checkpoint, hydra_tensors(seed=3), binary=name.endswith(".bin"), name=name)
    for path in (checkpoint, tmp_path):
        summary = inspect_adapter(path)
        assert summary.weights_file == checkpoint / name
        assert name in summary.note
    expected = load_adapter(write(tmp_path / "same", CONFIG, hydra_tensors(seed=3)))
    assert load_adapter(checkpoint).digest == expected.digest


def test_a_checkpoint_with_both_files_itself(tmp_path: Path) -> None:
    """When pip's peft is installed, the Trainer writes an adapter into the checkpoint folder as well."""
    write(tmp_path / "checkpoint-5", CONFIG, hydra_tensors(), binary=True)
    write(tmp_path / "checkpoint-5" / "sft_lora_model", CONFIG, hydra_tensors(), binary=True)
    assert inspect_adapter(tmp_path / "checkpoint-5").source == tmp_path / "checkpoint-5"


def test_the_doubled_folder_of_the_best_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-5" / "sft_lora_model" / "sft_lora_model")
    assert inspect_adapter(tmp_path / "checkpoint-5").source == folder
    assert inspect_adapter(tmp_path).note == "took checkpoint-5/sft_lora_model/sft_lora_model"


def test_safetensors_comes_before_bin_and_this_is_said(tmp_path: Path) -> None:
    write(tmp_path, CONFIG, hydra_tensors(seed=1), binary=True)
    write_tensors(tmp_path, hydra_tensors(seed=2))
    summary = inspect_adapter(tmp_path)
    assert summary.weights_file.name == "adapter_model.safetensors"
    assert summary.note == "took adapter_model.safetensors and ignored adapter_model.bin"
    assert load_adapter(tmp_path).digest == load_adapter(write(tmp_path / "b", CONFIG, hydra_tensors(seed=2))).digest


def test_the_folders_name_means_nothing(tmp_path: Path) -> None:
    assert inspect_adapter(write(tmp_path / "plain-lora-checkpoint-7")).format == "hydralora"


def test_several_adapters_in_one_folder_are_listed(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / name)
    with pytest.raises(AmbiguousAdapterError, match=r"with adapters in a, b"):
        inspect_adapter(tmp_path)


def test_a_single_adapter_in_a_folder_is_pointed_at(tmp_path: Path) -> None:
    write(tmp_path / "a")
    with pytest.raises(AdapterNotFoundError, match=f"give {tmp_path / 'a'}"):
        inspect_adapter(tmp_path)


def test_ungathered_tensors_of_a_run_and_the_gathered_ones(tmp_path: Path) -> None:
    """What the fix in the message says works: the checkpoint's own file, under the adapter's name."""
    run = training_run(tmp_path, steps=(5,))
    empty = {name: tensor[:0, 0] for name, tensor in hydra_tensors().items()}
    saved = run / "checkpoint-5" / "sft_lora_model"
    write_tensors(saved, empty, binary=True)
    with pytest.raises(EmptyTensorError, match=r"copy that file here as adapter_model\.bin"):
        load_adapter(saved)
    os.replace(run / "checkpoint-5" / "pytorch_model.bin", saved / "adapter_model.bin")
    assert load_adapter(saved).heads == 3


def test_a_folder_linked_into_itself(tmp_path: Path) -> None:
    (tmp_path / "sft_lora_model").symlink_to(tmp_path)
    with pytest.raises(AdapterNotFoundError):
        inspect_adapter(tmp_path)
