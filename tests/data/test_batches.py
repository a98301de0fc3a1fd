"""Composition of batches, in one and in multiple processes."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.data.batches import EpochBatches, LengthBatches, Plan, SortedBatches, TaskBatches, TokenBatches

LENGTHS = np.random.RandomState(0).geometric(0.05, 1000) + 3


def counting(plans: list[Plan]) -> list[int]:
    """The rows that are not fillers."""
    return [row for plan in plans for row, weight in zip(plan.rows, plan.weights, strict=True) if weight]


def padded_size(lengths: np.ndarray, batches: list[list[int]]) -> int:
    return sum(int(lengths[rows].max()) * len(rows) for rows in batches)


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(("rows", "size"), [(1000, 32), (1000, 1), (31, 32), (1, 8), (64, 32)])
def test_an_epoch_has_each_example_once(rows, size, epoch):
    sampler = LengthBatches(LENGTHS[:rows], size, seed=3)
    sampler.set_epoch(epoch)
    plans = list(sampler)
    assert sorted(chain.from_iterable(plan.rows for plan in plans)) == list(range(rows))
    assert len(plans) == len(sampler) == -(-rows // size)
    assert sorted(len(plan.rows) for plan in plans)[1:] == [size] * (len(plans) - 1)
    assert all(plan.weights == [1.0] * len(plan.rows) and len(plan.global_indices) == len(plan.rows) for plan in plans)


def order_of(sampler: EpochBatches, epoch: int) -> list[list[int]]:
    sampler.set_epoch(5)  # what was before does not matter
    list(sampler)
    sampler.set_epoch(epoch)
    return [plan.rows for plan in sampler]


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return order_of(LengthBatches(LENGTHS, 32, seed), epoch)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(0, 1) != order(1, 0)
    assert {frozenset(rows) for rows in order(1, 2)} != {frozenset(rows) for rows in order(1, 3)}, "new company"


@pytest.mark.parametrize("rows", [1000, 997, 33, 32, 31, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_get_the_batches_of_one_process(rows, world_size):
    one = LengthBatches(LENGTHS[:rows], 32, seed=5)
    several = [LengthBatches(LENGTHS[:rows], 32 // world_size, 5, rank, world_size) for rank in range(world_size)]
    for epoch in range(3):
        for sampler in [one, *several]:
            sampler.set_epoch(epoch)
        steps = list(zip(*several, strict=True))
        assert len(steps) == len(one)
        for whole, shares in zip(one, steps, strict=True):
            assert sorted(whole.rows) == sorted(counting(list(shares)))
            assert {len(share.global_indices) for share in shares} == {len(whole.rows)}


def test_a_rank_without_examples_gets_a_filler():
    samplers = [LengthBatches(LENGTHS[:34], 8, seed=0, rank=rank, world_size=4) for rank in range(4)]
    small = [shares for shares in zip(*samplers, strict=True) if len(shares[0].global_indices) == 2]
    assert len(small) == 1
    assert [share.weights for share in small[0]] == [[1.0], [1.0], [0.0], [0.0]]
    assert all(len(share.rows) == 1 for share in small[0])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rows", [1000, 7, 1])
def test_evaluation_has_each_example_once(rows, world_size):
    samplers = [SortedBatches(LENGTHS[:rows], 16, rank, world_size) for rank in range(world_size)]
    plans = [list(sampler) for sampler in samplers]
    assert sorted(chain.from_iterable(counting(share) for share in plans)) == list(range(rows))
    assert {len(share) for share in plans} == {len(samplers[0])}
    assert sum(len(share.global_indices) for share in plans[0]) == rows


def test_evaluation_starts_with_the_longest():
    firsts = [LENGTHS[plan.rows].max() for plan in SortedBatches(LENGTHS, 16)]
    assert firsts == sorted(firsts, reverse=True)
    assert firsts[0] == LENGTHS.max()


def test_batches_of_similar_length_need_little_padding():
    random = np.random.RandomState(1).permutation(len(LENGTHS))
    shuffled = [random[start : start + 32].tolist() for start in range(0, len(random), 32)]
    real = LENGTHS.sum()
    by_length = padded_size(LENGTHS, [plan.rows for plan in LengthBatches(LENGTHS, 32, seed=0)])
    assert by_length < 1.15 * real < 2 * real < padded_size(LENGTHS, shuffled)


def test_the_batches_are_not_sorted_themselves():
    longest = [int(LENGTHS[plan.rows].max()) for plan in LengthBatches(LENGTHS, 32, seed=0)]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_batches_are_composed_differently_in_each_epoch():
    lengths = np.full(6400, 20)
    sampler = LengthBatches(lengths, 32, seed=0)
    met: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        met.update((0, other) for plan in sampler if 0 in plan.rows for other in plan.rows if other)
    assert met.most_common(1)[0][1] < 3


def test_a_resumed_epoch_starts_where_it_stopped():
    sampler = LengthBatches(LENGTHS, 32, seed=1)
    sampler.set_epoch(4)
    whole = [plan.rows for plan in sampler]
    resumed = LengthBatches(LENGTHS, 32, seed=1)
    resumed.resume(epoch=4, batch=10)
    resumed.set_epoch(4)
    assert len(resumed) == len(whole)
    assert [plan.rows for plan in resumed] == whole[10:]
    assert [plan.rows for plan in resumed] == whole, "only the next pass is cut"
    resumed.resume(epoch=4, batch=10)
    resumed.set_epoch(5)
    assert len(list(resumed)) == len(whole)


# --- by tokens ----------------------------------------------------------------------------------------

CHOICES = np.random.RandomState(1).randint(2, 6, len(LENGTHS))


def within_budget(plan: Plan, lengths: np.ndarray, counts: np.ndarray | None, tokens: int) -> bool:
    sequences = len(plan.rows) if counts is None else int(counts[plan.rows].sum())
    return len(plan.rows) == 1 or sequences * int(lengths[plan.rows].max()) <= tokens


@pytest.mark.parametrize("tokens", [40, 256, 4096, 10**6])
@pytest.mark.parametrize("counts", [None, CHOICES], ids=["rows", "choices"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_by_tokens_respect_the_budget_and_have_each_example_once(tokens, counts, world_size):
    samplers = [TokenBatches(LENGTHS, counts, tokens, 3, rank, world_size) for rank in range(world_size)]
    lengths_of_epochs = set()
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        shares = [list(sampler) for sampler in samplers]
        assert sorted(chain.from_iterable(counting(plans) for plans in shares)) == list(range(len(LENGTHS)))
        assert all(within_budget(plan, LENGTHS, counts, tokens) for plan in chain.from_iterable(shares))
        for step in zip(*shares, strict=True):
            assert {len(plan.global_indices) for plan in step} == {len(counting(list(step)))}
        lengths_of_epochs |= {len(plans) for plans in shares} | {len(sampler) for sampler in samplers}
    assert len(lengths_of_epochs) == 1


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 200), st.integers(1, 6)), min_size=1, max_size=120),
    tokens=st.integers(1, 2000),
    seed=st.integers(0, 2**32 - 1),
    epochs=st.lists(st.integers(0, 1000), min_size=2, max_size=2),
    world_size=st.integers(1, 4),
    choices=st.booleans(),
)
def test_random_lengths_by_tokens(rows, tokens, seed, epochs, world_size, choices):
    lengths, counts = np.array([length for length, _ in rows]), np.array([count for _, count in rows])
    kept = counts if choices else None
    for ranks in (
        [TokenBatches(lengths, kept, tokens, seed, rank, world_size) for rank in range(world_size)],
        [SortedBatches(lengths, 1, rank, world_size, tokens, kept) for rank in range(world_size)],
    ):
        steps = set()
        for epoch in epochs:
            plans = []
            for sampler in ranks:
                if isinstance(sampler, TokenBatches):
                    sampler.set_epoch(epoch)
                own = list(sampler)
                assert len(own) == len(sampler)
                assert all(within_budget(plan, lengths, kept, tokens) for plan in own)
                plans += own
                steps.add(len(own))
            assert sorted(counting(plans)) == list(range(len(rows)))
        assert len(steps) == 1


def test_the_order_by_tokens_is_a_function_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[list[int]]:
        return order_of(TokenBatches(LENGTHS, None, 1024, seed), epoch)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    together = [{frozenset(rows) for rows in order(1, epoch)} for epoch in (2, 3)]
    assert len(together[0] & together[1]) < 0.1 * len(together[0]), "new company"


def test_a_resumed_epoch_by_tokens_starts_where_it_stopped():
    whole, resumed = (TokenBatches(LENGTHS, CHOICES, 1024, seed=1) for _ in range(2))
    whole.set_epoch(4)
    resumed.set_epoch(4)
    resumed.resume(epoch=4, batch=7)
    assert len(resumed) == len(whole)
    assert [plan.rows for plan in resumed] == [plan.rows for plan in whole][7:]
    assert [plan.rows for plan in resumed] == [plan.rows for plan in whole], "only the next pass is cut"


def test_two_devices_with_half_the_budget_match_one():
    one, half = TokenBatches(LENGTHS, None, 4096, 0), TokenBatches(LENGTHS, None, 2048, 0, 0, 2)
    assert len(one) <= len(half) <= 1.1 * len(one)


def test_batches_by_tokens_are_full_and_need_little_padding():
    plans = [plan.rows for plan in TokenBatches(LENGTHS, None, 1024, seed=0)]
    assert padded_size(LENGTHS, plans) < 1.25 * LENGTHS.sum()
    assert padded_size(LENGTHS, plans) > 0.75 * 1024 * len(plans)


def test_an_example_above_the_budget_is_a_batch_of_one():
    lengths = np.array([100, 10, 10, 90])
    plans = [sorted(plan.rows) for plan in TokenBatches(lengths, None, 50, seed=0)]
    assert sorted(plans) == [[0], [1, 2], [3]]


# --- multiple tasks -----------------------------------------------------------------------------------

SIZES = (1000, 250, 40)


def of_tasks(
    seed: int = 3, rank: int = 0, world_size: int = 1, temperature: float = 2.0, tokens: int | None = None
) -> TaskBatches:
    """Three tasks of 1000, 250 and 40 rows, 8 rows a step over all devices; the second has choices."""
    samplers: list[EpochBatches] = []
    for number, size in enumerate(SIZES):
        if tokens is None:
            samplers.append(LengthBatches(LENGTHS[:size], 8 // world_size, seed, rank, world_size))
        else:
            counts = CHOICES[:size] if number == 1 else None
            samplers.append(TokenBatches(LENGTHS[:size], counts, tokens, seed, rank, world_size))
    return TaskBatches(samplers, SIZES, temperature, seed, rank, world_size)


def steps(sampler: TaskBatches, epoch: int) -> list[tuple[int, list[int]]]:
    sampler.set_epoch(epoch)
    return [(plan.task, plan.rows) for plan in sampler]


def test_a_multi_task_epoch_has_the_total_length_of_its_tasks():
    sampler = of_tasks()
    assert len(sampler) == 125 + 32 + 5
    assert [len(steps(sampler, epoch)) for epoch in range(3)] == [162, 162, 162]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0, 1000.0, 0.01])
def test_tasks_are_drawn_by_temperature(temperature):
    sampler = of_tasks(temperature=temperature)
    drawn: Counter[int] = Counter()
    for epoch in range(60):
        drawn.update(task for task, _ in steps(sampler, epoch))
    powers = [float(size / max(SIZES)) ** (1 / temperature) for size in SIZES]
    total = sum(drawn.values())
    for task, power in enumerate(powers):
        p = power / sum(powers)
        assert abs(drawn[task] / total - p) <= 4 * (p * (1 - p) / total) ** 0.5 + 1e-12, task
    assert sampler.shares.sum() == pytest.approx(1)


@pytest.mark.parametrize("tokens", [None, 300])
def test_the_multi_task_order_is_a_function_of_seed_and_epoch(tokens):
    def order(seed: int, epoch: int) -> list[tuple[int, list[int]]]:
        sampler = of_tasks(seed, tokens=tokens)
        steps(sampler, 5)  # what was before does not matter
        return steps(sampler, epoch)

    assert order(1, 2) == order(1, 2)
    for other in (order(1, 3), order(2, 2), order(2, 1)):
        assert order(1, 2) != other
        assert [task for task, _ in order(1, 2)] != [task for task, _ in other]


def test_an_exhausted_task_restarts_within_an_epoch():
    own: dict[int, list[list[int]]] = {task: [] for task in range(3)}
    for task, rows in steps(of_tasks(temperature=1000.0), 0):
        own[task].append(rows)
    for task, batches in own.items():
        a_pass = -(-SIZES[task] // 8)
        whole = len(batches) // a_pass
        passes = [batches[n * a_pass : (n + 1) * a_pass] for n in range(whole)]
        for one in passes:
            assert sorted(chain.from_iterable(one)) == list(range(SIZES[task])), "each row once a pass"
        assert len({str(one) for one in passes}) == whole, "newly shuffled"
        rest = list(chain.from_iterable(batches[whole * a_pass :]))
        assert len(set(rest)) == len(rest)
    assert len(own[2]) > 5 * 5 and len(own[0]) < 125


def test_two_tasks_with_the_same_examples_are_shuffled_independently():
    samplers = [LengthBatches(LENGTHS[:80], 8, seed=0) for _ in range(2)]
    first: dict[int, list[int]] = {}
    for task, rows in steps(TaskBatches(samplers, [80, 80], 1.0, seed=0), 0):
        first.setdefault(task, rows)
    assert first[0] != first[1]


@pytest.mark.parametrize("tokens", [None, 300])
def test_a_resumed_multi_task_epoch_starts_where_it_stopped(tokens):
    whole, resumed = (of_tasks(tokens=tokens) for _ in range(2))
    expected = steps(whole, 4)
    resumed.resume(epoch=4, batch=50)
    assert len(resumed) == len(expected)
    assert steps(resumed, 4) == expected[50:]
    assert steps(resumed, 4) == expected, "only the next pass is cut"


def test_all_ranks_draw_the_same_task_and_together_get_the_batches_of_one_process():
    one = of_tasks()
    ranks = [of_tasks(rank=rank, world_size=2) for rank in range(2)]
    for epoch in range(3):
        for sampler in [one, *ranks]:
            sampler.set_epoch(epoch)
        shares = list(zip(*ranks, strict=True))
        assert len(shares) == len(one)
        for whole, step in zip(one, shares, strict=True):
            assert {plan.task for plan in step} == {whole.task}
            assert sorted(whole.rows) == sorted(counting(list(step)))
            assert {len(plan.global_indices) for plan in step} == {len(whole.rows)}


def test_multi_task_batches_by_tokens_respect_the_budget_on_every_rank():
    ranks = [of_tasks(rank=rank, world_size=2, tokens=300) for rank in range(2)]
    seen = set()
    for step in zip(*ranks, strict=True):
        assert len({plan.task for plan in step}) == 1
        for plan in step:
            counts = CHOICES[: SIZES[1]] if plan.task == 1 else None
            assert within_budget(plan, LENGTHS[: SIZES[plan.task]], counts, 300)
            seen.add(plan.task)
    assert seen == {0, 1, 2}


def test_plans_of_one_task_name_the_first():
    assert {plan.task for plan in LengthBatches(LENGTHS, 32, seed=0)} == {0}
    assert {plan.task for plan in SortedBatches(LENGTHS, 32)} == {0}
