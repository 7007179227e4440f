"""Prompt and completion to token ids and labels.

The two are tokenised apart and joined, so that the boundary is exact: no token straddles it, and
the prompt's ids are the ones that generation will see.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import PreTrainedTokenizerBase

from flex.config import DataConfig
from flex.data.ledger import Ledger
from flex.data.prompts import Prompted, render
from flex.data.rows import Row
from flex.errors import ModelError
from flex.state import IGNORE, Example


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a prompt, with the tokenizer's BOS if it adds one and the chat template has not."""
    ids = _ids(prompt, tokenizer)
    bos = _bos(tokenizer)
    return [bos, *ids] if bos is not None and ids[:1] != [bos] else ids


def completion_ids(completion: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a completion as they continue a text, without EOS.

    Special tokens spelt out in the code (`</s>` is HTML too) stay text: an EOS inside would teach
    the model to stop.
    """
    anchor = _anchor(tokenizer)
    head = _ids(anchor, tokenizer, literal=True)
    ids = _ids(anchor + completion, tokenizer, literal=True)
    if ids[: len(head)] != head:
        raise ModelError(
            f"the tokenizer merges a line end with what follows it ({completion[:20]!r})",
            "the boundary between prompt and completion would not be exact",
            "start the completion with a letter, or choose a model with another tokenizer",
        )
    return ids[len(head) :]


def encode(
    prompted: Prompted, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, row: str = ""
) -> Example:
    """Tokenise one row: prompt + completion + EOS, cut at the right to `cfg.max_length`.

    Labels are shifted (see Example). `completion`: the completion's tokens and EOS bear loss;
    `full`: all but the first token. A cut row loses its EOS: the model must not learn to stop
    there. `num_targets` may be 0 after a cut.

    Raises:
        ModelError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no EOS token",
            "the model could not learn to stop",
            "set eos_token in the tokenizer's configuration",
        )
    prompt = prompt_ids(prompted.prompt, tokenizer)
    ids = [*prompt, *completion_ids(prompted.completion, tokenizer), tokenizer.eos_token_id]
    first_target = max(len(prompt), 1) if cfg.loss_on == "completion" else 1
    input_ids = torch.tensor(ids[: cfg.max_length], dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    labels[first_target - 1 : -1] = input_ids[first_target:]
    return Example(input_ids, labels, row=row, truncated=len(ids) > cfg.max_length)


def encode_all(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    cfg: DataConfig,
    ledger: Ledger | None = None,
) -> tuple[list[Example], Ledger]:
    """Render and tokenise rows; account for them in `ledger` (a new one if none is given).

    Raises:
        DataError: a row has no target token left after the cut and `on_bad_row` is `error`.
    """
    examples: list[Example] = []
    account = Ledger(read=len(rows))
    for row in rows:
        example = encode(render(row, cfg.template, tokenizer), tokenizer, cfg, row.origin)
        if example.num_targets == 0:
            detail = f"the prompt alone fills {cfg.max_length} tokens"
            account.drop(row.origin, "no target tokens", detail)
            continue
        examples.append(example)
        account.used += 1
        account.truncated += example.truncated
    fix = f"raise data.max_length (now {cfg.max_length}), or set data.on_bad_row=skip"
    account.settle(cfg.on_bad_row, fix, damaged=False)
    if ledger is None:
        return examples, account
    ledger.used += account.used
    ledger.truncated += account.truncated
    ledger.drops += account.drops
    return examples, ledger


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, *, literal: bool = False) -> list[int]:
    options = {"add_special_tokens": False, "split_special_tokens": literal, "verbose": False}
    return tokenizer(text, **options)["input_ids"]


@lru_cache(maxsize=4)
def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id if the tokenizer puts it in front of a text by itself."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


@lru_cache(maxsize=4)
def _anchor(tokenizer: PreTrainedTokenizerBase) -> str:
    """What to put before a completion while it is tokenised.

    SentencePiece-like tokenizers (Llama 2, Code Llama) put a space before whatever they are given:
    joined, the code would start with one. There the completion is tokenised behind a line end,
    whose ids are taken off again.
    """
    return "" if tokenizer.decode(_ids("a", tokenizer) + _ids("b", tokenizer)) == "ab" else "\n"
