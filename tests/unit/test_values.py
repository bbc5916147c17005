"""Times of the database and how the API writes them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import schedulezero as sz

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
FIRST_US, LAST_US = (int(datetime(y, 1, 1, tzinfo=UTC).timestamp()) * 10**6 for y in (1969, 2101))


def test_a_database_time_is_exact_to_the_microsecond_from_1969_to_2101() -> None:
    draw = random.Random(1)
    edges = [at + d for at in (FIRST_US, 0, LAST_US) for d in (-(10**6), -1, 0, 1, 999_999, 10**6)]
    for us in edges + [draw.randrange(FIRST_US, LAST_US) for _ in range(20_000)]:
        at = EPOCH + timedelta(microseconds=us)
        assert sz.at_of(us) == at
        assert sz.at_of(us).tzinfo is UTC
        assert sz.us_of(at) == us
        assert sz.iso_of(us) == at.isoformat().replace("+00:00", "Z")
        whole = us // 10**6 * 10**6
        assert sz.iso_of(whole) == sz.at_of(whole).isoformat().replace("+00:00", "Z")
