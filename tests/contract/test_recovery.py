"""What becomes of a database that was damaged, cut, emptied or replaced while nobody looked."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schedulezero as sz
from apparatus import Anything, Dial
from schedulezero import Config, DatabaseRefused, Execution, Recovery, Status, Store

pytestmark = pytest.mark.anyio
FLUSH = bytes(range(256)) * 16


class Place:
    """A data directory, used by one server life after another."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = Config(data_dir=str(directory))
        self.clock = Dial()
        self.database = directory / "schedulezero.db"
        self.log = directory / "schedulezero.db-wal"
        self.recovery: Recovery | None = None
        self.store: Store | None = None

    async def start(self) -> Place:
        self.recovery = Recovery(self.config, self.clock)
        self.recovery.prepare()
        last_id = self.recovery.seal.last_id
        self.store = Store(self.recovery.path, self.config, self.clock, last_id)
        self.store.open(asyncio.get_running_loop())
        self.store.intake = Anything()
        await self.recovery.reseal(self.store)
        return self

    async def stop(self) -> None:
        assert self.store is not None and self.recovery is not None
        await self.recovery.reseal(self.store, is_open=False)
        self.store.close()
        self.store = None

    def die(self, *, elsewhere: Path) -> None:
        """End as a killed server does: what is on the disk stays exactly as it is."""
        assert self.store is not None
        elsewhere.mkdir()
        for path in self.directory.iterdir():
            if path.is_file() and not path.name.endswith("-shm"):
                shutil.copy(path, elsewhere)
        self.store.close()
        self.store = None
        for path in elsewhere.iterdir():
            shutil.copy(path, self.directory)
        for name in {p.name for p in self.directory.iterdir() if p.is_file()}:
            if not (elsewhere / name).exists():
                (self.directory / name).unlink()

    async def put(self, count: int = 1) -> list[str]:
        assert self.store is not None
        ids = []
        for _ in range(count):
            self.clock.us += 1_000_000
            made = Execution(
                self.store.new_id(), None, "worker", "work", {"text": "x" * 2_000}, Status.QUEUED,
                self.clock.us, self.clock.us, None,
            )  # fmt: skip
            await self.store.add_execution(made)
            ids.append(made.execution_id)
        return ids

    def ids(self) -> list[str]:
        assert self.store is not None
        return [e.execution_id for e in reversed(self.store.executions(limit=1_000))]

    @property
    def incident(self) -> str:
        assert self.recovery is not None
        return self.recovery.incident or ""

    async def back_up(self) -> None:
        assert self.recovery is not None and self.store is not None
        before = sz.list_backups(str(self.directory))
        self.clock.us += 86_400_000_000
        self.clock.passed_s += 86_400
        await self.recovery.back_up_if_due(self.store)
        assert sz.list_backups(str(self.directory)) != before

    def set_aside(self) -> list[str]:
        return sorted(p.name for p in self.directory.glob("*.damaged"))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    made = Place(tmp_path / "data")
    made.directory.mkdir()
    yield made
    if made.store is not None:
        made.store.close()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a page of noise": (lambda path: overwrite(path, 20 * 1024, os.urandom(4096)), "damaged"),
    "a page of zeros": (lambda path: overwrite(path, 20 * 1024, bytes(4096)), "damaged"),
    "a corrupted header": (lambda path: overwrite(path, 0, FLUSH[:100]), "not a database"),
    "half of the file": (lambda path: os.truncate(path, path.stat().st_size // 2), "damaged"),
    "an odd length": (lambda path: os.truncate(path, 5_000), "damaged"),
    "an empty file": (empty, "is empty"),
    "no file": (delete, "is missing"),
    "another format": (lambda path: path.write_bytes(FLUSH), "not a database"),
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_database_is_set_aside_and_the_newest_backup_restored(
    place: Place, damage: str
) -> None:
    await place.start()
    in_backup = await place.put(20)
    await place.back_up()
    after_backup = await place.put(20)
    await place.stop()
    do, sentence = DAMAGES[damage]
    do(place.database)
    left = place.database.read_bytes() if place.database.exists() else None

    await place.start()
    assert place.ids() == in_backup
    assert sentence in place.incident
    assert "the backup of 2027-01-16T08:00:20Z was restored" in place.incident
    aside = place.set_aside()
    kept = [(place.directory / name).read_bytes() for name in aside]
    assert kept == ([] if left is None else [left])
    assert all(name in place.incident for name in aside)
    # No id is given twice, although those after the backup are forgotten, whatever the clock says.
    place.clock.us -= 3_600_000_000
    assert set(await place.put(3)).isdisjoint(after_backup)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_without_a_backup_it_starts_anew_and_says_so(place: Place, damage: str) -> None:
    await place.start()
    await place.put(40)
    await place.stop()
    DAMAGES[damage][0](place.database)
    await place.start()
    assert place.ids() == []
    assert "there is no backup, so it starts anew" in place.incident


async def test_a_new_place_starts_without_a_word(place: Place) -> None:
    await place.start()
    assert place.incident == ""
    await place.stop()
    await place.start()
    assert place.incident == ""


async def test_a_sound_database_after_a_kill_is_used_as_it_is(place: Place, tmp_path: Path) -> None:
    await place.start()
    ids = await place.put(5)
    place.die(elsewhere=tmp_path / "copy")
    await place.start()
    assert place.ids() == ids
    assert place.incident == ""


async def test_the_incident_is_told_after_restarts_until_it_is_acknowledged(place: Place) -> None:
    await place.start()
    await place.stop()
    empty(place.database)
    await place.start()
    told = place.incident
    for _ in range(2):
        await place.stop()
        await place.start()
        assert place.incident == told
    assert place.recovery is not None
    await place.recovery.acknowledge()
    await place.stop()
    await place.start()
    assert place.incident == ""


@pytest.mark.parametrize("cut", ["deleted", "emptied", "cut"])
async def test_a_write_ahead_log_that_was_deleted_or_cut_is_noticed(
    place: Place, tmp_path: Path, cut: str
) -> None:
    await place.start()
    assert place.store is not None and place.recovery is not None
    first = await place.put(5)
    await place.store.write(lambda db: None)
    with closing(sqlite3.connect(place.database)) as other:
        other.execute("PRAGMA wal_checkpoint(FULL)")
    await place.put(5)
    await place.recovery.reseal(place.store)
    place.die(elsewhere=tmp_path / "copy")
    if cut == "deleted":
        place.log.unlink()
    else:
        os.truncate(place.log, 0 if cut == "emptied" else 4_000)

    await place.start()
    # SQLite opens it without complaint; it is the newest sound state there is.
    assert place.ids()[:5] == first
    assert len(place.ids()) < 10
    assert "lacks changes that were made before" in place.incident


async def test_a_backup_newer_than_what_a_lost_log_leaves_is_preferred(
    place: Place, tmp_path: Path
) -> None:
    await place.start()
    ids = await place.put(5)
    await place.back_up()
    assert place.store is not None and place.recovery is not None
    await place.put(5)
    await place.recovery.reseal(place.store)
    place.die(elsewhere=tmp_path / "copy")
    place.log.unlink()
    await place.start()
    assert place.ids() == ids
    assert "was restored" in place.incident


async def test_a_log_that_is_gone_after_a_kill_is_told_even_if_nothing_known_is_missing(
    place: Place, tmp_path: Path
) -> None:
    await place.start()
    ids = await place.put(5)
    assert place.store is not None and place.recovery is not None
    await place.recovery.reseal(place.store)
    with closing(sqlite3.connect(place.database)) as other:
        other.execute("PRAGMA wal_checkpoint(FULL)")
    place.die(elsewhere=tmp_path / "copy")
    place.log.unlink()
    await place.start()
    assert place.ids() == ids
    assert "unless another program has merged it" in place.incident


async def test_an_older_copy_in_its_place_is_used_and_told(place: Place, tmp_path: Path) -> None:
    await place.start()
    first = await place.put(5)
    await place.stop()
    shutil.copy(place.database, tmp_path / "old.db")
    await place.start()
    await place.put(5)
    await place.stop()
    shutil.copy(tmp_path / "old.db", place.database)
    await place.start()
    assert place.ids() == first
    assert "an older copy took its place" in place.incident


async def test_the_database_of_another_place_is_used_and_told(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other")
    other.directory.mkdir()
    await other.start()
    ids = await other.put(2)
    await other.stop()
    await place.start()
    await place.stop()
    shutil.copy(other.database, place.database)
    await place.start()
    assert place.ids() == ids
    assert "another one than was here before" in place.incident


def make_foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE songs (title)")


def make_newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {sz.SCHEMA_VERSION + 1}")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(make_foreign, "of another program"), (make_newer, "start the newer program")],
)
async def test_a_foreign_or_newer_database_is_refused_and_left_untouched(
    place: Place, make: Callable[[Path], None], sentence: str
) -> None:
    await place.start()
    await place.stop()
    if make is make_foreign:
        place.database.unlink()
    make(place.database)
    before = place.database.read_bytes()
    with pytest.raises(DatabaseRefused, match=sentence):
        await place.start()
    assert place.database.read_bytes() == before
    assert place.set_aside() == []


async def test_a_damaged_backup_is_passed_over_for_an_older_one(place: Place) -> None:
    await place.start()
    first = await place.put(20)
    await place.back_up()
    await place.put(20)
    await place.back_up()
    await place.stop()
    newest, _ = sz.list_backups(str(place.directory))
    overwrite(Path(newest), 20 * 1024, bytes(8_192))
    empty(place.database)
    await place.start()
    assert place.ids() == first


async def test_a_full_disk_does_not_stand_in_the_way_of_a_backup(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.start()
    ids = await place.put(3)
    await place.back_up()
    await place.stop()
    empty(place.database)

    def full(source: str, target: str) -> None:
        raise sz.DiskFull("the disk is full")

    monkeypatch.setattr(sz, "copy_database", full)
    await place.start()
    assert place.ids() == ids


class Crash(BaseException):
    """The end of the process, here and now."""


def crash_at(number: int, rename: Callable[[str, str], None] = os.replace) -> Any:
    """As os.replace, but the process ends before so many calls."""
    calls = iter(range(1_000))

    def step(source: str, target: str) -> None:
        if next(calls) >= number:
            raise Crash
        rename(source, target)

    return step


def refuse_copy(source: str, target: str) -> None:
    raise sz.DiskFull("the disk is full")


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_restore_that_is_cut_off_anywhere_is_done_by_the_next_start(
    place: Place, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    for number in range(100):
        await place.start()
        ids = place.ids() or await place.put(2)
        await place.back_up()
        await place.stop()
        overwrite(place.database, 0, FLUSH[:100])
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", crash_at(number))
            if not has_room:
                patched.setattr(sz, "copy_database", refuse_copy)
            try:
                Recovery(place.config, place.clock).prepare()
                break
            except Crash:
                pass
        await place.start()
        assert place.ids() == ids
        assert place.incident
        await place.stop()
    assert number >= 4


async def test_only_the_newest_few_set_aside_are_kept(place: Place) -> None:
    for _ in range(sz.SET_ASIDE_KEPT + 2):
        await place.start()
        await place.stop()
        overwrite(place.database, 0, FLUSH[:100])
        place.clock.us += 1_000_000
    await place.start()
    assert len(place.set_aside()) == sz.SET_ASIDE_KEPT


async def test_what_a_killed_copy_has_left_is_removed(place: Place) -> None:
    backups = place.directory / "backups"
    backups.mkdir()
    left = backups / "schedulezero-20270115T080000000Z.db.new"
    left.write_bytes(FLUSH)
    await place.start()
    assert not left.exists()
    assert place.incident == ""


async def test_backups_rotate_and_one_from_the_future_goes_first(place: Place) -> None:
    place.config = replace(place.config, backup_keep=2)
    await place.start()
    right_us = place.clock.us
    place.clock.us += 10 * 365 * 86_400_000_000
    await place.back_up()
    future = sz.list_backups(str(place.directory))[0]
    place.clock.us = right_us
    await place.back_up()
    assert len(sz.list_backups(str(place.directory))) == 1
    assert future not in sz.list_backups(str(place.directory))
    for _ in range(3):
        await place.back_up()
    assert len(sz.list_backups(str(place.directory))) == 2


async def test_a_backup_is_made_when_the_newest_is_too_old(place: Place) -> None:
    await place.start()
    assert place.recovery is not None and place.store is not None
    counts = []
    for hours in (0, 1, 22, 2):
        place.clock.us += hours * 3_600_000_000
        place.clock.passed_s += hours * 3_600
        await place.recovery.back_up_if_due(place.store)
        counts.append(len(sz.list_backups(str(place.directory))))
    assert counts == [1, 1, 1, 2]


async def test_a_staged_database_takes_the_place_of_the_present_one(
    place: Place, tmp_path: Path
) -> None:
    await place.start()
    first = await place.put(3)
    sz.copy_database(str(place.database), str(tmp_path / "kept.db"))
    await place.put(3)
    await place.stop()
    sz.stage_restore(str(tmp_path / "kept.db"), str(place.database))
    await place.start()
    assert place.ids() == first
    assert place.incident == ""  # it was asked for
    assert len(list(place.directory.glob("*.replaced"))) == 1


async def test_a_file_that_cannot_be_used_is_not_staged(place: Place, tmp_path: Path) -> None:
    await place.start()
    (tmp_path / "bad.db").write_bytes(FLUSH)
    make_foreign(tmp_path / "foreign.db")
    for name in ("bad.db", "foreign.db"):
        with pytest.raises(sz.StoreUnavailable):
            sz.stage_restore(str(tmp_path / name), str(place.database))
    assert not list(place.directory.glob("*.restore*"))


async def test_a_database_deleted_under_the_server_is_saved_whole(place: Place) -> None:
    await place.start()
    ids = await place.put(10)
    place.database.unlink()
    place.log.unlink()
    assert place.store is not None and place.recovery is not None
    assert place.store.is_displaced
    await place.recovery.rescue(place.store)
    with pytest.raises(sz.StoreUnavailable):
        await place.put()
    place.store.close()
    await place.start()
    assert place.ids() == ids
    assert "nothing of it is lost" in place.incident


async def test_a_seal_that_is_under_way_does_not_hide_that_the_database_was_deleted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.start()
    assert place.store is not None and place.recovery is not None
    sealed, note = threading.Event(), place.recovery._note

    def note_late(seal: sz.Seal) -> None:
        monkeypatch.undo()
        sealed.wait(5)
        note(seal)

    monkeypatch.setattr(place.recovery, "_note", note_late)
    sealing = asyncio.create_task(place.recovery.suspect())
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.1, sealed.set)
    await place.recovery.rescue(place.store)
    await sealing
    assert "nothing of it is lost" in place.incident
    assert place.recovery.seal.is_suspect


async def test_a_row_damaged_within_its_page_is_shown_and_stops_nothing_else(
    place: Place,
) -> None:
    await place.start()
    assert place.store is not None
    bad, good = await place.put(2)

    def spoil(db: sqlite3.Connection) -> None:
        db.execute(
            "UPDATE executions SET job_params = cast(x'7b22ff22' AS TEXT) WHERE id = ?",
            (sz.decode_id(bad),),
        )

    await place.store.write(spoil)
    assert [e.execution_id for e in place.store.live_executions()] == [good]
    shown = place.store.execution(bad)
    assert shown is not None and "damaged" in (shown.error or "")


async def test_a_schedule_damaged_within_its_row_is_quarantined(place: Place) -> None:
    await place.start()
    assert place.store is not None
    state = sz.parse_trigger(
        {"type": "interval", "seconds": 60}, timezone="UTC", now=sz.at_of(place.clock.us)
    ).__getstate__()
    made = sz.Schedule("a", "h", "m", {}, state, state, next_fire_us=place.clock.us)
    await place.store.add_schedule_record(made)
    await place.store.write(
        lambda db: db.execute("UPDATE definitions SET trigger_state = '{\"typ'")
    )
    told: list[str] = []
    place.store.changed = told.append
    lease = sz.timedelta(seconds=30)
    assert await place.store.acquire_schedules("one", lease, 10) == []
    assert told == ["a"]
    schedule = place.store.schedule("a")
    assert schedule is not None and "damaged" in (schedule.quarantined or "")
    stored = place.store.schedules()[0]
    assert [s.schedule_id for s in stored] == ["a"]


async def test_a_pause_does_not_wipe_out_what_is_left_of_a_damaged_schedule(place: Place) -> None:
    await place.start()
    assert place.store is not None
    state = {"type": "interval"}
    await place.store.add_schedule_record(sz.Schedule("a", "h", "m", {}, state, state))
    await place.store.write(lambda db: db.execute("UPDATE definitions SET job_params = '{\"typ'"))
    before = place.store._reader.one("SELECT * FROM schedules")
    assert await place.store.set_paused("a", True) == place.store.schedule("a")
    assert place.store._reader.one("SELECT * FROM schedules") == before


async def test_a_schedule_one_of_whose_texts_is_damaged_can_be_found_paused_mended_and_deleted(
    place: Place,
) -> None:
    await place.start()
    store = place.store
    assert store is not None
    state = {"type": "interval"}
    made = sz.Schedule("a", "h", "m", {"a": 1}, state, state, name="nightly")
    await store.add_schedule_record(made)
    await store.write(
        lambda db: db.execute("UPDATE definitions SET name = cast(x'6e69676874ff79' AS TEXT)")
    )
    assert store.schedules(search="NIGHT")[1] == 1
    assert [s.schedule_id for s in sz.load_schedules(store.path)] == ["a"]
    assert store.state == "ok"
    await store.set_paused("a", True)
    (found,), _ = store.schedules()
    assert found.paused and found.job_params == {"a": 1}
    assert await store.replace_schedule(made, found.generation)
    assert store.schedules(search="nightly")[1] == 1
    assert await store.delete_schedule("a")
