"""The page in states that a real server seldom is in, over a stand-in for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mock_server
import pytest
from mock_server import Mock, MockServer

if TYPE_CHECKING:
    from playwright.sync_api import Page

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

Open = Callable[..., "Page"]
Serve = Callable[..., MockServer]
VIEWS = ["overview", "schedules", "handlers", "executions"]
PAGES = [*VIEWS, "schedules/nightly-backup", "handlers/backup", "executions/live00000001"]


def rows(page: Page, table: str) -> Any:
    return page.locator(f"table.{table} tbody tr")


def test_an_empty_server_says_what_to_do_next(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(Mock()).url)
    expect(page.get_by_text("no schedules yet")).to_be_visible()
    expect(page.get_by_text("no handler has registered yet")).to_be_visible()
    page.get_by_role("button", name="create the first").click()
    expect(page.get_by_role("dialog", name="New schedule")).to_be_visible()


def test_the_overview_tells_rate_success_running_failed_and_next(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.running()).url)
    chart = page.get_by_role("img", name=re.compile("executions in the last 60 minutes"))
    expect(chart).to_be_visible()
    expect(page.get_by_text("96.6 %", exact=True)).to_be_visible()
    expect(rows(page, "running")).to_have_count(3)
    expect(rows(page, "running").nth(1)).to_contain_text("retrying")
    expect(rows(page, "failed").first).to_contain_text("Connection refused")
    expect(rows(page, "nexts").first).to_contain_text("Chime on the hour")


def test_the_tab_of_this_page_stays_readable_under_the_pointer(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url)
    tab = page.get_by_role("link", name="Schedules").first
    tab.click()  # the pointer stays on it
    expect(tab).to_have_attribute("aria-current", "page")
    colours = "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    under_pointer = tab.evaluate(colours)
    page.mouse.move(600, 500)
    assert under_pointer == tab.evaluate(colours)


def test_what_is_queued_says_what_it_waits_for(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.running()).url)
    expect(rows(page, "running").nth(1)).to_contain_text("waits for its next attempt")
    expect(rows(page, "running").nth(0)).to_contain_text("waits for its handler")


def test_a_last_fire_that_failed_is_seen_among_the_schedules(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    failed = mock_server.execution(
        "bad000000001", "backup", "push", "error", "nightly-backup", ago=5
    )
    mock.executions.insert(0, failed)
    mock.schedules["nightly-backup"]["last_fire_time"] = failed["scheduled_at"]
    page = open_page(serve(mock).url + "/#/schedules")
    failures = page.locator("tr[data-id=nightly-backup] td.last a")
    expect(failures).to_have_count(1)
    mock.schedules["nightly-backup"]["last_fire_time"] = mock_server.iso_in(0)
    mock.publish("schedule", mock.schedules["nightly-backup"])
    expect(failures).to_have_count(0)
    mock.schedules["nightly-backup"]["last_fire_time"] = failed["scheduled_at"]
    mock.publish("schedule", mock.schedules["nightly-backup"])
    failures.click()
    expect(page).to_have_url(re.compile("executions/bad000000001"))


def test_a_row_opens_wherever_it_is_pressed_but_beside_its_controls(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/schedules")
    row = page.locator("tr[data-id=nightly-backup]")
    row.locator(".acts").click(position={"x": 1, "y": 1})
    row.locator(".pick").click(position={"x": 1, "y": 1})
    expect(row).to_be_visible()
    row.locator(".trigger").click()
    expect(page).to_have_url(re.compile("schedules/nightly-backup"))


def test_handlers_where_it_is_narrow_say_what_their_numbers_count(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/handlers", width=390)
    cells = rows(page, "handlers").first.locator(".num")
    expect(cells).to_have_count(5)
    labels = "cells => cells.map(cell => getComputedStyle(cell, '::before').content)"
    assert "queued" in str(cells.evaluate_all(labels))


def test_the_history_is_narrowed_to_a_schedule_that_is_found_by_a_part_of_its_id(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/executions")
    page.get_by_role("combobox", name="schedule id").fill("nightly")
    expect(page.locator("#similar option")).to_have_text("nightly-backup")


def test_what_ended_last_comes_first_however_long_it_took(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    longest = mock_server.execution("x00000000990", "backup", "verify", ago=3600, took=3599)
    mock.executions.insert(9, longest)
    page = open_page(serve(mock).url)
    expect(rows(page, "lately").first).to_contain_text("verify")


def test_a_degraded_server_says_why(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    mock.checks["clock"] = "the clock is 40 s behind: fires are held"
    page = open_page(serve(mock).url)
    expect(page.get_by_text("the clock is 40 s behind: fires are held")).to_be_visible()
    expect(page.locator("#top")).to_contain_text("degraded")


def test_ten_thousand_schedules_are_shown_by_the_page(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.many()).url + "/#/schedules")
    expect(rows(page, "schedules")).to_have_count(50)
    expect(page.get_by_text("page 1 of 200")).to_be_visible()
    page.keyboard.press("]")
    expect(page.get_by_text("page 2 of 200")).to_be_visible()
    page.get_by_role("link", name="last »").click()
    expect(page).to_have_url(re.compile(r"page=200"))
    page.get_by_role("searchbox").fill("sensor-00042")
    expect(rows(page, "schedules")).to_have_count(1)
    expect(page).to_have_url(re.compile(r"search=sensor-00042"))


def test_view_filter_sort_and_page_live_in_the_address(open_page: Open, serve: Serve) -> None:
    server = serve(mock_server.many(200))
    page = open_page(server.url + "/#/schedules?handler=sensors&state=paused&sort=schedule_id")
    expect(page.get_by_label("Handler")).to_have_value("sensors")
    expect(rows(page, "schedules").first).to_contain_text("paused")
    page.get_by_role("link", name="sensor-00017").click()
    expect(page.get_by_role("heading", name="sensor-00017")).to_be_focused()
    page.go_back()
    expect(page.get_by_label("State", exact=True)).to_have_value("paused")
    page.get_by_role("link", name="sensor-00017").click()
    page.locator("p.trail a").click()
    expect(page).to_have_url(re.compile(r"handler=sensors&state=paused"))


def test_a_live_update_keeps_focus_and_does_not_move_other_rows(
    open_page: Open, serve: Serve
) -> None:
    mock = mock_server.small()
    page = open_page(serve(mock).url + "/#/executions")
    button = rows(page, "history").nth(3).get_by_role("link").first
    button.focus()
    page.evaluate("() => { window.kept = document.activeElement }")
    mock.publish("execution", mock_server.execution("new000000001", "backup", "push", "running"))
    expect(rows(page, "history").first).to_contain_text("running")
    assert page.evaluate("window.kept === document.activeElement && window.kept.isConnected")
    mock.publish("execution", mock_server.execution("new000000001", "backup", "push", "error"))
    expect(rows(page, "history").first).to_contain_text("error")


def test_an_event_that_the_filter_excludes_is_not_shown(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    page = open_page(serve(mock).url + "/#/executions?status=error")
    expect(rows(page, "history")).to_have_count(1)
    mock.publish("execution", mock_server.execution("new000000001", "backup", "push", "success"))
    mock.publish("execution", mock_server.execution("new000000002", "backup", "push", "error"))
    expect(rows(page, "history")).to_have_count(2)


def test_a_gap_in_the_events_reloads_what_is_shown(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    page = open_page(serve(mock).url + "/#/executions")
    expect(page.locator("#top")).to_contain_text("live")
    mock.executions.insert(0, mock_server.execution("gap000000001", "backup", "verify", "lost"))
    mock.publish("gap", {"lost": True})
    expect(rows(page, "history").first).to_contain_text("lost")


def test_the_log_of_a_running_job_grows_and_follows_its_end(open_page: Open, serve: Serve) -> None:
    mock = mock_server.running()
    page = open_page(serve(mock).url + "/#/executions/live00000001")
    lines = page.get_by_role("log", name="Log")
    expect(lines).to_contain_text("IMG_4439.jpg")
    told = {"execution_id": "live00000001", "attempt": 1}
    mock.publish("log", {**told, "lines": [[time.time(), "ERROR", "the disk is full"]]})
    mock.publish("progress", {**told, "percent": 23, "message": "copying"})
    expect(lines.locator("div").last).to_contain_text("the disk is full")
    expect(page.get_by_role("progressbar").first).to_have_attribute("value", "23")
    at_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight < 8"
    assert lines.evaluate(at_end)
    lines.evaluate("node => { node.scrollTop = 0 }")
    mock.publish("log", {**told, "lines": [[time.time(), "stdout", "one more"]]})
    expect(lines).to_contain_text("one more")
    assert lines.evaluate("node => node.scrollTop") == 0


def test_a_failed_execution_shows_each_attempt_with_its_traceback(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/executions/x00000000992")
    expect(rows(page, "tries")).to_have_count(3)
    page.get_by_text("traceback").first.click()
    expect(page.get_by_text("client.upload(archive, timeout=30)").first).to_be_visible()
    expect(page.get_by_text("cannot reach nas.local")).to_be_visible()


def test_the_page_says_since_when_the_server_is_gone_and_comes_back(
    open_page: Open, serve: Serve
) -> None:
    server = serve(mock_server.small())
    page = open_page(server.url)
    expect(page.locator("#top")).to_contain_text("live")
    server.stop()
    expect(page.locator("#top")).to_contain_text(re.compile(r"disconnected since \d\d:\d\d"))
    expect(rows(page, "nexts")).to_have_count(2)
    mock = mock_server.small()
    mock.schedules["new"] = mock_server.schedule("new", "backup", "push")
    serve(mock, server.port)
    expect(page.locator("#top")).to_contain_text("live", timeout=20_000)
    expect(rows(page, "nexts")).to_have_count(3)


def test_a_server_without_events_is_polled(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    mock.has_events = False
    page = open_page(serve(mock).url + "/#/executions")
    expect(page.locator("#top")).to_contain_text("polling")
    mock.executions.insert(0, mock_server.execution("new000000001", "backup", "push", "lost"))
    expect(rows(page, "history").first).to_contain_text("lost")


def test_a_tab_that_nobody_looks_at_lets_its_stream_go(open_page: Open, serve: Serve) -> None:
    url = serve(mock_server.small()).url
    page = open_page("about:blank")
    page.clock.install()
    page.goto(url)
    expect(page.locator("#top")).to_contain_text("live")
    page.evaluate(SHOW_OR_HIDE, True)
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/events")):
        page.clock.run_for(61_000)
    page.clock.run_for(10_000)
    with page.expect_request("**/api/events"):
        page.evaluate(SHOW_OR_HIDE, False)


SHOW_OR_HIDE = """hidden => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_the_page_can_be_held_still(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    page = open_page(serve(mock).url + "/#/executions")
    expect(rows(page, "history")).to_have_count(50)
    page.keyboard.press("p")
    expect(page.locator("#top")).to_contain_text("held still")
    mock.executions.insert(0, mock_server.execution("new000000001", "backup", "push", "lost"))
    mock.publish("execution", mock.executions[0])
    expect(rows(page, "history").first).to_contain_text("success")
    page.keyboard.press("p")
    expect(rows(page, "history").first).to_contain_text("lost")


def test_the_form_tells_the_next_fires_with_their_notes(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url)
    page.keyboard.press("n")
    form = page.get_by_role("dialog", name="New schedule")
    expect(form.locator(".fire-list li")).to_have_count(6)
    expect(form.get_by_text("01:30 does not exist that day")).to_be_visible()
    form.get_by_label("crontab").check(force=True)
    form.get_by_label("minute hour day month weekday").fill("*/7 * * * *")
    expect(form.get_by_text("*/7 * * * *", exact=True)).to_be_visible()


def test_errors_of_the_api_stand_at_their_fields(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url)
    page.keyboard.press("n")
    form = page.get_by_role("dialog", name="New schedule")
    form.get_by_label("Handler").select_option("backup")
    form.get_by_label("Method").select_option("push")
    form.get_by_label("cron fields").check(force=True)
    form.get_by_label("minute", exact=True).fill("61")
    minute = form.get_by_label("minute", exact=True)
    expect(minute).to_have_attribute("aria-invalid", "true")
    expect(minute).to_have_accessible_description(re.compile("61 is not between 0 and 59"))
    form.get_by_role("button", name="create").click()
    path = form.get_by_label(re.compile(r"^path"))
    expect(path).to_be_focused()
    expect(path).to_have_accessible_description(re.compile("path is required"))
    minute.fill("30")
    expect(minute).not_to_have_attribute("aria-invalid", "true")
    path.fill("/srv")
    form.get_by_label("Id", exact=True).fill("nightly-backup")
    form.get_by_role("button", name="create").click()
    expect(form.get_by_label("Id", exact=True)).to_have_accessible_description(re.compile("taken"))


def test_parameters_go_back_and_forth_between_fields_and_json(
    open_page: Open, serve: Serve
) -> None:
    mock = mock_server.small()
    page = open_page(serve(mock).url + "/#/handlers/backup")
    page.get_by_role("button", name="run", exact=True).first.click()
    dialog = page.get_by_role("dialog", name="Run backup.push")
    dialog.get_by_label(re.compile("^path")).fill("/srv")
    dialog.get_by_role("button", name="as JSON").click()
    editor = dialog.get_by_label("JSON object")
    expect(editor).to_have_value('{\n  "path": "/srv"\n}')
    editor.fill('{"path": "/srv", "keep_days": }')
    expect(editor).to_have_accessible_description(re.compile("Not JSON"))
    editor.fill('{"path": "/srv", "keep_days": 7}')
    dialog.get_by_role("button", name="as fields").click()
    expect(dialog.get_by_label(re.compile("^keep_days"))).to_have_value("7")
    dialog.get_by_role("button", name="run", exact=True).click()
    expect(page.get_by_role("heading", name="backup.push")).to_be_visible()
    sent = [body for verb, path, body in mock.calls if path == "/api/run_now"]
    assert sent[-1]["job_params"] == {"path": "/srv", "keep_days": 7}


def test_a_form_with_changes_is_not_lost_by_one_key(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url)
    page.keyboard.press("n")
    form = page.get_by_role("dialog", name="New schedule")
    form.get_by_label("Name").fill("x")
    page.keyboard.press("Escape")
    page.get_by_role("dialog", name="Leave the form?").get_by_role("button", name="keep").click()
    expect(form.get_by_label("Name")).to_have_value("x")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="leave").click()
    expect(form).to_have_count(0)


