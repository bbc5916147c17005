import assert from "node:assert/strict";
import { test } from "node:test";

import { request } from "../../static/api.js";

test("a request given up while its answer comes is no answer", async (t) => {
  const controller = new AbortController();
  const headers = new Headers();
  const json = async () => {
    controller.abort();
    throw controller.signal.reason;
  };
  t.mock.method(globalThis, "fetch", async () => ({ ok: true, status: 200, headers, json }));
  const asked = request("GET", "/api/health", null, { signal: controller.signal });
  await assert.rejects(asked, { name: "AbortError" });
});
