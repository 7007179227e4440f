"""The fixtures of conftest.py do what tests rely on."""

import os

import torch


def test_poison_fills_what_empty_returns(poison):
    like = torch.zeros(3)
    for made in (
        torch.empty(2, 3),
        torch.empty_like(like),
        torch.empty_strided((2,), (1,)),
        like.new_empty(4),
        torch.empty(2, dtype=torch.bfloat16),
    ):
        assert made.isnan().all()
    assert (torch.empty(5, dtype=torch.int8) == 127).all()
    assert not torch.zeros(3).isnan().any()


def test_empty_is_itself_again_without_the_fixture():
    assert type(torch.empty).__name__ == "builtin_function_or_method"


def test_children_inherit_one_thread_and_no_network():
    assert os.environ["OMP_NUM_THREADS"] and os.environ["HF_HUB_OFFLINE"]
