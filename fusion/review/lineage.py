"""Which artifact a W&B run made, and out of which: W&B's own artifacts, now or when an offline run is uploaded.

What is to be drawn lies beside the run's files, in DIRECTORY/wandb/links.json:
{"run": {"id", "project", "entity"}, "made": {"name", "kind", "hash", "folder"} or null,
 "used": [{"name", "hash", "run"}], "drawn": bool}
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import first_line

log = logging.getLogger(__name__)

FILE = "links.json"
ALIAS = 12  # digits of an artifact's hash
# Of a manifest, what W&B shows with the artifact; a run's whole config stands with the run.
SHOWN = ("kind", "name", "adapter", "composition", "method", "sources", "metrics", "seed", "versions", "result")


@dataclass(frozen=True)
class Links:
    """made: what the run stored; None: nothing. used: what it read, with the run that made it where that is known."""

    made: dict[str, Any] | None
    used: list[dict[str, Any]]

    def write(self, file: Path, run: Mapping[str, Any], drawn: bool) -> None:
        """Keeps them beside the run `{"id", "project", "entity"}`; whether they are drawn."""
        said = {"run": dict(run), "made": self.made, "used": self.used, "drawn": drawn}
        part = file.with_name(f".{FILE}.{os.getpid()}")
        part.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, file)


def links_file(run: Any) -> Path:
    return Path(run.settings.sync_dir).parent / FILE


def describe(run: Any) -> dict[str, Any]:
    return {"id": run.id, "project": run.project, "entity": run.entity or None}


def link(run: Any, links: Links) -> list[str]:
    """Draws the links of an online run.

    Returns:
        The names of the used artifacts that W&B does not have (made offline and not uploaded yet, or elsewhere).
    """
    import wandb

    missing = []
    for used in links.used:
        try:
            run.use_artifact(reference(used))
        except Exception as error:  # the run's config names it all the same
            log.debug("W&B has no artifact %s: %s", used["name"], first_line(error))
            missing.append(str(used["name"]))
    if (made := links.made) is not None:
        folder = Path(made["folder"])
        artifact = wandb.Artifact(made["name"], type=made["kind"], metadata=metadata(folder, made["hash"]))
        for file in sorted(folder.iterdir()):
            artifact.add_file(str(file), policy="immutable")  # no second copy in W&B's staging folder
        run.log_artifact(artifact, aliases=["latest", made["hash"][:ALIAS]])
    return missing


def reference(used: Mapping[str, Any]) -> str:
    """`entity/project/name:hash`, where the run that made it is known to W&B, else `name:hash` of this project."""
    run = used.get("run") or {}
    place = [str(run[key]) for key in ("entity", "project") if run.get(key)]
    return "/".join([*(place if len(place) == 2 else []), f"{used['name']}:{used['hash'][:ALIAS]}"])


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
