"""Slots in real architectures against the layers recomputed from the backbone's own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.backbones.families import FAMILIES
from fusion.backbones.load import Backbone, load_backbone
from fusion.backbones.slots import CurrentBatch, PostNormSlot
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.model.adapted import AdaptedModel

PLACEMENTS = {
    "pfeiffer": (["feedforward"], "normed"),
    "houlsby": (["attention", "feedforward"], "output"),
    "parallel": (["feedforward"], "input"),
    "parallel to both": (["attention", "feedforward"], "input"),
    "before attention": (["before_attention"], "input"),
    "before attention and parallel": (["before_attention", "feedforward"], "input"),
}


def fillings(layers: list[int], sites: list[str], hidden_size: int = 32) -> dict[str, SlotModule]:
    torch.manual_seed(3)
    made: dict[str, SlotModule] = {}
    for layer in layers:
        for site in sites:
            adapter = BottleneckAdapter(hidden_size, 4, "silu").double()
            for parameter in adapter.parameters():
                nn.init.normal_(parameter, std=0.3)
            made[f"{layer}.{site}"] = adapter
    return made


def norm(x: Tensor, state: Mapping[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def dense(x: Tensor, state: Mapping[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def change(adapter: SlotModule | None, x: Tensor) -> Tensor:
    if adapter is None:
        return torch.zeros_like(x)
    assert isinstance(adapter, BottleneckAdapter)
    z = dense(x, dict(adapter.down.named_parameters(prefix="d")), "d")
    return dense(z * torch.sigmoid(z), dict(adapter.up.named_parameters(prefix="u")), "u")


def plain_layers(
    hidden: Tensor, mask: Tensor, backbone: Backbone, adapters: dict[str, SlotModule], placement: str
) -> Tensor:
    """All layers from their tensors, with the placement's equations of the two papers."""
    config, state = backbone.model.config, dict(backbone.model.named_parameters())
    eps, heads = config.layer_norm_eps, config.num_attention_heads
    width = config.hidden_size // heads
    for layer in range(config.num_hidden_layers):
        path = f"encoder.layer.{layer}"

        before = adapters.get(f"{layer}.before_attention")
        read = hidden + change(before, hidden)

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (heads, width)).transpose(1, 2)

        q, k, v = (split(dense(read, state, f"{path}.attention.self.{n}")) for n in ("query", "key", "value"))
        scores = (q @ k.transpose(-1, -2)) / width**0.5
        weights = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf")).softmax(-1)
        attended = (weights @ v).transpose(1, 2).flatten(-2)

        def end(h: Tensor, a: Tensor, module: str, adapter: SlotModule | None) -> Tensor:
            name = f"{module}.LayerNorm"
            x = {"normed": norm(h + a, state, name, eps), "output": h, "input": a}[PLACEMENTS[placement][1]]
            return norm(h + change(adapter, x) + a, state, name, eps)

        h = dense(attended, state, f"{path}.attention.output.dense")
        middle = end(h, hidden, f"{path}.attention.output", adapters.get(f"{layer}.attention"))
        h = dense(F.gelu(dense(middle, state, f"{path}.intermediate.dense")), state, f"{path}.output.dense")
        hidden = end(h, middle, f"{path}.output", adapters.get(f"{layer}.feedforward"))
    return hidden


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_slots_equal_a_plain_recomputation(
    model_type: str, placement: str, make_backbone: Callable[..., Path]
) -> None:
    backbone = load_backbone(str(make_backbone(model_type)))
    backbone.model.double()
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 10, 3, 0, 0]])
    mask = (ids != 0).long()
    sites, reads = PLACEMENTS[placement]
    adapters = fillings([0, 2], sites)  # the middle layer keeps its own modules
    with torch.no_grad():
        embedded = backbone.model.get_submodule("embeddings")(input_ids=ids)
        if model_type == "electra":
            embedded = backbone.model.get_submodule("embeddings_project")(embedded)
        expected = plain_layers(embedded, mask, backbone, adapters, placement)
        without = plain_layers(embedded, mask, backbone, {}, placement)
        head = TaskHead(32, 2).double()
        model = AdaptedModel(backbone, adapters, reads, head).eval()
        scores = model(ids, mask)
    real = mask.bool()
    hidden = model.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(hidden[real], expected[real], rtol=0, atol=1e-10)
    torch.testing.assert_close(scores, head(expected, mask), rtol=0, atol=1e-10)
    assert (expected - without).abs().max() > 0.1  # the adapters do something


def test_backbone_keeps_its_tensor_names_and_its_fingerprint(tiny_backbone: Path) -> None:
    from fusion.backbones.load import fingerprint

    backbone = load_backbone(str(tiny_backbone))
    before = {name: p.clone() for name, p in backbone.model.named_parameters()}
    AdaptedModel(backbone, {"1.feedforward": BottleneckAdapter(32, 4)}, "normed", TaskHead(32, 2))
    after = dict(backbone.model.named_parameters())
    assert set(before) == set(after)
    assert fingerprint(backbone.model, backbone.family) == backbone.fingerprint


def test_wrong_reading_and_a_slot_outside_the_model(tiny_backbone: Path) -> None:
    output = load_backbone(str(tiny_backbone)).model.get_submodule("encoder.layer.0.output")
    with pytest.raises(ValueError, match="output, normed, input"):
        PostNormSlot(output, "0.feedforward", BottleneckAdapter(32, 4), "both", CurrentBatch())
    slot = PostNormSlot(output, "0.feedforward", BottleneckAdapter(32, 4), "normed", CurrentBatch())
    with pytest.raises(RuntimeError, match=r"0\.feedforward"):
        slot(torch.zeros(1, 2, 64), torch.zeros(1, 2, 32))
