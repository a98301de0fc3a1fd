"""The bottleneck adapter (Houlsby et al. 2019, §2.1; Pfeiffer et al. 2021, §3.1), with LoRA as a special case.

Shapes: B texts, T tokens, D_in and D_out input and output sizes, R bottleneck size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.layers.slot_module import BatchContext, LinearMap, SlotModule

NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
"""Each maps 0 to 0, so that `AdapterBank` can pad bottlenecks with zero rows."""


class BottleneckAdapter(SlotModule):
    """u = s · (σ(x Wdᵀ + bd) Wuᵀ + bu), without the residual, which the slot adds.

    Without biases and with the identity as σ, this is LoRA (Hu et al. 2022, eq. 3): A = Wd, B = Wu, s = α / r. Raises
    ValueError if a size is below 1, or the nonlinearity, scaling or initialization is unknown.

    Args:
        hidden_size, bottleneck_size, output_size: D_in, R, and D_out (default: D_in).
        nonlinearity: σ, a key of `NONLINEARITIES`.
        scaling: s (λ of He et al. 2021): a number, or `learned`, which is initialized to 1.
        dropout: dropout probability of the update.
        init: `bert`: N(0, 0.02) and zero biases, as in BERT; `houlsby`: N(0, 0.01) truncated at two standard
            deviations (Houlsby et al. 2019, §3.6); `zero_up`: Kaiming down and zero up, so that the slot is initially
            the identity (He et al. 2021).
        bias: whether to use bd and bu.
        up_bias: whether to use bu, if different from `bias`.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        nonlinearity: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        init: str = "bert",
        output_size: int | None = None,
        bias: bool = True,
        up_bias: bool | None = None,
    ) -> None:
        super().__init__()
        output_size = hidden_size if output_size is None else output_size
        if min(hidden_size, bottleneck_size, output_size) < 1:
            raise ValueError(
                f"sizes must be at least 1: hidden {hidden_size}, bottleneck {bottleneck_size}, output {output_size}"
            )
        if nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity {nonlinearity!r}: expected one of {', '.join(NONLINEARITIES)}")
        self.nonlinearity = nonlinearity
        if isinstance(scaling, str) and scaling != "learned":
            raise ValueError(f"scaling {scaling!r}: expected a number or 'learned'")
        self.scaling = nn.Parameter(torch.ones(())) if isinstance(scaling, str) else float(scaling)
        self.down = nn.Linear(hidden_size, bottleneck_size, bias)
        self.up = nn.Linear(bottleneck_size, output_size, bias if up_bias is None else up_bias)
        self.dropout = nn.Dropout(dropout)
        self._initialize(init)

    def _initialize(self, init: str) -> None:
        if init == "bert":
            nn.init.normal_(self.down.weight, std=0.02)
            nn.init.normal_(self.up.weight, std=0.02)
        elif init == "houlsby":
            nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.trunc_normal_(self.up.weight, std=0.01, a=-0.02, b=0.02)
        elif init == "zero_up":
            nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
            nn.init.zeros_(self.up.weight)
        else:
            raise ValueError(f"init {init!r}: expected bert, houlsby or zero_up")
        for bias in (self.down.bias, self.up.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D_in) -> u: (B, T, D_out)."""
        z = NONLINEARITIES[self.nonlinearity](self.down(x))
        u = self.up(z)
        if isinstance(self.scaling, Tensor) or self.scaling != 1.0:
            u = u * self.scaling
        return self.dropout(u)

    def linear_map(self) -> LinearMap | None:
        """Return s Wu Wd and s (Wu bd + bu), if σ is the identity."""
        if self.nonlinearity != "identity":
            return None
        with torch.no_grad():
            scaling, up = float(self.scaling), self.up.weight.double()
            bias = torch.zeros(up.shape[0], dtype=up.dtype, device=up.device)
            bias = bias if self.down.bias is None else bias + up @ self.down.bias.double()
            bias = bias if self.up.bias is None else bias + self.up.bias.double()
            return LinearMap(scaling * up @ self.down.weight.double(), scaling * bias)


class WithTargetAdapter(SlotModule):
    """o + u_target: a composition of frozen sources plus a trainable adapter.

    With an adapter initialized by `zero_up`, it is initially equal to the composition. The recorded weights are those of
    the composition; the target adapter is not a source.
    """

    def __init__(self, composition: SlotModule, target: BottleneckAdapter) -> None:
        super().__init__()
        self.composition = composition
        self.target = target
        self.undecayed = tuple(f"composition.{name}" for name in composition.undecayed)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        """x: (B, T, D) -> o + u_target: (B, T, D)."""
        out: Tensor = self.composition(x, batch)
        return out + self.target(x, batch)

    def losses(self) -> dict[str, Tensor]:
        """Return the losses of the composition."""
        return self.composition.losses()

    def merged(self) -> WithTargetAdapter:
        """Return the module with a merged composition."""
        return WithTargetAdapter(self.composition.merged(), self.target)

    def linear_map(self) -> LinearMap | None:
        """Return the sum of both maps, if both are linear."""
        one, other = self.composition.linear_map(), self.target.linear_map()
        if one is None or other is None:
            return None
        return LinearMap(one.weight + other.weight, one.bias + other.bias)
