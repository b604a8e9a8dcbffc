"""Tiny denoisers of the families, randomly initialised from config: [16, 64] channels, two blocks of each kind.

``FAMILIES[name]()`` gives (module, draw): the module in eval mode, fp32, and draw(generator, share) -> keyword arguments of one
call at ``share`` (1 = pure noise, 0 = picture) of the trajectory. Importing this file imports no diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Draw = Callable[[torch.Generator, float], dict[str, Any]]
WIDTH, HEADS = 64, 4
TOKENS, TEXT = 16, 6  # of the picture (4 x 4) and of the text
SDXL_SIDE = 8  # latent pixels


def awake(module: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with random weights everywhere: some of these models start with zero layers, which would quantise nothing."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=noise) / fan_in**0.5)
            else:
                base = 1.0 if name.endswith("weight") else 0.0
                parameter.copy_(base + 0.1 * torch.randn(parameter.shape, generator=noise))
    return module.eval()


def normal(noise: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=noise)


def flux(in_channels: int = WIDTH, out_channels: int | None = None) -> tuple[nn.Module, Draw]:
    """Two double and two single blocks."""
    from diffusers import FluxTransformer2DModel

    module = FluxTransformer2DModel(in_channels=in_channels, out_channels=out_channels, num_layers=2, num_single_layers=2,
                                    attention_head_dim=16, num_attention_heads=HEADS, joint_attention_dim=WIDTH,
                                    pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        ids = torch.zeros(TOKENS, 3)
        ids[:, 1], ids[:, 2] = torch.arange(TOKENS) // 4, torch.arange(TOKENS) % 4
        return {"hidden_states": normal(noise, 2, TOKENS, WIDTH), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "pooled_projections": normal(noise, 2, 32), "timestep": torch.full((2,), share), "img_ids": ids,
                "txt_ids": torch.zeros(TEXT, 3), "guidance": torch.full((2,), 3.5), "return_dict": False}

    return awake(module), draw


def sd3(dual_attention_layers: tuple[int, ...] = (0,), qk_norm: str | None = "rms_norm") -> tuple[nn.Module, Draw]:
    """The first block with the second attention of SD3.5 medium; RMS norms of q and k."""
    from diffusers import SD3Transformer2DModel

    module = SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=16, num_layers=2, attention_head_dim=16,
                                   num_attention_heads=HEADS, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH,
                                   pooled_projection_dim=32, out_channels=16, pos_embed_max_size=8, qk_norm=qk_norm,
                                   dual_attention_layers=dual_attention_layers)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, 16, 8, 8), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "pooled_projections": normal(noise, 2, 32), "timestep": torch.full((2,), 1000 * share), "return_dict": False}

    return awake(module), draw


def pixart() -> tuple[nn.Module, Draw]:
    from diffusers import PixArtTransformer2DModel

    module = PixArtTransformer2DModel(num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, out_channels=8,
                                      num_layers=2, cross_attention_dim=WIDTH, sample_size=8, patch_size=2,
                                      caption_channels=WIDTH, use_additional_conditions=False)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, 4, 8, 8), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "timestep": torch.full((2,), int(999 * share)), "encoder_attention_mask": torch.ones(2, TEXT),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}

    return awake(module), draw


def wan() -> tuple[nn.Module, Draw]:
    """Two frames; the first projection is a Conv3d."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=16, in_channels=16, out_channels=16,
                                   text_dim=WIDTH, freq_dim=32, ffn_dim=128, num_layers=2, rope_max_seq_len=32)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 16, 2, 8, 8), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "timestep": torch.full((1,), 1000 * share), "return_dict": False}

    return awake(module), draw


def ltx() -> tuple[nn.Module, Draw]:
    from diffusers import LTXVideoTransformer3DModel

    module = LTXVideoTransformer3DModel(in_channels=32, out_channels=32, num_attention_heads=HEADS, attention_head_dim=16,
                                        cross_attention_dim=WIDTH, num_layers=2, caption_channels=WIDTH)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, 2 * TOKENS, 32), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "timestep": torch.full((2,), 1000 * share), "encoder_attention_mask": torch.ones(2, TEXT), "num_frames": 2,
                "height": 4, "width": 4, "return_dict": False}

    return awake(module), draw


def qwen_image(zero_cond_t: bool = False) -> tuple[nn.Module, Draw]:
    """Its last block computes a text stream that nobody reads."""
    from diffusers import QwenImageTransformer2DModel

    module = QwenImageTransformer2DModel(in_channels=WIDTH, out_channels=16, num_layers=2, attention_head_dim=16,
                                         num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
                                         zero_cond_t=zero_cond_t)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, TOKENS, WIDTH), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.long), "timestep": torch.full((1,), share),
                "img_shapes": [[(1, 4, 4)]], "return_dict": False}

    return awake(module), draw


def z_image() -> tuple[nn.Module, Draw]:
    """Lists of latents and captions; tokens are padded to a multiple of 32. Feed-forwards are 8 / 3 as wide as what they read."""
    from diffusers import ZImageTransformer2DModel

    module = ZImageTransformer2DModel(in_channels=16, dim=96, n_layers=2, n_refiner_layers=1, n_heads=6, n_kv_heads=6,
                                      cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32])

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"x": [normal(noise, 16, 1, 8, 8)], "t": torch.full((1,), 1 - share), "cap_feats": [normal(noise, TEXT, WIDTH)],
                "return_dict": False}

    return awake(module), draw


SDXL = {"sample_size": SDXL_SIDE, "in_channels": 4, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": (2, 4), "cross_attention_dim": WIDTH,
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 32}


def sdxl_inputs(noise: torch.Generator, share: float) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(2, 1)
    return {"sample": normal(noise, 2, 4, SDXL_SIDE, SDXL_SIDE), "timestep": torch.tensor(int(999 * share)),
            "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
            "added_cond_kwargs": {"text_embeds": normal(noise, 2, 32), "time_ids": size}, "return_dict": False}


def sdxl_unet(channels: tuple[int, int] = (32, 64)) -> tuple[nn.Module, Draw]:
    """Two levels, the second with transformer blocks, added text and sizes."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(out_channels=4, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                                  **{**SDXL, "block_out_channels": channels})
    return awake(module), sdxl_inputs


def controlnet() -> tuple[nn.Module, Draw]:
    """What steers ``sdxl_unet``, by a picture of eight times the latent's side."""
    from diffusers import ControlNetModel

    module = ControlNetModel(conditioning_embedding_out_channels=(16, 32, 32, 32), **{k: v for k, v in SDXL.items()
                                                                                     if k != "sample_size"})

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {**sdxl_inputs(noise, share), "controlnet_cond": torch.rand(2, 3, 8 * SDXL_SIDE, 8 * SDXL_SIDE, generator=noise)}

    return awake(module), draw


def bundled_unet() -> tuple[nn.Module, Draw]:
    """The trained UNet that the package brings, on latents of half its side."""
    import sdtrt_backend

    module = sdtrt_backend.demo_pipeline().unet.eval()

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 2, 4, 16, 16), "timestep": torch.tensor(int(999 * share)),
                "encoder_hidden_states": normal(noise, 2, TEXT, 192), "return_dict": False}

    return module, draw


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Draw]]] = {
    "flux": flux, "sd3": sd3, "pixart": pixart, "wan": wan, "ltx": ltx, "qwen_image": qwen_image, "z_image": z_image,
    "sdxl_unet": sdxl_unet, "controlnet": controlnet}
