// Executions: the history with its filters, and the page of one execution with its live log.

import { at } from "./api.js";
import { h, lazy } from "./dom.js";
import {
  EXECUTION_STATUSES, firstLine, formatCount, formatDuration, formatJson, formatPlural, prettyJson,
} from "./format.js";
import {
  PAGE_ROWS, SPANS, executionsUrl, isEmpty, isFinal, isShown, joinLog, readLog, renderRoute,
  stateOfExecution, upsertExecution,
} from "./model.js";
import {
  button, call, dim, empty, facts, filterField, filters, frame, handlerField, heading, link,
  missing, pages, pair, searchField, shape, state, table, tableFrame, tools, unseenHeading, when,
} from "./pieces.js";

export const title = ({ id }) => (id == null ? "Executions" : `Execution ${id}`);

export const resources = ({ route: { id, query }, now }) =>
  id == null
    ? { executions: watch(executionsUrl(query, now), 5_000, listed(query)) }
    : { execution: watch(at("executions", id), 500, detailed) };

const watch = (url, every, execution) => ({ url, every, on: { execution } });

/** New executions come in front of the newest page only. */
const listed = (query) => (data, changed) => {
  const isKnown = data.records.some(({ execution_id: id }) => id === changed.execution_id);
  if (!isKnown && query.before) return data;
  const records = upsertExecution(data.records, changed, isShown(query, changed), PAGE_ROWS);
  return { ...data, records };
};

/** Events tell the execution, not its attempts: those are loaded when it changed its state. */
function detailed(data, changed) {
  if (changed.execution_id !== data.execution_id) return data;
  const isSame = changed.status === data.status && changed.attempt_number === data.attempt_number;
  return isSame ? { ...data, ...changed } : "reload";
}

export const render = (page) => (page.route.id == null ? renderList(page) : renderOne(page));

// ---- Tables of executions

const FRESH_MS = 2_000;
const REASONS = {
  down: "the server was down",
  clock_step: "the clock was set",
  too_late: "too late to start",
  overlap: "the run before was not finished",
  handler_offline: "the handler was not connected",
};

const columnsOf = (page) => ({
  mark: ["mark", "state", (one) => fresh(one, page, shape(stateOfExecution(one)))],
  state: ["state-of", "status", (one) => fresh(one, page, state(stateOfExecution(one)))],
  call: ["name", "call", (one) => link("executions", one.execution_id, call(one))],
  schedule: ["schedule-of", "schedule", ({ schedule_id: id }) =>
    id ? link("schedules", id) : dim("run now")],
  scheduled: ["started", "scheduled", (one) => when(one.scheduled_at, page)],
  took: ["took num", "took", (one) => took(one, page)],
  tries: ["tries num", h("abbr", { title: "attempts" }, "try"), ({ attempt_number: attempt }) =>
    attempt > 1 ? String(attempt) : dim(attempt || "–")],
  outcome: ["outcome dim", "outcome", (one) => outcome(one, page)],
  ending: ["grow dim", "outcome", (one) => outcome(one, page)],
  progress: ["grow", "progress", (one) => progress(one, page)],
  elapsed: ["end", "time", (one) => elapsed(one, page)],
  ended: ["end", "ended", (one) => when(one.completed_at, page, "abs")],
  endedAgo: ["end", "ended", (one) => when(one.completed_at, page, "rel")],
});

/** A frame with the executions of a resource, by default the one named as the frame; `columns` are
 *  names of those above. */
export function executionTable(page, { name, resource = page.get(name), ...about }, columns) {
  const known = columnsOf(page);
  const records = { kind: "execution", idOf: (one) => one.execution_id };
  const shown = columns.map((column) => known[column]);
  return tableFrame({ resource, name, ...records, ...about }, shown, resource?.data?.records);
}

export const history = (page, about, ...left) =>
  executionTable(page, { name: "history", caption: `${about.title}, newest first`, ...about },
    ["state", "call", "schedule", "scheduled", "took", "tries", "outcome"]
      .filter((name) => !left.includes(name)));

/** What ended a moment ago glows for a short while. */
const fresh = ({ completed_at: at }, { now }, content) =>
  h("span", { class: at && now - Date.parse(at) < FRESH_MS && "fresh" }, content);

function took({ duration_ms: duration, status, started_at: started }, { now }) {
  if (duration != null) return formatDuration(duration);
  const isRunning = status === "running" && started;
  return isRunning ? formatDuration(Math.max(0, now - Date.parse(started))) : dim("–");
}

function elapsed(execution, page) {
  if (execution.status === "running") return took(execution, page);
  const { due_at: due } = execution;
  return Date.parse(due) > page.now ? when(due, page, "rel") : dim("waiting");
}

/** How it ended, or how far it is, on one line. */
function outcome(execution, page) {
  if (!isFinal(execution)) return progress(execution, page);
  const { status, result, error, reason, coalesced } = execution;
  const also = coalesced ? ` (stands for ${formatPlural(coalesced, "more fire")})` : "";
  if (status === "success") return formatJson(result ?? undefined, 160) + also;
  return firstLine(error ?? REASONS[reason] ?? reason) + also;
}

/** The progress a job told of itself, as a bar with its message. */
function progress(execution, { progress: told }) {
  const { percent, message } = told.get(execution.execution_id) ?? execution.progress ?? {};
  if (isFinal(execution) || (percent == null && !message)) return null;
  return h("span.progress",
    percent != null && [
      h("progress", { max: 100, value: percent, "aria-label": "progress" }),
      h("span.num", `${Math.round(percent)} %`),
    ],
    message && dim(message));
}

// ---- The history

