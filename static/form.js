// The form that makes, changes and copies schedules, with the next fires told while typing.

import { changeSchedule, createSchedule, previewTrigger } from "./api.js";
import { confirmAction, openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import {
  CRON_FIELDS,
  RETRY_FIELDS,
  TRIGGER_TYPES,
  changedParts,
  emptyDraft,
  movedTrigger,
  scheduleBody,
  scheduleDraft,
  triggerConfig,
  triggerErrors,
} from "./draft.js";
import {
  clearErrors,
  enterParam,
  field,
  focusError,
  paramFields,
  placeError,
  submitButton,
  switchParams,
} from "./fields.js";
import { methodsOf } from "./model.js";
import { button, frame } from "./pieces.js";
import { fireList } from "./schedules.js";

const PREVIEW_DELAY_MS = 250;
const PREVIEW_FIRES = 6;

/** Open the form. `schedule` is the one to change, or to copy with `copy`; `call` presets handler
 *  and method; `onDone(id, verb)` hears of success. */
export function openScheduleForm(ctx, options) {
  new ScheduleForm(ctx, options);
}

class ScheduleForm {
  errors = {};
  preview = null;
  previewing = false;
  sending = false;

  constructor(ctx, { schedule, copy = false, call = {}, onDone }) {
    const editing = Boolean(schedule) && !copy;
    Object.assign(this, { ctx, schedule, editing, onDone });
    this.title = editing
      ? `Edit ${schedule.id}`
      : schedule
        ? `Copy of ${schedule.id}`
        : "New schedule";
    this.initial = schedule
      ? scheduleDraft(schedule, this.parameters(schedule))
      : { ...emptyDraft(ctx().config?.timezone), ...call };
    this.draft = { ...this.initial };
    this.original = editing ? scheduleBody(this.initial, this.parameters(), true).body : {};
    Object.assign(
      this,
      openDialog({
        name: "form",
        label: this.title,
        render: () => renderForm(this),
        onAct: (act) => this.act(act),
        onClose: () => this.stopPreview(),
      }),
    );
    this.dialog.addEventListener("input", ({ target }) => this.enter(target));
    this.dialog.addEventListener("submit", (event) => this.submit(event));
    this.dialog.addEventListener("cancel", (event) => this.leave(event));
    this.showFires(0);
  }

  handlers() {
    return this.ctx().get("handlers")?.data?.handlers ?? [];
  }

  methods({ handler_id } = this.draft) {
    return methodsOf(this.handlers().find(({ id }) => id === handler_id));
  }

  parameters(call = this.draft) {
    return this.methods(call).find(({ name }) => name === call.method_name)?.parameters ?? [];
  }

  act(act) {
    if (act === "cancel") this.leave();
    else switchParams(this, this.parameters());
    this.update();
  }

  enter({ name, value, type, checked }) {
    if (!name) return;
    if (name === "kind") Object.assign(this.draft, movedTrigger(this.draft, value));
    this.draft[name] = type === "checkbox" ? (checked ? "true" : "") : value;
    delete this.errors[name];
    if (name === "handler_id")
      this.draft.method_name = this.methods().length === 1 ? this.methods()[0].name : "";
    if (name === "handler_id" || name === "method_name") this.draft.params_as = null;
    enterParam(this, name);
    if (name === "kind" || name.startsWith("trigger_config")) this.showFires(PREVIEW_DELAY_MS);
    this.update();
  }

  stopPreview() {
    clearTimeout(this.timer);
    this.controller?.abort();
  }

  showFires(delay) {
    this.stopPreview();
    this.previewing = true;
    this.timer = setTimeout(() => this.loadFires(), delay);
  }

  async loadFires() {
    this.controller = new AbortController();
    const { signal } = this.controller;
    clearErrors(this, "trigger_config");
    Object.assign(this.errors, triggerErrors(this.draft));
    try {
      const config = this.errors.trigger_config ? null : triggerConfig(this.draft);
      this.preview = config && (await previewTrigger(config, PREVIEW_FIRES, signal));
    } catch (error) {
      if (signal.aborted) return;
      this.preview = error.status ? null : { unknown: error.message };
      if (error.status) placeError(this, error, "trigger_config");
    }
    this.previewing = false;
    this.update();
  }

  async submit(event) {
    event.preventDefault();
    const { body, errors } = scheduleBody(this.draft, this.parameters(), this.editing);
    this.errors = errors;
    if (!Object.keys(errors).length)
      await this.send(this.editing ? changedParts(this.original, body) : body);
    this.update();
    focusError(this.dialog);
  }

  async send(body) {
    this.sending = true;
    this.update();
    try {
      const answer = await (this.editing
        ? changeSchedule(this.schedule.id, body)
        : createSchedule(body));
      this.close();
      this.onDone(answer.schedule_id, this.editing ? "changed" : "created");
    } catch (error) {
      placeError(this, error, { 404: "handler_id", 409: "schedule_id" }[error.status]);
    }
    this.sending = false;
  }

  async leave(event) {
    event?.preventDefault();
    const isDirty = JSON.stringify(this.draft) !== JSON.stringify(this.initial);
    const question = {
      title: "Leave the form?",
      text: "What you have entered is lost.",
      label: "leave",
    };
    if (!isDirty || (await confirmAction(question))) this.close();
  }
}

function renderForm(form) {
  const { draft, errors, editing, sending } = form;
  return h(
    "form",
    { novalidate: true, "data-key": "form" },
    h("h2", null, form.title),
    h(
      "div",
      { class: "columns" },
      h("div", { class: "column" }, what(form), policy(form)),
      h("div", { class: "column" }, trigger(form), fires(form)),
    ),
    errors[""] && h("p", { class: "error", role: "alert" }, `✗ ${errors[""]}`),
    h(
      "p",
      { class: "buttons" },
      button("cancel", "cancel"),
      submitButton(editing ? "save" : draft.paused ? "create paused" : "create", sending),
    ),
  );
}

/** Choices that hold the chosen one even if it is not among what is known. */
function choices(names, chosen, otherwise) {
  const options = [["", "choose"], ...names.map((name) => [name, name])];
  return chosen && !names.includes(chosen)
    ? [...options, [chosen, `${chosen} (${otherwise})`]]
    : options;
}

function what(form) {
  const { draft, editing } = form;
  const method = form.methods().find(({ name }) => name === draft.method_name);
  const handlers = choices(
    form.handlers().map(({ id }) => id),
    draft.handler_id,
    "not registered",
  );
  const methods = choices(
    form.methods().map(({ name }) => name),
    draft.method_name,
    "unknown",
  );
  return frame(
    { title: "What", name: "what" },
    h(
      "div",
      { class: "fields two" },
      field(form, { path: "handler_id", label: "Handler", control: "select", options: handlers }),
      field(form, { path: "method_name", label: "Method", control: "select", options: methods }),
    ),
    method?.doc && h("p", { class: "hint" }, method.doc),
    draft.method_name && paramFields(form, form.parameters()),
    h(
      "div",
      { class: "fields two" },
      !editing &&
        field(form, {
          path: "schedule_id",
          label: "Id",
          placeholder: "made up for you",
          maxlength: 128,
        }),
      field(form, { path: "name", label: "Name", maxlength: 200 }),
    ),
  );
}

// ---- When ---------------------------------------------------------------------------------------

function trigger(form) {
  const { kind } = form.draft;
  const error = kind !== "json" && form.errors.trigger_config;
  return frame(
    { title: "When", name: "when" },
    h(
      "div",
      { class: "tabs", role: "radiogroup", "aria-label": "Kind of trigger" },
      Object.entries(TRIGGER_TYPES).map(([name, label]) => tab(name, label, name === kind)),
    ),
    h("div", { class: `fields ${kind}`, "data-key": kind }, KINDS[kind](form)),
    error && h("p", { class: "error" }, `✗ ${error}`),
    kind !== "json" &&
      h("div", { class: "fields" }, part(form, "timezone", "Time zone", { list: "zones" })),
  );
}

const tab = (value, label, checked) =>
  h(
    "label",
    { "data-key": value },
    h("input", { type: "radio", name: "kind", value, checked }),
    h("span", null, label),
  );

const part = (form, name, label, more) =>
  field(form, { path: `trigger_config.${name}`, label, ...more });
const numbers = (form, names) => names.map((name) => part(form, name, name, { control: "number" }));
const moment = (form, name, label) => part(form, name, label, { type: "datetime-local", step: 1 });
const span = (form) => [moment(form, "start_time", "from"), moment(form, "end_time", "until")];

const KINDS = {
  interval: (form) => [numbers(form, ["weeks", "days", "hours", "minutes", "seconds"]), span(form)],
  expression: (form) =>
    part(form, "expression", "minute hour day month weekday", {
      class: "big",
      placeholder: "*/5 9-17 * * mon-fri",
      hint: "as in crontab(5), or @hourly, @daily, @weekly …",
    }),
  cron: (form) => [
    CRON_FIELDS.map((name) =>
      part(form, name, name === "day_of_week" ? "weekday" : name, { placeholder: "*" }),
    ),
    span(form),
  ],
  calendar_interval: (form) => [
    numbers(form, ["years", "months", "weeks", "days", "hour", "minute", "second"]),
    part(form, "start_date", "from", { type: "date" }),
    part(form, "end_date", "until", { type: "date" }),
  ],
  date: (form) => moment(form, "run_date", "at"),
  json: (form) =>
    field(form, {
      path: "trigger_config",
      label: "trigger_config",
      control: "area",
      hint: "also for the types and, or",
    }),
};

function fires({ preview, previewing, ctx }) {
  const told = preview?.fire_times ?? [];
  const silence = preview?.unknown ?? (previewing ? "…" : "no fire times to show");
  return frame(
    { title: "It will fire", name: "preview" },
    h(
      "div",
      { "aria-busy": previewing ? "true" : null },
      h(
        "p",
        { class: told.length ? "bright" : "empty", "aria-live": "polite" },
        told.length ? preview.description : silence,
      ),
      fireList(told, ctx()),
    ),
  );
}

// ---- Policy -------------------------------------------------------------------------------------

const OVERLAPS = [
  ["", "skip (default)"],
  ["skip", "skip this one"],
  ["queue", "queue"],
  ["allow", "run both"],
  ["replace", "cancel the old one"],
];
const COALESCES = [
  ["", "one catch-up run (default)"],
  ["latest", "one catch-up run"],
  ["none", "drop them"],
  ["all", "run all (at most 100)"],
];
const RETRY_LABELS = ["attempts", "first after, s", "then times", "at most, s", "± share"];
const POLICY_PATHS = [
  "overlap",
  "coalesce",
  "timeout",
  "misfire_grace_time",
  "max_jitter",
  "paused",
  ...RETRY_FIELDS.map((name) => `retry.${name}`),
];

function policy(form) {
  const open = POLICY_PATHS.some((path) => form.draft[path] || form.errors[path]);
  const retry = RETRY_FIELDS.map((name, i) =>
    field(form, { path: `retry.${name}`, label: RETRY_LABELS[i], control: "number" }),
  );
  return h(
    "details",
    { class: "policy", "data-key": "policy", open },
    h("summary", null, "Policy: retries, overlap, lateness"),
    h("div", { class: "fields two" }, policyFields(form)),
    h("fieldset", null, h("legend", null, "Retry"), h("div", { class: "fields five" }, retry)),
  );
}

const policyFields = (form) => [
  field(form, {
    path: "overlap",
    label: "If the run before has not finished",
    control: "select",
    options: OVERLAPS,
  }),
  field(form, {
    path: "coalesce",
    label: "Fires missed while down",
    control: "select",
    options: COALESCES,
  }),
  field(form, { path: "timeout", label: "Timeout, s", control: "number" }),
  field(form, { path: "misfire_grace_time", label: "Run late by at most, s", control: "number" }),
  field(form, { path: "max_jitter", label: "Jitter, s", control: "number" }),
  !form.editing && field(form, { path: "paused", label: "Start paused", control: "check" }),
];
