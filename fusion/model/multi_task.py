"""Multi-task inference: the layers below the lowest adapter are run once for all tasks.

AdapterDrop (Rücklé et al. 2021, §3.2): the more of the first layers are without adapters, the more the tasks share.

Shapes: B rows, T tokens, D hidden size, N tasks, K outputs of a task's head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fusion.backbones.load import Backbone
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule
from fusion.layers.switch import TaskSwitch
from fusion.model.adapted import AdaptedModel


class MultiTaskModel(nn.Module):
    """Scores of each row by the adapters and heads of N tasks, in one pass.

    Args:
        adapters: of each task, by slot address.
        reads: what all of them read, see `fusion.backbones.wirings`.
        heads: of each task.

    Raises:
        ValueError: no task, or not as many heads as tasks.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[Mapping[str, BottleneckAdapter]],
        reads: str,
        heads: Sequence[TaskHead],
    ) -> None:
        super().__init__()
        if not adapters or len(adapters) != len(heads):
            raise ValueError(f"{len(adapters)} tasks and {len(heads)} heads")
        slot_modules: dict[str, SlotModule] = {}
        for slot in sorted({slot for own in adapters for slot in own}):
            present = [task for task, own in enumerate(adapters) if slot in own]
            bank = AdapterBank([adapters[task][slot] for task in present], present, len(adapters))
            slot_modules[slot] = TaskSwitch(bank)
        self.model = AdaptedModel(backbone, slot_modules, reads, heads[0])
        self.model.take_features()
        self.heads = nn.ModuleList(heads)
        self.eval()

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> list[Tensor]:
        """input_ids, attention_mask, token_type_ids: (B, T) -> for each task (B, K)."""
        tasks = len(self.heads)
        hidden = self.model.frozen_features(input_ids, attention_mask, token_type_ids)
        if self.model.boundary is None:  # no adapter anywhere
            return [head(hidden, attention_mask) for head in self.heads]
        states = self.model.hidden_states(
            input_ids.repeat(tasks, 1),
            attention_mask.repeat(tasks, 1),
            None if token_type_ids is None else token_type_ids.repeat(tasks, 1),
            members=torch.arange(tasks, device=input_ids.device).repeat_interleave(len(input_ids)),
            features=hidden.repeat(tasks, 1, 1),
        )
        return [head(own, attention_mask) for head, own in zip(self.heads, states.chunk(tasks), strict=True)]
