"""--adapter-dir: what appears is loaded whole, what changes is loaded again, what vanishes is unloaded."""

from __future__ import annotations

import asyncio
import shutil
import tarfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from fake_runtime import FakeRuntime, MakeService

from hydraserve.adapters.checkpoint import load_adapter
from hydraserve.adapters.registry import Origin
from hydraserve.errors import AdapterConflictError, StorageError
from hydraserve.server.lifecycle import directory as directories
from hydraserve.server.lifecycle.directory import AdapterDirectory, look
from hydraserve.server.lifecycle.service import AdapterService


@pytest.fixture
def wish(tmp_path: Path) -> Path:
    folder = tmp_path / "wish"
    folder.mkdir()
    return folder


Make = Callable[[], tuple[AdapterService, AdapterDirectory]]


@pytest.fixture
def make(make_service: MakeService, wish: Path) -> Make:
    """A service over a fake engine, following `wish`."""

    def make() -> tuple[AdapterService, AdapterDirectory]:
        service = make_service(FakeRuntime(slots=2, host_adapters=8), wish)
        return service, AdapterDirectory(service, wish)

    return make


def served(service: AdapterService) -> dict[str, str]:
    return {entry.name: entry.version.digest for entry in service.registry if entry.version is not None}


async def settled(directory: AdapterDirectory) -> None:
    for _ in range(10):
        if await directory.follow():
            return
    raise AssertionError("the directory does not settle")


def run(test: Awaitable[None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))  # type: ignore[arg-type]


