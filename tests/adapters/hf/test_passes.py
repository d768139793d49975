"""Which pass of a model a router is called in: its padding, its repetition, and whether it is one of the training."""

import copy
import threading
import warnings

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import sinkroute
from sinkroute.adapters.hf.model_pass import Call, ModelPass

from .zoo import FAMILIES, recompute

FAMILY = {family.name: family for family in FAMILIES}
IDS = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
MASK, OTHER = torch.ones_like(IDS), torch.ones_like(IDS)
MASK[1, 6:] = 0
OTHER[0, 2:] = 0
BALANCE = {"losses": {"load-balance": 5.0}}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixtral(layers=2):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    return transformers.MixtralForCausalLM(config).train()


def patched(router="ssr-l", layers=2, **options):
    model = mixtral(layers)
    if router == "ssr-l":
        options = {"probability": 1.0, "noise": 0.0} | options
    handle = sinkroute.patch(model, router, **options)
    sinkroute.set_step(model, 0)
    return model, handle


def tokens(called, *args, mode="train", **kwargs):
    """What each router counts in a pass."""
    with sinkroute.LoadMonitor(called) as monitor:
        called(*args, **kwargs)
    return [row["tokens"] for row in monitor.metrics(mode).values()]


def change_mask(module, mask):
    """Have the module called with another mask than its caller gives."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"attention_mask": mask}), with_kwargs=True, prepend=True
    )


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6, msg=name)


# -- whose mask ------------------------------------------------------------------------------------------------------


def test_a_mask_is_gone_when_its_pass_is():
    model, _ = patched()
    before = model.model(IDS).last_hidden_state
    model(input_ids=IDS, attention_mask=MASK)
    assert torch.equal(model.model(IDS).last_hidden_state, before)


def test_the_backbones_mask_is_seen_where_it_is_called_directly():
    model, _ = patched()
    assert tokens(model.model, IDS, MASK) == [30, 30]
    assert tokens(model, input_ids=IDS, attention_mask=MASK) == [30, 30]


def test_a_call_inside_with_a_mask_of_its_own_goes_by_that():
    model, _ = patched()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=OTHER)

    assert tokens(Outer(), IDS, MASK) == [26, 26]
    change_mask(model.model, OTHER)
    assert tokens(model, input_ids=IDS, attention_mask=MASK) == [26, 26]


def test_a_mask_that_the_model_turns_into_another_form_is_that_of_the_call_outside():
    model, _ = patched()
    change_mask(model.model, torch.zeros(3, 1, 12, 12))
    assert tokens(model, input_ids=IDS, attention_mask=MASK) == [30, 30]


@pytest.mark.parametrize("patched_first", [True, False])
def test_masks_are_seen_in_a_model_that_adapters_were_merged_into(patched_first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    if patched_first:
        model = peft.get_peft_model(patched("load-balance")[0], config)
    else:
        model = peft.get_peft_model(mixtral(), config)
        sinkroute.patch(model, "load-balance")
    merged = model.merge_and_unload().train()
    sinkroute.set_step(merged, 0)
    assert tokens(merged, input_ids=IDS, attention_mask=MASK) == [30, 30]


@pytest.mark.parametrize("patched_first", [True, False])
def test_the_mask_of_a_model_with_a_prompt_before_its_tokens_covers_that_prompt(patched_first):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = mixtral()
    if patched_first:
        sinkroute.patch(model, "softmax")
    model = peft.get_peft_model(model, config).train()
    if not patched_first:
        sinkroute.patch(model, "softmax")
    assert tokens(model, IDS, MASK) == [36, 36]  # 30 real tokens, and 2 of the prompt in each of 3 rows


def test_a_pass_that_fails_or_is_interrupted_leaves_nothing_to_the_next():
    for error in (ValueError, KeyboardInterrupt):
        model, _ = patched()

        def fail(module, args, error=error):
            raise error

        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(input_ids=IDS, attention_mask=MASK)
        hook.remove()
        for called in (model.model, model):
            assert tokens(called, input_ids=IDS) == [36, 36]


def test_threads_are_in_passes_of_their_own():
    model, _ = patched("softmax")
    counts, inside, done = [], threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            done.wait(20)

    model.model.layers[0].register_forward_pre_hook(wait)
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: None)
    other = threading.Thread(target=lambda: model(input_ids=IDS, attention_mask=MASK))
    other.start()
    inside.wait(20)
    counts += tokens(model, input_ids=IDS, attention_mask=OTHER)
    done.set()
    other.join()
    assert counts == [26, 26]


def test_a_replica_of_data_parallel_is_refused_by_name():
    model, _ = patched()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"replica of nn\.DataParallel.*DistributedDataParallel"):
        replica(IDS)
    assert tokens(nn.DataParallel(model), input_ids=IDS, attention_mask=MASK) == [30, 30]  # one device: no replica


def test_a_router_outside_any_pass_counts_all_tokens_and_says_so_once():
    model, _ = patched("softmax")
    model(input_ids=IDS, attention_mask=MASK)
    hidden = torch.randn(3, 12, 32)
    with pytest.warns(UserWarning, match=r"model\.layers\.0\.mlp\.gate was called outside a pass .* all of them count"):
        assert tokens(model.model.layers[0].mlp, hidden) == [36]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens(model.model.layers[1].mlp, hidden) == [36]


def test_a_mask_comes_to_the_device_of_the_logits():
    with FakeTensorMode():
        passes = ModelPass()
        call = Call(passes, passes, {"attention_mask": torch.ones(6, dtype=torch.bool)}, False, True)
        passes.enter(call)
        found = passes.token_mask(torch.empty(6, 4, device="cuda"), False)
        assert passes.leave(passes)
    assert found.device.type == "cuda"


# -- encoders and decoders -------------------------------------------------------------------------------------------


def test_a_decoders_mask_is_made_of_labels_as_its_inputs_are():
    model = FAMILY["switch_transformers"].build().train()
    model.config.decoder_start_token_id = 0
    sinkroute.patch(model, "softmax")
    ids = torch.randint(1, 64, (2, 12))
    labels = ids.clone()
    labels[0, 8:], labels[1, 3:] = -100, -100
    # The decoder is given where it starts, then all labels but the last: 1 + 8 and 1 + 3 tokens.
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    assert tokens(model, input_ids=ids, attention_mask=mask, labels=labels) == [22, 22, 13, 13]
    inputs = torch.ones(2, 12, dtype=torch.long)
    of_all = tokens(model, input_ids=ids, attention_mask=mask, labels=labels, decoder_input_ids=inputs)
    assert of_all == [22, 22, 24, 24]


# -- repetitions -----------------------------------------------------------------------------------------------------


def two_passes(checkpointed, order, router="ssr-l", **options):
    """Gradients of two padded passes, then a pass without gradients and one in eval()."""
    model, _ = patched(router, **options)
    if router != "ssr-l":
        sinkroute.set_step(model, 0, micro_batches=2)
    if checkpointed is not None:
        recompute(model, checkpointed)
    losses = [
        factor * model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        for factor, ids, mask in ((1.0, IDS, MASK), (3.0, IDS.flip(1), OTHER))
    ]
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=OTHER)
        model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS).triu())
    model.train()
    if order == "together":
        sum(losses).backward()
    else:
        for loss in losses if order == "first" else losses[::-1]:
            loss.backward()
    return gradients(model)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("order", ["together", "first", "last"])
@pytest.mark.parametrize(("router", "options"), [("ssr-l", {}), ("load-balance", BALANCE)])
def test_a_repetition_has_the_mask_of_the_pass_that_it_repeats(use_reentrant, order, router, options):
    expected = two_passes(None, order, router, **options)
    assert_close(two_passes(use_reentrant, order, router, **options), expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_model_as_a_whole_may_be_repeated(use_reentrant):
    results = []
    for checkpointed in (False, True):
        model, handle = patched("load-balance", **BALANCE)
        embedded = model.model.embed_tokens(IDS)

        def logits(embedded, model=model):
            return model(inputs_embeds=embedded, attention_mask=MASK).logits

        with sinkroute.LoadMonitor(model) as monitor:
            found = checkpoint(logits, embedded, use_reentrant=use_reentrant) if checkpointed else logits(embedded)
            found.square().sum().backward()
        results.append(gradients(model) | {"loss": handle.aux_loss()})
        assert [row["tokens"] for row in monitor.metrics().values()] == [30, 30]
    assert_close(results[1], results[0])


# -- compiled regions ------------------------------------------------------------------------------------------------


def regions(router, layers=2, **options):
    accelerate = pytest.importorskip("accelerate.utils")
    testing = pytest.importorskip("torch._dynamo.testing")
    torch._dynamo.reset()
    model = mixtral(layers).eval()
    if router is not None:
        sinkroute.patch(model, router, **options)
    counter = testing.CompileCounter()
    return accelerate.compile_regions(model, backend=counter).train(), counter


def test_compiled_regions_see_padding():
    model, _ = regions("softmax", layers=1)
    assert tokens(model, input_ids=IDS, attention_mask=MASK, use_cache=False) == [30]
    assert tokens(model, input_ids=IDS, use_cache=False) == [36]


def test_compiled_regions_have_the_losses_of_the_uncompiled_model():
    results = []
    for compiled in (True, False):
        model = regions("load-balance", **BALANCE)[0] if compiled else patched("load-balance", **BALANCE)[0]
        sinkroute.set_step(model, 0, micro_batches=3)
        for mask in (None, MASK, OTHER):
            model(input_ids=IDS, attention_mask=mask, use_cache=False).logits.square().sum().backward()
        results.append({name.replace("_orig_mod.", ""): grad for name, grad in gradients(model).items()})
    assert_close(*results)


@pytest.mark.slow
def test_all_layers_share_a_graph_however_many_they_are():
    frames = []
    for router in (None, "load-balance"):
        model, counter = regions(router, layers=10)
        for _ in range(2):
            model(input_ids=IDS, attention_mask=MASK, use_cache=False)
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


def test_layers_that_are_compiled_in_their_place_and_repeated_have_the_mask_of_their_pass():
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, _ = patched("load-balance", **BALANCE)
        sinkroute.set_step(model, 0, micro_batches=2)
        for layer in model.model.layers:
            if compiled:
                layer.mlp.compile(backend="aot_eager")
        recompute(model, False)
        losses = [
            factor * model(input_ids=ids, attention_mask=mask).logits[mask == 1].square().sum()
            for factor, ids, mask in ((1.0, IDS, MASK), (3.0, IDS.flip(1), OTHER))
        ]
        sum(losses).backward()
        results.append(gradients(model))
    assert_close(results[1], results[0])


# -- passes that are no training -------------------------------------------------------------------------------------


def test_nothing_is_balanced_or_counted_inside_no_balancing():
    model, handle = patched("load-balance", **BALANCE)
    served = mixtral().eval()(input_ids=IDS, attention_mask=MASK).logits
    model(input_ids=IDS, attention_mask=MASK)
    before = handle.aux_loss()
    with sinkroute.LoadMonitor(model) as monitor, sinkroute.no_balancing(model):
        logits = model(input_ids=IDS, attention_mask=MASK).logits
        with sinkroute.no_balancing(model):
            pass
        assert torch.equal(logits, model(input_ids=IDS, attention_mask=MASK).logits)
    torch.testing.assert_close(logits, served)
    assert model.training and torch.equal(handle.aux_loss(), before)
    for mode in ("train", "eval"):
        assert [row["passes"] for row in monitor.metrics(mode).values()] == [0, 0]
    assert tokens(model, input_ids=IDS) == [36, 36]


def biases(model):
    return [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_pass_that_keeps_no_graph_is_none_of_the_training(context):
    model = FAMILY["deepseek_v3"].build().train()
    sinkroute.patch(model, "loss-free", update_rate=0.5)
    sinkroute.set_step(model, 0)
    ids = FAMILY["deepseek_v3"].inputs()["input_ids"]
    before = [bias.clone() for bias in biases(model)]
    with sinkroute.LoadMonitor(model) as monitor, context():
        model(input_ids=ids)
        model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    sinkroute.end_step(model)
    assert all(map(torch.equal, biases(model), before))
    for mode in ("train", "eval"):
        assert {row["passes"] for row in monitor.metrics(mode).values()} == {0}
    assert set(tokens(model, input_ids=ids)) == {24}


def test_a_step_that_had_no_pass_with_a_graph_is_told_once():
    model = mixtral()
    sinkroute.patch(model, "ssr-l")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkroute.set_step(model, 0)
        model(IDS)
        with sinkroute.no_balancing(model):
            for step in (1, 2):
                sinkroute.set_step(model, step)
                model(IDS)
    sinkroute.set_step(model, 3)
    with torch.no_grad(), pytest.warns(UserWarning, match="step 0 had passes in train.. and no training pass"):
        model(IDS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkroute.set_step(model, 4)
        model(IDS)


def test_a_step_with_a_rollout_and_a_training_pass_is_like_any_other():
    model = mixtral()
    sinkroute.patch(model, "ssr-l")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            sinkroute.set_step(model, step)
            with torch.no_grad():
                model(IDS)
            model(IDS, labels=IDS).loss.backward()


def test_rollouts_in_training_mode_are_the_models_own():
    model, _ = patched()
    expected = mixtral().generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
    with sinkroute.LoadMonitor(model) as monitor:
        found = model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=4, do_sample=False)
        model(input_ids=IDS)
    assert torch.equal(found, expected)
    assert [row["passes"] for row in monitor.metrics().values()] == [1, 1]


def test_layers_of_sinkroute_count_nothing_inside_no_balancing_and_choose_as_when_serving():
    layer = sinkroute.MoE(d_model=8, d_hidden=16, num_experts=4, top_k=2, router="ssr-l", router_options={"noise": 9.0})
    x = torch.randn(20, 8)
    served = layer.eval()(x)
    layer.train()
    sinkroute.set_step(layer, 0)
    with sinkroute.LoadMonitor(layer) as monitor, sinkroute.no_balancing(layer):
        assert torch.equal(layer(x), served)
    assert layer.router.training and monitor.metrics()["router"]["passes"] == 0
    assert not torch.equal(layer(x), served)


def test_copies_hear_of_their_own_passes():
    model, _ = patched("softmax")
    model(input_ids=IDS, attention_mask=MASK)
    twin = copy.deepcopy(model)
    assert tokens(twin, input_ids=IDS, attention_mask=OTHER) == [26, 26]
    assert tokens(model, input_ids=IDS, attention_mask=MASK) == [30, 30]


def test_a_model_that_is_trained_in_eval_says_so_once():
    model = mixtral().eval()  # as from_pretrained returns it
    sinkroute.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            model(IDS)
        model(IDS)  # no backward pass: an evaluation, if a wasteful one
    with pytest.warns(UserWarning, match=r"MixtralForCausalLM in eval\(\).* call model.train\(\) first"):
        model(IDS, labels=IDS).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS, labels=IDS).loss.backward()


def test_gradients_in_eval_after_training_are_the_users_own_affair():
    model = mixtral()
    sinkroute.patch(model)
    model(IDS, labels=IDS).loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.eval()(IDS, labels=IDS).loss.backward()
