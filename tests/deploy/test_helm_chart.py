"""What the chart renders is what Kubernetes takes, and says what the server needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import helm_python as helm
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import check_deploy  # noqa: E402 - scripts/ is no package
from check_deploy import FULL, VALUES, check_values, render  # noqa: E402

from hydraserve.cli import serve  # noqa: E402


def by_kind(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {manifest["kind"]: manifest for manifest in render(values)}


def container(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = by_kind(values)["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    return found


@pytest.mark.parametrize("name", VALUES)
def test_manifests_are_valid_for_kubernetes(name: str) -> None:
    assert list(check_values(name, VALUES[name])) == []


def test_an_invalid_manifest_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = by_kind({})["Deployment"]
    broken["spec"]["template"]["spec"]["containers"][0]["ports"][0]["containerPort"] = "eight thousand"
    monkeypatch.setattr(check_deploy, "render", lambda _: [broken])
    assert len(list(check_values("broken", {}))) == len(check_deploy.KUBERNETES)


def test_helm_finds_nothing_wrong() -> None:
    assert list(check_deploy.lint_chart()) == []


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("defaults", {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"}),
        ("CPU", {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"}),
        (
            "everything",
            {
                *("Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"),
                *("HorizontalPodAutoscaler", "ServiceMonitor"),
            },
        ),
        (
            "several nodes",
            {
                *("LeaderWorkerSet", "Service", "ServiceAccount", "PodDisruptionBudget"),
                *("HorizontalPodAutoscaler", "ServiceMonitor"),
            },
        ),
    ],
)
def test_kinds(name: str, kinds: set[str]) -> None:
    assert set(by_kind(VALUES[name])) == kinds


@pytest.mark.parametrize(
    "values",
    [
        {"model": ""},
        {"image": {"repository": "x", "tag": "latest"}},
        {"image": {"repository": "x", "digest": "sha256:short"}},
        {"image": {"tag": ""}},
        {"adapters": {"slots": 0}},
        {"replica": 2},
        {"sharedMemory": "much"},
        {"multiNode": {"enabled": True, "sharedClaim": ""}},
        {"autoscaling": {"enabled": True, "target": -1}},
        {"rollingUpdate": {"maxSurge": "half"}},
        {"kvCacheBytes": "1Gi"},
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm.HelmError):
        render(values)


def test_an_autoscaler_without_room_is_refused_with_a_reason() -> None:
    with pytest.raises(helm.HelmError, match="got minReplicas 5 and maxReplicas 4, expected"):
        render({"autoscaling": {"enabled": True, "minReplicas": 5}})


def test_an_image_is_named_by_its_digest_where_there_is_one() -> None:
    digest = f"sha256:{'0' * 64}"
    assert container({"image": {"tag": "", "digest": digest}})["image"] == f"hydraserve@{digest}"
    assert container({})["image"] == "hydraserve:cuda"


def test_only_the_cpu_is_given_a_size_of_the_kv_cache() -> None:
    spec = container(VALUES["CPU"])
    assert spec["args"][spec["args"].index("--kv-cache-memory-bytes") + 1] == str(4 << 30)
    assert "nvidia.com/gpu" not in spec["resources"]["limits"]
    assert "--kv-cache-memory-bytes" not in container({})["args"]


def test_probes_ask_the_routes_that_the_server_has() -> None:
    spec = container({})
    paths = {probe: spec[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert spec["startupProbe"]["periodSeconds"] * spec["startupProbe"]["failureThreshold"] == 30 * 60


def test_a_pod_is_given_the_time_that_the_server_takes_to_drain() -> None:
    pod = by_kind({"drainSeconds": 90, "preStopSeconds": 20})["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > 20 + 90
    arguments = pod["containers"][0]["args"]
    assert arguments[arguments.index("--shutdown-timeout") + 1] == "90"


@pytest.mark.parametrize("name", VALUES)
def test_flags_are_those_of_the_command(name: str) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    serve.add_arguments(parser)
    pods = [*find(render(VALUES[name]), "containers")]
    assert pods
    for (spec,) in pods:
        args, others = parser.parse_known_args(spec["args"])
        assert args.model == "demo"
        known = {"--shutdown-timeout", "--dtype", "--tensor-parallel-size", "--pipeline-parallel-size", "--nnodes"}
        known |= {"--kv-cache-memory-bytes"}
        known |= {"--node-rank", "--master-addr", "--headless"}  # vLLM's
        assert {flag for flag in others if flag.startswith("--")} <= known


def find(value: Any, key: str) -> list[Any]:
    """All values under `key`, however deep."""
    if isinstance(value, dict):
        return [*([value[key]] if key in value else []), *(f for v in value.values() for f in find(v, key))]
    return [f for v in value for f in find(v, key)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", VALUES)
def test_pods_run_without_rights_and_write_only_to_volumes(name: str) -> None:
    for (spec,) in find(render(VALUES[name]), "containers"):
        security = spec["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        mounted = {mount["mountPath"] for mount in spec["volumeMounts"]}
        assert {"/tmp", "/dev/shm", "/var/cache/hydraserve"} <= mounted


def test_nodes_of_a_group_are_given_the_same_engine() -> None:
    group = by_kind(VALUES["several nodes"])["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    leader, worker = (group[role]["spec"]["containers"][0]["args"] for role in ("leaderTemplate", "workerTemplate"))
    own = {"--state-dir", "/var/lib/hydraserve/state/$(GROUP_INDEX)", "--headless"}
    assert [a for a in leader if a not in own] == [a for a in worker if a not in own]
    assert leader[leader.index("--tensor-parallel-size") + 1] == "8"
    assert leader[leader.index("--pipeline-parallel-size") + 1] == str(group["size"])
    for role in ("leaderTemplate", "workerTemplate"):
        limits = group[role]["spec"]["containers"][0]["resources"]["limits"]
        assert limits == {"memory": "32Gi", "nvidia.com/gpu": 8}, "as many GPUs as tensor parallel ranks"
        # Adapters are read by every node.
        assert {"name": "state", "persistentVolumeClaim": {"claimName": "shared"}} in group[role]["spec"]["volumes"]
    assert by_kind(VALUES["several nodes"])["Service"]["spec"]["selector"]["hydraserve/role"] == "leader"


def test_a_rollout_is_as_the_values_say() -> None:
    strategy = by_kind({})["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}
    strategy = by_kind(VALUES["CPU"])["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": "50%"}


def test_autoscaling_is_on_requests_that_wait() -> None:
    scaler = by_kind(FULL)["HorizontalPodAutoscaler"]["spec"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == "hydraserve_requests_waiting"
    assert "replicas" not in by_kind(FULL)["Deployment"]["spec"], "the autoscaler's number must not be overwritten"
