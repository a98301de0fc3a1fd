"""Pooling and the two kinds of head."""

from __future__ import annotations

import pytest
import torch

from fusion.layers.heads import TaskHead, pool

HIDDEN = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


def test_pooling() -> None:
    torch.testing.assert_close(pool(HIDDEN, MASK, "cls"), HIDDEN[:, 0])
    expected = torch.stack([(HIDDEN[0, 0] + HIDDEN[0, 1]) / 2, HIDDEN[1].mean(0)])
    torch.testing.assert_close(pool(HIDDEN, MASK, "mean"), expected)
    with pytest.raises(ValueError, match="max"):
        pool(HIDDEN, MASK, "max")


def test_padding_does_not_reach_the_mean() -> None:
    changed = HIDDEN.clone()
    changed[0, 2] = 1e6
    assert torch.equal(pool(HIDDEN, MASK, "mean"), pool(changed, MASK, "mean"))


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (1, {"output.weight", "output.bias"}),
        (2, {"dense.weight", "dense.bias", "output.weight", "output.bias"}),
    ],
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
