"""Grouped attention on a GPU at the sizes of DGT-T, beside what else one could do: bfloat16, 64 images, 48 groups.

fused     this project's kernel, in the second column with the groups and the selection, as a layer needs them
flash     torch's dense attention over all keys, by flash attention: another function, which groups shall spare
flex      torch's flex_attention over a group's keys side by side, for queries in the order of their groups; sorting and
          gathering are not counted
tiles     the torch form: groups in tiles of queries         padded    groups padded to the largest, batched products
forms     the four products as the paper writes them (`kernels/cuda_forms.py`), in float32, as the kernel then
floor     what an H200 needs at least, by its products, its memory or its exponentials, whichever takes longest

Times are those of the device, with an empty cache: what does not wait for the device runs as a CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dynattn.bench import grouped

BATCH, GROUPS, CHANNELS = 64, 48, 32
FLOPS, BYTES, EXPONENTIALS = 790e12, 4.3e12, 3.9e12  # of an H200 in a second: what bfloat16 and its memory really reach
BLOCK = 128  # flex_attention's, of queries and of keys


class Race(NamedTuple):
    """Another way against the fused kernel, which shall be `bound` times as fast; or take as many floors at most."""

    what: str
    other: str
    L: int
    heads: int
    keys: int = 98
    backward: bool = False
    bound: float | None = None
    dtype: torch.dtype = torch.bfloat16


def races() -> dict[str, Race]:
    """What is to be measured."""
    first, high, single = grouped.STAGES[1], (16384, 2, 512), {"dtype": torch.float32}
    found = {
        "flash 1": Race("stage 1: flash / fused", "flash", *first, bound=6),
        "both 1": Race("  with the backward", "flash", *first, backward=True, bound=4),
        "flash high": Race("L = 16384, k = 512: flash / fused", "flash", *high, bound=12),
        "flex 1": Race("stage 1: flex over gathered keys / fused", "flex", *first, bound=1.2),
        "padded 1": Race("  padded groups / fused", "padded", *first),
        "tiles 1": Race("  tiles / fused", "tiles", *first),
        "forms 1": Race("  the paper's four forms / fused, float32", "forms", *first, **single),
        "forms both 1": Race("  with the backward", "forms", *first, backward=True, **single),
    }
    for stage, size in (grouped.STAGES | {"high": high}).items():
        name = "L = 16384, k = 512" if stage == "high" else f"stage {stage}"
        race = Race(name, "floor", *size, bound=2.5)
        found[f"floor {stage}"] = race._replace(what=f"{name}: fused / floor of {floor(race):.0f} us")
        both = race._replace(backward=True)
        found[f"floor both {stage}"] = both._replace(what=f"  with the backward, {floor(both):.0f} us")
    return found


def floor(race: Race) -> float:
    """Microseconds that the attention needs at least: 4 L k d operations and L k exponentials a head.

    Of memory: q, k, v and the output once, the index of each query's group and of each selected key.
    """
    heads, pairs = BATCH * race.heads, race.L * race.keys
    rows = race.L * CHANNELS * race.dtype.itemsize
    indices = 4 * GROUPS * race.keys
    work = [(4 * pairs * CHANNELS, 4 * rows + 4 * race.L + indices)]
    if race.backward:  # products are 5 then, not 2; memory: the same again, and their gradients
        work.append((10 * pairs * CHANNELS, 8 * rows + 8 * race.L + indices))
    times = [max(flops / FLOPS, moved / BYTES, pairs / EXPONENTIALS) for flops, moved in work]
    return 1e6 * heads * sum(times)


# ---------------------------------------------------------------------------------------------------------------------
# What runs
# ---------------------------------------------------------------------------------------------------------------------


def fused(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor) -> Tensor:
    """The kernel as a layer calls it, which has made the indices itself and need not look at them."""
    from dynattn.mechanisms.dynamic_group import grouped_attention

    return grouped_attention.forms.run("triton", q, k, v, groups, selected, q.shape[-1] ** -0.5)


def search(q: Tensor, k: Tensor, centroids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Groups and selection as a layer finds them."""
    from dynattn.mechanisms.dynamic_group import ASSIGN, SELECT

    q, k = q.detach().float(), k.detach().float()
    return ASSIGN["triton"](q, centroids), SELECT["triton"](k, centroids, n)


def flash(q: Tensor, k: Tensor, v: Tensor, *_) -> Tensor:
    """Dense attention, by flash attention or not at all."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def tiles(*inputs: Tensor) -> Tensor:
    """The torch form."""
    from dynattn.mechanisms.dynamic_group import grouped_attention_torch

    return grouped_attention_torch(*inputs, inputs[0].shape[-1] ** -0.5)


def padded(*inputs: Tensor) -> Tensor:
    """Every group padded to the largest."""
    with torch.device(inputs[0].device):
        return grouped.padded(*inputs)


def forms_run() -> bool:
    """Whether numba can launch the four forms."""
    from dynattn.kernels import cuda_forms

    return cuda_forms.available()[0]


def forms(*inputs: Tensor) -> Tensor:
    """The paper's four forms."""
    from dynattn.kernels import cuda_forms

    return cuda_forms.grouped_attention(*inputs)


