"""LoRAs in the 8-bit codes of the bundled model, two crafted and one trained here, judged on pictures."""

from statistics import mean

import pytest
import torch

import sdtrt_backend
from sdtrt_backend.demo import CALIBRATION_PROMPTS, PROMPTS, draw
from sdtrt_backend.metrics import psnr

pytestmark = pytest.mark.slow
STEPS, SEED, TRAINED = 12, 5, 24
LEAST, WITHIN, MOVED = 35.0, 1.0, 25.0  # dB


def crafted(unet, targets, rank=8):
    """The largest part of each weight again: a weight of -0.3 takes as much of it away."""
    found = {}
    for path, layer in unet.named_modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d) and any(t in path for t in targets):
            w = layer.weight.detach()
            u, s, v = torch.linalg.svd(w.flatten(1), full_matrices=False)
            found[f"unet.{path}.lora_A.weight"] = v[:rank].reshape(-1, *w.shape[1:]).contiguous()
            found[f"unet.{path}.lora_B.weight"] = (u[:, :rank] * s[:rank]).reshape(len(w), -1, *[1] * (w.dim() - 2)).contiguous()
    return found


def trained(pipe, folder):
    """A file of a LoRA that PEFT trained for a few steps to make pictures of one colour."""
    from peft import LoraConfig

    unet = pipe.unet
    with torch.random.fork_rng(devices=[]):  # PEFT draws where it begins: what comes of a few steps differs by as much
        torch.manual_seed(0)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), "trained")
    noise = torch.Generator().manual_seed(0)
    size, text = unet.config.sample_size, pipe.encode_prompt(list(PROMPTS[:4]), "cpu", 1, False)[0].detach()
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=2e-3)
    latents = torch.full((4, unet.config.in_channels, size, size), 0.5)
    for _ in range(TRAINED):
        eps = torch.randn(latents.shape, generator=noise)
        t = torch.randint(50, 900, (4,), generator=noise)
        wanted = pipe.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        noisy = wanted.sqrt() * latents + (1 - wanted).sqrt() * eps
        target = wanted.sqrt() * eps - (1 - wanted).sqrt() * latents  # v-prediction
        if pipe.scheduler.config.prediction_type == "epsilon":
            target = eps
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(unet(noisy, t, text).sample, target).backward()
        optimizer.step()
    pipe.save_lora_weights(folder, unet_lora_layers=peft_state_dict(unet))
    unet.delete_adapters("trained")


def peft_state_dict(unet):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(unet, adapter_name="trained")


SETS = {
    "attention and feed-forward": {"attention": -0.4},
    "convolutions": {"convolutions": -0.4},
    "two at once": {"attention": -0.2, "convolutions": -0.1},
    "trained": {"trained": 1.0},
    "trained, weight 0.3": {"trained": 0.3},
    "trained, weight 1.2": {"trained": 1.2},
}

ALWAYS = ("trained",)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory):
    """(accelerated, eager, pictures of both without LoRAs, function that loads some into both)."""
    pipe, eager, folder = sdtrt_backend.demo_pipeline(), sdtrt_backend.demo_pipeline(), tmp_path_factory.mktemp("lora")
    trained(eager, folder)
    sources = {"attention": lambda: crafted(sdtrt_backend.demo_pipeline().unet, ["attn", "ff.net"]),
               "convolutions": lambda: crafted(sdtrt_backend.demo_pipeline().unet, ["resnets", "conv_in"], 4),
               "trained": lambda: folder}
    recipe = sdtrt_backend.calibrate(pipe, list(CALIBRATION_PROMPTS), num_inference_steps=STEPS, progress=False)
    sdtrt_backend.accelerate(pipe, recipe=recipe, engine="inductor")
    plain, base = (draw(p, PROMPTS, STEPS, SEED) for p in (eager, pipe))

    def load(names):
        for name in set(names) & sources.keys():
            source = sources.pop(name)()
            sdtrt_backend.load_lora(pipe, source, name)
            eager.load_lora_weights(source, adapter_name=name)

    yield pipe, eager, plain, base, load
    sdtrt_backend.restore(pipe)


@pytest.mark.parametrize("loras", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.long]) for name in SETS])
def test_pictures_with_loras_are_as_near_to_full_precision_as_without(pipes, loras):
    pipe, eager, plain, base, load = pipes
    weights = SETS[loras]
    load(weights)
    eager.enable_lora()
    eager.set_adapters(list(weights), list(weights.values()))
    expected = draw(eager, PROMPTS, STEPS, SEED)
    sdtrt_backend.set_loras(pipe, weights)
    got = draw(pipe, PROMPTS, STEPS, SEED)
    moved, without, with_loras = (mean(psnr(a, b)) for a, b in ((plain, expected), (base, plain), (got, expected)))
    print(f"{loras}: moved to {moved:.1f} dB, without {without:.1f}, with {with_loras:.1f}")
    assert with_loras >= max(LEAST, without - WITHIN)
    if loras in ("attention and feed-forward", "convolutions"):
        assert moved < MOVED


def test_without_any_the_pictures_are_the_earlier_ones_to_the_bit(pipes):
    pipe, _, _, base, load = pipes
    load(["trained"])
    sdtrt_backend.set_loras(pipe, {})
    assert (draw(pipe, PROMPTS, STEPS, SEED) == base).all()
