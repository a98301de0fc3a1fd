"""A sweep on the command line: one W&B run per job, with its labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.bench import LABELS, write_task
from tests.tracking.conftest import records, summary

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_jobs_of_a_sweep_are_runs_of_one_group(tmp_path: Path, tiny_backbone: Path) -> None:
    place = tmp_path / "my work"
    (place / "conf" / "task").mkdir(parents=True)
    write_task(place / "data", "films")
    task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
    (place / "conf" / "task" / "films.yaml").write_text(yaml.safe_dump(task))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "FUSION_"))}
    home = {f"WANDB_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "CACHE", "DATA")}
    done = subprocess.run(
        [
            sys.executable, "-m", "fusion.stage1", "-m", "+task=films", "seed=1,2", "data.dir=data",
            f"backbone.name_or_path={tiny_backbone}", "backbone.pooling=mean", "data.max_length=16",
            "trainer.max_epochs=1", "trainer.accelerator=cpu", "optim.lr=5e-3", "logger.wandb.mode=offline",
            "hydra.sweep.dir=outputs/seeds",
        ],
        cwd=place,
        env=environment | home | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NETRC": str(tmp_path / "n")},
        capture_output=True,
        text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    folders = sorted((place / "outputs" / "seeds").glob("*-films-*"))
    runs = [records(folder, "run")[0] for folder in folders]
    assert [(run["display_name"], run["run_group"], run["job_type"]) for run in runs] == [
        ("films · adapter · seed 1", "seeds", "stage1"),
        ("films · adapter · seed 2", "seeds", "stage1"),
    ]
    assert len({run["run_id"] for run in runs}) == 2
    for folder, run, seed in zip(folders, runs, (1, 2), strict=True):
        assert run["config"]["update"]["seed"] == seed and run["config"]["update"]["optim/lr"] == 5e-3
        result = json.loads((folder / "result.json").read_text())
        assert summary(folder)["summary"]["best/validation/accuracy"] == (result["metrics"]["validation"]["accuracy"])
        manifest = json.loads((place / result["artifact"] / "manifest.json").read_text())
        assert manifest["run"]["wandb"]["id"] == run["run_id"]
    assert not (tmp_path / "DATA").exists()
