"""Who may do what: keys, roles, tenants, rates, and where a request comes from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hydraserve.errors import ConfigError, ForbiddenError, RateLimitError, UnauthenticatedError
from hydraserve.server import keys
from hydraserve.server.keys import KeyRing, Principal, Role, hash_key, parse_key_file
from hydraserve.server.security import Caller, Gate, is_loopback

LOCAL = Caller("127.0.0.1", "localhost:8000")
REMOTE = Caller("10.0.0.7", "server:8000")
CHANGES = (("POST", "/v1/adapters"), ("DELETE", "/v1/adapters/a"), ("POST", "/v1/load_lora_adapter"))


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_without_keys_only_this_machine_changes_adapters() -> None:
    open_gate = Gate(KeyRing(), local_admin=True)
    assert open_gate.admit("POST", "/v1/completions", None, REMOTE).role is Role.INFERENCE
    for method, path in CHANGES:
        assert open_gate.admit(method, path, None, LOCAL).role is Role.ADMIN
        with pytest.raises(ForbiddenError, match="admin key"):
            open_gate.admit(method, path, None, REMOTE)
        with pytest.raises(ForbiddenError, match="HYDRASERVE_ADMIN_API_KEY"):
            Gate(KeyRing(), local_admin=False).admit(method, path, None, LOCAL)


@pytest.mark.parametrize(
    "caller",
    [
        Caller("127.0.0.1", "localhost", proxied=True),
        Caller("127.0.0.1", "localhost", origin="https://evil.example"),
        Caller("127.0.0.1", "evil.example"),
        Caller("192.168.1.5", "localhost"),
    ],
)
def test_a_web_page_or_a_proxys_client_is_not_this_machine(caller: Caller) -> None:
    with pytest.raises(ForbiddenError):
        Gate(KeyRing(), local_admin=True).admit("POST", "/v1/adapters", None, caller)


def test_loopback_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost", "", "::ffff:127.0.0.1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "::ffff:10.0.0.1")))


def test_keys_for_inference_and_for_administration() -> None:
    gate = Gate(KeyRing(["user"], "boss"), local_admin=False)
    assert gate.admit("POST", "/v1/completions", bearer("user"), REMOTE).role is Role.INFERENCE
    assert gate.admit("POST", "/v1/completions", bearer("boss"), REMOTE).role is Role.ADMIN
    assert gate.admit("GET", "/health", None, REMOTE).name == "anonymous"
    with pytest.raises(UnauthenticatedError):
        gate.admit("POST", "/v1/completions", None, REMOTE)
    for wrong in (bearer("nobody"), "user", "Basic user", bearer("")):
        with pytest.raises(UnauthenticatedError):
            gate.admit("POST", "/v1/completions", wrong, REMOTE)
    for method, path in CHANGES:
        assert gate.admit(method, path, bearer("boss"), REMOTE).role is Role.ADMIN
        with pytest.raises(ForbiddenError):
            gate.admit(method, path, bearer("user"), LOCAL)
        with pytest.raises(UnauthenticatedError, match="admin key"):
            gate.admit(method, path, None, LOCAL)
    with pytest.raises(ForbiddenError):
        gate.admit("POST", "/sleep", bearer("user"), REMOTE)
    assert gate.admit("GET", "/v1/adapters", bearer("user"), REMOTE).role is Role.INFERENCE


FILE = f"""
[[key]]
name = "team-a"
sha256 = "{hash_key("a")}"
adapters = ["sql", "team-a-*"]
isolated = true
requests_per_minute = 60

