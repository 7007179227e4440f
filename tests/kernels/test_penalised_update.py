"""Penalty and Sophia in one pass: error against fp64, bytes, launches, what is refused, seeded bugs."""

import pytest
import torch

from flex.kernels.penalised_update import api, kernel, penalised_reference, penalised_update
from flex.kernels.penalised_update.shipped import shipped
from flex.kernels.sophia_update import Scalars, UpdateGroup, gradient_norm, sophia_update_groups
from flex.kernels.spectral_penalty import Spectrum, chips, spectral_penalty_into, tables
from tests.counting import count_traffic
from tests.mutants import load_copy
from tests.oracle import assert_within_budget

AXIS = Spectrum(transform="axis")
EDGE = Spectrum("hard_cutoff", phi_high=0.0, transform="axis", one_sided=True)
WEIGHT = 0.3
GUARD = 128  # elements behind each tensor that nobody may write; more than a vector of a mutant
PLAN = tables.plan
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# p, m, h, g, copy
DTYPES = {
    "fp32": (F32, F32, F32, F32, None),
    "copy-bf16": (F32, F32, F32, BF16, BF16),
    "bf16": (BF16, BF16, BF16, BF16, None),
}
FIRST = Scalars(
    lr=0.01, beta1=0.9, gamma=0.5, eps=0.3, weight_decay=0.1, m_scale=1.7, h_scale=3, h_offset=0.2
)
SECOND = Scalars(lr=0.2, beta1=0.6, gamma=1.0, eps=1e-12, weight_decay=0.0, h_offset=0.5)
CONTROL = torch.tensor([4.0, 0.7, 1.0])


def guarded(x):
    """x at the start of something longer."""
    longer = torch.full((x.numel() + GUARD,), 77.0, dtype=x.dtype)
    longer[: x.numel()] = x.flatten()
    return longer[: x.numel()].view(x.shape)


