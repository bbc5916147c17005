// Forms as drafts (flat mappings of text by dotted field path) and the JSON they stand for. Pure.

import { localTime } from "./format.js";

export const TRIGGER_TYPES = {
  interval: "interval",
  expression: "crontab",
  cron: "cron fields",
  calendar_interval: "calendar",
  date: "once",
  json: "JSON",
};

export const CRON_FIELDS = [
  "minute",
  "hour",
  "day",
  "month",
  "day_of_week",
  "week",
  "year",
  "second",
];

/** The number fields and the text fields of each kind of trigger, in the order they are shown. */
export const TRIGGER_FIELDS = {
  interval: {
    numbers: ["weeks", "days", "hours", "minutes", "seconds"],
    texts: ["start_time", "end_time"],
  },
  expression: { numbers: [], texts: ["expression"] },
  cron: { numbers: [], texts: [...CRON_FIELDS, "start_time", "end_time"] },
  calendar_interval: {
    numbers: ["years", "months", "weeks", "days", "hour", "minute", "second"],
    texts: ["start_date", "end_date"],
  },
  date: { numbers: [], texts: ["run_date"] },
  json: { numbers: [], texts: [] },
};

// What an empty field stands for.
const POLICY = {
  timeout: null,
  misfire_grace_time: null,
  max_jitter: 0,
  coalesce: "latest",
  overlap: "skip",
};
export const RETRY_FIELDS = ["max_attempts", "base_delay", "factor", "max_delay", "jitter"];

const filled = (text) => text != null && String(text).trim() !== "";

/** A number if the text is one; otherwise the text itself, for the server to refuse by name. */
export const readNumber = (text) => (Number.isFinite(Number(text)) ? Number(text) : text);

/** The trigger_config of a draft; `draft.kind` is a key of TRIGGER_TYPES. */
export function triggerConfig(draft) {
  if (draft.kind === "json") return readJson(draft.trigger_config ?? "").value ?? {};
  const { numbers, texts } = TRIGGER_FIELDS[draft.kind];
  const config = { type: draft.kind === "expression" ? "cron" : draft.kind };
  for (const name of numbers) {
    const text = draft[`trigger_config.${name}`];
    if (filled(text)) config[name] = readNumber(text);
  }
  for (const name of [...texts, "timezone"]) {
    const text = draft[`trigger_config.${name}`];
    if (filled(text)) config[name] = text.trim();
  }
  return config;
}

/** What is wrong with a trigger_config written as JSON, by field path. */
export function triggerErrors(draft) {
  const { error } = draft.kind === "json" ? readJson(draft.trigger_config ?? "") : {};
  return error ? { trigger_config: error } : {};
}

const MOMENTS = ["run_date", "start_time", "end_time"];

/** The part of a draft that stands for a trigger_config, as JSON if no fields do. Times become
 *  wall times. */
export function triggerDraft(config) {
  const kind = config.type === "cron" && "expression" in config ? "expression" : config.type;
  const { numbers = [], texts = [] } = TRIGGER_FIELDS[kind] ?? {};
  const known = ["type", "timezone", ...numbers, ...texts];
  if (!(kind in TRIGGER_FIELDS) || Object.keys(config).some((name) => !known.includes(name))) {
    return { kind: "json", trigger_config: JSON.stringify(config, null, 2) };
  }
  const draft = { kind };
  for (const [name, value] of Object.entries(config)) {
    if (name === "type" || value == null) continue;
    draft[`trigger_config.${name}`] = MOMENTS.includes(name)
      ? localTime(value, config.timezone)
      : String(value);
  }
  return draft;
}

// ---- Parameters ---------------------------------------------------------------------------------

/** The kind of control for a parameter: number, boolean, text, or json for everything else. */
export function controlOf({ type = "", default: preset }) {
  const name = type.replace(/\s*\|\s*None$|^Optional\[(.*)\]$/, "$1").trim() || typeof preset;
  if (["int", "float", "number", "integer"].includes(name)) return "number";
  if (["bool", "boolean"].includes(name)) return "boolean";
  if (["str", "string"].includes(name)) return "text";
  return "json";
}

/** Parse JSON: {value} or {error} with line and column in words. */
export function readJson(text) {
  try {
    return { value: JSON.parse(text) };
  } catch (error) {
    return { error: describeJsonError(text, error.message) };
  }
}

