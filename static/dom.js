// Elements from data, and a page made equal to them. Nothing parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** A new element: h("p#id.class", {title: "x"}, ...children). Props are attributes and may be left
 *  out; null and false leave an attribute or a child out. */
export const h = (tag, ...rest) => make((name) => document.createElement(name), tag, rest);
export const s = (tag, ...rest) => make((name) => document.createElementNS(SVG, name), tag, rest);

function make(create, tag, rest) {
  const [, name, id, kind] = /^(\w+)(?:#([\w-]+))?\.?(.*)$/.exec(tag);
  const props = rest[0]?.constructor === Object ? rest.shift() : {};
  return fill(create(name), { id, class: kind.replaceAll(".", " ") || null, ...props }, rest);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props))
    if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

/** `node` with the children `make` gives, made only if `version` is not what the page shows. */
export const lazy = (node, version, make) =>
  Object.assign(fill(node, { "data-version": version }, []), { make });

/** Make the children of `root` equal to `wanted`. What stays keeps focus, scroll and selection. */
export function patch(root, ...wanted) {
  const focused = document.activeElement;
  reconcileChildren(root, [...fill(root.cloneNode(false), {}, wanted).childNodes]);
  root.querySelectorAll("input,select,textarea").forEach(showDefault);
  if (root.contains(focused)) focused.focus({ preventScroll: true });
}

/** A control shows what its attributes say, except the text the user is typing. */
function showDefault(control) {
  const { options, defaultChecked, defaultValue, type } = control;
  if (type === "checkbox" || type === "radio") control.checked = defaultChecked;
  else if (control !== document.activeElement)
    control.value = options ? control.querySelector("[selected]")?.value : defaultValue;
}

const keyOf = (node) => node.dataset?.key ?? node.id ?? "";

function reconcile(old, next) {
  if (!next.make && old.isEqualNode(next)) return;
  if (old.nodeType === Node.TEXT_NODE) return void (old.data = next.data);
  const isStale = !next.make || old.dataset.version !== next.dataset.version;
  // Whether <details> is open is up to the user.
  for (const name of old.getAttributeNames())
    if (name !== "open" && !next.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of next.attributes)
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (isStale) reconcileChildren(old, next.make?.() ?? [...next.childNodes]);
}

function finish(node) {
  if (node.make) node.append(...node.make());
  else node.querySelectorAll?.("[data-version]").forEach(finish);
}

/** An element is the one from before that has the same data-key or id, or else the same place. */
function reconcileChildren(parent, wanted) {
  const staying = new Set(wanted.map(keyOf));
  for (const node of [...parent.children]) if (!staying.has(keyOf(node))) node.remove();
  const keyed = new Map([...parent.children].filter(keyOf).map((node) => [keyOf(node), node]));
  let cursor = parent.firstChild;
  for (const next of wanted) {
    const found = keyOf(next) ? keyed.get(keyOf(next)) : cursor && !keyOf(cursor) && cursor;
    const match = found && found.nodeName === next.nodeName ? found : null;
    if (match && match === cursor) cursor = cursor.nextSibling;
    else parent.insertBefore(match ?? next, cursor);
    if (match) reconcile(match, next);
    else finish(next);
  }
  for (let rest; cursor; cursor = rest) [rest] = [cursor.nextSibling, cursor.remove()];
}
