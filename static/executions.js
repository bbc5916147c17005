// Executions: the history with its filters, and the page of one execution with its live log.

import { h, lazy } from "./dom.js";
import {
  EXECUTION_STATUSES,
  firstLine,
  formatCount,
  formatDuration,
  formatJson,
  formatPlural,
  prettyJson,
} from "./format.js";
import {
  PAGE_ROWS,
  SPANS,
  executionsUrl,
  isEmpty,
  isFinal,
  isShown,
  joinLog,
  readLog,
  renderRoute,
  stateOfExecution,
  upsertExecution,
} from "./model.js";
import {
  button,
  call,
  cell,
  dim,
  empty,
  facts,
  filters,
  frame,
  handlerField,
  heading,
  link,
  missing,
  pages,
  row,
  searchField,
  select,
  state,
  table,
  tableFrame,
  tools,
  trail,
  unseenHeading,
  when,
} from "./pieces.js";

export const title = ({ route }) => (route.id == null ? "Executions" : `Execution ${route.id}`);

export function resources({ route, now }) {
  if (route.id == null) {
    const on = { execution: (data, changed) => changeRecords(data, changed, route.query) };
    return { executions: { url: executionsUrl(route.query, now), every: 5_000, on } };
  }
  const on = { execution: (data, changed) => mergeDetail(data, changed, route.id) };
  return { execution: { url: `/api/executions/${encodeURIComponent(route.id)}`, every: 500, on } };
}

/** New executions come in front of the newest page only. */
function changeRecords(data, changed, query) {
  const isKnown = data.records.some(({ execution_id: id }) => id === changed.execution_id);
  if (!isKnown && query.before) return data;
  return {
    ...data,
    records: upsertExecution(data.records, changed, isShown(query, changed), PAGE_ROWS),
  };
}

/** Events tell the execution, not its attempts: those are loaded when it changed its state. */
function mergeDetail(data, changed, id) {
  if (changed.execution_id !== id) return data;
  const isSame = changed.status === data.status && changed.attempt_number === data.attempt_number;
  return isSame ? { ...data, ...changed } : "reload";
}

export const render = (ctx) => (ctx.route.id == null ? renderList(ctx) : renderOne(ctx));

// ---- The history --------------------------------------------------------------------------------

function renderList(ctx) {
  const resource = ctx.get("executions");
  const { before } = ctx.route.query;
  return [
    unseenHeading("Executions"),
    toolbar(ctx),
    history(ctx, {
      title: "Executions",
      note: before && "older ones",
      resource,
      nothing: "no execution matches",
    }),
    resource?.data && pager(ctx.route, resource.data),
  ];
}

function toolbar(ctx) {
  const { query } = ctx.route;
  const chosen = (query.status ?? "").split(",");
  const spans = [["", "all times"], ...Object.keys(SPANS).map((span) => [span, `last ${span}`])];
  const chip = (name) =>
    h(
      "label",
      null,
      h("input", { type: "checkbox", name: "status", value: name, checked: chosen.includes(name) }),
      state(name),
    );
  return filters(
    searchField("schedule", "schedule id", query.schedule),
    handlerField(ctx),
    select({ name: "span", "aria-label": "Since" }, spans, query.span),
    h(
      "fieldset",
      { class: "chips" },
      h("legend", { class: "unseen" }, "Status"),
      EXECUTION_STATUSES.map(chip),
    ),
  );
}

function pager(route, { next_cursor: next }) {
  const { query } = route;
  const to = (before) => renderRoute({ ...route, query: { ...query, before } });
  return pages(
    [query.before && to(null), "« newest", "page-previous"],
    [next && to(next), "older ›", "page-next"],
  );
}

/** A frame with a table of executions; without `hasSchedule` the column is left out. */
export function history(ctx, { hasSchedule = true, resource, ...about }) {
  const heads = [
    ["state-of", "status"],
    ["name", "call"],
    hasSchedule && ["schedule-of", "schedule"],
    ["started", "scheduled"],
    ["took num", "took"],
    ["tries num", h("abbr", { title: "attempts" }, "try")],
    ["outcome", "outcome"],
  ].filter(Boolean);
  const rows = (resource?.data?.records ?? []).map((execution) =>
    historyRow(ctx, execution, hasSchedule),
  );
  const layout = {
    caption: `${about.title}, newest first`,
    wide: true,
    busy: resource?.loading,
    heads,
  };
  return tableFrame({ name: "history", resource, table: layout, ...about }, rows);
}

