"""Completions from vLLM, on GPUs: the same interface as engine.HfEngine.

Written from vLLM's documentation and not run by this project's tests, which have no GPU. Before a
figure is quoted, compare a greedy result of it with one of the engine `hf`.

vLLM schedules by itself, so a completion can depend on its company; a killed evaluation goes on
sample by sample, and only greedy or seeded draws in fp32 will come out the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flex.data.encode import prompt_ids
from flex.errors import ConfigError, ModelError
from flex.evals.engine import versions
from flex.evals.generate import Request, context_of, end_tokens
from flex.evals.journal import Generated, Key
from flex.evals.sampling import Sampling
from flex.evals.stops import Completion
from flex.evals.subject import Subject
from flex.model.base import resolve
from flex.model.export import adapter_config

log = logging.getLogger("flex.evals")

_CHUNK = 1024  # completions handed to vLLM at once; each chunk is in the journal when it is done


class VllmEngine:
    """vLLM's offline engine.

    Args: as of HfEngine; `batch_size` is vLLM's max_num_seqs.

    Raises:
        ConfigError: vLLM is not installed, or the subject is one that it cannot take as it is.
    """

    def __init__(
        self, subject: Subject, sampling: Sampling, max_new_tokens: int, batch_size: int
    ) -> None:
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"--engine vllm: {error}",
                "the package vllm does the generating, on a GPU",
                "pip install vllm, or use --engine hf",
            ) from error
        if subject.merged:
            raise ConfigError(
                "--engine vllm with --merged",
                "vLLM reads a merged model from a folder",
                "python -m flex merge first, then give the folder as --model",
            )
        self._vllm, self._subject, self._sampling = vllm, subject, sampling
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size

    def describe(self) -> dict[str, Any]:
        return {
            "name": "vllm",
            "batch_size": self._batch_size,
            "context": context_of(self._subject.architecture()),
            "device": "cuda",
            "versions": versions("torch", "transformers", "vllm"),
        }

    def generate(
        self, requests: Sequence[Request], done: Mapping[Key, Generated]
    ) -> Iterator[tuple[Key, Generated]]:
        model, tokenizer = self._load(), self._subject.tokenizer()
        ends = end_tokens(tokenizer, self._subject.architecture())
        lora = self._lora()
        left = [request for request in requests if request.key not in done]
        for start in range(0, len(left), _CHUNK):
            chunk = left[start : start + _CHUNK]
            prompts = [prompt_ids(request.prompt, tokenizer) for request in chunk]
            outputs = model.generate(
                [{"prompt_token_ids": ids} for ids in prompts],
                [self._params(request, ends) for request in chunk],
                lora_request=lora,
                use_tqdm=False,
            )
            for request, prompt, output in zip(chunk, prompts, outputs, strict=True):
                ids = list(output.outputs[0].token_ids)
                completion = Completion(tokenizer, prompt, request.stops)
                seen = [completion.push(token) for token in ids]
                finish = "eos" if ids and ids[-1] in ends else "stop" if any(seen) else "length"
                yield (
                    request.key,
                    Generated(request.seed, completion.text(), len(ids), finish),
                )

    def _params(self, request: Request, ends: tuple[int, ...]) -> Any:
        return self._vllm.SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._max_new_tokens,
            seed=request.seed,
            stop=list(request.stops),
            stop_token_ids=list(ends),
        )

    def _load(self) -> Any:
        options: dict[str, Any] = {}
        if self._subject.quantise is not None:
            options["quantization"] = "bitsandbytes"
        if self._subject.adapter is not None:
            rank = adapter_config(self._folder()).r  # type: ignore[attr-defined]
            options |= {"enable_lora": True, "max_lora_rank": max(8, rank)}
        try:
            return self._vllm.LLM(
                model=resolve(self._subject.config),
                revision=self._subject.revision,
                dtype=self._subject.dtype,
                max_num_seqs=self._batch_size,
                trust_remote_code=False,
                **options,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"vLLM cannot load {self._subject.model}: {error}",
                "nothing can be generated",
                "see its message, or use --engine hf",
            ) from error

    def _lora(self) -> Any:
        if self._subject.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("adapter", 1, str(self._folder().resolve()))

    def _folder(self) -> Any:
        from pathlib import Path

        assert self._subject.adapter is not None
        return Path(self._subject.adapter)
