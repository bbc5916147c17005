// The first view: is it well, what runs, what comes, what failed.

import { dayStrip, durationRanges, gauge, minuteBars } from "./charts.js";
import { h } from "./dom.js";
import { fresh, outcome, progress } from "./executions.js";
import {
  EXECUTION_STATUSES,
  firstLine,
  formatCount,
  formatDuration,
  formatPercent,
  formatPlural,
} from "./format.js";
import {
  fillMinutes,
  fillSlots,
  isFailed,
  isFinal,
  keepRecords,
  stateOfExecution,
  upsertExecution,
  wordsOf,
} from "./model.js";
import {
  button,
  call,
  cell,
  dim,
  empty,
  frame,
  link,
  missing,
  row,
  shape,
  state,
  tableFrame,
  unseenHeading,
  when,
} from "./pieces.js";

const RUNNING_ROWS = 20;
const LATELY_ROWS = 14;
const FAILED_ROWS = 5;
const NEXT_ROWS = 8;
const HANDLER_ROWS = 12;
const DURATION_ROWS = 6;
const DAY_ROWS = 200;
const PREVIEWED = 12;
const PREVIEWED_FIRES = 100; // a fire each quarter of an hour, for a day
const PREVIEW_MS = 900_000;
const ENDED = EXECUTION_STATUSES.slice(2).join();

export const title = () => "Overview";

export function resources({ get }) {
  return {
    ...previews(get("day")?.data?.schedules ?? []),
    stats: { url: "/api/executions/stats", every: 5_000, on: { execution: "reload" } },
    running: {
      url: `/api/executions?status=running,queued&limit=${RUNNING_ROWS}`,
      every: 2_000,
      on: { execution: keepRecords((execution) => !isFinal(execution), RUNNING_ROWS) },
    },
    lately: {
      url: `/api/executions?status=${ENDED}&limit=${LATELY_ROWS}`,
      every: 2_000,
      on: { execution: endedFirst },
    },
    failed: {
      url: `/api/executions/errors?limit=${FAILED_ROWS}`,
      every: 5_000,
      on: { execution: keepRecords(isFailed, FAILED_ROWS) },
    },
    day: {
      url: `/api/schedules?sort=next_fire_time&paused=false&limit=${DAY_ROWS}`,
      every: 30_000,
      on: { schedule: "reload" },
    },
    next: {
      url: `/api/schedules?sort=next_fire_time&paused=false&limit=${NEXT_ROWS}`,
      every: 2_000,
      on: { schedule: "reload", execution: "reload" },
    },
  };
}

/** The fires of the coming day, of those schedules that the page cannot work out itself. */
function previews(schedules) {
  const calendars = schedules.filter(
    ({ trigger_config: { type }, quarantined }) => type === "cron" && !quarantined,
  );
  return Object.fromEntries(
    calendars
      .slice(0, PREVIEWED)
      .map(({ id, trigger_config }) => [
        `fires of ${id}`,
        {
          url: "/api/triggers/preview",
          body: { trigger_config, count: PREVIEWED_FIRES },
          every: PREVIEW_MS,
          refresh: PREVIEW_MS,
        },
      ]),
  );
}

function endedFirst(data, execution) {
  const records = upsertExecution(data.records, execution, isFinal(execution), LATELY_ROWS);
  return {
    ...data,
    records: records
      .toSorted((a, b) => (a.completed_at < b.completed_at ? 1 : -1))
      .slice(0, LATELY_ROWS),
  };
}

export const render = (ctx) => [
  unseenHeading("Overview"),
  troubles(ctx),
  h("div", { class: "figures", "data-key": "figures" }, rate(ctx), outcomes(ctx), durations(ctx)),
  day(ctx),
  h(
    "div",
    { class: "lists", "data-key": "lists" },
    h("div", null, running(ctx), lately(ctx)),
    h("div", null, next(ctx), failures(ctx), handlers(ctx)),
  ),
];

