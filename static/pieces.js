// Small pieces of page that several views are built of. Pure: data in, elements out.

import { h } from "./dom.js";
import { formatRelative, stateOf } from "./format.js";
import { renderRoute } from "./model.js";

export const dim = (...text) => h("span", { class: "dim" }, text);

/** A titled box; `note` stands after the title, `aside` at the right end of the upper edge. */
export const frame = ({ title, aside, name, note }, ...children) =>
  h(
    "section",
    { class: `frame ${name}-frame`, "data-key": name, "aria-label": title },
    h(
      "header",
      null,
      h("h2", null, title),
      note && h("span", { class: "note" }, note),
      aside && h("span", { class: "aside" }, aside),
    ),
    h("div", { class: "body" }, children),
  );

/** A frame with a table of what `resource` holds; `nothing` is said if there are no rows. */
export function tableFrame({ title, name, note, aside, resource, nothing, table: about }, rows) {
  const content =
    missing(resource) ??
    (rows.length ? table({ caption: title, name, ...about }, rows) : empty(nothing));
  return frame({ title, name, note, aside }, content);
}

/** State as shape, text and colour. */
export function state(name, text) {
  const [mark, label, tone] = stateOf(name);
  const shown = h("span", { "aria-hidden": "true", class: "shape" }, mark);
  return h("span", { class: `state ${tone}` }, shown, text ?? label);
}

/** Only the shape; the text is there for those who do not see it. */
export function shape(name) {
  const [mark, label, tone] = stateOf(name);
  return h(
    "span",
    { class: `state ${tone}`, title: label },
    h("span", { "aria-hidden": "true", class: "shape" }, mark),
    h("span", { class: "unseen" }, label),
  );
}

/** A moment: absolute ("abs"), relative ("rel") or both, always with everything in its title. */
export function when(iso, { now, times }, how = "both") {
  if (!iso) return dim("–");
  const at = Date.parse(iso);
  const [relative, absolute] = [formatRelative(at - now), times.short(at, now)];
  const shown = { rel: relative, abs: absolute, both: [relative, " ", dim(absolute)] }[how];
  return h("time", { datetime: iso, title: times.full(at) }, shown);
}

export const link = (view, id, text, props) =>
  h("a", { href: renderRoute({ view, id }), ...props }, text ?? id);

/** A button that asks for a command; `data` becomes data attributes, which the command gets. */
export const button = (act, label, { data = {}, ...props } = {}) =>
  h("button", { type: "button", "data-act": act, ...props, ...dataset(data) }, label);

const dataset = (data) =>
  Object.fromEntries(Object.entries(data).map(([name, value]) => [`data-${name}`, value]));

/** Handler and method as one word: ding-dong.chime */
export const call = ({ handler_id, method_name }) =>
  h("span", { class: "call" }, dim(`${handler_id}.`), method_name);

export const empty = (...text) => h("p", { class: "empty" }, text);

/** What stands where a resource would: waiting, an error with its sentence, or nothing. */
export function missing(resource) {
  if (resource?.data) return null;
  return resource?.error
    ? h("p", { class: "empty red", role: "alert" }, resource.error.message)
    : empty("loading …");
}

/** A table with a caption for those who do not see it. `heads`: [class, label, attributes]; the
 *  first class is the column's, and sets its width. A `wide` one becomes blocks of lines where it
 *  is narrow. */
export const table = ({ caption, name, busy, heads, wide }, rows) =>
  h(
    "table",
    { class: `${name} ${wide ? "wide" : ""}`, "data-key": name, "aria-busy": busy ? "true" : null },
    h("caption", { class: "unseen" }, caption),
    h(
      "colgroup",
      null,
      heads.map(([kind]) => h("col", { class: `c-${kind.split(" ")[0]}` })),
    ),
    h("thead", null, h("tr", null, heads.map(head))),
    h("tbody", null, rows),
  );

const head = ([kind, label, more]) => h("th", { scope: "col", class: kind, ...more }, label);

/** A row that the keyboard walks over; `kind` and `id` say what its keys act on. */
export const row = (kind, id, ...cells) =>
  h("tr", { "data-key": `${kind} ${id}`, "data-row": kind, "data-id": id, tabindex: "-1" }, cells);

export const cell = (kind, ...children) => h("td", { class: kind }, children);

/** The way back from the page of one thing to its list. */
export const trail = (ctx, view, label) =>
  h("p", { class: "trail" }, h("a", { href: ctx.listHash(view) }, `‹ ${label}`));

/** The heading of a page about one thing. It takes the focus when the page opens, so it is there
 *  at once. */
export const heading = (text, ...beside) =>
  h(
    "div",
    { class: "heading", "data-key": "heading" },
    h("h1", { tabindex: "-1", id: "title" }, text),
    beside,
  );

/** The heading of a list; its frame has the visible title. */
export const unseenHeading = (text) => h("h1", { class: "unseen", tabindex: "-1" }, text);

/** What can be done with the thing a page is about; keys act on it too. */
export const tools = (kind, id, ...buttons) =>
  h("span", { class: "tools", "data-row": kind, "data-id": id }, buttons);

/** Pairs of name and value; those without a value are left out. */
export const facts = (pairs) =>
  h(
    "dl",
    { class: "facts" },
    pairs
      .filter(([, value]) => value != null && value !== "" && value !== false)
      .map(([name, value]) => [h("dt", null, name), h("dd", null, value)]),
  );

/** A choice among [value, label] options. */
export const select = (props, options, chosen) =>
  h(
    "select",
    props,
    options.map(([value, label]) =>
      h("option", { value, selected: value === (chosen ?? "") }, label),
    ),
  );

/** Links between pages of a list: [address or nothing, label, id] each; nothing if none leads
 *  anywhere. */
export function pages(...targets) {
  if (!targets.some(([href]) => href)) return null;
  return h(
    "nav",
    { class: "pager", "aria-label": "Pages" },
    targets.map(([href, label, id]) =>
      id ? h("a", { id, href: href || null, "aria-disabled": href ? null : "true" }, label) : label,
    ),
  );
}

// ---- Filters of lists ---------------------------------------------------------------------------

export const filters = (...fields) =>
  h("form", { class: "toolbar", role: "search", "data-form": "filter" }, fields);

export const searchField = (name, label, value = "") =>
  h("input", {
    type: "search",
    id: "search",
    name,
    value,
    placeholder: label,
    "aria-label": label,
    autocomplete: "off",
    spellcheck: "false",
  });

export function handlerField({ get, route: { query } }) {
  const ids = (get("handlers")?.data?.handlers ?? []).map(({ id }) => [id, id]);
  return select(
    { name: "handler", "aria-label": "Handler" },
    [["", "all handlers"], ...ids],
    query.handler,
  );
}
