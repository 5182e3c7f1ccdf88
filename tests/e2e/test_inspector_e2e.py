"""The inspector page in a real Chromium: what a person does, and what a person would see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from adapter_client import wait_for
from engines import one_process_engine
from webdriver import CHROMIUM, DRIVER, Browser

from hydraserve.adapters.save import save_adapter
from hydraserve.adapters.synthetic import make_adapter
from hydraserve.bench.process import ServerProcess
from hydraserve.models import base_shapes
from hydraserve.server.routes.routing import MAX_TRACES

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no Chromium with its driver; Debian has them in: apt-get install chromium chromium-driver",
    ),
]

PROMPT = "### Instruction:\nCompute 17 + 26.\n### Response:\n"
LAYERS = 30
WIDE, NARROW = (1280, 900), (360, 740)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Browser:
    """The page, just opened, with the list of adapters shown."""
    browser.look(width=WIDE[0], height=WIDE[1], dark=False)
    browser.open(f"{server.url}/inspector")
    browser.js("sessionStorage.clear()")
    browser.until(lambda: browser.js("return document.querySelectorAll('#adapter-list input').length"), "adapters")
    return browser


def choose(page: Browser, *names: str) -> None:
    """Tick these adapters and no others, with the mouse."""
    boxes = page.js("return [...document.querySelectorAll('#adapter-list input')].map(i => [i.value, i.checked])")
    for name, is_checked in boxes:
        if is_checked != (name in names):
            page.click(f'#adapter-list input[value="{name}"]')


def listed(page: Browser) -> list[str]:
    """Names of the adapters that can be chosen from."""
    found: list[str] = page.js("return [...document.querySelectorAll('#adapter-list input')].map(n => n.value)")
    return found


def generate(page: Browser, *names: str, prompt: str = PROMPT, tokens: int = 8) -> None:
    """Ask these adapters, and wait for their answers."""
    choose(page, *names)
    page.js("document.getElementById('mode').value = 'text'")
    page.type("#prompt", prompt)
    page.type("#max-tokens", str(tokens))
    page.click("#generate")
    wait_for_answers(page)


def wait_for_answers(page: Browser) -> None:
    page.until(lambda: page.js("return document.getElementById('status').textContent") == "Done.", "the answers")


def texts(page: Browser, selector: str) -> list[str]:
    found: list[str] = page.js("return [...document.querySelectorAll(arguments[0])].map(n => n.textContent)", selector)
    return found


def text(page: Browser, selector: str) -> str:
    return texts(page, selector)[0]


def answer_of(server: ServerProcess, model: str, tokens: int = 8) -> dict[str, Any]:
    """What the page should have been given."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens}
    response = httpx.post(f"{server.url}/v1/routing", json=body, timeout=60)
    found: dict[str, Any] = response.raise_for_status().json()
    return found


def percent(share: float) -> str:
    return f"{share * 100:.{1 if 0 < share < 0.0995 else 0}f} %"


def test_type_generate_and_read(page: Browser, server: ServerProcess) -> None:
    generate(page, "oracle")
    expected = answer_of(server, "oracle")
    shown = "".join(texts(page, ".token"))
    assert shown == "".join(token["text"] for token in expected["tokens"]).replace("\n", "⏎\n")
    assert texts(page, ".legend li") == ["head 0", "head 1"]
    prompt_tokens = page.js("return document.querySelectorAll('.token.in-prompt').length")
    assert prompt_tokens == expected["prompt_tokens"]
    heads = page.js("return [...document.querySelectorAll('.token')].map(n => n.style.getPropertyValue('--head'))")
    colours = page.js("return [...document.querySelectorAll('.swatch')].map(n => n.style.getPropertyValue('--head'))")
    assert heads == [colours[token["head"]] if token["head"] is not None else "" for token in expected["tokens"]]
    shares = [percent(share) for share in expected["usage"]["weights"]]
    assert texts(page, ".usage td:nth-child(2)") == shares


