"""The network: a pre-norm vision transformer with timm's names, small enough for two CPU cores.

`patch_embed.proj` is a linear layer over flattened patches, because GPUSQ-ViT prunes the patch embedding as a GEMM
over C·P². There is no class token: the head reads the mean over the tokens. The default configuration pads the
28×28 image to 32×32 and cuts it into 16 patches of 8×8, so the K of every GEMM is a multiple of 32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Pad the image with zeros, cut it into patches, then one GEMM with K = patch²."""

    def __init__(self, image: int, padded: int, patch: int, width: int) -> None:
        super().__init__()
        if padded % patch or (padded - image) % 2 or padded < image:
            raise ValueError(f"an image of {image} pixels cannot be padded to {padded} and cut into patches of {patch}")
        self.margin = (padded - image) // 2
        self.patch = patch
        self.grid = padded // patch
        self.proj = nn.Linear(patch * patch, width)

    def forward(self, image: Tensor) -> Tensor:
        """[N, 1, image, image] → [N, (padded/patch)², width]."""
        image = nn.functional.pad(image, [self.margin] * 4)
        cells = image.reshape(-1, self.grid, self.patch, self.grid, self.patch).permute(0, 1, 3, 2, 4)
        projected: Tensor = self.proj(cells.reshape(-1, self.grid * self.grid, self.patch * self.patch))
        return projected


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] → [N, T, C]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Mlp(nn.Module):
    """Linear, GELU (erf), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] → [N, T, C]."""
        projected: Tensor = self.fc2(self.act(self.fc1(x)))
        return projected


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, C] → [N, T, C]."""
        x = x + self.attn(self.norm1(x))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed


class FashionVit(nn.Module):
    """The whole network."""

    def __init__(
        self, *, image: int, padded: int, patch: int, width: int, depth: int, heads: int, mlp_ratio: int, classes: int
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(image, padded, patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.grid**2, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_features(self, image: Tensor) -> list[Tensor]:
        """The output of every block, each [N, T, C]."""
        x = self.patch_embed(image) + self.pos_embed
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features

    def forward_head(self, x: Tensor) -> Tensor:
        """The logits [N, classes] from the last block's output [N, T, C]."""
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """`image` float32 [N, 1, 28, 28], normalised → `logits` float32 [N, classes]."""
        return self.forward_head(self.forward_features(image)[-1])


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)


def fashion_vit(
    *,
    image: int = 28,
    padded: int = 32,
    patch: int = 8,
    width: int = 96,
    depth: int = 6,
    heads: int = 3,
    mlp_ratio: int = 2,
    classes: int = 10,
) -> FashionVit:
    """The factory that a student file names; all sizes are in pixels, channels or counts."""
    return FashionVit(
        image=image,
        padded=padded,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=mlp_ratio,
        classes=classes,
    )
