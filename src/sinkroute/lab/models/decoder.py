"""A compact decoder-only language model whose feed-forward layers are mixtures of experts.

Pre-norm RMSNorm, rotary positions (Su et al., arXiv 2104.09864), causal scaled-dot-product attention, `sinkroute.MoE`,
embeddings tied to nothing: what people train today, small. Shape suffixes: `B` sequences, `L` positions, `D` width,
`H` heads, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute.lab.config import ModelConfig, RouterConfig
from sinkroute.lab.models.sparse import SparseModel
from sinkroute.moe import MoE

__all__ = ["Decoder"]


class Decoder(SparseModel):
    """Bytes (or any symbols) in, scores of the next one out.

    Args:
        config: sizes.
        router: how tokens choose experts.

    Raises:
        ValueError: sizes that do not fit each other.

    >>> model = Decoder(ModelConfig(layers=2, d_model=32, heads=2, d_hidden=16), RouterConfig("softmax"))
    >>> model(torch.zeros(3, 5, dtype=torch.long)).shape
    torch.Size([3, 5, 256])
    """

    def __init__(self, config: ModelConfig, router: RouterConfig) -> None:
        super().__init__()
        if config.d_model % (2 * config.heads):
            raise ValueError(
                f"d_model={config.d_model} must be a multiple of 2 * heads (heads={config.heads}): "
                "each head rotates pairs of numbers"
            )
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.blocks = nn.ModuleList(_Block(config, router) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        # Normal(0, 0.02) for embeddings and scores of symbols; what writes into the residual stream starts small, so
        # that depth does not change its scale (as in GPT-2).
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        shrink = (2 * self.config.layers) ** -0.5
        for block in self.blocks:
            assert isinstance(block, _Block)
            with torch.no_grad():
                block.attention.out.weight.mul_(shrink)
                block.moe.experts.w_out.mul_(shrink)

    def forward(self, symbols_BL: Tensor, token_mask_BL: Tensor | None = None) -> Tensor:
        """(B, L) int64 → (B, L, V) scores. `token_mask_BL`: True for real symbols; padding ends a row."""
        x_BLD = self.embed(symbols_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD, token_mask_BL, symbols_BL)
        return self.head(self.norm(x_BLD))


class _Block(nn.Module):
    def __init__(self, config: ModelConfig, router: RouterConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = _Attention(config.d_model, config.heads)
        self.moe_norm = nn.RMSNorm(config.d_model)
        self.moe = MoE(
            config.d_model,
            config.d_hidden,
            config.experts,
            config.top_k,
            router=router.name,
            router_options=router.options,
            activation=config.activation,
            shared_hidden=config.shared_hidden,
            capacity=config.capacity,
        )

    def forward(self, x_BLD: Tensor, token_mask_BL: Tensor | None, symbols_BL: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        return x_BLD + self.moe(self.moe_norm(x_BLD), token_mask_BL, token_ids=symbols_BL)


class _Attention(nn.Module):
    """Causal, so padding at the end of a row needs no mask: no real symbol sees it."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        length, d_model = x_BLD.shape[1:]
        qkv = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)  # (B, H, 3, L, D/H)
        query, key = _rotate(qkv[:, :, :2], *_rotations(length, d_model // self.heads, x_BLD.device)).unbind(2)
        out_BHLd = F.scaled_dot_product_attention(query, key, qkv[:, :, 2], is_causal=True)
        return self.out(out_BHLd.transpose(1, 2).flatten(2))


def _rotations(length: int, width: int, device: torch.device, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines (L, width) of position · base^(−2i/width), for the two halves of a head."""
    frequency = base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + width/2}) by its angle; in the dtype of `x`."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))
