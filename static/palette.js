// The command palette: all the page can do, and every schedule, by a few letters. And the help.

import { request } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { KEYS } from "./keys.js";
import { bestMatches, methodsOf } from "./model.js";
import { button } from "./pieces.js";

const SEARCH_DELAY_MS = 150;
const FOUND_ROWS = 8;

/** Open the palette. `commands`: [{text, hint?, run()}]; `goTo(view, id)` opens what was found, and
 *  `runMethod(handler_id, name)` the dialog of a method. */
export function openPalette(options) {
  new Palette(options);
}

class Palette {
  query = "";
  chosen = 0;
  found = [];

  constructor({ commands, handlers, goTo, runMethod }) {
    this.goTo = goTo;
    this.fixed = [
      ...commands,
      ...handlers.flatMap((handler) => [
        { text: `handler ${handler.id}`, run: () => goTo("handlers", handler.id) },
        ...methodsOf(handler).map(({ name }) => ({
          text: `run ${handler.id}.${name}`,
          run: () => runMethod(handler.id, name),
        })),
      ]),
    ];
    Object.assign(
      this,
      openDialog({
        name: "palette",
        label: "Commands",
        render: () => this.render(),
        onAct: (_, { at }) => this.choose(Number(at)),
        onClose: () => clearTimeout(this.timer),
      }),
    );
    this.dialog.addEventListener("input", ({ target }) => this.enter(target.value));
    this.dialog.addEventListener("keydown", (event) => this.press(event));
  }

  items() {
    return bestMatches(this.query, [...this.fixed, ...this.found]);
  }

  render() {
    const items = this.items();
    return [
      h("input", {
        type: "text",
        id: "palette-input",
        role: "combobox",
        "aria-expanded": "true",
        "aria-controls": "palette-list",
        "aria-autocomplete": "list",
        "aria-activedescendant": items.length ? `choice-${this.chosen}` : null,
        "aria-label": "Command",
        placeholder: "command, schedule, handler",
        autocomplete: "off",
        spellcheck: "false",
      }),
      h(
        "ul",
        { id: "palette-list", role: "listbox", "aria-label": "Commands" },
        items.map((item, i) =>
          h(
            "li",
            {
              id: `choice-${i}`,
              role: "option",
              "aria-selected": String(i === this.chosen),
              "data-act": "choose",
              "data-at": i,
            },
            h("span", null, item.text),
            item.hint && h("kbd", null, item.hint),
          ),
        ),
      ),
      items.length ? null : h("p", { class: "empty" }, "nothing found"),
    ];
  }

  choose(at) {
    const item = this.items()[at];
    this.close();
    item?.run();
  }

  enter(query) {
    Object.assign(this, { query, chosen: 0, found: [] });
    clearTimeout(this.timer);
    if (query.trim()) this.timer = setTimeout(() => this.search(query), SEARCH_DELAY_MS);
    this.update();
  }

  async search(query) {
    const { schedules } = await request(
      "GET",
      `/api/schedules?limit=${FOUND_ROWS}&search=${encodeURIComponent(query)}`,
    ).catch(() => ({ schedules: [] }));
    if (query !== this.query || !this.dialog.open) return;
    this.found = schedules.map(({ id, name }) => ({
      text: `schedule ${name ? `${name} (${id})` : id}`,
      run: () => this.goTo("schedules", id),
    }));
    this.update();
  }

  press(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const count = this.items().length;
    if (event.key === "Enter") this.choose(this.chosen);
    if (!step || !count) return;
    event.preventDefault();
    this.chosen = (this.chosen + step + count) % count;
    this.update();
    this.dialog.querySelector("[aria-selected=true]").scrollIntoView({ block: "nearest" });
  }
}

/** Show the keys, and the switch for them. */
export function openHelp(settings) {
  const isOn = () => settings.get("keys") !== "off";
  const { update } = openDialog({
    name: "help",
    label: "Keys",
    render: () => [
      h("h2", null, "Keys"),
      h(
        "dl",
        { class: isOn() ? null : "off" },
        KEYS.map(({ key, text, on }) => [
          h("dt", null, h("kbd", null, key)),
          h("dd", null, text, where(on)),
        ]),
      ),
      h(
        "p",
        null,
        h(
          "label",
          null,
          h("input", { type: "checkbox", "data-act": "switch", checked: isOn() }),
          " single-key shortcuts",
        ),
      ),
      h("p", { class: "buttons" }, button("close", "close", { autofocus: true })),
    ],
    onAct() {
      settings.set("keys", isOn() ? "off" : "on");
      update();
    },
  });
}

const where = (on) =>
  on &&
  h(
    "span",
    { class: "dim" },
    on === "any" ? " (on a row or page)" : ` (on ${on === "execution" ? "an" : "a"} ${on})`,
  );
