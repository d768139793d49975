"""What the tutorials start from, without a download: a text, and a small mixture that learned a little of it.

The text is the head of a Wikipedia dump that ships with gensim. The mixture is an OLMoE of 1.6 million parameters: 3
layers of 16 experts, top-2. It is trained for 60 steps as transformers makes it, with no balancing: as any young
mixture that is left alone it sends most tokens to a few experts.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from sinkroute.lab.data import load_corpus

LENGTH, BATCH, STEPS = 128, 16, 60


def write_texts(folder):
    """Text to train on and text that is held out, 1.1 MB and 0.1 MB: the paths of two files in UTF-8.

    They are lines from all over the dump, so that a few windows of them are about many things.
    """
    corpus = load_corpus("wikipedia")
    out = []
    for name, part, every in (("train", corpus.train, 5), ("held-out", corpus.valid, 3)):
        path = Path(folder, f"{name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = part.tobytes().decode("utf-8", errors="ignore").splitlines(keepends=True)
        path.write_text("".join(lines[::every]), encoding="utf-8", newline="")
        out.append(path)
    return out


def cut(tokenizer, text, length=LENGTH):
    """Windows of token ids without overlap, (N, length) int64."""
    ids = tokenizer(Path(text).read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(ids) // length
    return torch.tensor(ids[: windows * length]).view(windows, length)


def untrained(seed=0):
    """The mixture with the weights that transformers draws."""
    torch.manual_seed(seed)
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config)


def make_tokenizer(text):
    """Byte-level BPE of 1024 symbols, learned from the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = Path(text).read_text(encoding="utf-8").splitlines()
    backend.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=1024, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=LENGTH)


def make_checkpoint(folder, text):
    """Train the mixture on the text and save it, unless it is there; returns the folder, for `from_pretrained`."""
    if Path(folder, "model.safetensors").exists():
        return str(folder)
    make_tokenizer(text).save_pretrained(folder)
    windows, model = cut(AutoTokenizer.from_pretrained(folder), text), untrained()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20))
    for rows in windows[torch.randperm(len(windows))[: STEPS * BATCH]].split(BATCH):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
    model.save_pretrained(folder)
    return str(folder)
