// The page: where it is, what it shows, what it says. Everything else acts through it.

import { patch } from "./dom.js";
import { Times } from "./format.js";
import { chooseZone, nextLink, nextOffset, parseRoute, renderRoute, replaceIn } from "./model.js";
import { link, titleOf, unseenHeading } from "./pieces.js";
import { Resources } from "./resources.js";
import { renderFacts, renderTop } from "./shell.js";

const SAY_MS = 12_000;
const BROWSER_ZONE = Intl.DateTimeFormat().resolvedOptions().timeZone;

// What every view needs. No event tells the age of heartbeats, which the handlers' view shows.
const always = (view) => ({
  config: { url: "/api/config", every: 60_000 },
  session: { url: "/api/session", every: 60_000 },
  health: {
    url: "/api/health",
    every: 5_000,
    refresh: 10_000,
    on: { health: (data, change) => ({ ...data, ...change }), clock: "reload" },
  },
  handlers: {
    url: "/api/handlers",
    every: 2_000,
    refresh: view === "handlers" ? 2_000 : 30_000,
    on: { handler: replaceIn("handlers") },
  },
});

/** Views look at all of it, and change nothing. */
export class Page {
  route = parseRoute("");
  times = new Times(BROWSER_ZONE);
  now = Date.now(); // of the server
  link = { state: "connecting", since: Date.now() };
  held = false;
  selected = new Set(); // ids of schedules
  isAllSelected = false; // all that match the filter, also on other pages
  progress = new Map(); // by id of execution
  log = []; // lines that events brought of the execution that is shown
  undo = null; // takes the last deletion back
  #offset = 0;
  #lists = {};
  #scrolls = {}; // how far down each list was left
  #scroll = 0; // where to go as soon as the list is there
  #isWanted = false;

  /** `views` by name: modules with resources, renderList, renderOne; `parts`: what to fill. */
  constructor(views, settings, parts) {
    Object.assign(this, { views, settings, parts });
    this.resources = new Resources(() => this.render(), (answer) => this.#hear(answer));
  }

  get view() {
    return this.views[this.route.view];
  }

  get = (name) => this.resources.get(name);

  data = (name) => this.resources.get(name)?.data;

  get config() {
    return this.data("config");
  }

  get handlers() {
    return this.data("handlers")?.handlers ?? [];
  }

  /** The hash of a list as it was last filtered. */
  listHash = (view) => this.#lists[view] ?? renderRoute({ view });

  // Rendering

  /** Show what has changed, at the next frame. */
  render() {
    if (this.#isWanted || document.hidden) return;
    this.#isWanted = true;
    requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.#isWanted = false;
    this.now = Date.now() + this.#offset;
    const { view, parts, route } = this;
    const isOne = route.id != null && view.renderOne;
    const name = titleOf(route.view);
    const zone = chooseZone(this.settings.get("zone"), this.config?.timezone, BROWSER_ZONE);
    if (zone !== this.times.zone) this.times = new Times(zone);
    if (!this.held) this.#sync(false);
    const read = [...parts.main.querySelectorAll("[data-stick]")].filter(isScrolledUp);
    document.documentElement.dataset.role = this.data("session")?.role ?? "admin";
    patch(parts.top, renderTop(this));
    patch(parts.main, isOne ? view.renderOne(this) : [unseenHeading(name), view.renderList(this)]);
    patch(parts.facts, renderFacts(this));
    for (const node of parts.main.querySelectorAll("[data-stick]"))
      if (!read.includes(node)) node.scrollTop = node.scrollHeight;
    if (this.#scroll && parts.main.querySelector("[data-row]")) {
      scrollTo(0, this.#scroll);
      this.#scroll = 0;
    }
    const alarm = this.link.state === "disconnected" ? "○ " : "";
    const instance = this.config?.instance_name ?? "ScheduleZero";
    document.title = `${alarm}${route.id ?? name} · ${instance}`;
  }

  #sync(isOther) {
    this.resources.sync({ ...always(this.route.view), ...this.view.resources(this) }, isOther);
  }

  say(...content) {
    const { status } = this.parts;
    clearTimeout(this.silence);
    this.silence = setTimeout(() => patch(status), SAY_MS);
    patch(status, content);
  }

  sayStarted = (text, id) => this.say(link("executions", id, text));

  /** Do what the user asked; if the server refuses, tell why. */
  async attempt(act) {
    try {
      await act();
    } catch (error) {
      this.say(`✗ ${error.message}`);
      if (!("status" in error)) throw error;
    }
  }

  // Where it is

  /** Go to a route; with `replace` the one before is left out of the history. */
  go(route, replace = false) {
    const hash = renderRoute(route);
    if (hash === location.hash) return;
    history[replace ? "replaceState" : "pushState"](null, "", hash);
    this.follow();
  }

  /** Show what the address says; `isBack`: it was left before. */
  follow(isBack = false) {
    const before = this.route;
    this.route = parseRoute(location.hash);
    const { view, id, query } = this.route;
    const hash = renderRoute(this.route);
    if (id == null) this.#lists[view] = hash;
    const isReturn = id == null && (isBack || before.view === view);
    const hasMoved = before.view !== view || before.id !== id;
    const isOtherPage = ["page", "before"].some((name) => before.query[name] !== query[name]);
    if (hasMoved && before.id == null) this.#scrolls[renderRoute(before)] = scrollY;
    if (hasMoved || isOtherPage) scrollTo(0, 0);
    if (hasMoved) {
      this.log = [];
      this.#scroll = isReturn ? this.#scrolls[hash] : 0;
    }
    this.isAllSelected = false;
    this.#sync(hasMoved);
    this.paint();
    if (!hasMoved) return;
    const { main } = this.parts;
    (main.querySelector("h1") ?? main).focus({ preventScroll: true });
  }

  // The server

  #hear(answer) {
    if (answer.status === 401) {
      if (!document.querySelector("dialog.login")) this.onLogin();
    } else if (answer instanceof Error) this.setLink("unreachable");
    else this.#offset = nextOffset(this.#offset, answer, Date.now());
  }

  setLink(happened) {
    const before = this.link;
    this.link = nextLink(before, happened, Date.now() + this.#offset);
    if (this.link !== before && ["live", "polling"].includes(this.link.state))
      this.resources.expire();
    this.render();
  }

  /** Look what has become of what the user did. */
  refresh() {
    this.resources.expire();
    this.tick();
  }

  /** Load what is due. While nothing answers, only the stream asks again, ever more slowly. */
  tick() {
    if (this.link.state !== "disconnected") this.resources.tick(this.link.state === "polling");
  }

  /** Hold the page still, or let it go on. */
  hold() {
    this.held = !this.held;
    if (!this.held) this.resources.reload();
    this.say(this.held ? "The page is held still. Press p to go on." : "The page follows again.");
    this.render();
  }
}

const isScrolledUp = (node) => node.scrollHeight - node.scrollTop - node.clientHeight > 8;
