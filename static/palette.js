// The command palette: everything the page can do, and every schedule, by a few letters. And the help.

import { request } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { KEYS } from "./keys.js";
import { bestMatches, methodsOf } from "./model.js";
import { button } from "./pieces.js";

const SEARCH_DELAY_MS = 150;

/** Open the palette. `commands`: [{text, hint?, run()}]; `goTo(view, id)` opens what was found. */
export function openPalette({ commands, handlers, goTo, run }) {
  const fixed = [
    ...commands,
    ...handlers.flatMap((handler) => [
      { text: `handler ${handler.id}`, run: () => goTo("handlers", handler.id) },
      ...methodsOf(handler).map((method) => ({ text: `run ${handler.id}.${method.name}`, run: () => run(handler.id, method.name) })),
    ]),
  ];
  let query = "";
  let chosen = 0;
  let found = [];
  let timer;
  const items = () => bestMatches(query, [...fixed, ...found]);

  const { dialog, update, close } = openDialog({
    name: "palette", label: "Commands", onClose: () => clearTimeout(timer),
    render() {
      const list = items();
      return [
        h("input", { type: "text", id: "palette-input", role: "combobox", "aria-expanded": "true", "aria-controls": "palette-list", "aria-autocomplete": "list",
          "aria-activedescendant": list.length ? `choice-${chosen}` : null, "aria-label": "Command", placeholder: "command, schedule, handler", autocomplete: "off", spellcheck: "false" }),
        h("ul", { id: "palette-list", role: "listbox", "aria-label": "Commands" }, list.map((item, i) =>
          h("li", { id: `choice-${i}`, role: "option", "aria-selected": String(i === chosen), "data-act": "choose", "data-at": i },
            h("span", null, item.text), item.hint && h("kbd", null, item.hint)))),
        list.length ? null : h("p", { class: "empty" }, "nothing found"),
      ];
    },
    onAct: (_, { at }) => choose(Number(at)),
  });

  function choose(at) {
    const item = items()[at];
    close();
    item?.run();
  }

  async function search() {
    const wanted = query;
    const { schedules } = await request("GET", `/api/schedules?limit=8&search=${encodeURIComponent(wanted)}`).catch(() => ({ schedules: [] }));
    if (wanted !== query || !dialog.open) return;
    found = schedules.map(({ id, name }) => ({ text: `schedule ${name ? `${name} (${id})` : id}`, run: () => goTo("schedules", id) }));
    update();
  }

  dialog.addEventListener("input", ({ target }) => {
    [query, chosen, found] = [target.value, 0, []];
    clearTimeout(timer);
    if (query.trim()) timer = setTimeout(search, SEARCH_DELAY_MS);
    update();
  });
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const count = items().length;
    if (step && count) chosen = (chosen + step + count) % count;
    else if (event.key === "Enter") return choose(chosen);
    else return;
    event.preventDefault();
    update();
    dialog.querySelector("[aria-selected=true]").scrollIntoView({ block: "nearest" });
  });
}

/** Show the keys, and the switch for them. */
export function openHelp(settings) {
  const { update } = openDialog({
    name: "help", label: "Keys",
    render: () => [h("h2", null, "Keys"),
      h("dl", { class: settings.get("keys") === "off" ? "off" : null }, KEYS.map(({ key, text, on }) =>
        [h("dt", null, h("kbd", null, key)), h("dd", null, text, on ? h("span", { class: "dim" }, on === "any" ? " (on a row)" : ` (on its row or page)`) : null)])),
      h("p", null, h("label", null, h("input", { type: "checkbox", "data-act": "switch", checked: settings.get("keys") !== "off" }), " single-key shortcuts")),
      h("p", { class: "buttons" }, button("close", "close"))],
    onAct() {
      settings.set("keys", settings.get("keys") === "off" ? "on" : "off");
      update();
    },
  });
}
