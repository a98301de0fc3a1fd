"""Fusion against the single adapter, over seeds: sources once, then each target several times.

    python -m pipelines.two_stage targets=[cb] seeds=[1,2,3,4,5] backbone=minilm data_dir=../shared/data

For each target and seed: a single adapter is trained on the target, then a fusion of that adapter with the
source adapters of all other tasks, as the AdapterFusion paper does. Both choose their best epoch on the
validation rows that they are scored on. The report gives mean and standard deviation of both and the mean
paired difference with its 95 % interval (Student's t over the seeds). What is stored already is not trained
again, so a broken run goes on where it was, and more seeds or targets cost only themselves.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from fusion.errors import UserError
from fusion.runs.signals import exit_code
from pipelines.commands import call, read_config, say


@dataclass
class TwoStageConfig:
    sources: list[str] = field(default_factory=lambda: ["snli", "qqp", "mrpc", "rte", "cb"])
    targets: list[str] = field(default_factory=lambda: ["cb"])
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    backbone: str = "minilm"
    data_dir: str | None = None
    output: str = "outputs/two_stage"
    source_overrides: list[str] = field(default_factory=lambda: ["optim.lr=5e-4", "trainer.max_epochs=3"])
    single_overrides: list[str] = field(default_factory=lambda: ["optim.lr=5e-4"])
    fusion_overrides: list[str] = field(default_factory=lambda: ["optim.lr=2e-4"])
    target_overrides: list[str] = field(default_factory=lambda: ["trainer.max_epochs=10"])  # of both

    def __post_init__(self) -> None:
        for key in ("sources", "targets", "seeds"):
            values = getattr(self, key)
            if not values or len(set(values)) != len(values):
                raise UserError(f"{key}={values}: expected one or more, each once")


def train(config: TwoStageConfig) -> None:
    """All trainings, as the project's own commands; each skips what is stored already."""
    store = f"{config.output}/store"
    shared = [f"backbone={config.backbone}", f"store={store}", "logger=csv"]
    if config.data_dir:
        shared.append(f"data.dir={config.data_dir}")
    runs = f"{config.output}/runs"
    sources = ",".join(config.sources)
    say(f"\n[1/3] sources: {sources}")
    call(
        "fusion.stage1",
        ["-m", f"+task={sources}", *shared, *config.source_overrides, f"hydra.sweep.dir={runs}/sources"],
    )
    for target in config.targets:
        seeds = ",".join(str(seed) for seed in config.seeds)
        several = ["-m", f"+task={target}", f"seed={seeds}", *shared, *config.target_overrides]
        say(f"\n[2/3] single adapters for {target}, seeds {seeds}")
        name = f"name={target}-seed-${{seed}}"
        call("fusion.stage1", [*several, *config.single_overrides, name, f"hydra.sweep.dir={runs}/{target}"])
        say(f"\n[3/3] fusions for {target}, seeds {seeds}")
        names = [*(source for source in config.sources if source != target), f"{target}-seed-${{seed}}"]
        fused = [f"sources=[{','.join(names)}]", f"name={target}-adapterfusion-seed-${{seed}}"]
        call(
            "fusion.stage2",
            [*several, *config.fusion_overrides, *fused, f"hydra.sweep.dir={runs}/{target}-fusion"],
        )


def scores(config: TwoStageConfig, name: str) -> dict[str, float]:
    """The validation metrics that a stored artifact's manifest holds: of its first validation split."""
    manifest = json.loads(
        (Path(config.output) / "store" / name / "manifest.json").read_text(encoding="utf-8")
    )
    return next(iter(manifest["metrics"].values()))


def compare(single: list[float], fusion: list[float]) -> dict[str, float]:
    """Means, standard deviations and the mean paired difference with its 95 % interval.

    Args:
        single, fusion: a score a seed, in the order of the seeds.
    """
    differences = [two - one for one, two in zip(single, fusion, strict=True)]
    n = len(differences)
    # Student's t: few seeds make a wide interval.
    half = (
        float(stats.t.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    )
    mean = statistics.fmean(differences)
    return {
        "single": statistics.fmean(single),
        "single_deviation": statistics.stdev(single) if n > 1 else float("nan"),
        "fusion": statistics.fmean(fusion),
        "fusion_deviation": statistics.stdev(fusion) if n > 1 else float("nan"),
        "difference": mean,
        "low": mean - half,
        "high": mean + half,
    }


def verdict(compared: dict[str, float]) -> str:
    """What the interval allows to say."""
    if compared["low"] > 0:
        return "fusion is better"
    if compared["high"] < 0:
        return "fusion is worse"
    return "no difference shown"


def report(config: TwoStageConfig) -> dict[str, Any]:
    """A comparison for each target and metric, printed and given back."""
    rows: dict[str, Any] = {}
    say(
        f"\nsources {', '.join(config.sources)}; {len(config.seeds)} seeds; mean ± deviation; difference with 95 % interval"
    )
    for target in config.targets:
        single = [scores(config, f"{target}-seed-{seed}") for seed in config.seeds]
        fusion = [scores(config, f"{target}-adapterfusion-seed-{seed}") for seed in config.seeds]
        for metric in single[0]:
            compared = compare([s[metric] for s in single], [s[metric] for s in fusion])
            rows.setdefault(target, {})[metric] = compared | {
                "singles": [s[metric] for s in single],
                "fusions": [s[metric] for s in fusion],
            }
            say(
                f"{target:<10} {metric:<10} single {compared['single']:.3f} ± {compared['single_deviation']:.3f}   "
                f"fusion {compared['fusion']:.3f} ± {compared['fusion_deviation']:.3f}   "
                f"{compared['difference']:+.3f} [{compared['low']:+.3f}, {compared['high']:+.3f}]  {verdict(compared)}"
            )
    return rows


def main(arguments: list[str]) -> int:
    try:
        config = read_config(TwoStageConfig, arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    train(config)
    rows = report(config)
    path = Path(config.output) / f"{'-'.join(config.targets)}.json"
    path.write_text(
        json.dumps({"config": asdict(config), "targets": rows}, indent=2) + "\n", encoding="utf-8"
    )
    say(f"Results: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
