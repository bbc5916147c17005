// Executions: the history with its filters, and the page of one execution with its live log.

import { h, lazy } from "./dom.js";
import { EXECUTION_STATUSES, firstLine, formatCount, formatDuration, formatJson, formatPlural, prettyJson } from "./format.js";
import { SPANS, executionsUrl, isFinal, isShown, joinLog, readLog, renderRoute, stateOfExecution, upsertExecution } from "./model.js";
import { button, call, cell, empty, facts, frame, heading, link, missing, row, select, state, table, unseenHeading, when } from "./pieces.js";

export const title = ({ route }) => (route.id == null ? "Executions" : `Execution ${route.id}`);

export function resources({ route, now }) {
  if (route.id != null) {
    return {
      execution: {
        url: `/api/executions/${encodeURIComponent(route.id)}`, every: 500,
        on: { execution: (data, changed) => mergeDetail(data, changed, route.id) },
      },
    };
  }
  return {
    executions: {
      url: executionsUrl(route.query, now), every: 5_000,
      on: { execution: (data, changed) => ({ ...data, records: changedRecords(data.records, changed, route.query) }) },
    },
  };
}

/** New executions come in front of the newest page only. */
function changedRecords(records, changed, query) {
  const isKnown = records.some(({ execution_id: id }) => id === changed.execution_id);
  return isKnown || !query.before ? upsertExecution(records, changed, isShown(query, changed)) : records;
}

/** Events tell the execution, not its attempts: those are loaded when it changed its state. */
function mergeDetail(data, changed, id) {
  if (changed.execution_id !== id) return data;
  return changed.status === data.status && changed.attempt_number === data.attempt_number ? { ...data, ...changed } : "reload";
}

export const render = (ctx) => (ctx.route.id == null ? renderList(ctx) : renderOne(ctx));

// ---- The history --------------------------------------------------------------------------------

function renderList(ctx) {
  const resource = ctx.get("executions");
  const records = resource?.data?.records ?? [];
  const { route } = ctx;
  return [
    unseenHeading("Executions"),
    toolbar(ctx),
    frame({ title: "Executions", name: "list", note: route.query.before && "older ones" },
      missing(resource) ?? (records.length ? history(ctx, records, { busy: resource.loading }) : empty("no execution matches")),
      pager(route, resource?.data)),
  ];
}

function pager(route, data) {
  const { query } = route;
  if (!data || (!query.before && !data.next_cursor)) return null;
  const to = (before, label, id) => h("a", {
    id, href: before === undefined ? null : renderRoute({ ...route, query: { ...query, before } }), "aria-disabled": before === undefined ? "true" : null,
  }, label);
  return h("nav", { class: "pager", "aria-label": "Pages" },
    to(query.before ? "" : undefined, "« newest", "page-previous"), to(data.next_cursor ?? undefined, "older ›", "page-next"));
}

function toolbar({ route: { query }, get }) {
  const chosen = (query.status ?? "").split(",");
  const handlers = get("handlers")?.data?.handlers ?? [];
  return h("form", { class: "toolbar", role: "search", "data-form": "filter" },
    h("input", { type: "search", name: "schedule", id: "search", value: query.schedule ?? "", placeholder: "schedule id", "aria-label": "Schedule id", autocomplete: "off", spellcheck: "false" }),
    select({ name: "handler", "aria-label": "Handler" }, [["", "all handlers"], ...handlers.map(({ id }) => [id, id])], query.handler),
    select({ name: "span", "aria-label": "Since" }, [["", "all times"], ...Object.keys(SPANS).map((span) => [span, `last ${span}`])], query.span),
    h("fieldset", { class: "chips" }, h("legend", { class: "unseen" }, "Status"), EXECUTION_STATUSES.map((name) =>
      h("label", null, h("input", { type: "checkbox", name: "status", value: name, checked: chosen.includes(name) }), state(name)))));
}

