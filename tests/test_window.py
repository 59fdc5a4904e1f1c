"""Window attention, plain and shifted: the operation against its loops, who reads whom, and the module."""

import pytest
import torch
from helpers import DOUBLE, normal

from dynattn import core, ops, tracing
from dynattn.mechanisms.window import (
    Layout,
    WindowAttention,
)
from dynattn.models.layers import Block

# ------------------------------------------------------------------------------------------------------- the operation

# B, h, d, (H, W), window, shift
SIZES = [
    (2, 2, 2, (4, 6), (2, 3), (0, 0)),  # whole windows
    (1, 2, 1, (4, 6), (2, 3), (1, 2)),  # shifted
    (1, 1, 2, (5, 7), (3, 2), (2, 1)),  # prime, not divisible, shifted
    (2, 1, 1, (5, 3), (2, 2), (0, 1)),  # one axis shifted
    (1, 1, 1, (1, 1), (1, 1), (0, 0)),  # one token
    (1, 2, 2, (2, 3), (4, 4), (2, 2)),  # one window, larger than the map: no shift
    (1, 1, 2, (1, 5), (3, 3), (1, 1)),  # one window in rows, two in columns
    (1, 1, 1, (3, 3), (1, 1), (0, 0)),  # a window for every token
]


def inputs(B, h, d, shape, window, shift) -> tuple[list, dict]:
    q, k, v = (normal(B, h, shape[0] * shape[1], d) for _ in range(3))
    table = normal(h, 2 * window[0] - 1, 2 * window[1] - 1)
    return [q, k, v, table, shape], {"window": window, "shift": shift}


# ------------------------------------------------------------------------------------------------------- who reads whom


def readers(shape: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> torch.Tensor:
    """(L, L): whether query l reads key n, told by the gradient of the operation itself."""
    v = torch.eye(shape[0] * shape[1], dtype=DOUBLE)[None, None]
    zero = torch.zeros_like(v)
    return ops.window_attention(zero, zero, v, None, shape, window=window, shift=shift)[0, 0] > 0


def test_plain_windows_by_hand():
    reads = readers((4, 6), (2, 3), (0, 0)).reshape(4, 6, 4, 6)
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[2:, 3:] = True
    assert torch.equal(reads[3, 4], expected)


def test_shifted_windows_by_hand():
    """Windows of 2 shifted by 1 on a 4 x 4 map: the middle cells share one, tokens around the edges stay apart."""
    reads = readers((4, 4), (2, 2), (1, 1)).reshape(4, 4, 4, 4)
    middle, edge, corner = (torch.zeros(4, 4, dtype=torch.bool) for _ in range(3))
    middle[1:3, 1:3], edge[0, 1:3], corner[0, 0] = True, True, True
    assert torch.equal(reads[1, 2], middle) and torch.equal(reads[0, 1], edge) and torch.equal(reads[0, 0], corner)


@pytest.mark.parametrize("shape, window, shift", [s[3:] for s in SIZES])
def test_reading_is_mutual_local_and_complete(shape, window, shift):
    """Who reads is read; nobody reads beyond its window's size; everybody reads itself; padding takes no weight."""
    reads = readers(shape, window, shift)
    i, j = torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).reshape(-1, 2).T
    assert torch.equal(reads, reads.T) and reads.diagonal().all()
    apart = (i[:, None] - i).abs() >= window[0]
    assert not (reads & (apart | ((j[:, None] - j).abs() >= window[1]))).any()
    v = torch.ones(1, 1, len(i), 1, dtype=DOUBLE)
    out = ops.window_attention(normal(*v.shape), normal(*v.shape), v, None, shape, window=window, shift=shift)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("shape", [(3, 4), (5, 1), (1, 1)])
