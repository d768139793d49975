"""Normal numbers: functions of their seed, deaf to everything else."""

import ctypes
import math

import numpy as np
import pytest
import torch
from scipy.special import factorial2, ndtri
from scipy.stats import kstest, norm

from sinkroute.kernels import native
from sinkroute.kernels.normal import normal_like as normal_of_seed
from sinkroute.routing.draws import hash63


def normal_like(reference, *key):
    return normal_of_seed(reference, torch.tensor(hash63(*key)))


def test_normal_numbers_are_standard_normal():
    sample = normal_like(torch.empty(200, 500, dtype=torch.float64), "noise", 1)
    # 1e5 numbers: the mean is off by 1/√1e5 = 0.0032 (one standard deviation), the deviation by 0.0022, and the share
    # within ±1 of 0.6827 by 0.0015; five of each.
    assert abs(sample.mean()) < 0.016 and abs(sample.std() - 1) < 0.012
    assert abs((sample.abs() < 1).double().mean() - 0.6827) < 0.0075


def test_neighbouring_keys_give_unrelated_noise():
    reference = torch.empty(20_000)
    one, other = normal_like(reference, "noise", 5), normal_like(reference, "noise", 6)
    # The correlation of independent samples has standard deviation 1/√20000 = 0.0071; five of them.
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.036


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_has_the_form_of_its_reference_and_repeats(dtype):
    reference = torch.empty(3, 4, dtype=dtype)
    noise = normal_like(reference, "noise", 7)
    assert noise.shape == (3, 4) and noise.dtype == dtype
    assert torch.equal(noise, normal_like(reference, "noise", 7))


def test_draws_neither_read_nor_move_the_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = normal_like(torch.empty(5), "noise", 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(normal_like(torch.empty(5), "noise", 3), first)


# -- the numbers of the CPU's kernel ---------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(native.load() is None, reason="no compiler here")
ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key, counter):
    """Threefry-2x32-20 of one counter in Python's integers (Salmon et al., SC 2011)."""
    keys, (a, b) = (*key, 0x1BD11BDA ^ key[0] ^ key[1]), counter
    a, b = (a + keys[0]) % 2**32, (b + keys[1]) % 2**32
    for block in range(5):
        for turn in ROTATIONS[block % 2]:
            a = (a + b) % 2**32
            b = (b << turn | b >> (32 - turn)) % 2**32 ^ a
        a = (a + keys[(block + 1) % 3]) % 2**32
        b = (b + keys[(block + 2) % 3] + block + 1) % 2**32
    return a, b


def quantile(seed, place):
    """The number at a place, in float64 by SciPy."""
    bits = threefry((seed % 2**32, seed >> 32), ((place & ~16) % 2**32, place >> 32))[place >> 4 & 1]
    return math.copysign(-ndtri((bits % 2**31 + 0.5) / 2**32), -1 if bits >> 31 else 1)


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_this_threefry_gives_the_published_answers(key, counter, words):
    # kat_vectors of Random123 1.14, which JAX's tests repeat.
    assert threefry(key, counter) == words


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1, hash63("noise", 7)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (40, 16)])
def test_every_number_is_the_quantile_of_its_bits(seed, shape):
    noise = normal_of_seed(torch.empty(shape), torch.tensor(seed)).flatten()
    expected = torch.tensor([quantile(seed, place) for place in range(noise.numel())])
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=3e-7)


@needs_kernels
def test_places_past_the_32nd_bit_have_numbers_of_their_own():
    seed, first, offsets = 5, 2**32 - 40, np.arange(96, dtype=np.uint32)
    out = np.empty(96, dtype=np.float32)
    arguments = ctypes.c_int64(seed), ctypes.c_int64(first), offsets.ctypes.data_as(ctypes.c_void_p)
    native.load().normal_at(*arguments, ctypes.c_int64(96), out.ctypes.data_as(ctypes.c_void_p))
    expected = [quantile(seed, first + offset) for offset in range(96)]
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=3e-7)


@needs_kernels
def test_the_numbers_are_normal_to_the_eye_of_a_million():
    sample = normal_like(torch.empty(1000, 1000), "noise", 11).double().flatten().numpy()
    assert kstest(sample, "norm").pvalue > 0.01
    # Standard errors of the k-th moments: √((2k − 1)!! / 1e6) and less; five of them.
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        error = math.sqrt((float(factorial2(2 * power - 1)) - moment**2) / 1e6)
        assert abs((sample**power).mean() - moment) < 5 * error
    for limit in (2.5, 3.5, 4.5):
        for tail in (sample > limit, sample < -limit):
            expected = 1e6 * norm.sf(limit)
            assert abs(tail.sum() - expected) < 5 * math.sqrt(expected)
    assert abs(sample).max() < 6.34


@needs_kernels
@pytest.mark.parametrize("shape", [(4000, 16), (1000, 64), (300, 200)])
def test_neighbours_in_rows_columns_and_keys_are_unrelated(shape):
    noise, other = (normal_like(torch.empty(shape), "noise", key).double() for key in (5, 6))
    low, high = (normal_of_seed(torch.empty(shape), torch.tensor(key)).double() for key in (5, 6))
    pairs = [(noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1]), (noise[:, 4:], noise[:, :-4])]
    pairs += [(noise, other), (low, high), (noise.flatten()[32:], noise.flatten()[:-32])]
    for one, two in pairs:
        for function in (lambda x: x, torch.square, torch.abs):
            correlation = torch.corrcoef(torch.stack([function(one).flatten(), function(two).flatten()]))[0, 1]
            assert abs(correlation) < 5 / math.sqrt(one.numel())


@needs_kernels
def test_float64_noise_is_that_of_float32():
    narrow, wide = (normal_like(torch.empty(9, 5, dtype=dtype), "noise", 7) for dtype in (torch.float32, torch.float64))
    assert torch.equal(narrow.double(), wide)


def test_without_kernels_torch_draws(monkeypatch):
    monkeypatch.setattr(native, "load", lambda: None)
    drawn = normal_like(torch.empty(3, 4), "noise", 7)
    generator = torch.Generator().manual_seed(hash63("noise", 7))
    assert torch.equal(drawn, torch.randn(3, 4, generator=generator))
