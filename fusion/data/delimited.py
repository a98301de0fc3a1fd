"""CSV and TSV files: their types by the whole of each column, what is wrong in them by its line or row."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

_LARGEST_BLOCK = 2**31 - 2  # of pyarrow's reader
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A field in quotes, from where a field can begin; the last group is empty where the quotes never close.
_QUOTED = re.compile(rb'(?:\A|[,\r\n])"[^"]*(?:""[^"]*)*("?)')
_ROW = re.compile(r"Row #(\d+): ")


def read_delimited(path: Path, text_columns: Iterable[str]) -> pyarrow.Table:
    """CSV with RFC 4180 quotes; TSV without any, as GLUE's files are (their quotes do not close).

    Args:
        text_columns: columns that hold text even where all of it looks like numbers.

    Raises:
        UserError: the text is not UTF-8, quotes do not close, or a row does not fit; names the line or row.
        OSError: the file cannot be read.
    """
    import pyarrow
    import pyarrow.csv

    tabs = path.suffix == ".tsv"
    content = path.read_bytes().removeprefix(_BYTE_ORDER_MARK)
    _check_text(path, content)
    if not tabs:
        _check_quotes(path, content)
    if not content.strip():
        raise UserError(
            f"{path}: the file is empty; expected a line with the names of the columns, then rows"
        )
    if not content.endswith((b"\n", b"\r")):
        content += b"\n"  # without which pyarrow takes the names of the columns alone for nothing
    try:
        return pyarrow.csv.read_csv(
            pyarrow.BufferReader(content),
            # In one block and by one thread: a column's type is then that of all its values, a row may be longer
            # than a block, and an error says its row.
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=min(len(content) + 1, _LARGEST_BLOCK)
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter="\t" if tabs else ",",
                quote_char=False if tabs else '"',
                newlines_in_values=not tabs,
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pyarrow.string() for name in text_columns},
                null_values=[""],
                strings_can_be_null=False,
            ),
        )
    except pyarrow.ArrowInvalid as error:
        said = first_line(error)
        found = _ROW.search(said)
        if found is None:
            raise
        row, reason = int(found[1]) - 1, said[found.end() :]  # the names of the columns are its first row
        where = f"row {row}" if row else "the names of the columns"
        raise UserError(
            f"{path}, {where}: cannot be read as {path.suffix[1:]}: {reason[:120]}\n"
            f"Fields are parted by {'tabs, and quotes mean nothing' if tabs else 'commas, and one with commas or lines in it stands in quotes'}"
        ) from error


def _check_text(path: Path, content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error


def _check_quotes(path: Path, content: bytes) -> None:
    """What follows a quote that never closes would all be one value, and rows be lost without a word."""
    for found in _QUOTED.finditer(content):
        if not found[1]:
            begin = content.index(b'"', found.start())
            line = content.count(b"\n", 0, begin) + 1
            raise UserError(
                f"{path}, line {line}: a quote begins a field and never closes; close it, or double the quotes in a field"
            )
