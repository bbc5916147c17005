// The first view: is it well, what runs, what comes, what failed.

import { dayStrip, durationRanges, gauge, minuteBars } from "./charts.js";
import { h } from "./dom.js";
import { formatCount, formatDuration, formatPercent, formatPlural, firstLine, EXECUTION_STATUSES } from "./format.js";
import { fillMinutes, fillSlots, isFailed, isFinal, stateOfExecution, upsertExecution, wordsOf } from "./model.js";
import { fresh, outcome, progress } from "./executions.js";
import { button, call, cell, empty, frame, link, missing, row, shape, state, table, unseenHeading, when } from "./pieces.js";

const RUNNING_ROWS = 20;
const LATELY_ROWS = 14;
const FAILED_ROWS = 5;
const ENDED = EXECUTION_STATUSES.slice(2).join(",");
const NEXT_ROWS = 8;
const DAY_ROWS = 200;
const PREVIEWED = 12;
const PREVIEWED_FIRES = 100; // a fire each quarter of an hour, for a day
const PREVIEW_MS = 900_000;

export const title = () => "Overview";

export function resources({ get }) {
  const previewed = (get("day")?.data?.schedules ?? []).filter(({ trigger_config: config, quarantined }) => config.type === "cron" && !quarantined).slice(0, PREVIEWED);
  return {
    ...Object.fromEntries(previewed.map(({ id, trigger_config }) => [`fires of ${id}`, {
      url: "/api/triggers/preview", body: { trigger_config, count: PREVIEWED_FIRES }, every: PREVIEW_MS, refresh: PREVIEW_MS,
    }])),
    stats: { url: "/api/executions/stats", on: { execution: "reload" }, every: 5_000 },
    running: {
      url: `/api/executions?status=running,queued&limit=${RUNNING_ROWS}`, every: 2_000,
      on: { execution: (data, execution) => ({ ...data, records: upsertExecution(data.records, execution, !isFinal(execution), RUNNING_ROWS) }) },
    },
    lately: {
      url: `/api/executions?status=${ENDED}&limit=${LATELY_ROWS}`, every: 2_000,
      on: { execution: (data, execution) => ({ ...data, records: endedFirst(data.records, execution) }) },
    },
    failed: {
      url: `/api/executions/errors?limit=${FAILED_ROWS}`, every: 5_000,
      on: { execution: (data, execution) => ({ ...data, records: upsertExecution(data.records, execution, isFailed(execution), FAILED_ROWS).slice(0, FAILED_ROWS) }) },
    },
    day: {
      url: `/api/schedules?sort=next_fire_time&paused=false&limit=${DAY_ROWS}`, every: 30_000, on: { schedule: "reload" },
    },
    next: {
      url: `/api/schedules?sort=next_fire_time&paused=false&limit=${NEXT_ROWS}`, every: 2_000,
      on: { schedule: "reload", execution: "reload" },
    },
  };
}

export function render(ctx) {
  const stats = ctx.get("stats");
  return [
    unseenHeading("Overview"),
    troubles(ctx),
    h("div", { class: "figures", "data-key": "figures" }, rate(ctx, stats), outcomes(stats), durations(stats)),
    strip(ctx),
    h("div", { class: "lists", "data-key": "lists" },
      h("div", null, running(ctx), lately(ctx)),
      h("div", null, next(ctx), failures(ctx), handlers(ctx))),
  ];
}

const endedFirst = (records, execution) =>
  upsertExecution(records, execution, isFinal(execution), LATELY_ROWS)
    .toSorted((a, b) => (a.completed_at < b.completed_at ? 1 : -1)).slice(0, LATELY_ROWS);

function troubles({ get }) {
  const health = get("health")?.data;
  const bad = Object.entries(health?.checks ?? {}).filter(([, said]) => said !== "ok");
  if (!bad.length) return null;
  return frame({ title: `Health: ${health.status}`, name: "troubles" },
    h("ul", null, bad.map(([name, said]) => h("li", null, state(health.status === "ok" ? "degraded" : health.status, name), " ", String(said)))));
}

const rate = ({ now, times }, stats) =>
  frame({ title: "Executions per minute", name: "rate" },
    missing(stats) ?? minuteBars(fillMinutes(stats.data.per_minute, now), times));

function outcomes(stats) {
  const waiting = missing(stats);
  if (waiting) return frame({ title: "Success", name: "outcomes" }, waiting);
  const { success_rate: share, by_status: counts = {} } = stats.data;
  const ended = EXECUTION_STATUSES.filter((name) => counts[name]);
  return frame({ title: "Success", name: "outcomes" },
    h("p", { class: "figure" }, share == null ? h("span", { class: "dim" }, "no runs yet") : formatPercent(share)),
    gauge(share, share == null ? "no runs yet" : `${formatPercent(share)} of runs succeeded`),
    h("ul", { class: "counts" }, ended.map((name) => h("li", { "data-key": name },
      h("a", { href: `#/executions?status=${name}` }, state(name)), h("span", { class: "num" }, formatCount(counts[name]))))));
}

