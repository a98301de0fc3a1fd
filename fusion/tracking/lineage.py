"""Which artifact a W&B run made, and from which ones: W&B's own artifacts, linked now or after an offline upload.

What is to be linked is in DIRECTORY/wandb/links.json:
{"run": {"id", "project", "entity", "name"}, "made": {"name", "kind", "hash", "folder"} or null,
 "used": [{"name", "hash", "run"}], "drawn": ["NAME:HASH", ...]}; "drawn" names what is linked already.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FILE = "links.json"
ALIAS_DIGITS = 12  # of an artifact's hash
# What W&B shows of a manifest; the whole config is with the run.
SHOWN = ["kind", "name", "adapter", "composition", "method", "sources", "metrics", "seed", "versions", "result"]
SHOWN_OF_RUN = ["identity", "overrides", "git", "wandb"]


def read_links(file: Path) -> dict[str, Any]:
    """
    Raises:
        OSError, ValueError: it cannot be read, or is not a file of links.
    """
    links: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    try:
        not_linked(links), links["run"]["id"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return links


def not_linked(links: Mapping[str, Any]) -> list[str]:
    """The artifacts that are not linked yet, as `NAME:HASH`."""
    every = [mark(one) for one in [*links["used"], *([links["made"]] if links["made"] else [])]]
    return [one for one in every if one not in links["drawn"]]


def mark(artifact: Mapping[str, Any]) -> str:
    """`NAME:HASH`, W&B's name of an artifact."""
    return f"{artifact['name']}:{artifact['hash'][:ALIAS_DIGITS]}"


def link(run: Any, links: Mapping[str, Any]) -> dict[str, Any]:
    """Link what is open of an online run, and return the links with what is linked now.

    An artifact that W&B does not have (made offline and not uploaded yet, or elsewhere) stays open, and so does one
    whose folder was removed.
    """
    import wandb

    linked, made = list(links["drawn"]), links["made"]
    for used in links["used"]:
        if mark(used) not in linked:
            with contextlib.suppress(Exception):  # the run's config names it anyway
                run.use_artifact(reference(used))
                linked.append(mark(used))
    if made and mark(made) not in linked and (folder := Path(made["folder"])).is_dir():
        artifact = wandb.Artifact(made["name"], type=made["kind"], metadata=metadata(folder, made["hash"]))
        for file in sorted(folder.iterdir()):
            artifact.add_file(str(file), policy="immutable")  # no copy in W&B's staging folder
        run.log_artifact(artifact, aliases=["latest", made["hash"][:ALIAS_DIGITS]])
        linked.append(mark(made))
    return {**links, "drawn": linked}


def reference(used: Mapping[str, Any]) -> str:
    """`entity/project/name:hash`, as far as the run that made it is known; otherwise in this project."""
    run = used.get("run") or {}
    place = [str(run[key]) for key in ("entity", "project") if run.get(key)] if run.get("project") else []
    return "/".join([*place, mark(used)])


def metadata(folder: Path, hash: str) -> dict[str, Any]:
    """The part of the artifact's manifest that W&B shows."""
    manifest: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    task, backbone, run = (manifest.get(key) or {} for key in ("task", "backbone", "run"))
    shown = {key: manifest[key] for key in SHOWN if manifest.get(key)}
    shown |= {key: run[key] for key in SHOWN_OF_RUN if run.get(key)}
    shown["backbone"] = {key: backbone.get(key) for key in ("name_or_path", "fingerprint")}
    return {"hash": hash, "folder": str(folder), "task": task.get("name"), **shown}


@contextlib.contextmanager
def staged_in(folder: Path | str) -> Iterator[None]:
    """W&B stages the files of artifacts in this folder, in place of the user's home."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR")
        os.environ.update({} if before is None else {"WANDB_DATA_DIR": before})
