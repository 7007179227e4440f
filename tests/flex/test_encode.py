import pytest

from flex.config import DataConfig
from flex.data.encode import completion_ids, encode, encode_all, prompt_ids
from flex.data.ledger import Ledger
from flex.data.prompts import Prompted
from flex.data.rows import Row
from flex.errors import DataError, ModelError
from flex.state import IGNORE
from tests.flex.tiny_tokenizer import byte_tokenizer, llama_like_tokenizer

BYTES = byte_tokenizer()
LLAMA = llama_like_tokenizer()


def config(**options):
    return DataConfig(name="jsonl", path="rows.jsonl", **options)


def spelt(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def pair(i, prompt, completion):
    return Row("pair", f"r:{i}", f"rows.jsonl:{i}", prompt, completion)


def test_loss_is_on_the_completion_and_eos_and_labels_are_shifted():
    example = encode(Prompted("ab", "cd"), BYTES, config(), "rows.jsonl:1")
    a, b, c, d = spelt(BYTES, "abcd")
    eos = BYTES.eos_token_id
    assert example.input_ids.tolist() == [a, b, c, d, eos]
    assert example.labels.tolist() == [IGNORE, c, d, eos, IGNORE]
    assert (example.num_targets, example.truncated, example.row) == (3, False, "rows.jsonl:1")


def test_full_loss_is_on_all_but_the_first_token():
    example = encode(Prompted("ab", "cd"), BYTES, config(loss_on="full"))
    assert example.labels.tolist() == [*example.input_ids[1:].tolist(), IGNORE]


@pytest.mark.parametrize(
    ("max_length", "kept", "targets", "truncated"),
    [
        (6, 5, 3, False),
        (5, 5, 3, False),
        (4, 4, 2, True),
        (3, 3, 1, True),
        (2, 2, 0, True),
        (1, 1, 0, True),
    ],
)
def test_a_cut_takes_the_end_with_its_eos(max_length, kept, targets, truncated):
    example = encode(Prompted("ab", "cd"), BYTES, config(max_length=max_length))
    whole = [*spelt(BYTES, "abcd"), BYTES.eos_token_id]
    assert example.input_ids.tolist() == whole[:kept]
    assert (example.num_targets, example.truncated) == (targets, truncated)
    assert example.labels[-1] == IGNORE


def test_bos_is_added_once_where_the_tokenizer_adds_one():
    plain, with_bos = byte_tokenizer(), byte_tokenizer(bos=True)
    assert prompt_ids("a", plain) == spelt(plain, "a")
    assert prompt_ids("a", with_bos) == [with_bos.bos_token_id, *spelt(with_bos, "a")]
    assert prompt_ids("<s>a", with_bos) == prompt_ids("a", with_bos)
    example = encode(Prompted("a", "b"), with_bos, config())
    assert example.input_ids.tolist() == [1, *spelt(with_bos, "ab"), 2]
    assert example.num_targets == 2


@pytest.mark.parametrize("tokenizer", [BYTES, byte_tokenizer(bos=True), LLAMA])
@pytest.mark.parametrize(
    "completion", ["def f():\n    return 1", "    x", "\n\n y", "\u00e9\u2603 z"]
)
def test_prompt_and_completion_join_to_the_text(tokenizer, completion):
    example = encode(Prompted("# add\n\n", completion), tokenizer, config())
    ids = [i for i in example.input_ids.tolist() if i not in (1, 2)]
    assert tokenizer.decode(ids) == f"# add\n\n{completion}"


def test_a_space_that_the_tokenizer_puts_in_front_does_not_reach_the_code():
    joined = prompt_ids("a\n", LLAMA) + completion_ids("def", LLAMA)
    assert LLAMA.convert_ids_to_tokens(joined) == ["<s>", "\u2581a", "<0x0A>", "d", "e", "f"]
    assert joined == LLAMA("a\ndef").input_ids


def test_special_tokens_spelt_out_in_code_stay_text():
    example = encode(Prompted("a", "<b></s></b>"), BYTES, config())
    assert example.input_ids.tolist().count(BYTES.eos_token_id) == 1
    assert BYTES.decode(example.input_ids[1:-1]) == "<b></s></b>"
    # The switch must not outlive the call: chat templates rely on special tokens.
    assert prompt_ids("</s>", BYTES) == [BYTES.eos_token_id]


def test_a_tokenizer_without_eos_is_an_error():
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS"):
        encode(Prompted("a", "b"), tokenizer, config())


ROWS = [pair(1, "ab", "cd"), pair(2, "a" * 9, "b"), pair(3, "ab", "c" * 20), pair(4, "a" * 10, "b")]


def test_a_row_without_target_tokens_is_an_error_naming_it():
    with pytest.raises(DataError) as caught:
        encode_all(ROWS, BYTES, config(max_length=9))
    assert "2 of 4 rows" in caught.value.what
    assert "rows.jsonl:2: no target tokens" in caught.value.what
    assert "rows.jsonl:4: no target tokens" in caught.value.what
    assert "data.max_length (now 9)" in caught.value.fix


def test_a_row_without_target_tokens_is_counted_when_skipped():
    examples, ledger = encode_all(ROWS, BYTES, config(max_length=9, on_bad_row="skip"))
    assert [example.row for example in examples] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert (ledger.read, ledger.used, ledger.truncated) == (4, 2, 1)
    assert ledger.dropped == {"no target tokens": 2}
    assert ledger.summary() == (
        "4 rows read: 2 used (1 truncated), 0 set aside, "
        "2 dropped (no target tokens: 2, first rows.jsonl:2)"
    )


def test_a_given_ledger_is_completed():
    ledger = Ledger(read=7)
    ledger.drop("rows.jsonl:9", "not JSON", "")
    ledger.set_aside["test"] += 2
    cfg = config(max_length=9, on_bad_row="skip")
    _, same = encode_all(ROWS, BYTES, cfg, ledger)
    assert same is ledger
    assert ledger.read == ledger.used + ledger.set_aside.total() + ledger.dropped.total() == 7
    assert ledger.dropped == {"not JSON": 1, "no target tokens": 2}
