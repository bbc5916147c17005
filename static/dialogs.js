// Dialogs: a native <dialog> whose content is rendered again whenever its model changes.

import { h, patch } from "./dom.js";
import { button } from "./pieces.js";

/** Show a modal dialog. `render()` gives its content; `onAct(act, data)` hears its buttons. */
export function openDialog({ name, label, render, onAct, onClose }) {
  const dialog = h("dialog", { class: name, "aria-label": label });
  const update = () => patch(dialog, render());
  const close = () => dialog.close();
  dialog.addEventListener("click", (event) => {
    const act = event.target.closest("[data-act]");
    if (act?.dataset.act === "close") close();
    else if (act) onAct?.(act.dataset.act, act.dataset);
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
export function confirmAction({ title, text, label }) {
  return new Promise((resolve) => {
    let agreed = false;
    const { dialog, close } = openDialog({
      name: "confirm",
      label: title,
      onClose: () => resolve(agreed),
      render: () => [
        h("h2", null, title),
        h("p", null, text),
        h(
          "p",
          { class: "buttons" },
          button("close", "keep"),
          button("agree", label, { class: "danger", autofocus: true }),
        ),
      ],
      onAct() {
        agreed = true;
        close();
      },
    });
    dialog.querySelector("[data-act=agree]").focus();
  });
}
