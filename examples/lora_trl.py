"""LoRA with TRL's SFTTrainer on a mixture that sinkroute routes: adapters on the attention, and the gate with them.

    pip install "sinkroute[lab]" peft trl
    python examples/lora_trl.py                                        # a small mixture, made here, about a minute
    python examples/lora_trl.py --model allenai/OLMoE-1B-7B-0924 --text train.txt --held-out other.txt --lr 1e-4

It prints the loads before and after, writes the adapter, and checks that the adapter serves as it was trained. What is
sinkroute's is numbered: two lines. Why the gate is in `modules_to_save`: what the router learns is folded into it, and
only so is it in the adapter's file.
"""

import argparse
from pathlib import Path

import datasets
import peft
import torch
import trl
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from tutorials.small_mixture import LENGTH, cut, make_checkpoint, write_texts

import sinkroute
from sinkroute.adapters.hf import RouterCallback
from sinkroute.lab.inspect import inspect_checkpoint


def train(options, text):
    """Train adapter and gate; returns the model in `eval()`, with the router taken out."""
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(0)})  # TRL asks for one
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["gate"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(options.model), config)
    adapted.print_trainable_parameters()
    handle = sinkroute.patch(adapted)  # 1: after get_peft_model, which copies the gate that is trained
    print(handle)
    rows = [{"input_ids": row} for row in cut(tokenizer, text).tolist()]
    settings = trl.SFTConfig(
        str(options.out / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=options.lr,
        max_length=LENGTH,
        bf16=torch.cuda.is_available(),
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
    )
    trainer = trl.SFTTrainer(
        adapted, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    RouterCallback(handle).attach(trainer)  # 2
    trainer.train()
    print(handle.summary())
    handle.remove()
    return adapted.eval()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder or a hub id; a small mixture is made without it")
    parser.add_argument("--text", type=Path, help="to train on, in UTF-8; text of Wikipedia without it")
    parser.add_argument("--held-out", type=Path, help="to count loads on, in UTF-8; text of Wikipedia without it")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/lora_trl"))
    options = parser.parse_args(arguments)
    made = write_texts(options.out)
    text, held_out = options.text or made[0], options.held_out or made[1]
    options.model = options.model or make_checkpoint(options.out / "start", text)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    adapted = train(options, text)

    # The adapter's file has all that was learned: on the first checkpoint it serves what was trained.
    adapted.save_pretrained(options.out / "adapter")
    base = AutoModelForCausalLM.from_pretrained(options.model)
    loaded = peft.PeftModel.from_pretrained(base, options.out / "adapter").eval()
    ids = cut(tokenizer, held_out)[:8]
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapted.cpu()(input_ids=ids).logits)

    # Merged it is a plain mixture, for every engine.
    merged = str(options.out / "merged")
    loaded.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    table = Table("on held-out text", "MaxVio, mean of layers", "of the worst", "dead experts")
    for name, folder in (("before", options.model), ("after", merged)):
        layers = inspect_checkpoint(folder, held_out, tokens=8192, length=LENGTH).layers
        found = [layer.max_vio for layer in layers]
        dead = sum(len(layer.dead) for layer in layers)
        table.add_row(name, f"{sum(found) / len(found):.2f}", f"{max(found):.2f}", str(dead))
    Console().print(table)


if __name__ == "__main__":
    main()
