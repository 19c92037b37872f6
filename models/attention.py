"""Transformers: of image patches (Dosovitskiy et al. 2020, arXiv 2010.11929) and of characters, causal.

Both are written as their users write them: the first around `nn.MultiheadAttention`, the second with an attention of
its own around `scaled_dot_product_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxinvert.models.text import ALPHABET


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each with a shortcut: (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class DigitsViT(nn.Module):
    """16 patches of 2x2 pixels and a class token, two blocks: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self, width: int = 32, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 17, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> patches (N, 16, 32) -> tokens (N, 17, 32) -> logits (N, 10)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        token = self.class_token.expand(x.shape[0], -1, -1)
        x = torch.cat([token, x], 1) + self.positions
        x = self.norm(self.blocks(x))
        logits: Tensor = self.head(x[:, 0])
        return logits


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and the ones before it: (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> three times (N, heads, T, width / heads) -> (N, T, width)."""
        n, t, width = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.proj(y.transpose(1, 2).reshape(n, t, width))
        return result


class DecoderBlock(nn.Module):
    """Pre-norm causal attention and MLP, each with a shortcut: (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = CausalSelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) -> (N, T, width)."""
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class CharTransformer(nn.Module):
    """Two causal blocks: character numbers, int64 (N, T) with T <= 32 -> logits of the next ones (N, T, vocabulary)."""

    def __init__(
        self, vocabulary: int = len(ALPHABET), context: int = 32, width: int = 32, heads: int = 4
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.dropout = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Character numbers (N, T) -> (N, T, 32) -> logits of the next ones (N, T, vocabulary)."""
        x = self.dropout(self.embedding(tokens) + self.positions[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def mlp(width: int) -> nn.Sequential:
    """(N, T, width) -> (N, T, 2 · width) -> (N, T, width)."""
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
