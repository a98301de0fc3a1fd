"""Data as people have it: shards, compressed files, JSON arrays, folders of save_to_disk, quoted TSV."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas  # of `datasets`
import pyarrow
import pyarrow.parquet
import pytest

from fusion.config.data import DataConfig
from fusion.config.task import TaskConfig
from fusion.data.rows import load_rows
from fusion.data.splits import check_source
from fusion.data.tables import file_format, split_files
from fusion.errors import UserError

ROWS = [{"text": f"row {number}", "label": number % 2} for number in range(10)]
TEXTS = [(row["text"],) for row in ROWS]


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def comma(rows: list[dict[str, Any]]) -> bytes:
    return pandas.DataFrame(rows).to_csv(index=False).encode()


def tabbed(rows: list[dict[str, Any]]) -> bytes:
    return pandas.DataFrame(rows).to_csv(index=False, sep="\t").encode()


def array(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=2).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "parquet": parquet,
    "jsonl": lines,
    "json": array,
    "csv": comma,
    "tsv": tabbed,
}
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}

Write = Callable[..., DataConfig]
Task = Callable[..., TaskConfig]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.parquet", ".parquet"),
        ("a.b.JSONL", ".jsonl"),
        ("a.CSV.Gz", ".csv.gz"),
        ("a.json.zst", ".json.zst"),
        ("a.parquet.gz", None),
        ("a.gz", None),
        ("a.arrow", None),
        ("a.xlsx", None),
        ("a", None),
        ("csv", None),
        (".csv", None),
    ],
)
def test_file_format(name: str, form: str | None) -> None:
    assert file_format(Path("folder.csv") / name) == form


# --- one file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", *COMPRESS])
@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv"])
def test_every_form_of_a_file_has_the_same_rows(task: Task, write: Write, ending: str, compression: str) -> None:
    content = WRITERS[ending](ROWS)
    if compression:
        content, ending = COMPRESS[compression](content), f"{ending}.{compression}"
    rows = load_rows(task(), write(f"train.{ending}", content), "train")
    assert rows.texts == TEXTS
    assert rows.labels == [row["label"] for row in ROWS]


@pytest.mark.parametrize("ending", ["CSV", "Parquet", "JSON", "csv.GZ"])
def test_the_case_of_an_ending(task: Task, write: Write, ending: str) -> None:
    first, _, compression = ending.lower().partition(".")
    content = WRITERS[first](ROWS)
    data = write(f"train.{ending}", COMPRESS[compression](content) if compression else content)
    assert load_rows(task(), data, "train").texts == TEXTS


def test_lines_in_a_json_file(task: Task, write: Write) -> None:
    assert load_rows(task(), write("train.json", lines(ROWS)), "train").texts == TEXTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (array([*ROWS[:2], {"text": 3, "label": 0}]), r"train\.json, row 3: text is 3"),
        (b"[1, 2]", r"train\.json, row 1: got int; expected one JSON object"),
        (b'[{"text": "a", "text": "b", "label": 0}]', r"train\.json: invalid JSON \(duplicate key text"),
        (b'[{"text": "a"\n', r"train\.json: invalid JSON \(.*line 2 column 1.*expected .* an array"),
        (b'[{"text": "\xff"}]', r"train\.json, line 1: not UTF-8"),
        (b"[]", "contains no rows"),
        (b"", "contains no rows"),
        (pandas.DataFrame(ROWS).to_json().encode(), r"line 1: text is \{.*expected text"),
        (b'{"data": [{"text": "a", "label": 0}]}', "no column label; found data"),
    ],
)
def test_json_that_is_not_a_list_of_objects(task: Task, write: Write, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_rows(task(), write("train.json", content), "train")


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_compressed_file_that_is_damaged(task: Task, write: Write, compression: str) -> None:
    whole = COMPRESS[compression](lines([{"text": f"{n * 7919 % 1009}", "label": 0} for n in range(3000)]))
    for content in (whole[: len(whole) // 2], b"no such thing", whole[:30] + b"\0" * 40 + whole[70:]):
        with pytest.raises(UserError, match=rf"train\.jsonl\.{compression}.*") as caught:
            load_rows(task(), write(f"train.jsonl.{compression}", content), "train")
        assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("compression", COMPRESS)
def test_two_compressed_streams_in_one_file(task: Task, write: Write, compression: str) -> None:
    """As `cat a.gz b.gz` makes them."""
    compress = COMPRESS[compression]
    data = write(f"train.jsonl.{compression}", compress(lines(ROWS[:4])) + compress(lines(ROWS[4:])))
    assert load_rows(task(), data, "train").texts == TEXTS


def test_lines_keep_their_numbers(task: Task, write: Write) -> None:
    broken = lines(ROWS[:3]) + b"\n" + lines([{"text": None, "label": 0}])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz, line 5: text is null"):
        load_rows(task(), write("train.jsonl.gz", gzip.compress(broken)), "train")


# --- shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "data/"])
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "tsv", "csv.gz", "jsonl.zst"])
def test_shards(task: Task, write: Write, ending: str, folder: str) -> None:
    kind, _, compression = ending.partition(".")
    for number, part in enumerate((ROWS[:3], ROWS[3:4], ROWS[4:])):
        content = WRITERS[kind](part)
        data = write(
            f"{folder}train-{number:05d}-of-00003.{ending}", COMPRESS[compression](content) if compression else content
        )
    check_source(task(), data, ["train"])
    rows = load_rows(task(), data, "train")
    assert rows.texts == TEXTS and rows.labels == [row["label"] for row in ROWS]
    one = write("train.jsonl", lines(ROWS), "other")
    assert load_rows(task(name="other"), one, "train").fingerprint == rows.fingerprint


def test_a_shard_with_a_hash_in_its_name(task: Task, write: Write) -> None:
    write("data/validation-00000-of-00001-0123456789abcdef.parquet", parquet(ROWS[:2]))
    data = write("data/train-00000-of-00001-4746b8785c874cc7.parquet", parquet(ROWS))
    assert load_rows(task(), data, "train").texts == TEXTS
    assert load_rows(task(), data, "validation").texts == TEXTS[:2]


def test_a_missing_shard(task: Task, write: Write) -> None:
    write("train-00000-of-00003.parquet", parquet(ROWS))
    data = write("train-00002-of-00003.parquet", parquet(ROWS))
    for call in (lambda: load_rows(task(), data, "train"), lambda: check_source(task(), data, ["train"])):
        with pytest.raises(
            UserError, match=r"train-\*-of-00003\.parquet: expected the shards 0 to 2 once each, got 0, 2"
        ):
            call()
    write("train-00001-of-00003.parquet", parquet(ROWS))
    write("train-00003-of-00003.parquet", parquet(ROWS))
    with pytest.raises(UserError, match=r"got 0, 1, 2, 3"):
        load_rows(task(), data, "train")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train.parquet", "train-00000-of-00001.parquet"),
        ("train-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"),
        ("train-00000-of-00001.parquet", "train-00000-of-00002.parquet"),
        ("train-00000-of-00001.jsonl", "train-00000-of-00001.parquet"),
        ("train.csv", "train.csv.gz"),
        ("train.csv", "train.CSV"),
        ("train.json", "train.jsonl"),
        ("data/train.csv", "train.csv"),
        ("data/train-00000-of-00001-0123456789abcdef.csv", "data/train-00000-of-00001-0123456789abcdee.csv"),
    ],
)
def test_a_split_in_two_forms(task: Task, write: Write, one: str, other: str) -> None:
    write(one, b"")
    data = write(other, b"")
    with pytest.raises(UserError, match=r"both .+ and .+ exist: keep one of them|once each"):
        check_source(task(), data, ["train"])


def test_an_error_in_a_shard_names_shard_and_row(task: Task, write: Write) -> None:
    write("train-00000-of-00002.jsonl", lines(ROWS[:4]))
    data = write("train-00001-of-00002.jsonl", b"\n" + lines([ROWS[4], {"text": "x", "label": 7}]))
    with pytest.raises(UserError, match=r"train-00001-of-00002\.jsonl, line 3: label is 7"):
        load_rows(task(), data, "train")
    write("validation-00000-of-00002.parquet", parquet(ROWS[:4]))
    write("validation-00001-of-00002.parquet", parquet([ROWS[4], {"text": None, "label": 0}]))
    with pytest.raises(UserError, match=r"validation-00001-of-00002\.parquet, row 2: text is null"):
        load_rows(task(), data, "validation")


def test_shards_with_other_columns(task: Task, write: Write) -> None:
    write("train-00000-of-00002.parquet", parquet(ROWS[:4]))
    data = write("train-00001-of-00002.parquet", parquet([{"sentence": "x", "label": 0}]))
    with pytest.raises(UserError, match=r"00001-of-00002\.parquet: column sentence, text differs from "):
        load_rows(task(), data, "train")


def test_shards_with_ids_of_other_classes(task: Task, write: Write, tmp_path: Path) -> None:
    for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
        path = tmp_path / "data" / "pets" / f"train-{number:05d}-of-00002.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(ROWS, features=features).to_parquet(path)
    with pytest.raises(UserError, match=r"00001-of-00002\.parquet: column label differs from "):
        load_rows(task(), DataConfig(dir=str(tmp_path / "data")), "train")


# --- save_to_disk -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A `DatasetDict` in the folder of `pets`."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    train = datasets.Dataset.from_list(ROWS, features=features)
    both = {"train": train.select(range(9, -1, -1)).select(range(9, -1, -1)), "validation": train.select([1, 3])}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "data" / "pets", num_shards={"train": 3, "validation": 1})
    return tmp_path / "data"


def test_a_saved_data_set_dict(task: Task, saved: Path) -> None:
    data = DataConfig(dir=str(saved))
    check_source(task(), data)
    rows = load_rows(task(), data, "train")
    assert rows.texts == TEXTS and rows.labels == [row["label"] for row in ROWS]
    assert load_rows(task(), data, "validation").texts == [TEXTS[1], TEXTS[3]]
    with pytest.raises(UserError, match=r"has no test: it contains dataset_dict\.json, train/, validation/"):
        load_rows(task(), data, "test")


def test_a_saved_data_set(task: Task, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "pets"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "train")
    assert load_rows(task(), DataConfig(dir=str(tmp_path / "data")), "train").texts == TEXTS


@pytest.mark.parametrize("damage", ["data-00000-of-00001.arrow", "state.json", "dataset_info.json"])
def test_a_saved_data_set_that_is_damaged(task: Task, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "data" / "pets" / "train"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    (folder / damage).write_bytes(b'{"_data_files": 3}' if damage == "state.json" else b"\0nothing")
    with pytest.raises(UserError, match="cannot be read as save_to_disk") as caught:
        load_rows(task(), DataConfig(dir=str(tmp_path / "data")), "train")
    assert len(str(caught.value).splitlines()) <= 2


def test_a_saved_split_beside_a_file_of_it(task: Task, saved: Path) -> None:
    (saved / "pets" / "train.csv").write_text("text,label\na,0\n")
    with pytest.raises(UserError, match=r"both .*/train and .*/train\.csv exist"):
        load_rows(task(), DataConfig(dir=str(saved)), "validation")


# --- what is not read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train.arrow", "train.xlsx", "train.txt", "train.pkl", "data/train.parquet.gz"])
def test_other_endings_are_named(task: Task, write: Write, name: str) -> None:
    data = write(name, b"x")
    with pytest.raises(UserError) as caught:
        check_source(task(), data, ["train"])
    message = str(caught.value)
    assert "has no train: it contains " in message and name in message
    assert ".parquet, .jsonl, .json, .csv, .tsv or .conll" in message and len(message.splitlines()) == 2


def test_existing_files_are_always_named(task: Task, write: Write) -> None:
    write("mnli/train-00000-of-00001.parquet", parquet(ROWS))
    write("._train.csv", b"junk of another system")
    data = write("arrow/data-00000-of-00001.arrow", b"x")
    with pytest.raises(UserError, match="has no train: it contains arrow/, mnli/\n"):
        load_rows(task(), data, "train")


def test_an_empty_folder(tmp_path: Path) -> None:
    assert split_files(tmp_path) == {}


# --- quotes -------------------------------------------------------------------------------------------

QUOTED = pandas.DataFrame({"text": ['say "hi"', "two\nlines", "plain", "a\ttab"], "label": [0, 1, 0, 1]})


def test_a_quoted_tsv(task: Task, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    data = write("train.tsv", QUOTED.to_csv(index=False, sep="\t"))
    data.quoting = "csv"
    assert [text for (text,) in load_rows(task(), data, "train").texts] == QUOTED["text"].tolist()
    data.quoting = None
    with pytest.raises(
        UserError, match=r"quotes are literal characters; the file seems to use quotes: set data\.quoting=csv"
    ):
        load_rows(task(), data, "train")
    assert not caplog.records


def test_quotes_in_a_tsv_are_text_with_a_warning(task: Task, write: Write, caplog: pytest.LogCaptureFixture) -> None:
    data = write("train.tsv", QUOTED[::2].to_csv(index=False, sep="\t"))
    assert load_rows(task(), data, "train").texts == [('"say ""hi"""',), ("plain",)]
    assert "train.tsv: 1 fields start and end with a quotation mark" in caplog.text
    assert "data.quoting=csv" in caplog.text
    caplog.clear()
    data.quoting = "none"
    assert load_rows(task(), data, "train").texts == [('"say ""hi"""',), ("plain",)]
    assert not caplog.records


