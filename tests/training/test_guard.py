"""Each way of changing more than the declared parameters is detected and named, and no artifact is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as lightning
import torch
from torch import Tensor, nn

from fusion.backbones.load import load_backbone
from fusion.config.methods import MethodConfig
from fusion.config.model import BackboneConfig
from fusion.errors import GuardError, UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import BatchContext
from fusion.model.adapted import AdaptedModel, hash_of_hashes
from fusion.training import fit as fit_module
from fusion.training.guard import _CHUNK, Guard, _checksums
from fusion.training.module import TaskModule
from tests.backbones.test_compiling import compiling_is_refused
from tests.bench import Bench, add_callback, same, trainer_config
from tests.tiny_backbone import save_backbone

ROOT = Path(__file__).resolve().parents[2]
WORDS = "backbone.embeddings.word_embeddings.weight"
NORM = "backbone.embeddings.LayerNorm.bias"
TYPES = "backbone.embeddings.token_type_ids"  # a buffer that no state_dict holds
BANK = "slots.1.feedforward.bank.up_bias"
Change = Callable[[AdaptedModel], None]


class CarelessAdapter(BottleneckAdapter):
    """Writes to a weight of the backbone in each training step."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(32, 4)
        self.other = (weight,)

    def forward(self, x: Tensor, batch: BatchContext) -> Tensor:
        if self.training:
            self.other[0].data[0, 0].add_(1e-3)
        return super().forward(x, batch)


class AtStep(lightning.Callback):
    """Changes the model at a batch of an epoch."""

    def __init__(self, change: Change, epoch: int = 1, batch: int = 3) -> None:
        self.change = change
        self.when = epoch, batch

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.when:
            self.change(pl_module.model)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """`built(change)` changes every model that is built from then on."""

    def use(change: Change) -> None:
        build = AdaptedModel.__init__

        def careless(self: AdaptedModel, *values: Any, **named: Any) -> None:
            build(self, *values, **named)
            change(self)

        monkeypatch.setattr(AdaptedModel, "__init__", careless)

    return use


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> Callable[[lightning.Callback], None]:
    """`callback(c)` appends a callback to those of every training."""

    return lambda more: add_callback(monkeypatch, more)


def refused(bench: Bench, message: str, task: str = "films", **changes: Any) -> None:
    with pytest.raises(GuardError, match=message):
        bench.stage1(task, **changes)
    assert not (bench.folder / "store" / task).exists()


def write(name: str, in_place: bool = True) -> Change:
    def change(model: AdaptedModel) -> None:
        tensor = model.every_tensor()[name]
        with torch.no_grad():
            (tensor if in_place else tensor.data).view(-1)[0].add_(1)

    return change


def epochs_kept(bench: Bench) -> int:
    """How many epochs the last checkpoint has."""
    files = list((bench.folder / "store" / ".runs").glob("*/last.ckpt"))
    return int(torch.load(files[0], weights_only=True)["epoch"]) + 1 if files else 0


# --- what trains -----------------------------------------------------------------------------------


def unfreeze(model: AdaptedModel) -> None:
    model.every_tensor()[NORM].requires_grad_(True)


def freeze_the_head(model: AdaptedModel) -> None:
    model.trainable()["head.output.bias"].requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unfreeze, f"not declared trainable: {NORM}; declared trainable but frozen: nothing"),
        (freeze_the_head, r"not declared trainable: nothing; declared trainable but frozen: head\.output\.bias"),
    ],
)
def test_other_parameters_than_declared(
    bench: Bench, built: Callable[[Change], None], change: Change, message: str
) -> None:
    built(change)
    refused(bench, message)


@pytest.mark.parametrize("more", [True, False], ids=["one too many", "one too few"])
def test_an_optimizer_of_other_parameters(bench: Bench, monkeypatch: pytest.MonkeyPatch, more: bool) -> None:
    make = fit_module.TaskModule.configure_optimizers

    def careless(self: TaskModule) -> Any:
        made = make(self)
        group = made["optimizer"].param_groups[0]
        if more:
            group["params"].append(self.model.every_tensor()[NORM])
        else:
            group["params"].pop(0)
        return made

    monkeypatch.setattr(TaskModule, "configure_optimizers", careless)
    refused(bench, f"undeclared parameters: {NORM}" if more else r"missing parameters: (slots|head)\.")


def test_an_optimizer_with_a_tensor_outside_the_model(
    bench: Bench, callback: Callable[[lightning.Callback], None]
) -> None:
    class Adds(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 9:
                trainer.optimizers[0].param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))

    callback(Adds())
    refused(bench, r"has undeclared parameters: a tensor of shape \(3,\)")


# --- what shares memory ----------------------------------------------------------------------------