// ---- Figures ------------------------------------------------------------------------------------

function troubles({ get }) {
  const { status, checks = {}, warnings = [] } = get("health")?.data ?? {};
  const bad = Object.entries(checks).filter(([, said]) => said !== "ok");
  if (!bad.length && !warnings.length) return null;
  const isIncident = (checks.recovery ?? "ok") !== "ok";
  const line = (name, said) =>
    h("li", null, state(status === "failed" ? "failed" : "degraded", name), " ", said);
  return frame(
    {
      title: `Health: ${status}`,
      name: "troubles",
      aside: isIncident && button("acknowledge", "acknowledge"),
    },
    h(
      "ul",
      null,
      bad.map(([name, said]) => line(name, said)),
      warnings.map((said) => line("warning", said)),
    ),
  );
}

function rate({ get, now, times }) {
  const stats = get("stats");
  return frame(
    { title: "Executions per minute", name: "rate" },
    missing(stats) ?? minuteBars(fillMinutes(stats.data.per_minute, now), times),
  );
}

function outcomes({ get }) {
  const stats = get("stats");
  return frame(
    { title: "Success", name: "outcomes" },
    missing(stats) ?? [share(stats.data), counts(stats.data)],
  );
}

const share = ({ success_rate: part }) => [
  h("p", { class: "figure" }, part == null ? dim("no runs yet") : formatPercent(part)),
  gauge(part, part == null ? "no runs yet" : `${formatPercent(part)} of runs succeeded`),
];

const counts = ({ by_status: by = {} }) =>
  h(
    "ul",
    { class: "counts" },
    EXECUTION_STATUSES.filter((name) => by[name]).map((name) =>
      h(
        "li",
        { "data-key": name },
        h("a", { href: `#/executions?status=${name}` }, state(name)),
        h("span", { class: "num" }, formatCount(by[name])),
      ),
    ),
  );

function durations({ get }) {
  const stats = get("stats");
  const rows = Object.entries(stats?.data?.by_handler ?? {})
    .filter(([, { duration_ms: duration }]) => duration?.p50 != null)
    .sort(([, a], [, b]) => b.total - a.total)
    .map(([name, { duration_ms: duration }]) => [name, duration]);
  return frame(
    { title: "Duration", name: "duration" },
    missing(stats) ??
      (rows.length
        ? durationRanges(rows.slice(0, DURATION_ROWS))
        : empty("no successful runs yet")),
  );
}

function day({ now, times, get }) {
  const resource = get("day");
  const { schedules = [], total = 0 } = resource?.data ?? {};
  const { slots, dense } = fillSlots(
    schedules,
    ({ id }) => get(`fires of ${id}`)?.data?.fire_times,
    now,
  );
  const notes = [
    total > schedules.length &&
      `the ${formatCount(schedules.length)} soonest of ${formatCount(total)} schedules`,
    dense > 0 &&
      `without ${formatCount(dense)} that ${dense === 1 ? "fires" : "fire"} every few minutes`,
  ];
  return frame(
    { title: "Next 24 hours", name: "day", note: notes.filter(Boolean).join("; ") },
    missing(resource) ?? dayStrip(slots, times),
  );
}

// ---- Lists --------------------------------------------------------------------------------------

const count = (items) => (items.length ? formatCount(items.length) : null);

function running(ctx) {
  const resource = ctx.get("running");
  const records = resource?.data?.records ?? [];
  const heads = [
    ["mark", "state"],
    ["name", "call"],
    ["grow", "progress"],
    ["end", "time"],
  ];
  const rows = records.map((execution) =>
    row(
      "execution",
      execution.execution_id,
      cell("mark", shape(stateOfExecution(execution))),
      cell("name", link("executions", execution.execution_id, call(execution))),
      cell("grow", progress(execution, ctx)),
      cell("end", elapsed(execution, ctx)),
    ),
  );
  return tableFrame(
    {
      title: "Running",
      name: "running",
      note: count(records),
      resource,
      nothing: "nothing runs",
      table: { wide: true, heads },
    },
    rows,
  );
}

