// The single-key shortcuts: one table for what they do and for what `?` shows. Pure.

/** `on`: the kind of row the key acts on; none means anywhere. */
export const KEYS = [
  { key: "1", act: "go-overview", text: "overview" },
  { key: "2", act: "go-schedules", text: "schedules" },
  { key: "3", act: "go-handlers", text: "handlers" },
  { key: "4", act: "go-executions", text: "executions" },
  { key: "5", act: "go-audit", text: "audit" },
  { key: "j", act: "row-down", text: "next row, also ↓ from a row" },
  { key: "k", act: "row-up", text: "previous row, also ↑" },
  { key: "Enter", act: "open-row", text: "open the row", on: "any" },
  { key: "u", act: "back", text: "up, back to the list" },
  { key: "]", act: "next-page", text: "next page" },
  { key: "[", act: "previous-page", text: "previous page" },
  { key: "/", act: "search", text: "search" },
  { key: "n", act: "new-schedule", text: "new schedule" },
  { key: "x", act: "select-row", text: "select the schedule", on: "schedule" },
  {
    key: "r",
    act: "run-row",
    text: "run the schedule, the method or the execution again",
    on: "any",
  },
  { key: "s", act: "toggle-row", text: "pause or resume the schedule", on: "schedule" },
  { key: "e", act: "edit-schedule", text: "edit the schedule", on: "schedule" },
  { key: "d", act: "duplicate-schedule", text: "duplicate the schedule", on: "schedule" },
  { key: "Delete", act: "delete-schedule", text: "delete the schedule", on: "schedule" },
  { key: "c", act: "cancel-execution", text: "cancel the execution", on: "execution" },
  { key: "p", act: "pause-live", text: "hold the page still, or let it go on" },
  { key: "t", act: "theme", text: "theme: as the system, light, dark" },
  { key: "h", act: "contrast", text: "contrast: as the system, more, less" },
  { key: "z", act: "zone", text: "time zone: server, browser, UTC" },
  { key: ":", act: "palette", text: "command palette, also Ctrl+K" },
  { key: "?", act: "help", text: "this help" },
];

/** The entry for a key press on a row of kind `row` (null outside rows), or null. */
export const actionFor = (key, row) =>
  KEYS.find(
    (entry) =>
      entry.key === key && (!entry.on || (row && (entry.on === "any" || entry.on === row))),
  ) ?? null;