def make_group(shapes, scalars=FIRST, dtypes="fp32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    p_type, m_type, h_type, g_type, copy_type = DTYPES[dtypes]

    def make(dtype):
        return [guarded(torch.randn(s, generator=generator).to(dtype)) for s in shapes]

    p, m, h, g = make(p_type), make(m_type), make(h_type), make(g_type)
    h = [guarded(x.square()) for x in h]
    copies = None if copy_type is None else make(copy_type)
    return UpdateGroup(p, m, h, g, scalars, copies)


def copied(group):
    lists = [[guarded(x) for x in found] for found in group.lists()]
    return UpdateGroup(*lists[:4], group.scalars, None if len(lists) == 4 else lists[4])


def matrices(groups):
    """(p, m, h, g, copy or None, scalars) of every matrix in order."""
    for group in groups:
        copies = group.copies or [None] * len(group.params)
        for one in zip(*group.lists()[:4], copies, strict=True):
            yield *one, group.scalars


def check(groups, roles, spectrum=AXIS, start=True, control=CONTROL, impl="triton"):
    """Hold everything that an update writes to the error budget; two runs must agree bit for bit."""
    before = [copied(group) for group in groups]
    again = [copied(group) for group in groups]
    generator = torch.Generator().manual_seed(9)
    starts = [
        torch.randn(x[0].shape, generator=generator) if start else None for x in matrices(groups)
    ]
    factor = 1.0 if control is None else float(control[1])
    options = {"starts": starts, "control": control, "impl": impl}
    found = penalised_update(groups, spectrum, roles, WEIGHT, **options)
    repeated = penalised_update(again, spectrum, roles, WEIGHT, **options)
    assert all(map(torch.equal, vars(found).values(), vars(repeated).values())), "runs differ"
    clipped = total = 0
    new, old, twin = (list(matrices(x)) for x in (groups, before, again))
    for i, ((p, m, h, g, copy, scalars), w0, role) in enumerate(
        zip(old, starts, roles, strict=True)
    ):
        small = F32 if m.dtype == F32 else m.dtype

        def reference(dtype, p=p, m=m, h=h, g=g, w0=w0, role=role, scalars=scalars):
            # no FFT in half precision: the plain computation widens, and rounds what it stores
            wide = [x.to(dtype) for x in (p, m, h, g)]
            w0 = None if w0 is None else w0.to(dtype)
            return penalised_reference(
                *wide, spectrum, role=role, weight=WEIGHT, start=w0, factor=factor, **vars(scalars)
            )

        want, eager = reference(F64), reference(F32)
        assert_within_budget(new[i][0], eager.p.to(p.dtype), want.p, f"p {i}")
        assert_within_budget(new[i][1], eager.m.to(small), want.m, f"m {i}")
        assert_within_budget(found.values[i], eager.value, want.value, f"value {i}")
        assert_within_budget(found.squares[i], eager.square, want.square, f"square {i}")
        assert torch.equal(new[i][2], h) and torch.equal(new[i][3], g), f"h or g {i} was written"
        if copy is not None:
            assert torch.equal(new[i][4], new[i][0].to(copy.dtype)), f"copy {i}: not p, rounded"
        for a, b in zip(new[i][:2], twin[i][:2], strict=True):
            assert torch.equal(a, b), f"matrix {i}: runs differ"
        for x in (t for t in (*new[i][:2], new[i][4]) if t is not None):
            whole = x.new_empty(0).set_(x.untyped_storage())
            assert (whole[x.numel() :] == 77.0).all(), f"matrix {i}: written beyond the end"
        clipped += int(want.clipped)
        total += p.numel()
    assert 0.1 * total < clipped < 0.9 * total, "a count that proves little"
    slack = 0 if old[0][1].dtype == F32 else 2
    assert abs(int(found.clipped) - clipped) <= slack, f"clipped {found.clipped}, not {clipped}"


def with_split(monkeypatch, split):
    """Make every plan take `split` blocks, so that short lengths go through the long ones' code."""
    monkeypatch.setattr(tables, "plan", lambda n, precision, chip: PLAN(n, precision, chip, split))


# ---- the result


@pytest.mark.parametrize(
    ("length", "spectrum"),
    ((64, AXIS), (96, EDGE), (112, AXIS), (172, EDGE), (256, AXIS), (344, EDGE)),
)
@pytest.mark.usefixtures("poison")
def test_lengths(length, spectrum):
    """Odd numbers of vectors, A and B, in one call."""
    check([make_group([(3, length), (length, 2)])], "AB", spectrum)


@pytest.mark.parametrize(
    ("length", "split", "short"),
    ((64, 4, True), (344, 4, False), (96, 8, False), (320, 8, True), (64, 1, False)),
)
@pytest.mark.usefixtures("poison")
def test_blocks(length, split, short, monkeypatch):
    with_split(monkeypatch, split)
    if not short:
        monkeypatch.setattr(tables, "LONG_POINTS", 0)
        check([make_group([(2, length), (length, 1)])], "AB", start=False)
    check([make_group([(2, length), (length, 1)])], "AB")


@pytest.mark.parametrize("rank", (1, 4, 17))
def test_ranks(rank):
    check([make_group([(rank, 32), (32, rank)])], "AB", start=rank != 4)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_dtypes(dtypes):
    check([make_group([(3, 96), (96, 4)], dtypes=dtypes)], "AB", EDGE)


def test_the_common_length_without_control():
    check([make_group([(1, 4096)])], "A", control=None)


def test_groups_keep_their_scalars():
    shapes = [(3, 64), (96, 5), (2, 96)]
    check([make_group(shapes), make_group(shapes[1:], SECOND, seed=1)], "ABABA")


@pytest.mark.parametrize("transform", ("flat", "axis", "fft2"))
def test_torch_path(transform):
    groups = [make_group([(3, 64), (17, 2)]), make_group([(3, 64)], SECOND, "copy-bf16")]
    check(groups, "ABA", Spectrum(transform=transform), impl="torch")


@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_with_factor_1_it_is_the_separate_passes(impl):
    """Today's step: penalty into the gradients, the norm of the sum, the update."""
    group = make_group([(3, 64), (64, 2)])
    one, three = copied(group), copied(group)
    penalised_update([one], AXIS, "AB", WEIGHT, control=torch.ones(3), impl=impl)
    spectral_penalty_into(three.params, three.grads, AXIS, "AB", WEIGHT, impl="torch")
    control = gradient_norm(three.grads, 1e9, impl="torch")
    sophia_update_groups([three], control=control, impl="torch")
    for a, b in zip(one.params + one.exp_avgs, three.params + three.exp_avgs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
@pytest.mark.parametrize("impl", ("torch", "triton"))
def test_not_finite_changes_nothing_but_is_measured(bad, impl):
    group = make_group([(3, 96), (96, 2)], dtypes="copy-bf16")
    sane = penalised_update([copied(group)], AXIS, "AB", WEIGHT, impl=impl)
    group.grads[1][7, 1] = bad
    before = copied(group)
    control = gradient_norm(group.grads, 1.0, impl=impl)
    found = penalised_update([group], AXIS, "AB", WEIGHT, control=control, impl=impl)
    for new, old in zip(matrices([group]), matrices([before]), strict=True):
        assert torch.equal(new[0], old[0]) and torch.equal(new[1], old[1])
        assert torch.equal(new[4], old[4])
    assert int(found.clipped) == 0
    assert torch.equal(found.values, sane.values) and torch.equal(found.squares, sane.squares)


# ---- what it costs


def table_bytes(spec):
    """What a program reads of the constant tables, which all programs share through L2."""
    size_1, size_2 = spec.padded
    dfts = (2 * size_1) ** 2 + (2 * size_2) ** 2 * (spec.q1 != spec.q2)
    # of each class twiddles twice and sigma; of all but the first twists twice
    return 4 * (dfts + (9 * spec.classes - 4) * size_1 * size_2)


@pytest.mark.parametrize(("start", "each"), ((False, 24), (True, 28)))
def test_bytes_and_launches(start, each):
    """p, m, h, g (and the start) are read once, p and m written once."""
    shapes, roles = [(5, 4096), (4096, 2), (4, 448)], "ABA"
    group = make_group(shapes)
    starts = [p.clone() for p in group.params] if start else None
    with count_traffic() as traffic:
        penalised_update(
            [group], AXIS, roles, WEIGHT, starts=starts, control=CONTROL, impl="triton"
        )
    assert traffic.launches == {"_penalised_kernel": 3, "_sum_kernel": 1, "_count_kernel": 1}
    elements, programs = sum(p.numel() for p in group.params), 3 + 1 + 2
    read, written = traffic.by_kernel["_penalised_kernel"]
    read -= 4 * table_bytes(PLAN(4096, "tf32")) + 2 * table_bytes(PLAN(448, "tf32"))
    assert written == 8 * elements + 12 * programs
    assert read + written <= 1.05 * each * elements
    assert 0 < read - (each - 8) * elements <= 500 * programs  # the table: stays in L1


@pytest.mark.parametrize(("split", "start", "each"), ((4, True, 28), (8, True, 32), (8, False, 24)))
def test_of_long_rows_only_eight_blocks_with_a_start_are_read_once_more(
    split, start, each, monkeypatch
):
    with_split(monkeypatch, split)
    monkeypatch.setattr(tables, "LONG_POINTS", 0)
    group = make_group([(2, 4096)])
    starts = [p.clone() for p in group.params] if start else None
    with count_traffic() as traffic:
        penalised_update([group], AXIS, "A", WEIGHT, starts=starts, impl="triton")
    read, written = traffic.by_kernel["_penalised_kernel"]
    read -= 2 * table_bytes(PLAN(4096, "tf32", split=split))
    assert each * 8192 < read + written <= 1.05 * each * 8192


def test_which_vectors_are_held():
    lengths = (4096, 5120, 8192, 11008, 13824, 14336)
    assert all(kernel.holds(PLAN(n, "tf32"), False) for n in lengths)
    assert [n for n in lengths if kernel.holds(PLAN(n, "tf32"), True)] == [*lengths[:4]]


def test_shipped_names_are_unique_and_bind():
    configs = shipped()
    assert len({c.name for c in configs}) == len(configs)
    for c in configs:
        assert set(c.fn.arg_names) == {*c.signature, *c.constants}


# ---- what it takes


def test_refusals():
    group = make_group([(2, 64)])

    def run(spectrum=AXIS, group=group, roles="A", **options):
        return penalised_update([group], spectrum, roles, WEIGHT, **{"impl": "triton", **options})

    for transform in ("flat", "fft2"):
        with pytest.raises(NotImplementedError, match=rf"{transform}.*impl='torch'"):
            run(Spectrum(transform=transform))
    for bad in (
        {"roles": "C"}, {"roles": "AA"}, {"impl": "cuda"}, {"starts": [torch.ones(2, 63)]},
        {"group": make_group([(64,)])}, {"group": make_group([])}, {"control": torch.ones(2)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            run(**bad)
    doubles = UpdateGroup(*([x[0].double()] for x in group.lists()), FIRST)
    turned = UpdateGroup(*([x[0].mT] for x in group.lists()), FIRST)
    for odd, match in (
        (doubles, "float64"), (make_group([(2, 131)]), "131 elements"), (turned, "contiguous"),
    ):  # fmt: skip
        before = odd.params[0].clone()
        with pytest.raises(ValueError, match=match):
            run(group=odd)
        assert torch.equal(odd.params[0], before)


def test_what_spills_on_a_chip_is_refused(monkeypatch):
    """What the kernels report found, not a property of the length."""
    monkeypatch.setattr(api, "chip_of", lambda device: chips.AMPERE)
    refused = (("A", (1, 5120), AXIS), ("B", (4096, 1), EDGE), ("A", (1, 3584), AXIS))
    for roles, shape, spectrum in refused:
        group = make_group([shape])
        with pytest.raises(ValueError, match=r"sm_80.* in tf32.*spill.*impl='torch'"):
            penalised_update([group], spectrum, roles, WEIGHT, impl="triton")
    check([make_group([(1, 4096)])], "A")


def test_auto_gives_the_rest_to_the_passes(monkeypatch):
    """On a GPU, lengths that do not factor take two passes, in the same call."""
    monkeypatch.setattr(
        api, "choose_impl", lambda _, impl, __: "triton" if impl == "auto" else impl
    )
    with count_traffic() as traffic:
        check([make_group([(3, 131), (64, 3), (2, 131)])], "ABA", impl="auto")
    assert traffic.launches["_penalised_kernel"] == 2  # `check` runs it twice
    monkeypatch.setattr(api, "chip_of", lambda device: chips.UNKNOWN)
    with count_traffic() as traffic:
        check([make_group([(3, 64)])], "A", impl="auto")
    assert "_penalised_kernel" not in traffic.launches


# ---- bugs that must not survive: (name, text, what a careless author would have written)
BUGS = (
    ("gradient not doubled", "2.0 * weight * xs[i]", "weight * xs[i]"),
    ("penalty clipped with the data", "g * factor + x, scalars", "(g + x) * factor, scalars"),
    ("factor left out", "g * factor + x, scalars", "g + x, scalars"),
    ("penalty left out", "g * factor + x, scalars", "g * factor, scalars"),
    ("start added", "w = p - tl.load", "w = p + tl.load"),
    ("update of p - start", "return p, w", "return w, w"),
    ("last vector dropped", "mask & (piece * 2 + 1 < vectors)", "mask & (piece * 2 + 2 < vectors)"),
    ("second vector over the first", "which = piece * 2 + i", "which = piece * 2"),
    ("no bound on the second vector", "inside = mask & (which < vectors)", "inside = mask"),
    ("value without lambda", "weight * energy)", "energy)"),
    ("square of one block", "square += part", "square = part"),
    ("square of the padding", "tl.where(mask, x * x, 0.0)", "tl.where(mask, x * x, 1.0)"),
    ("count of one block", "clipped += count", "clipped = count"),
    ("m not stored", "tl.store(m_ptr, m.to(TYPES[1]), mask=mask)", "pass"),
    ("scalars of the first group", "tl.load(row_ptr + 8) * SCALARS", "0"),
    ("copy of another block", "which, 6, TYPES[5], BLOCK, SHAPE", "which, 6, TYPES[5], 0, SHAPE"),
    ("blocks overlap", "+ (BLOCK * SHAPE[0] * SHAPE[1]) * stride_e", "+ BLOCK * stride_e"),
    ("rows taken for columns", 'if self.role == "A" else (along', "if True else (along"),
    ("columns as rows in memory", "and self.strides[1] == 1 and self.strides[0] % 16 == 0", ""),
    ("skip ignored", "+ finite != 0.0)", "+ 1.0 != 0.0)"),
)  # fmt: skip


def everything(monkeypatch):
    """The least that kills every bug."""
    shapes = [(3, 32), (32, 2)]
    groups = [make_group(shapes), make_group([(1, 32)], SECOND)]
    check(groups, "ABA", EDGE)
    with monkeypatch.context() as patch:
        with_split(patch, 4)
        check([make_group([(1, 64), (64, 1)], dtypes="copy-bf16")], "AB", EDGE)
    group = make_group([(2, 32)])
    before = group.params[0].clone()
    control = torch.tensor([float("inf"), 1.0, 0.0])
    penalised_update([group], AXIS, "A", WEIGHT, control=control, impl="triton")
    assert torch.equal(group.params[0], before), "not finite, and changed"


def use(monkeypatch, copy):
    for name in ("Item", "update_launch"):
        monkeypatch.setattr(kernel, name, getattr(copy, name))


def test_unchanged_copy_passes(tmp_path, monkeypatch):
    """The harness of the bugs adds none of its own."""
    use(monkeypatch, load_copy(tmp_path, kernel, "import triton\n", "import triton\n"))
    everything(monkeypatch)


@pytest.mark.parametrize(("bug", "old", "new"), BUGS, ids=[bug[0] for bug in BUGS])
def test_bug_is_noticed(tmp_path, monkeypatch, bug, old, new):
    use(monkeypatch, load_copy(tmp_path, kernel, old, new))
    with pytest.raises(AssertionError, match=r"over its budget|clipped|copy|beyond|not finite"):
        everything(monkeypatch)
