"""An MLP-mixer: one MLP across patches, one across channels, in turns. Tolstikhin et al. 2021 (arXiv 2105.01601)."""

from __future__ import annotations

from torch import Tensor, nn


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each with a shortcut: (N, tokens, width) -> (N, tokens, width)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.token_mlp = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.norm2 = nn.LayerNorm(width)
        self.channel_mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) -> (N, tokens, width)."""
        x = x + self.token_mlp(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        result: Tensor = x + self.channel_mlp(self.norm2(x))
        return result


class DigitsMixer(nn.Module):
    """16 patches of 2x2 pixels, three blocks: images (N, 1, 8, 8) -> logits (N, 10)."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.blocks = nn.Sequential(*(MixerBlock(16, width) for _ in range(3)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) -> patches (N, 16, 24) -> their mean (N, 24) -> logits (N, 10)."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits
