"""The families suite: one adapter and a fusion in each model family, over the bare model and against the baseline."""

from __future__ import annotations

from statistics import median
from typing import Any

from fusion.cli.console import columns
from pipelines.benchmark.cases import ADAPTER, BARE, FUSION, INFER, TRAIN, Case
from pipelines.benchmark.config import BenchmarkError
from pipelines.benchmark.random_backbone import model_settings
from pipelines.benchmark.report import Figure, Report, Target, Timings, medians, ratio
from pipelines.benchmark.session import BASELINE, OURS, Session
from pipelines.commands import say

SHAPE = (4, 384)  # layers of each stack, and hidden size
FEW, MANY = 2, 14  # sources of the fusions whose steps are compared


def families(session: Session) -> Report:
    """Measure random models of every family, in the same shape."""
    config = session.config
    layers, hidden_size = config.shape or SHAPE
    r = max(1, hidden_size // 16)
    bare, one, one_step = Case(INFER, BARE), Case(INFER, ADAPTER, 0, r), Case(TRAIN, ADAPTER, 0, r)
    fused, fused_step = (Case(work, FUSION, config.families.sources, r) for work in (INFER, TRAIN))
    few, many = (Case(TRAIN, FUSION, sources, r) for sources in (FEW, MANY))
    figures: list[Figure] = []
    timings: Timings = {}
    found: list[dict[str, Any]] = []
    rows = [["family", "bare s", "adapter", "fusion", "step s", "fusion s", "peak MiB", "rival step", "rival fusion"]]
    for name in config.families.names:
        session.use_model(name, model_settings(name, layers, hidden_size))
        measured = [(OURS, case) for case in (bare, one, fused, one_step, fused_step, few, many)]
        unsupported = ""
        try:
            session.worker(BASELINE).ask("time", case=one_step, warmup=0, steps=1)
        except BenchmarkError as error:
            unsupported = str(error)
            say(f"{name}: not supported by the baseline: {unsupported}")
        else:
            measured += [(BASELINE, case) for case in (one_step, fused_step)]
        own = session.time(measured)
        timings |= {(f"{name}: {who}", case): values for (who, case), values in own.items()}

        def seconds(case: Case, who: str = OURS, own: Timings = own) -> list[float]:
            return medians(own, who, case)

        figures += [
            ratio(f"{name}: one adapter over the bare model, inference", seconds(one), seconds(bare)),
            ratio(f"{name}: fusion of {fused.sources} over the bare model, inference", seconds(fused), seconds(bare)),
            ratio(f"{name}: fusion of {MANY} over one of {FEW}, step", seconds(many), seconds(few), Target(1.3)),
        ]
        peak = session.peak(OURS, fused_step)
        theirs = ["-", "-"]
        if not unsupported:
            pairs = [(seconds(case, BASELINE), seconds(case)) for case in (one_step, fused_step)]
            figures += [
                ratio(f"{name}: one adapter, step: the baseline over ours", *pairs[0]),
                ratio(f"{name}: fusion of {fused.sources}, step: the baseline over ours", *pairs[1]),
            ]
            theirs = [f"{median(rival) / median(ours):.2f}x" for rival, ours in pairs]
        values = [median(seconds(case)) for case in (bare, one, fused, one_step, fused_step)]
        infer = [f"{values[0]:.4f}", *(f"{value / values[0]:.2f}x" for value in values[1:3])]
        rows.append([name, *infer, *(f"{value:.4f}" for value in values[3:]), f"{peak / 2**20:.1f}", *theirs])
        found.append({"family": name, "peak_bytes": peak, "unsupported": unsupported})
    start = f"\nrandom models of {layers} layers, hidden size {hidden_size}; fusion of {fused.sources}; x: over the bare model"
    return Report(figures, timings, more={"families": found}, lines=[start, *columns(rows)])
