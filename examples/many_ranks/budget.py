"""What a mixture costs on many ranks: memory, messages of the router, and how much imbalance is noise.

    pip install "sinkroute[hf]"
    python examples/many_ranks/budget.py                                  # the recipes, as they start
    python examples/many_ranks/budget.py 30b-a3b --engine megatron --dp 64 --tp 2 --pp 4 --ep 16
    python examples/many_ranks/budget.py 7b-a1b --tokens 4096 --latency-us 30 --gigabytes-per-s 25

Models are built on the meta device: their parameters are counted, and none is stored. Activations, and what a framework
keeps beside weights, gradients and Adam's two moments, are not counted.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from balance import chance_max_vio, rank_excess, routed_max_vio
from mixtures import LAYOUTS, MIXTURES, PUBLISHED, Layout, Mixture
from rich.console import Console
from rich.table import Table
from torch import nn

import sinkroute
from sinkroute.routing.fold import GateFold
from sinkroute.transport.over_ranks import CALLS

FLOAT64 = 8
# Passes of the solver over the logits in a plan (docs/transport.md).
PASSES = 5.2
# The share of steps with a plan of ssr-l: the paper's.
PROBABILITY = 0.001
# Of the busiest expert, in training and as served, by docs/study.md: 512 tokens a step, 16 experts top-2.
MEASURED = {"left alone": (2.70, 2.84), "balancing loss": (0.53, 0.47), "ssr-dual": (0.30, 0.17)}


# -- parameters --------------------------------------------------------------------------------------------------------


def hf_config(mixture: Mixture) -> Any:
    """The configuration of transformers with these sizes."""
    import transformers

    said: dict[str, Any] = {
        "vocab_size": mixture.vocab,
        "num_hidden_layers": mixture.layers,
        "hidden_size": mixture.dim,
        "num_attention_heads": mixture.heads,
        "num_key_value_heads": mixture.kv_heads,
        "head_dim": mixture.head_dim,
        "num_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": mixture.norm_topk,
        "max_position_embeddings": mixture.length,
        "tie_word_embeddings": False,
    }
    if mixture.wide_qk_norm:
        return transformers.OlmoeConfig(intermediate_size=mixture.expert_dim, **said)
    return transformers.Qwen3MoeConfig(moe_intermediate_size=mixture.expert_dim, **said)


@dataclass(frozen=True)
class Parameters:
    """Counted, by what shares them among ranks.

    Attributes:
        experts: of all layers; spread over expert-parallel ranks.
        split: attention of all layers; spread over tensor-parallel ranks.
        whole: gates and norms of all layers, on every tensor-parallel rank.
        ends: the embedding and the head, each; spread over tensor-parallel ranks.
    """

    experts: int
    split: int
    whole: int
    ends: int

    @property
    def total(self) -> int:
        return self.experts + self.split + self.whole + 2 * self.ends

    def active(self, mixture: Mixture) -> int:
        """What one token needs, the embedding and the head included."""
        return self.total - self.experts * (mixture.experts - mixture.top_k) // mixture.experts


@cache
def count_parameters(mixture: Mixture) -> Parameters:
    """By transformers' model of these sizes, built on the meta device."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config(mixture))
    found = dict.fromkeys(("experts", "split", "whole", "ends"), 0)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            kind = "experts"
        elif "embed_tokens" in name or "lm_head" in name:
            kind = "ends"
        elif "_proj." in name:
            kind = "split"
        else:
            kind = "whole"
        found[kind] += parameter.numel()
    found["ends"] //= 2
    return Parameters(**found)


# -- memory ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on the rank that has most, a first stage."""

    weights: int
    gradients: int
    adam: int
    gathered: int
    router: int


def memory(mixture: Mixture, layout: Layout, engine: str) -> Memory:
    """What a rank holds between steps, and the weights that FSDP gathers in addition while it works.

    Args:
        engine: `"torchtitan"`: float32 weights, gradients and moments, all sharded over all ranks of a stage (FSDP2),
            and of two blocks at a time bfloat16 copies of what this rank computes with. `"megatron"`: bfloat16 weights
            and float32 gradients on each rank, float32 weights and moments spread over its data-parallel ranks.
    """
    found = count_parameters(mixture)
    layers = math.ceil(mixture.layers / layout.pp)
    ends = (2 if layout.pp == 1 else 1) * found.ends / layout.tp
    dense = layers / mixture.layers * (found.split / layout.tp + found.whole) + ends
    experts = layers / mixture.layers * found.experts / layout.ep  # of one rank, if nothing else shares them
    router = layers * router_bytes(mixture)
    if engine == "torchtitan":
        kept = dense / layout.sharding + experts * layout.ep / layout.stage
        block = (found.split / layout.tp + found.whole) / mixture.layers + experts / layers
        return Memory(*(round(4 * times * kept) for times in (1, 1, 2)), gathered=round(2 * 2 * block), router=router)
    held, spread = dense + experts, dense / layout.sharding + experts * layout.ep / layout.stage
    return Memory(round(2 * held), round(4 * held), round(12 * spread), gathered=0, router=router)


