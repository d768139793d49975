"""What people give to models, patched: packed, padded and long batches, single tokens, images, classes, two texts.

The oracles are not ours: what a model's own gate returned before the choice was changed, what its experts were then
given, and losses written out from those logits.
"""

import pytest
import torch
from torch.nn import functional

import sinkroute

pytest.importorskip("transformers")

import transformers

from .tried import PAGE, TRIED, told, tried, written

EXPERTS, TOP_K, VOCABULARY = 4, 2, 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_cache": False,  # with a cache, transformers takes a packed row for one text
}
TEXTS = [torch.randint(1, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 2)]
REAL = 16  # tokens of them


def make(kind="MixtralForCausalLM", **settings):
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.MixtralConfig(**SMALL | settings)).train()


def options(router):
    """`ssr-l` makes a plan."""
    return {"probability": 1.0, "noise": 0.0} if router == "ssr-l" else {}


def patched(model, router=None):
    """With the router, at step 0; None: the recommended one."""
    handle = sinkroute.patch(model) if router is None else sinkroute.patch(model, router, **options(router))
    sinkroute.set_step(model, 0)
    return handle


class Seen:
    """What the gates of a model returned, and which experts were then called, in each pass.

    Made before the model is patched, or it would see changed choices.
    """

    def __init__(self, model):
        self.logits, self.chosen, self.given = [], [], []
        blocks = [part for part in model.modules() if hasattr(part, "gate") and hasattr(part, "experts")]
        assert blocks
        for block in blocks:
            block.gate.register_forward_hook(self._of_gate)
            block.experts.register_forward_pre_hook(self._of_experts)

    def _of_gate(self, gate, args, outputs):
        self.logits.append(outputs[0].detach())
        self.chosen.append(outputs[2])

    def _of_experts(self, experts, args):
        self.given.append(args[1])

    def loads(self, real_T):
        """By layer, what the experts were given of real tokens."""
        return [counted(given, real_T) for given in self.given]


def counted(experts_TK, real_T):
    return torch.bincount(experts_TK[real_T].flatten(), minlength=EXPERTS).tolist()


def load_balance(logits_TE, experts_TK):
    """E · Σ_j f_j P_j of the Switch Transformer: f the share of choices, P the mean probability."""
    chosen = functional.one_hot(experts_TK, EXPERTS).float().sum((0, 1))
    return EXPERTS * (chosen / chosen.sum() * logits_TE.float().softmax(-1).mean(0)).sum()


def step(model, given):
    """A training pass and its gradients; the loads that a monitor saw, by layer."""
    with sinkroute.LoadMonitor(model) as monitor:
        output = model(**given)
    output.loss.backward()
    return output, [row["load"] for row in monitor.metrics().values()]


# -- batches of several texts ----------------------------------------------------------------------------------------


def padded(side):
    """Inputs, and which of their tokens are real."""
    rows = [(text, 9 - len(text)) for text in TEXTS]
    pad = [(0, n) if side == "right" else (n, 0) for _, n in rows]
    ids, mask = (
        torch.stack([functional.pad(of(text), width) for (text, _), width in zip(rows, pad, strict=True)])
        for of in (lambda text: text, torch.ones_like)
    )
    labels = ids.where(mask.bool(), -100)
    if side == "left":  # as a collator does: nothing is learned from padding
        labels[:, 1:][~mask[:, :-1].bool()] = -100
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "position_ids": positions,
    }, mask.bool().flatten()


def packed():
    """One row of texts one after another, whose positions begin anew."""
    positions = torch.cat([torch.arange(len(text)) for text in TEXTS])
    ids = torch.cat(TEXTS)
    given = {"input_ids": ids, "position_ids": positions, "labels": ids.where(positions > 0, -100)}
    return {name: value[None] for name, value in given.items()}, torch.ones(REAL, dtype=torch.bool)


def flattened():
    """The same by transformers' collator, with cumulative lengths for kernels."""
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    return collator([{"input_ids": text.tolist()} for text in TEXTS]), torch.ones(REAL, dtype=torch.bool)


LAYOUTS = {"left": lambda: padded("left"), "packed": packed, "flattened": flattened}


def trained(router, given, real_T):
    """All that a step leaves that does not depend on the place of padding."""
    model = make()
    seen = Seen(model)
    patched(model, router)
    output, loads = step(model, given)
    assert loads == seen.loads(real_T)
    assert sum(loads[0]) == REAL * TOP_K
    gradient = model.model.layers[0].mlp.gate.weight.grad
    sinkroute.end_step(model)
    return {
        "loads": torch.tensor(loads),
        "logits": output.logits.flatten(0, 1)[real_T],
        "gradient": gradient,
        "gate": model.model.layers[0].mlp.gate.weight.detach(),
    }


