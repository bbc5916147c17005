// Elements from data, and one keyed reconcile. Nothing here ever parses markup.

/** A new HTML element. Props are attributes; null and false leave one out. */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);

/** A new SVG element. */
export const s = (tag, props, ...children) => build(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

/** `node` with the children that `make` gives, made only if `version` is not what the page shows. */
export const lazy = (node, version, make) => Object.assign(build(node, { "data-version": version }, []), { make });

function build(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

/** Make the children of `root` equal to `wanted`. Nodes that stay keep focus, scroll and selection. */
export function patch(root, ...wanted) {
  const focused = document.activeElement;
  reconcileChildren(root, [...build(root.cloneNode(false), null, wanted).childNodes]);
  root.querySelectorAll("input,select,textarea").forEach(showDefault);
  if (root.contains(focused) && focused !== document.activeElement) focused.focus({ preventScroll: true });
}

/** A control shows what its attributes say, except the text the user is typing. */
function showDefault(control) {
  if (control.type === "checkbox" || control.type === "radio") control.checked = control.defaultChecked;
  else if (control !== document.activeElement) control.value = control.options ? control.querySelector("[selected]")?.value ?? "" : control.defaultValue;
}

const keyOf = (node) => node.dataset?.key ?? node.id ?? "";
const fill = (node) => (node.make ? node.append(...node.make()) : node.querySelectorAll?.("[data-version]").forEach(fill));

function reconcile(old, next) {
  if (!next.make && old.isEqualNode(next)) return;
  if (old.nodeType === Node.TEXT_NODE) return void (old.data = next.data);
  const isStale = !next.make || old.dataset.version !== next.dataset.version;
  for (const { name } of [...old.attributes]) if (name !== "open" && !next.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of next.attributes) if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  if (isStale) reconcileChildren(old, next.make?.() ?? [...next.childNodes]);
}

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
    else fill(next);
  }
  for (let rest; cursor; cursor = rest) [rest] = [cursor.nextSibling, cursor.remove()];
}
