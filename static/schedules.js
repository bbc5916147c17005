// Schedules: the list with search, filter, sort and pages, and the page of one schedule.

import { h } from "./dom.js";
import { history } from "./executions.js";
import { formatCount, formatDuration, formatJson, formatParams, formatPlural } from "./format.js";
import {
  PAGE_ROWS,
  isEmpty,
  keepRecords,
  methodsOf,
  renderRoute,
  schedulesUrl,
  signature,
  stateOfSchedule,
  wordsOf,
} from "./model.js";
import {
  button,
  call,
  cell,
  dim,
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
  tableFrame,
  tools,
  trail,
  unseenHeading,
  when,
} from "./pieces.js";

const RECENT_ROWS = 20;
const PREVIEW_FIRES = 8;

export const title = ({ route }) => route.id ?? "Schedules";

export function resources({ route, get }) {
  if (route.id != null) return oneSchedule(route.id, get("schedule")?.data);
  const on = { schedule: replaceIn, execution: "reload" };
  return { schedules: { url: schedulesUrl(route.query), every: 1_000, on } };
}

function replaceIn(data, changed) {
  const at = data.schedules.findIndex((schedule) => schedule.id === changed.id);
  if (at < 0 || changed.deleted) return "reload";
  return { ...data, schedules: data.schedules.with(at, changed) };
}

function oneSchedule(id, known) {
  const path = encodeURIComponent(id);
  const fires = known?.id === id && stateOfSchedule(known) === "active";
  return {
    schedule: {
      url: `/api/schedules/${path}`,
      every: 1_000,
      on: {
        schedule: (data, changed) =>
          changed.id === data.id && !changed.deleted ? changed : "reload",
      },
    },
    recent: {
      url: `/api/executions?schedule_id=${path}&limit=${RECENT_ROWS}`,
      every: 5_000,
      on: { execution: keepRecords((execution) => execution.schedule_id === id, RECENT_ROWS) },
    },
    ...(fires && {
      preview: {
        url: "/api/triggers/preview",
        body: { trigger_config: known.trigger_config, count: PREVIEW_FIRES },
        every: 1_000,
        on: { schedule: "reload" },
      },
    }),
  };
}

export const render = (ctx) => (ctx.route.id == null ? renderList(ctx) : renderOne(ctx));

// ---- The list -----------------------------------------------------------------------------------

const SORTS = {
  next_fire_time: "by next fire",
  schedule_id: "by id",
  name: "by name",
  handler_id: "by handler",
  last_fire_time: "by last fire",
  created_at: "oldest first",
};
const DEFAULT_SORT = "next_fire_time";

function renderList(ctx) {
  const { query } = ctx.route;
  const resource = ctx.get("schedules");
  const { schedules = [], total } = resource?.data ?? {};
  const isFiltered = query.search || query.handler || query.state;
  const nothing = isFiltered
    ? "no schedule matches"
    : ["no schedules yet. ", button("new-schedule", "create the first")];
  return [
    unseenHeading("Schedules"),
    toolbar(ctx),
    tableFrame(
      {
        title: "Schedules",
        name: "schedules",
        note: total != null && formatCount(total),
        resource,
        nothing,
        table: { wide: true, busy: resource?.loading, heads: heads(ctx, schedules) },
      },
      schedules.map((schedule) => listRow(ctx, schedule)),
    ),
    total > PAGE_ROWS && pager(ctx.route, total),
  ];
}

function toolbar(ctx) {
  const { selected, route } = ctx;
  const { query } = route;
  const states = [
    ["", "all states"],
    ["active", "not paused"],
    ["paused", "paused"],
  ];
  return filters(
    searchField("search", "search", query.search),
    handlerField(ctx),
    select({ name: "state", "aria-label": "State" }, states, query.state),
    select(
      { name: "sort", "aria-label": "Sort" },
      Object.entries(SORTS),
      query.sort ?? DEFAULT_SORT,
    ),
    h("span", { class: "spring" }),
    selected.size > 0 &&
      h(
        "span",
        { class: "bulk" },
        `${formatCount(selected.size)} selected `,
        button("bulk-pause", "pause"),
        button("bulk-resume", "resume"),
        button("select-none", "clear"),
      ),
    button("new-schedule", "new schedule", { class: "primary" }),
  );
}

function heads({ selected, route }, schedules) {
  const isAll = schedules.every(({ id }) => selected.has(id));
  const { sort = DEFAULT_SORT } = route.query;
  const sortable = (kind, label, by) => [
    kind,
    h(
      "a",
      { href: renderRoute({ ...route, query: { ...route.query, sort: by, page: null } }) },
      label,
    ),
    sort === by && { "aria-sort": by === "last_fire_time" ? "descending" : "ascending" },
  ];
  return [
    [
      "pick",
      h("input", {
        type: "checkbox",
        "data-act": "select-page",
        checked: isAll,
        "aria-label": "Select this page",
      }),
    ],
    ["state-of", "state"],
    sortable("name", "schedule", "schedule_id"),
    sortable("call-of", "calls", "handler_id"),
    ["trigger", "when"],
    sortable("next", "next fire", "next_fire_time"),
    sortable("last", "last fire", "last_fire_time"),
    ["acts", h("span", { class: "unseen" }, "actions")],
  ];
}

