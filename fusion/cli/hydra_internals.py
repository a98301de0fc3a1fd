"""Replacements and uses of private parts of Hydra, each with its reason."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.hydra import Hydra
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf._utils import get_yaml_loader

from fusion.cli.config_sources import check_place
from fusion.config.task import read_task_file


class ConfigFiles(FileConfigSource):
    """Hydra's file reader, extended to validate task files and cache files, which Hydra reads repeatedly."""

    read: ClassVar[dict[tuple[str, Path, int, int], ConfigResult]] = {}

    def load_config(self, config_path: str) -> ConfigResult:
        path = Path(self.path) / self._normalize_file_name(config_path)
        if not path.is_file():
            return super().load_config(config_path)  # raises the error
        check_place(config_path.removesuffix(".yaml"))
        status = path.stat()
        key = (self.provider, path, status.st_mtime_ns, status.st_size)
        if key not in self.read:
            self.read[key] = self._load(path, config_path)
        return copy.deepcopy(self.read[key])  # Hydra removes the defaults list

    def _load(self, path: Path, config_path: str) -> ConfigResult:
        if not config_path.startswith("task/"):
            return super().load_config(config_path)
        return ConfigResult(
            config=DictConfig(read_task_file(path, get_yaml_loader())),
            path=f"{self.scheme()}://{self.path}",
            provider=self.provider,
            header=self._get_header_dict(""),  # `# @package` has no effect in a task file
        )


# Hydra identifies readers by name, and registers its own again in processes of a launcher.
ConfigFiles.__name__ = FileConfigSource.__name__
SourcesRegistry.instance().types["file"] = ConfigFiles


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    modes = [word.partition("=")[2] for word in overrides if word.startswith("hydra.mode=")]
    return RunMode.__members__.get(modes[-1]) if modes else None


# Hydra composes the config an additional time to read hydra.mode, which is only set by overrides.
Hydra.get_mode = _mode  # type: ignore[method-assign]
# Hydra composes each job of a sweep an additional time to validate it, after `compose_job`.
BasicSweeper.validate_batch_is_legal = lambda self, batch: None  # type: ignore[method-assign]
# Hydra copies the repository for each composition, including all schemas, only to replace the list of sources.
ConfigRepository.__deepcopy__ = lambda self, memo: copy.copy(self)  # type: ignore[attr-defined]


def compose_job(master: DictConfig, overrides: list[str], number: int) -> tuple[DictConfig, str]:
    """Compose the config of a sweep job, and its directory relative to hydra.sweep.dir."""
    composed = GlobalHydra.instance().config_loader().load_sweep_config(master, overrides)
    with open_dict(composed):
        composed.hydra.job.num = composed.hydra.job.id = number
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)  # to resolve ${hydra:...}
    try:
        return composed, str(composed.hydra.sweep.subdir)
    finally:
        HydraConfig.instance().cfg = before


def parse(words: Sequence[str]) -> list[Override]:
    loader = GlobalHydra.instance().config_loader()
    return OverridesParser.create(config_loader=loader).parse_overrides(list(words))


def split_into_jobs(overrides: list[Override]) -> list[list[str]]:
    """Split swept overrides into one list per job. BasicSweeper exposes no public function for this."""
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    return [list(job) for job in jobs]


def is_hydras_own(plugin: Any) -> bool:
    """Return whether a sweeper is Hydra's BasicSweeper."""
    return str(plugin.get("_target_", "")).endswith(".BasicSweeper")
