// Wires the page: routes, resources, events, keys. The only module that does anything when loaded.

import { createActions } from "./actions.js";
import { h, patch } from "./dom.js";
import * as executions from "./executions.js";
import { createTimes } from "./format.js";
import * as handlers from "./handlers.js";
import { KEYS, actionFor } from "./keys.js";
import { MAX_LOG_LINES, bestZone, nextLink, nextOffset, parseRoute, renderRoute } from "./model.js";
import * as overview from "./overview.js";
import { openHelp, openPalette } from "./palette.js";
import { createResources } from "./resources.js";
import * as schedules from "./schedules.js";
import { createSettings } from "./settings.js";
import { renderFacts, renderTop } from "./shell.js";
import { openStream } from "./stream.js";

const TICK_MS = 500;
const EVENTS_MS = 150; // events are taken in batches, so that a burst costs one render
const TYPING_MS = 200;
const SAY_MS = 12_000;

const views = { overview, schedules, handlers, executions };
const [top, main, status, facts] = ["top", "main", "status", "facts"].map((id) => document.getElementById(id));
const settings = createSettings(globalThis.localStorage);
const selected = new Set();
const progress = new Map();
const logs = new Map();
const lists = {};
const browserZone = Intl.DateTimeFormat().resolvedOptions().timeZone;

let route = parseRoute(location.hash);
let times = createTimes(browserZone);
let link = { state: "connecting", since: Date.now() };
let offset = 0;
let pages = 1;
let held = false;
let queue = [];
let wanted = false;

const resources = createResources({ onChange: render, onAnswer });

/** All that a view may look at, as it is now. */
const ctx = () => ({
  route, times, link, held, pages, progress, selected, settings, config: resources.get("config")?.data,
  now: Date.now() + offset, get: resources.get, logOf: (id) => logs.get(id) ?? [],
  listHash: (view) => (route.view === view && route.id == null ? renderRoute(route) : lists[view] ?? renderRoute({ view })),
});

// ---- Resources ----------------------------------------------------------------------------------

const always = {
  config: { url: "/api/config", every: 60_000 },
  health: { url: "/api/health", every: 5_000, refresh: 10_000, on: { health: (data, change) => ({ ...data, ...change }), clock: "reload" } },
};
// The age of heartbeats is shown among the handlers only, and no event tells of them.
const handlersSpec = () => ({ url: "/api/handlers", every: 2_000, refresh: route.view === "handlers" ? 2_000 : 30_000, on: { handler: upsertHandler } });

function upsertHandler(data, handler) {
  const at = data.handlers.findIndex(({ id }) => id === handler.id);
  return at < 0 ? "reload" : { ...data, handlers: data.handlers.with(at, handler) };
}

const sync = (fresh) => resources.sync({ ...always, handlers: handlersSpec(), ...views[route.view].resources(ctx()) }, () => fresh);

function onAnswer(answer) {
  if (answer instanceof Error) return onLink("unreachable");
  offset = nextOffset(offset, answer, Date.now());
  if (link.state === "disconnected") {
    onLink("answered");
    stream.retry();
  }
}

// ---- Rendering ----------------------------------------------------------------------------------

function render() {
  if (wanted || document.hidden) return;
  wanted = true;
  requestAnimationFrame(paint);
}

function paint() {
  wanted = false;
  times = bestZone(times, settings.get("zone"), ctx().config?.timezone, browserZone, createTimes);
  if (!held) sync(false);
  const now = ctx();
  const scrolledUp = new Set([...main.querySelectorAll("[data-stick]")].filter((node) => node.scrollHeight - node.scrollTop - node.clientHeight > 8));
  patch(top, ...renderTop(now));
  patch(main, ...views[route.view].render(now));
  patch(facts, ...renderFacts(now));
  for (const node of main.querySelectorAll("[data-stick]")) if (!scrolledUp.has(node)) node.scrollTop = node.scrollHeight;
  document.title = `${views[route.view].title(now)} · ${now.config?.instance_name ?? "ScheduleZero"}`;
}

