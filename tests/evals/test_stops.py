"""Completions end before the first stop, wherever their tokens divide it."""

import random

import pytest

from flex.evals.stops import Completion, cut
from tests.flex.tiny_tokenizer import byte_tokenizer, llama_like_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer, "llama": llama_like_tokenizer}
STOPS = ("\nclass", "\ndef", "\n#", "\n    }\n")


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def ids(tokenizer, text):
    return tokenizer("\n" + text, add_special_tokens=False).input_ids[
        len(tokenizer("\n", add_special_tokens=False).input_ids) :
    ]


def fed(tokenizer, text, stops=STOPS, prompt="def f():\n"):
    """The completion after as many tokens of `text` as it took; and the rest of the tokens."""
    completion = Completion(tokenizer, tokenizer(prompt).input_ids, stops)
    tokens = ids(tokenizer, text)
    for count, token in enumerate(tokens, start=1):
        if completion.push(token):
            return completion, len(tokens) - count
    return completion, None


def test_cut_takes_the_earliest_whatever_the_order():
    text = "a\n#b\ndef c\nclass d"
    assert cut(text, ["\nclass", "\ndef", "\n#"]) == cut(text, ["\n#", "\nclass"]) == "a"
    assert cut(text, ["\nclass", "\ndef"]) == "a\n#b"
    assert cut(text, ["zz"]) == text and cut("\n#", ["\n#"]) == ""


def test_it_ends_with_the_token_that_completes_a_stop(tokenizer):
    completion, left = fed(tokenizer, "    return 1\n\ndef g():\n    pass")
    assert completion.text() == "    return 1\n"
    assert left == len(ids(tokenizer, "x g():\n    pass")) - len(ids(tokenizer, "x"))


def test_a_beginning_of_a_stop_is_not_one(tokenizer):
    text = "    x = {}\n    }\n   \nde\nclas\n"
    completion, left = fed(tokenizer, text.replace("\n    }\n", "\n    } \n"))
    assert left is None and completion.text() == text.replace("\n    }\n", "\n    } \n")


def test_indentation_at_the_front_is_kept(tokenizer):
    # a Llama tokenizer decodes a text of its own without its first space
    completion, _ = fed(tokenizer, "    return  x ,y\n")
    assert completion.text() == "    return  x ,y\n"


def test_a_stop_begins_after_the_prompt(tokenizer):
    completion, left = fed(tokenizer, "def g", prompt="x\n\n")
    assert left is None and completion.text() == "def g"
    completion, left = fed(tokenizer, "abcdefghijk\n#", prompt="\n#\n#\n#")
    assert left == 0 and completion.text() == "abcdefghijk"


@pytest.mark.parametrize("stop", ["é", "\n\U0001f600", "日本"])
def test_characters_of_several_bytes(tokenizer, stop):
    completion, left = fed(tokenizer, f"ü = 1\n日{stop}rest", (stop,), prompt="# ß\n")
    assert completion.text() == cut(f"ü = 1\n日{stop}rest", [stop])
    assert left == len(ids(tokenizer, "rest"))


def test_half_a_character_at_the_end(tokenizer):
    completion = Completion(tokenizer, tokenizer("x\n").input_ids, STOPS)
    for token in ids(tokenizer, "a\U0001f600")[:-1]:
        assert not completion.push(token)
    assert completion.text().startswith("a\ufffd")
    completion.text().encode()


def test_special_tokens_leave_no_text(tokenizer):
    completion = Completion(tokenizer, tokenizer("x\n").input_ids, STOPS)
    for token in [*ids(tokenizer, "a"), tokenizer.eos_token_id]:
        completion.push(token)
    assert completion.text() == "a"


def test_each_place_of_a_stop_against_the_whole_text(tokenizer):
    rng = random.Random(0)
    pieces = ["\n", "#", "def", "\ncl", "ass", " ", "    }", "ö", "\U0001f600", "x"]
    stopped = 0
    for _ in range(150):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        completion, left = fed(tokenizer, text)
        assert completion.text() == cut(text, STOPS), text
        assert (left is not None) == any(stop in text for stop in STOPS)
        stopped += left is not None
    assert 20 < stopped < 140


def test_an_empty_stop_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        Completion(tokenizer, [5], ("",))


def test_a_stop_at_the_very_front(tokenizer):
    completion, left = fed(tokenizer, " x = 1", (" x",))
    assert completion.text() == "" and left == len(ids(tokenizer, " = 1"))
