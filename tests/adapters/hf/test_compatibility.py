"""Patched models with what people put around models: checkpointing, compilation, PEFT, accelerate, files."""

import os

import pytest
import torch

import sinkroute
from sinkroute.routing.attached import named_routers

pytest.importorskip("transformers")

from .zoo import FAMILIES, recompute

FAMILY = {family.name: family for family in FAMILIES}
OPTIONS = {"plan": {"probability": 1.0}, "noise": {"probability": 0.0}, "plain": {"probability": 0.0, "noise": 0.0}}
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, -3:] = 0
every_branch = pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(name="mixtral", router=None, **options):
    model = FAMILY[name].build()
    if router is not None:
        sinkroute.patch(model, router, **options)
        sinkroute.set_step(model, 0)
    return model


def given(name="mixtral"):
    inputs = FAMILY[name].inputs()
    return inputs | {"labels": inputs["input_ids"], "attention_mask": MASK}


def step(model, name="mixtral", seed=0):
    """Loss and gradients of a training step; what has none is left out."""
    torch.manual_seed(seed)
    loss = model(**given(name)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(second[name], first[name], **tolerance or {"rtol": 0, "atol": 0}, msg=name)


# -- activation checkpointing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("name", "router", "options"),
    [
        ("mixtral", "ssr-l", OPTIONS["plan"]),
        ("mixtral", "ssr-l", OPTIONS["noise"]),
        ("mixtral", "load-balance", {}),
        ("deepseek_v3", "ssr-s", OPTIONS["plan"]),
        ("deepseek_v3", "loss-free", {}),
        ("phimoe", "load-balance", {}),
        ("llama4", "ssr-l", OPTIONS["plan"]),
        ("switch_transformers", "ssr-l", OPTIONS["plan"]),
    ],
)
def test_gradients_under_activation_checkpointing_are_those_without(name, router, options, use_reentrant):
    expected = step(make(name, router, **options), name)
    model = make(name, router, **options)
    recompute(model, use_reentrant)
    # Where weights are shared, sums are in another order.
    assert_same(expected, step(model, name), rtol=1e-5, atol=1e-6)


def test_a_state_moves_once_under_activation_checkpointing():
    biases = []
    for use_reentrant in (None, True, False):
        model = make("deepseek_v3", "loss-free")
        if use_reentrant is not None:
            recompute(model, use_reentrant)
        step(model, "deepseek_v3")
        sinkroute.end_step(model)
        biases.append(model.model.layers[0].mlp.gate.e_score_correction_bias)
    assert torch.equal(biases[0], biases[1]) and torch.equal(biases[0], biases[2])


# -- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("branch", ["noise", "plain"])
def test_between_sinkhorn_steps_compilation_makes_one_graph(name, branch):
    torch._dynamo.reset()
    model = make(name, "ssr-l", **OPTIONS[branch])
    whole = torch.compile(model, backend="eager", fullgraph=True)
    loss = FAMILY[name].loss(whole(**FAMILY[name].inputs()))
    loss.backward()
    other = make(name, "ssr-l", **OPTIONS[branch])
    assert torch.equal(loss, FAMILY[name].loss(other(**FAMILY[name].inputs())))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["outside", "inside"])
def test_a_compiled_model_takes_sinkhorn_steps_in_between(place):
    torch._dynamo.reset()

    def losses(model, called):
        found = []
        for number in range(4):
            sinkroute.set_step(model, number)
            found.append(called(**given()).loss.item())
        return found

    options = {"probability": 0.5, "seed": 3}
    expected = losses(eager := make("mixtral", "ssr-l", **options), eager)
    model = make("mixtral", "ssr-l", **options)
    if place == "outside":
        called = torch.compile(model, backend="eager")
    else:
        called = model
        model.compile(backend="eager")
    assert losses(model, called) == pytest.approx(expected, rel=1e-6)


# -- modes and dtypes ------------------------------------------------------------------------------------------------


@every_branch
def test_autocast_to_bf16(options):
    results = []
    for patched in (True, False):
        model = make("mixtral", "ssr-l", **options) if patched else make()
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(model))
    assert all(value.isfinite().all() for value in results[0].values())
    if options is OPTIONS["plain"]:
        assert_same(*results)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("router", ["ssr-l", "ssr-ec"])
def test_implementations_of_experts_agree(name, router):
    results = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = make(name)
        try:
            sinkroute.patch(model, router, probability=1.0)
        except ValueError as error:
            assert router == "ssr-ec"  # refused where a token must have K experts, or those of some groups
            pytest.skip(str(error))
        model.set_experts_implementation(implementation)
        sinkroute.set_step(model, 0)
        results.append(step(model, name))
    for result in results[1:]:
        assert_same(results[0], result, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "switch_transformers"])
def test_generation_is_the_models_own(name):
    prompt = {"input_ids": FAMILY[name].inputs()["input_ids"], "attention_mask": MASK}
    expected = make(name).eval().generate(**prompt, max_new_tokens=6, do_sample=False)
    model = make(name, "ssr-l", probability=1.0)
    assert torch.equal(model.eval().generate(**prompt, max_new_tokens=6, do_sample=False), expected)


def test_a_model_left_in_training_mode_generates_as_it_serves():
    prompt = FAMILY["mixtral"].inputs()
    expected = make().generate(**prompt, max_new_tokens=6, do_sample=False)
    model = make("mixtral", "ssr-l", probability=1.0)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), expected)


