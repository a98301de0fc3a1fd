"""How two artifacts or runs differ: in their settings, their scores, and what they cost.

python -m fusion.compare rte rte-head
python -m fusion.compare rte outputs/stage1/rte/2026-01-01_12-00-00-abc123
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.console import say, show_table
from fusion.cli.program import run_program
from fusion.errors import UserError, first_line
from fusion.files import check_reference, resolve_path
from fusion.runs.identity import ADDED_LATER, identity_config
from fusion.runs.run import CONFIG, RESULT, STATUS
from fusion.store.layout import MANIFEST
from fusion.store.lookup import find, read_folder, read_settled
from fusion.store.settings_groups import Lookup, Settings, group
from fusion.store.settings_groups import differing as differing_settings
from fusion.text import printable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

USAGE = """\
python -m fusion.compare A B [store=DIR]

    A, B                 each an artifact's name in the store, an artifact's folder, or the folder of a run
    store=DIR            the store (default: outputs/store)

Shows which settings differ, the scores side by side, and what each cost. Settings are those that decide the numbers:
where it was stored or logged to is none. B's score minus A's is the difference.

Exit codes: 0 done, 2 a wrong command, artifact or run, 130 interrupted.
"""
DEFAULT_STORE = "outputs/store"
INPUTS = "inputs."  # settings that only a manifest has: the hashes of what a run was made of
ABSENT = "-"


@dataclass(frozen=True)
class Side:
    """
    settings: what decides the numbers, by key. facts: what only a manifest knows, empty without one.
    scores: by split and metric. costs: by title. seed: of the run. shared: the settings that the runs of one setting
    share, whatever their seeds and names are, with those of the sources.
    """

    name: str
    place: Path
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    scores: Mapping[str, Any]
    costs: Mapping[str, Any]
    seed: Any
    shared: Settings


def main(words: Sequence[str] | None = None) -> int:
    """The program; gives the exit code."""
    return run_program(words, USAGE, compare)


def compare(words: Sequence[str]) -> int:
    one, two, store = read_words(words)
    show(read_side(one, store), read_side(two, store))
    sys.stdout.flush()
    return 0


def read_words(words: Sequence[str]) -> tuple[str, str, Path]:
    """The two sides and the store.

    Raises:
        UserError: an unknown key, or more or fewer than two sides.
    """
    store, sides = None, []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or "/" in key:  # a path may have a = in it
            sides.append(word)
        elif key != "store":
            near = ": did you mean store?" if difflib.get_close_matches(key, ["store"], 1, 0.6) else ""
            raise UserError(f"unknown key {key}{near}; compare knows store=")
        elif store is not None:
            raise UserError("store= stands twice")
        elif not value:
            raise UserError("store= is empty: expected store=DIR")
        else:
            store = value
    if len(sides) != 2 or "" in sides:
        raise UserError(
            f"compare takes two artifacts or runs, not {' '.join(map(repr, sides)) or 'nothing'} (--help says more)"
        )
    return sides[0], sides[1], resolve_path(store or DEFAULT_STORE, "store")


# --- reading --------------------------------------------------------------------------------------


def read_side(reference: str, store: Path) -> Side:
    """An artifact of the store or a folder, or a run's folder.

    Raises:
        UserError: there is none, or what it says cannot be read.
    """
    check_reference(reference, "artifact")
    folder = Path(reference).expanduser()
    if (folder / STATUS).is_file() and not (folder / MANIFEST).is_file():
        return _of_run(folder)
    place, manifest = read_settled(lambda: find(reference, store), lambda there: (there, read_folder(there)))
    return _of_artifact(place, manifest)


def _of_artifact(place: Path, manifest: Manifest) -> Side:
    sizes = {"stored_bytes": sum(file.bytes for file in manifest.files.values())}
    result = dict(manifest.content["result"])
    parameters = result.get("parameters")
    result["parameters"] = (parameters if isinstance(parameters, dict) else {}) | sizes
    return Side(
        name=manifest.name,
        place=place,
        settings=manifest.run.config,
        facts=_facts(manifest),
        scores=_flat(manifest.metrics),
        costs=_costs(result),
        seed=manifest.seed,
        shared=Lookup().of_artifact(manifest, place.parent),
    )


def _of_run(folder: Path) -> Side:
    """What a run's folder says; with the manifest of what it stored, where that still is the one it stored."""
    status = _json(folder / STATUS)
    config = _config(folder / CONFIG)
    result = _json(folder / RESULT) if (folder / RESULT).exists() else {}
    settings = identity_config(config)
    facts: Mapping[str, Any] = {}
    store = config.get("store")
    shared = Lookup().of_run(settings, Path(store) if isinstance(store, str) else None)
    if isinstance(artifact := result.get("artifact"), str) and "stage" in result:
        try:
            manifest = read_folder(Path(artifact))
        except UserError:
            manifest = None
        if manifest is not None and _without_inputs(manifest.run.config) == settings:
            settings, facts = manifest.run.config, _facts(manifest)
            shared = Lookup().of_artifact(manifest, Path(artifact).parent)
    metrics = result.get("metrics")
    return Side(
        name=str(status.get("name") or folder.name),
        place=folder,
        settings=settings,
        facts=facts,
        scores=_flat(metrics if isinstance(metrics, dict) else {}),
        costs={"status": status.get("status"), **_costs(result)},
        seed=config.get("seed"),
        shared=shared,
    )


