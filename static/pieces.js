// Small pieces of page that several views are built of. Pure: data in, elements out.

import { h } from "./dom.js";
import { formatRelative, prettyJson, stateOf } from "./format.js";
import { isEmpty, renderRoute } from "./model.js";

export const dim = (...text) => h("span.dim", text);
export const empty = (...text) => h("p.empty", text);

/** A titled box; `note` stands after the title, `aside` at the right end of the upper edge. */
export const frame = ({ title, name = title.toLowerCase(), note, aside }, ...content) =>
  h(`section#${name}-frame.frame`, { "aria-label": title },
    h("header", h("h2", title), note && h("span.note", note), aside && h("span.aside", aside)),
    h("div.body", content));

/** What stands where a resource would: waiting, an error with its sentence, or nothing. */
export function missing(resource) {
  if (resource?.data) return null;
  const { error } = resource ?? {};
  return error ? h("p.empty.red", { role: "alert" }, error.message) : empty("loading …");
}

/** A table. `columns`: [class, label, content of an item's cell, attributes of the head]; the first
 *  class sets the width. Keys act on the `kind` and `idOf` a row. A `wide` table becomes blocks of
 *  lines where it is narrow. */
export function table(about, columns, items) {
  const { caption, name, kind, idOf = ({ id }) => id, busy, wide = true } = about;
  const rowProps = (id) => kind && { "data-row": kind, "data-id": id, tabindex: "-1" };
  const cell = ([style, label, content], item) =>
    h("td", { class: style, "data-label": typeof label === "string" && label }, content(item));
  const row = (item) =>
    h("tr", { "data-key": `${kind} ${idOf(item)}`, ...rowProps(idOf(item)) },
      columns.map((column) => cell(column, item)));
  const head = ([style, label, , more]) => h("th", { scope: "col", class: style, ...more }, label);
  return h("table", { class: wide ? `${name} wide` : name, "aria-busy": busy && "true" },
    h("caption.unseen", caption),
    h("colgroup", columns.map(([style]) => h("col", { class: style }))),
    h("thead", h("tr", columns.map(head))),
    h("tbody", items.map(row)));
}

/** A frame with a table of what `resource` holds, or `nothing`. */
export function tableFrame({ resource, nothing, ...about }, columns, items = []) {
  const shown = { caption: about.title, busy: resource?.loading, ...about };
  const content = items.length ? table(shown, columns, items) : empty(nothing);
  return frame(about, missing(resource) ?? content);
}

const mark = (text) => h("span.shape", { "aria-hidden": "true" }, text);

export function state(name, text) {
  const [shape, tone, words] = stateOf(name);
  return h(`span.state.${tone}`, { title: words }, mark(shape), text ?? words);
}

/** Only the shape; the text is there for those who do not see it. */
export const shape = (name) => state(name, h("span.unseen", stateOf(name)[2]));

/** A moment: absolute ("abs"), relative ("rel") or both, always with everything in its title. */
export function when(iso, { now, times }, how) {
  if (!iso) return dim("–");
  const at = Date.parse(iso);
  const relative = formatRelative(at - now);
  const absolute = times.short(at, now);
  const shown = { rel: relative, abs: absolute }[how] ?? [relative, " ", dim(absolute)];
  return h("time", { datetime: iso, title: times.full(at) }, shown);
}

export const link = (view, id, text = id, query) =>
  h("a", { href: renderRoute({ view, id, query }) }, text);

/** A button that asks for a command, which gets the data attributes of it and of its row. */
export const button = (act, label, props) =>
  h("button", { type: "button", "data-act": act, ...props }, label);

/** Handler and method as one word: ding-dong.chime */
export const call = ({ handler_id, method_name }) =>
  h("span.call", dim(`${handler_id}.`), method_name);

/** The way back and the heading, which takes the focus when the page of one thing opens. */
export const heading = (page, text, ...beside) => [
  h("p.trail", h("a", { href: page.listHash(page.route.view) }, `‹ ${titleOf(page.route.view)}`)),
  h("div#heading.heading", h("h1#title", { tabindex: "-1" }, text), beside),
];

export const titleOf = (view) => view[0].toUpperCase() + view.slice(1);

export const unseenHeading = (text) => h("h1.unseen", { tabindex: "-1" }, text);

export const tools = (kind, id, ...buttons) =>
  h("span.tools", { "data-row": kind, "data-id": id }, buttons);

export const pair = (...frames) => h("div#pair.pair", frames);

export const facts = (pairs) =>
  h("dl.facts",
    pairs
      .filter(([, value]) => value != null && value !== "" && value !== false)
      .map(([name, value]) => [h("dt", name), h("dd", value)]));

export const parameters = (params) => isEmpty(params) ? dim("none") : h("pre", prettyJson(params));

/** A choice among [value, label], or values that are their own labels. */
export const select = (props, options, chosen) =>
  h("select", props,
    options.map((option) => {
      const [value, label] = [option].flat();
      return h("option", { value, selected: value === (chosen ?? "") }, label ?? value);
    }));

/** Links between pages of a list: [address or nothing, label, id]. */
export function pages(...targets) {
  if (!targets.some(([href]) => href)) return null;
  const target = ([href, label, id]) =>
    id ? h(`a#page-${id}`, { href: href || null, "aria-disabled": !href && "true" }, label) : label;
  return h("nav.pager", { "aria-label": "Pages" }, targets.map(target));
}

/** The same for a list that is told newest first, from one cursor to the next. */
export const agePages = (route, next) => {
  const to = (before) => renderRoute({ ...route, query: { ...route.query, before } });
  return pages(
    [route.query.before && to(null), "« newest", "previous"],
    [next != null && to(next), "older ›", "next"]);
};

// ---- Filters of lists

export const filters = (...fields) =>
  h("form.toolbar", { role: "search", "data-form": "filter" }, fields);

export const NO_HELP = { autocomplete: "off", spellcheck: "false" };

export const searchField = (name, label, value = "", more = {}) =>
  h("input#search",
    { type: "search", name, value, placeholder: label, "aria-label": label, ...NO_HELP, ...more });

export const filterField = (name, label, options, { route }) =>
  select({ name, "aria-label": label }, options, route.query[name]);

export function handlerField(page) {
  const ids = page.handlers.map(({ id }) => id);
  return filterField("handler", "Handler", [["", "all handlers"], ...ids], page);
}
