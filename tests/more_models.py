"""More tiny denoisers of the families: see ``models.py``, whose table they extend."""

from __future__ import annotations

from typing import Any

import torch
from models import HEADS, TEXT, TOKENS, WIDTH, Draw, awake, flux, normal, qwen_image, sd3, sdxl_unet, wan
from torch import nn


def grid_ids(side: int = 4) -> torch.Tensor:
    """Positions of side x side tokens, [tokens, 3]."""
    ids = torch.zeros(side * side, 3)
    ids[:, 1], ids[:, 2] = torch.arange(side * side) // side, torch.arange(side * side) % side
    return ids


def chroma() -> tuple[nn.Module, Draw]:
    """Its modulation comes from a network of its own, over the index of each layer."""
    from diffusers import ChromaTransformer2DModel

    module = ChromaTransformer2DModel(in_channels=WIDTH, num_layers=2, num_single_layers=2, attention_head_dim=16,
                                      num_attention_heads=HEADS, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
                                      approximator_num_channels=64, approximator_hidden_dim=WIDTH, approximator_layers=1)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, TOKENS, WIDTH), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "timestep": torch.full((1,), share), "img_ids": grid_ids(), "txt_ids": torch.zeros(TEXT, 3),
                "attention_mask": torch.ones(1, TEXT + TOKENS), "return_dict": False}

    return awake(module), draw


def flux2() -> tuple[nn.Module, Draw]:
    """Modulation shared by all blocks, SwiGLU, four rotary axes."""
    from diffusers import Flux2Transformer2DModel

    module = Flux2Transformer2DModel(in_channels=WIDTH, num_layers=2, num_single_layers=2, attention_head_dim=16,
                                     num_attention_heads=HEADS, joint_attention_dim=WIDTH, timestep_guidance_channels=WIDTH,
                                     axes_dims_rope=(4, 4, 4, 4))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        ids = torch.cat([grid_ids(), torch.zeros(TOKENS, 1)], 1)
        return {"hidden_states": normal(noise, 1, TOKENS, WIDTH), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "timestep": torch.full((1,), share), "img_ids": ids, "txt_ids": torch.zeros(TEXT, 4),
                "guidance": torch.full((1,), 4.0), "return_dict": False}

    return awake(module), draw


def auraflow() -> tuple[nn.Module, Draw]:
    from diffusers import AuraFlowTransformer2DModel

    module = AuraFlowTransformer2DModel(sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2,
                                        attention_head_dim=16, num_attention_heads=HEADS, joint_attention_dim=WIDTH,
                                        caption_projection_dim=WIDTH, pos_embed_max_size=64)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, 4, 8, 8), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "timestep": torch.full((2,), share), "return_dict": False}

    return awake(module), draw


def hunyuan_dit() -> tuple[nn.Module, Draw]:
    """Two text encoders; long skips from the first half of the blocks to the second."""
    from diffusers import HunyuanDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    module = HunyuanDiT2DModel(num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8,
                               hidden_size=WIDTH, num_layers=4, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH,
                               pooled_projection_dim=32, text_len=TEXT, text_len_t5=TEXT)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        rotary = get_2d_rotary_pos_embed(16, ((0, 0), (4, 4)), (4, 4), output_type="pt")
        ones = torch.ones(2, TEXT)
        return {"hidden_states": normal(noise, 2, 4, 8, 8), "timestep": torch.full((2,), 1000 * share),
                "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "text_embedding_mask": ones,
                "encoder_hidden_states_t5": normal(noise, 2, TEXT, WIDTH), "text_embedding_mask_t5": ones,
                "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * 2), "style": torch.zeros(2, dtype=torch.long),
                "image_rotary_emb": rotary, "return_dict": False}

    return awake(module), draw


