"""python -m fusion.store: what it prints, what it refuses, its exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion.errors import UserError
from fusion.locks import run_lock
from fusion.model.from_manifests import head_shapes, weight_shapes
from fusion.store.__main__ import COMMANDS, main
from fusion.store.artifacts import load_by_hash, save
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.listing import as_bytes
from fusion.store.lookup import names, read_manifest
from fusion.store.manifest import Manifest, checksum_of
from fusion.store.writing import remove, writing
from tests.cli.fake_terminal import at_terminal
from tests.store.conftest import exit_code, fork

Say = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], store: Path) -> Say:
    """Runs the program on the store: exit code, output, errors."""

    def run(*words: str) -> tuple[int, str, str]:
        code = main([*words, f"store={store}"])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def put(store: Path, manifest: Manifest, value: float = 1.0, sources: list[Manifest] | None = None, **how: Any) -> Path:
    """Stores an artifact with the tensors of its manifest, filled with one value."""
    shapes = weight_shapes(manifest, sources or [], Path()) or {}
    weights = {name: torch.full(shape, value) for name, shape in shapes.items()}
    head = {name: torch.full(shape, value) for name, shape in head_shapes(manifest, Path()).items()}
    return save(store, manifest, weights, head, **how)


@pytest.fixture
def full(store: Path, make_manifest: Callable[..., Manifest]) -> Path:
    """Two adapters, a fusion of them, and a head."""
    for number, name in enumerate(("films", "books")):
        put(store, make_manifest(name), float(number))
    sources = [read_manifest(name, store) for name in ("films", "books")]
    named = [{"name": source.name, "hash": source.hash} for source in sources]
    put(store, make_manifest("both", "fusion", sources=named), 0.5, sources)
    put(store, make_manifest("head", "head", task={"name": "films"}, metrics={}))
    return store


def test_list(say: Say, full: Path) -> None:
    code, out, err = say("list")
    assert (code, err) == (0, "")
    lines = [re.split(r"  +", line) for line in out.splitlines()]
    assert lines[0] == ["name", "kind", "task", "backbone", "what", "seed", "score", "size", "when", "used by"]
    assert [line[0] for line in lines[1:]] == ["books", "both", "films", "head"]
    assert lines[2][1:7] == ["fusion", "both", "tiny", "adapterfusion of 2", "3", "accuracy 0.5"]
    assert lines[3][1:7] == ["adapter", "films", "tiny", "feedforward/normed", "3", "accuracy 0.5"]
    assert lines[4][1:7] == ["head", "films", "tiny", "-", "3", "-"]
    assert [line[-1] for line in lines[1:]] == ["both", "-", "both", "-"]
    size = sum(file.stat().st_size for file in (full / "films").iterdir())
    assert lines[3][7] == as_bytes(size)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", lines[3][8])
    assert len({line.index("adapter") for line in out.splitlines() if "adapter " in line}) == 1  # aligned


@pytest.mark.parametrize("width", [60, 100, 160])
def test_list_at_a_terminal_truncates_no_name(full: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    terminal = at_terminal(monkeypatch, width)
    assert main(["list", f"store={full}"]) == 0
    assert all(len(line) <= width for line in terminal.text.splitlines()) and "─" in terminal.text
    if width == 160:
        assert {"books", "both", "films", "head", "feedforward/normed", "tiny"} <= set(terminal.text.split())


def test_truncated_weights_are_named_without_reading_them(say: Say, full: Path) -> None:
    weights = full / "books" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    _, out, _ = say("list")
    (line,) = (line for line in out.splitlines() if line.startswith("damaged: "))
    assert "books" in line and "bytes, expected" in line and "retrain it with overwrite=true" in line
    code, _, err = say("show", "books")
    assert code == 2 and "bytes, expected" in err


def test_list_names_damaged_and_leftover_folders(say: Say, full: Path) -> None:
    (full / "books" / MANIFEST).write_text("{")
    (full / "stray").mkdir()
    (full / "odd\u202ename").mkdir()
    (full / ".runs" / "films-0123456789ab").mkdir(parents=True)
    (full / ".runs" / "plays-999999999999").mkdir()
    (full / ".runs" / "books-888888888888").mkdir()
    (full / ".runs" / "books-888888888888" / "attempt.json").write_text('{"status": "failed"}')
    (full / ".staging" / "plays~new").mkdir()
    shutil.copytree(full / "films", full / ".staging" / "gone.old")
    code, out, _ = say("list")
    assert code == 0
    damaged = [line for line in out.splitlines() if line.startswith("damaged: ")]
    assert [line.split()[1] for line in damaged] == ["books:", "odd\\u202ename:", "stray:"]
    assert "is not valid JSON" in damaged[0] and "is missing" in damaged[2]
    left = {line.split()[1]: line for line in out.splitlines() if line.startswith("left: ")}
    assert set(left) == {
        ".runs/books-888888888888", ".runs/films-0123456789ab", ".runs/plays-999999999999", ".staging/plays~new",
        ".staging/gone.old",
    }  # fmt: skip
    assert "of a finished run" in left[".runs/films-0123456789ab"]
    assert "an interrupted run; the same command reruns it; to discard it, del" in left[".runs/plays-999999999999"]
    assert (
        "a run that failed; the same command reruns it; to discard it, delete the directory"
        in left[".runs/books-888888888888"]
    )
    assert "partially written" in left[".staging/plays~new"]
    assert "the only copy of gone" in left[".staging/gone.old"]
    assert "\u202e" not in out


def test_an_active_run_is_not_a_leftover(say: Say, full: Path) -> None:
    for run in ("films-0123456789ab", "plays-999999999999"):
        (full / ".runs" / run).mkdir(parents=True)
    (full / ".staging" / "plays~new").mkdir()
    with run_lock(full, "films"), run_lock(full, "plays"), writing(full, "plays"):
        for command in ("list", "verify"):
            code, out, _ = say(command)
            lines = [line for line in out.splitlines() if line.startswith("left")]
            assert code == 0 and len(lines) == 3
            assert all("running: it is being" in line for line in lines), lines
            assert f"process {os.getpid()}" in lines[0]
            assert "rm -r" not in out and "interrupted" not in out and "of a finished run" not in out
    (full / ".staging" / "plays~new").mkdir(exist_ok=True)
    code, out, _ = say("verify")
    assert out.count("rm -r") == 2 and "an interrupted run" in out and "running" not in out


def test_an_empty_or_missing_store(say: Say, store: Path) -> None:
    for words in (["list"], ["verify"]):
        code, out, err = say(*words)
        assert (code, out) == (2, "") and "store=DIR" in err
    store.mkdir(parents=True)
    assert say("list") == (0, f"{store} has no artifacts\n", "")
    assert say("verify") == (0, "0 of 0 artifacts are valid\n", "")


def test_show(say: Say, full: Path) -> None:
    code, out, err = say("show", "both")
    assert (code, err) == (0, "")
    manifest = read_manifest("both", full)
    for expected in (
        manifest.hash,
        "labels: no, yes",
        manifest.backbone.fingerprint,
        "validation: accuracy 0.5",
        "train " + "0" * 64,
        f"torch {torch.__version__}",
        "git           unknown",
        "threads       unknown",
        *(source.hash for source in manifest.sources),
        *(entry.sha256 for entry in manifest.files.values()),
        *(f"{entry.bytes:,} bytes" for entry in manifest.files.values()),
        f"found: {full / 'films'}",
    ):
        assert expected in out
    shutil.rmtree(full / "films")
    assert "NOT FOUND" in say("show", "both")[1]
    code, out, err = say("show", "bot")
    assert (code, out) == (2, "") and "did you mean both" in err


def with_run(manifest: Manifest, *overrides: str, **run: Any) -> Manifest:
    return manifest.changed(run={**manifest.content["run"], "overrides": list(overrides), **run})


def commands(out: str) -> list[str]:
    return out.split("to reproduce it:\n")[1].splitlines()


def test_the_commands_that_reproduce_it(
    say: Say, store: Path, make_manifest: Callable[..., Manifest], tmp_path: Path
) -> None:
    config = {"data.dir": "/my data/it's"}
    first = with_run(
        make_manifest("films", seed=5), "+task=films", "store=x", "name=n-${seed}", "seed=1", "optim.lr=0.1",
        "overwrite=true", "resume=false", "adapter.layers=[0,1]", config=config, folder="/a work",
        environment={"FUSION_CONF": "/my conf"},
    )  # fmt: skip
    put(store, first)
    put(store, with_run(make_manifest("books"), "+task=books", "data.dir=rows", config=config), 2.0)
    sources = [read_manifest(name, store) for name in ("films", "books")]
    named = [{"name": source.name, "hash": source.hash} for source in sources]
    fusion = make_manifest("both", "fusion", sources=named)
    put(store, with_run(fusion, "+task=plays", "sources=[/elsewhere/films,books]"), sources=sources)
    put(store, with_run(make_manifest("films", seed=6), "+task=films"), 3.0, overwrite=True)
    other = tmp_path / "other store"
    _, out, _ = say("show", "both", f"into={other}")
    assert commands(out) == [
        "cd '/a work'",
        "FUSION_CONF='/my conf' python -m fusion.stage1 +task=films optim.lr=0.1 'adapter.layers=[0,1]' "
        "'data.dir=\"/my data/it'\"'\"'s\"' name=films "
        f"'store=\"{other}\"' seed=5",
        f"python -m fusion.stage1 +task=books data.dir=rows name=books 'store=\"{other}\"' seed=3",
        f"python -m fusion.stage2 +task=plays 'sources=[films,books]' name=both 'store=\"{other}\"' seed=3",
    ]
    _, out, _ = say("show", "films")
    assert commands(out) == [f"python -m fusion.stage1 +task=films name=films store={store} seed=6"]
    shutil.rmtree(store / "books")
    _, out, _ = say("show", "both")
    assert sum(line.startswith("# source books") for line in commands(out)) == 1
    _, out, _ = say("show", str(put(store, make_manifest("quiet"))))
    assert commands(out)[0].startswith("# quiet was not created by a command")


def test_a_sound_store_is_verified(say: Say, full: Path) -> None:
    code, out, err = say("verify")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        *(f"ok       {name}" for name in ("books", "both", "films", "head")), "4 of 4 artifacts are valid",
    ]  # fmt: skip
    code, out, _ = say("verify", "films")
    assert (code, out) == (0, "ok       films\n1 of 1 artifacts are valid\n")
    assert say("verify", "plays")[0] == 2


def rewrite(folder: Path, file: str, tensors: dict[str, torch.Tensor]) -> None:
    """Other content, and a manifest that agrees with it."""
    import hashlib

    import safetensors.torch

    content = safetensors.torch.save(tensors)
    (folder / file).write_bytes(content)
    values = json.loads((folder / MANIFEST).read_text())
    values["files"][file] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    values["checksum"] = checksum_of(values)
    (folder / MANIFEST).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "weights.safetensors is missing or not a regular file; copy the artifact again"),
        ("extra", "notes.txt does not belong to an artifact; move it elsewhere"),
        ("cut", "weights.safetensors: has 1 bytes, expected"),
        ("changed", "weights.safetensors was modified: sha256"),
        ("manifest", "manifest.json is not valid JSON"),
        ("no manifest", "manifest.json is missing"),
        ("shape", "of a different shape: 0.feedforward.down.bias (3,), expected (2,)"),
        ("name", "missing: 0.feedforward.down.bias; unexpected: x"),
        ("nan", "0.feedforward.down.bias contains NaN or infinity"),
        ("type", "0.feedforward.down.bias is torch.int64, expected a float"),
    ],
)
def test_problems_are_named(say: Say, full: Path, how: str, says: str) -> None:
    folder = full / "head" if how in ("missing", "extra") else full / "films"
    weights = folder / WEIGHTS
    tensors = {
        name: torch.ones(shape)
        for name, shape in (weight_shapes(read_manifest(folder.name, full), [], Path()) or {}).items()
    }
    bias = "0.feedforward.down.bias"
    if how == "missing":
        weights.unlink()
    elif how == "extra":
        (folder / "notes.txt").touch()
    elif how == "cut":
        weights.write_bytes(b"1")
    elif how == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif how == "manifest":
        (folder / MANIFEST).write_text("{")
    elif how == "no manifest":
        (folder / MANIFEST).unlink()
    elif how == "name":
        rewrite(folder, WEIGHTS, {("x" if name == bias else name): value for name, value in tensors.items()})
    else:
        other = {"shape": torch.ones(3), "nan": torch.tensor([1.0, float("nan")]), "type": torch.ones(2).long()}
        rewrite(folder, WEIGHTS, tensors | {bias: other[how]})
    code, out, _ = say("verify")
    lines = {line.split()[1].rstrip(":"): line for line in out.splitlines()[:-1]}
    assert code == 1 and set(lines) == {"both", "books", "films", "head"}
    assert lines[folder.name].startswith(f"problem  {folder.name}: ") and says in lines[folder.name]
    assert lines["books"] == "ok       books"
    # A fusion's source is found by its hash, which is computed from its manifest.
    hash_gone = how in ("manifest", "no manifest", "shape", "name", "nan", "type")
    assert ("source films" in lines["both"]) == hash_gone
    assert out.splitlines()[-1] == f"{2 if hash_gone else 3} of 4 artifacts are valid"
    assert say("verify", folder.name)[0] == 1 and say("verify", "books")[0] == 0


def test_replaced_artifacts_and_leftovers_are_verified(
    say: Say, full: Path, make_manifest: Callable[..., Manifest]
) -> None:
    put(full, make_manifest("films", seed=9), 7.0, overwrite=True)
    (kept,) = (full / ".replaced").iterdir()
    (full / ".runs" / "films-0123456789ab").mkdir(parents=True)
    code, out, _ = say("verify")
    assert code == 0 and f"ok       .replaced/{kept.name}" in out
    assert f"rm -r '{full / '.runs' / 'films-0123456789ab'}' frees it" in out
    (kept / WEIGHTS).write_bytes(b"")
    code, out, _ = say("verify")
    assert code == 1 and f"problem  .replaced/{kept.name}: " in out


def test_remove(say: Say, full: Path) -> None:
    code, out, err = say("remove", "films")
    assert (code, out) == (2, "")
    assert err.startswith("films is a source of both; remove them first, or set force=true")
    assert names(full) == ["books", "both", "films", "head"]
    assert say("remove", "head") == (0, "removed head\n", "")
    assert say("remove", "both") == (0, "removed both\n", "")
    assert say("remove", "films", "force=false") == (0, "removed films\n", "")
    assert names(full) == ["books"] and not list((full / ".staging").iterdir())
    code, _, err = say("remove", "films")
    assert code == 2 and "no artifact 'films'" in err and "It contains books" in err


def test_forced_removal_keeps_what_fusions_need(say: Say, full: Path) -> None:
    hash = read_manifest("films", full).hash
    code, out, _ = say("remove", "films", "force=true")
    kept = full / ".replaced" / f"films-{hash[:8]}"
    assert (code, out) == (0, f"removed films; both finds it in {kept}\n")
    assert names(full) == ["books", "both", "head"]
    assert load_by_hash(hash, "films", full).path == kept
    assert say("verify")[0] == 0
    put(full, read_manifest("books", full).changed(name="films", files={}))  # the name is free


def test_a_source_is_kept_if_a_damaged_fusion_may_need_it(say: Say, full: Path) -> None:
    manifest = full / "both" / MANIFEST
    manifest.write_text(manifest.read_text()[:-20])
    code, _, err = say("remove", "films")
    assert code == 2 and err.startswith("films may be a source of the unreadable both; ")
    assert say("remove", "films", "force=true")[0] == 0
    assert [path.name.partition("-")[0] for path in (full / ".replaced").iterdir()] == ["films"]
    assert say("remove", "head")[0] == 0  # no fusion has a head for a source
    assert say("remove", "both") == (0, "removed both\n", "")
    assert say("remove", "books") == (0, "removed books\n", "")


def test_a_copy_under_another_name_allows_removal(say: Say, full: Path) -> None:
    shutil.copytree(full / "films", full / "copy")
    assert say("remove", "films") == (0, "removed films\n", "")
    assert say("verify")[0] == 0
    assert say("remove", "copy")[0] == 2  # now it is the last one


def test_damaged_artifacts_can_be_removed_and_other_paths_cannot(say: Say, full: Path, tmp_path: Path) -> None:
    (full / "books" / MANIFEST).write_text("{")
    assert say("remove", "books") == (0, "removed books\n", "")
    (full / "remains").mkdir()
    (full / "remains" / WEIGHTS).touch()
    assert say("remove", "remains") == (0, "removed remains\n", "")
    (full / "thesis").mkdir()
    (full / "thesis" / "thesis.tex").touch()
    code, _, err = say("remove", "thesis")
    assert code == 2 and "is not an artifact" in err and (full / "thesis" / "thesis.tex").exists()
    (full / "file").touch()
    assert say("remove", "file")[0] == 2 and (full / "file").exists()
    shutil.move(full / "head", tmp_path / "head elsewhere")
    (full / "head").symlink_to(tmp_path / "head elsewhere")
    assert say("remove", "head") == (0, "removed head\n", "")
    assert (tmp_path / "head elsewhere" / HEAD).exists()  # a link goes, what it points to stays


def test_removing_an_unknown_name_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no artifact"):
        remove("typo", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_remove_waits_for_a_writer(full: Path) -> None:
    with writing(full, "head"), pytest.raises(UserError, match="is being written by process"):
        remove("head", full, wait=0.1)
    assert "head" in names(full)


def test_a_removal_that_was_killed(full: Path, make_manifest: Callable[..., Manifest]) -> None:
    def removed() -> None:
        remove_tree = shutil.rmtree

        def killed(path: Path, **more: Any) -> None:
            if path.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            remove_tree(path, **more)

        shutil.rmtree = killed  # type: ignore[assignment]
        remove("head", full)

    assert exit_code(fork(removed)) == -signal.SIGKILL
    assert names(full) == ["books", "both", "films"]
    assert [entry.name for entry in (full / ".staging").iterdir()] == ["head~removed"]
    put(full, make_manifest("head", "head"))
    assert list((full / ".staging").iterdir()) == []


BAD_NAMES = [
    "../films", "..", ".", "", "/films", "/etc/passwd", "films/../../x", "films/", "a/b", "a\\b", "..\\films",
    ".runs", ".replaced", ".staging", ".locks", "-films", "_films", "films.", "films ", " films", "films\n",
    "films\t", "fi lms", "films\0", "films\u202e", "\u202efilms", "\u200bfilms", "fi\u00adlms", "f\u0456lms",
    "ﬁlms", "films\u0301", "ｆilms", "films\ufeff", "\ud800", "a" * 101,
    "films~new", "films:stream", "films*", "films?", "$HOME", "`x`", "films;rm", "~", "~root", "film\u2024s", "١",
]  # fmt: skip


def test_names_that_would_leave_the_store(full: Path, make_manifest: Callable[..., Manifest], tmp_path: Path) -> None:
    before = sorted(path for path in tmp_path.rglob("*") if ".locks" not in path.parts)
    valid = make_manifest("films").to_json()
    for name in BAD_NAMES:
        with pytest.raises(UserError, match="expected at most 100 letters"):
            remove(name, full)
        with pytest.raises(UserError, match="expected at most 100 letters"):
            save(full, make_manifest(name), {}, {})
        text = valid.replace('"name": "films"', f'"name": {json.dumps(name)}', 1)
        with pytest.raises(UserError, match=r"name: |is not valid JSON"):
            Manifest.from_json(text, Path("m"))
    assert sorted(path for path in tmp_path.rglob("*") if ".locks" not in path.parts) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "unknown command ''; expected one of list, show, verify, remove"),
        (["lst"], "unknown command 'lst': did you mean list?"),
        (["list", "films"], "expected no name, not 'films'"),
        (["show"], "expected the NAME of an artifact, not nothing"),
        (["show", "a", "b"], "expected the NAME of an artifact, not 'a' 'b'"),
        (["verify", "a", "b"], "expected at most one NAME"),
        (["remove", ""], "expected the NAME of an artifact"),
        (["list", "stroe=x"], "unknown key stroe: did you mean store?; expected store=DIR"),
        (["list", "force=true"], "unknown key force; expected store=DIR"),
        (["remove", "a", "force=yes"], "force=yes: expected true or false"),
        (["list", "store="], "store=: expected store=DIR"),
        (["list", "store=a", "store=b"], "store=b: expected store=DIR, once"),
    ],
)
def test_a_wrong_command_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == "" and says in output.err and output.err.count("\n") == 1


def test_help_lists_every_command_and_key(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["list", "-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        for command, (keys, *_) in COMMANDS.items():
            assert re.search(rf"^    {command} ", out, re.MULTILINE)
            assert all(f"    {key}=" in out for key in keys)


def test_the_program_does_not_import_torch(full: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv[1:] = ['list', 'store={full}']\n"
        "try: runpy.run_module('fusion.store', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "sys.argv[1] = 'show'; sys.argv.insert(2, 'both')\n"
        "try: runpy.run_module('fusion.store', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torch', 'transformers', 'safetensors', 'hydra', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
