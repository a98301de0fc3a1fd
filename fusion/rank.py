"""Rank stored adapters for a target task, without training a fusion of them to its end.

python -m fusion.rank +task=cb sources=all
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.analysis.ranking.candidates import Candidates, all_adapters
from fusion.backbones.files import check_files
from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import RankConfig
from fusion.config.compositions import CompositionConfig
from fusion.errors import TrainingError, UserError
from fusion.runs.inputs import check_backbone_name
from fusion.runs.run import Run
from fusion.store.compatibility import check_sources
from fusion.store.lookup import artifacts, read_manifest
from fusion.store.writing import check_writable

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest


def candidates_of(config: RankConfig) -> Candidates:
    """The adapters to rank.

    Raises:
        UserError: there are fewer than two, or they cannot be fused with each other.
    """
    assert config.task is not None
    store = Path(config.store)
    if config.sources == "all":
        without = None if config.include_target else config.task.name
        found = all_adapters(store, config.backbone.name_or_path, without)
        if len(found.sources) < 2:
            raise UserError(
                f"sources=all: {found.sources[0].name} is alone, and a ranking needs at least two; "
                f"{found.left_out_line() or f'the store {store} has no others'}"
            )
    else:
        found = Candidates([read_manifest(source, store) for source in config.sources], {})
    check_sources(found.sources)
    check_backbone_name(found.sources[0], config.backbone.name_or_path)
    return found


def check(config: RankConfig, run: Run) -> None:
    """What can be said before a model is loaded."""
    from fusion.data.splits import check_held_out_splits, check_source

    if config.task is None:
        raise UserError("no task: say +task=NAME, the target that the sources are ranked for")
    check_held_out_splits([config.task], config.data)
    check_source(config.task, config.data)
    check_writable(Path(config.store))
    candidates_of(config)
    check_files(config.backbone.name_or_path, config.backbone.trust_remote_code)


@command("rank", RankConfig, check=check)
def main(config: RankConfig, run: Run) -> dict[str, Any]:
    if not run.rank_zero:  # one process does it
        return {}
    from fusion.analysis.ranking.kept import keep
    from fusion.analysis.ranking.scorers import Looks
    from fusion.backbones.load import load_backbone
    from fusion.config.data import LimitConfig
    from fusion.config.training import LossConfig
    from fusion.model.build import load_sources
    from fusion.training.task_rows import load_task_rows

    assert config.task is not None
    candidates = candidates_of(config)
    started = time.monotonic()
    backbone = load_backbone(
        config.backbone.name_or_path,
        config.backbone.revision,
        config.backbone.trust_remote_code,
        config.data.max_length,
    )
    manifests, store = candidates.sources, Path(config.store)
    references = config.sources if config.sources != "all" else [manifest.name for manifest in manifests]
    sources = load_sources(references, store, backbone)
    limit = config.data.limit
    limit = LimitConfig(_least(limit.train, config.rows), _least(limit.validation, config.rows))
    few = dataclasses.replace(config, data=dataclasses.replace(config.data, limit=limit))
    rows = load_task_rows([config.task], few.data, LossConfig(), backbone)
    seconds = {"loading": time.monotonic() - started}
    looks = Looks(few, sources, backbone, rows, run.directory)
    scores: dict[str, list[float | None]] = {}
    for method in config.methods:
        if method in ("logme", "probe") and "states" not in seconds:  # which they share
            started = time.monotonic()
            _ = looks.states
            seconds["states"] = time.monotonic() - started
        started = time.monotonic()
        scores[method] = list(getattr(looks, method)())
        seconds[method] = time.monotonic() - started
    ranking = _ranking(config, run, references, manifests, scores, seconds)
    ranking["left_out"] = candidates.left_out
    question = {
        "task": dataclasses.asdict(config.task),
        "data": dataclasses.asdict(few.data.limit) | {"max_length": config.data.max_length},
        "rows": {"train": rows.training[0].fingerprint}
        | {split: encoded.fingerprint for split, encoded in rows.validation.items()},
        "backbone": backbone.fingerprint,
        "sources": [manifest.hash for manifest in manifests],
        "methods": config.methods,
        "settings": [config.rows, config.epochs, config.lr],
    }
    try:
        ranking["ranking"] = str(keep(store, ranking, question))
    except OSError as error:
        raise TrainingError(
            f"{store}: the ranking cannot be written ({error.strerror or error}); make room or mend the folder, "
            "and rank again"
        ) from error
    _print(ranking, candidates, len(rows.training[0]))
    return ranking


def _least(limit: int | None, rows: int) -> int:
    return rows if limit is None else min(limit, rows)


# --- the outcome ----------------------------------------------------------------------------------------------


def _ranking(
    config: RankConfig,
    run: Run,
    references: Sequence[str],
    manifests: Sequence[Manifest],
    scores: dict[str, list[float | None]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """What result.json and the store keep; the sources best first."""
    from fusion.analysis.ranking.order import agreement, best_first, mean_ranks, ranks

    scores = {
        method: [None if score is None or not math.isfinite(score) else score for score in values]
        for method, values in scores.items()
    }
    assert config.task is not None
    mean = mean_ranks(scores)
    by_method = {method: ranks(values) for method, values in scores.items()}
    order = best_first([manifest.name for manifest in manifests], mean)
    return {
        "task": dataclasses.asdict(config.task),
        "backbone": {
            "name": config.backbone.name_or_path,
            "fingerprint": manifests[0].backbone.fingerprint,
        },
        "methods": config.methods,
        "made": datetime.now(timezone.utc).isoformat(),
        "overrides": list(run.overrides),
        "sources": [
            {
                "name": manifests[n].name,
                "reference": references[n],
                "hash": manifests[n].hash,
                "task": manifests[n].task.name,
                "mean_rank": mean[n],
                "ranks": {method: values[n] for method, values in by_method.items()},
                "scores": {method: values[n] for method, values in scores.items()},
            }
            for n in order
        ],
        "agreement": agreement(scores),
        "seconds": seconds,
        "fusion": _known_fusion(config),
    }


def _known_fusion(config: RankConfig) -> dict[str, Any] | None:
    """What the largest fusion for this target took, where the store has one."""
    assert config.task is not None
    found: list[dict[str, Any]] = [
        {
            "name": manifest.name,
            "sources": len(manifest.sources),
            "seconds": manifest.result.speed["seconds"],
        }
        for _, manifest in artifacts(Path(config.store))
        if manifest.made_by == CompositionConfig().name
        and manifest.task.name == config.task.name
        and isinstance(manifest.result.speed.get("seconds"), float)
    ]
    return max(found, key=lambda fusion: int(fusion["sources"]), default=None)


def _print(ranking: dict[str, Any], candidates: Candidates, rows: int) -> None:
    from fusion.analysis.ranking.order import table_rows
    from fusion.cli.console import show_table

    target, seconds = ranking["task"]["name"], ranking["seconds"]
    say(f"{len(ranking['sources'])} sources for {target}, {rows} of its rows: score (rank), higher is better")
    show_table(table_rows(ranking))
    if line := candidates.left_out_line():
        say(line)
    if ranking["agreement"]:
        rows_of = [["agreement", "Kendall τ", "Spearman ρ"]]
        rows_of += [
            [pair.replace("/", " and "), _signed(both["kendall"]), _signed(both["spearman"])]
            for pair, both in ranking["agreement"].items()
        ]
        show_table(rows_of)
    shown = ", ".join(f"{name} {took:.1f} s" for name, took in seconds.items())
    fusion = ranking["fusion"]
    known = (
        f"; the fusion {fusion['name']} of {fusion['sources']} took {fusion['seconds']:.1f} s"
        if fusion
        else ""
    )
    say(f"cost: {shown}{known}")
    say(f"kept: {ranking['ranking']}")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


if __name__ == "__main__":
    main()
