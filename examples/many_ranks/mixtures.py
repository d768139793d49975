"""Three mixtures and how they are spread over ranks: one place for what the recipes and the budget share.

`7b-a1b` has the sizes of OLMoE-1B-7B (arXiv 2409.02060), `30b-a3b` those of Qwen3-30B-A3B (arXiv 2505.09388), as their
published configurations say. `small` is made to run on a CPU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """The sizes of a decoder in which every layer is a mixture of experts.

    Attributes:
        norm_topk: whether a token's weights are divided by their sum.
        wide_qk_norm: whether queries and keys are normed over all heads together, as in OLMoE; else head by head.
    """

    vocab: int
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    expert_dim: int
    experts: int
    top_k: int
    norm_topk: bool
    wide_qk_norm: bool = False
    rope_theta: float = 10_000.0
    length: int = 4096


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many ranks each kind of parallelism takes. Experts are spread over `ep` of the dp · cp · tp ranks of a stage.

    Raises:
        ValueError: a degree below 1, or `ep` that does not divide the ranks of a stage.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name, degree in asdict(self).items():
            if degree < 1:
                raise ValueError(f"{name}={degree}: a degree of parallelism is 1 or more; 1 turns it off")
        if self.stage % self.ep:
            raise ValueError(
                f"ep={self.ep} does not divide the dp · cp · tp = {self.stage} ranks of a stage; take a divisor"
            )

    @property
    def stage(self) -> int:
        """Ranks of one pipeline stage, over which loads are counted.

        Tensor-parallel ranks have parts of a sequence. In torchtitan without expert parallelism they have the whole,
        and fewer take part.
        """
        return self.dp * self.cp * self.tp

    @property
    def ranks(self) -> int:
        return self.stage * self.pp

    @property
    def sharding(self) -> int:
        """Ranks over which a parameter that is not an expert's can be sharded."""
        return self.dp * self.cp

    def __str__(self) -> str:
        shown = [f"{name}{degree}" for name, degree in asdict(self).items() if degree > 1]
        return "·".join(shown) or "1 rank"


MIXTURES = {
    "small": Mixture(
        vocab=256,
        layers=4,
        dim=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        expert_dim=64,
        experts=16,
        top_k=4,
        norm_topk=True,
        length=128,
    ),
    "7b-a1b": Mixture(
        vocab=50304,
        layers=16,
        dim=2048,
        heads=16,
        kv_heads=16,
        head_dim=128,
        expert_dim=1024,
        experts=64,
        top_k=8,
        norm_topk=False,
        wide_qk_norm=True,
    ),
    "30b-a3b": Mixture(
        vocab=151936,
        layers=48,
        dim=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        expert_dim=768,
        experts=128,
        top_k=8,
        norm_topk=True,
        rope_theta=1_000_000.0,
    ),
}

# Parameters in all and for one token, in billions, as published: the papers' abstracts and Qwen's model card.
PUBLISHED = {"7b-a1b": (6.9, 1.3), "30b-a3b": (30.5, 3.3)}

# What the recipes start with; `small` on 4 processes of one machine.
LAYOUTS = {
    "torchtitan": {
        "small": Layout(dp=4, ep=2),
        "7b-a1b": Layout(dp=64, ep=8),
        "30b-a3b": Layout(dp=512, ep=8),
    },
    "megatron": {
        "small": Layout(dp=2, tp=2, ep=2),
        "7b-a1b": Layout(dp=64, ep=8),
        "30b-a3b": Layout(dp=128, tp=2, pp=2, ep=8),
    },
}
