"""The report as one HTML file. No network, no external scripts, at most 5 MB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fusion
from fusion.errors import UserError
from fusion.files import write_atomic
from fusion.reporting import sections, wording
from fusion.reporting.contents import Contents
from fusion.reporting.results import BASELINE
from fusion.reporting.statistics import LEVEL, RESAMPLES

LARGEST = 5_000_000  # bytes of the page
WORD_ROWS = (1000, 4, 1, 0)  # rows of each fusion, tried in turn until the page is small enough
FILTERS = (
    *(wording.signed, wording.interval, wording.p_value, wording.number, wording.size, wording.mean_of),
    *(wording.seeds, wording.common_seeds, wording.score, wording.chosen_setting),
)


def write_page(contents: Contents, output: Path, about: Mapping[str, Any], files: Path | None) -> int:
    """Write the page atomically, and return its size in bytes.

    Args:
        about: for its header: `command`, `runs`, `made`.
        files: the folder of the figures and tables, which the page names; None: there are none.

    Raises:
        OSError: it cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the font does not have
        values = _values(contents, output)
    template = _template()
    for rows in WORD_ROWS:
        notes = list(contents.notes)
        if rows != WORD_ROWS[0]:
            notes.append(
                f"To stay below 5 MB, token-level attention is limited to {rows} rows of each fusion."
            )
        shown = [sections.at_most(one, rows) for one in values["inspected"]]
        words = [one for one in shown if one["rows"]]
        where = None if files is None else os.path.relpath(files, output.parent)
        data = {one["id"]: one["data"] for one in words}
        text = template.render(values, about=about, notes=notes, words=words, words_data=data, files=where)
        if len(text.encode()) <= LARGEST:
            break
    else:
        raise UserError(f"{output}: the page would exceed 5 MB; select fewer runs: runs=[DIR,ANOTHER]")
    write_atomic(output, text)
    return len(text.encode())


def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fusion.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {one.__name__: one for one in FILTERS}
    environment.globals |= {"group_anchor": wording.group_anchor, "against": wording.against}
    return environment.get_template("report.html")


def _values(contents: Contents, output: Path) -> dict[str, Any]:
    """What the template lays out, without the rows of token-level attention."""
    targets = contents.targets
    return {
        "version": fusion.__version__,
        "found": contents.found,
        "level": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "baseline": BASELINE,
        "targets": targets,
        "single": [(target, group) for target in contents.single for group in target.every_group],
        "optimistic": sections.optimistic(targets),
        "tallies": sections.tallies(targets),
        "some_chosen": any(group.others for target in targets for group in target.groups.values()),
        "heatmaps": [sections.heatmap(one) for one in contents.attention],
        "by_target": sections.sources_by_target(contents.attention),
        "entropy": sections.entropy(contents.attention),
        "inspected": [sections.inspected(*one) for one in contents.inspected],
        "curves": sections.curves(contents),
        "cost": [sections.cost(target) for target in targets],
        "groups": sections.runs(contents.everything, output),
        "rebuilds": sections.rebuilds(contents.everything),
    }
