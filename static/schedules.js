// Schedules: the list with search, filter, sort and pages, and the page of one schedule.

import { h } from "./dom.js";
import { formatCount, formatDuration, formatJson, formatParams, formatPlural } from "./format.js";
import { PAGE_ROWS, methodsOf, renderRoute, schedulesUrl, signature, stateOfSchedule, upsertExecution, wordsOf } from "./model.js";
import { button, call, cell, empty, facts, frame, heading, link, missing, row, select, state, table, unseenHeading, when } from "./pieces.js";
import { history } from "./executions.js";

const RECENT_ROWS = 20;
const PREVIEW_FIRES = 8;

export const title = ({ route }) => route.id ?? "Schedules";

export function resources({ route, get }) {
  if (route.id == null) {
    return { schedules: { url: schedulesUrl(route.query), every: 1_000, on: { schedule: replaceIn, execution: "reload" } } };
  }
  const schedule = get("schedule")?.data;
  return {
    schedule: {
      url: `/api/schedules/${encodeURIComponent(route.id)}`, every: 1_000,
      on: { schedule: (data, changed) => (changed.id === data.id && !changed.deleted ? changed : "reload") },
    },
    recent: {
      url: `/api/executions?schedule_id=${encodeURIComponent(route.id)}&limit=${RECENT_ROWS}`, every: 5_000,
      on: { execution: (data, execution) => ({ ...data, records: upsertExecution(data.records, execution, execution.schedule_id === route.id, RECENT_ROWS) }) },
    },
    ...(schedule?.id === route.id && !schedule.paused && schedule.next_fire_time ? {
      preview: {
        url: "/api/triggers/preview", body: { trigger_config: schedule.trigger_config, count: PREVIEW_FIRES },
        every: 1_000, on: { schedule: "reload" },
      },
    } : {}),
  };
}

function replaceIn(data, changed) {
  const at = data.schedules.findIndex((schedule) => schedule.id === changed.id);
  if (at < 0 || changed.deleted) return "reload";
  return { ...data, schedules: data.schedules.with(at, changed) };
}

export const render = (ctx) => (ctx.route.id == null ? renderList(ctx) : renderOne(ctx));

// ---- The list -----------------------------------------------------------------------------------

const SORTS = [
  ["next_fire_time", "next fire"], ["schedule_id", "id"], ["name", "name"], ["handler_id", "handler"],
  ["last_fire_time", "last fire"], ["created_at", "oldest"],
];

function renderList(ctx) {
  const resource = ctx.get("schedules");
  const schedules = resource?.data?.schedules ?? [];
  const filtered = ctx.route.query.search || ctx.route.query.handler || ctx.route.query.state;
  return [
    unseenHeading("Schedules"),
    toolbar(ctx),
    frame({ title: "Schedules", name: "list", note: resource?.data && formatCount(resource.data.total) },
      missing(resource) ?? (schedules.length
        ? listTable(ctx, schedules, resource.loading)
        : empty(filtered ? "no schedule matches" : "no schedules yet. ", !filtered && button("new-schedule", "create the first"))),
      resource?.data && pager(ctx, resource.data.total)),
  ];
}

function toolbar({ route: { query }, get, selected }) {
  const handlers = get("handlers")?.data?.handlers ?? [];
  return h("form", { class: "toolbar", role: "search", "data-form": "filter" },
    h("input", { type: "search", name: "search", id: "search", value: query.search ?? "", placeholder: "search", "aria-label": "Search schedules", autocomplete: "off", spellcheck: "false" }),
    select({ name: "handler", "aria-label": "Handler" }, [["", "all handlers"], ...handlers.map(({ id }) => [id, id])], query.handler),
    select({ name: "state", "aria-label": "State" }, [["", "all states"], ["active", "not paused"], ["paused", "paused"]], query.state),
    select({ name: "sort", "aria-label": "Sort by" }, SORTS.map(([value, label]) => [value, `by ${label}`]), query.sort ?? "next_fire_time"),
    h("span", { class: "spring" }),
    selected.size > 0 && h("span", { class: "bulk" }, `${formatCount(selected.size)} selected `,
      button("bulk-pause", "pause"), button("bulk-resume", "resume"), button("select-none", "clear")),
    button("new-schedule", "new schedule", { class: "primary" }));
}

function listTable(ctx, schedules, busy) {
  const { selected, route: { query } } = ctx;
  const all = schedules.every(({ id }) => selected.has(id));
  const sortable = (kind, label, sort) => [kind, h("a", { href: renderRoute({ ...ctx.route, query: { ...query, sort, page: null } }) }, label),
    { "aria-sort": (query.sort ?? "next_fire_time") === sort ? (sort === "last_fire_time" ? "descending" : "ascending") : null }];
  const heads = [
    ["pick", h("input", { type: "checkbox", "data-act": "select-page", checked: all, "aria-label": "Select this page" })],
    ["state-of", "state"], sortable("name", "schedule", "schedule_id"), sortable("call-of", "calls", "handler_id"),
    ["trigger", "when"], sortable("next", "next fire", "next_fire_time"), sortable("last", "last fire", "last_fire_time"),
    ["acts", h("span", { class: "unseen" }, "actions")],
  ];
  return table({ caption: "Schedules", name: "schedules", wide: true, busy, heads }, schedules.map((schedule) => listRow(ctx, schedule)));
}

