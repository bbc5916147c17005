// Charts as SVG of a few lines. Colour is never alone: failures are hollow, and each chart is
// told in words.

import { h, s } from "./dom.js";
import { formatCount, formatDuration, formatPercent, formatPlural } from "./format.js";
import { logPosition } from "./model.js";
import { table } from "./pieces.js";

/** A drawing of `width` × 100 units that fills its place. */
const drawing = (width, ...children) =>
  s("svg", { viewBox: `0 0 ${width} 100`, preserveAspectRatio: "none", "aria-hidden": "true" },
    children);

/** A chart and what stands under it; `story` tells it to those who do not see it. */
const figure = (kind, story, plot, caption) =>
  h(`figure.${kind}`,
    h("div.plot", { role: "img", "aria-label": story }, plot),
    h("figcaption", { "aria-hidden": "true" }, caption));

const rect = (kind, x, y, width, height) => s("rect", { class: kind, x, y, width, height });
const grid = (lines) => s("path.grid", { d: lines.join("") });
export const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const column = (i, tip, ...parts) => s("g", s("title", tip), rect("reach", i, 0, 1, 100), parts);

/** Bars: successes, failures (hollow) on top of them, then what ended otherwise. */
export function minuteBars(buckets, times) {
  const totals = buckets.map(({ success, failed, other }) => success + failed + other);
  const failed = sum(buckets.map((bucket) => bucket.failed));
  const most = Math.max(...totals);
  const top = Math.max(4, most);
  const story =
    `${formatPlural(sum(totals), "execution")} in the last ${buckets.length} minutes, ` +
    `${formatCount(failed)} failed; at most ${formatCount(most)} in one minute`;
  const marks = [buckets[0], buckets[buckets.length >> 1], buckets.at(-1)];
  const plot = [
    h("span.top", { "aria-hidden": "true" }, formatCount(top)),
    drawing(buckets.length,
      grid([0, 50].map((y) => `M0 ${y}H${buckets.length}`)),
      buckets.map((bucket, i) => minuteBar(bucket, i, 100 / top, times))),
  ];
  return figure("bars", story, plot, marks.map(({ at }) => h("span", times.minute(at))));
}

function minuteBar({ at, success, failed, other }, i, unit, times) {
  const part = (kind, below, count) =>
    count > 0 && rect(kind, i + 0.12, 100 - unit * (below + count), 0.76, unit * count);
  return column(i,
    `${times.minute(at)}  ${success} succeeded, ${failed} failed, ${other} ended otherwise`,
    part("good", 0, success),
    part("bad", success, failed),
    part("other", success + failed, other));
}

/** A line filled to `share`; the rest is hollow. */
export function gauge(share) {
  const label = share == null ? "no runs yet" : `${formatPercent(share)} of runs succeeded`;
  const good = 100 * (share ?? 0);
  return h("div.gauge", { role: "img", "aria-label": label },
    drawing(100,
      rect(share == null ? "none" : "bad", good, 0, 100 - good, 100),
      rect("good", 0, 0, good, 100)));
}

/** From p50 to p95 of each handler on one logarithmic axis. `rows`: [name, {p50, p95, max}]. */
export function durationRanges(rows) {
  const power = (ms) => Math.log10(Math.max(1, ms));
  const low = Math.floor(power(Math.min(...rows.map(([, { p50 }]) => p50))));
  const high = Math.ceil(power(Math.max(...rows.map(([, { p95 }]) => p95))));
  const ends = [10 ** low, 10 ** Math.max(low + 3, high)];
  const caption = "Duration of successful runs by handler";
  const end = (ms) => h("span", ms < 1000 ? `${ms} ms` : `${ms / 1000} s`);
  return table({ caption, name: "durations", wide: false, idOf: ([name]) => name }, [
    ["name", "handler", ([name]) => name],
    ["range", h("span.axis", ends.map(end)), ([, duration]) => range(duration, ends)],
    ["took num", "p50", ([, { p50 }]) => formatDuration(p50)],
    ["took num", "p95", ([, { p95 }]) => formatDuration(p95)],
  ], rows);
}

function range({ p50, p95, max }, [low, high]) {
  const x = (ms) => 100 * logPosition(ms, low, high);
  const ticks = [];
  for (let ms = low; ms <= high; ms *= 10) ticks.push(`M${x(ms)} 0V100`);
  return drawing(100, grid(ticks),
    s("g",
      s("title", [["p50", p50], ["p95", p95], ["max", max]]
        .map(([name, ms]) => `${name} ${formatDuration(ms)}`).join(", ")),
      rect("span", x(p50), 35, Math.max(0.8, x(p95) - x(p50)), 30),
      rect("median", Math.min(98.6, x(p50)), 10, 1.4, 80)));
}

/** What the server foresees; columns grow with the logarithm of the fires due. */
export function dayStrip({ buckets }, times) {
  const counts = buckets.map(({ count }) => count);
  const top = Math.log(1 + Math.max(1, ...counts));
  const hours = buckets
    .map(({ at }, i) => [i, times.minute(Date.parse(at))])
    .filter(([, text]) => text.endsWith(":00") && Number(text.slice(0, 2)) % 3 === 0);
  const label = ([i, text]) => {
    const end = i < 2 ? "first" : i > buckets.length - 8 ? "last" : "";
    const kind = `${Number(text.slice(0, 2)) % 6 ? "odd" : ""} ${end}`;
    return s("text", { x: `${(100 * i) / buckets.length}%`, y: "1em", class: kind }, text);
  };
  return figure("strip",
    `${formatPlural(sum(counts), "fire")} in the coming 24 hours`,
    drawing(buckets.length,
      grid(hours.map(([i]) => `M${i} 0V100`)),
      buckets.map((bucket, i) => dayColumn(bucket, i, top, times))),
    s("svg.hours", hours.map(label)));
}

function dayColumn({ at, count, schedules }, i, top, times) {
  if (!count) return null;
  const height = 12 + (88 * Math.log(1 + count)) / top;
  const who = schedules.join(", ") + (count > schedules.length ? " …" : "");
  return column(i, `${times.minute(Date.parse(at))}  ${formatPlural(count, "fire")}: ${who}`,
    rect("fire", i + 0.15, 100 - height, 0.7, height));
}
