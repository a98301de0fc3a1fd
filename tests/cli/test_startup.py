"""Imports of the commands: only what training uses, and everything else on demand."""

from __future__ import annotations

import subprocess
import sys

import pytest

QUICK = """
import gc, sys
from fusion.cli import startup
from fusion.runs import memory

memory.collect_rarely()
assert gc.get_threshold()[0] > 10_000
startup.import_quickly()
frozen = gc.get_freeze_count()
assert frozen > 10_000
later = [[] for _ in range(1000)]
startup.import_quickly()
assert gc.get_freeze_count() == frozen, "what later jobs leave behind is collected"
assert "torch._dynamo" in sys.modules and "torch.distributed.fsdp" not in sys.modules
import pytorch_lightning
import torch
import transformers.modeling_utils

unused = ("torchmetrics.functional", "torchmetrics.audio", "matplotlib", "scipy.signal", "scipy.optimize", "pandas")
found = [name for name in unused if name in sys.modules]
assert not found, found
import torchmetrics
from pytorch_lightning.core import module

assert module.Metric is torchmetrics.Metric and torchmetrics.Metric.__module__ == "torchmetrics.metric"
from importlib.metadata import version

assert torchmetrics.__version__ == version("torchmetrics")
# The rest of the package is imported when it is used.
metric = torchmetrics.Accuracy(task="binary")
assert isinstance(metric, module.Metric) and torchmetrics.functional.accuracy and torchmetrics.MeanMetric
from transformers.utils import is_scipy_available

assert is_scipy_available()
from torch.distributed.fsdp import FullyShardedDataParallel

assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""

BROKEN = """
import importlib, sys
from fusion.cli import startup

def fail(name):
    raise RuntimeError(name)

importlib.import_module, found = fail, importlib.import_module
startup.import_quickly()
importlib.import_module = found
assert not [name for name in sys.modules if name.startswith("torchmetrics")]
import pytorch_lightning, torchmetrics

assert "torchmetrics.functional" in sys.modules and torchmetrics.Accuracy
"""


@pytest.mark.parametrize("code", [QUICK, BROKEN], ids=["quick", "broken"])
def test_libraries_are_imported_as_far_as_they_are_used(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


GARBAGE = """
import gc
from fusion.runs import memory

gc.set_threshold(5)
memory.collect_as_usual()
print(*gc.get_threshold())
"""


def test_garbage_is_collected_as_usual_in_training() -> None:
    done = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["700", "10", "10"]
