import assert from "node:assert/strict";
import { test } from "node:test";

import { KEYS, actionFor } from "../../static/keys.js";
import { createSettings } from "../../static/settings.js";

test("no key means two things in one place", () => {
  const places = KEYS.map(({ key, on }) => `${key} ${on}`);
  assert.equal(new Set(places).size, places.length);
  for (const { key } of KEYS.filter(({ on }) => !on))
    assert.equal(KEYS.filter((other) => other.key === key).length, 1);
});

test("a key for rows does nothing outside them, nor on rows of another kind", () => {
  assert.equal(actionFor("e", null), undefined);
  assert.equal(actionFor("e", "execution"), undefined);
  assert.equal(actionFor("e", "schedule").act, "edit-schedule");
  assert.equal(actionFor("r", "method").act, "run-method");
  assert.equal(actionFor("r", "execution").act, "run-again");
  assert.equal(actionFor("2", null).act, "go-schedules");
  assert.equal(actionFor("F7", null), undefined);
});

test("settings fall back to their first choice and survive forbidden storage", () => {
  const forbidden = {
    getItem() {
      throw new Error("denied");
    },
    setItem() {
      throw new Error("denied");
    },
  };
  const settings = createSettings(forbidden);
  assert.equal(settings.get("theme"), "auto");
  assert.equal(settings.next("theme"), "light");
  assert.equal(settings.get("theme"), "light");
  const odd = createSettings({ getItem: () => "purple", setItem() {} });
  assert.equal(odd.get("theme"), "auto");
});
