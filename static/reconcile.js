// The keyed reconcile: turns the elements there are into the elements there should be.

const keyOf = (node) => node.dataset?.key ?? node.id ?? "";

function fill(node) {
  if (node.make) node.append(...node.make());
  else node.querySelectorAll?.("[data-version]").forEach(fill);
}

function reconcile(old, next) {
  if (!next.make && old.isEqualNode(next)) return;
  if (old.nodeType === Node.TEXT_NODE) return void (old.data = next.data);
  const isStale = !next.make || old.dataset.version !== next.dataset.version;
  for (const name of old.getAttributeNames()) if (!next.hasAttribute(name)) drop(old, name);
  for (const { name, value } of next.attributes) put(old, name, value);
  if (isStale) reconcileChildren(old, next.make?.() ?? [...next.childNodes]);
}

// Whether <details> is open is up to the user.
const drop = (node, name) => name !== "open" && node.removeAttribute(name);
const put = (node, name, value) =>
  name !== "open" && node.getAttribute(name) !== value && node.setAttribute(name, value);

/** Make the children of `parent` equal to `wanted` with as few changes as keys allow: an element
 *  is the same as one before it if both have the same data-key or id, or else the same place. */
export function reconcileChildren(parent, wanted) {
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
