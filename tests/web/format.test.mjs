import assert from "node:assert/strict";
import { test } from "node:test";

import {
  EXECUTION_STATUSES,
  Times,
  firstLine,
  formatBytes,
  formatDuration,
  formatJson,
  formatParams,
  formatPercent,
  formatPlural,
  formatRelative,
  formatWeekday,
  localTime,
  prettyJson,
  stateOf,
} from "../../static/format.js";

const each = (cases, check) => {
  for (const [given, expected] of cases) assert.equal(check(given), expected, `for ${given}`);
};

test("a duration has two units at most and never a unit that is full", () => {
  each(
    [
      [null, "–"],
      [0, "<1 ms"],
      [0.4, "<1 ms"],
      [1, "1 ms"],
      [999.4, "999 ms"],
      [999.6, "1.00 s"],
      [9_949, "9.95 s"],
      [9_951, "10.0 s"],
      [59_900, "59.9 s"],
      [60_000, "1 min 00 s"],
      [245_000, "4 min 05 s"],
      [3_600_000, "1 h 00 min"],
      [7_380_000, "2 h 03 min"],
      [274_311_000, "3 d 4 h"],
    ],
    formatDuration,
  );
});

test("a relative time is rounded towards now, so that a fire is never announced too early", () => {
  each(
    [
      [0, "now"],
      [999, "now"],
      [-999, "now"],
      [1_000, "in 1 s"],
      [59_999, "in 59 s"],
      [60_000, "in 1 min"],
      [-119_999, "1 min ago"],
      [3_600_000, "in 1 h"],
      [-86_400_000, "1 d ago"],
      [200 * 86_400_000, "in 200 d"],
    ],
    formatRelative,
  );
});

test("a share that is not perfect never reads as 100 or 0 per cent", () => {
  each(
    [
      [null, "–"],
      [1, "100 %"],
      [0, "0 %"],
      [0.99999, "99.9 %"],
      [0.00001, "0.1 %"],
      [0.9661, "96.6 %"],
    ],
    formatPercent,
  );
});

test("bytes, plurals and parameters are short", () => {
  each(
    [
      [null, "–"],
      [0, "0 B"],
      [1023, "1023 B"],
      [1024, "1.0 KB"],
      [33_900_000, "32.3 MB"],
    ],
    formatBytes,
  );
  assert.equal(formatPlural(1, "run"), "1 run");
  assert.equal(formatPlural(12_000, "run"), "12,000 runs");
  assert.equal(formatParams({ a: 1, b: "x", c: { d: [] } }, 80), 'a=1 b="x" c={"d":[]}');
  assert.equal(formatParams(null), "");
  assert.equal(formatJson({ a: "xxxxxxxx" }, 8), '{"a":"x…');
  assert.equal(formatJson(undefined), "");
  assert.equal(firstLine("one\ntwo"), "one");
  assert.equal(firstLine(null), "");
});

test("times are told in their zone, and shorter the nearer they are", () => {
  const times = new Times("Europe/Berlin");
  const now = Date.parse("2026-11-23T23:30:00Z"); // 00:30 of the 24th in Berlin
  assert.equal(times.clock(now), "00:30:00");
  assert.equal(times.minute(now), "00:30");
  assert.equal(times.short(Date.parse("2026-11-24T01:30:00Z"), now), "02:30:00");
  assert.equal(times.short(Date.parse("2026-11-23T22:59:00Z"), now), "11-23 23:59");
  assert.equal(times.short(Date.parse("2027-01-01T00:00:00Z"), now), "2027-01-01");
  assert.equal(times.full(now), "Tue 2026-11-24 00:30:00 Europe/Berlin (GMT+1)");
});

test("a time with an offset becomes wall time of its zone, and wall time stays as it is", () => {
  assert.equal(localTime("2026-07-01T00:30:00Z", "Europe/Berlin"), "2026-07-01T02:30:00");
  assert.equal(localTime("2026-07-01T00:30:00+05:30", "Europe/Berlin"), "2026-06-30T21:00:00");
  assert.equal(localTime(1_782_865_800, "Europe/Berlin"), "2026-07-01T02:30:00");
  assert.equal(localTime("2026-07-01T02:30", "Europe/Berlin"), "2026-07-01T02:30");
});

test("no two states of an execution share a shape, so that colour is never needed", () => {
  const shapes = [...EXECUTION_STATUSES, "retrying"].map((name) => stateOf(name)[0]);
  assert.equal(new Set(shapes).size, shapes.length);
  assert.deepEqual(stateOf("unheard-of"), ["·", "dim", "unheard-of"]);
});

test("JSON to read takes one line if that is enough", () => {
  assert.equal(prettyJson({ seconds: 40, to: "a\nb" }), '{ "seconds": 40, "to": "a\\nb" }');
  assert.match(prettyJson({ text: "x".repeat(80) }), /^\{\n {2}"text"/);
});

test("the day of the week is that of the date as it is written, in every zone", () => {
  assert.equal(formatWeekday("2026-11-29 00:30:00+13:00"), "Sun");
  assert.equal(formatWeekday("2026-11-29 23:30:00-11:00"), "Sun");
});
