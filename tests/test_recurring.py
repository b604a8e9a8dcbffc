"""What does not depend on the latent is made once for each prompt and each timestep, and again after weights were written."""

import pytest
import torch
import torch.nn.functional as F
from conftest import grab
from fragments import planned
from test_families import calibrated_graphs
from torch import nn

import sdtrt_backend
from sdtrt_backend import recurring
from sdtrt_backend.capture import bind, tensor_inputs
from sdtrt_backend.lower import LOWERINGS
from sdtrt_backend.measure import compare
from sdtrt_backend.merge import renew
from sdtrt_backend.options import Options
from sdtrt_backend.quantize import insert
from sdtrt_backend.state import states

LATENT, TIMESTEP, PROMPT = range(3)  # arguments of the module
BOUND = 0.1  # of the error of a step


class Twice(nn.Module):
    """Products of the timestep, products of the prompt, and a latent that reads both."""

    def __init__(self, products=recurring.LEAST):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.text = (nn.ModuleList(nn.Linear(64, 64) for _ in range(products)) for _ in range(2))
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.spoil = ""

    def forward(self, latent, timestep, prompt):
        emb = timestep.float().expand(1, 64) / 1000
        if self.spoil == "of both":
            prompt = prompt + self.time[0](emb)
        text = F.dropout(prompt, 0.5, self.spoil == "drawn anew")
        if self.spoil == "written":
            text = text.clone().mul_(2)
        for time, words in zip(self.time, self.text, strict=True):
            emb, text = time(F.silu(emb)), text + F.gelu(words(text))
        attended = F.scaled_dot_product_attention(self.first(latent * (1 + emb)), text, text)
        result = self.last(latent + attended)
        return (result, text) if self.spoil == "a result" else result


def inputs(seed=0, tokens=16):
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, 64, generator=noise), torch.tensor(500), torch.randn(2, 5, 64, generator=noise)]


def apart(module, given):
    """(which of the module's arguments -> what is made of them, the rest, the graph's inputs)."""
    torch._dynamo.reset()
    captured, args = grab(module, given)
    tensors = tensor_inputs(captured, args)
    parts, rest = recurring.apart(bind(captured, args)[0], tensors)
    which = [next(i for i, t in enumerate(given) if t is tensor) for tensor in tensors]
    return {tuple(sorted(which[i] for i in places)): (places, part) for places, part in parts}, rest, tensors


def products(gm):
    return len(gm.graph.find_nodes(op="call_function", target=torch._C._nn.linear))


def test_the_parts_are_what_does_not_depend_on_the_latent():
    module, given = Twice(), inputs()
    parts, rest, tensors = apart(module, given)
    assert {of: products(part) for of, (_, part) in parts.items()} == {(TIMESTEP,): recurring.LEAST, (PROMPT,): recurring.LEAST}
    assert products(rest) == 2
    made = [t for places, part in parts.values() for t in part(*(tensors[i] for i in places))]
    assert torch.equal(rest(*tensors, *made)[0], module(*given))


@pytest.mark.parametrize("spoil", ["written", "a result"])
def test_graphs_without_parts(spoil):
    module = Twice()
    module.spoil = spoil
    assert apart(module, inputs())[0] == {}


def test_few_products_and_results_without_a_latent_are_no_part():
    assert apart(Twice(recurring.LEAST - 1), inputs())[0] == {}
    module = Twice()
    module.last.forward = lambda x: x.mean(1)
    assert apart(module, inputs())[0] == {}


@pytest.mark.parametrize("spoil", ["drawn anew", "a weight", "large", "of both"])
def test_what_changes_is_in_no_part(spoil, monkeypatch):
    module, given = Twice(), inputs()
    module.spoil = spoil
    if spoil == "a weight":
        given[PROMPT] = nn.Parameter(given[PROMPT])
    if spoil == "large":
        monkeypatch.setattr(recurring, "COMPARED_BYTES", given[PROMPT].nbytes - 1)
    assert list(apart(module, given)[0]) == [(TIMESTEP,)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "flux", "stable_cascade", "z_image"])
@torch.no_grad()
def test_a_familys_graph_apart_gives_what_it_gives_as_a_whole(family, monkeypatch):
    monkeypatch.setattr(recurring, "LEAST", 1)
    ((captured, args, _),) = calibrated_graphs(family)
    gm, tensors = bind(captured, args)[0], tensor_inputs(captured, args)
    parts, rest = recurring.apart(gm, tensors)
    assert parts
    made = [t for places, part in parts for t in part(*(tensors[i] for i in places))]
    assert all(map(torch.equal, gm(*tensors), rest(*tensors, *made)))


