"""Completions from a model of transformers: many at once, each as if it were alone.

Prompts are read one at a time, without padding, and decoded together in slots (slots.py). A row that
ends leaves its slot to the next prompt. This goes on within a window of BATCHES batches; a window's
course depends on its own prompts alone. A killed evaluation therefore repeats whole windows and finds
the same bits: half-precision sums change with the shape of a batch, and greedy decoding with them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from flex.data.encode import prompt_ids
from flex.errors import ConfigError, DataError, ModelError
from flex.evals.journal import Generated, Key
from flex.evals.sampling import Sampling, choose, uniform
from flex.evals.slots import SlotCache
from flex.evals.stops import Completion

log = logging.getLogger("flex.evals")

# Batches in a window. More keep the slots full for longer, but a kill costs a window: at 16 slots
# 32 completions, a fifth of HumanEval.
BATCHES = 2
_CACHED = {"full_attention", "sliding_attention"}  # kinds of layers that a SlotCache can serve


@dataclass(frozen=True)
class Request:
    """One completion to make; `seed` of its draws, see `sampling.sample_seed`."""

    task_id: str
    sample: int
    seed: int
    prompt: str
    stops: tuple[str, ...]

    @property
    def key(self) -> Key:
        return self.task_id, self.sample


@dataclass(frozen=True)
class _Job:
    request: Request
    prompt: tuple[int, ...]
    room: int  # new tokens at most


@dataclass
class _Row:
    job: _Job
    completion: Completion
    length: int  # columns of its slot that are filled
    last: int  # the newest token, which is not in the slot yet


def end_tokens(tokenizer: PreTrainedTokenizerBase, model_config: Any = None) -> tuple[int, ...]:
    """Tokens that end a completion: the model's EOS and every special token but the unknown one.

    What follows a special token belongs to another document.
    """
    ends: set[Any] = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    eos = getattr(model_config, "eos_token_id", None)
    ends |= set(eos if isinstance(eos, list | tuple) else [eos])
    ends.add(tokenizer.eos_token_id)
    return tuple(sorted(token for token in ends if token is not None))


def context_of(config: PreTrainedConfig) -> int | None:
    """The most tokens a model can see; None if its configuration does not say."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None)
    return int(limit) if limit else None


