"""How things are timed: in turn, so that other load on the machine meets all of them."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Benchmark(NamedTuple):
    """What is measured, by what, and the most that it may be, or the least."""

    what: str
    measure: Callable[[], float]
    bound: float
    unit: str = "x"
    least: bool = False

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the bound."""
        return value >= self.bound if self.least else value <= self.bound
