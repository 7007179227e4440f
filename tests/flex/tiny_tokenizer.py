"""Tokenizers built in memory: like GPT-2's (bytes), and like Llama 2's (a space in front)."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def byte_tokenizer(*, bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, no merges. With `bos` it puts `<s>` in front of a text by itself."""
    special = ["<pad>", "<s>", "</s>"]
    vocab = {
        token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return _wrap(core, bos, chat)


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """Characters with byte fallback; texts get a space in front, which decoding takes off."""
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["<pad>", "<s>", "</s>", "<unk>", "\u2581", *letters, *(f"\u2581{c}" for c in letters)]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(f"<0x{b:02X}>" for b in range(256))])}
    merges = [("\u2581", letter) for letter in letters]
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrap(core, bos=True, chat=False)


def _wrap(core: Tokenizer, bos: bool, chat: bool) -> PreTrainedTokenizerFast:
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
