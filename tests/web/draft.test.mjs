import assert from "node:assert/strict";
import { test } from "node:test";

import {
  changedParts,
  controlFor,
  controlOf,
  emptyDraft,
  movedTrigger,
  paramsDraft,
  readJson,
  readParams,
  scheduleBody,
  scheduleDraft,
  triggerConfig,
  triggerDraft,
  triggerErrors,
} from "../../static/draft.js";

const PARAMETERS = [
  { name: "path", type: "str", required: true },
  { name: "keep", type: "int", default: 30, required: false },
  { name: "loud", type: "bool", default: false, required: false },
  { name: "options", type: "dict", required: false },
];

test("every trigger that has fields comes back from its draft unchanged", () => {
  for (const config of [
    {
      type: "interval",
      hours: 1,
      seconds: 30,
      start_time: "2026-11-24T02:30:00",
      timezone: "Europe/Berlin",
    },
    { type: "cron", minute: "*/5", day_of_week: "mon-fri", timezone: "UTC" },
    { type: "cron", expression: "30 2 * * *", timezone: "Europe/Berlin" },
    { type: "calendar_interval", months: 1, hour: 2, start_date: "2026-11-30", timezone: "UTC" },
    { type: "date", run_date: "2027-01-01T00:00:00", timezone: "UTC" },
  ])
    assert.deepEqual(triggerConfig(triggerDraft(config)), config);
});

test("a trigger that no fields can hold is edited as JSON and loses nothing", () => {
  for (const config of [
    { type: "or", triggers: [{ type: "cron", hour: "1" }] },
    { type: "cron", hour: "1", dst: "skip" },
    { type: "of the future", x: 1 },
  ]) {
    assert.equal(triggerDraft(config).kind, "json");
    assert.deepEqual(triggerConfig(triggerDraft(config)), config);
  }
});

test("text that is no number goes to the server as it is, to be refused by name", () => {
  const draft = { kind: "interval", "trigger_config.hours": "one", "trigger_config.minutes": " " };
  assert.deepEqual(triggerConfig(draft), { type: "interval", hours: "one" });
});

test("changing the kind to JSON carries the trigger along, and back", () => {
  const draft = { kind: "interval", "trigger_config.hours": "2" };
  const asJson = { kind: "json", ...movedTrigger(draft, "json") };
  assert.deepEqual(triggerConfig(asJson), { type: "interval", hours: 2 });
  assert.equal(movedTrigger(asJson, "interval")["trigger_config.hours"], "2");
  assert.deepEqual(movedTrigger(asJson, "date"), {});
  assert.match(triggerErrors({ kind: "json", trigger_config: "{" }).trigger_config, /^Not JSON/);
});

test("a parameter's control follows its type, told or guessed from its default", () => {
  const cases = [
    [{ type: "int" }, "number"],
    [{ type: "float | None" }, "number"],
    [{ type: "Optional[str]" }, "text"],
    [{ type: "bool" }, "boolean"],
    [{ type: "list[int]" }, "json"],
    [{ default: "x" }, "text"],
    [{ default: 1 }, "number"],
    [{}, "json"],
  ];
  for (const [parameter, control] of cases)
    assert.equal(controlOf(parameter), control, JSON.stringify(parameter));
});

test("fields become parameters of their types; empty ones are left out", () => {
  const draft = {
    "job_params.path": "/srv",
    "job_params.keep": "7",
    "job_params.loud": "false",
    "job_params.options": '{"a":1}',
  };
  assert.deepEqual(readParams(draft, PARAMETERS), {
    params: { path: "/srv", keep: 7, loud: false, options: { a: 1 } },
    errors: {},
  });
  assert.deepEqual(readParams({ "job_params.path": "x" }, PARAMETERS).params, { path: "x" });
});

test("each wrong field has its own sentence", () => {
  const { errors } = readParams(
    { "job_params.keep": "many", "job_params.options": "{a" },
    PARAMETERS,
  );
  assert.deepEqual(Object.keys(errors), [
    "job_params.path",
    "job_params.keep",
    "job_params.options",
  ]);
  assert.equal(errors["job_params.path"], "path is required.");
  assert.equal(errors["job_params.keep"], "many is not a number.");
});

test("JSON that is wrong is told with its place, or at least with what is wrong", () => {
  assert.match(readJson('{\n  "a": 1,\n  b\n}').error, /^Not JSON( at line 3, column 3)?: /);
  assert.match(readJson("{").error, /^Not JSON/);
  assert.deepEqual(readJson('{"a":null}'), { value: { a: null } });
});

