// Charts as SVG of a few lines. Colour is never alone: failures are hollow, and each chart is
// told in words.

import { h, s } from "./dom.js";
import { formatCount, formatDuration, formatPlural } from "./format.js";
import { logPosition } from "./model.js";

/** A drawing of `width` × `height` units that fills its place, whatever its shape. */
const drawing = (width, height, ...children) => {
  const viewBox = `0 0 ${width} ${height}`;
  return s("svg", { viewBox, preserveAspectRatio: "none", "aria-hidden": "true" }, children);
};

/** A chart and what stands under it; `story` tells it to those who do not see it. */
const figure = (kind, story, plot, caption) =>
  h(
    "figure",
    { class: kind },
    h("div", { class: "plot", role: "img", "aria-label": story }, plot),
    h("figcaption", { "aria-hidden": "true" }, caption),
  );

const rect = (kind, x, y, width, height) => s("rect", { class: kind, x, y, width, height });
const tip = (text) => s("title", null, text);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const minuteOf = (times, at) => times.clock(at).slice(0, 5);

// ---- Executions per minute ----------------------------------------------------------------------

/** Bars: successes, failures (hollow) on top of them, then what ended otherwise. */
export function minuteBars(buckets, times) {
  const totals = buckets.map(({ success, failed, other }) => success + failed + other);
  const failed = sum(buckets.map((bucket) => bucket.failed));
  const top = Math.max(4, ...totals);
  const story =
    `${formatPlural(sum(totals), "execution")} in the last ${buckets.length} minutes, ` +
    `${formatCount(failed)} failed; at most ${formatCount(Math.max(...totals))} in one minute`;
  const grid = s("path", { class: "grid", d: `M0 0H${buckets.length}M0 50H${buckets.length}` });
  const marks = [buckets[0], buckets[Math.floor(buckets.length / 2)], buckets.at(-1)];
  return figure(
    "bars",
    story,
    [
      h("span", { class: "top", "aria-hidden": "true" }, formatCount(top)),
      drawing(
        buckets.length,
        100,
        grid,
        buckets.map((bucket, i) => minuteBar(bucket, i, top, times)),
      ),
    ],
    marks.map(({ at }) => h("span", null, minuteOf(times, at))),
  );
}

function minuteBar({ at, success, failed, other }, i, top, times) {
  const part = (kind, from, count) =>
    count > 0 &&
    rect(kind, i + 0.12, 100 - (100 * (from + count)) / top, 0.76, (100 * count) / top);
  return s(
    "g",
    null,
    tip(`${minuteOf(times, at)}  ${success} succeeded, ${failed} failed, ${other} ended otherwise`),
    rect("reach", i, 0, 1, 100),
    part("good", 0, success),
    part("bad", success, failed),
    part("other", success + failed, other),
  );
}

// ---- Success ------------------------------------------------------------------------------------

/** A line filled to `share`; the rest is hollow. */
export const gauge = (share, label) =>
  h(
    "div",
    { class: "gauge", role: "img", "aria-label": label },
    drawing(100, 10, gaugeParts(share)),
  );

function gaugeParts(share) {
  if (share == null) return rect("none", 0, 0, 100, 10);
  const filled = share * 100;
  return [share < 1 && rect("bad", filled, 0, 100 - filled, 10), rect("good", 0, 0, filled, 10)];
}

// ---- Durations ----------------------------------------------------------------------------------

/** From p50 to p95 of each handler on one logarithmic axis. `rows`: [name, {p50, p95, max}]. */
export function durationRanges(rows) {
  const axis = durationAxis(rows.map(([, duration]) => duration));
  const kinds = ["name", "range", "took num", "took num"];
  const head = (label, i) => h("th", { scope: "col", class: kinds[i] }, label);
  return h(
    "table",
    { class: "durations" },
    h("caption", { class: "unseen" }, "Duration of successful runs by handler"),
    h(
      "colgroup",
      null,
      kinds.map((kind) => h("col", { class: `c-${kind.split(" ")[0]}` })),
    ),
    h("thead", null, h("tr", null, ["handler", "", "p50", "p95"].map(head))),
    h(
      "tbody",
      null,
      rows.map(([name, duration]) => durationRow(name, duration, axis)),
      axisRow(axis),
    ),
  );
}

