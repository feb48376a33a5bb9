// Talking to the server: models, the exact prompt, and a reply that arrives piece by piece.

/** An answer of the server that is an error; `code` and `message` are its own words. */
export class ApiError extends Error {
  constructor(status, body) {
    const error = body?.error ?? {};
    super(error.message ?? `the server answered with status ${status}`);
    this.status = status;
    this.code = error.code ?? error.type ?? "";
  }
}

async function post(path, body, key, signal) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    let parsed = null;
    try { parsed = await response.json(); } catch { /* not JSON: the status says enough */ }
    throw new ApiError(response.status, parsed);
  }
  return response;
}

/** The model's id and context. Throws ApiError, also where a key is wanted. */
export async function model(key) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const response = await fetch("/v1/models", { headers });
  const body = await response.json().catch(() => null);
  if (!response.ok) throw new ApiError(response.status, body);
  return body.data[0];
}

/** What the model would see for this request. */
export async function render(request, key) {
  return (await post("/v1/render", { ...request, stream: false }, key)).json();
}

/**
 * Streams one reply. `on` is called with {reasoning}, {content}, {call: {index, id, name,
 * arguments}}, {finish} or {usage}, in the order of arrival.
 */
export async function reply(request, key, signal, on) {
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  const response = await post("/v1/chat/completions", body, key, signal);
  const notice = response.headers.get("x-fathom-notice");
  if (notice) on({ notice });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(response.status, chunk);
    if (chunk.usage) on({ usage: chunk.usage });
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const delta = choice.delta ?? {};
    if (delta.reasoning_content) on({ reasoning: delta.reasoning_content });
    if (delta.content) on({ content: delta.content });
    for (const call of delta.tool_calls ?? []) {
      on({ call: { index: call.index, id: call.id, name: call.function?.name, arguments: call.function?.arguments ?? "" } });
    }
    if (choice.finish_reason) on({ finish: choice.finish_reason });
  }
  throw new Error("the connection ended before the reply did");
}

/** The data of server-sent events; comments, which keep the connection alive, are passed over. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.split("\n").filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trimStart());
        if (data.length) yield data.join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