[[key]]
name = "scraper"
sha256 = "{hash_key("m").upper()}"
role = "metrics"
"""


def test_a_key_file(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    gate = Gate(KeyRing(file=file), local_admin=False)
    tenant = gate.admit("POST", "/v1/completions", bearer("a"), REMOTE)
    assert tenant == Principal("team-a", Role.INFERENCE, ("sql", "team-a-*"), True, 60)
    assert [tenant.may_use(name) for name in ("sql", "team-a-1", "sql@uniform", "sql2", "SQL", "team-b-1", "")] == [
        *(True, True, True, False, False, False, False)
    ]
    assert gate.admit("GET", "/metrics", bearer("m"), REMOTE).role is Role.METRICS
    for path, key in (("/metrics", "a"), ("/v1/completions", "m")):
        with pytest.raises(ForbiddenError):
            gate.admit("POST", path, bearer(key), REMOTE)
    with pytest.raises(UnauthenticatedError):
        gate.admit("GET", "/metrics", None, LOCAL)
    for key in "am":
        with pytest.raises(ForbiddenError, match="/scale_elastic_ep"):
            gate.admit("POST", "/scale_elastic_ep", bearer(key), LOCAL)
    with pytest.raises(UnauthenticatedError):
        gate.admit("POST", "/sleep", None, LOCAL)


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        "[key]",
        "",
        'key = ["a"]',
        "key = [[]]",
        FILE + "[other]\n",
        '[[key]]\nname = "x"\n',
        f'[[key]]\nsha256 = "{hash_key("a")}"\n',
        '[[key]]\nname = "x"\nsha256 = "12"\n',
        FILE + f'[[key]]\nname = "team-a"\nsha256 = "{hash_key("z")}"\n',
        FILE + f'[[key]]\nname = "other"\nsha256 = "{hash_key("a")}"\n',
        *(
            f'[[key]]\nname = "x"\nsha256 = "{hash_key("x")}"\n{line}\n'
            for line in ('role = "root"', "adapters = 3", "isolated = 1", "requests_per_minute = 0", "unknown = 1")
        ),
    ],
)
def test_key_files_that_cannot_be_used(text: str) -> None:
    with pytest.raises(ConfigError, match="--api-key-file"):
        parse_key_file(text)


def test_a_changed_key_file_is_read_again_and_a_broken_one_is_not(tmp_path: Path) -> None:
    file, now = tmp_path / "keys.toml", [0.0]
    file.write_text(FILE)
    ring = KeyRing(file=file, clock=lambda: now[0])
    assert ring.identify(bearer("a")) is not None

    def change(text: str) -> None:
        now[0] += 2
        file.write_text(text)
        os.utime(file, ns=(0, int(now[0] * 1e9)))

    change("broken [[")
    assert ring.identify(bearer("a")) is not None
    change(FILE.replace(hash_key("a"), hash_key("b")))
    assert ring.identify(bearer("b")) is not None
    with pytest.raises(UnauthenticatedError):
        ring.identify(bearer("a"))
    change('key = ["b"]')
    assert ring.identify(bearer("b")) is not None
    change("")
    assert ring.identify(bearer("b")) is not None
    now[0] += 2
    file.unlink()
    assert ring.identify(bearer("b")) is not None
    change("key = []")
    with pytest.raises(UnauthenticatedError):
        ring.identify(bearer("b"))
    assert ring.has_inference_keys, "a request without a key is still refused"


def test_every_key_is_compared_and_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = keys.secrets.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return real(a, b)

    monkeypatch.setattr(keys.secrets, "compare_digest", compare)
    ring = KeyRing(["one", "two", "three"], "boss")
    assert ring.identify(bearer("one")) is not None
    assert len(compared) == 4, "also after the key was found"
    assert all(len(a) == len(b) == 64 for a, b in compared), "hashes: of one length, whatever the key's"


def test_rates() -> None:
    now = [0.0]
    ring = KeyRing(clock=lambda: now[0])
    slow = Principal("slow", rate=60)
    for _ in range(10):  # ten seconds' worth at once
        ring.count(slow)
    with pytest.raises(RateLimitError, match="60 a minute") as caught:
        ring.count(slow)
    assert caught.value.retry_after == pytest.approx(1.0)
    now[0] += 3
    for _ in range(3):
        ring.count(slow)
    with pytest.raises(RateLimitError):
        ring.count(slow)
    for _ in range(1000):
        ring.count(Principal("free"))
