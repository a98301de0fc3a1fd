"""CoNLL-style files: one token per line with its fields, an empty line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from fusion.data.delimited import check_text
from fusion.errors import UserError
from fusion.text import shortened

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DOCUMENT = "-DOCSTART-"  # begins the line that CoNLL-2003 has before each document
_SPACES = re.compile(r"[ \t]+")
_EXPECTED = (
    "Expected a token per line, its fields separated by tabs or spaces, and an empty line between sentences"
)


def read_conll(path: Path, content: bytes) -> tuple[list[dict[str, list[str]]], list[int]]:
    """The sentences: by column, which are named by their position ("0", "1" and so on), the fields of all tokens.

    Fields are separated by tabs where the line of the first token has one, else by spaces. `-DOCSTART-` lines are
    skipped and end a sentence. In a file with tabs, a line that begins with "# " and has no tab is a comment, as in
    CoNLL-U; it ends no sentence. A file with spaces has no comments, since "#" is a token there.

    Args:
        path: for messages.

    Returns:
        The sentences, and the number of the line of each one's first token.

    Raises:
        UserError: the text is not UTF-8, there is no token, or a line has another number of fields than the first
            one, or an empty one; names the line.
    """
    content = content.removeprefix(_BYTE_ORDER_MARK)
    check_text(path, content)
    # Not `splitlines`: other characters that end a line there may be part of a token.
    lines = content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    tabs = _has_tabs(lines)
    sentences: list[list[list[str]]] = []
    first_lines: list[int] = []
    is_open = False  # whether the next token continues the last sentence
    for number, line in enumerate(lines, start=1):
        line = line.rstrip(" \t")
        if not line or line.startswith(_DOCUMENT):
            is_open = False
            continue
        if tabs and _may_be_comment(line):
            continue
        fields = line.split("\t") if tabs else _SPACES.split(line.lstrip(" \t"))
        if sentences and len(fields) != len(sentences[0][0]):
            raise UserError(
                f"{path}, line {number}: '{shortened(' '.join(line.split()), 60)}' has {len(fields)} of the {len(sentences[0][0])} fields "
                f"that line {first_lines[0]} has\n{_EXPECTED}"
            )
        if "" in fields:
            raise UserError(
                f"{path}, line {number}: field {fields.index('')} (from 0) of '{shortened(' '.join(line.split()), 60)}' is empty\n{_EXPECTED}"
            )
        if not is_open:
            sentences.append([])
            first_lines.append(number)
            is_open = True
        sentences[-1].append(fields)
    if not sentences:
        only = f" (only {_DOCUMENT} lines)" if any(line.startswith(_DOCUMENT) for line in lines) else ""
        raise UserError(f"{path}: holds no tokens{only}\n{_EXPECTED}")
    names = [str(column) for column in range(len(sentences[0][0]))]
    return [
        dict(zip(names, map(list, zip(*sentence, strict=True)), strict=True)) for sentence in sentences
    ], first_lines


def _has_tabs(lines: Iterable[str]) -> bool:
    """Whether the first line that can only be a token's has a tab."""
    for line in lines:
        line = line.rstrip(" \t")
        if line and not line.startswith(_DOCUMENT) and not _may_be_comment(line):
            return "\t" in line
    return False


def _may_be_comment(line: str) -> bool:
    return line.startswith("# ") and "\t" not in line
