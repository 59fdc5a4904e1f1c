"""Routed attention at BiFormer's first stage, beside copies of whole regions and torch's attention; memory; models.

gather    every region of queries gathers a copy of the regions that it reads, out of an expanded tensor, then SDPA
copies    the torch form: the same copies by rows of regions

What bounds the kernel (EPYC of family 25, AVX-512, one thread, forward): its share of torch.mm's rate is 0.82 here and
0.61 at DGT's first stage. Of its time, found by leaving a part out:

                    BiFormer, stage 1    DGT, stage 1
    q k^T                39 %                34 %
    weights v            35 %                31 %
    softmax              16 %                13 %         half of it are the powers of two
    the rest             10 %                22 %         queries sorted and turned, checks, idle lanes

The two products alone run at about torch.mm's rate. The copies with SDPA have a share of 0.49, so that a kernel at
torch.mm's rate would be 2 times as fast as they are, not more.
"""

import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dynattn.bench.grouped import on_one_thread
from dynattn.bench.timing import Benchmark, in_turn, model_over_swin, multiply_adds, share_of_mm, threads

ROOT = Path(__file__).parents[2]


def inputs_of(batch: int = 8, heads: int = 2, side: int = 56, S: int = 7, k: int = 4, d: int = 32) -> list[Tensor]:
    """q, k, v in S x S regions, and k regions at random for each."""
    torch.manual_seed(0)
    tokens = (side // S) ** 2
    routes = torch.rand(batch, S * S, S * S).argsort(-1)[..., :k].contiguous()
    return [*(torch.randn(batch, heads, S * S, tokens, d) for _ in range(3)), routes]


def gathered(q: Tensor, k: Tensor, v: Tensor, routes: Tensor) -> Tensor:
    """torch.gather over all regions for every region of queries, then torch's attention."""
    R, T = q.shape[2], k.shape[3]
    index = routes[:, None, :, :, None, None].expand(-1, k.shape[1], -1, -1, T, k.shape[4])
    k, v = (x[:, :, None].expand(-1, -1, R, -1, -1, -1).gather(3, index).flatten(3, 4) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def call(impl: str, inputs: list[Tensor], backward: bool) -> None:
    """One call, with the gradients of q, k and v if wanted."""
    from dynattn import ops

    q, k, v = (x.detach().requires_grad_(backward) for x in inputs[:3])
    with torch.set_grad_enabled(backward):
        attend = gathered if impl == "gather" else partial(ops.routed_attention, impl=impl)
        out = attend(q, k, v, inputs[3])
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def speed_up(other: str, backward: bool, rounds: int = 3) -> float:
    """Time of another way over that of the kernel, one thread."""
    inputs = inputs_of()
    ours, theirs = in_turn(*(on_one_thread(partial(call, impl, inputs, backward)) for impl in ("numba", other)), rounds)
    return theirs / ours


def share(backward: bool) -> float:
    """The kernel's rate as a share of torch.mm's, one thread."""
    run = partial(call, "numba", inputs_of(), backward)
    return share_of_mm(on_one_thread(run), multiply_adds(run), on_one_thread)


def extra_bytes(H: int = 600, W: int = 500, C: int = 20) -> int:
    """What bi-level attention of a map takes at its peak beyond its inputs and its output (Linux)."""
    from dynattn import ops

    def attend(H: int, W: int) -> Tensor:
        return ops.bilevel_attention(*inputs, (H, W), (H, W), regions=7, topk=4, impl="numba")

    def resident(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    with threads(2), torch.inference_mode():
        inputs = [torch.randn(1, 1, 120, C) for _ in range(3)]
        attend(12, 10)  # libraries, threads
        inputs = [torch.randn(1, 1, H * W, C) for _ in range(3)]
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        out = attend(H, W)
        return resident("VmHWM") - before - out.numel() * out.element_size()


def memory() -> float:
    """`extra_bytes` in MB, in a process of its own."""
    program = "from dynattn.bench import routed; print(routed.extra_bytes())"
    run = [sys.executable, "-W", "ignore", "-c", program]
    return int(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout) / 1e6


def rows() -> dict[str, Benchmark]:
    """The kernel, memory at a large map, and a multiply-add of three models."""
    found = {}
    for name, backward in (("forward", False), ("both", True)):
        what = "  with the backward" if backward else "routed attention, stage 1: gather / numba"
        rate, gather, copies = (
            partial(share, backward),
            *(partial(speed_up, way, backward) for way in ("gather", "torch")),
        )
        found[f"{name} r"] = Benchmark(what, gather, 3, least=True, share=rate)
        found[f"{name} c"] = Benchmark("  copies / numba", copies, 1, least=True, share=rate)
    found["memory r"] = Benchmark("  extra memory at 1 x 20 x 600 x 500", memory, 200, "MB")
    for name, bound in (("biformer_tiny", 1.3), ("biformer_small", 1.6), ("debiformer_tiny", 1.8)):
        found[name] = Benchmark("  multiply-add / of timm's Swin-T", partial(model_over_swin, name, 5), bound)
    return found
