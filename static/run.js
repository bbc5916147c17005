// Run one method now, with parameters from fields or a JSON editor.

import { runMethod } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { readNumber, readParams } from "./draft.js";
import { enterParam, field, focusError, paramFields, placeError, switchParams } from "./fields.js";
import { button } from "./pieces.js";

/** Open the dialog for a method; `onDone` gets the id of the new execution. */
export function openRun({ handler_id, method, onDone }) {
  const form = { draft: { job_params: "{}" }, errors: {}, sending: false };
  Object.assign(form, openDialog({
    name: "run", label: `Run ${handler_id}.${method.name}`, render: () => renderRun(form, handler_id, method),
    onAct() {
      switchParams(form, method.parameters);
      form.update();
    },
  }));

  form.dialog.addEventListener("input", ({ target: { name, value } }) => {
    form.draft[name] = value;
    delete form.errors[name];
    enterParam(form, name);
    form.update();
  });

  form.dialog.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { params, errors } = readParams(form.draft, method.parameters);
    form.errors = errors;
    if (!Object.keys(errors).length) await send(params);
    form.update();
    focusError(form.dialog);
  });

  async function send(job_params) {
    form.sending = true;
    const timeout = form.draft.timeout ? { timeout: readNumber(form.draft.timeout) } : {};
    try {
      const { execution_id } = await runMethod({ handler_id, method_name: method.name, job_params, ...timeout });
      form.close();
      onDone(execution_id);
    } catch (error) {
      placeError(form, error);
    }
    form.sending = false;
  }
}

const renderRun = (form, handler_id, { name, doc, parameters }) => h("form", { novalidate: true },
  h("h2", null, `Run ${handler_id}.${name}`),
  doc && h("p", { class: "dim" }, doc),
  paramFields(form, parameters),
  field(form, { path: "timeout", label: "Timeout, s", control: "number" }),
  form.errors[""] && h("p", { class: "error", role: "alert" }, `✗ ${form.errors[""]}`),
  h("p", { class: "buttons" }, button("close", "cancel"), h("button", { type: "submit", class: "primary", disabled: form.sending }, "run")));
