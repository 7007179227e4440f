"""What makes completions for an evaluation: transformers here, vLLM in vllm_engine.py."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch

from flex.errors import ModelError
from flex.evals.generate import Generator, Request, context_of
from flex.evals.journal import Generated, Key
from flex.evals.sampling import Sampling
from flex.evals.subject import Subject

log = logging.getLogger("flex.evals")


class Engine(Protocol):
    """Makes completions; the model is loaded when the first one is asked for."""

    def describe(self) -> dict[str, Any]:
        """What a sample depends on besides model and protocol; JSON values."""

    def generate(
        self, requests: Sequence[Request], done: Mapping[Key, Generated]
    ) -> Iterator[tuple[Key, Generated]]:
        """Yield the completions of `requests` that are not in `done`, as each ends."""


class HfEngine:
    """The batched decoding of generate.py.

    Args:
        subject: what is evaluated.
        sampling, max_new_tokens: of the protocol.
        batch_size: completions at once.
    """

    def __init__(
        self, subject: Subject, sampling: Sampling, max_new_tokens: int, batch_size: int
    ) -> None:
        self._subject, self._sampling = subject, sampling
        self._max_new_tokens, self._batch_size = max_new_tokens, batch_size

    def describe(self) -> dict[str, Any]:
        device = self._subject.where
        return {
            "name": "transformers",
            "batch_size": self._batch_size,
            "attention": "sdpa",
            "context": context_of(self._subject.architecture()),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": versions("torch", "transformers", "peft", "tokenizers"),
        }

    def generate(
        self, requests: Sequence[Request], done: Mapping[Key, Generated]
    ) -> Iterator[tuple[Key, Generated]]:
        generator = Generator(
            self._subject.load(),
            self._subject.tokenizer(),
            self._sampling,
            self._max_new_tokens,
            self._batch_size,
        )
        repeated: dict[Key, Generated] = {}
        try:
            yield from generator.generate(requests, done, repeated.__setitem__)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"no memory on the device for {self._batch_size} completions at once",
                "each keeps the keys and values of its prompt and of --max-new-tokens",
                "give a smaller --batch-size; what was generated with this one is in the journal, "
                "so give another --out too",
            ) from error
        changed = sum(done[key] != made for key, made in repeated.items())
        if changed:
            log.warning(
                "%d of %d completions that were made again came out otherwise (the first ones are "
                "kept): this machine does not compute the same bits twice",
                *(changed, len(repeated)),
            )


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages by name."""
    return {name: importlib.metadata.version(name) for name in packages}
