"""Does a ranking of sources foretell what training from each of them gives?

    python -m pipelines.ranking targets=[cb,mr] data_dir=../shared/data

Trains an adapter a source; ranks all of them for each target (python -m fusion.rank); then finds out what each gives:
for every seed, an adapter of the target alone, and one that goes on from the source's (stage 2 with that source and
composition=continued), in the same number of steps. A source's gain is the mean over the seeds of the difference.
The report holds each method's scores against the gains: Kendall's tau and Spearman's rho over the sources, and what
its best three would have gained beside the mean and the best of all. What is stored already is not trained again.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fusion.analysis.ranking.order import correlation, ranked
from fusion.cli.console import columns
from fusion.errors import UserError
from fusion.runs.signals import exit_code
from pipelines.commands import call, read_config, say

MEAN = "mean rank"


@dataclass
class RankingConfig:
    sources: list[str] = field(
        default_factory=lambda: ["sst2", "subj", "snli", "mrpc", "qqp", "cola", "rte", "qnli"]
    )
    targets: list[str] = field(default_factory=lambda: ["mr", "cb"])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    backbone: str = "minilm"
    data_dir: str | None = None
    output: str = "outputs/ranking"
    source_overrides: list[str] = field(
        default_factory=lambda: [
            "data.limit.train=1500",
            "data.limit.validation=500",
            "optim.lr=5e-4",
            "trainer.max_epochs=2",
        ]
    )
    target_overrides: list[str] = field(  # of both: alone, and after a source
        default_factory=lambda: [
            "data.limit.train=250",
            "data.limit.validation=500",
            "optim.lr=5e-4",
            "optim.patience=null",
            "trainer.max_epochs=4",
            "trainer.check_val_every_n_epoch=2",
        ]
    )
    rank_overrides: list[str] = field(  # the target's rows as above
        default_factory=lambda: ["data.limit.train=250", "data.limit.validation=500"]
    )

    def __post_init__(self) -> None:
        for key, least in (("sources", 2), ("targets", 1), ("seeds", 1)):
            values = getattr(self, key)
            if len(values) < least or len(set(values)) != len(values):
                raise UserError(f"{key}={values}: expected at least {least}, each once")
        if both := sorted(set(self.sources) & set(self.targets)):
            raise UserError(
                f"{', '.join(both)}: a target is ranked for, and no source of its own; leave it out of one"
            )


def train(config: RankingConfig) -> None:
    """All that is trained and ranked, as the project's own commands; each skips what is there already."""
    runs = f"{config.output}/runs"
    place = [f"backbone={config.backbone}", f"store={config.output}/store"]
    if config.data_dir:
        place.append(f"data.dir={config.data_dir}")
    shared = [*place, "logger=csv"]
    names = ",".join(config.sources)
    say(f"\n[1] sources: {names}")
    call(
        "fusion.stage1",
        ["-m", f"+task={names}", *shared, *config.source_overrides, f"hydra.sweep.dir={runs}/sources"],
    )
    for target in config.targets:
        say(f"\n[2] the ranking for {target}")
        folder = ranking_folder(config, target)
        if (folder / "result.json").is_file():
            say(f"{folder} is there already")
        else:
            where = [f"sources=[{names}]", *config.rank_overrides, f"hydra.run.dir={folder}"]
            call("fusion.rank", [f"+task={target}", *place, *where])
        seeds = ",".join(map(str, config.seeds))
        several = ["-m", f"+task={target}", f"seed={seeds}", *shared, *config.target_overrides]
        say(f"\n[3] {target} alone, and after each source: seeds {seeds}")
        alone = [f"name={target}-alone-seed-${{seed}}", f"hydra.sweep.dir={runs}/{target}-alone"]
        call("fusion.stage1", [*several, *alone])
        each = ",".join(f"[{source}]" for source in config.sources)
        after = [
            f"name={target}-after-${{sources.0}}-seed-${{seed}}",
            f"hydra.sweep.dir={runs}/{target}-after",
        ]
        call("fusion.stage2", [*several, "composition=continued", f"sources={each}", *after])


def ranking_folder(config: RankingConfig, target: str) -> Path:
    return Path(config.output) / "runs" / f"{target}-ranking"


def score(config: RankingConfig, name: str) -> float:
    """The first metric of the first validation split of a stored artifact."""
    path = Path(config.output) / "store" / name / "manifest.json"
    split = next(iter(json.loads(path.read_text(encoding="utf-8"))["metrics"].values()))
    return float(next(iter(split.values())))


