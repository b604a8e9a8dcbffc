"""LoRAs that are part of a denoiser's 8-bit codes: W + sum(weight * scale * up @ down) is quantised in place of W, in fp32, into
the tensors that built steps read already, so that nothing is compiled, calibrated or captured anew.

The module's own weights are never written. Those that stay in 16 bits have a second tensor with the LoRAs added, which steps for
such sets read; what runs in the module's own precision gets weights that are made for the call. Of pictures that several threads
draw each is of one set of LoRAs: codes change when no picture that began with them goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .graphs import Graphed, Memory
from .measure import Stopwatch
from .merge import Factors, Merged, added, renew, write
from .names import step_into, step_out
from .quantize import Coded
from .timesteps import timestep_value

if TYPE_CHECKING:
    from .state import State

# (name, which loading of that name, weight) of each LoRA, sorted; () is the module as it is
Set = tuple[tuple[str, int, float], ...]
Layers = dict[int, tuple[torch.Tensor, str, Set]]  # id of a weight -> (it, the path of its layer, those of a set that change it)
ON_DEVICE = 2**30  # bytes of LoRAs that are held on a GPU, the one used longest ago goes first; all are in memory of the host
IDLE_S, IDLE_STEPS = 1.0, 4  # a picture that was not called for so long, and for so many of its steps, is taken to have ended
SETS = 16  # for which the layers that they change are remembered
NOTHING: tuple[None, str, Set] = (None, "", ())
REPEATED = 3  # calls at one timestep that may belong to one picture: guidance takes one call for each of its terms


@dataclass(frozen=True)
class Change:
    """place: of ``weight`` among arguments."""

    place: int
    weight: torch.Tensor


@dataclass(eq=False)
class Picture:
    """What one thread draws: with which LoRAs, and when it was last called. at: the timestep of that call; called: whether it is
    being called now."""

    loras: Set
    at: Any = None
    called: bool = False
    began: float = 0.0
    ended: float = 0.0
    interval: float = 0.0
    repeated: int = 0

    def goes_on(self, at: Any) -> bool:
        """Whether a call at this timestep belongs to the picture. A call without one does where others have one."""
        if at is None:
            return self.at is not None
        now, before = timestep_value(at), timestep_value(self.at)
        self.repeated = self.repeated + 1 if now == before else 0
        return now < before or 0 < self.repeated < REPEATED

    def idle(self) -> bool:
        return not self.called and time.monotonic() - self.ended > max(IDLE_S, IDLE_STEPS * self.interval)


class Adapters:
    """Those of one denoiser. wanted: the set of pictures that begin from now on; states: that have them."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.root = weakref.ref(root)
        self.states: weakref.WeakSet[State] = weakref.WeakSet()
        self.loaded: dict[str, dict[str, Factors]] = {}  # name -> path of a layer -> its factors
        self.numbers: dict[str, int] = {}
        self.wanted: Set = ()
        self.endings: list[Callable[[], None]] = []
        self.stepped_in: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
        self.switched: tuple[int, Stopwatch] | None = None  # weights that the last switch wrote, and its time
        self._count = itertools.count()
        self._turn = threading.Condition(threading.RLock())
        self._here = threading.local()  # ``picture`` and ``block`` of a thread, which die with it
        self._pictures: weakref.WeakSet[Picture] = weakref.WeakSet()
        self._blocks: list[Set] = []
        self._retired: dict[int, dict[str, Factors]] = {}
        self._layers: dict[Set, Layers] = {}
        self._weights: dict[str, torch.Tensor] = {}
        self._near: OrderedDict[tuple[str, int, torch.device], dict[str, Factors]] = OrderedDict()

    # --- what is loaded

    def end(self) -> None:
        """They are forgotten: what was loaded beside them goes too."""
        for ending in self.endings:
            ending()
        for layer in self.stepped_in:
            step_out(layer)

    def load(self, name: str, factors: Mapping[str, Factors]) -> None:
        """Under ``name``, in place of what it named before."""
        self._retire(name)
        self.loaded[name], self.numbers[name] = dict(factors), next(self._count)
        self.look_again()
        self.wanted = tuple(sorted((n, self.numbers[n], w) for n, _, w in self.wanted))

    def unload(self, name: str) -> None:
        self.wanted = tuple(one for one in self.wanted if one[0] != name)
        self._retire(name)
        del self.loaded[name], self.numbers[name]

    def _retire(self, name: str) -> None:
        """Pictures that have it go on with it."""
        if name in self.loaded:
            self._retired[self.numbers[name]] = self.loaded[name]

    def _forget_retired(self) -> None:
        used = {number for loras in (*(p.loras for p in self._pictures), *self._blocks) for _, number, _ in loras}
        self._retired = {number: factors for number, factors in self._retired.items() if number in used}
        for key in [k for k in self._near if k[1] not in self.numbers.values() and k[1] not in used]:
            self._send_away(key)

    def _of(self, name: str, number: int) -> Mapping[str, Factors]:
        return self.loaded[name] if self.numbers.get(name) == number else self._retired[number]

    def set_of(self, weights: Mapping[str, float]) -> Set:
        """Without those that this denoiser has no part of, and those of weight 0."""
        return tuple(sorted((n, self.numbers[n], float(w)) for n, w in weights.items() if n in self.loaded and w))

    def layers(self, loras: Set) -> Layers:
        """Of a set."""
        if loras in self._layers:
            return self._layers[loras]
        found: Layers = {}
        for one in loras:
            for path in self._of(*one[:2]):
                weight = self._weight(path)
                found[id(weight)] = weight, path, (*(found[id(weight)][2] if id(weight) in found else ()), one)
        while len(self._layers) >= SETS:
            self._layers.pop(next(iter(self._layers)))
        self._layers[loras] = found
        return found

    def _weight(self, path: str) -> torch.Tensor:
        """Of the layer of this path: the user's parameter."""
        if path not in self._weights:
            root = self.root()
            assert root is not None, "a call is of a module that lives"
            self._weights[path] = weight_of(root, path)
        return self._weights[path]

    def step_in(self) -> None:
        """Layers that LoRAs change are pieces of their own where hooks, as of offloading, cut the module into pieces, then or
        later: called as it is, a layer would run without them. Of a module that is one graph this compiles nothing anew."""
        root = self.root()
        for path in dict.fromkeys(path for factors in self.loaded.values() for path in factors):
            layer = None if root is None else layer_of(root, path)
            if layer is not None and layer._compiled_call_impl is None:
                step_into(layer)
                self.stepped_in.add(layer)

    def look_again(self) -> None:
        """The module's parameters may be others now, or their memory in another order."""
        self._layers.clear()
        self._weights.clear()
        for key in list(self._near):
            self._send_away(key)

    def factors_of(self, weight: torch.Tensor, loras: Set) -> list[tuple[Factors, tuple[str, int, float]]]:
        """Those of a set that change this weight: on its device."""
        _, path, mine = self.layers(loras).get(id(weight), NOTHING)
        return [(self._factors(one[0], one[1], weight.device, loras)[path], one) for one in mine]

    def _factors(self, name: str, number: int, device: torch.device, loras: Set) -> Mapping[str, Factors]:
        """Of one LoRA, on the device where that has room beside the others of the set."""
        if device.type == "cpu":
            return self._of(name, number)
        key = name, number, device
        if key not in self._near:
            self._near[key] = {path: f.beside(self._weight(path)) for path, f in self._of(name, number).items()}
            sizes = {k: sum(f.nbytes for f in near.values()) for k, near in self._near.items()}
            wanted = {key[:2], *(one[:2] for one in loras)}
            for other in [k for k in self._near if k[:2] not in wanted]:
                if sum(sizes.values()) > ON_DEVICE:
                    del sizes[other]
                    self._send_away(other)
        return self._near[key]

    def _send_away(self, key: tuple[str, int, torch.device]) -> None:
        """Nobody holds the factors of this LoRA on this device any more."""
        del self._near[key]
        for state in self.states:
            state.memory.prepared.clear()

    def bring(self, name: str) -> None:
        """To the GPUs that have 8-bit steps, so that the first switch to it finds it there."""
        units = [unit for state in self.states if not state.slept for unit in state.units if unit.results]
        for device in {unit.constants[0].device for unit in units}:
            with contextlib.suppress(torch.OutOfMemoryError):  # there may be room when it is switched to
                self._factors(name, self.numbers[name], device, self.wanted)

    # --- pictures

    @property
    def mine(self) -> Set:
        """Of the picture that this thread draws."""
        picture = getattr(self._here, "picture", None)
        return self.wanted if picture is None or not picture.called else picture.loras

    @contextlib.contextmanager
    def call(self, at: Any) -> Iterator[None]:
        """One call of the denoiser, at a timestep: it belongs to the picture that this thread draws, or begins the next one."""
        block = getattr(self._here, "block", None)
        wanted = self.wanted if block is None else block
        with self._turn:
            picture = getattr(self._here, "picture", None)
            if picture is None or (picture.loras != wanted and (block is not None or not picture.goes_on(at))):
                picture = self._here.picture = Picture(wanted)
                self._pictures.add(picture)
                self._forget_retired()
            now = time.monotonic()
            picture.interval = now - picture.began if picture.began else 0.0
            picture.called, picture.began, picture.at = True, now, picture.at if at is None else at
        try:
            yield
        finally:
            with self._turn:
                picture.called, picture.ended = False, time.monotonic()
                self._turn.notify_all()

    @contextlib.contextmanager
    def block(self, loras: Set) -> Iterator[None]:
        """Pictures of this thread are of this set while the context is open."""
        before = getattr(self._here, "block", None)
        self._here.block = loras
        with self._turn:
            self._blocks.append(loras)
        try:
            yield
        finally:
            self._here.block = before
            with self._turn:
                self._blocks.remove(loras)
            self.end_picture()

    def end_picture(self) -> None:
        """The picture of this thread has ended."""
        with self._turn:
            self._here.picture = None
            self._turn.notify_all()

    def hold(self, state: State, loras: Set, wait: bool = True) -> bool:
        """See to it that the codes of the state are of this set, as soon as no picture of another thread needs the one that they
        are of. False where that is not to be waited for: another thread builds, or ``wait`` is not set."""
        if state.memory.loras == loras:
            return True
        mine = getattr(self._here, "picture", None)
        with self._turn:
            while any(p is not mine and p.loras == state.memory.loras and not p.idle() for p in self._pictures):
                if not wait or not state.lock.acquire(blocking=False):
                    return False
                state.lock.release()
                self._turn.wait(0.05)
            if not state.lock.acquire(blocking=False):
                return False
            try:
                self._write(state, loras)
            finally:
                state.lock.release()
        return True

    # --- codes

    @torch.no_grad()
    def _write(self, state: State, loras: Set) -> None:
        memory, watch = state.memory, Stopwatch(next((t.device for t in state.covered()), torch.device("cpu")))
        steps: dict[int, Any] = {id(made): made for unit in state.units for made in unit.results.values()
                                 if getattr(made, "derived", None) is not None}
        for made in steps.values():
            if isinstance(made.step, Graphed):
                made.step.wake()
        half = memory.loras is None
        with memory.writing():
            memory.loras = None  # until all is written: after a failure half way the next set is written whole
            written = self.rewrite(memory, loras)
            renew([one for made in steps.values() for one in made.derived], None if half else written, memory.prepared)
            memory.loras = loras
        if written:
            watch.stop()
            self.switched = sum(len(one.parts) for one in written), watch

    def rewrite(self, memory: Memory, loras: Set) -> Sequence[Coded | Merged]:
        """Write what has other LoRAs than those of the set in place, unless it sleeps; returns what was written."""
        layers, due = self.layers(loras), list[tuple[Coded | Merged, Set]]()
        for one in (*memory.codes.values(), *memory.merged.values()):
            found = [layers.get(id(weight), NOTHING)[2] for weight, *_ in one.parts]
            changing = found[0] if len(found) == 1 else tuple(sorted(set(itertools.chain.from_iterable(found))))
            if one.loras != changing and all(t.untyped_storage().nbytes() for _, t, *_ in one.parts):
                one.loras = None
                due.append((one, changing))
        for key in [key for key in self._near if any(key[:2] == one[:2] for one in loras)]:
            self._near.move_to_end(key)
        write([one for one, _ in due], lambda weight: [(f, one[:2]) for f, one in self.factors_of(weight, loras)],
              {one[:2]: one[2] for one in loras}, memory.prepared)
        for one, changing in due:
            one.loras = changing
        return [one for one, _ in due]

    # --- weights that stay in 16 bits

    def beside(self, memory: Memory, weights: Iterable[torch.Tensor], loras: Set) -> None:
        """See to it that each of these weights has a second tensor on its device, with the LoRAs of the set."""
        for weight in weights:
            key = id(weight), weight.device
            if key not in memory.merged:
                with torch.inference_mode(False):  # made in it, it could not be written outside it
                    memory.merged[key] = Merged(weight, torch.empty_like(weight, requires_grad=False))
        self.rewrite(memory, loras)

    def changes(self, places: Mapping[int, int]) -> Sequence[Change]:
        """What the LoRAs of this picture change. places: id of a weight -> its place among arguments."""
        return [Change(places[i], weight) for i, (weight, *_) in self.layers(self.mine).items() if i in places]

    @torch.no_grad()
    def applied(self, args: Sequence[Any], changes: Sequence[Change]) -> Sequence[Any]:
        """``args`` with the LoRAs of this picture added to weights among them, in their own dtype."""
        if not changes:
            return args
        given = list(args)
        for one in changes:
            factors = [(f, strength) for f, (_, _, strength) in self.factors_of(one.weight, self.mine)]
            given[one.place] = torch.empty_like(one.weight).copy_(added(one.weight, factors))
        return given

    def sentence(self, loras: Set) -> str:
        """Which LoRAs the codes are of, and what the last switch cost."""
        named = ", ".join(f"{name} ({strength:g})" for name, _, strength in loras) or "none"
        sentence = f"LoRAs in the 8-bit codes: {named}"
        if self.switched is not None:
            sentence += f"; the last switch wrote {self.switched[0]} weights in {self.switched[1].ms:.0f} ms"
        return sentence


def layer_of(root: torch.nn.Module, path: str) -> torch.nn.Module:
    """The layer of this path, which an adapter of PEFT may be wrapped around."""
    layer = root.get_submodule(path)
    found: torch.nn.Module = getattr(layer, "base_layer", layer)
    return found


def weight_of(root: torch.nn.Module, path: str) -> torch.Tensor:
    """Of that layer: the user's parameter."""
    weight = layer_of(root, path).weight
    assert isinstance(weight, torch.Tensor)
    return weight


_OF: weakref.WeakKeyDictionary[torch.nn.Module, Adapters] = weakref.WeakKeyDictionary()


def adapters_of(root: torch.nn.Module | None) -> Adapters | None:
    """Those that were loaded for this denoiser, None where none ever was."""
    return None if root is None else _OF.get(root)


def make_adapters(root: torch.nn.Module, states: Iterable[State]) -> Adapters:
    """Those of this denoiser and of its states, empty where there were none."""
    found = _OF.get(root) or _OF.setdefault(root, Adapters(root))
    for state in states:
        state.adapters = found
        found.states.add(state)
    return found


def forget_adapters(root: torch.nn.Module) -> None:
    """As if none had ever been loaded."""
    found = _OF.pop(root, None)
    if found is not None:
        found.end()
