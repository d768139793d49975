"""The load-balancing loss with the load of the global batch (Qiu et al., arXiv 2501.11873, section 3).

    loss = coefficient · E · Σ_j f_j P_j,    f over all ranks and the micro-batches of the step so far, P of this one

A micro-batch may be of one domain: to balance it by itself keeps experts from specialising. Averaged over ranks, as
data parallelism does with gradients, the losses sum to the loss of the global batch.
"""

from __future__ import annotations

from torch import Tensor

from sinkroute.routing.losses.inputs import LossInputs
from sinkroute.routing.losses.load_balance import load_balance_loss

__all__ = ["global_load_balance_loss"]


def global_load_balance_loss(inputs: LossInputs) -> Tensor:
    """E · Σ_j f_j P_j with the f of the batch so far; 0 (with a gradient of 0) if no token here is real."""
    return load_balance_loss(inputs.logits_TE, inputs.batch_load(), inputs.token_mask, inputs.score)
