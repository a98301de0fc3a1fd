"""Compare two artifacts or runs: settings, scores and costs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import number, read_arguments, run_program, say, score, show_table
from fusion.errors import UserError
from fusion.files import resolve_path
from fusion.reporting.reading import read_mapping
from fusion.runs.identity import ADDED_LATER, identity_config
from fusion.runs.output import result_of
from fusion.runs.run import CONFIG, RESULT, STATUS
from fusion.store.layout import MANIFEST
from fusion.store.lookup import find_manifest, read_folder
from fusion.store.settings_groups import Lookup, Settings, group
from fusion.store.settings_groups import differing as differing_settings
from fusion.text import printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

USAGE = """\
python -m fusion.compare A B [store=DIR]

    A, B                 an artifact (name in the store, or folder) or a run (folder)
    store=DIR            the store (default: outputs/store)

Prints the settings that differ, the scores and the costs. Only settings that affect the results are compared, not
where results are stored or logged. The difference is B's score minus A's.

Exit codes: 0 success, 2 invalid command, artifact or run, 130 interrupted.
"""
INPUTS = "inputs."  # settings that only exist in manifests: hashes of the inputs of a run
ABSENT = "-"


@dataclass(frozen=True)
class Side:
    """One of the two compared artifacts or runs."""

    name: str
    place: Path
    settings: Mapping[str, Any]  # only settings that affect the results
    metadata: Mapping[str, Any]  # fields that only exist in manifests; empty without a manifest
    scores: Mapping[str, Any]  # by `split/metric`
    costs: Mapping[str, Any]
    shared: Settings  # without seeds and names, including those of the sources


def main(words: Sequence[str] | None = None) -> int:
    return run_program(words, USAGE, compare)


def compare(words: Sequence[str]) -> int:
    (one, two), values = read_arguments(words, {"store": "DIR"}, (2, 2), "two artifacts or runs")
    store = resolve_path(values.get("store", "outputs/store"), "store")
    show(read_side(one, store), read_side(two, store))
    sys.stdout.flush()
    return 0


def read_side(reference: str, store: Path) -> Side:
    """Read an artifact, by name in the store or by folder, or a run folder. Raises UserError if this fails."""
    folder = resolve_path(reference, "artifact")
    if (folder / STATUS).is_file() and not (folder / MANIFEST).is_file():
        return _of_run(folder)
    return _of_artifact(*find_manifest(reference, store))


def _of_artifact(place: Path, manifest: Manifest) -> Side:
    costs, shared = _costs(result_of(manifest, place)), Lookup().of_artifact(manifest, place.parent)
    return Side(manifest.name, place, manifest.run.config, _metadata(manifest), _flat(manifest.metrics), costs, shared)


def _of_run(folder: Path) -> Side:
    """Read a run folder, including the manifest of its artifact unless the artifact has since been replaced."""
    status, config = read_mapping(folder / STATUS), read_mapping(folder / CONFIG)
    result = read_mapping(folder / RESULT) if (folder / RESULT).exists() else {}
    settings, store = identity_config(config), config.get("store")
    name, scores = str(status.get("name") or folder.name), _flat(_dict(result.get("metrics")))
    costs = {"status": status.get("status"), **_costs(result)}
    shared = Lookup().of_run(settings, Path(store) if isinstance(store, str) else None)
    side = Side(name, folder, settings, {}, scores, costs, shared)
    if isinstance(artifact := result.get("artifact"), str) and "stage" in result:
        with contextlib.suppress(UserError):
            made = _of_artifact(Path(artifact), read_folder(Path(artifact)))
            if {k: v for k, v in made.settings.items() if not k.startswith(INPUTS)} == settings:
                return replace(side, settings=made.settings, metadata=made.metadata, shared=made.shared)
    return side


def _metadata(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest fields that are not part of the config."""
    return {
        "kind": manifest.kind,
        "backbone": manifest.backbone.name_or_path,
        "backbone weights": manifest.backbone.fingerprint[:12],
        "backbone tokenizer": (manifest.backbone.tokenizer or "")[:12] or None,
        "sources": ", ".join(f"{source.name} {source.hash[:8]}" for source in manifest.sources) or None,
        "weights": manifest.hash[:12],
        **{f"data {split}": hash[:12] for split, hash in manifest.data.fingerprints.items()},
        **{f"version of {name}": version for name, version in manifest.versions.items()},
        "git": None if manifest.run.git is None else manifest.run.git.commit[:12],
        "threads": manifest.run.threads,
    }