def test_what_is_there_at_the_start_is_not_read(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        shutil.copytree(versions[0], wish / "sql")
        (wish / "notes.txt").write_text("no adapter")
        (wish / "empty").mkdir()
        service, directory = make()
        directory.register()
        assert [(entry.name, entry.origin, entry.version) for entry in service.registry] == [
            ("sql", Origin.DIRECTORY, None)
        ]
        await service.ready("sql")
        assert served(service) == {"sql": load_adapter(versions[0]).digest}

    run(test())


def test_appearing_changing_vanishing(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        directory.register()
        digests = [load_adapter(path).digest for path in versions]
        shutil.copytree(versions[0], wish / "one")
        with tarfile.open(wish / "two.tar.gz", "w:gz") as tar:
            tar.add(versions[1], "inside")
        await settled(directory)
        assert served(service) == {"one": digests[0], "two": digests[1]}

        for file in versions[2].iterdir():
            shutil.copy(file, wish / "one" / file.name)
        await settled(directory)
        assert served(service) == {"one": digests[2], "two": digests[1]}

        shutil.rmtree(wish / "one")
        await settled(directory)
        assert served(service) == {"two": digests[1]}
        await service.close()

    run(test())


def test_a_copy_is_taken_when_it_is_complete(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        whole = (versions[0] / "adapter_model.bin").read_bytes()
        folder = wish / "sql"
        folder.mkdir()
        shutil.copy(versions[0] / "adapter_config.json", folder)
        for part in range(1, 5):  # a copy that goes on while it is looked at
            (folder / "adapter_model.bin").write_bytes(whole[: part * len(whole) // 5])
            assert not await directory.follow(), "still changing"
            assert served(service) == {}
        await directory.follow()  # it pauses: taken for complete, and refused, as it is not
        assert len(service.registry) == 0
        (folder / "adapter_model.bin").write_bytes(whole)
        await settled(directory)
        assert served(service) == {"sql": load_adapter(versions[0]).digest}
        assert look(wish).keys() == {"sql"}

    run(test())


def test_what_cannot_be_read_does_not_replace_what_can(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        shutil.copytree(versions[0], wish / "sql")
        await settled(directory)
        before = served(service)
        (wish / "sql" / "adapter_model.bin").write_bytes(b"damaged")
        await settled(directory)
        assert served(service) == before
        failure = service.registry.get("sql").failure
        assert failure is not None
        assert "adapter_model.bin" in str(failure)

    run(test())


def test_names_of_others_are_left_alone(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        shutil.copytree(versions[0], wish / "mine")
        await service.add("mine", str(wish / "mine"), origin=Origin.API)
        shutil.copytree(versions[1], wish / "wrong name")
        shutil.copytree(versions[2], wish / ".hidden")
        await settled(directory)
        assert {entry.name: entry.origin for entry in service.registry} == {"mine": Origin.API}
        shutil.rmtree(wish / "mine")
        await settled(directory)
        assert "mine" in served(service)

    run(test())


def test_a_name_that_becomes_free_is_the_directorys(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        shutil.copytree(versions[0], wish / "mine")
        await service.add("mine", str(wish / "mine"), origin=Origin.API)
        await settled(directory)
        await service.remove("mine")
        await settled(directory)
        assert service.registry.get("mine").origin is Origin.DIRECTORY

    run(test())


def test_what_fails_for_another_reason_is_tried_again_and_told_once(
    make: Make, wish: Path, versions: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        service, directory = make()
        shutil.copytree(versions[0], wish / "sql")
        put, remove, full = service.registry.put, service.registry.remove, StorageError("state", got="a full disk")
        for method in ("put", "remove"):
            monkeypatch.setattr(service.registry, method, Mock(side_effect=full))
        for _ in range(3):
            await settled(directory)
        assert served(service) == {}
        monkeypatch.setattr(service.registry, "put", put)
        await settled(directory)
        assert set(served(service)) == {"sql"}
        shutil.rmtree(wish / "sql")
        for _ in range(3):
            await settled(directory)
        assert set(served(service)) == {"sql"}
        monkeypatch.setattr(service.registry, "remove", remove)
        await settled(directory)
        assert served(service) == {}
        assert [record.message for record in caplog.records].count(f"adapter sql of --adapter-dir: {full}") == 2

    run(test())


def test_what_the_directory_wishes_is_not_taken_away_elsewhere(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        shutil.copytree(versions[0], wish / "sql")
        await settled(directory)
        with pytest.raises(AdapterConflictError, match="--adapter-dir"):
            await service.remove("sql")
        with pytest.raises(AdapterConflictError, match="--adapter-dir"):
            await service.replace("sql", str(versions[1]))
        await service.pin("sql", True)

    run(test())


def test_replicas_that_share_a_directory_agree(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        replicas = [make() for _ in range(2)]
        for i, path in enumerate(versions):
            shutil.copytree(path, wish / f"a{i}")
        await settled(replicas[0][1])
        shutil.rmtree(wish / "a0")
        shutil.rmtree(wish / "a1")
        shutil.copytree(versions[2], wish / "a1")
        for _, directory in replicas:
            await settled(directory)
        assert served(replicas[0][0]) == served(replicas[1][0])
        assert set(served(replicas[1][0])) == {"a1", "a2", "a3"}
        for service, _ in replicas:
            await service.close()

    run(test())


def test_a_directory_that_is_away_is_no_wish(make: Make, wish: Path, versions: list[Path]) -> None:
    async def test() -> None:
        service, directory = make()
        shutil.copytree(versions[0], wish / "sql")
        await settled(directory)
        wish.rename(wish.with_name("away"))
        await settled(directory)
        assert "sql" in served(service), "a network disk that is gone for a moment must not stop the service"

    run(test())


def test_changes_are_told_by_the_system(
    make: Make, wish: Path, versions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directories, "SETTLE_S", 0.02)

    async def test() -> None:
        service, directory = make()
        directory.register()
        watching = asyncio.create_task(directory.watch())
        shutil.copytree(versions[0], wish / "sql")
        while not served(service):
            await asyncio.sleep(0.01)
        shutil.rmtree(wish / "sql")
        while served(service):
            await asyncio.sleep(0.01)
        watching.cancel()
        await service.close()

    run(test())
