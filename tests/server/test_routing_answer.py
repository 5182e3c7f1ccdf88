"""From a trace to an answer: texts of tokens, selection, summaries, limits."""

from __future__ import annotations

import asyncio
import io
import json

import numpy as np
import pytest
from safetensors.numpy import load

from hydraserve.adapters.observation import RoutingTrace
from hydraserve.errors import InvalidRequestError
from hydraserve.server.routing_answer import (
    MAX_BINARY_BYTES,
    MAX_JSON_NUMBERS,
    Generated,
    RoutingAnswer,
    check_size,
    layer_of,
    select,
    token_texts,
)
from hydraserve.server.routing_schemas import RoutingFormat, RoutingRequest

NAN = float("nan")
ROUTERS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.10.mlp.up_proj")


def trace() -> RoutingTrace:
    """Two tokens seen, and a third that no layer has; the second router has two heads, the others three."""
    weights = np.array(
        [
            [[0.2, 0.3, 0.5], [0.9, 0.1, NAN], [0.1, 0.1, 0.8]],
            [[1.0, 0.0, 0.0], [0.5, 0.5, NAN], [0.6, 0.2, 0.2]],
        ],
        dtype=np.float32,
    )
    return RoutingTrace(ROUTERS, (3, 2, 3), weights)


def answer() -> RoutingAnswer:
    return RoutingAnswer("sql", "id-1", Generated([7, 8], [9], ["a", "b", "c"], "length"), trace())


def as_json(made: RoutingAnswer) -> dict[str, object]:
    async def collect() -> bytes:
        return b"".join([piece async for piece in made.json()])

    found: dict[str, object] = json.loads(asyncio.run(collect()))
    return found


def test_json_has_every_weight_and_its_summaries() -> None:
    body = as_json(answer())
    tokens = body["tokens"]
    assert isinstance(tokens, list)
    assert [t["weights"] and [len(w) for w in t["weights"]] for t in tokens] == [[3, 2, 3], [3, 2, 3], None]
    assert tokens[0]["weights"][1] == [0.9, 0.1]
    assert [t["head"] for t in tokens] == [2, 0, None]
    entropy = [-sum(w * np.log(w) for w in weights if w > 0) / np.log(len(weights)) for weights in tokens[0]["weights"]]
    assert tokens[0]["entropy"] == pytest.approx(np.mean(entropy), abs=1e-5)
    assert [t["kind"] for t in tokens] == ["prompt", "prompt", "generated"]
    usage = body["usage"]
    assert isinstance(usage, dict)
    assert usage["weights"] == pytest.approx([(0.2 + 0.9 + 0.1 + 1 + 0.5 + 0.6) / 6, 1.2 / 6, 1.5 / 6], abs=1e-5)
    assert usage["leads"] == [0.5, 0, 0.5]
    assert (body["text"], body["finish_reason"], body["heads"], body["prompt_tokens"]) == ("c", "length", 3, 2)


def test_binary_forms_hold_the_same() -> None:
    made = answer()
    summary = made.summary()
    with np.load(io.BytesIO(made.npz()), allow_pickle=False) as arrays:
        npz = dict(arrays)
    tensors = load(made.safetensors())
    assert json.loads(str(npz["summary"])) == summary
    assert npz["routers"].tolist() == list(ROUTERS)
    for name in ("weights", "heads", "token_ids", "prompt_tokens"):
        np.testing.assert_array_equal(npz[name], tensors[name])
    assert tensors["weights"].shape == (3, 3, 3)
    np.testing.assert_array_equal(tensors["weights"][:2], trace().weights)
    assert np.isnan(tensors["weights"][2]).all()


def test_selection_by_module_and_layer() -> None:
    assert select(trace(), ["up_proj"], None).routers == (ROUTERS[0], ROUTERS[2])
    assert select(trace(), None, [10]).routers == (ROUTERS[2],)
    down = select(trace(), ["down_proj"], [0])
    assert (down.heads, down.weights.shape) == ((2,), (2, 1, 2))
    assert not np.isnan(down.weights).any(), "no wider than its heads"
    with pytest.raises(InvalidRequestError, match="down_proj, up_proj"):
        select(trace(), ["q_proj"], None)
    with pytest.raises(InvalidRequestError, match="0, 10"):
        select(trace(), None, [0, 1])
    with pytest.raises(InvalidRequestError, match="in both"):
        select(trace(), ["down_proj"], [10])


def test_layer_numbers_are_numbers() -> None:
    assert [layer_of(name) for name in (*ROUTERS, "lm_head")] == [0, 0, 10, -1]


def test_large_answers_are_refused_by_form() -> None:
    heads = (3, 2, 3)
    check_size(RoutingFormat.JSON, MAX_JSON_NUMBERS // sum(heads), heads)
    with pytest.raises(InvalidRequestError, match="npz or safetensors"):
        check_size(RoutingFormat.JSON, MAX_JSON_NUMBERS // sum(heads) + 1, heads)
    most = MAX_BINARY_BYTES // (4 * len(heads) * max(heads))  # arrays are as wide as the widest router
    check_size(RoutingFormat.NPZ, most, heads)
    with pytest.raises(InvalidRequestError, match="fewer tokens, modules or layers"):
        check_size(RoutingFormat.SAFETENSORS, most + 1, heads)


def test_texts_of_tokens_make_up_the_text_whatever_splits_a_character() -> None:
    pieces = [b"a", "é".encode()[:1], "é".encode()[1:], b" ", *(bytes([b]) for b in "漢".encode()), b"z", b"\xff"]

    def decode(ids: list[int]) -> str:
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    ids = list(range(len(pieces)))
    texts = token_texts(decode, ids)
    assert "".join(texts) == decode(ids)
    assert texts == ["a", "", "é", " ", "", "", "漢", "z", "\ufffd"]


@pytest.mark.parametrize("errors", ["replace", "one sign a byte"])
def test_the_sign_of_an_unknown_character_is_a_text_of_its_own(errors: str) -> None:
    """It may stand in the text itself; and bytes that no other byte completes are given to their own token."""
    sign = "\ufffd".encode()
    pieces = [sign, sign, b"a", sign, *(bytes([b]) for b in "漢".encode()), b"\xe6", b"b", *[sign] * 6, b"c"]

    def decode(ids: list[int]) -> str:
        text = b"".join(pieces[i] for i in ids).decode(errors="surrogateescape")
        if errors == "replace":
            return b"".join(pieces[i] for i in ids).decode(errors="replace")
        return "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in text)

    texts = token_texts(decode, list(range(len(pieces))))
    assert texts == ["\ufffd", "\ufffd", "a", "\ufffd", "", "", "漢", "\ufffd", "b", *["\ufffd"] * 6, "c"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"prompt": "x", "max_tokens": 0},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "layers": []},
        {"prompt": "x", "format": "csv"},
        {"prompt": "x", "layer": [1]},
    ],
)
def test_requests_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"prompt|max_tokens|temperature|layers|format|layer"):
        RoutingRequest(model="sql", **fields)  # type: ignore[arg-type]
