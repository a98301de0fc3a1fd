"""The report as one HTML file (no network, no external scripts, at most 5 MB), and as files for a paper."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fusion
from fusion.errors import UserError
from fusion.files import write_atomic
from fusion.reporting import figures, sections, tables, wording
from fusion.reporting.contents import Contents, costs
from fusion.reporting.results import BASELINE
from fusion.reporting.statistics import LEVEL, RESAMPLES

LARGEST = 5_000_000  # bytes of the page
WORD_ROWS = (1000, 4, 1, 0)  # examples of each fusion, tried in order until the page is small enough
FILTERS = (
    *(wording.signed, wording.interval, wording.p_value, wording.number, wording.size, wording.mean_of),
    *(wording.seeds, wording.common_seeds, wording.score, wording.chosen_setting),
)


def write_files(contents: Contents, folder: Path) -> list[Path]:
    """Figures as PNG and SVG, tables as CSV and LaTeX.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [path for table in tables.tables_of(contents) for path in tables.save(table, folder)]
    for name, (_, figure) in contents.figures.items():
        written += figures.save(figure, folder, wording.file_name(*name))
    return written


def write_page(contents: Contents, output: Path, about: Mapping[str, Any], files: Path | None) -> int:
    """Write the page atomically, and return its size in bytes.

    Args:
        about: for its header: `command`, `runs`, `made`.
        files: the folder of the figures and tables, which the page names; None: there are none.

    Raises:
        OSError: it cannot be written.
    """
    values = _values(contents, output) | {"about": about}
    values["files"] = None if files is None else os.path.relpath(files, output.parent)
    template = _template(contents)
    for rows in WORD_ROWS:
        note = f"To stay below 5 MB, token-level attention is limited to {rows} rows of each fusion."
        notes = [*contents.notes, *([] if rows == WORD_ROWS[0] else [note])]
        words = [one | {"rows": one["rows"][:rows]} for one in values["inspected"] if one["rows"][:rows]]
        text = template.render(values, notes=notes, words=words, data=_script_data(words, values["by_target"]))
        if len(text.encode()) <= LARGEST:
            break
    else:
        raise UserError(f"{output}: the page would exceed 5 MB; select fewer runs: runs=[DIR,ANOTHER]")
    write_atomic(output, text)
    return len(text.encode())


def _template(contents: Contents) -> Any:
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
        if name[0] in ("entropy", "needed", "curves", "cost")
    }
    environment.filters |= {one.__name__: one for one in FILTERS}
    environment.globals |= {"group_anchor": wording.group_anchor, "against": wording.against}
    environment.globals |= {"costs": costs, "titled": wording.titled, "figure": lambda *name: drawn.get(name)}
    return environment.get_template("report.html")


def _values(contents: Contents, output: Path) -> dict[str, Any]:
    """What the template lays out."""
    targets = contents.targets
    return {
        "version": fusion.__version__,
        "found": contents.found,
        "level": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "baseline": BASELINE,
        "targets": targets,
        "everything": contents.everything,
        "with_curves": [one for one in contents.everything if ("curves", one.label) in contents.figures],
        "single": [(target, group) for target in contents.single for group in target.every_group],
        "optimistic": sections.optimistic(targets),
        "tallies": sections.tallies(targets),
        "some_chosen": any(group.others for target in targets for group in target.groups.values()),
        "heatmaps": [sections.heatmap(one) for one in contents.attention],
        "by_target": sections.sources_by_target(contents.attention),
        "inspected": [sections.inspected(*one) for one in contents.inspected],
        "links": lambda entry: sections.links(entry, output),
        "rebuilds": sections.rebuilds(contents.everything),
    }


def _script_data(words: list[dict[str, Any]], by_target: dict[str, Any] | None) -> dict[str, Any]:
    """What the page's script reads."""
    read = {one["id"]: {key: one[key] for key in ("sources", "layers")} for one in words}
    for one in words:
        read[one["id"]]["weights"] = [row["weights"] for row in one["rows"]]
    return {"words": read, "byTarget": by_target and {k: by_target[k] for k in ("layers", "data", "largest")}}