function durations(stats) {
  const waiting = missing(stats);
  const busiest = Object.entries(stats?.data?.by_handler ?? {}).sort(([, a], [, b]) => b.total - a.total);
  const rows = busiest.map(([name, tally]) => [name, tally.duration_ms]);
  const known = rows.filter(([, duration]) => duration?.p50 != null).slice(0, 6);
  return frame({ title: "Duration", name: "duration" },
    waiting ?? (known.length ? durationRanges(known) : empty("no successful runs yet")));
}

function strip({ now, times, get }) {
  const resource = get("day");
  const { schedules = [], total: all = 0 } = resource?.data ?? {};
  const { slots, dense } = fillSlots(schedules, ({ id }) => get(`fires of ${id}`)?.data?.fire_times, now);
  const notes = [
    all > schedules.length && `the ${formatCount(schedules.length)} soonest of ${formatCount(all)} schedules`,
    dense > 0 && `without ${formatCount(dense)} that ${dense === 1 ? "fires" : "fire"} every few minutes`,
  ];
  return frame({ title: "Next 24 hours", name: "day", note: notes.filter(Boolean).join("; ") || null },
    missing(resource) ?? dayStrip(slots, times));
}

function running(ctx) {
  const resource = ctx.get("running");
  const records = resource?.data?.records ?? [];
  const rows = records.map((execution) => row("execution", execution.execution_id,
    cell("mark", shape(stateOfExecution(execution))),
    cell("name", link("executions", execution.execution_id, call(execution))),
    cell("grow", progress(execution, ctx)),
    cell("end", elapsed(execution, ctx))));
  return frame({ title: "Running", name: "running", note: count(records) },
    missing(resource) ?? (rows.length
      ? table({ caption: "Executions that run or wait", name: "runs", wide: true, heads: [["mark", "state"], ["name", "call"], ["grow", "progress"], ["end", "time"]] }, rows)
      : empty("nothing runs")));
}

const count = (records) => (records.length ? formatCount(records.length) : null);

function elapsed(execution, { now, times }) {
  if (execution.status === "running") return formatDuration(Math.max(0, now - Date.parse(execution.started_at)));
  if (Date.parse(execution.due_at) > now) return when(execution.due_at, { now, times }, "rel");
  return h("span", { class: "dim" }, "waiting");
}

function lately(ctx) {
  const resource = ctx.get("lately");
  const rows = (resource?.data?.records ?? []).map((execution) => row("execution", execution.execution_id,
    cell(`mark ${fresh(execution, ctx)}`, shape(execution.status)),
    cell("name", link("executions", execution.execution_id, call(execution))),
    cell("grow dim", outcome(execution, ctx)),
    cell("num took", execution.duration_ms == null ? "" : formatDuration(execution.duration_ms)),
    cell("end", when(execution.completed_at, ctx, "abs"))));
  return frame({ title: "Ended lately", name: "lately", aside: link("executions", null, "all") },
    missing(resource) ?? (rows.length
      ? table({ caption: "Executions that ended lately", name: "latest", wide: true, heads: [["mark", "state"], ["name", "call"], ["grow", "outcome"], ["took num", "took"], ["end", "ended"]] }, rows)
      : empty("nothing has run yet")));
}

function next(ctx) {
  const resource = ctx.get("next");
  const schedules = (resource?.data?.schedules ?? []).filter((schedule) => schedule.next_fire_time);
  const rows = schedules.map((schedule) => row("schedule", schedule.id,
    cell("name", link("schedules", schedule.id, schedule.name ?? schedule.id)),
    cell("grow dim", wordsOf(schedule, ctx.config)),
    cell("end", when(schedule.next_fire_time, ctx))));
  return frame({ title: "Fires next", name: "next", aside: button("new-schedule", "new schedule") },
    missing(resource) ?? (rows.length
      ? table({ caption: "Schedules that fire next", name: "nexts", wide: true, heads: [["name", "schedule"], ["grow", "trigger"], ["end", "fires"]] }, rows)
      : empty("no schedules yet. ", button("new-schedule", "create the first"))));
}

function failures(ctx) {
  const resource = ctx.get("failed");
  const rows = (resource?.data?.records ?? []).map((execution) => row("execution", execution.execution_id,
    cell("mark", shape(execution.status)),
    cell("name", link("executions", execution.execution_id, call(execution))),
    cell("grow dim", firstLine(execution.error)),
    cell("end", when(execution.completed_at, ctx, "rel"))));
  return frame({ title: "Failed lately", name: "failures" },
    missing(resource) ?? (rows.length
      ? table({ caption: "Executions that failed lately", name: "fails", wide: true, heads: [["mark", "state"], ["name", "call"], ["grow", "error"], ["end", "ended"]] }, rows)
      : empty("nothing failed")));
}

function handlers(ctx) {
  const resource = ctx.get("handlers");
  const list = resource?.data?.handlers ?? [];
  const rows = list.slice(0, 12).map((handler) => row("handler", handler.id,
    cell("mark", shape(handler.status)),
    cell("name", link("handlers", handler.id)),
    cell("grow dim", formatPlural(handler.methods.length, "method")),
    cell("end", `${formatCount(handler.running ?? 0)} running`)));
  return frame({ title: "Handlers", name: "handlers", note: count(list) },
    missing(resource) ?? (rows.length
      ? table({ caption: "Handlers", name: "workers", heads: [["mark", "state"], ["name", "handler"], ["grow", "methods"], ["end", "load"]] }, rows)
      : empty("no handler has registered yet")));
}
