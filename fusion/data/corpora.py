"""Labeled text from a PyPI package, so that the demo does not need the Hugging Face Hub.

The source archive of vaderSentiment 3.3.2 (MIT license) contains the sentences of Hutto and Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014: four domains, each sentence
rated from -4 to 4 by at least twenty people. pip downloads the archive; none of its code is run.
"""

from __future__ import annotations

import hashlib
import html
import io
import logging
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from fusion.data.cache import discard, write_cache_file
from fusion.errors import UserError
from fusion.files import user_cache
from fusion.hub.packages import pip_download

log = logging.getLogger(__name__)

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MEMBERS = {
    "movies": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "products": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "editorials": "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt",
    "tweets": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}
_NEUTRAL = 0.5  # a mean rating closer to zero is neither positive nor negative
# Fractions of the examples, by a hash of their text. At 22 %, each test split has at least 600 non-neutral examples.
_TEST_FRACTION, _VALIDATION_FRACTION = 0.22, 0.10


def corpus_records(corpus: str, split: str) -> list[dict[str, Any]]:
    """Read the examples of a split: `id`, `text`, `rating` (-4 to 4) and `sentiment` (negative, neutral, positive).

    Raises UserError if `corpus` is unknown, or the archive is not cached and cannot be downloaded.
    """
    if corpus not in MEMBERS:
        raise UserError(f"corpus={corpus}: expected one of {', '.join(MEMBERS)}")
    inner = _member(_archive(), INNER)
    lines = _member(inner, MEMBERS[corpus]).decode().splitlines()
    records = [_record(corpus, line) for line in lines if line.strip()]
    return [record for record in records if split_of(record["text"]) == split]


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        file = files.extractfile(name)
        assert file is not None
        return file.read()


def split_of(text: str) -> str:
    """Assign an example to a split by its text, ignoring case and spacing, so that no text is in two splits."""
    digest = hashlib.sha256(" ".join(text.casefold().split()).encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    if fraction < _TEST_FRACTION:
        return "test"
    return "validation" if fraction < _TEST_FRACTION + _VALIDATION_FRACTION else "train"


def _record(corpus: str, line: str) -> dict[str, Any]:
    number, rating, text = line.split("\t")
    value = float(rating)
    sentiment = "neutral" if abs(value) < _NEUTRAL else "positive" if value > 0 else "negative"
    # The texts are escaped for HTML, those of the editorials twice.
    plain = html.unescape(html.unescape(text)).strip()
    return {"id": f"{corpus}-{number}", "text": plain, "rating": value, "sentiment": sentiment}


def _archive() -> bytes:
    """Read the source archive from the cache, else download it from the package index."""
    path = user_cache() / "corpora" / f"{PACKAGE}-{VERSION}.tar.gz"
    if path.is_file():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == SHA256:
            return content
        discard(path, "sha256 mismatch")
    log.info("downloading the texts of %s from the package index", ", ".join(MEMBERS))
    with tempfile.TemporaryDirectory() as temporary:
        content = download_with_pip(Path(temporary))
    write_cache_file(path, content)
    return content


# To download a source archive, pip runs its setup.py for the metadata (and installs setuptools for that). This module
# replaces setuptools and writes the metadata, so that no code of the archive is run.
_SETUPTOOLS = f"""
import pathlib

class __legacy__:
    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        folder = pathlib.Path(metadata_directory) / "{PACKAGE}-{VERSION}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text('''Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n''')
        return folder.name
"""


def download_with_pip(folder: Path) -> bytes:
    """Download the archive with pip, which checks its sha256. Raises UserError if the download fails."""
    (folder / "requirements.txt").write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    (folder / "setuptools").mkdir()
    (folder / "setuptools" / "__init__.py").write_text("")
    (folder / "setuptools" / "build_meta.py").write_text(_SETUPTOOLS)
    options = ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes"]
    options += ["--requirement", str(folder / "requirements.txt")]
    # An environment variable, since newer versions of pip may drop the option.
    environment = {"PYTHONPATH": str(folder), "PIP_USE_PEP517": "1"}
    if problem := pip_download(options, folder / "downloads", environment):
        raise UserError(
            f"The demo's text ({PACKAGE} {VERSION}) is not cached, and pip cannot download it: {problem}\n"
            "Connect to the package index once, or set data.dir=DIR to read DIR/<task>/<split>.jsonl"
        )
    (path,) = (folder / "downloads").iterdir()
    return path.read_bytes()
