"""The kernel of grouped attention at the sizes of DGT-T, beside what else one could do, on one thread.

dense     torch's scaled_dot_product_attention over all keys, which is another function, and what groups shall spare
masked    the same with a mask of what each query may read: computes the same
tiles     the torch form: groups in tiles of queries
padded    groups padded to the largest, and batched products

How many times faster the kernel is than dense attention depends on the CPU, since dense attention does: it has no
floor. The others have one, below which something is wrong: `missed` says so, also where the machine is busy.
"""

from collections.abc import Callable
from functools import partial
from time import thread_time

import torch
import torch.nn.functional as F
from torch import Tensor

from dynattn.bench.timing import Benchmark, in_turn, multiply_adds, share_of_mm, threads, timed

STAGES = {1: (3136, 2), 2: (784, 4), 3: (196, 8)}  # L, heads; 48 groups of 98 keys, 32 channels of a head, 8 images


def inputs_of(L: int, heads: int, k: int = 98, batch: int = 8, groups: int = 48, d: int = 32) -> list[Tensor]:
    """q, k, v, groups of uneven sizes (lognormal), and the keys that they select at random."""
    torch.manual_seed(0)
    share = torch.randn(batch * heads, groups).exp()
    of_query = torch.multinomial(share, L, replacement=True).reshape(batch, heads, L)
    selected = torch.rand(batch, heads, groups, L).argsort(-1)[..., :k].contiguous()
    return [*(torch.randn(batch, heads, L, d) for _ in range(3)), of_query, selected]


def masked(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor) -> Tensor:
    """Dense attention with a mask of what each query may read."""
    from dynattn.mechanisms.dynamic_group import membership

    return F.scaled_dot_product_attention(q, k, v, attn_mask=membership(groups, selected, k.shape[2]))


def padded(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor) -> Tensor:
    """Every group padded to the largest: two batched products."""
    (B, h, L, d), G = q.shape, selected.shape[2]
    group = (groups.flatten(0, 1) + G * torch.arange(B * h)[:, None]).flatten()
    order = group.argsort(stable=True)
    size = torch.bincount(group, minlength=B * h * G)
    place = group[order] * int(size.max()) + torch.arange(B * h * L) - (size.cumsum(0) - size)[group[order]]
    rows = q.new_zeros(B * h * G * int(size.max()), d).index_copy(0, place, q.reshape(-1, d)[order])
    keys = (selected.flatten(0, 1) + L * torch.arange(B * h)[:, None, None]).flatten(0, 1)
    k, v = k.reshape(-1, d)[keys], v.reshape(-1, d)[keys]
    z = (rows.unflatten(0, (B * h * G, -1)) @ k.mT * d**-0.5).softmax(-1) @ v
    return torch.empty_like(q).reshape(-1, d).index_copy(0, order, z.flatten(0, 1)[place]).reshape(q.shape)


def form(name: str) -> Callable[..., Tensor]:
    """One way of computing."""
    from dynattn.mechanisms.dynamic_group import grouped_attention

    others = {"dense": lambda q, k, v, *_: F.scaled_dot_product_attention(q, k, v), "masked": masked, "padded": padded}
    return others.get(name) or partial(grouped_attention, impl={"tiles": "torch"}.get(name, name))


def run(name: str, inputs: list[Tensor], backward: bool) -> None:
    """One call, with the gradients of q, k and v if wanted."""
    q, k, v = (x.detach().requires_grad_(backward) for x in inputs[:3])
    with torch.set_grad_enabled(backward):
        out = form(name)(q, k, v, *inputs[3:])
        if backward:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))


def on_one_thread(call: Callable[[], object]) -> Callable[[], float]:
    """As `timed`, but with one thread, and in CPU time: what else the machine does only counts by its use of caches."""

    def seconds() -> float:
        with threads(1):
            start = thread_time()
            call()
            return thread_time() - start

    seconds()
    return seconds


def speed_up(other: str, L: int, heads: int, backward: bool = False, rounds: int = 3, **sizes: int) -> float:
    """Time of another way over that of the kernel, one thread."""
    inputs = inputs_of(L, heads, **sizes)
    ours, theirs = in_turn(*(on_one_thread(partial(run, name, inputs, backward)) for name in ("numba", other)), rounds)
    return theirs / ours


