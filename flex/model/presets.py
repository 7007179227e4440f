"""`shape:<preset>`: Llama shapes with random weights, for tests, benchmarks and sizing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flex.errors import ModelError

if TYPE_CHECKING:  # imported where they are used: `plan` reads a shape without transformers' 15 s
    from transformers import LlamaConfig, PreTrainedTokenizerFast

BOS, EOS, PAD = 256, 257, 258  # after the 256 bytes

# hidden, FFN, layers, heads, KV heads, vocabulary, context, RoPE theta, tied embeddings; as in the
# models' config.json
_SHAPES: dict[str, tuple[int, int, int, int, int, int, int, float, bool]] = {
    "tiny": (64, 128, 2, 4, 2, 384, 1024, 1e4, True),
    "small": (256, 704, 6, 8, 4, 1024, 2048, 1e4, True),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152, 8192, 1e5, True),
    "llama-1b": (2048, 8192, 16, 32, 8, 128256, 131072, 5e5, True),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e4, False),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e4, False),
    "llama-70b": (8192, 28672, 80, 64, 8, 32000, 4096, 1e4, False),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5, False),
    "codellama-7b": (4096, 11008, 32, 32, 32, 32016, 16384, 1e6, False),
    "codellama-13b": (5120, 13824, 40, 40, 40, 32016, 16384, 1e6, False),
    "codellama-34b": (8192, 22016, 48, 64, 8, 32000, 16384, 1e6, False),
}


def shape_fields(preset: str) -> dict[str, Any]:
    """What a preset's config.json would say of its architecture.

    Raises:
        ModelError: no such preset.
    """
    if preset not in _SHAPES:
        raise ModelError(
            f"model.name: there is no shape:{preset}",
            "a shape model is built from a preset",
            f"use one of {', '.join(f'shape:{name}' for name in _SHAPES)}",
        )
    hidden, ffn, layers, heads, kv_heads, vocabulary, context, theta, tied = _SHAPES[preset]
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
    }


def shape_config(preset: str) -> LlamaConfig:
    """The configuration of a preset; its special tokens are those of `byte_tokenizer`.

    Raises:
        ModelError: no such preset.
    """
    from transformers import LlamaConfig

    fields = {k: v for k, v in shape_fields(preset).items() if k != "model_type"}
    return LlamaConfig(**fields, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)


def byte_tokenizer(context: int) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte, then BOS, EOS and PAD: lossless, and it fits every preset."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(ByteLevel.alphabet())
    bytes_only = Tokenizer(
        BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[])
    )
    bytes_only.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_only.decoder = ByteLevelDecoder()
    bytes_only.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=context,
    )
