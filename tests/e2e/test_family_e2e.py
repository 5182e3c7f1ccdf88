"""Every format of the family, and composed adapters, through a real server: the log-probabilities of transformers
with the formats' own layers added in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import openai
import pytest
import safetensors.torch
import torch
from adapter_client import AdapterClient
from family import Expert, Member, SharedRouterMember, family, shared_routers
from torch import nn

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.compose import compose
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes

# As for the authors' code (test_oracle_e2e): a wrong gate or scaling moves log-probabilities by more than 5e-3.
FLOAT32_LIMIT = 3e-4
PROMPTS = ([338, 75, 346, 50, 343, 288], [504, 240, 282, 253, 442, 314, 260, 189, 28])
TOKENS = 8

Applied = Callable[[nn.Module], AbstractContextManager[None]]


@pytest.fixture(scope="module")
def members(tiny_llama: Path) -> dict[str, Member | SharedRouterMember]:
    """One adapter of each format for the tiny Llama's attention and feed-forward blocks, without k and v."""
    shapes = {
        path: shape
        for path, shape in base_shapes(str(tiny_llama)).items()
        if path.rpartition(".")[2] in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    return {
        **family(shapes),
        "mllm, dense": shared_routers(shapes, dense=True, seed=30),
        "mllm, argmax": shared_routers(shapes, dense=False, seed=31),
    }


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    """The tiny Llama, in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def admin(tiny_server: ServerProcess) -> Iterator[AdapterClient]:
    client = AdapterClient(tiny_server.url)
    before = set(client.names())
    yield client
    for name in set(client.names()) - before:
        client.remove(name)


@pytest.fixture(scope="module")
def client(tiny_server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", timeout=120, max_retries=0)


def complete(client: openai.OpenAI, name: str, prompt: list[int]) -> tuple[list[int], list[dict[str, float]]]:
    """Generated token ids, and for each step the log-probabilities of the 20 most likely tokens."""
    answer = client.completions.create(
        model=name,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=20,
        extra_body={"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True},
    ).choices[0]
    return answer.token_ids, answer.logprobs.top_logprobs  # type: ignore[attr-defined,union-attr]


def worst(client: openai.OpenAI, name: str, model: nn.Module, applied: Applied) -> float:
    """The largest difference of a log-probability between the server and the model with the layers applied."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: complete(client, name, prompt), PROMPTS))
    largest, compared = 0.0, 0
    for prompt, (tokens, steps) in zip(PROMPTS, answers, strict=True):
        with torch.inference_mode(), applied(model):
            logits = model(torch.tensor([prompt + tokens])).logits[0]
        logprobs = torch.log_softmax(logits, dim=-1)
        for i, step in enumerate(steps):
            for token, got in step.items():
                expected = float(logprobs[len(prompt) - 1 + i, int(token.removeprefix("token_id:"))])
                largest = max(largest, abs(got - expected))
                compared += 1
    assert compared >= 20 * TOKENS * len(PROMPTS)
    return largest


def served(name: str) -> str:
    return "family/" + name.replace(",", "").replace("'", "").replace(" ", "-")


def test_every_format_equals_transformers_with_its_own_layers(
    admin: AdapterClient,
    client: openai.OpenAI,
    members: dict[str, Member | SharedRouterMember],
    model: nn.Module,
    tiny_made: Path,
) -> None:
    errors, tokens = {}, set()
    for name, member in members.items():
        card = admin.add(served(name), member.write(tiny_made / served(name)))
        assert card["format"] == member.format
        errors[name] = worst(client, served(name), model, member.applied_to)
        tokens.add(tuple(complete(client, served(name), PROMPTS[0])[0]))
        admin.remove(served(name))
    print({name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < FLOAT32_LIMIT, errors
    assert len(tokens) > len(members) / 2, "adapters must change the text"


def lora_members(shapes: dict[str, tuple[int, int]]) -> list[Member]:
    """Two ordinary LoRA adapters, the second for fewer modules and of another rank."""
    from family import make_member

    def make(_: str, n_in: int, n_out: int, rank: int, scaling: float) -> nn.Module:
        return Expert(n_in, n_out, rank, scaling)

    fewer = {path: shape for path, shape in shapes.items() if "mlp" in path}
    return [
        make_member("lora", shapes, make, {}, rank=4, alpha=8, seed=41),
        make_member("lora", fewer, make, {}, rank=6, alpha=9, seed=42),
    ]


class Mixed(nn.Module):
    """Ordinary LoRA layers (None: not adapted) under a router."""

    def __init__(self, parts: list[nn.Module | None], weights: list[float], router: torch.Tensor) -> None:
        super().__init__()
        self.parts, self.weights, self.router = parts, weights, router

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.softmax(x @ self.router.T, dim=-1)
        terms = [
            mixed[..., i, None] * weight * part(x)
            for i, (part, weight) in enumerate(zip(self.parts, self.weights, strict=True))
            if part is not None
        ]
        return torch.stack(terms).sum(0)


class Added(nn.Module):
    """Ordinary LoRA layers, times their weights, added up."""

    def __init__(self, parts: list[nn.Module | None], weights: list[float]) -> None:
        super().__init__()
        self.parts, self.weights = parts, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        terms = [w * part(x) for part, w in zip(self.parts, self.weights, strict=True) if part is not None]
        return torch.stack(terms).sum(0)


def test_composed_adapters(
    admin: AdapterClient, client: openai.OpenAI, tiny_llama: Path, model: nn.Module, tiny_made: Path
) -> None:
    shapes = {
        path: shape
        for path, shape in base_shapes(str(tiny_llama)).items()
        if path.startswith("model.layers.") and "v_proj" not in path
    }
    first, second = lora_members(shapes)
    for name, member in (("part/one", first), ("part/two", second)):
        admin.add(name, member.write(tiny_made / name))
    weights = [0.8, -0.6]
    recipe: list[dict[str, Any]] = [
        {"adapter": "part/one", "weight": weights[0]},
        {"adapter": "part/two", "weight": weights[1]},
    ]

    def parts(path: str) -> list[nn.Module | None]:
        return [first.layers.get(path), second.layers.get(path)]

    total = post(admin, name="composed/sum", compose=recipe)
    assert (total["format"], total["rank"], total["heads"]) == ("composed", 10, 1)
    added = Member("composed", {}, {path: Added(parts(path), weights) for path in shapes})
    assert worst(client, "composed/sum", model, added.applied_to) < FLOAT32_LIMIT

    half = post(admin, name="composed/half", compose=[{"adapter": "part/one", "weight": 0.5}])
    scaled = Member("composed", {}, {path: Added([layer], [0.5]) for path, layer in first.layers.items()})
    assert half["rank"] == 4
    assert worst(client, "composed/half", model, scaled.applied_to) < FLOAT32_LIMIT

    generator = torch.Generator().manual_seed(7)
    routers = {path: torch.randn(2, n_in, generator=generator) * 8 * n_in**-0.5 for path, (n_in, _) in shapes.items()}
    (tiny_made / "router").mkdir()
    file = tiny_made / "router" / "router.safetensors"
    safetensors.torch.save_file({f"{path}.router.weight": router for path, router in routers.items()}, file)
    routed = post(admin, name="composed/routed", compose=recipe, router=str(tiny_made / "router"))
    assert (routed["rank"], routed["heads"]) == (6, 2)
    mixed = Member("composed", {}, {path: Mixed(parts(path), weights, router) for path, router in routers.items()})
    assert worst(client, "composed/routed", model, mixed.applied_to) < FLOAT32_LIMIT

    # The same content as composing the folders here; and it stays when a part goes.
    local = compose(
        [(load_adapter(tiny_made / name), w) for name, w in zip(("part/one", "part/two"), weights, strict=True)]
    )
    assert local.digest == total["version"]
    before = complete(client, "composed/sum", PROMPTS[0])
    admin.remove("part/two")
    assert complete(client, "composed/sum", PROMPTS[0]) == before


def post(admin: AdapterClient, **body: Any) -> dict[str, Any]:
    response = admin.http.post("/v1/adapters", json=body)
    assert response.status_code == 201, response.text
    card: dict[str, Any] = response.json()
    again = admin.http.post("/v1/adapters", json=body)
    assert (again.status_code, again.json()["version"]) == (200, card["version"]), again.text
    return card


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        ({"compose": [{"adapter": "third"}, {"adapter": "nobody"}]}, 404, "nobody"),
        ({"compose": [{"adapter": "third"}, {"adapter": "first"}]}, 422, "3 heads in an adapter to be composed"),
        ({"compose": [{"adapter": "third", "weight": 0}]}, 422, "weight of third"),
        ({"compose": [{"adapter": "third"}], "source": "/somewhere"}, 400, "either source or compose"),
        ({"compose": []}, 400, "compose"),
        ({"source": "/somewhere", "router": "/somewhere"}, 400, "router"),
    ],
)
def test_what_cannot_be_composed(admin: AdapterClient, body: dict[str, Any], status: int, text: str) -> None:
    response = admin.http.post("/v1/adapters", json={"name": "never", **body})
    assert response.status_code == status, response.text
    assert text in response.text
    assert "never" not in admin.names()


def test_a_sum_of_too_many_ranks_says_what_fits(admin: AdapterClient, tiny_llama: Path, tiny_made: Path) -> None:
    """The slots of this server have room for 24 rows of [A; R]: rank 16 and 8 heads."""
    from family import make_member

    def make(_: str, n_in: int, n_out: int, rank: int, scaling: float) -> nn.Module:
        return Expert(n_in, n_out, rank, scaling)

    shape = {"model.layers.0.self_attn.q_proj": base_shapes(str(tiny_llama))["model.layers.0.self_attn.q_proj"]}
    names = []
    for seed in range(3):
        names.append(f"wide/{seed}")
        admin.add(
            names[-1], make_member("lora", shape, make, {}, rank=16, alpha=8, seed=seed).write(tiny_made / names[-1])
        )
    body = {"name": "never", "compose": [{"adapter": name} for name in names]}
    response = admin.http.post("/v1/adapters", json=body)
    assert response.status_code == 413, response.text
    assert "composition wide/0 + wide/1 + wide/2" in response.text
    assert "rank 48" in response.text
    assert "--max-rank" in response.text