@tried(
    "texts of several lengths: padded right or left, packed with `position_ids` that begin anew, "
    "`DataCollatorWithFlattening` with cumulative lengths",
    "the same loads, logits, gradients and moved gate whatever the layout, by `ssr-dual`, `ssr-l` and `load-balance`",
)
@pytest.mark.parametrize("router", [None, "ssr-l", "load-balance"])
def test_what_a_step_leaves_is_that_of_its_real_tokens_in_whatever_layout(router):
    expected = trained(router, *padded("right"))
    for name, layout in LAYOUTS.items():
        found = trained(router, *layout())
        for what, value in expected.items():
            torch.testing.assert_close(found[what], value, rtol=1e-4, atol=1e-5, msg=f"{name}, {what}")


@tried("texts one by one, batches of 1", "one step of three micro-batches counts as one batch of the three texts")
def test_texts_one_by_one_count_as_in_one_batch():
    given, _ = padded("right")
    model, alone = make(), make()
    patched(model)
    patched(alone)
    _, expected = step(model, given)
    loads = torch.zeros(2, EXPERTS, dtype=torch.long)
    for number, text in enumerate(TEXTS):
        sinkroute.set_step(alone, 0, micro_batch=number)
        loads += torch.tensor(step(alone, {"input_ids": text[None], "labels": text[None]})[1])
    assert loads.tolist() == expected


# -- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "MixtralForSequenceClassification"])
def test_a_routers_loss_is_that_of_the_real_tokens_logits_and_reaches_the_gate(kind):
    given, real_T = padded("right")
    if kind.endswith("Classification"):
        given["labels"] = torch.tensor([0, 1, 1])
    gradients = {}
    for router in ("softmax", "load-balance"):
        model = make(kind)
        seen = Seen(model)
        handle = patched(model, router)
        inputs = []
        last = model.model.layers[1].mlp.gate
        last.register_forward_hook(lambda gate, args, _, inputs=inputs: inputs.append(args[0].detach()))
        step(model, given)
        gradients[router] = last.weight.grad
    # By hand: 0.01 times the loss of each layer. That of the last gate is a function of its weight alone.
    losses = [load_balance(seen.logits[n][real_T], seen.chosen[n][real_T]) for n in range(2)]
    assert handle.aux_loss().item() == pytest.approx(0.01 * sum(losses).item(), rel=1e-5)
    weight = last.weight.detach().requires_grad_()
    logits = functional.linear(inputs[0].reshape(-1, SMALL["hidden_size"]), weight)
    (0.01 * load_balance(logits[real_T], seen.chosen[1][real_T])).backward()
    torch.testing.assert_close(gradients["load-balance"] - gradients["softmax"], weight.grad, rtol=1e-3, atol=1e-7)


# -- other heads, other inputs ---------------------------------------------------------------------------------------


@tried(
    "sequence classification, padded (`MixtralForSequenceClassification`)",
    "padding in no load; a router's loss reaches the gate, as it is written out by hand",
)
@pytest.mark.parametrize("router", [None, "ssr-l"])
def test_a_classifier_counts_real_tokens(router):
    given, real_T = padded("right")
    model = make("MixtralForSequenceClassification")
    seen = Seen(model)
    patched(model, router)
    output, loads = step(model, given | {"labels": torch.tensor([0, 1, 1])})
    assert loads == seen.loads(real_T)
    assert sum(loads[0]) == REAL * TOP_K
    assert output.loss.isfinite()


@tried("one token", "counted, finite; the plan of one token is even, so that `ssr-l` gives it the first K experts")
@pytest.mark.parametrize("router", [None, "ssr-l"])
def test_one_token_is_routed(router):
    model = make()
    seen = Seen(model)
    patched(model, router)
    with sinkroute.LoadMonitor(model) as monitor:
        output = model(input_ids=torch.tensor([[3]]))
    output.logits.square().sum().backward()
    sinkroute.end_step(model)
    loads = [row["load"] for row in monitor.metrics().values()]
    assert loads == seen.loads(torch.ones(1, dtype=torch.bool))
    assert [sum(load) for load in loads] == [TOP_K, TOP_K]
    assert all(tensor.isfinite().all() for tensor in (output.logits, *(p.grad for p in model.parameters())))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@tried("131,072 tokens in one pass", "counted to the last; what `ssr-l` chooses by its plan is balanced to 1 %")
