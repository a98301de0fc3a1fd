"""The sections of the page as plain values, which its template lays out."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import UserError
from fusion.reporting import figures
from fusion.reporting.attention import Attention, by_target, layer_names
from fusion.reporting.contents import Contents, ablation, chosen_settings, costs
from fusion.reporting.curves import Curve
from fusion.reporting.packing import unpack
from fusion.reporting.results import BASELINE, Group, Target, Trained, order_of
from fusion.reporting.statistics import LEVEL, Difference
from fusion.reporting.wording import (
    anchor,
    chosen_setting,
    interval,
    p_value,
    score,
    seeds,
    signed,
    titled,
)
from fusion.store.rebuilding import rebuild_lines

SIGNIFICANT = 1 - LEVEL


def every_method(targets: Sequence[Target]) -> list[str]:
    """All methods of all targets, in one order."""
    return sorted({method for target in targets for method in target.groups}, key=order_of)


def helped(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Of each target a row for each method with each of its settings, the highest score first."""
    made = []
    for target in targets:
        groups = sorted(target.every_group, key=lambda group: -group.mean)
        made.append(
            {
                "target": target,
                "rows": [_result_row(target, group, group.mean == groups[0].mean) for group in groups],
                "constant": [(metric, f"{value:.3f}") for metric, value in target.constant.items()],
            }
        )
    return made


def _result_row(target: Target, group: Group, best: bool) -> dict[str, Any]:
    difference = group.difference
    chosen = target.groups[group.method] is group
    return {
        "method": group.method,
        "settings": group.differing,
        "chosen": f"best on {group.chosen_on}" if chosen and group.others else "",
        "baseline": group.method == BASELINE and chosen,
        "best": best,
        "score": f"{group.mean:.3f}",
        "deviation": None if group.deviation is None else f"{group.deviation:.3f}",
        "others": [(m, _scores(values)) for m in target.metrics[1:] if (values := group.scores_by(m))],
        "seeds": seeds(group),
        "difference": None if difference is None else signed(difference.mean),
        "interval": interval(difference),
        "common": _common_seeds(group),
        "against": _against(target, group),
        "verdict": _verdict(group),
        "unequal": "; ".join(group.unequal),
        "anchor": anchor_of(target, group),
    }


def _scores(values: Sequence[float]) -> str:
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _common_seeds(group: Group) -> str:
    """Of how many seeds a difference is, where that is not all of both: the means beside it are of others too."""
    if group.difference is None or group.against is None:
        return ""
    pairs = group.difference.pairs
    if pairs in (0, max(len(group.entries), len(group.against.entries))):
        return ""
    return f"of the {pairs} seeds in both" if pairs > 1 else "of the one seed in both"


def _against(target: Target, group: Group) -> str:
    """Which of the baseline's settings, where that is not the one that is chosen."""
    other = group.against
    return "" if other is None or other is target.groups[BASELINE] else other.differing


def anchor_of(target: Target, group: Group) -> str:
    chosen = target.groups[group.method] is group
    return anchor(target.label, group.method, *([] if chosen else [group.key]))


def _verdict(group: Group) -> str:
    """better, worse or no difference shown, after Holm's correction; unequal: not at equal budget; empty: not tested."""
    difference, p = group.difference, group.adjusted
    if difference is None:
        return ""
    if group.unequal:
        return "unequal"
    if p is None:
        return ""
    if p > SIGNIFICANT:
        return "same"
    return "better" if difference.mean > 0 else "worse"


def details(targets: Sequence[Target]) -> list[dict[str, Any]]:
    rows = []
    for target in targets:
        for group in target.every_group:
            difference = group.difference
            rows.append(
                {
                    "target": target.label,
                    "method": group.method,
                    "anchor": anchor_of(target, group),
                    "group": group,
                    "score": score(group),
                    "seeds": seeds(group),
                    "difference": None if difference is None else signed(difference.mean),
                    "interval": interval(difference),
                    "common": _common_seeds(group),
                    "p": None if difference is None or difference.p is None else p_value(difference.p),
                    "adjusted": None if group.adjusted is None else p_value(group.adjusted),
                    "counts": ""
                    if difference is None
                    else f"{difference.wins} / {difference.ties} / {difference.losses}",
                    "unit": "" if difference is None else difference.unit,
                    "verdict": _verdict(group),
                    "unequal": "; ".join(group.unequal),
                }
            )
    return rows


