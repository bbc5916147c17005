// Verbs of the page: each is one thing a button, a key or a command asks for.

import * as api from "./api.js";
import { confirmAction } from "./dialogs.js";
import { openScheduleForm } from "./form.js";
import { formatCount, formatPlural } from "./format.js";
import { methodsOf } from "./model.js";
import { openRun } from "./run.js";

const BULK_AT_ONCE = 6;

/** The actions by name; each gets the data attributes of what asked. */
export function createActions(page) {
  const acknowledge = async () => {
    await api.acknowledgeHealth();
    page.refresh();
  };
  const actions = {
    ...scheduleActions(page),
    ...bulkActions(page),
    ...executionActions(page),
    acknowledge,
  };
  return Object.fromEntries(
    Object.entries(actions).map(([name, act]) => [
      name,
      (data = {}) => page.attempt(() => act(data)),
    ]),
  );
}

function scheduleActions(page) {
  const ctx = () => page.ctx();
  const told =
    (call, done) =>
    async ({ id }) => {
      await call(id);
      page.say(`Schedule ${id} ${done}.`);
      page.refresh();
    };
  const saved = (id, done) => {
    page.say(`Schedule ${id} ${done}.`);
    page.refresh();
    page.go({ view: "schedules", id });
  };
  const openForm =
    (copy) =>
    async ({ id }) =>
      openScheduleForm(ctx, { schedule: await api.loadSchedule(id), copy, onDone: saved });
  return {
    "new-schedule": ({ handler: handler_id, method: method_name }) =>
      openScheduleForm(ctx, { call: handler_id ? { handler_id, method_name } : {}, onDone: saved }),
    "edit-schedule": openForm(false),
    "duplicate-schedule": openForm(true),
    "pause-schedule": told(api.pauseSchedule, "paused"),
    "resume-schedule": told(api.resumeSchedule, "resumed"),
    "run-schedule": async ({ id }) => {
      const { execution_id } = await api.runSchedule(id);
      page.say(`Schedule ${id} started.`, { view: "executions", id: execution_id });
      page.refresh();
    },
    "delete-schedule": ({ id }) => deleteSchedule(page, id),
  };
}

async function deleteSchedule(page, id) {
  const isAgreed = await confirmAction({
    title: `Delete ${id}?`,
    label: "delete",
    text: "Queued runs of this schedule are cancelled, running ones finish, and its history stays.",
  });
  if (!isAgreed) return;
  await api.deleteSchedule(id);
  page.selected.delete(id);
  page.say(`Schedule ${id} deleted.`);
  if (page.route.id === id) page.go({ view: "schedules" });
  page.refresh();
}

/** Pause or resume all that are selected, a few at a time; tells how many it was. */
function bulkActions(page) {
  const each = (change, done) => async () => {
    const { selected } = page;
    const ids = [...selected];
    const failures = [];
    let next = 0;
    const work = async () => {
      while (next < ids.length) {
        const id = ids[next++];
        await change(id).then(
          () => selected.delete(id),
          (error) => failures.push(error),
        );
        page.say(`${formatCount(next)} of ${formatPlural(ids.length, "schedule")} ${done} …`);
      }
    };
    await Promise.all(Array.from({ length: BULK_AT_ONCE }, work));
    page.say(
      `${formatPlural(ids.length - failures.length, "schedule")} ${done}.` +
        (failures.length ? ` ${formatCount(failures.length)} not: ${failures[0].message}` : ""),
    );
    page.refresh();
  };
  return {
    "bulk-pause": each(api.pauseSchedule, "paused"),
    "bulk-resume": each(api.resumeSchedule, "resumed"),
  };
}

function executionActions(page) {
  return {
    "run-method": ({ handler: handler_id, method: name }) => {
      const handler = page.resources
        .get("handlers")
        ?.data?.handlers.find(({ id }) => id === handler_id);
      const method = methodsOf(handler).find((one) => one.name === name);
      if (method)
        openRun({ handler_id, method, onDone: (id) => page.go({ view: "executions", id }) });
    },
    "cancel-execution": async ({ id }) => {
      await api.cancelExecution(id);
      page.say(`Execution ${id} is told to stop.`);
      page.refresh();
    },
    "run-again": async ({ id }) => {
      const { handler_id, method_name, job_params } = await api.loadExecution(id);
      const { execution_id } = await api.runMethod({ handler_id, method_name, job_params });
      page.go({ view: "executions", id: execution_id });
      page.say(`${handler_id}.${method_name} started again.`);
    },
  };
}