def test_one_window_is_dense_attention(shape):
    """DAT-2: a window that covers the map, with and without a shift, is dense attention with the same bias."""
    (q, k, v, _, _), _ = inputs(2, 2, 3, shape, (5, 5), (0, 0))
    table = normal(2, 9, 9)
    rows, cols = core.relative_index((5, 5))
    cells = torch.cartesian_prod(torch.arange(shape[0]), torch.arange(shape[1])).reshape(-1, 2) @ torch.tensor([5, 1])
    bias = table[:, rows, cols][:, cells[:, None], cells]
    for shift in (0, 2):
        found = ops.window_attention(q, k, v, table, shape, window=5, shift=shift)
        torch.testing.assert_close(found, ops.dense_attention(q, k, v, bias=bias), rtol=1e-10, atol=1e-12)


def test_relative_bias_by_hand():
    """The table's entry at (query - key) + w - 1."""
    table = torch.zeros(1, 3, 3, dtype=DOUBLE)
    table[0, 0, 2] = 100.0  # a key one row below and one column to the left
    q, v = torch.zeros(1, 1, 4, 1, dtype=DOUBLE), torch.arange(4, dtype=DOUBLE).reshape(1, 1, 4, 1)
    out = ops.window_attention(q, q, v, table, (2, 2), window=2).flatten()
    torch.testing.assert_close(out, torch.tensor([1.5, 2, 1.5, 1.5], dtype=DOUBLE))  # query (0, 1) reads key (1, 0)


@pytest.mark.parametrize("shape, window, shift", [s[3:] for s in SIZES])
def test_layout_cuts_and_joins(shape, window, shift):
    layout, x = Layout(shape, window, shift), normal(2, *shape, 3)
    windows = layout.cut(x)
    assert windows.shape[1:] == (window[0] * window[1], 3)
    assert torch.equal(layout.join(windows), x)


# ---------------------------------------------------------------------------------------------------------- the module

TEN_SIZES = [(1, 1), (1, 6), (2, 3), (3, 1), (5, 7), (8, 8), (8, 6), (11, 4), (13, 13), (4, 17)]


def layer(window: int = 4, shift: int = 0) -> WindowAttention:
    """A float64 layer with a table and biases far from zero."""
    module = WindowAttention(6, 2, window, shift).double().eval()
    with torch.no_grad():
        module.table.normal_()
        module.qkv.bias.normal_()
    return module


@pytest.mark.parametrize("shift", [0, 2])
def test_module_is_the_operation_between_linear_maps(shift):
    """DAT-1, DAT-2, DAT-3 at ten sizes: padding comes in as tokens, whose keys (the bias of k) nobody may read."""
    module = layer(4, shift)
    for H, W in TEN_SIZES:
        x = normal(2, H, W, 6)
        q, k, v = (core.split_heads(t, 2) for t in module.qkv(x).chunk(3, dim=-1))
        z = ops.window_attention(q, k, v, module.table, (H, W), window=4, shift=shift)
        torch.testing.assert_close(module(x), module.proj(core.merge_heads(z, (H, W))))


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_padding_never_influences_tokens(shift, monkeypatch):
    """Fill the padded cells with large numbers: the outputs of the map stay the same."""
    module, x = layer(4, shift), normal(1, 6, 5, 6)
    expected = module(x)
    pad = core.pad_map

    def pad_with_noise(x, padding):
        inside = torch.ones_like(x)
        return pad(x, padding) + 100 * (1 - pad(inside, padding))

    monkeypatch.setattr(core, "pad_map", pad_with_noise)
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


def test_padded_layer_equals_a_smaller_window_where_there_is_one():
    """A 3 x 4 map in a window of 4 needs padding; the top left of a 4 x 4 map reads the same cells without any."""
    module, x = layer(4), normal(1, 3, 4, 6)
    found = module(x)
    q, k, v = (core.split_heads(t, 2) for t in module.qkv(x).chunk(3, dim=-1))
    rows, cols = core.relative_index((4, 4))
    z = ops.dense_attention(q, k, v, bias=module.table[:, rows, cols][:, :12, :12])
    torch.testing.assert_close(found, module.proj(core.merge_heads(z, (3, 4))))


@pytest.mark.parametrize("shift", [0, 2])
def test_a_token_is_seen_in_its_window_and_nowhere_else(shift):
    """Change one token: exactly the tokens that may read it change."""
    module, H, W = layer(4, shift), 10, 7
    reads = readers((H, W), (4, 4), (shift, shift))
    x = normal(1, H, W, 6)
    before = module(x).flatten(1, 2)
    for token in (0, 17, 33, 69):
        changed = x.clone().flatten(1, 2)
        changed[0, token] += 1
        after = module(changed.reshape(x.shape)).flatten(1, 2)
        assert torch.equal((before != after).any(-1)[0], reads[:, token])


