"""What `hydraserve serve` reads from vLLM's arguments, refuses in them and fills in."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from hydra_kernels import SlotCapacity

from hydraserve.adapters.sizing import SlotPlan
from hydraserve.cli import engine_settings
from hydraserve.cli.engine_settings import WORKER_EXTENSION, check_memory, fill_in
from hydraserve.cli.main import main
from hydraserve.config import ServeConfig
from hydraserve.engine import launch
from hydraserve.engine.options import EngineOptions
from hydraserve.errors import ConfigError, ModelError, ModelTooLargeError
from hydraserve.models import memory

PLAN = SlotPlan(3, 5, SlotCapacity(rows=12, k=32, heads=4), 8, ("q_proj",), 1000)


def parse(*passthrough: str) -> Namespace:
    return engine_settings.parse(ServeConfig("short"), "/models/m", list(passthrough))


def filled(*passthrough: str) -> Namespace:
    parsed = parse(*passthrough)
    fill_in(parsed, ServeConfig("short"), PLAN)
    return parsed


def yaml(folder: Path, text: str) -> str:
    path = folder / "vllm.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("passthrough", "flag"),
    [
        (["--fully-sharded-loras"], "--fully-sharded-loras"),
        (["--fully_sharded_loras"], "--fully-sharded-loras"),
        (["--fully-sharded"], "--fully-sharded-loras"),  # an abbreviation that argparse takes
        (["--lora_modules", "a=/x"], "--lora-modules"),
        (["--no-enable-lora"], "--no-enable-lora"),
        (["--worker-extension-cls", "theirs.Extension"], "--worker-extension-cls"),
    ],
)
def test_settings_that_would_break_adapters_are_refused_however_they_are_written(
    passthrough: list[str], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        parse(*passthrough)


@pytest.mark.parametrize(
    ("text", "flag"),
    [("fully_sharded_loras: true", "--fully-sharded-loras"), ("lora-modules: ['a=/x']", "--lora-modules")],
)
def test_settings_of_a_configuration_file_are_refused_too(text: str, flag: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=flag):
        parse("--config", yaml(tmp_path, text))


def test_dual_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")
    with pytest.raises(ConfigError, match="DUAL_STREAM"):
        parse()


def test_a_worker_refuses_them_where_nobody_has_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under `vllm serve` with the plugin installed."""
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    from hydraserve.engine.manager import HydraWorkerLoRAManager

    def without_engine(self: Any, *_: object, **__: object) -> None:
        self.lora_config = Namespace(fully_sharded_loras=True)

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "__init__", without_engine)
    with pytest.raises(ConfigError, match="--fully-sharded-loras"):
        HydraWorkerLoRAManager(None, None, {})  # type: ignore[arg-type]


def test_our_values_are_filled_in() -> None:
    parsed = filled()
    assert parsed.enable_lora is True
    assert parsed.served_model_name == ["short", "/models/m"]
    assert (parsed.max_loras, parsed.max_cpu_loras, parsed.max_lora_rank) == (3, 5, 8)
    assert parsed.lora_target_modules == ["q_proj"]
    assert parsed.worker_extension_cls == WORKER_EXTENSION
    assert parsed.api_server_count == 1
    assert EngineOptions.from_vllm_config(parsed).capacity == PLAN.capacity
    assert filled("--headless").api_server_count is None


def test_what_the_user_says_to_vllm_wins(tmp_path: Path) -> None:
    assert filled("--max_lora_rank", "64", "--served-model-name", "other").served_model_name == ["other"]
    parsed = filled("--config", yaml(tmp_path, "max-lora-rank: 128\nmax-loras: 7"), "--max-loras", "9")
    assert (parsed.max_lora_rank, parsed.max_loras) == (128, 9)


def test_additional_configuration_is_kept_beside_ours() -> None:
    parsed = filled("--additional-config", json.dumps({"theirs": {"a": 1}}))
    assert parsed.additional_config["theirs"] == {"a": 1}
    assert EngineOptions.from_vllm_config(parsed).capacity == PLAN.capacity


@pytest.fixture
def too_small(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine that holds half of the tiny Llama's weights. Returns the bytes it lacks."""
    weights = memory.weight_bytes(str(tiny_llama))
    assert weights is not None
    monkeypatch.setattr(memory, "device_memory", lambda: ("the memory of a test", weights // 2))
    return weights - weights // 2


def test_a_model_that_does_not_fit_is_refused(tiny_llama: Path, too_small: int) -> None:
    with pytest.raises(ModelTooLargeError, match="the memory of a test"):
        check_memory(parse(), str(tiny_llama), 0)
    with pytest.raises(ModelTooLargeError):
        check_memory(parse("--quantization", "fp8"), str(tiny_llama), 2 * too_small)


@pytest.mark.parametrize(
    "passthrough",
    [
        ["--quantization", "fp8"],
        ["--quantization", "bitsandbytes"],
        ["--cpu-offload-gb", "1"],
        ["--nnodes", "2", "--tensor-parallel-size", "2"],
    ],
)
@pytest.mark.usefixtures("too_small")
def test_a_model_that_fits_in_the_end_is_not_refused(
    passthrough: list[str], tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_memory(parse(*passthrough), str(tiny_llama), 0)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "passthrough",
    [
        ["--nnodes", "2"],
        ["--distributed-executor-backend", "ray"],
        ["--headless"],
        ["--hf-overrides", '{"num_hidden_layers": 1}'],
    ],
)
def test_where_it_cannot_be_known_it_is_only_said(
    passthrough: list[str], tiny_llama: Path, too_small: int, capsys: pytest.CaptureFixture[str]
) -> None:
    check_memory(parse(*passthrough), str(tiny_llama), 2 * too_small)
    assert "warning: " in capsys.readouterr().err


@pytest.fixture
def remote_code(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint whose configuration and layers are code of its own: a Llama under another name."""
    config = json.loads((tiny_llama / "config.json").read_text())
    del config["architectures"]
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "own-llama", "auto_map": names}))
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own-llama'\n"
    )
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return tmp_path


def test_a_base_with_code_of_its_own_passes_the_checks_with_the_users_consent(
    remote_code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[Namespace] = []
    monkeypatch.setattr(launch, "run", started.append)
    arguments = ["serve", "--model", str(remote_code), "--port", "0"]
    assert main(arguments) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*arguments, "--trust_remote_code"]) == 0
    assert started[0].hydraserve.base_shapes["model.layers.0.self_attn.q_proj"] == (128, 128)


def test_the_checks_read_the_revision_and_use_the_token_that_vllm_will(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig

    asked: list[dict[str, Any]] = []

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.append({"name": name, **options})
        raise OSError("no network in a test")

    monkeypatch.setattr(AutoConfig, "from_pretrained", from_pretrained)
    arguments = ["--model", "owner/gated", "--port", "0", "--revision", "abc", "--hf-token", "hf_x"]
    with pytest.raises(ModelError):
        main(["serve", *arguments, "--debug"])
    assert asked == [{"name": "owner/gated", "trust_remote_code": False, "revision": "abc", "token": "hf_x"}]
