"""Which layers are of the picture as a whole is read off the graph, whatever their names are."""

from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES
from more_models import MORE
from torch import nn

from sdtrt_backend import names
from sdtrt_backend.capture import capture
from sdtrt_backend.quantize import plan
from sdtrt_backend.recipe import LayerRecipe, Recipe, fingerprint
from sdtrt_backend.roles import CONDITIONING, FIRST, LAST
from sdtrt_backend.rules import BY_ROLE, KEEP, ONE_VECTOR, layers_of, reason_to_keep

WIDTH = 32


class Denoiser(nn.Module):
    """Names that no table knows: ``a`` embeds the timestep, ``b`` modulates, ``c`` and ``d`` are of tokens, ``e`` reads their
    mean, ``f`` the prompt."""

    def __init__(self):
        super().__init__()
        for name in "abcdef":
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def forward(self, tokens, timestep, prompt, pooled=None):
        vector = self.a(torch.cos(timestep[:, None] * torch.arange(WIDTH)))
        if pooled is not None:
            vector = vector + pooled
        y = self.c(tokens) * (1 + self.b(F.silu(vector))[:, None])
        y = F.scaled_dot_product_attention(y, self.f(prompt), self.f(prompt))
        return self.d(y) * self.e(y.mean(1)).sigmoid()[:, None]


def layers(module, *args, **kwargs):
    """Layers of each graph that Dynamo makes of a call, by name."""
    torch._dynamo.reset()
    found, paths = {}, names.paths(module)

    def backend(gm, example):
        found.update({layer.name: layer for layer in capture(gm, example, paths).layers})
        return gm.forward

    with torch.no_grad():
        torch.compile(module, backend=backend)(*args, **kwargs)
    return found


def conditioning(module, *args, **kwargs):
    return {name for name, layer in layers(module, *args, **kwargs).items() if layer.role == CONDITIONING}


@pytest.mark.parametrize("batch", [1, 2])
def test_what_reads_one_vector_of_each_picture_is_conditioning(batch):
    given = torch.randn(batch, 6, WIDTH), torch.rand(batch), torch.randn(batch, 3, WIDTH)
    assert conditioning(Denoiser(), *given) == {"a", "b", "e"}
    assert conditioning(Denoiser(), *given, torch.randn(batch, WIDTH)) == {"a", "b", "e"}


def test_a_prompt_of_one_token_is_a_vector_and_one_without_pictures_is_not():
    module = Denoiser()
    given = torch.randn(2, 6, WIDTH), torch.rand(2), torch.randn(2, 1, WIDTH)
    assert conditioning(module, *given) == {"a", "b", "e", "f"}

    class Unbatched(nn.Module):
        """A list of prompts, as tokens alone."""

        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, tokens, timestep, prompts):
            return self.inner(tokens, timestep, torch.stack([self.inner.f(p) for p in prompts]))

    assert conditioning(Unbatched(), *given[:2], [torch.randn(5, WIDTH)] * 2) == {"inner.a", "inner.b", "inner.e"}


def test_tokens_in_one_row_are_tokens():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, tokens, timestep):
            rows = self.a(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
            return self.b(rows.flatten(1).unflatten(1, tokens.shape[1:])) * self.c(timestep[:, None].expand(-1, WIDTH))[:, None]

    assert conditioning(Rows(), torch.randn(2, 6, WIDTH), torch.rand(2)) == {"c"}


def test_tokens_made_of_one_vector_are_tokens():
    class Image(Denoiser):
        """An image embedding becomes three tokens, as an IP-Adapter does it."""

        def forward(self, tokens, timestep, image):
            return super().forward(tokens, timestep, self.b(image).unflatten(1, (4, -1)) @ torch.ones(WIDTH // 4, WIDTH))

    assert conditioning(Image(), torch.randn(2, 6, WIDTH), torch.rand(2), torch.randn(2, WIDTH)) == {"a", "b", "e"}


def test_where_no_input_tells_the_number_of_pictures_nothing_is():
    assert conditioning(nn.Sequential(nn.Linear(WIDTH, WIDTH)), torch.randn(8, WIDTH)) == set()


def test_numbers_of_words_are_tokens():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.a = nn.Embedding(10, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, words, mask):
            return F.scaled_dot_product_attention(self.a(self.table(words)), mask, mask)

    assert conditioning(Words(), torch.ones(2, 5, dtype=torch.int64), torch.randn(2, 5, WIDTH)) == set()


def test_a_symbolic_size_counts_as_the_one_that_was_seen_and_is_not_tied_to_it():
    module, sizes = Denoiser(), []

    def backend(gm, example):
        sizes.append(example)
        assert {layer.name for layer in capture(gm, example, names.paths(module)).layers if layer.role} == {"a", "b", "e"}
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=True)
    with torch.no_grad():
        for tokens in (6, 7, 9):
            compiled(torch.randn(2, tokens, WIDTH), torch.rand(2), torch.randn(2, 3, WIDTH))
    assert len(sizes) == 1


def test_a_layer_of_that_role_stays_and_says_why():
    found = layers(Denoiser(), torch.randn(2, 6, WIDTH), torch.rand(2), torch.randn(2, 3, WIDTH))
    assert reason_to_keep(found["b"], ()) == ONE_VECTOR
    assert reason_to_keep(found["c"], ()) is None


class Ends(nn.Module):
    """``a`` reads the latent, ``b`` the prompt, ``z`` makes the result; blocks of wide layers between them."""

    def __init__(self, blocks=2, width=256):
        super().__init__()
        self.a, self.b, self.z = nn.Linear(4, width), nn.Linear(8, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(width, width) for name in "qkvo"}) for _ in range(blocks))

    def forward(self, tokens, timestep, prompt, rotary):
        x, text = self.a(tokens), self.b(prompt)
        for block in self.blocks:
            context = torch.cat([text, x], 1)
            x = x + block["o"](F.scaled_dot_product_attention(block["q"](x) * rotary, block["k"](context), block["v"](context)))
        return self.z(F.layer_norm(x, x.shape[-1:])) * timestep[:, None, None]


