"""Strict readers of local text files as tables: CSV and TSV, JSON and JSON Lines, CoNLL."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusion.errors import UserError, first_line
from fusion.files import read_text
from fusion.tasks.columns import Table, counted
from fusion.text import listed, repeated, shortened

log = logging.getLogger(__name__)

_DOCUMENT = "-DOCSTART-"  # the line that CoNLL-2003 has before each document
_EXPECTED_TOKENS = "Expected a token per line, fields separated by tabs or spaces, an empty line between sentences"
_EXPECTED_OBJECTS = 'expected one JSON object per line, or in .json an array of objects, such as {"text": ...}'

csv.field_size_limit(sys.maxsize)


def record_table(records: Iterable[dict[str, Any]], where: str, lines: list[int] | None = None) -> Table:
    """Build a table from dicts; `lines` are the line numbers they were read from, if any."""
    rows = list(records)
    return Table(
        where=where,
        columns=tuple(dict.fromkeys(key for row in rows for key in row)),
        rows=len(rows),
        read=lambda name: [row.get(name) for row in rows],
        row_name=counted if lines is None else lambda row: f"line {lines[row]}",
    )


def read_delimited(path: Path, content: bytes, tabs: bool, quoting: str | None) -> Table:
    """Read CSV with RFC 4180 quotes, or TSV without quotes, since GLUE's are unbalanced. All values are strings.

    With `quoting`, `csv` parses quotes, and `none` treats them as literal characters. Raises UserError if the text is
    not UTF-8, a quote is not closed, or a row has too few or too many fields.
    """
    quoted = not tabs if quoting is None else quoting == "csv"
    text, delimiter = read_text(path, content), "\t" if tabs else ","
    fields, unclosed = _quoted_fields(text, delimiter, strict=not quoted)
    looks_quoted = not quoted and fields > 0 and unclosed is None
    if quoted and unclosed is not None:
        # The rest of the file would be read as one value, and rows would be lost silently.
        line = text.count("\n", 0, unclosed) + 1
        raise UserError(f"{path}, line {line}: a quote is not closed; close it, or double all quotes inside a field")
    file = io.StringIO(text, newline="")
    lines = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    names, *rows = [line for line in lines if line] or [[]]
    if not names:
        raise UserError(f"{path}: the file is empty; expected a line of column names, then rows")
    for number, row in enumerate(rows):
        if len(row) != len(names):
            hint = "; the file seems to use quotes: set data.quoting=csv to parse them" if looks_quoted else ""
            raise UserError(
                f"{path}, {counted(number)}: expected {len(names)} columns, got {len(row)}\n"
                f"Fields are separated by {'tabs' if tabs else 'commas'}, quotes are {'parsed' if quoted else 'literal characters'}{hint}"
            )
    if looks_quoted and quoting is None:
        log.warning(
            f"{path}: {fields} fields start and end with a quotation mark, which is read literally; set "
            "data.quoting=csv to parse quotes, or data.quoting=none to silence this warning"
        )
    if duplicates := repeated(names):
        raise UserError(f"{path}: duplicate column {listed(duplicates)}; expected each name once")
    table = record_table([dict(zip(names, row, strict=True)) for row in rows], str(path))
    return replace(table, columns=tuple(names), typed=False)


def _quoted_fields(text: str, delimiter: str, strict: bool) -> tuple[int, int | None]:
    """Return the number of fields in CSV quotes, and the offset of the first unclosed quote.

    With `strict`, the closing quote must end the field.
    """
    closing = rf'"(?=[{delimiter}\r\n]|\Z)' if strict else '"'
    count = 0
    for found in re.finditer(rf'(?:\A|[{delimiter}\r\n])"[^"]*(?:""[^"]*)*({closing})?', text):
        if found[1] is None:
            return count, text.index('"', found.start())
        count += 1
    return count, None


def read_json(path: Path, content: bytes) -> Table:
    """Read the objects of an array, else fall back to `read_jsonl`."""
    text = read_text(path, content)
    if not text.lstrip().startswith("["):
        return read_jsonl(path, content)
    records = _parse(text, str(path))
    return record_table([_checked(row, f"{path}, {counted(n)}") for n, row in enumerate(records)], str(path))


def read_jsonl(path: Path, content: bytes) -> Table:
    """Read one object per line; empty lines are skipped. Raises UserError for other lines, and duplicate keys."""
    records = {}
    for number, line in enumerate(read_text(path, content).split("\n"), start=1):
        if line.strip(" \t\r\v\f"):
            where = f"{path}, line {number}"
            records[number] = _checked(_parse(line, where), where)
    return record_table(records.values(), str(path), list(records))


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: got {type(record).__name__}; {_EXPECTED_OBJECTS}")
    return record


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:  # including duplicate keys, and numbers with thousands of digits
        reason = first_line(error)[:120].replace(": line 1 column", ", column")  # in .jsonl always line 1
        raise UserError(f"{where}: invalid JSON ({reason}); {_EXPECTED_OBJECTS}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"duplicate key {listed(repeated(name for name, _ in pairs))}")
    return found


def read_conll(path: Path, content: bytes) -> Table:
    """Read one token per line with its fields, and an empty line between sentences.

    A row is a sentence; a column is named by its index ("0", "1", ...) and has the fields of all tokens. Fields are
    separated by tabs if the first token's line has one, else by spaces. `-DOCSTART-` lines are skipped and end a
    sentence. In a file with tabs, a line that starts with "# " and has no tab is a comment, as in CoNLL-U; it does not
    end a sentence. A file with spaces has no comments, since "#" is a token there.

    Raises UserError if the text is not UTF-8, has no token, or a line's fields differ in number or are empty.
    """
    # Not `splitlines`, which also splits at characters that may be part of a token.
    text = read_text(path, content).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.rstrip(" \t") for line in text.split("\n")]
    tokens = (line for line in lines if line and not line.startswith(_DOCUMENT) and not _is_comment(line))
    tabs = "\t" in next(tokens, "")
    width = 0
    sentences: dict[int, list[list[str]]] = {}  # by the line number of the first token
    current: list[list[str]] | None = None
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith(_DOCUMENT):
            current = None
            continue
        if tabs and _is_comment(line):
            continue
        fields = line.split("\t") if tabs else re.split(r"[ \t]+", line.lstrip(" \t"))
        width = width or len(fields)
        if len(fields) != width or "" in fields:
            found = f"{len(fields) - fields.count('')} of {width} fields in '{shortened(' '.join(line.split()), 60)}'"
            raise UserError(f"{path}, line {number}: {found}\n{_EXPECTED_TOKENS}")
        if current is None:
            current = sentences.setdefault(number, [])
        current.append(fields)
    if not sentences:
        raise UserError(f"{path}: contains no tokens\n{_EXPECTED_TOKENS}")
    columns = [zip(*sentence, strict=True) for sentence in sentences.values()]
    records = [{str(n): list(values) for n, values in enumerate(column)} for column in columns]
    first_lines = list(sentences)
    table = record_table(records, str(path))
    return replace(table, typed=False, row_name=lambda row: f"sentence at line {first_lines[row]}")


def _is_comment(line: str) -> bool:
    return line.startswith("# ") and "\t" not in line
