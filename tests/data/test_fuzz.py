"""Damaged and hostile files: each is read rightly, or refused with its name in a line or two, quickly and in little room.

Seeds are kept, so that what fails fails again. What each form of damage must come to is in the examples; the rest are
mutations of good files, compared with a plain reader where there is one.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import Rows, load_rows
from fusion.errors import UserError
from tests.data.conftest import make_task

SECONDS = 5.0  # of computing for any one file
MEGABYTES = 400  # that all files of a test may take together
TASKS: dict[str, TaskConfig] = {
    "classes": make_task(name="classes", ignore_labels=[-1]),
    "values": make_task(name="values", kind="regression"),
    "choice": make_task(name="choice", kind="choice", choices="options"),
    "columns": make_task(name="columns", kind="choice", choices=["one", "two"]),
}
GOOD: dict[str, list[dict[str, Any]]] = {
    "classes": [{"text": f'row "{n}", é', "label": n % 2} for n in range(12)],
    "values": [{"text": f"row {n}", "label": n / 4} for n in range(12)],
    "choice": [{"text": f"row {n}", "options": ["a", "b", "ç"][: 2 + n % 2], "label": n % 2} for n in range(12)],
    "columns": [{"text": f"row {n}", "one": "a b", "two": "c,\nd", "label": n % 2} for n in range(12)],
}  # fmt: skip


class Fuzz:
    """Reads files and counts how each one ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ended: Counter[str] = Counter()

    @property
    def read(self) -> int:
        return self.ended["rows"] + self.ended["refused"]

    def __call__(self, task: TaskConfig, ending: str, content: bytes) -> Rows | UserError:
        """The result of reading a file: rows or a valid refusal; anything else raises."""
        path = self.folder / str(task.name) / f"train.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        started = time.process_time()
        try:
            outcome: Rows | UserError = load_rows(task, DataConfig(dir=str(self.folder)), "train")
            self.ended["rows"] += 1
            check_rows(task, outcome)  # type: ignore[arg-type]
        except UserError as error:
            outcome = error
            self.ended["refused"] += 1
            check_refusal(error, path)
        finally:
            assert time.process_time() - started < SECONDS, content[:200]
            path.unlink()
        return outcome


def check_rows(task: TaskConfig, rows: Rows) -> None:
    assert len(rows) > 0 and rows.labels is not None and len(rows.labels) == len(rows)
    assert all(type(text) is str for texts in rows.texts for text in texts)
    if task.kind == "classification":
        assert set(rows.labels) <= {0, 1}
    if task.kind == "choice":
        assert rows.choices is not None
        for options, label in zip(rows.choices, rows.labels, strict=True):
            assert len(options) >= 2 and 0 <= label < len(options)
            assert all(type(option) is str for option in options)


def check_refusal(error: UserError, path: Path) -> None:
    message = str(error)
    assert str(path) in message, message
    assert len(message.splitlines()) <= 2 and len(message) < 1500, message
    assert not any(name in message for name in ("Traceback", "object at 0x", "pyarrow.lib")), message
    message.encode()  # a log and status.json can hold it


@pytest.fixture
def fuzz(tmp_path: Path) -> Iterator[Fuzz]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield Fuzz(tmp_path / "data")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MEGABYTES


# --- examples with a known result ---------------------------------------------------------------------

