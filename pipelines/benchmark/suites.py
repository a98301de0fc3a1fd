"""Every suite by its name, and those that time single steps and batches: train, infer, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from pipelines.benchmark import commands
from pipelines.benchmark.cases import (
    ADAPTER,
    BARE,
    CLIPPED,
    FULL,
    FUSION,
    INFER,
    LOOP,
    LOWER_BOUND,
    TRAIN,
    Case,
)
from pipelines.benchmark.config import BenchmarkConfig
from pipelines.benchmark.report import Measured, Report, Target, describe_machine, finish, medians, ratio
from pipelines.benchmark.scale import scale
from pipelines.benchmark.session import BASELINE, OURS, Session
from pipelines.commands import say

FEW, MANY = 2, 64  # sources that the usual number is compared with


def train(session: Session) -> Report:
    """Training steps against the baseline, fewer and more sources, the matrix products, and the bare loop."""
    n, r = session.config.sources, session.bottleneck
    session.make_weights(max(n, MANY), r)
    agreement = session.agreement([Case(TRAIN, ADAPTER, 0, r), Case(TRAIN, FUSION, n, r)])
    usual, few, many = (Case(TRAIN, FUSION, count, r) for count in (n, FEW, MANY))
    bounds = {count: Case(LOWER_BOUND, FUSION, count, r) for count in (n, FEW, MANY)}
    one, one_bound = Case(TRAIN, ADAPTER, 0, r), Case(LOWER_BOUND, ADAPTER, 0, r)
    dropped, dropped_one = Case(TRAIN, FUSION, n, r, dropout=True), Case(TRAIN, ADAPTER, 0, r, dropout=True)
    loop, bare_loop = Case(LOOP, ADAPTER, 0, r), Case(CLIPPED, ADAPTER, 0, r)
    full = Case(TRAIN, FULL)
    # What is compared is measured side by side, so that a drift within a round hardly changes a ratio.
    measured: list[Measured] = [
        (BASELINE, dropped),
        (OURS, usual),
        (BASELINE, usual),
        (BASELINE, few),
        (OURS, few),
        (OURS, many),
        *((OURS, case) for case in bounds.values()),
        (OURS, one_bound),
        (OURS, one),
        (BASELINE, one),
        (BASELINE, dropped_one),
        (OURS, loop),
        (OURS, bare_loop),
        (OURS, full),
        (BASELINE, full),
    ]
    timings = session.time(measured)
    ours, theirs = (
        (lambda case: medians(timings, OURS, case)),
        (lambda case: medians(timings, BASELINE, case)),
    )
    faster = Target(4.5, at_least=True)
    over_lightning = "Lightning's loop with logger and progress bar, over the bare step"
    figures = [
        ratio(
            f"fusion of {n}, step: the baseline over ours, dropout off in both",
            theirs(usual),
            ours(usual),
            faster,
        ),
        ratio(
            f"fusion of {n}, step: the baseline over ours, each with its own defaults",
            theirs(dropped),
            ours(usual),
            faster,
        ),
        ratio(f"our fusion of {n} over one of {FEW}, step", ours(usual), ours(few), Target(1.25)),
        ratio(f"our fusion of {MANY} over one of {FEW}, step", ours(many), ours(few), Target(2.0)),
        ratio(f"  their matrix products alone, {n} over {FEW}", ours(bounds[n]), ours(bounds[FEW])),
        ratio(f"  their matrix products alone, {MANY} over {FEW}", ours(bounds[MANY]), ours(bounds[FEW])),
        ratio(f"  the baseline's fusion of {n} over one of {FEW}", theirs(usual), theirs(few)),
        ratio(
            "our one adapter, step, over its matrix products alone", ours(one), ours(one_bound), Target(1.25)
        ),
        ratio("  the baseline's, dropout off", theirs(one), ours(one_bound)),
        ratio("  the baseline's, with its defaults", theirs(dropped_one), ours(one_bound)),
        ratio(f"  our fusion of {n} over its matrix products alone", ours(usual), ours(bounds[n])),
        ratio(over_lightning, ours(loop), ours(bare_loop), Target(1.03), unit="%"),
        ratio("  one adapter, step: the baseline over ours, dropout off in both", theirs(one), ours(one)),
        ratio("  full fine-tuning over one adapter, ours", ours(full), ours(one)),
    ]
    return Report(figures, timings, more={"agreement": agreement})


def infer(session: Session) -> Report:
    """Inference against the bare backbone."""
    n, r = session.config.sources, session.bottleneck
    session.make_weights(n, r)
    fused, one, bare = Case(INFER, FUSION, n, r), Case(INFER, ADAPTER, 0, r), Case(INFER, BARE)
    agreement = session.agreement([one, fused])
    timings = session.time([(who, case) for case in (fused, bare, one) for who in (OURS, BASELINE)])
    ours, theirs = (
        (lambda case: medians(timings, OURS, case)),
        (lambda case: medians(timings, BASELINE, case)),
    )
    figures = [
        ratio(f"our fusion of {n} over the bare backbone, inference", ours(fused), ours(bare), Target(1.4)),
        ratio("our one adapter over the bare backbone, inference", ours(one), ours(bare), Target(1.06)),
        ratio(f"  the baseline's fusion of {n} over its bare backbone", theirs(fused), theirs(bare)),
        ratio("  the baseline's one adapter over its bare backbone", theirs(one), theirs(bare)),
        ratio(f"  fusion of {n}: the baseline over ours", theirs(fused), ours(fused)),
    ]
    return Report(figures, timings, more={"agreement": agreement})


def memory(session: Session) -> Report:
    """Most bytes of tensors in a training step above those after loading; a count, so once is enough."""
    n, r = session.config.sources, session.bottleneck
    session.make_weights(n, r)
    fused, one = Case(TRAIN, FUSION, n, r), Case(TRAIN, ADAPTER, 0, r)
    agreement = session.agreement([one, fused])
    peaks = {(who, case): session.peak(who, case) for who in (OURS, BASELINE) for case in (fused, one)}
    compared = [
        (f"our fusion of {n} over our one adapter, peak of a step", (OURS, fused), (OURS, one), Target(1.6)),
        (
            f"our fusion of {n} over the baseline's, peak of a step",
            (OURS, fused),
            (BASELINE, fused),
            Target(0.5),
        ),
        ("  our one adapter over the baseline's", (OURS, one), (BASELINE, one), None),
    ]
    figures = [
        ratio(what, [peaks[left]], [peaks[right]], target, exact=True)
        for what, left, right, target in compared
    ]
    found = {f"{who}: {case}": peak for (who, case), peak in peaks.items()}
    lines = ["\npeak tensor bytes above those after loading"]
    lines += [f"  {what:<46} {peak / 2**20:9.1f} MiB" for what, peak in found.items()]
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