def _costs(result: Mapping[str, Any]) -> dict[str, Any]:
    parameters, speed = _dict(result.get("parameters")), _dict(result.get("speed"))
    costs = {
        "best epoch": result.get("best_epoch"),
        "epochs": result.get("epochs"),
        "trained parameters": parameters.get("trainable"),
        "stored bytes": parameters.get("stored_bytes"),
        "seconds": speed.get("seconds"),
        "tokens per second": speed.get("tokens_per_second"),
        "peak memory bytes": speed.get("peak_memory_bytes"),
    }
    return {title: value for title, value in costs.items() if value is not None}


def _flat(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{split}/{metric}": value for split, values in metrics.items() for metric, value in _dict(values).items()}


def _dict(value: Any) -> dict[str, Any]:
    """Return `value` as a dict, or an empty dict if it is not a mapping."""
    return dict(value) if isinstance(value, Mapping) else {}


def show(one: Side, two: Side) -> None:
    """Print three tables. Empty tables are replaced by a message."""
    titles = (one.name, two.name) if one.name != two.name else (str(one.place), str(two.place))
    _show(("setting", *titles), list(differing(one, two)), "no setting differs")
    for line in seed_lines(one, two):
        say(line)
    say()
    scores = [(key, score(a), score(b), difference(a, b)) for key, a, b in _both(one.scores, two.scores)]
    _show(("score", *titles, "difference"), scores, "no scores")
    say()
    costs = [(key, number(a), number(b)) for key, a, b in _both(one.costs, two.costs)]
    _show(("cost", *titles), costs, "no costs")


def _show(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]], otherwise: str) -> None:
    if not rows:
        say(otherwise)
        return
    show_table([tuple(printable(" ".join(cell.split())) for cell in row) for row in (titles, *rows)])


def _both(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return each key with both values, `None` if missing."""
    return [(key, one.get(key), two.get(key)) for key in {**one, **two}]


def differing(one: Side, two: Side) -> Iterator[tuple[str, str, str]]:
    """Yield the settings and metadata that differ, with both values. Metadata requires that both sides have a manifest."""
    of_artifacts, absent = bool(one.metadata and two.metadata), object()
    # Older manifests do not contain keys that were added later; these had their defaults.
    first, second = ({**ADDED_LATER, **side.settings} for side in (one, two))
    for key in sorted({*first, *second}):
        if first.get(key, absent) != second.get(key, absent) and (of_artifacts or not key.startswith(INPUTS)):
            yield key, _value(first, key), _value(second, key)
    if of_artifacts:
        for key, value, other in _both(one.metadata, two.metadata):
            if value != other:
                yield key, number(value), number(other)


def seed_lines(one: Side, two: Side) -> Iterator[str]:
    """Yield a message if only the seeds differ; otherwise the differences between the sources except names and seeds."""
    if len(group([one.shared, two.shared])) == 1:
        if one.settings.get("seed") != two.settings.get("seed"):
            yield "same settings with different seeds: the scores only differ because of the seed"
    elif one.shared.get("sources") and two.shared.get("sources"):
        first, second = differing_settings([one.shared, two.shared])
        for key in first:
            if key.startswith("sources"):
                known = [{k: v for k, v in side.items() if v is not None} for side in (first, second)]
                yield printable(f"{key}: {_value(known[0], key)} and {_value(known[1], key)}")


def _value(settings: Mapping[str, Any], key: str) -> str:
    if key not in settings:
        return ABSENT
    value = settings[key]
    if isinstance(value, list) and all(isinstance(entry, str) and len(entry) == 64 for entry in value):
        value = [entry[:8] for entry in value]  # hashes
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def difference(one: float | None, two: float | None) -> str:
    return ABSENT if one is None or two is None else f"{two - one:+.4f}"


if __name__ == "__main__":
    sys.exit(main())
