"""Tensor and pipeline parallel give the tokens of one process, with adapters on all modules."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAPTERS = {"hydra-r4-e3": (4, 3), "hydra-r8-e2": (8, 2), "plain-r4": (4, 1)}
ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def answers(tiny_llama: Path, adapters: Path, flags: list[str], env: dict[str, str], log: Path) -> dict[str, list[int]]:
    """Greedy tokens of every model of a server started with `flags`."""
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", *flags]
    arguments += ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8"]
    for name in ADAPTERS:
        arguments += ["--adapter", f"{name}={adapters / name}"]
    with ServerProcess(arguments, log, {**ENV, **env}) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0)

        def greedy(model: str) -> list[int]:
            answer = client.completions.create(
                model=model,
                prompt=[5, 17, 42, 7, 99, 23],
                max_tokens=20,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]

        with ThreadPoolExecutor(4) as pool:
            models = ["tiny", *ADAPTERS]
            return dict(zip(models, pool.map(greedy, models), strict=True))


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-adapters")
    shapes = base_shapes(str(tiny_llama))
    for seed, (name, (rank, heads)) in enumerate(ADAPTERS.items()):
        save_adapter(make_adapter(shapes, TARGETS, rank, heads, seed=seed), folder / name)
    return folder


@pytest.fixture(scope="module")
def single(tiny_llama: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    found = answers(tiny_llama, adapters, [], {}, tmp_path_factory.mktemp("single") / "log")
    assert len({tuple(tokens) for tokens in found.values()}) == len(found), "every adapter must change the tokens"
    return found


@pytest.mark.parametrize("flag", ["--tensor-parallel-size", "--pipeline-parallel-size"])
def test_two_ranks_equal_one(
    flag: str, tiny_llama: Path, adapters: Path, single: dict[str, list[int]], tmp_path: Path
) -> None:
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    assert answers(tiny_llama, adapters, [flag, "2"], env, tmp_path / "log") == single
