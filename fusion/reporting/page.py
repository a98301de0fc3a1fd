"""The report as one HTML file (no network, no external scripts, at most 5 MB), with figures and tables as files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

import fusion
from fusion.errors import UserError
from fusion.files import write_atomic
from fusion.reporting import figures, wording
from fusion.reporting.contents import Contents, costs, save_table, tables_of
from fusion.reporting.errors import MOST_CLASSES
from fusion.reporting.records import Attention, by_target, layer_names, slider_positions
from fusion.reporting.scores import Score, Trained
from fusion.reporting.statistics import LEVEL, RESAMPLES
from fusion.reporting.targets import BASELINE, Target, every_method
from fusion.store.listing import rebuild_lines
from fusion.text import shell_line

LARGEST = 5_000_000  # maximum size of the page in bytes
WORD_ROWS = (1000, 4, 1, 0)  # number of examples per fusion, reduced until the page is small enough
FILTERS = ("signed", "interval", "p_value", "number", "size", "mean_of", "seeds", "common_seeds")


def write_files(contents: Contents, folder: Path) -> list[Path]:
    """Write the figures as PNG and SVG, and the tables as CSV and LaTeX."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [path for table in tables_of(contents) for path in save_table(table, folder)]
    for name, (_, figure) in contents.figures.items():
        written += figures.save(figure, folder, wording.file_name(*name))
    return written


def write_page(contents: Contents, output: Path, about: Mapping[str, Any], files: Path | None) -> int:
    """Write the page and return its size in bytes. Raises UserError if it would exceed `LARGEST`.

    Args:
        about: `command`, `runs` and `made` (the time of creation), shown in the page.
        files: directory of the figures and tables, or `None` if they are not written.
    """
    template = _template(contents, output)
    matrix = sources_by_target(contents.attention)
    values = {"about": about, "files": files and os.path.relpath(files, output.parent), "by_target": matrix}
    for rows in WORD_ROWS:
        note = f"To stay below 5 MB, token-level attention is limited to {rows} examples per fusion."
        notes = [*contents.notes, *([] if rows == WORD_ROWS[0] else [note])]
        words = [one | {"rows": one["rows"][:rows]} for one in contents.inspected if one["rows"][:rows]]
        text = template.render(values, notes=notes, words=words, data=_script_data(words, matrix))
        if (size := len(text.encode())) <= LARGEST:
            write_atomic(output, text)
            return size
    raise UserError(f"{output}: the page would exceed 5 MB; select fewer runs with runs=[DIR,DIR]")


def _template(contents: Contents, output: Path) -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fusion.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    drawn = {
        name: figures.inline(figure, wording.anchor(*name), title)
        for name, (title, figure) in contents.figures.items()
        if name[0] in ("entropy", "needed", "curves", "cost", "labels", "reliability")
    }
    environment.filters |= {name: getattr(wording, name) for name in FILTERS}
    environment.globals |= {
        "version": fusion.__version__,
        "contents": contents,
        "level": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "baseline": BASELINE,
        "with_curves": [one for one in contents.everything if ("curves", one.label) in drawn],
        "some_chosen": any(group.others for target in contents.targets for group in target.groups.values()),
        "optimistic": optimistic(contents.targets),
        "tallies": tallies(contents.targets),
        "rebuilds": rebuilds(contents.everything),
        "costs": costs,
        "most_classes": MOST_CLASSES,
        "figure": drawn.get,
        "group_anchor": wording.group_anchor,
        "layer_names": layer_names,
        "links": lambda entry: links(entry, output),
    }
    return environment.get_template("report.html")


def _script_data(words: list[dict[str, Any]], by_target: dict[str, Any] | None) -> dict[str, Any]:
    read = {
        one["id"]: {"sources": one["sources"], "layers": one["layers"], "weights": [r["weights"] for r in one["rows"]]}
        for one in words
    }
    return {"words": read, "byTarget": by_target and {k: by_target[k] for k in ("layers", "data", "largest")}}


def tallies(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return, for each method, the number of targets by verdict and the mean difference."""
    rows = []
    for method in every_method(targets):
        groups = [group for target in targets if (group := target.groups.get(method)) and group.difference]
        if groups:
            verdicts = [group.verdict for group in groups]
            counts = [verdicts.count(name) for name in ("better", "same", "worse", "unequal", "")]
            mean = float(np.mean([group.difference.mean for group in groups if group.difference]))
            rows.append({"method": method, "counts": counts, "mean": mean})
    return rows


def optimistic(targets: Sequence[Target]) -> list[str]:
    """Describe the selections made on the reported examples, with the labels of the targets unless all are affected."""
    by_choice: dict[str, list[str]] = {}
    for target in targets:
        if selected := target.selected_here:
            by_choice.setdefault(" and ".join(selected), []).append(target.label)
    return [
        selected + ("" if len(labels) == len(targets) else f" ({', '.join(labels)})")
        for selected, labels in by_choice.items()
    ]


def sources_by_target(every: Sequence[Attention]) -> dict[str, Any] | None:
    """Return the `by_target` matrices for the layer slider: the mean over the layers, then each layer."""
    if not every:
        return None
    longest = max(every, key=lambda one: len(one.slots))
    rows, columns, mean = by_target(every)
    matrices = np.stack([mean, *(by_target(every, layer)[2] for layer in range(len(longest.slots)))])
    data = [[[None if np.isnan(v) else round(v, 3) for v in row] for row in matrix] for matrix in matrices.tolist()]
    return {
        "columns": columns,
        "rows": list(zip(rows, [one.setting for one in every], mean.tolist(), strict=True)),
        "layers": slider_positions(longest.slots),
        "data": data,
        "largest": max(1e-9, float(np.nanmax(matrices))),
    }


def links(entry: Score, output: Path) -> dict[str, str]:
    """Return the links to a run's folders and its W&B run, by link text."""
    trained = entry.trained
    runs = {} if trained is None else {"trained": trained.run}
    if trained is None or trained.run is not entry.run:
        runs["evaluated"] = entry.run
    made = {
        f"{done} in {run.folder}": quote(os.path.relpath(run.folder, output.resolve().parent)) + "/"
        for done, run in runs.items()
    }
    tracked = None if trained is None or trained.manifest is None else trained.manifest.run.wandb
    if (url := str((tracked or {}).get("url"))).startswith(("https://", "http://")):
        made["W&B"] = url
    return made


def rebuilds(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Return the commands that reproduce each artifact, with its versions, data and commit."""
    every = (one for target in targets for group in target.every_group for one in group.trained)
    return [_rebuild(one) for one in {one.artifact: one for one in every}.values()]


def _rebuild(trained: Trained) -> dict[str, Any]:
    lines = [shell_line(trained.run.command, trained.run.overrides)]
    facts: dict[str, Any] = {}
    if (manifest := trained.manifest) is not None:
        store, git = Path(trained.artifact).parent, manifest.run.git
        with contextlib.suppress(UserError, OSError):
            lines = rebuild_lines(manifest, store, store)
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        facts["data"] = ", ".join(f"{split} {mark[:12]}" for split, mark in manifest.data.fingerprints.items())
        facts["hash"] = manifest.hash[:12]
        if git is not None:
            facts["commit"] = f"{git.commit[:12]}{' with uncommitted changes' if git.dirty else ''}"
    return {"name": trained.name, "lines": lines, "facts": facts}