let silence;
/** Tell something in the status line; `route` makes it a link. */
function say(text, to) {
  clearTimeout(silence);
  silence = setTimeout(() => patch(status), SAY_MS);
  patch(status, to ? h("a", { href: renderRoute(to) }, text) : text);
}

async function attempt(act) {
  try {
    await act();
  } catch (error) {
    say(`✗ ${error.message}`);
    if (!("status" in error)) throw error;
  }
}

// ---- Routes -------------------------------------------------------------------------------------

function go(to, replace = false) {
  const hash = renderRoute(to);
  if (hash === location.hash) return;
  if (replace) history.replaceState(null, "", hash);
  else history.pushState(null, "", hash);
  onRoute();
}

function onRoute() {
  const before = route;
  route = parseRoute(location.hash);
  if (route.id == null) lists[route.view] = renderRoute(route);
  const moved = before.view !== route.view || before.id !== route.id;
  if (moved || renderRoute(before) !== renderRoute(route)) pages = 1;
  if (moved) logs.clear();
  sync(moved);
  paint();
  if (!moved) return;
  scrollTo(0, 0);
  (main.querySelector("h1") ?? main).focus({ preventScroll: true });
}

addEventListener("popstate", onRoute);

// ---- Events -------------------------------------------------------------------------------------

const stream = { retry: () => {} };

function onLink(happened) {
  const before = link;
  link = nextLink(link, happened, Date.now() + offset);
  if (link !== before && link.state === "live") resources.expire();
  render();
}

function onEvents(events) {
  if (!queue.length) setTimeout(takeEvents, EVENTS_MS);
  queue.push(...events);
}

function takeEvents() {
  const events = queue;
  queue = [];
  if (held) return;
  for (const { name, data } of events) takeEvent(name, JSON.parse(data));
  render();
}

function takeEvent(name, payload) {
  if (name === "gap") resources.reload();
  else if (name === "log") takeLog(payload);
  else if (name === "progress") progress.set(payload.execution_id, payload);
  else resources.apply(name, payload);
  if (name === "execution" && payload.status !== "running") progress.delete(payload.execution_id);
}

function takeLog({ execution_id: id, lines }) {
  if (route.view === "executions" && route.id === id) logs.set(id, [...(logs.get(id) ?? []), ...lines].slice(-MAX_LOG_LINES));
}

// ---- What the user asks for ---------------------------------------------------------------------

const actions = createActions({ ctx, say, go, attempt, reload: () => resources.reload() });

const rows = () => [...main.querySelectorAll("[data-row][tabindex]")];
const focusedRow = () => document.activeElement.closest("[data-row]") ?? main.querySelector(".heading [data-row]");

function walk(step) {
  const list = rows();
  const at = list.indexOf(document.activeElement.closest("[data-row]"));
  list[at < 0 ? (step > 0 ? 0 : list.length - 1) : Math.min(list.length - 1, Math.max(0, at + step))]?.focus();
}

function mark(id, on) {
  if (on) selected.add(id);
  else selected.delete(id);
  render();
}

const set = (name) => () => {
  const value = settings.next(name);
  document.documentElement.dataset[name] = value;
  say(`${name}: ${value}`);
  render();
};

