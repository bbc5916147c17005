// The event stream: read, resumed after interruptions, asleep while nobody looks.

import { backoff, parseEvents } from "./model.js";

const SILENCE_MS = 45_000; // the server sends a comment at least every 15 s
const UNSUPPORTED_MS = 30_000; // how long to poll before asking for the stream again
const HIDDEN_MS = 60_000; // a tab hidden for longer closes its stream

/** Follows `url`. `onEvents` gets batches of {name, id, data}; `onLink` "opened", "unsupported" (an
 *  answer, but no stream), "lost", "unreachable" (again no answer), "slept" and "woke". */
export class Stream {
  retry = () => {};
  #lastId = "";
  #failures = 0;
  #controller = new AbortController();

  constructor(url, onEvents, onLink) {
    Object.assign(this, { url, onEvents, onLink });
  }

  async follow() {
    this.#watchTab();
    for (;;) {
      if (document.hidden && this.#controller.signal.aborted) await this.#sleep();
      const ended = await this.#connect().catch(() => "lost");
      this.#failures += 1;
      const isUnsupported = ended === "unsupported";
      this.onLink(isUnsupported ? ended : this.#failures > 1 ? "unreachable" : "lost");
      await this.#pause(isUnsupported ? UNSUPPORTED_MS : backoff(this.#failures, Math.random()));
    }
  }

  async #connect() {
    this.#controller = new AbortController();
    const response = await this.#inTime(
      fetch(this.url, {
        headers: this.#lastId ? { "Last-Event-ID": this.#lastId } : {},
        cache: "no-store",
        signal: this.#controller.signal,
      }),
    );
    if (!response.ok) return "unsupported";
    this.#failures = 0;
    this.onLink("opened");
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let text = ""; ; ) {
      const { value, done } = await this.#inTime(reader.read());
      if (done) return "lost";
      const { events, rest } = parseEvents(text + value);
      text = rest;
      this.#lastId = events.findLast((event) => event.id != null)?.id ?? this.#lastId;
      if (events.length) this.onEvents(events);
    }
  }

  #inTime(answer) {
    const watchdog = setTimeout(() => this.#controller.abort(), SILENCE_MS);
    return answer.finally(() => clearTimeout(watchdog));
  }

  #pause(ms) {
    return new Promise((resolve) => {
      setTimeout(resolve, ms);
      this.retry = resolve;
    });
  }

  async #sleep() {
    this.onLink("slept");
    const woken = (resolve) =>
      document.addEventListener("visibilitychange", resolve, { once: true });
    await new Promise(woken);
    this.onLink("woke");
  }

  #watchTab() {
    let hidden;
    document.addEventListener("visibilitychange", () => {
      clearTimeout(hidden);
      if (document.hidden) hidden = setTimeout(() => this.#controller.abort(), HIDDEN_MS);
      else this.retry();
    });
    addEventListener("online", () => this.retry());
  }
}
