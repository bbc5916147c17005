// Handlers: who is connected, what they offer, how they are.

import { h } from "./dom.js";
import { formatCount, formatDuration, formatPercent } from "./format.js";
import { isFailed, methodsOf, renderRoute, signature, upsertExecution } from "./model.js";
import { button, cell, empty, facts, frame, heading, link, missing, row, state, table, unseenHeading, when } from "./pieces.js";
import { history } from "./executions.js";

const FAILED_ROWS = 10;

export const title = ({ route }) => route.id ?? "Handlers";

export function resources({ route }) {
  const stats = { stats: { url: "/api/executions/stats", on: { execution: "reload" }, every: 5_000 } };
  if (route.id == null) return stats;
  return {
    ...stats,
    failed: {
      url: `/api/executions?handler_id=${encodeURIComponent(route.id)}&status=error,timeout,lost&limit=${FAILED_ROWS}`, every: 5_000,
      on: { execution: (data, execution) => ({
        ...data, records: upsertExecution(data.records, execution, isFailed(execution) && execution.handler_id === route.id, FAILED_ROWS),
      }) },
    },
  };
}

export function render(ctx) {
  const resource = ctx.get("handlers");
  const waiting = missing(resource);
  if (waiting) return [frame({ title: "Handlers", name: "list" }, waiting)];
  const { handlers } = resource.data;
  if (ctx.route.id == null) return renderList(ctx, handlers);
  return renderOne(ctx, handlers.find(({ id }) => id === ctx.route.id));
}

function renderList(ctx, handlers) {
  const heads = [["state-of", "status"], ["name", "handler"], ["address", "address"], ["num", "instances"], ["num", "running"], ["num", "queued"],
    ["num", "runs"], ["num", "success"], ["heard", "heard"], ["skew", "clock"]];
  return [
    unseenHeading("Handlers"),
    frame({ title: "Handlers", name: "list", note: formatCount(handlers.length) }, handlers.length
      ? table({ caption: "Handlers", name: "handlers", wide: true, heads }, handlers.map((handler) => listRow(ctx, handler)))
      : [empty("no handler has registered yet. A handler is a small program that offers methods; to try one:"),
        h("pre", null, `python handler.py Example --server tcp://${location.hostname}:${ctx.config?.zmq_port ?? 4242}`)]),
  ];
}

function listRow(ctx, handler) {
  const tally = ctx.get("stats")?.data?.by_handler?.[handler.id];
  const connected = (handler.instances ?? []).filter(({ status }) => status !== "Disconnected");
  return row("handler", handler.id,
    cell("state-of", state(handler.status)), cell("name", link("handlers", handler.id)), cell("address dim", handler.address),
    cell("num", formatCount(connected.length || handler.instances?.length || 0)),
    cell("num", formatCount(handler.running ?? 0)), cell("num", formatCount(handler.queued ?? 0)),
    cell("num", formatCount(tally?.total ?? 0)), cell("num", formatPercent(tally?.success_rate)),
    cell("heard", when(handler.last_seen, ctx, "rel")), cell("skew", skew(connected)));
}

const SKEW_S = 2; // a handler's clock this far off deserves a word

function skew(instances) {
  const worst = instances.map(({ clock_skew_seconds: s }) => s).filter((s) => s != null)
    .sort((a, b) => Math.abs(b) - Math.abs(a))[0];
  if (worst == null) return h("span", { class: "dim" }, "–");
  if (Math.abs(worst) < SKEW_S) return h("span", { class: "dim" }, "in step");
  return h("span", { class: "yellow" }, `${formatDuration(Math.abs(worst) * 1000)} ${worst > 0 ? "ahead" : "behind"}`);
}

function renderOne(ctx, handler) {
  const head = h("p", { class: "trail" }, h("a", { href: ctx.listHash("handlers"), "data-back": true }, "‹ Handlers"));
  if (!handler) return [head, heading(ctx.route.id), empty(`There is no handler ${ctx.route.id}.`)];
  const tally = ctx.get("stats")?.data?.by_handler?.[handler.id];
  return [
    head,
    heading(handler.id, state(handler.status),
      h("span", { class: "tools" }, h("a", { href: renderRoute({ view: "schedules", query: { handler: handler.id } }) }, "schedules"),
        h("a", { href: renderRoute({ view: "executions", query: { handler: handler.id } }) }, "executions"))),
    h("div", { class: "pair", "data-key": "pair" }, frame({ title: "Load", name: "about" }, facts([
      ["address", handler.address],
      ["running", `${formatCount(handler.running ?? 0)} of ${formatCount(handler.capacity ?? 0)}`], ["queued", formatCount(handler.queued ?? 0)],
      ["runs", tally && formatCount(tally.total)], ["success", tally && formatPercent(tally.success_rate)],
      ["duration", tally?.duration_ms?.p50 != null && `p50 ${formatDuration(tally.duration_ms.p50)}, p95 ${formatDuration(tally.duration_ms.p95)}`],
      ["heard", when(handler.last_seen, ctx)],
    ])), instances(ctx, handler)),
    methods(handler),
    frame({ title: "Failed lately", name: "failures" },
      missing(ctx.get("failed")) ?? (ctx.get("failed").data.records.length ? history(ctx, ctx.get("failed").data.records) : empty("nothing failed"))),
  ];
}

function instances(ctx, { instances: list = [] }) {
  const heads = [["state-of", "status"], ["name", "instance"], ["num", "load"], ["heard", "heard"], ["skew", "clock"]];
  const line = (instance) => h("tr", { "data-key": instance.instance },
    cell("state-of", state(instance.status)),
    cell("name", instance.hostname ? `${instance.hostname}:${instance.pid}` : instance.instance),
    cell("num", `${instance.running}/${instance.concurrency}`),
    cell("heard", when(instance.last_seen, ctx, "rel")), cell("skew", skew([instance])));
  return frame({ title: "Instances", name: "instances", note: formatCount(list.length) },
    list.length ? table({ caption: "Instances", name: "instances", wide: true, heads }, list.map(line)) : empty("none connected"));
}

function methods(handler) {
  const list = methodsOf(handler);
  return frame({ title: "Methods", name: "methods", note: formatCount(list.length) }, h("ul", { class: "methods" }, list.map((method) =>
    h("li", { "data-key": method.name, "data-row": "method", "data-id": method.name, tabindex: "-1" },
      h("div", null, h("code", null, signature(method)), method.doc && h("p", { class: "dim" }, method.doc)),
      h("span", { class: "tools" }, button("run-method", "run", { data: { handler: handler.id, method: method.name } }),
        button("new-schedule", "schedule", { data: { handler: handler.id, method: method.name } }))))));
}
