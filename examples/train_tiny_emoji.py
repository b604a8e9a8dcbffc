"""Train the text-to-image pipeline that ships as ``sdtrt_backend/assets/tiny_emoji``.

    python examples/train_tiny_emoji.py DATA --out tiny_emoji --work checkpoint --minutes 9

DATA holds ``images.npz`` (``images`` uint8 [N, 64, 64, 3]), ``captions.json`` (N lists of captions, the first one
canonical) and ``tokenizer/``. Two stages: a small KL autoencoder (64x64x3 -> 32x32x4), then UNet and text encoder
together (v-prediction, bf16, EMA, caption dropout). Every run continues from the checkpoint in ``--work`` and writes
the pipeline and a contact sheet of what it draws so far, so training can be cut into pieces of any length.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CAPTION_LENGTH = 32
CAPTION_DROPOUT = 0.1  # empty captions train the unconditional half of classifier-free guidance
LATENT = (4, 32, 32)


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """Three resolutions; attention at 16x16 and 8x8 with heads of width 64; channels are multiples of 64."""
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=(2, 2, 3),  # diffusers reads this as the number of heads
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=CAPTION_LENGTH,
            projection_dim=192,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> EulerDiscreteScheduler:
    """Betas of DDPM (Ho et al. 2020): a terminal SNR of 4e-5, so white backgrounds do not leak into the noise."""
    return EulerDiscreteScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


class Work:
    """One checkpoint file; ``seconds`` counts the training time over all runs."""

    def __init__(self, folder: Path):
        self.path = folder / "checkpoint.pt"
        folder.mkdir(parents=True, exist_ok=True)
        self.state = torch.load(self.path, weights_only=True) if self.path.exists() else {"seconds": 0.0}

    def save(self, **state: object) -> None:
        self.state.update(state)
        partial = self.path.with_suffix(".partial")
        torch.save(self.state, partial)
        partial.replace(self.path)


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, batch: int = 128) -> None:
    """L1 + MSE reconstruction with a light KL term; ``images`` uint8 [N, 3, 64, 64] on the device."""
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    forward = torch.compile(lambda x: _vae_loss(vae, x))
    bar = tqdm(range(steps), desc="vae", mininterval=5)
    for step in bar:
        x = images[torch.randint(len(images), (batch,), device=images.device)].float() / 127.5 - 1
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = forward(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 200 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    vae.eval()


def _vae_loss(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    posterior = vae.encode(x).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample.float()
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return F.l1_loss(reconstruction, x) + 4 * F.mse_loss(reconstruction, x) + 1e-4 * kl


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means [N, 4, 32, 32], unscaled."""
    return torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(512)])


