"""A denoiser in thirty lines: convolutions with group norm, a layer norm read by three linears, cross-attention, GEGLU."""

import torch
import torch.nn.functional as F
from torch import nn


class ToyDenoiser(nn.Module):
    """latents [n, 4, h, w], timestep scalar, context [n, tokens, 64] -> [n, 4, h, w]."""

    def __init__(self, seed=0, width=64):
        super().__init__()
        torch.manual_seed(seed)
        self.conv_in = nn.Conv2d(4, width, 3, padding=1)
        self.time_embedding = nn.Linear(1, width)
        self.norm1 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.context_k, self.context_v = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.to_out = nn.Linear(width, width)
        self.norm3 = nn.LayerNorm(width)
        self.ff_in, self.ff_out = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv_out = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states):
        x = self.conv_in(sample) + self.time_embedding(timestep.reshape(1, 1).to(sample.dtype) / 1000)[:, :, None, None]
        x = x + self.conv1(F.silu(self.norm1(x)))
        n, c, h, w = x.shape
        tokens = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        normed = self.norm2(tokens)
        q = self.to_q(normed)
        own = F.scaled_dot_product_attention(q, self.to_k(normed), self.to_v(normed))
        cross = F.scaled_dot_product_attention(q, self.context_k(encoder_hidden_states), self.context_v(encoder_hidden_states))
        tokens = tokens + self.to_out(own + cross)
        value, gate = self.ff_in(self.norm3(tokens)).chunk(2, dim=-1)
        tokens = tokens + self.ff_out(value * F.gelu(gate))
        return self.conv_out(tokens.reshape(n, h, w, c).permute(0, 3, 1, 2))
