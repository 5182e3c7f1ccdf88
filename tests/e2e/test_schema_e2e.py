"""Whatever a client sends, it is told what is wrong with it: no answer of the API is a 5xx.

Two ways: requests made from the OpenAPI description, some as it says and some not (Schemathesis), and requests of a
kind that a description does not think of, written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import hypothesis
import pytest
import schemathesis
from adapter_client import AdapterClient, completion
from raw_client import connect, post
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup

from hydraserve.bench.process import ServerProcess
from hydraserve.server.security import is_inference

EXAMPLES = 8  # of each operation
OWN = {"first", "second", "third"}  # adapters of the server's other tests, which must not be taken away


@pytest.fixture
def client(tiny_server: ServerProcess) -> Iterator[AdapterClient]:
    """A client that checks afterwards that the server is as it was."""
    client = AdapterClient(tiny_server.url)
    tokens = client.complete("first", range(5, 20), 4).tokens
    yield client
    assert client.complete("first", range(5, 20), 4).tokens == tokens
    client.http.close()


def bounded(body: Any) -> Any:
    """A generated body that costs the engine little: nobody learns from an answer of 500 tokens."""
    if isinstance(body, dict):
        for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(key), int):
                body[key] = min(body[key], 4)
        if body.get("model") is None or body.get("model") == "":
            body["model"] = "first"
    return body


def is_tried(path: str) -> bool:
    """Pausing the engine and the like is an operator's business; those routes do what they are told."""
    return is_inference(path) or path in ("/ready", "/health")


def takes_away(case: schemathesis.Case) -> bool:
    """Whether this unloads an adapter that other tests need, or replaces it."""
    named = {str(value) for value in (case.path_parameters or {}).values()}
    if isinstance(case.body, dict):
        named.add(str(case.body.get("lora_name")))
    return not OWN.isdisjoint(named)


def test_requests_made_from_the_description_never_fail_the_server(
    tiny_server: ServerProcess, client: AdapterClient
) -> None:
    description = client.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(description)
    tried, missing, failed = set(), set(), list[str]()
    for found in schema.get_all_operations():
        operation = found.ok()
        if not is_tried(operation.path):
            continue
        label = f"{operation.method.upper()} {operation.path}"
        tried.add(label)

        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            hypothesis.assume(not takes_away(case))
            case.body = bounded(case.body)
            answer = case.call(base_url=tiny_server.url, timeout=60)
            if answer.status_code == HTTPStatus.NOT_IMPLEMENTED:  # vLLM's routes for models of other kinds
                missing.add(label)  # noqa: B023 - called before the loop goes on
            else:
                case.validate_response(answer, checks=[not_a_server_error])

        try:
            check()
        except FailureGroup as failure:  # one run tells of all
            failed.append(f"{label}: {'; '.join(map(str, failure.exceptions))}")
    assert failed == []
    assert tried - missing >= {
        *("POST /v1/completions", "POST /v1/chat/completions", "POST /v1/adapters", "GET /v1/models"),
        *("PUT /v1/adapters/{name}", "DELETE /v1/adapters/{name}", "POST /v1/unload_lora_adapter"),
        *("POST /tokenize", "POST /detokenize", "POST /invocations"),
    }


HUGE = 10**400

