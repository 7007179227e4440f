"""The options of RunConfig as a flat table of dotted keys, and the one nearest to a mistake."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

from flex.config import RunConfig, Section


@dataclass(frozen=True)
class Option:
    """One leaf of RunConfig: `key` is dotted, `annotation` what pydantic validates against."""

    key: str
    annotation: Any
    description: str

    @property
    def is_text(self) -> bool:
        """Whether any text is a value: str or str | None."""
        union = typing.get_origin(self.annotation) in (typing.Union, types.UnionType)
        return self.annotation is str or (union and str in typing.get_args(self.annotation))


def _walk(section: type[Section], prefix: str = "") -> Iterator[Option | str]:
    for name, info in section.model_fields.items():
        kind, key = info.annotation, prefix + name
        if isinstance(kind, type) and issubclass(kind, Section):
            yield key
            yield from _walk(kind, key + ".")
        else:
            yield Option(key, kind, info.description or "")


_ALL = list(_walk(RunConfig))
OPTIONS: dict[str, Option] = {entry.key: entry for entry in _ALL if isinstance(entry, Option)}
SECTIONS: frozenset[str] = frozenset(entry for entry in _ALL if isinstance(entry, str))

# What other trainers call our options: no spelling distance leads from one to the other.
_ELSEWHERE = {
    "base_model": "model.name",
    "dataset": "data.name",
    "dataset_name": "data.name",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "seq_len": "data.max_length",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "lambda": "penalty.weight",
    "optimizer": "optim",
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.clip_norm",
    "gradient_clipping": "optim.clip_norm",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "max_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "gradient_accumulation_steps": "train.accumulation",
    "logging_steps": "train.log_every",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep",
    "output_dir": "dir",
    "run_name": "name",
    "report_to": "track",
}


def suggest(key: str) -> str | None:
    """The option or section that `key` most likely means: mistyped, at a wrong level, or another
    trainer's name for it; None if nothing is near."""
    key = key.strip().lstrip("-").replace("-", "_").lower()
    section, _, last = key.rpartition(".")
    known = [*OPTIONS, *SECTIONS]
    for name in (key, last):
        foreign = get_close_matches(name, _ELSEWHERE, n=1, cutoff=0.85)
        if foreign and name not in OPTIONS:
            return _ELSEWHERE[foreign[0]]

    def score(candidate: str) -> float:
        where, _, name = candidate.rpartition(".")
        whole, leaf = _alike(key, candidate), _alike(last, name)
        if section:
            value = max(whole, 0.5 * (whole + leaf)) + 0.1 * _alike(section, where)
            value += 0.3 * (last == name)  # the right name below the wrong section
        else:
            value = max(0.9 * whole, leaf)
        value += 0.1 * (2 < len(last) < len(name) and name.startswith(last))
        return value - 0.01 * candidate.count(".")  # the shallow option wins a tie

    best = max(known, key=score)
    return best if score(best) >= 0.6 else None


def _alike(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()
