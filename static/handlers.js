// Handlers: who is connected, what they offer, how they are.

import { h } from "./dom.js";
import { history } from "./executions.js";
import { FAILED, formatCount, formatDuration, formatPercent } from "./format.js";
import { methodsOf, newest, signature } from "./model.js";
import {
  button, dim, empty, facts, frame, heading, link, missing, pair, state, table, tableFrame,
  tools, when,
} from "./pieces.js";

const FAILED_ROWS = 10;
const SKEW_S = 2; // a handler's clock this far off deserves a word

export function resources({ route: { id } }) {
  const stats = { url: "/api/executions/stats", every: 5_000, on: { execution: "reload" } };
  if (id == null) return { stats };
  return { stats, failed: newest({ handler_id: id, status: FAILED }, FAILED_ROWS) };
}

const tallyOf = ({ data }, id) => data("stats")?.by_handler?.[id];

// ---- The list

export function renderList(page) {
  const about = {
    title: "Handlers",
    name: "handlers",
    note: formatCount(page.handlers.length),
    resource: page.get("handlers"),
    nothing: firstSteps(page),
    kind: "handler",
  };
  const connected = (one) => one.instances.filter(({ status }) => status !== "Disconnected");
  const columns = [
    ["state-of", "status", ({ status }) => state(status)],
    ["name", "handler", ({ id }) => link("handlers", id)],
    ["address dim", "address", ({ address }) => address],
    ["num", "instances", (one) => formatCount(connected(one).length)],
    ["num", "running", (one) => formatCount(one.running)],
    ["num", "queued", (one) => formatCount(one.queued)],
    ["num", "runs", ({ id }) => formatCount(tallyOf(page, id)?.total ?? 0)],
    ["num", "success", ({ id }) => formatPercent(tallyOf(page, id)?.success_rate)],
    ["heard", "heard", (one) => when(one.last_seen, page, "rel")],
    ["skew", "clock", (one) => skew(connected(one))],
  ];
  return tableFrame(about, columns, page.handlers);
}

function firstSteps({ config }) {
  const server = `tcp://${location.hostname}:${config?.zmq_port ?? 4242}`;
  return [
    "no handler has registered yet. A handler is a small program that offers methods; to try one: ",
    h("code.bright", `python handler.py Example --server ${server}`),
  ];
}

function skew(instances) {
  const skews = instances.map((one) => one.clock_skew_seconds).filter((s) => s != null);
  if (!skews.length) return dim("–");
  const worst = skews.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a));
  if (Math.abs(worst) < SKEW_S) return dim("in step");
  const way = worst > 0 ? "ahead" : "behind";
  return h("span.yellow", `${formatDuration(Math.abs(worst) * 1000)} ${way}`);
}

// ---- One handler

export function renderOne(page) {
  const { id } = page.route;
  const handler = page.handlers.find((one) => one.id === id);
  if (!page.data("handlers")) return [heading(page, id), missing(page.get("handlers"))];
  if (!handler) return [heading(page, id), empty(`There is no handler ${id}.`)];
  const to = (view) => link(view, null, view, { handler: id });
  const failed = { title: "Failed lately", nothing: "nothing failed" };
  return [
    heading(page, id, state(handler.status),
      tools("handler", id,
        to("schedules"),
        to("executions"),
        handler.status === "Disconnected" &&
          button("forget-handler", "forget", { class: "danger" }))),
    pair(load(page, handler), instances(page, handler.instances)),
    methods(handler),
    history(page, { ...failed, resource: page.get("failed") }),
  ];
}

function load(page, { id, address, running, capacity, queued, last_seen: seen }) {
  const { total, success_rate: share, duration_ms: took } = tallyOf(page, id) ?? {};
  const range = () => `p50 ${formatDuration(took.p50)}, p95 ${formatDuration(took.p95)}`;
  return frame({ title: "Load" },
    facts([
      ["address", address],
      ["running", `${formatCount(running)} of ${formatCount(capacity)}`],
      ["queued", formatCount(queued)],
      ["runs", total != null && formatCount(total)],
      ["success", share != null && formatPercent(share)],
      ["duration", took?.p50 != null && range()],
      ["heard", when(seen, page)],
    ]));
}

function instances(page, list) {
  const about = { caption: "Instances", name: "instances", idOf: (one) => one.instance };
  const columns = [
    ["state-of", "status", (one) => state(one.status)],
    ["name", "instance", ({ hostname, pid, instance }) =>
      hostname ? `${hostname}:${pid}` : instance],
    ["num", "load", (one) => `${one.running}/${one.concurrency}`],
    ["heard", "heard", (one) => when(one.last_seen, page, "rel")],
    ["skew", "clock", (one) => skew([one])],
  ];
  return frame({ title: "Instances", note: formatCount(list.length) },
    list.length ? table(about, columns, list) : empty("none connected"));
}

function methods(handler) {
  const list = methodsOf(handler);
  const props = ({ name }) => ({
    "data-key": name, "data-row": "method", "data-id": name, "data-handler": handler.id,
    tabindex: "-1",
  });
  const line = (method) =>
    h("li", props(method),
      h("div", h("code", signature(method)), method.doc && h("p.dim", method.doc)),
      h("span.tools", button("run-method", "run"), button("new-schedule", "schedule")));
  return frame({ title: "Methods", note: formatCount(list.length) },
    h("ul.methods", list.map(line)));
}
