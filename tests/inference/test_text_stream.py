"""Text of tokens that come one at a time, and stop strings in it."""

from __future__ import annotations

import random

import pytest

from hand_made import small_tokenizer
from pipekit.data.tokenizer import TextTokenizer
from pipekit.inference.text_stream import TextStream


def tokenizer() -> TextTokenizer:
    return TextTokenizer(small_tokenizer(), "<|endoftext|>", 0)


def pieces(text: str, *, stop: tuple[str, ...] = (), prompt: str = "def") -> tuple[list[str], bool]:
    """Pieces in which the tokens of a text come, until a stop string, and whether one has come."""
    own = tokenizer()
    stream = TextStream(own, own.encode(prompt), stop=stop)
    found = []
    for token in own.encode(text):
        found.append(stream.push(token))
        if stream.has_stopped:
            break
    return [*found, stream.finish()], stream.has_stopped


def joined(text: str, **options: object) -> str:
    return "".join(pieces(text, **options)[0])  # type: ignore[arg-type]


def test_without_a_stop_string_each_token_is_shown_at_once() -> None:
    assert pieces(" xyz") == ([" ", "x", "y", "z", ""], False)


def test_a_long_text_of_characters_of_several_tokens_comes_back() -> None:
    text = "".join(random.Random(1).choices("aé€\U0001d11e \n", k=400))
    assert joined(text) == text


@pytest.mark.parametrize("text", ["x\n\ny", "x\n\n", "x\n\n\n\ny"])
def test_a_stop_string_of_several_tokens_ends_the_text_before_it(text: str) -> None:
    assert joined(text, stop=("\n\n",)) == "x"
    assert pieces(text, stop=("\n\n",))[1]


def test_a_stop_string_within_a_token_cuts_it() -> None:
    own = tokenizer()
    assert len(own.encode(" return")) == 1
    assert joined("x return y", stop=("tu",)) == "x re"


def test_what_only_begins_like_a_stop_string_is_shown_when_that_is_known() -> None:
    assert pieces("xyxyz", stop=("xyz",)) == (["", "", "xy", "", "", ""], True)
    assert pieces("xyw", stop=("xyz",)) == (["", "", "xyw", ""], False)
    assert pieces("xy", stop=("xyz",)) == (["", "", "xy"], False), "and at the end of the text"


def test_the_first_of_several_stop_strings_counts() -> None:
    assert joined("abcdef", stop=("def", "c", "cde")) == "ab"


def test_a_stop_string_in_the_prompt_or_across_its_end_does_not_count() -> None:
    assert joined("yz", stop=("x", "xy"), prompt="x") == "yz"


def test_the_text_is_that_of_a_plain_search_for_any_text() -> None:
    draw = random.Random(2)
    for _ in range(200):
        text = "".join(draw.choices("abé", k=12))
        stops = tuple("".join(draw.choices("abé", k=draw.randint(1, 4))) for _ in range(2))
        # A stop string ends the text as soon as it is whole, wherever a longer one may have begun before.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(ends)[1]] if ends else text
        assert joined(text, stop=stops) == expected, (text, stops)
