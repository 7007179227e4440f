"""The waterfall of one FLeX step: what each part takes, with the least that it could take beside it.

    python benchmarks/waterfall.py --mbpp mbpp.jsonl --plot waterfall.png

One process. Floors: the products' operations at the GEMM rate, the bytes that must move at the bandwidth, both
measured in the same run with the same threads. A refresh counts with 1 / (steps between refreshes) of itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from step_profile import PARTS, Profiled, profile  # noqa: E402

from benchmarks.harness import Work  # noqa: E402
from benchmarks.harness.ceilings import Ceilings, measure  # noqa: E402
from flex.config import RunConfig  # noqa: E402
from flex.loss_plot import save_figure  # noqa: E402
from flex.model.architecture import read_architecture  # noqa: E402

RECIPE = Path(__file__).resolve().parents[1] / "flex/recipes/mbpp-smollm2.yaml"
AIMS = {"penalty": 0.01, "refresh": 0.05}  # of the average step


def config(mbpp: Path | None, model: str, options: list[str]) -> RunConfig:
    """The recipe with Sophia and the penalty, on the built-in tasks if there is no file."""
    from flex.config_io import load_config

    data = f"data.path={mbpp}" if mbpp else "data.name=builtin"
    return load_config(str(RECIPE), [data, f"model.name={model}", *options])


def floors(found: Profiled, cfg: RunConfig) -> dict[str, Work]:
    """The work that no implementation of a part can avoid, per step; parts without one have no key.

    Frozen GEMM, LM head: their products. LoRA: 4 M K + 2 M N extra bytes a layer beside the frozen product. Attention:
    the causal half of its products. Norms, RoPE, SwiGLU: each input and output of forward and backward once.
    Penalty: weights in, gradient in and out. Optimizer: 24 bytes a parameter (Sophia), 28 (AdamW).
    """
    model = read_architecture(cfg.model)
    hidden, layers = model.hidden, model.layers
    rows, size = found.positions, 2 if cfg.model.dtype == "bfloat16" else 4
    adapted = [
        (linear.inputs, linear.outputs)
        for linear in model.linears
        if linear.name.rpartition(".")[2] in cfg.lora.targets
    ]
    parameters = layers * cfg.lora.r * sum(k + n for k, n in adapted)
    lora = layers * size * rows * sum(4 * k + 2 * n for k, n in adapted)
    pairs = sum(n * (n + 1) / 2 for documents in found.documents for n in documents)
    pairs /= max(1, len(found.documents))
    pointwise = 2 * 5 * hidden + 4 * (model.attention_width + model.kv_width) + 8 * model.ffn
    kind = "bf16" if size == 2 else "fp32"
    work = {
        "frozen GEMM": Work(flops=found.flops["frozen GEMM"], dtype=kind),
        "LoRA": Work(bytes=lora),
        "attention": Work(flops=3 * 4 * layers * model.attention_width * pairs, dtype=kind),
        "loss and LM head": Work(
            flops=2 * 2 * found.targets * hidden * model.vocabulary, dtype=kind
        ),
        "norms and pointwise": Work(bytes=layers * size * rows * pointwise),
        "optimizer": Work(bytes=(24 if cfg.optim.name == "sophia" else 28) * parameters),
    }
    if cfg.penalty.active:
        work["penalty"] = Work(bytes=12 * parameters)
    return work


def table(found: Profiled, work: dict[str, Work], ceilings: Ceilings) -> str:
    """Seconds, share, floor and the floor's share of the time, by part."""
    lines = [f"{'part':<22}{'seconds':>9}{'share':>9}{'floor':>9}{'floor/time':>12}"]
    shares = found.shares()
    for part in PARTS:
        spent = shares[part] * found.average
        line = f"{part:<22}{spent:9.3f}{shares[part]:9.1%}"
        if part in work and spent > 0:
            floor = ceilings.floor(work[part])
            line += f"{floor:9.3f}{floor / spent:12.0%}"
        if part in AIMS:
            line += f"   aim: at most {AIMS[part]:.0%}"
        lines.append(line)
    floor = sum(ceilings.floor(w) for w in work.values())
    whole = f"{'step, on average':<22}{found.average:9.3f}{1:9.1%}{floor:9.3f}{floor / found.average:12.0%}"
    rate = f"{found.targets / found.average:.0f} target tokens/s, {found.positions / found.average:.0f} positions/s"
    return "\n".join([*lines, whole, f"{rate} under the profiler; loss {found.loss:.4f}"])


def plot(found: Profiled, work: dict[str, Work], ceilings: Ceilings, path: Path) -> None:
    """Bars that start where the one before ends; the floor drawn inside each."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(9, 4.5), layout="constrained")
    axes = canvas.subplots()
    shares, start = found.shares(), 0.0
    for place, part in enumerate(PARTS):
        spent = shares[part] * found.average
        axes.barh(place, spent, left=start, color="#8fb4d9")
        if part in work:
            axes.barh(place, ceilings.floor(work[part]), left=start, height=0.35, color="#2b5c8a")
        axes.text(start + spent, place, f" {spent:.2f} s, {shares[part]:.1%}", va="center")
        start += spent
    axes.set_yticks(range(len(PARTS)), PARTS)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * found.average)
    axes.set_xlabel("seconds of one step (dark: floor)")
    save_figure(canvas, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mbpp", type=Path, metavar="FILE", help="none: the built-in tasks")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="profiled steps (3)")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("option", nargs="*", help="of the run: key=value")
    args = parser.parse_args()
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    cfg = config(args.mbpp, args.model, args.option)
    found = profile(cfg, args.steps)
    ceilings = measure(torch.device("cpu"), tiny=False)
    work = floors(found, cfg)
    print(f"{torch.get_num_threads()} threads; {ceilings}\n{table(found, work, ceilings)}")
    if args.plot:
        plot(found, work, ceilings, args.plot)
        print(f"written: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
