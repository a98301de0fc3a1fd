"""Compare fusion with a single adapter over several seeds; sources are trained once, targets once per seed.

    python -m pipelines.two_stage targets=[cb] seeds=[1,2,3,4,5] backbone=minilm data_dir=../shared/data

For each target and seed, a single adapter is trained on the target, then a fusion of it with the source adapters of
all other tasks, as in the AdapterFusion paper. Both select their best epoch on the validation examples that they are
evaluated on. The report contains the mean and standard deviation of both, and the mean paired difference with its 95 %
confidence interval (Student's t over the seeds). Existing artifacts are reused: an interrupted run continues, and
additional seeds or targets only train the new ones.
"""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

from scipy import stats

from fusion.cli.console import show_table
from pipelines.commands import SeedsConfig, distinct, run_workflow, say


@dataclass
class TwoStageConfig(SeedsConfig):
    sources: list[str] = distinct(["snli", "qqp", "mrpc", "rte", "cb"])
    targets: list[str] = distinct(["cb"])
    seeds: list[int] = distinct([1, 2, 3, 4, 5])
    output: str = "outputs/two_stage"
    source_overrides: list[str] = field(default_factory=lambda: ["optim.lr=5e-4", "trainer.max_epochs=3"])
    single_overrides: list[str] = field(default_factory=lambda: ["optim.lr=5e-4"])
    fusion_overrides: list[str] = field(default_factory=lambda: ["optim.lr=2e-4"])
    target_overrides: list[str] = field(default_factory=lambda: ["trainer.max_epochs=10"])  # of both


def train(config: TwoStageConfig) -> None:
    sources, seeds = ",".join(config.sources), ",".join(map(str, config.seeds))
    say(f"\n[1/3] sources: {sources}")
    config.sweep("fusion.stage1", "sources", [f"+task={sources}", *config.source_overrides])
    for target in config.targets:
        shared = [f"+task={target}", *config.target_overrides]
        say(f"\n[2/3] single adapters for {target}, seeds {seeds}")
        config.sweep("fusion.stage1", target, [*shared, *config.single_overrides], name=target)
        say(f"\n[3/3] fusions for {target}, seeds {seeds}")
        names = [*(source for source in config.sources if source != target), f"{target}-seed-${{seed}}"]
        words = [*shared, *config.fusion_overrides, f"sources=[{','.join(names)}]"]
        config.sweep("fusion.stage2", f"{target}-fusion", words, name=f"{target}-adapterfusion")


def compare(single: list[float], fusion: list[float]) -> dict[str, float]:
    """Return means, standard deviations and the mean paired difference with its 95 % confidence interval."""
    differences = [two - one for one, two in zip(single, fusion, strict=True)]
    n, mean = len(differences), statistics.fmean(differences)
    deviations = [statistics.stdev(x) if n > 1 else math.nan for x in (single, fusion, differences)]
    half = float(stats.t.ppf(0.975, n - 1)) * deviations[2] / math.sqrt(n)
    return {
        "single": statistics.fmean(single),
        "single_deviation": deviations[0],
        "fusion": statistics.fmean(fusion),
        "fusion_deviation": deviations[1],
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
    }


def verdict(compared: dict[str, float]) -> str:
    """Return which method is better, or that the interval includes zero."""
    if compared["low"] > 0:
        return "fusion is better"
    return "fusion is worse" if compared["high"] < 0 else "no significant difference"


def report(config: TwoStageConfig) -> dict[str, Any]:
    """Print the comparison and return it by target and metric."""
    found: dict[str, dict[str, Any]] = {}
    table = [["target", "metric", "single", "fusion", "difference", "95% interval", ""]]
    for target in config.targets:
        found[target] = {}
        single, fusion = config.scores(target), config.scores(f"{target}-adapterfusion")
        for metric in single[0]:
            ones, twos = [scores[metric] for scores in single], [scores[metric] for scores in fusion]
            c = compare(ones, twos)
            found[target][metric] = c | {"singles": ones, "fusions": twos}
            means = [f"{c[key]:.3f} ± {c[f'{key}_deviation']:.3f}" for key in ("single", "fusion")]
            interval = [f"{c['difference']:+.3f}", f"{c['low']:+.3f} to {c['high']:+.3f}"]
            table.append([target, metric, *means, *interval, verdict(c)])
    say(f"\nsources {', '.join(config.sources)}; {len(config.seeds)} seeds; mean ± standard deviation\n")
    show_table(table)
    return found


def work(config: TwoStageConfig) -> None:
    train(config)
    config.save("-".join(config.targets), targets=report(config))


def main(arguments: list[str] | None = None) -> int:
    return run_workflow(TwoStageConfig, arguments, work)


if __name__ == "__main__":
    sys.exit(main())
