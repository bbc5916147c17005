"""The page on a real server with real handlers: what a user does all day."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from appliance import Appliance
    from playwright.sync_api import Locator, Page

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

Open = Callable[..., "Page"]


def url_of(real: Appliance, hash_: str = "") -> str:
    return f"http://127.0.0.1:{real.http_port}/{hash_}"


def make_schedule(real: Appliance, schedule_id: str, **more: object) -> None:
    wanted = {
        "schedule_id": schedule_id, "handler_id": "ding-dong", "method_name": "chime",
        "trigger_config": {"type": "cron", "expression": "30 2 * * *"}, **more,
    }  # fmt: skip
    assert real.post("/api/schedule", wanted).status == 201


def row(page: Page, text: str) -> Locator:
    return page.locator("tbody tr", has_text=text)


def test_a_schedule_is_made_in_the_form_and_runs(real: Appliance, open_page: Open) -> None:
    page = open_page(url_of(real, "#/schedules"))
    page.get_by_role("button", name="new schedule").click()
    form = page.get_by_role("dialog", name="New schedule")
    form.get_by_label("Handler").select_option("ding-dong")
    form.get_by_label("Method").select_option("countdown")
    form.get_by_label(re.compile("^seconds"), exact=False).first.fill("1")
    form.get_by_label("Id", exact=True).fill("morning")
    form.get_by_label("crontab").check(force=True)
    form.get_by_label("minute hour day month weekday").fill("30 2 * * *")
    expect(form.get_by_text("every day at 02:30 Europe/Berlin")).to_be_visible()
    expect(form.locator(".fire-list li")).to_have_count(6)
    form.get_by_role("button", name="create").click()
    expect(page.get_by_role("heading", name="morning")).to_be_visible()
    made = real.get("/api/schedules/morning").json()
    assert made["job_params"] == {"seconds": 1}
    assert made["trigger_config"]["expression"] == "30 2 * * *"
    page.get_by_role("button", name="run now").click()
    expect(page.locator("table.history tbody tr")).to_have_count(1)
    expect(page.locator("table.history tbody tr")).to_contain_text("success", timeout=15_000)


def test_the_form_shows_what_the_server_refuses_at_its_field(
    real: Appliance, open_page: Open
) -> None:
    make_schedule(real, "taken")
    page = open_page(url_of(real))
    page.keyboard.press("n")
    form = page.get_by_role("dialog", name="New schedule")
    form.get_by_label("Handler").select_option("ding-dong")
    form.get_by_label("Method").select_option("chime")
    form.get_by_label("cron fields").check(force=True)
    hour = form.get_by_label("hour", exact=True)
    hour.fill("25")
    expect(hour).to_have_accessible_description(re.compile("not between 0 and 23"))
    hour.fill("5")
    zone = form.get_by_label("Time zone")
    zone.fill("Europe/Berln")
    expect(zone).to_have_accessible_description(re.compile("Europe/Berlin"))
    zone.fill("Europe/Berlin")
    form.get_by_label("Id", exact=True).fill("taken")
    form.get_by_role("button", name="create").click()
    expect(form.get_by_label("Id", exact=True)).to_be_focused()
    expect(form.get_by_label("Id", exact=True)).to_have_attribute("aria-invalid", "true")


@pytest.mark.parametrize(
    ("kind", "fields", "config"),
    [
        ("interval", {"hours": "2"}, {"type": "interval", "minutes": 5, "hours": 2}),
        ("calendar", {"months": "1", "hour": "2"},
         {"type": "calendar_interval", "months": 1, "hour": 2}),
        ("once", {"at": "2087-01-01T00:00"},
         {"type": "date", "run_date": "2087-01-01T00:00"}),
        ("cron fields", {"weekday": "mon-fri", "hour": "9"},
         {"type": "cron", "day_of_week": "mon-fri", "hour": "9"}),
    ],
)  # fmt: skip
def test_every_kind_of_trigger_can_be_made(
    real: Appliance, open_page: Open, kind: str, fields: dict[str, str], config: dict[str, object]
) -> None:
    page = open_page(url_of(real, "#/handlers/ding-dong"))
    page.get_by_role("button", name="schedule", exact=True).first.click()
    form = page.get_by_role("dialog", name="New schedule")
    form.get_by_label("Id", exact=True).fill("made")
    form.get_by_role("radio", name=kind, exact=True).check(force=True)
    for label, text in fields.items():
        form.get_by_label(label, exact=True).fill(text)
    form.get_by_role("button", name="create").click()
    expect(page.get_by_role("heading", name="made")).to_be_visible()
    made = real.get("/api/schedules/made").json()["trigger_config"]
    assert made == {**config, "timezone": "Europe/Berlin"}


def test_editing_sends_only_what_was_changed(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "nightly", job_params={"style": "ship"}, timeout=10)
    before = real.get("/api/schedules/nightly").json()
    page = open_page(url_of(real, "#/schedules/nightly"))
    page.get_by_role("button", name="edit").click()
    form = page.get_by_role("dialog", name="Edit nightly")
    expect(form.get_by_label(re.compile("^style"))).to_have_value("ship")
    form.get_by_label("Name").fill("Every night")
    form.get_by_label("minute hour day month weekday").fill("0 3 * * *")
    form.get_by_role("button", name="save").click()
    expect(page.get_by_role("heading", name="Every night")).to_be_visible()
    expect(page.get_by_text("every day at 03:00").first).to_be_visible()
    after = real.get("/api/schedules/nightly").json()
    kept = ("job_params", "timeout", "overlap", "coalesce", "retry", "handler_id", "paused")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_a_schedule_is_paused_resumed_copied_and_deleted(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "nightly")
    page = open_page(url_of(real, "#/schedules"))
    row(page, "nightly").get_by_role("button", name="pause").click()
    expect(row(page, "nightly")).to_contain_text("paused")
    assert real.get("/api/schedules/nightly").json()["paused"] is True
    row(page, "nightly").get_by_role("button", name="resume").click()
    expect(row(page, "nightly")).to_contain_text("active")
    row(page, "nightly").get_by_role("link", name="nightly").click()
    page.get_by_role("button", name="duplicate").click()
    form = page.get_by_role("dialog", name="Copy of nightly")
    form.get_by_label("Id", exact=True).fill("nightly-2")
    form.get_by_role("button", name="create").click()
    expect(page.get_by_role("heading", name="nightly-2")).to_be_visible()
    page.get_by_role("button", name="delete").click()
    expect(row(page, "nightly")).to_have_count(1)
    assert real.get("/api/schedules/nightly-2").status == 404
    assert real.get("/api/schedules/nightly").status == 200


def test_a_deletion_can_be_taken_back_with_all_that_the_schedule_was(
    real: Appliance, open_page: Open
) -> None:
    make_schedule(
        real, "nightly", name="Every night", job_params={"style": "ship"}, paused=True, timeout=9,
        retry={"max_attempts": 2}, overlap="queue", coalesce="none", misfire_grace_time=60,
    )  # fmt: skip
    before = real.get("/api/schedules/nightly").json()
    page = open_page(url_of(real, "#/schedules/nightly"))
    page.get_by_role("button", name="delete").click()
    expect(page.get_by_role("status")).to_contain_text("Deleted nightly.")
    assert real.get("/api/schedules/nightly").status == 404
    page.get_by_role("button", name="Undo").click()
    expect(row(page, "Every night")).to_be_visible()
    expect(page.get_by_role("status")).to_contain_text("nightly is back")
    after = real.get("/api/schedules/nightly").json()
    made_anew = ("created_at", "updated_at", "generation")
    assert {**after, **{name: before[name] for name in made_anew}} == before


def test_an_emptied_retry_field_goes_back_to_the_default(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "nightly", retry={"max_attempts": 9, "factor": 7})
    page = open_page(url_of(real, "#/schedules/nightly"))
    page.get_by_role("button", name="edit").click()
    form = page.get_by_role("dialog", name="Edit nightly")
    expect(form.get_by_label("attempts")).to_have_value("9")
    form.get_by_label("attempts").fill("")
    form.get_by_role("button", name="save").click()
    expect(form).to_have_count(0)
    retry = real.get("/api/schedules/nightly").json()["retry"]
    assert (retry["max_attempts"], retry["factor"]) == (3, 7)


def test_a_handler_that_is_not_there_is_told_at_its_field(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "nightly")
    page = open_page(url_of(real, "#/schedules/nightly"))
    page.get_by_role("button", name="duplicate").click()
    form = page.get_by_role("dialog", name="Copy of nightly")
    handler = form.get_by_label("Handler")
    handler.evaluate(
        "node => { node.add(new Option('gone', 'gone')); node.value = 'gone'; "
        "node.dispatchEvent(new Event('input', { bubbles: true })) }"
    )
    method = form.get_by_label("Method")
    method.evaluate(
        "node => { node.add(new Option('x', 'x')); node.value = 'x'; "
        "node.dispatchEvent(new Event('input', { bubbles: true })) }"
    )
    form.get_by_role("button", name="create").click()
    expect(handler).to_be_focused()
    expect(handler).to_have_accessible_description(re.compile("no handler 'gone'"))


def test_all_that_match_are_paused_and_not_only_those_on_the_page(
    real: Appliance, open_page: Open
) -> None:
    for number in range(55):
        make_schedule(real, f"many-{number:02}")
    make_schedule(real, "other")
    page = open_page(url_of(real, "#/schedules?search=many&sort=schedule_id"))
    page.get_by_label("Select this page").check()
    page.get_by_role("button", name="select all 55 that match").click()
    expect(page.get_by_text("all 55 selected")).to_be_visible()
    page.locator(".bulk").get_by_role("button", name="pause").click()
    expect(page.get_by_role("status")).to_contain_text("55 schedules paused.")
    expect(row(page, "many-00")).to_contain_text("paused")
    shown = real.get("/api/schedules?paused=false").json()["schedules"]
    assert [one["id"] for one in shown] == ["other"]


def test_the_head_of_a_column_turns_its_order_round(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "alpha")
    make_schedule(real, "beta")
    page = open_page(url_of(real, "#/schedules"))
    head = page.get_by_role("columnheader", name="schedule")
    head.get_by_role("link").click()
    expect(page.locator("tbody tr").first).to_contain_text("alpha")
    expect(head).to_have_attribute("aria-sort", "ascending")
    head.get_by_role("link").click()
    expect(page.locator("tbody tr").first).to_contain_text("beta")
    expect(head).to_have_attribute("aria-sort", "descending")
    expect(page).to_have_url(re.compile("sort=-schedule_id"))
    expect(page.get_by_label("Sort")).to_have_value("-schedule_id")


def test_the_coming_fires_of_an_interval_go_on_from_the_next(
    real: Appliance, open_page: Open
) -> None:
    make_schedule(real, "often", trigger_config={"type": "interval", "minutes": 7})
    real.post("/api/schedules/often/run", {})
    due = real.get("/api/schedules/often").json()["next_fire_time"]
    page = open_page(url_of(real, "#/schedules/often"))
    expect(page.locator(".fire-list time")).to_have_count(8)
    expect(page.locator(".fire-list time").first).to_have_attribute("datetime", due)


def test_the_strip_counts_the_fires_of_all_schedules(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "often", trigger_config={"type": "cron", "minute": "*"})
    make_schedule(real, "resting", trigger_config={"type": "cron", "minute": "*"}, paused=True)
    page = open_page(url_of(real))
    strip = page.get_by_role("img", name=re.compile(r"1,4[234]\d fires in the coming 24 hours"))
    expect(strip).to_be_visible()
    expect(strip.locator("title").nth(5)).to_have_text(re.compile("15 fires: often"))


def test_a_method_is_run_and_its_log_seen_while_it_runs(real: Appliance, open_page: Open) -> None:
    page = open_page(url_of(real, "#/handlers/ding-dong"))
    page.locator("li", has_text="countdown").get_by_role("button", name="run").click()
    dialog = page.get_by_role("dialog", name="Run ding-dong.countdown")
    dialog.get_by_label(re.compile("^seconds")).fill("4")
    dialog.get_by_role("button", name="run", exact=True).click()
    expect(page.get_by_role("heading", name="ding-dong.countdown")).to_be_visible()
    log = page.get_by_role("log", name="Log")
    expect(log.locator("div")).to_have_count(2)
    expect(page.get_by_role("progressbar").first).to_be_visible()
    expect(page.locator(".heading")).to_contain_text("running")
    expect(page.locator(".heading")).to_contain_text("success", timeout=15_000)
    expect(log.locator("div")).to_have_count(5)
    expect(log.locator("div").last).to_contain_text("ding dong")
    expect(page.get_by_text('"counted": 4')).to_be_visible()


def test_a_running_execution_is_cancelled_and_run_again(real: Appliance, open_page: Open) -> None:
    call = {"handler_id": "ding-dong", "method_name": "countdown", "job_params": {"seconds": 60}}
    first = real.post("/api/run_now", {**call, "wait": False}).json()["execution_id"]
    real.wait_execution(first, "running")
    page = open_page(url_of(real, f"#/executions/{first}"))
    page.get_by_role("button", name="cancel").click()
    expect(page.locator(".heading")).to_contain_text("cancelled")
    page.get_by_role("button", name="run again").click()
    expect(page).not_to_have_url(re.compile(first))
    expect(page.locator(".heading")).to_contain_text("running")
    again = page.url.rsplit("/", 1)[1]
    assert real.get(f"/api/executions/{again}").json()["job_params"] == {"seconds": 60}


def test_a_failure_is_shown_with_its_attempts(real: Appliance, open_page: Open) -> None:
    call = {"handler_id": "example", "method_name": "fail", "job_params": {"message": "no paper"}}
    retry = {"max_attempts": 2, "base_delay": 0.1}
    failed = real.post("/api/run_now", {**call, "retry": retry}).json()["execution_id"]
    page = open_page(url_of(real, "#/executions?status=error"))
    row(page, "no paper").get_by_role("link").first.click()
    expect(page).to_have_url(re.compile(failed))
    expect(page.locator("table.tries tbody tr")).to_have_count(2)
    page.get_by_text("traceback").first.click()
    expect(page.get_by_text("RuntimeError: no paper").first).to_be_visible()


def test_everything_can_be_done_by_keyboard_alone(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "alpha")
    make_schedule(real, "beta")
    page = open_page(url_of(real))
    expect(page.locator("#top")).to_contain_text("live")
    press = page.keyboard.press
    press("2")
    expect(row(page, "beta")).to_be_visible()
    press("j")
    press("j")
    expect(row(page, "beta")).to_be_focused()
    press("s")
    expect(row(page, "beta")).to_contain_text("paused")
    expect(row(page, "beta")).to_be_focused()
    press("k")
    press("Enter")
    expect(page.get_by_role("heading", name="alpha")).to_be_focused()
    expect(page.get_by_role("button", name="run now")).to_be_visible()
    press("r")
    expect(page.locator("table.history tbody tr")).to_contain_text("success")
    press("e")
    form = page.get_by_role("dialog", name="Edit alpha")
    expect(form).to_be_visible()
    press("Escape")
    expect(form).to_have_count(0)
    press("Delete")
    expect(row(page, "beta")).to_be_visible()
    expect(row(page, "alpha")).to_have_count(0)
    press("y")
    expect(row(page, "alpha")).to_be_visible()
    press("4")
    expect(row(page, "chime")).to_be_visible()
    press("j")
    press("Enter")
    expect(page.get_by_role("heading", name="ding-dong.chime")).to_be_visible()


def test_the_page_lives_through_a_restart_of_the_server(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "before")
    page = open_page(url_of(real, "#/schedules"))
    expect(page.locator("#top")).to_contain_text("live")
    real.kill()
    expect(page.locator("#top")).to_contain_text(re.compile(r"disconnected since \d\d:\d\d"))
    expect(row(page, "before")).to_be_visible()
    real.run("server")
    expect(page.locator("#top")).to_contain_text("live", timeout=20_000)
    make_schedule(real, "after")
    expect(row(page, "after")).to_be_visible(timeout=15_000)


def test_without_login_nothing_is_shown_and_a_role_sees_what_it_may_do(
    real: Appliance, open_page: Open
) -> None:
    make_schedule(real, "nightly")
    made = real.cli("token", "create", "night-shift", "--role", "operator")
    token = re.search(r"sz_\S+", made.stdout)
    assert token, made
    page = open_page(url_of(real, "#/schedules/nightly"))
    login = page.get_by_role("dialog", name="Log in")
    login.get_by_label("Token").fill("sz_wrong")
    page.keyboard.press("Enter")
    expect(login.get_by_label("Token")).to_have_accessible_description(re.compile("not valid"))
    assert page.locator("main").get_by_text("30 2").count() == 0
    login.get_by_label("Token").fill(token[0])
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="run now")).to_be_visible()
    expect(page.get_by_role("button", name="delete")).to_be_hidden()
    expect(page.get_by_role("link", name="Audit")).to_be_hidden()
    expect(page.locator("#top")).to_contain_text("live")
    page.get_by_role("button", name="log out").click()
    expect(login).to_be_visible()


def test_the_audit_tells_who_did_what(real: Appliance, open_page: Open) -> None:
    make_schedule(real, "nightly")
    page = open_page(url_of(real, "#/audit"))
    expect(row(page, "create schedule")).to_contain_text("127.0.0.1")


def test_a_handler_that_leaves_is_seen_at_once(real: Appliance, open_page: Open) -> None:
    page = open_page(url_of(real, "#/handlers"))
    expect(row(page, "example")).to_contain_text("●connected")
    real.handlers[1].terminate()
    expect(row(page, "example")).to_contain_text("○disconnected")


def test_a_handler_that_is_gone_for_good_can_be_forgotten(real: Appliance, open_page: Open) -> None:
    page = open_page(url_of(real, "#/handlers/example"))
    expect(page.get_by_role("heading", name="example")).to_be_visible()
    forget = page.get_by_role("button", name="forget")
    expect(forget).to_have_count(0)
    real.handlers[1].terminate()
    forget.click()
    expect(page.get_by_role("status")).to_contain_text("Handler example is forgotten.")
    expect(row(page, "ding-dong")).to_be_visible()
    expect(row(page, "example")).to_have_count(0)


def test_the_fires_told_of_a_schedule_begin_with_its_next_one(
    real: Appliance, open_page: Open
) -> None:
    hours = {"type": "or", "triggers": [{"type": "interval", "hours": 7}]}
    make_schedule(real, "either", trigger_config=hours, name="Either")
    page = open_page(url_of(real, "#/schedules/either"))
    fires = page.locator(".fire-list li time")
    expect(fires).to_have_count(8)
    told = real.get("/api/schedules/either").json()["next_fire_time"]
    assert fires.first.get_attribute("datetime") == told
    page.get_by_role("button", name="edit").click()
    foreseen = page.get_by_role("dialog").locator(".fire-list li time")
    expect(foreseen).to_have_count(6)
    assert foreseen.first.get_attribute("datetime") == told