def gathered(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, selected: Tensor) -> tuple:
    """Queries in the order of their groups, keys and values of all groups side by side, and the mask of blocks.

    The keys of a group fill whole blocks. A block of queries reads the blocks of its first group to those of its last.
    """
    from torch.nn.attention.flex_attention import BlockMask

    L, (G, n) = q.shape[2], selected.shape[2:]
    order = groups.argsort(dim=-1, stable=True)
    group = groups.gather(2, order)
    blocks = -(-n // BLOCK)  # of a group
    width = blocks * BLOCK
    keys = F.pad(selected, (0, width - n)).flatten(2)
    q, k, v = (x.gather(2, i[..., None].expand(-1, -1, -1, x.shape[3])) for x, i in ((q, order), (k, keys), (v, keys)))
    starts = torch.arange(0, L, BLOCK, device=q.device)
    first, last = group[..., starts], group[..., (starts + BLOCK - 1).clamp(max=L - 1)]
    listed = (first[..., None] * blocks + torch.arange(G * blocks, device=q.device)) % (G * blocks)

    def of_the_group(b, h, query, key):
        return (group[b, h, query] == key // width) & (key % width < n)

    mask = BlockMask.from_kv_blocks(
        ((last - first + 1) * blocks).int(), listed.int(), BLOCK_SIZE=BLOCK, mask_mod=of_the_group,
        seq_lengths=(L, G * width),
    )  # fmt: skip
    return q, k, v, mask


def flex(*inputs: Tensor) -> Callable[[], Tensor]:
    """flex_attention over what is gathered before; its output is in the order of the groups."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, mask = gathered(*inputs)
    compiled = torch.compile(flex_attention) if q.is_cuda else flex_attention
    return partial(compiled, q, k, v, block_mask=mask)


OTHERS = {"flash": flash, "tiles": tiles, "padded": padded, "forms": forms}
WAITS = ("tiles", "padded", "forms")  # for the device, for how much memory to take; or is not launched by torch


def prepared(other: str, inputs: list[Tensor], backward: bool) -> Callable[[], list[Tensor]]:
    """A way as a call: the output, with the gradients of q, k and v if wanted."""
    if other == "flex":
        call = flex(*inputs)
        return lambda: [call()]
    form = fused if other == "fused" else OTHERS[other]
    q, k, v = (x.detach().requires_grad_(backward) for x in inputs[:3])
    grad = torch.randn_like(q)

    def step() -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = form(q, k, v, *inputs[3:])
            return [out, *torch.autograd.grad(out, (q, k, v), grad)] if backward else [out]

    return step


# ---------------------------------------------------------------------------------------------------------------------
# How long it takes
# ---------------------------------------------------------------------------------------------------------------------


def microseconds(call: Callable, waits: bool) -> float:
    """Time of a call on the device, the median of many, each with an empty cache. waits: cannot be a CUDA graph."""
    from triton.testing import do_bench

    if not waits:
        call = captured(call).replay
    return 1e3 * do_bench(call, return_mode="median")


def captured(call: Callable) -> "torch.cuda.CUDAGraph":
    """A call as a graph, after some calls that compile."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measured(race: Race, time: Callable[[Callable, bool], float] = microseconds, device: str = "cuda") -> list[float]:
    """The other way's time over that of the kernel, without and with groups and selection; that over the floor."""
    with torch.device(device):
        inputs = grouped.inputs_of(race.L, race.heads, race.keys, BATCH, GROUPS, CHANNELS)
        centroids = F.normalize(torch.randn(race.heads, GROUPS, CHANNELS), dim=-1)
    inputs = [x.to(race.dtype) if x.is_floating_point() else x for x in inputs]
    ours = time(prepared("fused", inputs, race.backward), False)
    all_of_it = ours + time(partial(search, *inputs[:2], centroids, race.keys), False)
    if race.other == "floor":
        return [ours / floor(race), all_of_it / floor(race)]
    theirs = time(prepared(race.other, inputs, race.backward), race.other in WAITS)
    return [theirs / ours, theirs / all_of_it]


def main() -> None:
    """Measure all and print a table; what cannot run here has a dash, without a GPU everything."""
    here = torch.cuda.is_available()
    print(torch.cuda.get_device_name() if here else "There is no GPU here: nothing is measured.")
    print(f"{'':16} {'':46} {'measured':>10} {'with selection':>15} {'wanted':>15}")
    for name, race in races().items():
        values = measured(race) if here and (race.other != "forms" or forms_run()) else []
        verdict = ""
        if values and race.bound is not None:
            holds = values[0] <= race.bound if race.other == "floor" else values[0] >= race.bound
            verdict = "" if holds else "   missed"
        plain, selecting = (f"{value:.2f} x" for value in values) if values else ("-", "-")
        least = "at most" if race.other == "floor" else "at least"
        wanted = "" if race.bound is None else f"{least} {race.bound:.1f} x"
        print(f"{name:16} {race.what:46} {plain:>10} {selecting:>15} {wanted:>15}{verdict}".rstrip(), flush=True)
