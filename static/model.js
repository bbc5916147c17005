// What the page knows and how events change it. Pure: no DOM, no clock, no network.

import { FAILED_STATUSES } from "./format.js";

export const PAGE_ROWS = 50;
const MINUTE = 60_000;

// ---- Routes: the hash holds view, id and query --------------------------------------------------

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

/** The hash of a route; empty query values are left out. */
export function renderRoute({ view, id, query = {} }) {
  const search = renderQuery(query);
  return `#/${view}${id == null ? "" : `/${encodeURIComponent(id)}`}${search}`;
}

export function renderQuery(query) {
  const kept = Object.entries(query).filter(([, value]) => value != null && value !== "");
  return kept.length ? `?${new URLSearchParams(kept)}` : "";
}

// ---- Addresses of what a route shows ------------------------------------------------------------

export function schedulesUrl({ search, handler, state, sort, page }) {
  const offset = (Math.max(1, Number(page) || 1) - 1) * PAGE_ROWS;
  return `/api/schedules${renderQuery({
    search,
    handler_id: handler,
    paused: { paused: "true", active: "false" }[state],
    sort: sort || "next_fire_time",
    limit: PAGE_ROWS,
    offset: offset || null,
  })}`;
}

export const SPANS = { "1h": 60, "24h": 1440, "7d": 10_080 };

/** `now` is rounded down to minutes, so that the address stays the same between two renders. */
export function executionsUrl({ status, handler, schedule, span, before }, now) {
  const minutes = SPANS[span];
  const since = minutes && new Date((Math.floor(now / MINUTE) - minutes) * MINUTE).toISOString();
  return `/api/executions${renderQuery({
    status,
    handler_id: handler,
    schedule_id: schedule,
    since,
    limit: PAGE_ROWS,
    cursor: before,
  })}`;
}

// ---- Executions ---------------------------------------------------------------------------------

export const isFinal = (execution) =>
  execution.status !== "queued" && execution.status !== "running";
export const isFailed = (execution) => FAILED_STATUSES.includes(execution.status);

/** The state to show: a queued execution that has begun an attempt waits for its next one. */
export const stateOfExecution = (execution) =>
  execution.status === "queued" && execution.attempt_number > 0 ? "retrying" : execution.status;

export function stateOfSchedule(schedule) {
  if (schedule.quarantined) return "quarantined";
  if (schedule.paused) return "paused";
  return schedule.next_fire_time ? "active" : "finished";
}

/** The trigger in words, without the zone if that is the server's own. */
export function wordsOf({ description, trigger }, config) {
  const own = ` ${config?.timezone}`;
  return description?.endsWith(own) ? description.slice(0, -own.length) : (description ?? trigger);
}

/** Whether a history filtered by the query of the executions view shows this execution. */
export function isShown({ status, handler, schedule }, execution) {
  return (
    (!status || status.split(",").includes(execution.status)) &&
    (!handler || handler === execution.handler_id) &&
    (!schedule || schedule === execution.schedule_id)
  );
}

/** `rows` with `execution` replaced, added in front or removed; newest first, at most `limit`. */
export function upsertExecution(rows, execution, shown, limit = PAGE_ROWS) {
  const at = rows.findIndex((row) => row.execution_id === execution.execution_id);
  if (!shown) return at < 0 ? rows : rows.toSpliced(at, 1);
  if (at >= 0) return rows.with(at, { ...rows[at], ...execution });
  return [execution, ...rows].slice(0, Math.max(limit, rows.length));
}

/** What an execution event does to a list of at most `limit` records that holds what `isWanted`. */
export const keepRecords = (isWanted, limit) => (data, execution) => ({
  ...data,
  records: upsertExecution(data.records, execution, isWanted(execution), limit),
});

// ---- Captured logs ------------------------------------------------------------------------------

export const MAX_LOG_LINES = 3_000;

/** The stored log of an execution as lines [unix_s, level, text]; other lines have only a text. */
export function readLog(log) {
  return log ? log.replace(/\n$/, "").split("\n").map(readLogLine) : [];
}

function readLogLine(line) {
  const [, at, level, text] = /^(\d{4}-\d\d-\d\dT\S+Z) (\S+) (.*)$/.exec(line) ?? [
    null,
    null,
    null,
    line,
  ];
  return [at && Date.parse(at) / 1000, level, text];
}

/** The lines of a stored log and of live events as one list, without what both hold. Lines are
 *  [unix_s, level, text]; the snapshot ends somewhere within the live lines or before them. */
export function joinLog(snapshot, live) {
  const [head, tail] = [snapshot, live].map((lines) => lines.map(([, , text]) => text));
  for (let size = Math.min(head.length, tail.length); size > 0; size -= 1) {
    if (tail.slice(0, size).every((line, i) => line === head[head.length - size + i])) {
      return [...snapshot, ...live.slice(size)].slice(-MAX_LOG_LINES);
    }
  }
  return [...snapshot, ...live].slice(-MAX_LOG_LINES);
}

// ---- Statistics ---------------------------------------------------------------------------------

/** One bucket per minute, oldest first, gaps filled with zeros: {at, success, failed, other}. */
export function fillMinutes(buckets, now, minutes = 60) {
  const last = Math.floor(now / MINUTE);
  const known = new Map(
    (buckets ?? []).map((bucket) => [Math.floor(Date.parse(bucket.minute) / MINUTE), bucket]),
  );
  return Array.from({ length: minutes }, (_, i) => {
    const minute = last - minutes + 1 + i;
    const { total = 0, success = 0, failed = 0 } = known.get(minute) ?? {};
    return { at: minute * MINUTE, success, failed, other: total - success - failed };
  });
}