@pytest.mark.parametrize("text", ['"open', '"a" b', '"a"b"', 'he said "x"'])
def test_quotes_that_csv_would_not_write_cause_no_warning(
    task: Task, write: Write, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    data = write(
        "train.tsv", f'text\tlabel\n"quoted"\t0\n{text}\t1\n' if text[0] == '"' else f"text\tlabel\n{text}\t1\n"
    )
    assert load_rows(task(), data, "train").texts[-1] == (text,)
    assert not caplog.records


def test_csv_without_quotes(task: Task, write: Write) -> None:
    data = write("train.csv", 'text,label\n"a,0\n')
    with pytest.raises(UserError, match="is not closed"):
        load_rows(task(), data, "train")
    data.quoting = "none"
    assert load_rows(task(), data, "train").texts == [('"a',)]


def test_an_open_quote_in_a_quoted_tsv(task: Task, write: Write) -> None:
    data = write("train.tsv", 'text\tlabel\nx\t1\n"a\t0\n')
    data.quoting = "csv"
    with pytest.raises(UserError, match=r"train\.tsv, line 3: a quote is not closed"):
        load_rows(task(), data, "train")


def test_an_unknown_quoting() -> None:
    with pytest.raises(UserError, match=r"data\.quoting=all: expected one of csv, none"):
        DataConfig(quoting="all")
