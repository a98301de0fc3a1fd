"""Random choice of the kills of each run, given a seed. Every fault point is chosen."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tests.crash.faults import AFTER_RENAME, BATCH, MAIN, READS
from tests.crash.workload import Kind

ANY_MOMENT = "any moment"
MOST_KILLS = 4  # maximum number of kills of one run

# Fault points in the order in which a run reaches them.
_COPY = ("a source is copied and not in place",)
_CACHE = (
    "half a file of the token cache",
    "half a file of the feature cache",
    "before the feature cache is put in place",
)
TRAINING = (
    BATCH,
    "before the optimizer's step",
    "after the optimizer's step",
    "a validation batch",
    "after a validation",
    "half a checkpoint",
    "a checkpoint is written and not synced",
    "before a checkpoint's renames",
    *tuple(AFTER_RENAME)[:3],
)
_STORE = (
    "half the weights",
    "half the head",
    "before the manifest is written",
    "half the manifest",
    "staged and not in place",
    *tuple(AFTER_RENAME)[3:],
)
_END = ("stored, the checkpoints are still there", "the checkpoints are half removed")
_PHASES = (_COPY, _CACHE, TRAINING, _STORE, _END)
PHASE = {place: number for number, phase in enumerate(_PHASES) for place in phase}
PLACES = (*PHASE, READS, ANY_MOMENT)
_WEIGHTS = {ANY_MOMENT: 8, BATCH: 2, "half a checkpoint": 2}  # relative to the other fault points


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        place: the fault point.
        count: the visit of the fault point at which to kill, from 1.
        target: role of the process to kill, or "all".
        share: fraction of a partially written file that is kept.
        seconds: time after the start, if `place` is ANY_MOMENT.
    """

    place: str
    count: int
    target: str
    share: float = 0.5
    seconds: float | None = None

    def __str__(self) -> str:
        target = self.target if self.target in (MAIN, "all") else f"rank {self.target}"
        when = f" ({self.count})" if self.seconds is None else f" ({self.seconds:.1f} s)"
        return f"{self.place}{when}, {target}"


@dataclass(frozen=True)
class Profile:
    """Number of visits of each fault point (maximum over processes) and seconds of an uninterrupted run."""

    visits: Mapping[str, int]
    seconds: float


class Plan:
    """Choose the kills of each run, starting with the fault points that were chosen least often.

    Args:
        profiles: profiles of uninterrupted runs, by kind.
    """

    def __init__(self, profiles: Mapping[str, Profile], seed: int) -> None:
        self._profiles = profiles
        self._random = random.Random(seed)
        self._drawn: Counter[str] = Counter()

    def kills(self, kind: Kind) -> list[Kill]:
        """Return 1 to `MOST_KILLS` kills, one per attempt, in the order in which a run reaches them."""
        profile, draw = self._profiles[kind.name], self._random
        targets = [MAIN] if kind.processes == 1 else [MAIN, "all", *map(str, range(kind.processes))]
        places = self._places(profile)
        kills = []
        for place in places:
            count, seconds = 1, None
            if place == ANY_MOMENT:
                seconds = draw.uniform(0.0, profile.seconds)
            elif place in TRAINING:  # attempts resume, so these visits are spread over all of them
                count = draw.randint(1, max(1, profile.visits[place] // len(places)))
            kills.append(Kill(place, count, draw.choice(targets), draw.random(), seconds))
        return kills

    def _places(self, profile: Profile) -> list[str]:
        left = [place for place in PHASE if profile.visits.get(place)] + [ANY_MOMENT] * MOST_KILLS
        chosen = []
        for _ in range(self._random.randint(1, MOST_KILLS)):
            place = min(left, key=lambda p: (self._drawn[p] / _WEIGHTS.get(p, 1), self._random.random()))
            left.remove(place)
            self._drawn[place] += 1
            chosen.append(place)
        chosen.sort(key=lambda place: PHASE.get(place, len(_PHASES) / 2) + self._random.random())
        trained = next((n for n, place in enumerate(chosen) if place in (*TRAINING, *_STORE)), None)
        if trained is not None and len(chosen) < MOST_KILLS and self._random.random() < 0.5:
            chosen.insert(trained + 1, READS)  # only a run that was killed has a checkpoint to read
        return chosen
