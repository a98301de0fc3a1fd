"""DDP exchanges the trainable parameters and nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from fusion.backbones.load import load_backbone
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.training.frozen_weights import FrozenWeights


class Module(nn.Module):
    """Has the model under the name that it has in the LightningModule."""

    def __init__(self, model: AdaptedModel) -> None:
        super().__init__()
        self.model = model


def test_ddp_does_not_exchange_frozen_tensors(tiny_backbone: Path, tmp_path: Path) -> None:
    bank = AdapterBank([BottleneckAdapter(32, 4), BottleneckAdapter(32, 4)], [0, 1], 2)
    model = AdaptedModel(
        load_backbone(str(tiny_backbone)), {"1.feedforward": AdapterFusion(bank)}, "normed", TaskHead(32, 2)
    )
    module = Module(model)
    FrozenWeights(model, False).setup(cast(Any, SimpleNamespace(world_size=2)), module, "fit")
    distributed.init_process_group("gloo", f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(module)
        buffers = {id(buffer) for buffer in wrapped.modules_buffers}
        assert not buffers & {id(tensor) for tensor in model.frozen().values()}
        broadcast = {id(tensor) for tensor in wrapped._module_parameters}
        assert broadcast == {id(parameter) for parameter in model.trainable().values()}
    finally:
        distributed.destroy_process_group()
