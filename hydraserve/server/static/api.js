// Calls of the server this page came from. Addresses are relative, so that the page works behind a path prefix.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const apiKey = () => document.getElementById("api-key").value.trim();

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  const response = await fetch(path, { ...options, headers });
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  if (response.status === 401) return "This server asks for an API key, or does not know this one.";
  try {
    const body = await response.json();
    return body.error?.message ?? body.error ?? body.detail ?? response.statusText;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

/** [{name, facts, routed}]: the adapters that this key may use. */
export async function listAdapters() {
  const { data } = await (await call("v1/adapters")).json();
  return data.map(({ name, heads, rank, format }) => ({
    name,
    routed: heads === null || heads > 1,
    facts: heads === null ? "" : heads > 1 ? `${heads} heads, rank ${rank}` : `${format}, no router`,
  }));
}

/** The answer of POST /v1/routing. */
export async function route(model, { prompt, chat, maxTokens }, signal) {
  const text = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = JSON.stringify({ model, ...text, max_tokens: maxTokens });
  const response = await call("v1/routing", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
    signal,
  });
  return response.json();
}

/** The text of /metrics. */
export async function metrics() {
  return (await call("metrics")).text();
}
