"""Which input is the timestep, which bucket a value falls into, and when a denoising trajectory is complete."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch

# Names of the timestep argument over the denoisers of diffusers; the value is the key, its scale is not known.
TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "sigma", "sigmas", "t")
MAX_BUCKETS = 64
NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
# Of ``Trajectories``; in diffusers 0.42 no scheduler steps back by more than a hundredth of its steps
TURN = 0.75  # of a step: moving back by less ends no picture
NEAR = 0.95  # of a step: two pictures ended at one place. A whole step more, and one of them was interrupted
HABIT = 3  # pictures that ended at one place: that is where they end
CALLS_PER_STEP = 3  # guidance, text and image guidance: more calls in a row at a picture's first timestep are other pictures
CALLS_PER_REPEAT = 6  # the same within a picture, where second-order schedulers repeat a timestep
# Of ``Candidates``
LONG_RUN = 3  # moves the same way: pictures of four steps and more
LEAST_MOVES = 20
LONG_SHARE = 0.7  # of the moves in long runs; of independent random numbers 0.2


def find_timestep(names: Sequence[str], values: Sequence[object]) -> int | None:
    """Index of the timestep among a graph's inputs, by its name; None where no tensor is called so: see ``Candidates``.

    names: placeholder names such as ``l_kwargs_timestep_``; values: the inputs.
    """
    return _named(names, [i for i, v in enumerate(values) if isinstance(v, torch.Tensor) and _given(names[i], v)])


def candidates(names: Sequence[str], values: Sequence[object]) -> list[int]:
    """Indices of the inputs that may be a timestep of whatever name, for ``Candidates``: real tensors of at most one dimension
    and numbers, also those that Dynamo made symbolic. Parameters, buffers and flags are none."""
    return [i for i, v in enumerate(values) if _given(names[i], v) and _real(v)]


def _real(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() <= 1 and value.dtype is not torch.bool and not value.is_complex()
    return isinstance(value, NUMBERS) and not isinstance(value, bool)


def _given(name: str, value: object) -> bool:
    """Whether an input comes with the call, and is not the module's own."""
    return not isinstance(value, torch.nn.Parameter) and "_buffers_" not in name


def number_for_timestep(names: Sequence[str], values: Sequence[object]) -> bool:
    """Whether the timestep comes as a Python number, which Dynamo makes symbolic."""
    return _named(names, [i for i, v in enumerate(values) if not isinstance(v, torch.Tensor)]) is not None


def _named(names: Sequence[str], among: Sequence[int]) -> int | None:
    """The first of these indices whose input is called as timesteps are."""
    for wanted in TIMESTEP_NAMES:
        for i in among:
            if names[i].lower().strip("_").split("_")[-1] == wanted or names[i].lower().strip("_").endswith("_" + wanted):
                return i
    return None


def timestep_value(timestep: object) -> float:
    """One key for a call: the largest value, since conditioned tokens or frames carry 0. A float, or NaN when absent."""
    if isinstance(timestep, torch.Tensor):
        return float(timestep.max()) if timestep.numel() else float("nan")
    return float(timestep) if isinstance(timestep, int | float) else float("nan")


class Buckets:
    """Timestep value -> bucket key. Each of the first ``limit`` values is a bucket of its own; after that, a value that no bucket
    spans makes a new one, and the two neighbours that together span least become one.

    Buckets span intervals that do not overlap. The key is the value that came first of those in the bucket.
    """

    def __init__(self, limit: int = MAX_BUCKETS) -> None:
        self.limit = limit
        self.spans: dict[float, tuple[float, float]] = {}  # key -> (smallest, largest value), in the order of the first visit

    @property
    def values(self) -> list[float]:
        """The keys, in the order of the first visit."""
        return list(self.spans)

    def key(self, value: float, merge: Callable[[float, float], None] = lambda gone, into: None) -> float:
        """Bucket of ``value``; NaN counts as 0. merge: told of each key that is no more, and the key it is part of now."""
        value = 0.0 if value != value else value
        for known, (low, high) in self.spans.items():
            if low <= value <= high:
                return known
        self.spans[value] = (value, value)
        if len(self.spans) <= self.limit:
            return value
        gone, into = self._join_nearest()
        merge(gone, into)
        return into if value == gone else value

    def _join_nearest(self) -> tuple[float, float]:
        """(the key that is no more, the key that spans both now)."""
        ordered = sorted(self.spans, key=lambda key: self.spans[key])
        below, above = min(itertools.pairwise(ordered), key=lambda two: self.spans[two[1]][1] - self.spans[two[0]][0])
        into, gone = (key for key in self.spans if key in (below, above))
        self.spans[into] = (self.spans[below][0], self.spans[above][1])
        del self.spans[gone]
        return gone, into


