"""Options are fields: documented, checked, frozen, and the same for every way of asking."""

import dataclasses
import pydoc

import pytest

import sinkroute
from sinkroute.routing.options import CommonOptions, described, option
from sinkroute.routing.registry import ROUTERS, router_options

ROUTER_NAMES = list(ROUTERS)


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_every_option_is_documented_and_its_default_is_taken(name):
    options = ROUTERS[name].Options
    assert all(row.about and not row.about.endswith(".") for row in described(options))
    assert sorted(row.name for row in described(options)) == sorted(router_options(name))
    # Every default given by name is what is meant by leaving it out, and in the bounds.
    given = {option: getattr(options(), option) for option in router_options(name)}
    assert sinkroute.create_router(name, num_experts=4, top_k=2, **given).options == options()


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_help_shows_every_option(name):
    shown = pydoc.render_doc(ROUTERS[name])
    assert all(f"{row.name}: {row.kind} = {row.default}" in shown for row in described(ROUTERS[name].Options))


def test_the_options_of_the_method_come_first():
    rows = [row.name for row in described(ROUTERS["loss-free"].Options)]
    assert rows[0] == "update_rate" and set(rows[1:]) == {each.name for each in dataclasses.fields(CommonOptions)}


def test_a_router_keeps_what_it_was_made_with():
    router = sinkroute.create_router("loss-free", num_experts=4, top_k=2, update_rate=0.5)
    router.update_rate = 0.25  # in use from now on
    assert (router.options.update_rate, router.update_rate) == (0.5, 0.25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        router.options.update_rate = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounded(CommonOptions):
    share: float = option(0.5, "a share", above=0, most=1, hint="0.5 is usual")
    half_open: float | None = option(None, "below one", least=0, below=1)
    count: int = option(3, "a count", least=2)
    many: float | str = option(0.1, "a number, or text that says it")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"share": 0}, ValueError, r"share must be a finite number above 0 and at most 1, got 0; 0\.5 is usual"),
        ({"share": 1.5}, ValueError, r"share must be .* got 1\.5"),
        ({"share": float("nan")}, ValueError, r"share must be a finite number .* got nan"),
        ({"share": "much"}, TypeError, r"share must be a number, got 'much' \(str\)"),
        ({"share": True}, TypeError, r"share must be a number, got True"),
        ({"half_open": 1}, ValueError, r"half_open must be a finite number of 0 or more and below 1, got 1"),
        ({"count": 1}, ValueError, r"count must be an integer of 2 or more, got 1"),
        ({"count": 2.0}, TypeError, r"count must be an int, got 2\.0"),
        ({"count": True}, TypeError, r"count must be an int, got True"),
        ({"count": None}, TypeError, r"count must be an int, got None"),
        ({"layer": True}, TypeError, r"layer must be an int or None, got True"),
        ({"norm_topk": 1}, TypeError, r"norm_topk must be True, False or None, got 1"),
        ({"ties": "frist"}, ValueError, r"unknown ties 'frist'; did you mean 'first'"),
        ({"losses": ["z-los"]}, ValueError, r"unknown loss 'z-los'; did you mean 'z-loss'"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_name(given, error, message):
    with pytest.raises(error, match=message):
        Bounded(**given)


def test_what_fits_is_taken_as_it_is():
    fits = {"share": 1, "half_open": 0.0, "count": 2, "many": "all of it", "layer": None, "norm_topk": False}
    made = Bounded(**fits)
    assert {name: getattr(made, name) for name in fits} == fits
