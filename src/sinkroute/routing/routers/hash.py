"""Hash layers: a token's experts are a function of what it is (Roller et al., arXiv 2106.04426, sections 3 and 3.1).

    experts of token i = table[id_i],    weights 1/K

Nothing is learned, so nothing collapses and nothing fluctuates. The table is fixed before training:

- a random hash that is balanced over ids: of every E ids from a multiple of E on, each goes to another expert;
- after `HashGate.balance(token_counts)` the paper's balanced hash: words by descending frequency, each to the experts
  that have the fewest tokens so far, so that the load is balanced over text.

The table is drawn from the seed, and from the layer where the router is told it; else all layers have the same one. For
K > 1 a token visits K distinct experts. (The paper's MultiHash cuts each expert in pieces instead.)

The gate makes logits of it, 0 for the chosen and −10⁴ for the others, so that the router is plain softmax top-k.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sinkroute.routing.beside import checked_ids, kind_of
from sinkroute.routing.card import Card
from sinkroute.routing.draws import hash63
from sinkroute.routing.options import CommonOptions, option
from sinkroute.routing.router import Router
from sinkroute.routing.state import KeepsDtypes, check_table, whole

__all__ = ["HashGate", "HashRouter"]

# Its exponential is 0 in any dtype, and sums of it are no infinities.
_NEVER = -1e4


class HashGate(KeepsDtypes):
    """Ids of tokens (T,) to logits (T, E).

    Args:
        num_experts: E.
        top_k: K.
        vocab_size: rows of the table, which is rounded up to a multiple of E. An id takes the row id mod rows.
        seed: of the table.

    Attributes:
        table_VK: (V, K) float32, the experts of each id; a buffer. What averages models or casts them takes buffers for
            numbers: it spoils integers, and floats of equal models stay what they are.
        experts_VK: the same as int64.
    """

    needs_token_ids = True
    table_VK: Tensor

    @torch.inference_mode(False)  # or `balance` could not write to the table
    def __init__(self, num_experts: int, top_k: int, vocab_size: int, seed: int) -> None:
        super().__init__()
        self.num_experts, self.seed = num_experts, seed
        rows = -(-vocab_size // num_experts) * num_experts
        self.register_buffer("table_VK", torch.empty(rows, top_k, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The random hash; what `balance` did is lost. (By this name, what fills models that come from the meta device
        finds it.)"""
        rows, top_k = self.table_VK.shape
        generator = torch.Generator("cpu").manual_seed(self.seed)
        noise_BE = torch.rand(rows // self.num_experts, self.num_experts, generator=generator, device="cpu")
        shuffled_BE = noise_BE.argsort(1)
        # Choice k of an id is the first choice of the id k places on in its block: distinct, and as balanced.
        choices = [shuffled_BE.roll(-k, dims=1).flatten() for k in range(top_k)]
        self.table_VK.copy_(torch.stack(choices, dim=1))

    @property
    def experts_VK(self) -> Tensor:
        """(V, K) int64, the experts of each id."""
        return whole(self.table_VK)

    def forward(self, x_TD: Tensor, token_ids: Tensor) -> Tensor:
        token_ids = checked_ids(token_ids, x_TD)
        experts_TK = whole(self.table_VK[token_ids % len(self.table_VK)])
        return x_TD.new_full((len(x_TD), self.num_experts), _NEVER).scatter(1, experts_TK, 0.0)

    @torch.no_grad()
    def balance(self, token_counts: Tensor) -> None:
        """Balance the load over text: the most frequent ids first, each to the K experts with the fewest tokens so far.

        Experts with equally many tokens take turns, by the number of ids that they have. Call it before training.

        Args:
            token_counts: (n,) how often each id occurs, n at most the rows of the table; what lies beyond stays.

        Raises:
            TypeError: they are no tensor of real numbers.
            ValueError: another shape, more ids than rows, a count that is negative or not finite.

        >>> gate = HashGate(num_experts=2, top_k=1, vocab_size=4, seed=0)
        >>> gate.balance(torch.tensor([5, 1, 3, 2]))  # 5 to 0; 3, 2 to 1; 1 where fewer ids are
        >>> gate.experts_VK.flatten().tolist()
        [0, 0, 1, 1]
        """
        rows, top_k = self.table_VK.shape
        if not isinstance(token_counts, Tensor) or token_counts.is_complex():
            raise TypeError(
                f"token_counts must be a tensor of counts, got {kind_of(token_counts)}; use torch.as_tensor(counts)"
            )
        if token_counts.ndim != 1 or len(token_counts) > rows:
            raise ValueError(
                f"token_counts must have shape (n,) with n <= {rows}, got {tuple(token_counts.shape)}; "
                "give the router vocab_size, the number of ids"
            )
        counts = token_counts.double().cpu()
        if not (torch.isfinite(counts).all() and (counts >= 0).all()):
            raise ValueError("token_counts must be finite numbers of 0 or more")
        heap = [(0.0, 0, expert) for expert in range(self.num_experts)]
        table = self.experts_VK.tolist()
        for token in torch.argsort(counts, descending=True, stable=True).tolist():
            emptiest = [heapq.heappop(heap) for _ in range(top_k)]
            table[token] = [expert for _, _, expert in emptiest]
            for load, ids, expert in emptiest:
                heapq.heappush(heap, (load + counts[token].item(), ids + 1, expert))
        self.table_VK.copy_(torch.tensor(table, device="cpu"))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        check_table(state_dict.get(f"{prefix}table_VK"), f"{prefix}table_VK", self.num_experts)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.table_VK = self.table_VK.float()  # `assign=True` takes tensors as they are


class HashRouter(Router):
    """Softmax top-k; its gate (`make_gate`) gives logits by a fixed hash of the token's id.

    Given the logits of another gate, it is plain top-k. Without groups.

    >>> import sinkroute
    >>> layer = sinkroute.MoE(d_model=8, d_hidden=8, num_experts=4, top_k=2, router="hash")
    >>> _ = layer(torch.randn(4, 8), token_ids=torch.tensor([0, 1, 2, 3]))
    >>> layer.routes.load.tolist(), layer.routes.weights.unique().tolist()
    ([2, 2, 2, 2], [0.5])
    """

    card = Card("partly", "partly", "a look-up")
    serves_any_gate = False

    keeps_groups = False

    @dataclass(frozen=True, kw_only=True)
    class Options(CommonOptions):
        vocab_size: int = option(32_768, "rows of the hash table; ids are taken modulo it", least=1)

    def make_gate(self, d_model: int) -> nn.Module:
        """A `HashGate`, which has no parameters."""
        seed = hash63("hash", self.seed, -1 if self.layer is None else self.layer)
        return HashGate(self.num_experts, self.top_k, self.vocab_size, seed)
