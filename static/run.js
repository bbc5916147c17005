// Run one method now, with parameters from fields or a JSON editor.

import { runMethod } from "./api.js";
import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { readNumber, readParams } from "./draft.js";
import {
  enterParam,
  field,
  focusError,
  paramFields,
  placeError,
  submitButton,
  switchParams,
} from "./fields.js";
import { button } from "./pieces.js";

/** Open the dialog for a method; `onDone` gets the id of the new execution. */
export function openRun(options) {
  new RunForm(options);
}

class RunForm {
  draft = { job_params: "{}" };
  errors = {};
  sending = false;

  constructor({ handler_id, method, onDone }) {
    Object.assign(this, { handler_id, method, onDone });
    const label = `Run ${handler_id}.${method.name}`;
    Object.assign(
      this,
      openDialog({
        name: "run",
        label,
        render: () => renderRun(this, label),
        onAct: () => this.act(),
      }),
    );
    this.dialog.addEventListener("input", ({ target }) => this.enter(target));
    this.dialog.addEventListener("submit", (event) => this.submit(event));
  }

  act() {
    switchParams(this, this.method.parameters);
    this.update();
  }

  enter({ name, value }) {
    this.draft[name] = value;
    delete this.errors[name];
    enterParam(this, name);
    this.update();
  }

  async submit(event) {
    event.preventDefault();
    const { params, errors } = readParams(this.draft, this.method.parameters);
    this.errors = errors;
    if (!Object.keys(errors).length) await this.send(params);
    this.update();
    focusError(this.dialog);
  }

  async send(job_params) {
    this.sending = true;
    const {
      handler_id,
      method: { name: method_name },
    } = this;
    const timeout = this.draft.timeout ? readNumber(this.draft.timeout) : undefined;
    try {
      const { execution_id } = await runMethod({ handler_id, method_name, job_params, timeout });
      this.close();
      this.onDone(execution_id);
    } catch (error) {
      placeError(this, error);
    }
    this.sending = false;
  }
}

const renderRun = (form, title) =>
  h(
    "form",
    { novalidate: true },
    h("h2", null, title),
    form.method.doc && h("p", { class: "dim" }, form.method.doc),
    paramFields(form, form.method.parameters),
    field(form, { path: "timeout", label: "Timeout, s", control: "number" }),
    form.errors[""] && h("p", { class: "error", role: "alert" }, `✗ ${form.errors[""]}`),
    h("p", { class: "buttons" }, button("close", "cancel"), submitButton("run", form.sending)),
  );
