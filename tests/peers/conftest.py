"""Our routers and the peers' own modules, on the same logits: choices, weights and the gradient must agree.

Every peer pins what another forbids, so each has another environment: `make test-peers`. In others its tests
skip.
"""

from collections.abc import Callable

import pytest
import torch

import sinkroute

# Programs, and stand-ins that change torch and their peer as soon as they are imported: pytest, which looks for
# examples in docstrings, must not do so.
collect_ignore_glob = ["*_on_the_cpu.py", "*_rank.py", "*_cells.py", "*_matrix.py"]

# What a peer makes of (T, E) logits: weights and choices (T, E), and the loss unless it is attached to the weights.
Peer = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


@pytest.fixture
def agree():
    return _agree


def _agree(router: sinkroute.Router, peer: Peer, logits_TE, mask=None) -> sinkroute.Routes:
    """Route with both and backpropagate the same random numbers through the weights of both, losses included."""
    ours_TE, theirs_TE = logits_TE.clone().requires_grad_(), logits_TE.clone().requires_grad_()
    real = torch.ones(len(logits_TE), dtype=torch.bool) if mask is None else mask
    projection_TE = torch.randn(logits_TE.shape, generator=torch.Generator().manual_seed(1)) * real[:, None]

    routes = router(ours_TE, mask)
    weights_TE = torch.zeros_like(ours_TE).scatter(1, routes.experts, routes.weights)
    chosen_TE = torch.zeros_like(ours_TE, dtype=torch.bool).scatter(1, routes.experts, True)
    their_weights_TE, their_chosen_TE, their_loss = peer(theirs_TE)
    assert torch.equal(chosen_TE[real], their_chosen_TE[real])
    torch.testing.assert_close(weights_TE[real], their_weights_TE[real], rtol=1e-5, atol=1e-7)

    for weights, loss in ((weights_TE, routes.aux_loss), (their_weights_TE, their_loss)):
        total = (weights * projection_TE).sum()
        (total if loss is None else total + loss).backward()
    torch.testing.assert_close(ours_TE.grad, theirs_TE.grad, rtol=1e-4, atol=1e-6)
    return routes