@pytest.mark.parametrize("router", ["ssr-dual", "ssr-l"])
def test_131072_tokens_are_routed_in_one_pass(router):
    tokens, draw = 131_072, torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 16, generator=draw) + torch.linspace(-1, 1, 16)  # some are asked for more
    routed = sinkroute.create_router(router, num_experts=16, top_k=2, **options(router))
    routed.train().set_step(0)
    routes = routed(logits)
    assert routes.load.sum() == tokens * 2
    assert routes.load.tolist() == torch.bincount(routes.experts.flatten(), minlength=16).tolist()
    if router == "ssr-l":
        assert routes.load.max() < 1.01 * tokens * 2 / 16
    else:
        assert torch.equal(routes.experts.sort(-1).values, logits.topk(2).indices.sort(-1).values)


@tried(
    "generation with a static cache, left-padded, by a model in `eval()`",
    "tokens are the unpatched model's. The mask of such a pass has four dimensions: a monitor counts padding too",
)
def test_generation_with_a_static_cache_is_the_models_own():
    given, _ = padded("left")
    asked = {name: given[name] for name in ("input_ids", "attention_mask")}
    asked |= {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    model = make().eval()
    expected = model.generate(**asked, cache_implementation="static")
    patched(model)
    counts = {}
    for cache in ("static", "dynamic"):
        with sinkroute.LoadMonitor(model) as monitor:
            assert torch.equal(model.generate(**asked, cache_implementation=cache), expected)
        counts[cache] = next(iter(monitor.metrics("eval").values()))["tokens"]
    # Three rows of which two tokens are given back to the model; the prompt's padding is seen in the dynamic cache.
    assert counts == {"static": 27 + 3 * 2, "dynamic": REAL + 3 * 2}


@tried(
    "encoder and decoder, labels alone (Switch Transformers)",
    "the decoder's padding is read off the labels, as the model makes its inputs of them",
)
def test_a_decoder_that_is_given_labels_alone_counts_what_they_make():
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_heads=2, num_layers=2, num_decoder_layers=2, num_experts=4,
        num_sparse_encoder_layers=2, num_sparse_decoder_layers=2, expert_capacity=64, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).train()
    patched(model)
    given, _ = padded("right")
    labels = torch.tensor([[5, 6, 7, 1], [8, 1, -100, -100], [9, 9, 1, -100]])
    _, loads = step(model, {name: given[name] for name in ("input_ids", "attention_mask")} | {"labels": labels})
    # The decoder is given where it starts and all but the last label: 4, 3 and 4 tokens.
    assert [sum(load) for load in loads] == [REAL, REAL, 11, 11]


def vision_model():
    torch.manual_seed(0)
    config = transformers.Qwen3VLMoeConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "moe_intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "initializer_range": 0.2, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 1, "out_hidden_size": 32, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    return transformers.Qwen3VLMoeForConditionalGeneration(config).train()


def images():
    """Two rows, each with an image of 4 x 4 patches that become 4 tokens; the second is padded by 3."""
    rows = [[5, 62, 60, 60, 60, 60, 63, 7, 8, 9], [62, 60, 60, 60, 60, 63, 7, 0, 0, 0]]
    ids = torch.tensor(rows)
    mask = (ids != 0).long()
    pixels = torch.randn(2 * 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "mm_token_type_ids": (ids == 60).long(),
        "labels": ids.where((ids < 60) & (ids > 0), -100),
    }


@tried(
    "text and images (`Qwen3VLMoeForConditionalGeneration`), padded",
    "image tokens count as all others, padding does not; the model's own loss is off",
)
@pytest.mark.parametrize("router", [None, "ssr-l"])
def test_image_tokens_are_routed_and_counted_as_others(router):
    given = images()
    model = vision_model()
    seen = Seen(model)
    patched(model, router)
    output, loads = step(model, given)
    assert loads == seen.loads(given["attention_mask"].bool().flatten())
    assert [sum(load) for load in loads] == [17 * TOP_K, 17 * TOP_K]
    logits, labels = output.logits[:, :-1].flatten(0, 1), given["labels"][:, 1:].flatten()
    assert output.loss.item() == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-5)
    if router is None:  # a plan is taken as it is: no gradient
        assert model.model.language_model.layers[0].mlp.gate.weight.grad.any()


# -- the page --------------------------------------------------------------------------------------------------------


def test_the_page_tells_what_these_tests_tried():
    from . import test_reports

    assert test_reports.REPORTS >= 10
    text = PAGE.read_text(encoding="utf-8")
    assert text == written(text, told(TRIED)), "run python -m tests.adapters.hf.tried"
