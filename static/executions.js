// Executions: the history with its filters, and the page of one with its live log.

import { at } from "./api.js";
import { h, lazy } from "./dom.js";
import {
  EXECUTION_STATUSES, FAILED, firstLine, formatCount, formatDuration, formatJson, formatPlural,
  prettyJson,
} from "./format.js";
import {
  PAGE_ROWS, SPANS, executionsFilter, isFinal, joinLog, newest, readLog, renderQuery,
  stateOfExecution, waitsFor,
} from "./model.js";
import {
  agePages, button, call, dim, empty, facts, filterField, filters, frame, handlerField, heading,
  link, missing, pair, parameters, searchField, shape, state, table, tableFrame, tools, when,
} from "./pieces.js";

export function resources({ route: { id, query }, now }) {
  if (id != null)
    return { execution: { url: at("executions", id), every: 500, on: { execution: detailed } } };
  const { schedule: search, before } = query;
  const similar = `/api/schedules${renderQuery({ search, limit: 10 })}`;
  return {
    executions: newest(executionsFilter(query, now), PAGE_ROWS, { before }),
    ...(search && { similar: { url: similar, every: 60_000 } }),
  };
}

/** Events tell the execution, not its attempts: they load when its state changed. */
function detailed(data, changed) {
  if (changed.execution_id !== data.execution_id) return data;
  const isSame = changed.status === data.status && changed.attempt_number === data.attempt_number;
  return isSame ? { ...data, ...changed } : "reload";
}

// ---- Tables of executions

const REASONS = {
  down: "the server was down",
  clock_step: "the clock was set",
  too_late: "too late to start",
  overlap: "the last still ran",
  handler_offline: "the handler was not connected",
};

const columnsOf = (page) => ({
  mark: ["mark", "state", (one) => shape(stateOfExecution(one))],
  state: ["state-of", "status", (one) => state(stateOfExecution(one))],
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
  elapsed: ["end", "time", (one) => took(one, page)],
  ended: ["end", "ended", (one) => when(one.completed_at, page, "abs")],
  endedAgo: ["end", "ended", (one) => when(one.completed_at, page, "rel")],
});

/** A frame with the executions of a resource, by default the one named as the frame. */
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

/** How long it took, takes or waits. */
function took(execution, page) {
  const { duration_ms: duration, status, started_at: started, due_at: due } = execution;
  if (duration != null) return formatDuration(duration);
  if (isFinal(execution)) return dim("–");
  const since = (at) => formatDuration(Math.max(0, page.now - Date.parse(at)));
  if (status === "running") return since(started);
  return Date.parse(due) > page.now ? when(due, page, "rel") : dim(since(due));
}

function outcome(execution, page) {
  if (!isFinal(execution)) return progress(execution, page);
  const { status, result, error, reason, coalesced } = execution;
  const also = coalesced ? ` (stands for ${formatPlural(coalesced, "more fire")})` : "";
  if (status === "success") return formatJson(result ?? undefined, 160) + also;
  return firstLine(error ?? REASONS[reason] ?? reason) + also;
}

function progress(execution, page) {
  if (execution.status === "queued") return dim(waitsFor(execution, page));
  const told = page.progress.get(execution.execution_id) ?? execution.progress;
  const { percent, message } = told ?? {};
  if (isFinal(execution) || (percent == null && !message)) return null;
  return h("span.progress",
    percent != null && [
      h("progress", { max: 100, value: percent, "aria-label": "progress" }),
      h("span.num", `${Math.round(percent)} %`),
    ],
    message && dim(message));
}

// ---- The history

export function renderList(page) {
  const resource = page.get("executions");
  const note = page.route.query.before && "older ones";
  return [
    toolbar(page),
    history(page, { title: "Executions", note, resource, nothing: "no execution matches" }),
    agePages(page.route, resource?.data?.next_cursor),
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
    searchField("schedule", "schedule id", query.schedule, { list: "similar" }),
    h("datalist#similar", page.data("similar")?.schedules.map(({ id }) => h("option", id))),
    handlerField(page),
    filterField("span", "Since", spans, page),
    h("fieldset.chips", h("legend.unseen", "Status"), EXECUTION_STATUSES.map(chip)));
}

// ---- One execution

export function renderOne(page) {
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
    pair(callOf(page, execution), end(execution)),
    attempts?.some((one) => one.error) && attemptTable(page, attempts),
    log(page, execution),
  ];
}

function callOf(page, execution) {
  const { schedule_id, scheduled_at, due_at, started_at, coalesced, timeout } = execution;
  const { status, attempt_number: attempt, max_attempts: most = "?" } = execution;
  const isRunning = status === "running";
  const at = (iso) => iso && when(iso, page);
  return frame({ title: "Call" },
    facts([
      ["execution", execution.execution_id],
      ["schedule", schedule_id ? link("schedules", schedule_id) : "none, run now"],
      ["handler", link("handlers", execution.handler_id)],
      ["scheduled", at(scheduled_at)],
      ["due", !isFinal(execution) && due_at !== scheduled_at && at(due_at)],
      ["start before", !started_at && at(execution.deadline)],
      ["started", at(started_at)],
      ["completed", at(execution.completed_at)],
      [isRunning ? "running for" : "took", status !== "queued" && took(execution, page)],
      ["attempt", attempt > 0 && !isFinal(execution) && `${attempt} of ${most}`],
      ["instance", isRunning && execution.instance],
      ["timeout", isRunning && timeout && formatDuration(timeout * 1000)],
      ["stands for", coalesced > 0 && `${formatPlural(coalesced, "more fire")} missed before`],
      ["parameters", parameters(execution.job_params)],
    ]));
}

/** What came of it, if something has. */
function end({ status, result, reason, error }) {
  if (status === "success")
    return frame({ title: "Result" },
      result == null ? empty("none") : h("pre", prettyJson(result)));
  if (!reason && !error) return null;
  const title = { queued: "Last error" }[status] ?? (FAILED.includes(status) ? "Error" : "Reason");
  return frame({ title },
    reason && h("p.dim", REASONS[reason] ?? reason),
    error && h("pre", error));
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
  return frame(about,
    lines.length ? logLines(page, lines, isRunning) : empty("nothing written yet"));
}

function logLines({ times }, lines, isRunning) {
  const about = { role: "log", "aria-label": "Log", "aria-live": "off", tabindex: "0" };
  const box = h("div.lines", { "data-stick": isRunning, ...about });
  const isNamed = lines.some(([, level]) => level && level !== "stdout");
  return lazy(box, `${lines.length} ${lines.at(-1)} ${times.zone}`, () =>
    lines.map((line) => logLine(line, times, isNamed)));
}

const LOUD = { stderr: "yellow", WARNING: "yellow", ERROR: "red", CRITICAL: "red", DEBUG: "dim" };

const logLine = ([at, level, text], times, isNamed) =>
  h("div", { class: LOUD[level] },
    at != null && h("time.dim", times.clock(at * 1000)),
    isNamed && level && h("b", level !== "stdout" && level),
    h("span", text));
