"""Random draws: functions of their key, deaf to everything else."""

from hypothesis import given
from hypothesis import strategies as st

from sinkroute.routing.draws import uniform

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


def test_a_draw_is_the_same_in_every_process():
    # Python salts its own hash of strings per process, and a resume would change the routes. By hand:
    # int.from_bytes(blake2b(b"('branch', 0, 7)", digest_size=8).digest(), "little") // 2**11 / 2**53
    assert uniform("branch", 0, 7) == 0.34800474648185054