function renderList(page) {
  const resource = page.get("executions");
  const note = page.route.query.before && "older ones";
  return [
    unseenHeading("Executions"),
    toolbar(page),
    history(page, { title: "Executions", note, resource, nothing: "no execution matches" }),
    resource?.data && pager(page.route, resource.data),
  ];
}

function toolbar(page) {
  const { query } = page.route;
  const chosen = (query.status ?? "").split(",");
  const spans = [["", "all times"], ...Object.keys(SPANS).map((span) => [span, `last ${span}`])];
  const chip = (value) =>
    h("label",
      h("input", { type: "checkbox", name: "status", value, checked: chosen.includes(value) }),
      state(value));
  return filters(
    searchField("schedule", "schedule id", query.schedule),
    handlerField(page),
    filterField("span", "Since", spans, page),
    h("fieldset.chips", h("legend.unseen", "Status"), EXECUTION_STATUSES.map(chip)));
}

function pager(route, { next_cursor: next }) {
  const to = (before) => renderRoute({ ...route, query: { ...route.query, before } });
  return pages(
    [route.query.before && to(null), "« newest", "previous"],
    [next && to(next), "older ›", "next"]);
}

// ---- One execution

function renderOne(page) {
  const resource = page.get("execution");
  if (!resource?.data) return [heading(page, `Execution ${page.route.id}`), missing(resource)];
  const execution = resource.data;
  const { execution_id: id, handler_id, method_name, attempts } = execution;
  const verb = isFinal(execution)
    ? button("run-again", "run again", { class: "primary" })
    : button("cancel-execution", "cancel", { class: "danger" });
  return [
    heading(page, `${handler_id}.${method_name}`,
      state(stateOfExecution(execution)), progress(execution, page), tools("execution", id, verb)),
    pair(times(page, execution), isFinal(execution) ? end(execution) : underWay(execution)),
    attempts?.some(({ outcome }) => !["success", "running"].includes(outcome))
      && attemptTable(page, attempts),
    log(page, execution),
  ];
}

function times(page, execution) {
  const { schedule_id, scheduled_at, due_at, started_at, coalesced, job_params } = execution;
  const at = (iso) => iso && when(iso, page);
  return frame({ title: "Times" },
    facts([
      ["execution", execution.execution_id],
      ["schedule", schedule_id ? link("schedules", schedule_id) : "none, run now"],
      ["handler", link("handlers", execution.handler_id)],
      ["scheduled", at(scheduled_at)],
      ["due", due_at !== scheduled_at && at(due_at)],
      ["start before", !started_at && at(execution.deadline)],
      ["started", at(started_at)],
      ["completed", at(execution.completed_at)],
      [execution.status === "running" ? "running for" : "took", took(execution, page)],
      ["stands for", coalesced > 0 && `${formatPlural(coalesced, "more fire")} missed before`],
      ["parameters", isEmpty(job_params) ? "none" : h("pre", prettyJson(job_params))],
    ]));
}

function end({ status, result, reason, error }) {
  if (status === "success")
    return frame({ title: "Result", name: "outcome" },
      result == null ? empty("none") : h("pre", prettyJson(result)));
  return frame({ title: "Error" },
    reason && h("p.dim", REASONS[reason] ?? reason),
    error && h("pre", error));
}

function underWay({ status, attempt_number, max_attempts = "?", instance, timeout, error }) {
  const isRunning = status === "running";
  return frame({ title: isRunning ? "Running" : "Waiting", name: "outcome" },
    facts([
      ["attempt", `${attempt_number || "none yet,"} of ${max_attempts}`],
      ["instance", isRunning && instance],
      ["timeout", timeout && formatDuration(timeout * 1000)],
      ["last error", error],
    ]));
}

function attemptTable(page, attempts) {
  const lasted = ({ started_at: from, ended_at: to }) =>
    to ? formatDuration(Date.parse(to) - Date.parse(from)) : "–";
  const columns = [
    ["index", "#", (one) => String(one.attempt_number)],
    ["state-of", "outcome", (one) => state(one.outcome)],
    ["started", "started", (one) => when(one.started_at, page)],
    ["took num", "took", lasted],
    ["instance dim", "instance", (one) => one.instance ?? "–"],
    ["outcome", "error", ({ error, traceback }) => [
      error && firstLine(error, 400),
      traceback && h("details", h("summary", "traceback"), h("pre", traceback)),
    ]],
  ];
  const about = { caption: "Attempts", name: "tries", idOf: (one) => one.attempt_number };
  return frame({ title: about.caption, name: "attempts", note: formatCount(attempts.length) },
    table(about, columns, attempts));
}

function log(page, execution) {
  const lines = joinLog(readLog(execution.log), page.log);
  const isRunning = execution.status === "running";
  if (!lines.length && isFinal(execution)) return null;
  const about = {
    title: "Log",
    note: lines.length > 0 && formatPlural(lines.length, "line"),
    aside: isRunning && page.link.state === "live" && state("live"),
  };
  const content = () => logLines(page, lines, isRunning);
  return frame(about, lines.length ? content() : empty("nothing written yet"));
}

function logLines({ times }, lines, isRunning) {
  const about = { role: "log", "aria-label": "Log", "aria-live": "off", tabindex: "0" };
  const box = h("div.lines", { "data-stick": isRunning, ...about });
  return lazy(box, `${lines.length} ${lines.at(-1)} ${times.zone}`, () =>
    lines.map((line) => logLine(line, times)));
}

const LOUD = { stderr: "yellow", WARNING: "yellow", ERROR: "red", CRITICAL: "red", DEBUG: "dim" };

const logLine = ([at, level, text], times) =>
  h("div", { class: LOUD[level] },
    at != null && h("time.dim", times.clock(at * 1000)),
    level && level !== "stdout" && h("b", level),
    h("span", text));
