"""Whole training runs on a tiny model: the adapter, resuming, heads, plain LoRA, refusals."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from hydraserve.errors import ConfigError, ModelNotFoundError
from hydraserve.models import hub_name
from hydraserve.training.data import DataError, load_examples
from hydraserve.training.output import keep_record
from hydraserve.training.run import _arguments, train
from hydraserve.training.settings import TrainSettings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers that the question decides: a letter, doubled."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    rows = [{"instruction": f"{sign} {word}", "output": sign * 2} for sign in letters for word in ("say", "tell")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def settings(tiny_model: Path, data: Path, tmp_path: Path) -> TrainSettings:
    return TrainSettings(
        model=str(tiny_model), data=(data,), output=tmp_path / "out", heads=2, rank=4, lr=1e-2, epochs=6,
        template="plain", max_length=64, batch_size=4, log_every=5, dtype="float32",
    )  # fmt: skip


def run(settings: TrainSettings) -> tuple[object, str]:
    out = io.StringIO()
    return train(settings, Console(file=out, width=200)), out.getvalue()


def test_train_writes_an_adapter_that_peft_loads(settings: TrainSettings, tiny_model: Path) -> None:
    summary, log = run(replace(settings, eval_share=0.1, base_name="someone/base", lr=2e-2, epochs=10))
    assert summary.last_loss < 0.6 * summary.first_loss
    assert summary.eval_loss < summary.first_loss
    assert (summary.examples, summary.eval_examples) == (47, 5)
    assert "step 5/120  loss " in log
    assert "lr " in log
    assert log.count("step 120/120  eval loss ") == 1
    config = json.loads((settings.output / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_heads"], config["r"]) == ("HYDRALORA", 2, 4)
    assert config["base_model_name_or_path"] == "someone/base"
    modes = {path.stat().st_mode for path in settings.output.glob("adapter_*")}
    assert len(modes) == 1, "weights are as readable as the config"
    record = json.loads((settings.output / "training.json").read_text())
    assert record["summary"]["steps"] == summary.steps == 120
    assert record["history"][-1]["step"] == 120
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), settings.output)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "hydralora_" in name)
    assert summary.trainable_parameters == parameters


def test_trained_model_answers(settings: TrainSettings, tiny_model: Path, tokenizer: object) -> None:
    run(replace(settings, packing=True, batch_size=1, epochs=30))
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model), settings.output).eval()
    answers = {}
    for sign in "cjt":
        ids = torch.tensor([tokenizer(f"{sign} say\n")["input_ids"]])
        answers[sign] = tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)[0, -3:])
    assert answers == {sign: f"{sign}{sign}</s>" for sign in "cjt"}


def test_resume_gives_what_one_run_gives(settings: TrainSettings) -> None:
    settings = replace(settings, max_steps=8, save_every=4, log_every=1, dropout=0.1)
    whole, _ = run(settings)
    expected = load_file(settings.output / "adapter_model.safetensors")
    broken = replace(settings, output=settings.output.parent / "again")
    # A run that stops after its first checkpoint: the same folder with only that checkpoint left.
    (settings.checkpoints).rename(settings.output.parent / "kept")
    (broken.checkpoints).mkdir(parents=True)
    for name in ("checkpoint-4", "run.json"):
        (settings.output.parent / "kept" / name).rename(broken.checkpoints / name)
    resumed, log = run(replace(broken, resume=True))
    assert "step 5/8" in log
    assert "step 4/8" not in log
    assert resumed.steps == whole.steps == 8
    got = load_file(broken.output / "adapter_model.safetensors")
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)


def test_resume_passes_over_a_checkpoint_that_was_being_written(settings: TrainSettings) -> None:
    settings = replace(settings, save_every=2, log_every=1)
    run(replace(settings, max_steps=2))
    (settings.checkpoints / "checkpoint-3").mkdir()
    (settings.checkpoints / "checkpoint-3" / "adapter_config.json").write_text("{}")
    (settings.checkpoints / "checkpoint-4").mkdir()
    (settings.checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    summary, log = run(replace(settings, max_steps=4, resume=True))
    assert "step 3/4" in log
    assert "step 2/4" not in log
    assert summary.steps == 4


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rank", 8, "--resume, --rank: got 8, expected 4, as the run began"),
        ("method", "lora", "--resume, --method: got lora, expected hydralora"),
        ("target_modules", ("q_proj",), r"--target-modules: got \['q_proj'\], expected \[\]"),
        ("seed", 1, "--seed: got 1, expected 0"),
        ("data", (), "--data: got other examples, expected those that the run began with"),
    ],
)
def test_a_run_resumes_only_as_it_began(settings: TrainSettings, name: str, value: object, message: str) -> None:
    examples = load_examples(settings.data)
    keep_record(replace(settings, save_every=2), examples)
    resumed = replace(settings, resume=True, log_every=1, max_steps=9)
    keep_record(resumed, examples)  # more steps, other lines in the log
    changed = resumed if name == "data" else replace(resumed, **{name: value})
    with pytest.raises(ConfigError, match=message):
        keep_record(changed, examples[1:] if name == "data" else examples)
    (settings.checkpoints / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"--resume: got no readable .*run\.json"):
        keep_record(resumed, examples)


def test_an_adapter_is_replaced_only_when_told_so(settings: TrainSettings) -> None:
    settings = replace(settings, max_steps=1, save_every=1)
    run(settings)
    shutil.rmtree(settings.checkpoints)
    (settings.output / "README.md").write_text("mine")
    before = (settings.output / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"--output: got .*, which holds an adapter.*--overwrite to replace it"):
        run(replace(settings, seed=1))
    assert (settings.output / "adapter_model.safetensors").read_bytes() == before
    (settings.checkpoints / "checkpoint-7").mkdir(parents=True)
    run(replace(settings, seed=1, overwrite=True))
    assert (settings.output / "adapter_model.safetensors").read_bytes() != before
    assert (settings.output / "README.md").read_text() == "mine"
    assert [path.name for path in settings.checkpoints.glob("checkpoint-*")] == ["checkpoint-1"]


def test_an_adapter_half_written_is_none(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hydraserve.adapters.formats.writing.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(replace(settings, max_steps=1))
    assert not (settings.output / "adapter_config.json").exists()


def test_packing_is_refused_where_examples_would_see_one_another(
    settings: TrainSettings, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 48}
    opt = OPTConfig(vocab_size=len(tokenizer), word_embed_proj_dim=32, init_std=0.2, eos_token_id=0, **sizes)
    OPTForCausalLM(opt).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    settings = replace(settings, model=str(tmp_path / "opt"), max_steps=1)
    with pytest.raises(ConfigError, match=r"--packing: got OPTForCausalLM, which does not keep.*without --packing"):
        run(replace(settings, packing=True))
    run(settings)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("nope",), "nope, which the base model does not have, expected linear layers: down_proj, .*v_proj"),
        (("q_proj", "embed_tokens"), "embed_tokens, a Embedding"),
        (("mlp",), "mlp, a LlamaMLP"),
    ],
)
def test_targets_that_are_no_linear_layers(settings: TrainSettings, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"--target-modules: got {message}"):
        run(replace(settings, target_modules=targets))


def test_all_linear_may_be_said(settings: TrainSettings) -> None:
    summary, _ = run(replace(settings, target_modules=("all-linear",), max_steps=1))
    tensors = load_file(settings.output / "adapter_model.safetensors")
    assert len({name.split(".")[-3] for name in tensors}) == 7
    assert summary.steps == 1


def test_evaluation_takes_examples_that_are_long_enough(settings: TrainSettings, tmp_path: Path) -> None:
    rows = [{"instruction": "a long question", "output": "x"}] * 30 + [{"instruction": "s", "output": "xy"}] * 4
    rows.append({"instruction": "s", "output": "a long answer"})
    data = tmp_path / "mixed.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    summary, _ = run(replace(settings, data=(data,), eval_share=0.2, max_length=8, max_steps=1))
    assert (summary.examples, summary.eval_examples) == (4, 1)
    assert (summary.cut_examples, summary.dropped_examples) == (1, 30)
    assert summary.eval_loss is not None


def test_an_end_of_any_kind_gives_the_cursor_back(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hydraserve.training.progress.ProgressLog.on_step_end", interrupted)
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        train(replace(settings, max_steps=2), Console(file=out, width=200, force_terminal=True))
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1


def test_one_process_uses_one_gpu(settings: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 4)
    assert _arguments(settings, evaluates=False)._n_gpu == 1


def test_short_names_are_written_in_full(settings: TrainSettings) -> None:
    assert hub_name("llama3.2-1b") == "meta-llama/Llama-3.2-1B"
    assert hub_name("demo") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_name(settings.model) == settings.model


def test_same_seed_same_adapter(settings: TrainSettings) -> None:
    settings = replace(settings, max_steps=3)
    run(settings)
    first = load_file(settings.output / "adapter_model.safetensors")
    again = replace(settings, output=settings.output.parent / "again")
    run(again)
    second = load_file(again.output / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_gradient_checkpointing_changes_nothing_but_memory(settings: TrainSettings) -> None:
    settings = replace(settings, max_steps=3, packing=True, eval_share=0.2, load_balance=0.1, accumulate=2)
    plain, _ = run(settings)
    checkpointed, _ = run(replace(settings, gradient_checkpointing=True, output=settings.output.parent / "again"))
    assert checkpointed.last_loss == pytest.approx(plain.last_loss, rel=1e-4)
    assert checkpointed.eval_loss == pytest.approx(plain.eval_loss, rel=1e-4)
    tensors = [load_file(s.output / "adapter_model.safetensors") for s in (plain, checkpointed)]
    for name, expected in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)


def test_plain_lora_and_save_dtype(settings: TrainSettings) -> None:
    summary, _ = run(
        replace(settings, method="lora", max_steps=2, save_dtype="bfloat16", target_modules=("q_proj", "up_proj"))
    )
    tensors = load_file(settings.output / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "up_proj"}
    assert json.loads((settings.output / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert summary.heads == 1


def test_heads_auto(settings: TrainSettings) -> None:
    summary, log = run(replace(settings, heads="auto", max_steps=1))
    assert summary.heads >= 2
    assert f"suggested: --heads {summary.heads} (52 examples)" in log
    assert next(line for line in log.splitlines() if "elbow" in line).split()[0] == str(summary.heads)
    assert (settings.output / "heads.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((settings.output / "adapter_config.json").read_text())["num_heads"] == summary.heads


def test_heads_auto_with_dbscan(settings: TrainSettings) -> None:
    summary, log = run(replace(settings, heads="auto", heads_method="dbscan", max_steps=1))
    assert "dense groups" in log
    assert summary.heads >= 2
    assert not (settings.output / "heads.png").exists()


def test_refusals(settings: TrainSettings) -> None:
    with pytest.raises(ConfigError, match=r"--resume: got no checkpoint in .*--save-every"):
        run(replace(settings, resume=True))
    with pytest.raises(ModelNotFoundError, match="base model: got '/no/such'"):
        run(replace(settings, model="/no/such"))
    settings.output.mkdir(exist_ok=True)
    with pytest.raises(ModelNotFoundError, match=r"--model: got .*out: .*expected a transformers model"):
        run(replace(settings, model=str(settings.output)))
    long = settings.data[0].parent / "long.jsonl"
    long.write_text(json.dumps({"instruction": "a long question", "output": "x"}))
    with pytest.raises(DataError, match="no example with an answer within 8 tokens"):
        run(replace(settings, data=(long,), max_length=8))
    (settings.checkpoints / "checkpoint-3").mkdir(parents=True)
    (settings.checkpoints / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        run(settings)
    with pytest.raises(ConfigError, match=r"--output: got .*data\.jsonl/out: Not a directory, expected a folder"):
        run(replace(settings, output=settings.data[0] / "out"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("method", "dora", "method: got dora, expected one of hydralora, lora"),
        ("rank", 0, "rank: got 0, expected at least 1"),
        ("heads", 0, "heads: got 0"),
        ("lr", 0.0, "lr: got 0.0, expected more than 0"),
        ("dropout", 1.0, "dropout: got 1.0"),
        ("max_length", 4, "max_length: got 4"),
        ("max_heads", 2, "max_heads: got 2"),
        ("heads_method", "guess", "heads_method: got guess, expected one of kmeans, dbscan"),
    ],
)
def test_settings_refuse_impossible_values(settings: TrainSettings, name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(settings, **{name: value})
