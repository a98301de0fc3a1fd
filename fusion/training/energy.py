"""The processors' energy in joules, from Linux's powercap counters (RAPL). It includes all that runs on the machine.

Many machines have no counters, or let only root read them; the energy is then unknown.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Measures from its construction on. A counter may overflow once between two readings."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        # `intel-rapl:0` is a processor (also of AMD); `intel-rapl:0:1` is a part of it.
        self._zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._before = [_read(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        """Since the construction; None if a counter cannot be read."""
        total = 0
        for zone, before in zip(self._zones, self._before, strict=True):
            now, maximum = _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj")
            if before is None or now is None or (now < before and maximum is None):
                return None
            total += now - before + (maximum or 0) * (now < before)
        return total * 1e-6 if self._zones else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
