"""Local-global attention: the operations, the layer, its record."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from helpers import normal
from torch import Tensor

from dynattn import core, ops, tracing
from dynattn.mechanisms.local_global import (
    Layout,
    LocalGlobalAttention,
    bias_of_windows,
    local_attention_loops,
    place_loops,
    window_embedding_loops,
)

PUBLISHED = dict(positions="released")
TEXT = dict(query_as_key=False, conv_of="values")


def qkv(shape: tuple[int, int], B: int = 2, h: int = 2, d: int = 3) -> list[Tensor]:
    """Queries, keys and values of a map."""
    return [normal(B, h, shape[0] * shape[1], d) for _ in range(3)]


def layer(dim: int = 48, heads: int = 2, window: int = 3, **options) -> LocalGlobalAttention:
    """A layer with weights of a size that makes softmaxes uneven; its biases come from three channels."""
    module = LocalGlobalAttention(dim, heads, window, **options).double().eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def record_of(module: torch.nn.Module, x: Tensor) -> tracing.Record:
    """What a forward pass records."""
    found = []
    with torch.no_grad(), tracing.keeping(lambda _, record: found.append(record)):
        module(x)
    (record,) = found
    return record


# ------------------------------------------------------------------------------------------------------ the operations


@pytest.mark.parametrize("dilated", [False, True])
def test_a_window_as_large_as_the_map_is_dense_attention(dilated):
    """HLG-5: one window, plain or dilated, whether it is complete or not."""
    q, k, v = qkv((3, 5))
    for window in (5, 7):
        found = ops.local_attention(q, k, v, None, (3, 5), window=window, dilated=dilated)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("dilated", [False, True])
def test_a_window_of_one_token_hands_its_value_on(dilated):
    """HLG-5: each token alone."""
    q, k, v = qkv((3, 5))
    torch.testing.assert_close(ops.local_attention(q, k, v, None, (3, 5), window=1, dilated=dilated), v)


def test_dilated_windows_are_plain_windows_of_a_map_in_another_order():
    """HLG-5, figure 4: every D-th row and column lie beside each other there."""
    q, k, v = qkv((6, 9))
    table = normal(2, 5, 5)
    moved = lambda x: rearrange(x, "B h (wi I wj J) d -> B h (I wi J wj) d", wi=3, I=2, wj=3, J=3)  # noqa: E731
    expected = ops.local_attention(moved(q), moved(k), moved(v), table, (6, 9), window=3)
    torch.testing.assert_close(moved(ops.local_attention(q, k, v, table, (6, 9), window=3, dilated=True)), expected)


def test_plain_windows_are_those_of_window_attention():
    """HLG-5: Swin's windows without a shift, padded ones too."""
    q, k, v = qkv((5, 7))
    table = normal(2, 5, 5)
    expected = ops.window_attention(q, k, v, table, (5, 7), window=3)
    torch.testing.assert_close(ops.local_attention(q, k, v, table, (5, 7), window=3), expected)


def test_embeddings_are_pooling_and_a_strided_convolution():
    """HLG-6: as torch has them, where windows are whole."""
    x, weight, bias = normal(2, 6, 9, 4), normal(4, 3, 3), normal(4)
    nchw = rearrange(x, "B H W C -> B C H W")
    expected = {
        "mean": F.avg_pool2d(nchw, 3),
        "max": F.max_pool2d(nchw, 3),
        "conv": F.conv2d(nchw, weight[:, None], bias, stride=3, groups=4),
    }
    for by, maps in expected.items():
        kernel = (weight, bias) if by == "conv" else (None, None)
        found = ops.window_embedding(x, *kernel, window=3, by=by)
        torch.testing.assert_close(found, rearrange(maps, "B C I J -> B (I J) C"))


