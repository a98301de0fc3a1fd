"""A backbone with slot modules, and a head.

Shapes: S texts, B examples, T tokens, D hidden size, K outputs of the head, N sources.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fusion.backbones.forward import last_hidden_states
from fusion.backbones.layer_calls import BoundaryReached, recompute_in_backward, skip_with_features, watch_boundary
from fusion.backbones.load import Backbone, hash_tensors
from fusion.backbones.precision import multiplies
from fusion.backbones.slots import CurrentBatch, Slot, SlotAddress
from fusion.backbones.tuning import Tuning
from fusion.layers.gates import Gate
from fusion.layers.heads import TaskHead, TaskHeads
from fusion.layers.slot_module import BatchContext, LossRecorder, Recorder, SlotModule, parameters_of


class AdaptedModel(nn.Module):
    """Frozen backbone with slot modules attached to it, and a head that computes logits from its output.

    Only the parameters of `slot_modules`, `head` and `tuning` are trainable. Freezing, the optimizer, checkpoints and
    the store all read `trainable`. Raises ValueError if the backbone has no such slot, or the slot does not support
    `reads`.

    Args:
        backbone: frozen backbone, to which slots are attached in place.
        slot_modules: slot modules by slot address, see `SlotAddress`.
        reads: input of every slot module, see `fusion.backbones.slots`.
        backbone_dropout: whether the backbone's own dropout is active in training.
        gradient_checkpointing: whether layers are recomputed in the backward pass to save memory.
    """

    def __init__(
        self,
        backbone: Backbone,
        slot_modules: Mapping[str, SlotModule],
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
        self.tuning = tuning or Tuning({})
        self._current = CurrentBatch(in_float32=not multiplies(str(self.dtype).removeprefix("torch.")))
        self._family = backbone.family
        self._layers = backbone.layers  # of the deepest stack
        self.hidden_size = backbone.hidden_size
        self._takes_features = False
        self._frozen = False
        self._slot_list = [self._make_slot(SlotAddress.parse(name), module) for name, module in slot_modules.items()]
        for slot in sorted(self._slot_list, key=lambda slot: slot.order):
            slot.attach(self._layers_of(slot.address.stack)[slot.address.layer])
        # Nested by address, so that names are `slots.0.feedforward.down.weight`.
        self.slots = nn.ModuleDict()
        for slot in self._slot_list:
            *above, last = slot.address.path.split(".")
            parent = self.slots
            for key in above:
                if key not in parent:
                    parent[key] = nn.ModuleDict()
                parent = cast(nn.ModuleDict, parent[key])
            parent[last] = slot.module
        self._cast_frozen_buffers()
        first = next(iter(self._family.stacks))
        gates = {gate.key: gate for gate in self.slots.modules() if isinstance(gate, Gate) and gate.place is not None}
        places = [(slot.address.stack, slot.address.layer) for slot in self._slot_list]
        places += [gate.place for gate in gates.values() if gate.place is not None]
        self.boundary = min((layer for stack, layer in places if stack == first), default=None)
        if self.boundary is not None:
            watch_boundary(self._layers_of(first)[self.boundary], self._current)
        for gate in gates.values():  # after the boundary, which replaces the input of its layer
            assert gate.place is not None
            stack, layer = gate.place
            self._current.watch_gate(self._layers_of(stack)[layer], gate)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            recompute_in_backward(self.layers(), self._current)
        self.backbone.requires_grad_(False)
        for parameter in self.tuning.parameters.values():
            parameter.requires_grad_(True)
        self.train(self.training)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone's weights and of the hidden states."""
        return next(self.backbone.parameters()).dtype

    def _cast_frozen_buffers(self) -> None:
        """Cast the frozen adapters of the slot modules, which are buffers, to the dtype of their products."""
        if self._current.in_float32:
            return
        for module in self.slots.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and name not in getattr(module, "in_float32", ()):
                    setattr(module, name, buffer.to(self.dtype))

    def layers(self) -> list[nn.Module]:
        """Return the layers of all stacks, in order of execution."""
        return [layer for stack in self._family.stacks for layer in self._layers_of(stack)]

    def _layers_of(self, stack: str) -> nn.ModuleList:
        return self._family.layer_list(self.backbone, stack)

    def _make_slot(self, address: SlotAddress, module: SlotModule) -> Slot:
        stack = self._family.stacks.get(address.stack)
        if stack is None:
            raise ValueError(f"no slot {address}: the stack must be one of {', '.join(self._family.stacks)}")
        layers = len(self._layers_of(address.stack))
        if address.site not in stack.sites or address.layer >= layers:
            raise ValueError(
                f"no slot {address}: the backbone has {layers} layers with the sites {', '.join(stack.sites)}"
            )
        return stack.sites[address.site].at(address, module, self.reads, self._current)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set training mode; the backbone's own dropout is active only with `backbone_dropout`."""
        super().train(mode)
        if not self.backbone_dropout:
            self.backbone.eval()
            for dropout in self.tuning.dropouts:
                dropout.train(mode)
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        choice_counts: Tensor | None = None,
        sources_on: Tensor | None = None,
        folds: Tensor | None = None,
        record: Recorder | None = None,
        add_loss: LossRecorder | None = None,
        features: Tensor | None = None,
        first_layer: int = 0,
        task: int = 0,
        words: Tensor | None = None,
    ) -> Tensor:
        """Compute the logits.

        Args:
            input_ids, attention_mask, token_type_ids: (S, T).
            choice_counts: (B,) number of texts per example: choices, or windows of a long sentence.
            sources_on: (N,) bool mask of active sources. If `None`, all sources are active.
            folds: (S,), see `BatchContext`.
            record: called in each slot with its name and the attention weights (S, T, N).
            add_loss: called in each slot with loss terms of each text (S,), see `BatchContext`.
            features: (S, T, D), `frozen_features` of these examples, which replace the layers below the lowest slot.
                Values at padding are ignored.
            first_layer: slots in lower layers are inactive (AdapterDrop, Rücklé et al. 2021).
            task: index of the head in multi-task models.
            words: (B, max words), for tagging: index of each word's first subword among the S * T tokens, -1 at
                padding.

        Returns:
            Logits (B, K); multiple choice: (B, max choices); tagging: (B, max words, K). Padded with -inf.
        """
        hidden = self.hidden_states(
            input_ids,
            attention_mask,
            token_type_ids,
            sources_on=sources_on,
            folds=folds,
            record=record,
            add_loss=add_loss,
            features=features,
            first_layer=first_layer,
        )
        index = (task,) if isinstance(self.head, TaskHeads) else ()
        logits: Tensor = self.head(hidden, attention_mask, *index, words=words)
        if self.training and first_layer > 0:
            logits = logits + self._zero_of_inactive_slots(first_layer)
        if choice_counts is None or words is not None:
            return logits
        return _by_example(logits.squeeze(-1), choice_counts)

    def hidden_states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        sources_on: Tensor | None = None,
        folds: Tensor | None = None,
        members: Tensor | None = None,
        record: Recorder | None = None,
        add_loss: LossRecorder | None = None,
        features: Tensor | None = None,
        first_layer: int = 0,
    ) -> Tensor:
        """Compute the last hidden states (S, T, D). See `forward` and `BatchContext` for the arguments."""
        if features is not None and not self._takes_features:
            raise RuntimeError("call take_features() before a batch with cached features")
        on = tuple(layer >= first_layer for layer in range(self._layers))
        self._current.context = BatchContext(attention_mask, on, members, sources_on, folds, record, add_loss)
        self._current.features = features
        if features is not None and self.boundary is None:
            return features
        return self._run(input_ids, attention_mask, token_type_ids)

    def _zero_of_inactive_slots(self, first_layer: int) -> Tensor:
        """Return 0 with zero gradients for the parameters of inactive slots, since DDP expects all gradients.

        It is added to the logits instead of in the layers, so that the backward pass stops at the lowest active slot.
        """
        below = [slot.module for slot in self._slot_list if slot.address.layer < first_layer]
        parts = [parameter.sum() for module in below for parameter in module.parameters()]
        return 0.0 * torch.stack(parts).sum() if parts else torch.zeros(())

    def _run(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
        """Run the backbone: (S, T) -> last hidden states (S, T, D)."""
        return last_hidden_states(self.backbone, self._family, input_ids, attention_mask, token_type_ids)

    @torch.no_grad()
    def frozen_features(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Compute the input (S, T, D) of the lowest layer with a slot or, without slots, the last hidden states.

        It does not depend on any trainable parameter, provided that the backbone's dropout is off.
        """
        assert not self.backbone.training, "with dropout, features would not be deterministic"
        self._current.context = BatchContext(attention_mask)
        self._current.features, self._current.capture = None, True
        try:
            return self._run(input_ids, attention_mask, token_type_ids)
        except BoundaryReached as reached:
            features: Tensor = reached.args[0]
            return features
        finally:
            self._current.capture = False

    def take_features(self) -> None:
        """Accept frozen features in batches, with which layers below the boundary are not computed.

        Raises RuntimeError if the features are not defined, see `has_features`.
        """
        if not self.has_features:
            raise RuntimeError("encoder features cannot be cached: all adapter slots are in the decoder")
        if not self._takes_features:
            layers, stack = self._family.layer_list(self.backbone), self._family.first_stack
            skip_with_features(layers, self.boundary or 0, stack, self._current)
            self._takes_features = True

    @property
    def has_features(self) -> bool:
        """Whether `frozen_features` exist: not if all slots are in the decoder of an encoder–decoder model."""
        return self.boundary is not None or not self._slot_list

    @property
    def adapted_layers(self) -> list[int]:
        """Indices of the layers with a slot, in ascending order."""
        return sorted({slot.address.layer for slot in self._slot_list})

    def merged(self, fold: bool = False) -> AdaptedModel:
        """Merge matrices in place for faster inference. Logits stay the same up to rounding.

        Afterwards the model can no longer be trained or stored. With `fold`, constant updates of linear layers (LoRAs,
        and compositions of LoRAs whose weights do not depend on the text) are added to the weights of the backbone;
        `sources_on`, `record` and `first_layer` then have no effect on them.
        """
        remaining = []
        for slot in self._slot_list:
            slot.module = slot.module.merged()
            self.slots.set_submodule(slot.address.path, slot.module)
            if fold and slot.fold():
                self.slots.set_submodule(slot.address.path, nn.Identity())
            else:
                remaining.append(slot)
        self._slot_list = remaining
        self.tuning.merge()
        return self.eval()

    def losses(self) -> dict[str, Tensor]:
        """Return the named loss terms of the slot modules, each summed over the slots."""
        total: dict[str, Tensor] = {}
        for slot in self._slot_list:
            for name, value in slot.module.losses().items():
                total[name] = total[name] + value if name in total else value
        return total

    def slot_modules(self) -> dict[str, SlotModule]:
        """Return all slot modules by address, in the order of the constructor's argument."""
        return {str(slot.address): slot.module for slot in self._slot_list}

    def weight_state(self) -> dict[str, nn.Parameter]:
        """Return the parameters stored as weights: `0.feedforward.down.weight`. Shared parameters appear once."""
        return parameters_of(self.slot_modules()) | self.tuning.state()

    @property
    def heads(self) -> list[TaskHead]:
        """List of the heads, one per task."""
        return list(self.head.by_task().values()) if isinstance(self.head, TaskHeads) else [self.head]

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return all trainable parameters by full name."""
        if self._frozen:
            return {}
        modules = {slot.address.path: slot.module for slot in self._slot_list}
        in_slots = {f"slots.{name}": parameter for name, parameter in parameters_of(modules).items()}
        tuned = {f"backbone.{name}": parameter for name, parameter in self.tuning.parameters.items()}
        head = {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}
        return in_slots | tuned | head

    def freeze(self) -> None:
        """Freeze all parameters. `weight_state` is unchanged."""
        self.requires_grad_(False)
        self._frozen = True

    def undecayed(self) -> set[str]:
        """Return the names in `trainable` without weight decay: vectors, and `SlotModule.undecayed`."""
        vectors = {name for name, parameter in self.trainable().items() if parameter.ndim < 2}
        exempt = {f"slots.{slot.address.path}.{name}" for slot in self._slot_list for name in slot.module.undecayed}
        return vectors | (exempt & set(self.trainable()))

    def frozen(self) -> dict[str, Tensor]:
        """Return all tensors that must not change in training. A shared tensor may appear under multiple names."""
        # Compared by identity, since a shared parameter has more than one name.
        training = {id(parameter) for parameter in self.trainable().values()}
        return {name: tensor for name, tensor in self.every_tensor().items() if id(tensor) not in training}

    def every_tensor(self) -> dict[str, Tensor]:
        """Return all parameters and buffers, including non-persistent buffers, by each of their names."""
        parameters = self.named_parameters(remove_duplicate=False)
        return {**dict(parameters), **dict(self.named_buffers(remove_duplicate=False))}

    def frozen_hashes(self) -> dict[str, str]:
        """Return the sha256 of each tensor of `frozen`."""
        return {name: hash_tensors([(name, tensor)]) for name, tensor in self.frozen().items()}


def hash_of_hashes(hashes: Mapping[str, str]) -> str:
    """Return the sha256 over names and hashes, in the order of the names."""
    return hashlib.sha256(json.dumps(dict(hashes), sort_keys=True).encode()).hexdigest()


def _by_example(logits: Tensor, choice_counts: Tensor) -> Tensor:
    """Group logits by example: (S,), choice_counts (B,) -> (B, max choices), padded with -inf."""
    most = int(choice_counts.max())
    exists = torch.arange(most, device=logits.device) < choice_counts.unsqueeze(-1)
    return logits.new_full(exists.shape, float("-inf")).masked_scatter(exists, logits)
