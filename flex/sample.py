"""A sample completion, before and after training: the plainest evidence that something was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from .state import IGNORE, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .engine import Engine

NEW_TOKENS = 64


def prompt_length(example: Example) -> int:
    """Number of tokens before the first one that bears loss; labels are shifted by one."""
    return int((example.labels != IGNORE).nonzero()[0]) + 1


@torch.no_grad()
def sample_completion(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, example: Example
) -> tuple[str, str]:
    """(prompt, greedy completion) of an example. Every process must call it: ZeRO-3 gathers weights in lockstep."""
    model = engine.peft_model
    model.eval()
    prompt = example.input_ids[: prompt_length(example)].unsqueeze(0).to(engine.device)
    output = cast(Any, model).generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=False,  # all processes have the same prompt and so the same number of steps
    )
    model.train()
    texts = (prompt[0], output[0, prompt.shape[1] :])
    before, after = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts)
    return before, after
