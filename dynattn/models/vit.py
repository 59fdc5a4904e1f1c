"""The encoder of ViT, DeiT and BEiT, which SETR reads layer by layer: one map size throughout, every token reads all.

An image of H x W pixels becomes L = H W / 256 tokens, one for each 16 x 16 patch, and each gets a learned position.
Then every layer l computes, with layer norms that the equations leave out,

    query = Z W_Q,  key = Z W_K,  value = Z W_V                    Z = Z^(l-1), for each of m heads            SETR-1
    SA(Z) = softmax(query key^T / sqrt(d)) value                                                               SETR-2
    Y = Z + [SA_1(Z); ...; SA_m(Z)] W_O,    Z^l = Y + MLP(Y)                                                   SETR-3

The paper adds Z within each head, where the shapes L x C and L x d do not fit; all the code adds it behind W_O.

BEiT (arXiv 2106.08254) has no positions of tokens. It adds a table of relative positions to the logits of every layer,
and scales what the two branches of a layer put out.
"""

from collections.abc import Sequence
from math import isqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.layers import DropPath, Mlp, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dynattn import core, tracing
from dynattn.mechanisms.dense import DenseRecord
from dynattn.models.layers import ConvStem, LocalConv, PatchEmbedding, check_dtype, drop_path_rates, initialise


def resize_positions(table: Float[Tensor, "C I J"], size: tuple[int, int]) -> Float[Tensor, "C H W"]:
    """A table of positions for another map: bilinear, as the published code does it."""
    if tuple(table.shape[1:]) == tuple(size):
        return table
    return F.interpolate(table[None], size=size, mode="bilinear", align_corners=False)[0]


