// What the current view has loaded from the API: fetched once, changed by events, loaded again when stale.

import { request } from "./api.js";

const POLL_MS = 3_000; // without an event stream
const REFRESH_MS = 60_000; // with one: events may be complete, a look now and then costs nothing

/**
 * Named resources. A spec is {url, body?, every, refresh?, on?}: `on` maps an event name to a function of
 * (data, payload) that gives the changed data or "reload"; `every` is the least time between two
 * loads in ms. `onChange` is told of each change, `onAnswer` of each answer (a Date) or failure (an error).
 */
export function createResources({ onChange, onAnswer }) {
  const entries = new Map();

  async function load(entry) {
    entry.controller?.abort();
    entry.controller = new AbortController();
    Object.assign(entry, { loading: true, stale: false, loadedAt: performance.now(), missed: [] });
    const { spec, controller: { signal } } = entry;
    try {
      const answer = await request(spec.body ? "POST" : "GET", spec.url, { body: spec.body, signal, onDate: onAnswer });
      entry.data = entry.missed.reduce((data, [name, payload]) => changed(entry, data, name, payload), answer);
      entry.error = null;
    } catch (error) {
      if (signal.aborted) return;
      entry.error = error;
      if (error.status >= 400 && error.status < 500) entry.data = null;
      if (error.status === 0) onAnswer(error);
    }
    entry.loading = false;
    onChange();
  }

  function changed(entry, data, name, payload) {
    const change = entry.spec.on?.[name];
    const next = typeof change === "function" ? change(data, payload) : change;
    if (next === "reload") entry.stale = true;
    return next && next !== "reload" ? next : data;
  }

  const addressOf = (spec) => spec.url + JSON.stringify(spec.body ?? null);

  return {
    get: (name) => entries.get(name),

    /** Make exactly these resources known; new addresses are loaded, their old data stays until then
     *  unless `fresh` says that it would be about something else. */
    sync(specs, fresh) {
      for (const [name, entry] of entries) {
        if (!(name in specs)) {
          entry.controller?.abort();
          entries.delete(name);
        }
      }
      for (const [name, spec] of Object.entries(specs)) {
        const entry = entries.get(name) ?? {};
        const moved = entry.spec && addressOf(entry.spec) !== addressOf(spec);
        if (moved && fresh(name)) entry.data = null;
        const isNew = moved || !entry.spec;
        entry.spec = spec;
        entries.set(name, entry);
        if (isNew) load(entry);
      }
    },

    /** An event changes what it concerns; what is being loaded hears it again afterwards. */
    apply(name, payload) {
      for (const entry of entries.values()) {
        if (entry.loading) entry.missed.push([name, payload]);
        if (entry.data) entry.data = changed(entry, entry.data, name, payload);
      }
    },

    /** Load what is stale or old. Called about twice a second. */
    tick(polling) {
      const now = performance.now();
      for (const entry of entries.values()) {
        const age = now - entry.loadedAt;
        const due = age >= (polling ? POLL_MS : entry.spec.refresh ?? REFRESH_MS);
        if (!entry.loading && (due || (entry.stale && age >= entry.spec.every))) load(entry);
      }
    },

    /** Take everything for stale: loaded again as soon as each may be. */
    expire() {
      for (const entry of entries.values()) entry.stale = true;
    },

    /** Load everything again, or only `names`. */
    reload(...names) {
      for (const [name, entry] of entries) if (!names.length || names.includes(name)) load(entry);
    },
  };
}
