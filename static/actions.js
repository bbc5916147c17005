// Verbs of the page: each is one thing a button, a key or a command asks for.

import * as api from "./api.js";
import { confirmAction } from "./dialogs.js";
import { openScheduleForm } from "./form.js";
import { formatCount, formatPlural } from "./format.js";
import { methodsOf } from "./model.js";
import { openRun } from "./run.js";

const BULK_AT_ONCE = 6;

/** The actions by name; each gets the data attributes of what asked. `page` is what main.js offers. */
export function createActions(page) {
  const { ctx, say, go, reload, attempt } = page;
  const { selected } = ctx();
  const handlerOf = (id) => ctx().get("handlers")?.data?.handlers.find((handler) => handler.id === id);
  const started = (id, what) => {
    say(`${what} started.`, { view: "executions", id });
    reload();
  };

  async function editSchedule(id, copy) {
    const schedule = await api.loadSchedule(id);
    openScheduleForm(ctx, { schedule, copy, onDone: saved });
  }

  function saved(id, what) {
    say(`Schedule ${id} ${what}.`);
    reload();
    go({ view: "schedules", id });
  }

  async function deleteSchedule({ id }) {
    const agreed = await confirmAction({
      title: `Delete ${id}?`, label: "delete",
      text: "Queued runs of this schedule are cancelled, running ones finish, and its history stays.",
    });
    if (!agreed) return;
    await api.deleteSchedule(id);
    selected.delete(id);
    say(`Schedule ${id} deleted.`);
    if (ctx().route.id === id) go({ view: "schedules" });
    reload();
  }

  /** Pause or resume all that are selected, a few at a time; tells how many it was. */
  async function each(change, done) {
    const ids = [...selected];
    const failures = [];
    let next = 0;
    const work = async () => {
      while (next < ids.length) {
        const id = ids[next++];
        await change(id).then(() => selected.delete(id), (error) => failures.push(error));
        say(`${formatCount(next)} of ${formatPlural(ids.length, "schedule")} ${done} …`);
      }
    };
    await Promise.all(Array.from({ length: BULK_AT_ONCE }, work));
    say(`${formatPlural(ids.length - failures.length, "schedule")} ${done}.`
      + (failures.length ? ` ${formatCount(failures.length)} not: ${failures[0].message}` : ""));
    reload();
  }

  const simple = (call, done) => async ({ id }) => {
    await call(id);
    say(`Schedule ${id} ${done}.`);
    reload();
  };

  function runMethod({ handler, method }) {
    const known = methodsOf(handlerOf(handler)).find(({ name }) => name === method);
    if (known) openRun({ handler_id: handler, method: known, onDone: (id) => go({ view: "executions", id }) });
  }

  const actions = {
    "run-schedule": async ({ id }) => started((await api.runSchedule(id)).execution_id, `Schedule ${id}`),
    "pause-schedule": simple(api.pauseSchedule, "paused"),
    "resume-schedule": simple(api.resumeSchedule, "resumed"),
    "edit-schedule": ({ id }) => editSchedule(id, false),
    "duplicate-schedule": ({ id }) => editSchedule(id, true),
    "delete-schedule": deleteSchedule,
    "new-schedule": ({ handler, method }) =>
      openScheduleForm(ctx, { call: handler ? { handler_id: handler, method_name: method } : {}, onDone: saved }),
    "bulk-pause": () => each(api.pauseSchedule, "paused"),
    "bulk-resume": () => each(api.resumeSchedule, "resumed"),
    "run-method": runMethod,
    "cancel-execution": async ({ id }) => {
      await api.cancelExecution(id);
      say(`Execution ${id} is told to stop.`);
      reload();
    },
    "run-again": async ({ id }) => {
      const { handler_id, method_name, job_params } = await api.request("GET", `/api/executions/${encodeURIComponent(id)}`);
      const { execution_id } = await api.runMethod({ handler_id, method_name, job_params });
      go({ view: "executions", id: execution_id });
      say(`${handler_id}.${method_name} started again.`);
    },
  };
  return Object.fromEntries(Object.entries(actions).map(([name, act]) => [name, (data = {}) => attempt(() => act(data))]));
}
