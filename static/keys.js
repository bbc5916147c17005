// The single-key shortcuts: one table for what they do and for what `?` shows. Pure.

/** `on`: the kind of row the key acts on; none means anywhere. */
export const KEYS = [
  ["1", "go-overview", "overview"],
  ["2", "go-schedules", "schedules"],
  ["3", "go-handlers", "handlers"],
  ["4", "go-executions", "executions"],
  ["5", "go-audit", "audit"],
  ["j", "row-down", "next row, also ↓ from a row"],
  ["k", "row-up", "previous row, also ↑"],
  ["Enter", "open-row", "open the row", "any"],
  ["u", "back", "up, back to the list"],
  ["]", "next-page", "next page"],
  ["[", "previous-page", "previous page"],
  ["/", "search", "search"],
  ["n", "new-schedule", "new schedule"],
  ["x", "select-row", "select the schedule", "schedule"],
  ["r", "run-schedule", "run the schedule", "schedule"],
  ["r", "run-method", "run the method", "method"],
  ["r", "run-again", "run the execution again", "execution"],
  ["s", "toggle-row", "pause or resume the schedule", "schedule"],
  ["e", "edit-schedule", "edit the schedule", "schedule"],
  ["d", "duplicate-schedule", "duplicate the schedule", "schedule"],
  ["Delete", "delete-schedule", "delete the schedule", "schedule"],
  ["y", "undo", "take the deletion back"],
  ["c", "cancel-execution", "cancel the execution", "execution"],
  ["p", "pause-live", "hold the page still, or let it go on"],
  ["t", "theme", "theme: as the system, light, dark"],
  ["h", "contrast", "contrast: as the system, more, less"],
  ["z", "zone", "time zone: server, browser, UTC"],
  [":", "palette", "command palette, also Ctrl+K"],
  ["?", "help", "this help"],
].map(([key, act, text, on]) => ({ key, act, text, on }));

export const actionFor = (key, row) =>
  KEYS.filter((entry) => entry.key === key).find(
    ({ on }) => !on || on === row || (row && on === "any"),
  );
