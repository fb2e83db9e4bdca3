import contextlib
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedseg.site.hours import DAYS, Span, within

MONDAY = datetime(2024, 1, 1)


def at(day, clock):
    hour, minute = map(int, clock.split(":"))
    return MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("span", "inside", "outside"),
    [
        ("Mo-Fr 08:00-17:30", ["Mo 08:00", "Fr 17:29"], ["Mo 07:59", "Fr 17:30", "Sa 12:00", "Su 12:00"]),
        ("Mo-Fr 18:00-06:00", ["Mo 18:00", "Tu 05:59", "Sa 05:59"], ["Mo 05:59", "Mo 06:00", "Sa 18:00", "Su 03:00"]),
        ("Sa-Su 00:00-24:00", ["Sa 00:00", "Su 23:59"], ["Fr 23:59", "Mo 00:00"]),
        ("Sa-Mo 12:00-13:00", ["Sa 12:30", "Su 12:30", "Mo 12:30"], ["Tu 12:30", "Fr 12:30"]),
        ("Su 22:00-02:00", ["Su 22:00", "Mo 01:59"], ["Su 01:00", "Mo 22:00", "Mo 02:00"]),
        ("We 20:00-00:00", ["We 23:59"], ["Th 00:00", "We 19:59"]),
    ],
)
def test_a_span_holds_its_first_minute_and_not_its_last(span, inside, outside):
    assert [moment for moment in inside if not Span.parse(span).holds(at(*moment.split()))] == []
    assert [moment for moment in outside if Span.parse(span).holds(at(*moment.split()))] == []


def test_any_of_several_spans_will_do():
    hours = ("Mo-Fr 18:00-06:00", "Sa-Su 00:00-24:00")
    assert within(hours, at("Sa", "12:00"))
    assert within(hours, at("We", "23:00"))
    assert not within(hours, at("We", "12:00"))


@pytest.mark.parametrize(
    ("span", "told"),
    [
        ("18:00-06:00", "no span of hours"),
        ("Mo-Fr 18-6", "no span of hours"),
        ("Mo 18:00-06:00 ", "no span of hours"),
        ("Mo \u0661\u0668:00-19:00", "no span of hours"),
        ("Xx 18:00-06:00", "'Xx' is no day; days are Mo, Tu"),
        ("Mo 24:01-06:00", "'24:01' is no time of day"),
        ("Mo 12:60-13:00", "'12:60' is no time of day"),
        ("Mo 08:00-08:00", "has no length"),
        ("Mo 24:00-06:00", "has no length"),
    ],
)
def test_what_is_no_span_is_refused_with_what_would_be_right(span, told):
    with pytest.raises(ValueError, match=told):
        Span.parse(span)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 1439), st.integers(0, 1439))
def test_a_span_is_as_long_as_its_days_and_times_say(first, last, begin, end):
    if begin == end:
        return
    span = Span.parse(
        f"{DAYS[first]}-{DAYS[last]} {begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}",
    )
    week = sum(span.holds(MONDAY + timedelta(minutes=minute)) for minute in range(0, 7 * 1440))
    assert week == len(span.days) * ((end - begin) % 1440)


@given(st.text())
def test_any_text_is_a_span_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        Span.parse(text)
