// What the event stream tells, brought to the page in batches.

import { MAX_LOG_LINES } from "./model.js";

const BATCH_MS = 150; // a burst of events costs one render
const MAX_WAITING = 1_000;
const AIM_MS = 1_000;

export class Live {
  #queue = [];
  #aimedAt = -AIM_MS;

  constructor(page) {
    this.page = page;
    document.addEventListener(
      "pointermove",
      ({ target }) => {
        if (target.closest?.("tbody")) this.#aimedAt = performance.now();
      },
      { passive: true },
    );
  }

  /** Rows do not move away under a pointer that is about to press something in them. */
  get isAiming() {
    return performance.now() - this.#aimedAt < AIM_MS;
  }

  take(events) {
    if (!this.#queue.length) setTimeout(() => this.#flush(), BATCH_MS);
    this.#queue.push(...events);
  }

  #flush() {
    if (this.isAiming && this.#queue.length < MAX_WAITING) {
      setTimeout(() => this.#flush(), BATCH_MS);
      return;
    }
    const events = this.#queue;
    this.#queue = [];
    if (this.page.held) return;
    for (const { name, data } of events) this.#apply(name, JSON.parse(data));
    this.page.render();
  }

  #apply(name, payload) {
    const { progress, resources } = this.page;
    if (name === "gap") {
      progress.clear();
      resources.reload();
    } else if (name === "progress") progress.set(payload.execution_id, payload);
    else if (name === "log") this.#addLog(payload);
    else resources.apply(name, payload);
    if (name === "execution" && payload.status !== "running") progress.delete(payload.execution_id);
  }

  #addLog({ execution_id, lines }) {
    const { page } = this;
    const { route } = page;
    if (route.view === "executions" && route.id === execution_id)
      page.log = [...page.log, ...lines].slice(-MAX_LOG_LINES);
  }
}
