"""scripts/install.py: which set and which build of torch a machine gets."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "install.py"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with an environment of its own that it believes in."""
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(module, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.delenv("SYSTEM_PACKAGES", raising=False)
    return module


class FakePip:
    """Records what pip is asked for; finds what `offers` names."""

    def __init__(self, install: ModuleType, monkeypatch: pytest.MonkeyPatch, offers: tuple[str, ...] = ()) -> None:
        self.offers = offers
        self.asked: list[tuple[str, ...]] = []
        monkeypatch.setattr(install, "pip", lambda *arguments: self.asked.append(arguments))
        monkeypatch.setattr(install, "pip_finds", self.finds)
        monkeypatch.setattr(install, "write_bytecode", lambda _: None)

    def finds(self, *arguments: str) -> bool:
        self.asked.append(arguments)
        return arguments[-1] in self.offers


@pytest.mark.parametrize(
    ("script", "variant"),
    [
        ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", "cuda"),
        ("echo 'No devices were found'; exit 6", "cpu"),
        ("echo 'failed because it could not communicate with the driver'; exit 9", "cpu"),
        (None, "cpu"),
    ],
)
def test_variant_follows_nvidia_smi(
    install: ModuleType, script: str | None, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.detect_variant() == variant


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "cpu.txt"
    path.write_text("# a comment\nother==1\ntorch==2.13.0\ntorch-c-dlpack-ext==0.1\n")
    return path


def test_cpu_torch_of_pips_sources_is_taken_without_asking_further(
    install: ModuleType, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = FakePip(install, monkeypatch, offers=("torch==2.13.0+cpu",))
    monkeypatch.setattr(install, "reachable", lambda url: pytest.fail(f"asked {url}"))
    install.install_torch("cpu", lock)
    assert pip.asked == [("torch==2.13.0+cpu",)]


def test_pytorchs_index_is_used_when_it_can_be_reached(
    install: ModuleType, lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = f"--index-url={install.PYTORCH_CPU_INDEX}"
    pip = FakePip(install, monkeypatch, offers=(index,))
    monkeypatch.setattr(install, "reachable", lambda _: True)
    install.install_torch("cpu", lock)
    assert pip.asked == [("torch==2.13.0+cpu",), ("torch==2.13.0+cpu", index)]


def test_without_a_cpu_build_torch_comes_with_its_dependencies(
    install: ModuleType, lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pip = FakePip(install, monkeypatch)
    monkeypatch.setattr(install, "reachable", lambda _: False)
    install.install_torch("cpu", lock)
    assert pip.asked == [("torch==2.13.0+cpu",), ("install", f"--constraint={lock}", "torch==2.13.0")]
    assert "warning: found no torch==2.13.0+cpu" in capsys.readouterr().out


def test_cuda_torch_is_never_the_cpu_build(install: ModuleType, lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = FakePip(install, monkeypatch, offers=("torch==2.13.0+cpu",))
    install.install_torch("cuda", lock)
    assert pip.asked == [("install", "--no-deps", "torch==2.13.0,!=2.13.0+cpu")]


def test_an_unreachable_index_is_told_quickly(install: ModuleType) -> None:
    assert not install.reachable("http://127.0.0.1:9/")  # the discard port: refused at once


def test_a_second_time_does_nothing(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    pip = FakePip(install, monkeypatch, offers=("torch==2.13.0+cpu",))
    monkeypatch.setattr(install.venv, "create", lambda folder, **_: (made.append("venv"), folder.mkdir(exist_ok=True)))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(install.sys, "argv", ["install.py", *arguments])
        return int(install.main())

    assert run("--variant", "cpu", "dev") == 0
    first = len(pip.asked)
    assert first == 3  # torch, the locks, the package itself
    assert run("--variant", "cpu", "dev") == run("--variant", "cpu", "serve") == 0
    assert len(pip.asked) == first
    assert made == ["venv"]
    # The two vLLM distributions own the same files: another variant is a new environment.
    assert run("--variant", "cuda", "serve") == 0
    assert made == ["venv", "venv"]


def test_bytecode_is_written_where_python_does_not(
    install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "outer.py").write_text("import inner")
    (tmp_path / "inner.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    install.write_bytecode(["not_there_at_all", "outer"])
    written = {path.name.partition(".")[0] for path in (tmp_path / "__pycache__").iterdir()}
    assert written == {"outer", "inner"}


def test_a_failed_install_is_tried_again(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePip(install, monkeypatch, offers=("torch==2.13.0+cpu",))
    monkeypatch.setattr(install.venv, "create", lambda folder, **_: folder.mkdir(exist_ok=True))

    def fails(*arguments: str) -> None:
        raise install.subprocess.CalledProcessError(1, ["pip", *arguments])

    monkeypatch.setattr(install, "pip", fails)
    monkeypatch.setattr(install.sys, "argv", ["install.py", "--variant", "cpu", "serve"])
    assert install.main() == 1
    assert install.read_stamp() == {"variant": "cpu"}


@pytest.fixture
def debian(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container run by root, whose apt-get writes down what it is asked for, and lacks two of three packages."""
    program = tmp_path / "apt-get"
    program.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\nexit $(cat {tmp_path}/status)\n')
    program.chmod(0o755)
    (tmp_path / "status").write_text("0")
    (tmp_path / "there").touch()
    wanted = {"there": ("one",), "lacks": ("two", "three"), "*/no": ("four",)}
    monkeypatch.setattr(install, "SYSTEM", {str(tmp_path / path): names for path, names in wanted.items()})
    monkeypatch.setattr(install, "SYSTEMD", tmp_path / "systemd")
    monkeypatch.setattr(install.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SYSTEM_PACKAGES", "yes")
    return tmp_path


def test_a_container_gets_what_tests_start(
    install: ModuleType, debian: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install.install_system(install.missing_packages())
    update, asked = (debian / "asked").read_text().splitlines()
    assert update.endswith(" update")
    assert asked.endswith(" install --yes --no-install-recommends two three four")
    assert "two three four, which tests start" in capsys.readouterr().out


def test_without_packages_the_rest_is_installed(
    install: ModuleType, debian: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (debian / "status").write_text("100")
    install.install_system(install.missing_packages())
    assert "warning: apt-get failed" in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["nobody asked", "not root", "runs services", "no Debian"])
def test_other_machines_are_left_alone(
    install: ModuleType, debian: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    assert install.missing_packages() != []
    if reason == "nobody asked":
        monkeypatch.delenv("SYSTEM_PACKAGES")
    elif reason == "not root":
        monkeypatch.setattr(install.os, "geteuid", lambda: 1000)
    elif reason == "runs services":
        (debian / "systemd").mkdir()
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    assert install.missing_packages() == []


def test_a_test_that_is_skipped_without_a_package_names_one_that_is_installed(install: ModuleType) -> None:
    reasons = [
        reason
        for path in (SCRIPT.parent.parent / "tests").rglob("test_*.py")
        for reason in re.findall(r'reason="([^"]*Debian[^"]*)"', path.read_text())
    ]
    packages = {name for names in install.SYSTEM.values() for name in names}
    assert len(reasons) >= 6
    assert [reason for reason in reasons if packages.isdisjoint(re.findall(r"[a-z][a-z0-9-]+", reason))] == []


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
@pytest.mark.parametrize("profile", ["serve", "dev"])
def test_every_set_has_its_locks(install: ModuleType, variant: str, profile: str) -> None:
    paths = install.lock_files(variant, profile)
    assert all(path.is_file() for path in paths)
    assert "\ntorch==" in paths[0].read_text()
