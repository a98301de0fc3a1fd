"""Two artifacts or runs side by side: which settings differ, scores, costs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion.cli.console import read_arguments
from fusion.compare import difference, differing, main, read_side
from fusion.config.training import OptimConfig
from fusion.runs.run import Run, record
from fusion.stage1 import main as stage1
from fusion.store.layout import MANIFEST
from fusion.store.lookup import artifacts
from tests.bench import Bench, write_manifest

ROOT = Path(__file__).parents[1]
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Bench:
    """Adapters of two learning rates and a fusion, and the folder of the run that made `slow`."""
    from fusion.config.stages import Stage1Config

    bench = Bench(tmp_path_factory.mktemp("compare") / "a folder", tiny_backbone)
    bench.stage1("films")
    config = Stage1Config(**bench.settings("films", name="slow", optim=OptimConfig(lr=1e-4, patience=None)))
    run = bench.run("stage1", config)
    assert isinstance(run, Run)
    record(run, lambda: stage1.__wrapped__(config, run))  # type: ignore[attr-defined]
    run.directory.rename(bench.folder / "run of slow")
    bench.stage2("books", ["films", "slow"], name="both")
    return bench


@pytest.fixture
def say(trained: Bench, capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*words: str, store: bool = True) -> tuple[int, str, str]:
        code = main([*words, *([f"store={trained.folder / 'store'}"] if store else [])])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def tables(out: str) -> list[dict[str, list[str]]]:
    """Each table by the first cell of its rows; titles are omitted."""
    found = []
    for block in out.strip().split("\n\n"):
        rows = [re.split(r"  +", line) for line in block.splitlines()[1:]]
        found.append({row[0]: row[1:] for row in rows})
    return found


def test_two_artifacts(trained: Bench, say: Say) -> None:
    code, out, err = say("films", "slow")
    assert (code, err) == (0, "")
    settings, scores, costs = tables(out)
    assert settings.keys() == {"optim.lr", "weights"}
    assert settings["optim.lr"] == ["0.005", "0.0001"]
    assert scores.keys() == {"validation/accuracy", "validation/macro_f1"}
    one, two = (json.loads((trained.folder / "store" / name / MANIFEST).read_text()) for name in ("films", "slow"))
    first, second = (m["metrics"]["validation"]["accuracy"] for m in (one, two))
    assert scores["validation/accuracy"] == [f"{first:.4f}", f"{second:.4f}", f"{second - first:+.4f}"]
    assert costs["trained parameters"] == [f"{one['result']['parameters']['trainable']:,}"] * 2
    assert costs["stored bytes"] == [f"{sum(f['bytes'] for f in m['files'].values()):,}" for m in (one, two)]
    assert {"best epoch", "epochs", "seconds"} <= costs.keys()


def test_an_artifact_and_itself(trained: Bench, say: Say) -> None:
    code, out, _ = say("films", str(trained.folder / "store" / "films"))
    assert code == 0 and out.startswith("no setting differs\n")
    assert all(row[-1] == "+0.0000" for row in tables(out)[1].values())


def test_kinds_and_sources_differ(say: Say) -> None:
    settings = tables(say("films", "both")[1])[0]
    assert settings["kind"] == ["adapter", "fusion"]
    assert re.fullmatch(r"films [0-9a-f]{8}, slow [0-9a-f]{8}", settings["sources"][1])
    assert settings["sources"][0] == "-" and settings["task.name"] == ["films", "books"]
    assert {"data train", "data validation", "composition.name"} <= settings.keys()


def test_a_run_is_compared_by_its_artifact(trained: Bench, say: Say) -> None:
    run = str(trained.folder / "run of slow")
    code, out, err = say(run, "slow")
    assert (code, err) == (0, "") and out.startswith("no setting differs\n")
    assert tables(out)[2]["status"] == ["done", "-"]
    assert tables(say("films", run)[1])[0].keys() == {"optim.lr", "weights"}


def test_a_run_without_its_artifact_is_compared_by_its_settings(trained: Bench, tmp_path: Path, say: Say) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder / "run of slow", run)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(result | {"artifact": str(tmp_path / "gone")}))
    settings, scores, _ = tables(say("films", str(run))[1])
    assert settings.keys() == {"optim.lr"} and len(scores) == 2
    # values that only a manifest has cannot differ from unknown ones
    assert not any(key.startswith("inputs.") for key in tables(say("both", str(run))[1])[0])


def test_a_run_that_failed_has_settings_and_no_scores(trained: Bench, tmp_path: Path, say: Say) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder / "run of slow", run)
    (run / "result.json").unlink()
    (run / "status.json").write_text('{"status": "failed", "name": "slow"}')
    settings, scores, costs = tables(say("films", str(run))[1])
    assert settings.keys() == {"optim.lr"}
    assert all(row[1:] == ["-", "-"] for row in scores.values())
    assert costs["status"] == ["-", "failed"]


def test_two_seeds_of_one_setting_are_identified(
    trained: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever they are named; another setting of a source is one that differs."""
    store = tmp_path / "store"
    shutil.copytree(trained.folder / "store", store)
    for seed, rate in ((8, 0.005), (9, 0.1)):
        for name in ("films", "both"):
            shutil.copytree(store / name, store / f"{name}-{seed}")
            path = store / f"{name}-{seed}" / MANIFEST
            manifest = json.loads(path.read_text())
            manifest["run"]["config"]["seed"] = manifest["seed"] = seed
            if name == "films":
                manifest["run"]["config"]["optim.lr"] = rate
                manifest["files"]["weights.safetensors"]["sha256"] = str(seed) * 64
            else:
                films = read_side(f"films-{seed}", store).metadata["weights"]
                full = next(m.hash for _, m in artifacts(store) if m.hash.startswith(films))
                manifest["sources"][0] = {"name": f"films-{seed}", "hash": full}
            write_manifest(path, manifest | {"name": f"{name}-{seed}"})
    shown = {}
    for words in (("films", "films-8"), ("films", "films-9"), ("both", "both-8"), ("both", "both-9")):
        assert main([*words, f"store={store}"]) == 0
        shown[words] = [line for line in capsys.readouterr().out.splitlines() if "seeds:" in line or ".lr: " in line]
    seeds = ["same settings with different seeds: the scores only differ because of the seed"]
    assert shown == {
        ("films", "films-8"): seeds,
        ("films", "films-9"): [],
        ("both", "both-8"): seeds,
        ("both", "both-9"): ["sources.0.optim.lr: 0.005 and 0.1"],
    }