@cache
def router_of(mixture: Mixture, folded: bool = True) -> sinkroute.Router:
    """The recommended router of one layer; `folded` into a gate without a bias, as in the recipes."""
    router = sinkroute.create_router("ssr-dual", num_experts=mixture.experts, top_k=mixture.top_k)
    if folded:
        gate = nn.Linear(mixture.dim, mixture.experts, bias=False, device="meta")
        router.links.append(GateFold(router, gate, "weight"))
    return router


def router_bytes(mixture: Mixture) -> int:
    """What one layer's router keeps: its state, what it counts in a step, and the copies of that for checkpoints."""
    state = router_of(mixture).state
    assert state is not None
    counts = [state.load_E, *state.sums.values()]
    return sum(part.numel() * part.element_size() for part in (*state.buffers(), *counts))


# -- messages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Messages:
    """What a router sends in a step.

    Attributes:
        messages: collective calls in a step, one after another.
        numbers: float64 numbers in all of them.
        gathers: whether each rank receives those of every rank (all_gather), or their sum (all_reduce).
        ranks: that take part.
        share: of the steps that do it.
    """

    what: str
    messages: float
    numbers: float
    gathers: bool
    ranks: int
    share: float = 1.0

    @property
    def sent(self) -> float:
        """Bytes that a rank puts in."""
        return FLOAT64 * self.numbers

    def seconds(self, latency: float, bandwidth: float) -> float:
        """In a step that has them: hops of a tree, and bytes over the slowest link of a ring; none on one rank."""
        if self.ranks == 1:
            return 0.0
        hops = math.ceil(math.log2(self.ranks)) * (1 if self.gathers else 2)
        moved = self.sent * ((self.ranks - 1) if self.gathers else 2 * (self.ranks - 1) / self.ranks)
        return self.messages * hops * latency + moved / bandwidth


def messages(mixture: Mixture, layout: Layout) -> list[Messages]:
    """Of the recommended router, and of what it is compared with, on one pipeline stage."""
    layers, experts, ranks = math.ceil(mixture.layers / layout.pp), mixture.experts, layout.stage
    sizes = {}
    for folded in (False, True):
        state = router_of(mixture, folded).state
        assert state is not None
        sizes[folded] = layers * len(state.pending())
    plan = 1 + 3 * experts + 2 * experts * PASSES
    return [
        Messages("ssr-dual, a bias", 1, sizes[False], False, ranks),
        Messages("ssr-dual, folded into the gate", 1, sizes[True], False, ranks),
        Messages(
            "ssr-dual, a plan of all ranks, at most",
            1 + layers * CALLS,
            sizes[True] + layers * CALLS * 3 * experts,
            True,
            ranks,
            share=0.0,
        ),
        Messages("ssr-l, plans of all ranks", layers * (PASSES + 2), layers * plan, True, ranks, share=PROBABILITY),
    ]


# -- balance -----------------------------------------------------------------------------------------------------------


def expert_share(mixture: Mixture) -> float:
    """The experts' share of a step's arithmetic, attention over sequences of full length included."""
    found = count_parameters(mixture)
    experts = found.experts * mixture.top_k / mixture.experts
    products = experts + found.split + found.whole + found.ends  # the embedding is looked up
    scores = mixture.layers * mixture.length * mixture.heads * mixture.head_dim  # causal: half of all pairs, twice
    return experts / (products + scores)


# -- the tables --------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    names = options.mixture or list(MIXTURES)
    console.print(parameter_table(names))
    layouts = {}
    for engine in [options.engine] if options.engine else list(LAYOUTS):
        for name in names:
            said = {key: getattr(options, key) for key in ("dp", "tp", "pp", "cp", "ep")}
            base = LAYOUTS[engine][name]
            layouts[engine, name] = replace(base, **{key: n for key, n in said.items() if n is not None})
    console.print(memory_table(layouts))
    console.print(message_table(layouts, options.latency_us * 1e-6, options.gigabytes_per_s * 1e9))
    console.print(chance_table(layouts, options.tokens))
    console.print(cost_table(layouts, options.tokens))
    if options.simulate:
        console.print(simulation_table(names, options.simulate))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("mixture", nargs="*", choices=[*MIXTURES, []], default=[], help="all of them unless told")
    parser.add_argument("--engine", choices=list(LAYOUTS), help="both unless told")
    for name in asdict(Layout()):
        parser.add_argument(f"--{name}", type=int, help="instead of the recipe's")
    parser.add_argument("--tokens", type=int, default=4096, help="of a micro-batch of one replica")
    parser.add_argument("--latency-us", type=float, default=20.0, help="of one hop between machines")
    parser.add_argument("--gigabytes-per-s", type=float, default=25.0, help="of one link between machines")
    parser.add_argument("--simulate", type=int, metavar="STEPS", help="train routers on drawn tokens, to compare")
    return parser.parse_args(arguments)


