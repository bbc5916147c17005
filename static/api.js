// Every request the page makes. Failures are ApiErrors with a sentence.

export class ApiError extends Error {
  /** `status` is 0 when no answer came; `field` is the dotted path the error belongs to. */
  constructor(message, { status = 0, code = "", field = null, body = null } = {}) {
    super(message);
    Object.assign(this, { status, code, field, body });
  }
}

const REQUEST_LIMIT_MS = 20_000;

/** The JSON answer to one request; `onDate` hears the server's clock from each answer. */
export async function request(
  method,
  url,
  { body, signal, onDate, limit = REQUEST_LIMIT_MS } = {},
) {
  const timeout = AbortSignal.timeout(limit);
  const response = await send(url, {
    method,
    signal: signal ? AbortSignal.any([signal, timeout]) : timeout,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const date = Date.parse(response.headers.get("Date"));
  if (date) onDate?.(date);
  const answer = await response.json().catch(() => null);
  // Health answers 503 with its full report when it has failed: that is an answer, not an error.
  if (response.ok || (answer?.checks && response.status === 503)) return answer;
  throw new ApiError(answer?.error ?? `The server answered ${response.status}.`, {
    status: response.status,
    code: answer?.code,
    field: answer?.field,
    body: answer,
  });
}

async function send(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    if (options.signal.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
    throw new ApiError("The server does not answer.");
  }
}

const at = (collection, id, verb = "") =>
  `/api/${collection}/${encodeURIComponent(id)}${verb && `/${verb}`}`;

export const pauseSchedule = (id) => request("POST", at("schedules", id, "pause"));
export const resumeSchedule = (id) => request("POST", at("schedules", id, "resume"));
export const runSchedule = (id) => request("POST", at("schedules", id, "run"));
export const deleteSchedule = (id) => request("DELETE", at("schedules", id));
export const loadSchedule = (id) => request("GET", at("schedules", id));
export const createSchedule = (body) => request("POST", "/api/schedule", { body });
export const changeSchedule = (id, body) => request("PATCH", at("schedules", id), { body });
export const loadExecution = (id) => request("GET", at("executions", id));
export const cancelExecution = (id) => request("POST", at("executions", id, "cancel"));
export const runMethod = (body) =>
  request("POST", "/api/run_now", { body: { ...body, wait: false } });
export const logIn = (token) => request("POST", "/api/login", { body: { token } });
export const logOut = () => request("POST", "/api/logout");
export const acknowledgeHealth = () => request("POST", "/api/health/acknowledge");
export const previewTrigger = (trigger_config, count, signal) =>
  request("POST", "/api/triggers/preview", { body: { trigger_config, count }, signal });