def small_model(folder: Path, change: Callable[[nn.Module, BottleneckAdapter, TaskHead], None]) -> AdaptedModel:
    torch.manual_seed(0)
    backbone, adapter, head = load_backbone(str(folder)), BottleneckAdapter(32, 4), TaskHead(32, 2)
    change(backbone.model, adapter, head)
    model = AdaptedModel(backbone, {"1.feedforward": adapter}, "normed", head)
    for parameter in (*adapter.parameters(), *head.parameters()):
        parameter.requires_grad_(True)
    return model


def tie_the_head(backbone: nn.Module, adapter: BottleneckAdapter, head: TaskHead) -> None:
    head.output.weight = backbone.get_parameter("embeddings.token_type_embeddings.weight")


def tie_the_slot_module(backbone: nn.Module, adapter: BottleneckAdapter, head: TaskHead) -> None:
    adapter.up.bias = backbone.get_parameter("embeddings.LayerNorm.bias")


def view_the_words(backbone: nn.Module, adapter: BottleneckAdapter, head: TaskHead) -> None:
    words = backbone.get_parameter("embeddings.word_embeddings.weight")
    adapter.down.weight = nn.Parameter(words.detach()[2:6])


def view_a_buffer(backbone: nn.Module, adapter: BottleneckAdapter, head: TaskHead) -> None:
    backbone.register_buffer("scale", torch.ones(2, 40), persistent=False)
    adapter.up.bias = nn.Parameter(cast(Tensor, backbone.scale)[1, 4:36])


def a_parameter_as_a_buffer(backbone: nn.Module, adapter: BottleneckAdapter, head: TaskHead) -> None:
    backbone.register_buffer("scale", head.output.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tie_the_head, r"head\.output\.weight is also the frozen backbone\.embeddings\.token_type_embedd"),
        (tie_the_slot_module, rf"slots\.1\.feedforward\.up\.bias is also the frozen {NORM}"),
        (view_the_words, rf"feedforward\.down\.weight shares memory with the frozen {WORDS}"),
        (view_a_buffer, r"feedforward\.up\.bias shares memory with the frozen backbone\.scale"),
        (a_parameter_as_a_buffer, r"head\.output\.weight is also the frozen backbone\.scale"),
    ],
)
def test_tied_weights(tiny_backbone: Path, change: Any, message: str) -> None:
    model = small_model(tiny_backbone, change)
    with pytest.raises(GuardError, match=message):
        prepared(model)


def prepared(model: AdaptedModel) -> Guard:
    guard = Guard(model)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    guard.setup(trainer, lightning.LightningModule(), "fit")
    return guard


def test_disjoint_views_of_one_storage_are_fine(tiny_backbone: Path) -> None:
    def side_by_side(backbone: nn.Module, adapter: BottleneckAdapter, head: TaskHead) -> None:
        both = torch.zeros(64)
        backbone.register_buffer("scale", both[:32])
        adapter.up.bias = nn.Parameter(both[32:])

    prepared(small_model(tiny_backbone, side_by_side))


def test_tied_weights_of_a_backbone_that_trains_as_a_whole_are_fine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion.model import adapted as model_module

    build = AdaptedModel.__init__

    def tied(self: AdaptedModel, backbone: Any, *values: Any, **named: Any) -> None:
        layers = backbone.model.encoder.layer
        layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
        twin = "encoder.layer.1.attention.self.query.weight"
        named_tuning = values[-1] if values and values[-1] is not None else named["tuning"]
        named_tuning.parameters.pop(twin)
        build(self, backbone, *values, **named)

    monkeypatch.setattr(model_module.AdaptedModel, "__init__", tied)
    bench.stage1("films", method=MethodConfig("full"), backbone=bench_backbone(bench, cache="off"))
    assert (bench.folder / "store" / "films-full" / "manifest.json").is_file()


def bench_backbone(bench: Bench, **settings: Any) -> BackboneConfig:
    return BackboneConfig(name_or_path=str(bench.backbone), pooling="mean", **settings)


# --- what changes ----------------------------------------------------------------------------------


def give_a_gradient(model: AdaptedModel) -> None:
    tensor = model.every_tensor()[NORM]
    tensor.grad = torch.zeros_like(tensor)


def replace_the_words(model: AdaptedModel) -> None:
    embeddings = model.backbone.get_submodule("embeddings.word_embeddings")
    embeddings.weight = nn.Parameter(cast(Tensor, embeddings.weight) * 2, requires_grad=False)


