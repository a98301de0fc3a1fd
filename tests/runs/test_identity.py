"""Settings that have no effect on a run are not part of its identity."""

from __future__ import annotations

import dataclasses
from typing import Any

from fusion.config.model import BackboneConfig
from fusion.config.stages import Stage1Config
from fusion.config.training import OptimConfig, TrainerConfig
from fusion.runs.identity import identity, identity_config


def config(max_epochs: int | None, **optim: Any) -> dict[str, Any]:
    backbone = BackboneConfig(name_or_path="bert", rates={"adapter": 1e-3})
    settings = Stage1Config(backbone=backbone, optim=OptimConfig(**optim), trainer=TrainerConfig(max_epochs=max_epochs))
    return dataclasses.asdict(settings)


def test_the_planned_length_matters_without_max_epochs_only() -> None:
    assert identity(config(3, epochs=10, min_steps=7)) == identity(config(3))
    assert identity(config(None, epochs=10)) != identity(config(None))
    assert identity(config(None, min_steps=7)) != identity(config(None))
    assert "optim.epochs" not in identity_config(config(3, epochs=10))


def test_the_rate_that_is_used_is_part_of_the_identity() -> None:
    kept = identity_config(config(3))
    assert kept["optim.lr"] == 1e-3 and not any(key.startswith("backbone.rates") for key in kept)
    assert identity(config(3)) == identity(config(3, lr=1e-3)) != identity(config(3, lr=2e-3))
