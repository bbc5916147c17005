// Dialogs, and forms in them: a draft, fields drawn from it, and errors that stand at their fields.

import { h, patch } from "./dom.js";
import { controlFor, controlOf, paramsDraft, readParams } from "./draft.js";
import { NO_HELP, button, select } from "./pieces.js";

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

/** A form in a dialog. What it is about: name, title, draft, verb (the label of its button), cancel
 *  (what the other button asks for), content(), parameters() of the method called, read() for
 *  {body, errors by field path}, send(body), whose error stands at its field, and entered(name). */
export class Form {
  errors = {};
  sending = false;

  constructor(about) {
    Object.assign(this, about);
    const { name, title: label, onClose } = about;
    const hooks = { render: () => this.render(), onAct: (act) => this.act(act), onClose };
    Object.assign(this, openDialog({ name, label, ...hooks }));
    this.dialog.querySelector("input,select,textarea").focus();
    this.dialog.addEventListener("input", ({ target }) => this.enter(target));
    this.dialog.addEventListener("submit", (event) => this.submit(event));
  }

  render() {
    const { errors, sending, cancel } = this;
    return h("form", { novalidate: true },
      h("h2", this.title),
      this.content(this),
      errors[""] && h("p.error", { role: "alert" }, `✗ ${errors[""]}`),
      h("p.buttons",
        cancel && button(cancel, "cancel"),
        h("button.primary", { type: "submit", disabled: sending }, this.verb)));
  }

  act(act) {
    if (act === "switch-params") switchParams(this);
    else this.leave();
    this.update();
  }

  enter({ name, value, type, checked }) {
    const before = { ...this.draft };
    this.draft[name] = type === "checkbox" ? (checked ? "true" : "") : value;
    delete this.errors[name];
    // JSON is checked while it is typed.
    if (name === "job_params") Object.assign(this.errors, readParams(this.draft, []).errors);
    this.entered?.(name, before);
    this.update();
  }

  async submit(event) {
    event.preventDefault();
    const { body, errors } = this.read();
    const isTold = ([path]) => path.startsWith("trigger_config"); // by the preview
    const told = Object.fromEntries(Object.entries(this.errors).filter(isTold));
    this.errors = { ...told, ...errors };
    if (!Object.keys(errors).length) {
      this.errors = {};
      this.sending = true;
      this.update();
      await this.send(body).then(this.close, (error) => this.place(error));
      this.sending = false;
    }
    this.update();
    this.dialog.querySelector("[aria-invalid=true]")?.focus();
  }

  /** Put an API error at its control; if it names none, at `otherwise` or above the buttons. */
  place({ field, message }, otherwise = "") {
    const paths = [...this.dialog.querySelectorAll("[name]")].map((control) => control.name);
    this.errors[controlFor(field, paths) ?? otherwise] = message;
  }
}

/** One field. `path` is the dotted path of the API's error, and the key in the draft. */
export function field({ draft, errors }, path, label, { hint, control = "text", ...props } = {}) {
  const error = errors[path];
  const id = `f-${path}`;
  const told = [hint && `${id}-hint`, error && `${id}-error`].filter(Boolean).join(" ");
  const { options, ...attributes } = {
    id, name: path, "aria-invalid": error && "true", "aria-describedby": told || null,
    ...NO_HELP, ...props,
  };
  const value = draft[path] ?? "";
  const input = (more) => h("input", { type: "text", value, ...more, ...attributes });
  const make = {
    text: input,
    number: () => input({ inputmode: "decimal" }),
    area: () => h("textarea", { rows: 5, ...attributes }, value),
    select: () => select(attributes, options, value),
    check: () => input({ type: "checkbox", value: "true", checked: value === "true" }),
  };
  return h("div", { class: `field ${control}`, "data-key": path },
    h("label", { for: id }, label, hint && h("span.hint", { id: `${id}-hint` }, ` ${hint}`)),
    make[control](),
    error && h("p.error", { id: `${id}-error` }, `✗ ${error}`));
}

// ---- Parameters of a method: a field for each, or all of them as JSON

export function paramFields(form) {
  const parameters = form.parameters();
  const asJson = form.draft.params_as === "json" || !parameters.length;
  const other = parameters.length > 0 && button("switch-params", asJson ? "as fields" : "as JSON");
  const hint = !parameters.length && "any that the method takes";
  return h("fieldset#params.params",
    h("legend", "Parameters ", other),
    asJson
      ? field(form, "job_params", "JSON object", { control: "area", hint })
      : parameters.map((parameter) => paramField(form, parameter)));
}

function paramField(form, parameter) {
  const { name, type, required } = parameter;
  const preset = "default" in parameter ? JSON.stringify(parameter.default) : "";
  const kind = controlOf(parameter);
  const hint = [type, kind === "json" && "as JSON"].filter(Boolean).join(", ");
  const options = [["", preset ? `default (${preset})` : "–"], "true", "false"];
  const props =
    kind === "boolean"
      ? { control: "select", options }
      : { control: kind === "number" ? kind : "text", placeholder: preset || null, required };
  return field(form, `job_params.${name}`, required ? `${name} *` : name, { hint, ...props });
}

function switchParams(form) {
  const { draft, errors } = form;
  const parameters = form.parameters();
  const { params, errors: wrong } = readParams(draft, parameters);
  if (draft.params_as !== "json")
    Object.assign(draft, { params_as: "json", job_params: JSON.stringify(params, null, 2) });
  else if (wrong.job_params) Object.assign(errors, wrong);
  else Object.assign(draft, paramsDraft(params, parameters));
}
