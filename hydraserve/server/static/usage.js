// Use of the heads in all requests, from the server's metrics, brought up to date while the page is looked at.

import { metrics } from "./api.js";

const EVERY_MS = 3000;
// Adapters whose names are labels of the server's own get an underscore there.
const TAKEN = ["base", "other"];
const WEIGHT = /^hydraserve_router_weight_total\{(.*)\} (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Map of adapter -> map of module -> sum of each head's weights. */
export function parseUsage(text) {
  const usage = new Map();
  for (const line of text.split("\n")) {
    const match = WEIGHT.exec(line);
    if (!match) continue;
    const labels = Object.fromEntries([...match[1].matchAll(LABEL)].map(([, name, value]) => [name, unescape(value)]));
    if (!usage.has(labels.adapter)) usage.set(labels.adapter, new Map());
    const modules = usage.get(labels.adapter);
    if (!modules.has(labels.module)) modules.set(labels.module, []);
    modules.get(labels.module)[Number(labels.head)] = Number(match[2]);
  }
  return usage;
}

const unescape = (value) => value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));

/** Share of each head in the weights of these modules (null: all), or null when there are none. */
export function headShares(modules, wanted) {
  const sums = [];
  for (const [module, heads] of modules ?? []) {
    if (wanted === null || module === wanted) heads.forEach((weight, head) => (sums[head] = (sums[head] ?? 0) + weight));
  }
  const total = sums.reduce((sum, weight) => sum + weight, 0);
  return total ? sums.map((weight) => weight / total) : null;
}

/** [modules of one adapter as `parseUsage` gives them, or undefined; why there are none]. */
export function liveUsage({ adapters, note }, adapter) {
  const own = adapters?.get(TAKEN.includes(adapter) ? `${adapter}_` : adapter);
  const missing = "No counts of this adapter: it is new, or one of those that share “other” (--metrics-adapters).";
  return [own, note || (own ? "" : missing)];
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
