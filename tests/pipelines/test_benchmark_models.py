"""Our worker's part of the benchmark, on a tiny backbone: what it builds, counts and measures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusion.backbones.families import FAMILIES
from pipelines.benchmark import formulas
from pipelines.benchmark.cases import ADAPTER, BARE, CLIPPED, FULL, FUSION, INFER, LOOP, LOWER_BOUND, TRAIN, Case, Setup
from pipelines.benchmark.ours import OurModel, OurWorker, Products
from pipelines.benchmark.random_backbone import model_settings
from pipelines.benchmark.session import LOGITS_LIMIT
from pipelines.benchmark.worker import peak_bytes, token_batch

R, N, ROWS, TOKENS = 4, 3, 4, 12


@pytest.fixture
def setup(tiny_backbone: Path) -> Setup:
    return Setup(str(tiny_backbone), ROWS, TOKENS, threads=torch.get_num_threads(), seed=0)


@pytest.fixture
def backbone(tiny_backbone: Path) -> formulas.Backbone:
    return formulas.Backbone.read(str(tiny_backbone))


@pytest.fixture
def worker(setup: Setup) -> OurWorker:
    worker = OurWorker()
    worker.prepare(dataclasses.asdict(setup))
    return worker


@pytest.mark.parametrize(("method", "sources"), [(ADAPTER, None), (FUSION, N)])
@pytest.mark.parametrize("tokens", [4, TOKENS])  # fewer tokens in a batch than the hidden size has numbers, and more
def test_a_step_multiplies_what_the_formula_gives(
    worker: OurWorker, backbone: formulas.Backbone, method: str, sources: int | None, tokens: int
) -> None:
    worker.setup = dataclasses.replace(worker.setup, tokens=tokens)
    model = worker.build(Case(LOWER_BOUND, method, sources or 0, R))
    with FlopCounterMode(display=False) as counted, Products() as products:
        model.train()
    multiply_adds = counted.get_total_flops() / 2
    expected = formulas.training(backbone, worker.setup, sources, R)
    # Products with a vector, which bk makes in every layer, are no matrix products; a model may do at most 2 % more
    # than it needs.
    vectors = 0 if sources is None else 3 * 3 * ROWS * tokens * 32
    assert expected - vectors <= multiply_adds <= 1.02 * expected
    with FlopCounterMode(display=False) as counted:
        products.run()
    assert counted.get_total_flops() == 2 * multiply_adds


def test_formulas_of_a_base_model() -> None:
    few, many = (formulas.per_token(16, 48, 768, tokens) for tokens in (512, 10**6))
    bottlenecks, biases = 3 * 16 * 48 * 768, 2 * 16 * 768 + 16 * 768**2 / 512
    assert few["folded"] == bottlenecks + 3 * 768**2 + biases  # tokens times Wq, Wk and Wv, one after the other
    assert many["folded"] == pytest.approx(many["merged"], rel=0.001)  # matrices first
    assert few["plain"] == pytest.approx(20.6e6, rel=0.02)
    assert few["merged"] == many["merged"] == 768 * (3 * 16 * 48 + 2 * 16)


def test_the_peak_is_what_the_formula_gives(worker: OurWorker, backbone: formulas.Backbone) -> None:
    """In the limit of many tokens: only small temporary tensors of one layer are then not counted."""
    worker.setup = dataclasses.replace(worker.setup, batch_size=64, tokens=32)
    found = worker.peak(Case(TRAIN, FUSION, N, R))
    assert found == pytest.approx(formulas.training_bytes(backbone, N, R, 64 * 32), rel=0.12)


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    kept: list[torch.Tensor] = []

    def step() -> None:
        if not kept:
            kept.append(torch.ones(1000))  # stays
        torch.ones(3000)
        torch.ones(2000)

    assert peak_bytes(step, "cpu") == pytest.approx(4 * 4000, abs=256)


@pytest.mark.parametrize(
    "case",
    [
        Case(TRAIN, FUSION, N, R),
        Case(TRAIN, FULL),
        Case(INFER, BARE),
        Case(INFER, ADAPTER, 0, R),
        Case(LOWER_BOUND, ADAPTER, 0, R),
    ],
    ids=str,
)
def test_every_kind_of_work_is_timed(worker: OurWorker, case: Case) -> None:
    seconds = worker.time(case, warmup=1, steps=2)
    assert len(seconds) == 2 and min(seconds) > 0


def test_the_loop_and_the_bare_step_train_the_same_model(worker: OurWorker) -> None:
    for work in (LOOP, CLIPPED):
        (seconds,) = worker.time(Case(work, ADAPTER, 0, R), warmup=1, steps=1)
        assert seconds > 0
    assert len(worker.models) == 1


def test_training_changes_what_is_declared_and_inference_nothing(worker: OurWorker) -> None:
    def changed(model: OurModel, work: Callable[[], object]) -> set[str]:
        before = {name: value.clone() for name, value in model.adapted.state_dict().items()}
        work()
        return {n for n, value in model.adapted.state_dict().items() if not torch.equal(value, before[n])}

    trained = worker.build(Case(TRAIN, FUSION, N, R))
    assert changed(trained, trained.train) == set(trained.adapted.trainable())
    used = worker.build(Case(INFER, FUSION, N, R))
    used.infer()  # the first time it is merged
    assert changed(used, used.infer) == set()


def test_the_check_detects_a_missing_weight(worker: OurWorker) -> None:
    case = Case(INFER, FUSION, N, R)
    found = worker.check(case)
    assert len(found["logits"]) == ROWS and found["penalty"] > 0
    assert worker.build(case).padded.attention_mask.sum() < ROWS * TOKENS
    for part in ("query.bias", "key.weight", "value.weight", "bank.up_bias", "bank.down_weight"):
        model = worker.build(case)
        (name,) = (name for name in model.adapted.state_dict() if name.endswith(f".1.feedforward.{part}"))
        model.adapted.state_dict()[name].zero_()
        difference = torch.tensor(model.check()["logits"]) - torch.tensor(found["logits"])
        assert difference.abs().max() > LOGITS_LIMIT, part


def test_the_batch_is_the_same_each_time(setup: Setup) -> None:
    one, two = (token_batch(setup, 3000, padded=True) for _ in range(2))
    assert torch.equal(one.input_ids, two.input_ids) and torch.equal(one.labels, two.labels)
    assert one.attention_mask[0].all() and not one.attention_mask[1::2].all()
    assert int(one.input_ids[one.attention_mask.bool()].min()) >= 1000


@pytest.mark.parametrize("name", FAMILIES)
def test_a_random_model_of_every_family(name: str) -> None:
    settings = model_settings(name, 2, 64)
    setup = Setup("", 2, 6, torch.get_num_threads(), 0, model_type=name, settings=settings)
    worker = OurWorker()
    worker.prepare(dataclasses.asdict(setup))
    model = worker.build(Case(TRAIN, FUSION, 2, R))
    layers = model.adapted._family.layer_list(model.adapted.backbone)
    assert model.adapted.hidden_size == 64 and len(layers) == 2
    model.train()
    assert all(parameter.grad is not None for parameter in model.adapted.trainable().values())
    assert model.infer().isfinite().all() and worker.peak(Case(TRAIN, ADAPTER, 0, R)) > 0
