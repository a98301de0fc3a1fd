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
from fusion.reporting.contents import Contents, costs, every_method
from fusion.reporting.packing import unpack
from fusion.reporting.results import Group, Target
from fusion.reporting.scores import Score
from fusion.reporting.trained import Trained
from fusion.reporting.wording import anchor, chosen_setting, chosen_settings, group_anchor, titled
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
    return [
        [
            None
            if math.isnan(value)
            else {"text": f"{value:.2f}", "weight": max(0, min(100, round(100 * value / largest)))}
            for value in row
        ]
        for row in matrix
    ]


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
            [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in matrix]
            for matrix in matrices
        ],
        "largest": largest,
    }


def _layers(slots: Sequence[str]) -> list[str]:
    """The positions of a layer slider."""
    return ["all layers (mean)", *(f"layer {name}" for name in layer_names(slots))]


def entropy(every: Sequence[Attention]) -> Any:
    if not any(one.entropy is not None and one.max_entropy > 0 for one in every):
        return None
    title = "Entropy of the attention in each layer, the mean over tokens, relative to uniform attention"
    return figures.inline(figures.entropy_figure(every), "entropy", title)


def inspected(target: Target, method: str, trained: Trained, inspection: dict[str, Any]) -> dict[str, Any]:
    """Token-level attention and source ablation of a fusion."""
    metric, full = next(iter(inspection["metrics"].items()))
    sources = [str(source) for source in inspection["sources"]]
    slots = [str(slot) for slot in inspection["slots"]]
    colours = [figures.colour(n) for n in range(len(sources))]
    rows = [row for one in inspection["words"] if (row := _word_row(one, slots, sources, colours))]
    changes = ablation(inspection, metric)
    picture = None
    if changes:
        title = f"Score without each source, and with fewer and fewer, {target.label}"
        name = anchor("needed", target.label, method)
        steps = [(len(step["kept"]), step["metrics"][metric]) for step in inspection.get("pruned") or []]
        picture = figures.inline(figures.pruning_figure(metric, changes, steps, stacked=True), name, title)
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
        "data": {
            "sources": sources,
            "colours": colours,
            "layers": len(slots),
            "rows": [{"weights": row["weights"], "tokens": len(row["tokens"])} for row in rows],
        },
        "changes": changes,
        "picture": picture,
        "pruned": inspection.get("pruned") or [],
    }


def at_most(one: dict[str, Any], rows: int) -> dict[str, Any]:
    """An inspected fusion with at most so many rows of token-level attention."""
    return one | {"rows": one["rows"][:rows], "data": one["data"] | {"rows": one["data"]["rows"][:rows]}}


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


def curves(contents: Contents) -> list[dict[str, Any]]:
    made = []
    for target, shown in contents.curves:
        title = f"{', '.join(shown)} over the steps, {target.label}"
        figure = figures.curves_figure(shown, list(target.groups), columns=1)
        picture = figures.inline(figure, anchor("curves", target.label), title)
        methods = [method for of_metric in shown.values() for method in of_metric]
        made.append({"target": target, "settings": chosen_settings(target, methods), "picture": picture})
    return made


def cost(target: Target) -> dict[str, Any]:
    rows, picture = costs(target), None
    if any(row["parameters"] or row["seconds"] for row in rows):
        title = f"Score against parameters and seconds, {target.label}"
        figure = figures.cost_figure(rows, target.label, target.metric, stacked=True)
        picture = figures.inline(figure, anchor("cost", target.label), title)
    return {"target": target, "rows": rows, "picture": picture}


def runs(targets: Sequence[Target], output: Path) -> list[dict[str, Any]]:
    """The runs of each group, with links to their folders."""
    return [
        {
            "anchor": group_anchor(target, group),
            "title": f"{target.label} · {titled(group)}",
            "runs": [_run(group, entry, output) for entry in group.entries],
        }
        for target in targets
        for group in target.every_group
    ]


def _run(group: Group, entry: Score, output: Path) -> dict[str, Any]:
    trained = entry.trained
    tracked = None if trained is None or trained.manifest is None else trained.manifest.run.wandb
    url = tracked.get("url") if isinstance(tracked, dict) else None
    folders = [] if trained is None else [("trained", trained.run.folder)]
    if trained is None or trained.run is not entry.run:
        folders.append(("evaluated", entry.run.folder))
    return {
        "name": trained.name if trained is not None else entry.run.result.get("name"),
        "diverged": trained is not None and bool(trained.run.result.get("diverged")),
        "seed": entry.seed,
        "score": entry.metrics[group.metric],
        "folders": [(what, _link(folder, output), str(folder)) for what, folder in folders],
        "url": url if isinstance(url, str) and url.startswith(("https://", "http://")) else None,
    }


def _link(folder: Path, output: Path) -> str:
    return quote(os.path.relpath(folder, output.resolve().parent)) + "/"


def rebuilds(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """The commands that rebuild each artifact, with its versions, data and commit."""
    every = (one for target in targets for group in target.every_group for one in group.trained)
    return [_rebuild(one) for one in {one.artifact: one for one in every}.values()]


def _rebuild(trained: Trained) -> dict[str, Any]:
    lines = [shlex.join(["python", "-m", f"fusion.{trained.run.command}", *trained.run.overrides])]
    facts: dict[str, Any] = {"seed": trained.seed}
    if (manifest := trained.manifest) is not None:
        folder, git = Path(trained.artifact), manifest.run.git
        with contextlib.suppress(UserError, OSError):
            lines = rebuild_lines(manifest, folder.parent, folder.parent)
        marks = manifest.data.fingerprints.items()
        facts |= {
            "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
            "data": ", ".join(f"{split} {mark[:12]}" for split, mark in marks),
            "hash": manifest.hash[:12],
        }
        if git is not None:
            facts["commit"] = f"{git.commit[:12]}{' with changes' if git.dirty else ''}"
    return {"name": trained.name, "lines": lines, "facts": facts}
