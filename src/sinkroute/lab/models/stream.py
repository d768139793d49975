"""The decoder of the paper's family: adaptive-span style, a text read as one stream, block after block.

Its ancestor is the code of Adaptive Attention Span (Sukhbaatar et al., arXiv 1905.07799), of which sparse mixtures of
the Selective Sinkhorn Routing paper's group are descendants. What is peculiar to it is kept, because the published
parameter counts and perplexities belong to it:

- post-norm, and around a mixture a double residual: h ← LN(h + LN(h + MoE(h)));
- attention sees the `span` symbols before the current one, never the current one itself;
- positions are learnt vectors, one per distance, (d_head, span), shared by all layers and heads;
- each layer remembers the last `span` inputs that it had; the memory begins as zeros, which are attended to;
- three layer norms in each block beside the mixture's own, of which a block uses two: the third never learns, but is
  a part of the counts.

Shape suffixes: `B` streams, `L` symbols of a block, `S` the span, `D` width, `H` heads, `d` width of a head, `N` blocks
of the model, `V` vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute.lab.config import RouterConfig, StreamConfig
from sinkroute.lab.models.sparse import SparseModel
from sinkroute.moe import MoE, MultiHeadMoE

__all__ = ["StreamDecoder"]


class StreamDecoder(SparseModel):
    """Blocks of streams in, scores of the next symbols and the memory for the next blocks out.

    Args:
        config: sizes.
        router: how tokens choose experts.

    Raises:
        ValueError: sizes that do not fit each other.

    >>> model = StreamDecoder(StreamConfig(layers=2, d_model=32, heads=2, span=6, d_hidden=16), RouterConfig("softmax"))
    >>> scores_BLV, memory_NBSD = model(torch.zeros(3, 5, dtype=torch.long))
    >>> scores_BLV.shape, memory_NBSD.shape
    (torch.Size([3, 5, 256]), torch.Size([2, 3, 6, 32]))
    """

    def __init__(self, config: StreamConfig, router: RouterConfig) -> None:
        super().__init__()
        if config.d_model % config.heads:
            raise ValueError(f"d_model={config.d_model} must be a multiple of heads={config.heads}")
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.d_model)
        self.positions_dS = nn.Parameter(torch.randn(config.d_model // config.heads, config.span))
        kinds = (True, False) if config.dense_blocks else (True,)
        self.blocks = nn.ModuleList(_Block(config, router, sparse) for _ in range(config.layers) for sparse in kinds)
        self.head = nn.Linear(config.d_model, config.vocab)

    def start(self, streams: int) -> Tensor:
        """The memory (N, B, S, D) before the first symbol."""
        shape = (len(self.blocks), streams, self.config.span, self.config.d_model)
        return self.head.weight.new_zeros(shape)

    def forward(
        self, symbols_BL: Tensor, memory_NBSD: Tensor | None = None, token_mask_BL: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, L) int64 → (B, L, V) scores, (N, B, S, D) memory without gradient.

        Args:
            symbols_BL: the next block of each stream.
            memory_NBSD: what the call for the block before returned; None: streams that begin.
            token_mask_BL: True for real symbols; padding ends a row, and nothing may follow it.
        """
        if memory_NBSD is None:
            memory_NBSD = self.start(len(symbols_BL))
        h_BLD = self.embed(symbols_BL)
        kept = []
        for block, memory_BSD in zip(self.blocks, memory_NBSD, strict=True):
            # Under autocast the layers' outputs are narrower than the memory, which holds their inputs.
            seen_BAD = torch.cat((memory_BSD, h_BLD.to(memory_BSD.dtype)), dim=1)
            kept.append(seen_BAD[:, -self.config.span :].detach())
            h_BLD = block(h_BLD, seen_BAD, self.positions_dS, token_mask_BL, symbols_BL)
        return self.head(h_BLD), torch.stack(kept)


