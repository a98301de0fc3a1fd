from __future__ import annotations

import ast
import io
import logging
import sys
from pathlib import Path

import pytest

from fusion.store.__main__ import main as store_program
from fusion.store.layout import HEAD, WEIGHTS
from fusion.text import listed, printable, printable_output, shortened, shown
from tests.store.conftest import build, put

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
def test_untrusted_text_is_escaped(text: str) -> None:
    for safe in (printable(text), shortened(text), shown(text), listed([text, text])):
        assert safe.isprintable(), ascii(safe)


def test_plain_text_is_kept() -> None:
    for text in ("mnli", "Straße 東京 🙂", "two\nlines"):
        assert printable(text) == text == shortened(text)
    assert listed(["a", "b"]) == "a, b" and listed([]) == "nothing"


def test_long_text_is_truncated() -> None:
    assert len(shortened("x" * 10_000)) == 300
    assert len(shown("x" * 10_000)) < 80
    assert listed(map(str, range(25))).endswith("19, and 5 more")


def test_logs_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        printable_output()
        logging.getLogger("fusion.anything").warning("%s: cannot be read", "\x1b[31m.parquet")
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["\\x1b[31m.parquet: cannot be read"]


def test_a_stdout_without_unicode_gets_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    factory = logging.getLogRecordFactory()
    printable_output()
    logging.setLogRecordFactory(factory)
    print("Zürich", flush=True)
    assert stdout.buffer.getvalue() == b"Z\\xfcrich\n"


def test_only_a_few_modules_print_directly() -> None:
    """Everything else prints with `say`, which makes text from outside printable."""
    package = Path(__file__).parents[1] / "fusion"
    found = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }
    # app: messages, through `printable`
    assert found == {"cli/console.py", "cli/app.py"}


def test_names_in_a_ranking_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    from fusion.rank import _print

    evil = "\x1b[2Jgone"
    ranking = {
        "task": {"name": evil},
        "seconds": {evil: 1.0},
        "sources": [{"name": evil, "scores": {}, "ranks": {}, "mean_rank": None}],
        "agreement": {f"{evil}/b": {"kendall": None, "spearman": 0.5}},
        "fusion": {"name": evil, "sources": 2, "seconds": 3.0},
        "ranking": evil,
        "methods": {},
    }
    _print(ranking, "", 3)
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\\x1b[2Jgone") >= 5


def test_names_in_a_manifest_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2Jgone"
    manifest = build(
        "films",
        "fusion",
        task={"name": evil, "kind": "classification", "labels": [evil, "b"]},
        sources=[{"name": "a", "hash": "b"}],
        files={WEIGHTS: {"sha256": "1" * 64, "bytes": 10}, HEAD: {"sha256": "2" * 64, "bytes": 20}},
    )
    put(tmp_path / "films", manifest)
    assert store_program(["show", "films", f"store={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("\\x1b[2Jgone") >= 2
