"""Pooling and the two kinds of head."""

from __future__ import annotations

import pytest
import torch

from fusion.layers.heads import TaskHead, TaskHeads, pool

HIDDEN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_pooling() -> None:
    torch.testing.assert_close(pool(HIDDEN, MASK, "cls"), HIDDEN[:, 0])
    expected = torch.stack([(HIDDEN[0, 0] + HIDDEN[0, 1]) / 2, HIDDEN[1].mean(0)])
    torch.testing.assert_close(pool(HIDDEN, MASK, "mean"), expected)
    with pytest.raises(ValueError, match="max"):
        pool(HIDDEN, MASK, "max")


def test_a_word_is_its_first_sub_word() -> None:
    words = torch.tensor([[1, -1], [3, 5]])  # the second token of the first text; the first and last of the other
    expected = torch.stack([HIDDEN[0, 1], HIDDEN[1, 0], HIDDEN[1, 2]])
    there = words >= 0
    assert torch.equal(pool(HIDDEN, MASK, "words", words)[there], expected)
    head = TaskHead(4, 3, pooling="words", layers=2).eval()
    assert head.dense is not None
    scores = head(HIDDEN, MASK, words)
    torch.testing.assert_close(
        scores[there], torch.stack([head.output(torch.tanh(head.dense(vector))) for vector in expected])
    )
    assert scores.shape == (2, 2, 3) and scores[0, 1].tolist() == [float("-inf")] * 3
    assert head(HIDDEN, MASK, words[:, :0]).shape == (2, 0, 3)
    for how, given in (("words", None), ("cls", words)):
        with pytest.raises(ValueError, match=f"pooling '{how}'"):
            pool(HIDDEN, MASK, how, given)


def test_padding_does_not_affect_the_mean() -> None:
    changed = HIDDEN.clone()
    changed[0, 2] = 1e6
    assert torch.equal(pool(HIDDEN, MASK, "mean"), pool(changed, MASK, "mean"))


@pytest.mark.parametrize(
    ("layers", "names"),
    [(1, {"output.weight", "output.bias"}), (2, {"dense.weight", "dense.bias", "output.weight", "output.bias"})],
)
def test_parameters_and_shape(layers: int, names: set[str]) -> None:
    head = TaskHead(4, 3, pooling="mean", layers=layers)
    assert {name for name, _ in head.named_parameters()} == names
    assert head(HIDDEN, MASK).shape == (2, 3)


def test_two_layers_are_dense_tanh_linear() -> None:
    head = TaskHead(4, 3, layers=2).eval()
    assert head.dense is not None
    expected = head.output(torch.tanh(HIDDEN[:, 0] @ head.dense.weight.T + head.dense.bias))
    torch.testing.assert_close(head(HIDDEN, MASK), expected)


@pytest.mark.parametrize("options", [{"layers": 3}, {"pooling": "max"}])
def test_wrong_values_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TaskHead(4, 3, **options)  # type: ignore[arg-type]


def three_heads() -> TaskHeads:
    """`my.task` and `type` are names that torch does not take for modules."""
    torch.manual_seed(0)
    return TaskHeads({"my.task": TaskHead(4, 3), "type": TaskHead(4, 1, layers=2), "c": TaskHead(4, 2)})


def test_a_batch_is_scored_by_the_head_of_its_task() -> None:
    heads = three_heads().double().eval()
    hidden = HIDDEN.double()
    for number, (name, outputs) in enumerate([("my.task", 3), ("type", 1), ("c", 2)]):
        state = {key.removeprefix(f"{name}."): value for key, value in heads.state().items() if key.startswith(name)}
        x = hidden[:, 0]
        if "dense.weight" in state:
            x = torch.tanh(torch.einsum("bi,oi->bo", x, state["dense.weight"]) + state["dense.bias"])
        expected = torch.einsum("bi,oi->bo", x, state["output.weight"]) + state["output.bias"]
        assert expected.shape == (2, outputs)
        for mode in (False, True):
            torch.testing.assert_close(heads.train(mode)(hidden, MASK, number), expected)


def test_the_heads_are_stored_under_their_tasks() -> None:
    heads = three_heads()
    assert set(heads.state()) == {
        "my.task.output.weight", "my.task.output.bias",
        "type.dense.weight", "type.dense.bias", "type.output.weight", "type.output.bias",
        "c.output.weight", "c.output.bias",
    }  # fmt: skip
    assert list(heads.by_task()) == ["my.task", "type", "c"]
    assert {id(p) for p in heads.state().values()} == {id(p) for p in heads.parameters()}


def test_in_training_the_other_heads_get_a_gradient_of_zero() -> None:
    heads = three_heads().train()
    heads(HIDDEN, MASK, 1).square().sum().backward()
    for name, parameter in heads.state().items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == name.startswith("type."), name
    heads.eval()
    heads.zero_grad()
    heads(HIDDEN, MASK, 1).sum().backward()
    assert heads.state()["c.output.weight"].grad is None


def test_one_head_of_many_equals_a_single_head() -> None:
    alone = TaskHead(4, 2)
    scores = TaskHeads({"only": alone}).train()(HIDDEN, MASK, 0)
    assert torch.equal(scores, alone(HIDDEN, MASK))


def test_the_last_token_is_found_with_padding_on_either_side() -> None:
    hidden = torch.arange(2 * 4 * 3, dtype=torch.float32).view(2, 4, 3)
    for mask, last in (([[1, 1, 1, 0], [1, 0, 0, 0]], (2, 0)), ([[0, 1, 1, 1], [0, 0, 0, 1]], (3, 3))):
        expected = torch.stack([hidden[0, last[0]], hidden[1, last[1]]])
        assert torch.equal(pool(hidden, torch.tensor(mask), "last"), expected)
    assert torch.equal(pool(hidden, torch.ones(2, 4, dtype=torch.long), "last"), hidden[:, -1])