def test_the_heat_map_follows_the_cursor(page: Browser, server: ServerProcess) -> None:
    generate(page, "oracle")
    expected = answer_of(server, "oracle")
    for index in (3, 11):
        page.hover(f'.token[data-index="{index}"]')
        assert text(page, ".token-facts").startswith(f"Token {index}, prompt")
        titles = page.js("return [...document.querySelectorAll('.heat .cell')].map(n => n.title)")
        weights = expected["tokens"][index]["weights"]
        wanted = []
        for head in range(2):
            for layer in range(LAYERS):
                own = [w[head] for w, r in zip(weights, expected["routers"], strict=True) if r["layer"] == layer]
                wanted.append(f"layer {layer}, head {head}: {percent(sum(own) / len(own))}")
        assert len(titles) == len(wanted)
        assert sum(a != b for a, b in zip(titles, wanted, strict=True)) <= 2, "but for a last digit that is rounded"
    page.js("const m = document.querySelector('.module'); m.value = 'down_proj'; m.dispatchEvent(new Event('change'))")
    down = [r["layer"] for r in expected["routers"] if r["module"] == "down_proj"]
    assert page.js("return document.querySelectorAll('.heat .cell').length") == 2 * len(down)
    assert page.js("return document.querySelector('.heat').getAttribute('aria-label')").startswith("Leading heads: lay")


def test_colours_span_the_weights_of_the_answer_and_the_page_says_so(page: Browser, server: ServerProcess) -> None:
    generate(page, "oracle")
    tokens, routers = (answer_of(server, "oracle")[key] for key in ("tokens", "routers"))
    weights = np.array([token["weights"] for token in tokens[:-1]])  # [tokens, routers, heads]
    layers = np.array([router["layer"] for router in routers])
    means = np.stack([weights[:, layers == layer].mean(axis=1) for layer in range(LAYERS)])
    leading = weights.mean(axis=1).max()
    assert f"has {percent(leading)}, the most" in text(page, ".token-scale")
    assert f"Grey is {percent(means.min())} of" in text(page, ".heat-scale")
    assert f"full colour {percent(means.max())}:" in text(page, ".heat-scale")
    token, place = int(means.max(axis=(0, 2)).argmax()), "n => Number(n.style.getPropertyValue('--weight'))"
    page.hover(f'.token[data-index="{token}"]')
    assert page.js(f"return Math.max(...[...document.querySelectorAll('.heat .cell')].map({place}))") == 1


def test_switch_adapters_and_compare_two(page: Browser) -> None:
    generate(page, "oracle")
    generate(page, "all-r8-e4")
    assert texts(page, ".answer h2") == ["all-r8-e4"]
    assert len(texts(page, ".legend li")) == 4
    generate(page, "all-r8-e4", "attn-r4-e3")
    assert texts(page, ".answer h2") == ["all-r8-e4", "attn-r4-e3"]
    left, right = page.js(
        "return [...document.querySelectorAll('.answer')].map(n => { const r = n.getBoundingClientRect();"
        " return [r.left, r.top, r.right, r.bottom] })"
    )
    assert left[2] < right[0], "side by side"
    assert left[1] == right[1]
    page.hover('.answer:last-child .token[data-index="5"]')
    facts = texts(page, ".token-facts")
    assert all(fact.startswith("Token 5, prompt") for fact in facts), "both show the same position"


def complete(server: ServerProcess, model: str, prompt: list[int]) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": 1}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


