"""CSV and TSV files, each column typed by all of its values."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fusion.data.files import read_text
from fusion.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

_MAX_BLOCK = 2**31 - 2  # of pyarrow's reader


def read_delimited(
    path: Path, content: bytes, tabs: bool, text_columns: Iterable[str], quoting: str | None = None
) -> pyarrow.Table:
    """CSV with RFC 4180 quotes; TSV without quotes, as GLUE's files are (theirs do not close).

    Args:
        tabs: whether fields are separated by tabs; else by commas.
        text_columns: columns that hold text even if all of it is numeric.
        quoting: `csv` reads RFC 4180 quotes, `none` keeps quotes as text; None: as above.

    Raises:
        UserError: the text is not UTF-8, a quote is not closed, or a row has too few or too many fields; names the
            line or row.
    """
    import pyarrow
    import pyarrow.csv

    quoted = not tabs if quoting is None else quoting == "csv"
    content = read_text(path, content).encode()
    if not content.strip():
        raise UserError(f"{path}: the file is empty; expected a line of column names, then rows")
    fields, unclosed = _quoted_fields(content, b"\t" if tabs else b",", strict=not quoted)
    looks_quoted = not quoted and fields > 0 and unclosed is None
    if quoted and unclosed is not None:
        line = content.count(b"\n", 0, unclosed) + 1
        # pyarrow would read the rest of the file as one value, and rows would be lost silently.
        raise UserError(f"{path}, line {line}: a quote is not closed; close it, or double the quotes in a field")
    if not content.endswith((b"\n", b"\r")):
        content += b"\n"  # without it, pyarrow ignores a file of column names only
    try:
        table = pyarrow.csv.read_csv(
            pyarrow.BufferReader(content),
            # In one block and by one thread: a column's type is then that of all its values, a row may be longer
            # than a block, and an error names its row.
            pyarrow.csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, _MAX_BLOCK)),
            pyarrow.csv.ParseOptions(
                delimiter="\t" if tabs else ",", quote_char='"' if quoted else False, newlines_in_values=quoted
            ),
            pyarrow.csv.ConvertOptions(
                column_types={name: pyarrow.string() for name in text_columns},
                null_values=[""],
                strings_can_be_null=False,
            ),
        )
    except pyarrow.ArrowInvalid as error:
        # pyarrow counts the line of column names.
        reason = re.sub(r"Row #(\d+): ", lambda row: f"row {int(row[1]) - 1}: ", first_line(error))[:150]
        hint = "; the file looks quoted: to read it as such, set data.quoting=csv" if looks_quoted else ""
        raise UserError(
            f"{path}: cannot be read as {'tsv' if tabs else 'csv'}: {reason}\n"
            f"Fields are separated by {'tabs' if tabs else 'commas'}, quotes are {'read' if quoted else 'text'}{hint}"
        ) from error
    if looks_quoted and quoting is None:
        log.warning(
            "%s: %d fields start and end with a quotation mark, which is read as part of the text; set "
            "data.quoting=csv to read them as quoted fields, or data.quoting=none to silence this warning",
            path,
            fields,
        )
    return table


def _quoted_fields(content: bytes, delimiter: bytes, strict: bool) -> tuple[int, int | None]:
    """The number of fields in CSV quotes, and the offset of the first that is not closed.

    Args:
        strict: whether the closing quote must end the field.
    """
    closing = rb'"(?=[%b\r\n]|\Z)' % delimiter if strict else b'"'
    count = 0
    for found in re.finditer(rb'(?:\A|[%b\r\n])"[^"]*(?:""[^"]*)*(%b)?' % (delimiter, closing), content):
        if found[1] is None:
            return count, content.index(b'"', found.start())
        count += 1
    return count, None