/** Where `ms` lies on a logarithmic axis from `low` to `high`, 0..1. */
export const logPosition = (ms, low, high) =>
  Math.min(1, Math.max(0, Math.log(Math.max(ms, low) / low) / Math.log(high / low)));

const UNITS_MS = {
  weeks: 604_800_000,
  days: 86_400_000,
  hours: 3_600_000,
  minutes: MINUTE,
  seconds: 1_000,
};

/** Milliseconds between two fires of an interval schedule; 0 for every other kind. */
export function intervalMs({ trigger_config: config }) {
  if (config?.type !== "interval") return 0;
  return Object.entries(UNITS_MS).reduce(
    (sum, [unit, ms]) => sum + ms * (Number(config[unit]) || 0),
    0,
  );
}

/** The known fires of a schedule from `first` to `end` in ms. Of intervals all are known, of what
 *  `told` (a preview) tells those, else the next; null if they are too dense for the slots. */
export function knownFires(schedule, told, first, end, slotMs) {
  const next = Date.parse(schedule.next_fire_time);
  const step = intervalMs(schedule);
  if (step && step < slotMs) return null;
  const ahead = told?.map(({ at }) => Date.parse(at)) ?? [];
  if (
    ahead.length > 1 &&
    ahead.at(-1) < end &&
    (ahead.at(-1) - ahead[0]) / (ahead.length - 1) < slotMs
  )
    return null;
  for (let fire = next + step; step && fire < end; fire += step) ahead.push(fire);
  return [...new Set([next, ...ahead])].filter((fire) => fire >= first && fire < end);
}

/** Fires per slot of the coming span, and how many schedules fire too often to be shown there:
 *  {slots: [{at, count, names}], dense}. `toldOf(schedule)` is its preview, if there is one. */
export function fillSlots(schedules, toldOf, now, count = 96, slotMs = 15 * MINUTE) {
  const first = Math.floor(now / slotMs) * slotMs;
  const slots = Array.from({ length: count }, (_, i) => ({
    at: first + i * slotMs,
    count: 0,
    names: new Set(),
  }));
  let dense = 0;
  for (const schedule of schedules) {
    const fires = knownFires(schedule, toldOf(schedule), first, first + count * slotMs, slotMs);
    if (!fires) dense += 1;
    for (const fire of fires ?? []) {
      const slot = slots[Math.floor((fire - first) / slotMs)];
      slot.count += 1;
      slot.names.add(schedule.name ?? schedule.id);
    }
  }
  return { slots, dense };
}

// ---- Parameters of methods ----------------------------------------------------------------------

/** A handler's methods as [{name, doc, parameters}], whatever the handler told about them. */
export function methodsOf(handler) {
  const told = new Map((handler?.method_details ?? []).map((method) => [method.name, method]));
  const names = handler?.methods ?? [...told.keys()];
  return names.map((name) => ({ name, doc: "", parameters: [], ...told.get(name) }));
}

export const isEmpty = (object) => Object.keys(object ?? {}).length === 0;

/** A call as it is written: chime(volume=3, *text*). */
export const signature = ({ name, parameters }) =>
  `${name}(${parameters.map(signaturePart).join(", ")})`;

const signaturePart = ({ name, required, default: preset = null }) =>
  required ? name : `${name}=${JSON.stringify(preset)}`;

// ---- The link to the server ---------------------------------------------------------------------

/** The next state of the link after `happened`; `since` is when the state was entered. */
export function nextLink(link, happened, now) {
  const state = LINK[happened]?.[link.state] ?? link.state;
  return state === link.state ? link : { state, since: now };
}

const everywhere = (state) =>
  Object.fromEntries(
    ["connecting", "live", "polling", "disconnected", "asleep"].map((from) => [from, state]),
  );

const LINK = {
  opened: everywhere("live"),
  unsupported: everywhere("polling"),
  lost: { ...everywhere("disconnected"), live: "connecting" },
  unreachable: { ...everywhere("disconnected"), live: "live" },
  slept: everywhere("asleep"),
  woke: { asleep: "connecting" },
};

/** How far the server's clock is ahead of ours in ms; its Date has whole seconds, so small steps
 *  are noise. */
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

/** Server-sent events from `text`: the complete ones, and the rest to put before the next chunk. */
export function parseEvents(text) {
  // The \n of a last \r may be in the next chunk.
  const end = text.endsWith("\r") ? text.length - 1 : text.length;
  const blocks = text.slice(0, end).replace(/\r\n?/g, "\n").split("\n\n");
  const rest = blocks.pop() + text.slice(end);
  return { events: blocks.map(parseEvent).filter(Boolean), rest };
}

function parseEvent(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^([^:]*):? ?(.*)$/.exec(line);
    if (field === "data") event.data += (event.data && "\n") + value;
    else if (field === "event") event.name = value;
    else if (field === "id") event.id = value;
  }
  return event.data ? event : null;
}

// ---- Finding ------------------------------------------------------------------------------------

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

/** The best answers first, at most `limit`. */
export const bestMatches = (query, items, limit = 12) =>
  items
    .map((item) => [matchScore(query, item.text), item])
    .filter(([score]) => score > 0)
    .sort(([a], [b]) => b - a)
    .slice(0, limit)
    .map(([, item]) => item);
