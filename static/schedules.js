// Schedules: the list with search, filter, sort and pages, and the page of one schedule.

import { at } from "./api.js";
import { h } from "./dom.js";
import { POLICY_WORDS } from "./draft.js";
import { history } from "./executions.js";
import {
  FAILED, formatCount, formatDuration, formatParams, formatPlural, formatWeekday,
} from "./format.js";
import {
  PAGE_ROWS, lastFailures, methodsOf, newest, pageOf, renderRoute, replaceIn, schedulesUrl,
  signature, stateOfSchedule, wordsOf,
} from "./model.js";
import {
  button, call, dim, facts, filterField, filters, frame, handlerField, heading, link, missing,
  pages, pair, parameters, searchField, shape, state, tableFrame, tools, when,
} from "./pieces.js";

const RECENT_ROWS = 20;
const PREVIEW_FIRES = 8;
const FAILURES = 100; // as many are looked through for what the last fires ended as

export function resources({ route: { id, query }, data }) {
  if (id != null) return oneSchedule(id, data("schedule"));
  const on = { schedule: replaceIn("schedules"), execution: "reload" };
  return {
    schedules: { url: schedulesUrl(query), every: 1_000, on },
    failures: newest({ status: FAILED }, FAILURES),
  };
}

function oneSchedule(id, known) {
  const isOther = (one) => one.id !== id || one.deleted;
  const fires = known?.id === id && stateOfSchedule(known) === "active";
  return {
    schedule: {
      url: at("schedules", id),
      every: 1_000,
      on: { schedule: (data, changed) => (isOther(changed) ? "reload" : changed) },
    },
    recent: newest({ schedule_id: id }, RECENT_ROWS),
    ...(fires && {
      preview: {
        url: "/api/triggers/preview",
        body: { trigger_config: known.trigger_config, schedule_id: id, count: PREVIEW_FIRES },
        every: 1_000,
        on: { schedule: "reload" },
      },
    }),
  };
}

// ---- The list

const SORTS = {
  next_fire_time: "by next fire",
  schedule_id: "by id",
  name: "by name",
  handler_id: "by handler",
  last_fire_time: "by last fire",
  created_at: "oldest first",
};
const STATES = [["", "all states"], ["active", "not paused"], ["paused", "paused"]];

export function renderList(page) {
  const { query } = page.route;
  const resource = page.get("schedules");
  const { schedules = [], total } = resource?.data ?? {};
  const isFiltered = query.search || query.handler || query.state;
  const about = {
    title: "Schedules",
    name: "schedules",
    note: total != null && formatCount(total),
    resource,
    nothing: isFiltered
      ? "no schedule matches"
      : ["no schedules yet. ", button("new-schedule", "create the first")],
    kind: "schedule",
  };
  return [
    toolbar(page, total),
    tableFrame(about, columns(page, schedules), schedules),
    total > PAGE_ROWS && pager(page.route, total),
  ];
}

function toolbar(page, total) {
  const { query } = page.route;
  const { sort } = query;
  const sorts = Object.entries(SORTS).flatMap(([name, label]) => {
    const option = [name === "next_fire_time" ? "" : name, label];
    return sort === `-${name}` ? [[sort, `${label}, reversed`], option] : [option];
  });
  return filters(
    searchField("search", "search", query.search),
    handlerField(page),
    filterField("state", "State", STATES, page),
    filterField("sort", "Sort", sorts, page),
    h("span.spring"),
    bulk(page, total),
    button("new-schedule", "new schedule", { class: "primary" }));
}

/** What can be done with the selected ones; more than a page of them can be selected at once. */
function bulk({ selected, isAllSelected }, total) {
  if (!selected.size) return null;
  const canAll = !isAllSelected && selected.size >= PAGE_ROWS && total > selected.size;
  return h("span.bulk",
    `${isAllSelected ? `all ${formatCount(total)}` : formatCount(selected.size)} selected `,
    canAll && button("select-all", `select all ${formatCount(total)} that match`),
    button("bulk-pause", "pause"),
    button("bulk-resume", "resume"),
    button("select-none", "clear"));
}

const checkbox = (act, label, checked) =>
  h("input", { type: "checkbox", "data-act": act, checked, "aria-label": label });

/** Pressing the head of a sorted column turns its order round. */
function sortable(route, style, label, by, content) {
  const { sort = "next_fire_time" } = route.query;
  const isReversed = sort === `-${by}`;
  const next = sort === by ? `-${by}` : by;
  const query = { ...route.query, sort: next === "next_fire_time" ? null : next, page: null };
  const isUp = isReversed === (by === "last_fire_time");
  const more = (isReversed || sort === by) && { "aria-sort": isUp ? "ascending" : "descending" };
  return [style, h("a", { href: renderRoute({ ...route, query }) }, label), content, more];
}

