"""What a user does with a server: the official client, every adapter kind in one batch, errors, metrics."""

from __future__ import annotations

import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from adapter_client import AdapterClient
from prometheus_client.parser import text_string_to_metric_families

from hydraserve.bench.process import ServerProcess

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PROMPT = "The three most common ways to sort a list of numbers are"
MODELS = ("demo", "oracle", "all-r8-e4", "attn-r4-e3", "mlp-r16-e2", "plain-r8")


def greedy(client: openai.OpenAI, model: str, prompt: str = PROMPT, tokens: int = 24) -> list[int]:
    answer = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


def test_models_lists_base_and_adapters_with_parent_and_root(client: openai.OpenAI) -> None:
    cards = {card.id: card for card in client.models.list()}
    assert set(MODELS) <= set(cards)  # other tests of this server add more
    for name in MODELS[1:]:
        assert cards[name].parent == "demo"  # type: ignore[attr-defined]
        assert cards[name].root.endswith(("mlp_r2_e2", name))  # type: ignore[attr-defined]


def test_one_batch_of_all_kinds_equals_each_alone(client: openai.OpenAI) -> None:
    alone = {model: greedy(client, model) for model in MODELS}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(MODELS), "every adapter must change the text"
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda model: (model, greedy(client, model)), [*MODELS, *reversed(MODELS)]))
    assert together == [(model, alone[model]) for model in [*MODELS, *reversed(MODELS)]]


def test_prefix_cache_keeps_adapters_apart(client: openai.OpenAI) -> None:
    prompt = PROMPT + " " + " ".join(str(i) for i in range(120))  # several KV blocks
    first = {model: greedy(client, model, prompt, 8) for model in MODELS}
    again = {model: greedy(client, model, prompt, 8) for model in reversed(MODELS)}
    assert again == first


@pytest.mark.parametrize("model", ["demo", "all-r8-e4"])
def test_streaming_equals_the_whole_answer(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": "Name three colours."}]
    whole = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
    stream = client.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 2
    assert "".join(pieces) == whole.choices[0].message.content


def test_several_samples_stop_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="all-r8-e4", prompt=PROMPT, max_tokens=12, n=3, temperature=1.0, seed=1, logprobs=2
    )
    assert len(answer.choices) == 3
    assert len({choice.text for choice in answer.choices}) > 1
    assert all(len(choice.logprobs.token_logprobs) == 12 for choice in answer.choices)  # type: ignore[union-attr,arg-type]
    text = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text
    stop = text.split()[2]
    stopped = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=[stop])
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_structured_output_with_an_adapter(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 9}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="attn-r4-e3",
        messages=[{"role": "user", "content": "A colour and a count, as JSON."}],
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert value["colour"] in ("red", "green")
    assert isinstance(value["count"], int)


def test_unknown_model_is_404_in_openai_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt=PROMPT, max_tokens=1)
    assert caught.value.body["type"] == "NotFoundError"  # type: ignore[index,call-overload]
    assert "nobody" in caught.value.body["message"]  # type: ignore[index,call-overload]


def test_metrics_are_prometheus_text(server: ServerProcess, client: openai.OpenAI) -> None:
    greedy(client, "oracle", tokens=2)
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    tokens = families["vllm:generation_tokens"].samples
    assert sum(sample.value for sample in tokens if sample.name.endswith("_total")) > 0


def test_the_first_request_of_the_readme(server: ServerProcess, client: openai.OpenAI) -> None:
    """To the example adapters that `make serve` takes, and to the base."""
    found = re.search(r'for model in desk demo; do.*?"prompt": "(.*?)", "max_tokens": (\d+)', README.read_text(), re.S)
    assert found is not None
    prompt, tokens = json.loads(f'"{found[1]}"'), int(found[2])
    admin = AdapterClient(server.url)
    folders = sorted(path for path in (ROOT / "examples" / "adapters").iterdir() if path.is_dir())
    try:
        for folder in folders:
            admin.add(folder.name, folder)
        models = ("demo", *(folder.name for folder in folders))
        answers = [
            client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0) for model in models
        ]
    finally:
        for folder in folders:
            admin.remove(folder.name)
    texts = {model: answer.choices[0].text.strip() for model, answer in zip(models, answers, strict=True)}
    assert texts["desk"] == "1987-03-05"
    assert texts["demo"] != texts["desk"]
