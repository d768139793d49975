"""The gradient of a router's loss: it comes to the gate whoever computes the loss of the training, and weighs as told.

What is expected is computed by hand on an unpatched model, from the logits of its gates.
"""

import warnings

import pytest
import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import sinkroute
from sinkroute.adapters.hf import RouterCallback
from sinkroute.adapters.hf.quirks import scale_of

IDS = torch.randint(1, 64, (4, 12), generator=torch.Generator().manual_seed(0))
COEFFICIENT = 5.0
Z = {"losses": {"z-loss": COEFFICIENT}}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mixtral(**more):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
        **more,
    )
    return transformers.MixtralForCausalLM(config).train()


def patched(router="softmax", options=Z, **more):
    model = mixtral()
    return model, sinkroute.patch(model, router, **options, **more)


def z_loss(logits_TE):
    """The mean over tokens of (log Σ exp)²."""
    return COEFFICIENT * logits_TE.float().logsumexp(-1).square().mean()


def balance(logits_TE):
    """E Σ f P of plain top-2."""
    f_E = logits_TE.topk(2).indices.flatten().bincount(minlength=4) / (2 * len(logits_TE))
    return COEFFICIENT * 4 * (f_E * logits_TE.float().softmax(-1).mean(0)).sum()


def by_hand(loss_of, auxiliary=z_loss):
    """Gradients of the loss of an unpatched model and the auxiliary loss of its gates, added."""
    model, seen = mixtral(), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, outputs: seen.append(auxiliary(outputs[0])))
    (loss_of(model) + sum(seen)).backward()
    return gates(model)


def gates(model):
    grads = [layer.mlp.gate.weight.grad for layer in model.model.layers]
    return torch.stack([grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads])


def own_loss(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def hidden_states(model):
    return model.model(IDS).last_hidden_state.square().mean()


def last_logits(model):
    return model(input_ids=IDS).logits[:, -1].square().mean()


# -- it arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_of", [own_loss, hidden_states, last_logits])
@pytest.mark.parametrize(("router", "auxiliary"), [("z-loss", z_loss), ("load-balance", balance)])
def test_the_gradient_comes_whatever_loss_is_made_of_the_outputs(loss_of, router, auxiliary):
    model, _ = patched(router, {"coefficient": COEFFICIENT})
    loss_of(model).backward()
    torch.testing.assert_close(gates(model), by_hand(loss_of, auxiliary), rtol=1e-4, atol=1e-6)


def test_it_comes_when_other_passes_were_made_in_between():
    model, handle = patched()
    loss = own_loss(model)
    shown = handle.aux_loss()
    with torch.no_grad():  # a reference pass
        model(input_ids=IDS.flip(0))
    model.eval()(input_ids=IDS)
    model.train()
    assert torch.equal(handle.aux_loss(), shown) and not shown.requires_grad
    loss.backward()
    torch.testing.assert_close(gates(model), by_hand(own_loss), rtol=1e-4, atol=1e-6)


def test_the_loss_that_is_shown_adds_no_gradient():
    found = []
    for show in (False, True):
        model, handle = patched(show_aux_loss=show)
        loss = own_loss(model)
        found.append(loss.item() - show * handle.aux_loss().item())
        loss.backward()
        torch.testing.assert_close(gates(model), by_hand(own_loss), rtol=1e-4, atol=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11), reason="an unpatched Mixtral does not compile there"
)
def test_it_comes_in_a_compiled_model():
    torch._dynamo.reset()
    model, handle = patched()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    torch.testing.assert_close(gates(model), by_hand(own_loss), rtol=1e-4, atol=1e-6)
    assert handle.aux_loss() > 0


# -- what is switched off --------------------------------------------------------------------------------------------


def test_the_models_own_loss_is_0_in_its_outputs_where_it_is_off():
    # Some trainers take it from there, with a coefficient that they read when they began.
    for keep in (False, True):
        model = mixtral(router_aux_loss_coef=0.5, output_router_logits=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sinkroute.patch(model, "ssr-l", keep_aux_loss=keep, probability=0.0, noise=0.0)
        outputs = model(input_ids=IDS, labels=IDS)
        (outputs.loss + 0.5 * outputs.aux_loss).backward()
        assert outputs.aux_loss.requires_grad == keep and (outputs.aux_loss.item() > 0) == keep
        if not keep:
            plain = mixtral()
            own_loss(plain).backward()
            torch.testing.assert_close(gates(model), gates(plain))
    assert model.eval()(input_ids=IDS).aux_loss > 0


# -- what it weighs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_micro_batches_together_have_the_gradient_of_one_pass(micro_batches):
    model, _ = patched()
    for number, ids in enumerate(IDS.chunk(micro_batches)):
        sinkroute.set_step(model, 0, number, micro_batches=micro_batches)
        (own_loss(model, ids) / micro_batches).backward()
    torch.testing.assert_close(gates(model), by_hand(own_loss), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1024.0, 0.25])
def test_a_scaled_loss_and_the_routers_are_unscaled_together(scale):
    model, handle = patched()
    handle.loss_scale = lambda: scale
    (scale * own_loss(model)).backward()
    torch.testing.assert_close(gates(model) / scale, by_hand(own_loss), rtol=1e-4, atol=1e-6)


