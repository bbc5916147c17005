"""The handler that is called while measuring: its method does nothing."""

from __future__ import annotations

from handler import Handler


class Bench(Handler):
    def nothing(self) -> int:
        return 1
