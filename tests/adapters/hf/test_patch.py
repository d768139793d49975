"""`sinkroute.patch` and its handle on real models: Mixtral, DeepSeek-V3, Switch and others, tiny and random."""

import contextlib
import copy
import io
import warnings

import pytest
import torch

import sinkroute
from sinkroute.adapters._fit import has_gate
from sinkroute.routing.attached import named_routers
from sinkroute.routing.registry import RECOMMENDED, router_options

pytest.importorskip("transformers")

import transformers

from .zoo import FAMILIES, recompute

FAMILY = {family.name: family for family in FAMILIES}
QUIET = {"noise": 0.0}
ALL = {name: sinkroute.create_router(name, num_experts=4, top_k=2).eval() for name in sinkroute.list_routers()}
# 2 sequences of 12 tokens; 3 at the end of the second, or at the beginning of the first, are padding.
RIGHT, LEFT = torch.ones(2, 12, dtype=torch.long), torch.ones(2, 12, dtype=torch.long)
RIGHT[1, -3:] = 0
LEFT[0, :3] = 0


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name="mixtral", router=None, **options):
    model = FAMILY[name].build()
    if router is None:
        return model
    handle = sinkroute.patch(model, router, **options)
    sinkroute.set_step(model, 0)
    return model, handle


def text(name="mixtral", **more):
    return FAMILY[name].inputs() | more


def with_labels(name="mixtral"):
    return text(name, labels=text(name)["input_ids"])


def loads(model, *args, **kwargs):
    """(layers, E) of one forward pass in training, as the routers count."""
    with sinkroute.LoadMonitor(model) as monitor:
        output = model(*args, **kwargs)
    return torch.tensor([row["load"] for row in monitor.metrics().values()]), output


# -- the handle ------------------------------------------------------------------------------------------------------


def test_the_handle_shows_what_was_found():
    _, handle = make("deepseek_v3", "ssr-l")
    assert str(handle).splitlines() == [
        "ssr-l in 2 of 2 layers of DeepseekV3ForCausalLM",
        "  2 × model.layers.*.mlp.gate  DeepseekV3TopkRouter  sigmoid, top 2 of 8, renormalised, 1 of 2 groups "
        "(top2-sum), e_score_correction_bias on scores, times 1.5",
    ]
    assert list(handle.scorings) == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert "SSRLinearRouter" in repr(handle)


def test_removing_twice_is_removing_once():
    model, handle = make("mixtral", "ssr-l")
    handle.remove()
    other = sinkroute.patch(model, "softmax")
    handle.remove()
    assert len(named_routers(model)) == 2
    other.remove()
    assert named_routers(model) == {}


def test_a_patched_model_is_not_patched_again():
    model, handle = make("mixtral", "ssr-l")
    with pytest.raises(ValueError, match=r"patched already; call handle\.remove\(\)"):
        sinkroute.patch(model, "ssr-s")
    handle.remove()
    sinkroute.patch(model, "ssr-s")


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_patching_draws_nothing_from_the_global_generator(name):
    model, state = make(name), torch.random.get_rng_state()
    try:
        sinkroute.patch(model, "ssr-l")
    except ValueError:
        assert named_routers(model) == {}
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "option", [{"num_experts": 4}, {"top_k": 1}, {"score": "sigmoid"}, {"norm_topk": False}, {"route_scale": 2.0}]
)
def test_what_the_model_decides_is_no_option(option):
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        sinkroute.patch(make(), "ssr-l", **option)


BIASED = {name: bias.on for name, router in ALL.items() if (bias := router.choice_bias()) is not None}


@pytest.mark.parametrize("router", [name for name, on in BIASED.items() if on == "scores"])
def test_a_router_that_serves_with_a_bias_on_scores_is_refused_where_there_is_none(router):
    model = make()
    with pytest.raises(ValueError, match=f"{router}.*MixtralTopKRouter.*take one of .*ssr-l.*ssr-bias.*ssr-dual"):
        sinkroute.patch(model, router)
    assert named_routers(model) == {}


