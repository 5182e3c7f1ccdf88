// Use of the heads in all requests, from the server's metrics, brought up to date while the page is looked at.

import { metrics } from "./api.js";

const EVERY_MS = 3000;
const WEIGHT = /^hydraserve_router_weight_total\{(.*)\} (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Map of adapter -> share of each head, over all modules. */
export function parseUsage(text) {
  const sums = new Map();
  for (const line of text.split("\n")) {
    const match = WEIGHT.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...match[1].matchAll(LABEL)].map(([, name, value]) => [name, unescape(value)]));
    const heads = sums.get(labels.adapter) ?? [];
    heads[Number(labels.head)] = (heads[Number(labels.head)] ?? 0) + Number(match[2]);
    sums.set(labels.adapter, heads);
  }
  return new Map([...sums].map(([adapter, heads]) => [adapter, shares(heads)]));
}

const unescape = (value) => value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));

function shares(heads) {
  const known = Array.from(heads, (weight) => weight ?? 0);
  const total = known.reduce((sum, weight) => sum + weight, 0);
  return known.map((weight) => (total ? weight / total : 0));
}

/** Calls show(usage, problem) now and again: usage as parseUsage gives it, or null and why not. */
export function watchUsage(show) {
  const update = async () => {
    if (document.hidden) return;
    try {
      const usage = parseUsage(await metrics());
      show(usage, usage.size ? "" : "No router metrics yet (server flag --router-metrics on).");
    } catch (error) {
      show(null, error.status ? "This key may not read the metrics." : "The metrics cannot be reached.");
    }
  };
  update();
  setInterval(update, EVERY_MS);
}
