// The form that makes, changes and copies schedules, with the next fires told while typing.

import { changeSchedule, createSchedule, previewTrigger } from "./api.js";
import { confirmAction, openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import {
  CRON_FIELDS, RETRY_FIELDS, TRIGGER_TYPES, changedParts, controlFor, emptyDraft, paramsDraft, readParams, scheduleBody,
  scheduleDraft, triggerConfig,
} from "./draft.js";
import { field, focusError, paramFields } from "./fields.js";
import { methodsOf } from "./model.js";
import { button, frame } from "./pieces.js";
import { fireList } from "./schedules.js";

const PREVIEW_DELAY_MS = 250;
const PREVIEW_FIRES = 6;

/** Open the form. `schedule` is the one to change or copy; `call` presets handler and method. */
export function openScheduleForm(ctx, { schedule, copy = false, call = {}, onDone }) {
  const editing = Boolean(schedule) && !copy;
  const handlers = () => ctx().get("handlers")?.data?.handlers ?? [];
  const parametersOf = ({ handler_id, method_name }) =>
    methodsOf(handlers().find(({ id }) => id === handler_id)).find(({ name }) => name === method_name)?.parameters ?? [];
  const initial = schedule
    ? scheduleDraft(schedule, parametersOf(schedule), ctx().times.local)
    : { ...emptyDraft(ctx().config?.timezone), ...call };
  const form = { draft: { ...initial }, errors: {}, preview: null, previewing: false, sending: false, editing, title: titleOf(schedule, editing) };
  const original = editing ? scheduleBody(initial, parametersOf(initial), true).body : null;
  let timer;
  let controller;

  const { dialog, update, close } = openDialog({
    name: "form", label: form.title,
    render: () => renderForm(form, { handlers: handlers(), parameters: parametersOf(form.draft), ctx: ctx() }),
    onAct: act,
    onClose() {
      clearTimeout(timer);
      controller?.abort();
    },
  });

  function act(name) {
    const { draft } = form;
    if (name === "params-json") Object.assign(draft, { params_as: "json", job_params: JSON.stringify(readParams(draft, parametersOf(draft)).params, null, 2) });
    if (name === "params-fields") {
      const { params, errors } = readParams(draft, []);
      if (errors.job_params) form.errors = { ...form.errors, ...errors };
      else Object.assign(draft, paramsDraft(params, parametersOf(draft)));
    }
    if (name === "cancel") leave();
    update();
  }

  async function leave() {
    const dirty = JSON.stringify(form.draft) !== JSON.stringify(initial);
    if (!dirty || await confirmAction({ title: "Leave the form?", text: "What you have entered is lost.", label: "leave" })) close();
  }

  function changed({ target }) {
    const { name, value, type, checked } = target;
    if (!name) return;
    form.draft[name] = type === "checkbox" ? (checked ? "true" : "") : value;
    delete form.errors[name];
    if (name === "handler_id") {
      const methods = methodsOf(handlers().find(({ id }) => id === value));
      form.draft.method_name = methods.length === 1 ? methods[0].name : "";
    }
    if (name === "handler_id" || name === "method_name") form.draft.params_as = null;
    if (name.startsWith("job_params") && form.draft.params_as === "json") Object.assign(form.errors, readParams(form.draft, []).errors);
    if (name === "kind" || name.startsWith("trigger_config")) preview(PREVIEW_DELAY_MS);
    update();
  }

  function preview(delay) {
    clearTimeout(timer);
    controller?.abort();
    form.previewing = true;
    timer = setTimeout(async () => {
      controller = new AbortController();
      const { signal } = controller;
      clearErrors("trigger_config");
      try {
        form.preview = await previewTrigger(triggerConfig(form.draft), PREVIEW_FIRES, signal);
      } catch (error) {
        if (signal.aborted) return;
        form.preview = null;
        if (error.status === 0) form.preview = { unknown: error.message };
        else showError(error, "trigger_config");
      }
      form.previewing = false;
      update();
    }, delay);
  }

  const clearErrors = (prefix) => {
    for (const path of Object.keys(form.errors)) if (path.startsWith(prefix)) delete form.errors[path];
  };

  /** Puts the sentence at its control, or above the buttons if it belongs to none. */
  function showError(error, otherwise = "") {
    const paths = [...dialog.querySelectorAll("[name]")].map((control) => control.name);
    form.errors[controlFor(error.field, paths) ?? otherwise] = error.message;
  }

  async function submit(event) {
    event.preventDefault();
    const { body, errors } = scheduleBody(form.draft, parametersOf(form.draft), editing);
    form.errors = errors;
    if (!Object.keys(errors).length) await send(editing ? changedParts(original, body) : body);
    update();
    focusError(dialog);
  }

  async function send(body) {
    form.sending = true;
    update();
    try {
      const answer = editing ? await changeSchedule(schedule.id, body) : await createSchedule(body);
      onDone(editing ? schedule.id : answer.schedule_id, editing ? "changed" : "created");
      close();
    } catch (error) {
      showError(error);
    }
    form.sending = false;
  }

  dialog.addEventListener("input", changed);
  dialog.addEventListener("submit", submit);
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    leave();
  });
  preview(0);
  return dialog;
}

const titleOf = (schedule, editing) => (editing ? `Edit ${schedule.id}` : schedule ? `Copy of ${schedule.id}` : "New schedule");

