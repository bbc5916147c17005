// Forms as drafts (flat mappings of text by dotted field path) and the JSON they stand for. Pure.

import { localTime } from "./format.js";

const SPAN = ["start_time", "end_time"];
const CRON = ["minute", "hour", "day", "month", "day_of_week", "week", "year", "second"];

/** The kinds of triggers a form can make: label, number fields and text fields. */
export const TRIGGERS = {
  interval: ["interval", ["weeks", "days", "hours", "minutes", "seconds"], SPAN],
  expression: ["crontab", [], ["expression"]],
  cron: ["cron fields", [], [...CRON, ...SPAN]],
  calendar_interval: [
    "calendar",
    ["years", "months", "weeks", "days", "hour", "minute", "second"],
    ["start_date", "end_date"],
  ],
  date: ["once", [], ["run_date"]],
  json: ["JSON", [], []],
};

/** In words what can become of a fire, the default first. */
export const POLICY_WORDS = {
  overlap: {
    skip: "skip this one",
    queue: "wait for the last",
    allow: "run both",
    replace: "cancel the last",
  },
  coalesce: { latest: "one catch-up run", none: "drop them", all: "run all, at most 100" },
};

// What an empty field stands for.
const POLICY = {
  timeout: null,
  misfire_grace_time: null,
  max_jitter: 0,
  coalesce: "latest",
  overlap: "skip",
};
export const RETRY_LABELS = {
  max_attempts: "attempts",
  base_delay: "after, s",
  factor: "then times",
  max_delay: "at most, s",
  jitter: "± share",
};
const RETRY = Object.keys(RETRY_LABELS);

const isFilled = (text) => text != null && String(text).trim() !== "";

/** A number if the text is one; else the text itself, for the server to refuse. */
export const readNumber = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);

// ---- Triggers

/** The trigger_config of a draft; `draft.kind` is a key of TRIGGERS. */
export function triggerConfig(draft) {
  if (draft.kind === "json") return readJson(draft.trigger_config ?? "").value ?? {};
  const [, numbers, texts] = TRIGGERS[draft.kind];
  const config = { type: draft.kind === "expression" ? "cron" : draft.kind };
  for (const name of [...numbers, ...texts, "timezone"]) {
    const text = draft[`trigger_config.${name}`];
    if (isFilled(text)) config[name] = numbers.includes(name) ? readNumber(text) : text.trim();
  }
  return config;
}

export function triggerErrors(draft) {
  const { error } = draft.kind === "json" ? readJson(draft.trigger_config ?? "") : {};
  return error ? { trigger_config: error } : {};
}

/** The draft of a trigger_config, as JSON if no fields can hold it. Times become wall times. */
export function triggerDraft(config) {
  const kind = config.type === "cron" && "expression" in config ? "expression" : config.type;
  const known = ["type", "timezone", ...(TRIGGERS[kind] ?? []).slice(1).flat()];
  if (!(kind in TRIGGERS) || Object.keys(config).some((name) => !known.includes(name)))
    return { kind: "json", trigger_config: JSON.stringify(config, null, 2) };
  const draft = { kind };
  for (const [name, value] of Object.entries(config)) {
    if (name === "type" || value == null) continue;
    const isMoment = name === "run_date" || SPAN.includes(name);
    const text = isMoment ? localTime(value, config.timezone) : String(value);
    draft[`trigger_config.${name}`] = text;
  }
  return draft;
}

/** The trigger as another kind, where that can hold it. */
export function movedTrigger(draft, kind) {
  if (kind === "json") return { trigger_config: JSON.stringify(triggerConfig(draft), null, 2) };
  const moved = draft.kind === "json" ? triggerDraft(triggerConfig(draft)) : {};
  return moved.kind === kind ? moved : {};
}

// ---- Parameters

const CONTROLS = {
  int: "number", integer: "number", float: "number", number: "number",
  bool: "boolean", boolean: "boolean", str: "text", string: "text",
};

/** The kind of control for a parameter: number, boolean, text, or json for everything else. */
export function controlOf({ type = "", default: preset }) {
  const name = type.replace(/\s*\|\s*None$|^Optional\[(.*)\]$/, "$1").trim() || typeof preset;
  return CONTROLS[name] ?? "json";
}

