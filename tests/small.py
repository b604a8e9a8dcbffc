"""Small diffusers models, made from their configurations, and what users do to them: adapters, offload, other weights."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS, TOKENS, TIMESTEPS = 32, 5, (900, 500, 100)


def small_unet(seed: int = 0) -> nn.Module:
    """A UNet2DConditionModel of one block down, with the only transformer layer, and one up: 27 layers.

    latents [n, 4, h, w], timestep scalar, text [n, tokens, 32] -> [n, 4, h, w]; a call takes 2 ms, Dynamo more than a second."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",), mid_block_type=None, block_out_channels=(CHANNELS,), layers_per_block=1,
            cross_attention_dim=CHANNELS, attention_head_dim=8, norm_num_groups=8).eval()


def small_inputs(module: nn.Module, timestep: int, size: int = 8, batch: int = 1, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(latents [batch, 4, size, size], timestep [], text [batch, 5, 32]) in the dtype and on the device of the module."""
    noise = torch.Generator().manual_seed(1000 * seed + timestep)
    like = next(module.parameters())
    return (torch.randn(batch, 4, size, size, generator=noise).to(like), torch.tensor(timestep, device=like.device),
            torch.randn(batch, TOKENS, CHANNELS, generator=noise).to(like))


class SmallPipeline:
    """What ``accelerate`` and ``calibrate`` take for a pipeline: a denoiser and a call that draws. Its pictures are latents."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet = unet

    @torch.no_grad()
    def __call__(self, prompt: list[str], num_inference_steps: int = 3, generator: object = None, output_type: str = "latent",
                 **_: object) -> torch.Tensor:
        for step in range(num_inference_steps):
            y = self.unet(*small_inputs(self.unet, 900 - 800 * step // max(1, num_inference_steps - 1), batch=len(prompt))).sample
        return y

    @torch.no_grad()
    def draw(self, size: int = 8, seed: int = 0) -> list[torch.Tensor]:
        """The outputs of every step of one picture."""
        return [self.unet(*small_inputs(self.unet, t, size, seed=seed)).sample for t in TIMESTEPS]


@torch.no_grad()
def own(module: nn.Module, size: int = 8, seed: int = 0) -> list[torch.Tensor]:
    """What the module itself gives for ``SmallPipeline.draw``: its forward, past whatever it was compiled with."""
    return [module.forward(*small_inputs(module, t, size, seed=seed)).sample for t in TIMESTEPS]


def add_lora(unet: nn.Module, name: str, seed: int, strength: float = 1.0) -> None:
    """A LoRA of rank 4 on attention and convolutions, its weights drawn from ``seed``: strong enough to change the picture."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_out.0", "conv1"]), name)
    unet.set_adapters([name])
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in unet.named_parameters():
            if f".lora_A.{name}." in path or f".lora_B.{name}." in path:
                fan_in = p[0].numel()
                p.copy_(torch.randn(p.shape, generator=noise) * strength * fan_in ** -0.5)


def other_weights(unet: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state dict of the module with every floating-point tensor mixed with noise of its own size: the same statistics."""
    noise = torch.Generator().manual_seed(seed)

    def mixed(t: torch.Tensor) -> torch.Tensor:
        n = torch.randn(t.shape, generator=noise).to(t)
        spread = t.std() if t.numel() > 1 else t.abs().mean()
        return (0.8 * t + 0.6 * spread * n).detach().clone()

    return {name: mixed(t) if t.is_floating_point() else t.clone() for name, t in unet.state_dict().items()}


class Offload:
    """Parameters that lie elsewhere between calls, as offloading keeps them: a call rebinds ``param.data`` to a fresh copy, and
    afterwards to what it was. whole: the module at once, else each of its blocks by itself."""

    def __init__(self, unet: nn.Module, whole: bool) -> None:
        self.modules = [unet] if whole else [*unet.down_blocks, *unet.up_blocks]
        for module in self.modules:
            module.forward = _offloaded(module)

    def remove(self) -> None:
        """The modules run their own forward again."""
        for module in self.modules:
            del module.forward


def _offloaded(module: nn.Module):
    forward, kept = module.forward, {}

    @torch.compiler.disable()
    def onload():
        for p in module.parameters():
            kept[p] = p.data
            p.data = p.data.clone()

    @torch.compiler.disable()
    def offload():
        for p, data in kept.items():
            p.data = data
        kept.clear()

    def call(*args, **kwargs):
        onload()
        result = forward(*args, **kwargs)
        offload()
        return result

    return call
