// Charts as SVG of a few lines. Colour is never alone: failures are hollow, and each chart is told in words.

import { h, s } from "./dom.js";
import { formatCount, formatDuration, formatPlural } from "./format.js";
import { logPosition } from "./model.js";

/** Bars of executions per minute: successes, failures (hollow) on top of them, then what did not run. */
export function minuteBars(buckets, times) {
  const totals = buckets.map(({ success, failed, other }) => success + failed + other);
  const top = Math.max(4, ...totals);
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const story = `${formatPlural(sum(totals), "execution")} in the last ${buckets.length} minutes, `
    + `${formatCount(sum(buckets.map(({ failed }) => failed)))} failed; at most ${formatCount(Math.max(...totals))} in one minute`;
  const part = (kind, i, from, count) => count > 0
    && s("rect", { class: kind, x: i + 0.12, y: 100 - 100 * (from + count) / top, width: 0.76, height: 100 * count / top });
  const bar = ({ at, success, failed, other }, i) => s("g", null,
    s("title", null, `${times.clock(at).slice(0, 5)}  ${success} succeeded, ${failed} failed, ${other} did not run`),
    s("rect", { class: "reach", x: i, y: 0, width: 1, height: 100 }),
    part("good", i, 0, success), part("bad", i, success, failed), part("other", i, success + failed, other));
  return h("figure", { class: "bars" },
    h("div", { class: "plot", role: "img", "aria-label": story },
      h("span", { class: "top", "aria-hidden": "true" }, formatCount(top)),
      s("svg", { viewBox: `0 0 ${buckets.length} 100`, preserveAspectRatio: "none", "aria-hidden": "true" },
        s("path", { class: "grid", d: `M0 0H${buckets.length}M0 50H${buckets.length}` }), buckets.map(bar))),
    h("figcaption", { "aria-hidden": "true" },
      [buckets[0].at, buckets[Math.floor(buckets.length / 2)].at, buckets.at(-1).at].map((at) => h("span", null, times.clock(at).slice(0, 5)))));
}

/** A line of blocks filled to `share`; the rest is hollow. */
export const gauge = (share, label) =>
  h("div", { class: "gauge", role: "img", "aria-label": label },
    s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      share == null ? s("rect", { class: "none", width: 100, height: 10 }) : [
        share < 1 && s("rect", { class: "bad", x: share * 100, width: 100 - share * 100, height: 10 }),
        s("rect", { class: "good", width: share * 100, height: 10 })]));

/** From p50 to p95 of each handler on one logarithmic axis. `rows`: [name, {p50, p95, max}]. */
export function durationRanges(rows) {
  const known = rows.filter(([, duration]) => duration?.p50 != null);
  const low = 10 ** Math.floor(Math.log10(Math.max(1, Math.min(...known.map(([, d]) => d.p50)))));
  const high = Math.max(low * 1000, 10 ** Math.ceil(Math.log10(Math.max(1, ...known.map(([, d]) => d.p95)))));
  const ticks = [];
  for (let tick = low; tick <= high; tick *= 10) ticks.push(tick);
  const x = (ms) => 100 * logPosition(ms, low, high);
  const range = ([name, { p50, p95, max }]) => h("tr", { "data-key": name },
    h("th", { scope: "row" }, name),
    h("td", { class: "range" }, s("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      s("path", { class: "grid", d: ticks.map((tick) => `M${x(tick)} 0V10`).join("") }),
      s("rect", { class: "span", x: x(p50), y: 3.5, width: Math.max(0.8, x(p95) - x(p50)), height: 3 }),
      s("rect", { class: "median", x: Math.min(98.6, x(p50)), y: 1, width: 1.4, height: 8 },
        s("title", null, `p50 ${formatDuration(p50)}, p95 ${formatDuration(p95)}, max ${formatDuration(max)}`)))),
    h("td", { class: "num" }, formatDuration(p50)), h("td", { class: "num" }, formatDuration(p95)));
  const axis = h("tr", { class: "axis", "aria-hidden": "true" }, h("td"), h("td", { class: "range" }, s("svg", null,
    s("text", { x: "0%" }, tickText(low)), s("text", { x: "100%" }, tickText(high)))), h("td"), h("td"));
  return h("table", { class: "durations" },
    h("caption", { class: "unseen" }, "Duration of successful runs by handler"),
    h("colgroup", null, ["name", "range", "took", "took"].map((kind) => h("col", { class: `c-${kind}` }))),
    h("thead", null, h("tr", null, ["handler", "", "p50", "p95"].map((label, i) => h("th", { scope: "col", class: i > 1 && "num" }, label)))),
    h("tbody", null, known.map(range), axis));
}

/** A power of ten of milliseconds, short: 1 ms, 10 s, 1000 s. */
const tickText = (ms) => (ms < 1000 ? `${ms} ms` : `${ms / 1000} s`);

/** The coming 24 hours in quarters of an hour; columns grow with the logarithm of the fires due. */
export function dayStrip(slots, times) {
  const top = Math.max(1, ...slots.map((slot) => slot.count));
  const total = slots.reduce((sum, slot) => sum + slot.count, 0);
  const hours = slots.map((slot, i) => [i, ...times.hour(slot.at)]).filter(([, hour, minute]) => minute === 0 && hour % 3 === 0);
  const column = ({ at, count, names }, i) => {
    if (!count) return null;
    const height = 12 + 88 * (Math.log(1 + count) / Math.log(1 + top));
    const some = [...names].slice(0, 6).join(", ") + (names.size > 6 ? `, ${names.size - 6} more` : "");
    return s("g", null,
      s("title", null, `${times.clock(at).slice(0, 5)}  ${formatPlural(count, "fire")}: ${some}`),
      s("rect", { class: "reach", x: i, y: 0, width: 1, height: 100 }),
      s("rect", { class: "fire", x: i + 0.15, y: 100 - height, width: 0.7, height }));
  };
  return h("figure", { class: "strip" },
    h("div", { class: "plot", role: "img", "aria-label": `${formatPlural(total, "fire")} in the coming 24 hours` },
      s("svg", { viewBox: `0 0 ${slots.length} 100`, preserveAspectRatio: "none", "aria-hidden": "true" },
        s("path", { class: "grid", d: hours.map(([i]) => `M${i} 0V100`).join("") }), slots.map(column))),
    h("figcaption", { "aria-hidden": "true" }, s("svg", { class: "hours" }, hours.map(([i, hour]) =>
      s("text", { x: `${(i / slots.length) * 100}%`, y: "1em", class: [hour % 6 && "odd", i < 2 && "first"].filter(Boolean).join(" ") }, `${String(hour).padStart(2, "0")}:00`)))));
}
