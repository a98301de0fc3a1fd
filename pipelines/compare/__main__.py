"""Compare all methods of the project on one target with the same training budget.

    python -m pipelines.compare +task=cb 'sources=[snli,mrpc,rte,cb]' backbone=minilm data.dir=../shared/data

    +task=NAME            target task (required)
    sources=[A,B,C]       adapters in the store of the comparison; missing ones are trained on the task of that name
    methods=[ID,ID]       methods to compare (default: all); methods that they depend on are added
    equal_budget=true     use the same epochs, patience and learning rates for all methods; if false, use the defaults
    rates=[5e-5,5e-4,5e-3]  learning rates; the best one by the first validation metric is reported
    epochs=5 batch_size=16 patience=3   training budget of each method; patience=null disables early stopping
    seeds=[0]             for more than one seed, mean ± standard deviation are reported
    source_rows=1000 source_epochs=2  training examples and epochs of each source (learning rate 5e-4), and of each
                          task of the multi-task methods
    output=DIR            output folder (default: outputs/compare/TARGET)

All other overrides (backbone=, data.dir=, data.max_length=, trainer.KEY=, logger=) are passed to both stages. Each
command is printed. Artifacts that already exist are not retrained, so rerunning the same command resumes an
interrupted comparison. If a method fails, it is listed with the reason, and the other methods still run.

Files in DIR: table.md (with the commands), results.json, picture.png, picture.svg, store/ and runs/.
Exit codes: 0 success, 2 invalid command, 1 if something failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fusion.cli.console import run_program, show_table
from pipelines.commands import say
from pipelines.compare.config import read_comparison
from pipelines.compare.rows import GROUPS, ROWS


def usage() -> str:
    """Return the output of --help: the keys, and all methods with their overrides."""
    width = max(len(row.id) for row in ROWS)
    lines = [__doc__ or "", "Methods and their overrides ({placeholders} are replaced):"]
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
    if compared.rows:  # otherwise, do not overwrite the results of an earlier run
        write(compared)
        compared.time_inference()
        files = [*write(compared), *draw(compared)]
        say(f"\n{comparison.target}: {len(compared.rows)} methods\n")
        show_table(terminal_table(compared.rows))
        say("\n".join(["", *notes(compared)]))
    if compared.failures:
        say(f"\nFailed ({len(compared.failures)}):")
        for failure in compared.failures:
            say("  {id} ({what}): {reason}".format_map(failure))
        if any("the store already contains a different" in failure["reason"] for failure in compared.failures):
            say("The stored artifacts were trained with different settings; set output=DIR to keep both comparisons.")
    if files:
        say(f"\nResults: {', '.join(map(str, files))}")
    return 1 if compared.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(arguments, usage(), work)


if __name__ == "__main__":
    sys.exit(main())