def test_block_is_pre_norm_with_two_residuals():
    """DAT-4, DAT-5: x + attention(norm(x)), then x + mlp(norm(x))."""
    block, x = Block(6, layer()).double(), normal(1, 5, 4, 6)
    between = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), between + block.mlp(block.norm2(between)))


# -------------------------------------------------------------------------------------------------- keys of the record


def record_of(attend, shape: tuple[int, int]) -> tracing.Record:
    """The record that a layer keeps when it is the whole model, on a random map of 6 channels."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.attend = torch.nn.Conv2d(3, 6, 1).double(), attend

        def forward(self, image):
            return self.attend(self.embed(image).movedim(1, -1)).mean((1, 2))

    (record,) = tracing.trace(Model(), normal(3, *shape))
    return record


def keys_of(record: tracing.Record) -> torch.Tensor:
    """(L, L): whom each query reads by its keys, all of which have the weight of the effective matrix."""
    cells = record.cells()
    reads = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for query, (col, row) in enumerate(cells.tolist()):
        keys = record.keys(row, col, 1)
        places = (keys.xy[:, None] == cells).all(2).nonzero()[:, 1]
        weight = record.effective_matrix(1)[query]
        assert len(places.unique()) == len(keys.xy) and torch.equal(weight[places], keys.weight)
        assert weight.count_nonzero() == keys.weight.count_nonzero()
        reads[query, places] = True
    return reads


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("shape", [(8, 8), (10, 7), (5, 4), (3, 2), (1, 9)])
@pytest.mark.parametrize("rows", [slice(0), 3, slice(4)])  # of the table: none; keys in the query's own row; and below
def test_keys_are_what_the_layout_lets_a_query_read(shape, shift, rows):
    """DAT-2: a bias of -1e4 takes the weight from a key, not its place among the keys."""
    module = layer(4, shift)
    with torch.no_grad():
        module.table[:, rows] = -1e4
    record = record_of(module, shape)
    assert torch.equal(keys_of(record), readers(shape, (4, 4), (shift, shift)))


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("shape", [(8, 8), (10, 10), (9, 11), (5, 9), (4, 3)])
@pytest.mark.parametrize("extreme", [False, True])
def test_keys_of_timms_windows_are_the_cells_that_it_reads(shape, shift, extreme):
    """Told by changing one token of timm's own block after the other.

    timm rolls before it pads and masks by the padded map: queries read padding, which is no cell, and where the
    sides are no multiple of the window also cells that came around the edge.
    """
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(6, shape, num_heads=2, window_size=4, shift_size=shift, always_partition=True)
    block = block.double().eval()
    with torch.no_grad():
        block.attn.relative_position_bias_table.normal_()
        block.attn.qkv.bias.normal_()
    x = normal(1, *shape, 6)
    before, expected = block._attn(x).flatten(1, 2)[0], []
    for token in range(shape[0] * shape[1]):
        changed = x.flatten(1, 2).clone()
        changed[0, token] += 1
        expected.append(((block._attn(changed.reshape(x.shape)).flatten(1, 2)[0] - before).abs() > 1e-9).any(1))
    if extreme:
        with torch.no_grad():
            block.attn.relative_position_bias_table[24] = -1e4  # the query's own cell
    record = record_of(block, shape)
    assert torch.equal(keys_of(record), torch.stack(expected, dim=1))
    assert (record.effective_matrix(1).diagonal() == 0).all() == extreme


# ----------------------------------------------------------------------------------------------------------- bad input

Z = torch.zeros


def attend(**changes) -> None:
    """The operation on good arguments, some of them changed."""
    good = dict(q=Z(1, 2, 12, 3), k=Z(1, 2, 12, 3), v=Z(1, 2, 12, 3), table=Z(2, 3, 3), query_shape=(4, 3), window=2)
    ops.window_attention(**good | changes)


BAD = [
    (lambda: attend(q=Z(2, 12, 3)), ValueError, r"q: expected 4 dimensions \(B h 12 d\), got shape \(2, 12, 3\)"),
    (lambda: attend(q=Z(1, 2, 11, 3)), ValueError, r"q: expected shape \(B h 12 d\), got shape \(1, 2, 11, 3\)"),
    (lambda: attend(q=Z(1, 2, 12, 3).bool()), TypeError, r"q: expected a floating tensor, got torch.bool"),
    (lambda: attend(k=Z(1, 2, 12, 4)), ValueError, r"k: .* d = 3"),
    (lambda: attend(k=Z(2, 2, 12, 3)), ValueError, r"k: .* B = 1"),
    (
        lambda: attend(v=Z(1, 2, 12, 3).half()),
        TypeError,
        r"v: expected torch.float32 on cpu as q has, got torch.float16",
    ),
    (lambda: attend(v=Z(1, 2, 12, 3, device="meta")), TypeError, r"v: .* on cpu as q has, got torch.float32 on meta"),
    (lambda: attend(q=Z(0, 2, 12, 3)), ValueError, r"q: no dimension may be empty"),
    (lambda: attend(table=Z(2, 3, 5)), ValueError, r"table: expected shape \(h 3 3\), got shape \(2, 3, 5\)"),
    (lambda: attend(table=Z(1, 3, 3)), ValueError, r"table: .* h = 2"),
    (lambda: attend(table=Z(9, 2)), ValueError, r"table: expected 3 dimensions"),
    (lambda: attend(query_shape=(12, 1.0)), TypeError, r"query_shape\[1\]: expected a whole number, got 1.0"),
    (lambda: attend(query_shape=(4, 4)), ValueError, r"q: expected shape \(B h 16 d\)"),
    (lambda: attend(window=0), ValueError, r"window\[0\]: expected at least 1, got 0"),
    (lambda: attend(window=(2, 2, 2)), TypeError, r"window: expected a whole number or a pair"),
    (lambda: attend(shift=2), ValueError, r"shift: expected 0 to 1 for windows of 2, got 2"),
    (lambda: attend(shift=-1), ValueError, r"shift: expected 0 to 1 for windows of 2, got -1"),
    (
        lambda: attend(window=(2, 3), table=None, shift=(1, 3)),
        ValueError,
        r"shift: expected 0 to 2 for windows of 3, got 3",
    ),
    (lambda: attend(shift=(1, 1, 1)), TypeError, r"shift: expected a whole number or a pair .*, got \(1, 1, 1\)"),
    (lambda: attend(shift=0.5), TypeError, r"shift: expected a whole number or a pair .*, got 0.5"),
    (lambda: attend(scale=float("inf")), ValueError, r"scale: expected a finite float or None, got inf"),
    (lambda: attend(impl="numba"), ValueError, r"impl: window_attention has no 'numba' kernel here"),
    (lambda: attend(impl="triton"), ValueError, r"impl: window_attention has no 'triton' kernel here"),
    (lambda: attend(impl=None), ValueError, r"impl: expected one of .*, got None"),
    (lambda: WindowAttention(6, 4, 3), ValueError, r"heads: expected a divisor of 6, got 4"),
    (lambda: WindowAttention(6, 0, 3), ValueError, r"heads: expected at least 1, got 0"),
    (lambda: WindowAttention(6, 2, 0), ValueError, r"window: expected at least 1, got 0"),
    (lambda: WindowAttention(6, 2, 3, 3), ValueError, r"shift: expected 0 to 2 for windows of 3, got 3"),
    (lambda: layer()(normal(1, 6, 4, 4)), ValueError, r"x: expected shape \(B H W 6\), got shape \(1, 6, 4, 4\)"),
    (lambda: layer()(normal(4, 4, 6)), ValueError, r"x: expected 4 dimensions"),
    (lambda: layer()(Z(1, 4, 4, 6).int()), TypeError, r"x: expected a floating tensor, got torch.int32"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(unchecked, call, error, message):
    with pytest.raises(error, match=message):
        call()