def add_a_buffer(model: AdaptedModel) -> None:
    model.backbone.register_buffer("seen", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (write(WORDS), f"frozen tensors changed during training, in epoch 2: {WORDS};"),
        (write(TYPES, in_place=False), f"frozen tensors changed during training, in epoch 2: {TYPES};"),
        (unfreeze, f"not declared trainable: {NORM}"),
        (give_a_gradient, f"frozen tensors received a gradient in epoch 2: {NORM};"),
        (replace_the_words, f"in epoch 2: {WORDS};"),
        (add_a_buffer, r"in epoch 2: backbone\.seen;"),
    ],
)
def test_a_change_during_training(
    bench: Bench, callback: Callable[[lightning.Callback], None], change: Change, message: str
) -> None:
    callback(AtStep(change))
    refused(bench, message)
    assert epochs_kept(bench) == 1
    refused(bench, message)  # resumed from the epoch before


def test_a_slot_that_writes_into_the_backbone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion.model import build

    def slot_modules(config: Any, backbone: Any) -> dict[str, BottleneckAdapter]:
        words = backbone.model.get_parameter("embeddings.word_embeddings.weight")
        return {"0.feedforward": CarelessAdapter(words)}

    monkeypatch.setattr(build, "new_adapters", slot_modules)
    refused(bench, f"in epoch 1: {WORDS};")
    assert epochs_kept(bench) == 0


def test_without_checkpoints(bench: Bench, callback: Callable[[lightning.Callback], None]) -> None:
    trainer = trainer_config(enable_checkpointing=False)
    callback(AtStep(write(WORDS, in_place=False), epoch=0))
    refused(bench, f"in epoch 1: {WORDS};", trainer=trainer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.int8])
