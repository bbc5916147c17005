// The first view: is it well, what runs, what comes, what failed.

import { dayStrip, durationRanges, gauge, minuteBars, sum } from "./charts.js";
import { h } from "./dom.js";
import { executionTable } from "./executions.js";
import { EXECUTION_STATUSES, FAILED, formatCount, formatPercent, formatPlural } from "./format.js";
import { fillMinutes, newest, wordsOf } from "./model.js";
import {
  button, dim, empty, frame, link, missing, shape, state, tableFrame, when,
} from "./pieces.js";

const RUNNING_ROWS = 20;
const LATELY_ROWS = 14;
const FAILED_ROWS = 5;
const NEXT_ROWS = 8;
const HANDLER_ROWS = 12;
const DURATION_ROWS = 6;
const ENDED = EXECUTION_STATUSES.slice(2).join();

export const resources = () => ({
  stats: { url: "/api/executions/stats", every: 5_000, on: { execution: "reload" } },
  running: newest({ status: "running,queued" }, RUNNING_ROWS, { every: 2_000 }),
  lately: newest({ status: ENDED }, LATELY_ROWS, { every: 2_000 }),
  failed: newest({ status: FAILED }, FAILED_ROWS),
  day: { url: "/api/upcoming?hours=24&buckets=96", every: 5_000, on: { schedule: "reload" } },
  next: {
    url: `/api/schedules?sort=next_fire_time&paused=false&limit=${NEXT_ROWS}`,
    every: 2_000,
    on: { schedule: "reload", execution: "reload" },
  },
});

export const renderList = (page) => [
  troubles(page),
  h("div#figures.figures", figures(page)),
  day(page),
  h("div#lists.lists",
    h("div", running(page), lately(page)),
    h("div", next(page), failures(page), handlers(page))),
];

// ---- Figures

function troubles(page) {
  const { status, checks = {}, warnings = [] } = page.data("health") ?? {};
  const bad = Object.entries(checks).filter(([, said]) => said !== "ok");
  if (!bad.length && !warnings.length) return null;
  const isIncident = (checks.recovery ?? "ok") !== "ok";
  const mark = status === "failed" ? status : "degraded";
  const lines = [...bad, ...warnings.map((said) => ["warning", said])];
  return frame(
    {
      title: `Health: ${status}`,
      name: "troubles",
      aside: isIncident && button("acknowledge", "acknowledge"),
    },
    h("ul", lines.map(([name, said]) => h("li", state(mark, name), " ", said))));
}

function figures(page) {
  const stats = page.get("stats");
  const chart = (title, name, note, draw) =>
    frame({ title, name, note }, missing(stats) ?? draw(stats.data));
  return [
    chart("Executions per minute", "rate", "last hour", ({ per_minute: buckets }) =>
      minuteBars(fillMinutes(buckets, page.now), page.times)),
    chart("Success", "outcomes", "last 24 h", outcomes),
    chart("Duration", "duration", "last 24 h", durations),
  ];
}

const outcomes = ({ success_rate: share, by_status: by = {} }) => [
  h("p.figure", share == null ? dim("no runs yet") : formatPercent(share)),
  gauge(share),
  h("ul.counts",
    EXECUTION_STATUSES.filter((name) => by[name]).map((status) =>
      h("li", { "data-key": status },
        link("executions", null, state(status), { status }),
        h("span.num", formatCount(by[status]))))),
];

function durations({ by_handler: by = {} }) {
  const rows = Object.entries(by)
    .filter(([, { duration_ms: duration }]) => duration?.p50 != null)
    .sort(([, a], [, b]) => b.total - a.total)
    .slice(0, DURATION_ROWS)
    .map(([name, { duration_ms: duration }]) => [name, duration]);
  return rows.length ? durationRanges(rows) : empty("no successful runs yet");
}

function day(page) {
  const resource = page.get("day");
  const { left_out: left, buckets = [] } = resource?.data ?? {};
  const fires = formatPlural(sum(buckets.map(({ count }) => count)), "fire");
  const without = left > 0 ? `, without ${formatPlural(left, "schedule")}, too many to count` : "";
  const note = resource?.data && fires + without;
  return frame({ title: "Next 24 hours", name: "day", note },
    missing(resource) ?? dayStrip(resource.data, page.times));
}

// ---- Lists

const countNote = (items = []) => items.length > 0 && formatCount(items.length);

function running(page) {
  const about = { title: "Running", name: "running", nothing: "nothing runs" };
  const note = countNote(page.data("running")?.records);
  return executionTable(page, { ...about, note }, ["mark", "call", "progress", "elapsed"]);
}

/** The API's order is that of their beginnings. */
function lately(page) {
  const { data, ...resource } = page.get("lately") ?? {};
  const byEnd = (a, b) => (a.completed_at < b.completed_at ? 1 : -1);
  const records = data?.records.toSorted(byEnd);
  const about = { title: "Ended lately", name: "lately", nothing: "nothing has run yet" };
  const aside = link("executions", null, "all");
  return executionTable(page,
    { ...about, aside, resource: { ...resource, data: records && { records } } },
    ["mark", "call", "ending", "took", "ended"]);
}

function failures(page) {
  const aside = link("executions", null, "all", { status: FAILED });
  const about = { title: "Failed lately", name: "failed", nothing: "nothing failed" };
  return executionTable(page, { ...about, aside }, ["mark", "call", "ending", "endedAgo"]);
}

function next(page) {
  const resource = page.get("next");
  const about = {
    title: "Fires next",
    name: "nexts",
    aside: button("new-schedule", "new schedule"),
    nothing: ["no schedules yet. ", button("new-schedule", "create the first")],
    kind: "schedule",
  };
  const columns = [
    ["name", "schedule", ({ id, name }) => link("schedules", id, name ?? id)],
    ["grow dim", "trigger", (schedule) => wordsOf(schedule, page.config)],
    ["end", "fires", (schedule) =>
      schedule.quarantined ? state("quarantined") : when(schedule.next_fire_time, page)],
  ];
  const coming = resource?.data?.schedules.filter((schedule) => schedule.next_fire_time);
  return tableFrame({ ...about, resource }, columns, coming);
}

function handlers(page) {
  const resource = page.get("handlers");
  const about = {
    title: "Handlers",
    name: "workers",
    note: countNote(page.handlers),
    nothing: ["no handler has registered yet: ", link("handlers", null, "how to start one")],
    kind: "handler",
    wide: false,
  };
  const columns = [
    ["mark", "state", ({ status }) => shape(status)],
    ["name", "handler", ({ id }) => link("handlers", id)],
    ["end", "load", (handler) => `${formatCount(handler.running)} running`],
  ];
  return tableFrame({ ...about, resource }, columns, page.handlers.slice(0, HANDLER_ROWS));
}
