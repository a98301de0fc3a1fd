"""Damaged artifacts: each is read as it was stored, or refused by a UserError that names its place.

Two families: raw damage, which a hash detects, and damage with matching sizes and hashes, which only a check of the
content can detect. Each artifact is used as the commands do: load, build, fuse, verify, list.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from fusion.backbones.load import Backbone, load_backbone
from fusion.config.compositions import CompositionConfig
from fusion.errors import UserError
from fusion.layers.bottleneck import BottleneckAdapter
from fusion.layers.heads import TaskHead
from fusion.layers.slot_module import SlotModule, parameters_of
from fusion.model.build import build_composition, check_trained_on, load_sources, stored_adapters, stored_model
from fusion.model.from_manifests import tensor_shapes
from fusion.model.head_selection import select_heads
from fusion.runs.output import result_of
from fusion.store.artifacts import load, save, verify
from fusion.store.layout import HEAD, MANIFEST, WEIGHTS
from fusion.store.listing import describe, list_store
from fusion.store.lookup import read_manifest
from fusion.store.manifest import Manifest, checksum_of
from tests.store.conftest import build as make_manifest

EXAMPLES = 400, 1000  # damaged artifacts in `make test`, and of each seed in `make test-full`
SECONDS = 30  # limit of one example on a busy machine; most take a few milliseconds
MEMORY = 512 * 2**20  # bytes that the process may grow by
FILES = (MANIFEST, WEIGHTS, HEAD)
IDS = torch.tensor([[2, 9, 14, 3], [2, 15, 3, 0]])
MASK = (IDS != 0).long()


class Place:
    """A store with two adapters, a fusion, a pruned one, a head alone, LoRA, and an adapter of two tasks."""

    def __init__(self, folder: Path, backbone: Path) -> None:
        self.store = folder / "a store"
        self.backbone = load_backbone(str(backbone))
        torch.manual_seed(0)
        head = TaskHead(32, 2)
        task = {"name": "films", "kind": "classification", "text": "text", "labels": ["bad", "good"]}
        made_for = {"name_or_path": str(backbone), "fingerprint": self.backbone.fingerprint}
        about: dict[str, Any] = {
            "backbone": made_for | {"hidden_size": 32, "layers": 3},
            "task": {**task, "metrics": ["accuracy"]},
            "result": {"parameters": {"trainable": 1, "frozen": 2}},
        }
        one_head = dict(head.named_parameters())
        adapters: list[dict[str, SlotModule]] = [{}, {}]
        for number, (name, more) in enumerate((("films", {}), ("books", {"scaling": "learned"}))):
            sizes = {f"{layer}.feedforward": 2 for layer in range(3)}
            for slot in sizes:
                adapters[number][slot] = BottleneckAdapter(32, 2, **more)  # type: ignore[arg-type]
            manifest = make_manifest(name, adapter={"bottleneck_sizes": sizes, **more}, **about)
            save(self.store, manifest, parameters_of(adapters[number]), one_head)
        sources = [{"name": n, "hash": read_manifest(n, self.store).hash} for n in ("films", "books")]
        kept = {"kept": {f"{layer}.feedforward": [layer % 2] for layer in range(3)}}
        compositions: tuple[tuple[str, CompositionConfig, dict[str, Any]], ...] = (
            ("fusion", CompositionConfig("adapterfusion", rank=3), {}),
            ("pruned", CompositionConfig("pruned", fusion="fusion", keep=1), kept),
        )
        for name, config, chosen in compositions:
            loaded = load_sources(["films", "books"], self.store, self.backbone)
            slot_modules = build_composition(config, loaded, self.backbone, chosen)
            manifest = make_manifest(name, "fusion", sources=sources, **about)
            manifest = manifest.changed(composition=config.as_stored() | chosen)
            save(self.store, manifest, parameters_of(slot_modules), one_head)
        save(self.store, make_manifest("head", "head", **about), {}, one_head)
        lora = {"name": "lora", "rank": 2, "alpha": 4, "dropout": 0.0, "targets": ["query"]}
        names = [f"encoder.layer.{layer}.attention.self.query" for layer in range(3)]
        parts = {f"{n}.lora_A.weight": torch.randn(2, 32) for n in names}
        parts |= {f"{n}.lora_B.weight": torch.randn(32, 2) for n in names}
        save(self.store, make_manifest("lora", "lora", method=lora, **about), parts, one_head)
        described = make_manifest("x").content["head"] | {"pooling": "mean", "layers": 2}
        multi_task = {n: {"task": {**about["task"], "name": n}, "head": described} for n in ("films", "books")}
        two = TaskHead(32, 2, "mean", 2)
        heads = {f"{n}.{key}": value for n in multi_task for key, value in two.named_parameters()}
        shared = {"shared": True, "bottleneck_sizes": {f"{layer}.feedforward": 2 for layer in range(3)}}
        one = {"0.feedforward": BottleneckAdapter(32, 2)}
        both = make_manifest("both", adapter=shared, multitask=multi_task, **about)
        save(self.store, both, parameters_of(one), heads)
        self.names = ("films", "books", "fusion", "pruned", "head", "lora", "both")
        self.content = {(n, f): (self.store / n / f).read_bytes() for n in self.names for f in FILES}
        self.scores = {name: self.use(name) for name in self.names}

    def fresh(self) -> Backbone:
        return replace(self.backbone, model=copy.deepcopy(self.backbone.model))

    def use(self, name: str) -> torch.Tensor:
        """Do all that the commands do with an artifact; return the scores of two examples."""
        artifact = load(name, self.store)
        check_trained_on(artifact, self.backbone)
        select_heads(artifact.manifest, None)
        result_of(artifact.manifest, artifact.path)
        if artifact.manifest.kind == "adapter":
            (source, *_) = load_sources([name], self.store, self.backbone)
            filled = parameters_of(stored_adapters(source))
            assert {key: value.shape for key, value in filled.items()} == {
                key: value.shape for key, value in source.weights.items()
            }
            assert all(torch.equal(filled[key].detach(), source.weights[key].float()) for key in filled)
            build_composition(CompositionConfig("static"), [source], self.backbone)
        model = stored_model(artifact, self.store, self.fresh())
        with torch.inference_mode():
            return model(IDS, MASK)

    def restore(self, name: str) -> None:
        for file in FILES:
            (self.store / name / file).write_bytes(self.content[name, file])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_backbone: Path) -> Place:
    return Place(tmp_path_factory.mktemp("fuzz"), tiny_backbone)


class TooLong(BaseException):
    """No Exception, so that no example catches it."""


@contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(place: Place, name: str, family: str, shown: bool = True) -> str:
    """Use a damaged artifact. Returns `read`, or `refused` for a UserError that names its place."""
    outcome = "read"
    with limited():
        try:
            scores = place.use(name)
        except UserError as error:
            outcome, message = "refused", str(error)
            assert name in message and len(message) < 2000 and message.count("\n") <= 2, message
            assert message.replace("\n", "").isprintable(), ascii(message)
        else:
            assert scores.shape[0] == 2
            check_reading(place, name, scores, family)
        (verdict,) = verify(place.store, tensor_shapes, name)
        if outcome == "read":
            assert not verdict.problem or "fingerprint" in verdict.problem, verdict
        if shown:
            list_store(place.store)
            try:
                describe(name, place.store)
            except UserError:
                assert outcome == "refused"
    return outcome


def check_reading(place: Place, name: str, scores: torch.Tensor, family: str) -> None:
    """The loaded artifact equals the stored one, as far as hashes can detect."""
    artifact = load(name, place.store)
    stored = Manifest.from_json(place.content[name, MANIFEST].decode(), Path())
    if family == "raw":  # their hashes are in the manifest, whose checksum is right
        assert artifact.manifest.files == stored.files
    same_head = (artifact.manifest.head, artifact.manifest.multitask) == (stored.head, stored.multitask)
    if artifact.manifest.hash == stored.hash and same_head and artifact.manifest.files == stored.files:
        assert torch.equal(scores, place.scores[name])


def raw_damage(draw: random.Random, content: bytes) -> bytes:
    """Other bytes: flipped bits, cut, inserted, truncated, noise, another header length, deep nesting."""
    length = len(content)
    # The header has the structure: half of all damage goes there.
    at = draw.randrange(min(length, 200)) if draw.random() < 0.5 else draw.randrange(length)
    count = draw.choice((1, 4, 8, 100))
    header = draw.choice((0, 1, 2**63, 2**64 - 1, 10**9, 100_000_001, length, length - 8, 2**31, 2**32))
    flipped = bytes([content[at] ^ 1 << draw.randrange(8)])
    return draw.choice(
        (
            *(content[:at] + flipped + content[at + 1 :],) * 3,
            content[:at] + content[at + count :],
            content[:at] + draw.randbytes(count) + content[at:],
            content[: draw.choice((0, 1, 7, 8, 9, length // 2, length - 4, length - 1, at))],
            draw.randbytes(draw.choice((0, 1, 8, 100, length))),
            struct.pack("<Q", header) + content[8:],
            draw.choice((b"[", b'{"a":')) * draw.choice((40, 1000, 100_000)),
        )
    )


def tensor_damage(draw: random.Random, content: bytes) -> bytes:
    """A safetensors file with another header or other values."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    how, nan, names = draw.randrange(8), float("nan"), list(header)
    if how == 0:  # integers in place of floats, of the same size: only the type differs
        for entry in header.values():
            entry["dtype"] = draw.choice(("I32", "U32", "F8_E4M3"))
    elif how == 1:  # finite floats cannot be detected, others must be
        values = [draw.choice((1.0, 2.0, nan) if draw.random() < 0.1 else (1.0, 2.0)) for _ in body[::4]]
        body = struct.pack(f"<{len(values)}f", *values)
    elif how == 2:
        draw.shuffle(names)
        header = dict(zip(names, header.values(), strict=True))
    elif how == 3 or not header:
        body += b"\0" * draw.choice((1, 4, 1000))
    text = json_damage(draw, header) if how > 3 and header else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 2**31, 2**62, 2**64, 10**100, 1e308, "", "x", "../../etc/passwd", "/dev/zero",
    "\u202e", "\0", "a" * 10_000, [], {}, [[]], [None], {"x": 1}, [1, 2], ["x"], "learned", "last:3", "last:99999",
    "specialized:2", "specialized:99999999", "robust", "mean", "average", "continued", "scalearn_pp", "static",
    "lora", "head", "adapter", "fusion", "full", {"kept": 1}, 3, 2, 99, 0.5, -0.5, "1", "0.feedforward",
    [2**40], [0, 2**62], [2**63, 2**63], [4, 0], [-1], "F64", "BF16", "F8_E4M3", "C64", "0.feedforward.down.bias",
)  # fmt: skip


