"""Train a small OLMoE with random weights by transformers' Trainer: SSR against the model's own balancing loss.

    pip install "sinkroute[lab]"
    python examples/finetune_olmoe.py                                     # ssr-l, own-loss and none, one after another
    python examples/finetune_olmoe.py --router ssr-l --probability 0.05 --steps 1000 --report-to tensorboard

Killed? The same command continues from the last checkpoint. Text is the bytes of some Wikipedia articles, for which
nothing has to be downloaded. For your own model take your own data and `from_pretrained`: the three lines that are
numbered stay as they are.
"""

import argparse
import math
import os

import torch
from rich.console import Console
from rich.table import Table
from transformers import OlmoeConfig, OlmoeForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import sinkroute
from sinkroute.adapters.hf import RouterCallback  # 1
from sinkroute.lab.data import load_corpus

LENGTH = 128


def make_model(own_loss):
    config = OlmoeConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        output_router_logits=own_loss,  # what makes transformers add the model's own balancing loss
        router_aux_loss_coef=0.01,
        pad_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def windows(text, count):
    """`count` windows, spread over the text, as the model takes them."""
    starts = torch.linspace(0, len(text) - LENGTH, count).long().tolist()
    rows = [torch.tensor(text[start : start + LENGTH].copy(), dtype=torch.int64) for start in starts]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(router, options):
    set_seed(options.seed)
    model = make_model(own_loss=router == "own-loss")
    if router in ("own-loss", "none"):
        handle = sinkroute.patch(model, "softmax")  # changes nothing, and counts the loads
    else:
        handle = sinkroute.patch(model, router, probability=options.probability)  # 2
    print(handle)

    corpus = load_corpus("wikipedia")
    settings = TrainingArguments(
        os.path.join(options.out, router),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        logging_steps=max(1, options.steps // 10),
        save_steps=max(1, options.steps // 2),
        report_to=options.report_to,
        seed=options.seed,
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=windows(corpus.train, options.steps * 16),
        eval_dataset=windows(corpus.valid, 128),
    )
    RouterCallback(handle).attach(trainer)  # 3
    trainer.train(resume_from_checkpoint=get_last_checkpoint(settings.output_dir))

    model.config.output_router_logits = False  # or the loss of the evaluation would have the balancing loss in it
    served = trainer.evaluate()
    trained = [log["router/max_vio"] for log in trainer.state.log_history if "router/max_vio" in log]
    handle.remove()
    trainer.save_model(os.path.join(options.out, router, "model"))  # a plain OLMoE, for from_pretrained
    return (
        router,
        f"{served['eval_loss'] / math.log(2):.3f}",
        f"{trained[0]:.2f} … {trained[-1]:.2f}",
        f"{served['eval_router/max_vio_global']:.2f}",
        str(sum(value for name, value in served.items() if name.endswith("/dead"))),
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Train a small OLMoE by Trainer, routed by sinkroute or as it is.")
    parser.add_argument(
        "--router", nargs="+", default=["ssr-l", "own-loss", "none"], help="ssr-l, ssr-s, ..., own-loss, none"
    )
    parser.add_argument("--probability", type=float, default=0.1, help="share of the steps that are routed by the plan")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report-to", default="none", help="tensorboard, wandb, ...")
    parser.add_argument("--out", default="runs/finetune_olmoe")
    options = parser.parse_args(arguments)
    table = Table("router", "valid bits/byte", "MaxVio in training", "MaxVio serving", "dead of 64 experts")
    for row in [train(router, options) for router in options.router]:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
