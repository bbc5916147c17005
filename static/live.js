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
    const aim = ({ target }) => {
      if (target.closest?.("tbody")) this.#aimedAt = performance.now();
    };
    document.addEventListener("pointermove", aim, { passive: true });
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
    if (this.isAiming && this.#queue.length < MAX_WAITING)
      return void setTimeout(() => this.#flush(), BATCH_MS);
    const events = this.#queue;
    this.#queue = [];
    if (this.page.held) return;
    for (const { name, data } of events) this.#apply(name, JSON.parse(data));
    this.page.render();
  }

  #apply(name, payload) {
    const { page } = this;
    const { execution_id: id } = payload;
    if (name === "gap") {
      page.progress.clear();
      page.resources.reload();
    } else if (name === "progress") page.progress.set(id, payload);
    else if (name === "log") {
      if (page.route.view === "executions" && page.route.id === id)
        page.log = [...page.log, ...payload.lines].slice(-MAX_LOG_LINES);
    } else page.resources.apply(name, payload);
    if (name === "execution" && payload.status !== "running") page.progress.delete(id);
  }
}
