"""Backbones in half-precision types: close to float32, with trained parameters and their gradients in float32."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from fusion.backbones import precision
from fusion.backbones.attention import NAME, FusedForward
from fusion.backbones.float32_products import multiply_in_float32
from fusion.backbones.load import cast_weights, compute_buffers, load_backbone, log_dtype, use_half_precision
from fusion.backbones.precision import automatic_dtype, hardware_dtype
from fusion.backbones.slots import LinearLayer
from fusion.layers.attention import AdapterFusion
from fusion.layers.bank import AdapterBank
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from tests.backbones.tiny_models import HIDDEN, IDS, MASK, SETTINGS
from tests.backbones.tiny_models import tiny_backbone as tiny_model
from tests.tiny_backbone import save_backbone


@pytest.mark.parametrize("in_float32", [False, True])
@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
def test_the_backward_pass_equals_that_of_the_plain_formula(mask: str, in_float32: bool) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    scores = (query @ key.transpose(-1, -2)) * 0.3
    given: Tensor | None = None
    if mask == "bool":
        given = torch.rand(2, 1, 7, 7) > 0.3
        given[..., 0] = True
        scores = scores.masked_fill(~given, float("-inf"))
    elif mask == "additive":
        given = torch.randn(2, 1, 7, 7, dtype=torch.float64)
        scores = scores + given
    plain = scores.softmax(-1) @ value
    output = FusedForward.apply(query, key, value, given, 0.3, in_float32)
    torch.testing.assert_close(output, plain, rtol=0, atol=1e-12)
    direction, inputs = torch.randn_like(plain), (query, key, value)
    expected = torch.autograd.grad((plain * direction).sum(), inputs)
    for one, two in zip(torch.autograd.grad((output * direction).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5 if in_float32 else 1e-12)


def adapter() -> BottleneckAdapter:
    made = BottleneckAdapter(HIDDEN, 4, "gelu")
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def model_of(name: str, dtype: torch.dtype, fused: bool) -> AdaptedModel:
    backbone = tiny_model(name)
    backbone.model.float()
    list(cast_weights(backbone.model, dtype))
    if dtype != torch.float32:
        use_half_precision(backbone.model, str(dtype).removeprefix("torch."))
    stack = list(backbone.family.stacks)[-1]
    described = backbone.family.stacks[stack]
    site = next(
        site for site, slot in described.sites.items() if site == "feedforward" and not isinstance(slot, LinearLayer)
    )
    torch.manual_seed(1)
    modules = {}
    for layer in (0, 2):
        address = f"{stack}.{layer}.{site}" if stack else f"{layer}.{site}"
        modules[address] = (
            AdapterFusion(AdapterBank([adapter() for _ in range(3)], range(3), 3)) if fused else adapter()
        )
    return AdaptedModel(backbone, modules, "output", TaskHead(HIDDEN, 3, "mean"))


def hardware(monkeypatch: pytest.MonkeyPatch, folder: Path, flags: str) -> None:
    """Make the CPU one with these instruction sets and no GPU."""
    (folder / flags).write_text(f"flags : fpu {flags} ht")
    monkeypatch.setattr(precision, "CPU_FLAGS", folder / flags)
    monkeypatch.setattr(precision, "gpu", lambda: False)


@pytest.mark.parametrize("flags", ["amx_bf16", "avx2"])
@pytest.mark.parametrize("fused", [False, True], ids=["adapter", "fusion"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if "t5" not in name])  # which needs tokens of its decoder
def test_bfloat16_is_close_to_float32(
    name: str, fused: bool, flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware(monkeypatch, tmp_path, flags)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of(name, dtype, fused).train()
        assert model.dtype == dtype
        logits = model(IDS, MASK)
        nn.functional.cross_entropy(logits, torch.tensor([0, 2, 1])).backward()
        trainable = model.trainable()
        assert {parameter.dtype for parameter in trainable.values()} == {torch.float32} == {logits.dtype}
        gradients = torch.cat([p.grad.flatten() for p in trainable.values() if p.grad is not None])
        with torch.no_grad():
            merged = model.eval().merged()(IDS, MASK)
        found[dtype] = logits.detach(), gradients, merged
    for exact, half in zip(*found.values(), strict=True):
        assert (exact - half).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("flags", ["amx_bf16", "avx2"])
def test_frozen_tensors_are_cast_and_rotary_frequencies_are_not(
    flags: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware(monkeypatch, tmp_path, flags)
    model = model_of("llama", torch.bfloat16, fused=True)
    slots = dict(model.slots.named_buffers())
    products = torch.bfloat16 if flags == "amx_bf16" else torch.float32
    assert {t.dtype for name, t in slots.items() if t.is_floating_point()} == {products}
    assert {p.dtype for p in model.backbone.parameters()} == {torch.bfloat16}
    frequencies = {t.dtype for name, t in model.backbone.named_buffers() if "inv_freq" in name}
    assert frequencies == {torch.float32}


def test_products_in_float32_are_those_of_bfloat16_up_to_the_order_of_sums() -> None:
    torch.manual_seed(0)
    linear, conv = nn.Linear(300, 70), Conv1D(70, 300)
    conv.weight.data = linear.weight.data.T.contiguous()
    conv.bias.data = linear.bias.data
    model = nn.Sequential(linear, conv).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(4, 9, 300).bfloat16().requires_grad_()
    direction = torch.randn(4, 9, 70).bfloat16()
    exact = x.detach().double().requires_grad_()
    expected = nn.functional.linear(exact, linear.weight.double(), linear.bias.double())
    expected.backward(direction.double())
    multiply_in_float32(model)
    for layer in model:
        x.grad = None
        output = layer(x)
        output.backward(direction)
        # One rounding, half a unit in the last of the 8 significant bits.
        for found, wanted in ((output, expected), (x.grad, exact.grad)):
            assert found is not None and wanted is not None and found.dtype == torch.bfloat16
            torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-5)
        assert layer(x[0, 0]).shape == (70,)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(("flags", "name"), [("amx_bf16", NAME), ("avx2", f"{NAME}_in_float32")])
def test_only_sdpa_is_replaced(flags: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware(monkeypatch, tmp_path, flags)
    bert = model_of("bert", torch.bfloat16, fused=False).backbone
    assert bert.config._attn_implementation == name  # type: ignore[union-attr]
    assert model_of("bert", torch.float32, fused=False).backbone.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


@pytest.mark.parametrize(("flags", "level"), [("amx_bf16", "INFO"), ("avx512_bf16", "INFO"), ("avx2", "WARNING")])
def test_the_dtype_is_logged_with_a_warning_where_it_is_slow(
    flags: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hardware(monkeypatch, tmp_path, flags)
    caplog.set_level("INFO", logger="fusion")
    log_dtype("bfloat16")
    ((name, line),) = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert name == level and line.startswith("the weights of the backbone are in bfloat16")
    assert ("products are computed in float32" in line) == (level == "WARNING")


@pytest.mark.parametrize(
    ("precision_", "required", "expected"),
    [(None, None, "float32"), ("bf16-mixed", None, "bfloat16"), ("bf16-mixed", "float32", "float32")],
)
def test_the_automatic_dtype(
    precision_: str | None, required: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "hardware_dtype", lambda accelerator: "float32")
    assert automatic_dtype("auto", precision_, required) == expected


@pytest.mark.parametrize(
    ("accelerator", "flags", "expected"),
    [
        ("cpu", "flags : fpu amx_bf16 avx512_bf16 amx_tile", "bfloat16"),
        ("auto", "flags : fpu avx2 avx512_bf16", "float32"),
        ("tpu", "flags : fpu amx_bf16 amx_tile", "float32"),
        ("cpu", None, "float32"),
    ],
)
def test_the_hardware_decides(
    accelerator: str, flags: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(flags)
    monkeypatch.setattr(precision, "CPU_FLAGS", file)
    monkeypatch.setattr(precision, "gpu", lambda: False)
    assert hardware_dtype(accelerator) == expected


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_the_fingerprint_is_that_of_the_float32_values(tmp_path: Path, stored: torch.dtype) -> None:
    folder = save_backbone(tmp_path / "a backbone")
    if stored != torch.float32:
        AutoModel.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    exact = load_backbone(str(folder))
    for dtype in ("bfloat16", "float16"):
        loaded = load_backbone(str(folder), dtype=dtype)
        assert loaded.fingerprint == exact.fingerprint
        assert {p.requires_grad for p in loaded.model.parameters()} == {False}
        for name, parameter in loaded.model.named_parameters():
            assert parameter.dtype == getattr(torch, dtype)
            assert torch.equal(parameter, exact.model.get_parameter(name).to(parameter.dtype)), name


@pytest.mark.parametrize("name", ["bert", "llama", "gemma3_text"])
def test_buffers_are_those_of_a_model_loaded_in_float32(tmp_path: Path, name: str) -> None:
    config = tiny_model(name).model.config
    AutoModel.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    exact, half = (AutoModel.from_pretrained(tmp_path, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    before = {key: value.clone() for key, value in half.state_dict().items()}
    compute_buffers(half)
    assert dict(half.named_buffers()).keys() == dict(exact.named_buffers()).keys()
    for key, buffer in exact.named_buffers():
        assert torch.equal(half.get_buffer(key), buffer) and half.get_buffer(key).dtype == buffer.dtype, key
    assert all(torch.equal(value, before[key]) for key, value in half.state_dict().items())


MEASURE = """
import re, sys, threading
from fusion.backbones.load import load_backbone

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

load_backbone(sys.argv[1])  # imports
before, peak, loaded = resident(), 0, threading.Event()

def watch():
    global peak
    while not loaded.wait(0.001):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
backbone = load_backbone(sys.argv[2], dtype=sys.argv[3])
loaded.set()
watcher.join()
print((peak - before) / sum(p.nbytes for p in backbone.model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_memory_of_the_weights(
    tmp_path: Path, tiny_backbone: Path, stored: torch.dtype, dtype: str
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 768, "num_hidden_layers": 8, "intermediate_size": 3072, "vocab_size": 30522}
    folder = save_backbone(tmp_path / "large", num_attention_heads=12, **sizes)
    if stored != torch.float32:
        AutoModel.from_pretrained(folder, dtype=stored).save_pretrained(folder)
    words = [sys.executable, "-c", MEASURE, str(tiny_backbone), str(folder), dtype]
    ratio = float(subprocess.run(words, capture_output=True, check=True, text=True).stdout)
    assert 0.5 < ratio < 1.2
