"""The vocabulary compared with a plain dict, and its error messages."""

import random
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chargpt.model import UserError
from chargpt.vocabulary import Vocabulary

# st.characters() excludes surrogates; a prompt from a terminal may have them
any_text = st.text(alphabet=st.characters(exclude_categories=()), max_size=200)


@given(any_text)
def test_decode_inverts_encode(text):
    vocabulary = Vocabulary.from_text(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


@given(any_text, any_text)
def test_encode_agrees_with_a_dict(text, more):
    vocabulary = Vocabulary.from_text(text + more)
    ids = {character: id for id, character in enumerate(sorted(set(text + more)))}
    assert vocabulary.encode(text).tolist() == [ids[character] for character in text]


@given(st.text(max_size=50), st.text(max_size=50))
def test_encode_fails_exactly_if_a_character_is_unknown(known, text):
    vocabulary = Vocabulary.from_text(known)
    unknown = set(text) - set(known)
    if not unknown:
        assert len(vocabulary.encode(text)) == len(text)
    else:
        with pytest.raises(UserError) as error:
            vocabulary.encode(text)
        first = next(character for character in text if character in unknown)
        assert f"(U+{ord(first):04X}) at position {text.index(first)}" in str(error.value)


@pytest.mark.parametrize(
    "size, dtype",
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")],
)
def test_ids_take_the_narrowest_type(size, dtype):
    characters = "".join(chr(code) for code in range(0x1000, 0x1000 + size))
    vocabulary = Vocabulary(characters)
    text = "".join(random.Random(size).sample(characters, k=min(size, 500))) + characters[-1]
    assert len(vocabulary) == size
    assert vocabulary.dtype == vocabulary.encode(text).dtype == np.dtype(dtype)
    assert vocabulary.encode(characters).tolist() == list(range(size))
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_every_code_point_at_once():
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    vocabulary = Vocabulary(characters)
    assert vocabulary.decode(vocabulary.encode(characters)) == characters


def test_a_vocabulary_is_the_sorted_distinct_characters():
    vocabulary = Vocabulary.from_text("hello\0\n\ufeffe\u0301🙂")
    assert vocabulary.characters == "\0\nehlo\u0301\ufeff🙂"
    assert vocabulary == Vocabulary(vocabulary.characters)
    assert vocabulary != Vocabulary.from_text("hello")
    assert len({vocabulary, Vocabulary(vocabulary.characters)}) == 1


@pytest.mark.parametrize("characters", ["aa", "abca"])
def test_repeated_characters_are_refused(characters):
    with pytest.raises(UserError, match="distinct"):
        Vocabulary(characters)


def test_a_vocabulary_is_extended_without_moving_ids():
    vocabulary = Vocabulary("bd").extended(Vocabulary.from_text("abcd"))
    assert vocabulary.characters == "bdac"
    assert vocabulary.encode("abcd").tolist() == [2, 0, 3, 1]
    assert vocabulary.decode([2, 0, 3, 1]) == "abcd"


def test_the_error_names_code_point_position_and_similar_characters():
    vocabulary = Vocabulary.from_text("abcdefghijklmnopqrstuvwxyz XYZ'-\n")
    with pytest.raises(UserError) as error:
        vocabulary.encode("Romé’s 7\ud800 \u0301")
    message = str(error.value)
    assert "'R' (U+0052) at position 0, nearest known: 'r'" in message
    assert "'é' (U+00E9) at position 3, nearest known: 'e'" in message
    assert "'’' (U+2019) at position 4, nearest known: \"'\"" in message
    assert "'7' (U+0037) at position 7;" in message  # nothing is similar
    assert "'\\ud800' (U+D800) at position 8" in message
    assert "'\\u0301' (U+0301) at position 10" in message
    assert "\n" not in message


def test_a_newline_that_was_typed_literally_is_explained():
    for known, explained in (("abn", True), ("abn\\", False)):
        with pytest.raises(UserError) as error:
            Vocabulary(known).encode(r"a\nbx")
        assert (r"\n is not a newline here" in str(error.value)) == explained
        assert len(str(error.value).splitlines()) == 1 + explained
    with pytest.raises(UserError) as error:
        Vocabulary("abn").encode(r"a\b")
    assert "newline" not in str(error.value)


def test_the_error_message_for_many_unknown_characters_is_short():
    text = "".join(map(chr, range(0x4E00, 0x5E00))) * 5
    with pytest.raises(UserError) as error:
        Vocabulary.from_text("abc").encode(text)
    assert "(U+4E00) at position 0; " in str(error.value)
    assert "and 4,086 more" in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "ids", [[2, 0, 1], (2, 0, 1), np.array([2, 0, 1], np.uint64), np.array([2, 0, 1], np.int8)]
)
def test_decode_accepts_any_integer_type(ids):
    assert Vocabulary("abc").decode(ids) == "cab"


def test_decode_accepts_tensors_single_ids_and_empty_input():
    torch = pytest.importorskip("torch")
    assert Vocabulary("abc").decode(torch.tensor([2, 0, 1])) == "cab"
    assert Vocabulary("abc").decode(torch.tensor(1)) == "b"
    assert Vocabulary("abc").decode(torch.tensor([])) == ""
    assert Vocabulary("abc").decode([]) == ""
    assert Vocabulary("").encode("").tolist() == []


@pytest.mark.parametrize("ids, wrong", [([0, 3], "id 3"), ([-1], "id -1")])
def test_decode_refuses_ids_outside_the_vocabulary(ids, wrong):
    with pytest.raises(UserError, match=f"{wrong} is outside the vocabulary of 3"):
        Vocabulary("abc").decode(ids)


@pytest.mark.parametrize("ids", [[0.5], [[0, 1], [1, 2]], ["a"], [True]])
def test_decode_refuses_anything_but_integers_in_one_dimension(ids):
    with pytest.raises(TypeError):
        Vocabulary("abc").decode(ids)
