// One adapter's answer: coloured tokens, the heat map of the token looked at, and how much the heads were used.

import { element, headColour, indexOfLargest, meanWeights, percent } from "./heads.js";

const ALL_MODULES = "all";
// So many layers get a number on the axis.
const LAYER_NUMBERS = 6;

export class Answer {
  /** onSelect(index): called when the user looks at another token. */
  constructor(adapter, onSelect) {
    this.adapter = adapter;
    this.onSelect = onSelect;
    this.data = null;
    this.selected = -1;
    this.live = null;
    this.root = document.getElementById("answer-template").content.firstElementChild.cloneNode(true);
    this.find("h2").textContent = adapter;
    this.find(".body").hidden = true;
    this.find(".module").addEventListener("change", () => this.drawHeat());
    this.listenToTokens();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  wait() {
    this.root.setAttribute("aria-busy", "true");
    this.say("");
    this.find(".facts").textContent = "generating…";
  }

  fail(message) {
    this.root.setAttribute("aria-busy", "false");
    this.find(".facts").textContent = "";
    this.say(message);
  }

  say(message) {
    const node = this.find(".message");
    node.hidden = !message;
    node.className = "message error";
    node.textContent = message;
  }

  /** data: the answer of POST /v1/routing. */
  show(data) {
    this.data = data;
    this.root.setAttribute("aria-busy", "false");
    this.find(".body").hidden = false;
    const generated = data.tokens.length - data.prompt_tokens;
    this.find(".facts").textContent =
      `${data.prompt_tokens} prompt tokens, ${generated} generated · ` +
      `${data.routers.length} routers of ${data.heads} heads · entropy ${data.usage.entropy.toFixed(2)} of 1`;
    this.drawLegend();
    this.drawModules();
    this.drawTokens();
    this.drawUsage();
    this.select(Math.min(data.prompt_tokens, data.tokens.length - 1));
  }

  drawLegend() {
    const items = Array.from({ length: this.data.heads }, (_, head) => {
      const swatch = element("span", { className: "swatch" });
      swatch.style.setProperty("--head", headColour(head));
      return element("li", {}, swatch, `head ${head}`);
    });
    this.find(".legend").replaceChildren(...items);
  }

  drawModules() {
    const modules = [...new Set(this.data.routers.map((router) => router.module))];
    const chosen = this.find(".module").value;
    const options = [element("option", { value: ALL_MODULES, textContent: "mean of all" })];
    options.push(...modules.map((module) => element("option", { value: module, textContent: module })));
    this.find(".module").replaceChildren(...options);
    this.find(".module").value = modules.includes(chosen) ? chosen : ALL_MODULES;
  }

  drawTokens() {
    const nodes = this.data.tokens.map((token, i) => {
      const node = element("span", { className: `token ${token.kind}`, textContent: visible(token.text) });
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      node.tabIndex = -1;
      node.dataset.index = i;
      if (token.weights) {
        const mean = meanWeights(token.weights, this.data.heads);
        node.style.setProperty("--head", headColour(token.head));
        node.style.setProperty("--weight", mean[token.head].toFixed(3));
        node.setAttribute("aria-label", `${token.text}: head ${token.head}, ${percent(mean[token.head])}`);
      }
      return node;
    });
    this.find(".tokens").replaceChildren(...nodes);
  }

  listenToTokens() {
    const list = this.find(".tokens");
    const indexOf = (event) => event.target.closest?.(".token")?.dataset.index;
    for (const kind of ["pointerover", "focusin", "click"]) {
      list.addEventListener(kind, (event) => {
        const index = indexOf(event);
        if (index !== undefined && Number(index) !== this.selected) this.onSelect(Number(index));
      });
    }
    list.addEventListener("keydown", (event) => {
      const last = this.data.tokens.length - 1;
      const target = {
        ArrowRight: this.selected + 1,
        ArrowDown: this.selected + 1,
        ArrowLeft: this.selected - 1,
        ArrowUp: this.selected - 1,
        Home: 0,
        End: last,
      }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      const index = Math.max(0, Math.min(last, target));
      this.onSelect(index);
      list.children[index].focus();
    });
  }

  /** Look at token `index`, if there is one. */
  select(index) {
    if (!this.data || index >= this.data.tokens.length) return;
    const nodes = this.find(".tokens").children;
    if (nodes[this.selected]) {
      nodes[this.selected].setAttribute("aria-selected", "false");
      nodes[this.selected].tabIndex = -1;
    }
    this.selected = index;
    nodes[index].setAttribute("aria-selected", "true");
    nodes[index].tabIndex = 0;
    this.drawTokenFacts();
    this.drawHeat();
  }

  drawTokenFacts() {
    const token = this.data.tokens[this.selected];
    const what = `Token ${this.selected}, ${token.kind}: “${visible(token.text)}”`;
    this.find(".token-facts").textContent = token.weights
      ? `${what} · head ${token.head} leads with ` +
        `${percent(meanWeights(token.weights, this.data.heads)[token.head])} · entropy ${token.entropy.toFixed(2)}`
      : `${what} · generated last, so no layer has seen it`;
  }

  drawHeat() {
    const { routers, tokens, heads } = this.data;
    const { weights } = tokens[this.selected];
    const module = this.find(".module").value;
    const layers = [...new Set(routers.map((router) => router.layer))];
    const heat = this.find(".heat");
    heat.style.gridTemplateColumns = `auto repeat(${layers.length}, minmax(0, 1fr))`;
    const columns = layers.map((layer) => {
      const rows = routers.flatMap((router, i) =>
        router.layer === layer && (module === ALL_MODULES || router.module === module) ? [i] : [],
      );
      return weights && rows.length ? meanWeights(rows.map((i) => weights[i]), heads) : new Array(heads).fill(null);
    });
    const cells = Array.from({ length: heads }, (_, head) => [
      element("span", { className: "name", textContent: `head ${head}` }),
      ...columns.map((column, i) => heatCell(head, layers[i], column[head])),
    ]);
    heat.replaceChildren(...cells.flat(), ...layerNumbers(layers));
    const leaders = columns.map((column) => (column[0] === null ? null : indexOfLargest(column)));
    heat.setAttribute("aria-label", describe(layers, leaders));
  }

  /** usage: share of each head in all requests, or null. note: why there is none. */
  showLive(usage, note) {
    this.live = usage;
    this.find(".live-note").textContent = note;
    if (this.data) this.drawUsage();
  }

  drawUsage() {
    const rows = Array.from({ length: this.data.heads }, (_, head) => {
      const name = element("th", { scope: "row", textContent: `head ${head}` });
      return element("tr", {}, name, bar(head, this.data.usage.weights[head]), bar(head, this.live?.[head]));
    });
    this.find(".usage tbody").replaceChildren(...rows);
  }
}

function bar(head, share) {
  const known = share !== undefined && share !== null;
  const node = element("div", { className: known ? "bar" : "bar unknown", textContent: known ? percent(share) : "–" });
  node.style.setProperty("--head", headColour(head));
  node.style.setProperty("--share", known ? share.toFixed(4) : "0");
  return element("td", {}, node);
}

function heatCell(head, layer, weight) {
  const known = weight !== null && weight !== undefined;
  const title = `layer ${layer}, head ${head}: ${known ? percent(weight) : "no weights"}`;
  const node = element("span", { className: "cell", title });
  node.style.setProperty("--head", headColour(head));
  node.style.setProperty("--weight", known ? weight.toFixed(3) : "0");
  return node;
}

function layerNumbers(layers) {
  const step = Math.max(1, Math.ceil(layers.length / LAYER_NUMBERS));
  return [
    element("span", { className: "name", textContent: "layer" }),
    ...layers.map((layer, i) => element("span", { className: "layer", textContent: i % step ? "" : layer })),
  ];
}

function describe(layers, leaders) {
  const known = leaders.flatMap((head, i) => (head === null ? [] : [`layer ${layers[i]} head ${head}`]));
  return known.length ? `Leading heads: ${known.join(", ")}` : "No weights for this token";
}

/** Text as it can be seen: a token of nothing but line breaks needs a sign. */
function visible(text) {
  const signs = text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥");
  return signs === "" ? "∅" : signs;
}