def counting(results):
    calls = []

    def call(*tensors):
        calls.append([t.clone() for t in tensors])
        return results(*tensors)

    return call, calls


def test_equal_values_are_not_computed_again_and_others_are():
    call, calls = counting(lambda x: [x * 2])
    held = recurring.Held(call, [1], [])
    mine = torch.tensor([1.0, 2.0])
    first = held([torch.zeros(1), mine])
    assert held([torch.ones(1), mine.clone()]) is first
    assert len(calls) == 1
    mine.add_(1)  # the caller's tensor, written in place
    assert torch.equal(held([torch.ones(1), mine])[0], mine * 2)
    assert len(calls) == 2
    assert held([torch.ones(1), torch.tensor([1.0, 2.0])]) is first
    assert len(calls) == 2
    for _ in range(2):
        assert held([mine, torch.tensor([float("nan")])])[0].isnan().all()
    assert len(calls) == 4
    held.renew()
    held([mine, mine])
    assert len(calls) == 5


def test_a_pictures_timesteps_are_kept_and_of_large_results_the_last(monkeypatch):
    call, calls = counting(lambda x: [x.expand(1024).clone()])
    held = recurring.Held(call, [0], [])
    for _ in range(2):
        for t in range(50):
            held([torch.tensor(t)])
    assert len(calls) == 50
    monkeypatch.setattr(recurring, "KEPT_BYTES", 1)
    for _ in range(2):
        for t in range(50):
            held([torch.tensor(-1 - t)])
    assert len(calls) == 150
    assert len(held.known) == 1


@pytest.mark.slow
def test_the_step_follows_prompts_timesteps_and_written_codes(monkeypatch):
    """Against the same step without parts: prompts and timesteps in turn, and after codes that both read were written."""
    captured, args, decisions, tensors = planned(Twice(), *inputs())
    codes, made = {}, []
    for how in (recurring.apart, lambda gm, example: ([], gm)):
        monkeypatch.setattr(recurring, "apart", how)
        gm = insert(*bind(captured, args), decisions, codes)
        made.append(LOWERINGS["inductor"].lower(gm, tensors, Options(rest="float32")))
    held = [one for one in made[0].derived if isinstance(one, recurring.Held)]
    assert len(held) == 2
    assert made[0].eight_bit_flops == made[1].eight_bit_flops > 0

    def compared():
        for prompt in range(3):
            for timestep in (500, 20):
                given = {(2, 16, 64): inputs(timestep)[LATENT], (): torch.tensor(timestep), (2, 5, 64): inputs(prompt)[PROMPT]}
                with torch.no_grad():
                    mine, whole = (one.step(*(given[tuple(t.shape)] for t in tensors))[0].clone() for one in made)
                assert torch.allclose(mine, whole, atol=1e-4 * float(whole.abs().max()))
        return whole

    before = compared()
    scales = {id(scale) for coded in codes.values() for _, scale in coded.tensors}
    (of_prompt,) = (one for one in held if not scales.isdisjoint(map(id, one.sources)))
    computed, calls = counting(of_prompt.call)
    monkeypatch.setattr(of_prompt, "call", computed)
    assert torch.equal(compared(), before)
    assert not calls
    for coded in codes.values():
        for _, scale in coded.tensors:
            scale.mul_(1.5)
    for one in made:
        renew(one.derived, list(codes.values()), {})
    assert not torch.equal(compared(), before)
    assert calls


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("part", ["time", "text"])
def test_a_weight_that_is_written_in_place_is_seen_at_once(part):
    torch._dynamo.reset()
    module = Twice().eval().requires_grad_(False)
    step = torch.compile(module, backend="sd_int8", options={"engine": "inductor", "calibration_runs": 1})
    latent, _, prompt = inputs()
    for timestep in (900, 500, 100) * 3:
        before = step(latent, torch.tensor(timestep), prompt)
    assert sdtrt_backend.explain(module).state == "ready"
    assert any(isinstance(one, recurring.Held) for unit in states(module)[0].units for made in unit.results.values()
               for one in made.derived)
    assert compare(before, module(latent, torch.tensor(100), prompt)) < BOUND
    for p in getattr(module, part)[-1].parameters():
        p.neg_()
    own = module(latent, torch.tensor(100), prompt)
    assert compare(before, own) > 2 * compare(step(latent, torch.tensor(100), prompt), own)
    assert compare(step(latent, torch.tensor(100), prompt), own) < BOUND
