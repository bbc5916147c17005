// Logging in with a token: the server answers with a cookie that scripts cannot read.

import { logIn } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { field, focusError, submitButton } from "./fields.js";

/** Ask for a token until one is right; then `onDone()`. */
export function openLogin(onDone) {
  const form = { draft: {}, errors: {}, sending: false };
  const { dialog, update, close } = openDialog({
    name: "login",
    label: "Log in",
    render: () => renderLogin(form),
  });
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.addEventListener("input", ({ target }) => {
    form.draft.token = target.value;
  });
  dialog.addEventListener("submit", async (event) => {
    event.preventDefault();
    Object.assign(form, { sending: true, errors: {} });
    update();
    try {
      await logIn(form.draft.token ?? "");
      close();
      onDone();
    } catch (error) {
      Object.assign(form, { sending: false, errors: { token: error.message } });
      update();
      focusError(dialog);
    }
  });
}

const renderLogin = (form) =>
  h(
    "form",
    { novalidate: true },
    h("h2", null, "Log in"),
    field(form, {
      path: "token",
      label: "Token",
      hint: "from: schedulezero.py token create NAME",
      type: "password",
      autocomplete: "current-password",
    }),
    h("p", { class: "buttons" }, submitButton("log in", form.sending)),
  );
