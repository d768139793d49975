"""A vision transformer whose later feed-forward layers are mixtures of experts.

The backbone is ViT in DeiT's sizes (Dosovitskiy et al., arXiv 2010.11929; Touvron et al., arXiv 2012.12877): patches
and a class token, learnt places, pre-norm blocks, biases everywhere, LayerNorm with ε = 10⁻⁶. From block `moe_from` on
a mixture stands where the feed-forward layer was, with experts of its form, as in V-MoE (Riquelme et al., arXiv
2106.05974), whose gate has no bias; nothing is dropped, and the class token is routed like every patch.

Shape suffixes: `B` images, `C` channels, `H`, `W` rows and columns, `P` patches, `N` = P + 1 tokens of an image, the
class token first, `D` width, `h` attention heads, `d` width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sinkroute.lab.config import RouterConfig, VisionConfig
from sinkroute.lab.models.sparse import SparseModel
from sinkroute.moe import MoE

__all__ = ["VisionTransformer"]

_EPSILON = 1e-6


class VisionTransformer(SparseModel):
    """Images in, scores of classes out.

    Args:
        config: sizes.
        router: how tokens choose experts.

    Raises:
        ValueError: sizes that do not fit each other.

    >>> config = VisionConfig(image_size=8, channels=1, classes=10, patch=4, layers=2, d_model=16, heads=2, d_hidden=32,
    ...     moe_from=1, experts=4)
    >>> VisionTransformer(config, RouterConfig("softmax"))(torch.rand(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(self, config: VisionConfig, router: RouterConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        side = config.image_size // config.patch
        self.patches = nn.Conv2d(config.channels, config.d_model, config.patch, stride=config.patch)
        self.class_D = nn.Parameter(torch.zeros(config.d_model))
        self.positions_ND = nn.Parameter(torch.zeros(1 + side**2, config.d_model))
        self.blocks = nn.ModuleList(_Block(config, router, number) for number in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model, eps=_EPSILON)
        self.head = nn.Linear(config.d_model, config.classes)
        self._initialise()

    def _initialise(self) -> None:
        # DeiT's: Normal(0, 0.02) for what is learnt per place and for all linear maps, whose biases are 0. The patches'
        # map keeps its own, and so do the gates, which are a matter of the router.
        for tensor in (self.class_D, self.positions_ND):
            nn.init.trunc_normal_(tensor, std=0.02)
        gates = {id(part) for layer in self.moe_layers for part in layer.gate.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear) and id(module) not in gates:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for layer in self.moe_layers:
            for weight in (layer.experts.w_in, layer.experts.w_out):
                nn.init.trunc_normal_(weight, std=0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) normalised images → (B, classes) scores.

        Raises:
            ValueError: images of other channels or of another size.
        """
        config = self.config
        shape = (config.channels, config.image_size, config.image_size)
        if images_BCHW.shape[1:] != shape:
            raise ValueError(
                f"images must have shape (B, {', '.join(map(str, shape))}), got {tuple(images_BCHW.shape)}"
            )
        patches_BPD = self.patches(images_BCHW).flatten(2).transpose(1, 2)
        class_B1D = self.class_D.expand(len(images_BCHW), 1, -1).to(patches_BPD.dtype)
        x_BND = torch.cat((class_B1D, patches_BPD), dim=1) + self.positions_ND
        # What a token is, for routers that ask: of a patch there is no other name than its place.
        places_BN = torch.arange(x_BND.shape[1], device=x_BND.device).expand(x_BND.shape[:2])
        for block in self.blocks:
            x_BND = block(x_BND, places_BN)
        return self.head(self.norm(x_BND[:, 0]))


def _check(config: VisionConfig) -> None:
    if config.image_size % config.patch:
        raise ValueError(f"image_size={config.image_size} must be a multiple of patch={config.patch}")
    if config.d_model % config.heads:
        raise ValueError(f"d_model={config.d_model} must be a multiple of heads={config.heads}")
    if config.moe_from > config.layers:
        raise ValueError(
            f"moe_from must be from 0 to layers={config.layers} (no mixture at all), got {config.moe_from}"
        )


class _Block(nn.Module):
    def __init__(self, config: VisionConfig, router: RouterConfig, number: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=_EPSILON)
        self.attention = _Attention(config.d_model, config.heads)
        self.mlp_norm = nn.LayerNorm(config.d_model, eps=_EPSILON)
        self.mlp: nn.Module
        if number < config.moe_from:
            self.mlp = nn.Sequential(
                nn.Linear(config.d_model, config.d_hidden), nn.GELU(), nn.Linear(config.d_hidden, config.d_model)
            )
        else:
            self.mlp = MoE(
                config.d_model,
                config.d_hidden,
                config.experts,
                config.top_k,
                router=router.name,
                router_options=router.options,
                activation="gelu",
                bias=True,
            )
        self.drop_path = config.drop_path * number / max(config.layers - 1, 1)

    def forward(self, x_BND: Tensor, places_BN: Tensor) -> Tensor:
        x_BND = x_BND + self._kept(self.attention(self.attention_norm(x_BND)))
        normed_BND = self.mlp_norm(x_BND)
        sparse = isinstance(self.mlp, MoE)
        return x_BND + self._kept(self.mlp(normed_BND, token_ids=places_BN) if sparse else self.mlp(normed_BND))

    def _kept(self, branch_BND: Tensor) -> Tensor:
        """Stochastic depth (Huang et al., arXiv 1603.09382): the branch of some samples is 0, that of others larger."""
        if not self.training or not self.drop_path:
            return branch_BND
        kept_B11 = torch.rand(len(branch_BND), 1, 1, device=branch_BND.device) >= self.drop_path
        return branch_BND * (kept_B11 / (1 - self.drop_path)).to(branch_BND.dtype)


class _Attention(nn.Module):
    """Every token sees every other."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, x_BND: Tensor) -> Tensor:
        query, key, value = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # (B, h, N, d)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
