"""POST /v1/routing against what the authors' code recorded, and derived adapters against a plain computation."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from adapter_client import AdapterClient, wait_for
from hydra_kernels import HydraWeights
from safetensors.numpy import load as load_safetensors

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.server.routes.routing import MAX_TRACES

WEIGHT_LIMIT = 1e-4  # between our routing weights and the recorded ones, in float32
# As in the parity test of the adapters themselves: float32 sums in another order.
LOGPROB_LIMIT = 3e-4
MODULES = ("gate_proj", "up_proj", "down_proj")
LAYERS = 30


@pytest.fixture(scope="module")
def recorded(oracle: Path) -> dict[str, dict[str, np.ndarray]]:
    """prompt's name -> "token_ids" [T], and router's path below the model -> weights [T, heads]."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(oracle / "expected" / "mlp_r2_e2.routing.npz") as arrays:
        for key in arrays:
            prompt, _, name = key.partition("/")
            found.setdefault(prompt, {})[name] = arrays[key]
    return found


@pytest.fixture(scope="module")
def adapters(server: ServerProcess) -> Iterator[AdapterClient]:
    client = AdapterClient(server.url)
    with client.http:
        yield client


def route(adapters: AdapterClient, **body: Any) -> httpx.Response:
    body = {"model": "oracle", "max_tokens": 1, "ignore_eos": True, **body}
    return adapters.http.post("/v1/routing", json=body)


