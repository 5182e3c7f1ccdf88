// The form: which adapters, which prompt; one column for each answer.

import { listAdapters, route } from "./api.js";
import { Answer } from "./answer.js";
import { element } from "./heads.js";
import { watchUsage } from "./usage.js";

const byId = (id) => document.getElementById(id);
const KEY = "hydraserve-api-key";

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
    const before = new Set(chosen());
    byId("adapter-list").replaceChildren(...adapters.map((adapter) => choice(adapter, before.has(adapter.name))));
    const first = document.querySelector("#adapter-list input:not(:disabled)");
    if (first && !chosen().length) first.checked = true;
    status(adapters.length ? "" : "This server has no adapters.");
  } catch (error) {
    byId("adapter-list").replaceChildren();
    status(error.message, true);
  }
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
  for (const answer of answers) answer.showLive(usage.adapters?.get(answer.adapter), usage.note);
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
  const done = await Promise.all(answers.map((answer) => ask(answer, request, controller.signal)));
  if (running !== controller) return;
  setBusy(false);
  const failed = done.filter((ok) => !ok).length;
  status(controller.signal.aborted ? "Stopped." : failed ? `${failed} of ${done.length} failed.` : "Done.", failed > 0);
}

async function ask(answer, request, signal) {
  answer.wait();
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
watchUsage((adapters, note) => {
  usage = { adapters, note };
  showLive();
});
