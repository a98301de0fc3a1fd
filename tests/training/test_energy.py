"""Powercap counters as files in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusion.training.callbacks import EnergyMeter


def count(folder: Path, zone: str, microjoules: int, most: int = 10_000_000) -> None:
    (folder / zone).mkdir(exist_ok=True)
    (folder / zone / "energy_uj").write_text(f"{microjoules}\n")
    (folder / zone / "max_energy_range_uj").write_text(f"{most}\n")


def test_only_whole_processors_count(tmp_path: Path) -> None:
    for zone in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        count(tmp_path, zone, 1_000_000)
    meter = EnergyMeter(tmp_path)
    assert meter.joules() == 0
    for zone, now in (("intel-rapl:0", 3_500_000), ("intel-rapl:1", 2_000_000), ("intel-rapl:0:0", 9_000_000)):
        count(tmp_path, zone, now)
    assert meter.joules() == pytest.approx(3.5), "the part is in the whole"


def test_a_counter_that_overflows(tmp_path: Path) -> None:
    count(tmp_path, "intel-rapl:0", 9_000_000)
    meter = EnergyMeter(tmp_path)
    count(tmp_path, "intel-rapl:0", 1_500_000)
    assert meter.joules() == pytest.approx(2.5)


def test_unknown_energy(tmp_path: Path) -> None:
    assert EnergyMeter(tmp_path).joules() is None and EnergyMeter(tmp_path / "no").joules() is None
    count(tmp_path, "intel-rapl:0", 1)
    meter = EnergyMeter(tmp_path)
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("broken")
    assert meter.joules() is None
