"""A slot: a place in the backbone where the stream may be changed.

Shapes: B rows, T tokens, D hidden size, I the width of what the sublayer's last product reads.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from fusion.layers.filling import BatchContext, Filling


class CurrentBatch:
    """What the model hands to all its slots before the backbone runs.

    The backbone's own modules pass no keyword through to the place where a slot sits, hence this
    one shared reference. It stays as it is until the next batch, so that a layer that is computed
    again for its gradient sees the same.
    """

    def __init__(self) -> None:
        self.context: BatchContext | None = None


class PostNormSlot(nn.Module):
    """The end of a post-norm sublayer, `LN(h + a)`, with room for a change u: `LN(h + u + a)`.

    It takes the place of the backbone's own output module (BERT, RoBERTa, XLM-R, Electra), and
    keeps that module's three parts under their own names, so that the backbone's tensors are
    called what they were. With a the sublayer's input and h = dropout(W·…), the filling reads

        `output`: x = h            (Houlsby et al. 2019)
        `normed`: x = LN(h + a)    (Pfeiffer et al. 2021; the same LN, twice)

    Args:
        sublayer_output: a module with `dense`, `dropout` and `LayerNorm`.
        name: `LAYER.SITE`, such as `0.feedforward`.
        filling: what changes the stream here. It is not registered: the model owns it.
        reads: output or normed.
        current: where the model puts each batch's context.

    Raises:
        ValueError: `reads` is unknown.
    """

    def __init__(
        self, sublayer_output: nn.Module, name: str, filling: Filling, reads: str, current: CurrentBatch
    ) -> None:
        super().__init__()
        if reads not in ("output", "normed"):
            raise ValueError(f"reads {reads!r}: expected output or normed")
        self.dense = sublayer_output.get_submodule("dense")
        self.dropout = sublayer_output.get_submodule("dropout")
        self.LayerNorm = sublayer_output.get_submodule("LayerNorm")
        self.name = name
        self.reads = reads
        self._current = current
        self._filling = (filling,)  # a tuple hides it from torch: the model's own table registers it

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states: (B, T, I), input_tensor a: (B, T, D) -> (B, T, D)."""
        h = self.dropout(self.dense(hidden_states))
        residual = h + input_tensor
        x = self.LayerNorm(residual) if self.reads == "normed" else h
        return self.LayerNorm(residual + self._filling[0](x, self._context()))

    def _context(self) -> BatchContext:
        context = self._current.context
        if context is None:
            raise RuntimeError(f"slot {self.name} ran outside the model: nothing set the batch")
        return context if context.record is None else replace(context, place=self.name)
