from __future__ import annotations

import logging

import pytest

from fusion.safe_text import listed, one_line, printable, printable_logs, quotable, shown

HOSTILE = [
    "\x1b[2Jgone",  # clears the screen
    "\x1b]0;title\x07",
    "a\rb",
    "a\bb",
    "\u202eevil",  # right-to-left override
    "\u2066x\u2069",
    "\u200bzero",
    "\x9b31m",  # a one-byte CSI
    "\ud800",
    "\x7f",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_is_printed(text: str) -> None:
    for safe in (printable(text), one_line(text), quotable(text), shown(text), listed([text, text])):
        assert safe.isprintable(), ascii(safe)


def test_plain_text_is_kept() -> None:
    for text in ("mnli", "Straße 東京 🙂", "two\nlines"):
        assert printable(text) == text == quotable(text)
    assert listed(["a", "b"]) == "a, b" and listed([]) == "nothing"
    assert one_line("a\n  b\tc") == "a b c"


def test_what_is_long_is_cut() -> None:
    assert len(quotable("x" * 10_000)) <= 610
    assert len(shown("x" * 10_000)) < 80
    assert listed(map(str, range(25))).endswith("19, and 5 more")


def test_logs_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        printable_logs()
        logging.getLogger("fusion.anything").warning("%s: cannot be read", "\x1b[31m.parquet")
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["\\x1b[31m.parquet: cannot be read"]
