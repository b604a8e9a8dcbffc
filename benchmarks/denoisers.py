"""More denoisers for ``gpu.py`` at their published sizes: the transformers of today, in bf16, with random weights.

Each entry has the class in diffusers, the published configuration where it is not the class's default, a small one for
``--tiny``, and what a step at the usual size is given. ``python benchmarks/denoisers.py`` prints the parameters of each, on no
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Arguments = Callable[[float], dict[str, Any]]


@dataclass(frozen=True)
class Noise:
    """Where the inputs of a step are made."""

    generator: torch.Generator
    device: torch.device
    dtype: torch.dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def full(self, batch: int, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.full((batch,), value, device=self.device, dtype=dtype or self.dtype)


@dataclass(frozen=True)
class Denoiser:
    """parameters: of the published one; tiny: what differs in the small one; inputs: (config, batch, tiny, noise) -> timestep,
    0 to 1000 -> keyword arguments of a step."""

    kind: str
    parameters: int
    inputs: Callable[[Any, int, bool, Noise], Arguments]
    config: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)


def mixed(noise: Noise, *shape: int) -> Callable[[float], torch.Tensor]:
    """timestep -> the clean latent with that share of noise."""
    clean, other = noise(*shape), noise(*shape)
    return lambda t: (1 - t / 1000) * clean + t / 1000 * other


def z_image(config: Any, batch: int, tiny: bool, noise: Noise) -> Arguments:
    side, tokens = (8, 5) if tiny else (128, 77)
    latents = [mixed(noise, config.in_channels, 1, side, side) for _ in range(batch)]
    captions = [noise(tokens, config.cap_feat_dim) for _ in range(batch)]
    return lambda t: {"x": [latent(t) for latent in latents], "t": noise.full(batch, 1 - t / 1000), "cap_feats": captions,
                      "return_dict": False}


def sd3(config: Any, batch: int, tiny: bool, noise: Noise) -> Arguments:
    latent = mixed(noise, batch, config.in_channels, config.sample_size, config.sample_size)
    fixed = {"encoder_hidden_states": noise(batch, 5 if tiny else 333, config.joint_attention_dim),
             "pooled_projections": noise(batch, config.pooled_projection_dim), "return_dict": False}
    return lambda t: fixed | {"hidden_states": latent(t), "timestep": noise.full(batch, t)}


def qwen_image(config: Any, batch: int, tiny: bool, noise: Noise) -> Arguments:
    side, tokens = (4, 5) if tiny else (64, 128)
    latent = mixed(noise, batch, side * side, config.in_channels)
    fixed = {"encoder_hidden_states": noise(batch, tokens, config.joint_attention_dim), "img_shapes": [[(1, side, side)]] * batch,
             "return_dict": False}  # no mask, as pipelines call it for prompts of one length
    return lambda t: fixed | {"hidden_states": latent(t), "timestep": noise.full(batch, t / 1000)}


def flux2(config: Any, batch: int, tiny: bool, noise: Noise) -> Arguments:
    side, tokens = (4, 5) if tiny else (64, 512)
    latent = mixed(noise, batch, side * side, config.in_channels)
    places = torch.zeros(side * side, 4, device=noise.device)
    places[:, 1], places[:, 2] = (torch.arange(side * side, device=noise.device) // side,
                                  torch.arange(side * side, device=noise.device) % side)
    fixed = {"encoder_hidden_states": noise(batch, tokens, config.joint_attention_dim), "img_ids": places,
             "txt_ids": torch.zeros(tokens, 4, device=noise.device), "return_dict": False,
             "guidance": noise.full(batch, 4.0, torch.float32) if config.guidance_embeds else None}
    return lambda t: fixed | {"hidden_states": latent(t), "timestep": noise.full(batch, t / 1000)}


def wan(config: Any, batch: int, tiny: bool, noise: Noise) -> Arguments:
    """832x480: 81 frames at 8x8 pixels a latent of 16 channels, 121 at 16x16 of 48."""
    size = (2, 8, 8) if tiny else (21, 60, 104) if config.in_channels == 16 else (31, 30, 52)
    latent = mixed(noise, batch, config.in_channels, *size)
    fixed = {"encoder_hidden_states": noise(batch, 5 if tiny else 512, config.text_dim), "return_dict": False}
    return lambda t: fixed | {"hidden_states": latent(t), "timestep": noise.full(batch, t, torch.float32)}


def ltx(config: Any, batch: int, tiny: bool, noise: Noise) -> Arguments:
    """704x480, 121 frames."""
    (frames, height, width), tokens = ((2, 4, 4), 5) if tiny else ((16, 15, 22), 128)
    latent = mixed(noise, batch, frames * height * width, config.in_channels)
    fixed = {"encoder_hidden_states": noise(batch, tokens, config.caption_channels), "num_frames": frames, "height": height,
             "width": width, "encoder_attention_mask": torch.ones(batch, tokens, device=noise.device), "return_dict": False}
    return lambda t: fixed | {"hidden_states": latent(t), "timestep": noise.full(batch, t)}


HEADS = {"attention_head_dim": 16, "num_attention_heads": 4}
DENOISERS = {
    "z-image": Denoiser("ZImageTransformer2DModel", 6154908736, z_image, tiny={
        "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "cap_feat_dim": 64, "axes_dims": [4, 6, 6],
        "axes_lens": [64, 32, 32]}),
    "sd35-large": Denoiser("SD3Transformer2DModel", 8056627520, sd3, {
        "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm"}, HEADS | {
            "sample_size": 8, "num_layers": 3, "joint_attention_dim": 64, "caption_projection_dim": 64,
            "pooled_projection_dim": 32, "pos_embed_max_size": 8}),
    "qwen-image": Denoiser("QwenImageTransformer2DModel", 20430401088, qwen_image, tiny=HEADS | {
        "in_channels": 64, "num_layers": 3, "joint_attention_dim": 64, "axes_dims_rope": (4, 6, 6)}),
    "flux2-dev": Denoiser("Flux2Transformer2DModel", 32223281152, flux2, tiny=HEADS | {
        "in_channels": 64, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 64, "timestep_guidance_channels": 64,
        "axes_dims_rope": (4, 4, 4, 4)}),
    "flux2-klein": Denoiser("Flux2Transformer2DModel", 3875544576, flux2, {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False}, HEADS | {"in_channels": 64, "num_layers": 2, "num_single_layers": 3, "joint_attention_dim": 64,
                 "timestep_guidance_channels": 64, "axes_dims_rope": (4, 4, 4, 4)}),
    "wan-1.3b": Denoiser("WanTransformer3DModel", 1418996800, wan, {
        "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        HEADS | {"text_dim": 64, "freq_dim": 32, "ffn_dim": 128, "num_layers": 3, "rope_max_seq_len": 32}),
    "wan-5b": Denoiser("WanTransformer3DModel", 4999787712, wan, {
        "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        HEADS | {"text_dim": 64, "freq_dim": 32, "ffn_dim": 128, "num_layers": 3, "rope_max_seq_len": 32}),
    "ltx": Denoiser("LTXVideoTransformer3DModel", 1923385472, ltx, tiny=HEADS | {
        "in_channels": 32, "out_channels": 32, "cross_attention_dim": 64, "num_layers": 3, "caption_channels": 64}),
}


def build(name: str, tiny: bool, device: torch.device) -> torch.nn.Module:
    """The denoiser with random weights from seed 0; fp32 on a CPU."""
    import diffusers

    found = DENOISERS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            module: torch.nn.Module = getattr(diffusers, found.kind)(**found.config | (found.tiny if tiny else {}))
    finally:
        torch.set_default_dtype(torch.float32)
    parameters = sum(p.numel() for p in module.parameters())
    assert tiny or parameters == found.parameters, f"{name} has {parameters} parameters, the published one {found.parameters}"
    for path, p in module.named_parameters():  # Z-Image's tokens for padding hold what memory held
        if p.device.type != "meta" and (path.endswith("pad_token") or not p.isfinite().all()):
            torch.nn.init.normal_(p, std=0.02)
    return module.eval().requires_grad_(False)


def inputs(name: str, module: torch.nn.Module, batch: int, tiny: bool, device: torch.device) -> Arguments:
    """timestep -> keyword arguments of a step."""
    noise = Noise(torch.Generator(device).manual_seed(1), device, next(module.parameters()).dtype)
    return DENOISERS[name].inputs(module.config, batch, tiny, noise)


if __name__ == "__main__":
    for name in DENOISERS:
        module = build(name, False, torch.device("meta"))
        print(f"{name:12}{sum(p.numel() for p in module.parameters()):>14,} parameters", flush=True)
