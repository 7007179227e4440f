"""One optimizer step over the 448 adapter matrices of Code Llama 7B: how many Triton launches it takes."""

import torch

from flex.kernels.penalised_update import penalised_update
from flex.kernels.sophia_update import Scalars, UpdateGroup, gradient_norm, sophia_update_groups
from flex.kernels.spectral_penalty import Spectrum, spectral_penalty_into
from tests.counting import count_traffic

HIDDEN, WIDE, RANK = 64, 172, 2  # 4096, 11008 and 16 at reduced width: launches do not depend on it
LAYERS = 32
AXIS = Spectrum(transform="axis")
SCALARS = Scalars(lr=1e-3, beta1=0.9, gamma=0.05, eps=1e-12, weight_decay=0.0)


def adapters(layers: int = LAYERS) -> tuple[UpdateGroup, list[str]]:
    """q, k, v, o, gate, up, down of every layer: A (r, in) and B (out, r)."""
    generator = torch.Generator().manual_seed(0)
    linears = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, WIDE)] * 2 + [(WIDE, HIDDEN)]
    shapes = [s for k, n in linears * layers for s in ((RANK, k), (n, RANK))]
    p, m, h, g = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(4))
    return UpdateGroup(p, m, [x.square() for x in h], g, SCALARS), list("AB") * (len(shapes) // 2)


def test_penalty_clipping_and_update_take_seven_launches():
    group, roles = adapters()
    assert len(group.params) == 448
    with count_traffic() as traffic:
        spectral_penalty_into(
            list(group.params), list(group.grads), AXIS, roles, 0.1, impl="triton"
        )
        control = gradient_norm(group.grads, 1.0, impl="triton")
        sophia_update_groups([group], control=control, impl="triton")
    assert traffic.launches == {
        **{"_penalty_kernel": 2, "_sum_kernel": 1},  # one a length, and one for the values
        **{"_square_sum_kernel": 1, "_norm_kernel": 1, "_sophia_kernel": 1, "_count_kernel": 1},
    }  # gradients are set to None: nothing is zeroed


def test_the_penalty_inside_the_update_takes_no_more_than_eight():
    group, roles = adapters(layers=2)
    with count_traffic() as traffic:
        control = gradient_norm(group.grads, 1.0, impl="triton")
        penalised_update([group], AXIS, roles, 0.1, control=control, impl="triton")
    assert 2 <= traffic.launches["_penalised_kernel"] <= 4  # at most one a length and role
    assert sum(traffic.launches.values()) <= 8