function describeJsonError(text, message) {
  const position = Number(/position (\d+)/.exec(message)?.[1] ?? NaN);
  const what = message.split(/ in JSON| \(line|, "|, \.\.\./)[0];
  if (Number.isNaN(position)) return `Not JSON: ${what}`;
  const before = text.slice(0, position).split("\n");
  return `Not JSON at line ${before.length}, column ${before.at(-1).length + 1}: ${what}`;
}

/** What the parameter part of a draft stands for: {params, errors by field path}. */
export function readParams(draft, parameters) {
  if (draft.params_as === "json" || !parameters.length)
    return readJsonParams(draft.job_params ?? "");
  const params = {};
  const errors = {};
  for (const parameter of parameters) {
    const path = `job_params.${parameter.name}`;
    const text = draft[path];
    if (!filled(text)) {
      if (parameter.required) errors[path] = `${parameter.name} is required.`;
      continue;
    }
    const { value, error } = readParam(controlOf(parameter), text);
    if (error) errors[path] = error;
    else params[parameter.name] = value;
  }
  return { params, errors };
}

function readJsonParams(text) {
  if (!filled(text)) return { params: {}, errors: {} };
  const { value, error } = readJson(text);
  const isObject = typeof value === "object" && value !== null && !Array.isArray(value);
  const sentence =
    error ?? (isObject ? null : 'The parameters are a JSON object, such as {"volume": 3}.');
  return { params: value, errors: sentence ? { job_params: sentence } : {} };
}

function readParam(control, text) {
  if (control === "text") return { value: text };
  if (control === "boolean") return { value: text === "true" };
  if (control === "json") return readJson(text);
  return Number.isFinite(Number(text))
    ? { value: Number(text) }
    : { error: `${text} is not a number.` };
}

/** The draft of given parameters: fields if the method knows them all, JSON otherwise. */
export function paramsDraft(params, parameters) {
  const known = new Map(parameters.map((parameter) => [parameter.name, controlOf(parameter)]));
  const names = Object.keys(params ?? {});
  const asFields =
    parameters.length > 0 && names.every((name) => fits(known.get(name), params[name]));
  const draft = {
    params_as: asFields ? "fields" : "json",
    job_params: JSON.stringify(params ?? {}, null, 2),
  };
  if (asFields) {
    for (const name of names) {
      draft[`job_params.${name}`] =
        known.get(name) === "json" ? JSON.stringify(params[name]) : String(params[name]);
    }
  }
  return draft;
}

function fits(control, value) {
  if (control === "json") return true;
  return (
    control === { string: "text", number: "number", boolean: "boolean" }[typeof value] &&
    value !== ""
  );
}

// ---- Schedules ----------------------------------------------------------------------------------

export const emptyDraft = (timezone) => ({
  kind: "interval",
  "trigger_config.minutes": "5",
  "trigger_config.timezone": timezone ?? "",
});

/** The draft of an existing schedule, for editing it or making another like it. */
export function scheduleDraft(schedule, parameters) {
  const draft = {
    name: schedule.name ?? "",
    handler_id: schedule.handler_id,
    method_name: schedule.method_name,
    paused: schedule.paused ? "true" : "",
    ...triggerDraft(schedule.trigger_config),
    ...paramsDraft(schedule.job_params, parameters),
  };
  for (const [name, standard] of Object.entries(POLICY)) {
    if ((schedule[name] ?? standard) !== standard) draft[name] = String(schedule[name]);
  }
  for (const name of RETRY_FIELDS) {
    if (schedule.retry?.[name] != null) draft[`retry.${name}`] = String(schedule.retry[name]);
  }
  return draft;
}

/** What the draft asks the API for: {body, errors by field path}. Fields left empty keep the
 *  defaults; with `editing` those are sent, which sets the schedule back to them. */
export function scheduleBody(draft, parameters, editing) {
  const { params, errors } = readParams(draft, parameters);
  Object.assign(errors, triggerErrors(draft));
  for (const name of ["handler_id", "method_name"])
    if (!filled(draft[name])) errors[name] = "Choose one.";
  const body = {
    handler_id: draft.handler_id,
    method_name: draft.method_name,
    job_params: params,
    trigger_config: triggerConfig(draft),
  };
  const blank = editing ? null : undefined;
  if (!editing && filled(draft.schedule_id)) body.schedule_id = draft.schedule_id.trim();
  body.name = filled(draft.name) ? draft.name.trim() : blank;
  for (const [name, standard] of Object.entries(POLICY)) {
    if (filled(draft[name]))
      body[name] = typeof standard === "string" ? draft[name] : readNumber(draft[name]);
    else if (editing) body[name] = standard;
  }
  const retry = RETRY_FIELDS.filter((name) => filled(draft[`retry.${name}`]));
  body.retry = retry.length
    ? Object.fromEntries(retry.map((name) => [name, readNumber(draft[`retry.${name}`])]))
    : blank;
  if (!editing) body.paused = draft.paused === "true" || undefined;
  return { body, errors };
}

/** The top-level parts of `body` that differ from `original`: what a change sends. */
export const changedParts = (original, body) =>
  Object.fromEntries(
    Object.entries(body).filter(
      ([name, value]) => JSON.stringify(value) !== JSON.stringify(original[name]),
    ),
  );

/** The draft's trigger carried over to another kind where that can hold it. */
export function movedTrigger(draft, kind) {
  if (kind === "json") return { trigger_config: JSON.stringify(triggerConfig(draft), null, 2) };
  const moved = draft.kind === "json" ? triggerDraft(triggerConfig(draft)) : {};
  return moved.kind === kind ? moved : {};
}

/** The path of the control an API error belongs to: the longest one the field starts with. */
export const controlFor = (field, paths) =>
  paths
    .filter(
      (path) => field === path || field?.startsWith(`${path}.`) || field?.startsWith(`${path}[`),
    )
    .sort((a, b) => b.length - a.length)[0] ?? null;
