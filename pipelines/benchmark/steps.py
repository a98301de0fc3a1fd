"""The suites that time single steps and batches: train, infer, memory."""

from __future__ import annotations

from pipelines.benchmark.cases import ADAPTER, BARE, CLIPPED, FLOOR, FULL, FUSION, INFER, LOOP, TRAIN, Case
from pipelines.benchmark.report import Report
from pipelines.benchmark.session import OURS, RIVAL, Measured, Session
from pipelines.benchmark.verdicts import Target, ratio

FEW, MANY = 2, 64  # sources that the usual number is compared with


def train(session: Session) -> Report:
    """Training steps: against the rival, against fewer and more sources, the matrix products, the bare loop."""
    n, r = session.config.sources, session.bottleneck
    session.make_weights(max(n, MANY), r)
    agreement = session.agreement([Case(TRAIN, ADAPTER, 0, r), Case(TRAIN, FUSION, n, r)])
    usual, few, many = (Case(TRAIN, FUSION, count, r) for count in (n, FEW, MANY))
    floors = {count: Case(FLOOR, FUSION, count, r) for count in (n, FEW, MANY)}
    one, one_floor = Case(TRAIN, ADAPTER, 0, r), Case(FLOOR, ADAPTER, 0, r)
    theirs, theirs_one = Case(TRAIN, FUSION, n, r, dropout=True), Case(TRAIN, ADAPTER, 0, r, dropout=True)
    loop, bare_loop = Case(LOOP, ADAPTER, 0, r), Case(CLIPPED, ADAPTER, 0, r)
    full = Case(TRAIN, FULL)
    # What is compared stands side by side, so that a drift within a round hardly reaches a ratio.
    measured: list[Measured] = [
        (RIVAL, theirs),
        (OURS, usual),
        (RIVAL, usual),
        (RIVAL, few),
        (OURS, few),
        (OURS, many),
        *((OURS, case) for case in floors.values()),
        (OURS, one_floor),
        (OURS, one),
        (RIVAL, one),
        (RIVAL, theirs_one),
        (OURS, loop),
        (OURS, bare_loop),
        (OURS, full),
        (RIVAL, full),
    ]
    timings = session.time(measured)
    ours, rival = (lambda case: timings.medians(OURS, case)), (lambda case: timings.medians(RIVAL, case))
    figures = [
        ratio(
            f"fusion of {n}, step: the rival over ours, dropout off in both",
            rival(usual),
            ours(usual),
            Target(4.5, at_least=True),
        ),
        ratio(
            f"fusion of {n}, step: the rival over ours, each with its own defaults",
            rival(theirs),
            ours(usual),
            Target(4.5, at_least=True),
        ),
        ratio(f"our fusion of {n} over one of {FEW}, step", ours(usual), ours(few), Target(1.25)),
        ratio(f"our fusion of {MANY} over one of {FEW}, step", ours(many), ours(few), Target(2.0)),
        ratio(f"  their matrix products alone, {n} over {FEW}", ours(floors[n]), ours(floors[FEW])),
        ratio(f"  their matrix products alone, {MANY} over {FEW}", ours(floors[MANY]), ours(floors[FEW])),
        ratio(f"  the rival's fusion of {n} over one of {FEW}", rival(usual), rival(few)),
        ratio(
            "our one adapter, step, over its matrix products alone", ours(one), ours(one_floor), Target(1.25)
        ),
        ratio("  the rival's, dropout off", rival(one), ours(one_floor)),
        ratio("  the rival's, with its defaults", rival(theirs_one), ours(one_floor)),
        ratio(f"  our fusion of {n} over its matrix products alone", ours(usual), ours(floors[n])),
        ratio(
            "Lightning's loop with logger, over the bare step",
            ours(loop),
            ours(bare_loop),
            Target(1.03),
            unit="%",
        ),
        ratio("  one adapter, step: the rival over ours, dropout off in both", rival(one), ours(one)),
        ratio("  full fine-tuning over one adapter, ours", ours(full), ours(one)),
    ]
    return Report(figures, timings, more={"agreement": agreement})


def infer(session: Session) -> Report:
    """Inference against the bare backbone."""
    n, r = session.config.sources, session.bottleneck
    session.make_weights(n, r)
    fused, one, bare = Case(INFER, FUSION, n, r), Case(INFER, ADAPTER, 0, r), Case(INFER, BARE)
    agreement = session.agreement([one, fused])
    timings = session.time([(who, case) for case in (fused, bare, one) for who in (OURS, RIVAL)])
    ours, rival = (lambda case: timings.medians(OURS, case)), (lambda case: timings.medians(RIVAL, case))
    figures = [
        ratio(f"our fusion of {n} over the bare backbone, inference", ours(fused), ours(bare), Target(1.4)),
        ratio("our one adapter over the bare backbone, inference", ours(one), ours(bare), Target(1.06)),
        ratio(f"  the rival's fusion of {n} over its bare backbone", rival(fused), rival(bare)),
        ratio("  the rival's one adapter over its bare backbone", rival(one), rival(bare)),
        ratio(f"  fusion of {n}: the rival over ours", rival(fused), ours(fused)),
    ]
    return Report(figures, timings, more={"agreement": agreement})


def memory(session: Session) -> Report:
    """Most bytes of tensors in a training step above those after loading; a count, so once is enough."""
    n, r = session.config.sources, session.bottleneck
    session.make_weights(n, r)
    fused, one = Case(TRAIN, FUSION, n, r), Case(TRAIN, ADAPTER, 0, r)
    agreement = session.agreement([one, fused])
    peaks = {(who, case): [session.peak(who, case)] for who in (OURS, RIVAL) for case in (fused, one)}
    figures = [
        ratio(
            f"our fusion of {n} over our one adapter, peak of a step",
            peaks[OURS, fused],
            peaks[OURS, one],
            Target(1.6),
            exact=True,
        ),
        ratio(
            f"our fusion of {n} over the rival's, peak of a step",
            peaks[OURS, fused],
            peaks[RIVAL, fused],
            Target(0.5),
            exact=True,
        ),
        ratio("  our one adapter over the rival's", peaks[OURS, one], peaks[RIVAL, one], exact=True),
    ]
    found = {f"{who}: {case}": peak for (who, case), (peak,) in peaks.items()}
    lines = ["\npeak tensor bytes above those after loading"]
    lines += [f"  {what:<46} {peak / 2**20:9.1f} MiB" for what, peak in found.items()]
    return Report(figures, more={"peak_bytes": found, "agreement": agreement}, lines=lines)
