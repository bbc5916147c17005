// The event stream: read, resumed after interruptions, asleep while nobody looks.

import { backoff, parseEvents } from "./model.js";

const SILENCE_MS = 45_000; // the server sends a comment at least every 15 s
const UNSUPPORTED_MS = 30_000; // how long to poll before asking for the stream again
const HIDDEN_MS = 60_000; // a tab hidden for longer closes its stream

/**
 * Follows `url` for as long as the page lives. `onEvents` gets each batch of {name, id, data};
 * `onLink` gets "opened", "unsupported" (an answer, but no stream), "lost", "unreachable" (again no
 * answer), "slept" and "woke".
 */
export class Stream {
  #lastId = "";
  #failures = 0;
  #controller = new AbortController();
  #hurry = () => {};

  constructor(url, { onEvents, onLink }) {
    Object.assign(this, { url, onEvents, onLink });
  }

  async follow() {
    this.#watchTab();
    for (;;) {
      if (document.hidden && this.#controller.signal.aborted) await this.#sleep();
      const ended = await this.#connect().catch(() => "lost");
      this.#failures += 1;
      if (ended === "unsupported") this.onLink("unsupported");
      else this.onLink(this.#failures > 1 ? "unreachable" : "lost");
      await this.#pause(
        ended === "unsupported" ? UNSUPPORTED_MS : backoff(this.#failures, Math.random()),
      );
    }
  }

  /** Try again at once, if it is waiting to. */
  retry() {
    this.#hurry();
  }

  async #connect() {
    this.#controller = new AbortController();
    const watchdog = this.#hangUpAfterSilence();
    const response = await fetch(this.url, {
      headers: this.#lastId ? { "Last-Event-ID": this.#lastId } : {},
      cache: "no-store",
      signal: this.#controller.signal,
    }).finally(() => clearTimeout(watchdog));
    if (!response.ok) return "unsupported";
    this.#failures = 0;
    this.onLink("opened");
    await this.#read(response.body.pipeThrough(new TextDecoderStream()).getReader());
    return "lost";
  }

  async #read(reader) {
    let text = "";
    for (;;) {
      const watchdog = this.#hangUpAfterSilence();
      const { value, done } = await reader.read().finally(() => clearTimeout(watchdog));
      if (done) return;
      const { events, rest } = parseEvents(text + value);
      text = rest;
      this.#lastId = events.findLast((event) => event.id != null)?.id ?? this.#lastId;
      if (events.length) this.onEvents(events);
    }
  }

  #hangUpAfterSilence() {
    return setTimeout(() => this.#controller.abort(), SILENCE_MS);
  }

  #pause(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#hurry = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  async #sleep() {
    this.onLink("slept");
    await new Promise((resolve) =>
      document.addEventListener("visibilitychange", resolve, { once: true }),
    );
    this.onLink("woke");
  }

  #watchTab() {
    let hidden;
    document.addEventListener("visibilitychange", () => {
      clearTimeout(hidden);
      if (document.hidden) hidden = setTimeout(() => this.#controller.abort(), HIDDEN_MS);
      else this.#hurry();
    });
    addEventListener("online", () => this.#hurry());
  }
}