def places_of(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a manifest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield (*way, key)
        yield from places_of(entry, (*way, key))


def json_damage(draw: random.Random, values: dict[str, Any]) -> bytes:
    """JSON with another value or key; most of the time it is still JSON."""
    *way, key = draw.choice(list(places_of(values)))
    parent: Any = values
    for step in way:
        parent = parent[step]
    how = draw.randrange(10)
    if how < 5:
        parent[key] = draw.choice(JUNK)
    elif how == 5:
        del parent[key]
    elif how == 6 and isinstance(parent, dict):
        parent[draw.choice(("x", "", "..", "\u202e", "0.feedforward", "99.feedforward", "shared", "kept"))] = (
            draw.choice(JUNK)
        )
    elif how == 7 and isinstance(parent[key], (int, float)):
        parent[key] = parent[key] * draw.choice((-1, 2, 10**6, 10**12))
    elif how == 8 and isinstance(parent[key], str) and parent[key]:
        parent[key] = parent[key][:-1] + chr(draw.randrange(0x500))
    else:
        text = json.dumps(values)
        word = json.dumps(parent[key])
        odd = ("NaN", "-Infinity", "1e999", "9" * 5000, '"\\ud800"', "[" * 100_000, "{", "", '"a": 1', "tru")
        return text.replace(word, draw.choice(odd), 1).encode()
    return json.dumps(values).encode()


def consistent(content: bytes, weights: bytes, head: bytes) -> bytes:
    """A manifest whose sizes and hashes match the files."""
    values = json.loads(content)
    for file, data in ((WEIGHTS, weights), (HEAD, head)):
        values["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    values["checksum"] = checksum_of(values)
    return json.dumps(values).encode()


def damage(place: Place, draw: random.Random) -> tuple[str, str]:
    """Damage one artifact of the store; return its name and the family of the damage."""
    name = draw.choice(place.names)
    folder = place.store / name
    if draw.random() < 0.4:
        file = draw.choice(FILES)
        (folder / file).write_bytes(raw_damage(draw, place.content[name, file]))
        return name, "raw"
    content = {file: place.content[name, file] for file in FILES}
    kind = draw.randrange(3)
    if kind < 2:
        content[MANIFEST] = json_damage(draw, json.loads(content[MANIFEST]))
    if kind > 0:
        file = draw.choice((WEIGHTS, HEAD))
        content[file] = (raw_damage if draw.random() < 0.3 else tensor_damage)(draw, content[file])
        # A manifest that is no JSON needs no hash.
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            content[MANIFEST] = consistent(content[MANIFEST], content[WEIGHTS], content[HEAD])
    for file in FILES:
        (folder / file).write_bytes(content[file])
    return name, "consistent"


def run_examples(place: Place, examples: int, seed: int) -> Counter[str]:
    """Use damaged artifacts, the same ones each time; return how many were read and refused by family."""
    seen: Counter[str] = Counter()
    with little_memory():
        for number in range(examples):
            name, family = damage(place, random.Random(f"{seed} {number}"))
            try:
                seen[f"{family} {attempt(place, name, family, shown=number % 4 == 0)}"] += 1
            except BaseException as error:
                error.add_note(f"example {number} of seed {seed}")
                raise
            finally:
                place.restore(name)
    return seen


@contextmanager
def little_memory() -> Iterator[None]:
    """Limit the memory of the process to a little more than is in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else None
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_intact_artifacts_are_read(place: Place) -> None:
    for name in place.names:
        assert attempt(place, name, "raw") == "read"
        assert torch.equal(place.use(name), place.scores[name])


@pytest.mark.parametrize(
    ("count", "seed"),
    [(EXAMPLES[0], 0), *(pytest.param(EXAMPLES[1], seed, marks=pytest.mark.slow) for seed in range(5))],
)
def test_damaged_artifacts(place: Place, count: int, seed: int) -> None:
    seen = run_examples(place, count, seed)
    assert sum(seen.values()) >= count
    assert seen["raw refused"] > count // 4 and seen["consistent refused"] > count // 4
    assert seen["consistent read"] > count // 50


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("what", ["pipe", "folder", "empty", "/dev/zero", "nowhere", "/etc/passwd", "loop"])
def test_a_path_that_is_not_a_regular_file(place: Place, file: str, what: str) -> None:
    path = place.store / "films" / file
    path.unlink()
    try:
        if what == "pipe":
            os.mkfifo(path)
        elif what == "folder":
            path.mkdir()
        elif what == "empty":
            path.touch()
        else:
            path.symlink_to(path if what == "loop" else what)
        with little_memory():
            assert attempt(place, "films", "raw") == "refused"
            with limited(), pytest.raises(UserError, match="films"):
                place.use("fusion")  # films is a source of it
    finally:
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        place.restore("films")


def test_a_link_to_an_artifact_is_read(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.store / "films", tmp_path / "elsewhere")
    (place.store / "linked").symlink_to(tmp_path / "elsewhere")
    try:
        assert torch.equal(place.use("linked"), place.scores["films"])
    finally:
        (place.store / "linked").unlink()


def test_another_backbone_is_refused(place: Place, make_backbone: Callable[..., Path]) -> None:
    own = place.backbone
    for other in ({"seed": 1}, {"hidden_size": 48}):
        place.backbone = load_backbone(str(make_backbone(**other)))
        try:
            for name in place.names:
                assert attempt(place, name, "raw") == "refused"
        finally:
            place.backbone = own


@pytest.mark.parametrize("count", [10**6, 2**62])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("films", "adapter/bottleneck_sizes/0.feedforward"),
        ("both", "adapter/bottleneck_sizes/0.feedforward"),
        ("fusion", "composition/rank"),
        ("lora", "method/rank"),
        ("head", "head/outputs"),
        ("both", "multitask/films/head/outputs"),
        ("films", "backbone/hidden_size"),
        ("films", "backbone/layers"),
    ],
)
def test_wrong_sizes_allocate_no_memory(place: Place, name: str, way: str, count: int) -> None:
    values = json.loads(place.content[name, MANIFEST])
    *path, key = way.split("/")
    parent = values
    for step in path:
        parent = parent[step]
    assert parent[key] < 100
    parent[key] = count
    values["checksum"] = checksum_of(values)
    (place.store / name / MANIFEST).write_text(json.dumps(values))
    try:
        with little_memory():
            assert attempt(place, name, "consistent") == "refused"
    finally:
        place.restore(name)