@pytest.mark.parametrize("router", [name for name, on in BIASED.items() if on == "logits"])
def test_a_bias_on_logits_is_folded_into_the_gate_and_refused_where_another_bias_is_on_scores(router):
    _, handle = make("mixtral", router)
    assert str(handle).splitlines()[0].endswith("; its potentials are folded into the gate")
    options = {"bias_on": "logits"} if "bias_on" in router_options(router) else {}
    with pytest.raises(ValueError, match=r"a bias on logits, and MiniMaxM2TopKRouter adds e_score.* scores"):
        make("minimax_m2", router, **options)


def test_without_a_name_the_recommended_router_is_taken_and_says_where_its_potentials_are():
    for name, place in (("gpt_oss", "folded into the gate"), ("minimax_m2", "in e_score_correction_bias")):
        handle = sinkroute.patch(make(name))
        assert str(handle).startswith("ssr-dual in 2 of 2 layers of ") and handle.router == RECOMMENDED
        assert str(handle).splitlines()[0].endswith(f"; its potentials are {place}")


@pytest.mark.parametrize("router", [name for name, router in ALL.items() if has_gate(router)])
def test_a_router_that_brings_a_gate_is_refused(router):
    with pytest.raises(ValueError, match=f"{router}' brings a gate, and MixtralTopKRouter"):
        sinkroute.patch(make(), router)


def test_learned_noise_would_be_a_new_parameter_and_is_refused():
    with pytest.raises(ValueError, match=r"learned.* parameter.*give noise as a number"):
        sinkroute.patch(make(), "ssr-l", noise="learned")


def test_an_unknown_router_is_answered_with_names():
    with pytest.raises(ValueError, match="ssr-l"):
        sinkroute.patch(make(), "ssr-ll")


def test_an_error_at_a_later_layer_leaves_no_layer_patched():
    model = make("deepseek_v3")
    model.model.layers[1].mlp.gate = make("deepseek_v2").model.layers[1].mlp.gate  # it has no bias to train
    with pytest.raises(ValueError, match="DeepseekV2TopkRouter"):
        sinkroute.patch(model, "loss-free")
    assert named_routers(model) == {}
    assert all(not part._forward_hooks for part in model.modules())
    sinkroute.patch(model, "ssr-l")


def test_layers_of_several_rules_are_each_routed_by_its_own():
    model = make("deepseek_v3")
    model.model.layers[1].mlp.gate = make("deepseek_v2").model.layers[1].mlp.gate
    handle = sinkroute.patch(model, "ssr-l")
    assert [str(rule).partition(",")[0] for rule in handle.scorings.values()] == ["sigmoid", "softmax"]


def test_the_plan_is_used_in_eval_where_that_is_asked_for_and_masked_there_too():
    model, _ = make("mixtral", "ssr-l", **QUIET)
    plain = model.eval()(**text()).logits
    sinkroute.set_inference(model, "sinkhorn")
    assert not torch.equal(model(**text()).logits, plain)
    with sinkroute.LoadMonitor(model) as monitor:
        model(**text(attention_mask=RIGHT))
    assert {sum(row["load"]) for row in monitor.metrics(mode="eval").values()} == {2 * 21}
    sinkroute.set_inference(model, "none")
    assert torch.equal(model(**text()).logits, plain)


def test_state_goes_around_by_the_handle_and_is_in_no_checkpoint():
    model, handle = make("mixtral", "ssr-l", probability="adaptive(high=0.5, low=0.2, floor=0.0, ceiling=1.0)")
    for step in range(3):
        sinkroute.set_step(model, step)
        model(**text())
    sinkroute.end_step(model)
    state = {name: value.clone() for name, value in handle.state_dict().items()}
    assert any("max_vio" in name for name in state) and not any("rout" in name for name in model.state_dict())
    _, other = make("mixtral", "ssr-l", probability="adaptive(high=0.5, low=0.2, floor=0.0, ceiling=1.0)")
    assert not torch.equal(other.state_dict()["routers.0.state.max_vio"], state["routers.0.state.max_vio"])
    other.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


# -- the model's own bias --------------------------------------------------------------------------------------------