def cogview4() -> tuple[nn.Module, Draw]:
    """Its last block computes a text stream that nobody reads."""
    from diffusers import CogView4Transformer2DModel

    module = CogView4Transformer2DModel(in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
                                        num_attention_heads=HEADS, text_embed_dim=WIDTH, time_embed_dim=WIDTH, condition_dim=16,
                                        pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        size = torch.tensor([[64.0, 64.0]])
        return {"hidden_states": normal(noise, 1, 4, 8, 8), "encoder_hidden_states": normal(noise, 1, 16, WIDTH),
                "timestep": torch.full((1,), 1000 * share), "original_size": size, "target_size": size,
                "crop_coords": torch.zeros(1, 2), "return_dict": False}

    return awake(module), draw


def sana() -> tuple[nn.Module, Draw]:
    """Linear attention, and a feed-forward of convolutions, one of them with a group for each channel."""
    from diffusers import SanaTransformer2DModel

    module = SanaTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=16, num_layers=2,
                                    num_cross_attention_heads=HEADS, cross_attention_head_dim=16, cross_attention_dim=WIDTH,
                                    caption_channels=WIDTH, sample_size=8)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, 4, 8, 8), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "timestep": torch.full((2,), 1000 * share), "encoder_attention_mask": torch.ones(2, TEXT), "return_dict": False}

    return awake(module), draw


def lumina2() -> tuple[nn.Module, Draw]:
    """Captions of several lengths, so that Dynamo breaks its graph; timesteps that rise."""
    from diffusers import Lumina2Transformer2DModel

    module = Lumina2Transformer2DModel(sample_size=8, in_channels=4, hidden_size=WIDTH, num_layers=2, num_refiner_layers=1,
                                       num_attention_heads=HEADS, num_kv_heads=2, multiple_of=32, axes_dim_rope=(4, 6, 6),
                                       axes_lens=(32, 16, 16), cap_feat_dim=WIDTH)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        mask = torch.ones(2, TEXT, dtype=torch.bool)
        mask[1, 4:] = False
        return {"hidden_states": normal(noise, 2, 4, 8, 8), "timestep": torch.full((2,), 1 - share),
                "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "encoder_attention_mask": mask, "return_dict": False}

    return awake(module), draw


def hidream() -> tuple[nn.Module, Draw]:
    """Experts that are chosen for each token, so that Dynamo breaks its graph."""
    from diffusers import HiDreamImageTransformer2DModel

    module = HiDreamImageTransformer2DModel(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
                                            attention_head_dim=16, num_attention_heads=HEADS, caption_channels=[WIDTH, WIDTH],
                                            text_emb_dim=WIDTH, num_routed_experts=4, num_activated_experts=2,
                                            axes_dims_rope=(4, 6, 6), max_resolution=(16, 16), llama_layers=[0, 1],
                                            force_inference_output=True)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 4, 8, 8), "encoder_hidden_states_t5": normal(noise, 1, TEXT, WIDTH),
                "encoder_hidden_states_llama3": normal(noise, 2, 1, TEXT, WIDTH), "pooled_embeds": normal(noise, 1, WIDTH),
                "timesteps": torch.full((1,), 1000 * share), "return_dict": False}

    return awake(module), draw


def mochi() -> tuple[nn.Module, Draw]:
    """Video; text tokens are picked by their mask, so that Dynamo breaks its graph. Its feed-forwards are 8 / 3 as wide as what
    they read, which is a multiple of 16 at 96 channels, as at the published 3072."""
    from diffusers import MochiTransformer3DModel

    module = MochiTransformer3DModel(num_attention_heads=6, attention_head_dim=16, num_layers=2, pooled_projection_dim=96,
                                     in_channels=4, text_embed_dim=WIDTH, time_embed_dim=32, max_sequence_length=TEXT)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 4, 2, 8, 8), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "timestep": torch.full((1,), 1000 * share), "encoder_attention_mask": torch.ones(1, TEXT, dtype=torch.bool),
                "return_dict": False}

    return awake(module), draw


def hunyuan_image() -> tuple[nn.Module, Draw]:
    from diffusers import HunyuanImageTransformer2DModel

    module = HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=16,
                                            num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH,
                                            text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        ones = torch.ones(1, TEXT)
        return {"hidden_states": normal(noise, 1, 4, 8, 8), "timestep": torch.full((1,), 1000 * share),
                "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH), "encoder_attention_mask": ones,
                "encoder_hidden_states_2": normal(noise, 1, TEXT, WIDTH), "encoder_attention_mask_2": ones, "return_dict": False}

    return awake(module), draw


