"""Our worker's part of the benchmark, on a tiny backbone: what it builds, counts and measures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipelines.benchmark import floor, formulas, measure, weights
from pipelines.benchmark.cases import (
    ADAPTER,
    BARE,
    CLIPPED,
    FLOOR,
    FULL,
    FUSION,
    INFER,
    LOOP,
    TRAIN,
    Case,
    Setup,
)
from pipelines.benchmark.ours import OurModel, OurWorker
from pipelines.benchmark.session import LOGITS_LIMIT

R, N, ROWS, TOKENS = 4, 3, 4, 12


@pytest.fixture
def setup(tiny_backbone: Path, tmp_path: Path) -> Setup:
    return Setup(str(tiny_backbone), str(tmp_path), ROWS, TOKENS, threads=torch.get_num_threads(), seed=0)


@pytest.fixture
def worker(setup: Setup) -> OurWorker:
    worker = OurWorker()
    answer = worker.prepare({"setup": setup.as_json()})
    assert answer["sizes"]["layers"] == 3
    worker.make_weights({"sources": N, "bottleneck": R})
    return worker


def sizes(worker: OurWorker) -> floor.Sizes:
    config = worker.backbone().model.config
    return floor.Sizes(
        rows=ROWS,
        tokens=TOKENS,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        layers=config.num_hidden_layers,
        outputs=weights.OUTPUTS,
    )


def model_of(worker: OurWorker, setup: Setup, case: Case) -> OurModel:
    backbone = worker.backbone()
    # Spelled out in plain products: the fused one counts some of backward twice, as it computes them again.
    backbone.model.set_attn_implementation("eager")
    return OurModel(setup, case, backbone)


@pytest.mark.parametrize(("method", "sources"), [(ADAPTER, None), (FUSION, N)])
def test_the_floor_is_what_a_step_multiplies(
    worker: OurWorker, setup: Setup, method: str, sources: int | None
) -> None:
    model = model_of(worker, setup, Case(TRAIN, method, sources or 0, R))
    with FlopCounterMode(display=False) as counted:
        model.train()
    expected = floor.multiply_adds(floor.training_step(sizes(worker), R, sources))
    # The counter leaves out products with a vector, which bk makes in every layer; a model may do no more than 2 %
    # beside its floor.
    vectors = 0 if sources is None else 3 * 4 * ROWS * TOKENS * 32
    assert expected - vectors <= counted.get_total_flops() / 2 <= 1.02 * expected


def test_the_floor_runs_every_product(worker: OurWorker) -> None:
    products = floor.training_step(sizes(worker), R, N)
    with FlopCounterMode(display=False) as counted:
        floor.runner(products, "cpu", torch.float32)()
    assert counted.get_total_flops() == 2 * floor.multiply_adds(products)


def test_more_sources_cost_what_the_formulas_say(worker: OurWorker) -> None:
    shape = sizes(worker)
    tokens, d, layers = ROWS * TOKENS, shape.hidden_size, shape.layers

    def forward(sources: int) -> int:
        return floor.multiply_adds(floor.inference(shape, R, sources))

    grown = formulas.merged(8, R, d) - formulas.merged(2, R, d)
    assert forward(8) - forward(2) == layers * tokens * grown
    assert formulas.folded(16, 48, 768, tokens=512) == pytest.approx(3.5e6, rel=0.02)
    assert formulas.folded(16, 48, 768, tokens=10**6) == pytest.approx(2.95e6, rel=0.02)
    assert formulas.plain(16, 48, 768) == pytest.approx(20.6e6, rel=0.02)


def test_the_peak_is_what_the_formula_says(worker: OurWorker, setup: Setup) -> None:
    """In the limit of many tokens: small things that one layer needs for a moment are then all that is left out."""
    large = Setup(**{**setup.as_json(), "batch_size": 64, "tokens": 32})
    worker.prepare({"setup": large.as_json()})
    shape = sizes(worker)
    backbone = formulas.Backbone(
        "tiny", shape.layers, shape.hidden_size, shape.intermediate_size, shape.heads
    )
    found = worker.peak({"case": Case(TRAIN, FUSION, N, R).as_json()})["bytes"]
    assert found == pytest.approx(formulas.training_bytes(backbone, N, R, 64 * 32), rel=0.12)


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        if not kept:
            kept.append(torch.ones(1000))  # stays
        torch.ones(3000)
        torch.ones(2000)

    assert measure.peak_bytes(step, "cpu") == pytest.approx(4 * 4000, abs=256)


def test_every_kind_of_work_is_timed(worker: OurWorker) -> None:
    for case in (
        Case(TRAIN, FUSION, N, R),
        Case(TRAIN, FULL),
        Case(INFER, BARE),
        Case(INFER, ADAPTER, 0, R),
        Case(FLOOR, ADAPTER, 0, R),
    ):
        seconds = worker.time({"case": case.as_json(), "warmup": 1, "steps": 2})["seconds"]
        assert len(seconds) == 2 and min(seconds) > 0


def test_the_loop_and_the_bare_step_train_the_same_model(worker: OurWorker, tmp_path: Path) -> None:
    for work in (LOOP, CLIPPED):
        case = Case(work, ADAPTER, 0, R)
        (seconds,) = worker.time({"case": case.as_json(), "warmup": 1, "steps": 1})["seconds"]
        assert seconds > 0
    assert len(worker._loops) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f"R{R}.safetensors"]  # the loop's log is gone


def test_training_changes_what_is_declared_and_inference_nothing(worker: OurWorker, setup: Setup) -> None:
    def changed(model: OurModel, work: Callable[[], object]) -> set[str]:
        before = {name: value.clone() for name, value in model.adapted.state_dict().items()}
        work()
        return {n for n, value in model.adapted.state_dict().items() if not torch.equal(value, before[n])}

    trained = worker.build(setup, Case(TRAIN, FUSION, N, R))
    assert changed(trained, trained.train) == set(trained.adapted.trainable())
    used = worker.build(setup, Case(INFER, FUSION, N, R))
    used.infer()  # the first time it is merged
    assert changed(used, used.infer) == set()


def test_the_check_sees_what_is_missing(worker: OurWorker, setup: Setup) -> None:
    case = Case(INFER, FUSION, N, R)
    found = worker.check({"case": case.as_json()})
    assert len(found["logits"]) == ROWS and found["penalty"] > 0
    assert worker.build(setup, case).padded.attention_mask.sum() < ROWS * TOKENS
    for part in ("query.bias", "key.weight", "value.weight", "bank.up_bias", "bank.down_weight"):
        model = worker.build(setup, case)
        state = model.adapted.state_dict()
        state[f"slots.1.feedforward.{part}"].zero_()
        apart = torch.tensor(model.check()["logits"]) - torch.tensor(found["logits"])
        assert apart.abs().max() > LOGITS_LIMIT, part


def test_the_batch_is_the_same_each_time() -> None:
    one, two = (measure.token_batch(3000, 6, 20, 3, seed=1, device="cpu", padded=True) for _ in range(2))
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)
    assert one.attention_mask[0].all() and not one.attention_mask[1::2].all()
    assert int(one.input_ids[one.attention_mask.bool()].min()) >= 1000
