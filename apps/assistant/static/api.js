// Requests to the server that this page came from: JSON, and answers as events. Errors are one class.

export class ApiError extends Error {
  /** `status` 0: nobody answered. `code` is the server's own word for what went wrong. */
  constructor(message, { status = 0, code = null, retry_s = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retry_s });
  }
}

const GONE = "edgealign is not answering.";

async function send(method, path, body, signal) {
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: body === undefined ? {} : { "content-type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    window.dispatchEvent(new Event("server-gone"));
    throw new ApiError(GONE);
  }
  if (response.ok) return response;
  const { error = {} } = await response.json().catch(() => ({}));
  if (response.status === 401) window.dispatchEvent(new Event("locked-out"));
  const retry_s = Number(response.headers.get("retry-after")) || null;
  throw new ApiError(error.message ?? `The server said ${response.status}.`, { status: response.status, code: error.code, retry_s });
}

/** One request; its answer as JSON, or null where there is none. */
export async function call(method, path, body) {
  const response = await send(method, path, body);
  return response.status === 204 ? null : response.json();
}

/** One request; its answer as text. */
export const text = async (path) => (await send("GET", path)).text();

/** The events of an answer as they come. An error in the middle, or an end without a last event, is thrown. */
export async function* stream(path, body, signal) {
  const response = await send("POST", path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let last = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (held + value).split("\n\n");
      held = events.pop();
      for (const event of events) {
        if (!event.startsWith("data: ")) continue;
        const found = JSON.parse(event.slice(6));
        if (found.error) throw new ApiError(found.error.message, { status: 503, code: found.error.code });
        last = found.type;
        yield found;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
    last = "";
  } finally {
    reader.cancel().catch(() => {});
  }
  if (last !== "answer" && last !== "comparison") {
    window.dispatchEvent(new Event("server-gone"));
    throw new ApiError("The answer was cut off: edgealign went away in the middle of it.");
  }
}

/** Whether the server is there. */
export async function healthy() {
  try {
    return (await fetch("/health")).ok;
  } catch {
    return false;
  }
}
