"""Our attacks on images against torchattacks' and pyautoattack's, on the same classifier: how many images stand.

pip install --no-deps torchattacks==3.5.1 pyautoattack==0.2.0
"""

import pytest
import torch
from torch import nn

from sinkroute.lab.attacks.images import attack_images

EPSILON = 4
RADIUS = EPSILON / 255


class Task:
    """A random network on random images, which are what it says they are: all are right before an attack."""

    def __init__(self, seed, count=200):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10)).eval()
            self.images = torch.rand(count, 1, 8, 8)
        with torch.no_grad():
            self.labels = self.model(self.images).argmax(dim=1)

    def right(self, images):
        return (self.model(images).argmax(dim=1) == self.labels).float().mean().item()

    def ours(self, name, seed, **options):
        return attack_images(name, self.model, self.images, self.labels, seed, epsilon=EPSILON, **options)


@pytest.fixture(params=[0, 1, 2])
def seed(request):
    with torch.random.fork_rng():
        torch.manual_seed(request.param)
        yield request.param


def test_fgsm_finds_the_images_of_torchattacks(seed):
    torchattacks = pytest.importorskip("torchattacks")
    task = Task(seed)
    expected = torchattacks.FGSM(task.model, eps=RADIUS)(task.images, task.labels)
    torch.testing.assert_close(task.ours("fgsm", seed), expected, rtol=0, atol=1e-6)


def test_pgd_leaves_as_many_right_as_that_of_torchattacks(seed):
    torchattacks = pytest.importorskip("torchattacks")
    task = Task(seed)
    theirs = torchattacks.PGD(task.model, eps=RADIUS, alpha=0.15 * RADIUS, steps=20)(task.images, task.labels)
    right = task.right(task.ours("pgd", seed))
    print(f"\nPGD, seed {seed}: ours {right:.3f}, torchattacks {task.right(theirs):.3f}")
    assert 0.05 < right < 0.95
    assert right == pytest.approx(task.right(theirs), abs=0.02)


def test_spsa_leaves_as_many_right_as_that_of_torchattacks(seed):
    torchattacks = pytest.importorskip("torchattacks")
    task = Task(seed)
    theirs = torchattacks.SPSA(task.model, eps=RADIUS, nb_iter=40, nb_sample=32)(task.images, task.labels)
    right = task.right(task.ours("spsa", seed, samples=32))
    print(f"\nSPSA, seed {seed}: ours {right:.3f}, torchattacks {task.right(theirs):.3f}")
    assert right == pytest.approx(task.right(theirs), abs=0.03)


@pytest.mark.slow
def test_auto_attack_leaves_what_pyautoattack_leaves_and_no_more_than_pgd(seed):
    pyautoattack = pytest.importorskip("pyautoattack")
    task = Task(seed, 50)
    attack = pyautoattack.AutoAttack(task.model, eps=RADIUS, seed=seed)
    theirs, _ = attack.run_standard_evaluation(task.images, task.labels, batch_size=len(task.images))
    right, by_pgd = task.right(task.ours("auto-attack", seed)), task.right(task.ours("pgd", seed))
    print(f"\nAutoAttack, seed {seed}: ours {right:.3f}, pyautoattack {task.right(theirs):.3f}, PGD {by_pgd:.3f}")
    assert right == task.right(theirs)
    assert right <= by_pgd
