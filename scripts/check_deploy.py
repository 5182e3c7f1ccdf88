"""Check what is in deploy/: the Dockerfile, every YAML file, the compose files, the Helm chart and what it renders.

    .venv/bin/python scripts/check_deploy.py

Hadolint, yamllint, the Compose specification's schema, Helm's own lint, and Kubernetes' schemas for every manifest that
the chart renders under VALUES. All of it comes from PyPI (the extra `dev`) and works without a container engine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python as helm
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "hydraserve"
KUBERNETES = ("1.29", "1.34")  # the oldest and the newest that the chart is checked against

FULL: dict[str, Any] = {
    "existingSecret": "keys",
    "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "INFO"}],
    "envFrom": [{"secretRef": {"name": "object-store"}}],
    "extraArgs": ["--dtype", "bfloat16"],
    "replicas": 3,
    "adapters": {
        "volume": {"persistentVolumeClaim": {"claimName": "adapters"}},
        "allowSources": ["s3://bucket/adapters/"],
    },
    "cache": {"existingClaim": "cache"},
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"nvidia.com/gpu.product": "H100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "podAnnotations": {"example.com/owner": "models"},
    "podLabels": {"team": "models"},
    "priorityClassName": "serving",
    "extraVolumes": [{"name": "models", "nfs": {"server": "nfs.example.com", "path": "/models"}}],
    "extraVolumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "autoscaling": {"enabled": True},
    "serviceMonitor": {"enabled": True, "authorization": {"name": "metrics", "key": "key"}},
}
# What users choose between; each is rendered and checked.
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "CPU": {
        "image": {"repository": "hydraserve", "tag": "cpu"},
        "kvCacheBytes": 4 << 30,
        "resources": {"limits": {"nvidia.com/gpu": None}},
        "rollingUpdate": {"maxSurge": 0, "maxUnavailable": "50%"},
    },
    "everything": FULL,
    "several nodes": {**FULL, "multiNode": {"enabled": True, "nodes": 2, "gpusPerNode": 8, "sharedClaim": "shared"}},
}


def main() -> int:
    commands = [
        ["hadolint", f"--config={DEPLOY / 'hadolint.yaml'}", DEPLOY / "Dockerfile"],
        ["yamllint", "--strict", f"--config-file={DEPLOY / '.yamllint'}", DEPLOY],
        ["check-jsonschema", "--builtin-schema=vendor.compose-spec", *sorted(DEPLOY.glob("compose*.yaml"))],
    ]
    bin_folder = Path(sys.executable).parent
    failed = [c[0] for c in commands if subprocess.run([bin_folder / str(c[0]), *map(str, c[1:])]).returncode]
    problems = [*lint_chart(), *(p for name, values in VALUES.items() for p in check_values(name, values))]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if failed or problems else 0


def lint_chart() -> Iterator[str]:
    """What Helm finds wrong with the chart."""
    found = helm.lint(str(CHART))
    yield from (str(error) for error in found["errors"])
    yield from (f"{m['path']}: {m['error']}" for m in found["messages"] if m["severity"] > 1)  # 1 is a suggestion


def render(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The manifests that `helm install demo` would send to the cluster. Raises helm_python.HelmError."""
    with helm.Chart.load(str(CHART)) as chart:
        texts = chart.render(dict(values), name="demo", namespace="models")
    documents = [doc for path, text in texts.items() if path.endswith(".yaml") for doc in yaml.safe_load_all(text)]
    return [document for document in documents if document is not None]


def check_values(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the manifests that these values become."""
    for manifest in render(values):
        for checked in [*as_builtin(manifest)]:
            for version in KUBERNETES:
                try:
                    kubernetes_validate.validate(checked, version, strict=True)
                except kubernetes_validate.ValidationError as error:
                    yield f"{name}: {manifest['kind']}: Kubernetes {version}: {error.message}"


def as_builtin(manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What of a manifest Kubernetes' own schemas describe: of a LeaderWorkerSet its pods, of a ServiceMonitor nothing
    but its metadata."""
    kind, metadata = manifest["kind"], manifest["metadata"]
    if kind == "LeaderWorkerSet":
        for role in ("leaderTemplate", "workerTemplate"):
            template = manifest["spec"]["leaderWorkerTemplate"][role]
            pod_metadata = {"name": role.lower(), **template["metadata"]}
            yield {"apiVersion": "v1", "kind": "Pod", "metadata": pod_metadata, "spec": template["spec"]}
    elif kind == "ServiceMonitor":
        yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}
    else:
        yield dict(manifest)


if __name__ == "__main__":
    sys.exit(main())
