"""`hydraserve route`: which head of an adapter works for which token, in colour and as a picture."""

from __future__ import annotations

import argparse
import http.client
import json
import tempfile
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydraserve.config import take_secret
from hydraserve.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from hydraserve.bench.process import ServerProcess

HELP = "show which head of an adapter works for which token"
PASSES_THROUGH = True  # with --model: flags that are not ours go to the server that is started

EPILOG = """\
Asks a running server, or with --model starts one for this question. The key of the server, if it asks for one, is
taken from HYDRASERVE_API_KEY.

examples:
  hydraserve route --adapter sql --prompt "Count the orders of each customer."
  hydraserve route --adapter sql@top_k=1 --chat --prompt "..." --module down_proj --url http://gpu-1:8000
  hydraserve route --model demo --adapter ./runs/sql --prompt "..." --output sql.png
"""

REQUEST_TIMEOUT_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--adapter", required=True, metavar="NAME", help="as the server calls it; with --model: [NAME=]PATH"
    )
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--chat", action="store_true", help="send the prompt as a chat message of the user")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--module", help="look at these layers only, such as down_proj (default: the mean of all)")
    parser.add_argument(
        "--output", type=Path, default=Path("routing.png"), metavar="PNG", help="the picture (default: %(default)s)"
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)")
    parser.add_argument("--model", help="start a server on this base model instead of asking one that runs")


def run(args: argparse.Namespace) -> int:
    from hydraserve.cli.route_view import Routing, draw, show
    from hydraserve.cli.signals import terminable

    if args.passthrough and not args.model:
        raise ConfigError("arguments", args.passthrough[0], "flags of hydraserve route", "see hydraserve route --help")
    with (
        terminable(),
        tempfile.TemporaryDirectory(prefix="hydraserve-route-") as folder,
        server(args, Path(folder)) as started,
    ):
        name = args.adapter
        if started is not None:
            from hydraserve.cli.serve import adapter_source

            args.url, name = started.url, adapter_source(args.adapter).name
        routing = Routing.of(ask(args, name))
    show(routing)
    draw(routing, args.output)
    print(f"heat map: {args.output}")
    return 0


def server(args: argparse.Namespace, folder: Path) -> AbstractContextManager[ServerProcess | None]:
    """The server to start, None where one runs."""
    if not args.model:
        return nullcontext()
    from hydraserve.bench.process import ServerProcess

    print("starting a server, which takes a minute or so ...", flush=True)
    arguments = ["--model", args.model, "--adapter", args.adapter, *args.passthrough]
    return ServerProcess(arguments, folder / "server.log")


def ask(args: argparse.Namespace, adapter: str) -> bytes:
    """The answer of POST /v1/routing as safetensors. Raises RequestError with what the server says."""
    text = {"messages": [{"role": "user", "content": args.prompt}]} if args.chat else {"prompt": args.prompt}
    body: dict[str, Any] = {"model": adapter, **text, "max_tokens": args.max_tokens, "format": "safetensors"}
    if args.module:
        body["modules"] = [args.module]
    headers = {"Content-Type": "application/json"}
    if key := take_secret("HYDRASERVE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = urllib.request.Request(f"{args.url.rstrip('/')}/v1/routing", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            data: bytes = response.read()
            return data
    except urllib.error.HTTPError as e:
        raise RequestError(f"{args.url}/v1/routing", got=_message(e), expected="routing weights") from e
    # ValueError: an address without "http://". HTTPException: what answers speaks something else.
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise RequestError(
            args.url,
            got=getattr(e, "reason", None) or str(e) or type(e).__name__,
            expected="a server that answers",
            fix="start one with hydraserve serve, or give --url http://HOST:PORT, or --model to have one started",
        ) from e


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.loads(error.read())['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"