/** A table of executions; `schedule: false` leaves out the column that would be the same in all. */
export function history(ctx, records, { schedule = true, busy } = {}) {
  if (!records.length) return empty("no executions yet");
  const heads = [["state-of", "status"], ["name", "call"], schedule && ["schedule-of", "schedule"], ["started", "scheduled"],
    ["took num", "took"], ["tries num", h("abbr", { title: "attempts" }, "try")], ["outcome", "outcome"]].filter(Boolean);
  return table({ caption: "Executions, newest first", name: "history", wide: true, busy, heads }, records.map((execution) => row("execution", execution.execution_id,
    cell(`state-of ${fresh(execution, ctx)}`, state(stateOfExecution(execution))),
    cell("name", link("executions", execution.execution_id, call(execution))),
    schedule && cell("schedule-of", execution.schedule_id ? link("schedules", execution.schedule_id) : h("span", { class: "dim" }, "run now")),
    cell("started", when(execution.scheduled_at, ctx)),
    cell("num took", took(execution, ctx)),
    cell("num tries", execution.attempt_number > 1 ? String(execution.attempt_number) : h("span", { class: "dim" }, execution.attempt_number || "–")),
    cell("outcome dim", outcome(execution, ctx)))));
}

const FRESH_MS = 2_000;

/** Marks what ended a moment ago, for a short glow. */
export const fresh = ({ completed_at: at }, { now }) => (at && now - Date.parse(at) < FRESH_MS ? "fresh" : "");

function took(execution, { now }) {
  if (execution.duration_ms != null) return formatDuration(execution.duration_ms);
  return execution.status === "running" && execution.started_at
    ? formatDuration(Math.max(0, now - Date.parse(execution.started_at))) : h("span", { class: "dim" }, "–");
}

const REASONS = {
  down: "the server was down", clock_step: "the clock was set", too_late: "too late to start",
  overlap: "the run before was not finished", handler_offline: "the handler was not connected",
};

/** The progress a job told of itself, as a bar with its message. */
export function progress(execution, { progress: told }) {
  const { percent, message } = told.get(execution.execution_id) ?? execution.progress ?? {};
  if (percent == null && !message) return null;
  return h("span", { class: "progress" },
    percent == null ? null : h("progress", { max: 100, value: percent, "aria-label": "progress" }),
    percent == null ? null : h("span", { class: "num" }, `${Math.round(percent)} %`),
    message && h("span", { class: "dim" }, message));
}

/** How it ended, or how far it is, on one line. */
export function outcome(execution, ctx) {
  if (!isFinal(execution)) return progress(execution, ctx);
  const also = execution.coalesced ? ` (stands for ${formatPlural(execution.coalesced, "more fire")})` : "";
  if (execution.status === "success") return formatJson(execution.result ?? undefined, 160) + also;
  return firstLine(execution.error ?? REASONS[execution.reason] ?? execution.reason ?? "") + also;
}

// ---- One execution ------------------------------------------------------------------------------

function renderOne(ctx) {
  const head = h("p", { class: "trail" }, h("a", { href: ctx.listHash("executions"), "data-back": true }, "‹ Executions"));
  const resource = ctx.get("execution");
  const waiting = missing(resource);
  if (waiting) return [head, heading(`Execution ${ctx.route.id}`), waiting];
  const execution = resource.data;
  return [
    head,
    heading(`${execution.handler_id}.${execution.method_name}`, state(stateOfExecution(execution)), progress(execution, ctx), tools(execution)),
    h("div", { class: "pair", "data-key": "pair" }, about(ctx, execution), ended(execution)),
    attempts(ctx, execution),
    log(ctx, execution),
  ];
}

const tools = (execution) => h("span", { class: "tools", "data-row": "execution", "data-id": execution.execution_id },
  isFinal(execution)
    ? button("run-again", "run again", { data: { id: execution.execution_id }, class: "primary" })
    : button("cancel-execution", "cancel", { data: { id: execution.execution_id }, class: "danger" }));

