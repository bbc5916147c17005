// Elements from data, and one keyed reconcile. Nothing here ever parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** A new HTML element. Props are attributes; null and false leave one out. */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);

/** A new SVG element. */
export const s = (tag, props, ...children) => build(document.createElementNS(SVG, tag), props, children);

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
  reconcile(root, build(root.cloneNode(false), null, wanted));
  if (root.contains(focused) && focused !== document.activeElement) focused.focus({ preventScroll: true });
}

const keyOf = (node) => node.dataset?.key ?? node.id ?? "";

function reconcile(old, next) {
  if (old.nodeType === Node.TEXT_NODE) {
    if (old.data !== next.data) old.data = next.data;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (name !== "open" && !next.hasAttribute(name)) old.removeAttribute(name);
  }
  for (const { name, value } of next.attributes) {
    if (name !== "open" && old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  reconcileChildren(old, [...next.childNodes]);
  if (next.type === "checkbox" || next.type === "radio") old.checked = next.checked;
  // What is being typed belongs to the user.
  else if (old.matches("input,select,textarea") && old !== document.activeElement && old.value !== next.value) old.value = next.value;
}

function reconcileChildren(parent, wanted) {
  const staying = new Set(wanted.map(keyOf));
  for (const node of [...parent.children]) if (!staying.has(keyOf(node))) node.remove();
  const keyed = new Map([...parent.children].filter(keyOf).map((node) => [keyOf(node), node]));
  let cursor = parent.firstChild;
  for (const next of wanted) {
    const key = keyOf(next);
    const found = key ? keyed.get(key) : cursor && !keyOf(cursor) && cursor;
    const match = found && found.nodeName === next.nodeName ? found : null;
    if (match === cursor && match) cursor = cursor.nextSibling;
    else parent.insertBefore(match ?? next, cursor);
    if (match) reconcile(match, next);
  }
  while (cursor) {
    const rest = cursor.nextSibling;
    cursor.remove();
    cursor = rest;
  }
}
