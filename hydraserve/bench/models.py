"""Which models a running server has."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

from hydraserve.bench.scrape import key_header
from hydraserve.errors import EngineError


def served_models(url: str, key: str | None = None) -> tuple[str, list[str]]:
    """(base, adapters) as `url`/v1/models lists them. Raises EngineError when nothing of that kind answers."""
    request = urllib.request.Request(f"{url}/v1/models", headers=key_header(key))
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            cards = json.load(response)["data"]
        base = next(card["id"] for card in cards if not card.get("parent"))
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError, StopIteration) as e:
        raise EngineError(
            what=f"server {url}",
            got=f"{type(e).__name__}: {e}",
            expected="an OpenAI-compatible server with a base model at /v1/models",
            fix="check --url, that the server is up, and --api-key if it asks for a key",
        ) from e
    return base, [card["id"] for card in cards if card.get("parent")]
