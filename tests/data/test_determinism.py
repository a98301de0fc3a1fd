"""The same rows, tokens, batches and weights, whatever the loader's workers, the hash seed, the locale and the threads."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.config.model import AdapterConfig, HeadConfig
from tests.bench import Bench, same, write_task
from tests.data.conftest import make_tokenizer

ROOT = Path(__file__).parents[2]

# Prints a hash of everything that a batch holds, for two epochs of training and one of evaluation.
PROGRAM = """
import hashlib, sys
from fusion.config.data import DataConfig, LimitConfig
from fusion.config.task import TaskConfig
from fusion.data.encode import encode
from fusion.hub.tokenizer import load_tokenizer
from fusion.data.loaders import evaluation_loader, training_loader
from fusion.data.rows import load_rows

if __name__ == "__main__":
    folder, tokenizer, cache, workers = sys.argv[1], load_tokenizer(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    digest, batches = hashlib.sha256(), 0
    tasks = []
    for number, name in enumerate(("films", "books")):
        task = TaskConfig(name=name, text="text", labels=["bad", "good"], metrics=["accuracy"])
        rows = load_rows(task, DataConfig(dir=folder, limit=LimitConfig(train=50)), "train")
        digest.update(rows.fingerprint.encode())
        tasks.append(encode(rows, tokenizer, 16, cache))
        tasks[-1].task = number
        digest.update(tasks[-1].key.encode())
    for loader in (
        training_loader([tasks[0]], 8, seed=3, workers=workers),
        training_loader([tasks[0]], 8, seed=3, workers=workers, tokens_per_batch=64),
        training_loader(tasks, 8, seed=3, workers=workers, temperature=2.0),
        evaluation_loader(tasks[1], 8, workers=workers),
    ):
        for epoch in range(2):
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)
            for batch in loader:
                batches += 1
                for tensor in (batch.input_ids, batch.attention_mask, batch.token_type_ids, batch.labels, batch.rows, batch.weights):
                    digest.update(str(tensor.dtype).encode() + str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
                digest.update(f"{batch.global_rows} {batch.task}".encode())
    print(batches, digest.hexdigest())
"""

CASES: list[tuple[int, dict[str, str]]] = [
    (0, {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "LC_ALL": "C"}),
    (1, {"PYTHONHASHSEED": "1", "TOKENIZERS_PARALLELISM": "true", "LC_ALL": "C.UTF-8"}),
    (2, {"PYTHONHASHSEED": "77", "LC_ALL": "POSIX", "PYTHONUTF8": "0", "TZ": "Asia/Tokyo"}),
    (3, {"PYTHONHASHSEED": "random", "OMP_NUM_THREADS": "2", "LANG": "tr_TR.UTF-8"}),
]


@pytest.mark.parametrize("cases", [CASES[::2], pytest.param(CASES, marks=pytest.mark.slow)], ids=["two", "all"])
def test_batches_are_the_same_everywhere(tmp_path: Path, cases: list[tuple[int, dict[str, str]]]) -> None:
    for name in ("films", "books"):
        write_task(tmp_path / "data", name)
    make_tokenizer(tmp_path / "tokenizer", types=True)
    (tmp_path / "program.py").write_text(PROGRAM)
    running = [
        subprocess.Popen(
            [sys.executable, "program.py", "data", "tokenizer", f"cache-{workers}", str(workers)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for workers, variables in cases
    ]
    try:
        ended = [process.communicate(timeout=150) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(cases), ended
    printed = {out for out, _ in ended}
    assert len(printed) == 1 and int(printed.pop().split()[0]) > 40, ended
    caches = [{f.name: f.read_bytes() for f in (tmp_path / f"cache-{n}").iterdir()} for n, _ in cases]
    assert len(caches[0]) == 2 and all(cache == caches[0] for cache in caches)


@pytest.mark.parametrize("workers", [2])
def test_weights_do_not_depend_on_the_workers(bench: Bench, workers: int) -> None:
    """With dropout, so that a draw that a worker's start would take from the global generator shows."""
    settings = {"adapter": AdapterConfig(dropout=0.2), "head": HeadConfig(dropout=0.3)}
    bench.stage1("films", name="alone", **settings)
    bench.data = dataclasses.replace(bench.data, workers=workers)
    bench.stage1("films", name="helped", **settings)
    assert same(bench.weights("alone"), bench.weights("helped"))
    bench.data = dataclasses.replace(bench.data, workers=0)
    bench.stage1("films", name="plain", head=HeadConfig(dropout=0.3))
    assert not same(bench.weights("alone"), bench.weights("plain")), "dropout acts"
