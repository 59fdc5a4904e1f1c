"""The table and the arithmetic of `dynattn bench`, with numbers that are given. Nothing here is timed but once.

Only one measure is in the gate, and only by `make test-all`: the kernel is not slower than the torch form. It counts
the CPU time of one thread, and stops at the first try of five that shows it.
"""

from functools import partial
from pathlib import Path

import pytest
import torch

from dynattn import bench
from dynattn.bench import grouped, routed, timing


@pytest.mark.slow
@pytest.mark.speed
def test_the_kernel_is_not_slower_than_the_torch_form():
    """DGT-2 at the first stage of DGT-T."""
    assert any(grouped.speed_up("tiles", *grouped.STAGES[1]) >= 1 for _ in range(5))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak of memory")
def test_routed_attention_copies_no_map():
    """At 600 x 500, whose sides 7 regions do not divide, with 20 channels, which registers do not fit.

    One copy of q, k and v, with padding and in whole registers, is 116 MB.
    """
    assert routed.memory() < 100


def test_the_share_of_mm_is_a_ratio_of_rates(monkeypatch):
    """A kernel that does 1024^3 / 4 multiply-adds in half of torch.mm's time has half of its rate."""
    times = iter([2.0])
    timer = lambda call: call() is not None and (lambda: next(times))  # noqa: E731
    found = timing.share_of_mm(lambda: 1.0, timing.SIDE**3 // 4, timer, rounds=1)
    assert found == 0.5


def test_multiply_adds_are_those_of_the_operation():
    """Two products with the keys that each query reads; five more in a backward, of which one is computed again."""
    L, heads, k, d = 20, 2, 9, 4
    inputs = grouped.inputs_of(L, heads, k, batch=1, groups=3, d=d)
    forward, both = (timing.multiply_adds(partial(grouped.run, "numba", inputs, way)) for way in (False, True))
    assert forward == 2 * heads * L * k * d and both == forward * 7 // 2


def test_rows_about_a_kernel_s_time_have_a_share():
    rows = bench.GROUPS["ops"]()
    without = {name for name, row in rows.items() if row.share is None}
    assert without == {"memory 49", "memory 196", "memory 784", "loops", "loops g", "whole 1", "slope", "threads"}
    assert all(row.bound is None for name, row in rows.items() if "dense" in row.what)  # that depends on the CPU


def test_times_are_the_shortest_and_both_have_as_long():
    order, times = [], {"a": iter([2.0, 1.0, 3.0, 2.0, 2.0, 9.0]), "b": iter([8.0, 6.0])}

    def timed(name):
        return lambda: order.append(name) or next(times[name])

    assert bench.in_turn(timed("a"), timed("b"), 2) == (1.0, 6.0)
    assert "".join(order) == "abaaaab"  # 2 beside 8, then 1, 3, 2 and 2 until there are 10


def test_the_printed_table(capsys, monkeypatch):
    numbers = {"model": 0.97, "import": 1.31, "figures": 60.0}
    fakes = {name: one._replace(measure=lambda name=name: numbers[name]) for name, one in bench.BENCHMARKS.items()}
    monkeypatch.setattr(bench, "BENCHMARKS", fakes)
    bench.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["model", "import"]
    assert lines[1].endswith("0.97 x  at most     1.25 x") and lines[2].endswith("1.31 x  at most     1.30 x   missed")
    bench.main(["figures"])
    assert capsys.readouterr().out.splitlines()[1].endswith("60.00 s  at most   180.00 s")


def test_a_group_has_many_rows_and_some_want_much(capsys, monkeypatch):
    rows = {
        "a": bench.Benchmark("as fast", lambda: 3.0, 1.5, least=True),
        "b": bench.Benchmark("not", lambda: 1.0, 1.5, least=True, share=lambda: 0.456),
        "c": bench.Benchmark("as it comes", lambda: 2.0, None, share=lambda: 0.5),
    }
    monkeypatch.setitem(bench.GROUPS, "ops", lambda: rows)
    bench.main(["ops"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("at least     1.50 x") and lines[2].endswith("at least     1.50 x         46%   missed")
    assert lines[3].split() == ["c", "as", "it", "comes", "2.00", "x", "50%"] and lines[0].endswith("of torch.mm")


@pytest.mark.parametrize("names", [["modle"], ["model", "gpu"]])
def test_unknown_names(names):
    with pytest.raises(
        ValueError, match="expected some of model, import, figures, hlg, ops, routed, ranks, cuda, got '(modle|gpu)'"
    ):
        bench.main(names)


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with timing.threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