function renderForm(form, { handlers, parameters, ctx }) {
  const { draft, errors, editing } = form;
  const known = handlers.map(({ id }) => [id, id]);
  if (draft.handler_id && !known.some(([id]) => id === draft.handler_id)) known.push([draft.handler_id, `${draft.handler_id} (not registered)`]);
  const methods = methodsOf(handlers.find(({ id }) => id === draft.handler_id));
  const names = methods.map(({ name }) => [name, name]);
  if (draft.method_name && !names.some(([name]) => name === draft.method_name)) names.push([draft.method_name, `${draft.method_name} (unknown)`]);
  const method = methods.find(({ name }) => name === draft.method_name);
  return h("form", { novalidate: true, "data-key": "form" },
    h("h2", null, form.title),
    h("div", { class: "columns" },
      h("div", { class: "column" },
        frame({ title: "What", name: "what" },
          h("div", { class: "fields two" },
            field(form, { path: "handler_id", label: "Handler", control: "select", options: [["", "choose"], ...known] }),
            field(form, { path: "method_name", label: "Method", control: "select", options: [["", "choose"], ...names], hint: method?.doc })),
          draft.method_name && paramFields(form, parameters),
          h("div", { class: "fields two" },
            !editing && field(form, { path: "schedule_id", label: "Id", placeholder: "made up for you", maxlength: 128 }),
            field(form, { path: "name", label: "Name", maxlength: 128 }))),
        policy(form)),
      h("div", { class: "column" }, trigger(form), previewFrame(form, ctx))),
    errors[""] && h("p", { class: "error", role: "alert" }, `✗ ${errors[""]}`),
    h("p", { class: "buttons" }, button("cancel", "cancel"),
      h("button", { type: "submit", class: "primary", disabled: form.sending }, editing ? "save" : "create")));
}

function trigger(form) {
  const kinds = h("div", { class: "tabs", role: "radiogroup", "aria-label": "Kind of trigger" },
    Object.entries(TRIGGER_TYPES).map(([kind, label]) => h("label", { "data-key": kind },
      h("input", { type: "radio", name: "kind", value: kind, checked: form.draft.kind === kind }), h("span", null, label))));
  return frame({ title: "When", name: "when" }, kinds,
    h("div", { class: `fields ${form.draft.kind}`, "data-key": form.draft.kind }, KINDS[form.draft.kind](form)),
    form.errors.trigger_config && h("p", { class: "error" }, `✗ ${form.errors.trigger_config}`),
    h("div", { class: "fields" }, field(form, { path: "trigger_config.timezone", label: "Time zone", list: "zones" })));
}

const part = (form, name, label, more) => field(form, { path: `trigger_config.${name}`, label, ...more });
const numbers = (form, names) => names.map((name) => part(form, name, name, { control: "number" }));
const moment = (form, name, label) => part(form, name, label, { type: "datetime-local", step: 1 });

const KINDS = {
  interval: (form) => [
    numbers(form, ["weeks", "days", "hours", "minutes", "seconds"]),
    moment(form, "start_time", "from"), moment(form, "end_time", "until")],
  expression: (form) => part(form, "expression", "minute  hour  day  month  weekday", { class: "big", placeholder: "*/5 9-17 * * mon-fri", hint: "as in crontab(5), or @hourly, @daily, @weekly …" }),
  cron: (form) => [
    CRON_FIELDS.map((name) => part(form, name, name.replaceAll("_", " "), { placeholder: "*" })),
    moment(form, "start_time", "from"), moment(form, "end_time", "until")],
  calendar_interval: (form) => [
    numbers(form, ["years", "months", "weeks", "days"]), numbers(form, ["hour", "minute", "second"]),
    part(form, "start_date", "from", { type: "date" }), part(form, "end_date", "until", { type: "date" })],
  date: (form) => moment(form, "run_date", "at"),
};

function previewFrame(form, ctx) {
  const { preview, previewing } = form;
  const content = preview?.fire_times?.length
    ? [h("p", { class: "bright" }, preview.description ?? preview.trigger), fireList(preview.fire_times, ctx)]
    : h("p", { class: "empty" }, preview?.unknown ?? (previewing ? "…" : "no fire times to show"));
  return frame({ title: "It will fire", name: "preview" }, h("div", { "aria-live": "polite", "aria-busy": previewing ? "true" : null }, content));
}

function policy(form) {
  const some = ["timeout", "misfire_grace_time", "max_jitter", "coalesce", "overlap", "paused", ...RETRY_FIELDS.map((name) => `retry.${name}`)];
  const open = some.some((path) => form.draft[path] || form.errors[path]);
  return h("details", { class: "policy", "data-key": "policy", open }, h("summary", null, "Policy: retries, overlap, lateness"),
    h("div", { class: "fields two" },
      field(form, { path: "overlap", label: "If the run before has not finished", control: "select", options: [["", "skip (default)"], ["skip", "skip this one"], ["queue", "queue"], ["allow", "run both"], ["replace", "cancel the old one"]] }),
      field(form, { path: "coalesce", label: "Fires missed while down", control: "select", options: [["", "one catch-up run (default)"], ["latest", "one catch-up run"], ["none", "drop them"], ["all", "run all (at most 100)"]] }),
      field(form, { path: "timeout", label: "Timeout, s", control: "number" }),
      field(form, { path: "misfire_grace_time", label: "Run late by at most, s", control: "number" }),
      field(form, { path: "max_jitter", label: "Jitter, s", control: "number" }),
      !form.editing && field(form, { path: "paused", label: "Start paused", control: "check" })),
    h("fieldset", null, h("legend", null, "Retry"), h("div", { class: "fields five" },
      [["max_attempts", "attempts"], ["base_delay", "first after, s"], ["factor", "then times"], ["max_delay", "at most, s"], ["jitter", "± share"]]
        .map(([name, label]) => field(form, { path: `retry.${name}`, label, control: "number" })))));
}