# Fields of a completion, each wrong in its way. "raw" values are put into the JSON text as they stand.
WRONG_FIELDS: list[dict[str, Any]] = [
    *({"max_tokens": n} for n in (-1, -(2**70), 2**63, HUGE, 1.5, "many")),
    *({"temperature": t} for t in (-1, -1e308, "hot", [])),
    *({"top_p": p} for p in (-0.1, 1.1, 1e308)),
    *({"temperature": 1, "top_k": k} for k in (-5, 2**70, HUGE)),
    *({"temperature": 1, "n": n} for n in (0, -1, 129, 2**31, 10**9, HUGE)),
    *({"temperature": 1, "min_p": p} for p in (-1, 2, 1e308)),
    *({"temperature": 1, "repetition_penalty": p} for p in (0, -1)),
    *({"logprobs": n} for n in (-7, 10**6, HUGE)),
    *({"seed": n} for n in (2**64, -(2**70), HUGE)),
    *({"min_tokens": n} for n in (-1, 10**9)),
    *({"presence_penalty": n} for n in (-3, 3, 1e308)),
    *({"prompt": p} for p in ([-1], [2**31], [2**70], [HUGE], [1.5], [[[[1]]]], {}, [], [None], 7, None)),
    *({"prompt": [5] * n} for n in (513, 100_000)),
    *({"model": m} for m in ("nobody", "../../etc/passwd", "a" * 100_000, 7, [], "first@", "first@head=99")),
    *({"stop": s} for s in ([7], {}, [""] * 3)),
    *({"logit_bias": b} for b in ({"-1": 1}, {"99999999": 1}, {"x": 1})),
    {"prompt_logprobs": -5},
    {"truncate_prompt_tokens": -(2**70)},
    {"priority": 2**70},
    {"cache_salt": 7},
    {"stream_options": {"include_usage": True}},
    {"structured_outputs": {"regex": "(" * 500}},
    {"structured_outputs": {"json": {"type": "nonsense"}}},
    {"structured_outputs": {"choice": []}},
    {"response_format": {"type": "json_schema"}},
    {"stop_token_ids": [-1, 2**70]},
    {"allowed_token_ids": [-1]},
    {"bad_words": [""]},
]


@pytest.mark.parametrize("fields", WRONG_FIELDS, ids=lambda fields: json.dumps(fields)[:60])
def test_a_wrong_field_is_a_4xx(client: AdapterClient, fields: dict[str, Any]) -> None:
    answer = client.http.post("/v1/completions", json={**completion("first", [5, 6, 7], 2), **fields})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]


BODY = json.dumps(completion("first", [5, 6, 7], 2)).encode()
WRONG_BODIES = {
    "empty": b"",
    "no JSON": b"hello",
    "half a JSON": BODY[:-1],
    "not an object": b"[1, 2, 3]",
    "invalid UTF-8": BODY.replace(b'"first"', b'"\xff\xfe\x80"'),
    "a lone surrogate as model": BODY.replace(b'"first"', b'"\\ud800"'),
    "UTF-16": BODY.decode().encode("utf-16"),
    "not a number": BODY.replace(b'"max_tokens": 2', b'"max_tokens": NaN'),
    "infinity": BODY.replace(b'"temperature": 0', b'"temperature": 1e999'),
    "minus infinity": BODY.replace(b'"temperature": 0', b'"temperature": -Infinity'),
    "a number of 5,000 digits": BODY.replace(b'"max_tokens": 2', b'"max_tokens": ' + b"9" * 5000),
    "deep lists": BODY.replace(b'"prompt": [5, 6, 7]', b'"prompt": ' + b"[" * 50_000 + b"]" * 50_000),
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep, in a schema": BODY[:-1] + b', "structured_outputs": {"json": ' + b'{"not":' * 5000 + b"{}" + b"}" * 5002,
    "deep, never closed": b"[" * 100_000,
    "too large": BODY[:-1] + b', "user": "' + b"x" * (1 << 20) + b'"}',
}


@pytest.mark.parametrize("body", WRONG_BODIES.values(), ids=WRONG_BODIES)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/adapters", "/v1/routing"])
def test_a_wrong_body_is_a_4xx(client: AdapterClient, path: str, body: bytes) -> None:
    answer = client.http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json().keys() & {"error", "detail"}  # FastAPI's own, where JSON cannot be parsed


def test_text_that_is_no_text_is_answered_or_refused(client: AdapterClient) -> None:
    for text in ('"\\ud800"', '"\\u0000"', '"\\udfff\\ud800 x"', '"' + "a" * 5000 + '"'):
        body = BODY.replace(b"[5, 6, 7]", text.encode())
        answer = client.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (text, answer.text)


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(post(b"{}", length=1 << 40), id="a tebibyte announced"),
        pytest.param(b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", id="a long path"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n", id="TLS to a plain port"),
        pytest.param(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", id="negative length"),
    ],
)
@pytest.mark.usefixtures("client")
def test_wrong_http_is_refused(tiny_server: ServerProcess, request_bytes: bytes) -> None:
    connection = connect(tiny_server.url)
    try:
        connection.sendall(request_bytes)
        status = connection.recv(1 << 16).split(b"\r\n")[0].split()
    except ConnectionError:  # closed while we were still sending: refused as well
        return
    finally:
        connection.close()
    assert not status or status[1].startswith(b"4"), status
