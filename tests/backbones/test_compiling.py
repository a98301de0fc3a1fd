"""Compiled layers: the same results, for any shape, under the same names."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.backbones.layer_calls import check_compiler, compile_layers
from fusion.backbones.load import load_backbone
from fusion.errors import UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from tests.backbones.test_checkpointing import build, gradients


def layers_of(model: AdaptedModel) -> torch.nn.ModuleList:
    layers = model.backbone.get_submodule("encoder.layer")
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


class Counting:
    """A backend that compiles nothing and counts how often it is asked to."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def some_ids(rows: int, tokens: int) -> Tensor:
    ids = torch.randint(5, 20, (rows, tokens), generator=torch.Generator().manual_seed(rows * tokens))
    ids[0, tokens // 2 :] = 0
    return ids


def compare(plain: AdaptedModel, compiled: AdaptedModel, ids: Tensor) -> None:
    """Scores and gradients, in training and in evaluation."""
    expected, found = gradients(plain.train(), ids), gradients(compiled.train(), ids)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        mask = (ids != 0).long()
        torch.testing.assert_close(compiled.eval()(ids, mask), plain.eval()(ids, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slot_module", ["adapter", "fusion"])
@pytest.mark.parametrize("model_type", ["bert", pytest.param("roberta", marks=pytest.mark.slow)])
def test_other_shapes_do_not_recompile(make_backbone: Callable[..., Path], model_type: str, slot_module: str) -> None:
    folder, backend = make_backbone(model_type), Counting()
    plain, compiled = (build(folder, slot_module, checkpointing=False) for _ in range(2))
    names, hashed = list(compiled.state_dict()), compiled.frozen_hashes()
    compile_layers(layers_of(compiled), backend)
    for rows, tokens in ((4, 12), (3, 9)):
        compare(plain, compiled, some_ids(rows, tokens))
    graphs = backend.graphs
    # Three layers: without a slot, with the lowest one, with another one; each in training and in evaluation.
    assert 0 < graphs <= 6
    for rows, tokens in ((8, 30), (2, 7), (5, 64), (16, 16), (3, 12)):
        compare(plain, compiled, some_ids(rows, tokens))
    assert backend.graphs == graphs
    assert list(compiled.state_dict()) == names and compiled.frozen_hashes() == hashed


@pytest.mark.parametrize("lower", ["0.feedforward", pytest.param("0.before_attention", marks=pytest.mark.slow)])
def test_slots_that_read_the_input_and_a_skipped_layer(tiny_backbone: Path, lower: str) -> None:
    def made() -> AdaptedModel:
        torch.manual_seed(0)
        adapters = {name: BottleneckAdapter(32, 4) for name in (lower, "1.before_attention", "1.feedforward")}
        for adapter in adapters.values():
            torch.nn.init.normal_(adapter.up.weight)
        return AdaptedModel(load_backbone(str(tiny_backbone)), dict(adapters), "input", TaskHead(32, 2)).eval()

    plain, compiled = made(), made()
    compile_layers(layers_of(compiled), Counting())
    ids = some_ids(4, 12)
    found = []
    for first_layer in (0, 1, 2, 0):
        expected = plain(ids, (ids != 0).long(), first_layer=first_layer)
        found.append(expected)
        scores = compiled(ids, (ids != 0).long(), first_layer=first_layer)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0], found[3])
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[2])


@pytest.mark.slow
def test_layers_that_differ_are_all_compiled(tiny_backbone: Path) -> None:
    """One model after another in a process, as in a sweep: none is left uncompiled."""
    for _ in range(4):
        backend = Counting()
        model = build(tiny_backbone, "adapter", checkpointing=False).train()
        compile_layers(layers_of(model), backend)
        model(some_ids(3, 8), torch.ones(3, 8, dtype=torch.long))
        assert backend.graphs == 3


def compiling_is_refused() -> bool:
    """Whether torch is in a path with a space, where torch.compile cannot link: then `check_compiler` refuses it."""
    if " " not in torch.__file__:
        check_compiler()
        return False
    with pytest.raises(UserError, match=r"torch\.compile cannot use the path .*, which contains a space"):
        check_compiler()
    return True


@pytest.mark.slow
@pytest.mark.parametrize("slot_module", ["adapter", "fusion"])
def test_really_compiled(tiny_backbone: Path, slot_module: str) -> None:
    if compiling_is_refused():
        return
    plain, compiled = (build(tiny_backbone, slot_module, checkpointing=False) for _ in range(2))
    for model in (plain, compiled):  # another stream of random numbers
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    compile_layers(layers_of(compiled))
    for rows, tokens in ((4, 12), (3, 9), (8, 30), (1, 5)):
        compare(plain, compiled, some_ids(rows, tokens))


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"^compile=true requires a C\+\+ compiler, but \S+ was not found: [^\n]*$"):
        check_compiler()
    program = tmp_path / "my-c++"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", "my-c++")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="Python's headers"):
        check_compiler()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch, "__file__", "/my work/.venv/torch/__init__.py")
    with pytest.raises(UserError, match=r"cannot use the path /my work/\.venv/torch, which contains a space"):
        check_compiler()
