"""Rank stored adapters for a target task, without training a full fusion."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fusion.analysis.ranking.selection import Candidates, all_adapters
from fusion.backbones.files import check_files
from fusion.cli.app import command
from fusion.cli.console import formatted, say, show_table
from fusion.config.commands import RankConfig
from fusion.config.compositions import CompositionConfig
from fusion.config.stages import POOLED_RANKINGS
from fusion.errors import TrainingError, UserError
from fusion.files import check_writable
from fusion.runs.inputs import check_backbone_name
from fusion.runs.run import Run
from fusion.store.compatibility import check_sources
from fusion.store.lookup import artifacts, read_manifest


def select_candidates(config: RankConfig) -> Candidates:
    """Select the adapters to rank. Raises UserError if there are fewer than two, or they cannot be fused."""
    assert config.task is not None
    store = Path(config.store)
    if config.sources == "all":
        without = None if config.include_target else config.task.name
        found = all_adapters(store, config.backbone.name_or_path, without)
        if len(found.sources) < 2:
            raise UserError(
                f"sources=all: expected at least two sources to rank, found only {found.sources[0].name} in {store}; "
                f"{found.left_out_line()}".removesuffix("; ")
            )
    else:
        found = Candidates([read_manifest(source, store) for source in config.sources], {})
    check_sources(found.sources)
    check_backbone_name(found.sources[0], config.backbone.name_or_path)
    return found


def check(config: RankConfig, run: Run) -> None:
    from fusion.data.splits import check_held_out_splits, check_source

    assert config.task is not None
    check_held_out_splits([config.task], config.data)
    check_source(config.task, config.data)
    check_writable(config.store, "store")
    select_candidates(config)
    backbone = config.backbone
    check_files(backbone.name_or_path, backbone.trust_remote_code, backbone.encoder_only, backbone.accept_licence)


@command("rank", RankConfig, check=check)
def main(config: RankConfig, run: Run) -> dict[str, Any]:
    if not run.rank_zero:
        return {}
    from fusion.analysis.ranking.rankings import agreement, ranked, write_ranking
    from fusion.analysis.ranking.scorers import SCORERS, ScorerInputs
    from fusion.config.data import LimitConfig
    from fusion.config.training import LossConfig
    from fusion.data.splits import SPLITS
    from fusion.model.build import configured_backbone, load_sources
    from fusion.training.task_rows import load_task_rows

    task = config.task
    assert task is not None
    candidates = select_candidates(config)
    seconds: dict[str, float] = {}
    started, options = time.monotonic(), config.backbone
    backbone = configured_backbone(options, config.data.max_length)
    store, names = Path(config.store), [manifest.name for manifest in candidates.sources]
    references = dict(zip(names, names if config.sources == "all" else config.sources, strict=True))
    sources = load_sources(list(references.values()), store, backbone)
    trained, validated = config.data.limit.train, config.data.limit.validation
    limit = LimitConfig(min(trained or config.rows, config.rows), min(validated or config.rows, config.rows))
    config = replace(config, data=replace(config.data, limit=limit))
    rows = load_task_rows([task], config.data, LossConfig(), backbone)
    seconds["loading"] = time.monotonic() - started
    inputs = ScorerInputs(config, task, sources, backbone, rows, run.directory)
    scores = {}
    for method in config.methods:
        if method in POOLED_RANKINGS and "states" not in seconds:  # computed once for all pooled methods
            started = time.monotonic()
            _ = inputs.states
            seconds["states"] = time.monotonic() - started
        started = time.monotonic()
        scores[method] = SCORERS[method](inputs)
        seconds[method] = time.monotonic() - started
    manifests, table = {source.manifest.name: source.manifest for source in sources}, []
    for row in ranked(names, scores):
        name, own = row["name"], manifests[row["name"]]
        table.append({"name": name, "reference": references[name], "hash": own.hash, "task": own.task.name, **row})
    ranking: dict[str, Any] = {
        "task": asdict(task),
        "backbone": {"name": options.name_or_path, "fingerprint": backbone.fingerprint},
        "methods": config.methods,
        "made": datetime.now(timezone.utc).isoformat(),
        "overrides": list(run.overrides),
        "sources": table,
        "agreement": agreement({m: [row["scores"][m] for row in table] for m in config.methods}),
        "seconds": seconds,
        "fusion": _largest_fusion(store, task.name),
        "left_out": candidates.left_out,
    }
    question = {
        "task": ranking["task"],
        "data": {name: getattr(limit, name) for name in SPLITS} | {"max_length": config.data.max_length},
        "rows": {"train": rows.training[0].fingerprint}
        | {split: encoded.fingerprint for split, encoded in rows.validation.items()},
        "backbone": backbone.fingerprint,
        "sources": [manifest.hash for manifest in candidates.sources],
        "methods": config.methods,
        "settings": [config.rows, config.epochs, config.lr],
    }
    try:
        ranking["ranking"] = str(write_ranking(store, ranking, question))
    except OSError as error:
        raise TrainingError(f"{store}: cannot write the ranking ({error.strerror or error})") from error
    _print(ranking, candidates.left_out_line(), len(rows.training[0]))
    return ranking


def _largest_fusion(store: Path, task: str | None) -> dict[str, Any] | None:
    """Return the stored AdapterFusion of the target with the most sources, for comparing the cost, or `None`."""
    fusions: list[dict[str, Any]] = [
        {"name": manifest.name, "sources": len(manifest.sources), "seconds": manifest.result.speed["seconds"]}
        for _, manifest in artifacts(store)
        if manifest.made_by == CompositionConfig().name
        and manifest.task.name == task
        and isinstance(manifest.result.speed.get("seconds"), float)
    ]
    return max(fusions, key=lambda fusion: int(fusion["sources"]), default=None)


def _print(ranking: dict[str, Any], left_out: str, rows: int) -> None:
    methods, sources = ranking["methods"], ranking["sources"]
    say(f"{len(sources)} sources for {ranking['task']['name']}, {rows} examples: score (rank), higher is better")
    table = [["", "source", "mean rank", *methods]]
    for place, source in enumerate(sources, 1):
        found = [(source["scores"][method], source["ranks"][method]) for method in methods]
        cells = ["-" if score is None else f"{score:.4f} ({rank:g})" for score, rank in found]
        table.append([str(place), source["name"], formatted(source["mean_rank"], ".2f"), *cells])
    show_table(table)
    if left_out:
        say(left_out)
    if ranking["agreement"]:
        table = [["agreement", "Kendall τ", "Spearman ρ"]]
        for pair, both in ranking["agreement"].items():
            cells = [formatted(both[key], "+.2f") for key in ("kendall", "spearman")]
            table.append([pair.replace("/", " and "), *cells])
        show_table(table)
    cost = ", ".join(f"{name} {took:.1f} s" for name, took in ranking["seconds"].items())
    if fusion := ranking["fusion"]:
        cost += f"; fusion {fusion['name']} of {fusion['sources']} sources {fusion['seconds']:.1f} s"
    say(f"cost: {cost}")
    say(f"saved: {ranking['ranking']}")


if __name__ == "__main__":
    main()
