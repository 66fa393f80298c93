"""Times as people type them: ISO 8601, an age such as 7d, a word such as today, milliseconds since 1970."""

import argparse
import re
from datetime import UTC, datetime, timedelta

FORMS = "ISO 8601, an age such as 7d or 36h, now, today, yesterday, or milliseconds since 1970"

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
_DAYS_AGO = {"today": 0, "yesterday": 1}


def now() -> datetime:
    """The time of day, UTC."""
    return datetime.now(UTC)


def moment(text: str) -> int:
    """Reads a time as milliseconds since 1970; what names no time zone is UTC."""
    word = text.strip().lower()
    if re.fullmatch(r"-?\d{1,19}", word, re.ASCII):
        return int(word)  # the library says what is wrong with those that are no time
    if age := re.fullmatch(r"(\d{1,6})([smhdw])", word, re.ASCII):
        return _milliseconds(now()) - int(age[1]) * _SECONDS[age[2]] * 1000
    if word == "now":
        return _milliseconds(now())
    if word in _DAYS_AGO:
        midnight = now().replace(hour=0, minute=0, second=0, microsecond=0)
        return _milliseconds(midnight - timedelta(days=_DAYS_AGO[word]))
    try:
        found = datetime.fromisoformat(text)
        return _milliseconds(found if found.tzinfo else found.replace(tzinfo=UTC))
    except (ValueError, OverflowError):
        message = f"a time is {FORMS}, as in 2026-01-17T12:00Z, not {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def _milliseconds(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
