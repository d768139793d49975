"""What the runs of all trainers are compared with: one process, a plain loop, nothing wrapped, nothing checkpointed.

The batch of a step is two micro-batches. One process takes them one after the other (gradient accumulation), two ranks
take one each: the numbers are the same. Both have as many real tokens, so that no average depends on who weighs them.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import sinkroute
from sinkroute.adapters.hf.handle import Handle
from sinkroute.routing.ranks import Ranks

STEPS, MICRO_BATCHES, ROWS, LR = 3, 2, 2, 0.5
VOCAB, EXPERTS, TOP_K, PAD, EOS = 64, 4, 2, 0, 1
AUX = 0.5  # of the load-balancing loss: as large as the loss of the task, so that nobody overlooks it
BETA = 0.1  # of DPO


class Method(NamedTuple):
    """A router on the model that can serve by it; no name: the model as it is."""

    model: str
    name: str | None
    options: dict[str, Any]


def _every_other(step: int) -> float:
    return float(step % 2 == 0)


METHODS = {
    "none, Mixtral": Method("mixtral", None, {}),
    "none, DeepSeek-V3": Method("deepseek", None, {}),
    "ssr-dual in the gate": Method("mixtral", "ssr-dual", {}),
    "ssr-dual in the bias": Method("deepseek", "ssr-dual", {}),
    "ssr-l": Method("mixtral", "ssr-l", {"probability": _every_other, "noise": 0.0}),
    "load-balance": Method("mixtral", "load-balance", {"losses": {"load-balance": AUX}}),
    "loss-free": Method("deepseek", "loss-free", {"update_rate": 0.05}),
}


def make_model(method: Method) -> transformers.PreTrainedModel:
    """Tiny, with gates that are out of balance; the loss of the model is on wherever it is ours to switch it off."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_experts_per_tok": TOP_K, "initializer_range": 0.2, "pad_token_id": PAD, "eos_token_id": EOS}
    torch.manual_seed(0)
    if method.model == "mixtral":
        own = 0.0 if method.name is None else AUX
        config = transformers.MixtralConfig(
            **sizes, intermediate_size=16, num_key_value_heads=1, num_local_experts=EXPERTS, router_aux_loss_coef=own
        )
        return transformers.MixtralForCausalLM(config)
    low_rank = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    grouping = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    sizes |= {"num_key_value_heads": 2, "moe_intermediate_size": 16, "intermediate_size": 16}
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes, **low_rank, **grouping))


def gates(model: nn.Module) -> list[nn.Module]:
    return [part for path, part in model.named_modules() if path.endswith("mlp.gate")]


# -- data: each micro-batch has rows of other lengths, and as many tokens as any ------------------------------------


def tokens(*key: int, length: int) -> list[int]:
    """The same for the same key; neither padding nor the end of a text."""
    seed = functools.reduce(lambda found, number: found * 1009 + number, key, 7)
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def texts() -> list[list[int]]:
    """One row after another, as trainers read them: of micro-batch after micro-batch, of step after step."""
    return [tokens(row, length=12 if row % ROWS == 0 else 7) for row in range(STEPS * MICRO_BATCHES * ROWS)]


def preferences() -> list[dict[str, list[int]]]:
    """Prompts of one token: the same tokens in both rows would tie at the edge of what ssr-dual counts."""
    return [
        {
            "prompt": tokens(row, 0, length=1),
            "chosen": [*tokens(row, 1, length=5 if row % ROWS == 0 else 2), EOS],
            "rejected": [*tokens(row, 2, length=3), EOS],
        }
        for row in range(STEPS * MICRO_BATCHES * ROWS)
    ]


def prompts() -> list[list[int]]:
    """One for the two completions of a micro-batch."""
    return [tokens(row, 3, length=5) for row in range(STEPS * MICRO_BATCHES)]


def completion(prompt: list[int], number: int) -> list[int]:
    """What a rollout is taken to have written, whatever it wrote: which tokens it picks would hang on the last bits."""
    written = tokens(*prompt, number, length=6)
    return written if number == 0 else [*written[:3], EOS]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    length = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def labelled(rows: list[list[int]]) -> dict[str, Tensor]:
    batch = padded(rows)
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


# -- losses ----------------------------------------------------------------------------------------------------------


def log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, L - 1): of each next token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[..., 0]


def causal_loss(model: nn.Module, frozen: nn.Module, number: int) -> Tensor:
    batch = padded(texts()[number * ROWS : (number + 1) * ROWS])
    real = batch["attention_mask"][:, 1:].bool()
    return -log_probs(model, batch)[real].mean()


