"""Which artifact a W&B run made, and out of which: W&B's own artifacts, now or when an offline run is uploaded.

What is to be drawn lies beside the run's files, in DIRECTORY/wandb/links.json:
{"run": {"id", "project", "entity", "name"}, "made": {"name", "kind", "hash", "folder"} or null,
 "used": [{"name", "hash", "run"}], "drawn": ["NAME:HASH", ...]}
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusion.errors import first_line
from fusion.files import write_json

log = logging.getLogger(__name__)

FILE = "links.json"
ALIAS = 12  # digits of an artifact's hash
# Of a manifest, what W&B shows with the artifact; a run's whole config stands with the run.
SHOWN = (
    "kind",
    "name",
    "adapter",
    "composition",
    "method",
    "sources",
    "metrics",
    "seed",
    "versions",
    "result",
)


@dataclass(frozen=True)
class Links:
    """made: what the run stored; None: nothing. used: what it read, with the run that made it where that is known.

    drawn: which of them W&B has, as `NAME:HASH`.
    """

    run: dict[str, Any]
    made: dict[str, Any] | None
    used: list[dict[str, Any]]
    drawn: tuple[str, ...] = ()

    @property
    def open(self) -> list[str]:
        """What is not drawn yet."""
        every = [*self.used, *([self.made] if self.made is not None else [])]
        return [mark(artifact) for artifact in every if mark(artifact) not in self.drawn]

    def write(self, file: Path) -> None:
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Links:
        """
        Raises:
            OSError, ValueError: it cannot be read, or is something else.
        """
        said = json.loads(file.read_text(encoding="utf-8"))
        try:
            made = said["made"]
            links = cls(dict(said["run"]), made and dict(made), list(said["used"]), tuple(said["drawn"]))
            links.open  # noqa: B018 - every artifact has its name and hash
            return links
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: is no file of links ({type(error).__name__}: {error})") from error


def mark(artifact: Mapping[str, Any]) -> str:
    """`NAME:HASH`, as W&B knows it."""
    return f"{artifact['name']}:{artifact['hash'][:ALIAS]}"


def links_file(run: Any) -> Path:
    return Path(run.settings.sync_dir).parent / FILE


def describe(run: Any) -> dict[str, Any]:
    return {"id": run.id, "project": run.project, "entity": run.entity or None, "name": run.name}


def link(run: Any, links: Links) -> Links:
    """Draws what is open of an online run's links.

    Returns:
        With what is drawn now. An artifact that W&B does not have (made offline and not uploaded yet, or elsewhere)
        stays open, and so does one whose folder holds another by now.
    """
    import wandb

    drawn = list(links.drawn)
    for used in links.used:
        if mark(used) not in drawn:
            try:
                run.use_artifact(reference(used))
                drawn.append(mark(used))
            except Exception as error:  # the run's config names it all the same
                log.debug("W&B has no artifact %s: %s", used["name"], first_line(error))
    made = links.made
    if made is not None and mark(made) not in drawn and Path(made["folder"]).is_dir():
        folder = Path(made["folder"])
        artifact = wandb.Artifact(made["name"], type=made["kind"], metadata=metadata(folder, made["hash"]))
        for file in sorted(folder.iterdir()):
            artifact.add_file(str(file), policy="immutable")  # no second copy in W&B's staging folder
        run.log_artifact(artifact, aliases=["latest", made["hash"][:ALIAS]])
        drawn.append(mark(made))
    return replace(links, drawn=tuple(drawn))


def reference(used: Mapping[str, Any]) -> str:
    """`entity/project/name:hash`, as far as it is known where the run that made it is; else in this project."""
    run = used.get("run") or {}
    place = [str(run[key]) for key in ("entity", "project") if run.get(key)] if run.get("project") else []
    return "/".join([*place, mark(used)])


def metadata(folder: Path, hash: str) -> dict[str, Any]:
    """What the artifact's manifest says of it, without the parts that only the loader needs."""
    values: dict[str, Any] = {"hash": hash, "folder": str(folder)}
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return values
    values |= {key: manifest[key] for key in SHOWN if manifest.get(key)}
    values["task"] = (manifest.get("task") or {}).get("name")
    backbone = manifest.get("backbone") or {}
    values["backbone"] = {key: backbone.get(key) for key in ("name_or_path", "fingerprint")}
    run = manifest.get("run") or {}
    return values | {key: run[key] for key in ("identity", "overrides", "git", "wandb") if run.get(key)}
