"""Predict with a stored artifact for the examples of a file; writes one JSON line per example."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.backbones.slots import SlotAddress
from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import PredictConfig
from fusion.config.task import TaskConfig
from fusion.errors import UserError
from fusion.files import atomic_path
from fusion.model.head_selection import SelectedHead, select_heads
from fusion.runs.inputs import read_used
from fusion.runs.run import Run
from fusion.store.compatibility import check_attends
from fusion.tasks.table import kind_of

if TYPE_CHECKING:
    from fusion.model.inference import Predictions
    from fusion.store.manifest import Manifest

# Examples whose token ids and outputs are in memory at a time; batches are sorted by length within them.
PART = 16_384


def select_head(manifest: Manifest, task: TaskConfig | None) -> SelectedHead:
    """Return the head for the task, or the artifact's only head."""
    heads = select_heads(manifest, task)
    if len(heads) > 1:
        names = ", ".join(head.trained_on for head in heads)
        raise UserError(f"{manifest.name} has multiple tasks; set +task= to the task of the file, one of {names}")
    return heads[0]


def check(config: PredictConfig, run: Run) -> None:
    from fusion.data.tables import READABLE, file_format

    manifest = read_used(config)
    select_head(manifest, config.task)
    if config.attention:
        check_attends(manifest, "attention=true", "leave attention= out")
    source, output = Path(config.input), Path(config.output)
    if not source.is_file() or file_format(source) is None:
        raise UserError(f"input={config.input}: expected an existing file with the extension {READABLE}")
    if output.is_dir() or (output.exists() and output.samefile(source)):
        problem = "is a folder" if output.is_dir() else "is the input file"
        raise UserError(f"output={config.output} {problem}; set a different output file")
    try:
        tempfile.TemporaryFile(dir=output.absolute().parent).close()
    except OSError as error:
        raise UserError(
            f"output={config.output}: cannot write to its folder ({error.strerror}); use an existing, writable folder"
        ) from None


@command("predict", PredictConfig, check=check)
def main(config: PredictConfig, run: Run) -> dict[str, Any]:
    from fusion.cli.console import rows_progress
    from fusion.data.encode import encode
    from fusion.data.rows import rows_of_file
    from fusion.model.inference import load_model, predict

    loaded = load_model(config, fold=not config.attention)
    manifest, backbone = loaded.artifact.manifest, loaded.backbone
    head = select_head(manifest, config.task)
    rows = rows_of_file(head.task, Path(config.input), config.data.quoting)
    seconds = 0.0
    with (
        atomic_path(Path(config.output)) as path,
        path.open("w", encoding="utf-8") as file,
        rows_progress(f"{manifest.name} on {Path(config.input).name}", len(rows)) as advance,
    ):
        for part in rows.parts(PART):
            encoded = encode(part, backbone.tokenizer, loaded.max_length, config.data.cache_dir, backbone.family.causal)
            encoded.task = head.index
            found = predict(loaded.model, encoded, config.data, loaded.device, config.attention, advance=advance)
            if config.attention and not found.attention:
                raise UserError(f"attention=true: with drop={config.drop}, {manifest.name} has no layer with attention")
            counts = None if part.choices is None else [len(choices) for choices in part.choices]
            for line in lines(found, head, [source.name for source in manifest.sources], counts):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            seconds += found.seconds
    say(f"{len(rows)} predictions of {manifest.name} in {config.output}")
    return {
        "artifact": str(loaded.artifact.path),
        "name": manifest.name,
        "drop": config.drop,
        "output": config.output,
        "rows": len(rows),
        "speed": {"seconds": seconds, "examples_per_second": len(rows) / seconds},
    }


def lines(
    predictions: Predictions, head: SelectedHead, sources: list[str], counts: list[int] | None
) -> Iterator[dict[str, Any]]:
    """Yield the line of each example, see `Kind.lines`, with the mean source attention per layer if recorded.

    If adapters are placed at more than one site, or in an encoder–decoder model, the attention is per slot.
    """
    addresses = [SlotAddress.parse(slot) for slot in predictions.attention]
    by_layer = len({address.site for address in addresses}) == 1 and not any(address.stack for address in addresses)
    for row, line in enumerate(kind_of(head.task).lines(head.task, predictions.scores, counts, head.decision)):
        if predictions.attention:
            line["attention"] = {
                str(address.layer if by_layer else address): dict(zip(sources, means[row].tolist(), strict=True))
                for address, means in zip(addresses, predictions.attention.values(), strict=True)
            }
        yield line


if __name__ == "__main__":
    main()