def preference_loss(model: nn.Module, frozen: nn.Module, number: int) -> Tensor:
    pairs = preferences()[number * ROWS : (number + 1) * ROWS]
    batch = padded([pair["prompt"] + pair[side] for side in ("chosen", "rejected") for pair in pairs])
    completed = batch["attention_mask"][:, 1:].clone()
    completed[:, : len(pairs[0]["prompt"]) - 1] = 0
    with torch.no_grad():
        reference = (log_probs(frozen, batch) * completed).sum(1)
    chosen, rejected = ((log_probs(model, batch) * completed).sum(1) - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def policy_loss(model: nn.Module, frozen: nn.Module, number: int) -> Tensor:
    prompt = prompts()[number]
    batch = padded([prompt + completion(prompt, reply) for reply in range(2)])
    written = batch["attention_mask"][:, len(prompt) :]
    found = log_probs(model, batch)[:, len(prompt) - 1 :]
    rewards = torch.tensor([1.0, 0.0])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    gained = (found - found.detach()).exp() * advantages[:, None]
    return -((gained * written).sum(1) / written.sum(1)).mean()


LOSSES = {"causal": causal_loss, "preference": preference_loss, "policy": policy_loss}


# -- what a run leaves, and the plain loop's -------------------------------------------------------------------------


class Run(NamedTuple):
    """What is compared.

    Attributes:
        losses: of each step.
        with_aux: the same with the routers' own, where they have one.
        gates: of each layer, (E, D): how far SGD, and what else moves it, has moved the gate.
        loads: of each layer, (E,): choices of real tokens, each pass once.
        served: logits of the model that was saved, loaded as a plain one.
    """

    losses: Tensor
    with_aux: Tensor
    gates: Tensor
    loads: Tensor
    served: Tensor


def probe() -> Tensor:
    return torch.tensor([tokens(99, row, length=12) for row in range(4)])


def balance_loss(logits_TE: Tensor, experts_TK: Tensor, mask_T: Tensor) -> Tensor:
    """E · Σ share of the choices · mean probability: written once more, as what is compared must not judge itself."""
    share_E = F.one_hot(experts_TK[mask_T].flatten(), EXPERTS).float().mean(0)
    return EXPERTS * (share_E * logits_TE[mask_T].softmax(-1).mean(0)).sum()


def _watch_balance(model: nn.Module) -> tuple[list[Tensor], list[Any]]:
    """The balance loss of each layer of each pass to come, and the hooks that put it there."""
    seen: list[Tensor] = []
    masks: list[Tensor] = []
    hooks: list[Any] = [
        model.register_forward_pre_hook(
            lambda _, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ]
    for gate in gates(model):
        hooks.append(
            gate.register_forward_hook(
                lambda _, args, out: seen.append(balance_loss(out[0], out[2], masks[-1].flatten().bool()))
            )
        )
    return seen, hooks


@functools.cache
def plain_run(kind: str, label: str) -> Run:
    """The numbers that all trainers have to find, by this loss and this one of `METHODS`."""
    method = METHODS[label]
    model, frozen = make_model(method).train(), make_model(method).eval()
    routed_by_itself = method.name in (None, "load-balance")
    handle = sinkroute.patch(model, "softmax") if routed_by_itself else None
    handle = handle or sinkroute.patch(model, str(method.name), **method.options)
    for router in handle.routers.values():
        router.ranks = router.ranks._replace(
            load=Ranks(None), noise=Ranks(None)
        )  # where ranks are joined, each has this loop for itself
    before = torch.stack([gate.weight.detach().clone() for gate in gates(model)])
    seen, hooks = _watch_balance(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses, with_aux = [], []
    with sinkroute.LoadMonitor(model) as monitor:
        for step in range(STEPS):
            losses.append(0.0)
            with_aux.append(0.0)
            for micro_batch in range(MICRO_BATCHES):
                seen.clear()
                sinkroute.set_step(model, step, micro_batch)
                loss = LOSSES[kind](model, frozen, step * MICRO_BATCHES + micro_batch)
                total = loss + AUX * torch.stack(seen).sum() if method.name == "load-balance" else loss
                (total / MICRO_BATCHES).backward()
                losses[-1] += loss.item() / MICRO_BATCHES
                with_aux[-1] += total.item() / MICRO_BATCHES
            optimizer.step()
            optimizer.zero_grad()
            sinkroute.end_step(model)
        loads = torch.tensor([row["load"] for row in monitor.metrics().values()])
    moved = torch.stack([gate.weight.detach() for gate in gates(model)]) - before
    handle.remove()
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        served = model.eval()(input_ids=probe()).logits
    return Run(torch.tensor(losses), torch.tensor(with_aux), moved, loads, served)


def patched(method: Method) -> tuple[transformers.PreTrainedModel, Handle | None]:
    """The model that a trainer is given."""
    model = make_model(method)
    return model, None if method.name is None else sinkroute.patch(model, method.name, **method.options)


def differences(found: Run, wanted: Run) -> list[str]:
    """In words, what is not equal; nothing if all is."""
    said = []
    losses = [(found.losses - losses).abs().max().item() for losses in (wanted.losses, wanted.with_aux)]
    if not min(losses) < 1e-4:
        told = " ".join(f"{value:.4f}" for value in found.losses.tolist())
        plain = " ".join(f"{value:.4f}" for value in wanted.losses.tolist())
        said.append(f"losses {told} instead of {plain}")
    for name in ("gates", "served"):
        got, want = getattr(found, name), getattr(wanted, name)
        off = (got - want).abs().max().item() / want.abs().max().item()
        if not off < 2e-3:
            said.append(f"{name} off by {off:.2g} of the largest")
    if not torch.equal(found.loads, wanted.loads):
        said.append(f"{int(found.loads.sum())} choices counted, {found.loads.tolist()} instead of "
                    f"{wanted.loads.tolist()}")  # fmt: skip
    return said