def test_loss_free_balancing_moves_the_models_own_bias_and_eval_uses_it():
    model, _ = make("deepseek_v3", "loss-free", update_rate=0.5)
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]
    before = [bias_E.clone() for bias_E in biases]
    answer = model.eval()(**text("deepseek_v3")).logits
    load_LE, _ = loads(model.train(), **text("deepseek_v3"))
    sinkroute.end_step(model)
    for bias_E, old_E, load_E in zip(biases, before, load_LE, strict=True):
        # 48 choices among 8 experts: 6 each.
        torch.testing.assert_close(bias_E, old_E + 0.5 * torch.sign(6.0 - load_E))
    moved = make("deepseek_v3")
    for layer, bias_E in zip(moved.model.layers, biases, strict=True):
        layer.mlp.gate.e_score_correction_bias.copy_(bias_E)
    now = model.eval()(**text("deepseek_v3")).logits
    assert torch.equal(now, moved.eval()(**text("deepseek_v3")).logits)
    assert not torch.equal(now, answer)


def test_a_new_router_that_keeps_a_bias_moves_the_models_own_without_an_edit_here(newcomer):
    model, handle = make("minimax_m2", newcomer)
    loads(model, **text("minimax_m2"))
    sinkroute.end_step(model)
    twin = make("minimax_m2")
    for ours, theirs, router in zip(model.model.layers, twin.model.layers, handle.routers.values(), strict=True):
        assert router.state.bias_E.any()
        assert torch.equal(ours.mlp.e_score_correction_bias, router.state.bias_E)
        theirs.mlp.e_score_correction_bias.copy_(router.state.bias_E)
    assert torch.equal(model.eval()(**text("minimax_m2")).logits, twin.eval()(**text("minimax_m2")).logits)
    with pytest.raises(ValueError, match=f"{newcomer}.* serves with a bias on scores, which MixtralTopKRouter"):
        make("mixtral", newcomer)


def test_quantile_balancing_is_taken_where_it_adds_to_scores_as_the_model_does():
    with pytest.raises(
        ValueError, match="a bias on logits, and MiniMaxM2TopKRouter adds e_score_correction_bias to scores"
    ):
        make("minimax_m2", "quantile")
    model, _ = make("minimax_m2", "quantile", scope="batch")
    before = served(model, "minimax_m2")
    loads(model.train(), **text("minimax_m2"))
    sinkroute.end_step(model)
    assert sum(served(model, "minimax_m2")) < 0.5 * sum(before)


