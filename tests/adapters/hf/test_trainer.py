"""Routers in transformers' Trainer: steps, logs, and runs that are killed and go on."""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import sinkroute
from sinkroute.adapters.hf import RouterCallback
from sinkroute.adapters.hf.trainer import STATE_FILE
from sinkroute.routing.attached import named_routers
from sinkroute.routing.watch import Watch

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4))


def deepseek():
    torch.manual_seed(0)
    config = DeepseekV3Config(
        **SMALL,
        n_routed_experts=8,
        moe_intermediate_size=8,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    return DeepseekV3ForCausalLM(config)


def texts(count, seed=0):
    tokens = torch.randint(0, 32, (count, 6), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"input_ids": text, "labels": text} for text in tokens]


def make_trainer(folder, model, train=None, callbacks=None, eval_dataset=None, model_init=None, **settings):
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    } | settings
    train = texts(16) if train is None else train
    arguments = TrainingArguments(str(folder), **settings)
    trainer = Trainer(
        model, arguments, train_dataset=train, eval_dataset=eval_dataset, callbacks=callbacks, model_init=model_init
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def patched_trainer(folder, model, router="ssr-l", options=None, **settings):
    handle = sinkroute.patch(model, router, **(options or {}))
    trainer = make_trainer(folder, model, **settings)
    return trainer, handle, RouterCallback(handle).attach(trainer)


def noted(trainer, name="loss"):
    """step → value of every log that has it."""
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def router_of(handle, layer):
    return list(handle.routers.values())[layer]


def watch(model, note):
    """`note(router, routes)` after every call of a router; the handles of the hooks."""
    routers = named_routers(model).values()
    return [router.register_forward_hook(lambda router, _, routes: note(router, routes)) for router in routers]


# -- steps -------------------------------------------------------------------------------------------------------------


def test_every_micro_batch_has_the_trainers_step_and_its_own_number(tmp_path):
    trainer, handle, _ = patched_trainer(tmp_path, mixtral(), train=texts(10), num_train_epochs=2, max_steps=-1)
    seen = []
    watch(trainer.model, lambda router, _: seen.append((router.layer, router.step, router.micro_batch)))
    trainer.train()
    # Five batches an epoch: its last step has one micro-batch.
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0), (4, 1), (5, 0)]
    assert seen == [(layer, *key) for key in keys for layer in (0, 1)]
    assert [router.total_steps for router in handle.routers.values()] == [6, 6]


def test_a_schedule_over_the_training_spans_what_the_trainer_runs(tmp_path):
    trainer, handle, _ = patched_trainer(tmp_path, mixtral(), options={"probability": "linear(1, 0)"}, max_steps=5)
    trainer.train()
    assert router_of(handle, 0).probability_now == pytest.approx(0.2)  # at step 4 of 5


def test_an_evaluation_sees_the_bias_that_the_step_before_it_left(tmp_path):
    trainer, handle, _ = patched_trainer(
        tmp_path, deepseek(), "loss-free", {"update_rate": 0.5}, max_steps=1, eval_strategy="steps",
        eval_steps=1, eval_dataset=texts(2),
    )  # fmt: skip
    seen = []
    router = router_of(handle, 0)
    gate = trainer.model.model.layers[0].mlp.gate
    gate.register_forward_hook(lambda *_: seen.append((router.training, gate.e_score_correction_bias.clone())))
    loads = []
    watch(trainer.model, lambda router, routes: loads.append(routes.load) if router.training else None)
    trainer.train()
    load_E = loads[0] + loads[2]  # of the first layer, two micro-batches
    served = [bias_E for training, bias_E in seen if not training]
    torch.testing.assert_close(served[0], 0.5 * torch.sign(load_E.double().mean() - load_E).float())


# -- logs --------------------------------------------------------------------------------------------------------------


def violation(load_E):
    return float(load_E.max() / load_E.float().mean() - 1)