def test_a_maximum_that_is_there_twice():
    """HLG-6: the number is right; its gradient, however it is shared, adds up to one."""
    x = torch.tensor([1.0, 3.0, 3.0, 2.0]).double().reshape(1, 2, 2, 1).requires_grad_()
    for impl in ("loops", "torch"):
        out = ops.window_embedding(x, None, None, window=2, by="max", impl=impl)
        (slope,) = torch.autograd.grad(out.sum(), x)
        assert out.item() == 3 and slope.sum() == 1 and slope[0, 0, 0] == slope[0, 1, 1] == 0


@pytest.mark.parametrize("side", range(1, 12))
def test_every_window_has_a_cell(side):
    """No mean is of nothing, no softmax of padding alone; places within a window are distinct."""
    for window in range(1, 9):
        for dilated in (False, True):
            places = [place_loops(i, side, window, dilated) for i in range(side)]
            assert {number for number, _ in places} == set(range(-(-side // window)))
            assert len(set(places)) == side and all(0 <= place < window for _, place in places)


BAD_ATTENTION = [
    (dict(window=0), ValueError, "window: expected at least 1, got 0"),
    (dict(window=2.0), TypeError, "window: expected a whole number, got 2.0"),
    (dict(dilated="no"), ValueError, "dilated: expected one of False, True, got 'no'"),
    (dict(query_shape=(4, 3)), ValueError, "q: expected shape"),
    (dict(query_shape=3), ValueError, "q: expected shape"),
    (dict(table=torch.zeros(2, 5, 5).double()), ValueError, r"table: expected shape \(h 3 3\)"),
    (dict(scale=torch.inf), ValueError, "scale: expected a finite float or None, got inf"),
    (dict(v=torch.zeros(1, 2, 16, 3)), TypeError, "v: expected torch.float64"),
    (dict(k=None), TypeError, "k: expected a tensor"),
    (dict(impl="fast"), ValueError, "impl: expected one of"),
    (dict(impl="triton"), ValueError, "impl: local_attention has no 'triton' kernel here"),
]


@pytest.mark.parametrize("changes, error, message", BAD_ATTENTION)
def test_bad_input_of_local_attention(changes, error, message, unchecked):
    q = torch.zeros(1, 2, 16, 3).double()
    with pytest.raises(error, match=message):
        ops.local_attention(**dict(q=q, k=q, v=q, table=None, query_shape=(4, 4), window=2) | changes)


BAD_EMBEDDING = [
    (dict(window=-1), ValueError, "window: expected at least 1, got -1"),
    (dict(by="sum"), ValueError, "by: expected one of 'mean', 'max', 'conv', got 'sum'"),
    (dict(by="conv"), ValueError, "weight, bias: expected both with by='conv' and neither without, got by='conv'"),
    (dict(bias=torch.zeros(3)), ValueError, "weight, bias: expected both with by='conv' and neither without"),
    (dict(x=torch.zeros(4, 4, 3)), ValueError, "x: expected 4 dimensions"),
    (
        dict(by="conv", weight=torch.zeros(3, 3, 2), bias=torch.zeros(3)),
        ValueError,
        r"weight: expected shape \(C 2 2\)",
    ),
    (dict(by="conv", weight=torch.zeros(4, 2, 2), bias=torch.zeros(3)), ValueError, "weight: expected shape"),
    (dict(dilated=2), ValueError, "dilated: expected one of False, True, got 2"),
]


@pytest.mark.parametrize("changes, error, message", BAD_EMBEDDING)
def test_bad_input_of_window_embedding(changes, error, message, unchecked):
    with pytest.raises(error, match=message):
        ops.window_embedding(**dict(x=torch.zeros(1, 4, 4, 3), weight=None, bias=None, window=2) | changes)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(heads=3), ValueError, "heads: expected a divisor of 8, got 3"),
        (dict(window=0), ValueError, "window: expected at least 1, got 0"),
        (dict(conv_of="queries"), ValueError, "conv_of: expected one of 'attention', 'values', got 'queries'"),
        (dict(positions="corner"), ValueError, "positions: expected one of 'released', 'centre', got 'corner'"),
        (dict(embedding="sum"), ValueError, "embedding: expected one of 'mean', 'max', 'conv', got 'sum'"),
        (dict(attn_drop=1.0), ValueError, "attn_drop: expected a number from 0 to below 1, got 1.0"),
        (dict(proj_drop=-0.1), ValueError, "proj_drop: expected a number from 0 to below 1, got -0.1"),
        (dict(drop_path=2), ValueError, "drop_path: expected a number from 0 to below 1, got 2"),
    ],
)
def test_bad_arguments_of_the_layer(options, error, message, unchecked):
    with pytest.raises(error) as caught:
        LocalGlobalAttention(**dict(dim=8, heads=2) | options)
    assert str(caught.value).startswith(message)
    with pytest.raises(ValueError, match="x: expected shape"):
        LocalGlobalAttention(8, 2)(torch.zeros(1, 4, 4, 7))


