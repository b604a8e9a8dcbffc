"""``sd_int8`` and ``sd_fp8``: what torch.compile calls with a graph, and what it gets to call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from .calls import inputs_changed
from .capture import Captured, capture
from .errors import ModelError, OptionError, SdtrtError
from .fx import start_workers
from .lower import choose
from .names import unfit
from .options import Options
from .recipe import Recipe
from .rules import BY_CALL
from .state import State, state_of
from .step import Step, captured_of, state_with_recipe, unread
from .timesteps import number_for_timestep

log = logging.getLogger("sdtrt_backend")


def sd_int8(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
            **others: Any) -> Callable[..., Any]:
    """The ``torch.compile`` backend with int8 kernels. ``options``: see ``Options``; anything else that torch.compile hands to a
    backend, such as ``mode``, raises OptionError."""
    return _backend(gm, example_inputs, Options.parse(options, "int8"), others)


def sd_fp8(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None,
           **others: Any) -> Callable[..., Any]:
    """The same with float8_e4m3fn, and int8 where that was measured to be faster. NVIDIA GPUs of capability 8.9 or newer."""
    return _backend(gm, example_inputs, Options.parse(options, "fp8"), others)


def _backend(gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options, others: Mapping[str, Any]) -> Callable[..., Any]:
    """A Step for the graph, or the graph as torch.compile runs it by itself where no 8-bit step is possible."""
    for name, value in others.items():
        raise OptionError.not_taken(name, value)
    if parsed.recipe is None:
        check_made_for(parsed, None)
    try:
        step = _step(gm, example_inputs, parsed)
    except SdtrtError:  # the user's options or recipe
        raise
    except Exception as error:  # ours: the user's call goes on without us
        unread(error, example_inputs, parsed)
        step = None
    return step or _inductor(gm, example_inputs)


def _step(gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Step | None:
    if not capture(gm, example_inputs).layers:
        return None
    root, captured = captured_of(gm, example_inputs)
    why = unfit(root)
    if why is not None:
        state = state_of(root, captured.constants.values(), parsed)
        if state.refusal is None:
            state.refuse(why)
        return None
    if any(p.is_meta for p in captured.constants.values()):
        raise ModelError.on_meta("the module")
    if next(iter(captured.constants.values())).is_cuda:
        start_workers()
    step = Step(gm, parsed, _frame())
    if parsed.recipe is not None:
        step.recipe = Recipe.load(parsed.recipe)
        check_made_for(parsed, step.recipe)
    state = state_with_recipe(root, captured, step)
    for name, why in captured.unquantizable.items():
        state.say(state.notes, f"{name} stays in its own precision: {why}")
    refusal = _refusal(gm, captured, example_inputs)
    if refusal is not None:
        state.refuse(refusal)
    if refusal is not None or _needs_gradients(state, example_inputs):
        return None
    if state.recipe is None and state.refusal is None:  # at once: nothing is calibrated for nothing
        _, refusal = choose(parsed, next(iter(captured.constants.values())).device)
        if refusal is not None:
            state.refuse(refusal)
    return step


def _refusal(gm: fx.GraphModule, captured: Captured, example_inputs: Sequence[Any]) -> str | None:
    """Why no graph of this module can have an 8-bit step, or None."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    if number_for_timestep([n.name for n in placeholders], example_inputs):
        return ("the timestep comes as a Python number, and every value of it would be a step of its own: pass a tensor, "
                "torch.tensor(t)")
    changed = inputs_changed(gm.graph)
    if changed:
        return (f"the module changes its input {changed[0].name} in place (a cache, a counter, a norm in training), and a build "
                "runs it several times")
    return None


def _needs_gradients(state: State, example_inputs: Sequence[Any]) -> bool:
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in example_inputs if isinstance(t, torch.Tensor))):
        return False
    state.keep_weights()
    state.say(state.fallbacks, "gradients are enabled and the weights or inputs require them, and 8-bit kernels have none: this "
                               "call runs unquantised; for inference call the module under torch.no_grad()")
    return True


def _frame() -> int:
    """Dynamo's number of the piece of code that it compiles: the same for all graphs of that code."""
    found = torch._guards.CompileContext.current_compile_id()
    return -1 if found is None or found.frame_id is None else found.frame_id


def check_made_for(parsed: Options, recipe: Recipe | None) -> None:
    """Raise OptionError for what only ``calibrate`` can do, unless the recipe was made with it."""
    if recipe is None and parsed.rule in BY_CALL:
        raise OptionError.counts_calls(parsed.rule)
    target = 0.0 if recipe is None else recipe.provenance.get("min_psnr", {}).get("target_db", 0.0)
    if parsed.min_psnr is not None and target < parsed.min_psnr:
        raise OptionError.needs_pictures(parsed.min_psnr)


def _inductor(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """What torch.compile does by itself, called by Dynamo while it compiles, with gradients where they are enabled."""
    from torch._inductor.compile_fx import compile_fx

    return cast(Callable[..., Any], compile_fx(gm, list(example_inputs)))
