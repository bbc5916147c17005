// Every request the page makes. Failures are ApiErrors with a sentence.

const LIMIT_MS = 20_000;

/** `status` is 0 when no answer came; `field` is the dotted path the error belongs to. */
class ApiError extends Error {
  constructor(message, status = 0, field = null) {
    super(message);
    Object.assign(this, { status, field });
  }
}

/** The JSON answer to one request; `onDate` hears the server's clock from each answer. */
export async function request(method, url, body, { signal, onDate, limit = LIMIT_MS } = {}) {
  const timeout = AbortSignal.timeout(limit);
  const response = await send(url, {
    method,
    signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
    ...(body && { headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) }),
  });
  const date = Date.parse(response.headers.get("Date"));
  if (date) onDate?.(date);
  const answer = await response.json().catch(() => null);
  signal?.throwIfAborted(); // or half an answer would pass for none
  // Health that has failed answers 503 with its report: that is an answer, not an error.
  if (response.ok || (answer?.checks && response.status === 503)) return answer;
  const sentence = answer?.error ?? `The server answered ${response.status}.`;
  throw new ApiError(sentence, response.status, answer?.field);
}

async function send(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (options.signal.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
    throw new ApiError("The server does not answer.");
  }
}

/** The address of one schedule or execution, or of what can be done with it. */
export const at = (collection, id, verb) =>
  `/api/${collection}/${encodeURIComponent(id)}${verb ? `/${verb}` : ""}`;
