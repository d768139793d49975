"""SSR as its component map reads: noise in the Sinkhorn branch only, with a standard deviation of α itself.

What is known of arXiv 2511.08972 leaves open which branch gets the noise and what α means. `ssr-l` and `ssr-s` put it
on both, with a standard deviation of α/E: a perplexity that is sensitive to α cannot come from noise on 0.1 % of the
steps. Here the map that shows noise beside the plan is taken at its word. Steps without a plan are softmax top-k then,
to the last bit. For the softmax cost, whose entries are in [0, 1], an α of 0.3 leaves little more than chance of a
token's choice on a step by the plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from sinkroute.routing.noise import NoiseScale
from sinkroute.routing.options import with_default
from sinkroute.routing.routers.ssr import NoiseBranch, SSRLinearRouter, SSRRouter, SSRSoftmaxRouter

__all__ = ["SSRLinearLiteralRouter", "SSRSoftmaxLiteralRouter"]


@dataclass(frozen=True, kw_only=True)
class _Literal(SSRRouter.Options):
    noise_branch: NoiseBranch = with_default(SSRRouter.Options, "noise_branch", "sinkhorn")
    noise_scale: NoiseScale = with_default(SSRRouter.Options, "noise_scale", "absolute")


class SSRLinearLiteralRouter(SSRLinearRouter):
    """The paper's SSR-L with the noise of its component map: on plans only, of standard deviation α.

    >>> import sinkroute
    >>> options = sinkroute.create_router("ssr-l-literal", num_experts=8, top_k=2).options
    >>> options.noise_branch, options.noise_scale, options.noise
    ('sinkhorn', 'absolute', 0.3)
    """

    Options = _Literal


class SSRSoftmaxLiteralRouter(SSRSoftmaxRouter):
    """The paper's SSR-S with the noise of its component map: on plans only, of standard deviation α."""

    Options = _Literal