/** The powers of ten that hold all ranges, three of them at least. */
function durationAxis(durations) {
  const log = (ms) => Math.log10(Math.max(1, ms));
  const low = Math.floor(log(Math.min(...durations.map(({ p50 }) => p50))));
  const high = Math.max(low + 3, Math.ceil(log(Math.max(...durations.map(({ p95 }) => p95)))));
  return Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
}

function durationRow(name, { p50, p95, max }, axis) {
  const x = (ms) => 100 * logPosition(ms, axis[0], axis.at(-1));
  const grid = s("path", { class: "grid", d: axis.map((tick) => `M${x(tick)} 0V10`).join("") });
  const range = s(
    "g",
    null,
    tip(`p50 ${formatDuration(p50)}, p95 ${formatDuration(p95)}, max ${formatDuration(max)}`),
    rect("span", x(p50), 3.5, Math.max(0.8, x(p95) - x(p50)), 3),
    rect("median", Math.min(98.6, x(p50)), 1, 1.4, 8),
  );
  return h(
    "tr",
    { "data-key": name },
    h("th", { scope: "row" }, name),
    h("td", { class: "range" }, drawing(100, 10, grid, range)),
    h("td", { class: "num" }, formatDuration(p50)),
    h("td", { class: "num" }, formatDuration(p95)),
  );
}

function axisRow(axis) {
  const end = (x, ms) => s("text", { x }, ms < 1000 ? `${ms} ms` : `${ms / 1000} s`);
  const ends = s("svg", null, end("0%", axis[0]), end("100%", axis.at(-1)));
  return h(
    "tr",
    { class: "axis", "aria-hidden": "true" },
    h("td"),
    h("td", { class: "range" }, ends),
    h("td"),
    h("td"),
  );
}

// ---- The coming day -----------------------------------------------------------------------------

/** 24 hours in quarters of an hour; columns grow with the logarithm of the fires due. */
export function dayStrip(slots, times) {
  const counts = slots.map(({ count }) => count);
  const top = Math.max(1, ...counts);
  const hours = slots
    .map(({ at }, i) => [i, ...times.hour(at)])
    .filter(([, hour, minute]) => minute === 0 && hour % 3 === 0);
  const grid = s("path", { class: "grid", d: hours.map(([i]) => `M${i} 0V100`).join("") });
  const label = ([i, hour]) => {
    const end = i < 2 ? "first" : i > slots.length - 8 ? "last" : "";
    const kind = `${hour % 6 ? "odd" : ""} ${end}`;
    return s(
      "text",
      { x: `${(100 * i) / slots.length}%`, y: "1em", class: kind },
      `${String(hour).padStart(2, "0")}:00`,
    );
  };
  return figure(
    "strip",
    `${formatPlural(sum(counts), "fire")} in the coming 24 hours`,
    drawing(
      slots.length,
      100,
      grid,
      slots.map((slot, i) => slotColumn(slot, i, top, times)),
    ),
    s("svg", { class: "hours" }, hours.map(label)),
  );
}

const NAMED = 6; // schedules in a tip

function slotColumn({ at, count, names }, i, top, times) {
  if (!count) return null;
  const height = 12 + (88 * Math.log(1 + count)) / Math.log(1 + top);
  const some =
    [...names].slice(0, NAMED).join(", ") +
    (names.size > NAMED ? `, ${names.size - NAMED} more` : "");
  return s(
    "g",
    null,
    tip(`${minuteOf(times, at)}  ${formatPlural(count, "fire")}: ${some}`),
    rect("reach", i, 0, 1, 100),
    rect("fire", i + 0.15, 100 - height, 0.7, height),
  );
}