def test_logs_have_what_the_routers_did_since_the_last_one(tmp_path):
    trainer, _, _ = patched_trainer(tmp_path, mixtral(), options={"probability": 0.6}, max_steps=6, logging_steps=3)
    trainer.model.train()(torch.zeros(1, 6, dtype=torch.int64))  # before the training, and in no log
    calls = []
    watch(trainer.model, lambda router, routes: calls.append((router.step, router.layer, routes.load, routes.branch)))
    trainer.train()
    for until in (3, 6):
        log = next(log for log in trainer.state.log_history if log["step"] == until and "loss" in log)
        own = [call for call in calls if until - 3 <= call[0] < until]
        means = []
        for layer in (0, 1):
            loads = [load_E for _, number, load_E, _ in own if number == layer]
            means.append(sum(map(violation, loads)) / 6)
            name = f"router/model.layers.{layer}.mlp.gate"
            assert log[f"{name}/max_vio"] == pytest.approx(means[-1])
            assert log[f"{name}/dead"] == int((sum(loads) == 0).sum())
        assert log["router/max_vio"] == pytest.approx(sum(means) / 2)
        assert log["router/sinkhorn_share"] == sum(branch == "sinkhorn" for *_, branch in own) / 12


def test_a_router_with_a_loss_logs_it_and_one_without_plans_logs_none(tmp_path):
    trainer, _, _ = patched_trainer(tmp_path, mixtral(), "load-balance", max_steps=1)
    losses = []
    watch(trainer.model, lambda _, routes: losses.append(routes.aux_loss.item()))
    trainer.train()
    assert noted(trainer, "router/aux_loss") == {1: pytest.approx(sum(losses) / 4)}
    assert noted(trainer, "router/plan_error") == {}


def test_an_evaluation_logs_its_own_loads_under_its_own_prefix(tmp_path):
    data = {"a": texts(3, seed=1), "b": texts(5, seed=2)}
    trainer, _, _ = patched_trainer(tmp_path, mixtral(), eval_dataset=data)
    trainer.predict(texts(7, seed=3))  # is no evaluation, and in none
    loads = []
    watch(trainer.model, lambda router, routes: loads.append(routes.load) if not router.training else None)
    metrics = trainer.evaluate()
    # One batch each, of two layers.
    expected = {name: (violation(loads[i]) + violation(loads[i + 1])) / 2 for name, i in (("a", 0), ("b", 2))}
    assert expected["a"] != expected["b"]
    for name, value in expected.items():
        assert metrics[f"eval_{name}_router/max_vio"] == pytest.approx(value)
        assert noted(trainer, f"eval_{name}_router/max_vio_global") == {0: pytest.approx(value)}
    assert not any(name.startswith("router/") for log in trainer.state.log_history for name in log)