function elapsed(execution, ctx) {
  if (execution.status === "running")
    return formatDuration(Math.max(0, ctx.now - Date.parse(execution.started_at)));
  return Date.parse(execution.due_at) > ctx.now
    ? when(execution.due_at, ctx, "rel")
    : dim("waiting");
}

function lately(ctx) {
  const resource = ctx.get("lately");
  const heads = [
    ["mark", "state"],
    ["name", "call"],
    ["grow", "outcome"],
    ["took num", "took"],
    ["end", "ended"],
  ];
  const rows = (resource?.data?.records ?? []).map((execution) =>
    row(
      "execution",
      execution.execution_id,
      cell(`mark ${fresh(execution, ctx)}`, shape(execution.status)),
      cell("name", link("executions", execution.execution_id, call(execution))),
      cell("grow dim", outcome(execution, ctx)),
      cell("num took", execution.duration_ms == null ? "" : formatDuration(execution.duration_ms)),
      cell("end", when(execution.completed_at, ctx, "abs")),
    ),
  );
  return tableFrame(
    {
      title: "Ended lately",
      name: "lately",
      aside: link("executions", null, "all"),
      resource,
      nothing: "nothing has run yet",
      table: { wide: true, heads },
    },
    rows,
  );
}

function next(ctx) {
  const resource = ctx.get("next");
  const heads = [
    ["name", "schedule"],
    ["grow", "trigger"],
    ["end", "fires"],
  ];
  const schedules = (resource?.data?.schedules ?? []).filter((schedule) => schedule.next_fire_time);
  const rows = schedules.map((schedule) =>
    row(
      "schedule",
      schedule.id,
      cell("name", link("schedules", schedule.id, schedule.name ?? schedule.id)),
      cell("grow dim", wordsOf(schedule, ctx.config)),
      cell("end", when(schedule.next_fire_time, ctx)),
    ),
  );
  return tableFrame(
    {
      title: "Fires next",
      name: "nexts",
      aside: button("new-schedule", "new schedule"),
      resource,
      nothing: ["no schedules yet. ", button("new-schedule", "create the first")],
      table: { wide: true, heads },
    },
    rows,
  );
}

function failures(ctx) {
  const resource = ctx.get("failed");
  const heads = [
    ["mark", "state"],
    ["name", "call"],
    ["grow", "error"],
    ["end", "ended"],
  ];
  const rows = (resource?.data?.records ?? [])
    .slice(0, FAILED_ROWS)
    .map((execution) =>
      row(
        "execution",
        execution.execution_id,
        cell("mark", shape(execution.status)),
        cell("name", link("executions", execution.execution_id, call(execution))),
        cell("grow dim", firstLine(execution.error)),
        cell("end", when(execution.completed_at, ctx, "rel")),
      ),
    );
  return tableFrame(
    {
      title: "Failed lately",
      name: "failed",
      resource,
      nothing: "nothing failed",
      table: { wide: true, heads },
    },
    rows,
  );
}

function handlers(ctx) {
  const resource = ctx.get("handlers");
  const list = resource?.data?.handlers ?? [];
  const heads = [
    ["mark", "state"],
    ["name", "handler"],
    ["grow", "methods"],
    ["end", "load"],
  ];
  const rows = list
    .slice(0, HANDLER_ROWS)
    .map((handler) =>
      row(
        "handler",
        handler.id,
        cell("mark", shape(handler.status)),
        cell("name", link("handlers", handler.id)),
        cell("grow dim", formatPlural(handler.methods.length, "method")),
        cell("end", `${formatCount(handler.running)} running`),
      ),
    );
  return tableFrame(
    {
      title: "Handlers",
      name: "workers",
      note: count(list),
      resource,
      nothing: "no handler has registered yet",
      table: { heads },
    },
    rows,
  );
}
