"""The compose files are valid, name files that exist, and start the server with flags that it has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parent.parent.parent / "deploy"


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return found


def test_all_of_deploy_passes_its_checks() -> None:
    done = subprocess.run(
        [sys.executable, DEPLOY.parent / "scripts" / "check_deploy.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_mounted_files_are_there() -> None:
    services = load("compose.yaml")["services"]
    sources = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    files = [source for source in sources if source.startswith(".")]
    assert len(files) == 4
    assert [source for source in files if not (DEPLOY / source).exists()] == []


def test_prometheus_asks_what_it_is_configured_to_ask_outside_of_compose() -> None:
    ours = yaml.safe_load(load("compose.yaml")["configs"]["prometheus"]["content"])
    other = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    ours["scrape_configs"][0]["static_configs"] = other["scrape_configs"][0]["static_configs"]
    assert ours == other


def test_the_server_gets_longer_to_stop_than_it_takes() -> None:
    from hydraserve.config import DEFAULT_SHUTDOWN_TIMEOUT

    server = load("compose.yaml")["services"]["hydraserve"]
    assert int(server["stop_grace_period"].removesuffix("s")) > DEFAULT_SHUTDOWN_TIMEOUT + 5
    assert server["read_only"] is True


def test_ports_are_open_to_this_machine_only() -> None:
    services = load("compose.yaml")["services"].values()
    assert all(port.startswith("127.0.0.1:") for service in services for port in service["ports"])


def test_images_are_pinned_and_the_gpu_variant_changes_only_what_it_must() -> None:
    services = load("compose.yaml")["services"]
    for name, service in services.items():
        assert not service["image"].endswith(":latest"), name
        assert ":" in service["image"], name
    gpu = load("compose.cuda.yaml")["services"]["hydraserve"]
    assert set(gpu) == {"build", "image", "command", "deploy"}
    assert gpu["build"]["args"] == {"VARIANT": "cuda"}
    size = ["--kv-cache-memory-bytes", "${KV_CACHE_BYTES:-1073741824}"]
    assert services["hydraserve"]["command"] == [*gpu["command"], *size]
