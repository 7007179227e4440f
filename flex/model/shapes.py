"""A `shape:` model as a sharded safetensors folder, so that a big one takes the path of a real checkpoint."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flex.errors import ModelError
from flex.model.folder import whole_folder
from flex.model.presets import byte_tokenizer, shape_config
from flex.model.smollm2 import cache_folder
from flex.model.tensors import INDEX

log = logging.getLogger("flex.model")

BIG = 1_000_000_000  # parameters from which a shape is read from files instead of made in memory
SHARD_BYTES = 1_000_000_000

# Random numbers that all matrices are cut from. A prime: no row length divides it, so rows that are
# taken from the same numbers are not aligned.
_BLOCK = 4_194_301


def is_big(preset: str) -> bool:
    """Whether `load_model` reads the weights of `shape:<preset>` from a folder. Raises ModelError."""
    return sum(p.numel() for p in skeleton(preset).parameters()) >= BIG


def shape_folder(preset: str, seed: int = 0) -> Path:
    """The folder of a shape in the cache; the first call writes it, calls beside it wait.

    Raises:
        ModelError: as `write_shape`, or the cache cannot be written.
    """
    folder = cache_folder() / "shapes" / f"{preset}-seed{seed}"
    if (folder / INDEX).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / INDEX).is_file():
                log.info("writing the random weights of shape:%s, once: %s", preset, folder)
                write_shape(preset, folder, seed)
    except OSError as error:
        raise ModelError(
            f"cannot write to the cache {folder.parent}: {error}",
            "the weights of a big shape are kept there",
            "set FLEX_CACHE to a folder with more free space",
        ) from error
    return folder


def write_shape(preset: str, folder: Path, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `shape:<preset>` as a Hub folder: config, tokenizer, bf16 shards and their index.

    No more than about one shard is in memory. Every matrix is cut from one block of 4 million normal numbers
    (standard deviation: the configuration's `initializer_range`), each piece with an offset and a sign of its own:
    a 7B model is written at the speed of the disk. Fine for memory, speed and shapes; no two pieces are
    independent, so nothing about randomness itself should be measured on it. Norms are 1.

    Args:
        preset: as in `shape:<preset>`.
        folder: appears whole or not at all; must not exist or be empty.
        seed: of the block, the offsets and the signs.
        shard_bytes: a shard holds at most so many bytes, or one tensor.

    Raises:
        ModelError: no such preset, the disk is too small, or `folder` holds something.
    """
    model = skeleton(preset)
    tied = set(model.all_tied_weights_keys)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(parent).free
    if free < total + SHARD_BYTES:
        raise ModelError(
            f"shape:{preset} takes {total / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free",
            "its weights are read from files, as those of a real checkpoint are",
            "free the disk, or set FLEX_CACHE to a folder on another one",
        )
    shards = _plan(shapes, shard_bytes)
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(_BLOCK, generator=generator) * model.config.initializer_range
    block = block.bfloat16()
    with whole_folder(folder) as draft:
        where = {}
        for i, names in enumerate(shards, start=1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            tensors = {n: _fill(shapes[n], block, generator) for n in names}
            save_file(tensors, draft / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(names, file))
            del tensors
        config = model.config
        config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
        config.save_pretrained(draft)
        byte_tokenizer(config.max_position_embeddings).save_pretrained(draft)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (draft / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def skeleton(preset: str) -> PreTrainedModel:
    """The model without memory for its weights (device meta)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_config(preset), dtype=torch.bfloat16)


def _plan(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _fill(shape: tuple[int, ...], block: Tensor, generator: torch.Generator) -> Tensor:
    out = torch.ones(shape, dtype=block.dtype)
    if len(shape) == 1:
        return out
    for piece in out.view(-1).split(_BLOCK):
        offset, sign = torch.randint(0, 2 * _BLOCK, (1,), generator=generator).item(), 1.0
        if offset >= _BLOCK:
            offset, sign = offset - _BLOCK, -1.0
        head = min(len(piece), _BLOCK - offset)
        torch.mul(block[offset : offset + head], sign, out=piece[:head])
        torch.mul(block[: len(piece) - head], sign, out=piece[head:])
    return out
