"""What keeps the repository as it is meant: names, layers, locks, the commands that the README shows."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hydraserve.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Changing what people import is a decision, not an accident: change it here too.
PUBLIC = {
    "hydra_kernels": {
        "Carry",
        "HydraWeights",
        "LayerSlots",
        "Layout",
        "RoutingProbe",
        "SlotCapacity",
        "StepMetadata",
        "expand_",
        "linear_",
        "make_slots",
        "shrink",
    },
    "hydraserve.models": {
        "BASE_MODELS",
        "BaseModel",
        "ModelAccess",
        "base_shapes",
        "check_fits",
        "demo_model",
        "hub_name",
        "resolve_model",
    },
    "hydraserve.tuner": {
        "HydraLoraConfig",
        "HydraLoraLayer",
        "HydraLoraLinear",
        "HydraLoraModel",
        "RouterLossCallback",
        "Routing",
        "record_routing",
    },
}


def python(code: str, folder: Path) -> str:
    """What a fresh interpreter started in `folder` prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["the repository", "elsewhere"])
def test_the_name_kernels_is_not_ours(place: str, tmp_path: Path) -> None:
    """transformers probes for Hugging Face's package of this name; if it finds ours, vLLM cannot be imported."""
    folder = ROOT if place == "the repository" else tmp_path
    code = (
        "from importlib.util import find_spec\n"
        "from transformers.utils import is_kernels_available\n"
        "spec = find_spec('kernels')\n"
        "print(spec is not None and spec.loader is not None, is_kernels_available())"
    )
    # In the repository Python sees a folder without code of its own (a spec without a loader), elsewhere nothing.
    assert python(code, folder) == "False False"


def test_only_the_packages_are_packages() -> None:
    for folder in ("kernels", "scripts", "examples"):
        assert not (ROOT / folder / "__init__.py").exists()
    for folder in ("tests", "kernels/tests", "kernels/benchmarks"):
        assert not list((ROOT / folder).rglob("__init__.py"))


def test_test_files_have_names_of_their_own() -> None:
    """Without packages pytest imports a test file by its bare name."""
    names = [path.name for folder in ("tests", "kernels/tests") for path in (ROOT / folder).rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_layers() -> None:
    """The contracts are in pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_command_is_cheap_until_it_runs() -> None:
    """`hydraserve --help` must not take the seconds that torch, transformers and vLLM take to import."""
    modules = sorted(f"hydraserve.cli.{path.stem}" for path in (ROOT / "hydraserve/cli").glob("*.py"))
    code = f"import sys, {', '.join(modules)}; print(sorted({{'torch', 'transformers', 'vllm'}} & set(sys.modules)))"
    assert python(code, ROOT) == "[]"


@pytest.mark.parametrize("module", PUBLIC)
def test_public_surface(module: str) -> None:
    found = importlib.import_module(module)
    assert set(found.__all__) == PUBLIC[module]
    assert all(hasattr(found, name) for name in found.__all__)


def readme_commands(program: str) -> set[str]:
    """The words after `program` in the README's indented blocks and code spans."""
    return set(re.findall(rf"(?:^    |`){program} ([a-z][a-z-]*)", README, re.MULTILINE))


def test_readme_shows_verbs_that_exist() -> None:
    verbs = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert verbs == {"serve", "test", "lint", "check", "bench"}
    assert {"serve", "test"} <= readme_commands("make") <= verbs


def test_readme_shows_commands_that_exist() -> None:
    shown = readme_commands("hydraserve")
    assert shown >= {"models"}
    assert shown <= set(COMMANDS)


@pytest.mark.parametrize("lock", ["cpu.txt", "cuda.txt"])
def test_locks_hold_every_dependency(lock: str) -> None:
    """A dependency added to pyproject.toml needs `python scripts/lock.py`."""
    locked = read_locks(lock, "dev.txt", *(["dev-cpu.txt"] if lock == "cpu.txt" else []))
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["demo"] + extras["train"] + extras["dev"] + extras[lock[:-4]]
    for line in wanted:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in requirements/{lock} or dev.txt: scripts/lock.py"
        assert requirement.specifier.contains(version, prereleases=True), f"{line}, locked {version}"


def read_locks(*names: str) -> dict[str, str]:
    """Name -> version. A version of its own for some machines is left out."""
    lines = [line for name in names for line in (ROOT / "requirements" / name).read_text().splitlines()]
    pinned = [line.split("==") for line in lines if re.match(r"\w", line) and ";" not in line]
    return {canonicalize_name(name): version for name, version in pinned}
