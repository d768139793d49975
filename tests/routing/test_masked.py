"""Means that leave padding out."""

import torch

from sinkroute.routing.masked import mean_over_tokens


def test_mean_over_tokens_counts_only_real_ones():
    values = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 6.0]])
    mask = torch.tensor([True, False, True])
    assert mean_over_tokens(values, mask).tolist() == [2.0, 4.0]
    assert mean_over_tokens(values[:, 0], mask).item() == 2.0
    assert mean_over_tokens(values[:0], None).tolist() == [0.0, 0.0]