def gains(config: RankingConfig, target: str) -> dict[str, list[float]]:
    """Of each source, a difference a seed: after it less alone."""
    alone = [score(config, f"{target}-alone-seed-{seed}") for seed in config.seeds]
    return {
        source: [
            score(config, f"{target}-after-{source}-seed-{seed}") - before
            for seed, before in zip(config.seeds, alone, strict=True)
        ]
        for source in config.sources
    }


def judge(
    ranking: dict[str, Any], gained: dict[str, float], top: int = 3
) -> dict[str, dict[str, float | None]]:
    """Each method against the gains, and the mean rank.

    Returns:
        By method: kendall and spearman (None where one of the two does not differ), and top_gain, the mean gain of
        its best `top` sources.
    """
    scores: dict[str, dict[str, float | None]] = {
        method: {source["name"]: source["scores"][method] for source in ranking["sources"]}
        for method in ranking["methods"]
    }
    # Higher is better, as of the methods.
    scores[MEAN] = {
        source["name"]: None if source["mean_rank"] is None else -source["mean_rank"]
        for source in ranking["sources"]
    }
    found: dict[str, dict[str, float | None]] = {}
    for method, of in scores.items():
        names = [source for source in gained if of.get(source) is not None]
        both = correlation([of[name] for name in names], [gained[name] for name in names])
        best = sorted(names, key=lambda name: -float(of[name] or 0))[:top]
        found[method] = both | {"top_gain": statistics.fmean(gained[name] for name in best) if best else None}
    return found


def report(config: RankingConfig) -> dict[str, Any]:
    """A table of the sources and one of the methods for each target, printed and given back."""
    found: dict[str, Any] = {}
    for target in config.targets:
        ranking = json.loads((ranking_folder(config, target) / "result.json").read_text(encoding="utf-8"))
        each = gains(config, target)
        gained = {source: statistics.fmean(values) for source, values in each.items()}
        alone = [score(config, f"{target}-alone-seed-{seed}") for seed in config.seeds]
        judged = judge(ranking, gained)
        found[target] = {
            "alone": alone,
            "gains": each,
            "methods": judged,
            "seconds": ranking["seconds"],
            "agreement": ranking["agreement"],
            "ranking": ranking["sources"],
        }
        say(
            f"\n{target} alone: {_mean(alone)}; gain by seed of going on from a source, and its rank by each method"
        )
        say("\n".join(columns(_source_rows(ranking, each))))
        say("")
        rows = [["against the gain", "Kendall τ", "Spearman ρ", "gain of its best three", "seconds"]]
        for method, values in judged.items():
            took = cost(ranking["seconds"], method)
            rows.append(
                [
                    method,
                    _signed(values["kendall"], 2),
                    _signed(values["spearman"], 2),
                    _signed(values["top_gain"], 3),
                    "-" if took is None else f"{took:.1f}",
                ]
            )
        rows.append(["all sources", "", "", _signed(statistics.fmean(gained.values()), 3), ""])
        rows.append(["the best source", "", "", _signed(max(gained.values()), 3), ""])
        say("\n".join(columns(rows)))
    return found


def cost(seconds: dict[str, float], method: str) -> float | None:
    """Seconds of a method alone, with the states that two methods share; None for the mean rank."""
    if method not in seconds:
        return None
    return seconds[method] + (seconds["states"] if method in ("logme", "probe") else 0.0)


def _source_rows(ranking: dict[str, Any], each: dict[str, list[float]]) -> list[list[str]]:
    by_name = {source["name"]: source for source in ranking["sources"]}
    gained = [statistics.fmean(values) for values in each.values()]
    place = {row["name"]: float(row["mean_rank"]) for row in ranked(list(each), {"gain": gained})}
    rows = [["source", "gain", "rank", *ranking["methods"], MEAN]]
    for source in sorted(each, key=place.__getitem__):
        own = by_name[source]
        shown = [own["ranks"][method] for method in ranking["methods"]] + [own["mean_rank"]]
        rows.append(
            [
                source,
                _mean(each[source], signed=True),
                f"{place[source]:g}",
                *("-" if rank is None else f"{rank:.3g}" for rank in shown),
            ]
        )
    return rows


def _mean(values: list[float], signed: bool = False) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{'+' if signed else ''}.3f}{deviation}"


def _signed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def main(arguments: list[str]) -> int:
    try:
        config = read_config(RankingConfig, arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    train(config)
    found = report(config)
    path = Path(config.output) / f"{'-'.join(config.targets)}.json"
    path.write_text(
        json.dumps({"config": asdict(config), "targets": found}, indent=2) + "\n", encoding="utf-8"
    )
    say(f"Results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
