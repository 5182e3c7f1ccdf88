"""Writes hydraserve.json, the dashboard to import into Grafana (10 or newer): `python deploy/grafana/dashboard.py`.

The JSON is what Grafana wants, and too long to be read or changed by hand; what stands on the dashboard is said here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).with_name("hydraserve.json")
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24  # of Grafana's grid
HEIGHT = 8
# As in the inspector page, so that a head has one colour everywhere.
HEAD_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a900", "#8c6bb1")

Json = dict[str, Any]

SERVER = 'job=~"$job", instance=~"$instance"'
ADAPTER = f'{SERVER}, adapter=~"$adapter"'


def rate(metric: str, by: str = "adapter", more: str = "") -> str:
    """Per second, summed by a label."""
    return f"sum by ({by}) (rate({metric}{{{ADAPTER}{more}}}[$__rate_interval]))"


def server_rate(metric: str, by: str = "instance") -> str:
    return f"sum by ({by}) (rate({metric}{{{SERVER}}}[$__rate_interval]))"


def gauge(metric: str, by: str = "adapter") -> str:
    return f"sum by ({by}) ({metric}{{{ADAPTER if by == 'adapter' else SERVER}}})"


def quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, {rate(histogram + '_bucket', by='adapter, le')})"


def ratio(part: str, rest: str) -> str:
    """part / (part + rest)"""
    return f"{server_rate(part)} / ({server_rate(part)} + {server_rate(rest)})"


def head_share(by: str) -> str:
    """Of the routing weight of each `by`, what its heads have. Not of "other": its adapters differ in their heads."""
    weight = rate("hydraserve_router_weight_total", by=f"{by}, head", more=', adapter!="other"')
    tokens = rate("hydraserve_router_tokens_total", by=by)
    return f"{weight} / on ({by}) group_left () ({tokens} > 0)"


def entropy(by: str) -> str:
    tokens = rate("hydraserve_router_tokens_total", by=by)
    return f"{rate('hydraserve_router_entropy_total', by=by)} / ({tokens} > 0)"


def panel(title: str, kind: str, unit: str, width: int, *queries: tuple[str, str], text: str = "", **more: Any) -> Json:
    """queries: (expression, legend). more: of "defaults", "custom", "overrides", "options"."""
    custom = {"fillOpacity": 10, "showPoints": "never", **more.get("custom", {})} if kind == "timeseries" else {}
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": DATASOURCE}
        for i, (expr, legend) in enumerate(queries)
    ]
    return {
        "title": title,
        "description": text,
        "type": kind,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": more.get("height", HEIGHT)},
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, "custom": custom, **more.get("defaults", {})},
            "overrides": more.get("overrides", []),
        },
        "options": more.get("options", {}),
    }


def stat(title: str, unit: str, expr: str, text: str = "", **defaults: Any) -> Json:
    options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "area"}
    return panel(title, "stat", unit, 4, (expr, ""), text=text, height=4, defaults=defaults, options=options)


def graph(title: str, unit: str, *queries: tuple[str, str], width: int = 8, text: str = "", **more: Any) -> Json:
    options = {
        "legend": {"displayMode": "table", "placement": "bottom", "calcs": ["mean", "lastNotNull"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel(title, "timeseries", unit, width, *queries, text=text, options=options, **more)


def row(title: str, **more: Any) -> Json:
    return {"type": "row", "title": title, "collapsed": False, "panels": [], **more}


STACKED = {"stacking": {"mode": "normal"}, "fillOpacity": 70, "lineWidth": 0}
SHARE = {"max": 1}


def head_colours() -> list[Json]:
    """So that "head 0" has the same colour in every panel."""
    return [
        {
            "matcher": {"id": "byRegexp", "options": f"/head {head}$/"},
            "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
        }
        for head, colour in enumerate(HEAD_COLOURS)
    ]


def overview() -> Iterator[Json]:
    yield stat("Servers up", "short", 'count(up{job=~"$job", instance=~"$instance"} == 1)')
    yield stat("Requests", "reqps", f"sum(rate(hydraserve_adapter_requests_total{{{ADAPTER}}}[$__rate_interval]))")
    yield stat(
        "Generated tokens",
        "tps",
        f"sum(rate(hydraserve_adapter_generated_tokens_total{{{ADAPTER}}}[$__rate_interval]))",
    )
    yield stat(
        "Failed requests",
        "percentunit",
        f'sum(rate(hydraserve_adapter_requests_total{{{ADAPTER}, outcome="error"}}[$__rate_interval]))'
        f" / sum(rate(hydraserve_adapter_requests_total{{{ADAPTER}}}[$__rate_interval])) or vector(0)",
        thresholds={"mode": "absolute", "steps": [{"color": "green", "value": None}, {"color": "red", "value": 0.01}]},
    )
    yield stat("Requests that wait", "short", f"sum(hydraserve_adapter_requests_waiting{{{ADAPTER}}})")
    yield stat(
        "Slots in use",
        "percentunit",
        f"sum(hydraserve_slots_used{{{SERVER}}}) / sum(hydraserve_slots{{{SERVER}}})",
        max=1,
    )


def traffic() -> Iterator[Json]:
    yield row("Traffic, by adapter")
    yield graph(
        "Requests",
        "reqps",
        (rate("hydraserve_adapter_requests_total"), "{{adapter}}"),
        custom=STACKED,
        text="The busiest adapters have series of their own (--metrics-adapters), the rest are “other”.",
    )
    yield graph("Generated tokens", "tps", (rate("hydraserve_adapter_generated_tokens_total"), "{{adapter}}"))
    yield graph("Prompt tokens", "tps", (rate("hydraserve_adapter_prompt_tokens_total"), "{{adapter}}"))
    yield graph("How requests ended", "reqps", (rate("hydraserve_adapter_requests_total", by="outcome"), "{{outcome}}"))
    yield graph("Running", "short", (gauge("hydraserve_adapter_requests_running"), "{{adapter}}"), custom=STACKED)
    yield graph(
        "Waiting",
        "short",
        (gauge("hydraserve_adapter_requests_waiting"), "{{adapter}}"),
        custom=STACKED,
        text="For a place in the batch, for a slot, or for the adapter to be read.",
    )


def latency() -> Iterator[Json]:
    yield row("Latency, by adapter")
    for title, histogram in (
        ("Time to first token", "hydraserve_adapter_time_to_first_token_seconds"),
        ("Time per output token", "hydraserve_adapter_time_per_output_token_seconds"),
        ("Whole requests", "hydraserve_adapter_request_duration_seconds"),
    ):
        yield graph(
            title, "s", (quantile(0.5, histogram), "{{adapter}} p50"), (quantile(0.95, histogram), "{{adapter}} p95")
        )


def memory() -> Iterator[Json]:
    yield row("Adapters in memory")
    yield graph(
        "Slots",
        "short",
        (gauge("hydraserve_slots_used", by="instance"), "{{instance}} used"),
        (gauge("hydraserve_slots", by="instance"), "{{instance}} there are"),
    )
    yield graph(
        "Adapters in host memory",
        "short",
        (gauge("hydraserve_host_cache_adapters", by="instance"), "{{instance}} held"),
        (gauge("hydraserve_host_cache_capacity", by="instance"), "{{instance}} room for"),
    )
    yield graph(
        "Hits",
        "percentunit",
        (ratio("hydraserve_slot_hits_total", "hydraserve_slot_misses_total"), "{{instance}} slots"),
        (ratio("hydraserve_host_cache_hits_total", "hydraserve_host_cache_misses_total"), "{{instance}} host memory"),
        defaults=SHARE,
        text="Of the times an adapter was needed, those when it was there: in a slot when requests for it began,"
        " in host memory when a request looked it up.",
    )
    yield graph(
        "Loads and evictions",
        "ops",
        (rate("hydraserve_adapter_loads_total", by="place"), "into {{place}}"),
        (rate("hydraserve_adapter_evictions_total", by="place"), "out of {{place}}"),
    )
    yield graph(
        "Time to load",
        "s",
        (quantile(0.5, "hydraserve_adapter_load_seconds"), "{{adapter}} p50"),
        (quantile(0.95, "hydraserve_adapter_load_seconds"), "{{adapter}} p95"),
    )
    yield graph(
        "Host memory",
        "bytes",
        (gauge("hydraserve_adapter_bytes"), "{{adapter}}"),
        (gauge("hydraserve_host_cache_bytes", by="instance"), "{{instance}} all"),
    )
    yield panel(
        "Where adapters are",
        "state-timeline",
        "short",
        COLUMNS,
        *(
            (
                f'max by (adapter) (hydraserve_adapter_state{{{ADAPTER}, state="slot"}}) * 2'
                f' + max by (adapter) (hydraserve_adapter_state{{{ADAPTER}, state="host"}})',
                "{{adapter}}",
            ),
        ),
        defaults={
            "mappings": [
                {
                    "type": "value",
                    "options": {
                        "2": {"text": "slot", "color": "green"},
                        "1": {"text": "host memory", "color": "yellow"},
                        "0": {"text": "disk", "color": "gray"},
                    },
                }
            ]
        },
        options={"mergeValues": True, "showValue": "auto"},
    )


def routers() -> Iterator[Json]:
    yield row("Routers (with --router-metrics on): $adapter", repeat="adapter")
    yield graph(
        "Use of the heads",
        "percentunit",
        (head_share("adapter"), "head {{head}}"),
        custom=STACKED,
        defaults=SHARE,
        overrides=head_colours(),
        text="What part of the routing weight each head has, over all tokens, layers and modules.",
    )
    yield graph(
        "Use of the heads, by module",
        "percentunit",
        (head_share("adapter, module"), "{{module}} head {{head}}"),
        defaults=SHARE,
        overrides=head_colours(),
    )
    yield graph(
        "Entropy",
        "percentunit",
        (entropy("adapter, module"), "{{module}}"),
        (entropy("adapter"), "all"),
        defaults=SHARE,
        text="Of the routing weights, 1 when all heads weigh the same, 0 when one has it all.",
    )
    yield graph(
        "Collapsed routers",
        "percentunit",
        (f"max by (adapter) (hydraserve_router_collapsed_ratio{{{ADAPTER}}})", "{{adapter}}"),
        width=12,
        defaults=SHARE,
        text="Share of the adapter's routers that lately gave one head more than 95% of the weight.",
    )
    yield graph(
        "Tokens times layers routed",
        "ops",
        (rate("hydraserve_router_tokens_total", by="adapter, module"), "{{module}}"),
        width=12,
    )


def engine() -> Iterator[Json]:
    yield row("Engine (vLLM's own series)")
    yield graph(
        "Requests in the engine",
        "short",
        (gauge("vllm:num_requests_running", by="instance"), "{{instance}} running"),
        (gauge("vllm:num_requests_waiting", by="instance"), "{{instance}} waiting"),
    )
    yield graph(
        "KV cache in use",
        "percentunit",
        (f"avg by (instance) (vllm:kv_cache_usage_perc{{{SERVER}}})", "{{instance}}"),
        defaults=SHARE,
    )
    yield graph(
        "Steps that routers were observed in",
        "ops",
        (server_rate("hydraserve_router_sampled_steps_total"), "{{instance}}"),
    )


def variable(name: str, label: str, query: str) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*" if name != "adapter" else None,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
    }


def place(panels: Iterator[Json]) -> list[Json]:
    """The panels from left to right and from top to bottom, in the order in which they come."""
    placed, x, y, line = [], 0, 0, 0
    for number, one in enumerate(panels, start=1):
        size = one.setdefault("gridPos", {"w": COLUMNS, "h": 1})
        if x + size["w"] > COLUMNS:
            x, y, line = 0, y + line, 0
        placed.append({"id": number, **one, "gridPos": {"x": x, "y": y, **size}})
        x, line = x + size["w"], max(line, size["h"])
    return placed


def dashboard() -> Json:
    def panels() -> Iterator[Json]:
        for part in (overview, traffic, latency, memory, routers, engine):
            yield from part()

    return {
        "uid": "hydraserve",
        "title": "HydraServe",
        "tags": ["hydraserve", "vllm"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                variable("job", "Job", "label_values(hydraserve_slots, job)"),
                variable("instance", "Server", 'label_values(hydraserve_slots{job=~"$job"}, instance)'),
                variable("adapter", "Adapter", f"label_values(hydraserve_adapter_requests_total{{{SERVER}}}, adapter)"),
            ]
        },
        "panels": place(panels()),
    }


def text() -> str:
    """What the file holds."""
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text())