function listRow(ctx, schedule) {
  const { id } = schedule;
  const picked = {
    type: "checkbox",
    "data-act": "select",
    "data-id": id,
    checked: ctx.selected.has(id),
  };
  return row(
    "schedule",
    id,
    cell("pick", h("input", { ...picked, "aria-label": `Select ${id}` })),
    cell("state-of", state(stateOfSchedule(schedule))),
    cell("name", link("schedules", id, schedule.name ?? id, { title: id })),
    cell("call-of", h("span", { title: formatParams(schedule.job_params, 200) }, call(schedule))),
    cell(
      "trigger",
      h(
        "span",
        { title: `${schedule.description} = ${schedule.trigger}` },
        wordsOf(schedule, ctx.config),
      ),
    ),
    cell("next", when(schedule.paused ? null : schedule.next_fire_time, ctx)),
    cell("last", when(schedule.last_fire_time, ctx, "rel")),
    cell(
      "acts",
      button("run-schedule", "run", { data: { id }, title: "Run now" }),
      toggle(schedule),
      button("edit-schedule", "edit", { data: { id } }),
    ),
  );
}

const toggle = ({ id, paused }) =>
  button(paused ? "resume-schedule" : "pause-schedule", paused ? "resume" : "pause", {
    data: { id },
  });

function pager(route, total) {
  const last = Math.ceil(total / PAGE_ROWS);
  const here = Math.min(last, Math.max(1, Number(route.query.page) || 1));
  const to = (page) =>
    page >= 1 &&
    page <= last &&
    page !== here &&
    renderRoute({ ...route, query: { ...route.query, page: page === 1 ? null : page } });
  return pages(
    [to(1), "« first", "page-first"],
    [to(here - 1), "‹ previous", "page-previous"],
    [null, dim(`page ${formatCount(here)} of ${formatCount(last)}`)],
    [to(here + 1), "next ›", "page-next"],
    [to(last), "last »", "page-last"],
  );
}

// ---- One schedule -------------------------------------------------------------------------------

function renderOne(ctx) {
  const resource = ctx.get("schedule");
  const head = trail(ctx, "schedules", "Schedules");
  if (!resource?.data) return [head, heading(ctx.route.id), missing(resource)];
  const schedule = resource.data;
  return [
    head,
    heading(schedule.name ?? schedule.id, state(stateOfSchedule(schedule)), buttons(schedule)),
    schedule.quarantined &&
      frame(
        { title: "This schedule cannot fire", name: "troubles" },
        h("p", null, schedule.quarantined),
      ),
    h("div", { class: "pair", "data-key": "pair" }, plan(ctx, schedule), fires(ctx, schedule)),
    recent(ctx, schedule),
  ];
}

const buttons = ({ id, paused, quarantined }) =>
  tools(
    "schedule",
    id,
    button("run-schedule", "run now", { data: { id }, class: "primary" }),
    quarantined ? null : toggle({ id, paused }),
    button("edit-schedule", "edit", { data: { id } }),
    button("duplicate-schedule", "duplicate", { data: { id } }),
    button("delete-schedule", "delete", { data: { id }, class: "danger" }),
  );

function plan({ get, config }, schedule) {
  const { job_params: params, retry } = schedule;
  const seconds = (s) => (s ? formatDuration(s * 1000) : null);
  return frame(
    { title: "Plan", name: "plan" },
    facts([
      ["id", schedule.id],
      ["when", wordsOf(schedule, config)],
      ["time zone", schedule.trigger_config.timezone],
      ["calls", callee(get("handlers")?.data?.handlers, schedule)],
      ["parameters", isEmpty(params) ? null : h("code", null, formatJson(params, 2_000))],
      ["timeout", seconds(schedule.timeout)],
      ["retry", retry && describeRetry(retry)],
      ["overlap", schedule.overlap],
      ["after downtime", schedule.coalesce],
      ["misfire grace", seconds(schedule.misfire_grace_time)],
      ["jitter", schedule.max_jitter ? `up to ${seconds(schedule.max_jitter)}` : null],
      ["origin", schedule.origin === "config" ? "the configuration file" : null],
    ]),
  );
}

const describeRetry = ({ max_attempts: most, base_delay: base, factor, max_delay: limit }) =>
  `${formatPlural(most, "attempt")}, after ${base} s, then × ${factor} up to ${limit} s`;

function callee(handlers = [], { handler_id, method_name }) {
  const handler = handlers.find(({ id }) => id === handler_id);
  const method = methodsOf(handler).find(({ name }) => name === method_name);
  const trouble = handler ? "handler is not connected" : "no such handler";
  return h(
    "span",
    null,
    link("handlers", handler_id),
    ".",
    method ? h("span", { title: method.doc }, signature(method)) : method_name,
    handler?.status === "Connected" ? null : [" ", state("Disconnected", trouble)],
  );
}

const RESTING = {
  paused: "paused: nothing fires",
  finished: "it has fired for the last time",
  quarantined: "it cannot fire",
};

function fires(ctx, schedule) {
  const resting = RESTING[stateOfSchedule(schedule)];
  const told = ctx.get("preview")?.data?.fire_times ?? [];
  return frame(
    { title: "Fires", name: "fires" },
    facts([
      ["last", when(schedule.last_fire_time, ctx)],
      ["next", resting ?? when(schedule.next_fire_time, ctx)],
    ]),
    resting ? null : fireList(told, ctx),
  );
}

/** The fire times a preview tells, with what is special about them. */
export const fireList = (told, ctx) =>
  h(
    "ol",
    { class: "fire-list" },
    told.map(({ at, local, note }) =>
      h(
        "li",
        null,
        h("span", null, local),
        " ",
        when(at, ctx, "rel"),
        note && h("span", { class: "yellow note" }, `↳ ${note}`),
      ),
    ),
  );

function recent(ctx, { id }) {
  const resource = ctx.get("recent");
  const all = h("a", { href: renderRoute({ view: "executions", query: { schedule: id } }) }, "all");
  return history(ctx, {
    title: "Recent executions",
    aside: all,
    resource,
    nothing: "it has not run yet",
    hasSchedule: false,
  });
}