class Generator:
    """Makes completions with a loaded model.

    Args:
        model: a causal LM of transformers or a PeftModel over one; on one device, in eval mode.
        tokenizer: of the model.
        sampling: greedy, or temperature and top_p.
        max_new_tokens: of each completion, its stop and EOS included.
        batch_size: completions at once. At 16 a CPU or GPU still reads its weights once for all.

    Raises:
        ModelError: the model's layers keep another state than keys and values.
        ConfigError: max_new_tokens or batch_size below 1.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
        batch_size: int = 16,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(
                    f"{name} = {value}", "nothing would be generated", "give 1 or more"
                )
        self.model, self.tokenizer = model, tokenizer
        self.sampling = Sampling() if sampling is None else sampling
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.device = next(model.parameters()).device
        self.ends = frozenset(end_tokens(tokenizer, model.generation_config))
        _check_layers(model.config)

    def generate(
        self,
        requests: Sequence[Request],
        done: Collection[Key] = (),
        on_repeat: Callable[[Key, Generated], None] | None = None,
    ) -> Iterator[tuple[Key, Generated]]:
        """Yield each completion as it ends, longest prompts first; keys are unique.

        Args:
            requests: all of the evaluation, also those that are done: they decide the windows.
            done: keys that are not yielded; a window of which all are done is not computed.
            on_repeat: gets those of `done` that had to be computed again with the rest of a window.

        Raises DataError: a prompt that leaves no room in the model's context.
        """
        jobs = self._jobs(requests)
        size = self.batch_size * BATCHES if self.batch_size > 1 else 1
        cache = self._cache(jobs)
        for start in range(0, len(jobs), size):
            window = jobs[start : start + size]
            if all(job.request.key in done for job in window):
                continue
            for row, made in self._window(window, cache):
                key = row.job.request.key
                if key not in done:
                    yield key, made
                elif on_repeat is not None:
                    on_repeat(key, made)

    def token_ids(self, requests: Sequence[Request]) -> Iterator[tuple[Key, list[int]]]:
        """As `generate`, but the new tokens in place of their text. Raises DataError."""
        jobs = self._jobs(requests)
        for row, _ in self._window(jobs, self._cache(jobs)):
            yield row.job.request.key, row.completion.ids

    def _jobs(self, requests: Sequence[Request]) -> list[_Job]:
        context = context_of(self.model.config)
        encoded = {text: tuple(prompt_ids(text, self.tokenizer)) for text in _prompts(requests)}
        jobs, cut = [], set()
        for request in requests:
            prompt = encoded[request.prompt]
            room = self.max_new_tokens
            if not prompt:
                raise DataError(
                    f"{request.task_id}: the prompt has no tokens",
                    "a model continues a text, and there is none",
                    "correct that row of the benchmark",
                )
            if context is not None and len(prompt) >= context:
                raise DataError(
                    f"{request.task_id}: the prompt has {len(prompt)} tokens, the model's context {context}",
                    "there is no room for a single new token, and prompts are never cut",
                    "choose a model with a longer context, or leave the task out of --data",
                )
            if context is not None and len(prompt) + room > context:
                room = context - len(prompt)
                cut.add(request.task_id)
            jobs.append(_Job(request, prompt, room))
        if cut:
            log.warning(
                "%d of %d tasks get fewer than %d new tokens, since the model's context ends at %d",
                *(len(cut), len({r.task_id for r in requests}), self.max_new_tokens, context),
            )
        _check_sliding(self.model.config, max((len(j.prompt) + j.room for j in jobs), default=0))
        # Longest first: what does not fit into memory fails at once, and the time left is not too low
        return sorted(jobs, key=lambda job: -len(job.prompt))

    def _cache(self, jobs: Sequence[_Job]) -> SlotCache:
        columns = max((len(job.prompt) + job.room for job in jobs), default=0)
        return SlotCache(min(self.batch_size, len(jobs)), columns)

    def _window(self, window: Sequence[_Job], cache: SlotCache) -> Iterator[tuple[_Row, Generated]]:
        waiting, rows = deque(window), list[_Row]()
        read: tuple[tuple[int, ...], DynamicCache, Tensor] | None = None
        while waiting or rows:
            while waiting and len(rows) < self.batch_size:
                job = waiting.popleft()
                if read is None or read[0] != job.prompt:  # samples of a task share its prompt
                    read = (job.prompt, *self._read(job.prompt))
                row, made = self._start(job, read[2])
                if made is not None:
                    yield row, made
                else:
                    cache.put(len(rows), read[1])
                    rows.append(row)
            if not rows:
                break
            tokens = self._choose(rows, self._step(rows, cache))
            # From the end, so that the row that moves into a gap has been looked at
            for slot in reversed(range(len(rows))):
                row = rows[slot]
                row.length += 1
                if (made := self._take(row, tokens[slot])) is not None:
                    yield row, made
                    last = rows.pop()
                    if slot < len(rows):
                        cache.move(len(rows), slot, last.length)
                        rows[slot] = last

    @torch.no_grad()
    def _read(self, prompt: tuple[int, ...]) -> tuple[DynamicCache, Tensor]:
        """A prompt's keys and values, and the logits (1, vocabulary) of its first new token."""
        cache = DynamicCache()
        ids = torch.tensor([prompt], device=self.device)
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, out.logits[:, -1]

    def _start(self, job: _Job, logits: Tensor) -> tuple[_Row, Generated | None]:
        completion = Completion(self.tokenizer, job.prompt, job.request.stops)
        row = _Row(job, completion, len(job.prompt), -1)
        return row, self._take(row, self._choose([row], logits)[0])

    @torch.no_grad()
    def _step(self, rows: Sequence[_Row], cache: SlotCache) -> Tensor:
        """Logits (rows, vocabulary) after each row's newest token."""
        positions, mask = cache.begin_step([row.length for row in rows], self.device)
        ids = torch.tensor([[row.last] for row in rows], device=self.device)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _choose(self, rows: Sequence[_Row], logits: Tensor) -> list[int]:
        numbers: list[float] = []
        if not self.sampling.greedy:
            numbers = [uniform(r.job.request.seed, len(r.completion.ids)) for r in rows]
        return choose(logits, self.sampling, numbers)

    def _take(self, row: _Row, token: int) -> Generated | None:
        """Give a row its next token; the completion if that was the last one."""
        row.last = token
        stopped = row.completion.push(token)
        made = len(row.completion.ids)
        if token in self.ends:
            finish = "eos"
        elif stopped:
            finish = "stop"
        elif made >= row.job.room:
            finish = "length"
        else:
            return None
        return Generated(row.job.request.seed, row.completion.text(), made, finish)


def _prompts(requests: Sequence[Request]) -> dict[str, None]:
    return dict.fromkeys(request.prompt for request in requests)


def _check_layers(config: PreTrainedConfig) -> None:
    kinds = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if kinds - _CACHED:
        raise ModelError(
            f"{config.model_type}: layers of the kinds {', '.join(sorted(kinds - _CACHED))}",
            "the batched decoding keeps keys and values, which these do not have",
            "use --engine vllm",
        )


def _check_sliding(config: PreTrainedConfig, longest: int) -> None:
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else window is not None
    if slides and window is not None and longest > window:
        raise ModelError(
            f"{config.model_type} attends to {window} tokens, prompt and completion may have {longest}",
            "the batched decoding knows full attention only, which would be another model",
            "lower --max-new-tokens, or use --engine vllm",
        )
