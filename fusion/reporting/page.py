"""One HTML file: what the runs gave, as a person reads it. No network, no script from elsewhere, at most 5 MB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fusion
from fusion.errors import UserError
from fusion.files import write_atomic
from fusion.reporting import sections
from fusion.reporting.contents import Contents
from fusion.reporting.results import BASELINE
from fusion.reporting.statistics import LEVEL, RESAMPLES
from fusion.reporting.wording import number, size

LARGEST = 5_000_000  # bytes of the page
WORD_ROWS = (1000, 4, 1, 0)  # of each fusion, tried in turn until the page is small enough


def write_page(contents: Contents, output: Path, about: Mapping[str, Any], files: Path | None) -> int:
    """Writes the page whole or not at all, and gives its bytes.

    Args:
        about: what its head says: `command`, `runs`, `made`.
        files: the folder of the figures and tables, which the page names; None: there are none.

    Raises:
        OSError: it cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font has not
        values = _values(contents, output)
    template, text = _template(), ""
    for most_rows in WORD_ROWS:
        notes = list(contents.notes)
        if most_rows != WORD_ROWS[0]:
            notes.append(
                f"To stay below 5 MB, at most {most_rows} rows of each fusion have their token-level attention."
            )
        words = [sections.at_most(one, most_rows) for one in values["looked_into"]]
        words = [one for one in words if one["rows"]]
        text = template.render(
            values,
            about=about,
            notes=notes,
            words=words,
            words_data={one["id"]: one["data"] for one in words},
            files=None if files is None else os.path.relpath(files, output.parent),
        )
        if len(text.encode()) <= LARGEST:
            break
    else:
        raise UserError(
            f"{output}: the page would have more than 5 MB; make a report of fewer runs: runs=[DIR,ANOTHER]"
        )
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
    environment.filters["number"] = number
    environment.filters["bytes"] = size
    return environment.get_template("report.html")


def _values(contents: Contents, output: Path) -> dict[str, Any]:
    """What the template lays out, however many rows are shown word by word."""
    looked_into = [sections.looked_into(*one) for one in contents.inspected]
    return {
        "version": fusion.__version__,
        "found": contents.found,
        "level": f"{LEVEL:.0%}",
        "resamples": f"{RESAMPLES:,}",
        "baseline": BASELINE,
        "helped": sections.helped(contents.targets),
        "optimistic": sections.optimistic(contents.targets),
        "details": sections.details(contents.targets),
        "tallies": sections.tallies(contents.targets),
        "some_chosen": any(group.others for target in contents.targets for group in target.groups.values()),
        "heatmaps": [sections.heatmap(one) for one in contents.attention],
        "by_target": sections.sources_by_target(contents.attention),
        "entropy": sections.entropy(contents.attention),
        "looked_into": looked_into,
        "needed": [one for one in looked_into if one["needed"]],
        "curves": sections.curves(contents),
        "cost": [sections.cost(target) for target in contents.targets],
        "single": sections.details(contents.single),
        "groups": sections.runs(contents.everything, output),
        "rebuilds": sections.rebuilds(contents.everything),
    }
