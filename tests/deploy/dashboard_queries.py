"""What the dashboard asks Prometheus."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any


def dashboard_queries(dashboard: dict[str, Any]) -> Iterator[str]:
    """Every expression, as Grafana sends it to Prometheus."""
    values = {"$__rate_interval": "5m", "$job": ".*", "$instance": ".*", "$adapter": ".*"}
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"]
            for name, value in values.items():
                expr = expr.replace(name, value)
            yield expr
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield re.sub(r"label_values\((.*), \w+\)", r"\1", variable["query"]["query"]).replace("$job", ".*")
