// Run one method now, with parameters from fields or a JSON editor.

import { runMethod } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { controlFor, paramsDraft, readParams } from "./draft.js";
import { field, focusError, paramFields } from "./fields.js";
import { button } from "./pieces.js";

/** Open the dialog for a method; `onDone` gets the id of the new execution. */
export function openRun({ handler_id, method, onDone }) {
  const { parameters } = method;
  const form = { draft: { params_as: parameters.length ? "fields" : "json", job_params: "{}" }, errors: {}, sending: false };
  const { dialog, update, close } = openDialog({
    name: "run", label: `Run ${handler_id}.${method.name}`,
    render: () => h("form", { novalidate: true },
      h("h2", null, `Run ${handler_id}.${method.name}`),
      method.doc && h("p", { class: "dim" }, method.doc),
      paramFields(form, parameters),
      field(form, { path: "timeout", label: "Timeout, s", control: "number" }),
      form.errors[""] && h("p", { class: "error", role: "alert" }, `✗ ${form.errors[""]}`),
      h("p", { class: "buttons" }, button("close", "cancel"), h("button", { type: "submit", class: "primary", disabled: form.sending }, "run"))),
    onAct(act) {
      const { params, errors } = readParams(form.draft, parameters);
      if (act === "params-json") Object.assign(form.draft, { params_as: "json", job_params: JSON.stringify(params, null, 2) });
      else if (errors.job_params) form.errors = errors;
      else Object.assign(form.draft, paramsDraft(params, parameters));
      update();
    },
  });

  dialog.addEventListener("input", ({ target: { name, value } }) => {
    form.draft[name] = value;
    delete form.errors[name];
    if (name === "job_params") Object.assign(form.errors, readParams(form.draft, []).errors);
    update();
  });
  dialog.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { params, errors } = readParams(form.draft, parameters);
    form.errors = errors;
    if (!Object.keys(errors).length) await send(params);
    update();
    focusError(dialog);
  });

  async function send(job_params) {
    form.sending = true;
    const timeout = form.draft.timeout ? { timeout: Number(form.draft.timeout) } : {};
    try {
      onDone((await runMethod({ handler_id, method_name: method.name, job_params, ...timeout })).execution_id);
      close();
    } catch (error) {
      const paths = [...dialog.querySelectorAll("[name]")].map((control) => control.name);
      form.errors[controlFor(error.field, paths) ?? ""] = error.message;
    }
    form.sending = false;
  }
}
