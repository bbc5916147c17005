// What surrounds every view: name, tabs, link to the server, clock; memory and disk below. Pure.

import { h } from "./dom.js";
import { formatBytes, formatDuration, stateOf } from "./format.js";
import { VIEWS } from "./model.js";
import { button, dim, state, titleOf } from "./pieces.js";

export const renderTop = (page) => [
  h("p.brand", h("b", "ScheduleZero"), instance(page.config ?? {})),
  h("nav", { "aria-label": "Views" }, VIEWS.map((view, i) => tab(page, view, i + 1))),
  h("p.vitals", health(page), link(page), clock(page)),
];

const instance = ({ instance_name: name, description }) =>
  name && name !== "ScheduleZero" && h("span.instance", { title: description }, name);

const tab = ({ route, listHash }, view, key) =>
  h("a", { href: listHash(view), "data-key": view, "aria-current": route.view === view && "page" },
    h("kbd", { "aria-hidden": "true" }, key),
    h("span", titleOf(view)));

function health(page) {
  const answer = page.data("health");
  if (!answer || page.link.state === "disconnected") return null;
  return h("a", { href: "#/overview" }, state(answer.status, stateOf(answer.status)[2]));
}

function link({ link: { state: name, since }, times, now, held }) {
  if (held) return button("pause-live", state("paused", "held still"), { title: "Press to go on" });
  if (name !== "disconnected")
    return button("pause-live", state(name), { title: "Hold the page still" });
  const at = times.short(since, now).replace(/:\d\d$/, "");
  return button("retry", state(name, `disconnected since ${at}`), { title: "Try again now" });
}

const clock = ({ times, now }) =>
  button("zone", h("time.clock", times.clock(now), " ", dim(times.zone)), {
    title: `${times.full(now)}; press for another time zone`,
  });

export function renderFacts(page) {
  const session = page.data("session") ?? {};
  const known = vitals(page.data("health") ?? {}, page.config ?? {}, session);
  return [
    h("dl",
      known
        .filter(([, value]) => value != null)
        .map(([name, value]) => h("div", h("dt", name), h("dd", value)))),
    h("span.tools",
      session.can_log_out && button("log-out", "log out"),
      button("theme", `theme: ${page.settings.get("theme")}`),
      button("palette", ["commands ", h("kbd", ":")]),
      button("help", ["keys ", h("kbd", "?")])),
  ];
}

const vitals = (health, { deployment }, { can_log_out: hasLogin, name, role }) => [
  ["memory", health.memory_bytes && formatBytes(health.memory_bytes)],
  ["written", health.disk_written_bytes && formatBytes(health.disk_written_bytes)],
  ["up", health.uptime_seconds && formatDuration(health.uptime_seconds * 1000)],
  ["deployment", deployment],
  ["version", health.version],
  ["you", hasLogin ? `${name} (${role})` : null],
];