def test_trackers_get_the_metrics(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, _, _ = patched_trainer(
        tmp_path, mixtral(), max_steps=2, report_to="tensorboard", eval_strategy="steps", eval_steps=2,
        eval_dataset=texts(2),
    )  # fmt: skip
    trainer.train()
    (events,) = tmp_path.rglob("events.*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    for tag, name in (("train/router/max_vio", "router/max_vio"), ("eval/router/entropy", "eval_router/entropy")):
        written = {event.step: event.value for event in accumulator.Scalars(tag)}
        assert written == {step: pytest.approx(value) for step, value in noted(trainer, name).items()}
        assert len(written) == (2 if name == "router/max_vio" else 1)


def test_given_among_the_callbacks_it_warns_of_trackers_that_come_before(tmp_path):
    model = mixtral()
    callback = RouterCallback(sinkroute.patch(model, "ssr-l"))
    trainer = make_trainer(tmp_path, model, callbacks=[callback], max_steps=1, report_to="tensorboard")
    with pytest.warns(UserWarning, match=r"attach\(trainer\)"):
        trainer.train()
    assert list(noted(trainer, "router/max_vio")) == [1]


def test_added_without_attach_it_says_once_that_others_miss_the_metrics(tmp_path):
    model = mixtral()
    trainer = make_trainer(tmp_path, model, max_steps=1)
    trainer.add_callback(RouterCallback(sinkroute.patch(model, "ssr-l")))
    with pytest.warns(UserWarning, match=r"miss its metrics.*attach\(trainer\).*add_callback"):
        trainer.train()
    assert list(noted(trainer, "router/max_vio")) == [1]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*miss its metrics")
        trainer.train()


def test_a_model_of_model_init_without_routers_is_refused_by_name(tmp_path):
    handle = sinkroute.patch(mixtral(), "ssr-l")
    trainer = make_trainer(tmp_path, None, model_init=mixtral, max_steps=1)
    RouterCallback(handle).attach(trainer)
    with pytest.raises(ValueError, match=r"another MixtralForCausalLM.*call sinkroute.patch.*in model_init"):
        trainer.train()


def test_a_removed_patch_is_refused_by_name(tmp_path):
    trainer, handle, _ = patched_trainer(tmp_path, mixtral(), max_steps=1)
    handle.remove()
    with pytest.raises(ValueError, match=r"which has none; call sinkroute.patch"):
        trainer.train()


@pytest.mark.parametrize("router", ["ssr-l", "load-balance"])
def test_the_callback_goes_over_to_the_model_that_model_init_makes_and_patches(tmp_path, router):
    def patched():
        model = mixtral()
        handles.append(sinkroute.patch(model, router))
        return model

    handles = []
    trainer = make_trainer(tmp_path / "init", None, model_init=patched, max_steps=3)
    callback = RouterCallback(handles[0]).attach(trainer)
    trainer.train()
    assert callback.routed is handles[-1] is not handles[0] and callback.model is trainer.model
    assert [made.step for made in handles[-1].routers.values()] == [2, 2]
    hooks = [hook for made in handles[0].routers.values() for hook in made._forward_hooks.values()]
    assert not any(isinstance(hook, Watch) for hook in hooks)  # the monitor is on one model only

    plain, _, _ = patched_trainer(tmp_path / "plain", mixtral(), router, max_steps=3)
    mixtral()  # as model_init leaves the generator from which the order of the data is drawn
    plain.train()
    assert noted(trainer, "router/max_vio") == noted(plain, "router/max_vio") != {}
    assert noted(trainer) == noted(plain)


def test_it_goes_over_to_a_model_whose_own_parts_are_routers(tmp_path):
    trainer = make_trainer(tmp_path, None, model_init=Own, max_steps=2)
    callback = RouterCallback(Own()).attach(trainer)
    trainer.train()
    assert callback.routed is trainer.model
    assert list(noted(trainer, "router/max_vio")) == [1, 2]


def test_attached_after_it_was_given_among_the_callbacks_it_is_there_once(tmp_path):
    model = mixtral()
    callback = RouterCallback(sinkroute.patch(model, "ssr-l"))
    trainer = make_trainer(tmp_path, model, callbacks=[callback])
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks[0] is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1


def test_recomputed_layers_change_no_number(tmp_path):
    runs = []
    # Renamed after transformers 5.20.
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    setting = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    for recompute in (False, True):
        trainer, _, _ = patched_trainer(
            tmp_path, mixtral(), options={"probability": 0.5, "noise": 1.0}, max_steps=3,
            **{setting: recompute},
        )  # fmt: skip
        calls = []
        watch(trainer.model, lambda *_: calls.append(1))  # noqa: B023
        trainer.train()
        runs.append((noted(trainer), noted(trainer, "router/max_vio"), len(calls)))
    assert runs[0][:2] == runs[1][:2]
    assert [calls for *_, calls in runs] == [12, 24]


# -- checkpoints -------------------------------------------------------------------------------------------------------

STATEFUL = {
    "noise": (mixtral, "ssr-l", {"probability": 0.5, "noise": 1.0}),
    "loss-free": (deepseek, "loss-free", {"update_rate": 0.05}),
    "adaptive": (mixtral, "ssr-s", {"probability": "adaptive(high=0.4, low=0.35, floor=0.1, ceiling=0.9)"}),
}


class Kill(TrainerCallback):
    """Ends the process's work in the middle of the fifth step."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def saving(folder, kind, **settings):
    build, router, options = STATEFUL[kind]
    return patched_trainer(folder, build(), router, options, save_strategy="steps", save_steps=3, **settings)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_run_that_was_killed_goes_on_with_the_same_numbers(tmp_path, kind):
    whole, whole_handle, _ = saving(tmp_path / "whole", kind)
    whole.train()
    killed, _, _ = saving(tmp_path / "killed", kind, callbacks=[Kill()])
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again, handle, _ = saving(tmp_path / "killed", kind)
    again.train(resume_from_checkpoint=True)
    for name in ("loss", "grad_norm", "router/max_vio", "router/entropy", "router/model.layers.1.mlp.gate/max_vio"):
        assert noted(again, name) == noted(whole, name)
    for own, other in ((again.model, whole.model), (handle, whole_handle)):
        expected = other.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in own.state_dict().items())


def test_without_what_routers_remember_the_numbers_would_differ(tmp_path, monkeypatch):
    """What the test above rests on: the state matters within these few steps."""
    whole, _, _ = saving(tmp_path, "adaptive")
    whole.train()
    again, handle, _ = saving(tmp_path, "adaptive")
    monkeypatch.setattr(handle, "load_state_dict", lambda state: None)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert noted(again)[3] == noted(whole)[3] and noted(again) != noted(whole)


def test_a_checkpoint_has_what_the_handle_remembers(tmp_path):
    trainer, handle, _ = saving(tmp_path, "loss-free", max_steps=3)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-3" / STATE_FILE)
    expected = handle.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    assert saved["routers.0.state.saved_steps"].tolist() == [2, 2]  # the third step is over
    assert saved["routers.0.state.bias_E"].any()


def test_routers_that_remember_nothing_write_nothing(tmp_path):
    trainer, _, _ = saving(tmp_path, "noise", max_steps=3)
    trainer.train()
    assert not (tmp_path / "checkpoint-3" / STATE_FILE).exists()


def test_experts_that_the_trainer_drops_when_it_resumes_are_put_back(tmp_path):
    trainer, _, _ = saving(tmp_path, "noise", max_steps=3)
    trainer.train()
    trained = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    again, _, _ = saving(tmp_path, "noise", max_steps=3)
    again.train(resume_from_checkpoint=True)  # there is nothing left to do
    assert all(torch.equal(value, trained[name]) for name, value in again.model.state_dict().items())


def test_a_folder_elsewhere_has_to_be_told(tmp_path):
    trainer, _, _ = saving(tmp_path / "first", "loss-free", max_steps=3)
    trainer.train()
    folder = str(tmp_path / "first" / "checkpoint-3")
    # Another run's, of the same number.
    other, _, _ = saving(tmp_path / "second", "loss-free", max_steps=3, learning_rate=0.02)
    other.train()
    again, _, _ = saving(tmp_path / "second", "loss-free")
    with pytest.raises(ValueError, match="checkpoint=") as raised:
        again.train(resume_from_checkpoint=folder)
    assert str(tmp_path / "second" / "checkpoint-3") in str(raised.value)

    by_settings, handle, _ = saving(tmp_path / "third", "loss-free", max_steps=4, resume_from_checkpoint=folder)
    by_settings.train(resume_from_checkpoint=folder)
    by_argument, second_handle, callback = saving(tmp_path / "third", "loss-free", max_steps=4)
    callback.checkpoint = RouterCallback(second_handle, checkpoint=folder).checkpoint
    by_argument.train(resume_from_checkpoint=folder)
    assert handle.state_dict()["routers.0.state.saved_steps"].tolist() == [3, 3]
    assert noted(by_settings) == noted(by_argument)


def test_a_checkpoint_without_the_routers_file_is_refused(tmp_path):
    trainer, _, _ = saving(tmp_path, "loss-free", max_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / STATE_FILE).unlink()
    again, _, _ = saving(tmp_path, "loss-free")
    with pytest.raises(ValueError, match=f"holds no {STATE_FILE}"):
        again.train(resume_from_checkpoint=True)


def test_the_best_model_comes_back_with_what_its_routers_remembered(tmp_path):
    trainer, handle, _ = saving(
        tmp_path, "loss-free", eval_strategy="steps", eval_steps=3, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, eval_dataset=texts(10),
    )  # fmt: skip
    trainer.train()  # on what it evaluates: the first is the worst, here "best"
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-3"
    assert handle.state_dict()["routers.0.state.saved_steps"].tolist() == [2, 2]
    best = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "checkpoint-3").state_dict()
    assert all(torch.equal(value, best[name]) for name, value in trainer.model.state_dict().items())
    gate = trainer.model.model.layers[0].mlp.gate
    torch.testing.assert_close(gate.e_score_correction_bias, router_of(handle, 0).state.bias_E)


def test_a_model_in_the_place_of_its_handle_is_refused():
    model = mixtral()
    sinkroute.patch(model, "ssr-l")
    with pytest.raises(ValueError, match="give the handle"):
        RouterCallback(model)


def test_a_model_without_routers_is_refused():
    with pytest.raises(ValueError, match="holds no sinkroute router"):
        RouterCallback(nn.Linear(2, 2))


class Own(nn.Module):
    """A model whose own parts are routers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.experts = sinkroute.MoE(d_model=8, d_hidden=8, num_experts=4, top_k=2, router="loss-free")

    def forward(self, input_ids, labels):
        return {"loss": self.experts(self.embedding(input_ids)).square().mean()}


def test_a_model_of_our_own_layers_is_run_too_and_saved_by_the_trainer_alone(tmp_path):
    model = Own()
    trainer = make_trainer(tmp_path, model, max_steps=2, save_strategy="steps", save_steps=2)
    RouterCallback(model).attach(trainer)
    trainer.train()
    assert list(noted(trainer, "router/experts/max_vio")) == [1, 2]
    assert "experts.router.state.bias_E" in load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert not (tmp_path / "checkpoint-2" / STATE_FILE).exists()


# -- ranks -------------------------------------------------------------------------------------------------------------

FOLDER = "SINKROUTE_TEST_FOLDER"


def train_on_a_rank():
    rank = dist.get_rank()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    folder = Path(os.environ[FOLDER])
    loads = []
    # Another folder for each rank shows who writes; then both go on from the first's.
    trainer, handle, _ = saving(folder / str(rank), "loss-free", max_steps=5, ddp_find_unused_parameters=False)
    watch(trainer.model, lambda _, routes: loads.append(routes.load))
    trainer.train()
    again, again_handle, _ = saving(folder / "0", "loss-free", max_steps=5, ddp_find_unused_parameters=False)
    again.train(resume_from_checkpoint=str(folder / "0" / "checkpoint-3"))
    return {
        "parallel": type(trainer.model_wrapped).__name__,
        "wrote": (folder / str(rank) / "checkpoint-3" / STATE_FILE).exists(),
        "loads": torch.stack(loads),
        "bias": router_of(handle, 0).state.bias_E,
        "global": noted(trainer, "router/max_vio_global"),
        "whole": (noted(trainer), noted(trainer, "router/max_vio"), router_of(handle, 1).state.bias_E),
        "again": (noted(again), noted(again, "router/max_vio"), router_of(again_handle, 1).state.bias_E),
    }


def test_two_ranks_share_loads_and_biases_and_one_of_them_writes(run_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    first, second = run_ranks(train_on_a_rank, 2)
    assert first["parallel"] == "DistributedDataParallel"
    assert (first["wrote"], second["wrote"]) == (True, False)
    # Calls in the order step, micro-batch, layer: five steps of two micro-batches in two layers.
    loads = (first["loads"] + second["loads"]).view(5, 2, 2, -1).sum(1)
    bias_E = torch.zeros(8)
    for load_E in loads[:, 0]:
        bias_E += 0.05 * torch.sign(load_E.double().mean() - load_E)
    for rank in (first, second):
        torch.testing.assert_close(rank["bias"], bias_E)
        expected = {step + 1: (violation(loads[step, 0]) + violation(loads[step, 1])) / 2 for step in range(5)}
        assert rank["global"] == {step: pytest.approx(value) for step, value in expected.items()}
        assert rank["again"][:2] == rank["whole"][:2]
        assert torch.equal(rank["again"][2], rank["whole"][2])


# -- imports -----------------------------------------------------------------------------------------------------------


def test_patching_does_not_import_the_trainer():
    code = "import sys, sinkroute.adapters.hf; print('transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.strip() == "False"
