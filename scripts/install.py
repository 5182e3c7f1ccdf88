"""Make or bring up to date the virtual environment that every verb of the Makefile runs in.

    python3 scripts/install.py [--variant auto|cpu|cuda] serve|dev

`serve` is what serving needs, `dev` adds tests, linters and training, and with SYSTEM_PACKAGES=yes, in a container run
by root, the programs of SYSTEM that some tests start. When nothing changed since the last time this returns at once.
Only the standard library is used: it runs before anything is installed.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this file is run by whatever python3 is
    sys.exit(
        f"error: got Python {sys.version_info[0]}.{sys.version_info[1]}, expected 3.11 or newer\n"
        "fix: install one and name it, for example: make serve PYTHON=python3.12"
    )

import argparse
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "hydraserve-install.json"
LOCKS = {
    ("cpu", "serve"): ("cpu.txt",),
    ("cpu", "dev"): ("cpu.txt", "dev.txt", "dev-cpu.txt"),
    ("cuda", "serve"): ("cuda.txt",),
    ("cuda", "dev"): ("cuda.txt", "dev.txt"),
}
# What tests start that is no Python package: what has to be there -> the packages of Debian that it is in.
SYSTEM = {
    "/usr/sbin/nginx": ("nginx-light",),
    "/usr/lib/nginx/modules/ngx_http_js_module.so": ("libnginx-mod-http-js",),
    "/usr/bin/prometheus": ("prometheus",),
    "/usr/bin/bwrap": ("bubblewrap",),
    "/bin/ip": ("iproute2",),
    "/usr/lib/*/faketime/libfaketimeMT.so.1": ("libfaketime",),
    "/usr/bin/chromedriver": ("chromium", "chromium-driver"),
}
# What a server imports, and what tests and training do.
SERVED = (
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu_worker",
    "vllm.model_executor.models.llama",
    "hydraserve.cli.main",
)
IMPORTED = {
    "serve": SERVED,
    "dev": (*SERVED, "pytest", "xdist", "hypothesis", "schemathesis", "openai", "moto.server", "peft", "trl", "triton"),
}
# Where this folder is, packages of servers start them: nginx and Prometheus would come up on somebody's machine.
SYSTEMD = Path("/run/systemd/system")
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# pip repeats an unreachable index for about a minute; one look of this many seconds tells as much.
PROBE_SECONDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", choices=("serve", "dev"))
    parser.add_argument("--variant", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args()
    variant = args.variant if args.variant != "auto" else detect_variant()
    wanted = fingerprint(variant, args.profile)
    if args.profile == "dev":
        install_system(missing_packages())
    if read_stamp().get(args.profile) == wanted:
        return 0
    with only_one():
        stamp = read_stamp()  # another process may have done it while this one waited
        if stamp.get(args.profile) == wanted:
            return 0
        try:
            install(variant, args.profile, stamp)
        except subprocess.CalledProcessError as e:
            print(f"error: exit status {e.returncode} of: {' '.join(map(str, e.cmd))}", file=sys.stderr)
            return 1
    return 0


def detect_variant() -> str:
    """`cuda` where the NVIDIA driver lists a GPU, else `cpu`."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def fingerprint(variant: str, profile: str) -> str:
    """Changes with everything that decides what is in the environment."""
    digest = hashlib.sha256(f"{variant} {profile} {sys.version}".encode())
    for path in (ROOT / "pyproject.toml", Path(__file__), *lock_files(variant, profile)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def lock_files(variant: str, profile: str) -> list[Path]:
    return [ROOT / "requirements" / name for name in LOCKS[variant, profile]]


def read_stamp() -> dict[str, str]:
    """What is installed: `variant`, and under each profile its fingerprint."""
    try:
        stamp: dict[str, str] = json.loads(STAMP.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return stamp


@contextmanager
def only_one() -> Iterator[None]:
    """Two verbs started at once must not write the same environment."""
    folder = os.open(ROOT / "requirements", os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def install(variant: str, profile: str, stamp: dict[str, str]) -> None:
    locks = lock_files(variant, profile)
    names = " and ".join(f"requirements/{lock.name}" for lock in locks)
    say(f"installing {names} into .venv (some minutes the first time)")
    make_venv(variant, stamp)
    install_torch(variant, locks[0])
    pip("install", "--no-deps", *(f"--requirement={lock}" for lock in locks))
    pip("install", "--no-deps", "--no-build-isolation", f"--editable={ROOT}")
    write_bytecode(IMPORTED[profile])
    done = {"serve", profile}
    fingerprints = {name: fingerprint(variant, name) for name in done}
    STAMP.write_text(json.dumps({"variant": variant, **fingerprints}, indent=1))
    say("done")


def make_venv(variant: str, stamp: dict[str, str]) -> None:
    """An environment holds one variant: the two vLLM distributions own the same files."""
    other = stamp.get("variant", variant)
    if other != variant:
        say(f".venv holds the {other} set, the {variant} set is wanted: making it anew")
    if other != variant or not (VENV / "bin" / "python").exists():
        venv.create(VENV, clear=True, with_pip=True)
    STAMP.write_text(json.dumps({"variant": variant}))  # nothing in it is complete until the end


def install_torch(variant: str, lock: Path) -> None:
    """Torch comes first, because which build of the locked version is right depends on the machine."""
    match = re.search(r"^torch==(\S+)", lock.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{lock}: got no line torch==VERSION, expected one; fix: scripts/lock.py")
    version = match.group(1)
    if variant == "cuda":
        # `==2.13.0` alone also accepts 2.13.0+cpu, and prefers it where pip's sources offer one.
        pip("install", "--no-deps", f"torch=={version},!={version}+cpu")
        return
    cpu_build = f"torch=={version}+cpu"
    if pip_finds(cpu_build):
        return
    if reachable(f"{PYTORCH_CPU_INDEX}/torch/") and pip_finds(cpu_build, f"--index-url={PYTORCH_CPU_INDEX}"):
        return
    say(f"warning: found no {cpu_build}, neither in pip's sources nor at {PYTORCH_CPU_INDEX}")
    say(f"warning: taking torch {version} as pip offers it; on x86-64 that brings gigabytes of CUDA libraries")
    pip("install", f"--constraint={lock}", f"torch=={version}")


def missing_packages() -> list[str]:
    """Debian's packages that tests want and this machine lacks. None where they are not ours to install: nobody asked
    for it, we are not root, it is no Debian, or it is a machine that runs services and no container."""
    if os.environ.get("SYSTEM_PACKAGES") != "yes" or os.geteuid() != 0 or SYSTEMD.exists():
        return []
    if shutil.which("apt-get") is None:
        return []
    return [package for there, packages in SYSTEM.items() if not glob.glob(there) for package in packages]


def install_system(packages: list[str]) -> None:
    """Without them tests are skipped, and say so: nothing that makes an installation fail."""
    if not packages:
        return
    say(f"installing Debian's packages {' '.join(packages)}, which tests start")
    apt_get("update")
    done = apt_get("install", "--yes", "--no-install-recommends", *packages)
    if done.returncode != 0:
        say("warning: apt-get failed, tests that need these packages will be skipped. It says:\n" + done.stdout.strip())


def apt_get(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Another apt-get may run at the moment; a mirror that does not answer is not waited for.
    options = [f"--option={option}" for option in ("DPkg::Lock::Timeout=60", "Acquire::http::Timeout=20")]
    command = ["apt-get", "--quiet", *options, *arguments]
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def write_bytecode(modules: Sequence[str]) -> None:
    """Of these modules and all that they import. Python does so by itself at the first import, but not where
    PYTHONDONTWRITEBYTECODE is set: there every start of a server would compile everything anew."""
    code = (
        "import importlib, sys\nfor name in sys.argv[1:]:\n try: importlib.import_module(name)\n except Exception: pass"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([str(VENV / "bin" / "python"), "-c", code, *modules], env=env, capture_output=True, check=False)


def pip_finds(*arguments: str) -> bool:
    """Install without dependencies, if pip's sources have it."""
    command = pip_command("install", "--no-deps", *arguments)
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, OSError):
        return False


def pip(*arguments: str) -> None:
    subprocess.run(pip_command(*arguments), check=True)


def pip_command(*arguments: str) -> list[str]:
    """No bytecode of all that is installed, which takes as long as the rest: see `write_bytecode`."""
    if arguments[0] == "install":
        arguments = ("install", "--no-compile", *arguments[1:])
    quiet = () if sys.stdout.isatty() else ("--quiet",)
    return [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", *quiet, *arguments]


def say(text: str) -> None:
    print(f"[install] {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
