import assert from "node:assert/strict";
import { test } from "node:test";

import {
  backoff,
  bestMatches,
  executionsFilter,
  fillMinutes,
  isShown,
  joinLog,
  lastFailures,
  logPosition,
  matchScore,
  methodsOf,
  newest,
  nextLink,
  nextOffset,
  parseEvents,
  parseRoute,
  readLog,
  renderRoute,
  schedulesUrl,
  signature,
  stateOfExecution,
  stateOfSchedule,
  upsertExecution,
  waitsFor,
} from "../../static/model.js";

const MINUTE = 60_000;
const NOON = Date.parse("2026-11-23T12:00:00Z");

test("every route survives the hash, whatever is in its id", () => {
  for (const route of [
    { view: "overview", id: null, query: {} },
    { view: "schedules", id: null, query: { search: "a&b=c #%", page: "3" } },
    { view: "schedules", id: "a/b?c#d%20 e", query: {} },
    { view: "executions", id: null, query: { status: "error,lost" } },
  ])
    assert.deepEqual(parseRoute(renderRoute(route)), route);
});

test("an unknown or broken hash is the overview, never an error", () => {
  for (const hash of ["", "#", "#/", "#/nonsense/x", "#nonsense"]) {
    assert.equal(parseRoute(hash).view, "overview");
    assert.equal(parseRoute(hash).id, null);
  }
  assert.equal(parseRoute("#/schedules/%E0%A4%A").id, "%E0%A4%A");
});

test("addresses of lists carry filter, sort and page", () => {
  assert.equal(schedulesUrl({}), "/api/schedules?sort=next_fire_time&limit=50");
  assert.equal(
    schedulesUrl({ search: "a b", handler: "h", state: "paused", sort: "name", page: "3" }),
    "/api/schedules?search=a+b&handler_id=h&paused=true&sort=name&limit=50&offset=100",
  );
  assert.equal(schedulesUrl({ page: "-7" }), schedulesUrl({ page: "x" }));
  assert.equal(
    newest(executionsFilter({ status: "error", span: "1h" }, NOON + 59_999), 50).url,
    "/api/executions?status=error&since=2026-11-23T11%3A00%3A00.000Z&limit=50",
  );
});

test("an older page of executions changes what it holds and takes nothing new in", () => {
  const [known, fresh] = ["a", "b"].map((execution_id) => ({ execution_id, status: "error" }));
  const { url, on } = newest({}, 50, { before: "c" });
  assert.equal(url, "/api/executions?limit=50&cursor=c");
  const data = { records: [{ execution_id: "a", status: "running" }] };
  assert.deepEqual(on.execution(data, fresh), data);
  assert.deepEqual(on.execution(data, known).records, [known]);
  assert.deepEqual(newest({}, 50).on.execution(data, fresh).records, [fresh, ...data.records]);
});

test("a queued execution says what it waits for", () => {
  const handlers = [{ id: "h", status: "Connected" }, { id: "gone", status: "Disconnected" }];
  const waits = (handler_id, due) =>
    waitsFor({ handler_id, due_at: new Date(due).toISOString() }, { handlers, now: NOON });
  assert.match(waits("h", NOON + 1), /next attempt/);
  assert.match(waits("h", NOON), /its turn/);
  for (const id of ["gone", "unknown"]) assert.match(waits(id, NOON), /its handler/);
});

test("a schedule's last fire has failed if no fire came after its newest failure", () => {
  const failure = (schedule_id, minute) => ({ schedule_id, scheduled_at: `2026-11-23T12:0${minute}Z` });
  const records = [failure("a", 3), failure("b", 2), failure("a", 1)];
  const last = (id, minute) => ({ id, last_fire_time: minute && `2026-11-23T12:0${minute}Z` });
  const found = lastFailures([last("a", 3), last("b", 4), last("never", null)], records);
  assert.deepEqual([...found], [["a", records[0]]]);
  assert.equal(lastFailures([last("a", 3)]).size, 0);
});

test("states say what is behind a row: retrying, broken, finished", () => {
  assert.equal(stateOfExecution({ status: "queued", attempt_number: 0 }), "queued");
  assert.equal(stateOfExecution({ status: "queued", attempt_number: 1 }), "retrying");
  assert.equal(stateOfSchedule({ quarantined: "no such zone", paused: true }), "quarantined");
  assert.equal(stateOfSchedule({ paused: true, next_fire_time: null }), "paused");
  assert.equal(stateOfSchedule({ paused: false, next_fire_time: null }), "finished");
  assert.equal(
    stateOfSchedule({ paused: false, next_fire_time: "2026-11-23T12:00:00Z" }),
    "active",
  );
});

test("an execution event changes its row in place, comes in front if new, and leaves if filtered out", () => {
  const rows = ["b", "a"].map((execution_id) => ({ execution_id, status: "running" }));
  const ended = { execution_id: "a", status: "success" };
  assert.deepEqual(
    upsertExecution(rows, ended, true).map((row) => row.status),
    ["running", "success"],
  );
  assert.deepEqual(
    upsertExecution(rows, { execution_id: "c" }, true).map((row) => row.execution_id),
    ["c", "b", "a"],
  );
  assert.deepEqual(
    upsertExecution(rows, ended, false).map((row) => row.execution_id),
    ["b"],
  );
  assert.equal(upsertExecution(rows, { execution_id: "c" }, false), rows);
  assert.equal(upsertExecution(rows, { execution_id: "c" }, true, 2).length, 2);
});

