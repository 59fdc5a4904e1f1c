"""Aggregation by rank at SG-Former's first stages, beside the sorted copy of the torch form; a model."""

from functools import partial

import torch
from torch import Tensor

from dynattn.bench.grouped import on_one_thread
from dynattn.bench.timing import Benchmark, in_turn, model_over_swin

STAGES = {1: (56, 64, (196, 56, 28), (1, 2, 1)), 2: (28, 128, (49, 14, 7), (1, 2, 1)), 3: (14, 256, (2, 1), (1, 1))}


def inputs_of(stage: int, batch: int = 8) -> list[Tensor | list[int]]:
    """Tokens, an order at random, weights, sizes and rates of a stage of SG-Former-S."""
    side, C, rates, shares = STAGES[stage]
    torch.manual_seed(0)
    order = torch.rand(batch, side * side).argsort(dim=1)
    sizes = [side * side // sum(shares) * share for share in shares]
    tensors = [torch.randn(batch, side * side, C), order, torch.randn(sum(rates)), torch.randn(len(rates))]
    return [*tensors, sizes, list(rates)]


def call(impl: str, inputs: list, backward: bool) -> None:
    """One call, with the gradients of tokens, weights and biases if wanted."""
    from dynattn import ops

    x, order, weight, bias, *rest = inputs
    leaves = [t.detach().requires_grad_(backward) for t in (x, weight, bias)]
    with torch.set_grad_enabled(backward):
        out = ops.aggregate_tokens(leaves[0], order, *leaves[1:], *rest, impl=impl)
        if backward:
            torch.autograd.grad(out, leaves, torch.ones_like(out))


def speed_up(stage: int, backward: bool, rounds: int = 7) -> float:
    """Time of the torch form over that of the kernel, one thread."""
    inputs = inputs_of(stage)
    ours, theirs = in_turn(
        *(on_one_thread(partial(call, impl, inputs, backward)) for impl in ("numba", "torch")), rounds
    )
    return theirs / ours


def rows() -> dict[str, Benchmark]:
    """The kernel at three stages, and a multiply-add of SG-Former-S."""
    found = {}
    for stage in STAGES:
        what = f"aggregation by rank, stage {stage}: torch / numba"
        bound = 2 if stage == 1 else 1
        found[f"forward {stage}"] = Benchmark(what, partial(speed_up, stage, False), bound, least=True)
        found[f"both {stage}"] = Benchmark("  with the backward", partial(speed_up, stage, True), bound, least=True)
    swin = partial(model_over_swin, "sgformer_small", 5)
    found["sgformer_small"] = Benchmark("  multiply-add / of timm's Swin-T", swin, 0.95)
    return found