function historyRow(ctx, execution, hasSchedule) {
  const { execution_id: id, schedule_id, attempt_number: attempt } = execution;
  return row(
    "execution",
    id,
    cell(`state-of ${fresh(execution, ctx)}`, state(stateOfExecution(execution))),
    cell("name", link("executions", id, call(execution))),
    hasSchedule &&
      cell("schedule-of", schedule_id ? link("schedules", schedule_id) : dim("run now")),
    cell("started", when(execution.scheduled_at, ctx)),
    cell("num took", took(execution, ctx)),
    cell("num tries", attempt > 1 ? String(attempt) : dim(attempt || "–")),
    cell("outcome dim", outcome(execution, ctx)),
  );
}

const FRESH_MS = 2_000;

/** Marks what ended a moment ago, for a short glow. */
export const fresh = ({ completed_at: at }, { now }) =>
  at && now - Date.parse(at) < FRESH_MS ? "fresh" : "";

function took({ duration_ms: duration, status, started_at }, { now }) {
  if (duration != null) return formatDuration(duration);
  return status === "running" && started_at
    ? formatDuration(Math.max(0, now - Date.parse(started_at)))
    : dim("–");
}

const REASONS = {
  down: "the server was down",
  clock_step: "the clock was set",
  too_late: "too late to start",
  overlap: "the run before was not finished",
  handler_offline: "the handler was not connected",
};

/** How it ended, or how far it is, on one line. */
export function outcome(execution, ctx) {
  if (!isFinal(execution)) return progress(execution, ctx);
  const { status, result, error, reason, coalesced } = execution;
  const also = coalesced ? ` (stands for ${formatPlural(coalesced, "more fire")})` : "";
  if (status === "success") return formatJson(result ?? undefined, 160) + also;
  return firstLine(error ?? REASONS[reason] ?? reason) + also;
}

/** The progress a job told of itself, as a bar with its message. */
export function progress(execution, { progress: told }) {
  const { percent, message } = told.get(execution.execution_id) ?? execution.progress ?? {};
  if (isFinal(execution) || (percent == null && !message)) return null;
  return h(
    "span",
    { class: "progress" },
    percent != null && h("progress", { max: 100, value: percent, "aria-label": "progress" }),
    percent != null && h("span", { class: "num" }, `${Math.round(percent)} %`),
    message && dim(message),
  );
}

// ---- One execution ------------------------------------------------------------------------------

function renderOne(ctx) {
  const resource = ctx.get("execution");
  const head = trail(ctx, "executions", "Executions");
  if (!resource?.data) return [head, heading(`Execution ${ctx.route.id}`), missing(resource)];
  const execution = resource.data;
  const name = `${execution.handler_id}.${execution.method_name}`;
  return [
    head,
    heading(name, state(stateOfExecution(execution)), progress(execution, ctx), buttons(execution)),
    h("div", { class: "pair", "data-key": "pair" }, times(ctx, execution), end(execution)),
    execution.attempts?.length > 0 && attempts(ctx, execution.attempts),
    log(ctx, execution),
  ];
}

function buttons(execution) {
  const { execution_id: id } = execution;
  return tools(
    "execution",
    id,
    isFinal(execution)
      ? button("run-again", "run again", { data: { id }, class: "primary" })
      : button("cancel-execution", "cancel", { data: { id }, class: "danger" }),
  );
}

