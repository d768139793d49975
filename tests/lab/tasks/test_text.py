"""What language models of all kinds have in common: symbols, measures, attacks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sinkroute.lab.data import Corpus, Vocabulary
from sinkroute.lab.data.corpus import encoded_corpus, split_corpus
from sinkroute.lab.evaluation import Evaluation
from sinkroute.lab.tasks import make_task

from .small import WORDS, config, words

FOUND = Evaluation(count=10, nats=2.0, wrong=4, load_LE=torch.ones(1, 4, dtype=torch.int64), max_vio_batch=0.0)


def of_bytes() -> Corpus:
    return split_corpus("text", "bytes", b"to be or not to be\n" * 1200)


def of_renumbered_bytes() -> Corpus:
    vocabulary = Vocabulary(("t", "o", " ", "b"), byte_values=b"to b")
    ids = np.random.default_rng(0).integers(4, size=600)
    return encoded_corpus("renumbered", "bytes", vocabulary, ids, ids[:300], ids[300:])


def test_a_model_with_fewer_symbols_than_the_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"model\.vocab must be 23 or more, got 22: .* the text 'drawn'"):
        make_task(config(model={"vocab": 22}), words())
    with pytest.raises(ValueError, match=r"model\.vocab must be 256 or more, got 100"):
        make_task(config(model={"vocab": 100}), of_bytes())
    make_task(config(model={"vocab": 1000}), words())


def test_words_are_measured_in_perplexity() -> None:
    task = make_task(config(), words())
    assert task.metric == "perplexity"
    assert task.quality(FOUND) == {
        "symbols": 10,
        "perplexity": pytest.approx(7.38905609893065),
        "bits_per_symbol": pytest.approx(2.0 / 0.6931471805599453),
    }


def test_bytes_are_measured_in_bits_also_under_other_numbers() -> None:
    for corpus in (of_bytes(), of_renumbered_bytes()):
        task = make_task(config(model={"vocab": 256}), corpus)
        assert task.metric == "bits_per_byte"
        assert task.quality(FOUND) == {
            "bytes": 10,
            "bits_per_byte": pytest.approx(2.885390081777927),
            "perplexity": pytest.approx(7.38905609893065),
        }


def test_every_metric_has_its_words_in_reports() -> None:
    from sinkroute.lab.study.metric import METRICS

    assert {make_task(config(model={"vocab": 256}), corpus).metric for corpus in (of_bytes(), words())} < set(METRICS)


def test_an_attack_changes_the_words_it_says_and_no_others() -> None:
    corpus = words()
    task = make_task(config(), corpus)
    attacked, before = task.text("valid", ("word-swap", {"rate": 0.1}))
    swapped = attacked != corpus.valid
    assert before == corpus.train[-1]
    assert set(attacked[swapped].tolist()) == {WORDS.index("AAA")}
    assert 0.05 < swapped.mean() < 0.15
    assert np.array_equal(attacked, task.text("valid", ("word-swap", {"rate": 0.1}))[0])


def test_an_attack_of_a_limited_evaluation_is_that_of_its_head() -> None:
    task = make_task(config(eval={"limit": 50}), words())
    assert len(task.text("valid", ("word-swap", {"rate": 0.1}))[0]) == 50


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wordswap", {}, "did you mean 'word-swap'"),
        ("word-swap", {"rat": 0.1}, "did you mean 'rate'"),
        ("word-swap", {"rate": 1.5}, "rate"),
    ],
)
def test_an_attack_that_would_fail_is_found_beforehand(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(config(), words()).check_attack(name, options)


def test_an_attack_for_whose_word_the_vocabulary_has_none_is_found_beforehand() -> None:
    without = Vocabulary((*WORDS[:20], "BBB", "CCC", "DDD"))
    with pytest.raises(ValueError, match="AAA"):
        make_task(config(), replace(words(), vocabulary=without)).check_attack("word-swap", {"rate": 0.5})
