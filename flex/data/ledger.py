"""The account of every row: read, used, truncated, set aside by choice, dropped as unusable."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from flex.errors import DataError

logger = logging.getLogger("flex.data")

SHOWN = 5  # unusable rows named in a message
MAX_DAMAGED = 0.01  # share of unreadable rows (one is always allowed) above which `skip` refuses


class BadRow(Exception):
    """A row that cannot be used: a short stable reason, and the detail of this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Drop:
    """An unusable row."""

    origin: str  # "file.jsonl:12"
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}: {self.detail}"


@dataclass
class Ledger:
    """Counts of rows. In the end read == used + set aside + dropped; `truncated` is part of `used`.

    `set_aside` holds rows that the configuration or a data set's own split leaves out, by reason.
    """

    read: int = 0
    used: int = 0
    truncated: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    drops: list[Drop] = field(default_factory=list)

    @property
    def dropped(self) -> Counter[str]:
        """Number of unusable rows by reason."""
        return Counter(drop.reason for drop in self.drops)

    def first(self, reason: str) -> list[Drop]:
        """The first unusable rows with this reason, in reading order."""
        return [drop for drop in self.drops if drop.reason == reason][:SHOWN]

    def drop(self, origin: str, reason: str, detail: str) -> None:
        """Note an unusable row."""
        self.drops.append(Drop(origin, reason, detail))

    def settle(self, policy: str, fix: str, *, damaged: bool) -> None:
        """Apply `on_bad_row` to what was dropped so far.

        Raises:
            DataError: a row was dropped and the policy is `error`; or rows were dropped as
                `damaged` (unreadable, not merely too long) and they are more than 1 %.
        """
        if not self.drops:
            return
        count = f"{len(self.drops)} of {self.read} rows cannot be used"
        shown = "".join(f"\n    {drop}" for drop in self.drops[:SHOWN])
        if damaged and len(self.drops) == self.read:
            fix = "check data.name and data.path: not one row is as expected"
        if policy == "error":
            why = "data.on_bad_row=error accepts no loss of rows"
            raise DataError(f"{count}; the first:{shown}", why, fix)
        if damaged and len(self.drops) > max(1, MAX_DAMAGED * self.read):
            raise DataError(
                f"{count}; the first:{shown}",
                f"data.on_bad_row=skip accepts up to {MAX_DAMAGED:.0%}; more means a wrong file",
                "check data.name and data.path, or repair the file",
            )
        logger.warning("%s and were skipped; the first:%s", count, shown)

    def summary(self) -> str:
        """One line: `974 rows read: 464 used (3 truncated), 510 set aside (...), 0 dropped`."""
        aside = [f"{reason}: {count}" for reason, count in self.set_aside.items()]
        dropped = [
            f"{reason}: {count}, first {self.first(reason)[0].origin}"
            for reason, count in self.dropped.items()
        ]
        return (
            f"{self.read} rows read: {self.used} used ({self.truncated} truncated), "
            f"{self.set_aside.total()} set aside{_listed(aside)}, "
            f"{len(self.drops)} dropped{_listed(dropped)}"
        )


def _listed(parts: list[str]) -> str:
    return f" ({'; '.join(parts)})" if parts else ""
