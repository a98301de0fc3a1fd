"""CoNLL-style files: one token per line with its fields, an empty line between sentences."""

from __future__ import annotations

import re
from pathlib import Path

from fusion.data.files import read_text
from fusion.errors import UserError
from fusion.text import shortened

_DOCUMENT = "-DOCSTART-"  # the line that CoNLL-2003 has before each document
_EXPECTED = "Expected a token per line, fields separated by tabs or spaces, an empty line between sentences"


def read_conll(path: Path, content: bytes) -> tuple[list[dict[str, list[str]]], list[int]]:
    """The sentences: for each column, named by its position ("0", "1", ...), the fields of all tokens.

    Fields are separated by tabs if the first token's line has one, else by spaces. `-DOCSTART-` lines are skipped and
    end a sentence. In a file with tabs, a line that starts with "# " and has no tab is a comment, as in CoNLL-U; it
    does not end a sentence. A file with spaces has no comments, since "#" is a token there.

    Returns:
        The sentences, and the line number of each one's first token.

    Raises:
        UserError: the text is not UTF-8, there is no token, or a line has an empty field or another number of fields
            than the first one; names the line.
    """
    # Not `splitlines`: other characters that end a line there may be part of a token.
    text = read_text(path, content).replace("\r\n", "\n").replace("\r", "\n")
    lines = [line.rstrip(" \t") for line in text.split("\n")]
    tokens = (line for line in lines if line and not line.startswith(_DOCUMENT) and not _is_comment(line))
    tabs = "\t" in next(tokens, "")
    sentences: list[list[list[str]]] = []
    first_lines: list[int] = []
    is_open = False  # whether the next token continues the last sentence
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith(_DOCUMENT):
            is_open = False
            continue
        if tabs and _is_comment(line):
            continue
        fields = line.split("\t") if tabs else re.split(r"[ \t]+", line.lstrip(" \t"))
        width = len(sentences[0][0]) if sentences else len(fields)
        if len(fields) != width or "" in fields:
            found = f"{len(fields) - fields.count('')} of {width} fields in '{shortened(' '.join(line.split()), 60)}'"
            raise UserError(f"{path}, line {number}: {found}\n{_EXPECTED}")
        if not is_open:
            sentences.append([])
            first_lines.append(number)
            is_open = True
        sentences[-1].append(fields)
    if not sentences:
        raise UserError(f"{path}: holds no tokens\n{_EXPECTED}")
    columns = [zip(*sentence, strict=True) for sentence in sentences]
    return [{str(n): list(values) for n, values in enumerate(column)} for column in columns], first_lines


def _is_comment(line: str) -> bool:
    return line.startswith("# ") and "\t" not in line