function columns(page, schedules) {
  const { selected, isAllSelected, route } = page;
  const failures = lastFailures(schedules, page.data("failures")?.records);
  const isOn = ({ id }) => isAllSelected || selected.has(id);
  const words = (one) =>
    h("span", { title: `${one.description} = ${one.trigger}` }, wordsOf(one, page.config));
  const calls = (one) => h("span", { title: formatParams(one.job_params, 200) }, call(one));
  return [
    ["pick", checkbox("select-page", "Select this page", schedules.every(isOn)), (one) =>
      checkbox("select", `Select ${one.id}`, isOn(one))],
    ["state-of", "state", (one) => state(stateOfSchedule(one))],
    sortable(route, "name", "schedule", "schedule_id", ({ id, name }) =>
      h("span", { title: id }, link("schedules", id, name ?? id))),
    sortable(route, "call-of", "calls", "handler_id", calls),
    ["trigger", "when", words],
    sortable(route, "next", "next fire", "next_fire_time", (one) =>
      when(one.paused || one.quarantined ? null : one.next_fire_time, page)),
    sortable(route, "last", "last fire", "last_fire_time", (one) =>
      lastFire(one, failures.get(one.id), page)),
    ["acts", h("span.unseen", "actions"), (one) => [
      button("run-schedule", "run", { title: "Run now" }),
      toggle(one),
      one.origin !== "config" && button("edit-schedule", "edit"),
    ]],
  ];
}

function lastFire({ last_fire_time: at }, failure, page) {
  const time = when(at, page, "rel");
  if (!failure) return time;
  const { execution_id: id, status, error } = failure;
  return h("span.red", { title: error }, shape(status), link("executions", id, time));
}

const toggle = ({ paused }) =>
  paused ? button("resume-schedule", "resume") : button("pause-schedule", "pause");

function pager(route, total) {
  const last = Math.ceil(total / PAGE_ROWS);
  const here = Math.min(last, pageOf(route.query));
  const to = (page) =>
    page >= 1 && page <= last && page !== here &&
    renderRoute({ ...route, query: { ...route.query, page: page === 1 ? null : page } });
  return pages(
    [to(1), "« first", "first"],
    [to(here - 1), "‹ previous", "previous"],
    [null, dim(`page ${formatCount(here)} of ${formatCount(last)}`)],
    [to(here + 1), "next ›", "next"],
    [to(last), "last »", "last"]);
}

// ---- One schedule

export function renderOne(page) {
  const resource = page.get("schedule");
  if (!resource?.data) return [heading(page, page.route.id), missing(resource)];
  const schedule = resource.data;
  const { id, name, quarantined } = schedule;
  const isDeclared = schedule.origin === "config";
  const all = link("executions", null, "all", { schedule: id });
  const about = { title: "Recent executions", aside: all, nothing: "it has not run yet" };
  return [
    heading(page, name ?? id, state(stateOfSchedule(schedule)),
      tools("schedule", id,
        button("run-schedule", "run now", { class: "primary" }),
        !quarantined && toggle(schedule),
        !isDeclared && button("edit-schedule", "edit"),
        button("duplicate-schedule", "duplicate"),
        !isDeclared && button("delete-schedule", "delete", { class: "danger" }))),
    quarantined &&
      frame({ title: "This schedule cannot fire", name: "troubles" }, h("p", quarantined)),
    pair(plan(page, schedule), fires(page, schedule)),
    history(page, { ...about, resource: page.get("recent") }, "schedule"),
  ];
}

function plan(page, schedule) {
  const { retry } = schedule;
  const seconds = (s) => s && formatDuration(s * 1000);
  return frame({ title: "Plan" },
    facts([
      ["id", schedule.id],
      ["when", wordsOf(schedule, page.config)],
      ["time zone", schedule.trigger_config.timezone],
      ["calls", callee(page.handlers, schedule)],
      ["parameters", parameters(schedule.job_params)],
      ["timeout", seconds(schedule.timeout)],
      ["retry", retry && describeRetry(retry)],
      ["overlap", POLICY_WORDS.overlap[schedule.overlap]],
      ["missed while down", POLICY_WORDS.coalesce[schedule.coalesce]],
      ["misfire grace", seconds(schedule.misfire_grace_time)],
      ["jitter", schedule.max_jitter > 0 && `up to ${seconds(schedule.max_jitter)}`],
      ["origin", schedule.origin === "config" && "the configuration file: change it there"],
    ]));
}

const describeRetry = ({ max_attempts: most, base_delay: base, factor, max_delay: limit }) =>
  most === 1
    ? "none: one attempt"
    : `${formatPlural(most, "attempt")}, after ${base} s, then × ${factor} up to ${limit} s`;

function callee(handlers, { handler_id, method_name }) {
  const handler = handlers.find(({ id }) => id === handler_id);
  const method = methodsOf(handler).find(({ name }) => name === method_name);
  const trouble = handler ? "handler is not connected" : "no such handler";
  return h("span",
    link("handlers", handler_id),
    h("span", { title: method && `${signature(method)}: ${method.doc}` }, `.${method_name}`),
    handler?.status !== "Connected" && [" ", state("Disconnected", trouble)]);
}

const RESTING = {
  paused: "paused: nothing fires",
  finished: "it has fired for the last time",
  quarantined: "it cannot fire",
};

function fires(page, schedule) {
  const resting = RESTING[stateOfSchedule(schedule)];
  return frame({ title: "Fires" },
    facts([
      ["last", when(schedule.last_fire_time, page)],
      ["next", resting ?? when(schedule.next_fire_time, page)],
    ]),
    !resting && fireList(page.data("preview")?.fire_times, page));
}

export const fireList = (told = [], page) =>
  h("ol.fire-list",
    told.map(({ at, local, note }) =>
      h("li",
        h("span", formatWeekday(local), " ", local),
        " ",
        when(at, page, "rel"),
        note && h("span.yellow.note", `↳ ${note}`))));
