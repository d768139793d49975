"""Random draws: functions of their key, deaf to everything else."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkroute.routing.draws import hash63, uniform
from sinkroute.routing.draws import normal_like as normal_of_seed


def normal_like(reference, *key):
    return normal_of_seed(reference, torch.tensor(hash63(*key)))


KEYS = st.lists(st.integers(0, 2**40) | st.text(max_size=5), min_size=1, max_size=4)


@given(KEYS)
def test_uniform_lies_from_0_up_to_but_without_1(key):
    assert 0 <= uniform(*key) < 1


def test_uniform_draws_are_spread_evenly():
    draws = [uniform("branch", 0, step) for step in range(4000)]
    tenths = [sum(low <= 10 * draw < low + 1 for draw in draws) for low in range(10)]
    # 400 expected in each tenth, standard deviation √(4000 · 0.1 · 0.9) = 19.0; five of them.
    assert all(abs(count - 400) < 95 for count in tenths)


def test_uniform_tells_the_parts_of_a_key_apart():
    assert (
        len({uniform("a", 1, 23), uniform("a", 12, 3), uniform("a", 123), uniform("a1", 23), uniform("a", 23, 1)}) == 5
    )


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


def test_a_draw_is_the_same_in_every_process():
    # Python salts its own hash of strings per process, and a resume would change the routes. By hand:
    # int.from_bytes(blake2b(b"('branch', 0, 7)", digest_size=8).digest(), "little") // 2**11 / 2**53
    assert uniform("branch", 0, 7) == 0.34800474648185054
