"""The Triton update, norm and curvature in the interpreter: against fp64, at every edge, and their bugs."""

import re

import pytest
import torch

from flex.kernels import sophia_update as package
from flex.kernels.sophia_update import (
    Scalars,
    UpdateGroup,
    gradient_norm,
    kernel,
    norm,
    sophia_update_groups,
    table,
)
from flex.kernels.sophia_update.reference import curvature_reference, sophia_reference
from flex.kernels.sophia_update.shipped import shipped
from tests.counting import count_traffic
from tests.mutants import load_copy
from tests.oracle import assert_within_budget

BLOCK = table.BLOCK
ODD = [(1,), (7, 13), (BLOCK - 1,), (0,), (BLOCK,), (BLOCK + 1,), (3 * BLOCK + 977,)]
EVEN = [(16,), (4, 4), (BLOCK - 16,), (8, BLOCK // 8), (BLOCK + 16,), (0, 7), (16, 192)]
GUARD = 8  # elements behind each tensor that nobody may write
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# p, m, h, g, copy
DTYPES = {
    "fp32": (F32, F32, F32, F32, None),
    "grad-bf16": (F32, F32, F32, BF16, None),
    "copy-bf16": (F32, F32, F32, BF16, BF16),
    "copy-fp16": (F32, F32, F32, F16, F16),
    "bf16": (BF16, BF16, BF16, BF16, None),
    "bf16-moments-fp32": (BF16, F32, F32, BF16, None),
}
FIRST = Scalars(
    lr=0.01, beta1=0.9, gamma=0.5, eps=0.3, weight_decay=0.1, m_scale=1.7, h_scale=3, h_offset=0.2
)
SECOND = Scalars(lr=0.2, beta1=0.6, gamma=1.0, eps=1e-12, weight_decay=0.0, h_offset=0.5)


def make_group(shapes, scalars, dtypes="fp32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    p_type, m_type, h_type, g_type, copy_type = DTYPES[dtypes]

    def guarded(x):
        """x at the start of something longer, which no kernel may write."""
        longer = torch.full((x.numel() + GUARD,), 77.0, dtype=x.dtype)
        longer[: x.numel()] = x.flatten()
        return longer[: x.numel()].view(x.shape)

    def make(dtype):
        return [guarded(torch.randn(s, generator=generator).to(dtype)) for s in shapes]

    p, m, h, g = make(p_type), make(m_type), make(h_type), make(g_type)
    h = [x.square() for x in h]
    copies = None if copy_type is None else [torch.full_like(x, 9.0, dtype=copy_type) for x in p]
    return UpdateGroup(p, m, h, g, scalars, copies)


def by_reference(group, dtype, factor):
    """[(p, m, clipped)] by the reference in a dtype (fp32: bf16 inputs are widened first)."""
    options = vars(group.scalars)
    found = []
    for p, m, h, g in zip(*group.lists()[:4], strict=True):
        p, m, h, g = (x.to(dtype) for x in (p, m, h, g))
        found.append(sophia_reference(p, m, h, g * factor, **options))
    return found


def check_groups(groups, control=None, update=sophia_update_groups):
    """Update by Triton and hold p, m, copies and the count against fp64."""
    factor = 1.0 if control is None else float(control[1])
    wanted = [by_reference(group, torch.float64, factor) for group in groups]
    eager = []
    for group in groups:
        dtype = group.params[0].dtype if group.exp_avgs[0].dtype == BF16 else F32
        eager.append(by_reference(group, dtype, factor))
    before = [x.clone() for group in groups for x in (*group.curvatures, *group.grads)]
    clipped = update(groups, control=control, impl="triton")
    for index, group in enumerate(groups):
        copies = group.copies or [None] * len(group.params)
        for i, (p, m, copy) in enumerate(zip(group.params, group.exp_avgs, copies, strict=True)):
            if not p.numel():
                continue
            (want_p, want_m, _), (eager_p, eager_m, _) = wanted[index][i], eager[index][i]
            name = f"group {index} tensor {i} {tuple(p.shape)}"
            assert_within_budget(p, eager_p.to(p.dtype), want_p, f"p of {name}")
            assert_within_budget(m, eager_m.to(m.dtype), want_m, f"m of {name}")
            if copy is not None:
                assert torch.equal(copy, p.to(copy.dtype)), f"copy of {name}: not p, rounded"
    count = sum(int(c) for group in wanted for _, _, c in group)
    total = sum(p.numel() for group in groups for p in group.params)
    assert total < 200 or 0.1 * total < count < 0.9 * total, "a count that proves little"
    assert clipped.dtype == torch.int64 and clipped.shape == ()
    assert abs(int(clipped) - count) <= (0 if groups[0].exp_avgs[0].dtype == F32 else 2), (
        f"clipped: {int(clipped)}, not {count}"
    )
    after = [x for group in groups for x in (*group.curvatures, *group.grads)]
    assert all(map(torch.equal, before, after)), "h or g was written"
    for x in (x for group in groups for x in (*group.params, *group.exp_avgs)):
        whole = x.new_empty(0).set_(x.untyped_storage())
        if len(whole) == x.numel() + GUARD:
            assert (whole[x.numel() :] == 77.0).all(), "written beyond the end"


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shapes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_update_matches_fp64(dtypes, shapes):
    control = torch.tensor([4.0, 0.7, 1.0])
    check_groups(
        [make_group(shapes, FIRST, dtypes), make_group(shapes[:3], SECOND, dtypes, seed=1)], control
    )
    check_groups([make_group(shapes, FIRST, dtypes)])


def test_groups_of_different_dtypes_and_unaligned_views():
    mixed = [make_group(EVEN, FIRST, "bf16"), make_group(ODD, SECOND, "fp32", seed=1)]
    check_groups(mixed)
    flat = make_group([(100,)], FIRST)
    views = [
        [x[0][3:].clone() if i == 3 else x[0][3:] for x in [y]] for i, y in enumerate(flat.lists())
    ]
    assert views[0][0].data_ptr() % 16
    check_groups([UpdateGroup(*views, FIRST)])


def test_flat_equals_matrices_bit_for_bit():
    group = make_group([(5, 7), (64, 33), (3, 2)], FIRST)
    flat = UpdateGroup(*([torch.cat([x.flatten() for x in y])] for y in group.lists()), FIRST)
    sophia_update_groups([group], impl="triton")
    sophia_update_groups([flat], impl="triton")
    assert torch.equal(torch.cat([p.flatten() for p in group.params]), flat.params[0])


def test_two_runs_are_bit_equal():
    runs = []
    for _ in range(2):
        group = make_group(ODD, FIRST)
        control = gradient_norm(group.grads, 1.0, impl="triton")
        count = sophia_update_groups([group], control=control, impl="triton")
        runs.append([*group.params, *group.exp_avgs, control, count])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_changes_nothing(bad):
    group = make_group(ODD, FIRST, "copy-bf16")
    group.grads[4][7] = bad
    before = [x.clone() for y in group.lists() for x in y]
    control = gradient_norm(group.grads, 1.0, impl="triton")
    assert not control[0].isfinite() and control[2] == 0
    with count_traffic() as traffic:
        count = sophia_update_groups([group], control=control, impl="triton")
    after = [x for y in group.lists() for x in y]
    assert all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after, strict=True)
    )
    assert int(count) == 0
    assert traffic.by_kernel["_sophia_kernel"][1] == 4 * traffic_programs(group)


def traffic_programs(group):
    return sum(-(-p.numel() // BLOCK) for p in group.params)


def test_a_nan_gradient_without_control_is_not_hidden():
    group = make_group(EVEN, FIRST)
    group.grads[3][2, 5] = float("nan")
    sophia_update_groups([group], impl="triton")
    assert sum(int(p.isnan().sum()) for p in group.params) == 1


def check_norm(max_norm, scale, dtypes="fp32", launch=gradient_norm):
    grads = make_group(ODD, FIRST, dtypes).grads + make_group(EVEN, FIRST, seed=2).grads
    found = launch(grads, max_norm, scale=scale, impl="triton")
    factor = 1.0 if scale is None else float(scale)
    want = torch.cat([g.double().flatten() for g in grads]).norm() * abs(factor)
    clip = min(1.0, max_norm / (float(want) + 1e-6)) if max_norm else 1.0
    wanted = torch.stack([want, torch.tensor(factor * clip), torch.ones(())]).double()
    for a, b in zip(found, wanted, strict=True):
        assert_within_budget(a, b.float(), b, "norm, factor, finite")
    by_torch = gradient_norm(grads, max_norm, scale=scale, impl="torch")
    assert torch.allclose(found, by_torch, rtol=1e-6)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtypes", ["fp32", "bf16"])
def test_norm_and_factor(dtypes):
    for max_norm in (0.0, 1.0, 1e4):
        for scale in (None, torch.tensor(1 / 64)):
            check_norm(max_norm, scale, dtypes)


def test_norm_sums_many_partials():
    """More than one block of partial sums and of counts: the finishing programs loop."""
    many = 2 * kernel.SUM_BLOCK + 5
    partials = torch.arange(many, dtype=torch.int32) % 7
    assert int(kernel.count_launch(partials)) == int(partials.sum())
    control = torch.empty(3)
    norm._norm_kernel[(1,)](
        partials.float(), partials, control, many, 0.0, 1e-6, HAS_SCALE=False, BLOCK_N=4096
    )
    assert float(control[0]) == pytest.approx(float(partials.sum()) ** 0.5, rel=1e-6)


def test_norm_of_zero_is_finite_and_does_not_clip():
    assert gradient_norm([torch.zeros(5)], 1.0, impl="triton").tolist() == [0.0, 1.0, 1.0]


def check_curvature(dtypes, shapes, add=package.add_estimates, fold=package.curvature_update):
    group = make_group(shapes, FIRST, dtypes)
    estimates = [torch.full(g.shape, float("nan")) for g in group.grads]
    h = [x.clone() for x in group.curvatures]
    other = [g.flip(0) for g in group.grads]
    add(estimates, group.grads, 7, first=True, impl="triton")
    add(estimates, other, 5, first=False, impl="triton")
    fold(h, estimates, 0.9, scale=0.5, impl="triton")

    def expected(dtype, before, a, b):
        e = 7 * a.to(dtype).square() + 5 * b.to(dtype).square()
        return e, curvature_reference(before.to(dtype), e * 0.5, 0.9)

    for e, new, before, a, b in zip(
        estimates, h, group.curvatures, group.grads, other, strict=True
    ):
        if e.numel():
            (eager_e, eager_h), (want_e, want_h) = (
                expected(t, before, a, b) for t in (F32, torch.float64)
            )
            assert_within_budget(e, eager_e, want_e, "estimate")
            assert_within_budget(new, eager_h.to(new.dtype), want_h, "curvature")


@pytest.mark.parametrize("shapes", [ODD, EVEN], ids=["odd", "even"])
@pytest.mark.parametrize("dtypes", ["fp32", "grad-bf16", "bf16"])
def test_estimates_and_curvature(dtypes, shapes):
    check_curvature(dtypes, shapes)


# ---- what it costs


def lora_shapes(rank, hidden, wide):
    """The 448 matrices of a 7B with seven linears per layer, at another width."""
    return (
        [(rank, hidden)] * 192 + [(rank, wide)] * 32 + [(hidden, rank)] * 160 + [(wide, rank)] * 64
    )


def test_bytes_are_24_per_parameter_and_launches_4():
    shapes = lora_shapes(8, 256, 688)
    groups = [make_group(shapes[start::4], FIRST, seed=start) for start in range(4)]
    elements = sum(p.numel() for group in groups for p in group.params)
    programs = sum(traffic_programs(group) for group in groups)
    grads = [g for group in groups for g in group.grads]
    with count_traffic() as traffic:
        control = gradient_norm(grads, 1.0, impl="triton")
        sophia_update_groups(groups, control=control, impl="triton")
    assert sum(traffic.launches.values()) == 4
    loaded, stored = traffic.by_kernel["_sophia_kernel"]
    # per program: owner 4, meta 3 x 8, four addresses x 8, seven scalars x 4, factor and flag 8; a count 4
    assert loaded == 16 * elements + 96 * programs
    assert stored == 8 * elements + 4 * programs
    assert loaded + stored <= 1.02 * 24 * elements or elements / programs < BLOCK
    assert traffic.by_kernel["_square_sum_kernel"] == (4 * elements + 36 * programs, 4 * programs)
    assert 24 * BLOCK + 100 <= 1.02 * 24 * BLOCK, "a full program's table is over 2 %"


def test_real_matrices_are_within_two_percent():
    """Full programs, as the matrices of a 7B at rank 16 have: 32 and 86 per matrix."""
    group = make_group([(16, 4096), (11008, 16)], FIRST)
    with count_traffic() as traffic:
        sophia_update_groups([group], impl="triton")
    elements = sum(p.numel() for p in group.params)
    assert traffic.loaded + traffic.stored <= 1.02 * 24 * elements


def test_tables_are_made_once():
    group = make_group(EVEN, FIRST)
    for _ in range(3):
        sophia_update_groups([group], impl="triton")
    before = table._layout.cache_info().misses, table._column.cache_info().misses
    sophia_update_groups([group], impl="triton")
    assert (table._layout.cache_info().misses, table._column.cache_info().misses) == before
    group.grads[0] = group.grads[0].clone()
    sophia_update_groups([group], impl="triton")
    after = table._layout.cache_info().misses, table._column.cache_info().misses
    assert after == (before[0], before[1] + 1)


def test_shipped_names_are_unique_and_bind():
    configs = shipped()
    assert len({c.name for c in configs}) == len(configs)
    for c in configs:
        assert list(c.fn.arg_names) == [
            n for n in c.fn.arg_names if n in {**c.signature, **c.constants}
        ]


# ---- refusals


def test_strides_dtypes_and_control_are_checked():
    group = make_group([(4, 6)], FIRST)
    turned = UpdateGroup([group.params[0].mT], *([x[0].mT] for x in group.lists()[1:]), FIRST)
    with pytest.raises(ValueError, match=r"params\[0\].*contiguous"):
        sophia_update_groups([turned], impl="triton")
    double = UpdateGroup(*([x[0].double()] for x in group.lists()), FIRST)
    with pytest.raises(ValueError, match=r"torch.float64.*impl='torch'"):
        sophia_update_groups([double], impl="triton")
    sophia_update_groups([double], impl="auto")
    with pytest.raises(ValueError, match="control"):
        sophia_update_groups([group], control=torch.ones(2), impl="triton")
    with pytest.raises(ValueError, match="max_norm is -1"):
        gradient_norm(group.grads, -1.0)


def test_a_gradient_with_other_strides_is_read_right():
    group = make_group([(4, 6)], FIRST)
    other = UpdateGroup(*([x[0].clone()] for x in group.lists()), FIRST)
    other.grads[0] = other.grads[0].mT.contiguous().mT
    for each in (group, other):
        sophia_update_groups([each], impl="triton")
    assert torch.equal(group.params[0], other.params[0])


# ---- bugs that must not survive: (name, file, text, what a careless author would have written)
K, N = kernel, norm
BUGS = (
    ("decay inside the clip", K, "lr * u + lr_decay * p", "lr * (u + lr_decay * p)"),
    ("decay of the wrong sign", K, "lr * u + lr_decay * p", "lr * u - lr_decay * p"),
    ("decay left out", K, "(lr * u + lr_decay * p)", "lr * u"),
    ("momentum swapped", K, "m += beta1_rest * (g - m)", "m = g + beta1_rest * (m - g)"),
    ("bias correction of m left out", K, "m * m_scale / floor", "m / floor"),
    ("bias-corrected m is stored", K, "m += beta1_rest * (g - m)", "m = (m + beta1_rest * (g - m)) * m_scale"),
    ("offset scaled with h", K, "h * h_factor + h_offset", "(h + h_offset) * h_factor"),
    ("eps added", K, "tl.where(floor < eps, eps, floor)", "floor + eps"),
    ("not clipped", K, "tl.where(over, tl.where(ratio > 0.0, 1.0, -1.0), ratio)", "ratio"),
    ("clipped to +1 alone", K, "tl.where(ratio > 0.0, 1.0, -1.0)", "1.0"),
    ("gradient factor left out", K, "g_N * factor,", "g_N,"),
    ("scalars of the first group for all", K, "scalars_ptr + group * SCALARS", "scalars_ptr"),
    ("tail not masked in the count", K, "tl.sum((over_N & mask_N)", "tl.sum((over_N | (offs_N < 0) | ~mask_N)"),
    (
        "tail not masked",
        K,
        "return tensor, offs_N, offs_N < size, group",
        "return tensor, offs_N, offs_N < size + 1, group",
    ),
    (
        "last element lost",
        K,
        "return tensor, offs_N, offs_N < size, group",
        "return tensor, offs_N, offs_N < size - 1, group",
    ),
    ("every program on the first piece", K, "start = (pid - first) * BLOCK_N", "start = (pid - pid) * BLOCK_N"),
    ("m not stored", K, "tl.store(m_ptr, m_N.to(M_TYPE), mask=mask_N)", "pass"),
    (
        "copy of the old weights",
        K,
        "tl.store(copy_ptr, p_N.to(COPY_TYPE)",
        "tl.store(copy_ptr, tl.load(g_ptr, mask=mask_N).to(COPY_TYPE)",
    ),
    ("count of one program", K, "tl.store(clipped_ptr + pid,", "tl.store(clipped_ptr,"),
    ("estimate not squared", K, "g_N * g_N * num_targets", "g_N * num_targets"),
    ("estimate overwritten", K, "if not FIRST:", "if FIRST and not FIRST:"),
    ("curvature undamped", K, "beta2 * h_N + e_factor * e_N", "h_N + e_factor * e_N"),
    ("norm not rooted", N, "tl.sqrt(tl.sum(acc_N, axis=0))", "tl.sum(acc_N, axis=0)"),
    ("absolute sum", N, "tl.sum(g_N * g_N, axis=0)", "tl.sum(tl.abs(g_N), axis=0)"),
    ("factor above 1", N, "& (norm + added > max_norm)", ""),
    ("gradient scale lost from the norm", N, "* tl.abs(scale)", ""),
    ("gradient scale lost from the factor", N, "scale * clip", "clip"),
    ("always finite", N, 'norm < float("inf")', "norm == norm"),
)  # fmt: skip


def everything():
    """The least that kills every bug."""
    shapes = [(BLOCK + 977,), (7, 13)]
    groups = [make_group(shapes, FIRST, "copy-bf16"), make_group(shapes, SECOND, "copy-bf16", 1)]
    check_groups(groups, torch.tensor([4.0, 0.7, 1.0]))
    check_curvature("fp32", shapes)
    check_norm(1.0, torch.tensor(0.5))
    check_norm(1e4, None)
    bad = gradient_norm([torch.tensor([float("inf"), 1.0])], 1.0, impl="triton")
    assert bad[2] == 0


def use(monkeypatch, module, copy):
    for name in dir(copy):
        if re.fullmatch(r"\w+_launch", name):
            monkeypatch.setattr(module, name, getattr(copy, name))


@pytest.mark.parametrize(("bug", "module", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_is_noticed(tmp_path, monkeypatch, bug, module, old, new):
    use(monkeypatch, module, load_copy(tmp_path, module, old, new))
    with pytest.raises(AssertionError):
        everything()


@pytest.mark.parametrize("module", [K, N], ids=["kernel.py", "norm.py"])
def test_unchanged_copy_passes(tmp_path, monkeypatch, module):
    """The harness of the bugs adds none of its own."""
    use(monkeypatch, module, load_copy(tmp_path, module, "import triton\n", "import triton\n"))
    everything()