function times(ctx, execution) {
  const {
    schedule_id,
    scheduled_at,
    due_at,
    started_at,
    completed_at,
    deadline,
    coalesced,
    job_params: params,
  } = execution;
  const at = (iso) => iso && when(iso, ctx);
  return frame(
    { title: "Times", name: "times" },
    facts([
      ["execution", execution.execution_id],
      ["schedule", schedule_id ? link("schedules", schedule_id) : "none, run now"],
      ["handler", link("handlers", execution.handler_id)],
      ["scheduled", at(scheduled_at)],
      ["due", due_at !== scheduled_at && at(due_at)],
      ["start before", !started_at && at(deadline)],
      ["started", at(started_at)],
      ["completed", at(completed_at)],
      [execution.status === "running" ? "running for" : "took", took(execution, ctx)],
      ["stands for", coalesced > 0 && `${formatPlural(coalesced, "more fire")} missed before`],
      ["parameters", isEmpty(params) ? "none" : h("pre", null, prettyJson(params))],
    ]),
  );
}

function end(execution) {
  const { status, result, reason, error } = execution;
  if (!isFinal(execution)) return underWay(execution);
  if (status === "success") {
    return frame(
      { title: "Result", name: "outcome" },
      result == null ? empty("none") : h("pre", null, prettyJson(result)),
    );
  }
  return frame(
    { title: "Error", name: "error" },
    reason && h("p", { class: "dim" }, REASONS[reason] ?? reason),
    error && h("pre", null, error),
  );
}

function underWay({
  status,
  attempt_number: attempt,
  max_attempts: most = "?",
  instance,
  timeout,
  error,
}) {
  const isRunning = status === "running";
  return frame(
    { title: isRunning ? "Running" : "Waiting", name: "outcome" },
    facts([
      ["attempt", attempt ? `${attempt} of ${most}` : `none yet, of ${most}`],
      ["instance", isRunning && instance],
      ["timeout", timeout && formatDuration(timeout * 1000)],
      ["last error", error],
    ]),
  );
}

function attempts(ctx, list) {
  const heads = [
    ["index", "#"],
    ["state-of", "outcome"],
    ["started", "started"],
    ["took num", "took"],
    ["instance", "instance"],
    ["outcome", "error"],
  ];
  return frame(
    { title: "Attempts", name: "attempts", note: formatCount(list.length) },
    table(
      { caption: "Attempts", name: "tries", wide: true, heads },
      list.map((attempt) => attemptRow(ctx, attempt)),
    ),
  );
}

function attemptRow(
  ctx,
  { attempt_number: number, outcome: ended, started_at, ended_at, instance, error, traceback },
) {
  const lasted = ended_at ? formatDuration(Date.parse(ended_at) - Date.parse(started_at)) : "–";
  return h(
    "tr",
    { "data-key": number },
    cell("index", String(number)),
    cell("state-of", state(ended)),
    cell("started", when(started_at, ctx)),
    cell("num took", lasted),
    cell("instance dim", instance ?? "–"),
    cell(
      "outcome",
      error && firstLine(error, 400),
      traceback &&
        h(
          "details",
          { "data-key": "traceback" },
          h("summary", null, "traceback"),
          h("pre", null, traceback),
        ),
    ),
  );
}

function log(ctx, execution) {
  const lines = joinLog(readLog(execution.log), ctx.log);
  const isRunning = execution.status === "running";
  if (!lines.length && isFinal(execution)) return null;
  const about = {
    title: "Log",
    name: "log",
    note: lines.length > 0 && formatPlural(lines.length, "line"),
    aside: isRunning && ctx.link.state === "live" && state("live"),
  };
  return frame(
    about,
    lines.length ? logLines(ctx, lines, isRunning) : empty("nothing written yet"),
  );
}

function logLines({ times }, lines, isRunning) {
  const box = h("div", {
    class: "lines",
    "data-stick": isRunning,
    tabindex: "0",
    role: "log",
    "aria-label": "Log",
    "aria-live": "off",
  });
  return lazy(box, `${lines.length} ${lines.at(-1)} ${times.zone}`, () =>
    lines.map((line) => logLine(line, times)),
  );
}

const LOUD = { stderr: "yellow", WARNING: "yellow", ERROR: "red", CRITICAL: "red", DEBUG: "dim" };

const logLine = ([at, level, text], times) =>
  h(
    "div",
    { class: LOUD[level] },
    at != null && h("time", { class: "dim" }, times.clock(at * 1000)),
    level && level !== "stdout" && h("b", null, level),
    h("span", null, text),
  );
