"""FLeX: fast, honest LoRA fine-tuning of code models with a spectral penalty and Sophia."""

__version__ = "0.1.0"