def test_a_bias_that_is_loaded_later_is_the_one_that_is_moved():
    model, _ = make("deepseek_v3", "loss-free", update_rate=0.5)
    state = {name: value + 5 * ("correction" in name) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    model(**text("deepseek_v3"))
    sinkroute.end_step(model)
    moved_E = model.model.layers[0].mlp.gate.e_score_correction_bias
    assert (moved_E - state["model.layers.0.mlp.gate.e_score_correction_bias"]).abs().max() <= 0.51


def test_in_bf16_updates_too_small_for_it_add_up():
    model = make("deepseek_v3").bfloat16()
    bias_E = model.model.layers[0].mlp.gate.e_score_correction_bias.fill_(1.0)
    handle = sinkroute.patch(model, "loss-free", update_rate=0.001)
    for step in range(12):  # above 1, bf16 tells apart 1 and 1.0078
        sinkroute.set_step(model, step)
        load_LE, _ = loads(model, **text("deepseek_v3"))
        if step == 0:
            never_E = load_LE[0] == load_LE[0].min()
    sinkroute.end_step(model)
    assert (bias_E[never_E] > 1).all()
    torch.testing.assert_close(handle.state_dict()["routers.0.state.bias_E"][never_E], torch.full((1,), 1.012))


@pytest.mark.parametrize("router", ["ssr-l", "loss-free"])
@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_copies_of_a_patched_model_are_patched_and_apart_from_it(router, how):
    model, handle = make("deepseek_v3", router)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = named_routers(copied)
    assert len(theirs) == 2 and not any(router in named_routers(model).values() for router in theirs.values())
    sinkroute.set_step(copied, 0)
    copied(**text("deepseek_v3")).logits.sum().backward()
    sinkroute.end_step(copied)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert torch.equal(copied.state_dict()[name], before[name]) == (router == "ssr-l")
    handle.remove()
    assert named_routers(model) == {} and len(named_routers(copied)) == 2


# -- padding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [RIGHT, LEFT, RIGHT.bool(), RIGHT.float()], ids=["right", "left", "bool", "float"])
def test_padding_is_in_no_load(mask):
    model, _ = make("mixtral", "ssr-l", probability=1.0)
    load_LE, _ = loads(model, **text(attention_mask=mask))
    assert load_LE.sum(1).tolist() == [2 * 21] * 2


def test_a_mask_by_position_is_seen():
    model, _ = make("mixtral", "ssr-l", probability=1.0)
    load_LE, _ = loads(model, text()["input_ids"], RIGHT)
    assert load_LE.sum(1).tolist() == [2 * 21] * 2


@pytest.mark.parametrize("mask", [None, torch.ones(2, 12)], ids=["none", "ones"])
def test_without_padding_every_token_counts_and_nothing_else_changes(mask):
    model, _ = make("mixtral", "ssr-l", probability=1.0)
    load_LE, output = loads(model, **text(attention_mask=mask))
    assert load_LE.sum(1).tolist() == [2 * 24] * 2
    sinkroute.set_step(model, 0)
    assert torch.equal(output.logits, model(**text()).logits)


def test_a_mask_of_one_pass_is_not_that_of_the_next():
    model, _ = make("mixtral", "ssr-l", probability=1.0)
    model(**text(attention_mask=RIGHT))
    load_LE, _ = loads(model, **text())
    assert load_LE.sum(1).tolist() == [2 * 24] * 2


@pytest.mark.parametrize("router", ["ssr-l", "load-balance"])
def test_what_padding_holds_reaches_no_plan_and_no_loss(router):
    options = {"probability": 1.0, **QUIET} if router == "ssr-l" else {}
    results = []
    for garbage in (3, 40):
        model, _ = make("mixtral", router, **options)
        tokens = text()["input_ids"].masked_fill(RIGHT == 0, garbage)
        labels = tokens.masked_fill(RIGHT == 0, -100)
        output = model(input_ids=tokens, attention_mask=RIGHT, labels=labels)
        output.loss.backward()
        results.append((output.logits[RIGHT == 1], output.loss, model.model.layers[0].mlp.gate.weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-7)


def test_a_mask_of_four_dimensions_says_nothing_about_tokens():
    model, _ = make("mixtral", "ssr-l", probability=1.0)
    causal = torch.zeros(2, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1).bool(), torch.finfo(torch.float32).min)
    load_LE, _ = loads(model, **text(attention_mask=causal))
    assert load_LE.sum(1).tolist() == [2 * 24] * 2


def test_a_mask_that_covers_what_is_cached_is_left_out():
    model, _ = make("mixtral", "ssr-l", probability=1.0)
    cache = model(**text(), use_cache=True).past_key_values
    with sinkroute.LoadMonitor(model) as monitor:
        model(**text(attention_mask=torch.cat([RIGHT, RIGHT], 1), past_key_values=cache))
    assert {sum(row["load"]) for row in monitor.metrics().values()} == {2 * 24}


@pytest.mark.parametrize("decoder", [None, torch.ones_like(LEFT), LEFT], ids=["none", "ones", "left"])
def test_encoder_and_decoder_have_masks_of_their_own(decoder):
    model, _ = make("switch_transformers", "softmax")
    load_LE, _ = loads(model, **text("switch_transformers"), attention_mask=RIGHT, decoder_attention_mask=decoder)
    of_decoder = 24 if decoder is None else int(decoder.sum())
    assert load_LE.sum(1).tolist() == [21, 21, of_decoder, of_decoder]


# -- losses ----------------------------------------------------------------------------------------------------------


def balance(logits_TE, experts_TK, mask_T=None):
    """E Σ f P by hand."""
    mask_T = torch.ones(len(logits_TE), dtype=torch.bool) if mask_T is None else mask_T
    experts = logits_TE.shape[1]
    f_E = experts_TK[mask_T].flatten().bincount(minlength=experts) / experts_TK[mask_T].numel()
    return experts * (f_E * logits_TE[mask_T].float().softmax(-1).mean(0)).sum()


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["whole", "padded"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_a_routers_loss_is_shown_in_the_models_on_request(mask, return_dict):
    seen = []
    given = with_labels() | {"attention_mask": mask}
    if mask is not None:
        given["labels"] = given["labels"].masked_fill(mask == 0, -100)
    plain = make()
    for layer in plain.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, output: seen.append(output))
    expected = plain(**given).loss
    rows = None if mask is None else mask.flatten() == 1
    by_hand = sum(0.5 * balance(logits_TE, experts_TK, rows) for logits_TE, _, experts_TK in seen)
    for show in (False, True):
        model, handle = make("mixtral", "load-balance", coefficient=0.5, show_aux_loss=show)
        output = model(**given, return_dict=return_dict)
        loss = output.loss if return_dict else output[0]
        torch.testing.assert_close(handle.aux_loss(), by_hand.detach())
        torch.testing.assert_close(loss, expected + by_hand if show else expected)


def test_a_router_without_a_loss_leaves_the_models():
    model, handle = make("mixtral", "ssr-l", probability=0.0, **QUIET)
    assert torch.equal(model(**with_labels()).loss, make()(**with_labels()).loss)
    assert handle.aux_loss() is None


@pytest.mark.parametrize("router", ["ssr-l", "load-balance"])
def test_losses_do_not_pile_up_over_passes(router):
    model, handle = make("mixtral", router)
    first = model(**with_labels()) and handle.aux_loss()
    model(**with_labels())
    second = handle.aux_loss()
    assert (first is None and second is None) or torch.equal(first, second)
    model.eval()(**with_labels())  # the last training pass is still the last
    assert (handle.aux_loss() is None) == (second is None)


WITH_A_LOSS = ["mixtral", "olmoe", "qwen3_moe", "gpt_oss", "jetmoe", "granitemoe", "phimoe", "minimax_m2"]


@pytest.mark.parametrize("name", WITH_A_LOSS)
def test_the_models_own_balancing_loss_is_off_while_it_is_patched(name):
    def loss(model):
        torch.manual_seed(0)
        return model(**with_labels(name), output_router_logits=True).loss

    model = make(name)
    torch.manual_seed(0)
    without = model(**with_labels(name), output_router_logits=False).loss
    own = loss(model)
    assert not torch.equal(own, without)
    handle = sinkroute.patch(model, "ssr-l", probability=0.0, **QUIET)
    sinkroute.set_step(model, 0)
    assert list(handle.switched_off) and torch.equal(loss(model), without)
    handle.remove()
    assert torch.equal(loss(model), own)
    handle = sinkroute.patch(model, "ssr-l", probability=0.0, keep_aux_loss=True, **QUIET)
    sinkroute.set_step(model, 0)
    assert handle.switched_off == {} and torch.equal(loss(model), own)
    handle.remove()
    assert sinkroute.patch(model, "softmax").switched_off == {} and torch.equal(loss(model), own)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_configuration_is_never_changed(family):
    model = family.build()
    before = model.config.to_dict()
    with contextlib.suppress(ValueError):
        sinkroute.patch(model, "ssr-l")
    assert model.config.to_dict() == before
    sinkroute.set_step(model, 0)
    model(**family.inputs())
    assert model.config.to_dict() == before


def test_that_it_is_off_is_said_where_the_model_would_compute_it():
    model = make()
    model.config.output_router_logits = True
    with pytest.warns(UserWarning, match=r"MixtralForCausalLM's own balancing loss .* is switched off .*keep_aux_loss"):
        sinkroute.patch(model, "ssr-l").remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkroute.patch(model, "ssr-l", keep_aux_loss=True).remove()
        model.config.output_router_logits = False
        sinkroute.patch(model, "ssr-l").remove()


# DBRX gets our choice by logits, which are then what is recorded.
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "llama4", "jetmoe", "longcat_flash"])
@pytest.mark.parametrize("called_before", [True, False])
def test_recording_of_router_logits_goes_on(name, called_before):
    def record(model):
        return model.train()(**text(name), output_router_logits=True).router_logits

    expected = record(make(name))
    model = make(name)
    if called_before:
        record(model)
    handle = sinkroute.patch(model, "ssr-l", probability=1.0, **QUIET)
    sinkroute.set_step(model, 0)
    patched = record(model)
    assert len(patched) == len(expected)
    assert torch.equal(_first(patched[0]), _first(expected[0]))  # before the first layer of experts all is alike
    assert not torch.equal(_first(patched[-1]), _first(expected[-1]))
    handle.remove()
    assert all(torch.equal(_first(one), _first(other)) for one, other in zip(record(model), expected, strict=True))