GOOD_LINE = b'{"text": "a", "label": 0}\n'
JSONL: list[tuple[bytes, str | int]] = [  # after a good line: the message, or the number of rows
    (b'{"text": "b", "label": 1}', 2),
    (b'\xef\xbb\xbf{"text": "b", "label": 1}', "line 2: invalid JSON"),
    (b'{"text": "b", "label": 1}\r\n\r\n \t\n', 2),
    (b'{"text": "b", "label": 1}\r{"text": "c", "label": 1}', "line 2: invalid JSON (Extra data"),
    (b'{"text": "b", "label": 1', "line 2: invalid JSON"),
    (b'{"text": "b", "label": 1}}', "line 2: invalid JSON (Extra data"),
    (b"{'text': 'b', 'label': 1}", "line 2: invalid JSON"),
    (b'{"text": "b", "text": "c", "label": 1}', 'line 2: invalid JSON (duplicate key text)'),
    (b'{"text": "b", "label": 1, "more": {"x": 1, "x": 2}}', 'line 2: invalid JSON (duplicate key x)'),
    (b"[" * 100_000, "line 2: invalid JSON (maximum recursion"),
    (b'{"text": ' * 100_000, "line 2: invalid JSON (maximum recursion"),
    (b'{"text": "b", "label": ' + b"[" * 100 + b"]" * 100 + b"}", "line 2: label is [["),
    (b'{"text": "b", "label": ' + b"[" * 900 + b"]" * 900 + b"}", "line 2: "),
    (b'{"text": ' + b"[" * 900 + b"]" * 900 + b', "label": 1}', "line 2: "),
    (b'{"text": "b", "label": ' + b"9" * 5000 + b"}", "line 2: invalid JSON (Exceeds the limit"),
    (b'{"text": "b", "label": ' + b"9" * 400 + b"}", "line 2: label is 9999"),
    (b'{"text": "b", "label": 1.0}', 2),
    (b'{"text": "b", "label": 1e400}', "line 2: label is inf"),
    (b'{"text": "b", "label": NaN}', "line 2: label is nan"),
    (b'{"text": "b", "label": -Infinity}', "line 2: label is -inf"),
    (b'{"text": "b", "label": 1.5}', "line 2: label is 1.5"),
    (b'{"text": "b", "label": 2}', "line 2: label is 2 (int); expected one of 0 (cat), 1 (dog)"),
    (b'{"text": "b", "label": "1"}', "label is '1' (str)"),
    (b'{"text": "b", "label": true}', "label is True (bool)"),
    (b'{"text": "b", "label": null}', "line 2: label is null"),
    (b'{"text": "b", "label": {"a": 1}}', "line 2: label is {'a': 1} (dict)"),
    (b'{"text": "b", "label": "' + b"x" * 1_000_000 + b'"}', "line 2: label is 'xx"),
    (b'{"text": "b"}', "line 2: label is null"),
    (b'{"label": 1}', "line 2: text is null"),
    (b'{"text": NaN, "label": 1}', "line 2: text is nan (float)"),
    (b'{"text": "\\ud800", "label": 1}', "line 2: text has a lone surrogate"),
    (b'{"text": "\\ud83d\\ude00", "label": 1}', 2),
    (b'{"\\ud800": 1, "text": 3, "label": 1}', "line 2: text is 3 (int)"),
    (b'{"text": "a\\u0000b", "label": 1}', 2),
    (b'{"text": "a\x00b", "label": 1}', "line 2: invalid JSON (Invalid control character"),
    (b'{"text": "\xff", "label": 1}', "line 2: not UTF-8"),
    (b"\x00", "line 2: invalid JSON"),
    (b"null", "expected one JSON object"),
    (b'"text"', "expected one JSON object"),
    (b'{"text": "' + b"x" * 50_000_000 + b'", "label": 1}', 2),
    (b'{"text": "' + b"x" * 50_000_000, "line 2: invalid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), JSONL, ids=[f"{n}-{line[:24]!r}" for n, (line, _) in enumerate(JSONL)])
def test_a_line_of_json(fuzz: Fuzz, line: bytes, expected: str | int) -> None:
    came = fuzz(make_task(), "jsonl", GOOD_LINE + line)
    if isinstance(expected, int):
        assert isinstance(came, Rows) and len(came) == expected
    else:
        assert isinstance(came, UserError) and expected in str(came)


def test_many_names_and_names_with_line_breaks(fuzz: Fuzz) -> None:
    many = {f"column {n}": n for n in range(5000)}
    odd = {"a\nb": 1, "\ud800": 2, "x" * 100_000: 3, "": 4}
    for record in (many, odd):
        came = fuzz(make_task(), "jsonl", json.dumps(record).encode())
        assert isinstance(came, UserError) and "no column label" in str(came)
    assert "'a\\nb'" in str(came)


CSV: list[tuple[bytes, str | int]] = [
    (b"text,label\na,0\nb,1\n", 2),
    (b"\xef\xbb\xbftext,label\r\na,0\r\nb,1", 2),
    (b"text,label\ra,0\rb,1\r", 2),
    (b"", "the file is empty"),
    (b"\xef\xbb\xbf", "the file is empty"),
    (b"\n\n", "the file is empty"),
    (b"text,label", "contains no rows"),
    (b"text,label\n", "contains no rows"),
    (b"text,label\na,0\nb\n", "row 2: expected 2 columns, got 1"),
    (b"text,label\na,0\n\nb,1,1\n", "row 2: expected 2 columns, got 3"),
    (b"text,label\n" + b"a,0\n" * 200_000 + b"b\n", "row 200001: expected"),
    (b'text,label\na,0\n"b,1\n', "line 3: a quote is not closed"),
    (b'label,text\n0,"b\n1,c\n1,d\n', "line 2: a quote is not closed"),
    (b'label,text\n0,"b""', "line 2: a quote is not closed"),
    (b'"text', "line 1: a quote is not closed"),
    (b'text,label\n5" pipe,0\n"a ""b""\n, c",1\n', 2),
    (b'text,label\n"",0\n"""",1\n', 2),
    (b"text;label\na;0\n", "no column label; found text;label"),
    (b"text\tlabel\na\t0\n", "no column label"),
    ("text,label\né,0\n".encode("latin-1"), "line 2: not UTF-8"),
    ("text,label\na,0\n".encode("utf-16"), "line 1: not UTF-8"),
    ("text,label\na,0\n".encode("utf-16-le"), "train.csv"),
    (b"t\xffxt,label\na,0\n", "line 1: not UTF-8"),
    (b"text,text,label\na,b,0\n", "duplicate column text"),
    (b"text,label\na,0\nb,x\n", "row 2: label is 'x' (str)"),
    (b"text,label\na,2020-01-01\n", "row 1: label is '2020-01-01' (str)"),
    (b"text,label\na,99999999999999999999\n", "row 1: label is '99999999999999999999' (str)"),
    (b"text,label\na,\n", "row 1: label is null"),
    (b"text,label\n" + b"a" * 3_000_000 + b",1\n", 1),
    (b"text,label\n" + b"a,0\n" * 400_000 + b"b,x\n", "row 400001: label is 'x' (str)"),
    (b"text," * 20_000 + b"label\n", "duplicate column text"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "expected"), CSV, ids=[f"{n}-{c[:24]!r}" for n, (c, _) in enumerate(CSV)])
def test_a_csv_file(fuzz: Fuzz, content: bytes, expected: str | int) -> None:
    came = fuzz(make_task(), "csv", content)
    if isinstance(expected, int):
        assert isinstance(came, Rows) and len(came) == expected
    else:
        assert isinstance(came, UserError) and expected in str(came)


def test_quotes_mean_nothing_in_a_tsv_file(fuzz: Fuzz) -> None:
    came = fuzz(make_task(), "tsv", b'text\tlabel\n"a\t0\nb"\t1\n"\t0\n')
    assert isinstance(came, Rows) and came.texts == [('"a',), ('b"',), ('"',)]
    assert isinstance(fuzz(make_task(), "tsv", b"text\tlabel\na\t0\t\n"), UserError)


def column(values: list[Any], kind: Any = None) -> pyarrow.Array:
    return pyarrow.array(values, kind)


PARQUET: dict[str, tuple[dict[str, Any], str | None]] = {  # beside two good columns; None: it is read
    "text of another width": ({"text": column(["a", "b"], pyarrow.large_string())}, None),
    "text as a dictionary": ({"text": column(["a", "a"]).dictionary_encode()}, None),
    "labels of one byte": ({"label": column([0, 1], pyarrow.int8())}, None),
    "labels as floats": ({"label": column([0.0, 1.0])}, None),
    "labels as a dictionary": ({"label": column([0, 1]).dictionary_encode()}, None),
    "a column that nobody reads": ({"more": column([2**50, 0], pyarrow.timestamp("s"))}, None),
    "bytes": ({"text": column([b"a", b"b"])}, "row 1: text is b'a' (bytes)"),
    "dates": ({"text": column([datetime.date(2020, 1, 1)] * 2)}, "row 1: text is datetime.date"),
    "decimals": ({"label": column([decimal.Decimal("1")] * 2)}, "row 1: label is Decimal"),
    "times beyond Python's": (
        {"label": column([0, 2**50], pyarrow.timestamp("s"))},
        "column label cannot be read as timestamp",
    ),
    "nanoseconds": ({"label": column([1, 2], pyarrow.duration("ns"))}, "label"),
    "lists of nothing": ({"text": column([None, []], pyarrow.list_(pyarrow.null()))}, "row 1: text is null"),
    "nested": ({"text": column([{"a": [1]}, {"a": None}])}, "row 1: text is {'a': [1]} (dict)"),
    "nothing at all": ({"text": pyarrow.nulls(2)}, "row 1: text is null"),
    "maps": (
        {"label": column([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int8()))},
        "row 1: label is [('a', 1)] (list)",
    ),
    "bools for classes": ({"label": column([True, False])}, None),
}


@pytest.mark.parametrize("name", PARQUET)
def test_a_parquet_file_of_odd_columns(fuzz: Fuzz, name: str) -> None:
    columns, expected = PARQUET[name]
    table = pyarrow.table({"text": column(["a", "b"]), "label": column([0, 1])} | columns)
    came = fuzz(make_task(), "parquet", parquet(table))
    assert isinstance(came, Rows) if expected is None else isinstance(came, UserError) and expected in str(came)


def test_bytes_declared_as_text(fuzz: Fuzz) -> None:
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    came = fuzz(make_task(), "parquet", parquet(pyarrow.table({"text": text, "label": column([0, 1])})))
    assert isinstance(came, UserError) and "column text cannot be read as string" in str(came)


LABELS: list[tuple[str, Any, bool]] = [
    ("values", 1.5, True),
    ("values", -3, True),
    ("values", True, False),
    ("values", "1.5", False),
    ("values", None, False),
    ("values", 1e39, False),
    ("values", 10**400, False),
    ("values", -(10**4000), False),
    ("values", [1], False),
    ("classes", -1, True),
    ("classes", 1, True),
    ("classes", 10**400, False),
    ("classes", -2, False),
    ("choice", 1, True),
    ("choice", 2, False),
    ("choice", -1, False),
    ("choice", True, False),
    ("choice", "a", False),
    ("choice", None, False),
]


@pytest.mark.parametrize(("name", "label", "good"), LABELS, ids=[f"{n}-{str(v)[:12]}" for n, v, _ in LABELS])
def test_a_label(fuzz: Fuzz, name: str, label: Any, good: bool) -> None:
    records = [GOOD[name][0], {**GOOD[name][0], "label": label}]
    came = fuzz(TASKS[name], "jsonl", "\n".join(map(json.dumps, records)).encode())
    assert isinstance(came, Rows) == good
    assert good or "line 2: label" in str(came)


@pytest.mark.parametrize(
    "options", [[], ["a"], "ab", None, {"a": "b"}, ["a", 1], ["a", None], [["a"], ["b"]], ["a", "\ud800"]]
)
def test_invalid_choices(fuzz: Fuzz, options: Any) -> None:
    record = {"text": "t", "options": options, "label": 0}
    came = fuzz(TASKS["choice"], "jsonl", (json.dumps(GOOD["choice"][0]) + "\n" + json.dumps(record)).encode())
    assert isinstance(came, UserError) and "line 2: " in str(came)


# --- mutations ----------------------------------------------------------------------------------------

WORDS = [
    b"", b"\0", b"\n", b"\r", b"\r\n", b",", b"\t", b'"', b'""', b"{", b"}", b"[", b"]", b":", b"\\", b"\\u0000",
    b"\\ud800", b"\xff", b"\xef\xbb\xbf", b"null", b"true", b"NaN", b"-1", b"1e999", b"9" * 500, b"text", b"label",
    b"\xe2\x80\xa8", b" " * 300, b"[" * 2000, b"=cmd|' /C calc'!A0",
]  # fmt: skip


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to four small changes."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice((1, 1, 2, 8, 40)))
        piece = content[start:end]
        change = draw.randrange(6)
        if change == 0 and piece:
            piece = bytes([piece[0] ^ 1 << draw.randrange(8)]) + piece[1:]
        elif change == 1:
            piece = b""
        elif change == 2:
            piece = piece * draw.choice((2, 3, 50))
        elif change == 3:
            piece += draw.choice(WORDS)
        elif change == 4:
            piece = draw.choice(WORDS)
        else:
            content, piece = content[:end], content[start:end] if draw.random() < 0.5 else piece
        content = content[:start] + piece + content[end:]
    return content


def parquet(table: pyarrow.Table, compression: str = "snappy") -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content, compression=compression, write_page_checksum=True)
    return content.getvalue()


def written(name: str, ending: str, draw: random.Random) -> bytes:
    records = GOOD[name]
    if ending == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in records).encode()
    if ending == "parquet":
        return parquet(pyarrow.Table.from_pylist(records), draw.choice(("snappy", "none", "zstd", "gzip")))
    text = io.StringIO()
    tabs = ending == "tsv"
    writer = csv.DictWriter(
        text, list(records[0]), delimiter="\t" if tabs else ",", quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
        quotechar=None if tabs else '"', lineterminator=draw.choice(("\n", "\r\n")),
    )  # fmt: skip
    writer.writeheader()
    for row in records:
        writer.writerow({key: str(value).replace("\n", " ") if tabs else value for key, value in row.items()})
    return text.getvalue().encode()


