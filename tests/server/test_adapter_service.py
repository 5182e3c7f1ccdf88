"""The life of an adapter, and of requests that use it, over an engine that only keeps books."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable
from pathlib import Path
from unittest.mock import Mock

import pytest
from fake_runtime import FakeRuntime, Run, stored

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.compose import Recipe
from hydraserve.adapters.ingest import Ingester
from hydraserve.adapters.registry import Origin
from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.store import AdapterStore
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    SourceForbiddenError,
    UnknownAdapterError,
    UnreadableFileError,
)
from hydraserve.server.cards import adapter_card
from hydraserve.server.keys import Principal
from hydraserve.server.lifecycle.admission import Admission
from hydraserve.server.lifecycle.served import RequestScope, VisibleAdapters, current_scope, label_of
from hydraserve.server.lifecycle.service import AdapterService
from hydraserve.server.schemas import CONCERN_OTHERS


def digest(path: Path) -> str:
    return load_adapter(path).digest


def test_adding_is_idempotent_and_names_are_taken_once(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        entry, is_new = await service.add("a", str(versions[0]))
        assert (is_new, entry.version and entry.version.digest) == (True, digest(versions[0]))
        assert await service.add("a", str(versions[0])) == (entry, False)
        with pytest.raises(AdapterConflictError, match="replace"):
            await service.add("a", str(versions[1]))
        with pytest.raises(AdapterConflictError, match="base model"):
            await service.add("base", str(versions[1]))
        both = await asyncio.gather(*(service.add("b", str(versions[1])) for _ in range(2)))
        assert sorted(is_new for _, is_new in both) == [False, True]
        assert list(runtime.host.values()) == [digest(versions[0]), digest(versions[1])]

    run(test)


def test_what_fails_leaves_nothing(run: Run, versions: list[Path], store: AdapterStore, tmp_path: Path) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        before = set(store.digests())
        with pytest.raises(AdapterNotFoundError):
            await service.add("a", str(versions[0].parent / "missing"))
        with pytest.raises(SourceForbiddenError):
            await service.add("a", str(tmp_path))
        with pytest.raises(AdapterConflictError, match="digest"):
            await service.add("a", str(versions[0]), digest="0" * 64)
        runtime.failing[digest(versions[0])] = UnreadableFileError("x", got="damage")
        with pytest.raises(UnreadableFileError):
            await service.add("a", str(versions[0]))
        assert (len(service.registry), service.current, runtime.host) == (0, {}, {})
        assert set(store.digests()) <= before

    run(test)


def test_a_replacement_that_fails_changes_nothing(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        with pytest.raises(AdapterNotFoundError):
            await service.replace("a", str(versions[0].parent / "missing"))
        entry = service.registry.get("a")
        assert entry.source == str(versions[0])
        assert list(runtime.host.values()) == [digest(versions[0])]
        assert service.current["a"].stored.digest == digest(versions[0])
        assert entry.failure is not None
        await service.replace("a", str(versions[1]))
        assert (entry.source, entry.failure) == (str(versions[1]), None)

    run(test)


def test_old_content_goes_when_its_last_request_has_ended(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        admission = Admission(service)
        await service.add("a", str(versions[0]))
        old = service.current["a"]
        async with admission.admit(old.adapter_id, old.label, "r1"):
            await service.replace("a", str(versions[1]))
            new = service.current["a"]
            async with admission.admit(new.adapter_id, new.label, "r2"):
                assert set(runtime.host.values()) == {digest(versions[0]), digest(versions[1])}
            assert runtime.evicted == []
        while runtime.evicted != [old.label]:
            await asyncio.sleep(0)
        while set(runtime.host.values()) != {digest(versions[1])}:
            await asyncio.sleep(0)

    run(test)


def test_removal_waits_or_aborts(run: Run, versions: list[Path], store: AdapterStore) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        admission = Admission(service)
        for force in (False, True):
            await service.add("a", str(versions[2]))
            served = service.current["a"]
            async with admission.admit(served.adapter_id, served.label, f"r-{force}"):
                removing = asyncio.create_task(service.remove("a", force=force))
                while service.registry.find("a") is not None:
                    await asyncio.sleep(0)
                assert not removing.done()
                assert "a" not in VisibleAdapters(service.current)
            await removing
            assert runtime.host == {}
            assert digest(versions[2]) not in set(store.digests())
        assert runtime.aborted == ["r-True"]
        with pytest.raises(UnknownAdapterError):
            await service.remove("a")

    run(test)


def test_a_request_that_waited_while_its_adapter_was_taken_away_is_refused(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        admission = Admission(service)
        for i in range(3):
            await service.add(f"a{i}", str(versions[i]))
        holds = []
        for i in range(2):  # both slots
            served = service.current[f"a{i}"]
            holds.append(admission.admit(served.adapter_id, served.label, f"r{i}"))
            await holds[-1].__aenter__()
        last = service.current["a2"]

        async def ask() -> None:
            async with admission.admit(last.adapter_id, last.label, "late"):
                raise AssertionError("must not be let in")

        waiting = asyncio.create_task(ask())
        while not service.turnstile.waiting(last.stored.digest):
            await asyncio.sleep(0)
        removing = asyncio.create_task(service.remove("a2", force=True))
        while not last.removed:
            await asyncio.sleep(0)
        await holds[0].__aexit__(None, None, None)
        with pytest.raises(UnknownAdapterError):
            await waiting
        await removing
        await holds[1].__aexit__(None, None, None)
        assert (service.turnstile.active, len(runtime.host)) == (0, 2)

    run(test)


def test_only_the_path_of_the_command_line_may_be_anywhere(run: Run, versions: list[Path], tmp_path: Path) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        given, other = (shutil.copytree(versions[i], tmp_path / f"outside-{i}") for i in range(2))
        await service.claim("a", str(given), Origin.COMMAND_LINE)
        with pytest.raises(SourceForbiddenError):
            await service.replace("a", str(other))
        with pytest.raises(SourceForbiddenError):
            await service.replace("a", "hf://org/x")
        assert service.current["a"].stored.digest == digest(given)
        await service.replace("a", str(versions[2]))
        await service.replace("a", str(given))
        await service.replace("a")
        assert digest(given) in runtime.host.values()
        assert service.current["a"].stored.digest == digest(given)

    run(test)


def test_names_under_one_content_share_it(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        await service.add("b", str(versions[0]))
        assert list(runtime.host.values()) == [digest(versions[0])]
        await service.remove("a")
        assert list(runtime.host.values()) == [digest(versions[0])], "the other name still needs it"
        await service.remove("b")
        assert runtime.host == {}

    run(test)


def test_pins(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]), pin=True)
        await service.add("b", str(versions[1]))
        with pytest.raises(AdapterConflictError, match="slots"):
            await service.pin("b", True)
        first = service.current["a"].adapter_id
        await service.replace("a", str(versions[2]))
        assert service.registry.get("a").pinned
        assert runtime.pinned == {service.current["a"].adapter_id} != {first}
        await service.pin("a", False)
        await service.pin("a", False)
        assert runtime.pinned == set()
        await service.pin("b", True)
        await service.remove("b")
        assert runtime.pinned == set()

    run(test)


def test_registered_adapters_are_read_when_asked_for(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        service.register("a", str(versions[0]), Origin.DIRECTORY)
        service.register("bad", str(versions[0].parent / "missing"), Origin.DIRECTORY)
        assert runtime.loads == []
        await service.ready("nobody's")
        await asyncio.gather(*(service.ready("a") for _ in range(5)))
        assert runtime.loads == [digest(versions[0])]
        errors = []
        for _ in range(2):
            with pytest.raises(AdapterNotFoundError) as caught:
                await service.ready("bad")
            errors.append(caught.value)
        assert errors[0] is errors[1], "not tried again at once"

    run(test)


def test_adapters_composed_of_each_other_do_not_wait_for_ever(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        for name, version in zip("ab", versions, strict=False):
            service.register(name, str(version), Origin.API)
        assert runtime.loads == []
        recipes = {name: Recipe(((part, 2.0),)).source for name, part in ("ab", "ba")}
        work = (service.replace(name, recipe) for name, recipe in recipes.items())
        ended = await asyncio.gather(*work, return_exceptions=True)
        refused = [error for error in ended if isinstance(error, BaseException)]
        assert len(refused) < 2
        assert {type(error) for error in refused} <= {AdapterConflictError}, refused
        composed = [entry.name for entry in service.registry if entry.source == recipes[entry.name]]
        assert len(composed) == 2 - len(refused)

    run(test)


def test_the_digest_that_is_asked_for_has_to_be_there(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        source, wrong = str(versions[0]), digest(versions[1])
        await service.add("a", source, digest=digest(versions[0]).upper())
        service.register("unread", source, Origin.API)
        recipe = Recipe((("a", 2.0),)).source
        for name, where in (("a", source), ("unread", source), ("mix", recipe)):
            with pytest.raises(AdapterConflictError, match=f"expected digest {wrong}"):
                await service.add(name, where, digest=wrong)
        with pytest.raises(AdapterConflictError, match="digest"):
            await service.replace("a", digest=wrong)
        assert {entry.name for entry in service.registry} == {"a", "unread"}
        entry, is_new = await service.add("a", source, digest=digest(versions[0]))
        assert (entry.name, is_new, list(runtime.host.values())) == ("a", False, [digest(versions[0])])

    run(test)


def test_what_cannot_be_derived_is_not_read_for_again(
    run: Run, versions: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = versions[0].parent / f"plain-{tmp_path.name}"
    save_adapter(make_adapter({"model.layers.0.self_attn.q_proj": (64, 64)}, ("q_proj",), 4, 1, seed=1), plain)

    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        await service.add("plain", str(plain))
        derivations = Mock(side_effect=Ingester.derive)
        monkeypatch.setattr(Ingester, "derive", lambda *args: derivations(*args))
        for name in ("a@head=3", "a@head=9999", "a@top_k=0", "a@top_k=4", "plain@head=1", "plain@top_k=2"):
            with pytest.raises(UnknownAdapterError, match="heads"):
                await service.ready(name)
        assert derivations.call_count == 0
        for _ in range(3):
            with pytest.raises(UnknownAdapterError, match="router"):
                await service.ready("plain@uniform")
        assert derivations.call_count == 1
        await service.ready("a@head=2")
        assert len(runtime.host) == 3

    run(test)


def test_an_adapter_is_derived_from_what_its_parent_is_by_then(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        lock = service._lock("a@uniform")
        async with lock:  # somebody else is at it
            deriving = asyncio.create_task(service.ready("a@uniform"))
            while not service.tasks.running:
                await asyncio.sleep(0)
            await service.replace("a", str(versions[1]))
            while digest(versions[0]) in runtime.host.values():
                await asyncio.sleep(0)
        await deriving
        assert service.registry.get("a@uniform").source == f"{digest(versions[1])}@uniform"

    run(test)


def test_adapters_are_composed_of_derived_ones(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        await service.add("a", str(versions[0]))
        await service.add("mix", Recipe((("a@head=0", 1.0), ("a@head=1", 0.5))).source)
        assert {entry.name for entry in service.registry} == {"a", "a@head=0", "a@head=1", "mix"}
        assert service.current["mix"].stored.rank == 8
        with pytest.raises(UnknownAdapterError, match="head 7"):
            await service.add("other", Recipe((("a@head=7", 1.0),)).source)
        assert len(runtime.host) == 3

    run(test)


def test_contents_whose_digests_begin_alike_are_told_apart() -> None:
    one, other = stored("abcdefgh-1"), stored("abcdefgh-2")
    assert one.digest[:12] == other.digest[:12]
    assert label_of("a", one.digest) != label_of("a", other.digest)


def test_tenants(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        admission = Admission(service)
        await service.add("a-1", str(versions[0]))
        await service.add("b-1", str(versions[1]))
        visible = VisibleAdapters(service.current)
        assert len(runtime.host) == 2
        assert (set(visible), admission.cache_salt()) == ({"a-1", "b-1"}, None)
        salts = []
        for name in ("a", "b"):
            token = current_scope.set(RequestScope(Principal(name, adapters=(f"{name}-*",), isolated=True)))
            assert set(visible) == {f"{name}-1"}
            other = "b-1" if name == "a" else "a-1"
            assert other not in visible
            with pytest.raises(KeyError):
                visible[other]
            salts.append(admission.cache_salt())
            current_scope.reset(token)
        assert len({None, *salts}) == 3
        token = current_scope.set(RequestScope(Principal("open")))
        assert admission.cache_salt() is None
        current_scope.reset(token)

    run(test)


def test_a_tenant_is_told_nothing_of_others(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        admission, residency = Admission(service), await runtime.residency()
        await service.add("b-secret", str(versions[0]))
        recipe = Recipe((("b-secret", 2.0),)).source
        entry, _ = await service.add("a-mix", recipe)
        entry.failure = AdapterNotFoundError("x", where="s3://bucket/of-b")
        assert "b-secret" in (adapter_card(service, entry, residency).source or "")
        service.register("a-bad", str(versions[0].parent / "of-b"), Origin.API)
        broken = UnreadableFileError("file", where="/store/of-b")
        tenant = RequestScope(Principal("a", adapters=("a-*",)), told_all=False)
        token = current_scope.set(tenant)
        card = adapter_card(service, entry, residency)
        assert {name for name, value in card if value is None} >= set(CONCERN_OTHERS)
        assert card.version
        for told in (card.model_dump_json(), await message(admission.ready("a-bad"), AdapterNotFoundError)):
            assert "secret" not in told
            assert "of-b" not in told
        assert "head=9" in await message(admission.ready("a-mix@head=9"), UnknownAdapterError)
        await service.cache.drop(entry.version.digest if entry.version else "")
        runtime.failing = {entry.version.digest if entry.version else "": broken}
        served = service.current["a-mix"]
        told = await message(admission.admit(1, served.label, "r").__aenter__(), UnreadableFileError)
        assert "of-b" not in told
        current_scope.reset(token)
        assert "of-b" in await message(admission.ready("a-bad"), AdapterNotFoundError)

    run(test)


async def message(work: Awaitable[object], kind: type[Exception]) -> str:
    with pytest.raises(kind) as caught:
        await work
    return str(caught.value)


def test_a_request_knows_how_long_it_waited_for_its_adapter_to_be_read(run: Run, versions: list[Path]) -> None:
    async def test(service: AdapterService, runtime: FakeRuntime) -> None:
        service.register("late", str(versions[0]), Origin.DIRECTORY)
        scope = RequestScope()
        token = current_scope.set(scope)
        try:
            await Admission(service).ready("late")
        finally:
            current_scope.reset(token)
        read = service.registry.get("late").load_seconds
        assert read is not None
        assert 0 < read < scope.waited
        assert runtime.loads == [digest(versions[0])]

    run(test)