def _first(recorded):
    return recorded[0] if isinstance(recorded, (tuple, list)) else recorded


def test_what_is_counted_between_sinkhorn_steps_is_what_the_model_chose():
    # Phimoe draws its experts in training: no top k of ours would know them.
    model, _ = make("phimoe", "ssr-l", probability=0.0, **QUIET)
    chosen = []
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda _, args: chosen.append(args[1]))
    torch.manual_seed(0)
    load_LE, _ = loads(model, **text("phimoe"))
    assert load_LE.tolist() == [experts_TK.flatten().bincount(minlength=8).tolist() for experts_TK in chosen]


# -- what cannot be --------------------------------------------------------------------------------------------------


def test_a_model_without_experts_is_refused():
    config = transformers.LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=2, num_attention_heads=1)
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no mixture of experts"):
        sinkroute.patch(transformers.LlamaForCausalLM(config), "ssr-l")


def test_routers_that_are_bypassed_are_noticed():
    model, _ = make("mixtral", "ssr-l")
    for layer in model.model.layers:
        layer.mlp.forward = lambda hidden: hidden
    with pytest.raises(RuntimeError, match="without calling any of the 2 patched routers"):
        model(**text())
    model.eval()(**text())


def test_mxfp4_experts_are_refused():
    class Mxfp4GptOssExperts(torch.nn.Module):
        pass

    model = make("gpt_oss")
    model.model.layers[0].mlp.experts = Mxfp4GptOssExperts()
    with pytest.raises(ValueError, match=r"mxfp4 experts.*Mxfp4Config\(dequantize=True\)"):
        sinkroute.patch(model, "ssr-l")


