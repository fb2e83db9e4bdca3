"""Hours of the week, as a hospital writes them: `Mo-Fr 18:00-06:00`, `Sa-Su 00:00-24:00`.

A span that ends before it begins goes on into the next day: `Fr 22:00-06:00` ends on Saturday at six. The first minute is in
it, the last is not. Times are those of the clock on the wall.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Self

DAYS = ("Mo", "Tu", "We", "Th", "Fr", "Sa", "Su")
MINUTES = 24 * 60
"""Minutes of a day."""

_SPAN = re.compile(r"(?P<first>[A-Z][a-z])(?:-(?P<last>[A-Z][a-z]))? (?P<begin>\d\d:\d\d)-(?P<end>\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True)
class Span:
    """Part of some days of the week."""

    days: frozenset[int]
    """On which it begins; Monday is 0."""
    begin: int
    """Minute of the day."""
    end: int
    """Minute of the day, or of the next one if it is not after `begin`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read one span.

        Raises:
            ValueError: it is none.
        """
        found = _SPAN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no span of hours; right is a day or two, and two times: Mo-Fr 18:00-06:00")
        first, last = (_day(name) for name in (found["first"], found["last"] or found["first"]))
        begin, end = _minute(found["begin"]), _minute(found["end"])
        if begin in (end, MINUTES):
            raise ValueError(f"{text!r} has no length; the whole day is 00:00-24:00")
        return cls(frozenset((first + n) % 7 for n in range((last - first) % 7 + 1)), begin, end)

    def holds(self, moment: datetime) -> bool:
        """Whether a moment, by its own clock, is in the span."""
        minute, day = moment.hour * 60 + moment.minute, moment.weekday()
        if self.begin < self.end:
            return day in self.days and self.begin <= minute < self.end
        return (day in self.days and minute >= self.begin) or ((day - 1) % 7 in self.days and minute < self.end)


def within(hours: Iterable[str], moment: datetime) -> bool:
    """Whether a moment is in any of these spans."""
    return any(Span.parse(text).holds(moment) for text in hours)


def _day(name: str) -> int:
    if name not in DAYS:
        raise ValueError(f"{name!r} is no day; days are {', '.join(DAYS)}")
    return DAYS.index(name)


def _minute(clock: str) -> int:
    hour, minute = map(int, clock.split(":"))
    if minute > 59 or hour * 60 + minute > MINUTES:
        raise ValueError(f"{clock!r} is no time of day; times are 00:00 to 24:00")
    return hour * 60 + minute
