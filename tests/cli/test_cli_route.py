"""`hydraserve route`: the coloured text, the table, the picture. Against a server: tests/e2e/test_routing_e2e.py."""

from __future__ import annotations

import io
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from hydraserve.adapters.observation import RoutingTrace
from hydraserve.cli.main import FAILURE, USAGE_ERROR, main
from hydraserve.cli.route_view import Routing, draw, show, tint
from hydraserve.server.routing_answer import Generated, RoutingAnswer

ROUTERS = ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")


def routing(texts: list[str], prompt: int, heads: int = 3) -> Routing:
    """An answer as the server sends it, with weights that differ from token to token; the second router has 2 heads."""
    seen = len(texts) - 1
    logits = np.random.default_rng(0).normal(0, 2, (seen, len(ROUTERS), heads))
    logits[:, 1, 2:] = -np.inf
    weights = np.exp(logits)
    weights /= weights.sum(2, keepdims=True)
    weights[:, 1, 2:] = np.nan
    trace = RoutingTrace(ROUTERS, (heads, 2, heads), weights.astype(np.float32))
    ids = list(range(len(texts)))
    answer = RoutingAnswer("sql", "id-1", Generated(ids[:prompt], ids[prompt:], texts, "stop"), trace)
    return Routing.of(answer.safetensors())


def printed(of: Routing, **console: object) -> str:
    out = io.StringIO()
    show(of, Console(file=out, width=100, **console))  # type: ignore[arg-type]
    return out.getvalue()


def test_tokens_have_the_colour_of_their_leading_head() -> None:
    of = routing(["SELECT", " [b]x[/b]", "\n", "$", "end"], prompt=2)
    text = printed(of, force_terminal=True, color_system="truecolor")
    assert "SELECT" in text
    assert " [b]x[/b]" in text, "text is not markup"
    leaders = of.shares[:-1].argmax(axis=1)
    furthest = (of.shares[:-1].max(axis=1) - 1 / 3).max()
    for token, share, head in zip(of.summary["tokens"], of.shares, leaders, strict=False):
        colour = tint(int(head), 0.2 + 0.8 * (share[head] - 1 / 3) / furthest)
        r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        assert f"48;2;{r};{g};{b}m" in text, token
    assert text.rstrip().endswith("end"), "the last token has no colour"
    assert "2 prompt tokens (underlined), 3 generated, 3 routers" in text


def test_a_terminal_obeys_no_token() -> None:
    texts = ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m\r", "\x08\x7f", "a\n\tb", "end\x1b"]
    plain = printed(routing(texts, prompt=2), color_system=None)
    coloured = printed(routing(texts, prompt=2), force_terminal=True, color_system="truecolor")
    left = re.sub(r"\x1b\[[\d;]*m", "", coloured)  # what rich wrote
    for shown in (plain, left):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert r"\x1b]0;title\x07\x1b[2J\x9b31m\x0d\x08\x7fa" in left
    assert r"\x1b]0;title\x07" in plain


@contextmanager
def listening(answer: bytes) -> Iterator[str]:
    """The address of something that gives one client this answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join(10)


@pytest.mark.parametrize("url", ["gpu-1", "gpu-1:8000", "http://gpu-1:port", "http://[::1"])
def test_addresses_that_are_none_are_refused(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "--adapter", "sql", "--prompt", "x", "--url", url]) == FAILURE
    error = capsys.readouterr().err
    assert error.startswith(f"error: {url}")
    assert "http://HOST:PORT" in error


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n<p>welcome!</p>\n",
    ],
    ids=["another protocol", "nothing", "half an answer", "another server"],
)
def test_what_answers_is_no_server_of_ours(answer: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with listening(answer) as url:
        assert main(["route", "--adapter", "sql", "--prompt", "x", "--url", url]) == FAILURE
    assert capsys.readouterr().err.startswith("error: ")


def test_shares_are_of_all_routers_work() -> None:
    of = routing(["a", "b", "c"], prompt=1)
    np.testing.assert_allclose(of.shares[:-1].sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(of.shares[:-1], np.nan_to_num(of.weights[:-1]).mean(axis=1), atol=1e-6)
    layers, weights = of.by_layer()
    assert (layers, weights.shape) == ([0, 1], (3, 2, 3))
    np.testing.assert_allclose(weights[:, 0, 0], np.nan_to_num(of.weights[0, :2]).mean(axis=0), atol=1e-6)
    assert np.isnan(weights[:, :, -1]).all()


def test_without_colours_there_is_a_table() -> None:
    of = routing(["SELECT", "\n", " 漢"], prompt=2)
    text = printed(of, color_system=None)
    rows = [line for line in text.splitlines() if "│" in line]
    assert len(rows) == 3
    for row, share in zip(rows, of.shares, strict=True):
        assert np.isnan(share[0]) or (f" {share.argmax()} " in row and f"{share.max():.3f}" in row)
    assert "\\n" in rows[1]


@pytest.mark.parametrize("tokens", [2, 40, 400])
def test_the_picture_has_a_panel_for_each_head(tokens: int, tmp_path: Path) -> None:
    of = routing(["$x", " 漢字", "\n\t", *["word"] * (tokens - 2)], prompt=2)
    path = tmp_path / "new" / "heads.png"
    draw(of, path)
    height, width, _ = imread(path).shape
    assert 500 < width < 6000
    assert 400 < height < 2000


def test_flags_that_nobody_knows_are_refused_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "--adapter", "sql", "--prompt", "x", "--dtype", "float32"]) == USAGE_ERROR
    assert "--dtype" in capsys.readouterr().err
