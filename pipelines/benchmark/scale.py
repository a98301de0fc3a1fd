"""Time and memory against the number of sources and their size, beside the formulas."""

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
MIB, GIB = 2**20, 2**30
Points = list[dict[str, Any]]


def scale(session: Session) -> Report:
    """Measured for each size, then computed for backbones that do not fit here."""
    config, r = session.config.scale, session.bottleneck
    usual = [(sources, r) for sources in config.sources]
    sizes = list(dict.fromkeys([*usual, *((config.fixed_sources, wide) for wide in config.bottlenecks)]))
    theirs = [(sources, r) for sources in config.rival_sources]
    every = [*((OURS, size) for size in sizes), *((BASELINE, size) for size in theirs)]
    for bottleneck in {b for _, (_, b) in every}:
        session.make_weights(max(n for _, (n, b) in every if b == bottleneck), bottleneck)
    measured: list[Measured] = [
        (who, Case(work, FUSION, *size)) for who, size in every for work in (TRAIN, INFER)
    ]
    # Both of one size are measured side by side, so that a drift within a round hardly changes their ratio.
    measured.sort(key=lambda pair: (pair[1].bottleneck, pair[1].sources, pair[1].work, pair[0]))
    timings = session.time(measured, forget=True)

    def train_seconds(who: str, size: tuple[int, int]) -> list[float]:
        return medians(timings, who, Case(TRAIN, FUSION, *size))

    points = [
        {
            "who": who,
            "sources": size[0],
            "bottleneck": size[1],
            "train_seconds": statistics.median(train_seconds(who, size)),
            "infer_seconds": statistics.median(medians(timings, who, Case(INFER, FUSION, *size))),
            "peak_bytes": session.peak(who, Case(TRAIN, FUSION, *size)),
        }
        for who, size in every
    ]
    ours = points[: len(sizes)]
    _predict(session, ours)
    picture = session.output / "scale.png"
    drawn = [p for p in points if p["who"] == BASELINE or (p["sources"], p["bottleneck"]) in usual]
    plot(drawn, picture, f"D {session.backbone.hidden_size}, R {r}")
    computed = _on_paper(session.config.batch_size * session.config.tokens)
    first = sizes[0]
    figures = [
        ratio(
            f"  our fusion of {n}, R {bottleneck}, over {first[0]}, R {first[1]}, step",
            train_seconds(OURS, (n, bottleneck)),
            train_seconds(OURS, first),
        )
        for n, bottleneck in sizes[1:]
    ]
    figures += [
        ratio(
            f"  fusion of {size[0]}, step: the baseline over ours",
            train_seconds(BASELINE, size),
            train_seconds(OURS, size),
        )
        for size in theirs
        if size in sizes
    ]
    lines = [*_comparison(ours), *map(_sentence, computed), f"\nPicture: {picture}"]
    return Report(figures, timings, more={"points": points, "computed": computed}, lines=lines)


def _predict(session: Session, points: Points) -> None:
    """Add what the formulas give: bytes outright, seconds from the first point by the count of products."""
    backbone, setup = session.backbone, session.setup
    for point in points:
        n, r = point["sources"], point["bottleneck"]
        step = formulas.training_step(backbone, setup, r, n)
        point["train_multiply_adds"] = formulas.multiply_adds(step)
        point["infer_multiply_adds"] = formulas.inference(backbone, setup, n, r)
        point["predicted_peak_bytes"] = formulas.training_bytes(
            backbone, n, r, setup.batch_size * setup.tokens
        )
        for work in ("train", "infer"):
            growth = point[f"{work}_multiply_adds"] / points[0][f"{work}_multiply_adds"]
            point[f"predicted_{work}_seconds"] = points[0][f"{work}_seconds"] * growth


def _comparison(points: Points) -> list[str]:
    rows = [["N", "R", "step s", "predicted", "infer s", "predicted", "peak MiB", "predicted"]]
    for p in points:
        seconds = (p[f"{key}_seconds"] for key in ("train", "predicted_train", "infer", "predicted_infer"))
        peaks = (p[key] / MIB for key in ("peak_bytes", "predicted_peak_bytes"))
        rows.append(
            [
                str(p["sources"]),
                str(p["bottleneck"]),
                *(f"{s:.4f}" for s in seconds),
                *(f"{b:.1f}" for b in peaks),
            ]
        )
    return [
        f"\nmeasured and predicted: seconds grow with the products from those at N = {points[0]['sources']}; "
        "bytes come from the formula alone",
        *columns(rows),
        "\ncomputed from the formulas, not measured:",
    ]


def _on_paper(tokens: int) -> Points:
    found: Points = []
    for backbone in (formulas.BERT_LARGE, formulas.DECODER_7B):
        r = backbone.hidden_size // 16
        of = {"backbone": backbone.name, "sources": ON_PAPER_SOURCES, "bottleneck": r, "tokens": tokens}
        found.append(of | formulas.on_paper(backbone, ON_PAPER_SOURCES, r, tokens))
    return found


def _sentence(p: dict[str, Any]) -> str:
    backbone = p["multiply_adds_a_token_backbone"]
    return (
        f"  {p['backbone']}, {p['sources']} sources of R {p['bottleneck']}, {p['tokens']} tokens: the fusion's products are "
        f"{p['multiply_adds_a_token_folded'] / backbone:.2f} of the backbone's in training "
        f"(as the equations are written {p['multiply_adds_a_token_plain'] / backbone:.2f}), "
        f"{p['multiply_adds_a_token_merged'] / backbone:.2f} in inference; it keeps "
        f"{p['bytes_kept_folded'] / GIB:.1f} GiB for backward (as they are written {p['bytes_kept_plain'] / GIB:.1f}, "
        f"the backbone {p['bytes_kept_backbone'] / GIB:.1f}); {p['parameters_trained'] / 1e6:,.0f} M parameters train, "
        f"the optimizer's state is {p['bytes_optimizer_state'] / GIB:.2f} GiB, the stored fusion "
        f"{p['bytes_stored_fusion'] / GIB:.2f} and its sources {p['bytes_stored_sources'] / GIB:.2f} GiB"
    )


def plot(points: Points, path: Path, title: str) -> None:
    """Time and memory against N, one line for each of the two."""
    from matplotlib.figure import Figure

    panels = (
        ("train_seconds", "seconds per training step", 1.0),
        ("infer_seconds", "seconds per inference batch", 1.0),
        ("peak_bytes", "peak of a step above loading, MiB", MIB),
    )
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axis, (key, label, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for who, style, name in ((OURS, "o-", "this project"), (BASELINE, "s-", "adapters 1.3.0")):
            line = sorted((p["sources"], p[key] / unit) for p in points if p["who"] == who)
            axis.plot([n for n, _ in line], [value for _, value in line], style, label=name)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel("source adapters")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"AdapterFusion, {title}", fontsize=10)
    figure.savefig(path, dpi=120)
