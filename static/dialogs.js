// Dialogs: a native <dialog> whose content is rendered again whenever its model changes.

import { h, patch } from "./dom.js";
import { button } from "./pieces.js";

/** Show a modal dialog. `render()` gives its content; `onAct(act, data)` hears its buttons. */
export function openDialog({ name, label, render, onAct, onClose }) {
  const dialog = h("dialog", { class: name, "aria-label": label });
  const update = () => patch(dialog, render());
  const close = () => dialog.close();
  dialog.addEventListener("click", (event) => {
    const { act, ...data } = event.target.closest("[data-act]")?.dataset ?? {};
    if (act === "close") close();
    else if (act) onAct?.(act, data);
  });
  dialog.addEventListener("close", () => {
    dialog.remove();
    onClose?.();
  });
  document.body.append(dialog);
  update();
  dialog.showModal();
  return { dialog, update, close };
}

/** Ask before something that cannot be undone; true if `label` was chosen. */
export const confirmAction = ({ title, text, label }) =>
  new Promise((resolve) => {
    let isAgreed = false;
    const { close } = openDialog({
      name: "confirm",
      label: title,
      onClose: () => resolve(isAgreed),
      render: () => [
        h("h2", title),
        h("p", text),
        h("p.buttons",
          button("close", "keep"),
          button("agree", label, { class: "danger", autofocus: true })),
      ],
      onAct() {
        isAgreed = true;
        close();
      },
    });
  });