const about = (ctx, execution) => frame({ title: "Times", name: "about" }, facts([
  ["execution", execution.execution_id],
  ["schedule", execution.schedule_id ? link("schedules", execution.schedule_id) : "none, run now"],
  ["handler", link("handlers", execution.handler_id)],
  ["scheduled", when(execution.scheduled_at, ctx)],
  ["due", execution.due_at && execution.due_at !== execution.scheduled_at ? when(execution.due_at, ctx) : null],
  ["start before", !execution.started_at && execution.deadline ? when(execution.deadline, ctx) : null],
  ["started", execution.started_at ? when(execution.started_at, ctx) : null],
  ["completed", execution.completed_at ? when(execution.completed_at, ctx) : null],
  [execution.status === "running" ? "running for" : "took", took(execution, ctx)],
  ["stands for", execution.coalesced ? `${formatPlural(execution.coalesced, "more fire")} missed before` : null],
  ["parameters", Object.keys(execution.job_params ?? {}).length ? h("pre", null, prettyJson(execution.job_params)) : "none"],
]));

function ended(execution) {
  if (!isFinal(execution)) return underWay(execution);
  if (execution.status === "success") {
    return frame({ title: "Result", name: "outcome" }, execution.result == null ? empty("no result") : h("pre", null, prettyJson(execution.result)));
  }
  return frame({ title: "Error", name: "error" },
    execution.reason && h("p", { class: "dim" }, REASONS[execution.reason] ?? execution.reason),
    execution.error && h("pre", null, execution.error));
}

function underWay(execution) {
  const { status, attempt_number: attempt, max_attempts: most, instance, timeout, error } = execution;
  return frame({ title: status === "running" ? "Running" : "Waiting", name: "outcome" }, facts([
    ["attempt", attempt ? `${attempt} of ${most ?? "?"}` : `none yet, of ${most ?? "?"}`],
    ["instance", status === "running" ? instance : null],
    ["timeout", timeout && formatDuration(timeout * 1000)],
    ["last error", error],
  ]));
}

function attempts(ctx, execution) {
  const list = execution.attempts ?? [];
  if (!list.length) return null;
  const heads = [["index", "#"], ["state-of", "outcome"], ["started", "started"], ["took num", "took"], ["instance", "instance"], ["outcome", "error"]];
  const line = (attempt) => h("tr", { "data-key": attempt.attempt_number },
    cell("index", String(attempt.attempt_number)), cell("state-of", state(attempt.outcome)), cell("started", when(attempt.started_at, ctx)),
    cell("num took", attempt.ended_at ? formatDuration(Date.parse(attempt.ended_at) - Date.parse(attempt.started_at)) : "–"),
    cell("instance dim", attempt.instance ?? "–"),
    cell("outcome", attempt.error && firstLine(attempt.error, 400), attempt.traceback && h("details", { "data-key": "traceback" },
      h("summary", null, "traceback"), h("pre", null, attempt.traceback))));
  return frame({ title: "Attempts", name: "attempts", note: formatCount(list.length) },
    table({ caption: "Attempts", name: "tries", wide: true, heads }, list.map(line)));
}

function log(ctx, execution) {
  const lines = joinLog(readLog(execution.log), ctx.log);
  const aside = execution.status === "running" && ctx.link.state === "live" ? state("live") : null;
  if (!lines.length && isFinal(execution)) return null;
  return frame({ title: "Log", name: "log", aside, note: lines.length ? formatPlural(lines.length, "line") : null },
    lines.length ? lazy(h("div", { class: "lines", "data-stick": execution.status === "running", tabindex: "0", role: "log", "aria-label": "Log", "aria-live": "off" }),
      `${lines.length} ${lines.at(-1)} ${ctx.times.zone}`, () => lines.map((line) => logLine(line, ctx)))
      : empty("nothing written yet"));
}

const LOUD = { stderr: "yellow", WARNING: "yellow", ERROR: "red", CRITICAL: "red", DEBUG: "dim" };

const logLine = ([at, level, text], { times }) => h("div", { class: LOUD[level] ?? null },
  at == null ? null : h("time", { class: "dim" }, times.clock(at * 1000)), level && level !== "stdout" ? h("b", null, level) : null, h("span", null, text));
