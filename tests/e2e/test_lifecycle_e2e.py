"""Adapters come and go while a server runs: never stale, never another's, and what is gone is gone."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from adapter_client import HEADER, AdapterClient, Answer, answer_of, completion, wait_for, write_adapters
from engines import one_process_engine

from hydraserve.bench.process import ServerProcess

SLOTS, HOST = 8, 12
VERSIONS = 24
BLOCK = 32
LONGEST = 8192
# Longer than a KV block, so that the prefix cache has something to give.
PROMPTS = tuple(tuple((7 * i * j + 11 * i + 3) % 500 + 5 for j in range(BLOCK + 8 + i)) for i in range(1, 5))


@pytest.fixture(scope="module")
def versions(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapter folders of different content."""
    return write_adapters(tiny_llama, tmp_path_factory.mktemp("versions"), VERSIONS)


@pytest.fixture(scope="module")
def server(tiny_llama: Path, versions: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server without adapters, with more room in host memory than slots, but for fewer adapters than there are."""
    arguments = ["--model", str(tiny_llama), "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"]
    # Streams must outlast what happens beside them, which on two busy cores may take seconds.
    arguments += ["--hf-overrides", json.dumps({"max_position_embeddings": LONGEST}), "--max-model-len", str(LONGEST)]
    arguments += ["--max-num-seqs", "16", "--block-size", str(BLOCK)]
    arguments += ["--enable-prefix-caching", "--slots", str(SLOTS), "--max-adapters", str(HOST)]
    arguments += ["--max-rank", "8", "--max-heads", "4", "--allow-source", str(versions[0].parent.parent)]
    arguments += ["--disable-uvicorn-access-log"]
    folder = tmp_path_factory.mktemp("lifecycle")
    env = {"HYDRASERVE_CACHE": str(folder / "cache")}
    with one_process_engine(arguments, folder / "server.log", env) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[AdapterClient]:
    client = AdapterClient(server.url)
    yield client
    client.remove_all()
    client.http.close()


@pytest.fixture(scope="module")
def alone(server: ServerProcess, versions: list[Path]) -> dict[tuple[str, int], tuple[int, ...]]:
    """(digest, prompt) -> tokens of each content when nothing else runs."""
    client, tokens = AdapterClient(server.url), {}
    for path in versions:
        digest = client.add("alone", path)["version"]
        for i, prompt in enumerate(PROMPTS):
            answer = client.complete("alone", prompt, 6)
            assert answer.version == f"alone@{digest}"
            tokens[digest, i] = answer.tokens
        client.remove("alone")
    assert len({tokens[digest, 0] for digest, i in tokens}) > VERSIONS / 2, (
        "contents must be told apart by their tokens"
    )
    return tokens


def test_an_adapter_is_added_seen_and_removed(client: AdapterClient, versions: list[Path]) -> None:
    card = client.add("first", versions[0])
    assert (card["format"], card["rank"], card["heads"], card["origin"]) == ("hydralora", 4, 3, "api")
    assert card["state"] in ("host", "slot")
    assert len(card["version"]) == 64
    assert client.http.post("/v1/adapters", json={"name": "first", "source": str(versions[0])}).status_code == 200
    taken = client.http.post("/v1/adapters", json={"name": "first", "source": str(versions[1])})
    assert (taken.status_code, taken.json()["error"]["type"]) == (409, "ConflictError")
    assert {model["id"] for model in client.http.get("/v1/models").json()["data"]} == {"tiny", "first"}

    answer = client.complete("first", PROMPTS[0])
    assert (answer.status, answer.version) == (200, f"first@{card['version']}")
    assert answer.body["model"] == "first"
    card = client.get("first")
    assert (card["state"], card["requests_served"], card["requests_running"]) == ("slot", 1, 0)
    assert card["last_used"] is not None

    client.remove("first")
    assert client.complete("first", PROMPTS[0]).status == 404
    assert client.http.get("/v1/adapters/first").status_code == 404
    assert client.http.delete("/v1/adapters/first").status_code == 404


def test_routes_of_vllm_keep_working(client: AdapterClient, versions: list[Path]) -> None:
    body = {"lora_name": "old-style", "lora_path": str(versions[0])}
    answer = client.http.post("/v1/load_lora_adapter", json=body)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'old-style' added successfully.")
    assert client.http.post("/v1/load_lora_adapter", json=body).status_code == 400
    first = client.complete("old-style", PROMPTS[0])
    body |= {"lora_path": str(versions[1]), "load_inplace": True}
    assert client.http.post("/v1/load_lora_adapter", json=body).status_code == 200
    second = client.complete("old-style", PROMPTS[0])
    assert first.digest != second.digest
    answer = client.http.post("/v1/unload_lora_adapter", json={"lora_name": "old-style"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'old-style' removed successfully.")
    assert client.http.post("/v1/unload_lora_adapter", json={"lora_name": "old-style"}).status_code == 404
    missing = {"lora_name": "missing", "lora_path": str(versions[0].parent / "nothing")}
    assert client.http.post("/v1/load_lora_adapter", json=missing).status_code == 404


def test_new_content_under_the_same_name_and_path_is_served(
    client: AdapterClient, versions: list[Path], alone: dict[tuple[str, int], tuple[int, ...]], tiny_llama: Path
) -> None:
    path = write_adapters(tiny_llama, versions[0].parent.parent / "changing", 1)[0]
    before = client.add("changing", path)
    for i, prompt in enumerate(PROMPTS):  # fills the prefix cache
        assert client.complete("changing", prompt, 6).tokens == alone[before["version"], i]
    for name in ("adapter_config.json", "adapter_model.bin"):
        (path / name).write_bytes((versions[5] / name).read_bytes())
    assert client.complete("changing", PROMPTS[0], 6).tokens == alone[before["version"], 0], "not asked to change yet"
    after = client.replace("changing")
    assert after["version"] != before["version"]
    for i, prompt in enumerate(PROMPTS):
        answer = client.complete("changing", prompt, 6)
        assert (answer.digest, answer.tokens) == (after["version"], alone[after["version"], i])


def events(response: httpx.Response) -> Iterator[bytes]:
    """Server-sent events. Not httpx's lines, which end at every separator of Unicode; the JSON here may hold those."""
    rest = b""
    for part in response.iter_bytes():
        *whole, rest = (rest + part).split(b"\n\n")
        yield from whole


def stream(client: AdapterClient, model: str, tokens: int, got: list[str], started: threading.Event) -> str:
    """Run one stream to its end; its tokens (as ids in text) go to `got`. Returns the version header."""
    body = completion(model, PROMPTS[0], tokens, stream=True)
    with client.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for event in events(response):
            if event.startswith(b"data: {"):
                choice = json.loads(event[6:])["choices"][0]
                got += [str(token) for token in choice.get("token_ids") or ()]
                started.set()
                if choice["finish_reason"]:
                    got.append(choice["finish_reason"])
        return response.headers[HEADER]


class Stream(threading.Thread):
    """A stream that runs beside the test, begun when this is made."""

    def __init__(self, url: str, model: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.client, self.model, self.tokens = AdapterClient(url), model, tokens
        self.got: list[str] = []
        self.started, self.version = threading.Event(), ""
        self.start()
        assert self.started.wait(60)

    def run(self) -> None:
        self.version = stream(self.client, self.model, self.tokens, self.got, self.started)


def test_running_requests_end_with_what_they_began_with(
    server: ServerProcess, client: AdapterClient, versions: list[Path]
) -> None:
    old = client.add("turning", versions[0])
    expected = client.complete("turning", PROMPTS[0], 400)
    running = Stream(server.url, "turning", 4000)
    new = client.replace("turning", versions[1])
    assert client.complete("turning", PROMPTS[0], 4).digest == new["version"]
    assert running.is_alive(), "neither the replacement nor new requests may wait for running ones"
    running.join(300)  # on busy cores
    assert running.version == f"turning@{old['version']}"
    assert running.got[:400] == [*map(str, expected.tokens)]
    assert (len(running.got), running.got[-1]) == (4001, "length")


def test_removal_waits_for_running_requests_or_ends_them(
    server: ServerProcess, client: AdapterClient, versions: list[Path]
) -> None:
    client.add("leaving", versions[0])
    running = Stream(server.url, "leaving", 150)
    client.remove("leaving")
    running.join(1)
    assert running.got[-1] == "length", "removed before the stream had ended"
    assert len(running.got) == 151

    client.add("leaving", versions[0])
    streams = [Stream(server.url, "leaving", 3000)]
    client.replace("leaving", versions[1])
    streams.append(Stream(server.url, "leaving", 3000))
    client.remove("leaving", force=True)
    for running in streams:  # also that of the version before
        running.join(5)
        assert (running.got[-1], len(running.got) < 3000) == ("abort", True), f"{len(running.got)} tokens"


def test_after_removal_memory_and_blocks_are_back(client: AdapterClient, versions: list[Path]) -> None:
    client.complete("tiny", PROMPTS[0])
    before = client.list()["residency"]
    assert before["slots"] == [None] * SLOTS
    for i in range(4):
        client.add(f"many-{i}", versions[i])
        for prompt in PROMPTS:
            client.complete(f"many-{i}", prompt, 40)
    used = client.list()["residency"]
    assert sorted(name for name in used["slots"] if name) == [f"many-{i}" for i in range(4)]
    assert (used["host_adapters"], used["kv_blocks_cached"] - before["kv_blocks_cached"] >= 16) == (4, True)
    for i in range(4):
        client.remove(f"many-{i}")
    after = client.list()["residency"]
    for field in ("slots", "host_adapters", "host_bytes", "kv_blocks_free", "kv_blocks_cached"):
        assert after[field] == before[field], field


def test_memory_does_not_grow_with_adapters_that_come_and_go(client: AdapterClient, versions: list[Path]) -> None:
    def come_and_go(times: int) -> int:
        for i in range(times):
            client.add("passing", versions[i % 8])
            client.complete("passing", PROMPTS[0], 2)
            client.remove("passing")
        return int(client.list()["residency"]["process_bytes"])

    first = come_and_go(16)
    again = come_and_go(48)
    assert again - first < 8 * 2**20, f"{(again - first) / 2**20:.1f} MiB more after 48 adapters of 0.2 MiB"


def test_pinned_adapters_keep_their_slot(client: AdapterClient, versions: list[Path]) -> None:
    client.add("kept", versions[0], pin=True)
    assert (client.get("kept")["pinned"], client.get("kept")["state"]) == (True, "slot")
    for i in range(1, HOST + 2):
        client.add(f"other-{i}", versions[i])
        client.complete(f"other-{i}", PROMPTS[0], 2)
    assert client.get("kept")["state"] == "slot"
    answers = [client.http.post(f"/v1/adapters/other-{i}/pin").status_code for i in range(1, SLOTS)]
    assert answers == [200] * (SLOTS - 2) + [409], "one slot has to stay for the others"
    assert client.complete(f"other-{HOST}", PROMPTS[0], 2).status == 200
    assert client.http.post("/v1/adapters/kept/unpin").json()["pinned"] is False


def test_a_pin_waits_for_streams_that_use_all_slots(
    server: ServerProcess, client: AdapterClient, versions: list[Path]
) -> None:
    for i in range(SLOTS + 1):
        client.add(f"s{i}", versions[i])
    running = [Stream(server.url, f"s{i}", 400) for i in range(SLOTS)]
    pinned = client.http.post(f"/v1/adapters/s{SLOTS}/pin").json()
    assert (pinned["pinned"], pinned["state"]) == (True, "slot")
    replaced = client.replace(f"s{SLOTS}", versions[SLOTS + 1])
    assert (replaced["pinned"], replaced["state"]) == (True, "slot")
    for stream in running:
        stream.join(60)
        assert (len(stream.got), stream.got[-1]) == (401, "length")
    assert client.complete(f"s{SLOTS}", PROMPTS[0], 2).status == 200


def test_prefetch_brings_an_adapter_into_host_memory(client: AdapterClient, versions: list[Path]) -> None:
    for i in range(HOST + 1):
        client.add(f"p{i}", versions[i])
    states = {card["name"]: card["state"] for card in client.list()["data"]}
    assert states[f"p{HOST}"] == "disk", "host memory is full, and a new adapter pushes no other out"
    assert client.http.post(f"/v1/adapters/p{HOST}/prefetch").json()["state"] == "host"


def test_content_that_was_damaged_on_disk_fails_its_own_requests_only(
    server: ServerProcess, client: AdapterClient, versions: list[Path]
) -> None:
    names = [f"d{i}" for i in range(HOST + 1)]
    digests = {name: client.add(name, versions[i])["version"] for i, name in enumerate(names)}
    last = names[-1]  # on disk only
    (stored,) = Path(server.env["HYDRASERVE_CACHE"]).glob(f"run/*/store/{digests[last]}.safetensors")
    intact = stored.read_bytes()
    stored.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    refused = client.complete(last, PROMPTS[0], 2)
    assert refused.status == 422
    assert "changed on the disk" in refused.body["error"]["message"]
    assert client.complete(names[0], PROMPTS[0], 2).status == 200
    stored.write_bytes(intact)
    assert client.complete(last, PROMPTS[0], 2).status == 200


class Load:
    """Random requests and random changes at the same time, and what came of it.

    It ends when there have been enough of both: how many changes fit beside a request is the machine's affair.
    """

    def __init__(self, url: str, versions: list[Path], alone: dict[tuple[str, int], tuple[int, ...]]) -> None:
        self.url, self.versions, self.alone = url, versions, alone
        self.names = [f"load-{i}" for i in range(SLOTS + 6)]
        self.answered = self.gone = self.changes = 0
        self.wrong: list[str] = []

    async def run(self, requests: int, changes: int, clients: int) -> None:
        limits = httpx.Limits(max_connections=clients + 2)
        async with httpx.AsyncClient(base_url=self.url, timeout=60, limits=limits) as http:
            for i, name in enumerate(self.names):
                await http.post("/v1/adapters", json={"name": name, "source": str(self.versions[i])})
            changing = asyncio.create_task(self._change(http, random.Random(0)))

            def enough() -> bool:
                return self.answered + self.gone + len(self.wrong) >= requests and self.changes >= changes

            await asyncio.gather(*(self._ask(http, enough, random.Random(seed + 1)) for seed in range(clients)))
            changing.cancel()

    async def _ask(self, http: httpx.AsyncClient, enough: Callable[[], bool], rng: random.Random) -> None:
        while not enough():
            name, i = rng.choice([*self.names, "tiny"]), rng.randrange(len(PROMPTS))
            answer = answer_of(await http.post("/v1/completions", json=completion(name, PROMPTS[i], 6)))
            self._check(name, i, answer)

    def _check(self, name: str, prompt: int, answer: Answer) -> None:
        if answer.status == 404 and name != "tiny":
            self.gone += 1
        elif answer.status != 200 or answer.finish != "length":
            self.wrong.append(f"{name}: {answer.status} {answer.finish} {answer.body.get('error')}")
        else:
            self.answered += 1
            if name != "tiny" and answer.tokens != self.alone[answer.digest, prompt]:
                self.wrong.append(f"{answer.version} prompt {prompt}: {answer.tokens}")

    async def _change(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        while True:
            path, name = f"/v1/adapters/{(name := rng.choice(self.names))}", name
            source = str(rng.choice(self.versions))
            match rng.randrange(12):
                case 0 | 1:
                    response = await http.delete(path, params={"wait": rng.random() < 0.5})
                    ok = (200, 202, 404)
                case 2 | 3:
                    response = await http.post(f"{path}/{rng.choice(['prefetch', 'pin', 'unpin', 'unpin'])}")
                    ok = (200, 404, 409)  # 409: all slots but one are pinned
                case _:
                    response = await http.put(path, json={"source": source})
                    ok = (200, 201)
            if response.status_code not in ok:
                self.wrong.append(f"{response.request.method} {name}: {response.status_code} {response.text}")
            self.changes += 1


def test_under_load_every_answer_is_that_of_its_own_content(
    server: ServerProcess,
    client: AdapterClient,
    versions: list[Path],
    alone: dict[tuple[str, int], tuple[int, ...]],
) -> None:
    load = Load(server.url, versions, alone)
    asyncio.run(load.run(requests=2000, changes=60, clients=24))
    assert load.wrong == []
    assert load.answered > 1300
    wait_for(lambda: all(card["requests_running"] == 0 for card in client.list()["data"]), "no request hangs")


def test_more_adapters_than_slots_wait_about_equally(
    server: ServerProcess, client: AdapterClient, versions: list[Path]
) -> None:
    names = [f"fair-{i}" for i in range(2 * SLOTS)]
    for i, name in enumerate(names):
        client.add(name, versions[i])
    # Whoever asks at once again is answered as often as it waits briefly. The first half asks with three clients each:
    # left alone, these would keep the slots.
    clients = [name for i, name in enumerate(names) for _ in range(3 if i < SLOTS else 1)]
    answers = [0] * len(clients)

    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            deadline = time.monotonic() + 12

            async def ask(i: int, name: str) -> None:
                while time.monotonic() < deadline:
                    answer = await http.post("/v1/completions", json=completion(name, PROMPTS[0], 8))
                    assert answer.status_code == 200
                    answers[i] += 1

            await asyncio.gather(*(ask(i, name) for i, name in enumerate(clients)))

    asyncio.run(run())
    print(answers)
    assert min(answers) > statistics.mean(answers) / 3, answers