def test_many_are_paused_at_once_over_pages(open_page: Open, serve: Serve) -> None:
    mock = mock_server.many(120)
    page = open_page(serve(mock).url + "/#/schedules?sort=schedule_id&state=active")
    page.get_by_label("Select this page").check()
    page.keyboard.press("]")
    expect(page.get_by_role("link", name="sensor-00100")).to_be_visible()
    page.get_by_label("Select this page").check()
    expect(page.get_by_text("100 selected")).to_be_visible()
    page.get_by_role("button", name="pause", exact=True).first.click()
    expect(page.get_by_role("status")).to_contain_text("100 schedules paused.")
    assert sum(schedule["paused"] for schedule in mock.schedules.values()) >= 100


def test_a_count_that_was_cut_says_what_it_leaves_out(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    mock.left_out = 1200
    page = open_page(serve(mock).url)
    expect(page.get_by_text("without 1,200 schedules")).to_be_visible()


def test_the_palette_finds_commands_schedules_and_methods(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.many(300)).url)
    page.keyboard.press("Control+k")
    palette = page.get_by_role("combobox", name="Command")
    palette.fill("sensor-00123")
    expect(page.get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="sensor-00123")).to_be_visible()
    page.keyboard.press(":")
    page.get_by_role("combobox", name="Command").fill("run ding chime")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog", name="Run ding-dong.chime")).to_be_visible()


