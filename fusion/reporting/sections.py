"""The sections of the page as plain values for its template; groups are formatted by the template's filters."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fusion.errors import UserError
from fusion.reporting import figures
from fusion.reporting.ablation import ablation
from fusion.reporting.attention import Attention, Floats, by_target, layer_names
from fusion.reporting.contents import every_method
from fusion.reporting.packing import unpack
from fusion.reporting.results import Target
from fusion.reporting.scores import Score, Trained
from fusion.reporting.wording import anchor, chosen_setting
from fusion.store.rebuilding import rebuild_lines


def tallies(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """For each method, the number of targets by verdict, and the mean difference."""
    rows = []
    for method in every_method(targets):
        groups = [group for target in targets if (group := target.groups.get(method)) and group.difference]
        if groups:
            verdicts = [group.verdict for group in groups]
            counts = {name: verdicts.count(name) for name in ("better", "same", "worse", "unequal", "")}
            mean = float(np.mean([group.difference.mean for group in groups if group.difference]))
            rows.append({"method": method, "targets": len(groups), "counts": counts, "mean": mean})
    return rows


def optimistic(targets: Sequence[Target]) -> list[str]:
    """What was selected by scores on the shown rows, with the targets unless it is all."""
    by_choice: dict[str, list[str]] = {}
    for target in targets:
        if selected := target.selected_here:
            by_choice.setdefault(" and ".join(selected), []).append(target.label)
    return [
        selected + ("" if len(labels) == len(targets) else f" ({', '.join(labels)})")
        for selected, labels in by_choice.items()
    ]


def heatmap(one: Attention) -> dict[str, Any]:
    """Layers by sources, with the mean over the layers as the last row."""
    largest = float(max(one.mean.max(), 1e-9))
    names = [*layer_names(one.slots), "mean"]
    entropies = [""] * len(names) if one.entropy is None else [*(f"{e:.2f}" for e in one.entropy), ""]
    values = _cells(np.vstack([one.mean, one.overall]), largest)
    return {"attention": one, "rows": list(zip(names, values, entropies, strict=True))}


def _cells(matrix: Floats, largest: float) -> list[list[dict[str, Any] | None]]:
    """Text and percentage of the largest weight; None where there is no source."""

    def cell(value: float) -> dict[str, Any] | None:
        weight = 0 if math.isnan(value) else max(0, min(100, round(100 * value / largest)))
        return None if math.isnan(value) else {"text": f"{value:.2f}", "weight": weight}

    return [[cell(value) for value in row] for row in matrix.tolist()]


def sources_by_target(every: Sequence[Attention]) -> dict[str, Any] | None:
    """Figure 4: one matrix for the mean over the layers, and one for each layer, which a slider selects."""
    if not every:
        return None
    layers = max(len(one.slots) for one in every)
    rows, columns, mean = by_target(every)
    matrices = [mean, *(by_target(every, layer)[2] for layer in range(layers))]
    largest = max(1e-9, max(float(np.nanmax(matrix)) for matrix in matrices))
    longest = max(every, key=lambda one: len(one.slots))
    return {
        "columns": columns,
        "rows": list(zip(rows, [one.setting for one in every], _cells(mean, largest), strict=True)),
        "layers": _layers(longest.slots),
        "data": [
            [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in matrix] for matrix in matrices
        ],
        "largest": largest,
    }


def _layers(slots: Sequence[str]) -> list[str]:
    """The positions of a layer slider."""
    return ["all layers (mean)", *(f"layer {name}" for name in layer_names(slots))]


def inspected(target: Target, method: str, trained: Trained, inspection: dict[str, Any]) -> dict[str, Any]:
    """Token-level attention and source ablation of a fusion."""
    metric, full = next(iter(inspection["metrics"].items()))
    sources = [str(source) for source in inspection["sources"]]
    slots = [str(slot) for slot in inspection["slots"]]
    colours = [figures.colour(n) for n in range(len(sources))]
    rows = [row for one in inspection["words"] if (row := _word_row(one, slots, sources, colours))]
    changes = ablation(inspection, metric)
    return {
        "id": anchor("into", target.label, method),
        "title": f"{target.label} ← {method}",
        "name": trained.name,
        "setting": chosen_setting(target.groups[method]),
        "split": inspection["split"],
        "count": inspection["rows"],
        "metric": metric,
        "full": full,
        "sources": list(zip(sources, colours, strict=True)),
        "layers": _layers(slots),
        "rows": rows,
        "changes": changes,
        "figure": ("needed", target.label, method),
        "pruned": inspection.get("pruned") or [],
    }


def _word_row(
    row: dict[str, Any], slots: Sequence[str], sources: Sequence[str], colours: Sequence[str]
) -> dict[str, Any] | None:
    """A row with each token's strongest source over all layers, the first position of the slider."""
    tokens = [str(token) for token in row["tokens"]]
    try:
        mean = unpack(row["weights"], (len(slots), len(tokens), len(sources))).mean(0)
    except ValueError:
        return None
    return row | {
        "tokens": [
            {
                "text": token.strip() or token,
                "starts_word": token.startswith(" "),
                "special": place in row["special"],
                "colour": colours[mean[place].argmax()],
                "weight": round(100 * float(mean[place].max())),
            }
            for place, token in enumerate(tokens)
        ]
    }


def links(entry: Score, output: Path) -> dict[str, str]:
    """The addresses of a run's folders and of its W&B run, by text."""
    trained, made = entry.trained, {}
    if trained is not None:
        made[f"trained in {trained.run.folder}"] = _link(trained.run.folder, output)
    if trained is None or trained.run is not entry.run:
        made[f"evaluated in {entry.run.folder}"] = _link(entry.run.folder, output)
    tracked = None if trained is None or trained.manifest is None else trained.manifest.run.wandb
    url = tracked.get("url") if isinstance(tracked, dict) else None
    if isinstance(url, str) and url.startswith(("https://", "http://")):
        made["W&B"] = url
    return made


def _link(folder: Path, output: Path) -> str:
    return quote(os.path.relpath(folder, output.resolve().parent)) + "/"


def rebuilds(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """The commands that rebuild each artifact, with its versions, data and commit."""
    every = (one for target in targets for group in target.every_group for one in group.trained)
    return [_rebuild(one) for one in {one.artifact: one for one in every}.values()]


def _rebuild(trained: Trained) -> dict[str, Any]:
    lines = [shlex.join(["python", "-m", f"fusion.{trained.run.command}", *trained.run.overrides])]
    facts: dict[str, Any] = {}
    if (manifest := trained.manifest) is not None:
        store, git = Path(trained.artifact).parent, manifest.run.git
        with contextlib.suppress(UserError, OSError):
            lines = rebuild_lines(manifest, store, store)
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
        marks = manifest.data.fingerprints.items()
        facts["data"] = ", ".join(f"{split} {mark[:12]}" for split, mark in marks)
        facts["hash"] = manifest.hash[:12]
        if git is not None:
            facts["commit"] = f"{git.commit[:12]}{' with changes' if git.dirty else ''}"
    return {"name": trained.name, "lines": lines, "facts": facts}
