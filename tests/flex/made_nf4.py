"""A tiny base that the command rounded to NF4, with what it chose and printed, for the tests of both."""

import contextlib
import io

import pytest
import torch
from transformers import AutoModelForCausalLM

from flex import calibrate, quantise
from flex.config import ModelConfig
from flex.config_io import load_config
from flex.data.loader import load_data
from flex.model import nf4_store
from flex.model.base import load_tokenizer
from tests.flex.saved import make_base
from tests.runs import write_rows

FIELDS = {"hidden_size": 64, "intermediate_size": 128, "attention_bias": True}
PLACES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(base, rows, *more):
    options = (
        f"model.name={base}",
        "model.dtype=float32",
        "data.name=jsonl",
        f"data.path={rows}",
        "train.batch_size=8",
        *more,
    )
    return load_config(None, list({o.partition("=")[0]: o for o in options}.values()))


class Made:
    """One run of the command: its folder, the matrices that it chose by name, and what it printed."""

    def __init__(self, root):
        self.base = make_base(root / "base", **FIELDS)
        self._give_biases_values()
        self.rows = write_rows(root / "rows.jsonl")
        self.out, printed = root / "nf4", io.StringIO()
        self.matrices, self.hessians = [], []
        own = calibrate.round_matrix

        def watched(weight, hessian, *rest):
            found = own(weight, hessian, *rest)
            self.matrices.append(nf4_store.read_back(found.packed, found.state).clone())
            self.hessians.append(hessian)
            return found

        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
            patch.setattr(calibrate, "round_matrix", watched)
            assert quantise.quantise_command(self.config(), self.out, 100_000) == 0
        self.printed = printed.getvalue()
        # q, k and v read the same input, and so do gate and up: the order of the calls
        self.names = [
            f"model.layers.{i}.{'mlp' if place.partition('_')[0] in ('gate', 'up', 'down') else 'self_attn'}.{place}"
            for i in range(2)
            for place in PLACES
        ]

    def _give_biases_values(self):
        model = AutoModelForCausalLM.from_pretrained(self.base)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.data = torch.linspace(-0.1, 0.2, len(p))
        model.save_pretrained(self.base)

    def config(self, *more):
        return config(self.base, self.rows, *more)


def loaded(made, *more):
    tokenizer = load_tokenizer(ModelConfig(name=str(made.base)))
    return load_data(made.config(*more), tokenizer), tokenizer
