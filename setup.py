"""Installer. `pip install -e .` or, with the tested versions, `make .venv/.installed`."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "flex/__init__.py").read_text("utf-8"))[1]
README = ROOT / "README.md"

setup(
    name="flex-lora",
    version=VERSION,
    description="Fast, honest LoRA fine-tuning of code models with a spectral penalty and Sophia",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # flex/kernels is a symlink to ../kernels and setuptools follows it. The folder has no
    # __init__.py of its own, so it is found as a namespace package, and only below `flex`: the
    # top-level name `kernels` belongs to Hugging Face.
    packages=find_namespace_packages(include=["flex", "flex.*"], exclude=["*.__pycache__*"]),
    package_data={"": ["*.md", "*.yaml", "*.json", "*.jsonl", "*.java"]},
    install_requires=[
        "accelerate>=1.10",
        "bitsandbytes>=0.48",
        "datasets>=4.0",
        "deepspeed>=0.19.8",  # the first tested with managed_gradient_accumulation
        "gguf>=0.17",
        "huggingface_hub>=1.0",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "peft>=0.18",
        "psutil>=6.0",
        "pydantic>=2.11",
        "pyyaml>=6.0.2",
        "rich>=13.9",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "torch>=2.10",
        "transformers>=5.0",
        "triton>=3.5; platform_system == 'Linux'",
    ],
    extras_require={
        "test": [
            "hypothesis>=6.100",
            "pytest>=8.3",
            "pytest-benchmark>=5.0",
            "pytest-xdist>=3.6",
            "scipy>=1.15",
        ],
        # what the benchmarks measure against; a peer that is missing is a row "not installed"
        "bench": ["pytorch_optimizer>=3.5", "sophia-opt>=0.2", "trl>=1.0"],
        "gpu": ["liger-kernel>=0.6"],
        "track": ["mlflow", "tensorboard", "trackio", "wandb"],
        "dev": ["mypy>=1.15", "ruff>=0.12", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["flex-lora = flex.commands:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
