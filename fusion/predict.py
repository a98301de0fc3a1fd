"""Predictions of a stored artifact for the rows of a file, one JSON line each.

python -m fusion.predict artifact=rte-adapterfusion input=rows.jsonl output=predictions.jsonl
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.cli.app import command
from fusion.cli.console import say
from fusion.config.commands import PredictConfig
from fusion.errors import UserError
from fusion.files import atomic_path
from fusion.model.head_selection import Answer, answers
from fusion.runs.inputs import read_used
from fusion.runs.run import Run
from fusion.store.compatibility import check_attends
from fusion.tasks.table import kind_of

if TYPE_CHECKING:
    from fusion.model.inference import Predictions
    from fusion.store.manifest import Manifest


def answer_of(config: PredictConfig, manifest: Manifest) -> Answer:
    """The task that the rows are of: the one that is asked for, or an artifact's only one."""
    possible = answers(manifest, config.task)
    if len(possible) > 1:
        raise UserError(
            f"{manifest.name} answers several tasks; say which one the rows are of: +task=NAME, one of "
            f"{', '.join(answer.head_task for answer in possible)}"
        )
    return possible[0]


def check(config: PredictConfig, run: Run) -> None:
    """What can be said before a model is loaded."""
    from fusion.data.files import READABLE, file_format

    manifest = read_used(config)
    answer_of(config, manifest)
    if config.attention:
        check_attends(manifest, "attention=true", "leave attention= out")
    if not Path(config.input).is_file():
        raise UserError(f"input={config.input}: no such file; expected one with an ending {READABLE}")
    if file_format(Path(config.input)) is None:
        raise UserError(f"input={config.input}: this ending is not read; expected {READABLE}")
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"output={config.output}: expected a file, and this is a folder")
    if not output.absolute().parent.is_dir():
        raise UserError(f"output={config.output}: expected a file in a folder that exists")
    try:
        tempfile.TemporaryFile(dir=output.absolute().parent).close()
    except OSError as error:
        raise UserError(f"output={config.output}: its folder cannot be written ({error.strerror})") from None
    if output.exists() and output.samefile(config.input):
        raise UserError(f"output={config.output} is the input; name another file")


@command("predict", PredictConfig, check=check)
def main(config: PredictConfig, run: Run) -> dict[str, Any]:
    from fusion.backbones.load import load_backbone
    from fusion.cli.console import rows_progress
    from fusion.data.encode import encode
    from fusion.data.rows import rows_of_file
    from fusion.model.build import backbone_of, stored_model
    from fusion.model.inference import device_of, predict
    from fusion.store.artifacts import load

    device = device_of(config.accelerator)
    artifact = load(config.artifact, Path(config.store))
    manifest = artifact.manifest
    answer = answer_of(config, manifest)
    task = answer.task
    name, revision = backbone_of(manifest, config.backbone)
    max_length = config.data.max_length or manifest.data.max_length
    backbone = load_backbone(name, revision, config.backbone.trust_remote_code, max_length)
    model = stored_model(artifact, artifact.path.parent, backbone, config.drop)
    rows = rows_of_file(task, Path(config.input), config.data.quoting)
    encoded = encode(rows, backbone.tokenizer, max_length, config.data.cache_dir)
    encoded.task = answer.head
    with rows_progress(f"{manifest.name} on {Path(config.input).name}", len(rows)) as advance:
        predictions = predict(
            model,
            encoded,
            config.data.batch_size,
            device,
            config.attention,
            config.data.tokens_per_batch,
            advance=advance,
        )
    if config.attention and not predictions.attention:
        raise UserError(
            f"attention=true: with drop={config.drop} no layer of {manifest.name} is left that attends"
        )
    counts = None if rows.choices is None else [len(choices) for choices in rows.choices]
    _write(Path(config.output), lines(predictions, answer, manifest, counts))
    say(f"{len(rows)} predictions of {manifest.name} in {config.output}")
    return {
        "artifact": str(artifact.path),
        "name": manifest.name,
        "drop": config.drop,
        "output": config.output,
        "rows": len(rows),
        "speed": {"seconds": predictions.seconds, "examples_per_second": len(rows) / predictions.seconds},
    }


def lines(
    predictions: Predictions, answer: Answer, manifest: Manifest, counts: list[int] | None
) -> Iterator[dict[str, Any]]:
    """One prediction a row, as the task's kind words it.

    With attention: for each layer, the mean over the row's tokens of what each source got. Where a
    placement has several sites, `layer.site` stands for the layer.
    """
    sources = [source.name for source in manifest.sources]
    several_sites = len({slot.partition(".")[2] for slot in predictions.attention}) > 1
    kind = kind_of(answer.task)
    for row, line in enumerate(kind.lines(answer.task, predictions.scores, counts, answer.decision)):
        if predictions.attention:
            line["attention"] = {
                slot if several_sites else slot.partition(".")[0]: dict(
                    zip(sources, means[row].tolist(), strict=True)
                )
                for slot, means in predictions.attention.items()
            }
        yield line


def _write(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with atomic_path(path) as part, part.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
