// What surrounds every view: name, tabs, link to the server, clock; memory and disk below. Pure.

import { h } from "./dom.js";
import { formatBytes, formatDuration, stateOf } from "./format.js";
import { VIEWS, renderRoute } from "./model.js";
import { button, state } from "./pieces.js";

export function renderTop(ctx) {
  const { config, times, now, route } = ctx;
  return [
    h("p", { class: "brand" }, h("b", null, "ScheduleZero"), config?.instance_name && config.instance_name !== "ScheduleZero" ? h("span", { class: "instance", title: config.description }, config.instance_name) : null),
    h("nav", { "aria-label": "Views" }, VIEWS.map((view, i) => h("a", {
      href: ctx.listHash(view), "data-key": view, "aria-current": route.view === view ? "page" : null,
    }, h("kbd", { "aria-hidden": "true" }, i + 1), h("span", null, view[0].toUpperCase() + view.slice(1))))),
    h("p", { class: "vitals" }, health(ctx), link(ctx),
      button("zone", h("time", { class: "clock" }, times.clock(now), " ", h("span", { class: "dim" }, times.zone)), { title: `${times.full(now)}; press for another time zone` })),
  ];
}

function health({ get, link: { state: name } }) {
  const answer = get("health")?.data;
  if (!answer || name === "disconnected") return null;
  return h("a", { href: "#/overview", class: "plain" }, state(answer.status, stateOf(answer.status)[1]));
}

function link({ link: { state: name, since }, times, now, held }) {
  if (held) return button("pause-live", state("paused", "held still"), { title: "Live updates are held; press to go on" });
  if (name === "disconnected") return button("retry", state(name, `disconnected since ${times.short(since, now).slice(0, -3)}`), { title: "Try again now" });
  return button("pause-live", state(name), { title: "Hold the page still" });
}

export function renderFacts({ get, config, settings }) {
  const health = get("health")?.data ?? {};
  const session = get("session")?.data ?? {};
  const facts = [
    health.memory_bytes != null && ["memory", formatBytes(health.memory_bytes)],
    health.disk_written_bytes != null && ["written", formatBytes(health.disk_written_bytes)],
    health.uptime_seconds != null && ["up", formatDuration(health.uptime_seconds * 1000)],
    config?.deployment && ["deployment", config.deployment],
    session.can_log_out && ["you", `${session.name} (${session.role})`],
    health.version && ["version", health.version],
  ].filter(Boolean);
  return [
    h("dl", null, facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value)))),
    h("span", { class: "tools" },
      session.can_log_out && button("log-out", "log out"),
      button("theme", `theme: ${settings.get("theme")}`),
      button("palette", ["commands ", h("kbd", null, ":")]),
      button("help", ["keys ", h("kbd", null, "?")])),
  ];
}
