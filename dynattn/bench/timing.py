"""How things are timed: in turn, so that other load on the machine meets all of them.

What is compared between machines is a share: the multiply-adds of a kernel in a second, over those of torch.mm in the
same process with as many threads (float32, two matrices of 1024 x 1024). A ratio of two times means less, since it
tells of both: where another way is slow, a kernel looks fast.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch


def in_turn(one: Callable[[], float], other: Callable[[], float], rounds: int) -> tuple[float, float]:
    """The shortest times of two things, each called at least `rounds` times: other load on the machine only ever adds.

    Next is whichever has had less time so far: a short one has as long to find the machine idle as a long one has.
    """
    calls, times = (one, other), ([one()], [other()])
    while min(map(len, times)) < rounds:
        due = int(sum(times[0]) > sum(times[1]))
        times[due].append(calls[due]())
    return min(times[0]), min(times[1])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for torch, or as many as there are cores; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, os.cpu_count() or 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timed(call: Callable[[], object]) -> Callable[[], float]:
    """A call as something that answers its seconds; called once before, since the first call compiles and allocates."""
    call()

    def run() -> float:
        start = perf_counter()
        call()
        return perf_counter() - start

    return run


SIDE = 1024  # of the matrices that torch.mm multiplies


def share_of_mm(seconds: Callable[[], float], multiply_adds: int, timer: Callable, rounds: int = 5) -> float:
    """The rate of a kernel over that of torch.mm, timed in turn.

    seconds() calls the kernel, which does so many multiply-adds; timer is what made it: `timed` or a like.
    """
    one, other = torch.randn(2, SIDE, SIDE)
    ours, theirs = in_turn(seconds, timer(partial(torch.mm, one, other)), rounds)
    return (multiply_adds / ours) / (SIDE**3 / theirs)


def multiply_adds(call: Callable[[], object]) -> int:
    """Of one call, as torch counts them: of a kernel's backward too, where the logits are computed again."""
    from torch.utils.flop_counter import FlopCounterMode

    call()  # the first call loads the operators, with what the counter must know of them
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2


class Benchmark(NamedTuple):
    """What is measured, by what, and the most that it may be, or the least; None where that depends on the CPU.

    share: measures the kernel's rate as a share of torch.mm's, where the row is about a kernel's time.
    """

    what: str
    measure: Callable[[], float]
    bound: float | None
    unit: str = "x"
    least: bool = False
    share: Callable[[], float] | None = None

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return self.bound is None or (value >= self.bound if self.least else value <= self.bound)


def model_over_swin(name: str, rounds: int) -> float:
    """Time for a multiply-add of a model over that of timm's Swin-T: forward, 8 images of 224 x 224, two threads."""
    import timm

    from dynattn import cost, create_model

    images = torch.randn(8, 3, 224, 224)
    models = [create_model(name).eval(), timm.create_model("swin_tiny_patch4_window7_224").eval()]

    def forward(model: torch.nn.Module) -> float:
        start = perf_counter()
        model(images)
        return perf_counter() - start

    with threads(2), torch.inference_mode():
        for one in models:  # the first call allocates
            forward(one)
        ours, theirs = in_turn(lambda: forward(models[0]), lambda: forward(models[1]), rounds)
    return (ours / cost.count(models[0], 224).macs) / (theirs / cost.count(models[1], 224).macs)
