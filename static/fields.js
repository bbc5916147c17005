// Form fields with label, hint and error, drawn from a draft; and those of a method's parameters.

import { h } from "./dom.js";
import { controlFor, controlOf, paramsDraft, readParams } from "./draft.js";
import { button, select } from "./pieces.js";

/** One field. `path` is the dotted path of the API's error, and the key in the draft. */
export function field(form, { path, label, hint, control = "text", options, ...props }) {
  const error = form.errors[path];
  const id = `f-${path}`;
  const told = [hint && `${id}-hint`, error && `${id}-error`].filter(Boolean).join(" ");
  const attributes = {
    id,
    name: path,
    "aria-invalid": error ? "true" : null,
    "aria-describedby": told || null,
    autocomplete: "off",
    spellcheck: "false",
    ...props,
  };
  const value = form.draft[path] ?? "";
  const make = {
    text: () => h("input", { type: "text", value, ...attributes }),
    number: () => h("input", { type: "text", inputmode: "decimal", value, ...attributes }),
    area: () => h("textarea", { rows: 5, ...attributes }, value),
    select: () => select(attributes, options, value),
    check: () =>
      h("input", { type: "checkbox", value: "true", checked: value === "true", ...attributes }),
  };
  return h(
    "div",
    { class: `field ${control}`, "data-key": path },
    h(
      "label",
      { for: id },
      label,
      hint && h("span", { class: "hint", id: `${id}-hint` }, ` ${hint}`),
    ),
    make[control](),
    error && h("p", { class: "error", id: `${id}-error` }, `✗ ${error}`),
  );
}

export const submitButton = (label, disabled) =>
  h("button", { type: "submit", class: "primary", disabled }, label);

/** The parameters of a method: a field for each, or all of them as JSON. */
export function paramFields(form, parameters) {
  const asJson = form.draft.params_as === "json" || !parameters.length;
  const other = parameters.length > 0 && button("switch-params", asJson ? "as fields" : "as JSON");
  return h(
    "fieldset",
    { class: "params", "data-key": "params" },
    h("legend", null, "Parameters ", other),
    asJson
      ? field(form, {
          path: "job_params",
          label: "JSON object",
          control: "area",
          hint: !parameters.length && "as the method likes it",
        })
      : parameters.map((parameter) => paramField(form, parameter)),
  );
}

function paramField(form, parameter) {
  const { name, type, required } = parameter;
  const preset = "default" in parameter ? JSON.stringify(parameter.default) : "";
  const kind = controlOf(parameter);
  const common = {
    path: `job_params.${name}`,
    label: required ? `${name} *` : name,
    hint: [type, kind === "json" && "as JSON"].filter(Boolean).join(", ") || null,
  };
  if (kind === "boolean") {
    const options = [
      ["", preset ? `default (${preset})` : "–"],
      ["true", "true"],
      ["false", "false"],
    ];
    return field(form, { ...common, control: "select", options });
  }
  return field(form, {
    ...common,
    control: kind === "number" ? "number" : "text",
    placeholder: preset || null,
    required,
  });
}

// ---- What forms have in common; a form is {draft, errors, dialog} -------------------------------

/** Show the parameters as JSON instead of fields, or the other way round. */
export function switchParams(form, parameters) {
  const { draft } = form;
  const { params, errors } = readParams(draft, parameters);
  if (draft.params_as !== "json")
    Object.assign(draft, { params_as: "json", job_params: JSON.stringify(params, null, 2) });
  else if (errors.job_params) Object.assign(form.errors, errors);
  else Object.assign(draft, paramsDraft(params, parameters));
}

/** JSON is checked while it is typed. */
export function enterParam(form, name) {
  if (name === "job_params")
    Object.assign(form.errors, readParams({ ...form.draft, params_as: "json" }, []).errors);
}

export function clearErrors(form, prefix) {
  for (const path of Object.keys(form.errors))
    if (path.startsWith(prefix)) delete form.errors[path];
}

/** Put the sentence of an API error at its control; if it names none, at `otherwise` or above the
 *  buttons. */
export function placeError(form, error, otherwise = "") {
  const paths = [...form.dialog.querySelectorAll("[name]")].map((control) => control.name);
  form.errors[controlFor(error.field, paths) ?? otherwise] = error.message;
}

/** The first control with an error gets the focus. */
export const focusError = (dialog) => dialog.querySelector("[aria-invalid=true]")?.focus();
