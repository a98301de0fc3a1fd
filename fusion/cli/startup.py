"""Faster imports in the commands, which otherwise take most of the time until the first training step."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import logging
import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any


def import_quickly() -> None:
    """Import libraries without what training does not use."""
    from fusion.backbones.losses import import_losses_without_scipy

    for fast in (_import_compiler_without_fsdp, _import_torchmetrics_on_demand, import_losses_without_scipy):
        with contextlib.suppress(Exception):  # this only saves time
            fast()
    if not gc.get_freeze_count():  # at the first job: later, this would keep the models of earlier jobs
        gc.freeze()  # collections, also those at exit, skip the modules


def _import_compiler_without_fsdp() -> None:
    """Import torch._dynamo, which optimizers import even in eager mode, without FSDP, which it compiles if available."""
    name = "torch.distributed.fsdp"
    if name in sys.modules:
        return
    sys.modules[name] = None  # type: ignore[assignment]  # an import raises ModuleNotFoundError
    try:
        importlib.import_module("torch._dynamo")
    finally:
        del sys.modules[name]


def _import_torchmetrics_on_demand() -> None:
    """Import the modules of torchmetrics that Lightning uses; the others are imported when an attribute is read.

    Lightning imports torchmetrics for two classes. Its `__init__` imports every metric, with scipy.signal, and its
    plots import matplotlib.
    """
    if "torchmetrics" in sys.modules:
        return
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.loader is not None and spec.submodule_search_locations is not None
    package = importlib.util.module_from_spec(spec)

    def load(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del package.__dict__["__getattr__"]
        spec.loader.exec_module(package)  # type: ignore[union-attr]
        return getattr(package, name)

    sys.modules["torchmetrics"] = package
    try:
        vars(_submodule(spec, "torchmetrics.utilities.imports"))["_MATPLOTLIB_AVAILABLE"] = False
        package.__dict__.update(_logger=logging.getLogger("torchmetrics"), __version__=version("torchmetrics"))
        importlib.import_module("torchmetrics.utilities")
        package.__dict__.update(
            Metric=importlib.import_module("torchmetrics.metric").Metric,
            MetricCollection=importlib.import_module("torchmetrics.collections").MetricCollection,
        )
    except BaseException:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
            del sys.modules[name]
        raise
    package.__dict__["__getattr__"] = load


def _submodule(spec: importlib.machinery.ModuleSpec, name: str) -> ModuleType:
    """Import a module without the packages that contain it."""
    *_, folder, file = name.split(".")
    path = f"{spec.submodule_search_locations[0]}/{folder}/{file}.py"  # type: ignore[index]
    own = importlib.util.spec_from_file_location(name, path)
    assert own is not None and own.loader is not None
    module = importlib.util.module_from_spec(own)
    sys.modules[name] = module
    own.loader.exec_module(module)
    return module
