"""One HTML file: what the runs gave, as a person reads it. No network, no script from elsewhere, at most 5 MB."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import fusion
from fusion.errors import UserError
from fusion.packing import unpack
from fusion.review.report import figures, tables
from fusion.review.report.attention import Attention, attention_of, by_target, layer_names
from fusion.review.report.curves import Curve, curves_of
from fusion.review.report.reading import Found
from fusion.review.report.results import BASELINE, Group, Target, Trained, order_of
from fusion.review.report.statistics import LEVEL, RESAMPLES, Difference
from fusion.store.rebuilding import rebuild_lines

LARGEST = 5_000_000  # bytes of the page
SIGNIFICANT = 1 - LEVEL
WORD_ROWS = (1000, 4, 1, 0)  # of each fusion, tried in turn until the page is small enough


@dataclass
class Contents:
    """What the page and the files beside it are made of.

    targets: those with several methods, or all if there are none. single: the others, such as the tasks that the
    sources come from.
    """

    found: Found
    targets: list[Target]
    single: list[Target]
    attention: list[Attention]
    notes: list[str] = field(default_factory=list)

    @property
    def everything(self) -> list[Target]:
        return [*self.targets, *self.single]

    @property
    def inspected(self) -> list[tuple[Target, str, Trained, dict[str, Any]]]:
        """Of each method of each target the first run that was looked into."""
        seen = []
        for target in self.everything:
            for method, group in target.groups.items():
                for trained in group.trained:
                    inspection = self.found.inspections.get(trained.hash or "")
                    if inspection is not None and _is_whole(inspection):
                        seen.append((target, method, trained, inspection))
                        break
        return seen


def contents_of(found: Found, targets: list[Target], notes: Sequence[str] = ()) -> Contents:
    several = [target for target in targets if len(target.groups) > 1] or targets
    single = [target for target in targets if target not in several]
    return Contents(found, several, single, attention_of([*several, *single], found), list(notes))


def write_page(contents: Contents, output: Path, about: Mapping[str, Any], files: Path | None) -> int:
    """Writes the page whole or not at all, and gives its bytes.

    Args:
        about: what its head says: `command`, `runs`, `made`.
        files: the folder of the figures and tables, which the page names; None: there are none.

    Raises:
        OSError: it cannot be written.
    """
    text = ""
    for most_rows in WORD_ROWS:
        notes = list(contents.notes)
        if most_rows != WORD_ROWS[0]:
            notes.append(
                f"To stay below 5 MB, at most {most_rows} rows of each fusion are shown word by word."
            )
        text = _render(contents, output, about, files, most_rows, notes)
        if len(text.encode()) <= LARGEST:
            break
    else:
        raise UserError(
            f"{output}: the page would have more than 5 MB; make a report of fewer runs: runs=[DIR,ANOTHER]"
        )
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
    return len(text.encode())


def write_files(contents: Contents, folder: Path) -> list[Path]:
    """The figures as PNG and SVG, the tables as CSV and LaTeX.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [path for table in tables_of(contents) for path in tables.save(table, folder)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        for name, figure in figures_of(contents):
            written += figures.save(figure, folder, name)
    return written


def figures_of(contents: Contents) -> list[tuple[str, Any]]:
    """Every figure with the name of its files."""
    made: list[tuple[str, Any]] = []
    if contents.targets:
        made.append(("scores", figures.scores_figure(contents.targets)))
    for one in contents.attention:
        made.append((_file_name("attention", one.target, one.method), figures.attention_figure(one)))
    if contents.attention:
        made.append(("attention-by-target", figures.by_target_figure(contents.attention)))
        if any(one.entropy is not None for one in contents.attention):
            made.append(("entropy", figures.entropy_figure(contents.attention)))
    for target, method, _, inspection in contents.inspected:
        if inspection["masked"]:
            made.append((_file_name("needed", target.label, method), figures.pruning_figure(inspection)))
    for target in contents.everything:
        if shown := _shown_curves(target, contents.found):
            made.append(
                (_file_name("curves", target.label), figures.curves_figure(shown, list(target.groups)))
            )
        made.append((_file_name("cost", target.label), figures.cost_figure(target, _costs(target))))
    return made


def tables_of(contents: Contents) -> list[tables.Table]:
    """Every table that stands in the page."""
    methods = _methods(contents.targets)
    header = ("target", "metric", "split", *methods)
    rows, shown = [], []
    for target in contents.targets:
        groups = [target.groups.get(method) for method in methods]
        rows.append(
            [target.label, target.metric, target.split, *(None if g is None else g.mean for g in groups)]
        )
        shown.append(
            [target.label, target.metric, target.split, *("--" if g is None else _score(g) for g in groups)]
        )
    made = [tables.Table("scores", "Mean and standard deviation over the seeds", header, rows, shown)]
    header = (
        "target",
        "method",
        "settings",
        "seeds",
        "mean",
        "sd",
        "difference",
        "low",
        "high",
        "p",
        "p (Holm)",
    )
    header += ("wins", "ties", "losses", "over")
    rows = []
    for target in contents.targets:
        for method, group in target.groups.items():
            d = target.differences.get(method)
            rest: list[Any] = [None] * 9
            if d is not None:
                rest = [
                    d.mean,
                    d.low,
                    d.high,
                    d.p,
                    target.adjusted.get(method),
                    d.wins,
                    d.ties,
                    d.losses,
                    d.unit,
                ]
            rows.append(
                [target.label, method, group.differing, len(group.scores), group.mean, group.deviation, *rest]
            )
    made.append(tables.Table("differences", f"Differences to the {BASELINE}", header, rows))
    for one in contents.attention:
        made.append(
            tables.Table(
                _file_name("attention", one.target, one.method),
                f"Mean attention, {one.target} <- {one.method}, {one.runs} runs",
                ("layer", *one.sources, "entropy"),
                [
                    [layer, *map(float, one.mean[n]), None if one.entropy is None else float(one.entropy[n])]
                    for n, layer in enumerate(layer_names(one.slots))
                ],
            )
        )
    rows = []
    for target, method, trained, inspection in contents.inspected:
        metric, full = next(iter(inspection["metrics"].items()))
        for source, one in inspection["masked"].items():
            without = one["metrics"][metric]
            rows.append([target.label, method, trained.name, source, metric, full, without, without - full])
    header = ("target", "method", "artifact", "source", "metric", "with it", "without it", "change")
    made.append(tables.Table("needed", "Each source masked in turn, nothing trained again", header, rows))
    header = (
        "target",
        "method",
        "score",
        "parameters that train",
        "stored bytes",
        "seconds",
        "tokens per second",
    )
    header += ("peak memory bytes", "energy (J)")
    keys = ("score", "parameters", "bytes", "seconds", "tokens", "memory", "energy")
    rows = [
        [t.label, row["method"], *(row[key] for key in keys)] for t in contents.targets for row in _costs(t)
    ]
    made.append(tables.Table("cost", "Cost, means over the seeds", header, rows))
    return made


def _render(
    contents: Contents,
    output: Path,
    about: Mapping[str, Any],
    files: Path | None,
    most_rows: int,
    notes: Sequence[str],
) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fusion.review.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["bytes"] = _bytes
    looked_into = [_looked_into(*one, most_rows) for one in contents.inspected]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        return environment.get_template("report.html").render(
            about=about,
            version=fusion.__version__,
            notes=notes,
            found=contents.found,
            level=f"{LEVEL:.0%}",
            resamples=f"{RESAMPLES:,}",
            baseline=BASELINE,
            helped=_helped(contents.targets, output),
            details=_details(contents.targets),
            tallies=_tallies(contents.targets),
            heatmaps=[_heat(one) for one in contents.attention],
            by_target=_by_target(contents.attention),
            entropy=_entropy(contents.attention),
            words=[one for one in looked_into if one["rows"]],
            words_data={one["id"]: one["data"] for one in looked_into if one["rows"]},
            needed=[one for one in looked_into if one["needed"]],
            curves=_curves(contents),
            cost=[_cost(target) for target in contents.targets],
            single=_details(contents.single),
            groups=_runs(contents.everything, output),
            rebuilds=_rebuilds(contents.everything),
            files=None if files is None else os.path.relpath(files, output.parent),
        )


# --- what helped -----------------------------------------------------------------------------------


def _methods(targets: Sequence[Target]) -> list[str]:
    """All methods of all targets, in one order."""
    return sorted({method for target in targets for method in target.groups}, key=order_of)


def _helped(targets: Sequence[Target], output: Path) -> dict[str, Any]:
    methods = _methods(targets)
    rows = []
    for target in targets:
        best = max(group.mean for group in target.groups.values())
        cells: list[dict[str, Any] | None] = []
        for method in methods:
            group = target.groups.get(method)
            if group is None:
                cells.append(None)
                continue
            difference = target.differences.get(method)
            cells.append(
                {
                    "score": f"{group.mean:.3f}",
                    "deviation": None if group.deviation is None else f"{group.deviation:.3f}",
                    "seeds": len(group.scores),
                    "best": group.mean == best,
                    "difference": None if difference is None else _signed(difference.mean),
                    "verdict": _verdict(target, method),
                    "anchor": _anchor(target.label, method),
                    "others": group.others,
                    "differing": group.differing,
                }
            )
        rows.append({"target": target, "cells": cells})
    return {"methods": methods, "rows": rows}


def _verdict(target: Target, method: str) -> str:
    """better, worse or no difference shown, after Holm's correction; empty where nothing was tested."""
    difference, p = target.differences.get(method), target.adjusted.get(method)
    if difference is None or p is None:
        return ""
    if p > SIGNIFICANT:
        return "same"
    return "better" if difference.mean > 0 else "worse"


def _details(targets: Sequence[Target]) -> list[dict[str, Any]]:
    rows = []
    for target in targets:
        for method, group in target.groups.items():
            difference = target.differences.get(method)
            rows.append(
                {
                    "target": target.label,
                    "method": method,
                    "anchor": _anchor(target.label, method),
                    "group": group,
                    "score": _score(group),
                    "difference": None if difference is None else _signed(difference.mean),
                    "interval": _interval(difference),
                    "p": None if difference is None or difference.p is None else _p(difference.p),
                    "adjusted": None if method not in target.adjusted else _p(target.adjusted[method]),
                    "counts": ""
                    if difference is None
                    else f"{difference.wins} / {difference.ties} / {difference.losses}",
                    "unit": "" if difference is None else difference.unit,
                    "verdict": _verdict(target, method),
                    "rest": [one for one in target.variants[method] if one is not group],
                }
            )
    return rows


def _tallies(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Of each method, over the targets: how often it is better, no different, worse, and by how much on average."""
    rows = []
    for method in _methods(targets):
        having = [target for target in targets if method in target.differences]
        if not having:
            continue
        verdicts = [_verdict(target, method) for target in having]
        rows.append(
            {
                "method": method,
                "targets": len(having),
                "wins": verdicts.count("better"),
                "ties": verdicts.count("same"),
                "losses": verdicts.count("worse"),
                "untested": verdicts.count(""),
                "mean": _signed(float(np.mean([target.differences[method].mean for target in having]))),
            }
        )
    return rows


# --- who was listened to ---------------------------------------------------------------------------


def _heat(one: Attention) -> dict[str, Any]:
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


def _by_target(every: Sequence[Attention]) -> dict[str, Any] | None:
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
            {"name": name, "cells": [None if math.isnan(v) else _heat_cell(v, largest) for v in mean[n]]}
            for n, name in enumerate(rows)
        ],
        "layers": ["all layers (mean)", *(f"layer {name}" for name in layer_names(longest.slots))],
        "data": [
            [[None if math.isnan(v) else round(float(v), 3) for v in row] for row in matrix]
            for matrix in matrices
        ],
        "largest": largest,
    }


def _entropy(every: Sequence[Attention]) -> Any:
    if not any(one.entropy is not None and one.most > 0 for one in every):
        return None
    title = "Entropy of the attention in each layer, as a share of what even attention would have"
    return figures.inline(figures.entropy_figure(every), "entropy", title)


# --- word by word, and is it needed ----------------------------------------------------------------


def _looked_into(
    target: Target, method: str, trained: Trained, inspection: dict[str, Any], most_rows: int
) -> dict[str, Any]:
    metric, full = next(iter(inspection["metrics"].items()))
    identifier = _anchor("into", target.label, method)
    sources = [str(source) for source in inspection["sources"]]
    slots = [str(slot) for slot in inspection["slots"]]
    colours = [figures.PALETTE[n % len(figures.PALETTE)] for n in range(len(sources))]
    every = [_word_row(row, slots, sources, colours) for row in inspection["words"][:most_rows]]
    rows = [row for row in every if row is not None]
    masked = [
        {
            "source": source,
            "without": f"{one['metrics'][metric]:.4f}",
            "change": _signed(one["metrics"][metric] - full, 4),
            "sign": "worse"
            if one["metrics"][metric] < full
            else "better"
            if one["metrics"][metric] > full
            else "same",
        }
        for source, one in inspection["masked"].items()
    ]
    picture = None
    if masked:
        title = f"Score without each source, and with fewer and fewer, {target.label}"
        picture = figures.inline(
            figures.pruning_figure(inspection), _anchor("needed", target.label, method), title
        )
    return {
        "id": identifier,
        "title": f"{target.label} ← {method}",
        "name": trained.name,
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


def _is_whole(inspection: Mapping[str, Any]) -> bool:
    """Whether all that the page takes from an inspection is there; a file may be of anybody's."""
    try:
        metric = next(iter(inspection["metrics"]))
        numbers = [
            inspection["metrics"][metric],
            *(one["metrics"][metric] for one in inspection["masked"].values()),
        ]
        numbers += [step["metrics"][metric] for step in inspection["pruned"] or []]
        rows = all(
            {"row", "tokens", "special", "weights", "predicted", "truth", "right"} <= set(r)
            for r in inspection["words"]
        )
        return (
            rows
            and all(isinstance(number, (int, float)) for number in numbers)
            and {"sources", "slots", "split", "rows"} <= set(inspection)
        )
    except (KeyError, TypeError, AttributeError, StopIteration):
        return False


# --- curves and cost -------------------------------------------------------------------------------


def _shown_curves(target: Target, found: Found) -> dict[str, list[Curve]]:
    """What is drawn: each term of the loss, and the metric that picks the best epoch."""
    every = curves_of(target, found)
    terms = [name for name in every if name.startswith("train/") and name.endswith("loss")]
    if "train/loss" in terms and "train/task_loss" in terms and len(terms) == 2:
        terms.remove("train/task_loss")  # the only term is the loss
    scores = [name for name in every if not name.startswith("train/") and name.endswith(f"/{target.metric}")]
    return {name: every[name] for name in [*sorted(terms), *scores[:1]]}


def _curves(contents: Contents) -> list[dict[str, Any]]:
    made = []
    for target in contents.everything:
        if shown := _shown_curves(target, contents.found):
            title = f"{', '.join(shown)} over the steps, {target.label}"
            picture = figures.curves_figure(shown, list(target.groups))
            made.append(
                {
                    "target": target.label,
                    "picture": figures.inline(picture, _anchor("curves", target.label), title),
                }
            )
    return made


def _costs(target: Target) -> list[dict[str, Any]]:
    rows = []
    for method, group in target.groups.items():
        if method.endswith(" alone"):
            continue  # it learnt nothing from the target
        results = [trained.run.result for trained in group.trained]
        rows.append(
            {
                "method": method,
                "score": group.mean,
                "parameters": _mean_of(results, "parameters", "trainable"),
                "bytes": _mean_of(results, "parameters", "stored_bytes"),
                "seconds": _mean_of(results, "speed", "seconds"),
                "tokens": _mean_of(results, "speed", "tokens_per_second"),
                "memory": _mean_of(results, "speed", "peak_memory_bytes"),
                "energy": _mean_of(results, "speed", "energy_joules"),
            }
        )
    return rows


def _cost(target: Target) -> dict[str, Any]:
    rows = _costs(target)
    picture = None
    if any(row["parameters"] or row["seconds"] for row in rows):
        title = f"Score against parameters and seconds, {target.label}"
        picture = figures.inline(figures.cost_figure(target, rows), _anchor("cost", target.label), title)
    return {"target": target.label, "metric": target.metric, "rows": rows, "picture": picture}


def _mean_of(results: Sequence[Mapping[str, Any]], part: str, key: str) -> float | None:
    values = [(result.get(part) or {}).get(key) for result in results]
    numbers = [float(value) for value in values if isinstance(value, (int, float))]
    return float(np.mean(numbers)) if numbers else None


# --- the runs, and how to make them anew -----------------------------------------------------------


def _runs(targets: Sequence[Target], output: Path) -> list[dict[str, Any]]:
    """Of each cell the runs behind it, with links to their folders."""
    made = []
    for target in targets:
        for method, group in target.groups.items():
            runs = []
            for entry in group.entries:
                trained = entry.trained
                manifest = None if trained is None else trained.manifest
                tracked = None if manifest is None else manifest.run.get("wandb")
                url = tracked.get("url") if isinstance(tracked, dict) else None
                folders = (
                    [("scored", entry.run.folder)] if trained is None or trained.run is not entry.run else []
                )
                if trained is not None:
                    folders.insert(0, ("trained", trained.run.folder))
                runs.append(
                    {
                        "name": trained.name if trained is not None else entry.run.result.get("name"),
                        "seed": entry.seed,
                        "score": f"{entry.metrics[group.metric]:.4f}",
                        "folders": [(what, _link(folder, output), str(folder)) for what, folder in folders],
                        "url": url
                        if isinstance(url, str) and url.startswith(("https://", "http://"))
                        else None,
                    }
                )
            made.append(
                {"anchor": _anchor(target.label, method), "title": f"{target.label} · {method}", "runs": runs}
            )
    return made


def _link(folder: Path, output: Path) -> str:
    from urllib.parse import quote

    return quote(os.path.relpath(folder, output.resolve().parent)) + "/"


def _rebuilds(targets: Sequence[Target]) -> list[dict[str, Any]]:
    """Of each artifact the commands that make it anew, what with and on which data."""
    made: dict[str, dict[str, Any]] = {}
    for target in targets:
        for group in target.groups.values():
            for trained in group.trained:
                if trained.artifact not in made:
                    made[trained.artifact] = _rebuild(trained)
    return list(made.values())


def _rebuild(trained: Trained) -> dict[str, Any]:
    lines = [shlex.join(["python", "-m", f"fusion.{trained.run.command}", *trained.run.overrides])]
    facts: dict[str, Any] = {"seed": trained.seed}
    if (manifest := trained.manifest) is not None:
        folder, git = Path(trained.artifact), manifest.run.get("git") or {}
        with contextlib.suppress(UserError, OSError):
            lines = rebuild_lines(manifest, folder.parent, folder.parent)
        marks = manifest.data["fingerprints"].items()
        facts |= {
            "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
            "data": ", ".join(f"{split} {str(mark)[:12]}" for split, mark in marks),
            "hash": manifest.hash[:12],
        }
        if git.get("commit"):
            facts["commit"] = f"{str(git['commit'])[:12]}{' with changes' if git.get('dirty') else ''}"
    return {"name": trained.name, "lines": lines, "facts": facts}


# --- how things are written ------------------------------------------------------------------------


def _score(group: Group) -> str:
    return f"{group.mean:.3f}" + ("" if group.deviation is None else f" ± {group.deviation:.3f}")


def _signed(value: float, digits: int = 3) -> str:
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if value > 0 else "−") + text


def _interval(difference: Difference | None) -> str | None:
    if difference is None or difference.low is None or difference.high is None:
        return None
    return f"{_signed(difference.low)} to {_signed(difference.high)}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _bytes(value: float | None) -> str:
    if value is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _anchor(*parts: str) -> str:
    """An id that any text may become, no two of them the same."""
    import hashlib
    import re

    readable = re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:6]}"


def _file_name(*parts: str) -> str:
    import re

    return re.sub(r"[^A-Za-z0-9]+", "-", "-".join(parts)).strip("-").lower()[:100]
