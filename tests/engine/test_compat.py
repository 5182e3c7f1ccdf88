"""Where vLLM is extended: versions, missing symbols, running twice, and what is in place afterwards."""

from __future__ import annotations

import time
import types

import pytest
import vllm
import zmq

from hydraserve.engine import compat, plugin
from hydraserve.engine.layers import LAYER_CLASSES
from hydraserve.errors import MissingSymbolError, VersionError


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "0.320.1", "1.0"])
def test_another_minor_version_is_refused_naming_both(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(VersionError) as caught:
        compat.check_version()
    assert version in str(caught.value)
    assert compat.SUPPORTED in str(caught.value)


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.7+cpu"])
def test_patch_versions_are_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    compat.check_version()


def test_a_renamed_symbol_is_named_with_both_versions() -> None:
    with pytest.raises(MissingSymbolError) as caught:
        compat._symbol(types.ModuleType("vllm.gone"), "Something")
    message = str(caught.value)
    assert "vllm.gone.Something" in message
    assert vllm.__version__ in message
    assert compat.SUPPORTED in message


def test_processes_of_the_engine_sleep_while_they_wait_on_cpu() -> None:
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    compat.apply()
    condition, begun = SpinCondition(True, zmq.Context.instance(), "inproc://nobody-writes"), time.monotonic()
    for _ in range(100):
        condition.wait()
    assert time.monotonic() - begun >= 100 * compat.WAIT


def test_plugin_may_run_twice_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora import utils
    from vllm.v1.worker import lora_model_runner_mixin as mixin

    from hydraserve.engine.manager import HydraWorkerLoRAManager

    monkeypatch.setenv("HYDRASERVE_PLUGIN", "0")
    before = utils._all_lora_classes
    plugin.register()
    assert utils._all_lora_classes is before
    monkeypatch.setenv("HYDRASERVE_PLUGIN", "1")
    plugin.register()
    plugin.register()
    assert mixin.LRUCacheWorkerLoRAManager is HydraWorkerLoRAManager
    assert utils._all_lora_classes[: len(LAYER_CLASSES)] == LAYER_CLASSES
    assert len(set(utils._all_lora_classes)) == len(utils._all_lora_classes)
