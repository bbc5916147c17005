// What buttons, keys and the palette can ask for, by name.

import { createActions } from "./actions.js";
import { logOut } from "./api.js";
import { KEYS } from "./keys.js";
import { VIEWS, parseRoute } from "./model.js";
import { openHelp, openPalette } from "./palette.js";

/** The commands by name; each gets the data attributes of what asked. */
export function createCommands(page, stream, showLook) {
  const commands = {
    ...moveCommands(page),
    ...selectCommands(page),
    ...settingCommands(page, showLook),
    ...createActions(page),
    "pause-live": () => page.hold(),
    retry: () => stream.retry(),
    "log-out": () =>
      page.attempt(async () => {
        await logOut();
        page.resources.reload();
      }),
    help: () => openHelp(page.settings),
    palette: () =>
      openPalette({
        commands: offer(commands, focusedRow()),
        handlers: page.resources.get("handlers")?.data?.handlers ?? [],
        goTo: (view, id) => page.go({ view, id }),
        runMethod: (handler, method) => commands["run-method"]({ handler, method }),
      }),
  };
  return commands;
}

/** The row that has the focus, or what stands for the thing that the whole page is about. */
export const focusedRow = () =>
  document.activeElement.closest("[data-row]") ?? document.querySelector(".heading [data-row]");

const rows = () => [...document.querySelectorAll("main [data-row][tabindex]")];

function walk(step) {
  const list = rows();
  const at = list.indexOf(document.activeElement.closest("[data-row]"));
  const next = at < 0 && step < 0 ? list.length - 1 : at + step;
  list[Math.min(list.length - 1, Math.max(0, next))]?.focus();
}

/** Press the first of these buttons that the row has. */
const press = (row, ...acts) =>
  row?.querySelector(acts.map((act) => `[data-act=${act}]`).join())?.click();

const follow = (id) => document.getElementById(id)?.click();

function moveCommands(page) {
  const goToList = (view) => page.go(parseRoute(page.listHash(view)));
  return {
    ...Object.fromEntries(VIEWS.map((view) => [`go-${view}`, () => goToList(view)])),
    back: () => page.route.id != null && goToList(page.route.view),
    "row-down": () => walk(1),
    "row-up": () => walk(-1),
    "open-row": () => focusedRow()?.querySelector("a")?.click(),
    "run-row": () => press(focusedRow(), "run-schedule", "run-method", "run-again"),
    "toggle-row": () => press(focusedRow(), "pause-schedule", "resume-schedule"),
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
  const mark = (ids, isOn) => {
    for (const id of ids) selected[isOn ? "add" : "delete"](id);
    page.render();
  };
  return {
    select: ({ id, checked }) => mark([id], checked),
    "select-row": ({ id }) => mark([id], !selected.has(id)),
    "select-page": ({ checked }) =>
      mark(
        rows().map((row) => row.dataset.id),
        checked,
      ),
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

/** The commands of the palette: those for the row or page at hand first. */
function offer(commands, row) {
  const { id, row: kind } = row?.dataset ?? {};
  return KEYS.filter(
    ({ act, on }) => act !== "palette" && !act.startsWith("row-") && (!on || on === kind),
  )
    .sort((a, b) => Boolean(b.on) - Boolean(a.on))
    .map(({ act, key, text, on }) => ({
      text: on ? `${text} ${id}` : text,
      hint: key,
      run: () => commands[act]({ id }),
    }));
}