def plain_jsonl(content: bytes) -> list[str]:
    lines = [line for line in content.decode("utf-8-sig").split("\n") if line.strip(" \t\r\n\v\f")]
    return [json.loads(line)["text"] for line in lines]


def plain_csv(content: bytes) -> list[str]:
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    return [row["text"] for row in rows]


PLAIN: dict[str, Callable[[bytes], list[str]]] = {"jsonl": plain_jsonl, "csv": plain_csv}
KINDS = [
    *((name, "jsonl") for name in TASKS),
    *((name, ending) for name in ("classes", "values") for ending in ("csv", "tsv")),
    ("columns", "csv"),
    *((name, "parquet") for name in TASKS),
]


def run(fuzz: Fuzz, seeds: range) -> None:
    compared = 0
    for seed in seeds:
        draw = random.Random(seed)
        name, ending = KINDS[seed % len(KINDS)]
        content = mutate(written(name, ending, draw), draw)
        try:
            came = fuzz(TASKS[name], ending, content)
            if isinstance(came, Rows) and not came.ignored and ending in PLAIN:
                assert [texts[0] for texts in came.texts] == PLAIN[ending](content)
                compared += 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {name} as {ending}: {content[:3000]!r}") from error
    assert fuzz.read == len(seeds)
    # Neither everything refused nor everything taken, or the mutations show nothing.
    assert min(fuzz.ended["rows"], fuzz.ended["refused"]) > len(seeds) // 10
    assert compared > len(seeds) // 20


def test_mutated_files(fuzz: Fuzz) -> None:
    run(fuzz, range(1500))


@pytest.mark.slow
def test_many_more_mutated_files(fuzz: Fuzz) -> None:
    run(fuzz, range(1500, 101_500))


def test_every_cut_of_a_parquet_file(fuzz: Fuzz) -> None:
    content = parquet(pyarrow.Table.from_pylist(GOOD["choice"]))
    for end in range(0, len(content), 3):
        assert isinstance(fuzz(TASKS["choice"], "parquet", content[:end]), UserError)
    assert fuzz.read > 300


def test_every_flipped_byte_of_a_parquet_page_is_detected(fuzz: Fuzz) -> None:
    """Pages carry checksums where their writer made them; the footer has none."""
    whole = fuzz(TASKS["choice"], "parquet", content := parquet(pyarrow.Table.from_pylist(GOOD["choice"])))
    assert isinstance(whole, Rows)
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for place in range(pages):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        came = fuzz(TASKS["choice"], "parquet", bytes(flipped))
        assert isinstance(came, UserError) or came.fingerprint == whole.fingerprint
    assert fuzz.read == pages + 1 > 100