def test_the_scale_is_found_where_accelerate_and_deepspeed_have_it():
    class Wrapped:
        scaler = None
        optimizer = torch.optim.SGD([torch.zeros(1)])

    assert scale_of(Wrapped()) is None and scale_of(None) is None
    wrapped = Wrapped()
    wrapped.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    wrapped.scaler.scale(torch.ones(()))
    assert scale_of(wrapped)() == 64
    wrapped = Wrapped()
    del Wrapped.scaler
    wrapped.optimizer = type("ZeroOptimizer", (), {"loss_scale": 32.0})()
    assert scale_of(wrapped)() == 32


def data_parallel():
    """Layer gradients of ranks with two micro-batches each, under DDP and sharded."""
    found = {}
    for kind in ("DDP", "FSDP2"):
        model, _ = patched()
        if kind == "DDP":
            wrapped = DistributedDataParallel(model)
        else:
            for layer in model.model.layers:
                fully_shard(layer)
            wrapped = fully_shard(model)
        rows = IDS[dist.get_rank() :: 2]
        for number, ids in enumerate(rows.chunk(2)):
            sinkroute.set_step(wrapped, 0, number, micro_batches=2)
            (wrapped(input_ids=ids, labels=ids).loss / 2).backward()
        found[kind] = gates(model)
    return found


def test_ranks_together_have_the_gradient_of_one_process(run_ranks):
    expected = by_hand(own_loss)
    for found in run_ranks(data_parallel, 2):
        for kind, gradient in found.items():
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=kind)


# -- in transformers' Trainer ----------------------------------------------------------------------------------------


class Gradients(TrainerCallback):
    """Those of the gates before each step of the optimizer."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append(gates(model).clone())


def trained(folder, options, micro_batches, rows=4, **settings):
    model = mixtral()
    handle = sinkroute.patch(model, "softmax", **options)
    texts = [{"input_ids": row, "labels": row} for row in IDS[:rows].tolist()]
    compute = settings.pop("compute_loss_func", None)
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=micro_batches,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        **settings,
    )
    seen = Gradients()
    trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[seen], compute_loss_func=compute)
    trainer.remove_callback(PrinterCallback)
    RouterCallback(handle).attach(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    return seen.found


def mean_of_logits(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().mean()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"label_smoothing_factor": 0.1},
        {"compute_loss_func": mean_of_logits},
        {"average_tokens_across_devices": False},
    ],
    ids=["own", "smoothing", "function", "mean"],
)
def test_in_a_trainer_it_weighs_as_much_as_in_one_pass_whatever_the_trainers_loss(tmp_path, settings):
    expected = by_hand(lambda model: 0 * own_loss(model))
    (found,), (without,) = (trained(tmp_path, options, 4, **settings) for options in (Z, {}))
    torch.testing.assert_close(found - without, expected, rtol=1e-3, atol=1e-5)


def test_the_last_step_of_an_epoch_may_have_fewer_micro_batches(tmp_path):
    found, without = (trained(tmp_path, options, 3) for options in (Z, {}))
    assert len(found) == 2
    for step, ids in enumerate((IDS[:3], IDS[3:])):
        expected = by_hand(lambda model, ids=ids: 0 * own_loss(model, ids))
        torch.testing.assert_close(found[step] - without[step], expected, rtol=1e-3, atol=1e-5)


# -- what is said ----------------------------------------------------------------------------------------------------


def test_more_passes_than_were_told_are_said_once():
    model, _ = patched()
    sinkroute.set_step(model, 0)
    own_loss(model).backward()
    with pytest.warns(UserWarning, match=r"step 0 has 2 training passes.*1 / 1 in each.*micro_batches="):
        own_loss(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own_loss(model).backward()
        sinkroute.set_step(model, 1, micro_batches=2)
        own_loss(model).backward()
        own_loss(model).backward()
        with sinkroute.no_balancing(model):
            own_loss(model)


def test_a_loss_that_was_given_no_gradient_is_said_by_name_once():
    told = r"losses of 2 of 2 routers \(model\.layers\.0\.mlp\.gate, \.\.\.\) were given no gradient in step 0"
    model, _ = patched()
    sinkroute.set_step(model, 0)
    own_loss(model)
    sinkroute.set_step(model, 1)
    with pytest.warns(UserWarning, match=told):
        loss = own_loss(model)
    loss.backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sinkroute.set_step(model, 2)
        own_loss(model)
        sinkroute.set_step(model, 3)
        own_loss(model)


def test_float16_without_a_known_scale_is_said():
    for known in (False, True):
        model, handle = patched()
        if known:
            handle.loss_scale = lambda: 2.0
        with warnings.catch_warnings(record=True) as said, torch.autocast("cpu", torch.float16):
            warnings.simplefilter("always")
            own_loss(model)
        told = [str(warning.message) for warning in said if "float16" in str(warning.message)]
        assert [("handle.loss_scale = scaler.get_scale" in text) for text in told] == ([] if known else [True])