def parameter_table(names: list[str]) -> Table:
    table = _table("Parameters, counted", "mixture", "layers", "experts", "top-k", "total", "active", "published")
    for name in names:
        mixture, found = MIXTURES[name], count_parameters(MIXTURES[name])
        said = PUBLISHED.get(name)
        table.add_row(
            name,
            str(mixture.layers),
            str(mixture.experts),
            str(mixture.top_k),
            f"{found.total:,}",
            f"{found.active(mixture):,}",
            "-" if said is None else f"{said[0]} B / {said[1]} B",
        )
    return table


def memory_table(layouts: dict[tuple[str, str], Layout]) -> Table:
    columns = ("engine", "mixture", "layout", "ranks", "weights", "gradients", "Adam", "gathered", "router")
    table = _table("Memory of a rank, without activations", *columns)
    for (engine, name), layout in layouts.items():
        found = memory(MIXTURES[name], layout, engine)
        sizes = (_bytes(size) for size in asdict(found).values())
        table.add_row(engine, name, str(layout), str(layout.ranks), *sizes)
    return table


def message_table(layouts: dict[tuple[str, str], Layout], latency: float, bandwidth: float) -> Table:
    title = f"Messages of the router, {latency * 1e6:g} µs a hop, {bandwidth / 1e9:g} GB/s"
    columns = ("mixture", "layout", "router", "calls", "a rank sends", "time", "share of steps")
    table = _table(title, *columns)
    for (name, layout), mixture in _each(layouts):
        for found in messages(mixture, layout):
            share = f"{found.share:g}" if found.share else "the first, and after shifts"
            time = f"{1e3 * found.seconds(latency, bandwidth):.2f} ms"
            table.add_row(name, str(layout), found.what, f"{found.messages:.0f}", _bytes(found.sent), time, share)
    return table


def chance_table(layouts: dict[tuple[str, str], Layout], tokens: int) -> Table:
    """Expected MaxVio by chance alone, by whose tokens are counted together."""
    title = f"MaxVio by chance alone, {tokens} tokens a micro-batch and replica"
    table = _table(title, "mixture", "layout", "of a micro-batch", "of those that share experts", "of all ranks")
    for (name, layout), mixture in _each(layouts):
        counted = (tokens, together(layout, tokens), tokens * layout.dp)
        values = (chance_max_vio(number, mixture.experts, mixture.top_k) for number in counted)
        table.add_row(name, str(layout), *(f"{value:.3f}" for value in values))
    return table


def simulation_table(names: list[str], steps: int) -> Table:
    """Chance, and what routers make of tokens that are independent."""
    routers = ("softmax", "ssr-dual")
    title = f"MaxVio of independent tokens, {steps} steps, mean of the second half"
    table = _table(title, "experts, top-k", "tokens", "by chance", *routers)
    sizes = dict.fromkeys((MIXTURES[name].experts, MIXTURES[name].top_k) for name in names)
    for experts, top_k in sizes:
        for tokens in (512, 4096):
            found = (routed_max_vio(tokens, experts, top_k, steps, router) for router in routers)
            values = (chance_max_vio(tokens, experts, top_k), *found)
            table.add_row(f"{experts}, {top_k}", str(tokens), *(f"{value:.3f}" for value in values))
    return table


def cost_table(layouts: dict[tuple[str, str], Layout], tokens: int) -> Table:
    """How much longer a step takes where the busiest rank is waited for."""
    title = (
        "Time that an imbalance costs, % of a step's arithmetic: independent loads (one busy expert; all of a rank's)"
    )
    shown = [f"{name}, MaxVio {train}" for name, (train, _) in MEASURED.items()]
    table = _table(title, "mixture", "layout", "experts a rank", "experts' share", "chance", *shown)
    for (name, layout), mixture in _each(layouts):
        share = 100 * expert_share(mixture)
        costs = []
        for max_vio in (
            chance_max_vio(together(layout, tokens), mixture.experts, mixture.top_k),
            *(train for train, _ in MEASURED.values()),
        ):
            one, independent, most = (share * part for part in rank_excess(max_vio, mixture.experts, layout.ep))
            costs.append(f"{independent:.1f} ({one:.1f}; {most:.0f})")
        table.add_row(name, str(layout), str(mixture.experts // layout.ep), f"{share:.0f} %", *costs)
    return table


def together(layout: Layout, tokens: int) -> int:
    """The tokens that the same experts serve at a time, of replicas with so many in a micro-batch."""
    return tokens * max(layout.ep // (layout.tp * layout.cp), 1)


def _each(layouts: dict[tuple[str, str], Layout]) -> list[tuple[tuple[str, Layout], Mixture]]:
    """Each mixture and layout once, whatever the engines."""
    pairs = dict.fromkeys((name, layout) for (_, name), layout in layouts.items())
    return [((name, layout), MIXTURES[name]) for name, layout in pairs]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    return table


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


if __name__ == "__main__":
    main()
