"""The layers of every family, written out by hand from the model's own tensors, with the updates of slots in them.

Independent of `fusion` and of the modules of transformers, except for the embeddings and the tables of positions,
which slots do not touch. Where transformers rounds to float32 inside a float64 model (RMS norms, some softmaxes), so
does this: the inputs agree to the last bits, and so do the roundings.

Shapes: B rows, T queries, S keys, H heads, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.backbones.load import Backbone
from fusion.layers.bottleneck import BottleneckAdapter
from tests.backbones.tiny_models import DECODER_IDS, IDS, MASK

Site = Callable[[str, Tensor], Tensor]
"""Called with a site of the layer and what is read there, gives the update."""

PADDING = MASK.bool()[:, None, None, :]  # (B, 1, 1, S)


class Layers:
    """The layers of a backbone.

    Args:
        adapters: by slot address.
        reads: what those at sublayers read.
    """

    def __init__(self, backbone: Backbone, adapters: Mapping[str, BottleneckAdapter], reads: str) -> None:
        self.model: Any = backbone.model
        self.config = self.model.config
        self.adapters, self.reads = adapters, reads
        self.tensors = dict(self.model.named_parameters(remove_duplicate=False))
        self.place = ""  # of the layer in slot addresses, with a dot: `decoder.2.`
        self.path = ""  # of the layer in the model, with a dot

    # --- parts ---

    def update(self, site: str, x: Tensor) -> Tensor | float:
        adapter = self.adapters.get(self.place + site)
        if adapter is None:
            return 0.0
        z = x @ adapter.down.weight.T + adapter.down.bias
        return (z * torch.sigmoid(z)) @ adapter.up.weight.T + adapter.up.bias

    def dense(self, name: str, x: Tensor, site: str = "", rows_first: bool = False) -> Tensor:
        weight, bias = self.tensors[f"{self.path}{name}.weight"], self.tensors.get(f"{self.path}{name}.bias")
        y = x @ (weight if rows_first else weight.T) + (0.0 if bias is None else bias)
        return y + self.update(site, x) if site else y

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
        bias = self.tensors.get(f"{self.path}{name}.bias")
        return scaled * self.tensors[f"{self.path}{name}.weight"] + (0.0 if bias is None else bias)

    def rms(self, name: str, x: Tensor, eps: float, one: bool = False) -> Tensor:
        """LlamaRMSNorm; with `one` Gemma's, whose weight is an offset from 1 and which is float32 throughout."""
        single, weight = x.float(), self.tensors[f"{self.path}{name}.weight"]
        scaled = single * torch.rsqrt(single.pow(2).mean(-1, keepdim=True) + eps)
        return (scaled * (1.0 + weight.float())).type_as(x) if one else weight * scaled.to(x.dtype)

    def t5_norm(self, name: str, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        scaled = x * torch.rsqrt(variance + self.config.layer_norm_epsilon)
        return self.tensors[f"{self.path}{name}.weight"] * scaled

    def read(self, h: Tensor, r: Tensor, normed: Tensor, reads_input: Tensor) -> Tensor:
        """What the slot of a sublayer reads."""
        return {"output": h, "normed": normed, "stream": h + r, "input": reads_input}[self.reads]

    def post_norm(self, site: str, h: Tensor, r: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        return norm(h + self.update(site, self.read(h, r, norm(h + r), r)) + r)

    def updated(self, site: str, h: Tensor, r: Tensor, n: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """h + u, of a sublayer that reads n = LN(r)."""
        return h + self.update(site, self.read(h, r, norm(h + r), n))

    def before(self, i: Tensor) -> Tensor:
        return i + self.update("before_attention", i)

    # --- layers ---

    def bert(self, x: Tensor, mask: Tensor, paths: Mapping[str, str], bias: Tensor | None = None) -> Tensor:
        """All post-norm encoders. paths: of the projections and norms in a layer, see `POST_NORM`."""
        heads = self.config.num_attention_heads
        eps = getattr(self.config, "layer_norm_eps", 1e-12)
        read = self.before(x)
        q, k, v = (self.dense(paths[n], read, f"attention.{n}") for n in ("query", "key", "value"))
        if self.config.model_type == "deberta-v2":
            attended = self.disentangled(q, k, v, mask, paths)
        else:
            attended = attend(q, k, v, heads, mask, bias=bias)
        h = self.dense(paths["output"], attended, "attention.output")
        middle = self.post_norm("attention", h, x, lambda s: self.norm(paths["norm"], s, eps))
        gelu = {"gelu": "none", "gelu_new": "tanh"}[getattr(self.config, "hidden_act", "gelu")]
        up = F.gelu(self.dense(paths["up"], middle, "feedforward.up"), approximate=gelu)
        h = self.dense(paths["down"], up, "feedforward.down")
        return self.post_norm("feedforward", h, middle, lambda s: self.norm(paths["last"], s, eps))

    def disentangled(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, paths: Mapping[str, str]) -> Tensor:
        """DeBERTa's attention (He et al. 2021, eq. 2): content to content, content to position, position to content."""
        config, heads = self.config, self.config.num_attention_heads
        table, span = self.model.encoder.rel_embeddings.weight, config.position_buckets
        here, self.path = self.path, "encoder."
        positions = self.norm("LayerNorm", table, config.layer_norm_eps)[: 2 * span]
        self.path = here
        pq = split(self.dense(paths["query"], positions[None], "attention.query"), heads)
        pk = split(self.dense(paths["key"], positions[None], "attention.key"), heads)
        qs, ks = split(q, heads), split(k, heads)
        width = q.shape[-1] // heads
        scale = float(torch.tensor(3.0 * width).sqrt())  # in float32, as there
        scores = qs @ ks.transpose(-1, -2)
        length = q.shape[1]
        for row in range(length):
            for column in range(length):
                bucket = span + log_bucket(row - column, span, config.max_position_embeddings)
                bucket = min(max(bucket, 0), 2 * span - 1)
                extra = (qs[:, :, row] * pk[:, :, bucket]).sum(-1) + (ks[:, :, column] * pq[:, :, bucket]).sum(-1)
                one = torch.zeros(length, length, dtype=q.dtype)
                one[row, column] = 1.0
                scores = scores + extra[:, :, None, None] * one
        scores = (scores / scale).masked_fill(~mask, torch.finfo(q.dtype).min)
        weights = scores.softmax(-1)
        return joined(weights @ split(v, heads))

    def modernbert(self, x: Tensor, mask: Tensor, tables: Any) -> Tensor:
        config, eps = self.config, self.config.norm_eps
        first = f"{self.path}attn_norm.weight" not in self.tensors
        norm = (lambda y: y) if first else partial(self.norm, "attn_norm", eps=eps)
        n = norm(x)
        q, k, v = self.dense("attn.Wqkv", self.before(n), "attention.query_key_value").chunk(3, dim=-1)
        attended = attend(q, k, v, config.num_attention_heads, mask, tables=tables, single=True)
        h = self.dense("attn.Wo", attended, "attention.output")
        x = x + self.updated("attention", h, x, n, norm)
        norm = partial(self.norm, "mlp_norm", eps=eps)
        n = norm(x)
        up, gate = self.dense("mlp.Wi", n, "feedforward.up_gate").chunk(2, dim=-1)
        h = self.dense("mlp.Wo", F.gelu(up) * gate, "feedforward.down")
        return x + self.updated("feedforward", h, x, n, norm)

    def gpt2(self, x: Tensor, mask: Tensor) -> Tensor:
        eps = self.config.layer_norm_epsilon
        norm = partial(self.norm, "ln_1", eps=eps)
        n = norm(x)
        qkv = self.dense("attn.c_attn", self.before(n), "attention.query_key_value", rows_first=True)
        q, k, v = qkv.chunk(3, dim=-1)
        attended = attend(q, k, v, self.config.num_attention_heads, mask)
        h = self.dense("attn.c_proj", attended, "attention.output", rows_first=True)
        x = x + self.updated("attention", h, x, n, norm)
        norm = partial(self.norm, "ln_2", eps=eps)
        n = norm(x)
        up = F.gelu(self.dense("mlp.c_fc", n, "feedforward.up", rows_first=True), approximate="tanh")
        h = self.dense("mlp.c_proj", up, "feedforward.down", rows_first=True)
        return x + self.updated("feedforward", h, x, n, norm)

    def llama(self, x: Tensor, mask: Tensor, tables: Any) -> Tensor:
        """Llama, Mistral, Qwen 2 and 3, Phi 3, Gemma; with sandwich norms Gemma 2 and 3."""
        config = self.config
        gemma = config.model_type.startswith("gemma")
        sandwich = f"{self.path}pre_feedforward_layernorm.weight" in self.tensors

        def rms(name: str, y: Tensor) -> Tensor:
            return self.rms(name, y, config.rms_norm_eps, gemma)

        n = rms("input_layernorm", x)
        read = self.before(n)
        fused = config.model_type == "phi3"
        if fused:
            qkv = self.dense("self_attn.qkv_proj", read, "attention.query_key_value")
            q, k, v = qkv.split([n.shape[-1], *[config.num_key_value_heads * config.head_dim] * 2], dim=-1)
        else:
            q, k, v = (
                self.dense(f"self_attn.{name}_proj", read, f"attention.{site}")
                for name, site in (("q", "query"), ("k", "key"), ("v", "value"))
            )
        if f"{self.path}self_attn.q_norm.weight" in self.tensors:
            q, k = (
                rms(f"self_attn.{name}_norm", y.unflatten(-1, (-1, config.head_dim))).flatten(-2)
                for name, y in (("q", q), ("k", k))
            )
        attended = attend(
            q,
            k,
            v,
            config.num_attention_heads,
            mask,
            tables=tables,
            kv_heads=config.num_key_value_heads,
            scale=config.query_pre_attn_scalar**-0.5 if sandwich else None,
            softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        )
        h = self.updated(
            "attention",
            self.dense("self_attn.o_proj", attended, "attention.output"),
            x,
            n,
            partial(rms, "input_layernorm"),
        )
        x = x + (rms("post_attention_layernorm", h) if sandwich else h)
        norm = partial(rms, "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm")
        n = norm(x)
        if fused:
            gate, up = self.dense("mlp.gate_up_proj", n, "feedforward.up_gate").chunk(2, dim=-1)
        else:
            gate, up = (
                self.dense("mlp.gate_proj", n, "feedforward.gate"),
                self.dense("mlp.up_proj", n, "feedforward.up"),
            )
        up = (F.gelu(gate, approximate="tanh") if gemma else F.silu(gate)) * up
        h = self.updated("feedforward", self.dense("mlp.down_proj", up, "feedforward.down"), x, n, norm)
        return x + (rms("post_feedforward_layernorm", h) if sandwich else h)

    def phi(self, x: Tensor, mask: Tensor, tables: Any) -> Tensor:
        norm = partial(self.norm, "input_layernorm", eps=self.config.layer_norm_eps)
        n = norm(x)
        read = self.before(n)
        q, k, v = (
            self.dense(f"self_attn.{name}_proj", read, f"attention.{site}")
            for name, site in (("q", "query"), ("k", "key"), ("v", "value"))
        )
        attended = attend(q, k, v, self.config.num_attention_heads, mask, tables=tables)
        h = self.updated("attention", self.dense("self_attn.dense", attended, "attention.output"), x, n, norm)
        up = F.gelu(self.dense("mlp.fc1", n, "feedforward.up"), approximate="tanh")
        beside = self.updated("feedforward", self.dense("mlp.fc2", up, "feedforward.down"), x, n, norm)
        return x + h + beside

    def gptj(self, x: Tensor, mask: Tensor) -> Tensor:
        config = self.config
        norm = partial(self.norm, "ln_1", eps=config.layer_norm_epsilon)
        n = norm(x)
        read = self.before(n)
        q, k, v = (
            self.dense(f"attn.{name}_proj", read, f"attention.{site}")
            for name, site in (("q", "query"), ("k", "key"), ("v", "value"))
        )
        width = x.shape[-1] // config.n_head
        q, k = (
            rotated_in_pairs(y.unflatten(-1, (config.n_head, width)), config.rotary_dim).flatten(-2) for y in (q, k)
        )
        attended = attend(q, k, v, config.n_head, mask, rounded_scores=True)
        h = self.updated("attention", self.dense("attn.out_proj", attended, "attention.output"), x, n, norm)
        up = F.gelu(self.dense("mlp.fc_in", n, "feedforward.up"), approximate="tanh")
        beside = self.updated("feedforward", self.dense("mlp.fc_out", up, "feedforward.down"), x, n, norm)
        return x + h + beside

    def bart(self, x: Tensor, mask: Tensor, encoded: Tensor | None = None) -> Tensor:
        """BART, and with norms before the sublayers mBART."""
        heads, pre_norm = self.config.encoder_attention_heads, self.config.model_type == "mbart"

        def attention(module: str, site: str, r: Tensor, states: Tensor, where: Tensor) -> Tensor:
            name = {"attention": "self_attn_layer_norm", "cross_attention": "encoder_attn_layer_norm"}[site]
            norm = partial(self.norm, name, eps=1e-5)
            i = norm(r) if pre_norm else r
            read, other = (self.before(i), self.before(i)) if states is r else (i, states)
            q = self.dense(f"{module}.q_proj", read, f"{site}.query")
            k = self.dense(f"{module}.k_proj", other, f"{site}.key")
            v = self.dense(f"{module}.v_proj", other, f"{site}.value")
            h = self.dense(f"{module}.out_proj", attend(q, k, v, heads, where), f"{site}.output")
            if pre_norm:
                return r + self.updated(site, h, r, i, norm)
            return self.post_norm(site, h, r, norm)

        x = attention("self_attn", "attention", x, x, mask)
        if encoded is not None:
            x = attention("encoder_attn", "cross_attention", x, encoded, PADDING)
        norm = partial(self.norm, "final_layer_norm", eps=1e-5)
        n = norm(x) if pre_norm else x
        h = self.dense("fc2", F.gelu(self.dense("fc1", n, "feedforward.up")), "feedforward.down")
        if pre_norm:
            return x + self.updated("feedforward", h, x, n, norm)
        return self.post_norm("feedforward", h, x, norm)

    def t5(self, x: Tensor, mask: Tensor, bias: Tensor, encoded: Tensor | None = None) -> Tensor:
        heads = self.config.num_heads

        def attention(number: int, module: str, site: str, r: Tensor, states: Tensor | None, where: Tensor) -> Tensor:
            norm = partial(self.t5_norm, f"layer.{number}.layer_norm")
            n = norm(r)
            read = self.before(n) if states is None else n
            other = read if states is None else states
            path = f"layer.{number}.{module}"
            q = self.dense(f"{path}.q", read, f"{site}.query")
            k = self.dense(f"{path}.k", other, f"{site}.key")
            v = self.dense(f"{path}.v", other, f"{site}.value")
            attended = attend(q, k, v, heads, where, scale=1.0, bias=bias if states is None else None)
            return r + self.updated(site, self.dense(f"{path}.o", attended, f"{site}.output"), r, n, norm)

        x = attention(0, "SelfAttention", "attention", x, None, mask)
        if encoded is not None:
            x = attention(1, "EncDecAttention", "cross_attention", x, encoded, PADDING)
        last = f"layer.{1 if encoded is None else 2}"
        norm = partial(self.t5_norm, f"{last}.layer_norm")
        n = norm(x)
        inner = f"{last}.DenseReluDense"
        if self.config.is_gated_act:
            gate = F.gelu(self.dense(f"{inner}.wi_0", n, "feedforward.wi_0"), approximate="tanh")
            up = gate * self.dense(f"{inner}.wi_1", n, "feedforward.wi_1")
        else:
            up = F.relu(self.dense(f"{inner}.wi", n, "feedforward.wi"))
        return x + self.updated("feedforward", self.dense(f"{inner}.wo", up, "feedforward.wo"), x, n, norm)


# --- attention --------------------------------------------------------------------------------------


def split(x: Tensor, heads: int) -> Tensor:
    """(B, T, H·d) -> (B, H, T, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def rotated(x: Tensor, tables: tuple[Tensor, Tensor], single: bool) -> Tensor:
    """Rotary positions on the first dimensions of each head (Su et al. 2021), the two halves of them as pairs."""
    cos, sin = (table.unsqueeze(1) for table in tables)
    width = cos.shape[-1]
    # Two roundings of the same, as in transformers: their gradients are rounded apart.
    once, twice = (x.float(), x.float()) if single else (x, x)
    first, second = twice[..., :width].chunk(2, dim=-1)
    turned = once[..., :width] * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(x.dtype), x[..., width:]], dim=-1)


def rotated_in_pairs(x: Tensor, width: int) -> Tensor:
    """Rotary positions on the first `width` dimensions of each head (B, T, H, d), neighbours as pairs, in float32."""
    steps = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.int64) / width)
    angles = (torch.arange(x.shape[1], dtype=torch.int64).float()[:, None] * steps.float())[None, :, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, two = x[..., :width:2], x[..., 1:width:2]
    turned = torch.stack([one * cos - two * sin, two * cos + one * sin], dim=-1).flatten(-2)
    return torch.cat([turned, x[..., width:]], dim=-1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor,
    *,
    kv_heads: int | None = None,
    tables: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    single: bool = False,
    rounded_scores: bool = False,
) -> Tensor:
    """q: (B, T, D), k and v: (B, S, D or less), mask: (B, 1, T or 1, S) bool -> (B, T, D)."""
    q, k, v = split(q, heads), split(k, kv_heads or heads), split(v, kv_heads or heads)
    if tables is not None:
        q, k = rotated(q, tables, single), rotated(k, tables, single)
    if kv_heads is not None:
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    if rounded_scores:  # GPT-J's, to which a mask of the model's type is added
        scores = (q.float() @ k.float().transpose(-1, -2) / math.sqrt(q.shape[-1])).to(q.dtype)
    else:
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    # Gemma 2 alone takes the path of transformers that rounds.
    weights = scores.softmax(-1) if softcap is None else scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return joined(weights @ v)


def log_bucket(distance: int, buckets: int, most: int) -> int:
    """DeBERTa's bucket of a distance: exact up to half of them, then logarithmic."""
    middle = buckets // 2
    if abs(distance) <= middle:
        return distance
    steps = torch.tensor(abs(distance) / middle).log() / torch.tensor((most - 1) / middle).log() * (middle - 1)
    return int(math.copysign(math.ceil(float(steps)) + middle, distance))


def relative_bias(table: Tensor, queries: int, buckets: int, most: int, both_ways: bool = True) -> Tensor:
    """T5's and MPNet's bias (1, H, T, T) from the table (buckets, H) of distances (Raffel et al. 2020, §2.1)."""
    rows = []
    for query in range(queries):
        for key in range(queries):
            distance, half = key - query, buckets // 2 if both_ways else buckets
            bucket = half if both_ways and distance > 0 else 0
            distance = abs(distance) if both_ways else max(-distance, 0)
            exact = half // 2
            if distance < exact:
                bucket += distance
            else:
                part = math.log(distance / exact) / math.log(most / exact) * (half - exact)
                bucket += min(exact + int(part), half - 1)
            rows.append(table[bucket])
    return torch.stack(rows).unflatten(0, (queries, queries)).permute(2, 0, 1).unsqueeze(0)


# --- whole models -----------------------------------------------------------------------------------

_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "last": "output.LayerNorm",
}
POST_NORM = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "deberta-v2": _BERT | {name: f"attention.self.{name}_proj" for name in ("query", "key", "value")},
    "mpnet": _BERT
    | {"query": "attention.attn.q", "key": "attention.attn.k", "value": "attention.attn.v"}
    | {"output": "attention.attn.o", "norm": "attention.LayerNorm"},
    "distilbert": {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "output": "attention.out_lin",
        "norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "last": "output_layer_norm",
    },
    "albert": {
        "query": "albert_layers.0.attention.query",
        "key": "albert_layers.0.attention.key",
        "value": "albert_layers.0.attention.value",
        "output": "albert_layers.0.attention.dense",
        "norm": "albert_layers.0.attention.LayerNorm",
        "up": "albert_layers.0.ffn",
        "down": "albert_layers.0.ffn_output",
        "last": "albert_layers.0.full_layer_layer_norm",
    },
}


def last_states(backbone: Backbone, adapters: Mapping[str, BottleneckAdapter], reads: str) -> Tensor:
    """What `run` of a model with these adapters must give: (B, T, D)."""
    layers, family = Layers(backbone, adapters, reads), backbone.family.name
    if family in POST_NORM:
        return _encoder(layers, family, backbone.family.first_stack.layers)
    if family in ("bart", "mbart", "t5", "mt5"):
        return _encoder_decoder(layers, family)
    return _single_stack(layers, family)


def _causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def _encoder(layers: Layers, family: str, path: str) -> Tensor:
    model: Any = layers.model
    x = model.embeddings(input_ids=IDS, **({"mask": MASK} if family == "deberta-v2" else {}))
    if hasattr(model, "embeddings_project"):
        x = model.embeddings_project(x)
    if family == "albert":
        x = model.encoder.embedding_hidden_mapping_in(x)
    mask, bias, first = PADDING, None, x
    if family == "mpnet":
        bias = relative_bias(model.encoder.relative_attention_bias.weight, IDS.shape[1], 32, 128)
    if family == "deberta-v2":
        mask = PADDING & PADDING.transpose(-1, -2)
    for number in range(len(model.get_submodule(path))):
        layers.place, layers.path = f"{number}.", f"{path}.{number}."
        x = layers.bert(x, mask, POST_NORM[family], bias)
        if family == "deberta-v2" and number == 0:
            conv, layers.path = model.encoder.conv.conv, "encoder.conv."
            beside = F.conv1d(first.transpose(1, 2), conv.weight, conv.bias, padding=1).transpose(1, 2)
            beside = F.gelu(beside * MASK[..., None])
            x = layers.norm("LayerNorm", x + beside, layers.config.layer_norm_eps) * MASK[..., None]
    return x


def _single_stack(layers: Layers, family: str) -> Tensor:
    model: Any = layers.model
    config, positions = layers.config, torch.arange(IDS.shape[1])[None]
    mask = PADDING if family == "modernbert" else PADDING & _causal(IDS.shape[1])
    if family == "modernbert":
        x = model.embeddings(input_ids=IDS)
    elif family == "gpt2":
        x = model.wte.weight[IDS] + model.wpe.weight[positions]
    elif family == "gptj":
        x = model.wte.weight[IDS]
    else:
        x = model.embed_tokens(IDS)
    path = {"gpt2": "h", "gptj": "h"}.get(family, "layers")
    for number in range(len(model.get_submodule(path))):
        layers.place, layers.path = f"{number}.", f"{path}.{number}."
        if family in ("gpt2", "gptj"):
            x = getattr(layers, family)(x, mask)
            continue
        of_type = (config.layer_types[number],) if family in ("modernbert", "gemma3_text") else ()
        tables = model.rotary_emb(x, positions, *of_type)
        x = getattr(layers, {"modernbert": "modernbert", "phi": "phi"}.get(family, "llama"))(x, mask, tables)
    layers.path = ""
    if family in ("modernbert", "gpt2", "gptj", "phi"):
        name = {"modernbert": "final_norm", "phi": "final_layernorm"}.get(family, "ln_f")
        eps = {"modernbert": "norm_eps", "phi": "layer_norm_eps"}.get(family, "layer_norm_epsilon")
        return layers.norm(name, x, getattr(config, eps))
    return layers.rms("norm", x, config.rms_norm_eps, family.startswith("gemma"))


def _encoder_decoder(layers: Layers, family: str) -> Tensor:
    model: Any = layers.model
    states: dict[str, Tensor] = {}
    for stack, ids, mask in (("encoder", IDS, PADDING), ("decoder", DECODER_IDS, _causal(DECODER_IDS.shape[1]))):
        module: nn.Module = model.get_submodule(stack)
        x = module.embed_tokens(ids)  # type: ignore[operator]
        encoded = (states["encoder"],) if stack == "decoder" else ()
        if family in ("bart", "mbart"):
            positions = module.embed_positions.weight[2 : 2 + ids.shape[1]]  # type: ignore[index, union-attr]
            x = module.layernorm_embedding(x + positions)  # type: ignore[operator]
            for number in range(len(module.layers)):  # type: ignore[arg-type]
                layers.place, layers.path = f"{stack}.{number}.", f"{stack}.layers.{number}."
                x = layers.bart(x, mask, *encoded)
            layers.path = f"{stack}."
            if family == "mbart":
                x = layers.norm("layer_norm", x, 1e-5)
        else:
            table = layers.tensors[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            bias = relative_bias(table, ids.shape[1], 32, 128, both_ways=stack == "encoder")
            for number in range(len(module.block)):  # type: ignore[arg-type]
                layers.place, layers.path = f"{stack}.{number}.", f"{stack}.block.{number}."
                x = layers.t5(x, mask, bias, *encoded)
            layers.path = f"{stack}."
            x = layers.t5_norm("final_layer_norm", x)
        states[stack] = x
    return states["decoder"]
