"""Classifiers to attack: one whose worst case is known in closed form, and one that is trained."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SHAPE = (2, 3, 4)  # channels, rows, columns


class Linear:
    """Logits w·x of random weights, and the least margin that each image can be brought to, worked out exactly."""

    def __init__(self, classes: int, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = scale * torch.randn(classes, *SHAPE, generator=generator)
        self.images = torch.rand(9, *SHAPE, generator=generator)
        # Some pixels at the ends of the range, where clipping bites.
        self.images[:, :, 0] = torch.rand(9, 2, 4, generator=generator).round()
        self.labels = self(self.images).argmax(dim=1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.einsum("bchw,nchw->bn", pixels, self.weights)

    def worst_images(self, low: Tensor, high: Tensor) -> Tensor:
        """For two classes: each pixel at the bound that lowers the right class against the other."""
        assert len(self.weights) == 2
        difference = self.weights[self.labels] - self.weights[1 - self.labels]
        return torch.where(difference > 0, low, high)

    def least_margins(self, low: Tensor, high: Tensor) -> Tensor:
        """min over the box and over the wrong classes j of (w_y − w_j)·x, in float64."""
        low, high, weights = low.double(), high.double(), self.weights.double()
        difference = weights[self.labels][:, None] - weights[None]  # (B, N, C, H, W)
        least_BN = torch.where(difference > 0, difference * low[:, None], difference * high[:, None]).sum((2, 3, 4))
        return least_BN.scatter(1, self.labels[:, None], torch.inf).amin(dim=1)

    def margins(self, pixels: Tensor) -> Tensor:
        logits_BN = self(pixels).double()
        others_BN = logits_BN.scatter(1, self.labels[:, None], -torch.inf)
        return logits_BN.gather(1, self.labels[:, None])[:, 0] - others_BN.amax(dim=1)


@pytest.fixture
def linear():
    return Linear


@pytest.fixture(scope="session")
def digits():
    """A small network trained on 1200 of scikit-learn's digits, and 100 others that it has not seen."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        cross_entropy(model(images[:1200]), labels[:1200]).backward()
        optimizer.step()
    model.eval().zero_grad()
    images, labels = images[1200:1300], labels[1200:1300]

    def accuracy(pixels: Tensor) -> float:
        return (model(pixels).argmax(dim=1) == labels).float().mean().item()

    return SimpleNamespace(model=model, images=images, labels=labels, accuracy=accuracy)
