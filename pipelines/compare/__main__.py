"""Every method of the project once on one target, with the same budget, in one table.

    python -m pipelines.compare +task=cb 'sources=[snli,mrpc,rte,cb]' backbone=minilm data.dir=../shared/data

    +task=NAME            the target (required)
    sources=[A,B,C]       adapters in the store of the comparison; missing ones are trained on the task of that name
    methods=[ID,ID]       rows (default: all), together with the rows that they are made from
    equal_budget=true     the same epochs, patience and learning rates for every row; false: the commands' defaults
    rates=[5e-5,5e-4,5e-3]  the learning rates; a row reports the best one by the first validation metric
    epochs=5 batch_size=16 patience=3   of every row; patience=null: no early stopping
    seeds=[0]             with more than one: mean ± standard deviation
    source_rows=1000 source_epochs=2  of each source, with learning rate 5e-4, and of each task of multi-task rows
    output=DIR            default outputs/compare/TARGET

All other overrides (backbone=, data.dir=, data.max_length=, trainer.KEY=, logger=) are passed to both stages. Each
command is printed as you would type it and skips what is stored already, so the same command continues an
interrupted comparison. A row that fails is listed with the reason, and the others run.

In DIR: table.md (with the commands), results.json, picture.png, picture.svg, store/ and runs/.
Exit codes: 0 done, 2 a wrong command, 1 something failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fusion.cli.console import run_program, show_table
from pipelines.commands import say
from pipelines.compare.config import read_comparison
from pipelines.compare.rows import GROUPS, ROWS


def usage() -> str:
    """What --help prints: the keys, and every row with its overrides."""
    width = max(len(row.id) for row in ROWS)
    lines = [__doc__ or "", "Rows and their overrides (names in {braces} are replaced):"]
    for group in GROUPS:
        lines.append(f"\n{group}")
        lines += [f"  {row.id.ljust(width)}  {row.words}" for row in ROWS if row.group == group]
    return "\n".join(lines) + "\n"


def work(words: Sequence[str]) -> int:
    comparison = read_comparison(words)
    from pipelines.compare.table import draw, notes, terminal_table, write
    from pipelines.compare.workflow import Workflow

    compared = Workflow(comparison)
    compared.run()
    files = []
    if compared.rows:  # otherwise the results of an earlier run are kept
        write(compared)
        compared.time_inference()
        files = [*write(compared), *draw(compared)]
        say(f"\n{comparison.target}: {len(compared.rows)} methods\n")
        show_table(terminal_table(compared.rows))
        say("\n".join(["", *notes(compared)]))
    if compared.failures:
        say(f"\nFailed ({len(compared.failures)}):")
        for failure in compared.failures:
            say("  {id}, {what}: {reason}".format_map(failure))
        if any("the store has another" in failure["reason"] for failure in compared.failures):
            say("The stored artifacts were trained with other settings: output=ANOTHER keeps both comparisons.")
    if files:
        say(f"\nResults: {', '.join(map(str, files))}")
    return 1 if compared.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(arguments, usage(), work)


if __name__ == "__main__":
    sys.exit(main())