def test_mxfp4_is_refused_by_the_configuration_too():
    model = make("gpt_oss")
    model.config.quantization_config = transformers.Mxfp4Config()
    with pytest.raises(ValueError, match="mxfp4 experts"):
        sinkroute.patch(model, "ssr-l")


def test_hub_kernels_are_refused():
    model = make("gpt_oss")
    model._use_kernels = True  # as model.use_kernels = True leaves it, where the kernels are installed
    with pytest.raises(ValueError, match="use_kernels=False"):
        sinkroute.patch(model, "ssr-l")


# -- training --------------------------------------------------------------------------------------------------------


def test_a_skewed_gate_is_balanced_by_training_with_plans():
    def train(router, **options):
        model = make()
        with torch.no_grad():  # the mean token wants the first two experts
            direction_D = model.model.embed_tokens.weight.mean(0)
            model.model.embed_tokens.weight.add_(direction_D)
        sinkroute.patch(model, router, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        worst = []
        for step in range(4):
            sinkroute.set_step(model, step)
            with sinkroute.LoadMonitor(model) as monitor:
                model(**with_labels()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            worst.append(max(row["max_vio"] for row in monitor.metrics().values()))
        return worst

    assert max(train("ssr-l", probability=1.0, **QUIET)) <= 0.67 < min(train("softmax"))


# -- what a router leaves in the model -------------------------------------------------------------------------------


def skewed_fold(name, steps=6, **options):
    """A model whose gates are skewed along their mean input, trained by plans alone, and MaxVio of eval() before it."""
    model = FAMILY[name].build()
    seen = []
    gates = [part for path, part in model.named_modules() if path.endswith(("mlp.gate", "mlp.router"))]
    hooks = [gate.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for gate in gates]
    with torch.no_grad():
        model.eval()(**text(name))
        for gate, x in zip(gates, seen, strict=True):
            mean_D = x.flatten(0, -2).mean(0)
            gate.weight += torch.outer(torch.linspace(0, 4, len(gate.weight)), mean_D / mean_D.square().sum())
    for hook in hooks:
        hook.remove()
    handle = sinkroute.patch(model, "ssr-fold", probability=1, noise=0, balance="load", **options)
    before = served(model, name)
    model.train()
    for step in range(steps):
        sinkroute.set_step(model, step)
        model(**text(name))
    sinkroute.end_step(model)
    return model, handle, before


def served(model, name):
    with sinkroute.LoadMonitor(model) as monitor, torch.no_grad():
        model.eval()(**text(name))
    return [row["max_vio"] for row in monitor.metrics("eval").values()]


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "gpt_oss"])
def test_ssr_fold_balances_the_gate_that_serves_and_leaves_nothing_else(name):
    model, handle, before = skewed_fold(name)
    names = set(model.state_dict())
    handle.remove()
    sinkroute.patch(model, "softmax")  # to count
    after = served(model, name)
    assert max(before) > 1 and sum(after) < 0.6 * sum(before)
    assert names == set(make(name).state_dict())


