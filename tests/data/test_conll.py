"""CoNLL-style files: sentences of tokens with fields, and what is refused."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from fusion.data.formats import read_conll
from fusion.data.tables import read_table
from fusion.errors import UserError

PATH = Path("train.conll")
CONLL = b"""-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
# SYM O O

Peter NNP B-NP B-PER
"""
WNUT = b"@paulwalk\tO\n#Hashtag\tO\n\n\xe2\x80\x8b\tO\nNew York\tB-location\n"


def read(content: bytes) -> list[dict[str, list[str]]]:
    table = read_conll(PATH, content)
    columns = {name: table.read(name) for name in table.columns}
    return [{name: values[row] for name, values in columns.items()} for row in range(table.rows)]


def test_fields_by_position_and_lines() -> None:
    sentences, table = read(CONLL), read_conll(PATH, CONLL)
    assert [table.row_name(row) for row in range(2)] == ["sentence at line 3", "sentence at line 7"]
    assert [sentence["0"] for sentence in sentences] == [["EU", "rejects", "#"], ["Peter"]]
    assert [sentence["3"] for sentence in sentences] == [["B-ORG", "O", "O"], ["B-PER"]]
    assert {*sentences[0]} == {*sentences[1]} == {"0", "1", "2", "3"}


def test_tabs_keep_spaces_and_invisible_characters() -> None:
    first, second = read(WNUT)
    assert first == {"0": ["@paulwalk", "#Hashtag"], "1": ["O", "O"]}
    assert second == {"0": ["\u200b", "New York"], "1": ["O", "B-location"]}


@pytest.mark.parametrize(
    "content",
    [
        CONLL.replace(b"\n", b"\r\n"),
        CONLL.replace(b"\n", b"\r"),
        b"\xef\xbb\xbf" + CONLL,
        CONLL.rstrip(b"\n"),
        CONLL + b"\n\n \n\t\n",
        b"\n\n" + CONLL.replace(b"\n\n", b"\n \t\n\n\n"),
        CONLL.replace(b"rejects VBZ B-VP O", b" rejects  VBZ\tB-VP   O \t"),
        CONLL.replace(b" -X- -X- O", b""),
    ],
    ids=["crlf", "cr", "bom", "no last newline", "empty lines", "spaces", "runs of spaces", "docstart alone"],
)
def test_the_same_sentences_however_they_are_written(content: bytes) -> None:
    assert read(content) == read(CONLL)


def test_unusual_line_separators_do_not_end_a_line() -> None:
    (sentence,) = read("a\u2028b O\nc\x85d\x0be O\nf\u00a0g O\n".encode())
    assert sentence == {"0": ["a\u2028b", "c\x85d\x0be", "f\u00a0g"], "1": ["O", "O", "O"]}


def test_docstart_without_empty_lines_ends_a_sentence() -> None:
    assert [sentence["0"] for sentence in read(b"a O\n-DOCSTART- O\nb O\n")] == [["a"], ["b"]]


def test_comments_exist_only_in_files_with_tabs() -> None:
    commented = b"# text = a b\na\tO\n# in between\nb\tO\n\n# newdoc id = 1\n\nc\tO\n"
    assert [sentence["0"] for sentence in read(commented)] == [["a", "b"], ["c"]]
    assert [sentence["0"] for sentence in read(b"# O\na O\n")] == [["#", "a"]]
    with pytest.raises(UserError, match=r"line 2: 1 of 2 fields in '#a'"):
        read(b"b\tO\n#a\n")  # a token that has lost its tag


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no tokens\nExpected a token per line"),
        (b"\n \n\r\n", "contains no tokens\n"),
        (b"-DOCSTART- -X- O O\n\n-DOCSTART- -X- O O\n", "contains no tokens"),
        (b"a O\nb O\nc\n", r"line 3: 1 of 2 fields in 'c'"),
        (b"\n\na O\nb NN O\n", r"line 4: 3 of 2 fields in 'b NN O'"),
        (b"a\tO\nb\t\n", r"line 2: 1 of 2 fields in 'b'"),
        (b"a\tO\n\tO\n", r"line 2: 1 of 2 fields in 'O'"),
        (b"a O\nb\xff O\n", r"line 2: not UTF-8 text \(.*\); save the file as UTF-8"),
    ],
)
def test_malformed_files_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(str(PATH))}.*{message}"):
        read(content)


def test_a_table_of_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "train.conll.gz"
    path.write_bytes(gzip.compress(CONLL))
    table = read_table(path)
    assert table.columns == ("0", "1", "2", "3") and table.rows == 2 and not table.typed
    assert table.column("3") == [["B-ORG", "O", "O"], ["B-PER"]]
    assert table.at(1) == f"{path}, sentence at line 7"