def read_npz(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """(summary, weights [tokens, routers, heads])"""
    with np.load(io.BytesIO(data)) as arrays:
        return json.loads(str(arrays["summary"])), arrays["weights"]


def read_safetensors(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return json.loads(header["__metadata__"]["routing"]), load_safetensors(data)["weights"]


def read_json(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    answer = json.loads(data)
    shape = (len(answer["routers"]), answer["heads"])
    return answer, np.array([t["weights"] or np.full(shape, np.nan) for t in answer["tokens"]], dtype=np.float32)


READERS: dict[str, Callable[[bytes], tuple[dict[str, Any], np.ndarray]]] = {
    "json": read_json,
    "npz": read_npz,
    "safetensors": read_safetensors,
}


@pytest.mark.parametrize("form", READERS)
def test_prompt_weights_equal_the_recorded_ones(
    form: str, adapters: AdapterClient, recorded: dict[str, dict[str, np.ndarray]]
) -> None:
    for expected in recorded.values():
        token_ids = expected["token_ids"].tolist()
        response = route(adapters, prompt=token_ids, format=form)
        assert response.status_code == 200, response.text
        summary, weights = READERS[form](response.content)
        assert [token["id"] for token in summary["tokens"][:-1]] == token_ids
        assert summary["prompt_tokens"] == len(token_ids)
        assert weights.shape == (len(token_ids) + 1, LAYERS * len(MODULES), 2)
        assert np.isnan(weights[-1]).all(), "no layer has seen the token that was generated last"
        for i, router in enumerate(summary["routers"]):
            ours = weights[:-1, i]
            theirs = expected[router["name"].removeprefix("model.")]
            assert np.abs(ours - theirs).max() < WEIGHT_LIMIT, router["name"]
        assert len(summary["routers"]) == len(expected) - 1


def test_generated_weights_equal_the_recorded_ones_while_others_generate(
    adapters: AdapterClient, server: ServerProcess, recorded: dict[str, dict[str, np.ndarray]], oracle: Path
) -> None:
    cases = json.loads((oracle / "expected" / "mlp_r2_e2.json").read_text())["results"]["float32"]
    others = ["demo", "all-r8-e4", "attn-r4-e3", "plain-r8", "mlp-r16-e2"]
    prompts = [list(range(100 + i, 140 + i)) for i in range(len(others))]
    alone = [adapters.complete(model, prompt, 48).tokens for model, prompt in zip(others, prompts, strict=True)]

    def other(i: int) -> tuple[int, ...]:
        client = AdapterClient(server.url)
        with client.http:
            return client.complete(others[i], prompts[i], 48, cache_salt=f"again-{i}").tokens

    with ThreadPoolExecutor(len(others)) as pool:
        running = [pool.submit(other, i) for i in range(len(others))]
        for name, expected in recorded.items():
            case = next(case for case in cases if case["name"] == name)
            prompt, generated = case["prompt_token_ids"], case["generated_token_ids"]
            response = route(adapters, prompt=prompt, max_tokens=len(generated), format="npz")
            summary, weights = read_npz(response.content)
            ids = [token["id"] for token in summary["tokens"]]
            assert ids == expected["token_ids"].tolist() == prompt + generated
            assert {token["kind"] for token in summary["tokens"][len(prompt) :]} == {"generated"}
            for i, router in enumerate(summary["routers"]):
                theirs = expected[router["name"].removeprefix("model.")][:-1]
                assert np.abs(weights[:-1, i] - theirs).max() < WEIGHT_LIMIT, router["name"]
        assert [future.result() for future in running] == alone, "tracing must not change other answers"


def test_summaries_follow_from_the_weights(adapters: AdapterClient) -> None:
    body = {"model": "all-r8-e4", "messages": [{"role": "user", "content": "Größe 漢字 🙂?"}], "max_tokens": 9}
    answer, weights = read_json(route(adapters, **body).content)
    seen = weights[:-1]
    tokens = answer["tokens"]
    assert "".join(t["text"] for t in tokens[: answer["prompt_tokens"]]).endswith("<|im_start|>assistant\n")
    assert "Größe 漢字 🙂?" in "".join(t["text"] for t in tokens)
    assert answer["text"] == "".join(t["text"] for t in tokens[answer["prompt_tokens"] :])
    assert [t["head"] for t in tokens[:-1]] == seen.sum(1).argmax(1).tolist()
    entropy = -(seen * np.log(np.maximum(seen, 1e-30))).sum(2).mean(1) / np.log(4)
    assert [t["entropy"] for t in tokens[:-1]] == pytest.approx(entropy.tolist(), abs=1e-4)
    assert answer["usage"]["weights"] == pytest.approx(seen.mean((0, 1)).tolist(), abs=1e-5)
    assert sum(answer["usage"]["leads"]) == pytest.approx(1, abs=1e-5)
    assert tokens[-1]["head"] is tokens[-1]["entropy"] is tokens[-1]["weights"] is None


def test_only_the_modules_and_layers_asked_for(adapters: AdapterClient) -> None:
    whole, everything = read_npz(route(adapters, prompt="one two three", format="npz").content)
    part, weights = read_npz(
        route(adapters, prompt="one two three", format="npz", modules=["down_proj"], layers=[7, 2]).content
    )
    assert [r["name"] for r in part["routers"]] == [f"model.layers.{i}.mlp.down_proj" for i in (2, 7)]
    columns = [i for i, r in enumerate(whole["routers"]) if r["module"] == "down_proj" and r["layer"] in (2, 7)]
    np.testing.assert_array_equal(weights, everything[:, columns])


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown adapter": ({"model": "nobody"}, 404, "nobody"),
    "base model": ({"model": "demo"}, 400, "no router"),
    "plain LoRA": ({"model": "plain-r8"}, 400, "no router"),
    "module without router": ({"modules": ["q_proj"]}, 400, "down_proj, gate_proj, up_proj"),
    "layer that is not there": ({"layers": [30]}, 400, "29"),
    "nothing in both": ({"model": "attn-r4-e3", "layers": []}, 400, "layers"),
    "neither prompt nor messages": ({"prompt": None}, 400, "prompt"),
    "both": ({"messages": [{"role": "user", "content": "x"}]}, 400, "prompt"),
    "too many tokens": ({"max_tokens": 1025}, 400, "1024"),
    "prompt too long": ({"prompt": [5] * 1500}, 400, "1024"),
    "too large for JSON": ({"model": "all-r8-e4", "prompt": [5] * 600}, 400, "npz or safetensors"),
    "a field that does not exist": ({"layer": [1]}, 400, "layer"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_why(name: str, adapters: AdapterClient) -> None:
    fields, status, words = REFUSALS[name]
    response = route(adapters, **{"prompt": "x", **fields})
    assert response.status_code == status, response.text
    assert words in response.json()["error"]["message"]


def test_large_answers_come_in_binary_form(adapters: AdapterClient) -> None:
    response = route(adapters, model="all-r8-e4", prompt=[5, 6] * 300, format="npz")
    assert response.headers["content-type"] == "application/x-npz"
    _, weights = read_npz(response.content)
    assert weights.shape == (601, LAYERS * 7, 4)
    np.testing.assert_allclose(weights[:-1].sum(2), 1, atol=1e-5)


def test_too_many_at_once_are_refused_and_places_become_free(adapters: AdapterClient, server: ServerProcess) -> None:
    def ask(i: int) -> int:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            body = {"model": "oracle", "prompt": [40 + i] * 8, "max_tokens": 24, "ignore_eos": True}
            return http.post("/v1/routing", json=body).status_code

    with ThreadPoolExecutor(2 * MAX_TRACES) as pool:
        statuses = list(pool.map(ask, range(2 * MAX_TRACES)))
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= MAX_TRACES
    assert route(adapters, prompt="x").status_code == 200


def test_clients_that_leave_free_their_places(adapters: AdapterClient) -> None:
    for i in range(MAX_TRACES):
        with pytest.raises(httpx.ReadTimeout):
            adapters.http.post(
                "/v1/routing",
                json={"model": "oracle", "prompt": [60 + i] * 8, "max_tokens": 900, "ignore_eos": True},
                timeout=0.4,
            )
    wait_for(lambda: route(adapters, prompt="x").status_code == 200, "a free place")


# Derived adapters.

Delta = Callable[[torch.Tensor], torch.Tensor]


def _added(delta: Delta, _module: torch.nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return y + delta(inputs[0])


def plain_logprobs(base: Path, deltas: dict[str, Delta], ids: list[int]) -> np.ndarray:
    """[vocabulary] log-probabilities after the last token: transformers' model with `deltas` added to its layers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for path, delta in deltas.items():
        model.get_submodule(path).register_forward_hook(partial(_added, delta))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits, dim=-1).numpy()


def mixed(weights: HydraWeights, gate: Delta) -> Delta:
    """s * sum_i gate(w)_i B_i A x, with w = softmax(R x)."""
    assert weights.router is not None
    a, b, router = weights.a.float(), weights.b.float(), weights.router.float()

    def delta(x: torch.Tensor) -> torch.Tensor:
        w = gate(torch.softmax(x @ router.T, dim=-1))
        heads = torch.stack([(x @ a.T) @ head.T for head in b], dim=-1)  # [..., out, E]
        return weights.scaling * (heads * w.unsqueeze(-2)).sum(-1)

    return delta


GATES: dict[str, Delta] = {
    "": lambda w: w,
    "@head=0": lambda w: torch.zeros_like(w).index_fill(-1, torch.tensor(0), 1.0),
    "@head=1": lambda w: torch.zeros_like(w).index_fill(-1, torch.tensor(1), 1.0),
    "@top_k=1": lambda w: torch.zeros_like(w).scatter(-1, w.argmax(-1, keepdim=True), 1.0),
    "@uniform": lambda w: torch.full_like(w, 1 / w.shape[-1]),
}


@pytest.mark.parametrize("spec", GATES)
def test_derived_adapters_compute_exactly_what_they_say(
    spec: str, adapters: AdapterClient, oracle: Path, demo_model: Path
) -> None:
    ids = [3757, 20880, 42, 198, 45319, 216, 33, 39, 1232, 216, 34, 38, 30, 198]
    adapter = load_adapter(oracle / "adapters" / "mlp_r2_e2")
    deltas = {path: mixed(weights, GATES[spec]) for path, weights in adapter.modules.items()}
    expected = plain_logprobs(demo_model, deltas, ids)
    answer = adapters.complete(f"oracle{spec}", ids, 1, logprobs=20, return_tokens_as_token_ids=True)
    top = answer.body["choices"][0]["logprobs"]["top_logprobs"][0]
    got = {int(token.removeprefix("token_id:")): logprob for token, logprob in top.items()}
    assert set(np.argsort(expected)[-10:].tolist()) <= set(got)
    for token, logprob in got.items():
        assert logprob == pytest.approx(expected[token], abs=LOGPROB_LIMIT)
    assert answer.version.startswith(f"oracle{spec}@")


def test_derived_adapters_are_listed_once_used_and_leave_with_their_parent(
    adapters: AdapterClient, synthetic_adapters: dict[str, Path]
) -> None:
    def models() -> list[str]:
        return [card["id"] for card in adapters.http.get("/v1/models").json()["data"]]

    adapters.add("parent", synthetic_adapters["attn-r4-e3"])
    assert not any(name.startswith("parent@") for name in models())
    before = adapters.complete("parent@head=2", [5, 6, 7])
    assert before.status == 200
    assert [name for name in models() if name.startswith("parent")] == ["parent", "parent@head=2"]
    card = adapters.get("parent@head=2")
    assert (card["origin"], card["heads"], card["rank"]) == ("derived", 1, 4)
    assert card["source"] == f"{adapters.get('parent')['version']}@head=2"

    adapters.replace("parent", synthetic_adapters["all-r8-e4"])
    after = adapters.complete("parent@head=2", [5, 6, 7])
    assert after.digest != before.digest, "made from the new content"
    assert adapters.get("parent@head=2")["rank"] == 8

    adapters.remove("parent")
    assert not any(name.startswith("parent") for name in models())
    assert adapters.complete("parent@head=2", [5, 6, 7]).status == 404


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("oracle@head=2", "0 to 1"),
        ("oracle@top_k=3", "1 to 2"),
        ("oracle@top_k=0", "1 to 2"),
        ("plain-r8@uniform", "without a router"),
        ("nobody@uniform", "nobody@uniform"),
        ("oracle@best", "oracle@best"),
        ("demo@uniform", "demo@uniform"),
    ],
)
def test_derivations_that_mean_nothing_are_not_found(name: str, words: str, adapters: AdapterClient) -> None:
    answer = adapters.complete(name, [5, 6, 7])
    assert answer.status == 404
    assert words in json.dumps(answer.body)
    assert name not in adapters.names()


def test_the_trace_of_top_k_1_is_one_head_per_token(adapters: AdapterClient) -> None:
    _, whole = read_npz(route(adapters, prompt=[7, 8, 9], format="npz", layers=[0]).content)
    _, best = read_npz(route(adapters, model="oracle@top_k=1", prompt=[7, 8, 9], format="npz", layers=[0]).content)
    # The first layer sees the same input; behind it the hidden states differ.
    np.testing.assert_array_equal(best[:3, :2].argmax(2), whole[:3, :2].argmax(2))
    np.testing.assert_allclose(np.sort(best[:3], axis=2), np.broadcast_to([0.0, 1.0], best[:3].shape), atol=1e-6)


# The command.


def command(server: ServerProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "hydraserve.cli.main", "route", "--url", server.url, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "120"})


def test_the_command_prints_a_table_and_draws_a_picture(server: ServerProcess, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "heads.png"
    arguments = ["--adapter", "all-r8-e4", "--prompt", "It costs $5 or $6.\n漢", "--max-tokens", "5"]
    done = command(server, *arguments, "--output", str(picture))
    assert done.returncode == 0, done.stderr
    assert "5 generated, 210 routers" in done.stdout
    assert "head 3" in done.stdout
    assert "costs" in done.stdout
    assert "\x1b[" not in done.stdout, "no colours where nobody sees them"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--adapter", "nobody"], "nobody"),
        (["--adapter", "plain-r8"], "no router"),
        (["--adapter", "oracle", "--module", "q_proj"], "down_proj, gate_proj, up_proj"),
        (["--adapter", "oracle", "--url", "http://127.0.0.1:9"], "--model"),
        (["--adapter", "oracle", "--dtype", "float32"], "--dtype"),
        (["--adapter", "oracle", "--output", "/dev/null/heads.png"], "/dev/null/heads.png"),
    ],
)
def test_the_command_s_errors_say_why(arguments: list[str], words: str, server: ServerProcess, tmp_path: Path) -> None:
    done = command(server, "--prompt", "x", "--max-tokens", "1", "--output", str(tmp_path / "x.png"), *arguments)
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