def test_ssr_fold_is_refused_where_a_correction_bias_would_undo_it():
    with pytest.raises(ValueError, match="chooses by e_score_correction_bias, too, which would undo it; take ssr-dual"):
        make("minimax_m3_vl", "ssr-fold")


def test_ssr_fold_is_refused_for_a_frozen_gate():
    model = make()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"moves weight of model\.layers\.0\.mlp\.gate .* which is frozen"):
        sinkroute.patch(model, "ssr-fold")


def test_ssr_bias_keeps_what_a_plan_found_where_the_model_serves_from():
    model, _ = make("minimax_m2", "ssr-bias", probability=1, noise=0, balance="load")
    before = served(model, "minimax_m2")
    model.train()
    for step in range(3):
        sinkroute.set_step(model, step)
        model(**text("minimax_m2"))
    sinkroute.end_step(model)
    after = served(model, "minimax_m2")
    assert sum(after) < 0.5 * sum(before)
    assert model.model.layers[0].mlp.e_score_correction_bias.abs().max() > 0


def test_what_a_handle_loads_is_in_the_model_too():
    model, handle = make("deepseek_v3", "loss-free", update_rate=0.5)
    model.train()(**text("deepseek_v3"))
    sinkroute.end_step(model)
    saved = handle.state_dict()
    other, fresh = make("deepseek_v3", "loss-free", update_rate=0.5)
    fresh.load_state_dict(saved)
    for ours, theirs in zip(other.model.layers, model.model.layers, strict=True):
        assert torch.equal(ours.mlp.gate.e_score_correction_bias, theirs.mlp.gate.e_score_correction_bias)


# -- in evaluation, and in copies -------------------------------------------------------------------------------------


def test_the_loss_in_evaluation_is_the_models_own_with_its_balancing_loss():
    model = make()
    model.router_aux_loss_coef = 0.5
    expected = model.eval()(**with_labels(), output_router_logits=True).loss
    handle = sinkroute.patch(model, "ssr-l")
    assert torch.equal(model(**with_labels(), output_router_logits=True).loss, expected)
    trained = model.train()(**with_labels(), output_router_logits=True)
    assert trained.loss < expected - 0.5  # the balancing loss is about 2 before its coefficient
    assert handle.switched_off == {"router_aux_loss_coef": 0.5} and model.router_aux_loss_coef == 0.5


def test_a_coefficient_is_back_after_a_pass_that_failed():
    model, _ = make("mixtral", "ssr-l")
    before = model.router_aux_loss_coef
    with pytest.raises(IndexError):
        model.train()(input_ids=torch.full((1, 4), 10**6))
    assert model.router_aux_loss_coef == before > 0


def test_a_copy_can_be_made_after_a_pass_with_losses():
    model, _ = make("mixtral", "load-balance")
    model.train()(**with_labels()).loss.backward()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**with_labels()).loss, model(**with_labels()).loss)


def test_mixtures_that_are_in_eval_in_a_model_that_trains_are_left_alone():
    model, _ = make("mixtral", "ssr-l", probability=1)
    expected = make().eval()(**with_labels()).loss
    model.train()
    for layer in model.model.layers:
        layer.mlp.eval()
    assert torch.equal(model(**with_labels()).loss, expected)


def test_an_evaluation_before_the_backward_pass_does_not_take_the_masks_of_the_training():
    gradients = []
    for evaluated in (False, True):
        model, _ = make("mixtral", "ssr-l", probability=1, noise=0)
        recompute(model)
        loss = model.train()(**with_labels(), attention_mask=RIGHT).loss
        if evaluated:
            with sinkroute.LoadMonitor(model), torch.no_grad():
                model.eval()(**text(), attention_mask=LEFT)
            model.train()
        loss.backward()
        gradients.append(model.model.layers[0].mlp.experts.gate_up_proj.grad)
    assert torch.equal(*gradients)


