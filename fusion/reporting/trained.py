"""What the trainings made: their method, settings, sources and artifact."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config.compositions import COMPOSITIONS, Composition
from fusion.config.methods import METHODS, Method
from fusion.errors import UserError
from fusion.reporting.reading import RunFolder
from fusion.runs.identity import identity_config
from fusion.store.compatibility import check_attends
from fusion.store.lookup import read_folder
from fusion.store.settings_groups import Lookup, Settings

if TYPE_CHECKING:
    from fusion.store.manifest import Manifest

# Settings that name the target or the method; the others are the variant of the method.
_NOT_VARIANT = ("method.name", "composition.name", "task.name", "backbone.name_or_path", "data.limit.train")


@dataclass(frozen=True)
class Trained:
    """A training and its artifact.

    metric_of: the first metric of each task. variant: the settings that distinguish it from others of its method,
    those of its sources included. limit: of the training rows. manifest: of the artifact; None if it is gone.
    """

    run: RunFolder
    name: str
    tasks: tuple[str, ...]
    metric_of: Mapping[str, str]
    method: str
    variant: Mapping[str, Any]
    seed: int
    backbone: str
    limit: int | None
    sources: tuple[str, ...]
    artifact: str
    manifest: Manifest | None

    @property
    def hash(self) -> str | None:
        return None if self.manifest is None else self.manifest.hash

    @property
    def attends(self) -> bool:
        """Whether the artifact exists and has attention to inspect."""
        if self.manifest is None:
            return False
        try:
            check_attends(self.manifest, "", "")
        except UserError:
            return False
        return True


def trained_runs(runs: Iterable[RunFolder]) -> list[Trained]:
    """The last training of each artifact. A skipped run (already done) stands for the one before it."""
    made: dict[tuple[str, str], Trained] = {}
    trainings = [run for run in runs if run.command in ("stage1", "stage2") and "artifact" in run.result]
    lookup = Lookup({artifact_path(run): identity_config(run.config) for run in trainings})
    for run in trainings:
        key = (artifact_path(run), json.dumps(identity_config(run.config), sort_keys=True, default=str))
        if not (run.skipped and key in made):
            made[key] = _trained(run, lookup)
    return list({artifact: one for (artifact, _), one in made.items()}.values())


def _trained(run: RunFolder, lookup: Lookup) -> Trained:
    config, result, artifact = run.config, run.result, artifact_path(run)
    tasks = config.get("tasks") or [config.get("task") or {}]
    manifest = read_artifact(artifact)
    settings = _settings_of(run, artifact, manifest, lookup)
    return Trained(
        run=run,
        name=str(result.get("name")),
        tasks=tuple(str(task.get("name")) for task in tasks),
        metric_of={str(task.get("name")): str((task.get("metrics") or [""])[0]) for task in tasks},
        method=_method(config, result, settings),
        variant={key: value for key, value in settings.items() if key not in _NOT_VARIANT},
        seed=int(result.get("seed", 0)),
        backbone=str((config.get("backbone") or {}).get("name_or_path")),
        limit=((config.get("data") or {}).get("limit") or {}).get("train"),
        sources=tuple(map(str, result.get("sources") or ())),
        artifact=artifact,
        manifest=manifest,
    )


def read_artifact(path: str) -> Manifest | None:
    """The manifest of an artifact; None if it is gone."""
    with contextlib.suppress(OSError, UserError):
        return read_folder(Path(path))
    return None


def _settings_of(run: RunFolder, artifact: str, manifest: Manifest | None, lookup: Lookup) -> Settings:
    """The settings that all seeds share: of the artifact, if it is still the one that the run made."""
    flat, store = identity_config(run.config), Path(artifact).parent
    if manifest is not None:
        stored = manifest.run.config
        if {key: value for key, value in stored.items() if not key.startswith("inputs.")} == flat:
            return lookup.of_artifact(manifest, store)
    return lookup.of_run(flat, store, [str(source) for source in run.result.get("sources") or ()] or None)


def _method(config: Mapping[str, Any], result: Mapping[str, Any], settings: Settings) -> str:
    """The title of the method in tables."""
    if (composition := config.get("composition")) is None:
        return _title((config.get("method") or {}).get("name"), METHODS)
    sources: list[Any] = list(settings.get("sources") or result.get("sources") or ())
    of = f"of {len(sources)}"
    if len(sources) == 1:
        one = sources[0]
        task = one.get("artifact") or one.get("task.name") if isinstance(one, Mapping) else one
        of = f"of {task or 'one'}"
    own = " + own adapter" if composition.get("target_adapter") else ""
    return f"{_title(composition.get('name'), COMPOSITIONS)} {of}{own}"


def _title(name: Any, table: Mapping[str, Composition | Method]) -> str:
    """Runs of another version may have other names."""
    known = table.get(str(name))
    return (known.title if known is not None else "") or str(name)


def artifact_path(run: RunFolder) -> str:
    """The absolute path of the run's artifact; a relative one is relative to where the run was started."""
    place = Path(str(run.result["artifact"]))
    if not place.is_absolute():
        for above in (Path.cwd(), *run.folder.parents):  # one of them is where the run was started
            if (above / place).exists():
                return str((above / place).resolve())
    return str(place)
