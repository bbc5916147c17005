// The audit: who changed what and from where, and who was refused.

import { renderQuery } from "./model.js";
import { agePages, dim, state, tableFrame, when } from "./pieces.js";

export function resources({ route: { query } }) {
  const url = `/api/audit${renderQuery({ limit: 50, cursor: query.before })}`;
  return { audit: { url, every: 5_000, refresh: 15_000 } };
}

function answer(status) {
  if (status == null) return state("success", "accepted");
  return state("error", `${status < 500 ? "refused" : "failed"} ${status}`);
}

export function renderList(page) {
  const resource = page.get("audit");
  const { entries, next_cursor: next } = resource?.data ?? {};
  const about = {
    title: "Audit",
    name: "audit",
    resource,
    nothing: "nothing was changed yet",
    kind: "audit",
    idOf: ({ number }) => number,
  };
  const columns = [
    ["started", "when", ({ at }) => when(at, page)],
    ["state-of", "answer", ({ status }) => answer(status)],
    ["name", "who", ({ actor }) => actor || dim("nobody")],
    ["address dim", "from", ({ address }) => address],
    ["call-of", "did", ({ action }) => action.replaceAll("_", " ")],
    ["outcome dim", "to", ({ target }) => target],
  ];
  return [
    tableFrame(about, columns, entries),
    agePages(page.route, next),
  ];
}