def share(L: int, heads: int, backward: bool = False, **sizes: int) -> float:
    """The kernel's rate as a share of torch.mm's, one thread."""
    call = partial(run, "numba", inputs_of(L, heads, **sizes), backward)
    return share_of_mm(on_one_thread(call), multiply_adds(call), on_one_thread)


def whole(L: int, heads: int, rounds: int = 3) -> float:
    """Dense attention over assignment, selection and attention together, one thread."""
    from dynattn.kernels import grouped as kernel

    inputs = inputs_of(L, heads)
    q, k, v = inputs[:3]
    centroids = F.normalize(torch.randn(heads, 48, q.shape[-1]), dim=-1)

    def ours() -> None:
        run("numba", [q, k, v, kernel.ASSIGN(q, centroids), kernel.SELECT(k, centroids, 98)], False)

    one, other = in_turn(on_one_thread(ours), on_one_thread(partial(run, "dense", inputs, False)), rounds)
    return other / one


def over_loops() -> float:
    """Time of the loops over that of the kernel: 48 queries, 2 heads of 16 channels, 6 groups of 8 keys."""
    inputs = inputs_of(48, 2, k=8, batch=1, groups=6, d=16)
    kernel, loops = (on_one_thread(partial(run, name, inputs, False)) for name in ("numba", "loops"))
    ours, theirs = in_turn(kernel, loops, 2)
    return theirs / ours


def slope(rounds: int = 5) -> float:
    """How the kernel's time grows with L at fixed k: the slope of log time against log L from 784 to 50,176."""
    sides = (784, 3136, 12544, 50176)
    calls = [on_one_thread(partial(run, "numba", inputs_of(L, 2, batch=1), False)) for L in sides]
    times = [min(call() for _ in range(rounds)) for call in calls]
    x, y = torch.tensor(sides).log(), torch.tensor(times).log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def two_threads(rounds: int = 5) -> float:
    """Time of one thread over that of two, first stage."""
    inputs = inputs_of(*STAGES[1])

    def with_threads(count: int) -> None:
        with threads(count):
            run("numba", inputs, False)

    one, two = in_turn(timed(partial(with_threads, 1)), timed(partial(with_threads, 2)), rounds)
    return one / two


def rows() -> dict[str, Benchmark]:
    """The kernel at the stages of DGT-T and at high resolution."""
    found = {}
    for stage in (1, 2):
        L, heads = STAGES[stage]
        at, rate = partial(partial, speed_up, L=L, heads=heads), partial(partial, share, L, heads)
        name = f"grouped attention, stage {stage}: "
        found[f"dense {stage}"] = Benchmark(f"{name}dense / numba", at("dense"), None, share=rate())
        found[f"both {stage}"] = Benchmark("  with the backward", at("dense", backward=True), None, share=rate(True))
        found[f"padded {stage}"] = Benchmark("  padded groups / numba", at("padded"), 10, least=True, share=rate())
        found[f"masked {stage}"] = Benchmark("  masked / numba", at("masked"), 1, least=True, share=rate())
    L, heads = STAGES[3]
    rate = partial(share, L, heads)
    best = lambda: min(speed_up(name, L, heads) for name in ("masked", "tiles", "padded"))  # noqa: E731
    found["best 3"] = Benchmark("  stage 3: best other way / numba", best, 0.7, least=True, share=rate)
    high, rate = (partial(form, L=16384, heads=1, k=512, batch=1) for form in (partial(speed_up, "dense"), share))
    found["high"] = Benchmark("  L = 16384, k = 512: dense / numba", high, None, share=rate)
    found["whole 1"] = Benchmark("  with groups and selection, stage 1", partial(whole, *STAGES[1]), None)
    found["loops g"] = Benchmark("  small: loops / numba", over_loops, 150, least=True)
    found["slope"] = Benchmark("  slope of log time over log L", slope, 1.15, unit=" ")
    found["threads"] = Benchmark("  one thread / two", two_threads, 1.5, least=True)
    return found