def test_settings_unknown_to_older_stores_are_no_difference(trained: Bench) -> None:
    side = read_side("films", trained.folder / "store")
    older = dataclasses.replace(side, settings={**side.settings, "adapter.drop": None, "adapter.shared": False})
    assert list(differing(side, older)) == []
    newer = dataclasses.replace(side, settings={**side.settings, "adapter.drop": "robust"})
    assert list(differing(side, newer)) == [("adapter.drop", "null", "robust")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected two artifacts or runs, not nothing"),
        (["films"], "not 'films'"),
        (["films", "slow", "both"], "not 'films' 'slow' 'both'"),
        (["films", ""], "not 'films' ''"),
        (["films", "slow", "stroe=x"], "unknown key stroe: did you mean store?; expected store=DIR"),
        (["films", "slow", "name=x"], "unknown key name; expected store=DIR"),
        (["films", "slow", "store="], "store=: expected store=DIR"),
        (["films", "slow", "store=a", "store=b"], "store=b: expected store=DIR, once"),
        (["films", "nobody", "store=nowhere"], "nowhere"),
    ],
)
def test_a_wrong_command(say: Say, words: list[str], message: str) -> None:
    code, out, err = say(*words, store=False)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) <= 2


def test_a_path_may_have_an_equals_sign() -> None:
    read = read_arguments(["a/seed=1", "b", "store=s"], {"store": "DIR"}, (2, 2), "two")
    assert read == (["a/seed=1", "b"], {"store": "s"})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("status.json", "{", "status.json: cannot be read"),
        ("status.json", "[]", "status.json: expected a mapping of keys"),
        ("result.json", "\x00", "result.json: cannot be read"),
        ("result.json", "[" * 100_000, "result.json: cannot be read"),
        ("config.yaml", "a: [", "config.yaml: cannot be read"),
        ("config.yaml", "- a", "config.yaml: expected a mapping of keys"),
        ("config.yaml", "!!python/object:os.system {}", "config.yaml: cannot be read"),
        ("config.yaml", None, "config.yaml: cannot be read"),
    ],
)
def test_a_damaged_run(trained: Bench, tmp_path: Path, say: Say, file: str, content: str | None, message: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder / "run of slow", run)
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    code, out, err = say("films", str(run))
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("result", [{"metrics": [1], "parameters": 3, "speed": "x"}, {"metrics": {"v": 1}}])
def test_a_result_of_another_shape_is_no_crash(
    trained: Bench, tmp_path: Path, say: Say, result: dict[str, object]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder / "run of slow", run)
    (run / "result.json").write_text(json.dumps(result))
    assert say("films", str(run))[0] == 0


def test_a_damaged_artifact(trained: Bench, tmp_path: Path, say: Say) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(trained.folder / "store" / "films", broken)
    (broken / MANIFEST).write_text("{")
    code, out, err = say("films", str(broken))
    assert (code, out) == (2, "") and "is not valid JSON" in err and len(err.splitlines()) == 1


def test_control_characters_are_not_printed(trained: Bench, tmp_path: Path, say: Say) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.folder / "run of slow", run)
    (run / "status.json").write_text('{"status": "do\\u001b[31mne", "name": "sl\\u001bow"}')
    out = say("films", str(run))[1]
    assert "\x1b" not in out and "sl\\x1bow" in out


def test_differences() -> None:
    assert (difference(0.5, 0.25), difference(None, 0.5)) == ("-0.2500", "-")


def test_help_imports_no_heavy_modules() -> None:
    code = (
        "import sys; from fusion.compare import main; main(['--help'])\n"
        "print([m for m in ('torch', 'hydra', 'numpy', 'wandb', 'transformers', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]"
    assert done.stdout.startswith("python -m fusion.compare A B [store=DIR]")
