// Wires the page. The only module that does anything when loaded.

import * as audit from "./audit.js";
import { createCommands } from "./commands.js";
import { h } from "./dom.js";
import * as executions from "./executions.js";
import * as handlers from "./handlers.js";
import { listen } from "./input.js";
import { Live } from "./live.js";
import { openLogin } from "./login.js";
import * as overview from "./overview.js";
import { Page } from "./page.js";
import * as schedules from "./schedules.js";
import { createSettings, showLook } from "./settings.js";
import { Stream } from "./stream.js";

const TICK_MS = 500;
const CLOCK_MS = 1_000;

const parts = Object.fromEntries(
  ["top", "main", "status", "facts"].map((id) => [id, document.getElementById(id)]),
);
const settings = createSettings(globalThis.localStorage);
const page = new Page({ overview, schedules, handlers, executions, audit }, settings, parts);
page.onLogin = () =>
  openLogin(() => {
    page.resources.reload();
    stream.retry();
  });
const live = new Live(page);
const stream = new Stream("/api/events", {
  onEvents: (events) => live.take(events),
  onLink: (happened) => page.setLink(happened),
});

const contrast = matchMedia("(prefers-contrast: more)");
const look = () => showLook(settings, document.documentElement, contrast.matches);
look();
contrast.addEventListener("change", look);

document
  .getElementById("zones")
  .append(...Intl.supportedValuesOf("timeZone").map((zone) => h("option", { value: zone })));
listen(page, createCommands(page, stream, look));
addEventListener("popstate", () => page.follow());
document.addEventListener("visibilitychange", () => page.render());
setInterval(() => document.hidden || page.held || live.isAiming || page.tick(), TICK_MS);
setInterval(() => page.held || page.render(), CLOCK_MS);
stream.follow();
page.follow();
