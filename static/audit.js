// The audit: who changed what and from where, and who was refused.

import { renderRoute } from "./model.js";
import { cell, dim, pages, row, state, tableFrame, unseenHeading, when } from "./pieces.js";

export const title = () => "Audit";

export function resources({ route: { query } }) {
  const cursor = query.before ? `&cursor=${encodeURIComponent(query.before)}` : "";
  return { audit: { url: `/api/audit?limit=50${cursor}`, every: 5_000, refresh: 15_000 } };
}

export function render(ctx) {
  const resource = ctx.get("audit");
  const { entries = [], next_cursor: next } = resource?.data ?? {};
  const heads = [
    ["started", "when"],
    ["state-of", "answer"],
    ["name", "who"],
    ["address", "from"],
    ["call-of", "did"],
    ["outcome", "to"],
  ];
  const { route } = ctx;
  const older = (before) => renderRoute({ ...route, query: { before } });
  return [
    unseenHeading("Audit"),
    tableFrame(
      {
        title: "Audit",
        name: "audit",
        resource,
        nothing: "nothing was changed yet",
        table: { wide: true, busy: resource?.loading, heads },
      },
      entries.map((entry) => entryRow(ctx, entry)),
    ),
    pages(
      [route.query.before && older(null), "« newest", "page-previous"],
      [next != null && older(next), "older ›", "page-next"],
    ),
  ];
}

const entryRow = (ctx, { number, at, actor, address, action, target, status }) =>
  row(
    "audit",
    number,
    cell("started", when(at, ctx)),
    cell(
      "state-of",
      status == null ? state("success", "accepted") : state("error", `refused ${status}`),
    ),
    cell("name", actor || dim("nobody")),
    cell("address dim", address),
    cell("call-of", action.replaceAll("_", " ")),
    cell("outcome dim", target),
  );