class ConvPatches(nn.Module):
    """Patches by a `ConvStem`, and one more halving for each side above 4: (B, C, H, W) to (B, dim, h, w)."""

    def __init__(self, in_chans: int, patch: int, dim: int):
        super().__init__()
        halvings = patch.bit_length() - 3
        if patch != 4 * 2 ** max(halvings, 0):
            raise ValueError(f"patch: expected 4, 8, 16 and so on for a stem of convolutions, got {patch}")
        widths = [dim // 2 ** (halvings - i) for i in range(halvings + 1)]
        self.stem = ConvStem(in_chans, widths[0])
        self.down = nn.Sequential(*(PatchEmbedding(a, b, 3, 2) for a, b in zip(widths, widths[1:], strict=False)))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c h w"]:
        return rearrange(self.down(self.stem(rearrange(x, "B C H W -> B H W C"))), "B h w c -> B c h w")


class Tokens(nn.Module):
    """(B, C, H, W) to tokens of patches and the shape of their map, which covers the image: its border is padded.

    img_size: that sizes the table of positions.  positions: whether there is one; BEiT has none.
    class_token: whether a class token stands in front. Without it, its parameters are there and are not used: the
    published MLA encoder has them so.  conv_stem: patches by `ConvPatches` instead of one convolution.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        in_chans: int,
        patch: int,
        dim: int,
        *,
        positions: bool = True,
        class_token: bool = True,
        conv_stem: bool = False,
    ):
        super().__init__()
        self.patch = patch
        self.proj = ConvPatches(in_chans, patch, dim) if conv_stem else nn.Conv2d(in_chans, dim, patch, patch)
        self.prefix = int(class_token)
        self.class_token = nn.Parameter(torch.empty(dim))
        self.class_position = nn.Parameter(torch.empty(dim)) if positions else None
        self.table = nn.Parameter(torch.empty(dim, *self.map_size(img_size))) if positions else None
        for parameter in (self.class_token, self.class_position, self.table):
            if parameter is not None:
                trunc_normal_(parameter, std=0.02)
        if not class_token:
            self.class_token.requires_grad_(False)
            self.class_position.requires_grad_(False)

    def map_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens of an image of this size."""
        return tuple(-(-side // self.patch) for side in img_size)

    def resize_table(self, table: Float[Tensor, "C I J"], size: tuple[int, int]) -> Float[Tensor, "C H W"]:
        """How a table of positions is brought to another size."""
        return resize_positions(table, size)

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B N c"], tuple[int, int]]:
        check_dtype(x, next(self.proj.parameters()))
        shape = self.map_size(tuple(x.shape[-2:]))
        below, right = (n * self.patch - side for n, side in zip(shape, x.shape[-2:], strict=True))
        x = self.proj(F.pad(x, (0, right, 0, below)))
        if self.table is not None:
            x = x + self.resize_table(self.table, shape).to(x.dtype)
        x = rearrange(x, "B c h w -> B (h w) c")
        if self.prefix:
            front = self.class_token if self.class_position is None else self.class_token + self.class_position
            x = torch.cat([front.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        return x, shape


class TokenAttention(nn.Module):
    """Every token reads all: (B, prefix + H W, C) to the same, where `prefix` tokens stand in front of a map.

    relative: (H, W) of the map that a table of relative positions is made for, or None for no table; at another map
    it is resized (bicubic). With a table there is one class token, which has three numbers of its own, and keys have
    no bias, as in BEiT.  attn_drop: the share of the attention weights that training drops.
    """

    implementation, forms = "auto", tuple(core.dense_attention.forms)  # see `dynattn.use_implementation`

    def __init__(self, dim: int, heads: int, *, relative: tuple[int, int] | None = None, attn_drop: float = 0.0):
        super().__init__()
        self.dim, self.heads = dim, core.divisor("heads", heads, dim)
        self.attn_drop = core.rate("attn_drop", attn_drop)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=relative is None), nn.Linear(dim, dim)
        self.q_bias = self.v_bias = self.table = self.class_bias = None
        if relative is not None:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
            self.table = nn.Parameter(torch.zeros(heads, *(2 * side - 1 for side in relative)))
            self.class_bias = nn.Parameter(torch.zeros(heads, 3))  # class reads token, token reads class, class class

    def bias(self, shape: tuple[int, int]) -> Float[Tensor, "h N N"] | None:
        """What is added to the logits, of the class token and a map of this shape."""
        if self.table is None:
            return None
        rows, cols = core.relative_index(shape)
        inner = core.resize_table(self.table, tuple(2 * side - 1 for side in shape))[:, rows, cols]
        reads, is_read, itself = self.class_bias.unbind(1)
        below = torch.cat([is_read[:, None, None].expand(-1, len(rows), 1), inner], dim=2)
        first = torch.cat([itself[:, None], reads[:, None].expand(-1, len(rows))], dim=1)
        return torch.cat([first[:, None], below], dim=1)

    def forward(self, x: Float[Tensor, "B N C"], shape: tuple[int, int]) -> Float[Tensor, "B N C"]:
        core.bind(x=(x, f"B N {self.dim}"))
        qkv = self.qkv(x)  # SETR-1
        if self.q_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = rearrange(qkv, "B N (three h d) -> three B h N d", three=3, h=self.heads)
        bias = self.bias(shape)
        bias = None if bias is None else bias.to(q.dtype)
        if self.training and self.attn_drop:
            z = core.dense_attention_torch(q, k, v, bias, q.shape[-1] ** -0.5, self.attn_drop)
        else:
            z = core.dense_attention(q, k, v, bias=bias, impl=self.implementation)  # SETR-2
        if tracing.recording():
            prefix = x.shape[1] - shape[0] * shape[1]
            tracing.keep(self, DenseRecord(q[0], k[0], v[0], z[0], shape, prefix=prefix, bias=bias))
        return self.proj(rearrange(z, "B h N d -> B N (h d)"))


class Layer(nn.Module):
    """A layer of the encoder: attention and a feed-forward network, a layer norm in front of each.

    scale: what the factors of the two branches start from (BEiT), or None for branches without factors.
    Stochastic depth drops either branch with probability `drop_path`; `proj_drop` is the dropout of their outputs.
    local_conv: whether a `LocalConv` of the map stands in front.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        scale: float | None = None,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
        local_conv: bool = False,
    ):
        super().__init__()
        self.local = LocalConv(dim) if local_conv else None
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), attn
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim, drop=proj_drop)
        self.scale1, self.scale2 = (
            None if scale is None else nn.Parameter(torch.full((dim,), float(scale))) for _ in range(2)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop else nn.Identity()

    def forward(self, z: Float[Tensor, "B N C"], shape: tuple[int, int]) -> Float[Tensor, "B N C"]:
        if self.local is not None:
            front, cells = z.split((z.shape[1] - shape[0] * shape[1], shape[0] * shape[1]), dim=1)
            cells = self.local(rearrange(cells, "B (H W) C -> B H W C", H=shape[0])).flatten(1, 2)
            z = torch.cat([front, cells], dim=1)
        y = self.proj_drop(self.attn(self.norm1(z), shape))
        y = z + self.drop_path(y if self.scale1 is None else self.scale1 * y)
        more = self.mlp(self.norm2(y))
        return y + self.drop_path(more if self.scale2 is None else self.scale2 * more)  # SETR-3


class ViT(nn.Module):
    """The encoder: (B, in_chans, H, W) to the maps (B, dim, h, w) behind some of its layers, for any H and W.

    kind: "vit", which DeiT is too, or "beit".  img_size: (H, W) that sizes the tables; at another size they are
    resized.  class_token: whether a class token takes part (see `Tokens`); BEiT's always does.
    conv_stem, local_convs: convolutions for the patches and in front of every layer, with which small models learn
    within hundreds of steps.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        in_chans: int = 3,
        *,
        kind: str = "vit",
        patch: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        class_token: bool = True,
        conv_stem: bool = False,
        local_convs: bool = False,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        core.one_of("kind", kind, ("vit", "beit"))
        img_size = core.pair("img_size", img_size)
        beit = kind == "beit"
        self.kind, self.dim, self.patch = kind, core.positive("dim", dim), core.positive("patch", patch)
        self.embed = Tokens(
            img_size, in_chans, patch, dim, positions=not beit, class_token=class_token or beit, conv_stem=conv_stem
        )
        relative = self.embed.map_size(img_size) if beit else None
        (rates,) = drop_path_rates(drop_path_rate, (core.positive("depth", depth),))
        self.blocks = nn.ModuleList(
            Layer(
                dim,
                TokenAttention(dim, heads, relative=relative, attn_drop=attn_drop),
                scale=layer_scale if beit else None,
                drop_path=rate,
                proj_drop=proj_drop,
                local_conv=local_convs,
            )
            for rate in rates
        )
        self.grad_checkpointing = False
        self.apply(initialise)

    def forward(self, x: Float[Tensor, "B C H W"], layers: Sequence[int]) -> list[Float[Tensor, "B c h w"]]:
        """The maps behind layers, counted from 1, in the order that they are named. No layer behind the last runs."""
        z, shape = self.embed(x)
        found = {}
        for number, block in enumerate(self.blocks[: max(layers)], 1):
            if self.grad_checkpointing and torch.is_grad_enabled():
                z = checkpoint(block, z, shape, use_reentrant=False)
            else:
                z = block(z, shape)
            if number in layers:
                cells = z[:, self.embed.prefix :]
                found[number] = rearrange(cells, "B (h w) c -> B c h w", h=shape[0])
        return [found[number] for number in layers]

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Resize the tables for images of this size."""
        shape = self.embed.map_size(img_size)
        with torch.no_grad():
            if self.embed.table is not None:
                self.embed.table = nn.Parameter(self.embed.resize_table(self.embed.table, shape))
            for block in self.blocks:
                if block.attn.table is not None:
                    size = tuple(2 * side - 1 for side in shape)
                    block.attn.table = nn.Parameter(core.resize_table(block.attn.table, size))


# ---------------------------------------------------------------------------------------------------------------------
# Weights of others
# ---------------------------------------------------------------------------------------------------------------------


def split_positions(
    entry: Float[Tensor, "1 rows C"], size: tuple[int, int]
) -> tuple[Float[Tensor, " C"], Float[Tensor, "C H W"]]:
    """The class token's row and the table, resized, of positions that lie in one row.

    The first row is the class token's, the last rows are a square map. One row between them is left out: DeiT's
    distillation token has it. Raises ValueError for other numbers of rows.
    """
    side = isqrt(entry.shape[1] - 1)
    if entry.shape[1] - side**2 not in (1, 2):
        raise ValueError(f"pos_embed: expected a square number of rows and one or two in front, got {entry.shape[1]}")
    square = rearrange(entry[0, -(side**2) :], "(h w) C -> C h w", h=side)
    return entry[0, 0], resize_positions(square, size)


def load_encoder(model: nn.Module, source: nn.Module | dict) -> nn.Module:
    """Load the weights of timm's ViT, DeiT or BEiT into the encoder of a SETR of the same size; returns the model.

    source: a model of timm's, or its state dict, also under "model" as DeiT and BEiT publish theirs. The class token's
    and the positions' rows are kept, DeiT's distillation token is left out; tables of another resolution are resized
    (bilinear; of relative positions bicubic). Norm and classifier behind the encoder are left out: SETR has neither.
    Raises TypeError, ValueError where it does not fit, with what is missing or of another shape; the model is unchanged
    then.
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, ViT):
        raise TypeError(f"model: expected a SETR, whose encoder is a ViT, got {type(model).__name__}")
    state = source.state_dict() if isinstance(source, nn.Module) else source
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError(f"source: expected a model of timm's or its state dict, got {type(source).__name__}")
    found, wrong = {}, []
    for name, own in encoder.state_dict().items():
        try:
            found[name] = _from_timm(encoder, name, state)
        except KeyError as error:
            wrong.append(f"{error.args[0]} is missing")
            continue
        if found[name].shape != own.shape:
            wrong.append(f"{name} {tuple(found[name].shape)} for {tuple(own.shape)}")
    if wrong:
        more = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        kind = "beit" if any("relative_position_bias_table" in key for key in state) else "vit"
        fits = "" if kind == encoder.kind else f' It fits encoder="{kind}".'
        raise ValueError(
            f"source: it does not fit the encoder, which is unchanged: {', '.join(wrong[:10])}{more}.{fits}"
        )
    encoder.load_state_dict(found)
    return model


def _from_timm(encoder: ViT, name: str, state: dict[str, Tensor]) -> Tensor:
    """One entry of ours out of timm's. Raises KeyError with the name of timm's that is missing."""
    part = name.rpartition(".")[2]
    if name == "embed.class_token":
        return state["cls_token"].flatten()
    if name in ("embed.class_position", "embed.table"):
        rows = split_positions(state["pos_embed"], tuple(encoder.embed.table.shape[1:]))
        return rows[part == "table"]
    if name.startswith("embed."):
        return state[f"patch_{name}"]
    theirs = name.replace("scale1", "gamma_1").replace("scale2", "gamma_2")
    if part not in ("table", "class_bias"):
        return state[theirs]
    table = state[theirs.replace(part, "relative_position_bias_table")]
    if part == "class_bias":
        return table[-3:].T
    side = isqrt(len(table) - 3)
    own = encoder.get_submodule(name.rpartition(".")[0]).table
    return core.resize_table(rearrange(table[:-3], "(I J) h -> h I J", I=side), tuple(own.shape[1:]))
