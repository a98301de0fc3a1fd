"""What the victims do: a tiny random backbone, two tiny tasks, and a dozen kinds of runs over them."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

LABELS = ["bad", "good"]
WORDS = ["the", "a", "cat", "dog", "film", "book", "was", "is", "not", "very", "great", "poor", *LABELS]
TASKS = ("films", "books", "plays")
NAME = "made"  # what every run stores
ROWS = {"train": 64, "validation": 16}

# The same in every kind. Paths are seen from OUTPUT/FOLDER/RUN, which is where each run works.
_SHARED = (
    "data.dir=../../work/data",
    "data.cache_dir=cache",
    "data.max_length=16",
    "optim.lr=5e-3",
    "optim.patience=null",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "head.dropout=0.3",
    "logger=none",
    "store=store",
)
_OWN_BACKBONE = ("backbone.name_or_path=../../work/backbone", "backbone.pooling=mean")
_ONE = ("data.batch_size=8",)
_TWO = ("data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp")
_EVERY_BATCH = ("checkpoint_minutes=0",)
_ADAPTER = ("fusion.stage1", "+task=films", "adapter.dropout=0.2")
_FUSION = ("fusion.stage2", "+task=films", "composition.dropout=0.1", "sources=[books,plays]")
_ELSEWHERE = (
    *_FUSION[:-1],
    "sources=[../../preparations/books/store/books,../../preparations/plays/store/plays]",
)


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    words: the module and its overrides. needs: the preparations whose artifacts lie in its store before it starts.
    beside: the preparations whose artifacts it reads in their own stores.
    """

    name: str
    words: tuple[str, ...]
    processes: int = 1
    needs: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def overwrites(self) -> bool:
        return "overwrite=true" in self.words

    @property
    def stage(self) -> int:
        return int(self.words[0][-1])

    def command(self, backbone: str | None) -> list[str]:
        """Module and overrides, but for where the attempt writes."""
        chosen = _OWN_BACKBONE if backbone is None else (f"backbone={backbone}",)
        size = _ONE if self.processes == 1 else _TWO
        return [self.words[0], *_SHARED, *chosen, *size, f"name={NAME}", *self.words[1:]]


def _kind(name: str, words: tuple[str, ...], *more: str, processes: int = 1, minutes: bool = False) -> Kind:
    sources = ("books", "plays")
    needs = (*(sources if words == _FUSION else ()), *(("older",) if "overwrite=true" in more else ()))
    beside = sources if words == _ELSEWHERE else ()
    return Kind(name, (*words, *(() if minutes else _EVERY_BATCH), *more), processes, needs, beside)


# What other runs need: the sources, and what is overwritten.
PREPARATIONS = {
    "books": Kind("books", ("fusion.stage1", "+task=books", "name=books")),
    "plays": Kind("plays", ("fusion.stage1", "+task=plays", "name=plays")),
    "older": Kind("older", ("fusion.stage1", "+task=films", "seed=7")),
}
_LIST = (
    _kind("adapter", _ADAPTER),
    _kind("fusion in two processes", _FUSION, processes=2),
    _kind("accumulating", _ADAPTER, "trainer.accumulate_grad_batches=3"),
    _kind("fusion", _FUSION),
    _kind("adapter in two processes", _ADAPTER, processes=2),
    _kind("often evaluated", _ADAPTER, "trainer.val_check_interval=0.25"),
    _kind("kept prefix", _ADAPTER, "adapter.layers=last:2", "backbone.cache=float32"),
    _kind("overwriting", _ADAPTER, "overwrite=true"),
    _kind(
        "accumulating, overwriting, in two processes",
        _ADAPTER,
        "trainer.accumulate_grad_batches=3",
        "trainer.val_check_interval=0.5",
        "overwrite=true",
        processes=2,
    ),
    _kind("a checkpoint an epoch", _ADAPTER, minutes=True),
    _kind("fusion of another store's sources", _ELSEWHERE),
    _kind(
        "fusion with a kept prefix",
        _FUSION,
        "composition.layers=last:2",
        "backbone.cache=float32",
        "trainer.val_check_interval=0.5",
    ),
)
KINDS = {kind.name: kind for kind in _LIST}


def write_work(folder: Path) -> None:
    """The tasks (rows and task files) and the backbone, the same ones every time."""
    for name in TASKS:
        _write_rows(folder / "data" / name, name)
        said = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
        (folder / "conf" / "task").mkdir(parents=True, exist_ok=True)
        (folder / "conf" / "task" / f"{name}.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    write_backbone(folder / "backbone")


def _write_rows(folder: Path, name: str) -> None:
    """Sentences whose label is the one of two words that they hold."""
    draw = random.Random(name)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        lines = []
        for _ in range(count):
            label = draw.randrange(2)
            words = [*draw.choices(WORDS[:8], k=draw.randrange(2, 9)), LABELS[label]]
            draw.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_backbone(folder: Path) -> None:
    """A random BERT of 3 layers of width 32, and a tokenizer of a few words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **names
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(special + WORDS),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=80,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
