"""One epoch as the rival's own example trains it: padding to the full length, its AdapterTrainer, its defaults.

Imported by the rival's worker alone, when an epoch is asked for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pipelines.benchmark.cases import Setup


def run(setup: Setup, request: dict[str, Any]) -> dict[str, Any]:
    """Seconds from the beginning of training to its end, the evaluation after the epoch included.

    The request names `rows`, a JSON file with texts and labels of `train` and `validation`; `sources`, how
    many adapters are fused (0: one adapter is trained); `max_length`, to which every text is padded; `rate`, the
    learning rate; and `output`, a folder.
    """
    import adapters
    import torch
    from adapters.composition import Fuse
    from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

    rows = json.loads(Path(request["rows"]).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(setup.backbone)
    torch.manual_seed(setup.seed)
    model = adapters.AutoAdapterModel.from_pretrained(setup.backbone, dtype=torch.float32)
    model.add_classification_head("task", num_labels=len(set(rows["train"]["labels"])))
    names = [f"source{n}" for n in range(request["sources"])] or ["task"]
    for name in names:
        model.add_adapter(name, config=adapters.SeqBnConfig())
    if request["sources"]:
        model.add_adapter_fusion(Fuse(*names), "dynamic")
        model.train_adapter_fusion(Fuse(*names))
    else:
        model.train_adapter("task")
    model.active_head = "task"

    class Clock(TrainerCallback):
        started = ended = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    trainer = adapters.AdapterTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=request["output"],
            per_device_train_batch_size=setup.batch_size,
            per_device_eval_batch_size=setup.batch_size,
            learning_rate=request["rate"],
            num_train_epochs=1,
            eval_strategy="epoch",
            report_to=[],
            use_cpu=setup.device == "cpu",
            seed=setup.seed,
        ),
        train_dataset=_padded(rows["train"], tokenizer, request["max_length"]),
        eval_dataset=_padded(rows["validation"], tokenizer, request["max_length"]),
        callbacks=[clock],
    )
    trainer.train()
    return {"seconds": clock.ended - clock.started, "rows": len(rows["train"]["labels"])}


def _padded(split: dict[str, Any], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    columns = [list(column) for column in zip(*split["texts"], strict=True)]
    encoded = tokenizer(*columns, padding="max_length", max_length=max_length, truncation=True)
    return [
        {key: values[row] for key, values in encoded.items()} | {"labels": label}
        for row, label in enumerate(split["labels"])
    ]
