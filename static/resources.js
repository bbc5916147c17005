// What the view has loaded from the API: changed by events, loaded again when stale.

import { request } from "./api.js";

const POLL_MS = 3_000; // without an event stream
const REFRESH_MS = 60_000; // with one: events may be complete, a look now and then costs nothing

/**
 * Named resources. A spec is {url, body?, every, refresh?, on?}: `on` maps an event to "reload" or
 * a function of (data, payload) that gives the changed data or "reload"; `every` is the least time
 * between two loads, `refresh` the most, in ms. `onAnswer` hears of each answer (its date in ms)
 * and of errors that concern more than the resource: no answer, or none without login.
 */
export class Resources {
  #entries = new Map();

  constructor(onChange, onAnswer) {
    Object.assign(this, { onChange, onAnswer });
  }

  /** {data, error, loading} or undefined. */
  get(name) {
    return this.#entries.get(name);
  }

  /** Make exactly these known. Those with a new address are loaded; their old data stays until
   *  then, unless it `isOther`: about something else. */
  sync(specs, isOther) {
    for (const [name, entry] of this.#entries) {
      if (name in specs) continue;
      entry.controller.abort();
      this.#entries.delete(name);
    }
    for (const [name, spec] of Object.entries(specs)) {
      const entry = this.#entries.get(name) ?? {};
      const hasMoved = addressOf(entry.spec) !== addressOf(spec);
      if (hasMoved && isOther) entry.data = null;
      entry.spec = spec;
      this.#entries.set(name, entry);
      if (hasMoved) this.#load(entry);
    }
  }

  async #load(entry) {
    entry.controller?.abort();
    entry.controller = new AbortController();
    Object.assign(entry, { loading: true, stale: false, loadedAt: performance.now(), missed: [] });
    const { signal } = entry.controller;
    const { url, body } = entry.spec;
    const options = { signal, onDate: this.onAnswer };
    try {
      entry.data = await request(body ? "POST" : "GET", url, body, options);
      entry.error = null;
      for (const [name, payload] of entry.missed) change(entry, name, payload);
    } catch (error) {
      if (signal.aborted) return;
      entry.error = error;
      if (error.status >= 400 && error.status < 500) entry.data = null;
      if (error.status === 0 || error.status === 401) this.onAnswer(error);
    }
    entry.loading = false;
    this.onChange();
  }

  /** An event changes what it concerns; what is being loaded hears it again afterwards. */
  apply(name, payload) {
    for (const entry of this.#entries.values()) {
      if (entry.loading) entry.missed.push([name, payload]);
      if (entry.data) change(entry, name, payload);
    }
  }

  /** Load what is stale or old. Called about twice a second. */
  tick(isPolling) {
    for (const entry of this.#entries.values()) {
      const { every, refresh = REFRESH_MS } = entry.spec;
      const age = performance.now() - entry.loadedAt;
      const isDue = age >= (isPolling ? POLL_MS : refresh) || (entry.stale && age >= every);
      if (isDue && !entry.loading) this.#load(entry);
    }
  }

  /** Take everything for stale. */
  expire() {
    for (const entry of this.#entries.values()) entry.stale = true;
  }

  reload() {
    for (const entry of this.#entries.values()) this.#load(entry);
  }
}

const addressOf = (spec) => spec && spec.url + JSON.stringify(spec.body);

function change(entry, name, payload) {
  const on = entry.spec.on?.[name];
  const next = typeof on === "function" ? on(entry.data, payload) : on;
  if (next === "reload") entry.stale = true;
  else if (next) entry.data = next;
}
