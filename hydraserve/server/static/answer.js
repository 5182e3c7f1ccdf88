// One adapter's answer: coloured tokens, the heat map of the token looked at, and how much the heads were used.

import { element, headColour, indexOfLargest, meanWeights, percent } from "./heads.js";
import { headShares } from "./usage.js";

const ALL_MODULES = "";
// About so many layers get a number on the axis.
const LAYER_NUMBERS = 6;
// Of the colour's full strength: a token whose heads are all alike, so that its leading head can still be seen.
const FAINTEST = 0.25;
// Colours span what an answer's weights span, but no less than this, so that noise does not look like a choice.
const LEAST_SPAN = 0.02;

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
    this.find(".module").addEventListener("change", () => this.draw());
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

  /** What is shown of an earlier prompt would be taken for this one's. */
  fail(message) {
    this.data = null;
    this.find(".body").hidden = true;
    this.root.setAttribute("aria-busy", "false");
    this.find(".facts").textContent = "";
    this.say(message);
  }

  say(message) {
    const node = this.find(".message");
    node.hidden = !message;
    node.textContent = message;
  }

  /** data: what `route` gave. */
  show(data) {
    this.data = data;
    this.selected = Math.min(data.prompt_tokens, data.tokens.length - 1);
    this.root.setAttribute("aria-busy", "false");
    this.find(".body").hidden = false;
    const generated = data.tokens.length - data.prompt_tokens;
    this.find(".facts").textContent =
      `${data.prompt_tokens} prompt tokens, ${generated} generated · ` +
      `${data.routers.length} routers of ${data.heads} heads · entropy ${data.usage.entropy.toFixed(2)} of 1`;
    this.drawLegend();
    this.drawModules();
    this.draw();
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
    const chosen = this.module ?? ALL_MODULES;
    const options = [element("option", { value: ALL_MODULES, textContent: "all modules" })];
    options.push(...modules.map((module) => element("option", { value: module, textContent: module })));
    this.find(".module").replaceChildren(...options);
    this.find(".module").value = modules.includes(chosen) ? chosen : ALL_MODULES;
  }

  /** The chosen module, or null for all. */
  get module() {
    return this.find(".module").value || null;
  }

  /** Draw everything that depends on the chosen module. */
  draw() {
    const { routers, tokens, heads } = this.data;
    this.chosen = routers.flatMap((router, i) => (this.module === null || router.module === this.module ? [i] : []));
    this.means = tokens.map((_, i) => {
      const weights = this.data.weightsOf(i);
      return weights && meanWeights(this.chosen.map((router) => weights[router]), heads);
    });
    this.layers = [...new Set(routers.map((router) => router.layer))];
    this.byLayer = this.layers.map((layer) => this.chosen.filter((i) => routers[i].layer === layer));
    this.range = spanOf(tokens.flatMap((_, i) => this.columns(i).flatMap((column) => column ?? [])));
    this.drawTokens();
    this.drawUsage();
    this.select(this.selected);
  }

  /** For each layer, the mean weights of the chosen routers for token `index`; null where there are none. */
  columns(index) {
    const weights = this.data.weightsOf(index);
    return this.byLayer.map((own) =>
      weights && own.length ? meanWeights(own.map((i) => weights[i]), this.data.heads) : null,
    );
  }

  drawTokens() {
    const equal = 1 / this.data.heads;
    const leading = this.means.flatMap((mean) => (mean ? [Math.max(...mean)] : []));
    const [, most] = spanOf([equal, ...leading]);
    this.find(".token-scale").textContent =
      `Pale: all heads alike. Full colour: the head has ${percent(most)}, the most in this answer.`;
    const nodes = this.data.tokens.map((token, i) => {
      const node = element("span", { className: "token", textContent: visible(token.text), tabIndex: -1 });
      node.classList.toggle("in-prompt", token.kind === "prompt");
      node.setAttribute("role", "option");
      node.setAttribute("aria-selected", "false");
      node.dataset.index = i;
      const mean = this.means[i];
      if (mean) {
        const head = indexOfLargest(mean);
        const strength = FAINTEST + (1 - FAINTEST) * ((mean[head] - equal) / (most - equal));
        node.style.setProperty("--head", headColour(head));
        node.style.setProperty("--strength", strength.toFixed(3));
        node.setAttribute("aria-label", `${token.text}: head ${head}, ${percent(mean[head])}`);
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
    const list = this.find(".tokens");
    for (const node of list.querySelectorAll("[aria-selected=true]")) {
      node.setAttribute("aria-selected", "false");
      node.tabIndex = -1;
    }
    this.selected = index;
    list.children[index].setAttribute("aria-selected", "true");
    list.children[index].tabIndex = 0;
    scrollTo(list, list.children[index]);
    this.drawTokenFacts();
    this.drawHeat();
  }

  drawTokenFacts() {
    const token = this.data.tokens[this.selected];
    const mean = this.means[this.selected];
    const what = `Token ${this.selected}, ${token.kind}: “${visible(token.text)}”`;
    const head = mean && indexOfLargest(mean);
    this.find(".token-facts").textContent = mean
      ? `${what} · head ${head} leads with ${percent(mean[head])} · entropy ${token.entropy.toFixed(2)}`
      : `${what} · generated last, so no layer has seen it`;
  }

  drawHeat() {
    const { layers, range } = this;
    const columns = this.columns(this.selected);
    const heat = this.find(".heat");
    heat.style.gridTemplateColumns = `auto repeat(${layers.length}, minmax(0, 1fr))`;
    const cells = Array.from({ length: this.data.heads }, (_, head) => [
      element("span", { className: "name", textContent: `head ${head}` }),
      ...columns.map((column, i) => heatCell(head, layers[i], column?.[head] ?? null, range)),
    ]);
    this.find(".heat-scale").textContent =
      `Grey is ${percent(range[0])} of a layer’s weight, full colour ${percent(range[1])}: this answer’s range.`;
    heat.replaceChildren(...cells.flat(), ...layerNumbers(layers));
    heat.setAttribute("aria-label", describe(layers, columns));
  }

  /** usage: of this adapter in all requests, as parseUsage gives it. note: why there is none. */
  showLive(usage, note) {
    this.live = usage;
    this.find(".live-note").textContent = note;
    if (this.data) this.drawUsage();
  }

  drawUsage() {
    const seen = this.means.filter((mean) => mean);
    const here = seen.length ? meanWeights(seen, this.data.heads) : [];
    const everywhere = headShares(this.live, this.module);
    const rows = Array.from({ length: this.data.heads }, (_, head) => {
      const name = element("th", { scope: "row", textContent: `head ${head}` });
      return element("tr", {}, name, bar(head, here[head]), bar(head, everywhere?.[head]));
    });
    this.find(".usage tbody").replaceChildren(...rows);
  }
}

/** Bring a token into view without moving the page. */
function scrollTo(list, node) {
  const above = node.offsetTop - list.scrollTop;
  const below = above + node.offsetHeight - list.clientHeight;
  if (above < 0) list.scrollTop += above;
  else if (below > 0) list.scrollTop += below;
}

function bar(head, share) {
  const known = share !== undefined;
  const node = element("div", { className: known ? "bar" : "bar unknown", textContent: known ? percent(share) : "–" });
  node.style.setProperty("--head", headColour(head));
  node.style.setProperty("--share", known ? share.toFixed(4) : "0");
  return element("td", {}, node);
}

/** [least, most] of some shares, as far apart as colours can show. */
function spanOf(shares) {
  const [least, most] = shares.reduce(([low, high], share) => [Math.min(low, share), Math.max(high, share)], [1, 0]);
  return [least, Math.max(most, least + LEAST_SPAN)];
}

function heatCell(head, layer, weight, [least, most]) {
  const title = `layer ${layer}, head ${head}: ${weight === null ? "no weights" : percent(weight)}`;
  const node = element("span", { className: "cell", title });
  node.style.setProperty("--head", headColour(head));
  node.style.setProperty("--weight", weight === null ? "0" : ((weight - least) / (most - least)).toFixed(3));
  return node;
}

function layerNumbers(layers) {
  const step = Math.max(1, Math.ceil(layers.length / LAYER_NUMBERS));
  return [
    element("span", { className: "name axis", textContent: "layer" }),
    ...layers.map((layer, i) => element("span", { className: "layer", textContent: i % step ? "" : layer })),
  ];
}

function describe(layers, columns) {
  const known = columns.flatMap((column, i) => (column ? [`layer ${layers[i]} head ${indexOfLargest(column)}`] : []));
  return known.length ? `Leading heads: ${known.join(", ")}` : "No weights for this token";
}

/** Text as it can be seen: a token of nothing but line breaks needs a sign. */
function visible(text) {
  const signs = text.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥");
  return signs === "" ? "∅" : signs;
}