# -- what is changed after the patch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"probability": 0.0}, {"probability": 0.0, "noise": 0.1}, {"probability": 1.0}])
@pytest.mark.parametrize(
    ("name", "setting", "value", "was"),
    [
        ("mixtral", "top_k", 3, "top 2 of 8"),
        ("deepseek_v3", "routed_scaling_factor", 2.5, "times 1.5"),
        ("deepseek_v3", "norm_topk_prob", False, "renormalised"),
        ("olmoe", "norm_topk_prob", True, "top 2 of 8"),
    ],
)
def test_a_rule_that_is_changed_after_the_patch_is_refused_in_every_training_pass(name, setting, value, was, options):
    model, _ = make(name, "ssr-l", **QUIET | options)
    gate = model.model.layers[-1].mlp.gate
    before = getattr(gate, setting)
    model(**text(name))
    setattr(gate, setting, value)
    told = rf"{setting} was {before} and is {value}\. .*{was}.*set it back.*handle\.remove\(\)"
    for called in (model, model.model):
        with pytest.raises(ValueError, match=told):
            called(**text(name))
    setattr(gate, setting, before)
    model(**text(name))


def test_a_setting_that_the_router_reads_off_the_configuration_is_watched_there():
    model, _ = make("gemma4", "ssr-l", **QUIET)
    config = next(part.config for part in model.modules() if type(part).__name__ == "Gemma4TextRouter")
    config.top_k_experts = 3
    with pytest.raises(ValueError, match="top_k_experts was 2 and is 3"):
        model(**text("gemma4"))


def test_evaluation_and_a_new_patch_go_by_the_changed_rule():
    model, handle = make("mixtral", "ssr-l", **QUIET)
    plain = make()
    for changed in (model, plain):
        for layer in changed.model.layers:
            layer.mlp.gate.top_k = 3
    with sinkroute.LoadMonitor(model) as monitor:
        served = model.eval()(**text()).logits
    assert torch.equal(served, plain.eval()(**text()).logits)
    assert [sum(row["load"]) for row in monitor.metrics("eval").values()] == [3 * 24] * 2
    handle.remove()
    sinkroute.patch(model.train(), "ssr-l", probability=1.0, **QUIET)
    sinkroute.set_step(model, 0)
    assert (loads(model, **text())[0].sum(-1) == 3 * 24).all()


@pytest.mark.parametrize(
    ("name", "setting", "value"), [("ernie4_5_moe", "norm_min", 1e-11), ("phimoe", "router_jitter_noise", 0.0)]
)
def test_a_change_that_leaves_the_rule_as_it_was_is_no_matter(name, setting, value):
    model, handle = make(name, "ssr-l", probability=1.0, **QUIET)
    for path in handle.routers:
        gate = model.get_submodule(path)
        assert getattr(gate, setting) != value
        setattr(gate, setting, value)
    for _ in range(2):
        model(**text(name))


def test_a_copy_is_refused_by_its_own_settings():
    model, _ = make("mixtral", "ssr-l", **QUIET)
    twin = copy.deepcopy(model)
    twin.model.layers[0].mlp.gate.top_k = 1
    model(**text())
    with pytest.raises(ValueError, match="top_k was 2 and is 1"):
        twin(**text())


# -- a loss of the height of logits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma4", "diffusion_gemma"])
@pytest.mark.parametrize(("router", "options"), [("z-loss", {}), ("ssr-l", {"losses": "z-loss: 0.01, load-balance"})])
def test_a_z_loss_of_probabilities_is_refused(name, router, options):
    model = make(name)
    with pytest.raises(ValueError, match=r"has a z-loss.*returns probabilities.*leave z-loss out"):
        sinkroute.patch(model, router, **options)
    assert named_routers(model) == {}
    sinkroute.patch(model, "ssr-l", losses="load-balance")


def test_a_z_loss_of_logits_reaches_the_gate():
    model, handle = make("mixtral", "z-loss", coefficient=1.0)
    gate = model.model.layers[0].mlp.gate
    seen = []
    gate.register_forward_hook(lambda gate, args, outputs: seen.append(outputs[0].detach()))
    (0 * model.train()(**text()).logits.sum()).backward()
    assert gate.weight.grad.abs().max() > 0
    assert handle.routers["model.layers.0.mlp.gate"].losses == {"z-loss": 1.0}
    assert seen[0].logsumexp(-1).square().mean() > 0.01
