// Text for people. Pure: times and zones are passed in.

const SECOND = 1000;
const MINUTE = 60 * SECOND;
const HOUR = 60 * MINUTE;
const DAY = 24 * HOUR;
const WEEKDAYS = new Intl.DateTimeFormat("en-GB", { weekday: "short", timeZone: "UTC" });
const COUNT = new Intl.NumberFormat("en-US");
const MAX_CELL = 2_000; // characters
const MAX_JSON = 20_000;
const MAX_LINE = 48;
const MAX_KNOWN = 5_000;

const pad = (number) => String(Math.floor(number)).padStart(2, "0");

/** Milliseconds as a length of time with two units at most: "12 ms", "3.2 s", "4 min 05 s". */
export function formatDuration(ms) {
  if (ms == null) return "–";
  if (ms < 1) return "<1 ms";
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < MINUTE) return `${(ms / SECOND).toFixed(ms < 9_950 ? 2 : 1)} s`;
  if (ms < HOUR) return `${Math.floor(ms / MINUTE)} min ${pad((ms % MINUTE) / SECOND)} s`;
  if (ms < DAY) return `${Math.floor(ms / HOUR)} h ${pad((ms % HOUR) / MINUTE)} min`;
  return `${Math.floor(ms / DAY)} d ${Math.floor((ms % DAY) / HOUR)} h`;
}

const UNITS = [[DAY, "d"], [HOUR, "h"], [MINUTE, "min"], [SECOND, "s"]];

/** Milliseconds from now as "in 12 s", "4 min ago" or "now": one unit, rounded towards now. */
export function formatRelative(ms) {
  const away = Math.abs(ms);
  if (away < SECOND) return "now";
  const [size, unit] = UNITS.find(([least]) => away >= least);
  const text = `${formatCount(Math.floor(away / size))} ${unit}`;
  return ms > 0 ? `in ${text}` : `${text} ago`;
}

/** 12,345 */
export const formatCount = (n) => (n == null ? "–" : COUNT.format(Math.round(n)));

/** A share in 0..1 as "97.8 %"; never rounds an imperfect share up to 100. */
export function formatPercent(share) {
  if (share == null) return "–";
  if (share === 1 || share === 0) return `${share * 100} %`;
  return `${Math.min(99.9, Math.max(0.1, share * 100)).toFixed(1)} %`;
}

export function formatBytes(bytes) {
  if (bytes == null) return "–";
  const power = bytes < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(bytes) / 10));
  const value = bytes / 1024 ** power;
  return `${value.toFixed(power && value < 99.95 ? 1 : 0)} ${["B", "KB", "MB", "GB", "TB"][power]}`;
}

/** "1 schedule", "2 schedules" */
export const formatPlural = (n, noun) => `${formatCount(n)} ${noun}${n === 1 ? "" : "s"}`;

const texts = new WeakMap(); // rendering again each second must not encode a megabyte again

/** JSON on one line, cut to `limit` characters. */
export function formatJson(value, limit = 120) {
  const isObject = typeof value === "object" && value !== null;
  const known = isObject && texts.get(value);
  const text = known || cut(value === undefined ? "" : JSON.stringify(value), MAX_CELL);
  if (isObject) texts.set(value, text);
  return cut(text, limit);
}

/** JSON to read, on one line if that is enough, cut where it gets too long. */
export function prettyJson(value) {
  const lines = JSON.stringify(value, null, 2);
  const line = lines.length < MAX_LINE && lines.replace(/\n */g, " ");
  const text = line || lines;
  const more = text.length - MAX_JSON;
  return more > 0 ? `${text.slice(0, MAX_JSON)}\n… ${formatCount(more)} more characters` : text;
}

/** job_params as `a=1 b="x"`; empty text for none. */
export function formatParams(params, limit) {
  const parts = Object.entries(params ?? {}).map(([name, to]) => `${name}=${formatJson(to, 40)}`);
  return cut(parts.join(" "), limit);
}

