"""Keys, tenants, allowed sources, and adapters that somebody made to do harm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
import pytest
from adapter_client import AdapterClient, wait_for
from engines import one_process_engine
from malformed_adapters import malformed

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes

ADMIN, TEAM_A, TEAM_B, LIMITED, GOING = (
    f"key-of-{who}-0123456789abcdef" for who in ("admin", "a", "b", "slow", "gone")
)
# A longer run of the fuzzing: FUZZ_CASES=2500 pytest tests/e2e/test_security_e2e.py -k malformed
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "240"))
PROMPT = list(range(100, 260))


def key_entry(name: str, key: str, adapters: list[str], more: str = "") -> str:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[[key]]\nname = "{name}"\nsha256 = "{digest}"\nadapters = {json.dumps(adapters)}\n{more}\n'


def key_file(*entries: str) -> str:
    return "\n".join(entries)


KEYS = (
    key_entry("team-a", TEAM_A, ["a-*", "shared"], "isolated = true"),
    key_entry("team-b", TEAM_B, ["b-*", "shared"], "isolated = true"),
    key_entry("slow", LIMITED, ["shared"], "requests_per_minute = 6"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("security")


@pytest.fixture(scope="module")
def good(tiny_llama: Path, folder: Path) -> Path:
    """A small good adapter of the tiny Llama: two layers."""
    shapes = {name: shape for name, shape in base_shapes(str(tiny_llama)).items() if ".0." in name}
    path = folder / "allowed" / "good"
    save_adapter(make_adapter(shapes, ("q_proj", "down_proj"), 4, 3, seed=1), path)
    return path


@pytest.fixture(scope="module")
def server(tiny_llama: Path, folder: Path, good: Path) -> Iterator[ServerProcess]:
    """A server with tenants, that all may reach, and an admin key."""
    (folder / "keys.toml").write_text(key_file(*KEYS, key_entry("gone", GOING, ["shared"])))
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", "512", "--max-num-seqs", "8", "--enable-prefix-caching", "--block-size", "32"]
    arguments += ["--slots", "4", "--max-adapters", "6", "--max-rank", "8", "--max-heads", "4"]
    arguments += ["--allow-source", str(folder / "allowed"), "--api-key-file", str(folder / "keys.toml")]
    env = {"HYDRASERVE_CACHE": str(folder / "cache"), "HYDRASERVE_ADMIN_API_KEY": ADMIN}
    with one_process_engine(arguments, folder / "server.log", env) as process:
        admin = AdapterClient(process.url, ADMIN)
        for name in ("a-sql", "b-sql", "shared"):
            admin.add(name, good)
        yield process


@pytest.fixture
def admin(server: ServerProcess) -> AdapterClient:
    return AdapterClient(server.url, ADMIN)


@pytest.fixture
def team_a(server: ServerProcess) -> AdapterClient:
    return AdapterClient(server.url, TEAM_A)


@pytest.fixture
def team_b(server: ServerProcess) -> AdapterClient:
    return AdapterClient(server.url, TEAM_B)


def test_without_a_key_nothing_is_told(server: ServerProcess) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {ADMIN}"}):
        client = httpx.Client(base_url=server.url, headers=headers)
        for path in ("/v1/models", "/v1/adapters", "/metrics"):
            assert client.get(path).status_code == 401, path
        for path in ("/v1/completions", "/v1/adapters", "/v1/load_lora_adapter"):
            answer = client.post(path, json={})
            assert (answer.status_code, answer.json()["error"]["type"]) == (401, "AuthenticationError"), path
        assert client.get("/health").status_code == 200


def test_keys_for_inference_do_not_administer(team_a: AdapterClient, good: Path) -> None:
    body = {"name": "a-new", "source": str(good)}
    assert team_a.http.post("/v1/adapters", json=body).status_code == 403
    assert team_a.http.put("/v1/adapters/a-sql", json={}).status_code == 403
    assert team_a.http.delete("/v1/adapters/a-sql").status_code == 403
    for action in ("pin", "unpin", "prefetch"):
        assert team_a.http.post(f"/v1/adapters/a-sql/{action}").status_code == 403
    old = {"lora_name": "a-new", "lora_path": str(good)}
    assert team_a.http.post("/v1/load_lora_adapter", json=old).status_code == 403
    assert team_a.http.post("/v1/unload_lora_adapter", json={"lora_name": "a-sql"}).status_code == 403
    assert team_a.http.get("/metrics").status_code == 403, "the metrics name every adapter"


def test_a_tenant_neither_sees_nor_uses_what_is_not_its_own(
    admin: AdapterClient, team_a: AdapterClient, team_b: AdapterClient
) -> None:
    assert {"a-sql", "b-sql", "shared"} <= set(admin.names())
    for client, own, other in ((team_a, "a-sql", "b-sql"), (team_b, "b-sql", "a-sql")):
        assert sorted(client.names()) == sorted([own, "shared"])
        assert client.list()["residency"] is None
        assert {model["id"] for model in client.http.get("/v1/models").json()["data"]} == {"tiny", own, "shared"}
        assert client.complete(own, PROMPT, 1).status == 200
        never = client.complete("never-there", PROMPT, 1)
        for model in (other, f"{other}@uniform"):
            answer = client.complete(model, PROMPT, 1)
            assert answer.status == never.status == 404
            assert answer.body["error"]["message"].replace(model, "NAME") == never.body["error"]["message"].replace(
                "never-there", "NAME"
            ), "an adapter of somebody else looks like one that is not there"
        assert client.http.get(f"/v1/adapters/{other}").status_code == 404
        card, known = client.get("shared"), admin.get("shared")
        assert card["version"] == known["version"]
        for field in ("source", "error", "requests_running", "requests_served", "last_used"):
            assert card[field] is None, field
        assert known["source"]
        roots = {model["id"]: model["root"] for model in client.http.get("/v1/models").json()["data"]}
        assert roots["shared"] is None
        operators = client.http.post("/sleep")
        assert operators.status_code == 403, operators.text
        messages = [{"role": "user", "content": "?"}]
        chat = client.http.post("/v1/chat/completions", json={"model": other, "messages": messages})
        assert chat.status_code == 404


def hits(admin: AdapterClient) -> float:
    text = admin.http.get("/metrics").text
    return sum(
        float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total")
    )


def test_the_prefix_cache_is_not_shared_across_tenants(
    admin: AdapterClient, team_a: AdapterClient, team_b: AdapterClient
) -> None:
    prompt = [7 * i % 400 + 50 for i in range(200)]
    for model in ("shared", "tiny"):
        seen = [hits(admin)]
        for client in (team_a, team_b, team_a, team_b):
            assert client.complete(model, prompt, 1).status == 200
            seen.append(hits(admin))
        steps = [after - before for before, after in pairwise(seen)]
        assert steps[:2] == [0, 0], f"{model}: what one tenant computed must not be seen by another"
        assert min(steps[2:]) >= 160, f"{model}: a tenant's own prefixes are found"
        before = hits(admin)
        for own in (hashlib.sha256(b"team-a").hexdigest(), hashlib.sha256(b"team-a").hexdigest() + ":"):
            assert admin.complete(model, prompt, 1, cache_salt=own).status == 200
            assert hits(admin) == before, f"{model}: a salt that a client makes up is never a tenant's"
            assert admin.complete(model, prompt, 1, cache_salt=own).status == 200
            assert hits(admin) - before >= 160, f"{model}: but it finds what it was computed with"
            before = hits(admin)


def test_rate_limit(server: ServerProcess) -> None:
    limited = AdapterClient(server.url, LIMITED)
    answers = [limited.http.get("/v1/models") for _ in range(3)]
    assert answers[0].status_code == 200
    assert answers[-1].status_code == 429
    assert answers[-1].json()["error"]["type"] == "RateLimitError"
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 10


def test_a_key_that_is_taken_out_stops_working(server: ServerProcess, folder: Path) -> None:
    client = AdapterClient(server.url, GOING)
    assert client.http.get("/v1/models").status_code == 200
    (folder / "keys.toml").write_text("[[key]] half-written")
    time_of_look = time.monotonic() + 1.5
    wait_for(lambda: time.monotonic() > time_of_look, "the file was looked at")
    assert client.http.get("/v1/models").status_code == 200, "a file that cannot be read changes nothing"
    (folder / "keys.toml").write_text(key_file(*KEYS))
    wait_for(lambda: client.http.get("/v1/models").status_code == 401, "the key stops working", 5)


def test_local_sources_stay_below_the_allowed_folders(admin: AdapterClient, folder: Path, good: Path) -> None:
    outside = folder / "outside"
    shutil.copytree(good, outside)
    (folder / "allowed" / "link").symlink_to(outside)
    inner = folder / "allowed" / "inner"
    shutil.copytree(good, inner)
    (inner / "adapter_model.bin").unlink()
    (inner / "adapter_model.bin").symlink_to(outside / "adapter_model.bin")
    sources = [outside, folder / "allowed" / "link", inner, folder / "allowed" / ".." / "outside", "/etc"]
    sources += ["file:///etc", f"{good}/../../outside", "s3://bucket/x", "http://127.0.0.1/x", "hf://org/x", "~root"]
    for source in sources:
        answer = admin.http.post("/v1/adapters", json={"name": "out", "source": str(source)})
        assert answer.status_code == 403, f"{source}: {answer.text}"
        assert answer.json()["error"]["reason"] == "SourceForbiddenError"
    assert "out" not in admin.names()


NOT_EVEN_A_REQUEST = [
    *(
        {"name": name, "source": "x"}
        for name in ("", "a" * 129, "../x", "a//b", "a@b", "a b", "-x", "é", "a\0b", 7, None)
    ),
    *({"name": "x", "source": source} for source in (7, None, [], {})),
    *({"name": "x", "source": source} for source in ("", "a\0b", "\u2028", "x" * 100_000)),
    *({"name": "x", "source": "x", **more} for more in ({"pin": "maybe"}, {"digest": "0"}, {"unknown": 1})),
    {"name": "x"},
    [],
    "text",
    None,
]


def test_malformed_requests_are_refused(admin: AdapterClient) -> None:
    for body in NOT_EVEN_A_REQUEST:
        answer = admin.http.post("/v1/adapters", json=body)
        assert 400 <= answer.status_code < 500, f"{str(body)[:80]}: {answer.status_code}"
        assert answer.json()["error"]["message"]
    assert admin.http.post("/v1/adapters", content=b"{" * 10_000).status_code in (400, 422)
    assert "x" not in admin.names()


def resident(process: ServerProcess) -> int:
    """Bytes of the server and all its processes that nobody else shares."""
    assert process.process is not None
    root = psutil.Process(process.process.pid)
    return sum(child.memory_full_info().uss for child in [root, *root.children(recursive=True)])


def test_malformed_adapters_are_refused_and_leave_nothing(
    server: ServerProcess, admin: AdapterClient, folder: Path, good: Path
) -> None:
    """Every one a 4xx with a message that names a fault; the server answers in between; nothing is left of them."""
    stored = sorted((folder / "cache").glob("run/*/store/*"))
    cases = folder / "allowed" / "cases"
    cases.mkdir()
    statuses: Counter[tuple[str, int]] = Counter()
    wrong, begun, memory = [], time.monotonic(), []
    for i, (fault, path) in enumerate(malformed(good, cases, FUZZ_CASES)):
        answer = admin.http.post("/v1/adapters", json={"name": f"bad-{i}", "source": str(path)})
        statuses[fault, answer.status_code] += 1
        message = answer.json().get("error", {}).get("message", "")
        if not 400 <= answer.status_code < 500 or len(message) < 40 or "got" not in message:
            wrong.append(f"{path.name}: {answer.status_code} {message}")
        else:
            shutil.rmtree(path)
        if i % 50 == 0:
            assert admin.complete("shared", PROMPT[:20], 2).status == 200
            memory.append(resident(server))
    print(dict(statuses), f"{(time.monotonic() - begun) / FUZZ_CASES * 1000:.0f} ms a case", [m >> 20 for m in memory])
    assert wrong == []
    assert not (cases / "PWNED").exists()
    assert sorted(admin.names()) == ["a-sql", "b-sql", "shared"]
    assert sorted((folder / "cache").glob("run/*/store/*")) == stored
    assert list((folder / "cache").glob("run/*/fetch-*")) == []
    assert admin.list()["residency"]["host_adapters"] <= 3
    assert memory[-1] - memory[1] < 32 << 20, f"{[m >> 20 for m in memory]} MiB"


def test_nothing_secret_is_in_the_log(server: ServerProcess, admin: AdapterClient) -> None:
    source = "https://user:geheim@127.0.0.1/sql?signature=geheim"
    answer = admin.http.post("/v1/adapters", json={"name": "x", "source": source})
    assert answer.status_code == 403
    log = server.log.read_text(errors="replace")
    for secret in (ADMIN, TEAM_A, TEAM_B, LIMITED, GOING, "geheim"):
        assert secret not in log
        assert secret not in answer.text
    assert server.process is not None
    root = psutil.Process(server.process.pid)
    for process in root.children(recursive=True):
        assert ADMIN not in process.environ().values(), "processes that parse others' files need no keys"