test("the filter of the history is applied to events as the server applies it to lists", () => {
  const execution = { status: "error", handler_id: "h", schedule_id: "s" };
  assert.ok(isShown({}, execution));
  assert.ok(isShown({ status: "lost,error", handler_id: "h", schedule_id: "s" }, execution));
  for (const query of [{ status: "lost" }, { handler_id: "x" }, { schedule_id: "x" }])
    assert.ok(!isShown(query, execution));
});

test("a stored log and live lines join without a line twice or missing", () => {
  const line = (text) => [0, "stdout", text];
  const texts = (lines) => lines.map(([, , text]) => text).join("");
  const cases = [
    ["", "", ""],
    ["abc", "", "abc"],
    ["", "abc", "abc"],
    ["abc", "bcd", "abcd"],
    ["abc", "abc", "abc"],
    ["abc", "def", "abcdef"],
    ["aab", "abab", "aabab"],
    ["abc", "c", "abc"],
  ];
  for (const [stored, live, joined] of cases) {
    assert.equal(
      texts(joinLog([...stored].map(line), [...live].map(line))),
      joined,
      `${stored} + ${live}`,
    );
  }
});

test("a stored log is read as lines with time and level, and what is no such line as text", () => {
  assert.deepEqual(readLog("2026-11-23T12:00:00.500000Z INFO a  b\n… 3 lines left out …\n"), [
    [NOON / 1000 + 0.5, "INFO", "a  b"],
    [null, null, "… 3 lines left out …"],
  ]);
  assert.deepEqual(readLog(""), []);
  assert.deepEqual(readLog(null), []);
});

test("minutes without executions are zeros, and those that did not run are not failures", () => {
  const minutes = fillMinutes(
    [{ minute: "2026-11-23T11:59:00Z", total: 9, success: 5, failed: 1 }],
    NOON,
    3,
  );
  assert.deepEqual(
    minutes.map(({ at, ...counts }) => counts),
    [
      { success: 0, failed: 0, other: 0 },
      { success: 5, failed: 1, other: 3 },
      { success: 0, failed: 0, other: 0 },
    ],
  );
  assert.equal(minutes[2].at, NOON);
});

test("durations lie on a logarithmic axis and never outside it", () => {
  assert.equal(logPosition(10, 1, 100), 0.5);
  assert.equal(logPosition(0, 1, 100), 0);
  assert.equal(logPosition(1e9, 1, 100), 1);
});

test("a method is written as it is called", () => {
  const parameters = [
    { name: "n", required: true },
    { name: "v", default: 3 },
  ];
  assert.equal(signature({ name: "chime", parameters }), "chime(n, v=3)");
  assert.deepEqual(methodsOf(undefined), []);
});

test("the link says since when it is down, and a late answer does not claim it is live", () => {
  const told = (...happened) =>
    happened.reduce((link, what, i) => nextLink(link, what, i + 1), {
      state: "connecting",
      since: 0,
    });
  assert.deepEqual(told("opened"), { state: "live", since: 1 });
  assert.equal(told("opened", "lost").state, "connecting");
  assert.deepEqual(told("opened", "lost", "unreachable", "unreachable"), {
    state: "disconnected",
    since: 3,
  });
  assert.equal(told("unreachable", "unsupported").state, "polling");
  assert.equal(told("unsupported").state, "polling");
  assert.equal(told("unsupported", "unreachable").state, "disconnected");
  assert.equal(told("opened", "unreachable").state, "live");
  assert.equal(told("opened", "slept", "woke").state, "connecting");
});

test("waits grow to fifteen seconds and are spread", () => {
  assert.equal(backoff(1, 0.5), 500);
  assert.equal(backoff(3, 0.5), 2_000);
  assert.equal(backoff(60, 0.5), 15_000);
  assert.ok(backoff(1, 0) < backoff(1, 0.99));
});

test("the server's whole seconds do not make the clock jitter, but a real difference counts", () => {
  assert.equal(nextOffset(0, 999_000, 1_000_000), 0);
  assert.equal(nextOffset(0, 1_060_000, 1_000_000), 60_500);
});

const STREAM =
  'retry: 1000\n\n: hello\n\nid: a-1\nevent: log\ndata: {"x":\ndata: 1}\n\nid: a-2\r\nevent: health\r\ndata:{}\r\n\r\n';
const EVENTS = [
  { name: "log", id: "a-1", data: '{"x":\n1}' },
  { name: "health", id: "a-2", data: "{}" },
];

test("events are read whole, byte by byte, and with trailing bytes", () => {
  assert.deepEqual(parseEvents(STREAM), { events: EVENTS, rest: "" });
  assert.deepEqual(parseEvents(`${STREAM}id: a-3\nda`).rest, "id: a-3\nda");
  const seen = [];
  let rest = "";
  for (const byte of STREAM) {
    const read = parseEvents(rest + byte);
    seen.push(...read.events);
    rest = read.rest;
  }
  assert.deepEqual(seen, EVENTS);
});

test("the palette finds by parts of words, starts first", () => {
  const items = ["pause nightly", "run backup.push", "backup"].map((text) => ({ text }));
  assert.deepEqual(
    bestMatches("backup", items).map(({ text }) => text),
    ["backup", "run backup.push"],
  );
  assert.deepEqual(
    bestMatches("push run", items).map(({ text }) => text),
    ["run backup.push"],
  );
  assert.equal(bestMatches("", items).length, 3);
  assert.equal(matchScore("zzz", "abc"), 0);
});
