"""Rankings on disk, `STORE/.rankings/TASK-HASH.json`: written whole or not at all, read without torch.

The hash is that of the question: target, rows, backbone, sources and methods. The same question again replaces its
answer; another one stands beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.files import write_json
from fusion.store.layout import read_regular

RANKINGS = ".rankings"
FORMAT_VERSION = 1
MOST_BYTES = 32 * 2**20  # more is no ranking


@dataclass(frozen=True)
class Kept:
    """A ranking that was read.

    task: the whole task. backbone: its name or path. methods: in order. made: when, as ISO 8601 in UTC.
    sources: best first; each has name, reference (as it was typed), hash, mean_rank, and ranks by method.
    """

    path: Path
    task: dict[str, Any]
    backbone: str
    methods: list[str]
    made: str
    sources: list[dict[str, Any]]


def keep(store: Path, ranking: dict[str, Any], question: dict[str, Any]) -> Path:
    """Writes a ranking, and gives its file.

    Args:
        question: what the answer is a function of, besides the seed.

    Raises:
        OSError: it cannot be written.
    """
    text = json.dumps(question, sort_keys=True, default=str)
    name = str(ranking["task"]["name"]).replace("/", "-")
    path = store / RANKINGS / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format_version": FORMAT_VERSION, "question": question, **ranking})
    return path


def rankings_of(store: Path, task: dict[str, Any], backbone: str) -> tuple[list[Kept], list[str]]:
    """The rankings of a target, the newest first; and what is wrong with files that are none.

    Args:
        task: the target; one whose file says something else by now is another target.
        backbone: name or path.
    """
    found, damaged = [], []
    for path in _files(store):
        try:
            kept = read(path)
        except UserError as error:
            damaged.append(str(error))
            continue
        if _plain(kept.task) == _plain(task) and kept.backbone == backbone:
            found.append(kept)
    return sorted(found, key=lambda kept: kept.made, reverse=True), damaged


def read(path: Path) -> Kept:
    """
    Raises:
        UserError: names the file, and what is wrong with it.
    """
    try:
        values = json.loads(read_regular(path, most=MOST_BYTES))
        if values["format_version"] != FORMAT_VERSION:
            raise UserError(f"{path}: is of another version; rank again")
        kept = Kept(
            path=path,
            task=values["task"],
            backbone=values["backbone"]["name"],
            methods=values["methods"],
            made=values["made"],
            sources=values["sources"],
        )
        right = all(isinstance(text, str) for text in (kept.backbone, kept.made, *kept.methods))
        for source in kept.sources:
            right = right and all(isinstance(source[key], str) for key in ("name", "reference", "hash"))
            numbers = (source["mean_rank"], *(source["ranks"].get(method) for method in kept.methods))
            right = right and all(type(number) in (int, float, type(None)) for number in numbers)
        if not right or not isinstance(kept.task, dict) or not kept.sources:
            raise ValueError("a value of another type")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: is no ranking ({type(error).__name__}: {error}); remove it, and rank again"
        ) from None
    return kept


def _files(store: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in (store / RANKINGS).iterdir() if path.suffix == ".json")
    except OSError:
        return


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
