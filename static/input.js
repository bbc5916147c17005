// Clicks, keys and filters of the page, turned into commands and routes.

import { focusedRow } from "./commands.js";
import { actionFor } from "./keys.js";
import { parseRoute } from "./model.js";

const TYPING_MS = 200;

export function listen(page, commands) {
  document.addEventListener("click", (event) => click(event, page, commands));
  document.addEventListener("keydown", (event) => press(event, page, commands));
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
  const asked = event.target.closest("[data-act]");
  if (asked && !asked.closest("dialog")) {
    commands[asked.dataset.act]?.({ ...asked.dataset, checked: asked.checked });
    return;
  }
  const anchor = event.target.closest("a[href^='#/']");
  if (!anchor || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  page.go(parseRoute(anchor.getAttribute("href")));
}

function press(event, page, commands) {
  if (document.querySelector("dialog[open]")) return;
  const { act, id } = asked(event, page) ?? {};
  if (!act) return;
  event.preventDefault();
  commands[act]({ id });
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
  const { row, id } = focusedRow()?.dataset ?? {};
  return { act: actionFor(key, row)?.act, id };
}

/** The fields of a filter form become the query of the route. */
function filter(form, page) {
  const given = new FormData(form);
  const query = Object.fromEntries(
    [...new Set(given.keys())].map((name) => [name, given.getAll(name).join()]),
  );
  const { route } = page;
  page.go(
    {
      view: route.view,
      query: { ...route.query, status: null, page: null, before: null, ...query },
    },
    true,
  );
}