def hunyuan_video() -> tuple[nn.Module, Draw]:
    from diffusers import HunyuanVideoTransformer3DModel

    module = HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=16,
                                            num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=WIDTH,
                                            pooled_projection_dim=32, rope_axes_dim=(4, 6, 6))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 4, 2, 8, 8), "timestep": torch.full((1,), int(1000 * share)),
                "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH), "encoder_attention_mask": torch.ones(1, TEXT),
                "pooled_projections": normal(noise, 1, 32), "guidance": torch.full((1,), 6000.0), "return_dict": False}

    return awake(module), draw


def hunyuan_video15() -> tuple[nn.Module, Draw]:
    """Three kinds of conditions, of which the valid ones are sorted to the front."""
    from diffusers import HunyuanVideo15Transformer3DModel

    module = HunyuanVideo15Transformer3DModel(in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=16,
                                              num_layers=2, num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
                                              image_embed_dim=WIDTH, rope_axes_dim=(4, 6, 6), task_type="t2v")

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        ones = torch.ones(1, TEXT)
        return {"hidden_states": normal(noise, 1, 4, 2, 8, 8), "timestep": torch.full((1,), 1000 * share),
                "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH), "encoder_attention_mask": ones,
                "encoder_hidden_states_2": normal(noise, 1, TEXT, WIDTH), "encoder_attention_mask_2": ones,
                "image_embeds": torch.zeros(1, 4, WIDTH), "return_dict": False}

    return awake(module), draw


def cogvideox() -> tuple[nn.Module, Draw]:
    from diffusers import CogVideoXTransformer3DModel

    module = CogVideoXTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=16, in_channels=4, out_channels=4,
                                         time_embed_dim=32, text_embed_dim=WIDTH, num_layers=2, sample_width=8, sample_height=8,
                                         sample_frames=5, max_text_seq_length=TEXT)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 2, 4, 8, 8), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "timestep": torch.full((1,), int(1000 * share)), "return_dict": False}

    return awake(module), draw


def svd() -> tuple[nn.Module, Draw]:
    """Convolutions over time beside those over the picture; the timestep is a logarithm of the noise."""
    from diffusers import UNetSpatioTemporalConditionModel

    module = UNetSpatioTemporalConditionModel(
        sample_size=8, in_channels=8, out_channels=4, down_block_types=("CrossAttnDownBlockSpatioTemporal",
                                                                       "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), block_out_channels=(WIDTH, 2 * WIDTH),
        addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, layers_per_block=1, cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4), num_frames=2)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 1, 2, 8, 8, 8), "timestep": torch.tensor(3.0 * share - 1.5),
                "encoder_hidden_states": normal(noise, 1, 1, WIDTH), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
                "return_dict": False}

    return awake(module), draw


def stable_cascade() -> tuple[nn.Module, Draw]:
    from diffusers import StableCascadeUNet

    module = StableCascadeUNet(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=32, conditioning_dim=WIDTH,
                               block_out_channels=(WIDTH, WIDTH), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
                               up_num_layers_per_block=(1, 1), clip_image_in_channels=WIDTH, clip_text_in_channels=WIDTH,
                               clip_text_pooled_in_channels=WIDTH, switch_level=(False,))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 1, 4, 8, 8), "timestep_ratio": torch.full((1,), share),
                "clip_text_pooled": normal(noise, 1, 1, WIDTH), "clip_text": normal(noise, 1, TEXT, WIDTH),
                "clip_img": normal(noise, 1, 1, WIDTH), "return_dict": False}

    return awake(module), draw


def cosmos() -> tuple[nn.Module, Draw]:
    from diffusers import CosmosTransformer3DModel

    module = CosmosTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=16,
                                      num_layers=2, text_embed_dim=WIDTH, adaln_lora_dim=32, max_size=(4, 16, 16),
                                      concat_padding_mask=False)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 4, 2, 8, 8), "timestep": torch.full((1,), share),
                "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH), "fps": 16, "return_dict": False}

    return awake(module), draw