test("parameters as JSON must be an object", () => {
  const read = (job_params) => readParams({ params_as: "json", job_params }, PARAMETERS);
  assert.deepEqual(read('{"x": 1}'), { params: { x: 1 }, errors: {} });
  assert.deepEqual(read(""), { params: {}, errors: {} });
  for (const text of ["[1]", "null", "3", '"x"', "{"])
    assert.ok(read(text).errors.job_params, text);
});

test("existing parameters are shown as fields only if those can hold them", () => {
  const kindOf = (params) => paramsDraft(params, PARAMETERS).params_as;
  assert.equal(kindOf({ path: "/srv", keep: 7, options: [1] }), "fields");
  assert.equal(kindOf({ path: 7 }), "json");
  assert.equal(kindOf({ unknown: 1 }), "json");
  assert.equal(kindOf({ path: "" }), "json");
  assert.equal(paramsDraft({}, []).params_as, "json");
  const params = { path: "/srv", loud: true, options: { a: [] } };
  assert.deepEqual(readParams(paramsDraft(params, PARAMETERS), PARAMETERS).params, params);
});

const SCHEDULE = {
  id: "nightly",
  name: "Nightly",
  handler_id: "backup",
  method_name: "push",
  job_params: { path: "/srv" },
  paused: false,
  trigger_config: { type: "cron", hour: "2", timezone: "UTC" },
  timeout: 60,
  coalesce: "latest",
  overlap: "queue",
  max_jitter: 0,
  misfire_grace_time: null,
  retry: { max_attempts: 5, base_delay: 1, factor: 2, max_delay: 60, jitter: 0.5 },
};

test("opening and saving a schedule changes nothing", () => {
  const draft = scheduleDraft(SCHEDULE, PARAMETERS);
  const { body, errors } = scheduleBody(draft, PARAMETERS, true);
  assert.deepEqual(errors, {});
  for (const [name, value] of Object.entries(body)) assert.deepEqual(value, SCHEDULE[name], name);
  assert.deepEqual(changedParts(body, scheduleBody(draft, PARAMETERS, true).body), {});
});

test("only what was changed is sent, and an emptied field goes back to its default", () => {
  const draft = scheduleDraft(SCHEDULE, PARAMETERS);
  const original = scheduleBody(draft, PARAMETERS, true).body;
  const edited = { ...draft, timeout: "", overlap: "", name: "", "trigger_config.hour": "3" };
  assert.deepEqual(changedParts(original, scheduleBody(edited, PARAMETERS, true).body), {
    name: null,
    timeout: null,
    overlap: "skip",
    trigger_config: { type: "cron", hour: "3", timezone: "UTC" },
  });
});

test("an emptied member of retry goes back to what is configured, and with the last all of it", () => {
  const draft = scheduleDraft(SCHEDULE, PARAMETERS);
  const original = scheduleBody(draft, PARAMETERS, true).body;
  const sent = (edits) =>
    changedParts(original, scheduleBody({ ...draft, ...edits }, PARAMETERS, true).body);
  assert.deepEqual(sent({ "retry.max_attempts": "" }), {
    retry: { ...SCHEDULE.retry, max_attempts: null },
  });
  const all = Object.keys(SCHEDULE.retry).map((name) => [`retry.${name}`, " "]);
  assert.deepEqual(sent(Object.fromEntries(all)), { retry: null });
});

test("a new schedule sends what was filled in and nothing else", () => {
  const draft = {
    ...emptyDraft("UTC"),
    handler_id: "h",
    method_name: "m",
    schedule_id: " mine ",
    paused: "true",
  };
  assert.deepEqual(JSON.parse(JSON.stringify(scheduleBody(draft, [], false))), {
    body: {
      handler_id: "h",
      method_name: "m",
      job_params: {},
      schedule_id: "mine",
      paused: true,
      trigger_config: { type: "interval", minutes: 5, timezone: "UTC" },
    },
    errors: {},
  });
  assert.deepEqual(Object.keys(scheduleBody(emptyDraft("UTC"), [], false).errors), [
    "handler_id",
    "method_name",
  ]);
});

test("an API error finds the control it belongs to, the nearest if not the very one", () => {
  const paths = ["trigger_config.hour", "trigger_config", "retry.factor", "job_params"];
  assert.equal(controlFor("trigger_config.hour", paths), "trigger_config.hour");
  assert.equal(controlFor("trigger_config.day", paths), "trigger_config");
  assert.equal(controlFor("job_params.x.y", paths), "job_params");
  assert.equal(controlFor("trigger_config.triggers[0].hour", paths), "trigger_config");
  assert.equal(controlFor("timeout", paths), null);
  assert.equal(controlFor(undefined, paths), null);
});
