"""Fixtures that every part of the tests may use: base models that need no model hub, and the reference data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


# What starts engines that no other file uses.
OWN_ENGINES = (
    "tests/deploy/test_image_entry_point.py",
    *(
        f"tests/e2e/test_{name}_e2e.py"
        for name in ("api_servers", "bases", "lifecycle", "plan", "replicas", "restart", "security", "sources")
    ),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also the tests that are marked as long")


def pytest_configure() -> None:
    """Several processes that each compute with all cores take turns at waiting for one another."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes a minute or more: make test ARGS=--long"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Which tests several processes (pytest -n) do not divide: those of one file, and all that start engines, in two
    parts: those that share servers, and those with engines of their own. Not xdist's own groups: those of xdist 3.8 do
    nothing under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file in OWN_ENGINES:
                return "own engines"
            return "engines" if file.startswith("tests/e2e/") else file

    return Scheduler(config, log)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo base: a real small Llama in bf16, made once and kept in the cache folder between runs."""
    from hydraserve.models import demo_model

    return demo_model()


@pytest.fixture(scope="session")
def oracle() -> Path:
    """An adapter trained with the authors' code, and what that code answers; see the README there."""
    return ROOT / "tests" / "oracle"


@pytest.fixture(scope="session")
def tiny_llama(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random float32 Llama checkpoint for fast engine tests: 4 heads and 2 KV heads, so that two ranks can share it.

    hidden 128, intermediate 256, 2 layers, vocabulary 512 with a working tokenizer: the first of the demo's tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        hidden_size=128,  # heads of 32: the smallest that vLLM's CPU attention takes
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        # Wide enough that the layers decide the tokens; with the usual 0.02 the last token would repeat itself.
        initializer_range=0.15,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    save_first_tokens(demo_model, folder, config.vocab_size)
    return folder


def save_first_tokens(source: Path, folder: Path, size: int) -> None:
    """A tokenizer of the first `size` tokens: special ones, the 256 bytes, then the earliest merges."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = {token: i for token, i in tokenizer["model"]["vocab"].items() if i < size}
    merges = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) in vocabulary]
    tokenizer["model"].update(vocab=vocabulary, merges=merges)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((source / name).read_text())