def test_adapters_that_come_are_listed_and_their_use_is_live(page: Browser, server: ServerProcess) -> None:
    page.js("document.querySelector('#adapter-list input[value=oracle]').focus()")
    name = "oracle@top_k=1"  # whole tokens: another request changes what its heads have
    complete(server, name, [5])
    page.js("window.dispatchEvent(new Event('focus'))")  # sooner than the page would ask by itself
    page.until(lambda: name in listed(page), "the new adapter in the list")
    assert page.js("return document.activeElement.value") == "oracle", "the focus stays where it was"
    generate(page, name, prompt="x", tokens=1)
    bars = "return [...document.querySelectorAll('.usage td:nth-child(3) .bar')].map(n => n.style.cssText)"
    page.until(lambda: "–" not in texts(page, ".usage td:nth-child(3)"), "the use of the heads in all requests")
    shares = [float(share.removesuffix(" %")) for share in texts(page, ".usage td:nth-child(3)")]
    assert 99 <= sum(shares) <= 101
    assert text(page, ".live-note") == ""
    before = page.js(bars)
    complete(server, name, list(range(100, 160)))
    page.until(lambda: page.js(bars) != before, "the bars to follow what others ask", seconds=20)


def test_usage_of_adapters_without_series_of_their_own(page: Browser) -> None:
    """Of the page's own function: this server has series for all adapters."""
    script = "return import('./inspector/usage.js').then(m => m.liveUsage({adapters: new Map([%s]), note: ''}, '%s'))"
    own, note = page.js(script % ("['other', 1], ['other_', 2]", "other"))
    assert (own, note) == (2, "")
    own, note = page.js(script % ("['other', 1]", "sql"))
    assert own is None
    assert "--metrics-adapters" in note


def test_more_adapters_than_the_server_traces_at_once(page: Browser, server: ServerProcess) -> None:
    names = ["all-r8-e4", "attn-r4-e3", "mlp-r16-e2", "oracle"]
    names += [*(f"attn-r4-e3@top_k={k}" for k in (1, 2, 3)), "mlp-r16-e2@top_k=1", "mlp-r16-e2@top_k=2"]
    assert len(names) > MAX_TRACES
    for name in names[4:]:
        complete(server, name, [5])
    page.js("window.dispatchEvent(new Event('focus'))")
    page.until(lambda: set(names) <= set(listed(page)), "the new adapters in the list")
    generate(page, *names, prompt="x", tokens=1)
    assert set(texts(page, ".answer h2")) == set(names)
    assert page.js("return document.querySelectorAll('.answer .body[hidden]').length") == 0


def tab_to(page: Browser, condition: str) -> None:
    """Press the tab key until the condition, a JavaScript expression, holds."""
    for _ in range(40):
        page.press("tab")
        if page.js(f"return {condition}"):
            return
    raise AssertionError(f"not reached with the tab key: {condition}")


def test_from_the_keyboard_alone(page: Browser) -> None:
    ticked = page.js("return document.querySelector('#adapter-list input:checked').value")
    assert ticked != "oracle"
    for name in (ticked, "oracle"):
        tab_to(page, f"document.activeElement.value === '{name}'")
        page.press(" ")
    assert page.js("return [...document.querySelectorAll('#adapter-list input:checked')].map(n => n.value)") == [
        "oracle"
    ]
    tab_to(page, "document.activeElement.id === 'prompt'")
    page.press("control+a", *"Hello there", "control+enter")
    wait_for_answers(page)
    tab_to(page, "document.activeElement.id === 'max-tokens'")
    page.press("control+a", "1")
    tab_to(page, "document.activeElement.id === 'generate'")
    page.press("enter")
    page.until(lambda: " 1 generated" in text(page, ".facts"), "another answer")
    tab_to(page, "document.activeElement.classList.contains('token')")
    page.press("home")
    assert text(page, ".token-facts").startswith("Token 0, prompt")
    page.press("right", "right", "left")
    assert text(page, ".token-facts").startswith("Token 1, prompt")
    page.press("end")
    assert "generated last" in text(page, ".token-facts")
    outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "what has the focus can be seen"