# ----------------------------------------------------------------------------------------------------------- the layer


def global_bias(module: LocalGlobalAttention, shape: tuple[int, int]) -> Tensor:
    """B_G (h, L, N) by the displacement of every cell from every window, one pair at a time."""
    (H, W), R = shape, module.window
    places = [[place_loops(i, side, R, module.dilated)[0] for i in range(side)] for side in shape]
    count = [-(-side // R) for side in shape]
    # where a whole window is: the mean of its rows, and of its columns
    means = [[sum(n * D + I if module.dilated else I * R + n for n in range(R)) / R for I in range(D)] for D in count]
    assert all(set(own) == set(range(D)) for own, D in zip(places, count, strict=True))
    apart = torch.zeros(H * W, count[0] * count[1], 2).double()
    for query in range(H * W):
        for n in range(count[0] * count[1]):
            where = (
                (n // W, n % W) if module.positions == "released" else (means[0][n // count[1]], means[1][n % count[1]])
            )
            apart[query, n] = torch.tensor([query // W - where[0], query % W - where[1]])
    return rearrange(module.global_bias.layers(apart), "L N h -> h L N")


def by_hand(module: LocalGlobalAttention, x: Tensor) -> Tensor:
    """HLG-5 to HLG-9 by the loops, with each bias asked of its network for one displacement at a time."""
    shape, R, dim = tuple(x.shape[1:3]), module.window, module.dim
    norm = lambda part, t: F.layer_norm(t, (dim,), part.weight, part.bias, 1e-6)  # noqa: E731
    linear = lambda part, t: t @ part.weight.T + part.bias  # noqa: E731
    heads = lambda t: core.split_heads(t, module.heads)  # noqa: E731
    n, scale, z = norm(module.norm, x), (dim // module.heads) ** -0.5, None
    q = query = linear(module.q, n)
    if module.local:
        k, v = q if module.query_as_key else linear(module.k, n), linear(module.v, n)
        apart = torch.cartesian_prod(*[torch.arange(1 - R, R).double()] * 2)
        table = rearrange(module.local_bias.layers(apart), "(I J) h -> h I J", I=2 * R - 1)
        z = local_attention_loops(heads(q), heads(k), heads(v), table, shape, R, module.dilated, scale)
        z = core.merge_heads(z, shape)
        x = x + z
        context = norm(module.conv_norm, z) if module.conv_of == "attention" else v
        conv = F.conv2d(context.permute(0, 3, 1, 2), module.conv.weight, module.conv.bias, padding=1, groups=dim)
        query = q + conv.permute(0, 2, 3, 1)
    kernel = (module.embed.weight[:, 0], module.embed.bias) if module.embedding == "conv" else (None, None)
    g = norm(module.embed_norm, window_embedding_loops(x, *kernel, R, module.dilated, module.embedding))
    k, v = (rearrange(linear(part, g), "B N (h d) -> B h N d", h=module.heads) for part in (module.k, module.v))
    y = core.dense_attention_loops(heads(query), k, v, global_bias(module, shape), scale)
    return x + linear(module.proj, core.merge_heads(y, shape))


@pytest.mark.parametrize("shape", [(6, 3), (5, 4), (1, 2)])
@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize(
    "options",
    [PUBLISHED, TEXT, dict(embedding="conv"), dict(embedding="max", local=False, positions="released")],
    ids=str,
)
def test_a_layer_is_its_equations(shape, dilated, options):
    """HLG-5, HLG-6, HLG-7, HLG-8, HLG-9: both readings, by any form, at any size."""
    module, x = layer(dilated=dilated, **options), normal(1, *shape, 48)
    with torch.no_grad():
        expected = by_hand(module, x)
        torch.testing.assert_close(module(x), expected)
        module.implementation = "loops"
        torch.testing.assert_close(module(x), expected)


def test_local_and_global_attention_share_their_maps():
    """HLG-8: one W_Q, W_K, W_V; with queries as keys W_K is the windows' alone."""
    module, x = layer(), normal(1, 6, 6, 48)
    assert sum(p.numel() for part in (module.q, module.k, module.v) for p in part.parameters()) == 3 * 48 * 49
    (slope,) = torch.autograd.grad(module(x).sum(), module.k.weight)
    with torch.no_grad():
        module.proj.weight.zero_()
    (none,) = torch.autograd.grad(module(x).sum(), module.k.weight)
    assert slope.abs().sum() > 0 and none.abs().sum() == 0
    (some,) = torch.autograd.grad(layer(**TEXT)(x).sum(), (own := layer(**TEXT)).k.weight, allow_unused=True)
    assert some is None and own.query_as_key is False


def test_positions_of_windows_as_released_and_at_their_centres():
    """HLG-7: as released all windows of a wide map stand in its first row."""
    x = normal(1, 6, 6, 48)
    released, centre = layer(positions="released"), layer(positions="centre")
    centre.load_state_dict(released.state_dict())
    assert not torch.allclose(released(x), centre(x))
    for module in (released, centre):
        like = torch.zeros(1, dtype=torch.float64)
        found = bias_of_windows(module.global_bias, Layout((6, 6), 3, False), module.positions, like)[0]
        torch.testing.assert_close(found, global_bias(module, (6, 6)))


def test_nobody_reads_padding():
    """A row that is added below changes nothing above where windows of rows above it are the same."""
    module, x = layer(local=False, positions="released"), normal(1, 4, 3, 48)
    with torch.no_grad():
        whole = module(x)
        module.embed_norm.weight.zero_()  # all windows alike: padding would show as another token
        assert torch.equal(module(x[:, :4]), module(x)) and whole.isfinite().all()
    record = record_of(layer(dilated=True), normal(1, 5, 4, 48))
    torch.testing.assert_close(torch.stack([record.local(m) for m in (0, 1)]).sum(2), torch.ones(2, 20).double())
    torch.testing.assert_close(record.mean.sum(1), torch.ones(4).double())


def test_images_of_a_batch_are_computed_alone():
    for options in (PUBLISHED, TEXT):
        module, x = layer(dilated=True, **options), normal(3, 5, 7, 48)
        with torch.no_grad():
            torch.testing.assert_close(module(x), torch.cat([module(image[None]) for image in x]))


@pytest.mark.parametrize("options", [PUBLISHED, TEXT, dict(embedding="conv"), dict(local=False)], ids=str)
def test_every_parameter_learns(options):
    module = layer(**options).train()
    module(normal(2, 7, 5, 48)).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    assert all(p.grad.abs().sum() > 0 for p in module.parameters() if p.ndim > 1)


def test_dropout_of_weights():
    """In training only; its mean is near the output without it."""
    module, x = layer(attn_drop=0.5), normal(1, 4, 4, 48)
    with torch.no_grad():
        module.conv.weight.zero_()  # else what was dropped passes a softmax
        module.embed_norm.weight.zero_()
        still = module(x)
        module.train()
        drawn = torch.stack([module(x) for _ in range(400)])
    assert not torch.equal(drawn[0], drawn[1])
    assert (drawn.mean(0) - still).abs().max() < 0.2 * still.abs().max()


# ---------------------------------------------------------------------------------------------------------- the record


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (1, 3)])
@pytest.mark.parametrize("dilated", [False, True])
def test_a_record_adds_two_attentions(shape, dilated):
    """HLG-5 and HLG-7: what the cells and what the windows gave is what the layer computed; rows sum to 2."""
    record = record_of(layer(dilated=dilated), normal(2, *shape, 48))
    ones = torch.ones(shape[0] * shape[1]).double()
    assert record.kind == "local_global" and not record.exact
    for head in range(2):
        near, far = record.local(head), record.everywhere[head]
        torch.testing.assert_close(near @ record.value(head) + far @ record.v_g[head], record.output(head))
        torch.testing.assert_close(record.effective_matrix(head), near + far @ record.mean)
        torch.testing.assert_close(record.effective_matrix(head).sum(1), 2 * ones)
        torch.testing.assert_close(record.shares(head).sum(1), ones)
        assert record.weights(head).shape == (len(ones), len(ones) + len(record.mean))
        assert record.rest(head) > 1e-3


def test_a_record_without_local_attention_is_exact():
    """HLG-7 alone: the values are those of the windows."""
    record = record_of(layer(local=False), normal(2, 5, 7, 48))
    assert record.exact and record.near is None
    for head in range(2):
        torch.testing.assert_close(record.effective_matrix(head) @ record.value(head), record.output(head))
        torch.testing.assert_close(record.effective_matrix(head).sum(1), torch.ones(35).double())
        assert record.rest(head) < 1e-12


@pytest.mark.parametrize("dilated", [False, True])
def test_keys_are_the_cells_of_the_window_and_the_centre_of_every_window(dilated):
    record = record_of(layer(dilated=dilated), normal(1, 6, 6, 48))
    record.image_shape, record.stride = (24, 24), (4.0, 4.0)
    keys = record.keys(0, 23, head=1)
    near, centres = keys.xy[:9], keys.xy[9:]
    step, first = (8, 5.5) if dilated else (4, 13.5)  # pixels between the cells, and the first column
    assert sorted(set(near[:, 0].tolist())) == [first + step * n for n in range(3)]
    assert sorted(set(near[:, 1].tolist())) == [1.5 + step * n for n in range(3)]
    middle = [9.5, 13.5] if dilated else [5.5, 17.5]
    assert centres.tolist() == [[x, y] for y in middle for x in middle]
    for weight in (keys.weight[:9], keys.weight[9:]):
        assert float(weight.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="head: expected 0 to 1, got 2"):
        record.keys(0, 0, head=2)
    assert len(record_of(layer(local=False), normal(1, 6, 6, 48)).keys(0, 0).weight) == 4


@pytest.mark.parametrize("dilated", [False, True])
def test_windows_are_tokens_beside_the_cells(dilated):
    """The last keys, each at the mean place of its cells; and the second summand of A_eff."""
    record = record_of(layer(dilated=dilated), normal(1, 7, 5, 48))
    pooled = record.pooled(1)
    count = pooled.weight.shape[1]
    keys = record.keys(4, 3, head=1)
    torch.testing.assert_close(keys.weight[-count:], pooled.weight[record.query(4, 3)])
    cells = record.cells().double()
    for number in range(count):
        torch.testing.assert_close(keys.xy[number - count], cells[pooled.merged == number].mean(0))
        column = (pooled.merged == number).nonzero()[0, 0]
        share = pooled.weight[:, number] / (pooled.merged == number).sum()
        far = record.effective_matrix(1)[:, column] - record.local(1)[:, column]
        torch.testing.assert_close(far, share)
    assert record.kind_in_words == ("dilated" if dilated else "plain") + " local-global"
    with pytest.raises(ValueError, match="head: expected 0 to 1, got 2"):
        record.pooled(2)
