"""Evaluate how well rankings of sources predict the gain of initializing from each source.

    python -m pipelines.ranking targets=[cb,mr] data_dir=../shared/data

Trains one adapter per source and ranks them for each target (python -m fusion.rank). The gain of a source is measured
by training two adapters per seed for the same number of steps: a new one (stage 1), and one initialized from the source
adapter (stage 2 with composition=continued). The gain is the mean difference over seeds. The scores of each method are
compared with the gains by Kendall's tau and Spearman's rho over the sources, and by the mean gain of the method's top
three sources. Artifacts that already exist are not retrained.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fusion.analysis.ranking.rankings import correlation, ranked
from fusion.cli.console import formatted, show_table
from fusion.config.stages import POOLED_RANKINGS
from fusion.errors import UserError
from fusion.files import read_json
from pipelines.commands import SeedsConfig, call, distinct, run_workflow, say

MEAN = "mean rank"
# Default overrides.
SOURCE = ["data.limit.train=1500", "data.limit.validation=500", "optim.lr=5e-4", "trainer.max_epochs=2"]
ROWS = ["data.limit.train=250", "data.limit.validation=500"]  # limits of the target
TARGET = [*ROWS, "optim.lr=5e-4", "optim.patience=null", "trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2"]


@dataclass
class RankingConfig(SeedsConfig):
    sources: list[str] = distinct(["sst2", "subj", "snli", "mrpc", "qqp", "cola", "rte", "qnli"], at_least=2)
    targets: list[str] = distinct(["mr", "cb"])
    output: str = "outputs/ranking"
    source_overrides: list[str] = field(default_factory=SOURCE.copy)
    target_overrides: list[str] = field(default_factory=TARGET.copy)
    rank_overrides: list[str] = field(default_factory=ROWS.copy)

    def __post_init__(self) -> None:
        super().__post_init__()
        if both := sorted(set(self.sources) & set(self.targets)):
            raise UserError(f"sources, targets: {', '.join(both)} cannot be both a source and a target")


def train(config: RankingConfig) -> None:
    """Run all training and ranking commands. Existing artifacts and rankings are skipped."""
    names, seeds = ",".join(config.sources), ",".join(map(str, config.seeds))
    say(f"\n[1] sources: {names}")
    config.sweep("fusion.stage1", "sources", [f"+task={names}", *config.source_overrides])
    for target in config.targets:
        say(f"\n[2] ranking for {target}")
        ranking = ranking_folder(config, target)
        if (ranking / "result.json").is_file():
            say(f"already done: {ranking}")
        else:
            words = [f"sources=[{names}]", *config.rank_overrides, f"hydra.run.dir={ranking}"]
            call("fusion.rank", [f"+task={target}", *config.shared, *words])
        say(f"\n[3] {target} without a source, and initialized from each source: seeds {seeds}")
        words = [f"+task={target}", *config.target_overrides]
        config.sweep("fusion.stage1", f"{target}-alone", words, name=f"{target}-alone")
        each = ",".join(f"[{source}]" for source in config.sources)
        words += ["composition=continued", f"sources={each}"]
        config.sweep("fusion.stage2", f"{target}-after", words, name=f"{target}-after-${{sources.0}}")


def ranking_folder(config: RankingConfig, target: str) -> Path:
    return Path(config.output) / "runs" / f"{target}-ranking"


def main_scores(config: RankingConfig, name: str) -> list[float]:
    return [next(iter(scores.values())) for scores in config.scores(name)]


def gains(config: RankingConfig, target: str) -> dict[str, list[float]]:
    """Return, by source and for each seed, the score initialized from the source minus the score without it."""
    alone = main_scores(config, f"{target}-alone")
    after = {source: main_scores(config, f"{target}-after-{source}") for source in config.sources}
    return {source: [b - a for a, b in zip(alone, of, strict=True)] for source, of in after.items()}


def agreements(ranking: dict[str, Any], gained: dict[str, float], top: int = 3) -> dict[str, dict[str, float | None]]:
    """Compare the scores of each method, and the mean rank, with the measured gains.

    Correlations are `None` if all scores or all gains are equal; top_gain is the mean gain of the first `top` sources.
    """
    scored = {m: {s["name"]: s["scores"][m] for s in ranking["sources"]} for m in ranking["methods"]}
    scored[MEAN] = {s["name"]: s["mean_rank"] and -s["mean_rank"] for s in ranking["sources"]}  # higher is better
    found: dict[str, dict[str, float | None]] = {}
    for method, of in scored.items():
        names = [source for source in gained if of.get(source) is not None]
        best = sorted(names, key=lambda name: -of[name])[:top]
        found[method] = {
            **correlation([of[name] for name in names], [gained[name] for name in names]),
            "top_gain": fmean(gained[name] for name in best) if best else None,
        }
    return found


def report(config: RankingConfig) -> dict[str, Any]:
    """Print and return the gains of each target, and the agreement of the methods with the gains."""
    from fusion.reporting.wording import mean_of

    found: dict[str, Any] = {}
    for target in config.targets:
        ranking = read_json(ranking_folder(config, target) / "result.json")
        each, alone = gains(config, target), main_scores(config, f"{target}-alone")
        gained = {source: fmean(values) for source, values in each.items()}
        compared = agreements(ranking, gained)
        found[target] = {
            "alone": alone,
            "gains": each,
            "methods": compared,
            "seconds": ranking["seconds"],
            "agreement": ranking["agreement"],
            "ranking": ranking["sources"],
        }
        say(f"\n{target} without a source: {mean_of(alone)}; gain of each source, and its rank by each method\n")
        by_name = {source["name"]: source for source in ranking["sources"]}
        table = [["source", "gain", "rank", *ranking["methods"], MEAN]]
        for row in ranked(list(each), {"gain": list(gained.values())}):
            own = by_name[row["name"]]
            ranks = [*(own["ranks"][method] for method in ranking["methods"]), own["mean_rank"]]
            shown = [formatted(rank, ".3g") for rank in ranks]
            table.append([row["name"], mean_of(each[row["name"]]), f"{row['mean_rank']:g}", *shown])
        show_table(table)
        table = [["agreement with the gain", "Kendall τ", "Spearman ρ", "mean gain of top three", "seconds"]]
        for method, values in compared.items():
            correlations = [formatted(values[key], "+.2f") for key in ("kendall", "spearman")]
            seconds = formatted(cost(ranking["seconds"], method), ".1f")
            table.append([method, *correlations, formatted(values["top_gain"], "+.3f"), seconds])
        table.append(["all sources", "", "", f"{fmean(gained.values()):+.3f}", ""])
        table.append(["best source", "", "", f"{max(gained.values()):+.3f}", ""])
        say("")
        show_table(table)
    return found


def cost(seconds: dict[str, float], method: str) -> float | None:
    """Return the seconds of a method, including shared hidden states, or `None` for the mean rank."""
    if method not in seconds:
        return None
    return seconds[method] + (seconds["states"] if method in POOLED_RANKINGS else 0.0)


def work(config: RankingConfig) -> None:
    train(config)
    config.save("-".join(config.targets), targets=report(config))


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(RankingConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
