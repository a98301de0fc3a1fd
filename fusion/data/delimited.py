"""CSV and TSV files: their types by the whole of each column, what is wrong in them by its line or row."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

_LARGEST_BLOCK = 2**31 - 2  # of pyarrow's reader
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# A field in quotes, from where a field can begin; the last group is empty where the quotes never close.
_QUOTED = {
    ",": re.compile(rb'(?:\A|[,\r\n])"[^"]*(?:""[^"]*)*("?)'),
    "\t": re.compile(rb'(?:\A|[\t\r\n])"[^"]*(?:""[^"]*)*("?)'),
}
# The same in a file whose quotes may be text; the last group is empty where it is no field in quotes.
_LOOKS_QUOTED = {
    ",": re.compile(rb'(?:\A|[,\r\n])"[^"]*(?:""[^"]*)*((?:"(?=[,\r\n]|\Z))?)'),
    "\t": re.compile(rb'(?:\A|[\t\r\n])"[^"]*(?:""[^"]*)*((?:"(?=[\t\r\n]|\Z))?)'),
}
_ROW = re.compile(r"Row #(\d+): ")


def read_delimited(
    path: Path, content: bytes, tabs: bool, text_columns: Iterable[str], quoting: str | None = None
) -> pyarrow.Table:
    """CSV with RFC 4180 quotes; TSV without any, as GLUE's files are (their quotes do not close).

    Args:
        path: for messages.
        tabs: whether fields are separated by tabs; else by commas.
        quoting: `csv` reads RFC 4180 quotes, `none` takes quotes for text; None: as above.
        text_columns: columns that hold text even where all of it looks like numbers.

    Raises:
        UserError: the text is not UTF-8, quotes do not close, or a row does not fit; names the line or row.
    """
    import pyarrow
    import pyarrow.csv

    delimiter = "\t" if tabs else ","
    quoted = not tabs if quoting is None else quoting == "csv"
    content = content.removeprefix(_BYTE_ORDER_MARK)
    check_text(path, content)
    looks_quoted = 0 if quoted else _quoted_fields(content, delimiter)
    if quoted:
        _check_quotes(path, content, delimiter)
    if not content.strip():
        raise UserError(
            f"{path}: the file is empty; expected a line with the names of the columns, then rows"
        )
    if not content.endswith((b"\n", b"\r")):
        content += b"\n"  # without which pyarrow takes the names of the columns alone for nothing
    try:
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(content),
            # In one block and by one thread: a column's type is then that of all its values, a row may be longer
            # than a block, and an error says its row.
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=min(len(content) + 1, _LARGEST_BLOCK)
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
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
        name = "tabs" if tabs else "commas"
        raise UserError(
            f"{path}, {where}: cannot be read as {'tsv' if tabs else 'csv'}: {reason[:120]}\n"
            f"Fields are separated by {name}, and {_rule(name, quoted, looks_quoted)}"
        ) from error
    if looks_quoted and quoting is None:
        log.warning(
            "%s: %d fields begin and end with a quotation mark, which is read as part of the text; "
            "data.quoting=csv reads such fields as quoted (data.quoting=none keeps them without this warning)",
            path,
            looks_quoted,
        )
    return table


def _rule(name: str, quoted: bool, looks_quoted: int) -> str:
    if quoted:
        return f"a field with {name} or lines in it is in quotes"
    if looks_quoted:
        return f"quotes are text; the file looks quoted ({looks_quoted} fields): data.quoting=csv reads it so"
    return "quotes are text"


def _quoted_fields(content: bytes, delimiter: str) -> int:
    """How many fields are in quotes as CSV has them; 0 where one that begins with a quote is not, as in GLUE's files."""
    count = 0
    for found in _LOOKS_QUOTED[delimiter].finditer(content):
        if not found[1]:
            return 0
        count += 1
    return count


def check_text(path: Path, content: bytes) -> None:
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error


def _check_quotes(path: Path, content: bytes, delimiter: str) -> None:
    """What follows a quote that never closes would all be one value, and rows be lost without a word."""
    for found in _QUOTED[delimiter].finditer(content):
        if not found[1]:
            begin = content.index(b'"', found.start())
            line = content.count(b"\n", 0, begin) + 1
            raise UserError(
                f"{path}, line {line}: a quote begins a field and never closes; close it, or double the quotes in a field"
            )
