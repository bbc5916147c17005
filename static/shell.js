// What surrounds every view: name, tabs, link to the server, clock; memory and disk below. Pure.

import { h } from "./dom.js";
import { formatBytes, formatDuration, stateOf } from "./format.js";
import { VIEWS } from "./model.js";
import { button, dim, state } from "./pieces.js";

export const renderTop = (ctx) => [
  h("p", { class: "brand" }, h("b", null, "ScheduleZero"), instance(ctx.config ?? {})),
  h(
    "nav",
    { "aria-label": "Views" },
    VIEWS.map((view, i) => tab(ctx, view, i + 1)),
  ),
  h("p", { class: "vitals" }, health(ctx), link(ctx), clock(ctx)),
];

const instance = ({ instance_name: name, description }) =>
  name && name !== "ScheduleZero" && h("span", { class: "instance", title: description }, name);

function tab({ route, listHash }, view, key) {
  const current = route.view === view ? "page" : null;
  return h(
    "a",
    { href: listHash(view), "data-key": view, "aria-current": current },
    h("kbd", { "aria-hidden": "true" }, key),
    h("span", null, view[0].toUpperCase() + view.slice(1)),
  );
}

function health({ get, link: { state: name } }) {
  const answer = get("health")?.data;
  if (!answer || name === "disconnected") return null;
  return h("a", { href: "#/overview" }, state(answer.status, stateOf(answer.status)[1]));
}

function link({ link: { state: name, since }, times, now, held }) {
  if (held) return button("pause-live", state("paused", "held still"), { title: "Press to go on" });
  if (name !== "disconnected")
    return button("pause-live", state(name), { title: "Hold the page still" });
  const when = times.short(since, now).replace(/:\d\d$/, "");
  return button("retry", state(name, `disconnected since ${when}`), { title: "Try again now" });
}

function clock({ times, now }) {
  const title = `${times.full(now)}; press for another time zone`;
  return button("zone", h("time", { class: "clock" }, times.clock(now), " ", dim(times.zone)), {
    title,
  });
}

export function renderFacts({ get, config, settings }) {
  const session = get("session")?.data ?? {};
  const facts = vitals(get("health")?.data ?? {}, config, session).filter(Boolean);
  return [
    h(
      "dl",
      null,
      facts.map(([name, value]) => h("div", null, h("dt", null, name), h("dd", null, value))),
    ),
    h(
      "span",
      { class: "tools" },
      session.can_log_out && button("log-out", "log out"),
      button("theme", `theme: ${settings.get("theme")}`),
      button("palette", ["commands ", h("kbd", null, ":")]),
      button("help", ["keys ", h("kbd", null, "?")]),
    ),
  ];
}

const vitals = (health, config, session) => [
  health.memory_bytes != null && ["memory", formatBytes(health.memory_bytes)],
  health.disk_written_bytes != null && ["written", formatBytes(health.disk_written_bytes)],
  health.uptime_seconds != null && ["up", formatDuration(health.uptime_seconds * 1000)],
  config?.deployment && ["deployment", config.deployment],
  health.version && ["version", health.version],
  session.can_log_out && ["you", `${session.name} (${session.role})`],
];
