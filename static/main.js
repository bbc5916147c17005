// Wires the page. The only module that does anything when loaded.

import * as audit from "./audit.js";
import { createCommands, listen } from "./commands.js";
import { h } from "./dom.js";
import * as executions from "./executions.js";
import { openLogin } from "./form.js";
import * as handlers from "./handlers.js";
import { Live } from "./live.js";
import * as overview from "./overview.js";
import { Page } from "./page.js";
import * as schedules from "./schedules.js";
import { createSettings, showLook } from "./settings.js";
import { Stream } from "./stream.js";

const TICK_MS = 500;
const CLOCK_MS = 1_000;

const part = (id) => [id, document.getElementById(id)];
const parts = Object.fromEntries(["top", "main", "status", "facts"].map(part));
const settings = createSettings(globalThis.localStorage);
const page = new Page({ overview, schedules, handlers, executions, audit }, settings, parts);
const live = new Live(page);
const take = (events) => live.take(events);
const stream = new Stream("/api/events", take, (happened) => page.setLink(happened));
page.onLogin = () =>
  openLogin(() => {
    page.resources.reload();
    stream.retry();
  });

const contrast = matchMedia("(prefers-contrast: more)");
const look = () => showLook(settings, document.documentElement, contrast.matches);
look();
contrast.addEventListener("change", look);

const zones = Intl.supportedValuesOf("timeZone");
document.getElementById("zones").append(...zones.map((value) => h("option", { value })));
listen(page, createCommands(page, stream, look));
addEventListener("popstate", () => page.follow(true));
document.addEventListener("visibilitychange", () => page.render());
setInterval(() => document.hidden || page.held || live.isAiming || page.tick(), TICK_MS);
setInterval(() => page.held || page.render(), CLOCK_MS);
stream.follow();
page.follow();