def tallies(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Of each method, over the targets: how often it is better, no different, worse, and by how much on average."""
    rows = []
    for method in every_method(targets):
        having = [group for target in targets if (group := target.groups.get(method)) and group.difference]
        if not having:
            continue
        verdicts = [_verdict(group) for group in having]
        rows.append(
            {
                "method": method,
                "targets": len(having),
                "wins": verdicts.count("better"),
                "ties": verdicts.count("same"),
                "losses": verdicts.count("worse"),
                "unequal": verdicts.count("unequal"),
                "untested": verdicts.count(""),
                "mean": signed(
                    float(np.mean([group.difference.mean for group in having if group.difference]))
                ),
            }
        )
    return rows


def heatmap(one: Attention) -> dict[str, Any]:
    largest = float(max(one.mean.max(), 1e-9))
    rows = []
    for number, layer in enumerate(layer_names(one.slots)):
        cells = [_heat_cell(value, largest) for value in one.mean[number]]
        entropy = None if one.entropy is None else f"{one.entropy[number]:.2f}"
        rows.append({"layer": layer, "cells": cells, "entropy": entropy})
    rows.append(
        {"layer": "mean", "cells": [_heat_cell(value, largest) for value in one.overall], "entropy": None}
    )
    return {"attention": one, "rows": rows, "most": f"{one.most:.2f}"}


def _heat_cell(value: float, largest: float) -> dict[str, Any]:
    return {"text": f"{value:.2f}", "weight": max(0, min(100, round(100 * value / largest)))}


def sources_by_target(every: Sequence[Attention]) -> dict[str, Any] | None:
    """Figure 4: one matrix for the mean over the layers, and one for each layer, which a slider picks."""
    if not every:
        return None
    layers = max(len(one.slots) for one in every)
    rows, columns, mean = by_target(every)
    matrices = [mean, *(by_target(every, layer)[2] for layer in range(layers))]
    largest = max(1e-9, max(float(np.nanmax(matrix)) for matrix in matrices))
    longest = max(every, key=lambda one: len(one.slots))
    return {
        "columns": columns,
        "rows": [
            {
                "name": name,
                "setting": every[n].setting,
                "cells": [None if math.isnan(v) else _heat_cell(v, largest) for v in mean[n]],
            }
            for n, name in enumerate(rows)
        ],
        "layers": ["all layers (mean)", *(f"layer {name}" for name in layer_names(longest.slots))],
        "data": [
            [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in matrix]
            for matrix in matrices
        ],
        "largest": largest,
    }


def entropy(every: Sequence[Attention]) -> Any:
    if not any(one.entropy is not None and one.most > 0 for one in every):
        return None
    title = "Entropy of the attention in each layer, the mean over tokens, relative to even attention"
    return figures.inline(figures.entropy_figure(every), "entropy", title)


def looked_into(target: Target, method: str, trained: Trained, inspection: dict[str, Any]) -> dict[str, Any]:
    metric, full = next(iter(inspection["metrics"].items()))
    identifier = anchor("into", target.label, method)
    sources = [str(source) for source in inspection["sources"]]
    slots = [str(slot) for slot in inspection["slots"]]
    colours = [figures.PALETTE[n % len(figures.PALETTE)] for n in range(len(sources))]
    every = [_word_row(row, slots, sources, colours) for row in inspection["words"]]
    rows = [row for row in every if row is not None]
    differences = ablation(inspection, metric)
    masked = [
        {
            "source": source,
            "without": f"{one['metrics'][metric]:.4f}",
            "change": signed(one["metrics"][metric] - full, 4),
            "interval": interval(differences[source], 4),
            "sign": _sign(differences[source]),
        }
        for source, one in inspection["masked"].items()
    ]
    picture = None
    if masked:
        title = f"Score without each source, and with fewer and fewer, {target.label}"
        picture = figures.inline(
            figures.pruning_figure(inspection, stacked=True), anchor("needed", target.label, method), title
        )
    return {
        "id": identifier,
        "title": f"{target.label} ← {method}",
        "name": trained.name,
        "setting": chosen_setting(target.groups[method]),
        "split": inspection["split"],
        "count": inspection["rows"],
        "metric": metric,
        "full": f"{full:.4f}",
        "sources": list(zip(sources, colours, strict=True)),
        "layers": ["all layers (mean)", *(f"layer {name}" for name in layer_names(slots))],
        "rows": rows,
        "data": {
            "sources": sources,
            "colours": colours,
            "layers": len(slots),
            "rows": [{"weights": row["weights"], "tokens": len(row["tokens"])} for row in rows],
        },
        "needed": bool(masked),
        "masked": masked,
        "picture": picture,
        "pruned": [
            {
                "count": len(step["kept"]),
                "kept": ", ".join(step["kept"]),
                "score": f"{step['metrics'][metric]:.4f}",
            }
            for step in inspection.get("pruned") or []
        ],
    }


def _sign(difference: Difference) -> str:
    """The colour of a difference: none where its interval holds zero, or there is none."""
    if not difference.conclusive:
        return "same"
    return "better" if difference.mean > 0 else "worse"


def at_most(one: dict[str, Any], rows: int) -> dict[str, Any]:
    """What was looked into, with at most so many rows word by word."""
    return one | {"rows": one["rows"][:rows], "data": one["data"] | {"rows": one["data"]["rows"][:rows]}}


def _word_row(
    row: dict[str, Any], slots: Sequence[str], sources: Sequence[str], colours: Sequence[str]
) -> dict[str, Any] | None:
    """A row with each token's strongest source over all layers, as it stands before the slider is touched."""
    tokens = [str(token) for token in row["tokens"]]
    try:
        mean = unpack(row["weights"], (len(slots), len(tokens), len(sources))).mean(0)
    except ValueError:
        return None
    special = set(row["special"])
    strongest = mean.argmax(-1)
    return {
        "number": row["row"],
        "predicted": row["predicted"],
        "truth": row["truth"],
        "right": row["right"],
        "weights": row["weights"],
        "tokens": [
            {
                "text": token.strip() or token,
                "begins": token.startswith(" "),
                "special": place in special,
                "colour": colours[strongest[place]],
                "weight": round(100 * float(mean[place].max())),
            }
            for place, token in enumerate(tokens)
        ],
    }


def curves(contents: Contents) -> list[dict[str, Any]]:
    made = []
    for target, shown in contents.curves:
        title = f"{', '.join(shown)} over the steps, {target.label}"
        picture = figures.curves_figure(shown, list(target.groups), columns=1)
        made.append(
            {
                "target": target.label,
                "settings": chosen_settings(target, curve_methods(shown)),
                "picture": figures.inline(picture, anchor("curves", target.label), title),
            }
        )
    return made


def curve_methods(shown: Mapping[str, Sequence[Curve]]) -> list[str]:
    return [curve.method for of_metric in shown.values() for curve in of_metric]


def optimistic(targets: Sequence[Target]) -> list[str]:
    """Of the targets whose scores are on rows that chose something: what was chosen, and which targets, if not all."""
    by_choice: dict[str, list[str]] = {}
    for target in targets:
        if chosen := target.chosen_here:
            by_choice.setdefault(" and ".join(chosen), []).append(target.label)
    return [
        chosen + ("" if len(labels) == len(targets) else f" ({', '.join(labels)})")
        for chosen, labels in by_choice.items()
    ]


def cost(target: Target) -> dict[str, Any]:
    rows = costs(target)
    picture = None
    if any(row["parameters"] or row["seconds"] for row in rows):
        title = f"Score against parameters and seconds, {target.label}"
        picture = figures.inline(
            figures.cost_figure(target, rows, stacked=True), anchor("cost", target.label), title
        )
    return {"target": target.label, "metric": target.metric, "rows": rows, "picture": picture}


def runs(targets: Sequence[Target], output: Path) -> list[dict[str, Any]]:
    """Of each cell the runs behind it, with links to their folders."""
    made = []
    for target in targets:
        for group in target.every_group:
            runs = []
            for entry in group.entries:
                trained = entry.trained
                manifest = None if trained is None else trained.manifest
                tracked = None if manifest is None else manifest.run.wandb
                url = tracked.get("url") if isinstance(tracked, dict) else None
                folders = (
                    [("scored", entry.run.folder)] if trained is None or trained.run is not entry.run else []
                )
                if trained is not None:
                    folders.insert(0, ("trained", trained.run.folder))
                runs.append(
                    {
                        "name": trained.name if trained is not None else entry.run.result.get("name"),
                        "diverged": trained is not None and bool(trained.run.result.get("diverged")),
                        "seed": entry.seed,
                        "score": f"{entry.metrics[group.metric]:.4f}",
                        "folders": [(what, _link(folder, output), str(folder)) for what, folder in folders],
                        "url": url
                        if isinstance(url, str) and url.startswith(("https://", "http://"))
                        else None,
                    }
                )
            made.append(
                {
                    "anchor": anchor_of(target, group),
                    "title": f"{target.label} · {titled(group)}",
                    "runs": runs,
                }
            )
    return made


def _link(folder: Path, output: Path) -> str:
    from urllib.parse import quote

    return quote(os.path.relpath(folder, output.resolve().parent)) + "/"


def rebuilds(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Of each artifact the commands that make it anew, what with and on which data."""
    made: dict[str, dict[str, Any]] = {}
    for target in targets:
        for group in target.every_group:
            for trained in group.trained:
                if trained.artifact not in made:
                    made[trained.artifact] = _rebuild(trained)
    return list(made.values())


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
