// Small pieces of page that several views are built of. Pure: data in, elements out.

import { h } from "./dom.js";
import { formatRelative, stateOf } from "./format.js";
import { renderRoute } from "./model.js";

/** A titled box; `aside` stands at the right end of its upper edge. */
export const frame = ({ title, aside, name, note }, ...children) =>
  h("section", { class: `frame ${name}-frame`, "data-key": name, "aria-label": title },
    h("header", null, h("h2", null, title), note && h("span", { class: "note" }, note), aside && h("span", { class: "aside" }, aside)),
    h("div", { class: "body" }, children));

/** State as shape, text and colour. */
export function state(name, text) {
  const [shape, label, tone] = stateOf(name);
  return h("span", { class: `state ${tone}` }, h("span", { "aria-hidden": "true", class: "shape" }, shape), text ?? label);
}

/** Only the shape; the text is there for those who do not see it. */
export function shape(name) {
  const [mark, label, tone] = stateOf(name);
  return h("span", { class: `state ${tone}`, title: label },
    h("span", { "aria-hidden": "true", class: "shape" }, mark), h("span", { class: "unseen" }, label));
}

/** A moment: absolute, relative ("rel") or both, always with everything in its title. */
export function when(iso, { now, times }, how = "both") {
  if (!iso) return h("span", { class: "dim" }, "–");
  const at = Date.parse(iso);
  const [relative, absolute] = [formatRelative(at - now), times.short(at, now)];
  const attributes = { datetime: iso, title: times.full(at) };
  if (how === "rel") return h("time", attributes, relative);
  if (how === "abs") return h("time", attributes, absolute);
  return h("time", attributes, relative, " ", h("span", { class: "dim" }, absolute));
}

export const link = (view, id, text, props) =>
  h("a", { href: renderRoute({ view, id }), ...props }, text ?? id);

/** A button that asks main.js for an action; `data` becomes data attributes. */
export const button = (act, label, { title, data = {}, ...props } = {}) =>
  h("button", {
    type: "button", "data-act": act, title, ...props,
    ...Object.fromEntries(Object.entries(data).map(([name, value]) => [`data-${name}`, value])),
  }, label);

/** Handler and method as one word: ding-dong.chime */
export const call = ({ handler_id, method_name }) =>
  h("span", { class: "call" }, h("span", { class: "dim" }, `${handler_id}.`), method_name);

export const empty = (...text) => h("p", { class: "empty" }, text);

/** What stands where a resource would: waiting, an error with its sentence, or nothing. */
export function missing(resource) {
  if (resource?.error && !resource.data) return h("p", { class: "empty red", role: "alert" }, resource.error.message);
  return resource?.data ? null : empty("loading …");
}

/** A table with a caption for those who do not see it. `heads`: [class, label or node, attributes]; the
 *  first class is the column's, and sets its width. A `wide` one becomes blocks of lines where it is narrow. */
export const table = ({ caption, name, busy, heads, wide }, rows) =>
  h("table", { class: `${name} ${wide ? "wide" : ""}`, "data-key": name, "aria-busy": busy ? "true" : null },
    h("caption", { class: "unseen" }, caption),
    h("colgroup", null, heads.map(([kind]) => h("col", { class: `c-${kind.split(" ")[0]}` }))),
    h("thead", null, h("tr", null, heads.map(([kind, label, more]) => h("th", { scope: "col", class: kind, ...more }, label)))),
    h("tbody", null, rows));

/** A row that the keyboard walks over; `id` and `kind` say what its keys act on. */
export const row = (kind, id, ...cells) =>
  h("tr", { "data-key": `${kind} ${id}`, "data-row": kind, "data-id": id, tabindex: "-1" }, cells);

export const cell = (kind, ...children) => h("td", { class: kind }, children);

/** The heading of a page about one thing. It takes the focus when the page opens, so it is there at once. */
export const heading = (text, ...beside) =>
  h("div", { class: "heading", "data-key": "heading" }, h("h1", { tabindex: "-1", id: "title" }, text), beside);

/** The heading of a list; its frame has the visible title. */
export const unseenHeading = (text) => h("h1", { class: "unseen", tabindex: "-1" }, text);

/** Pairs of name and value. */
export const facts = (pairs) =>
  h("dl", { class: "facts" }, pairs.filter(([, value]) => value != null && value !== "" && value !== false)
    .map(([name, value]) => [h("dt", null, name), h("dd", null, value)]));

export const select = (props, options, chosen) =>
  h("select", props, options.map(([value, label]) => h("option", { value, selected: value === (chosen ?? "") }, label)));
