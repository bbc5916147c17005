// Elements from data, and a page made equal to them. Nothing here ever parses markup.

import { reconcileChildren } from "./reconcile.js";

const SVG = "http://www.w3.org/2000/svg";

/** A new HTML or SVG element. Props are attributes; null and false leave one out. */
export const h = (tag, props, ...children) => build(document.createElement(tag), props, children);
export const s = (tag, props, ...children) =>
  build(document.createElementNS(SVG, tag), props, children);

/** `node` with the children `make` gives, made only if `version` is not what the page shows. */
export const lazy = (node, version, make) =>
  Object.assign(build(node, { "data-version": version }, []), { make });

function build(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value != null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

/** Make the children of `root` equal to `wanted`. What stays keeps focus, scroll and selection. */
export function patch(root, ...wanted) {
  const focused = document.activeElement;
  reconcileChildren(root, [...build(root.cloneNode(false), null, wanted).childNodes]);
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
