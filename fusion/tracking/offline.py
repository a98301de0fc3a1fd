"""Link W&B runs to their output and input artifacts, and upload offline runs.

DIRECTORY/wandb/links.json lists the artifacts to link:
{"run": {"id", "project", "entity", "name"}, "made": {"name", "kind", "hash", "folder"} or null,
 "used": [{"name", "hash", "run"}], "drawn": ["NAME:HASH", ...]}; "drawn" lists the artifacts that are already linked.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any

from fusion.config.training import WandbConfig
from fusion.errors import UserError, first_line
from fusion.files import read_json, write_json
from fusion.store.layout import MANIFEST
from fusion.tracking.wandb_run import disable_error_reports, missing_key, settings

FILE = "links.json"
ALIAS_DIGITS = 12  # digits of the hash
# Manifest keys that are logged as metadata; the run contains the config.
SHOWN = ["kind", "name", "adapter", "composition", "method", "sources", "metrics", "seed", "versions", "result"]
SHOWN_OF_RUN = ["identity", "overrides", "git", "wandb"]


def not_linked(links: Mapping[str, Any]) -> list[str]:
    """Return the artifacts that are not yet linked, as `NAME:HASH`."""
    every = [mark(one) for one in [*links["used"], *([links["made"]] if links["made"] else [])]]
    return [one for one in every if one not in links["drawn"]]


def mark(artifact: Mapping[str, Any]) -> str:
    """Return `NAME:HASH`, the name of an artifact in W&B."""
    return f"{artifact['name']}:{artifact['hash'][:ALIAS_DIGITS]}"


def link(run: Any, links: Mapping[str, Any]) -> dict[str, Any]:
    """Link the artifacts of an online run, and return the updated links. Those that W&B lacks remain unlinked."""
    import wandb

    linked, made = list(links["drawn"]), links["made"]
    for used in links["used"]:
        if mark(used) not in linked:
            with contextlib.suppress(Exception):  # also recorded in the run's config
                run.use_artifact(reference(used))
                linked.append(mark(used))
    if made and mark(made) not in linked and (folder := Path(made["folder"])).is_dir():
        artifact = wandb.Artifact(made["name"], type=made["kind"], metadata=metadata(folder, made["hash"]))
        for file in sorted(folder.iterdir()):
            artifact.add_file(str(file), policy="immutable")  # no copy in W&B's staging directory
        run.log_artifact(artifact, aliases=["latest", made["hash"][:ALIAS_DIGITS]])
        linked.append(mark(made))
    return {**links, "drawn": linked}


def reference(used: Mapping[str, Any]) -> str:
    """Return `entity/project/name:hash`, without the entity and project if unknown."""
    run = used.get("run") or {}
    place = [str(run[key]) for key in ("entity", "project") if run.get(key)] if run.get("project") else []
    return "/".join([*place, mark(used)])


def metadata(folder: Path, hash: str) -> dict[str, Any]:
    """Return the W&B metadata of an artifact."""
    manifest = read_json(folder / MANIFEST)
    task, backbone, run = (manifest.get(key) or {} for key in ("task", "backbone", "run"))
    shown = {key: manifest[key] for key in SHOWN if manifest.get(key)}
    shown |= {key: run[key] for key in SHOWN_OF_RUN if run.get(key)}
    shown["backbone"] = {key: backbone.get(key) for key in ("name_or_path", "fingerprint")}
    return {"hash": hash, "folder": str(folder), "task": task.get("name"), **shown}


@contextlib.contextmanager
def staged_in(folder: Path | str) -> Iterator[None]:
    """Stage W&B artifact files in this directory instead of the home directory."""
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("WANDB_DATA_DIR")
        os.environ.update({} if before is None else {"WANDB_DATA_DIR": before})


CHECK_SECONDS = 5.0  # timeout of the server


class SyncError(Exception):
    """A run could not be uploaded or linked; later runs may still succeed."""


class ServerError(Exception):
    """The server fails or does not respond, so no run can be uploaded."""


def find_offline(folder: Path) -> list[Path]:
    """Return all offline runs below `folder`, `.../wandb/offline-run-TIME-ID`, in chronological order."""
    found = {path.parent for path in folder.rglob("*.wandb") if path.parent.name.startswith("offline-run-")}
    return sorted(found, key=lambda path: (path.name.split("-")[2], path))  # sort equal times by path


def is_uploaded(run: Path) -> bool:
    return bool(list(run.glob("*.wandb.synced")))


def open_links(run: Path) -> dict[str, Any] | None:
    """Return the links of a run if some are not yet linked, else None."""
    links = read_json(run.parent / FILE)
    return links if links and run.name.endswith(f"-{links['run']['id']}") and not_linked(links) else None


def check_connection() -> None:
    """Raise UserError without API key or connection, and ServerError if the server fails or does not respond."""
    import wandb

    os.environ.pop("WANDB_MODE", None)  # may be set to offline for training
    os.environ["WANDB_SILENT"] = "true"
    disable_error_reports()
    if (problem := missing_key()) is not None:
        raise UserError(f"nothing can be uploaded: {problem}")
    url = wandb.setup().settings.base_url
    try:
        urllib.request.urlopen(url, timeout=CHECK_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise ServerError(f"nothing can be uploaded: {url} responds with error {error.code}") from error
    except urllib.error.URLError as error:
        raise UserError(f"nothing can be uploaded: cannot connect to {url} ({error.reason})") from error
    except (OSError, HTTPException) as error:
        raise ServerError(f"nothing can be uploaded: {url} does not respond ({first_line(error)})") from error


def upload(run: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "wandb", "sync", str(run.absolute())]
    environment = {k: v for k, v in os.environ.items() if k not in ("WANDB_SERVICE", "WANDB_SILENT")}
    options: dict[str, Any] = {"env": environment, "stdin": subprocess.DEVNULL, "timeout": seconds}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "errors": "replace"}
    with tempfile.TemporaryDirectory() as here:  # W&B writes a log to the working directory
        try:
            done = subprocess.run(command, cwd=here, **options)
        except subprocess.TimeoutExpired as error:
            raise SyncError(f"not uploaded within {seconds:g} s; increase seconds=") from error
    if done.returncode != 0 or not is_uploaded(run):
        lines = [line.removeprefix("wandb: ").strip() for line in done.stdout.splitlines() if line.strip()]
        raise SyncError((lines or [f"wandb sync exited with {done.returncode}"])[-1])


def link_uploaded(run: Path) -> tuple[list[str], list[str]]:
    """Link an uploaded run. Returns the newly linked and the unlinked artifacts as `NAME:HASH`."""
    import wandb

    if (links := open_links(run)) is None:
        return [], []
    off = {"x_disable_stats": True, "x_disable_meta": True, "disable_git": True, "x_save_requirements": False}
    quiet = settings(WandbConfig().init_timeout, console="off", **off)
    known = {key: links["run"].get(key) for key in ("id", "project", "entity")}
    try:
        with tempfile.TemporaryDirectory() as here, staged_in(here):
            resumed = wandb.init(**known, resume="must", mode="online", dir=here, settings=quiet)
            try:
                after = link(resumed, links)
            finally:
                resumed.finish()
        write_json(run.parent / FILE, after)
    except Exception as error:
        raise SyncError(f"could not be linked ({first_line(error)})") from error
    return [one for one in after["drawn"] if one not in links["drawn"]], not_linked(after)
