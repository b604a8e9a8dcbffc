"""What Dynamo calls: one graph, any number of modules of that structure. Nothing of ours raises in the user's call, but for
options and recipes that are wrong."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from . import names, weights
from .capture import Captured, capture
from .errors import SdtrtError
from .options import Options
from .recipe import Recipe, fingerprint, one_weight
from .rules import MODULES
from .state import State, state_of
from .unit import Unit

log = logging.getLogger("sdtrt_backend")


class Step:
    """What Dynamo calls. It knows its units weakly: Dynamo keeps it as long as the code of the model's class."""

    def __init__(self, graph: fx.GraphModule, options: Options, frame: int) -> None:
        self.graph, self.options, self.frame = graph, options, frame
        self.recipe: Recipe | None = None
        self.recipe_hash = ""
        self.last: Callable[[], Unit | None] = lambda: None
        self.units: dict[int, list[weakref.ref[Unit]]] = {}
        self.first: int | None = None  # index of a constant, one that stays the same tensor when the module is moved
        self.rootless: list[State] = []  # of parameters that no module owns, so that nobody else holds their states
        self.broken = False

    def __call__(self, *args: Any) -> Any:
        unit = self.last()
        if unit is None or unit.state.closed or not unit.owns(args):
            unit = self._unit(args)
            if unit is None:
                return self.graph(*args)
            self.last = weakref.ref(unit)
        return unit(args)

    def _unit(self, args: Sequence[Any]) -> Unit | None:
        """The unit of these parameters; None where there is no way to make one."""
        if self.broken:
            return None
        known = self.units.get(0 if self.first is None else id(args[self.first]), [])
        for ref in known:
            unit = ref()
            if unit is not None and not unit.state.closed and (unit.owns(args) or unit.follows(args)):
                return unit
        try:
            return self._add(args)
        except SdtrtError:
            raise
        except Exception as error:
            self.broken = True
            unread(error, args, self.options)
            return None

    def _add(self, args: Sequence[Any]) -> Unit:
        root, captured = captured_of(self.graph, args)
        state = state_with_recipe(root, captured, self)
        captured = renamed(captured, state.recipe)
        state.purge()
        if root is None and state not in self.rootless:
            self.rootless.append(state)
        unit = Unit(captured, state, self.frame)
        if state.recipe is not None and of_other_weights(captured, state.recipe):
            unit.judge_a_picture()
        state.units.append(unit)
        self.first = next((i for i, p in captured.constants.items() if isinstance(p, torch.nn.Parameter)), unit.places[0])
        refs = self.units.setdefault(id(args[self.first]), [])
        refs[:] = [r for r in refs if r() is not None] + [weakref.ref(unit)]
        return unit


def unread(error: Exception, args: Sequence[Any], options: Options) -> None:
    """Say that a graph could not be read, which is an error of ours: the user's call goes on without us."""
    sentence = f"reading a graph of the module failed with {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    log.info("%s", sentence, exc_info=error)
    parameters = [a for a in args if isinstance(a, torch.nn.Parameter)]
    state = state_of(names.root_of(parameters), parameters, options)
    state.say(state.fallbacks, f"{sentence}; that graph runs in the module's own precision")


def captured_of(graph: fx.GraphModule, args: Sequence[Any]) -> tuple[torch.nn.Module | None, Captured]:
    """(the denoiser that owns the parameters among ``args``, the graph with them)."""
    root = names.root_of(a for a in args if isinstance(a, torch.nn.Parameter))
    return root, capture(graph, args, None if root is None else names.paths(root))


def state_with_recipe(root: torch.nn.Module | None, captured: Captured, step: Step) -> State:
    """The denoiser's state, with the recipe that the options name. Raises RecipeError for one of another model."""
    if step.recipe is not None and not step.recipe_hash:
        step.recipe_hash = step.recipe.content_hash()
    state = state_of(root, captured.constants.values(), step.options, step.recipe_hash)
    if step.recipe is not None and state.recipe is None and not state.anew:
        with weights.borrowed(captured.constants.values()):
            found = captured.fingerprints() if root is None else fingerprints(root)
        recipe = step.recipe.fitting(found)
        recipe.check_model(found)
        state.recipe = recipe
    return state


def fingerprints(root: torch.nn.Module) -> dict[str, str]:
    """Layer name -> fingerprint of its weight."""
    return {names.layer_name(n): fingerprint(m.get_parameter("weight")) for n, m in root.named_modules() if type(m) in MODULES}


def of_other_weights(captured: Captured, recipe: Recipe) -> bool:
    """Whether a layer has another weight than the one that was calibrated: a checkpoint took its place."""
    return any(name in recipe.layers and not one_weight(found, recipe.layers[name].fingerprint)
               for name, found in captured.fingerprints().items())


def renamed(captured: Captured, recipe: Recipe | None) -> Captured:
    """Layers whose name the recipe does not know get the one that it has for their weight: the denoiser is compiled inside
    another module, or in pieces whose paths nobody knows."""
    if recipe is None or all(layer.name in recipe.layers for layer in captured.layers):
        return captured
    known = {layer.name for layer in captured.layers}

    def name(layer: Any) -> str:
        if layer.name in recipe.layers:
            return str(layer.name)
        mine = fingerprint(layer.weight)
        found = [n for n, la in recipe.layers.items() if n not in known and one_weight(la.fingerprint, mine)]
        return found[0] if len(found) == 1 else str(layer.name)

    return replace(captured, layers=tuple(replace(layer, name=name(layer)) for layer in captured.layers))
