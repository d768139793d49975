"""Words and their ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkroute.lab.data import Vocabulary
from sinkroute.lab.data.vocabulary import FirstSeen

WORDS = st.lists(st.text(min_size=1, max_size=3))


@given(WORDS)
def test_ids_follow_the_order_in_which_words_are_first_seen(words):
    seen = FirstSeen()
    ids = seen.encode(words)
    order = []
    for word in words:
        if word not in order:
            order.append(word)
    assert seen.vocabulary().words == tuple(order)
    assert [order[place] for place in ids] == words


@given(WORDS, WORDS)
def test_words_of_a_second_text_come_after_those_of_the_first(one, two):
    apart, joined = FirstSeen(), FirstSeen()
    assert [*apart.encode(one), *apart.encode(two)] == list(joined.encode(one + two))
    assert apart.vocabulary() == joined.vocabulary()


def test_a_word_is_found_by_its_id_and_its_id_by_the_word():
    vocabulary = Vocabulary(("to", "be"))
    assert (vocabulary.words[1], vocabulary.id("be"), vocabulary.id("not"), len(vocabulary)) == ("be", 1, None, 2)


def test_an_unknown_word_becomes_unk():
    assert Vocabulary(("to", "<unk>", "be")).encode(["be", "not", "to"]).tolist() == [2, 1, 0]


def test_an_unknown_word_without_unk_is_named():
    with pytest.raises(ValueError, match="words: 'not' is not among the 2 words of this vocabulary, and neither is"):
        Vocabulary(("to", "be")).encode(["be", "not"])


def test_a_word_that_stands_twice_is_named():
    with pytest.raises(ValueError, match="words: 'be' stands twice"):
        Vocabulary(("to", "be", "or", "be"))


@pytest.mark.parametrize(
    ("symbols", "dtype"), [(256, np.uint8), (257, np.uint16), (65_536, np.uint16), (65_537, np.int32)]
)
def test_ids_are_of_the_smallest_type_that_holds_them_all(symbols, dtype):
    vocabulary = Vocabulary(tuple(map(str, range(symbols))))
    last = vocabulary.encode([str(symbols - 1)])
    assert last.dtype == dtype
    assert last.tolist() == [symbols - 1]


def test_symbols_that_are_bytes_translate_both_ways():
    vocabulary = Vocabulary(("99", "97", "98"), b"cab")
    data = np.frombuffer(b"abcabc", dtype=np.uint8)
    ids = vocabulary.from_bytes(data)
    assert ids.tolist() == [1, 2, 0, 1, 2, 0]
    assert vocabulary.to_bytes(ids).tobytes() == b"abcabc"


def test_a_byte_that_is_no_symbol_is_named():
    with pytest.raises(ValueError, match="data: byte 100 is not among the 3 symbols"):
        Vocabulary(("99", "97", "98"), b"cab").from_bytes(np.frombuffer(b"abd", dtype=np.uint8))
