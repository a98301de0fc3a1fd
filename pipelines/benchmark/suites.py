"""Every suite by its name, and those that time single steps and batches: train, infer, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from pipelines.benchmark import commands
from pipelines.benchmark.cases import ADAPTER, BARE, CLIPPED, FULL, FUSION, INFER, LOOP, LOWER_BOUND, TRAIN, Case
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.report import (
    Figure,
    Measured,
    Report,
    Target,
    Timings,
    describe_machine,
    finish,
    medians,
    ratio,
)
from pipelines.benchmark.scale import scale
from pipelines.benchmark.session import BASELINE, OURS, Session
from pipelines.commands import say

FEW, MANY = 2, 64  # sources that the usual number is compared with


Comparison = tuple[str, Measured, Measured, Target | None]


def compared(timings: Timings, comparisons: list[Comparison]) -> list[Figure]:
    return [
        ratio(what, medians(timings, *above), medians(timings, *below), target)
        for what, above, below, target in comparisons
    ]


def train(session: Session) -> Report:
    """Training steps against the baseline, fewer and more sources, the matrix products, and the bare loop."""
    n, r = session.config.sources, session.bottleneck
    agreement = session.agreement([Case(TRAIN, ADAPTER, 0, r), Case(TRAIN, FUSION, n, r)])

    def both(case: Case) -> tuple[Measured, Measured]:
        return (OURS, case), (BASELINE, case)

    ours, theirs = both(Case(TRAIN, FUSION, n, r))
    ours_few, theirs_few = both(Case(TRAIN, FUSION, FEW, r))
    ours_one, theirs_one = both(Case(TRAIN, ADAPTER, 0, r))
    ours_full, theirs_full = both(Case(TRAIN, FULL))
    ours_many = OURS, Case(TRAIN, FUSION, MANY, r)
    _, theirs_dropout = both(Case(TRAIN, FUSION, n, r, dropout=True))
    _, theirs_one_dropout = both(Case(TRAIN, ADAPTER, 0, r, dropout=True))
    bound, bound_few, bound_many = ((OURS, Case(LOWER_BOUND, FUSION, count, r)) for count in (n, FEW, MANY))
    bound_one = OURS, Case(LOWER_BOUND, ADAPTER, 0, r)
    loop, bare_loop = (OURS, Case(LOOP, ADAPTER, 0, r)), (OURS, Case(CLIPPED, ADAPTER, 0, r))
    # What is compared is measured side by side, so that a drift within a round hardly changes a ratio.
    timings = session.time(
        [
            *(theirs_dropout, ours, theirs, theirs_few, ours_few, ours_many, bound, bound_few, bound_many),
            *(bound_one, ours_one, theirs_one, theirs_one_dropout, loop, bare_loop, ours_full, theirs_full),
        ]
    )
    faster = Target(4.5, at_least=True)
    figures = compared(
        timings,
        [
            (f"fusion of {n}, step: the baseline over ours, dropout off in both", theirs, ours, faster),
            (f"fusion of {n}, step: the baseline over ours, own defaults", theirs_dropout, ours, faster),
            (f"our fusion of {n} over one of {FEW}, step", ours, ours_few, Target(1.25)),
            (f"our fusion of {MANY} over one of {FEW}, step", ours_many, ours_few, Target(2.0)),
            (f"  their matrix products alone, {n} over {FEW}", bound, bound_few, None),
            (f"  their matrix products alone, {MANY} over {FEW}", bound_many, bound_few, None),
            (f"  the baseline's fusion of {n} over one of {FEW}", theirs, theirs_few, None),
            ("our one adapter, step, over its matrix products alone", ours_one, bound_one, Target(1.25)),
            ("  the baseline's, dropout off", theirs_one, bound_one, None),
            ("  the baseline's, with its defaults", theirs_one_dropout, bound_one, None),
            (f"  our fusion of {n} over its matrix products alone", ours, bound, None),
            ("  one adapter, step: the baseline over ours, dropout off in both", theirs_one, ours_one, None),
            ("  full fine-tuning over one adapter, ours", ours_full, ours_one, None),
        ],
    )
    what = "Lightning's loop with logger and progress bar, over the bare step"
    over = ratio(what, medians(timings, *loop), medians(timings, *bare_loop), Target(1.03), unit="%")
    return Report([*figures, over], timings, more={"agreement": agreement})


def infer(session: Session) -> Report:
    """Inference against the bare backbone."""
    n, r = session.config.sources, session.bottleneck
    cases = Case(INFER, FUSION, n, r), Case(INFER, ADAPTER, 0, r), Case(INFER, BARE)
    agreement = session.agreement(cases[:2])
    (ours, ours_one, ours_bare), (theirs, theirs_one, theirs_bare) = (
        [(who, case) for case in cases] for who in (OURS, BASELINE)
    )
    timings = session.time([ours, theirs, ours_bare, theirs_bare, ours_one, theirs_one])
    figures = compared(
        timings,
        [
            (f"our fusion of {n} over the bare backbone, inference", ours, ours_bare, Target(1.4)),
            ("our one adapter over the bare backbone, inference", ours_one, ours_bare, Target(1.06)),
            (f"  the baseline's fusion of {n} over its bare backbone", theirs, theirs_bare, None),
            ("  the baseline's one adapter over its bare backbone", theirs_one, theirs_bare, None),
            (f"  fusion of {n}: the baseline over ours", theirs, ours, None),
        ],
    )
    return Report(figures, timings, more={"agreement": agreement})


def memory(session: Session) -> Report:
    """Most bytes of tensors in a training step above those after loading; a count, so once is enough."""
    n, r = session.config.sources, session.bottleneck
    fused, one = Case(TRAIN, FUSION, n, r), Case(TRAIN, ADAPTER, 0, r)
    agreement = session.agreement([one, fused])
    peaks = {(who, case): session.peak(who, case) for who in (OURS, BASELINE) for case in (fused, one)}
    ours, ours_one, theirs, theirs_one = ([peak] for peak in peaks.values())
    figures = [
        ratio(f"our fusion of {n} over our one adapter, peak of a step", ours, ours_one, Target(1.6), exact=True),
        ratio(f"our fusion of {n} over the baseline's, peak of a step", ours, theirs, Target(0.5), exact=True),
        ratio("  our one adapter over the baseline's", ours_one, theirs_one, exact=True),
    ]
    found = {f"{who}: {case}": peak for (who, case), peak in peaks.items()}
    lines = [f"  {what:<46} {peak / 2**20:9.1f} MiB" for what, peak in found.items()]
    lines = ["\npeak tensor bytes above those after loading", *lines]
    return Report(figures, more={"peak_bytes": found, "agreement": agreement}, lines=lines)


SUITES: dict[str, Callable[[Session], Report]] = {
    "train": train,
    "infer": infer,
    "scale": scale,
    "memory": memory,
    "epoch": commands.epoch,
    "startup": commands.startup,
    "ddp": commands.ddp,
}


def measure(config: BenchmarkConfig) -> Path:
    """Run the suite of the config, print its report and return the JSON file."""
    Path(config.output).mkdir(parents=True, exist_ok=True)
    threads, rounds = config.thread_count(), config.rounds_of_suite()
    machine = describe_machine(threads)
    say(f"suite {config.suite}: {rounds} rounds, {threads} threads, {machine['processor']}")
    with contextlib.closing(Session(config)) as session:
        return finish(config, SUITES[config.suite](session), machine, session.versions)
