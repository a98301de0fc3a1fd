"""The commands that `show` prints, typed into a shell: what they make is the same, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fusion.store.lookup import read_manifest
from tests.bench import LABELS, write_task

ROOT = Path(__file__).resolve().parents[2]
FILES = ("weights.safetensors", "head.safetensors")


def shell(line: str, folder: Path, **variables: str) -> str:
    """The output of a line typed in `folder`, where `python` is this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FUSION_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **variables}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", line], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_rebuilt_artifact_is_identical(tmp_path: Path, tiny_backbone: Path) -> None:
    """A sweep, data from the environment, a task of the user's own, a source that was replaced since, a pruned fusion."""
    place, data, conf = tmp_path / "my work", tmp_path / "the user's data", tmp_path / "own conf"
    (conf / "task").mkdir(parents=True)
    place.mkdir()
    for name in ("films", "books", "plays"):
        write_task(data, name)
        task = {"kind": "classification", "text": "text", "labels": LABELS, "metrics": ["accuracy"]}
        (conf / "task" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    shared = (
        f"'backbone.name_or_path=\"{tiny_backbone}\"' backbone.pooling=mean optim.lr=5e-3 trainer.max_epochs=2 "
        "trainer.accelerator=cpu data.max_length=16 logger=none data.cache_dir=cache"
    )
    own = {"FUSION_DATA_DIR": str(data), "FUSION_CONF": str(conf)}
    store = "store='a store'"
    shell(f"python -m fusion.stage1 -m +task=films,books seed=1,2 {shared} {store}", place, **own)
    shell(
        f"python -m fusion.stage2 +task=plays 'sources=[films-seed-1,books-seed-2]' {shared} {store} name=both",
        place,
        **own,
    )
    shell(
        f"python -m fusion.stage2 +task=plays composition=pruned composition.fusion=both composition.keep=1 {shared} "
        f"{store} name=pruned",
        place,
        **own,
    )
    shell(f"python -m fusion.stage1 +task=films name=again init_from=films-seed-1 {shared} {store}", place, **own)
    first = read_manifest("films-seed-1", place / "a store").hash
    shell(
        f"python -m fusion.stage1 +task=films name=films-seed-1 overwrite=true optim.weight_decay=0.1 {shared} {store}",
        place,
        **own,
    )
    assert read_manifest("films-seed-1", place / "a store").hash != first
    shown = shell(f"python -m fusion.store show pruned {store} into='another store'", place)
    lines = shown.split("to reproduce it:\n")[1]
    assert lines.count("python -m fusion.stage1") == 2 and lines.count("python -m fusion.stage2") == 2
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shell(lines, elsewhere)  # without what the first shell had in its environment
    made = place / "another store"
    originals = {name: place / "a store" / name for name in ("books-seed-2", "both", "pruned")}
    originals["films-seed-1"] = place / "a store" / ".replaced" / f"films-seed-1-{first[:8]}"
    assert {entry.name for entry in made.iterdir() if not entry.name.startswith(".")} == set(originals)
    shown = shell(f"python -m fusion.store show again {store} into='a third store'", place)
    assert f"films-seed-1 {first}, found: " in shown
    shell(shown.split("to reproduce it:\n")[1], elsewhere)
    third = place / "a third store"
    assert {entry.name for entry in third.iterdir() if not entry.name.startswith(".")} == {"films-seed-1", "again"}
    original = place / "a store" / "again" / FILES[0]
    assert (third / "again" / FILES[0]).read_bytes() == original.read_bytes()
    for name, original in originals.items():
        for file in FILES:
            assert (made / name / file).read_bytes() == (original / file).read_bytes(), (name, file)
        assert read_manifest(name, made).hash == read_manifest(str(original), made).hash
    assert "4 of 4 artifacts are valid" in shell("python -m fusion.store verify store='another store'", place)