class _Block(nn.Module):
    def __init__(self, config: StreamConfig, router: RouterConfig, sparse: bool) -> None:
        super().__init__()
        self.attention = _Attention(config)
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.mixture_norm = nn.LayerNorm(config.d_model)
        self.dense_norm = nn.LayerNorm(config.d_model)
        self.mixture = _Mixture(config, router) if sparse else None
        self.dense = None if sparse else _Dense(config)
        # It never has a gradient, which DistributedDataParallel and the optimiser's checkpoint would take for an error.
        (self.dense_norm if sparse else self.mixture_norm).requires_grad_(False)

    def forward(
        self, h_BLD: Tensor, seen_BAD: Tensor, positions_dS: Tensor, mask_BL: Tensor | None, symbols_BL: Tensor
    ) -> Tensor:
        h_BLD = self.attention_norm(h_BLD + self.attention(h_BLD, seen_BAD, positions_dS))
        if self.mixture is not None:
            return self.mixture_norm(h_BLD + self.mixture(h_BLD, mask_BL, symbols_BL))
        assert self.dense is not None
        return self.dense_norm(h_BLD + self.dense(h_BLD))


class _Mixture(nn.Module):
    """LN(h + MoE(h)): the inner of the two residuals."""

    def __init__(self, config: StreamConfig, router: RouterConfig) -> None:
        super().__init__()
        heads = config.sub_tokens
        make = MoE if heads == 1 else partial(MultiHeadMoE, heads=heads)
        self.moe: MoE | MultiHeadMoE = make(
            d_model=config.d_model,
            d_hidden=config.d_hidden,
            num_experts=config.experts,
            top_k=config.top_k,
            router=router.name,
            router_options=router.options,
            activation="relu",
            bias=True,
            dropout=config.dropout,
            capacity=config.capacity,
        )
        gate = self.moe.gate if isinstance(self.moe, MoE) else self.moe.moe.gate
        # The family's gate has a bias; gates of another form have what they have.
        if isinstance(gate, nn.Linear) and gate.bias is None:
            gate.bias = nn.Parameter(gate.weight.new_zeros(gate.out_features))
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.d_model)

    def forward(self, h_BLD: Tensor, mask_BL: Tensor | None, symbols_BL: Tensor) -> Tensor:
        return self.norm(h_BLD + self.dropout(self.moe(h_BLD, mask_BL, token_ids=symbols_BL)))


class _Dense(nn.Sequential):
    """As wide inside as outside, like the family's experts; those of a multi-head mixture are wider."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(
            nn.Linear(config.d_model, config.d_model),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.d_model, config.d_model),
        )


class _Attention(nn.Module):
    """Each symbol attends to the S symbols before it: score (q·k + q·position of the distance) / √d."""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.d_model, config.d_model, bias=False)
        self.key = nn.Linear(config.d_model, config.d_model, bias=False)
        self.value = nn.Linear(config.d_model, config.d_model, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_BLD: Tensor, seen_BAD: Tensor, positions_dS: Tensor) -> Tensor:
        query_BHLd, key_BHAd, value_BHAd = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(h_BLD), self.key(seen_BAD), self.value(seen_BAD))
        )
        by_content_BHLS = by_distance(query_BHLd @ key_BHAd.transpose(-2, -1), positions_dS.shape[-1])
        scores_BHLS = (by_content_BHLS + query_BHLd @ positions_dS) * query_BHLd.shape[-1] ** -0.5
        weights_BHLS = self.dropout(scores_BHLS.float().softmax(-1).to(value_BHAd.dtype))
        return self.out((by_place(weights_BHLS) @ value_BHAd).transpose(1, 2).flatten(2))


def by_distance(scores_LA: Tensor, span: int) -> Tensor:
    """(..., L, S + L) by place → (..., L, S): of row l the places l to l + S − 1, the S before its own.

    >>> by_distance(torch.arange(10).view(2, 5), 3)
    tensor([[0, 1, 2],
            [6, 7, 8]])
    """
    length, places = scores_LA.shape[-2:]
    # One number more in a row moves each row by one against the one above it.
    padded = F.pad(scores_LA.flatten(-2), (0, length))
    return padded.unflatten(-1, (length, places + 1))[..., :span]


def by_place(weights_LS: Tensor) -> Tensor:
    """The inverse: (..., L, S) → (..., L, S + L), 0 at the places that a row does not see.

    >>> by_place(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    tensor([[1, 2, 3, 0, 0],
            [0, 4, 5, 6, 0]])
    """
    length, span = weights_LS.shape[-2:]
    padded = F.pad(weights_LS, (0, length + 1)).flatten(-2)
    return padded[..., : length * (span + length)].unflatten(-1, (length, span + length))
