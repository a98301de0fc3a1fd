"""The content, safety and size of the page, and the files beside it."""

from __future__ import annotations

import csv
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fusion.errors import UserError
from fusion.reporting import page
from fusion.reporting.contents import Contents, inspected, latex, save_table, table
from fusion.reporting.page import write_files
from fusion.reporting.reading import read_runs
from fusion.reporting.records import POINTS, Attention, by_target, curves_of, history_of, layer_names, pack
from fusion.reporting.scores import trained_runs
from fusion.reporting.targets import targets_of
from tests.reporting.conftest import Write

ABOUT = {"runs": "runs", "made": "today", "command": "python -m fusion.report"}
EVIL = "</script><img src=x onerror=alert(1)>\"'&$x_1$"


class Tags(HTMLParser):
    """Every tag with its attributes, and all ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id" and value]


def inspection(**changes: Any) -> dict[str, Any]:
    weights = np.random.RandomState(0).dirichlet([1, 1], (3, 4))
    score = {"metrics": {"accuracy": 0.7}, "loss": 0.5}
    return {
        "name": "fused",
        "hash": "h" * 64,
        "task": "tweets",
        "split": "validation",
        "rows": 20,
        "sources": ["a", "b"],
        "slots": ["0.feedforward", "1.feedforward", "2.feedforward"],
        "metrics": {"accuracy": 0.8},
        "attention": {f"{n}.feedforward": {"mean": [0.3, 0.7], "entropy": 0.5} for n in range(3)},
        "masked": {"a": score, "b": score},
        "pruned": [{"kept": ["a", "b"], **score}, {"kept": ["b"], **score}],
        "words": [
            {
                "row": 3,
                "texts": ["a good film"],
                "tokens": [" [CLS]", " a", " good", "ish"],
                "special": [0],
                "weights": pack(weights),
                "predicted": "good (0.93)",
                "truth": "bad",
                "right": False,
            }
        ],
    } | changes


def contents(tmp_path: Path, seen: dict[str, Any] | None = None) -> Contents:
    found = read_runs([tmp_path / "runs"])
    targets = targets_of(found)
    made = Contents(found, targets)
    if seen is not None:
        target = targets[0]
        method = next(method for method in target.groups if method.startswith("fusion"))
        group = target.groups[method]
        made.inspected = [one for one in [inspected(target, group, group.trained[0], seen)] if one]
    return made


def written(made: Contents, tmp_path: Path, files: Path | None = None) -> str:
    output = tmp_path / "report.html"
    assert page.write_page(made, output, ABOUT, files) == output.stat().st_size
    return output.read_text(encoding="utf-8")


def write_attention(folder: Path, name: str = "a") -> None:
    slots = {f"{n}.feedforward": {"mean": [0.25, 0.75], "entropy": 0.56, "value_distance": 0.1} for n in range(3)}
    lines = [{"step": 5 * e, "epoch": e, "sources": [name, "b"], "slots": slots} for e in (1, 2)]
    (folder / "attention.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_history(folder: Path, run: str, steps: range, loss: float = 1.0, started: str = "1") -> None:
    lines: list[dict[str, Any]] = [{"run": run, "name": "n", "command": "stage2", "started": started}]
    lines += [{"step": step, "epoch": 0, "train/loss": loss / (step + 1), "train/task_loss": 1.0} for step in steps]
    lines += [{"step": steps[-1], "epoch": 0, "validation/accuracy": 0.5 + steps[-1] / 100}]
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def example_runs(write: Write, task: str = "tweets") -> None:
    for seed, (adapter, fused) in enumerate([(6, 2), (7, 1)], start=1):
        write(task, seed=seed, score=1 - adapter / 20, wrong=adapter)
        folder = write(task, seed=seed, score=1 - fused / 20, wrong=fused, sources=["a", "b"])
        write_attention(folder)
        write_history(folder, f"{task}-{seed}", range(0, 40, 10))


def test_content_of_the_page(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    text = written(contents(tmp_path, inspection()), tmp_path)
    for text_part in ("0.675", "± 0.035", "0.925", "+0.250 ▲", "2 seeds", "20 examples", "fusion of 2", "good (0.93)"):
        assert text_part in text, text_part
    for section in ("helped", "listened", "words", "needed", "curves", "cost", "runs", "rebuild"):
        assert f'<section id="{section}">' in text
    assert 'class="nothing"' not in text
    assert text.count('<svg class="figure"') == 4, "entropy, needed, curves, cost"
    assert "python -m fusion.stage1 +task=tweets seed=1" in html.unescape(text)


def test_settings_have_rows_and_unequal_budgets_no_verdict(tmp_path: Path, write: Write) -> None:
    for layers, wrong in (([0], 9), ([1], 7), ([2], 5)):
        metrics = {"validation": {"accuracy": 1 - wrong / 20, "macro_f1": 0.123}}
        write(wrong=wrong, adapter__layers=layers, result={"metrics": metrics})
    write(wrong=1, score=0.95, sources=["a", "b"], optim__lr=0.5)
    text = written(contents(tmp_path), tmp_path)
    rows = re.findall(r'<tr><th scope="row"><a href="#[^"]+">(?:single|fusion).*?</tr>', text, re.DOTALL)
    assert len(rows) == 4 and "best of" not in text
    assert "not at equal budget: optim.lr 0.5 vs. 0.001" in rows[0] and "▲" not in rows[0]
    assert [re.search(r"layers=<wbr>(\d)", row)[1] for row in rows[1:]] == ["2", "1", "0"]  # type: ignore[index]
    assert "baseline" in rows[1] and "best on validation" in rows[1]
    assert all(re.search(r"<small>[−+0].* to .*</small>", row) for row in (rows[0], *rows[2:]))
    assert "macro_f1 0.123" in rows[1] and "majority class" in text
    assert text.count("mean over tokens") >= 1 or "entropy" not in text


def test_differences_name_the_number_of_common_seeds(tmp_path: Path, write: Write) -> None:
    """The means are of three seeds and of two; a target with one method is in the tables too."""
    example_runs(write)
    write(seed=3, score=0.1, wrong=18, sources=["a", "b"])
    write("movies", seed=1, score=0.5)
    made = contents(tmp_path)
    text = written(made, tmp_path)
    write_files(made, tmp_path / "files")
    assert text.count("<small>over the 2 common seeds</small>") == 2 and "<small>3 seeds</small>" in text
    with open(tmp_path / "files" / "differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seeds"], row["pairs"], row["difference"][:4]) for row in rows] == [
        ("single adapter", "2", "", ""),
        ("fusion of 2", "3", "2", "0.25"),
    ]
    for name in ("scores", "metrics", "cost"):
        with open(tmp_path / "files" / f"{name}.csv", newline="") as file:
            assert {row["target"] for row in csv.DictReader(file)} >= {"tweets", "movies"}, name


def test_figures_name_the_chosen_setting(tmp_path: Path, write: Write) -> None:
    for rate, wrong in ((0.1, 1), (0.2, 4), (0.3, 8)):
        for seed in (1, 2):
            folder = write(seed=seed, score=1 - wrong / 20, wrong=wrong, sources=["a", "b"], optim__lr=rate)
            write_attention(folder)
            write_history(folder, f"{rate}-{seed}", range(0, 40, 10))
    write(score=0.5, wrong=10)
    named = "setting optim.lr=0.1, best of 3 on validation"
    made = contents(tmp_path, inspection())
    assert [one.setting for one in made.attention] == [named]
    assert made.inspected[0]["setting"] == named
    text = written(made, tmp_path)
    for section, count in (("listened", 2), ("words", 1), ("needed", 1)):
        content = text[text.index(f'<section id="{section}">') :].partition("</section>")[0]
        assert re.sub(r"<svg.*?</svg>", "", content, flags=re.DOTALL).count(named) == count, section
    write_files(made, tmp_path / "files")
    with_note = ("attention-tweets-fusion-of-2", "attention-by-target", "entropy")
    for name in (*with_note, "needed-tweets-fusion-of-2", "curves-tweets"):
        lines = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "files" / f"{name}.svg").read_text())
        assert named in " ".join(lines), name
    with open(tmp_path / "files/needed.csv", newline="") as file:
        assert {row["setting"] for row in csv.DictReader(file)} == {named}
    for one in ("scores", "attention-tweets-fusion-of-2"):
        assert named in (tmp_path / "files" / f"{one}.tex").read_text(), one


def test_single_setting_is_not_named(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    made = contents(tmp_path, inspection())
    text = written(made, tmp_path)
    assert (
        made.attention[0].setting == ""
        and "best on" not in text
        and "best of" not in text
        and "for methods with multiple settings, the best" not in text
    )


def test_optimistic_scores_have_one_note(tmp_path: Path, write: Write) -> None:
    folders = [write(score=0.8, wrong=4, artifact="a"), write("other", score=0.9, result={"epochs": 1})]
    text = written(contents(tmp_path), tmp_path)
    assert text.count("optimistic: the best epoch (tweets).") == 1 == text.count("optimistic:")
    assert text.index('id="optimistic"') < text.index("<table")
    write(score=0.7, wrong=6, optim__lr=0.5)
    text = written(contents(tmp_path), tmp_path)
    assert "optimistic: the best epoch and the best setting of a method." in text, "other is not compared"
    for folder in folders[:1]:
        (folder / "status.json").write_text((folder / "status.json").read_text().replace('"done"', '"failed"'))
    result = {"hash": None, "name": "a"}
    write(command="evaluate", split="test", score=0.7, artifact="a", result=result)
    found = read_runs([tmp_path / "runs"])
    assert 'id="optimistic"' not in written(Contents(found, targets_of(found, "test")), tmp_path)


def test_ablation_has_color_only_if_conclusive(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    labels = [0, 1] * 50
    wrong = {"much": 40, "little": 1}
    masked = {
        name: {
            "metrics": {"accuracy": 1 - count / 100},
            "loss": 0.5,
            "predicted": [1 - label if row < count else label for row, label in enumerate(labels)],
        }
        for name, count in wrong.items()
    }
    masked["unknown"] = {"metrics": {"accuracy": 0.2}, "loss": 0.5}
    seen = inspection(metrics={"accuracy": 1.0}, labels=labels, predicted=labels, masked=masked, rows=100)
    changes = contents(tmp_path, seen).inspected[0]["changes"]
    assert {name: change.conclusive for name, change in changes.items()} == {
        **{"much": True, "little": False, "unknown": False}
    }
    assert -0.55 < changes["much"].low < -0.4 < changes["much"].high < -0.25
    assert changes["unknown"].low is None
    text = written(contents(tmp_path, seen), tmp_path)
    assert '<td class="worse">−0.4000</td>' in text and '<td class="same">−0.0100</td>' in text


def test_links_resolve_and_ids_are_unique(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    example_runs(write, "cb")
    seen = Tags(written(contents(tmp_path, inspection()), tmp_path))
    assert len(seen.ids) == len(set(seen.ids))
    links = [attrs["href"] for tag, attrs in seen.tags if tag == "a"]
    within = {link[1:] for link in links if link and link.startswith("#")}
    assert len(within) > 10 and within <= set(seen.ids)
    for link in links:
        if link and not link.startswith("#"):
            assert (tmp_path / link).is_dir(), link
    uses = re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', (tmp_path / "report.html").read_text())
    assert uses and set(uses) <= set(seen.ids)


def test_untrusted_text_is_inert(tmp_path: Path, write: Write) -> None:
    """Names and texts may be anything: they are shown as they are."""
    task = EVIL
    for wrong in (2, 3):
        write(task, score=0.9, wrong=wrong, method__name=EVIL if wrong == 3 else "adapter", artifact="evil")
    folder = write(task, sources=[EVIL, "b"], wrong=1, score=0.95)
    write_attention(folder, EVIL)
    write_history(folder, EVIL, range(0, 20, 10))
    words = inspection()["words"][0] | {"tokens": [f" {EVIL}", "a", "b", "c"], "predicted": EVIL, "truth": EVIL}
    masked = {EVIL: inspection()["masked"]["a"]}
    made = contents(tmp_path, inspection(words=[words], sources=[EVIL, "b"], masked=masked))
    made.notes.append(EVIL)
    text = written(made, tmp_path)
    seen = Tags(text)
    assert "<img" not in text and text.count("<script") == 2 == text.count("</script>")
    assert html.unescape(text).count("onerror") > 10
    for tag, attrs in seen.tags:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        assert tag not in ("img", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "xlink:href", "action"):
            value = attrs.get(name) or ""
            assert not re.match(r"(?i)\s*(https?:|//|javascript:|file:)", value), (tag, value)
    policy = next(attrs["content"] for tag, attrs in seen.tags if attrs.get("http-equiv"))
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    (one,) = json.loads(data[1])["words"].values()
    assert [name for name, _ in one["sources"]] == [EVIL, "b"]


def test_only_web_addresses_are_links(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    target = contents(tmp_path).targets[0]
    for url, expected in (("javascript:alert(1)", 0), ("https://wandb.ai/x", 1)):
        for entry in (entry for group in target.every_group for entry in group.entries):
            object.__setattr__(entry.trained, "manifest", _Tracked(url))
            links = page.links(entry, tmp_path / "report.html")
            assert list(links.values()).count(url) == expected and len(links) == 1 + expected


class _Tracked:
    def __init__(self, url: str) -> None:
        self.run = SimpleNamespace(wandb={"url": url})


def test_page_stays_below_five_megabytes(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    rows = 600
    tokens = [" word"] * 100
    packed = pack(np.full((3, 100, 2), 0.5))
    words = [inspection()["words"][0] | {"row": n, "tokens": tokens, "weights": packed} for n in range(rows)]
    text = written(contents(tmp_path, inspection(words=words)), tmp_path)
    assert len(text.encode()) <= page.LARGEST
    assert "limited to 4 examples per fusion" in text and text.count('<div class="row">') == 4


def test_page_that_is_too_large(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    example_runs(write)
    monkeypatch.setattr(page, "LARGEST", 1000)
    with pytest.raises(UserError, match="fewer runs"):
        page.write_page(contents(tmp_path), tmp_path / "report.html", ABOUT, None)
    assert not (tmp_path / "report.html").exists()


def test_without_finished_runs(tmp_path: Path, write: Write) -> None:
    write(status="failed")
    text = written(contents(tmp_path), tmp_path)
    assert text.count('class="nothing"') == 7
    assert "1 failed" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {}},
        {"masked": {"a": {}}},
        {"words": [{"row": 1}]},
        {"pruned": [{"kept": []}]},
        {"masked": []},
        {"metrics": {"accuracy": "high"}},
    ],
)
def test_damaged_inspection_is_omitted(tmp_path: Path, write: Write, changes: dict[str, Any]) -> None:
    example_runs(write)
    text = written(contents(tmp_path, inspection(**changes)), tmp_path)
    assert text.count('class="nothing"') == 2


def test_weights_of_another_length_are_omitted(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    words = inspection()["words"][0] | {"weights": "AAAA"}
    assert '<div class="row">' not in written(contents(tmp_path, inspection(words=[words])), tmp_path)


def test_figure_and_table_files(tmp_path: Path, write: Write) -> None:
    example_runs(write)
    folder = tmp_path / "some files"
    names = {path.name for path in write_files(contents(tmp_path, inspection()), folder)}
    figures = {"scores", "attention-tweets-fusion-of-2", "attention-by-target", "entropy", "needed-tweets-fusion-of-2"}
    figures |= {"curves-tweets", "cost-tweets", "confusion-tweets-single-adapter", "confusion-tweets-fusion-of-2"}
    table_names = {"scores", "differences", "metrics", "attention-tweets-fusion-of-2", "needed", "cost", "classes"}
    assert names == {f"{n}.{e}" for n in figures for e in ("png", "svg")} | {
        f"{n}.{e}" for n in table_names for e in ("csv", "tex")
    }
    assert {path.name for path in folder.iterdir()} == names
    for name in figures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.svg").read_text().rstrip().endswith("</svg>")
    with open(folder / "differences.csv", newline="") as file:
        fused = next(row for row in csv.DictReader(file) if row["method"] == "fusion of 2")
    assert float(fused["difference"]) == pytest.approx(0.25) and fused["wins"] == "2"


def test_latex_escapes_every_special_character() -> None:
    rows: list[list[Any]] = [["50% & #1 {x}~^\\", 0.123456], ["±", None]]
    text = latex(table("t", "a\nb", ("target", "fusion_of 2"), rows))
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 3 and all(len(re.split(r"(?<!\\)&", line)) == 2 for line in body)
    assert r"50\% \& \#1 \{x\}" in text
    assert all(rf"\text{name}" in text for name in ("asciitilde", "asciicircum", "backslash"))
    assert "0.1235" in text and "--" in text and r"$\pm$" in text and text.startswith("% a b\n")
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in text


def test_csv_escapes_formulas(tmp_path: Path) -> None:
    save_table(table("t", "", ("a", "b"), [["=1+1", -2.5]]), tmp_path)
    assert list(csv.reader((tmp_path / "t.csv").open())) == [["a", "b"], ["'=1+1", "-2.5"]]


def test_parts_of_a_resumed_training_are_one_curve(tmp_path: Path, write: Write) -> None:
    first = write(status="interrupted", sources=["a", "b"])
    write_history(first, "tweets-1", range(0, 60, 10), loss=5.0, started="1")
    second = write(sources=["a", "b"])
    write_history(second, "tweets-1", range(40, 100, 10), loss=1.0, started="2")
    found = read_runs([tmp_path / "runs"])
    (trained,) = trained_runs(found.done)
    loss = history_of(trained, found)["train/loss"].dropna()
    assert sorted(loss.index) == list(range(0, 100, 10))
    assert loss[30] == 5.0 / 31 and loss[40] == 1.0 / 41, "the later part counts"


def test_curve_over_seeds(tmp_path: Path, write: Write) -> None:
    for seed, loss in ((1, 1.0), (2, 3.0)):
        write_history(write(seed=seed), f"t-{seed}", range(0, 5000, 10), loss)
    found = read_runs([tmp_path / "runs"])
    (target,) = targets_of(found)
    (curve,) = curves_of(target, found)["train/loss"].values()
    assert set(curve["count"]) == {2} and len(curve) == POINTS
    assert (curve.index[0], curve.index[-1]) == (0, 4990)
    for column, factor in (("mean", 2), ("min", 1), ("max", 3)):
        np.testing.assert_allclose(curve[column], factor / (curve.index + 1))


def test_truncated_history(tmp_path: Path, write: Write) -> None:
    folder = write()
    write_history(folder, "t", range(0, 30, 10))
    with open(folder / "history.jsonl", "a") as file:
        file.write('{"step": 40, "train/loss": NaN}\n{"step": true, "train/loss": 9}\n[]\n{"step": 50, "tra')
    found = read_runs([tmp_path / "runs"])
    history = history_of(trained_runs(found.done)[0], found)
    assert set(history["train/loss"].dropna().index) == {0, 10, 20}


def test_attention_by_target() -> None:
    mean = np.array([[0.2, 0.8], [0.6, 0.4]])
    one = Attention("cb", "fusion of 2", ("a", "b"), ("0.feedforward", "1.feedforward"), mean, None, 1)
    other = Attention("rte", "fusion of 2", ("b", "c"), ("0.feedforward",), mean[:1], None, 1)
    rows, columns, matrix = by_target([one, other])
    assert (rows, columns) == (["cb", "rte"], ["a", "b", "c"])
    np.testing.assert_allclose(matrix, [[0.4, 0.6, np.nan], [np.nan, 0.2, 0.8]])
    np.testing.assert_allclose(by_target([one, other], 1)[2], [[0.6, 0.4, np.nan], [np.nan, 0.2, 0.8]])
    assert layer_names(["0.attention", "0.feedforward", "11.feedforward"]) == [
        *("0 attention", "0 feedforward", "11 feedforward")
    ]
    assert layer_names(["0.feedforward", "4.feedforward"]) == ["0", "4"]
    stacks = ["encoder.0.feedforward", "decoder.11.feedforward", "decoder.11.cross_attention"]
    assert layer_names(stacks[:2]) == ["encoder 0", "decoder 11"]
    assert layer_names(stacks) == ["encoder 0 feedforward", "decoder 11 feedforward", "decoder 11 cross attention"]


def test_attention_of_the_best_epoch(tmp_path: Path, write: Write) -> None:
    folder = write(sources=["a", "b"])
    lines = [
        {"step": e, "epoch": e, "sources": ["a", "b"], "slots": {"0.x": {"mean": [e / 10, 1 - e / 10], "entropy": 0.5}}}
        for e in (1, 2, 3)
    ]
    (folder / "attention.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one,) = contents(tmp_path).attention
    np.testing.assert_allclose(one.mean, [[0.2, 0.8]])
    (folder / "attention.jsonl").write_text('{"epoch": 2, "sources": ["a"], "slots": {"0.x": {"mean": [1, 2]}}}\n')
    assert contents(tmp_path).attention == []
