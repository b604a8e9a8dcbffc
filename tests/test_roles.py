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
from sdtrt_backend.rules import KEEP, ONE_VECTOR, reason_to_keep

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
    return {name for name, layer in layers(module, *args, **kwargs).items() if layer.role}


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


# what embeds a timestep, guidance or pooled text, or modulates a block by them
NAMED = [pattern for pattern, why in KEEP if "timestep" in why or "embedding" in why or "modulation" in why]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "ltx", "sdxl_unet", "flux2", "sana"])
def test_the_graph_finds_the_layers_that_the_names_of_known_families_tell(family):
    module, draw = (FAMILIES | MORE)[family]()
    found = layers(module, **draw(torch.Generator().manual_seed(0), 0.6))
    named = {name for name in found if any(fnmatchcase(name, pattern) for pattern in NAMED)}
    assert {name for name, layer in found.items() if layer.role} == named != set()
