"""The scale suite: time and memory by number and size of the sources, compared with the formulas."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from fusion.cli.console import columns
from pipelines.benchmark import formulas
from pipelines.benchmark.cases import FUSION, INFER, TRAIN, Case
from pipelines.benchmark.report import Report, medians, ratio
from pipelines.benchmark.session import BASELINE, OURS, Session

ON_PAPER_SOURCES = 100
PANELS = {
    "train_seconds": "seconds per training step",
    "infer_seconds": "seconds per inference batch",
    "peak_bytes": "peak bytes of a step above loading",
}
Points = list[dict[str, Any]]
Size = tuple[int, int]  # sources and bottleneck


def scale(session: Session) -> Report:
    """Measure each size, and compute the costs for backbones that are too large to measure."""
    config, r, tokens = session.config.scale, session.bottleneck, session.setup.batch_size * session.setup.tokens
    usual = [(sources, r) for sources in config.sources]
    sizes = list(dict.fromkeys([*usual, *((config.fixed_sources, wide) for wide in config.bottlenecks)]))
    theirs = [(sources, r) for sources in config.rival_sources]
    every = [*((OURS, size) for size in sizes), *((BASELINE, size) for size in theirs)]
    measured = [(who, Case(work, FUSION, *size)) for who, size in every for work in (TRAIN, INFER)]
    # Both workers measure a size one after the other, so that a drift within a round hardly changes the ratio.
    measured.sort(key=lambda pair: (pair[1].bottleneck, pair[1].sources, pair[1].work, pair[0]))
    timings = session.time(measured, forget=True)

    def seconds(who: str, size: Size, work: str = TRAIN) -> list[float]:
        return medians(timings, who, Case(work, FUSION, *size))

    points: Points = [
        {
            "who": who,
            "sources": size[0],
            "bottleneck": size[1],
            "train_seconds": statistics.median(seconds(who, size)),
            "infer_seconds": statistics.median(seconds(who, size, INFER)),
            "peak_bytes": session.peak(who, Case(TRAIN, FUSION, *size)),
            **formulas.predicted(session.backbone, session.setup, *size),
        }
        for who, size in every
    ]
    rows = [["N", "R", "step s", "predicted", "infer s", "predicted", "peak MiB", "predicted"]]
    for p in points:
        cells = []
        for work in (TRAIN, INFER):
            growth = p[f"{work}_multiply_adds"] / points[0][f"{work}_multiply_adds"]
            p[f"predicted_{work}_seconds"] = points[0][f"{work}_seconds"] * growth
            cells += [f"{p[key]:.4f}" for key in (f"{work}_seconds", f"predicted_{work}_seconds")]
        cells += [f"{p[key] / 2**20:.1f}" for key in ("peak_bytes", "predicted_peak_bytes")]
        rows.append([str(p["sources"]), str(p["bottleneck"]), *cells])
    drawn = [p for p in points if p["who"] == BASELINE or (p["sources"], p["bottleneck"]) in usual]
    plot(drawn, session.output / "scale.png", f"D {session.backbone.hidden_size}, R {r}")
    computed = [
        formulas.on_paper(backbone, ON_PAPER_SOURCES, backbone.hidden_size // 16, tokens)
        for backbone in (formulas.BERT_LARGE, formulas.DECODER_7B)
    ]
    first, *others = sizes
    figures = [
        ratio(
            f"  our fusion of {size[0]}, R {size[1]}, over {first[0]}, R {first[1]}, step",
            seconds(OURS, size),
            seconds(OURS, first),
        )
        for size in others
    ]
    figures += [
        ratio(f"  fusion of {size[0]}, step: the baseline over ours", seconds(BASELINE, size), seconds(OURS, size))
        for size in theirs
        if size in sizes
    ]
    start = f"measured and predicted: time in proportion to the multiply-adds, from N = {first[0]}"
    lines = [f"\n{start}; memory from the formula", *columns(rows), "\ncomputed from the formulas, not measured:"]
    lines += columns(
        [[key, *(f"{p[key]:.3g}" if key != "backbone" else p[key] for p in computed)] for key in computed[0]]
    )
    return Report(figures, timings, more={"points": points, "computed": computed}, lines=lines)


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