def tokenise(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All captions as one table [K, 32], the offset of each picture's first caption, and how many it has."""
    flat = [caption for group in captions for caption in group]
    table = tokenizer(flat, padding="max_length", max_length=CAPTION_LENGTH, truncation=True, return_tensors="pt")
    counts = torch.tensor([len(group) for group in captions])
    return table.input_ids, counts.cumsum(0) - counts, counts


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 500 steps, constant, then linear to zero over the last 30 %."""
    return peak * min(1.0, (step + 1) / 500, max(1e-3, (steps - step) / (0.3 * steps)))


def train_diffusion(work: Work, pipe: StableDiffusionPipeline, images: torch.Tensor, captions: list[list[str]],
                    steps: int, batch: int, peak_lr: float, deadline: float) -> bool:
    """Continue until ``deadline`` (seconds since the epoch) or ``steps``; leaves the EMA weights in ``pipe``."""
    device = images.device
    unet, text = pipe.unet.to(memory_format=torch.channels_last), pipe.text_encoder
    unet.train(), text.train()
    latents = (encode_all(pipe.vae, images) * pipe.vae.config.scaling_factor).contiguous()
    table, first, counts = (t.to(device) for t in tokenise(pipe.tokenizer, captions))
    empty = pipe.tokenizer("", padding="max_length", max_length=CAPTION_LENGTH, return_tensors="pt").input_ids.to(device)
    alpha = pipe.scheduler.alphas_cumprod.to(device)

    parameters = [*unet.parameters(), *text.parameters()]
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda")
    step = 0
    if "optimizer" in work.state:
        step = work.state["step"]
        optimizer.load_state_dict(work.state["optimizer"])
        with torch.no_grad():
            for p, saved, e, saved_ema in zip(parameters, work.state["parameters"], ema, work.state["ema"], strict=True):
                p.copy_(saved), e.copy_(saved_ema)

    @torch.compile
    def loss_of(noisy: torch.Tensor, t: torch.Tensor, context: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(unet(noisy, t, context, return_dict=False)[0].float(), target)

    encode_text = torch.compile(lambda ids: text(ids)[0])
    bar = tqdm(total=steps, initial=step, desc="unet", mininterval=10)
    mean_loss = torch.zeros((), device=device)
    while step < steps and time.time() < deadline:
        pick = torch.randint(len(latents), (batch,), device=device)
        # half the time the canonical caption, else any of the picture's captions
        which = (torch.rand(batch, device=device) * counts[pick] * (torch.rand(batch, device=device) < 0.5)).long()
        ids = torch.where((torch.rand(batch, device=device) < CAPTION_DROPOUT)[:, None], empty, table[first[pick] + which])
        t = ((torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch * len(alpha)).long()
        t = t.clamp(max=len(alpha) - 1)  # in float32 511 + rand can round up to 512
        a = alpha[t].view(-1, 1, 1, 1)
        x, noise = latents[pick], torch.randn(batch, *LATENT, device=device)
        noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(noisy, t, encode_text(ids), a.sqrt() * noise - (1 - a).sqrt() * x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1 - min(0.9995, (1 + step) / (10 + step)))
        step += 1
        mean_loss.lerp_(loss.detach(), 0.01 if step > 100 else 1 / step)
        if step % 100 == 0:
            bar.update(100)
            bar.set_postfix(loss=f"{mean_loss.item():.4f}")
    bar.close()
    work.save(step=step, optimizer=optimizer.state_dict(), parameters=[p.detach().clone() for p in parameters], ema=ema)
    with torch.no_grad():
        for p, e in zip(parameters, ema, strict=True):
            p.copy_(e)
    unet.eval(), text.eval()
    return step >= steps


def save_pipeline(pipe: StableDiffusionPipeline, out: Path) -> None:
    """Write fp16 safetensors in diffusers' folder layout."""
    half = StableDiffusionPipeline(
        vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=pipe.unet, scheduler=pipe.scheduler,
        safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False)
    half.to(torch.float16).save_pretrained(out, safe_serialization=True)
    half.to(torch.float32)


def contact_sheet(pipe: StableDiffusionPipeline, captions: list[str], path: Path) -> None:
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(captions))]
    pictures = pipe(captions, num_inference_steps=25, guidance_scale=5.0, generator=generators, output_type="np").images
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in np.array_split(pictures, len(captions) // 12)])
    Image.fromarray((sheet * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("tiny_emoji"))
    parser.add_argument("--work", type=Path, default=Path("checkpoint"))
    parser.add_argument("--minutes", type=float, default=9.0, help="stop this run after so many minutes")
    parser.add_argument("--vae-steps", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=21600)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    images = torch.from_numpy(np.load(args.data / "images.npz")["images"]).permute(0, 3, 1, 2).contiguous().to(device)
    captions = json.loads((args.data / "captions.json").read_text())
    tokenizer = CLIPTokenizer.from_pretrained(args.data / "tokenizer", model_max_length=CAPTION_LENGTH)
    work = Work(args.work)
    torch.manual_seed(args.seed + work.state.get("step", 0))
    vae, unet, text = build_vae().to(device), build_unet().to(device), build_text_encoder(tokenizer).to(device)
    if "vae" not in work.state:
        train_vae(vae, images, args.vae_steps)
        latents = encode_all(vae, images)
        scaling = 1 / float(latents.std())
        with torch.no_grad():
            error = F.mse_loss(vae.decode(latents[:512]).sample, images[:512].float() / 127.5 - 1)
        print(f"vae: reconstruction PSNR {10 * torch.log10(4 / error).item():.1f} dB, latent std {1 / scaling:.3f}, "
              f"mean {latents.mean((0, 2, 3)).tolist()}")
        work.save(vae=vae.state_dict(), scaling=scaling)
    vae.load_state_dict(work.state["vae"])
    vae.register_to_config(scaling_factor=work.state["scaling"])
    vae.eval()
    pipe = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    spent = work.state["seconds"]
    done = train_diffusion(work, pipe, images, captions, args.steps, args.batch, args.lr, start + 60 * args.minutes - 25)
    work.save(seconds=spent + time.time() - start)
    save_pipeline(pipe, args.out)
    contact_sheet(pipe, [captions[i][0] for i in range(0, len(captions), len(captions) // 48)][:48], args.out.with_suffix(".png"))
    print(f"step {work.state['step']} of {args.steps}, {work.state['seconds'] / 60:.1f} minutes in all, "
          f"{'finished' if done else 'run again to continue'}")


if __name__ == "__main__":
    main()
