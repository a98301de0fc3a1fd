"""What the processors took, where the machine counts it: Linux's powercap (RAPL), in joules.

All that runs on the machine is in it. Many machines count nothing, or let only root read it: then it is not known.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_MICRO = 1e-6


class EnergyMeter:
    """Counts from when it is made. A counter that begins anew is counted on, once between two readings."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        # `intel-rapl:0` is a processor (AMD's have that name too); `intel-rapl:0:1` a part of it.
        self._zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._before = [_read(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        """Since it was made; None where a processor's count is not known."""
        total = 0
        for zone, before in zip(self._zones, self._before, strict=True):
            now, most = _read(zone / "energy_uj"), _read(zone / "max_energy_range_uj")
            if before is None or now is None or (now < before and most is None):
                return None
            total += now - before + (most or 0) * (now < before)
        return total * _MICRO if self._zones else None


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