def test_checksums_find_single_changes_and_swaps(dtype: torch.dtype) -> None:
    size = 2 * _CHUNK + 5
    tensor = (torch.arange(size) % 100).to(dtype)
    (whole,) = _checksums({"a": tensor}).values()
    assert _checksums({"a": tensor.clone()}) == {"a": whole}
    for place in (0, size // 2, size - 1):
        changed = tensor.clone()
        changed[place] += 1
        swapped = tensor.clone()
        swapped[[place, place - 1]] = swapped[[place - 1, place]]
        across = tensor.clone()
        across[[place, (place + size // 2 + 1) % size]] = across[[(place + size // 2 + 1) % size, place]]
        for other in (changed, swapped, across):
            assert _checksums({"a": other}) != {"a": whole}
    even = tensor[:-1].clone()
    shifted = torch.cat([even[:1], even])[1:]  # the same values at an address that is not aligned to 8 bytes
    assert _checksums({"a": shifted}) == _checksums({"a": even})


def swap(model: AdaptedModel) -> None:
    """Swap two rows, which keeps every sum."""
    pairs = model.every_tensor()[WORDS].data.view(-1, 2)
    pairs[[0, 1]] = pairs[[1, 0]]


def test_swapped_values_are_found(bench: Bench, callback: Callable[[lightning.Callback], None]) -> None:
    callback(AtStep(swap))
    refused(bench, f"in epoch 2: {WORDS};")


def test_a_change_found_only_at_the_end_removes_the_checkpoints(
    bench: Bench, callback: Callable[[lightning.Callback], None]
) -> None:
    """It is not known since when: no run may resume from there."""

    class AtEnd(lightning.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            swap(pl_module.model)

    callback(AtEnd())
    refused(bench, f"found at the end: {WORDS};")
    assert not list((bench.folder / "store" / ".runs").glob("*/*.ckpt"))


def test_a_norm_that_keeps_statistics(bench: Bench, built: Callable[[Change], None]) -> None:
    def change(model: AdaptedModel) -> None:
        norm = nn.BatchNorm1d(32, affine=False)
        embeddings = model.backbone.get_submodule("embeddings")
        embeddings.add_module("statistics", norm)
        embeddings.register_forward_hook(lambda _, __, output: norm(output.transpose(1, 2)).transpose(1, 2))

    built(change)
    dropout = bench_backbone(bench, dropout=True, cache="off")  # puts the backbone into training mode
    names = [f"backbone.embeddings.statistics.{n}" for n in ("num_batches_tracked", "running_mean", "running_var")]
    with pytest.raises(GuardError) as caught:
        bench.stage1("films", backbone=dropout)
    assert all(name in str(caught.value) for name in names) and "in epoch 1" in str(caught.value)


def test_an_optimizer_step_that_writes_to_a_frozen_tensor(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TaskModule.optimizer_step

    def decays(self: TaskModule, *values: Any, **named: Any) -> None:
        step(self, *values, **named)
        self.model.every_tensor()[NORM].data.mul_(0.99)

    monkeypatch.setattr(TaskModule, "optimizer_step", decays)
    refused(bench, f"in epoch 1: {NORM};")


@pytest.mark.parametrize("how", ["written", "trains"])
def test_a_source_of_a_fusion(bench: Bench, built: Callable[[Change], None], how: str,
                              callback: Callable[[lightning.Callback], None]) -> None:  # fmt: skip
    bench.stage1("films")
    bench.stage1("books")
    if how == "trains":
        built(lambda model: cast(None, model.every_tensor()[BANK].requires_grad_(True)))
        message = f"not declared trainable: {BANK};"
    else:
        callback(AtStep(write(BANK), epoch=0))
        message = f"in epoch 1: {BANK};"
    with pytest.raises(GuardError, match=message):
        bench.stage2("plays", ["films", "books"])
    assert not (bench.folder / "store" / "plays-adapterfusion").exists()


def test_under_mixed_precision(bench: Bench, callback: Callable[[lightning.Callback], None]) -> None:
    trainer = trainer_config(precision="bf16-mixed")
    bench.stage1("books", trainer=trainer)
    callback(AtStep(write(WORDS, in_place=False)))
    refused(bench, f"in epoch 2: {WORDS};", trainer=trainer)


def test_a_precision_that_converts_frozen_weights(bench: Bench) -> None:
    trainer = trainer_config(max_epochs=1)
    trainer.precision = "bf16-true"  # refused by the config
    refused(bench, r"trainer\.precision=bf16-true converted frozen tensors to torch\.bfloat16", trainer=trainer)


@pytest.mark.slow
def test_in_compiled_layers(bench: Bench, callback: Callable[[lightning.Callback], None]) -> None:
    if compiling_is_refused():
        return
    layer = "backbone.encoder.layer.1.attention.self.query.weight"
    bench.stage1("books", compile=True)
    callback(AtStep(write(layer)))
    refused(bench, f"in epoch 2: {layer};", compile=True)


# --- before a training, and on a resume ----------------------------------------------------------


def test_the_hash_is_that_of_the_frozen_weights(tiny_backbone: Path, tmp_path: Path) -> None:
    def nothing(*_: Any) -> None:
        pass

    one = prepared(small_model(tiny_backbone, nothing))
    again, other = (small_model(tiny_backbone, nothing), small_model(save_backbone(tmp_path / "b", seed=1), nothing))
    with torch.no_grad():
        again.trainable()["head.output.bias"].add_(1)
    assert one.frozen_hash == prepared(again).frozen_hash == hash_of_hashes(again.frozen_hashes()) != ""
    assert prepared(other).frozen_hash != one.frozen_hash


class StopAfter(lightning.Callback):
    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("the power went out")


def test_a_resume_with_another_frozen_backbone(
    bench: Bench, make_backbone: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.backbone = make_backbone("bert")
    with monkeypatch.context() as patch:
        add_callback(patch, StopAfter())
        with pytest.raises(RuntimeError, match="power"):
            bench.stage1("films")
    make_backbone("bert", seed=1)  # another one, in the same folder
    with pytest.raises(UserError, match=r"started with different frozen weights[\s\S]*resume=false"):
        bench.stage1("films")
    assert not (bench.folder / "store" / "films").exists()
    make_backbone("bert")
    resumed = bench.stage1("films")
    bench.stage1("films", store=str(bench.folder / "whole"))
    assert resumed["epochs"] == 2 and same(bench.weights("films"), bench.weights("films", "whole"))


RANKS = """
import sys
import torch
import pytorch_lightning as lightning
from fusion.backbones.load import load_backbone
from fusion.errors import GuardError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.model.adapted import AdaptedModel
from fusion.training.guard import Guard

rank, folder, meeting = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.distributed.init_process_group("gloo", "file://" + meeting, rank=rank, world_size=2)

class Trainer:
    world_size, global_rank = 2, rank

for how in ("same", "weights", "sizes"):
    size = 8 if rank and how == "sizes" else 4
    model = AdaptedModel(load_backbone(folder), {"1.feedforward": BottleneckAdapter(32, size)}, "normed", TaskHead(32, 2))
    if rank and how == "weights":
        model.backbone.get_parameter("embeddings.LayerNorm.bias").data[3] += 1e-6
    try:
        Guard(model).setup(Trainer(), None, "fit")
        print("they are the same")
    except GuardError as error:
        print(str(error).splitlines()[0])
"""


@pytest.mark.usefixtures("warm")
def test_ranks_that_differ_all_fail(tiny_backbone: Path, tmp_path: Path) -> None:
    """DDP would copy the weights of the first process to all of them."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tiny_backbone), str(tmp_path / "meeting")],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            out, err = process.communicate(timeout=180)
            sizes = [f"slots.1.feedforward.{name}" for name in ("down.bias", "down.weight", "up.weight")]
            assert out.splitlines() == [
                "they are the same",
                f"process 1 has different frozen tensors than process 0: {NORM}; no artifact was saved",
                f"process 1 would train different parameters than process 0: {', '.join(sizes)}; no artifact was saved",
            ], err[-2000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