class Trajectories:
    """Counts complete pictures from the timesteps of a model's calls, one timestep per call, in the order of the calls.

    A picture is a run of timesteps that move one way, falling or rising. It is complete once the next one begins, and ends
    - where the timestep moves back by TURN of the larger of its last two steps, or of the step that follows: the next picture
      starts there, at whatever strength, or goes the other way, as inversion and sampling do. Calls that repeat a timestep
      (guidance in several calls, second-order schedulers) and smaller steps back end nothing;
    - where one timestep comes more often in a row than a step has calls: CALLS_PER_STEP at a picture's first timestep,
      CALLS_PER_REPEAT later. Two equal calls may be the halves of a guided step, so a model of one step has made a picture after
      three calls, not after one: ``complete`` is too small there, never too large for a step in up to three calls.

    A picture counts if it ended where the furthest one of its direction did, or where HABIT pictures did: an interrupted one does
    not, but a model whose pictures all stop early (a refiner goes on) gets there. Only before the first whole picture an
    interrupted one cannot be told. Two pictures of which the second starts beyond the end of the first (a few large steps, then a
    few small ones at low strength) count as one.

    A call without a timestep (NaN) is a whole picture, complete once another such call begins. Where numbers come as well, as
    from Dynamo, which makes the first number a constant, the calls without one count for nothing.

    Laws, n pictures of at least 3 steps: complete is n - 1 or n once the next one began; never decreases; is the same for every
    positive scale and shift of the timestep, for the mirrored one, and for 2 calls per step.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.complete = 0
        self.ends: list[list[float]] = []  # of pictures: (direction, last timestep, last step, how many)
        self.settled = 0  # pictures of ``ends`` that count
        self.single = 0  # pictures of one step, and calls without a timestep
        self.nameless = False  # the last call had no timestep
        self.moves = {"falling": 0, "rising": 0}
        self.previous: float | None = None
        self._begin(0.0)

    @property
    def direction(self) -> float:
        """-1 where timesteps fall from noise to picture, 1 where they rise, 0 while unknown. Rising beside falling ones are
        inversions."""
        falling, rising = self.moves["falling"], self.moves["rising"]
        return 1.0 if rising > 2 * falling else -1.0 if falling else 0.0

    def observe(self, value: float) -> None:
        """At the start of each call."""
        self.calls += 1
        if value != value:
            self.single += self.nameless
            self.nameless = True
        else:
            self.nameless = False
            self._observe(value)
            self.previous = value
        self.complete = max(self.complete, self.settled + self.single)

    def _observe(self, value: float) -> None:
        if self.previous is None:
            self._begin(value)
        elif value == self.previous:
            self._repeat(value)
        else:
            self.repeats = 1
            self._move(value)

    def _begin(self, value: float) -> None:
        """A picture."""
        self.furthest = value
        self.heading = 0.0  # -1 falling, 1 rising, 0 before it moved
        self.steps = [0.0, 0.0]  # the last two, absolute
        self.back = 0.0  # how far behind ``furthest`` it stepped back
        self.repeats = 1

    def _end(self) -> None:
        """Of a picture that moved."""
        end = [self.heading, self.furthest, self.steps[1]]
        row = next((row for row in self.ends if row[:3] == end), None)
        if row is None:
            self.ends.append(row := [*end, 0.0])
        row[3] += 1
        self.settled = int(sum(row[3] for row in self.ends if self._counts(row)))

    def _counts(self, row: list[float]) -> bool:
        """Whether pictures that ended so are complete."""
        heading, end, step, _ = row
        same = [other for other in self.ends if other[0] == heading]
        furthest = max(other[1] * heading for other in same) * heading
        return abs(furthest - end) < NEAR * step or sum(n for _, other, _, n in same if abs(other - end) < NEAR * step) >= HABIT

    def _repeat(self, value: float) -> None:
        self.repeats += 1
        if self.repeats > (CALLS_PER_REPEAT if self.heading else CALLS_PER_STEP):
            if self.heading:
                self._end()
            self.single += 1
            self._begin(value)

    def _move(self, value: float) -> None:
        if not self.heading:
            self.heading = 1.0 if value > self.furthest else -1.0
        ahead = (value - self.furthest) * self.heading
        follows = self.back + ahead  # the move since it stepped back
        if self.back and follows > 0 and self.back >= TURN * follows:
            self._turn(self._behind(), value)
        elif ahead > 0:
            self.steps = [self.steps[1], ahead]
            self.furthest, self.back = value, 0.0
            self.moves["rising" if self.heading > 0 else "falling"] += 1
        elif max(self.back, -ahead) < TURN * max(self.steps):
            self.back = max(self.back, -ahead)
        elif self.back >= -follows / 2:  # the second move the other way: it is no jump, the next picture is on its way
            self._turn(self._behind(), value)
        else:
            self._turn(value)

    def _behind(self) -> float:
        """The timestep it stepped back to."""
        return self.furthest - self.back * self.heading

    def _turn(self, start: float, now: float | None = None) -> None:
        """Another picture began at ``start`` and is at ``now``."""
        self._end()
        self._begin(start)
        if now is not None:
            self._move(now)


class Candidates:
    """Which input of a graph is the timestep, where none has its name: told the values of all candidates at each root call.

    It is the input that moves one way over a picture and jumps back between pictures. At least LEAST_MOVES changes are looked at,
    in at least every fourth call; LONG_SHARE of them belong to runs of LONG_RUN or more the same way, and a run has ended.
    Constants (guidance), numbers that change with the picture only, that never turn (counters), that alternate (flags) or that
    jump about are none. Of several (timestep and sigma) the one with the most changes counts, then the first. Pictures of fewer
    than four steps show too little: undecided. Once chosen, it stays.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.chosen: int | None = None
        self.tracks: dict[int, Trajectories] = {}  # of each candidate from its first call on: pictures seen before the choice
        self._runs: dict[int, _Runs] = {}

    def observe(self, values: Mapping[int, float]) -> None:
        """values: candidate -> ``timestep_value`` of it in this call; NaN is as good as absent."""
        self.calls += 1
        for i, value in values.items():
            self.tracks.setdefault(i, Trajectories()).observe(value)
            if value == value:
                self._runs.setdefault(i, _Runs()).observe(value)
        if self.chosen is None:
            able = [i for i, runs in self._runs.items() if runs.like_a_timestep(self.calls)]
            self.chosen = min(able, key=lambda i: (-self._runs[i].moves, i), default=None)


class _Runs:
    """Moves of one number, and how many of them belong to long runs the same way."""

    def __init__(self) -> None:
        self.previous: float | None = None
        self.moves = self.in_long = self.run = 0
        self.rising = self.turned = False

    def observe(self, value: float) -> None:
        previous, self.previous = self.previous, value
        if previous is None or value == previous:
            return
        rising = value > previous
        if self.run and rising != self.rising:
            self.turned |= self.run >= LONG_RUN
            self.run = 0
        self.rising = rising
        self.moves += 1
        self.run += 1
        self.in_long += LONG_RUN if self.run == LONG_RUN else self.run > LONG_RUN

    def like_a_timestep(self, calls: int) -> bool:
        return (self.turned and self.moves >= max(LEAST_MOVES, calls / 4)
                and self.in_long >= LONG_SHARE * self.moves)
