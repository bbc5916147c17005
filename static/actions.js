// Verbs of the page: each is one thing a button, a key or a command asks of the server.

import { at, request } from "./api.js";
import { openRun, openScheduleForm } from "./form.js";
import { formatPlural } from "./format.js";
import { isFinal, methodsOf, renderQuery, schedulesFilter } from "./model.js";
import { button } from "./pieces.js";

const MANY_MS = 300_000; // ten thousand schedules on a slow disk

export function createActions(page) {
  const actions = {
    ...scheduleActions(page),
    ...executionActions(page),
    "bulk-pause": () => changeMany(page, true),
    "bulk-resume": () => changeMany(page, false),
    "forget-handler": async ({ id }) => {
      await request("DELETE", at("handlers", id));
      page.say(`Handler ${id} is forgotten.`);
      page.go({ view: "handlers" });
    },
    undo: () => page.undo?.(),
    acknowledge: () => request("POST", "/api/health/acknowledge"),
    "log-out": () => request("POST", "/api/logout").then(() => page.resources.reload()),
  };
  const attempt = (act) => (data = {}) =>
    page.attempt(async () => {
      await act(data);
      page.refresh();
    });
  return Object.fromEntries(Object.entries(actions).map(([name, act]) => [name, attempt(act)]));
}

function scheduleActions(page) {
  const onDone = (id, done) => {
    page.say(`Schedule ${id} ${done}.`);
    page.go({ view: "schedules", id });
  };
  const change = (verb, done) => async ({ id }) => {
    await request("POST", at("schedules", id, verb));
    page.say(`Schedule ${id} ${done}.`);
  };
  const open = (copy) => async ({ id }) => {
    const schedule = await request("GET", at("schedules", id));
    if (!copy && schedule.origin === "config")
      return page.say(`✗ Schedule ${id} is declared in the configuration file: change it there.`);
    openScheduleForm(page, { schedule, copy, onDone });
  };
  return {
    "new-schedule": ({ handler: handler_id, id: method_name }) =>
      openScheduleForm(page, { call: handler_id && { handler_id, method_name }, onDone }),
    "edit-schedule": open(false),
    "duplicate-schedule": open(true),
    "pause-schedule": change("pause", "paused"),
    "resume-schedule": change("resume", "resumed"),
    "run-schedule": async ({ id }) => {
      const { execution_id } = await request("POST", at("schedules", id, "run"));
      page.sayStarted(`Schedule ${id} started.`, execution_id);
    },
    "delete-schedule": ({ id }) => deleteSchedule(page, id),
  };
}

// What a schedule is made of; the rest of what the API shows follows from it.
const DEFINITION = [
  "name", "handler_id", "method_name", "job_params", "trigger_config", "paused", "timeout", "retry",
  "coalesce", "overlap", "misfire_grace_time", "max_jitter",
];

async function deleteSchedule(page, id) {
  const schedule = await request("GET", at("schedules", id));
  await request("DELETE", at("schedules", id));
  page.undo = async () => {
    const definition = DEFINITION.map((name) => [name, schedule[name]]);
    await request("POST", "/api/schedule", { schedule_id: id, ...Object.fromEntries(definition) });
    page.undo = null;
    page.say(`Schedule ${id} is back.`);
  };
  page.selected.delete(id);
  if (page.route.id === id) page.go({ view: "schedules" });
  page.say(`Deleted ${id}. `, button("undo", "Undo"));
}

async function changeMany(page, paused) {
  const { selected, isAllSelected, route } = page;
  const query = isAllSelected ? renderQuery(schedulesFilter(route.query)) : "";
  const body = isAllSelected ? { paused } : { paused, schedule_ids: [...selected] };
  page.say(paused ? "Pausing …" : "Resuming …");
  const { count } = await request("PATCH", `/api/schedules${query}`, body, { limit: MANY_MS });
  page.selected.clear();
  page.isAllSelected = false;
  page.say(`${formatPlural(count, "schedule")} ${paused ? "paused" : "resumed"}.`);
}

function executionActions(page) {
  const open = (id) => page.go({ view: "executions", id });
  return {
    "run-method": ({ handler: handler_id, id }) => {
      const methods = methodsOf(page.handlers.find((handler) => handler.id === handler_id));
      const method = methods.find(({ name }) => name === id);
      if (method) openRun({ handler_id, method, config: page.config, onDone: open });
    },
    "cancel-execution": async ({ id }) => {
      await request("POST", at("executions", id, "cancel"));
      page.say(`Execution ${id} is told to stop.`);
    },
    "run-again": async ({ id }) => {
      const execution = await request("GET", at("executions", id));
      if (!isFinal(execution)) return void page.say("It has not ended yet.");
      const { handler_id, method_name, job_params } = execution;
      const body = { handler_id, method_name, job_params, wait: false };
      open((await request("POST", "/api/run_now", body)).execution_id);
      page.say(`${handler_id}.${method_name} started again.`);
    },
  };
}
