"""The README's "Your own data in five commands" and the commands after it run, on a tiny backbone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import write_rows
from tests.docs.commands import ROOT, commands_of

pytestmark = pytest.mark.usefixtures("warm")
TEXTS = ("a good film", "the film was bad", "he hated it")


def write_data(folder: Path, labels: list[str], column: str) -> None:
    examples = [{"text": TEXTS[n % len(labels)], column: labels[n % len(labels)]} for n in range(12)]
    write_rows(folder, {"train": examples, "validation": examples[:6]})


def test_the_commands_of_the_readme_run(tmp_path: Path, tiny_backbone: Path) -> None:
    commands = [command.words for command in commands_of(ROOT / "README.md")]
    first = next(n for n, words in enumerate(commands) if words[0] == "mkdir")
    walkthrough = commands[first : first + 7]
    assert [words[2] if words[0] == "python" else words[0] for words in walkthrough] == [
        *("mkdir", "printf", "fusion.stage1", "fusion.stage2"),
        *("fusion.report", "fusion.evaluate", "fusion.predict"),
    ]
    subprocess.run(walkthrough[0], cwd=tmp_path, check=True)
    *shown, redirection, task_file = walkthrough[1]
    assert redirection == ">"
    printed = subprocess.run(shown, cwd=tmp_path, check=True, capture_output=True, text=True)
    (tmp_path / task_file).write_text(printed.stdout)
    write_data(tmp_path / "tickets", ["billing", "outage", "other"], "label")
    for file in (tmp_path / "tickets").iterdir():
        file.rename(tmp_path / "data" / "tickets" / file.name)
    for name in ("movies", "products"):  # in place of their text from PyPI
        write_data(tmp_path / "data" / name, ["negative", "positive"], "sentiment")
    (tmp_path / "new.jsonl").write_text('{"text": "a good book"}\n')

    tiny = [f"backbone.name_or_path={tiny_backbone}", "backbone.pooling=mean", "trainer.max_epochs=1"]
    tiny += ["trainer.accelerator=cpu", "data.max_length=16", "logger=none"]
    small = {"stage1": tiny, "stage2": tiny, "report": ["inspect=false", "files=false"]}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("FUSION_DATA_DIR", None)
    for words in walkthrough[2:]:
        overrides = [word for word in words[3:] if word != "backbone=minilm"]
        done = subprocess.run(
            [sys.executable, "-m", words[2], *overrides, *small.get(words[2].removeprefix("fusion."), [])],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, (words, done.stderr[-2000:])
    assert (tmp_path / "outputs" / "report.html").is_file()
    prediction = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert set(prediction["scores"]) == {"billing", "outage", "other"}
