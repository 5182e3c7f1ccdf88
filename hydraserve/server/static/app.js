// The form: which adapters, which prompt; one column for each answer.

import { listAdapters, route } from "./api.js";
import { Answer } from "./answer.js";
import { element } from "./heads.js";
import { liveUsage, watchUsage } from "./usage.js";

const byId = (id) => document.getElementById(id);
const KEY = "hydraserve-api-key";
const LIST_EVERY_MS = 10000;
// The server takes 8 such requests at a time, from everybody.
const AT_ONCE = 4;

let listed = "";
let answers = [];
let usage = { adapters: null, note: "" };
let running = null;

function status(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

const chosen = () => [...document.querySelectorAll("#adapter-list input:checked")].map((input) => input.value);

async function showAdapters() {
  try {
    const adapters = await listAdapters();
    drawAdapters(adapters);
    const first = document.querySelector("#adapter-list input:not(:disabled)");
    if (first && !chosen().length) first.checked = true;
    status(adapters.length ? "" : "This server has no adapters.");
  } catch (error) {
    drawAdapters([]);
    status(error.message, true);
  }
}

/** Show adapters that have come, and no longer those that have gone; when that cannot be found out, all as it was. */
async function refreshAdapters() {
  if (document.hidden || !listed) return;
  try {
    drawAdapters(await listAdapters());
  } catch {
    // The use of the heads says what is wrong.
  }
}

/** Ticks and the focus stay. */
function drawAdapters(adapters) {
  const text = JSON.stringify(adapters);
  if (text === listed) return;
  listed = text;
  const before = new Set(chosen());
  const focused = document.activeElement.closest?.("#adapter-list") ? document.activeElement.value : null;
  byId("adapter-list").replaceChildren(...adapters.map((adapter) => choice(adapter, before.has(adapter.name))));
  if (focused !== null) document.querySelector(`#adapter-list input[value="${CSS.escape(focused)}"]`)?.focus();
}

function choice({ name, facts, routed }, isChecked) {
  const input = element("input", { type: "checkbox", value: name, checked: isChecked && routed, disabled: !routed });
  const hint = element("span", { className: "hint", textContent: facts });
  return element("label", { className: "choice" }, input, element("span", { textContent: name }), hint);
}

/** Keep the columns of adapters that stay chosen, in the order of the list. */
function arrange(names) {
  const kept = new Map(answers.map((answer) => [answer.adapter, answer]));
  answers = names.map((name) => kept.get(name) ?? new Answer(name, selectEverywhere));
  byId("results").replaceChildren(...answers.map((answer) => answer.root));
  showLive();
}

function selectEverywhere(index) {
  for (const answer of answers) answer.select(index);
}

function showLive() {
  for (const answer of answers) answer.showLive(...liveUsage(usage, answer.adapter));
}

async function generate(event) {
  event.preventDefault();
  const names = chosen();
  if (!names.length) return status("Choose an adapter first.", true);
  const request = {
    prompt: byId("prompt").value,
    chat: byId("mode").value === "chat",
    maxTokens: Number(byId("max-tokens").value),
  };
  running?.abort();
  const controller = (running = new AbortController());
  arrange(names);
  setBusy(true);
  status(names.length > 1 ? `Generating with ${names.length} adapters…` : "Generating…");
  for (const answer of answers) answer.wait();
  const done = await all(answers, AT_ONCE, (answer) => ask(answer, request, controller.signal));
  if (running !== controller) return;
  setBusy(false);
  const failed = done.filter((ok) => !ok).length;
  status(controller.signal.aborted ? "Stopped." : failed ? `${failed} of ${done.length} failed.` : "Done.", failed > 0);
}

/** The results of work(item), of which at most `limit` are under way. */
async function all(items, limit, work) {
  const results = [];
  const waiting = [...items.entries()];
  const worker = async () => {
    for (let next = waiting.shift(); next; next = waiting.shift()) results[next[0]] = await work(next[1]);
  };
  await Promise.all(Array.from({ length: limit }, worker));
  return results;
}

async function ask(answer, request, signal) {
  try {
    answer.show(await route(answer.adapter, request, signal));
    return true;
  } catch (error) {
    answer.fail(signal.aborted ? "Stopped." : error.message);
    return false;
  }
}

function setBusy(busy) {
  byId("generate").disabled = busy;
  byId("stop").hidden = !busy;
}

byId("api-key").value = sessionStorage.getItem(KEY) ?? "";
byId("api-key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, byId("api-key").value.trim());
  showAdapters();
});
byId("ask").addEventListener("submit", generate);
byId("stop").addEventListener("click", () => running?.abort());
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
showAdapters();
setInterval(refreshAdapters, LIST_EVERY_MS);
window.addEventListener("focus", refreshAdapters);
watchUsage((adapters, note) => {
  usage = { adapters, note };
  showLive();
});
