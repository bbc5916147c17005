// The event stream: read, resumed after interruptions, asleep while nobody looks.

import { backoff, parseEvents } from "./model.js";

const SILENCE_MS = 45_000; // the server sends a comment at least every 15 s
const UNSUPPORTED_MS = 30_000; // how long to poll before asking for the stream again
const HIDDEN_MS = 60_000; // a tab hidden for longer closes its stream

/**
 * Follow `url` for as long as the page lives. `onEvents` gets each batch of {name, id, data};
 * `onLink` gets "opened", "unsupported", "lost", "unreachable", "slept" and "woke".
 * Returns a function that tries again at once.
 */
export function openStream(url, { onEvents, onLink }) {
  let lastId = "";
  let failures = 0;
  let controller = new AbortController();
  let hurry = () => {};

  const pause = (ms) => new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    hurry = () => {
      clearTimeout(timer);
      resolve();
    };
  });

  async function read(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    let watchdog;
    for (;;) {
      clearTimeout(watchdog);
      watchdog = setTimeout(() => controller.abort(), SILENCE_MS);
      const { value, done } = await reader.read().finally(() => clearTimeout(watchdog));
      if (done) return;
      const { events, rest } = parseEvents(text + value);
      text = rest;
      lastId = events.findLast((event) => event.id != null)?.id ?? lastId;
      if (events.length) onEvents(events);
    }
  }

  async function connect() {
    controller = new AbortController();
    const response = await fetch(url, {
      headers: lastId ? { "Last-Event-ID": lastId } : {}, cache: "no-store", signal: controller.signal,
    });
    if (!response.ok) return response.status < 500 || response.status === 503 ? "unsupported" : "unreachable";
    failures = 0;
    onLink("opened");
    await read(response);
    return "lost";
  }

  async function follow() {
    for (;;) {
      if (document.hidden && controller.signal.aborted) {
        onLink("slept");
        await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
        onLink("woke");
      }
      const wasOpen = failures === 0;
      const ended = await connect().catch(() => (wasOpen ? "lost" : "unreachable"));
      if (ended === "unsupported") {
        onLink("unsupported");
        await pause(UNSUPPORTED_MS);
        continue;
      }
      failures += 1;
      onLink(failures > 1 ? "unreachable" : "lost");
      await pause(backoff(failures, Math.random()));
    }
  }

  let hidden;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(hidden);
    if (document.hidden) hidden = setTimeout(() => controller.abort(), HIDDEN_MS);
    else hurry();
  });
  addEventListener("online", () => hurry());
  follow();
  return () => hurry();
}
