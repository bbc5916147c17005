// What the page knows and how events change it. Pure: no DOM, no clock, no network.

export const PAGE_ROWS = 50;
export const MAX_LOG_LINES = 3_000;
const MINUTE = 60_000;

// ---- Routes: the hash holds view, id and query

export const VIEWS = ["overview", "schedules", "handlers", "executions", "audit"];

/** "#/schedules/backup?page=2" as {view, id, query}; anything unknown is the overview. */
export function parseRoute(hash) {
  const [path, search = ""] = hash.replace(/^#?\/?/, "").split("?", 2);
  const [view, ...rest] = path.split("/");
  const known = VIEWS.includes(view);
  return {
    view: known ? view : "overview",
    id: known && rest.length ? decode(rest.join("/")) : null,
    query: Object.fromEntries(new URLSearchParams(search)),
  };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

export const renderRoute = ({ view, id, query = {} }) =>
  `#/${view}${id == null ? "" : `/${encodeURIComponent(id)}`}${renderQuery(query)}`;

export function renderQuery(query) {
  const kept = Object.entries(query).filter(([, value]) => value != null && value !== "");
  return kept.length ? `?${new URLSearchParams(kept)}` : "";
}

// ---- Addresses of what a route shows

/** The query of a list of schedules: those that a route's query matches. */
export const schedulesFilter = ({ search, handler, state }) => ({
  search,
  handler_id: handler,
  paused: { paused: "true", active: "false" }[state],
});

export const pageOf = ({ page }) => Math.max(1, Number(page) || 1);

export function schedulesUrl(query) {
  const offset = (pageOf(query) - 1) * PAGE_ROWS || null;
  const order = { sort: query.sort || "next_fire_time", limit: PAGE_ROWS, offset };
  return `/api/schedules${renderQuery({ ...schedulesFilter(query), ...order })}`;
}

export const SPANS = { "1h": 60, "24h": 1440, "7d": 10_080 };

/** `now` is rounded down to minutes, so that the address stays the same between two renders. */
export function executionsFilter({ status, handler, schedule, span }, now) {
  const minutes = SPANS[span];
  const since = minutes && new Date((Math.floor(now / MINUTE) - minutes) * MINUTE).toISOString();
  return { status, handler_id: handler, schedule_id: schedule, since };
}

/** The resource of the newest executions that match, or of older ones, `before` a cursor. */
export const newest = (filter, limit, { every = 5_000, before: cursor } = {}) => ({
  url: `/api/executions${renderQuery({ ...filter, limit, cursor })}`,
  every,
  on: {
    execution(data, changed) {
      const isKnown = data.records.some((one) => one.execution_id === changed.execution_id);
      if (!isKnown && cursor) return data;
      const records = upsertExecution(data.records, changed, isShown(filter, changed), limit);
      return { ...data, records };
    },
  },
});

// ---- Executions and schedules

export const isFinal = ({ status }) => status !== "queued" && status !== "running";

/** The state to show: a queued execution that has begun an attempt waits for its next one. */
export const stateOfExecution = ({ status, attempt_number: attempt }) =>
  status === "queued" && attempt > 0 ? "retrying" : status;

export function waitsFor({ due_at: due, handler_id }, { handlers, now }) {
  if (Date.parse(due) > now) return "waits for its next attempt";
  const { status } = handlers.find(({ id }) => id === handler_id) ?? {};
  return `waits for its ${status === "Connected" ? "turn" : "handler"}`;
}

export function stateOfSchedule({ quarantined, paused, next_fire_time: next }) {
  if (quarantined) return "quarantined";
  if (paused) return "paused";
  return next ? "active" : "finished";
}

/** Of these newest failures, those that were their schedules' last fires, by schedule. */
export function lastFailures(schedules, records = []) {
  const newest = new Map(records.toReversed().map((one) => [one.schedule_id, one]));
  const isLast = ({ id, last_fire_time: last }) => newest.get(id)?.scheduled_at >= last;
  return new Map(schedules.filter(isLast).map(({ id }) => [id, newest.get(id)]));
}

/** The trigger in words, without the zone if that is the server's own. */
export function wordsOf({ description, trigger }, config) {
  const own = ` ${config?.timezone}`;
  return description?.endsWith(own) ? description.slice(0, -own.length) : (description ?? trigger);
}

/** Whether an execution is among those that the API's filter matches. */
export const isShown = ({ status, handler_id: handler, schedule_id: schedule }, execution) =>
  (!status || status.split(",").includes(execution.status)) &&
  (!handler || handler === execution.handler_id) &&
  (!schedule || schedule === execution.schedule_id);

/** `rows` with `execution` replaced, added in front or removed; newest first, at most `limit`. */
export function upsertExecution(rows, execution, shown, limit = PAGE_ROWS) {
  const at = rows.findIndex((row) => row.execution_id === execution.execution_id);
  if (!shown) return at < 0 ? rows : rows.toSpliced(at, 1);
  if (at >= 0) return rows.with(at, { ...rows[at], ...execution });
  return [execution, ...rows].slice(0, Math.max(limit, rows.length));
}

/** What an event does to a list `name` of things that have an id. */
export const replaceIn = (name) => (data, changed) => {
  const at = data[name].findIndex(({ id }) => id === changed.id);
  if (at < 0 || changed.deleted) return "reload";
  return { ...data, [name]: data[name].with(at, changed) };
};

// ---- Captured logs

/** The stored log of an execution as lines [unix_s, level, text]; other lines have only a text. */
export const readLog = (log) =>
  log ? log.replace(/\n$/, "").split("\n").map(readLogLine) : [];

function readLogLine(line) {
  const [, at, level, text] = /^(\d{4}-\d\d-\d\dT\S+Z) (\S+) (.*)$/.exec(line) ?? [];
  return at ? [Date.parse(at) / 1000, level, text] : [null, null, line];
}

/** A stored log and live lines as one list: the snapshot ends within the live lines or before. */
export function joinLog(snapshot, live) {
  let shared = Math.min(snapshot.length, live.length);
  const isShared = ([, , text], i) => text === snapshot[snapshot.length - shared + i][2];
  while (shared && !live.slice(0, shared).every(isShared)) shared -= 1;
  return [...snapshot, ...live.slice(shared)].slice(-MAX_LOG_LINES);
}

// ---- Statistics

/** One bucket per minute, oldest first, gaps filled with zeros: {at, success, failed, other}. */
export function fillMinutes(buckets, now, minutes = 60) {
  const minuteOf = (ms) => Math.floor(ms / MINUTE);
  const known = new Map((buckets ?? []).map((one) => [minuteOf(Date.parse(one.minute)), one]));
  return Array.from({ length: minutes }, (_, i) => {
    const minute = minuteOf(now) - minutes + 1 + i;
    const { total = 0, success = 0, failed = 0 } = known.get(minute) ?? {};
    return { at: minute * MINUTE, success, failed, other: total - success - failed };
  });
}

/** Where `ms` lies on a logarithmic axis from `low` to `high`, 0..1. */
export const logPosition = (ms, low, high) =>
  Math.min(1, Math.max(0, Math.log(Math.max(ms, low) / low) / Math.log(high / low)));

// ---- Methods

export const methodsOf = (handler) => handler?.method_details ?? [];

export const isEmpty = (object) => Object.keys(object ?? {}).length === 0;

/** A call as it is written: chime(volume=3, *text*). */
export const signature = ({ name, parameters }) =>
  `${name}(${parameters.map(signaturePart).join(", ")})`;

const signaturePart = ({ name, required, default: preset = null }) =>
  required ? name : `${name}=${JSON.stringify(preset)}`;

// ---- The link to the server

/** The next state of the link after `happened`; `since` is when the state was entered. */
export function nextLink(link, happened, now) {
  const to = LINK[happened];
  const state = (typeof to === "string" ? to : (to[link.state] ?? to.other)) ?? link.state;
  return state === link.state ? link : { state, since: now };
}

const LINK = {
  opened: "live",
  unsupported: "polling",
  lost: { live: "connecting", other: "disconnected" },
  unreachable: { live: "live", other: "disconnected" },
  slept: "asleep",
  woke: { asleep: "connecting" },
};

/** How far the server's clock is ahead in ms; its Date has whole seconds: small steps are noise. */
export function nextOffset(offset, server, local) {
  const seen = server + 500 - local;
  return Math.abs(seen - offset) > 1_500 ? seen : offset;
}

/** The zone to tell times in; `choice` is the user's. */
export const chooseZone = (choice, serverZone, browserZone) =>
  ({ server: serverZone ?? browserZone, browser: browserZone })[choice] ?? "UTC";

/** Milliseconds to wait after the nth failure in a row; `chance` in 0..1 spreads the clients. */
export const backoff = (failures, chance) =>
  Math.min(15_000, 500 * 2 ** Math.min(failures - 1, 10)) * (0.5 + chance);

/** The complete server-sent events in `text`, and the rest, to put before the next chunk. */
export function parseEvents(text) {
  // The \n of a last \r may be in the next chunk.
  const end = text.endsWith("\r") ? text.length - 1 : text.length;
  const blocks = text.slice(0, end).replace(/\r\n?/g, "\n").split("\n\n");
  const rest = blocks.pop() + text.slice(end);
  return { events: blocks.map(parseEvent).filter(({ data }) => data), rest };
}

function parseEvent(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "data") event.data += (event.data && "\n") + value;
    else if (field === "event") event.name = value;
    else if (field === "id") event.id = value;
  }
  return event;
}

// ---- Finding

/** How well `text` answers `query`: 0 not at all; words in order of place, starts count double. */
export function matchScore(query, text) {
  const lower = text.toLowerCase();
  let score = 1;
  for (const word of query.toLowerCase().split(/\s+/).filter(Boolean)) {
    const at = lower.indexOf(word);
    if (at < 0) return 0;
    score += (at === 0 || /[\s_.\-/]/.test(lower[at - 1]) ? 2 : 1) * word.length - at / 100;
  }
  return score;
}

export const bestMatches = (query, items, limit = 12) =>
  items
    .map((item) => [matchScore(query, item.text), item])
    .filter(([score]) => score > 0)
    .sort(([a], [b]) => b - a)
    .slice(0, limit)
    .map(([, item]) => item);
