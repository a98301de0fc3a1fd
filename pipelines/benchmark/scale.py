"""The scale suite: time and memory by number and size of the sources, compared with the formulas."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from fusion.cli.console import columns
from pipelines.benchmark import formulas
from pipelines.benchmark.cases import FUSION, INFER, TRAIN, Case
from pipelines.benchmark.report import Measured, Report, medians, ratio
from pipelines.benchmark.session import BASELINE, OURS, Session

ON_PAPER_SOURCES = 100
MIB = 2**20
PANELS = {
    "train_seconds": "seconds per training step",
    "infer_seconds": "seconds per inference batch",
    "peak_bytes": "peak bytes of a step above loading",
}
Points = list[dict[str, Any]]


def scale(session: Session) -> Report:
    """Measure each size, and compute the costs for backbones that are too large to measure."""
    config, setup, r = session.config.scale, session.setup, session.bottleneck
    usual = [(sources, r) for sources in config.sources]
    sizes = list(dict.fromkeys([*usual, *((config.fixed_sources, wide) for wide in config.bottlenecks)]))
    theirs = [(sources, r) for sources in config.rival_sources]
    every = [*((OURS, size) for size in sizes), *((BASELINE, size) for size in theirs)]
    measured: list[Measured] = [(who, Case(work, FUSION, *size)) for who, size in every for work in (TRAIN, INFER)]
    # Both workers measure a size one after the other, so that a drift within a round hardly changes the ratio.
    measured.sort(key=lambda pair: (pair[1].bottleneck, pair[1].sources, pair[1].work, pair[0]))
    timings = session.time(measured, forget=True)

    def seconds(who: str, size: tuple[int, int], work: str = TRAIN) -> list[float]:
        return medians(timings, who, Case(work, FUSION, *size))

    points = [
        {
            "who": who,
            "sources": size[0],
            "bottleneck": size[1],
            "train_seconds": statistics.median(seconds(who, size)),
            "infer_seconds": statistics.median(seconds(who, size, INFER)),
            "peak_bytes": session.peak(who, Case(TRAIN, FUSION, *size)),
        }
        for who, size in every
    ]
    lines = _predict(session, points[: len(sizes)])
    drawn = [p for p in points if p["who"] == BASELINE or (p["sources"], p["bottleneck"]) in usual]
    plot(drawn, session.output / "scale.png", f"D {session.backbone.hidden_size}, R {r}")
    computed: Points = []
    for backbone in (formulas.BERT_LARGE, formulas.DECODER_7B):
        size = (ON_PAPER_SOURCES, backbone.hidden_size // 16, setup.batch_size * setup.tokens)
        of = dict(zip(("sources", "bottleneck", "tokens"), size, strict=True))
        computed.append({"backbone": backbone.name} | of | formulas.on_paper(backbone, *size))
    (n, wide), *others = sizes
    figures = [
        ratio(
            f"  our fusion of {size[0]}, R {size[1]}, over {n}, R {wide}, step",
            seconds(OURS, size),
            seconds(OURS, (n, wide)),
        )
        for size in others
    ]
    figures += [
        ratio(f"  fusion of {size[0]}, step: the baseline over ours", seconds(BASELINE, size), seconds(OURS, size))
        for size in theirs
        if size in sizes
    ]
    lines += ["\ncomputed from the formulas, not measured:"]
    lines += columns(
        [[key, *(f"{p[key]:.3g}" if key != "backbone" else p[key] for p in computed)] for key in computed[0]]
    )
    return Report(figures, timings, more={"points": points, "computed": computed}, lines=lines)


def _predict(session: Session, points: Points) -> list[str]:
    """Add predicted costs: memory from the formula, time in proportion to the multiply-adds of the first point."""
    backbone, setup, first = session.backbone, session.setup, points[0]
    rows = [["N", "R", "step s", "predicted", "infer s", "predicted", "peak MiB", "predicted"]]
    for p in points:
        n, r = p["sources"], p["bottleneck"]
        p["train_multiply_adds"] = formulas.training(backbone, setup, n, r)
        p["infer_multiply_adds"] = formulas.inference(backbone, setup, n, r)
        p["predicted_peak_bytes"] = formulas.training_bytes(backbone, n, r, setup.batch_size * setup.tokens)
        for work in (TRAIN, INFER):
            growth = p[f"{work}_multiply_adds"] / first[f"{work}_multiply_adds"]
            p[f"predicted_{work}_seconds"] = first[f"{work}_seconds"] * growth
        seconds = [p[f"{key}_seconds"] for key in ("train", "predicted_train", "infer", "predicted_infer")]
        peaks = [p["peak_bytes"] / MIB, p["predicted_peak_bytes"] / MIB]
        rows.append([str(n), str(r), *(f"{s:.4f}" for s in seconds), *(f"{b:.1f}" for b in peaks)])
    title = f"\nmeasured and predicted: time in proportion to the multiply-adds, from N = {first['sources']}; "
    return [f"{title}memory from the formula", *columns(rows)]


def plot(points: Points, path: Path, title: str) -> None:
    """Plot time and memory against N, with one line per implementation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for who, style, name in ((OURS, "o-", "this project"), (BASELINE, "s-", "adapters 1.3.0")):
            line = sorted((p["sources"], p[key]) for p in points if p["who"] == who)
            axis.plot([n for n, _ in line], [value for _, value in line], style, label=name)
        axis.set_xscale("log", base=2)
        axis.set(ylim=(0, None), xlabel="source adapters", title=label)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"AdapterFusion, {title}", fontsize=10)
    figure.savefig(path, dpi=120)
