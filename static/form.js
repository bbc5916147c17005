// The form of a schedule, with the next fires told while typing; to run a method; to log in.

import { at, request } from "./api.js";
import { Form, field, openDialog, paramFields } from "./dialogs.js";
import { h } from "./dom.js";
import {
  POLICY_WORDS, RETRY_LABELS, TRIGGERS, changedParts, emptyDraft, movedTrigger, readNumber,
  readParams, scheduleBody, scheduleDraft, triggerConfig, triggerErrors,
} from "./draft.js";
import { methodsOf } from "./model.js";
import { button, frame } from "./pieces.js";
import { fireList } from "./schedules.js";

const PREVIEW_DELAY_MS = 250;
const PREVIEW_FIRES = 6;

/** Change `schedule`, or `copy` it, or make one; `call` presets handler and method. */
export function openScheduleForm(page, { schedule, copy, call, onDone }) {
  const isEdit = Boolean(schedule) && !copy;
  const methods = (draft) => methodsOf(page.handlers.find(({ id }) => id === draft.handler_id));
  const methodOf = (draft) => methods(draft).find(({ name }) => name === draft.method_name);
  const parametersOf = (draft) => methodOf(draft)?.parameters ?? [];
  const initial = schedule
    ? scheduleDraft(schedule, parametersOf(schedule))
    : { ...emptyDraft(page.config?.timezone), ...call };
  const read = (draft) => scheduleBody(draft, parametersOf(draft), isEdit);
  const original = isEdit ? read(initial).body : {};
  const send = (body) =>
    isEdit
      ? request("PATCH", at("schedules", schedule.id), changedParts(original, body))
      : request("POST", "/api/schedule", body);
  const form = new Form({
    page, isEdit, methods, methodOf,
    name: "form",
    title: schedule ? `${isEdit ? "Edit" : "Copy of"} ${schedule.id}` : "New schedule",
    verb: isEdit ? "save" : "create",
    cancel: "cancel",
    draft: { ...initial },
    own: isEdit && {
      draft: original.trigger_config,
      asked: { trigger_config: schedule.trigger_config, schedule_id: schedule.id },
    },
    fires: {},
    content: scheduleContent,
    parameters() {
      return parametersOf(this.draft);
    },
    read() {
      return read(this.draft);
    },
    send: async (body) => onDone((await send(body)).schedule_id, isEdit ? "changed" : "created"),
    entered: (name, before) => entered(form, name, before),
    onClose() {
      stopPreview(form);
      removeEventListener("beforeunload", keep);
    },
    leave() {
      if (isDirty()) askToLeave(this.close);
      else this.close();
    },
  });
  const isDirty = () => JSON.stringify(form.draft) !== JSON.stringify(initial);
  const keep = (event) => isDirty() && event.preventDefault(); // the browser asks
  addEventListener("beforeunload", keep);
  form.dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    form.leave();
  });
  showFires(form, 0);
}

function askToLeave(leave) {
  const label = "Leave the form?";
  const { close } = openDialog({
    name: "confirm",
    label,
    render: () => [
      h("h2", label),
      h("p", "What you have entered is lost."),
      h("p.buttons",
        button("close", "keep"),
        button("leave", "leave", { class: "danger", autofocus: true })),
    ],
    onAct() {
      close();
      leave();
    },
  });
}

function entered(form, name, before) {
  const { draft } = form;
  if (name === "kind") Object.assign(draft, movedTrigger(before, draft.kind));
  if (name === "handler_id") {
    const methods = form.methods(draft);
    draft.method_name = methods.length === 1 ? methods[0].name : "";
  }
  if (name === "handler_id" || name === "method_name") draft.params_as = null;
  if (name === "kind" || name.startsWith("trigger_config")) showFires(form, PREVIEW_DELAY_MS);
}

function stopPreview({ timer, controller }) {
  clearTimeout(timer);
  controller?.abort();
}

function showFires(form, delay) {
  stopPreview(form);
  form.isLooking = true;
  form.timer = setTimeout(() => loadFires(form), delay);
}

async function loadFires(form) {
  form.controller = new AbortController();
  const { signal } = form.controller;
  const { draft, errors, own } = form;
  for (const path of Object.keys(errors))
    if (path.startsWith("trigger_config")) delete errors[path];
  Object.assign(errors, triggerErrors(draft));
  form.fires = {};
  try {
    const trigger_config = triggerConfig(draft);
    const isOwn = JSON.stringify(trigger_config) === JSON.stringify(own.draft);
    const body = { ...(isOwn ? own.asked : { trigger_config }), count: PREVIEW_FIRES };
    if (!errors.trigger_config)
      form.fires = await request("POST", "/api/triggers/preview", body, { signal });
  } catch (error) {
    if (signal.aborted) return;
    if (error.status) form.place(error, "trigger_config");
    else form.fires = { description: error.message };
  }
  form.isLooking = false;
  form.update();
}

const scheduleContent = (form) => [
  h("div.columns", what(form), h("div.column", trigger(form), coming(form))),
  policy(form),
];

/** Choices that hold the chosen one even if it is not known. */
function choices(names, chosen, otherwise) {
  const options = [["", "choose"], ...names];
  if (chosen && !names.includes(chosen)) options.push([chosen, `${chosen} (${otherwise})`]);
  return { control: "select", options };
}

function what(form) {
  const { draft, isEdit } = form;
  const ids = form.page.handlers.map(({ id }) => id);
  const names = form.methods(draft).map(({ name }) => name);
  const doc = form.methodOf(draft)?.doc;
  return frame({ title: "What" },
    h("div.fields.two",
      field(form, "handler_id", "Handler", choices(ids, draft.handler_id, "not registered")),
      field(form, "method_name", "Method", choices(names, draft.method_name, "unknown"))),
    doc && h("p.hint", doc),
    draft.method_name && paramFields(form),
    h("div.fields.two",
      !isEdit &&
        field(form, "schedule_id", "Id", { placeholder: "chosen for you", maxlength: 128 }),
      field(form, "name", "Name", { maxlength: 200 })));
}