def _facts(manifest: Manifest) -> dict[str, Any]:
    """What a manifest knows beyond its config."""
    facts: dict[str, Any] = {
        "kind": manifest.kind,
        "backbone": manifest.backbone.name_or_path,
        "backbone weights": manifest.backbone.fingerprint[:12],
        "backbone tokenizer": (manifest.backbone.tokenizer or "")[:12] or None,
        "sources": ", ".join(f"{source.name} {source.hash[:8]}" for source in manifest.sources) or None,
        "weights": manifest.hash[:12],
    }
    for split, fingerprint in manifest.data.fingerprints.items():
        facts[f"data {split}"] = fingerprint[:12]
    facts |= {f"version of {name}": version for name, version in manifest.versions.items()}
    facts["git"] = None if manifest.run.git is None else manifest.run.git.commit[:12]
    facts["threads"] = manifest.run.threads
    return facts


def _costs(result: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters, bytes, seconds; what is not known is left out."""
    parameters, speed = result.get("parameters"), result.get("speed")
    parameters = parameters if isinstance(parameters, dict) else {}
    speed = speed if isinstance(speed, dict) else {}
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
    return {
        f"{split}/{metric}": value
        for split, values in metrics.items()
        if isinstance(values, dict)
        for metric, value in values.items()
    }


def _without_inputs(settings: Any) -> dict[str, Any]:
    return (
        {k: v for k, v in settings.items() if not k.startswith(INPUTS)} if isinstance(settings, dict) else {}
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({printable(first_line(error))})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def _config(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({printable(first_line(error))})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected keys with values")
    return content


# --- showing --------------------------------------------------------------------------------------


def show(one: Side, two: Side) -> None:
    """Three tables on stdout; one in which nothing differs, or nothing is known, is a line."""
    titles = (one.name, two.name) if one.name != two.name else (str(one.place), str(two.place))
    titles = (printable(titles[0]), printable(titles[1]))
    rows = list(differing(one, two))
    if rows:
        show_table([("setting", *titles), *_printable(rows)])
    else:
        say("no setting differs")
    for line in seed_lines(one, two):
        say(line)
    say()
    scores = [
        (key, shown(one.scores.get(key)), shown(two.scores.get(key)), difference(one.scores.get(key), two.scores.get(key)))
        for key in dict.fromkeys([*one.scores, *two.scores])
    ]  # fmt: skip
    if scores:
        show_table([("score", *titles, "difference"), *_printable(scores)])
    else:
        say("no scores")
    say()
    costs = [
        (title, shown(one.costs.get(title)), shown(two.costs.get(title)))
        for title in dict.fromkeys([*one.costs, *two.costs])
    ]
    if costs:
        show_table([("cost", *titles), *_printable(costs)])


def differing(one: Side, two: Side) -> Iterator[tuple[str, str, str]]:
    """The settings and facts that differ, with both values. What only one side can know is not compared."""
    settings, others = dict(one.settings), dict(two.settings)
    if not (one.facts and two.facts):
        settings, others = _without_inputs(settings), _without_inputs(others)
    default = ADDED_LATER
    for key in sorted({*settings, *others}):
        first, second = settings.get(key, default.get(key)), others.get(key, default.get(key))
        known = key in settings or key in default, key in others or key in default
        if (first, known[0]) != (second, known[1]):
            yield key, _value(first, known[0]), _value(second, known[1])
    if one.facts and two.facts:
        for key in dict.fromkeys([*one.facts, *two.facts]):
            if one.facts.get(key) != two.facts.get(key):
                yield key, _fact(one.facts.get(key)), _fact(two.facts.get(key))


def seed_lines(one: Side, two: Side) -> Iterator[str]:
    """Whether the two are seeds of one setting; else how their sources differ beyond names and seeds."""
    if len(group([one.shared, two.shared])) == 1:
        if one.seed != two.seed:
            yield "one setting with two seeds: the difference of the scores is that of the seeds"
        return
    if not (one.shared.get("sources") and two.shared.get("sources")):
        return
    here, there = differing_settings([one.shared, two.shared])
    for key in here:
        if key.startswith("sources"):
            first, second = (_value(value, value is not None) for value in (here[key], there[key]))
            yield printable(f"{key}: {first} and {second}")


def _value(value: Any, known: bool) -> str:
    if not known:
        return ABSENT
    if (
        isinstance(value, list)
        and value
        and all(isinstance(entry, str) and len(entry) == 64 for entry in value)
    ):
        value = [entry[:8] for entry in value]  # hashes
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _fact(value: Any) -> str:
    return ABSENT if value is None else str(value)


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return ABSENT if value is None else str(value)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def difference(one: Any, two: Any) -> str:
    """Of two scores, the second's lead."""
    if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in (one, two)):
        return ABSENT
    return f"{two - one:+.4f}"


def _printable(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [tuple(" ".join(printable(cell).split()) for cell in row) for row in rows]


if __name__ == "__main__":
    sys.exit(main())
