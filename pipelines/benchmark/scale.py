"""Time and memory against the number of sources and their size, beside the formulas."""

from __future__ import annotations

import statistics
from typing import Any

from pipelines.benchmark import floor, formulas, plot, weights
from pipelines.benchmark.cases import FUSION, INFER, TRAIN, Case
from pipelines.benchmark.report import Report
from pipelines.benchmark.session import OURS, RIVAL, Measured, Session
from pipelines.benchmark.verdicts import ratio

ON_PAPER_SOURCES = 100
MIB = 2**20


def scale(session: Session) -> Report:
    """Measured for each size, then computed for backbones that do not fit here."""
    config, r = session.config.scale, session.bottleneck
    wide = [(config.fixed_sources, bottleneck) for bottleneck in config.bottlenecks]
    many = [(sources, r) for sources in config.sources]
    theirs = [(sources, r) for sources in config.rival_sources]
    sizes = list(dict.fromkeys([*many, *wide]))
    for bottleneck in {b for _, b in [*sizes, *theirs]}:
        session.make_weights(max(n for n, b in [*sizes, *theirs] if b == bottleneck), bottleneck)
    measured: list[Measured] = [
        (OURS, Case(work, FUSION, *size)) for size in sizes for work in (TRAIN, INFER)
    ]
    measured += [(RIVAL, Case(work, FUSION, *size)) for size in theirs for work in (TRAIN, INFER)]
    # Ours and the rival's of one size stand together, so that a drift within a round hardly parts them.
    measured.sort(key=lambda pair: (pair[1].bottleneck, pair[1].sources, pair[1].work, pair[0]))
    timings = session.time(measured, forget=True)
    peaks = {pair: session.peak(*pair) for pair in measured if pair[1].work == TRAIN}

    points = [
        {
            "who": who,
            "sources": n,
            "bottleneck": bottleneck,
            "train_seconds": statistics.median(timings.medians(who, Case(TRAIN, FUSION, n, bottleneck))),
            "infer_seconds": statistics.median(timings.medians(who, Case(INFER, FUSION, n, bottleneck))),
            "peak_bytes": peaks[who, Case(TRAIN, FUSION, n, bottleneck)],
        }
        for who, group in ((OURS, sizes), (RIVAL, theirs))
        for n, bottleneck in group
    ]
    ours = [point for point in points if point["who"] == OURS]
    _predict(session, ours)
    picture = session.output / "scale.png"
    of_usual_size = [point for point in points if (point["sources"], point["bottleneck"]) in [*many, *theirs]]
    drawn = plot.against_sources(of_usual_size, picture, f"D {session.sizes['hidden_size']}, R {r}")
    paper = _on_paper(session.config.batch_size * session.config.tokens)
    first = sizes[0]
    figures = [
        ratio(
            f"  our fusion of {n}, R {bottleneck}, over {first[0]}, R {first[1]}, step",
            timings.medians(OURS, Case(TRAIN, FUSION, n, bottleneck)),
            timings.medians(OURS, Case(TRAIN, FUSION, *first)),
        )
        for n, bottleneck in sizes[1:]
    ]
    figures += [
        ratio(
            f"  fusion of {n}, step: the rival over ours",
            timings.medians(RIVAL, Case(TRAIN, FUSION, n, r)),
            timings.medians(OURS, Case(TRAIN, FUSION, n, r)),
        )
        for n, _ in theirs
        if (n, r) in sizes
    ]
    lines = [*_comparison(ours), *_paper_lines(paper), *([f"\nPicture: {picture}"] if drawn else [])]
    return Report(figures, timings, more={"points": points, "computed": paper}, lines=lines)


def _predict(session: Session, points: list[dict[str, Any]]) -> None:
    """Adds what the formulas say: bytes outright, seconds from the first point by the count of products."""
    config, sizes = session.config, session.sizes
    shape = floor.Sizes(
        rows=config.batch_size,
        tokens=config.tokens,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        heads=sizes["heads"],
        layers=sizes["layers"],
        outputs=weights.OUTPUTS,
    )
    backbone = formulas.Backbone(
        config.backbone, sizes["layers"], sizes["hidden_size"], sizes["intermediate_size"], sizes["heads"]
    )
    for point in points:
        n, r = point["sources"], point["bottleneck"]
        point["train_multiply_adds"] = floor.multiply_adds(floor.training_step(shape, r, n))
        point["infer_multiply_adds"] = floor.multiply_adds(floor.inference(shape, r, n))
        point["predicted_peak_bytes"] = formulas.training_bytes(
            backbone, n, r, config.batch_size * config.tokens
        )
    first = points[0]
    for point in points:
        for work in ("train", "infer"):
            growth = point[f"{work}_multiply_adds"] / first[f"{work}_multiply_adds"]
            point[f"predicted_{work}_seconds"] = first[f"{work}_seconds"] * growth


def _comparison(points: list[dict[str, Any]]) -> list[str]:
    first = points[0]
    lines = [
        f"\nmeasured and predicted: seconds grow with the products from those at N = {first['sources']}; "
        "bytes come from the formula alone",
        f"{'N':>5} {'R':>4} {'step s':>9} {'predicted':>10} {'infer s':>9} {'predicted':>10} {'peak MiB':>9} {'predicted':>10}",
    ]
    for p in points:
        lines.append(
            f"{p['sources']:>5} {p['bottleneck']:>4} {p['train_seconds']:9.4f} {p['predicted_train_seconds']:10.4f} "
            f"{p['infer_seconds']:9.4f} {p['predicted_infer_seconds']:10.4f} "
            f"{p['peak_bytes'] / MIB:9.1f} {p['predicted_peak_bytes'] / MIB:10.1f}"
        )
    return lines


def _on_paper(tokens: int) -> list[dict[str, Any]]:
    found = []
    for backbone in (formulas.BERT_LARGE, formulas.DECODER_7B):
        r = backbone.hidden_size // 16
        values = formulas.on_paper(backbone, ON_PAPER_SOURCES, r, tokens)
        found.append(
            {"backbone": backbone.name, "sources": ON_PAPER_SOURCES, "bottleneck": r, "tokens": tokens}
            | values
        )
    return found


def _paper_lines(paper: list[dict[str, Any]]) -> list[str]:
    lines = ["\ncomputed from the formulas, not measured:"]
    for p in paper:
        backbone = p["multiply_adds_a_token_backbone"]
        lines.append(
            f"  {p['backbone']}, {p['sources']} sources of R {p['bottleneck']}, {p['tokens']} tokens: the fusion's products are "
            f"{p['multiply_adds_a_token_folded'] / backbone:.2f} of the backbone's in training "
            f"(as the equations stand {p['multiply_adds_a_token_plain'] / backbone:.2f}), "
            f"{p['multiply_adds_a_token_merged'] / backbone:.2f} in inference; it keeps "
            f"{p['bytes_kept_folded'] / 2**30:.1f} GiB for backward (as they stand {p['bytes_kept_plain'] / 2**30:.1f}, "
            f"the backbone {p['bytes_kept_backbone'] / 2**30:.1f}); {p['parameters_trained'] / 1e6:,.0f} M parameters train, "
            f"the optimizer's state is {p['bytes_optimizer_state'] / 2**30:.2f} GiB, the stored fusion "
            f"{p['bytes_stored_fusion'] / 2**30:.2f} and its sources {p['bytes_stored_sources'] / 2**30:.2f} GiB"
        )
    return lines