// ---- When

const LABELS = {
  expression: "minute hour day month weekday",
  day_of_week: "weekday",
  start_time: "from",
  end_time: "until",
  start_date: "from",
  end_date: "until",
  run_date: "at",
};
const CRONTAB = {
  class: "big",
  placeholder: "*/5 9-17 * * mon-fri",
  hint: "or @hourly, @daily …",
};

function trigger(form) {
  const { kind } = form.draft;
  const isJson = kind === "json";
  const error = !isJson && form.errors.trigger_config;
  const tab = ([value, [label]]) =>
    h("label", { "data-key": value },
      h("input", { type: "radio", name: "kind", value, checked: value === kind }),
      h("span", label));
  const about = { control: "area", hint: "also for the types and, or" };
  return frame({ title: "When" },
    h("div.tabs", { role: "radiogroup", "aria-label": "Kind of trigger" },
      Object.entries(TRIGGERS).map(tab)),
    h("div", { class: `fields ${kind}`, "data-key": kind },
      isJson ? field(form, "trigger_config", "trigger_config", about) : triggerFields(form, kind)),
    error && h("p.error", `✗ ${error}`),
    !isJson && h("div.fields", part(form, "timezone", { list: "zones" }, "Time zone")));
}

const part = (form, name, props, label = LABELS[name] ?? name) =>
  field(form, `trigger_config.${name}`, label, props);

function triggerFields(form, kind) {
  const [, numbers, texts] = TRIGGERS[kind];
  const text = (name) => {
    if (name === "expression") return part(form, name, CRONTAB);
    if (name.endsWith("_time") || name === "run_date")
      return part(form, name, { type: "datetime-local", step: 1 });
    return part(form, name, name.endsWith("_date") ? { type: "date" } : { placeholder: "*" });
  };
  return [numbers.map((name) => part(form, name, { control: "number" })), texts.map(text)];
}

function coming({ fires: { fire_times: told = [], description }, isLooking, page }) {
  const words = isLooking && !told.length ? "…" : (description ?? "no fire times to show");
  return frame({ title: "It will fire", name: "preview" },
    h("div", { "aria-busy": isLooking && "true" },
      h("p", { class: told.length ? "bright" : "empty", "aria-live": "polite" }, words),
      fireList(told, page)));
}

// ---- Policy

/** A choice whose first option is the default, which an empty field stands for. */
const choiceOf = (words) => ({
  control: "select",
  options: Object.entries(words).map(([value, text], i) => (i ? [value, text] : ["", text])),
});
const NUMBER = { control: "number" };
const POLICY = [
  ["overlap", "If the last still runs", choiceOf(POLICY_WORDS.overlap)],
  ["coalesce", "Fires missed while down", choiceOf(POLICY_WORDS.coalesce)],
  ["timeout", "Timeout, s", NUMBER],
  ["misfire_grace_time", "Run late by at most, s", NUMBER],
  ["max_jitter", "Jitter, s", NUMBER],
];
const RETRY = Object.entries(RETRY_LABELS).map(([name, label]) => [`retry.${name}`, label, NUMBER]);

function policy(form) {
  const { draft, errors, isEdit } = form;
  const start = isEdit ? [] : [["paused", "Start paused", { control: "check" }]];
  const { config = {} } = form.page;
  const preset = (path) => path.split(".").reduce((part, name) => part?.[name], config);
  const fields = (list) =>
    list.map(([path, label, props]) =>
      field(form, path, label, { placeholder: preset(path), ...props }));
  const open = [...POLICY, ...RETRY, ["paused"]].some(([path]) => draft[path] || errors[path]);
  return h("details#policy.policy", { open },
    h("summary", "Policy: retries, overlap, lateness"),
    h("div.fields.two", fields([...POLICY, ...start])),
    h("fieldset", h("legend", "Retry"), h("div.fields.five", fields(RETRY))));
}

export function openRun({ handler_id, method, config, onDone }) {
  const { name: method_name, doc, parameters } = method;
  new Form({
    name: "run",
    title: `Run ${handler_id}.${method_name}`,
    verb: "run",
    cancel: "close",
    draft: { job_params: "{}" },
    parameters: () => parameters,
    content: (form) => [
      doc && h("p.dim", doc),
      paramFields(form),
      field(form, "timeout", "Timeout, s", { placeholder: config?.timeout, ...NUMBER }),
    ],
    read() {
      const { params: job_params, errors } = readParams(this.draft, parameters);
      const timeout = this.draft.timeout ? readNumber(this.draft.timeout) : undefined;
      return { body: { handler_id, method_name, job_params, timeout, wait: false }, errors };
    },
    send: async (body) => onDone((await request("POST", "/api/run_now", body)).execution_id),
  });
}

/** Ask for a token until one is right; it becomes a cookie that scripts cannot read. */
export function openLogin(onDone) {
  const hint = "from: schedulezero.py token create NAME";
  const secret = { type: "password", autocomplete: "current-password", hint };
  const form = new Form({
    name: "login",
    title: "Log in",
    verb: "log in",
    draft: {},
    content: (form) => field(form, "token", "Token", secret),
    read() {
      return { body: { token: this.draft.token ?? "" }, errors: {} };
    },
    send: (body) => request("POST", "/api/login", body).then(onDone),
    place({ message }) {
      this.errors.token = message;
    },
  });
  form.dialog.addEventListener("cancel", (event) => event.preventDefault());
}
