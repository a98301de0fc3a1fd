"""A store with three sources, of which one has the same task as the target and the others have random labels."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fusion.config.task import TaskConfig
from fusion.config.training import OptimConfig, TrainerConfig
from tests.bench import LABELS, Bench
from tests.tiny_backbone import WORDS


def write_words(bench: Bench, name: str, meaning: bool, rows: int) -> None:
    """Sentences whose label is whether they hold `good` or `bad`; without meaning, other words and random labels."""
    draw = random.Random(name)
    folder = bench.folder / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("validation", 64)):
        lines = []
        for _ in range(count):
            label = draw.randrange(2)
            words = draw.choices(
                WORDS[:8] if meaning else WORDS[12:], k=draw.randrange(8, 13)
            )  # so many that the one word needs an adapter
            words += [LABELS[label]] * meaning
            draw.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    bench.tasks[name] = TaskConfig(name=name, text="text", labels=LABELS, metrics=["accuracy"])


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """The target is `plays`; `films` has the same task, `coins` and `dice` have random labels. Tests must not change the store."""
    bench = Bench(tmp_path_factory.mktemp("ranking") / "a folder", tiny_backbone)
    for name, meaning, rows in (("films", True, 256), ("coins", False, 32), ("dice", False, 32)):
        write_words(bench, name, meaning, rows)
        epochs = TrainerConfig(accelerator="cpu", max_epochs=8 if meaning else 2, enable_progress_bar=False)
        bench.stage1(name, trainer=epochs, optim=OptimConfig(lr=1e-2, patience=None))
    write_words(bench, "plays", True, 64)
    return bench