def ends(module, *args, **kwargs):
    return {name: layer.role for name, layer in layers(module, *args, **kwargs).items() if layer.role in (FIRST, LAST)}


ENDS = torch.randn(2, 16, 4), torch.rand(2), torch.randn(2, 5, 8), torch.randn(16, 256)


def test_what_alone_reads_an_input_or_makes_the_result_is_first_or_last():
    assert ends(Ends(), *ENDS) == {"a": FIRST, "b": FIRST, "z": LAST}
    assert ends(Ends(1), *ENDS) == {"a": FIRST, "b": FIRST, "z": LAST}  # what rotates the queries leads to "o" alone: not first


def test_what_reads_the_prompt_beside_others_is_not_first():
    class ReadByAll(Ends):
        def forward(self, tokens, timestep, prompt, rotary):
            return super().forward(tokens, timestep, prompt, rotary) + self.b(prompt).mean()

    assert ends(ReadByAll(), *ENDS) == {"a": FIRST}  # "b" reads it twice, and the result has two makers


def test_the_layers_of_one_block_are_neither():
    """A block that is compiled alone: its projections are all of the work there is."""
    block = Ends().blocks[0]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return self.block["o"](F.gelu(self.block["q"](x)))

    assert ends(Block(), torch.randn(2, 16, 256)) == {}


def test_results_for_another_model_have_no_last_layer():
    class Control(Ends):
        def forward(self, tokens, timestep, prompt, rotary):
            x = super().forward(tokens, timestep, prompt, rotary)
            return x, self.z(self.blocks[0]["q"](prompt.new_ones(2, 16, 256))), x.mean()

    assert LAST not in ends(Control(), *ENDS).values()


def test_the_recipe_tells_where_there_is_no_graph_and_the_graph_where_there_is_one():
    module = Ends()
    roles = {name: layer.role for name, layer in layers(module, *ENDS).items()}
    told = Recipe("", {name: LayerRecipe("linear", fingerprint(module.get_submodule(name).weight), name, 1.0, role=role)
                       for name, role in roles.items()})
    wide = [layer for layer in layers_of(module) if layer.role is None]  # too few channels would be a reason too
    assert {d.layer.name: d.reason for d in plan(wide, told, ()) if d.layer.name in "abz"} == {
        name: BY_ROLE[roles[name]] for name in "abz"}
    block = layers(module, *ENDS)["blocks.0.q"]
    once = Recipe("", {block.name: LayerRecipe("linear", fingerprint(block.weight), block.name, 1.0, role=CONDITIONING)})
    assert [d.precision for d in plan([block], once, ())] == ["int8"]  # a prompt of one token was a vector then


@pytest.mark.slow
@pytest.mark.parametrize(("family", "found"), [
    ("flux", {"x_embedder": FIRST, "context_embedder": FIRST, "proj_out": LAST}),
    ("sdxl_unet", {"conv_in": FIRST, "conv_out": LAST}),
    ("lumina2", {"x_embedder": FIRST, "norm_out.linear_2": LAST}),
    ("kandinsky5", {"text_embeddings.in_layer": FIRST, "visual_embeddings.in_layer": FIRST, "out_layer.out_layer": LAST}),
    ("stable_cascade", {"embedding.1": FIRST, "clip_txt_mapper": FIRST, "clf.1": LAST}),
])
def test_the_ends_of_known_families(family, found):
    module, draw = (FAMILIES | MORE)[family]()
    assert ends(module, **draw(torch.Generator().manual_seed(0), 0.6)) == found


# what embeds a timestep, guidance or pooled text, or modulates a block by them
NAMED = [pattern for pattern, why in KEEP if "timestep" in why or "embedding" in why or "modulation" in why]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "ltx", "sdxl_unet", "flux2", "sana"])
def test_the_graph_finds_the_layers_that_the_names_of_known_families_tell(family):
    module, draw = (FAMILIES | MORE)[family]()
    found = layers(module, **draw(torch.Generator().manual_seed(0), 0.6))
    named = {name for name in found if any(fnmatchcase(name, pattern) for pattern in NAMED)}
    assert {name for name, layer in found.items() if layer.role == CONDITIONING} == named != set()
