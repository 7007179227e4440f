"""A peer of the throughput contest: PEFT in a hand-written loop that a careful user could write.

bf16 without autocast, micro-batches sorted by length, causal attention without a mask (right padding needs none),
logits at the targets only, torch's fused AdamW, one flat all-reduce a step. `--adapters`: fp32 (PEFT's default: casts
around each adapter), bf16, or master (bf16 with fp32 copies that the optimizer updates, the same numerics as FLeX's);
`--logits` targets or all; `--compile` each decoder layer by torch.compile. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import peer_common as common
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Row = dict[str, list[int]]


def padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """Ids and labels, labels shifted to the position that predicts them."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(ids, common.IGNORE)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = torch.tensor(row["input_ids"])
        labels[i, : n - 1] = torch.tensor(row["labels"][1:])
    return ids, labels


def loss_sum(base: Any, rows: list[Row], all_logits: bool) -> Tensor:
    """Summed cross-entropy of a micro-batch."""
    ids, labels = padded(rows)
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    labels = labels.flatten()
    if not all_logits:
        keep = labels != common.IGNORE
        hidden, labels = hidden[keep], labels[keep]
    return F.cross_entropy(base.lm_head(hidden).float(), labels, reduction="sum")


class Update:
    """All-reduce, clipping and AdamW; with `masters` on fp32 copies of the parameters."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, masters: bool) -> None:
        self.parameters = parameters
        if common.WORLD > 1:  # each process drew its own A
            for p in parameters:
                dist.broadcast(p.data, 0)
        self.own = [nn.Parameter(p.detach().float()) for p in parameters] if masters else parameters
        self.optimizer = torch.optim.AdamW(self.own, lr=lr, weight_decay=0.0, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        if self.own is not self.parameters:
            for own, p in zip(self.own, self.parameters, strict=True):
                own.grad = p.grad.float()
        grads = [p.grad for p in self.own]
        if common.WORLD > 1:
            flat = torch.cat([g.flatten().float() for g in grads])
            dist.all_reduce(flat)
            parts = flat.split([g.numel() for g in grads])
            torch._foreach_copy_(grads, [x.view_as(g) for x, g in zip(parts, grads, strict=True)])
        nn.utils.clip_grad_norm_(self.own, 1.0)
        self.optimizer.step()
        if self.own is not self.parameters:
            torch._foreach_copy_([p.data for p in self.parameters], self.own)
        for p in (*self.parameters, *self.own):
            p.grad = None


def train(args: argparse.Namespace, model: Any, rows: list[Row]) -> None:
    base = model.get_base_model()
    if args.compile:  # layer by layer: one graph serves all thirty
        for layer in base.model.layers:
            layer.compile(dynamic=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = Update(trained, args.lr, args.adapters == "master")
    model.train()
    seconds, targets, positions, losses = [], [], [], []
    size = args.batch * args.accumulation * common.WORLD
    for step in range(args.steps):
        began = time.perf_counter()
        all_rows = rows[step * size : (step + 1) * size]
        micro = [all_rows[i : i + args.batch] for i in range(0, size, args.batch)]
        mine = micro[common.RANK :: common.WORLD]
        bearing = [sum(t != common.IGNORE for t in row["labels"][1:]) for row in all_rows]
        total = torch.zeros(1, dtype=torch.float64)
        for part in mine:
            loss = loss_sum(base, part, args.logits == "all") / sum(bearing)
            loss.backward()
            total += loss.detach().double()
        if common.WORLD > 1:
            dist.all_reduce(total)
        update.step()
        losses.append(total.item())
        seconds.append(time.perf_counter() - began)
        first = common.RANK == 0
        targets.append(sum(bearing) if first else 0)
        positions.append(sum(len(row["input_ids"]) for row in all_rows) if first else 0)
    common.print_record(seconds, targets, positions, losses)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--adapters", choices=("fp32", "bf16", "master"), default="master")
    parser.add_argument("--logits", choices=("targets", "all"), default="targets")
    args = parser.parse_args()
    if common.WORLD > 1:
        dist.init_process_group("gloo")
    rows = common.read_rows(args)
    train(args, common.lora_model(args, args.adapters == "fp32"), rows)
    if common.WORLD > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
