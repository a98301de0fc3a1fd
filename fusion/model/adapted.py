"""The backbone with its slots filled, and a head on top.

Shapes: S texts, B rows, T tokens, D hidden size, K outputs of the head, N sources, W the width of
what the lowest slot gets from below (D or 2·D).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fusion.backbones.checkpointing import recompute_in_backward
from fusion.backbones.families import Family
from fusion.backbones.load import Backbone, hash_tensors
from fusion.backbones.prefix import make_skippable
from fusion.backbones.slots import (
    BEFORE_ATTENTION,
    BeforeAttentionSlot,
    CurrentBatch,
    EntryReached,
    PostNormSlot,
    Slot,
    layer_and_site,
    state_parts,
)
from fusion.backbones.tuning import Tuning
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.slot_module import BatchContext, Recorder, SlotModule, parameters_of


class AdaptedModel(nn.Module):
    """Runs the frozen backbone through its filled slots and scores the result.

    The parameters of `fillings` and `head` train, and what `tuning` names; nothing else does. Freezing,
    the optimizer, checkpoints and the store all read that from here.

    Args:
        backbone: frozen; its sublayers are changed in place where a slot is filled.
        fillings: by slot name, `LAYER.SITE`. A slot that is not named stays as it was.
        reads: what every filling reads, see `PostNormSlot`.
        head: gives K scores a text; of several tasks, each has its own.
        backbone_dropout: whether the backbone's own dropout acts in training.
        gradient_checkpointing: whether each layer is computed again in backward, to keep less in memory.
        tuning: what of the backbone itself trains; None: nothing.

    Raises:
        ValueError: a slot that the backbone does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        fillings: Mapping[str, SlotModule],
        reads: str,
        head: TaskHead | TaskHeads,
        backbone_dropout: bool = False,
        gradient_checkpointing: bool = False,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__()
        self.backbone = cast(nn.Module, backbone.model)
        self.backbone_dropout = backbone_dropout
        self.reads = reads
        self.head = head
        self.tuning = tuning
        # As layer -> site -> filling, so that names read `fillings.0.feedforward.down.weight`.
        self.fillings = nn.ModuleDict()
        self._current = CurrentBatch()
        self._family = backbone.family
        self._hidden_size = backbone.hidden_size
        self._layers = backbone.layers
        self._skippable = False
        self._slots: list[Slot] = []
        self._frozen = False
        layers = backbone.family.layer_list(backbone.model)
        for name, filling in fillings.items():
            layer, _, site = name.partition(".")
            if site not in backbone.family.sites or not layer.isdigit() or int(layer) >= len(layers):
                raise ValueError(
                    f"no slot {name}: {len(layers)} layers, sites {', '.join(backbone.family.sites)}"
                )
            self._slots.append(
                _slot(layers[int(layer)], backbone.family, name, filling, reads, self._current)
            )
            if layer not in self.fillings:
                self.fillings[layer] = nn.ModuleDict()
            cast(nn.ModuleDict, self.fillings[layer])[site] = filling
        self._current.entry = self._lowest(fillings)
        self.gradient_checkpointing = False
        if gradient_checkpointing:
            self.recompute_layers()
        self.backbone.requires_grad_(False)
        for parameter in self.tuned().values():
            parameter.requires_grad_(True)
        self.train(self.training)

    def recompute_layers(self) -> None:
        """From now on, compute each layer again in backward, to keep less in memory."""
        if not self.gradient_checkpointing:
            recompute_in_backward(self._family.layer_list(self.backbone), self._current)
            self.gradient_checkpointing = True

    def train(self, mode: bool = True) -> AdaptedModel:
        """As torch's, but the backbone's dropout acts only where `backbone_dropout` asks for it."""
        super().train(mode)
        if not self.backbone_dropout:
            self.backbone.eval()
            for dropout in self.tuning.dropouts if self.tuning is not None else ():
                dropout.train(mode)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        choice_counts: Tensor | None = None,
        sources_on: Tensor | None = None,
        record: Recorder | None = None,
        prefix: Tensor | None = None,
        first_layer: int = 0,
        task: int = 0,
    ) -> Tensor:
        """Scores of the rows.

        Args:
            input_ids, attention_mask, token_type_ids: (S, T).
            choice_counts: (B,), the number of texts of each row of a choice task, in order.
            sources_on: (N,) bool, which sources take part; None means all.
            record: is called in each slot with its name and the sources' weights (S, T, N).
            prefix: (S, T, W), what `prefix_states` gives for these rows: nothing below the lowest
                slot is run then. Values at padding do not matter.
            first_layer: the slots of the layers below it stay empty (AdapterDrop, Rücklé et al. 2021).
            task: whose rows they are, where there are several heads.

        Returns:
            (B, K); for a choice task (B, most choices of a row), -inf where a row has fewer.
        """
        hidden = self.hidden_states(
            input_ids,
            attention_mask,
            token_type_ids,
            sources_on=sources_on,
            record=record,
            prefix=prefix,
            first_layer=first_layer,
        )
        whose = (task,) if isinstance(self.head, TaskHeads) else ()
        scores: Tensor = self.head(hidden, attention_mask, *whose)
        if self.training and first_layer > 0:
            scores = scores + self._idle(first_layer)
        return scores if choice_counts is None else _by_row(scores.squeeze(-1), choice_counts)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        sources_on: Tensor | None = None,
        members: Tensor | None = None,
        record: Recorder | None = None,
        prefix: Tensor | None = None,
        first_layer: int = 0,
    ) -> Tensor:
        """What the head reads; arguments as of `forward`.

        Args:
            members: (S,), whose adapter each text is for, where the slots hold those of several tasks.

        Returns:
            (S, T, D).
        """
        if prefix is not None and not self._skippable:
            raise RuntimeError("call make_prefix_skippable() before a batch brings its prefix")
        on = tuple(layer >= first_layer for layer in range(self._layers))
        self._current.context = BatchContext(attention_mask, on, members, sources_on, record)
        self._current.prefix = prefix
        return self._run(input_ids, attention_mask, token_type_ids)

    def _idle(self, first_layer: int) -> Tensor:
        """0, with a gradient of 0 for all that trains in the layers below: DDP wants one of every parameter.

        Added at the end and not in the layers, so that backward still stops where the first slot is filled.
        """
        below = [slot.filling for slot in self._slots if layer_and_site(slot.name)[0] < first_layer]
        parts = [parameter.sum() for filling in below for parameter in filling.parameters()]
        return 0.0 * torch.stack(parts).sum() if parts else torch.zeros(())

    def _run(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """(S, T) -> the last layer's output: (S, T, D)."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **types)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def prefix_states(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """What the lowest slot gets from below, or without any slot the last layer's output.

        The same for a row whatever is trained, as long as the backbone's dropout is off.

        Args:
            input_ids, attention_mask, token_type_ids: (S, T).

        Returns:
            (S, T, W).
        """
        assert not self.backbone.training, "dropout would make it another one each time"
        self._current.context = BatchContext(attention_mask)
        self._current.prefix, self._current.stop = None, True
        try:
            return self._run(input_ids, attention_mask, token_type_ids)
        except EntryReached as reached:
            return reached.state
        finally:
            self._current.stop = False

    def make_prefix_skippable(self) -> None:
        """Let batches bring their prefix. Frozen tensors of the prefix get other names by it."""
        if not self._skippable:
            make_skippable(self.backbone, self._family, self._hidden_size, self._current)
            self._skippable = True

    @property
    def prefix_width(self) -> int:
        """W, the width of what `prefix_states` gives."""
        return self._hidden_size * (1 if self.entry is None else state_parts(self.entry, self.reads))

    @property
    def entry(self) -> str | None:
        """The lowest slot, below which nothing trains; None: no slot."""
        return self._current.entry

    @property
    def adapted_layers(self) -> list[int]:
        """The layers with a slot, rising."""
        return sorted({layer_and_site(slot.name)[0] for slot in self._slots})

    def _lowest(self, slots: Iterable[str]) -> str | None:
        order = list(self._family.sites)

        def place(slot: str) -> tuple[int, int]:
            layer, site = layer_and_site(slot)
            return layer, order.index(site)

        return min(slots, key=place, default=None)

    def merged(self) -> AdaptedModel:
        """This model, changed for inference: what its fillings trained is merged where that saves work.

        The scores stay the same up to rounding. It cannot be trained or stored any more.
        """
        for slot in self._slots:
            layer, site = layer_and_site(slot.name)
            sites = cast(nn.ModuleDict, self.fillings[str(layer)])
            sites[site] = cast(SlotModule, sites[site]).merged()
            slot.fill(cast(SlotModule, sites[site]))
        if self.tuning is not None:
            self.tuning.merge()
        return self.eval()

    def losses(self) -> dict[str, Tensor]:
        """The named terms that the fillings add, each summed over the slots."""
        total: dict[str, Tensor] = {}
        for filling in self.filling_list():
            for name, value in filling.losses().items():
                total[name] = total[name] + value if name in total else value
        return total

    def filling_list(self) -> list[SlotModule]:
        """All fillings, layer by layer."""
        every = (cast(nn.ModuleDict, sites).values() for sites in self.fillings.values())
        return [cast(SlotModule, filling) for sites in every for filling in sites]

    def filling_state(self) -> dict[str, nn.Parameter]:
        """What the fillings train: `0.feedforward.down.weight` and so on. What slots share stands there once."""
        return parameters_of({slot.name: slot.filling for slot in self._slots})

    def tuned(self) -> dict[str, nn.Parameter]:
        """What of the backbone itself trains, by its name there."""
        return {} if self.tuning is None else dict(self.tuning.parameters)

    def weight_state(self) -> dict[str, nn.Parameter]:
        """What is stored as the weights."""
        return self.filling_state() | ({} if self.tuning is None else self.tuning.state())

    def head_state(self) -> dict[str, nn.Parameter]:
        """What is stored as the head: `output.weight` and so on; of several, `TASK.output.weight`."""
        return self.head.state() if isinstance(self.head, TaskHeads) else dict(self.head.named_parameters())

    def trainable(self) -> dict[str, nn.Parameter]:
        """The one list of what trains, by its full name."""
        if self._frozen:
            return {}
        fillings = {f"fillings.{name}": parameter for name, parameter in self.filling_state().items()}
        tuned = {f"backbone.{name}": parameter for name, parameter in self.tuned().items()}
        return (
            fillings | tuned | {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        )

    def freeze(self) -> None:
        """Let nothing train any more; what is stored stays the same."""
        self.requires_grad_(False)
        self._frozen = True

    def undecayed(self) -> set[str]:
        """Names of `trainable` that take no weight decay: vectors, and what a filling exempts."""
        vectors = {name for name, parameter in self.trainable().items() if parameter.ndim < 2}
        exempt = {
            f"fillings.{layer}.{site}.{name}"
            for layer, sites in self.fillings.items()
            for site, filling in cast(nn.ModuleDict, sites).items()
            for name in cast(SlotModule, filling).undecayed
        }
        return vectors | (exempt & set(self.trainable()))

    def frozen(self) -> dict[str, Tensor]:
        """Every tensor that must not change in training. One that is shared may stand there twice."""
        # By identity: what trains in several places at once has a name in each of them.
        training = {id(parameter) for parameter in self.trainable().values()}
        return {name: tensor for name, tensor in self.every_tensor().items() if id(tensor) not in training}

    def every_tensor(self) -> dict[str, Tensor]:
        """All parameters and buffers, those that no state_dict holds too, by each of their names."""
        parameters = self.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.named_buffers(remove_duplicate=False))}

    def frozen_hashes(self) -> dict[str, str]:
        """sha256 of each tensor of `frozen`."""
        return {name: hash_tensors([(name, tensor)]) for name, tensor in self.frozen().items()}

    def frozen_hash(self) -> str:
        """One hash for all of `frozen`."""
        return hash_of_hashes(self.frozen_hashes())


def hash_of_hashes(hashes: Mapping[str, str]) -> str:
    """sha256 over names and their hashes, in the order of the names."""
    return hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode()).hexdigest()


def _slot(
    layer: nn.Module, family: Family, name: str, filling: SlotModule, reads: str, current: CurrentBatch
) -> Slot:
    """Make room for a filling in one of the backbone's layers."""
    _, site = layer_and_site(name)
    path = family.sites[site]
    module = layer.get_submodule(path)
    if site == BEFORE_ATTENTION:
        before = BeforeAttentionSlot(name, filling, current)
        before.attach(module)
        return before
    after = PostNormSlot(module, name, filling, reads, current)
    layer.set_submodule(path, after)
    return after


def _by_row(scores: Tensor, choice_counts: Tensor) -> Tensor:
    """scores: (S,) in row order, choice_counts: (B,) -> (B, most choices), -inf where there is none."""
    most = int(choice_counts.max())
    there = torch.arange(most, device=scores.device) < choice_counts.unsqueeze(-1)
    return scores.new_full(there.shape, float("-inf")).masked_scatter(there, scores)
