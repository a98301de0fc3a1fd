"""Every method of the project once on one target, with the same budget, in one table.

    python -m pipelines.compare +task=cb 'sources=[snli,mrpc,rte,cb]' backbone=minilm data.dir=../shared/data

    +task=NAME            the target (required)
    sources=[A,B,C]       adapters in the store of the comparison; one that is not there and is a task is trained
    methods=[ID,ID]       rows (default: all); what they are made from comes along
    equal_budget=true     the same epochs, patience and grid of rates for every row; false: the commands' own defaults
    rates=[5e-5,5e-4,5e-3]  the grid; a row reports its best rate by the first validation metric
    epochs=5 batch_size=16 patience=3   of every row; patience=null does not stop early
    seeds=[0]             several: mean ± standard deviation
    source_rows=1000 source_epochs=2  of each source, at rate 5e-4; multi-task rows have the same rows and epochs
    output=DIR            default outputs/compare/TARGET

Every other word (backbone=, data.dir=, data.max_length=, trainer.KEY=, logger=) is handed on to both stages as it
is. Every step is one of the project's commands, printed as you would type it; what is stored already is not trained
again, so a broken run goes on where it was. A row that fails is named with its reason, and the others go on.

In DIR: table.md (with the commands), results.json, picture.png, store/ and runs/.
Exit codes: 0 done, 2 a wrong command, 1 something failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fusion.errors import UserError
from fusion.runs.signals import exit_code
from pipelines.commands import say
from pipelines.compare.config import read_settings
from pipelines.compare.journey import Journey
from pipelines.compare.picture import draw
from pipelines.compare.rows import GROUPS, ROWS
from pipelines.compare.table import notes, terminal_table, write


def help_text() -> str:
    """What --help prints: the keys, and every row with its words."""
    width = max(len(row.id) for row in ROWS)
    lines = [__doc__ or "", "Rows, and what is typed for each ({…} is filled in):"]
    for group in GROUPS:
        lines.append(f"\n{group}")
        lines += [f"  {row.id.ljust(width)}  {row.words}" for row in ROWS if row.group == group]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return 0
    try:
        settings = read_settings(arguments)
        journey = Journey(settings)
        journey.check_sources()
        compared = journey.run()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    files: list[Path] = []
    if compared.rows:  # a start that gave nothing leaves the results of an earlier one
        files = write(settings, compared)
        picture = settings.output / "picture.png"
        if draw(compared.rows, f"{settings.target}, {compared.rows[0].main_metric}", picture):
            files.append(picture)
        say(f"\n{settings.target}: {len(compared.rows)} methods\n\n{terminal_table(compared.rows)}\n")
        for note in notes(settings, compared):
            say(note)
    if compared.failures:
        say(f"\nFailed ({len(compared.failures)}):")
        for failure in compared.failures:
            say(f"  {failure.id}, {failure.what}: {failure.reason}")
        if any("the store has another" in failure.reason for failure in compared.failures):
            say(
                "What the store has was made with other settings: output=ANOTHER compares anew and keeps both."
            )
    if files:
        say(f"\nResults: {', '.join(map(str, files))}")
    return 1 if compared.failures else 0


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