def test_layers_in_eval_are_the_models_own_in_a_model_that_trains():
    model = make("mixtral", "ssr-l", probability=1.0)
    for layer in model.model.layers:
        layer.eval()
    model(**given())  # nobody is asked
    model.model.layers[1].train()
    seen = []
    model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(**given())
    own = make().eval()
    own.model.layers[0].mlp.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    own(**given())
    assert torch.equal(*seen)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "llama4", "switch_transformers"])
def test_a_patched_model_is_saved_as_a_plain_one(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "plain")
    sinkroute.patch(model, "ssr-l", probability=1.0)
    sinkroute.set_step(model, 0)
    step(model, name)
    model.save_pretrained(tmp_path / "patched")
    for file in os.listdir(tmp_path / "plain"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes(), file
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    assert named_routers(loaded) == {}
    inputs = FAMILY[name].inputs()
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(("name", "router"), [("mixtral", "ssr-l"), ("deepseek_v3", "loss-free")])
def test_a_model_without_storage_is_patched_and_filled_later(name, router):
    source = make(name)
    with torch.device("meta"):
        model = type(source)(source.config)
    sinkroute.patch(model, router)
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    model.model.rotary_emb.__init__(source.config)
    sinkroute.set_step(model, 0)
    assert_same(step(make(name, router), name), step(model, name))
    sinkroute.end_step(model)


# -- accelerate and PEFT ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("patched_first", [True, False])
def test_hooks_of_accelerate_may_be_there(offload, patched_first):
    accelerate = pytest.importorskip("accelerate")

    def hook(model):
        if offload:
            return accelerate.cpu_offload(model, torch.device("cpu"))
        return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)

    with torch.no_grad() if offload else torch.enable_grad():  # what is offloaded is not trained
        expected = make("mixtral", "ssr-l", probability=1.0)(**given()).logits
        model = make()
        model = model if patched_first else hook(model)
        sinkroute.patch(model, "ssr-l", probability=1.0)
        model = hook(model) if patched_first else model
        sinkroute.set_step(model, 0)
        assert torch.equal(model(**given()).logits, expected)


ADAPTED = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "gate": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
}


def adapted(model, kind):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTED[kind]))


@pytest.mark.parametrize("kind", ADAPTED)
@pytest.mark.parametrize("patched_first", [True, False])
@every_branch
def test_peft_adapts_a_patched_model_and_patch_an_adapted_one(kind, patched_first, options):
    expected = adapted(make(), kind)
    if patched_first:
        model = adapted(make("mixtral", "ssr-l", **options), kind)
    else:
        model = adapted(make(), kind)
        sinkroute.patch(model, "ssr-l", **options)
    assert list(model.state_dict()) == list(expected.state_dict())
    sinkroute.set_step(model, 0)
    with sinkroute.LoadMonitor(model) as monitor:
        result = step(model)
    assert {sum(row["load"]) for row in monitor.metrics().values()} == {2 * 21}  # the mask arrives
    assert len(result) > 1 and all("lora" in name or name == "loss" for name in result)
    if options is OPTIONS["plain"]:
        assert_same(step(expected), result)
    with torch.no_grad():
        assert torch.equal(model.eval()(**given()).logits, expected.eval()(**given()).logits)


@pytest.mark.parametrize("patched_first", [True, False])
def test_a_routers_loss_reaches_an_adapted_models(patched_first):
    model = adapted(make("mixtral", "load-balance"), "attention") if patched_first else adapted(make(), "attention")
    if not patched_first:
        sinkroute.patch(model, "load-balance")
    sinkroute.set_step(model, 0)
    model(**given()).loss.backward()
    plain = adapted(make("mixtral", "softmax", keep_aux_loss=False), "attention")
    plain(**given()).loss.backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert any((one.grad - other.grad).abs().max() > 1e-6 for one, other in pairs if one.grad is not None)


def test_a_gate_that_peft_replaced_after_the_patch_is_noticed():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = peft.get_peft_model(make("mixtral", "ssr-l"), config)
    with pytest.raises(RuntimeError, match="patch after get_peft_model"):
        model(**given())
    model = peft.get_peft_model(make(), config)
    sinkroute.patch(model, "ssr-l", probability=1.0)
    sinkroute.set_step(model, 0)
    assert any("modules_to_save" in name for name in step(model))


def test_adapters_that_are_merged_leave_a_plain_model():
    model = adapted(make("mixtral", "ssr-l", probability=1.0), "attention")
    expected = adapted(make(), "attention").merge_and_unload()
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(expected.state_dict())
    assert torch.equal(merged.eval()(**given()).logits, expected.eval()(**given()).logits)


# -- quantised experts -----------------------------------------------------------------------------------------------


def test_experts_of_torchao_may_be_quantised():
    quantization = pytest.importorskip("torchao.quantization")
    model = make("switch_transformers")  # its experts are linear layers
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, path: isinstance(module, torch.nn.Linear) and "expert_" in path,
    )
    before = model.eval()(**FAMILY["switch_transformers"].inputs()).logits
    sinkroute.patch(model, "ssr-l", probability=1.0)
    sinkroute.set_step(model, 0)
    assert torch.equal(model(**FAMILY["switch_transformers"].inputs()).logits, before)
    assert not torch.equal(model.train()(**FAMILY["switch_transformers"].inputs()).logits, before)
