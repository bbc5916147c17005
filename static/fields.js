// Form fields with label, hint and error, drawn from a draft; and the fields of a method's parameters.

import { h } from "./dom.js";
import { controlOf } from "./draft.js";
import { button, select } from "./pieces.js";

/** One field. `path` is the dotted path of the API's error, and the key in the draft. */
export function field(form, { path, label, hint, control = "text", options, ...props }) {
  const error = form.errors[path];
  const id = `f-${path}`;
  const told = [hint && `${id}-hint`, error && `${id}-error`].filter(Boolean).join(" ");
  const attributes = {
    id, name: path, "aria-invalid": error ? "true" : null, "aria-describedby": told || null,
    autocomplete: "off", spellcheck: "false", ...props,
  };
  const value = form.draft[path] ?? "";
  const make = {
    text: () => h("input", { type: "text", value, ...attributes }),
    number: () => h("input", { type: "text", inputmode: "decimal", value, ...attributes }),
    area: () => h("textarea", { rows: 5, ...attributes }, value),
    select: () => select(attributes, options, value),
    check: () => h("input", { type: "checkbox", value: "true", checked: value === "true", ...attributes }),
  };
  return h("div", { class: `field ${control}`, "data-key": path },
    h("label", { for: id }, label), make[control](),
    hint && h("p", { class: "hint", id: `${id}-hint` }, hint),
    error && h("p", { class: "error", id: `${id}-error` }, `✗ ${error}`));
}

/** The parameters of a method: a field for each, or all of them as JSON. */
export function paramFields(form, parameters) {
  const asJson = form.draft.params_as === "json" || !parameters.length;
  const other = parameters.length > 0 && button(asJson ? "params-fields" : "params-json", asJson ? "as fields" : "as JSON");
  return h("fieldset", { class: "params", "data-key": "params" }, h("legend", null, "Parameters ", other),
    asJson
      ? field(form, { path: "job_params", label: "JSON object", control: "area", hint: parameters.length ? null : "This method does not tell its parameters." })
      : parameters.map((parameter) => paramField(form, parameter)));
}

function paramField(form, parameter) {
  const { name, type, required } = parameter;
  const preset = "default" in parameter ? JSON.stringify(parameter.default) : "";
  const kind = controlOf(parameter);
  const common = {
    path: `job_params.${name}`, label: required ? `${name} *` : name,
    hint: [type, kind === "json" && "as JSON"].filter(Boolean).join(", ") || null,
  };
  if (kind === "boolean") {
    return field(form, { ...common, control: "select", options: [["", preset ? `default (${preset})` : "–"], ["true", "true"], ["false", "false"]] });
  }
  return field(form, { ...common, control: kind === "number" ? "number" : "text", placeholder: preset || null, required });
}

/** The first field with an error gets the focus; errors without a field are the form's own. */
export function focusError(dialog) {
  dialog.querySelector("[aria-invalid=true]")?.focus();
}