/** Parse JSON: {value} or {error} with line and column in words. */
export function readJson(text) {
  try {
    return { value: JSON.parse(text) };
  } catch ({ message }) {
    const what = message.split(/ in JSON| \(line|, "|, \.\.\./)[0];
    const position = /position (\d+)/.exec(message)?.[1];
    if (!position) return { error: `Not JSON: ${what}` };
    const before = text.slice(0, Number(position)).split("\n");
    const place = `line ${before.length}, column ${before.at(-1).length + 1}`;
    return { error: `Not JSON at ${place}: ${what}` };
  }
}

/** What the parameter part of a draft stands for: {params, errors by field path}. */
export function readParams(draft, parameters) {
  if (draft.params_as === "json" || !parameters.length) return readJsonParams(draft.job_params);
  const params = {};
  const errors = {};
  for (const parameter of parameters) {
    const { name, required } = parameter;
    const path = `job_params.${name}`;
    const isGiven = isFilled(draft[path]);
    const { value, error } = isGiven ? readParam(controlOf(parameter), draft[path]) : {};
    if (isGiven && !error) params[name] = value;
    else if (error || required) errors[path] = error ?? `${name} is required.`;
  }
  return { params, errors };
}

function readJsonParams(text) {
  if (!isFilled(text)) return { params: {}, errors: {} };
  const { value, error } = readJson(text);
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  const wrong = 'The parameters are a JSON object, such as {"volume": 3}.';
  return { params: value, errors: isObject ? {} : { job_params: error ?? wrong } };
}

function readParam(control, text) {
  if (control === "text") return { value: text };
  if (control === "boolean") return { value: text === "true" };
  if (control === "json") return readJson(text);
  const value = readNumber(text);
  return typeof value === "number" ? { value } : { error: `${text} is not a number.` };
}

/** The draft of given parameters: fields if the method knows them all, JSON otherwise. */
export function paramsDraft(params, parameters) {
  const given = Object.entries(params ?? {});
  const known = Object.fromEntries(parameters.map((one) => [one.name, controlOf(one)]));
  const isJson = !parameters.length || !given.every(([name, value]) => fits(known[name], value));
  const draft = { params_as: isJson ? "json" : "fields" };
  draft.job_params = JSON.stringify(params ?? {}, null, 2);
  for (const [name, value] of isJson ? [] : given)
    draft[`job_params.${name}`] = known[name] === "json" ? JSON.stringify(value) : String(value);
  return draft;
}

const fits = (control, value) =>
  control === "json" || (control === CONTROLS[typeof value] && control && value !== "");

// ---- Schedules

export const emptyDraft = (timezone) => ({
  kind: "interval",
  "trigger_config.minutes": "5",
  "trigger_config.timezone": timezone ?? "",
});

export function scheduleDraft(schedule, parameters) {
  const { name, handler_id, method_name, paused, trigger_config, job_params, retry } = schedule;
  const draft = {
    name: name ?? "",
    handler_id,
    method_name,
    paused: paused ? "true" : "",
    ...triggerDraft(trigger_config),
    ...paramsDraft(job_params, parameters),
  };
  for (const [field, standard] of Object.entries(POLICY))
    if ((schedule[field] ?? standard) !== standard) draft[field] = String(schedule[field]);
  for (const field of RETRY)
    if (retry?.[field] != null) draft[`retry.${field}`] = String(retry[field]);
  return draft;
}

/** What the draft asks the API for: {body, errors by field path}. Empty fields keep the defaults;
 *  with `editing` those are sent. */
export function scheduleBody(draft, parameters, editing) {
  const { params, errors } = readParams(draft, parameters);
  Object.assign(errors, triggerErrors(draft));
  for (const name of ["handler_id", "method_name"])
    if (!isFilled(draft[name])) errors[name] = "Choose one.";
  const { handler_id, method_name } = draft;
  const trigger_config = triggerConfig(draft);
  const body = { handler_id, method_name, job_params: params, trigger_config };
  body.name = isFilled(draft.name) ? draft.name.trim() : editing ? null : undefined;
  for (const [name, standard] of Object.entries(POLICY)) {
    if (isFilled(draft[name]))
      body[name] = typeof standard === "string" ? draft[name] : readNumber(draft[name]);
    else if (editing) body[name] = standard;
  }
  body.retry = readRetry(draft, editing);
  if (editing) return { body, errors };
  if (isFilled(draft.schedule_id)) body.schedule_id = draft.schedule_id.trim();
  return { body: { ...body, paused: draft.paused === "true" || undefined }, errors };
}

/** An empty member goes back to what is configured: null says so, for one or for all. */
function readRetry(draft, editing) {
  const blank = editing ? null : undefined;
  const read = (text) => (isFilled(text) ? readNumber(text) : blank);
  const members = RETRY.map((name) => [name, read(draft[`retry.${name}`])]);
  return members.some(([, value]) => value != null) ? Object.fromEntries(members) : blank;
}

/** The top-level parts of `body` that differ from `original`: what a change sends. */
export const changedParts = (original, body) =>
  Object.fromEntries(
    Object.entries(body).filter(
      ([name, value]) => JSON.stringify(value) !== JSON.stringify(original[name]),
    ),
  );

/** The control an API error belongs to: the longest path the field starts with. */
export const controlFor = (field, paths) =>
  paths
    .filter((path) => field === path || [".", "["].some((mark) => field?.startsWith(path + mark)))
    .sort((a, b) => b.length - a.length)[0] ?? null;
