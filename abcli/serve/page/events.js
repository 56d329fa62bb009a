// Server-sent events of an answer, and how a server's complaint is read.

/** The JSON values of a stream, as they come. Throws what the server complains of. */
async function* eventsOf(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      held += decoder.decode(value ?? new Uint8Array(), { stream: !done });
      const events = held.split("\n\n");
      held = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const found = JSON.parse(data);
        if (found.error) throw new Error(found.error.message);
        yield found;
      }
      if (done) throw new Error("the server ended before the answer was complete");
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A response of the server. Throws what it complains of; 401 has the property `locked`. */
async function ask(path, { body, key, signal } = {}) {
  const headers = { ...(body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  const error = new Error(found?.error?.message ?? `the server answers ${response.status}`);
  error.locked = response.status === 401;
  throw error;
}
