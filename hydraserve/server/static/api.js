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

/** The answer of POST /v1/routing: its summary, and weightsOf(token), which gives each router's weights or null. */
export async function route(model, { prompt, chat, maxTokens }, signal) {
  const text = chat ? { messages: [{ role: "user", content: prompt }] } : { prompt };
  const body = JSON.stringify({ model, ...text, max_tokens: maxTokens, format: "safetensors" });
  const response = await call("v1/routing", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body,
    signal,
  });
  return readRouting(await response.arrayBuffer());
}

/** A safetensors file: the header's length, the header (JSON), then the tensors, of which "weights" is float32. */
function readRouting(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const summary = JSON.parse(header.__metadata__.routing);
  const [begin, end] = header.weights.data_offsets;
  const weights = new Float32Array(buffer.slice(8 + length + begin, 8 + length + end));
  const [, routers, heads] = header.weights.shape;
  const weightsOf = (token) =>
    summary.tokens[token].head === null
      ? null
      : summary.routers.map((router, i) => {
          const first = (token * routers + i) * heads;
          return weights.subarray(first, first + router.heads);
        });
  return { ...summary, weightsOf };
}

/** The text of /metrics. */
export async function metrics() {
  return (await call("metrics")).text();
}