def test_stop_ends_the_request(page: Browser, server: ServerProcess) -> None:
    choose(page, "oracle")
    page.type("#max-tokens", "512")
    page.click("#generate")
    page.until(lambda: page.js("return !document.getElementById('stop').hidden"), "the stop button")
    page.click("#stop")
    page.until(lambda: text(page, "#status") == "Stopped.", "the request to be stopped")

    def running() -> list[float]:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        return [float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{")]

    wait_for(lambda: running() == [0.0], "the engine to let go of the request")
    generate(page, "oracle")
    assert not page.js("return document.getElementById('generate').disabled")


def test_what_goes_wrong_is_said(page: Browser) -> None:
    choose(page)
    page.click("#generate")
    assert text(page, "#status") == "Choose an adapter first."
    generate(page, "oracle")
    page.js("document.getElementById('prompt').value = 'word '.repeat(2000)")
    page.click("#generate")
    page.until(lambda: text(page, "#status") == "1 of 1 failed.", "the refusal")
    assert "1024" in text(page, ".message")
    assert page.js("return document.querySelector('.answer .body').hidden"), "the answer to an earlier prompt"
    assert page.js("return document.querySelector('#adapter-list input[value=plain-r8]').disabled")


LOOKS = (Path(__file__).parent / "looks.js").read_text()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_legible_and_in_its_place(page: Browser, size: tuple[int, int], dark: bool, tmp_path: Path) -> None:
    generate(page, "all-r8-e4", "oracle")
    page.look(width=size[0], height=size[1], dark=dark)
    page.until(lambda: page.js("return innerWidth") == size[0], "the window to have its size")
    page.screenshot(tmp_path / "page.png")
    assert page.js(LOOKS + "return overflow()") == []
    assert page.js(LOOKS + "return overlaps()") == []
    ratio, what = page.js(LOOKS + "return contrast()")
    assert ratio >= 4.5, f"{what} has a contrast of {ratio:.1f}"  # as WCAG AA asks of text
    background = page.js("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == dark


def test_nothing_from_outside_and_nothing_to_complain_of(page: Browser, server: ServerProcess) -> None:
    page.console_errors()
    page.requested_urls()
    page.open(f"{server.url}/inspector")
    page.until(lambda: texts(page, ".choice"), "adapters")
    generate(page, "oracle")
    urls = page.requested_urls()
    assert any(url.endswith("/v1/routing") for url in urls)
    assert {url for url in urls if not url.startswith((server.url + "/", "data:"))} == set()
    assert page.console_errors() == []


@pytest.fixture(scope="module")
def locked(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A small server that asks for a key, without router metrics."""
    folder = tmp_path_factory.mktemp("locked")
    save_adapter(make_adapter(base_shapes(str(tiny_llama)), ["q_proj"], 4, 3, seed=1), folder / "small")
    arguments = ["--model", str(tiny_llama), "--adapter", f"small={folder / 'small'}", "--api-key", "sesame"]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"]
    with one_process_engine(arguments, folder / "log") as process:
        yield process


def test_a_server_with_a_key(browser: Browser, locked: ServerProcess) -> None:
    browser.look(width=WIDE[0], height=WIDE[1], dark=False)
    browser.open(f"{locked.url}/inspector")
    browser.js("sessionStorage.clear()")
    browser.open(f"{locked.url}/inspector")
    browser.until(lambda: "asks for an API key" in text(browser, "#status"), "the page to ask for a key")
    assert not texts(browser, ".choice")
    browser.type("#api-key", "wrong")
    browser.press("tab")
    browser.until(lambda: "does not know this one" in text(browser, "#status"), "the page to say so")
    browser.type("#api-key", "sesame")
    browser.press("tab")
    browser.until(lambda: texts(browser, ".choice"), "adapters")
    generate(browser, "small", prompt="one two")
    assert texts(browser, ".usage td:nth-child(3)") == ["–"] * 3
    browser.until(lambda: "--router-metrics on" in text(browser, ".live-note"), "why there is no use to show")
    browser.open(f"{locked.url}/inspector")
    browser.until(lambda: texts(browser, ".choice"), "the key to be remembered in this tab")
    stored = json.loads(browser.js("return JSON.stringify({...localStorage})"))
    assert stored == {}, "and nowhere else"