def kandinsky_prior() -> tuple[nn.Module, Draw]:
    """Draws an embedding of an image."""
    from diffusers import PriorTransformer

    module = PriorTransformer(num_attention_heads=HEADS, attention_head_dim=16, num_layers=2, embedding_dim=WIDTH,
                              num_embeddings=TEXT, additional_embeddings=4)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, WIDTH), "timestep": torch.full((2,), int(1000 * share)),
                "proj_embedding": normal(noise, 2, WIDTH), "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH),
                "attention_mask": torch.ones(2, TEXT, dtype=torch.bool), "return_dict": False}

    return awake(module), draw


def sd15() -> tuple[nn.Module, Draw]:
    """Convolutions into and out of its transformer blocks, where SDXL has linears."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(WIDTH, 2 * WIDTH),
                                  down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
                                  up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH,
                                  attention_head_dim=HEADS)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 2, 4, 8, 8), "timestep": torch.tensor(int(999 * share)),
                "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "return_dict": False}

    return awake(module), draw


def sdxl() -> tuple[nn.Module, Draw]:
    """``sdxl_unet`` with no layer of fewer than 64 channels but its first and last."""
    return sdxl_unet((WIDTH, 2 * WIDTH))


def sd3_first() -> tuple[nn.Module, Draw]:
    """As SD3 came first: no norms of q and k, one attention to a block."""
    return sd3(dual_attention_layers=(), qk_norm=None)


def sd35_large() -> tuple[nn.Module, Draw]:
    """Norms of q and k, one attention to a block."""
    return sd3(dual_attention_layers=())


def flux_kontext() -> tuple[nn.Module, Draw]:
    """The tokens of the picture to edit behind those of the latent; the first axis of the positions tells them apart."""
    module, plain = flux()

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        given = plain(noise, share)
        of_picture = given["img_ids"].clone()
        of_picture[:, 0] = 1
        return {**given, "hidden_states": normal(noise, 2, 2 * TOKENS, WIDTH),
                "img_ids": torch.cat([given["img_ids"], of_picture])}

    return module, draw


def flux_fill() -> tuple[nn.Module, Draw]:
    """The masked picture and its mask in further channels of every token: 64, 64 and 256."""
    module, plain = flux(in_channels=6 * WIDTH, out_channels=WIDTH)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {**plain(noise, share), "hidden_states": normal(noise, 2, TOKENS, 6 * WIDTH)}

    return module, draw


def kandinsky22() -> tuple[nn.Module, Draw]:
    """Conditioned on an embedding of an image alone; attention over the picture and its condition at once."""
    from diffusers import UNet2DConditionModel

    module = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=8, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(WIDTH, 2 * WIDTH), layers_per_block=1, addition_embed_type="image", encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj", cross_attention_dim=WIDTH, attention_head_dim=16,
        resnet_time_scale_shift="scale_shift")

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 2, 4, 8, 8), "timestep": torch.tensor(int(999 * share)), "encoder_hidden_states": None,
                "added_cond_kwargs": {"image_embeds": normal(noise, 2, WIDTH)}, "return_dict": False}

    return awake(module), draw


def kandinsky3() -> tuple[nn.Module, Draw]:
    """Four levels, bottlenecks of half their channels, norms that read the timestep."""
    from diffusers import Kandinsky3UNet

    module = Kandinsky3UNet(time_embedding_dim=WIDTH, attention_head_dim=16, layers_per_block=2,
                            block_out_channels=(2 * WIDTH,) * 4, cross_attention_dim=WIDTH, encoder_hid_dim=WIDTH)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 2, 4, 16, 16), "timestep": torch.tensor(int(999 * share)),
                "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "encoder_attention_mask": torch.ones(2, TEXT),
                "return_dict": False}

    return awake(module), draw


def kandinsky5() -> tuple[nn.Module, Draw]:
    """Video with its channels last; positions as an argument."""
    from diffusers import Kandinsky5Transformer3DModel

    module = Kandinsky5Transformer3DModel(in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, ff_dim=128,
                                          time_dim=WIDTH, model_dim=WIDTH, num_text_blocks=1, num_visual_blocks=2,
                                          axes_dims=(4, 6, 6))

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 1, 2, 8, 8, 4), "encoder_hidden_states": normal(noise, 1, TEXT, WIDTH),
                "timestep": torch.full((1,), 1000 * share), "pooled_projections": normal(noise, 1, WIDTH),
                "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)], "text_rope_pos": torch.arange(TEXT),
                "return_dict": False}

    return awake(module), draw


def qwen_image_edit() -> tuple[nn.Module, Draw]:
    """The tokens of the picture to edit behind those of the latent, modulated as at timestep 0."""
    module, plain = qwen_image(zero_cond_t=True)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {**plain(noise, share), "hidden_states": normal(noise, 1, 2 * TOKENS, WIDTH), "img_shapes": [[(1, 4, 4)] * 2]}

    return module, draw


def animatediff() -> tuple[nn.Module, Draw]:
    """A UNet of pictures with a transformer over the frames behind each block."""
    from diffusers import UNetMotionModel

    module = UNetMotionModel(sample_size=8, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
                             up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), block_out_channels=(WIDTH, 2 * WIDTH),
                             layers_per_block=1, cross_attention_dim=WIDTH, num_attention_heads=HEADS,
                             motion_num_attention_heads=HEADS, motion_max_seq_length=4)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"sample": normal(noise, 1, 4, 2, 8, 8), "timestep": torch.tensor(int(999 * share)),
                "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "return_dict": False}

    return awake(module), draw


def ltx2() -> tuple[nn.Module, Draw]:
    """Video and sound, which look at each other."""
    from diffusers import LTX2VideoTransformer3DModel

    module = LTX2VideoTransformer3DModel(
        in_channels=32, out_channels=32, num_attention_heads=HEADS, attention_head_dim=16, cross_attention_dim=WIDTH,
        audio_in_channels=32, audio_out_channels=32, audio_num_attention_heads=HEADS, audio_attention_head_dim=16,
        audio_cross_attention_dim=WIDTH, num_layers=2, caption_channels=WIDTH)

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        return {"hidden_states": normal(noise, 2, 2 * TOKENS, 32), "audio_hidden_states": normal(noise, 2, 8, 32),
                "encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "audio_num_frames": 8,
                "audio_encoder_hidden_states": normal(noise, 2, TEXT, WIDTH), "timestep": torch.full((2,), 1000 * share),
                "encoder_attention_mask": torch.ones(2, TEXT), "audio_encoder_attention_mask": torch.ones(2, TEXT),
                "num_frames": 2, "height": 4, "width": 4, "fps": 24.0, "return_dict": False}

    return awake(module), draw


def wan22() -> tuple[nn.Module, Draw]:
    """A timestep for every token, as a picture that is made to move has it: the first frame is at 0."""
    module, plain = wan()

    def draw(noise: torch.Generator, share: float) -> dict[str, Any]:
        at = torch.full((1, 2 * TOKENS), 1000 * share)
        at[:, :TOKENS] = 0
        return {**plain(noise, share), "timestep": at}

    return module, draw


MORE = {"chroma": chroma, "flux2": flux2, "auraflow": auraflow, "hunyuan_dit": hunyuan_dit, "cogview4": cogview4, "sana": sana,
        "lumina2": lumina2, "hidream": hidream, "mochi": mochi, "hunyuan_image": hunyuan_image, "hunyuan_video": hunyuan_video,
        "hunyuan_video15": hunyuan_video15, "cogvideox": cogvideox, "svd": svd, "stable_cascade": stable_cascade,
        "cosmos": cosmos, "kandinsky_prior": kandinsky_prior, "sd15": sd15, "sdxl": sdxl, "sd3_first": sd3_first,
        "sd35_large": sd35_large, "flux_kontext": flux_kontext, "flux_fill": flux_fill, "kandinsky22": kandinsky22,
        "kandinsky3": kandinsky3, "kandinsky5": kandinsky5, "qwen_image_edit": qwen_image_edit, "animatediff": animatediff,
        "ltx2": ltx2, "wan22": wan22}
