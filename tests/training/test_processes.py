"""DDP jobs as whole programs: two processes, a sweep of them, a rank that fails, a launcher that dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fusion.config.training import TrainerConfig
from fusion.errors import UserError
from fusion.training import processes

ROOT = Path(__file__).resolve().parents[2]
TASK = "kind: classification\ntext: sentence\nlabels: [negative, positive]\nmetrics: [accuracy]\n"
DDP = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu")

PROGRAM = '''
import os, time
from fusion.cli.app import command
from fusion.config.stages import Stage1Config

def check(config, run):
    """Only the process that starts the ranks checks: rank zero may have started by then."""
    assert "LOCAL_RANK" not in os.environ

@command("stage1", Stage1Config, check)
def main(config, run):
    import torch, pytorch_lightning as pl
    other = not run.rank_zero
    if config.seed == 5 and other:
        raise RuntimeError("early boom")  # rank zero waits for it at the rendezvous

    class Model(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)
        def training_step(self, batch, index):
            if config.seed == 7 and other and index == 1:
                raise RuntimeError("late boom")  # rank zero waits for its gradients
            if config.seed == 9 and index == 1:
                open("rank%s" % self.global_rank, "w").write(str(os.getpid()))
                time.sleep(60)
            return self.layer(batch[0]).pow(2).mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        accelerator=config.trainer.accelerator, devices=config.trainer.devices, strategy=config.trainer.strategy,
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    rows = torch.utils.data.TensorDataset(torch.randn(8, 2))
    trainer.fit(Model(), torch.utils.data.DataLoader(rows, batch_size=2))
    return {
        "name": config.name, "steps": trainer.global_step, "world": trainer.world_size,
        "threads": torch.get_num_threads(), "directory": str(run.directory), "rank_zero": run.rank_zero,
    }

if __name__ == "__main__":
    main()
'''


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "work 'dir"
    (folder / "conf" / "task").mkdir(parents=True)
    (folder / "conf" / "task" / "mine.yaml").write_text(TASK)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def start(workdir: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "program.py", *arguments],
        cwd=workdir,
        env={**environment, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def jobs(workdir: Path) -> list[dict[str, Any]]:
    """Per job, in order: its folder, its status, its result (if there is one)."""
    found = []
    for file in sorted(workdir.glob("outputs/**/status.json")):
        result = file.parent / "result.json"
        found.append(
            {
                "folder": file.parent,
                **json.loads(file.read_text()),
                "result": json.loads(result.read_text()) if result.exists() else None,
            }
        )
    return found


def test_one_process_needs_no_ranks() -> None:
    assert processes.count(TrainerConfig(devices=1)) == 1
    assert processes.count(TrainerConfig(accelerator="cpu", devices="auto")) == 1
    assert processes.count(TrainerConfig(accelerator="cpu", devices=2, strategy="ddp")) == 2
    assert processes.count(TrainerConfig(accelerator="cpu", devices=3)) == 3
    assert processes.count(TrainerConfig(accelerator="cpu", devices=2, strategy="fsdp")) == 2
    for devices in (1, "auto"):
        with pytest.raises(UserError, match="there is only one process, so nothing can be sharded"):
            processes.count(TrainerConfig(accelerator="cpu", devices=devices, strategy="fsdp"))
    with pytest.raises(UserError, match=r"trainer\.accelerator=abacus"):
        processes.count(TrainerConfig(accelerator="abacus"))


def test_torchrun_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": 0, "RANK": 0, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert processes.count(TrainerConfig(accelerator="cpu", devices=2, num_nodes=2, strategy="ddp")) == 1
    for devices, nodes in ((1, 1), ("auto", 1), (2, 1), (1, 2)):
        expected = r"started 2 processes on each of 2 nodes; expected trainer\.devices=2 trainer\.num_nodes=2"
        with pytest.raises(UserError, match=expected):
            processes.count(TrainerConfig(accelerator="cpu", devices=devices, num_nodes=nodes, strategy="ddp"))


@pytest.mark.usefixtures("warm")
def test_a_failing_rank_does_not_stop_the_sweep(workdir: Path) -> None:
    """Rank one fails before the rendezvous, where rank zero would wait for 30 minutes."""
    process = start(workdir, "-m", "+task=mine", "seed=5,7,1", *DDP)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 1
    assert len(list((workdir / "outputs" / "stage1").iterdir())) == 1  # no rank started another sweep
    failed, late, good = jobs(workdir)
    assert (failed["status"], failed["error"]) == ("failed", "RankError: rank 1: RuntimeError: early boom")
    assert late["error"] == "RankError: rank 1: RuntimeError: late boom"
    assert "in training_step" in (late["folder"] / "run.log").read_text()
    assert "2 of 3 jobs failed" in err
    assert "in main" in (failed["folder"] / "run.log").read_text()  # the traceback of the rank
    assert (good["folder"] / "run.rank1.log").is_file()
    assert good["status"] == "done"
    assert good["result"] == {
        "name": "mine-seed-1",
        "steps": 2,
        "world": 2,
        "threads": max(1, len(os.sched_getaffinity(0)) // 2),
        "directory": str(good["folder"]),
        "rank_zero": True,
    }


@pytest.mark.usefixtures("warm")
def test_no_rank_survives_a_killed_launcher(workdir: Path) -> None:
    process = start(workdir, "+task=mine", "seed=9", *DDP)
    pids = [workdir / f"rank{rank}" for rank in (0, 1)]
    deadline = time.time() + 60
    while not all(file.exists() and file.read_text() for file in pids) and time.time() < deadline:
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=60)
    (job,) = jobs(workdir)
    assert job["status"] == "running"
    deadline = time.time() + 10
    alive = {int(file.read_text()) for file in pids}
    while alive and time.time() < deadline:
        alive = {pid for pid in alive if is_running(pid)}
        time.sleep(0.1)
    assert not alive


def is_running(pid: int) -> bool:
    """A zombie process counts as dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