const commands = {
  "go-overview": () => go(parseRoute(ctx().listHash("overview"))),
  "go-schedules": () => go(parseRoute(ctx().listHash("schedules"))),
  "go-handlers": () => go(parseRoute(ctx().listHash("handlers"))),
  "go-executions": () => go(parseRoute(ctx().listHash("executions"))),
  "row-down": () => walk(1),
  "row-up": () => walk(-1),
  "open-row": () => focusedRow()?.querySelector("a")?.click(),
  back: () => route.id != null && go(parseRoute(ctx().listHash(route.view))),
  "next-page": () => document.getElementById("page-next")?.click(),
  "previous-page": () => document.getElementById("page-previous")?.click(),
  search: () => (route.view === "executions" || route.view === "schedules") && route.id == null
    ? document.getElementById("search").focus() : (go({ view: "schedules" }), document.getElementById("search")?.focus()),
  "select-row": ({ id }) => mark(id, !selected.has(id)),
  "toggle-row": () => focusedRow()?.querySelector("[data-act=pause-schedule],[data-act=resume-schedule]")?.click(),
  "run-row": () => focusedRow()?.querySelector("[data-act=run-schedule],[data-act=run-method],[data-act=run-again]")?.click(),
  more: () => (pages += 1, sync(false), render()),
  select: ({ id, checked }) => mark(id, checked),
  "select-page": ({ checked }) => {
    for (const row of rows()) mark(row.dataset.id, checked);
  },
  "select-none": () => (selected.clear(), render()),
  "pause-live": () => {
    held = !held;
    if (!held) resources.reload();
    say(held ? "The page is held still. Press p to go on." : "The page follows again.");
    render();
  },
  retry: () => (stream.retry(), resources.reload()),
  theme: set("theme"),
  contrast: set("contrast"),
  zone: set("zone"),
  help: () => openHelp(settings),
  palette: () => openPalette({
    commands: KEYS.filter(({ act, on }) => !on && act !== "palette" && !act.startsWith("row-"))
      .map(({ act, key, text }) => ({ text, hint: key, run: () => commands[act]?.() })),
    handlers: ctx().get("handlers")?.data?.handlers ?? [],
    goTo: (view, id) => go({ view, id }),
    run: (handler, method) => actions["run-method"]({ handler, method }),
  }),
  ...actions,
};

document.addEventListener("click", (event) => {
  const asked = event.target.closest("[data-act]");
  if (asked && !asked.closest("dialog")) {
    commands[asked.dataset.act]?.({ ...asked.dataset, checked: asked.checked });
    return;
  }
  const anchor = event.target.closest("a[href^='#/']");
  if (!anchor || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(parseRoute(anchor.getAttribute("href")));
});

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if ((event.ctrlKey || event.metaKey) && event.key === "k") {
    event.preventDefault();
    commands.palette();
    return;
  }
  const typing = event.target.closest("input:not([type=checkbox]),textarea,select");
  if (event.key === "Escape" && typing) typing.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  const row = focusedRow();
  if (["ArrowDown", "ArrowUp"].includes(event.key) && document.activeElement.matches("[data-row]")) {
    event.preventDefault();
    walk(event.key === "ArrowDown" ? 1 : -1);
    return;
  }
  if (event.key === "Enter" && !document.activeElement.matches("[data-row]")) return;
  const found = settings.get("keys") === "off" && event.key !== "Enter" ? null : actionFor(event.key, row?.dataset.row);
  if (!found) return;
  event.preventDefault();
  commands[found.act]({ id: row?.dataset.id });
});

let typing;
document.addEventListener("input", (event) => {
  const form = event.target.closest("form[data-form=filter]");
  if (!form) return;
  clearTimeout(typing);
  typing = setTimeout(() => filter(form), event.target.type === "search" ? TYPING_MS : 0);
});
document.addEventListener("submit", (event) => event.preventDefault());

function filter(form) {
  const given = new FormData(form);
  const query = Object.fromEntries([...new Set(given.keys())].map((name) => [name, given.getAll(name).join(",")]));
  go({ view: route.view, query: { ...route.query, status: null, page: null, ...query } }, true);
}

// ---- Start --------------------------------------------------------------------------------------

document.addEventListener("visibilitychange", render);
setInterval(() => {
  if (!document.hidden && !held) resources.tick(link.state === "polling" || link.state === "disconnected");
}, TICK_MS);
setInterval(() => held || render(), 1000);
document.getElementById("zones").append(...Intl.supportedValuesOf("timeZone").map((zone) => h("option", { value: zone })));
stream.retry = openStream("/api/events", { onEvents, onLink });
onRoute();