const cut = (text, limit = 80) => (text.length > limit ? `${text.slice(0, limit - 1)}…` : text);

/** The first line of an error or result, short enough for a table cell. */
export const firstLine = (text, limit = 160) => cut(String(text ?? "").split("\n", 1)[0], limit);

const TWO = "2-digit";

/** Text for times in one zone. Intl is slow, so what was told once is remembered. */
export class Times {
  #known = new Map();

  constructor(zone) {
    this.zone = zone;
    this.format = new Intl.DateTimeFormat("en-GB", {
      timeZone: zone, hourCycle: "h23", weekday: "short", year: "numeric", month: TWO, day: TWO,
      hour: TWO, minute: TWO, second: TWO, timeZoneName: "shortOffset",
    });
  }

  #split(ms) {
    const second = Math.floor(ms / SECOND);
    if (this.#known.size >= MAX_KNOWN) this.#known.clear();
    if (!this.#known.has(second)) {
      const parts = this.format.formatToParts(ms).map(({ type, value }) => [type, value]);
      this.#known.set(second, Object.fromEntries(parts));
    }
    return this.#known.get(second);
  }

  /** 16:02:11 */
  clock(ms) {
    const { hour, minute, second } = this.#split(ms);
    return `${hour}:${minute}:${second}`;
  }

  /** 16:02 */
  minute = (ms) => this.clock(ms).slice(0, 5);

  /** Today "16:02:11", else "11-24 02:30", in another year "2027-01-01". */
  short(ms, now) {
    const [at, today] = [this.#split(ms), this.#split(now)];
    if (at.year !== today.year) return `${at.year}-${at.month}-${at.day}`;
    if (at.month === today.month && at.day === today.day) return this.clock(ms);
    return `${at.month}-${at.day} ${this.minute(ms)}`;
  }

  /** Tue 2026-11-24 02:30:00 Europe/Berlin (GMT+1) */
  full(ms) {
    const { weekday, year, month, day, timeZoneName } = this.#split(ms);
    return `${weekday} ${year}-${month}-${day} ${this.clock(ms)} ${this.zone} (${timeZoneName})`;
  }
}

/** The day of the week of a time that begins with its date. */
export const formatWeekday = (time) => WEEKDAYS.format(new Date(time.slice(0, 10)));

/** A time with an offset, or in Unix seconds, as wall time of a zone: 2026-11-24T02:30:00. Wall
 *  time stays as it is. */
export function localTime(time, zone) {
  if (typeof time === "string" && !/(Z|[+-]\d\d:?\d\d)$/.test(time)) return time;
  const at = new Date(typeof time === "number" ? time * SECOND : time);
  return at.toLocaleString("sv-SE", { timeZone: zone }).replace(" ", "T");
}

/** Of each state: name, shape, tone and, if they differ, words; those of executions come first. */
const STATES = `
  queued ○ dim
  running ► blue
  success ✓ green
  error ✗ red
  timeout ◔ red
  cancelled ⊘ dim
  missed ◇ yellow
  skipped » dim
  lost ? violet
  retrying ↻ yellow
  late « dim
  active ● green
  paused ‖ yellow
  finished ■ dim
  quarantined ! red broken
  Connected ● green connected
  Draining ◐ yellow draining
  Disconnected ○ red disconnected
  ok ● green
  degraded ▲ yellow
  failed ✗ red
  connecting ◌ dim
  live ● green
  polling ◍ blue
  disconnected ○ red
  asleep ◌ dim
`;
const known = new Map();
for (const line of STATES.trim().split("\n")) {
  const [name, mark, tone, words = name] = line.trim().split(" ");
  known.set(name, [mark, tone, words]);
}

/** [shape, tone, words] */
export const stateOf = (name) => known.get(name) ?? ["·", "dim", String(name)];

export const EXECUTION_STATUSES = [...known.keys()].slice(0, 9);
export const FAILED = "error,timeout,lost";