def test_the_key_that_chooses_in_the_palette_does_not_reach_what_opens(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/handlers")
    expect(rows(page, "handlers").first).to_be_visible()
    page.keyboard.press(":")
    palette = page.get_by_role("combobox", name="Command")
    palette.fill("run ding chime")
    is_kept = palette.evaluate(
        "node => !node.dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, cancelable: true}))"
    )
    assert is_kept
    expect(page.get_by_role("dialog", name="Run ding-dong.chime")).to_be_visible()


def test_the_palette_offers_what_can_be_done_on_the_page(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/schedules/nightly-backup")
    expect(page.get_by_role("button", name="run now")).to_be_visible()
    page.keyboard.press(":")
    expect(page.get_by_role("option").first).to_have_text(re.compile("run the schedule nightly"))
    for senseless in ("select the schedule", "next page", "take the deletion back"):
        expect(page.get_by_role("option", name=senseless)).to_have_count(0)
    page.keyboard.press("Enter")
    expect(rows(page, "history").first).to_contain_text("running")


def test_an_ended_execution_is_run_again_from_its_row(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    page = open_page(serve(mock).url + "/#/executions")
    rows(page, "history").first.focus()
    page.keyboard.press("r")
    expect(page.locator(".heading")).to_contain_text("running")
    assert [path for verb, path, _ in mock.calls if verb == "POST"] == ["/api/run_now"]
    page.keyboard.press("r")
    expect(page.get_by_role("status")).to_contain_text("not ended yet")


def test_the_way_to_the_content_stays_on_the_page(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/schedules")
    expect(page.get_by_role("link", name="nightly-backup")).to_be_visible()
    page.get_by_role("link", name="Skip to the content").focus()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    expect(page).to_have_url(re.compile("#/schedules$"))
    expect(page.get_by_role("link", name="nightly-backup")).to_be_visible()


def test_a_form_begins_at_its_first_field(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/handlers/backup")
    page.get_by_role("button", name="run", exact=True).first.click()
    expect(page.get_by_label(re.compile("^path"))).to_be_focused()
    page.keyboard.press("Escape")
    page.keyboard.press("n")
    expect(page.get_by_label("Handler")).to_be_focused()


def test_single_key_shortcuts_can_be_switched_off(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url)
    page.keyboard.press("?")
    page.get_by_label("single-key shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    page.keyboard.press("n")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(page).not_to_have_url(re.compile("schedules"))
    page.reload()
    page.keyboard.press("2")
    expect(page).not_to_have_url(re.compile("schedules"))
    page.keyboard.press("Control+k")
    expect(page.get_by_role("combobox", name="Command")).to_be_visible()


def test_keys_typed_into_fields_are_text(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/schedules")
    page.keyboard.press("/")
    page.keyboard.type("n2?")
    expect(page.get_by_role("searchbox")).to_have_value("n2?")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_the_theme_is_kept(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url, color_scheme="dark")
    background = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(background)
    page.keyboard.press("t")
    expect(page.get_by_role("status")).to_contain_text("theme: light")
    light = page.evaluate(background)
    assert light != dark
    page.reload()
    assert page.evaluate(background) == light


def test_data_is_never_markup(open_page: Open, serve: Serve) -> None:
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    mock = mock_server.small()
    mock.schedules["nightly-backup"].update(name=evil, description=evil, job_params={evil: evil})
    mock.executions[0].update(error=evil, status="error", result=evil, method_name=evil)
    server = serve(mock)
    page = open_page(server.url)
    for view in ("", "#/schedules", "#/schedules/nightly-backup", "#/executions"):
        page.goto(f"{server.url}/{view}")
        shown = page.locator("main td, main dd, main h1", has_text=evil)
        expect(shown.first).to_be_visible()
        assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("view", PAGES)
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_needs_sideways_scrolling(
    open_page: Open, serve: Serve, view: str, width: int
) -> None:
    page = open_page(f"{serve(mock_server.running()).url}/#/{view}", width=width)
    expect(page.get_by_text("loading").first).to_be_hidden()
    expect(page.locator("main .frame").first).to_be_visible()
    wide = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
          .filter(node => node.getBoundingClientRect().right > innerWidth + 1
            && !node.closest('svg, .unseen, .skip, thead, [data-own]'))
          .map(node => node.outerHTML.slice(0, 120))"""
    )
    assert wide == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", [*PAGES, "executions/x00000000992"])
def test_axe_finds_nothing_serious(
    open_page: Open, serve: Serve, axe: str, view: str, scheme: str
) -> None:
    page = open_page(f"{serve(mock_server.running()).url}/#/{view}", color_scheme=scheme)
    expect(page.get_by_text("loading").first).to_be_hidden()
    assert serious(page, axe) == []


@pytest.mark.parametrize("key", ["n", "?", ":"])
def test_axe_finds_nothing_serious_in_dialogs(
    open_page: Open, serve: Serve, axe: str, key: str
) -> None:
    page = open_page(f"{serve(mock_server.running()).url}/#/schedules")
    page.keyboard.press(key)
    expect(page.get_by_role("dialog")).to_be_visible()
    assert serious(page, axe) == []


def serious(page: Page, axe: str) -> list[str]:
    # Evaluated by the debugger, so the page's policy against inline scripts does not matter.
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{rule['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


def test_a_broken_schedule_is_not_said_to_fire_next(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    mock.schedules["nightly-backup"]["quarantined"] = "the stored trigger cannot be read"
    mock.schedules["nightly-backup"]["next_fire_time"] = mock_server.iso_in(-60)
    page = open_page(serve(mock).url)
    expect(page.locator("table.nexts tr[data-id=nightly-backup] td.end")).to_have_text("!broken")
    page.goto(f"{page.url.split('#')[0]}#/schedules")
    expect(page.locator("tr[data-id=nightly-backup] td.next")).to_have_text("–")


def test_a_schedule_without_retries_says_that_it_is_tried_once(
    open_page: Open, serve: Serve
) -> None:
    mock = mock_server.small()
    retry = {"max_attempts": 1, "base_delay": 1, "factor": 2, "max_delay": 60, "jitter": 0.5}
    mock.schedules["nightly-backup"]["retry"] = retry
    page = open_page(serve(mock).url + "/#/schedules/nightly-backup")
    expect(page.get_by_text("none: one attempt", exact=True)).to_be_visible()


def test_a_long_handler_id_leaves_room_for_the_search(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    mock.handlers.append(mock_server.handler("h" * 128))
    page = open_page(serve(mock).url + "/#/schedules")
    expect(page.get_by_role("combobox", name="Handler").locator("option")).to_have_count(5)
    search = page.get_by_role("searchbox").bounding_box()
    field = page.get_by_role("combobox", name="Handler").bounding_box()
    assert search["width"] >= 200 and field["width"] < 300


def test_a_declared_schedule_is_not_offered_to_be_changed_here(
    open_page: Open, serve: Serve
) -> None:
    mock = mock_server.small()
    mock.schedules["nightly-backup"]["origin"] = "config"
    page = open_page(serve(mock).url + "/#/schedules/nightly-backup")
    expect(page.get_by_text("the configuration file: change it there")).to_be_visible()
    expect(page.get_by_role("button", name="pause")).to_be_visible()
    for name in ("edit", "delete"):
        expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)
    page.keyboard.press("u")
    expect(page.locator("tr[data-id=hourly-chime] [data-act=edit-schedule]")).to_have_count(1)
    expect(page.locator("tr[data-id=nightly-backup] [data-act=edit-schedule]")).to_have_count(0)
    page.locator("tr[data-id=nightly-backup]").press("e")
    expect(page.get_by_role("status")).to_contain_text("declared in the configuration file")
    expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize("way", ["back", "up"])
def test_a_list_is_found_again_where_it_was_left(open_page: Open, serve: Serve, way: str) -> None:
    mock = mock_server.small()
    for number in range(45):
        made = mock_server.schedule(f"fleet-{number:02}", "backup", "push")
        mock.schedules[made["id"]] = made
    page = open_page(serve(mock).url + "/#/schedules")
    page.locator("tr[data-id=fleet-40] a").first.scroll_into_view_if_needed()
    page.locator("tr[data-id=fleet-40] a").first.click()
    expect(page.get_by_role("heading", name="fleet-40")).to_be_visible()
    assert page.evaluate("scrollY") == 0
    if way == "back":
        page.go_back()
    else:
        page.keyboard.press("u")
    expect(page.locator("tr[data-id=fleet-40] td.name")).to_be_in_viewport()
    page.keyboard.press("4")
    expect(page.locator("table.history tbody tr").first).to_be_visible()
    assert page.evaluate("scrollY") == 0


def test_the_browser_asks_before_a_reload_drops_what_was_entered(
    open_page: Open, serve: Serve
) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/schedules")
    asked: list[str] = []

    def keep(dialog: Any) -> None:
        asked.append(dialog.type)
        dialog.accept()

    page.on("dialog", keep)
    page.keyboard.press("n")
    form = page.get_by_role("dialog", name="New schedule")
    expect(form).to_be_visible()
    page.reload()
    assert asked == []
    page.keyboard.press("n")
    form.get_by_label("Id", exact=True).press_sequentially("nightly")
    page.reload()
    assert asked == ["beforeunload"]


@pytest.mark.parametrize(
    ("role", "kept"), [("viewer", []), ("operator", ["run"]), ("admin", ["edit", "run"])]
)
def test_keys_and_palette_offer_what_the_role_may_do(
    open_page: Open, serve: Serve, role: str, kept: list[str]
) -> None:
    mock = mock_server.small()
    mock.role = role
    page = open_page(serve(mock).url + "/#/schedules/nightly-backup")
    expect(page.locator(f"html[data-role={role}] h1")).to_have_text("nightly-backup")
    page.keyboard.press(":")
    offered = page.get_by_role("dialog").get_by_role("option")
    expect(offered.first).to_be_visible()
    words = [text.split()[0] for text in offered.all_inner_texts()]
    assert [word for word in ("edit", "run") if word in words] == kept
    page.keyboard.type("audit")
    expect(page.get_by_role("option", name="audit")).to_have_count(int(role == "admin"))
    page.keyboard.press("Escape")
    for key, name in (("e", "Edit nightly-backup"), ("n", "New schedule")):
        page.keyboard.press(key)
        if role != "admin":
            page.keyboard.press("?")
        expected = name if role == "admin" else "Keys"
        expect(page.locator("dialog[open] h2").first).to_have_text(expected)
        page.keyboard.press("Escape")


def test_the_next_page_of_a_list_is_shown_from_its_top(open_page: Open, serve: Serve) -> None:
    mock = mock_server.small()
    for number in range(120):
        made = mock_server.schedule(f"fleet-{number:03}", "backup", "push")
        mock.schedules[made["id"]] = made
    page = open_page(serve(mock).url + "/#/schedules")
    page.get_by_role("link", name="next ›").click()  # it is below the list
    expect(page.get_by_text("page 2 of 3")).to_be_attached()
    assert page.evaluate("scrollY") == 0


def test_all_that_is_wrong_in_a_form_is_shown_together(open_page: Open, serve: Serve) -> None:
    page = open_page(serve(mock_server.small()).url + "/#/schedules")
    page.keyboard.press("n")
    form = page.get_by_role("dialog", name="New schedule")
    form.get_by_label("Time zone").fill("Mars/Base")
    unknown = form.get_by_text("'Mars/Base' is not a known time zone")
    expect(unknown).to_be_visible()
    form.get_by_role("button", name="create").click()
    expect(form.get_by_text("Choose one.")).to_have_count(2)
    expect(unknown).to_be_visible()
