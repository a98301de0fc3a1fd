"""Every suite by its name, and those that time single steps and batches: train, infer, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipelines.benchmark import commands
from pipelines.benchmark.cases import ADAPTER, BARE, CLIPPED, FULL, FUSION, INFER, LOOP, LOWER_BOUND, TRAIN, Case
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.families import families
from pipelines.benchmark.report import Measured, Report, Target, describe_machine, finish, medians, ratio
from pipelines.benchmark.scale import scale
from pipelines.benchmark.session import BASELINE, OURS, Session
from pipelines.commands import say

FEW, MANY = 2, 64  # numbers of sources that the configured number is compared with


class Comparison(NamedTuple):
    """A ratio of two timings."""

    what: str
    above: Measured
    below: Measured
    target: Target | None = None
    unit: str = "x"


def at_least(limit: float) -> Target:
    return Target(limit, at_least=True)


def compare(session: Session, checked: Sequence[Case], comparisons: list[Comparison]) -> Report:
    """Check that both implementations agree, time every case of the comparisons, and report the ratios."""
    agreement = session.agreement(checked)
    # In the order of first use: the cases of a comparison are close in time, so a drift hardly changes their ratio.
    measured = dict.fromkeys(pair for one in comparisons for pair in (one.above, one.below))
    timings = session.time(list(measured))
    figures = [
        ratio(one.what, medians(timings, *one.above), medians(timings, *one.below), one.target, unit=one.unit)
        for one in comparisons
    ]
    return Report(figures, timings, more={"agreement": agreement})


def train(session: Session) -> Report:
    """Training steps: against the baseline, by number of sources, over matrix products alone, and Lightning's loop."""
    n, r = session.config.sources, session.bottleneck

    def fusion(who: str, sources: int, work: str = TRAIN, dropout: bool = False, dtype: str = "float32") -> Measured:
        return who, Case(work, FUSION, sources, r, dropout, dtype)

    def adapter(who: str, work: str = TRAIN, dropout: bool = False, dtype: str = "float32") -> Measured:
        return who, Case(work, ADAPTER, 0, r, dropout, dtype)

    ours, theirs, ours_few = fusion(OURS, n), fusion(BASELINE, n), fusion(OURS, FEW)
    ours_one, theirs_one, bound_one = adapter(OURS), adapter(BASELINE), adapter(OURS, LOWER_BOUND)
    bound, bound_few, bound_many = (fusion(OURS, count, LOWER_BOUND) for count in (n, FEW, MANY))
    faster = at_least(4.5)
    full, theirs_full = (OURS, Case(TRAIN, FULL)), (BASELINE, Case(TRAIN, FULL))
    step = f"fusion of {n}, step: the baseline over ours"
    loop = "Lightning's loop with logger and progress bar, over the bare step"
    one = "our one adapter, step, over its matrix products alone"
    comparisons = [
        Comparison(f"{step}, dropout off in both", theirs, ours, faster),
        Comparison(f"{step}, own defaults", fusion(BASELINE, n, dropout=True), ours, faster),
        Comparison(f"our fusion of {n} over one of {FEW}, step", ours, ours_few, Target(1.25)),
        Comparison(f"our fusion of {MANY} over one of {FEW}, step", fusion(OURS, MANY), ours_few, Target(2.0)),
        Comparison(f"  their matrix products alone, {n} over {FEW}", bound, bound_few),
        Comparison(f"  their matrix products alone, {MANY} over {FEW}", bound_many, bound_few),
        Comparison(f"  the baseline's fusion of {n} over one of {FEW}", theirs, fusion(BASELINE, FEW)),
        Comparison(one, ours_one, bound_one, Target(1.25)),
        Comparison("  the baseline's, dropout off", theirs_one, bound_one),
        Comparison("  the baseline's, with its defaults", adapter(BASELINE, dropout=True), bound_one),
        Comparison(f"  our fusion of {n} over its matrix products alone", ours, bound),
        Comparison("  one adapter, step: the baseline over ours, dropout off in both", theirs_one, ours_one),
        Comparison("  full fine-tuning over one adapter, ours", full, ours_one),
        Comparison("  full fine-tuning, step: the baseline over ours", theirs_full, full),
        Comparison(loop, adapter(OURS, LOOP), adapter(OURS, CLIPPED), Target(1.03), unit="%"),
    ]
    if half := session.half:
        ours, theirs_half = fusion(OURS, n, dtype=half), fusion(BASELINE, n, dtype=half)
        ours_one, theirs_one_half = adapter(OURS, dtype=half), adapter(BASELINE, dtype=half)
        bound_one = adapter(OURS, LOWER_BOUND, dtype=half)
        own = "one adapter, step: the baseline over ours"
        comparisons += [
            Comparison(f"{step}, ours in {half}", theirs, ours, at_least(8.0)),
            Comparison(f"{step}, both in {half}", theirs_half, ours, at_least(4.0)),
            Comparison(f"{own} in {half}", theirs_one, ours_one, at_least(2.0)),
            Comparison(f"{own}, both in {half}", theirs_one_half, ours_one, at_least(1.2)),
            Comparison(f"{one}, in {half}", ours_one, bound_one, Target(1.4)),
        ]
    return compare(session, [adapter(OURS)[1], fusion(OURS, n)[1]], comparisons)


def infer(session: Session) -> Report:
    """Benchmark inference, compared with the backbone without adapters."""
    n, r = session.config.sources, session.bottleneck
    cases = Case(INFER, FUSION, n, r), Case(INFER, ADAPTER, 0, r), Case(INFER, BARE)
    (ours, ours_one, ours_bare), (theirs, theirs_one, theirs_bare) = (
        [(who, case) for case in cases] for who in (OURS, BASELINE)
    )
    comparisons = [
        Comparison(f"our fusion of {n} over the bare backbone, inference", ours, ours_bare, Target(1.4)),
        Comparison("our one adapter over the bare backbone, inference", ours_one, ours_bare, Target(1.06)),
        Comparison(f"  the baseline's fusion of {n} over its bare backbone", theirs, theirs_bare),
        Comparison("  the baseline's one adapter over its bare backbone", theirs_one, theirs_bare),
        Comparison(f"  fusion of {n}: the baseline over ours", theirs, ours),
    ]
    if half := session.half:
        fused, bare = ((OURS, replace(case, dtype=half)) for case in (cases[0], cases[2]))
        comparisons += [
            Comparison(f"fusion of {n}, inference: the baseline over ours in {half}", theirs, fused, at_least(12.0)),
            Comparison(f"our fusion of {n} over the bare backbone, inference, {half}", fused, bare, Target(1.4)),
        ]
    return compare(session, cases[:2], comparisons)


def memory(session: Session) -> Report:
    """Peak bytes of tensors in a training step above those after loading; a count, so one measurement suffices."""
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
    "families": families,
    "epoch": commands.epoch,
    "startup": commands.startup,
    "ddp": commands.ddp,
}


def measure(config: BenchmarkConfig) -> Path:
    """Run the configured suite, print its report and return the path of its JSON file."""
    Path(config.output).mkdir(parents=True, exist_ok=True)
    threads, rounds = config.thread_count, config.round_count
    machine = describe_machine(threads)
    say(f"suite {config.suite}: {rounds} rounds, {threads} threads, {machine['processor']}")
    with contextlib.closing(Session(config)) as session:
        return finish(config, SUITES[config.suite](session), machine, session.versions)
