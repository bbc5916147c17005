// Handlers: who is connected, what they offer, how they are.

import { h } from "./dom.js";
import { history } from "./executions.js";
import { FAILED_STATUSES, formatCount, formatDuration, formatPercent } from "./format.js";
import { isFailed, keepRecords, methodsOf, renderQuery, renderRoute, signature } from "./model.js";
import {
  button,
  cell,
  dim,
  empty,
  facts,
  frame,
  heading,
  link,
  missing,
  row,
  state,
  table,
  tableFrame,
  trail,
  unseenHeading,
  when,
} from "./pieces.js";

const FAILED_ROWS = 10;
const FAILED = FAILED_STATUSES.join();
const SKEW_S = 2; // a handler's clock this far off deserves a word

export const title = ({ route }) => route.id ?? "Handlers";

export function resources({ route: { id } }) {
  const stats = { url: "/api/executions/stats", every: 5_000, on: { execution: "reload" } };
  if (id == null) return { stats };
  const query = renderQuery({ handler_id: id, status: FAILED, limit: FAILED_ROWS });
  const failed = {
    url: `/api/executions${query}`,
    every: 5_000,
    on: {
      execution: keepRecords(
        (execution) => isFailed(execution) && execution.handler_id === id,
        FAILED_ROWS,
      ),
    },
  };
  return { stats, failed };
}

export const render = (ctx) => (ctx.route.id == null ? renderList(ctx) : renderOne(ctx));

const tallyOf = ({ get }, id) => get("stats")?.data?.by_handler?.[id];

// ---- The list -----------------------------------------------------------------------------------

function renderList(ctx) {
  const resource = ctx.get("handlers");
  const handlers = resource?.data?.handlers ?? [];
  const heads = [
    ["state-of", "status"],
    ["name", "handler"],
    ["address", "address"],
    ["num", "instances"],
    ["num", "running"],
    ["num", "queued"],
    ["num", "runs"],
    ["num", "success"],
    ["heard", "heard"],
    ["skew", "clock"],
  ];
  return [
    unseenHeading("Handlers"),
    tableFrame(
      {
        title: "Handlers",
        name: "handlers",
        note: formatCount(handlers.length),
        resource,
        nothing: firstSteps(ctx),
        table: { wide: true, heads },
      },
      handlers.map((handler) => listRow(ctx, handler)),
    ),
  ];
}

const firstSteps = ({ config }) => [
  "no handler has registered yet. A handler is a small program that offers methods; to try one: ",
  h(
    "code",
    { class: "bright" },
    `python handler.py Example --server tcp://${location.hostname}:${config?.zmq_port ?? 4242}`,
  ),
];

function listRow(ctx, handler) {
  const { id, status, address, instances, running, queued, last_seen: seen } = handler;
  const tally = tallyOf(ctx, id);
  const connected = instances.filter((instance) => instance.status !== "Disconnected");
  return row(
    "handler",
    id,
    cell("state-of", state(status)),
    cell("name", link("handlers", id)),
    cell("address dim", address),
    cell("num", formatCount(connected.length)),
    cell("num", formatCount(running)),
    cell("num", formatCount(queued)),
    cell("num", formatCount(tally?.total ?? 0)),
    cell("num", formatPercent(tally?.success_rate)),
    cell("heard", when(seen, ctx, "rel")),
    cell("skew", skew(connected)),
  );
}

/** How far the clock is off that is off most. */
function skew(instances) {
  const [worst] = instances
    .map(({ clock_skew_seconds: s }) => s)
    .filter((s) => s != null)
    .sort((a, b) => Math.abs(b) - Math.abs(a));
  if (worst == null) return dim("–");
  if (Math.abs(worst) < SKEW_S) return dim("in step");
  return h(
    "span",
    { class: "yellow" },
    `${formatDuration(Math.abs(worst) * 1000)} ${worst > 0 ? "ahead" : "behind"}`,
  );
}

// ---- One handler --------------------------------------------------------------------------------

function renderOne(ctx) {
  const { id } = ctx.route;
  const resource = ctx.get("handlers");
  const head = trail(ctx, "handlers", "Handlers");
  if (!resource?.data) return [head, heading(id), missing(resource)];
  const handler = resource.data.handlers.find((one) => one.id === id);
  if (!handler) return [head, heading(id), empty(`There is no handler ${id}.`)];
  const to = (view) => h("a", { href: renderRoute({ view, query: { handler: id } }) }, view);
  return [
    head,
    heading(
      id,
      state(handler.status),
      h("span", { class: "tools" }, to("schedules"), to("executions")),
    ),
    h(
      "div",
      { class: "pair", "data-key": "pair" },
      load(ctx, handler),
      instances(ctx, handler.instances),
    ),
    methods(handler),
    history(ctx, {
      title: "Failed lately",
      resource: ctx.get("failed"),
      nothing: "nothing failed",
    }),
  ];
}

function load(ctx, { id, address, running, capacity, queued, last_seen: seen }) {
  const { total, success_rate: share, duration_ms: duration } = tallyOf(ctx, id) ?? {};
  return frame(
    { title: "Load", name: "load" },
    facts([
      ["address", address],
      ["running", `${formatCount(running)} of ${formatCount(capacity)}`],
      ["queued", formatCount(queued)],
      ["runs", total != null && formatCount(total)],
      ["success", share != null && formatPercent(share)],
      [
        "duration",
        duration?.p50 != null &&
          `p50 ${formatDuration(duration.p50)}, p95 ${formatDuration(duration.p95)}`,
      ],
      ["heard", when(seen, ctx)],
    ]),
  );
}

function instances(ctx, list) {
  const heads = [
    ["state-of", "status"],
    ["name", "instance"],
    ["num", "load"],
    ["heard", "heard"],
    ["skew", "clock"],
  ];
  const line = (one) =>
    h(
      "tr",
      { "data-key": one.instance },
      cell("state-of", state(one.status)),
      cell("name", one.hostname ? `${one.hostname}:${one.pid}` : one.instance),
      cell("num", `${one.running}/${one.concurrency}`),
      cell("heard", when(one.last_seen, ctx, "rel")),
      cell("skew", skew([one])),
    );
  return frame(
    { title: "Instances", name: "instances", note: formatCount(list.length) },
    list.length
      ? table({ caption: "Instances", name: "instances", wide: true, heads }, list.map(line))
      : empty("none connected"),
  );
}

function methods(handler) {
  const list = methodsOf(handler);
  const line = (method) => {
    const data = { handler: handler.id, method: method.name };
    return h(
      "li",
      { "data-key": method.name, "data-row": "method", "data-id": method.name, tabindex: "-1" },
      h(
        "div",
        null,
        h("code", null, signature(method)),
        method.doc && h("p", { class: "dim" }, method.doc),
      ),
      h(
        "span",
        { class: "tools" },
        button("run-method", "run", { data }),
        button("new-schedule", "schedule", { data }),
      ),
    );
  };
  return frame(
    { title: "Methods", name: "methods", note: formatCount(list.length) },
    h("ul", { class: "methods" }, list.map(line)),
  );
}