function listRow(ctx, schedule) {
  const name = stateOfSchedule(schedule);
  const { id } = schedule;
  const parameters = formatParams(schedule.job_params, 200);
  return row("schedule", id,
    cell("pick", h("input", { type: "checkbox", "data-act": "select", "data-id": id, checked: ctx.selected.has(id), "aria-label": `Select ${id}` })),
    cell("state-of", state(name)),
    cell("name", link("schedules", id, schedule.name ?? id, { title: id })),
    cell("call-of", h("span", { title: parameters }, call(schedule))),
    cell("trigger", h("span", { title: `${schedule.description} = ${schedule.trigger}` }, wordsOf(schedule, ctx.config))),
    cell("next", when(name === "paused" ? null : schedule.next_fire_time, ctx)),
    cell("last", when(schedule.last_fire_time, ctx, "rel")),
    cell("acts", button("run-schedule", "run", { data: { id }, title: "Run now" }),
      toggle(schedule), button("edit-schedule", "edit", { data: { id } })));
}

const toggle = ({ id, paused }) =>
  button(paused ? "resume-schedule" : "pause-schedule", paused ? "resume" : "pause", { data: { id } });

function pager({ route }, count) {
  const pages = Math.max(1, Math.ceil(count / PAGE_ROWS));
  const page = Math.min(pages, Math.max(1, Number(route.query.page) || 1));
  if (pages === 1) return null;
  const to = (target, label, key) => {
    const here = target < 1 || target > pages || target === page;
    return h("a", { "data-key": key, href: here ? null : renderRoute({ ...route, query: { ...route.query, page: target === 1 ? null : target } }), "aria-disabled": here ? "true" : null, id: `page-${key}` }, label);
  };
  return h("nav", { class: "pager", "aria-label": "Pages" },
    to(1, "« first", "first"), to(page - 1, "‹ previous", "previous"),
    h("span", { class: "dim" }, `page ${formatCount(page)} of ${formatCount(pages)}`),
    to(page + 1, "next ›", "next"), to(pages, "last »", "last"));
}

// ---- One schedule -------------------------------------------------------------------------------

function renderOne(ctx) {
  const resource = ctx.get("schedule");
  const head = h("p", { class: "trail" }, h("a", { href: ctx.listHash("schedules"), "data-back": true }, "‹ Schedules"));
  const waiting = missing(resource);
  if (waiting) return [head, heading(ctx.route.id), waiting];
  const schedule = resource.data;
  return [
    head,
    heading(schedule.name ?? schedule.id, state(stateOfSchedule(schedule)), tools(schedule)),
    schedule.quarantined && frame({ title: "This schedule cannot fire", name: "troubles" }, h("p", null, schedule.quarantined)),
    h("div", { class: "pair", "data-key": "pair" }, about(ctx, schedule), fires(ctx, schedule)),
    frame({ title: "Recent executions", name: "recent", aside: h("a", { href: renderRoute({ view: "executions", query: { schedule: schedule.id } }) }, "all") },
      missing(ctx.get("recent")) ?? history(ctx, ctx.get("recent").data.records, { schedule: false })),
  ];
}

const tools = ({ id, paused, quarantined }) => h("span", { class: "tools", "data-row": "schedule", "data-id": id },
  button("run-schedule", "run now", { data: { id }, class: "primary" }),
  quarantined ? null : toggle({ id, paused }),
  button("edit-schedule", "edit", { data: { id } }),
  button("duplicate-schedule", "duplicate", { data: { id } }),
  button("delete-schedule", "delete", { data: { id }, class: "danger" }));

function about({ get }, schedule) {
  const handler = get("handlers")?.data?.handlers.find(({ id }) => id === schedule.handler_id);
  const method = methodsOf(handler).find(({ name }) => name === schedule.method_name);
  const { retry } = schedule;
  return frame({ title: "Plan", name: "about" }, facts([
    ["id", schedule.id],
    ["when", schedule.description ?? schedule.trigger],
    ["time zone", schedule.trigger_config.timezone],
    ["calls", h("span", null, link("handlers", schedule.handler_id), ".", method ? h("span", { title: method.doc }, signature(method)) : schedule.method_name,
      handler?.status === "Connected" ? null : h("span", null, " ", state("Disconnected", handler ? "handler is not connected" : "no such handler")))],
    ["parameters", Object.keys(schedule.job_params ?? {}).length ? h("code", null, formatJson(schedule.job_params, 2_000)) : null],
    ["timeout", schedule.timeout == null ? null : formatDuration(schedule.timeout * 1000)],
    ["retry", retry && `${formatPlural(retry.max_attempts, "attempt")}, after ${retry.base_delay} s × ${retry.factor}ⁿ up to ${retry.max_delay} s`],
    ["overlap", schedule.overlap],
    ["after downtime", schedule.coalesce],
    ["misfire grace", schedule.misfire_grace_time == null ? null : formatDuration(schedule.misfire_grace_time * 1000)],
    ["jitter", schedule.max_jitter ? `up to ${formatDuration(schedule.max_jitter * 1000)}` : null],
    ["origin", schedule.origin === "config" ? "the configuration file" : null],
  ]));
}

function fires(ctx, schedule) {
  const told = ctx.get("preview")?.data?.fire_times ?? [];
  const resting = { paused: "paused: nothing fires", finished: "it has fired for the last time", quarantined: "it cannot fire" }[stateOfSchedule(schedule)];
  return frame({ title: "Fires", name: "fires" },
    facts([["last", when(schedule.last_fire_time, ctx)], ["next", resting ?? when(schedule.next_fire_time, ctx)]]),
    resting ? null : fireList(told, ctx));
}

/** The fire times a preview tells, with what is special about them. */
export const fireList = (told, ctx) => h("ol", { class: "fire-list" }, told.map((fire) => h("li", null,
  h("span", null, fire.local), " ", when(fire.at, ctx, "rel"), fire.note && h("span", { class: "yellow note" }, `↳ ${fire.note}`))));
