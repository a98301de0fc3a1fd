"""Group artifacts that differ only in the seeds of themselves and their sources, regardless of their names."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from fusion.store.lookup import artifacts, find, read_folder
from fusion.text import flat, is_within

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

Settings = dict[str, Any]

# Keys that may differ between seeds of one setting, such as names and directories.
NOT_SETTINGS = (
    *("seed", "name", "store", "output", "overwrite", "resume", "data.dir", "data.cache_dir"),
    *("backbone.cache_gb", "logger", "hydra", "inputs", "sources_by"),
)
# Values that produce equal results up to rounding; only float16 changes them.
NOT_SETTINGS_AT = tuple(("backbone.cache", value) for value in ("auto", "off", "float32"))
SOURCES, FUSION = "sources", "composition.fusion"  # keys that refer to artifacts
_DEEPEST = 8  # levels of artifacts that depend on artifacts


class Lookup:
    """Resolved settings of artifacts and runs, including their sources. `known`: flat configs of removed artifacts."""

    def __init__(self, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._known = known or {}
        self._stores: dict[Path, dict[str, Manifest]] = {}  # by hash
        self._depth = 0

    def of_artifact(self, manifest: Manifest, store: Path) -> Settings:
        """Return the settings of a stored artifact, whose sources are looked up by hash."""
        if store not in self._stores:
            self._stores[store] = {one.hash: one for _, one in artifacts(store, replaced=True)}
        found = [(source.name, self._stores[store].get(source.hash)) for source in manifest.sources]
        sources = [
            self._named(name, manifest.seed, store, False) if one is None else self.of_artifact(one, store)
            for name, one in found
        ]
        return self._settings(manifest.run.config, sources, manifest.seed, store)

    def of_run(self, config: Mapping[str, Any], store: Path | None, sources: Sequence[str] | None = None) -> Settings:
        """Return the settings of a run without an artifact. `sources`: names in the store, by default of the config."""
        seed, named = config.get("seed"), config.get(SOURCES) if sources is None else sources
        names = named if isinstance(named, (list, tuple)) else ()
        return self._settings(config, [self._named(str(name), seed, store) for name in names], seed, store)

    def _settings(self, config: Mapping[str, Any], sources: list[Settings], seed: Any, store: Path | None) -> Settings:
        left_out = (*NOT_SETTINGS, SOURCES, FUSION)
        settings = {k: v for k, v in config.items() if not is_within(k, left_out) and (k, v) not in NOT_SETTINGS_AT}
        if sources:
            settings[SOURCES] = sources
        if isinstance(reference := config.get(FUSION), str):
            settings[FUSION] = self._named(reference, seed, store)
        return settings

    def _named(self, reference: str, seed: Any, store: Path | None, stored: bool = True) -> Settings:
        """Return the settings of an artifact by name. `stored`: whether to look it up in the store."""
        if store is not None and self._depth < _DEEPEST:  # a pruned fusion may have overwritten its own source
            self._depth += 1
            try:
                if stored:
                    with contextlib.suppress(UserError, OSError):
                        folder = find(reference, store)
                        return self.of_artifact(read_folder(folder), folder.parent)
                if (config := self._known.get(str(store / reference))) is not None:
                    return self.of_run(config, store)
            finally:
                self._depth -= 1
        # Only the name is known. Sweeps over seeds append the seed.
        return {"artifact": re.sub(rf"-seed-{re.escape(str(seed))}$", "", reference)}


def key_of(settings: Mapping[str, Any]) -> str:
    """Return a string key that is identical for identical settings."""
    return json.dumps(settings, sort_keys=True, default=str)


def group(settings: Iterable[Mapping[str, Any]]) -> list[list[int]]:
    """Return lists of indices of equal settings, in order of first occurrence."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(settings):
        groups.setdefault(key_of(one), []).append(index)
    return list(groups.values())


def differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the settings that are not equal in all. Sources are named by their tasks if those differ."""
    every = [dict(flat(one)) for one in settings]
    tasks = [_tasks(one) for one in settings]
    if len(set(map(tuple, tasks))) > 1:  # omit the settings of different sources
        every = [
            {k: v for k, v in one.items() if not is_within(k, [SOURCES])} | {SOURCES: "+".join(names)}
            for one, names in zip(every, tasks, strict=True)
        ]
    keys = sorted({key for one in every for key in one})
    keys = [key for key in keys if len({json.dumps(one.get(key), default=str) for one in every}) > 1]
    return [{key: one.get(key) for key in keys} for one in every]


def _tasks(settings: Mapping[str, Any]) -> list[str]:
    tasks = []
    for source in settings.get(SOURCES) or ():
        names = [str(v) for k, v in source.items() if re.fullmatch(r"task\.name|tasks\.\d+\.name", k)]
        tasks.append(str(source.get("artifact") or "+".join(names)))
    return tasks
