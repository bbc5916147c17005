// The palette: all the page can do, and every schedule, by a few letters. And the help.

import { request } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { KEYS } from "./keys.js";
import { bestMatches, methodsOf, renderQuery } from "./model.js";
import { NO_HELP, button, dim, empty } from "./pieces.js";

const SEARCH_DELAY_MS = 150;
const FOUND_ROWS = 8;

/** `commands`: [{text, hint?, run()}], offered beside handlers, their methods and schedules. */
export function openPalette({ commands, handlers, goTo, runMethod }) {
  const offered = handlers.flatMap((handler) => [
    { text: `handler ${handler.id}`, run: () => goTo("handlers", handler.id) },
    ...methodsOf(handler).map(({ name }) => ({
      text: `run ${handler.id}.${name}`,
      run: () => runMethod(handler.id, name),
    })),
  ]);
  let [query, chosen, found, timer] = ["", 0, []];
  const items = () => bestMatches(query, [...commands, ...offered, ...found]);

  const choose = (at) => {
    const item = items()[at];
    close();
    item?.run();
  };
  const search = async (wanted) => {
    const url = `/api/schedules${renderQuery({ limit: FOUND_ROWS, search: wanted })}`;
    const { schedules } = await request("GET", url).catch(() => ({ schedules: [] }));
    if (wanted !== query || !dialog.open) return;
    found = schedules.map(({ id, name }) => ({
      text: `schedule ${name ? `${name} (${id})` : id}`,
      run: () => goTo("schedules", id),
    }));
    update();
  };
  const enter = ({ target }) => {
    [query, chosen, found] = [target.value, 0, []];
    clearTimeout(timer);
    if (query.trim()) timer = setTimeout(search, SEARCH_DELAY_MS, query);
    update();
  };
  const press = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const count = items().length;
    if (event.key === "Enter") {
      event.preventDefault(); // else what opens takes it for its own, and runs at once
      choose(chosen);
    }
    if (!step || !count) return;
    event.preventDefault();
    chosen = (chosen + step + count) % count;
    update();
    dialog.querySelector("[aria-selected=true]").scrollIntoView({ block: "nearest" });
  };

  const { dialog, update, close } = openDialog({
    name: "palette",
    label: "Commands",
    render: () => renderPalette(items(), chosen),
    onAct: (_, { at }) => choose(Number(at)),
    onClose: () => clearTimeout(timer),
  });
  dialog.addEventListener("input", enter);
  dialog.addEventListener("keydown", press);
}

function renderPalette(items, chosen) {
  const about = {
    type: "text", role: "combobox", "aria-expanded": "true", "aria-controls": "palette-list",
    "aria-autocomplete": "list", "aria-activedescendant": items.length ? `choice-${chosen}` : null,
    "aria-label": "Command", placeholder: "command, schedule, handler", ...NO_HELP,
  };
  const option = ({ text, hint }, i) =>
    h(`li#choice-${i}`,
      { role: "option", "aria-selected": String(i === chosen), "data-act": "choose", "data-at": i },
      h("span", text), hint && h("kbd", hint));
  return [
    h("input#palette-input", about),
    h("ul#palette-list", { role: "listbox", "aria-label": "Commands" }, items.map(option)),
    !items.length && empty("nothing found"),
  ];
}

export function openHelp(settings) {
  const where = (on) =>
    on && dim(` (on ${{ any: "a row", execution: "an execution" }[on] ?? `a ${on}`})`);
  const render = () => {
    const checked = settings.get("keys") === "on";
    return [
      h("h2", "Keys"),
      h("p",
        h("label",
          h("input", { type: "checkbox", "data-act": "switch", checked }),
          " single-key shortcuts")),
      h("dl", { class: !checked && "off" },
        KEYS.map(({ key, text, on }) => [h("dt", h("kbd", key)), h("dd", text, where(on))])),
      h("p.buttons", button("close", "close")),
    ];
  };
  const onAct = () => {
    settings.next("keys");
    update();
  };
  const { update } = openDialog({ name: "help", label: "Keys", render, onAct });
}
