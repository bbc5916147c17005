// What buttons, keys, filters and the palette can ask for, by name; and how they ask.

import { createActions } from "./actions.js";
import { h } from "./dom.js";
import { KEYS, actionFor } from "./keys.js";
import { VIEWS, parseRoute } from "./model.js";
import { openHelp, openPalette } from "./palette.js";

const TYPING_MS = 200;

export function createCommands(page, stream, showLook) {
  const commands = {
    ...moveCommands(page),
    ...selectCommands(page),
    ...settingCommands(page, showLook),
    ...createActions(page),
    "pause-live": () => page.hold(),
    retry: () => stream.retry(),
    help: () => openHelp(page.settings),
    palette: () =>
      openPalette({
        commands: offer(commands, page, focusedRow()),
        handlers: page.handlers,
        goTo: (view, id) => page.go({ view, id }),
        runMethod: (handler, id) => commands["run-method"]({ handler, id }),
      }),
  };
  return commands;
}

/** The row that has the focus, or what stands for the thing that the whole page is about. */
const focusedRow = () =>
  document.activeElement.closest("[data-row]") ?? document.querySelector(".heading [data-row]");

const rows = () => [...document.querySelectorAll("main [data-row][tabindex]")];

function walk(step) {
  const list = rows();
  const at = list.indexOf(document.activeElement.closest("[data-row]"));
  const next = at < 0 && step < 0 ? list.length - 1 : at + step;
  list[Math.min(list.length - 1, Math.max(0, next))]?.focus();
}

function press(...acts) {
  const found = focusedRow()?.querySelector(acts.map((act) => `[data-act=${act}]`).join());
  if (found?.checkVisibility()) found.click();
}

/** Whether a button for it would be shown to this role: the stylesheet knows. */
function isOffered(act) {
  const probe = h("span", { "data-act": act });
  document.body.append(probe);
  const isShown = probe.checkVisibility();
  probe.remove();
  return isShown;
}

const follow = (id) => document.getElementById(id)?.click();

function moveCommands(page) {
  const goToList = (view) => page.go(parseRoute(page.listHash(view)));
  return {
    ...Object.fromEntries(VIEWS.map((view) => [`go-${view}`, () => goToList(view)])),
    back: () => page.route.id != null && goToList(page.route.view),
    "row-down": () => walk(1),
    "row-up": () => walk(-1),
    "open-row": () => focusedRow()?.querySelector("a")?.click(),
    "toggle-row": () => press("pause-schedule", "resume-schedule"),
    "next-page": () => follow("page-next"),
    "previous-page": () => follow("page-previous"),
    search: () => {
      if (!document.getElementById("search")) goToList("schedules");
      document.getElementById("search").focus();
    },
  };
}

function selectCommands(page) {
  const { selected } = page;
  const mark = (ids, isOn, isAll = false) => {
    for (const id of ids) selected[isOn ? "add" : "delete"](id);
    page.isAllSelected = isAll;
    page.render();
  };
  const shown = () => rows().map((row) => row.dataset.id);
  return {
    select: ({ id, checked }) => mark([id], checked),
    "select-row": ({ id }) => mark([id], !selected.has(id)),
    "select-page": ({ checked }) => mark(shown(), checked),
    "select-all": () => mark(shown(), true, true),
    "select-none": () => mark([...selected], false),
  };
}

function settingCommands(page, showLook) {
  const turn = (name) => () => {
    page.say(`${name}: ${page.settings.next(name)}`);
    showLook();
    page.render();
  };
  return { theme: turn("theme"), contrast: turn("contrast"), zone: turn("zone") };
}

/** The commands of the palette that do something here: those for the row or page at hand first. */
function offer(commands, page, row) {
  const { dataset = {} } = row ?? {};
  const can = {
    palette: false,
    "row-down": false,
    "row-up": false,
    "select-row": row?.matches("tr"),
    "next-page": document.querySelector("#page-next[href]"),
    "previous-page": document.querySelector("#page-previous[href]"),
    back: page.route.id != null,
    undo: page.undo,
  };
  return KEYS.filter(({ on }) => !on || on === dataset.row)
    .filter(({ act }) => (act in can ? can[act] : isOffered(act)))
    .sort((a, b) => Boolean(b.on) - Boolean(a.on))
    .map(({ act, key, text, on }) => ({
      text: on ? `${text} ${dataset.id}` : text,
      hint: key,
      run: () => commands[act](dataset),
    }));
}

// ---- Clicks, keys and filters

export function listen(page, commands) {
  document.addEventListener("click", (event) => click(event, page, commands));
  document.addEventListener("keydown", (event) => keyDown(event, page, commands));
  document.addEventListener("submit", (event) => event.preventDefault());
  let typing;
  document.addEventListener("input", ({ target }) => {
    const form = target.closest("form[data-form=filter]");
    if (!form) return;
    clearTimeout(typing);
    typing = setTimeout(() => filter(form, page), target.type === "search" ? TYPING_MS : 0);
  });
}

function click(event, page, commands) {
  if (event.target.matches(".skip")) {
    event.preventDefault(); // the address is that of the view
    document.getElementById("main").focus();
  }
  const asked = event.target.closest("[data-act]");
  if (asked && !asked.closest("dialog")) {
    const row = asked.closest("[data-row]")?.dataset;
    return void commands[asked.dataset.act]?.({ ...row, ...asked.dataset, checked: asked.checked });
  }
  const anchor = event.target.closest("a[href^='#/']") ?? linkOfRow(event.target);
  if (!anchor || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  page.go(parseRoute(anchor.getAttribute("href")));
}

/** A row opens wherever it is pressed, except beside its controls and when text was marked. */
const linkOfRow = (target) =>
  getSelection().isCollapsed && !target.closest("input,.pick,.acts")
    ? target.closest("tr[data-row]")?.querySelector("a")
    : null;

function keyDown(event, page, commands) {
  if (document.querySelector("dialog[open]")) return;
  const { act, ...data } = asked(event, page) ?? {};
  if (!act || !isOffered(act)) return;
  event.preventDefault();
  commands[act](data);
}

const ARROWS = { ArrowDown: "row-down", ArrowUp: "row-up", Enter: "open-row" };

/** The command a key press asks for; what is typed into a field asks for none. */
function asked({ key, target, ctrlKey, metaKey, altKey }, { settings }) {
  if ((ctrlKey || metaKey) && key === "k") return { act: "palette" };
  const field = target.closest("input:not([type=checkbox]),textarea,select");
  if (field && key === "Escape") field.blur();
  if (field || ctrlKey || metaKey || altKey) return null;
  if (key in ARROWS) return target.matches("[data-row]") ? { act: ARROWS[key] } : null;
  if (settings.get("keys") === "off") return null;
  const data = focusedRow()?.dataset;
  return { ...data, act: actionFor(key, data?.row)?.act };
}

function filter(form, page) {
  const given = new FormData(form);
  const query = { ...page.route.query, status: null, page: null, before: null };
  for (const name of given.keys()) query[name] = given.getAll(name).join();
  page.go({ view: page.route.view, query }, true);
}
