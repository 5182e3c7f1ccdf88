"""`hydraserve adapters`: see and change the adapters of a running server."""

from __future__ import annotations

import argparse
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from hydraserve.config import administration_key, server_url
from hydraserve.errors import RequestError

HELP = "list, load, replace, unload and pin the adapters of a running server"

# Loading a large adapter from far away takes as long as it takes; a server that does not even accept is another thing.
_TIMEOUT = httpx.Timeout(None, connect=10.0)
_LOOK_S = 0.5

ACTIONS: dict[str, str] = {
    "list": "all adapters, where their weights are, and what the engine holds",
    "show": "everything about one adapter, as JSON",
    "load": "serve an adapter from a source, under a name",
    "replace": "serve a name with new content; without SOURCE, read its source again",
    "unload": "stop serving an adapter; running requests end first",
    "pin": "keep an adapter in a slot",
    "unpin": "undo pin",
    "prefetch": "bring an adapter into host memory",
    "new-key": "make a key, and its entry for the file of --api-key-file; talks to no server",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The server and its key: --url and --api-key, or HYDRASERVE_URL and HYDRASERVE_ADMIN_API_KEY."
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, text in ACTIONS.items():
        sub = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
        if action != "list":
            sub.add_argument("name", metavar="NAME")
        if action in ("load", "replace"):
            nargs = "?" if action == "replace" else None
            sub.add_argument(
                "source", metavar="SOURCE", nargs=nargs, help="folder, archive or URL, as the server sees it"
            )
            sub.add_argument("--pin", action="store_true", help="and keep it in a slot")
            sub.add_argument("--digest", metavar="SHA256", help="refuse other content than this")
        if action == "unload":
            sub.add_argument("--force", action="store_true", help="end its running requests now")
        if action == "list":
            sub.add_argument("--json", action="store_true", help="as the server answers it")
        if action == "new-key":
            sub.add_argument("--role", choices=("inference", "admin", "metrics"), default="inference")
            sub.add_argument("--adapters", default="", metavar="PATTERN,...", help="what the key may see and use")
            sub.add_argument("--isolated", action="store_true", help="a prefix cache of its own")
            sub.add_argument("--requests-per-minute", type=int, metavar="N")
        else:
            sub.add_argument("--url", default=server_url(), help="of the server (default: %(default)s)")
            sub.add_argument("--api-key", metavar="KEY", help="better given as HYDRASERVE_ADMIN_API_KEY")


def run(args: argparse.Namespace) -> int:
    if args.action == "new-key":
        print(new_key(args))
        return 0
    key = args.api_key or administration_key()
    with httpx.Client(
        base_url=args.url, timeout=_TIMEOUT, headers={"Authorization": f"Bearer {key}"} if key else {}
    ) as client:
        return _RUN[args.action](AdapterApi(client), args)


class AdapterApi:
    """/v1/adapters of one server. Raises RequestError with what the server said, or why there is no answer."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """path: below /v1/adapters."""
        url = f"/v1/adapters{path}"
        try:
            response = self.client.request(method, url, **arguments)
            body = response.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RequestError(
                f"server {self.client.base_url}",
                got=str(error) or type(error).__name__,
                expected="an answer of a HydraServe server",
                fix="check that it runs, and --url",
            ) from error
        except ValueError as error:
            raise RequestError(
                f"{method} {self.client.base_url}{url}",
                got=f"status {response.status_code} without JSON",
                expected="a HydraServe server",
                fix="check --url",
            ) from error
        if not response.is_success:
            error_body = body.get("error") if isinstance(body, dict) else None
            message = error_body.get("message") if isinstance(error_body, dict) else None
            raise RequestError(message or f"status {response.status_code}: {body}")
        return dict(body)


def list_adapters(api: AdapterApi, args: argparse.Namespace) -> int:
    answer = api.call("GET", "")
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    console = Console()
    if answer["data"]:
        console.print(adapter_table(answer["data"]))
    else:
        console.print("no adapters")
    if residency := answer.get("residency"):
        slots = ", ".join(str(name or "-") for name in residency["slots"])
        console.print(
            f"slots: {slots}; host memory: {residency['host_adapters']} of {residency['host_capacity']} adapters, "
            f"{residency['host_bytes'] / 2**20:.1f} MiB; KV blocks: {residency['kv_blocks_free']} of "
            f"{residency['kv_blocks']} free",
            highlight=False,
        )
    return 0


def adapter_table(cards: list[dict[str, Any]]) -> Table:
    """One row for each adapter."""
    table = Table()
    for column in ("name", "state", "pinned", "format", "rank", "heads", "size", "running", "served", "version"):
        right = column in ("rank", "heads", "size", "running", "served")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    table.add_column("source", overflow="fold")
    for card in cards:
        size = "" if card["bytes"] is None else f"{card['bytes'] / 2**20:.1f} MiB"
        values = [card["format"], card["rank"], card["heads"], size, card["requests_running"], card["requests_served"]]
        table.add_row(
            card["name"],
            _state(card),
            "yes" if card["pinned"] else "",
            *("" if value is None else str(value) for value in values),
            (card["version"] or "")[:12],
            card["error"] or card["source"],
        )
    return table


def _state(card: dict[str, Any]) -> str:
    progress = card["progress"]
    if card["state"] == "loading" and progress and progress["total"]:
        return f"loading {100 * progress['done'] // progress['total']} %"
    return str(card["state"])


def show(api: AdapterApi, args: argparse.Namespace) -> int:
    print(json.dumps(api.call("GET", f"/{args.name}"), indent=2))
    return 0


def load(api: AdapterApi, args: argparse.Namespace) -> int:
    body = {"name": args.name, "source": as_server_sees(args.source), "pin": args.pin, "digest": args.digest}
    with showing_progress(api, args.name):
        card = api.call("POST", "", json=body)
    return _say("loaded", card)


def replace(api: AdapterApi, args: argparse.Namespace) -> int:
    body = {"source": as_server_sees(args.source), "pin": args.pin or None, "digest": args.digest}
    with showing_progress(api, args.name):
        card = api.call("PUT", f"/{args.name}", json=body)
    return _say("replaced", card)


def unload(api: AdapterApi, args: argparse.Namespace) -> int:
    api.call("DELETE", f"/{args.name}", params={"force": args.force})
    print(f"{args.name}: unloaded")
    return 0


def pin(api: AdapterApi, args: argparse.Namespace) -> int:
    return _say("pinned", api.call("POST", f"/{args.name}/pin"))


def unpin(api: AdapterApi, args: argparse.Namespace) -> int:
    return _say("unpinned", api.call("POST", f"/{args.name}/unpin"))


def prefetch(api: AdapterApi, args: argparse.Namespace) -> int:
    return _say("prefetched", api.call("POST", f"/{args.name}/prefetch"))


def _say(what: str, card: dict[str, Any]) -> int:
    seconds = f", read in {card['load_seconds']:.2f} s" if card["load_seconds"] is not None else ""
    print(f"{card['name']}: {what}, version {(card['version'] or '')[:12]}, in {card['state']}{seconds}")
    return 0


def as_server_sees(source: str | None) -> str | None:
    """A path of this machine made absolute: the server may have been started in another folder."""
    if source is None or "://" in source:
        return source
    return str(Path(source).expanduser().resolve())


@contextmanager
def showing_progress(api: AdapterApi, name: str) -> Iterator[None]:
    """A bar in the terminal while the server downloads."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        thread = threading.Thread(target=_follow, args=(api, name, bar, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _follow(api: AdapterApi, name: str, bar: Progress, ended: threading.Event) -> None:
    task = bar.add_task(f"loading {name}", total=None)
    while not ended.wait(_LOOK_S):
        try:
            progress = api.call("GET", f"/{name}")["progress"]
        except RequestError:  # not registered yet, or not any more: whoever loads it is told
            continue
        if progress:
            bar.update(task, completed=progress["done"], total=progress["total"] or None)


def new_key(args: argparse.Namespace) -> str:
    """The text to print: a new key, and what to write into the key file. The key itself is kept nowhere."""
    from hydraserve.server.keys import hash_key

    key = f"hydra-{secrets.token_urlsafe(32)}"
    patterns = [pattern for pattern in args.adapters.split(",") if pattern]
    lines = [f"# key for {args.name}, shown only now: {key}", "[[key]]", f"name = {json.dumps(args.name)}"]
    lines += [f'sha256 = "{hash_key(key)}"', f'role = "{args.role}"', f"adapters = {json.dumps(patterns)}"]
    if args.isolated:
        lines.append("isolated = true")
    if args.requests_per_minute:
        lines.append(f"requests_per_minute = {args.requests_per_minute}")
    return "\n".join(lines)


_RUN: dict[str, Callable[[AdapterApi, argparse.Namespace], int]] = {
    "list": list_adapters,
    "show": show,
    "load": load,
    "replace": replace,
    "unload": unload,
    "pin": pin,
    "unpin": unpin,
    "prefetch": prefetch,
}
