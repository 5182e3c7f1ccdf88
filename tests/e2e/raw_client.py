"""Clients that misbehave: connections by hand, below what an HTTP library lets one do."""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


def post(body: bytes, path: str = "/v1/completions", headers: str = "", length: int | None = None) -> bytes:
    """The bytes of a POST. length: what Content-Length says; default: the truth."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n"
    return f"{head}{headers}\r\n".encode() + body


def post_json(body: dict[str, Any], **kwargs: Any) -> bytes:
    return post(json.dumps(body).encode(), **kwargs)


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    """A connection to a server. receive_buffer: bytes that the kernel takes for a client that does not read."""
    address = urlsplit(url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect((address.hostname, address.port))
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes the connection."""
    pieces = []
    while piece := connection.recv(1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


@dataclass(frozen=True)
class RawAnswer:
    """status: HTTP's; 0 when the connection was closed without an answer. headers: names in lower case."""

    status: int
    headers: dict[str, str]


async def ask(url: str, request: bytes, start: asyncio.Event) -> RawAnswer:
    """Connect, wait for `start`, send `request`, and read the head of the answer."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        await start.wait()
        writer.write(request)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return RawAnswer(0, {})
    finally:
        writer.close()
    status, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(": ") for line in lines if line)
    return RawAnswer(int(status.split()[1]), {name.lower(): value for name, _, value in fields})
