"""Recording attention: one forward pass, every attention layer kept, one vocabulary for all mechanisms.

A mechanism calls `keep(self, record)` in its forward when `recording()`. This file knows no mechanism: a record is any
subclass of `Record` that answers `weights`, `keys` and `effective_matrix`; `trace` finds where it stands in the model
and in the image. Models of timm are recorded through adapters, which `dynattn/adapters` registers with `adapter`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from pkgutil import iter_modules
from threading import Lock

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Who gets the records of the forward that runs now. Each thread (and each task of asyncio) has its own: a trace never
# sees the forward of another one, though both may run the same modules.
_keeper: ContextVar[Callable[[nn.Module, "Record"], None] | None] = ContextVar("keeper", default=None)
_adapters: dict[str, Callable] = {}


def recording() -> bool:
    """Whether a trace is being taken of the forward that runs now. A mechanism builds its record only then."""
    return not torch.compiler.is_compiling() and _keeper.get() is not None


def keep(module: nn.Module, record: "Record") -> None:
    """Hand the record of one forward of `module` to the trace that is being taken."""
    keeper = _keeper.get()
    if keeper is not None:
        keeper(module, record)


@contextmanager
def keeping(keeper: Callable[[nn.Module, "Record"], None]) -> Iterator[None]:
    """`keeper(module, record)` gets every record that forwards make inside, in this thread only."""
    before = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(before)


def adapter(*class_paths: str) -> Callable:
    """Register how modules of another library are recorded.

    The decorated function gets (module, watch): it hooks the module with `watch.before` and `watch.after`, and hands
    records to `tracing.keep`.
    """

    def register(attach: Callable) -> Callable:
        _adapters.update(dict.fromkeys(class_paths, attach))
        return attach

    return register


class Watch:
    """Hooks of one trace on modules that others may be using at the same time.

    Torch calls a module's hooks in every thread that runs it. These do something in the forward of their own trace
    only, and nothing that they return changes what the module computes.
    """

    def __init__(self, keeper: Callable[[nn.Module, "Record"], None]):
        self._keeper, self._handles = keeper, []

    def before(self, module: nn.Module, hook: Callable) -> None:
        """Call hook(module, inputs) before each forward of `module`."""
        self._handles.append(module.register_forward_pre_hook(self._own(hook)))

    def after(self, module: nn.Module, hook: Callable) -> None:
        """Call hook(module, inputs, named, output) after each forward of `module`; `named`: its keyword arguments."""
        self._handles.append(module.register_forward_hook(self._own(hook), with_kwargs=True))

    def _own(self, hook: Callable) -> Callable:
        # In another thread, a hook that is being removed may be called without `named`: hence any arguments.
        def guarded(*given: object) -> None:
            if _keeper.get() is self._keeper:
                hook(*given)

        return guarded

    def remove(self) -> None:
        """Take all hooks off again."""
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class Keys:
    """What one query reads: positions and their attention weights.

    xy (n, 2): image pixels as (x, y), centres at integers. weight (n,): at least 0, sums to 1 for a softmax.
    """

    xy: Float[Tensor, "n 2"]
    weight: Float[Tensor, " n"]


@dataclass(frozen=True)
class RegionRoutes:
    """How an image is cut into regions of queries and of keys, and which regions of keys each region of queries reads.

    query_side, key_side: (height, width) of a region in image pixels. query_grid, key_grid: (rows, columns) of regions,
    numbered row by row. routes: for every region of queries the numbers of regions of keys, the most liked first.
    readers: who reads them, "queries", or those that read for the queries, such as "agents".
    """

    query_side: tuple[float, float]
    query_grid: tuple[int, int]
    key_side: tuple[float, float]
    key_grid: tuple[int, int]
    routes: tuple[tuple[int, ...], ...]
    readers: str = "queries"

    def region(self, row: float, col: float) -> int:
        """The number of the region of queries that holds image pixel (row, col)."""
        sides = zip((row, col), self.query_side, self.query_grid, strict=True)
        i, j = (min(int((value + 0.5) // side), count - 1) for value, side, count in sides)
        return i * self.query_grid[1] + j

    def own(self, row: float, col: float) -> tuple[float, float, float, float]:
        """The edges of that region in image pixels: top, left, bottom, right. A region with padding ends outside."""
        return _edges(self.region(row, col), self.query_side, self.query_grid)

    def read(self, row: float, col: float) -> list[tuple[float, float, float, float]]:
        """The edges of the regions that it reads, the most liked first."""
        return [_edges(s, self.key_side, self.key_grid) for s in self.routes[self.region(row, col)]]


@dataclass(frozen=True)
class Pooled:
    """Tokens that stand for many cells each, and that queries read beside cells as they are.

    merged (S,): the number of the token that stands for every cell. weight (L, N): the attention of every query to the
    N tokens.
    """

    merged: Int[Tensor, " S"]
    weight: Float[Tensor, "L N"]


def _edges(number: int, side: tuple[float, float], grid: tuple[int, int]) -> tuple[float, float, float, float]:
    """Top, left, bottom, right of a region in image pixels, whose centres are at integers."""
    (i, j), (height, width) = divmod(number, grid[1]), side
    return i * height - 0.5, j * width - 0.5, (i + 1) * height - 0.5, (j + 1) * width - 0.5


class Record:
    """One attention layer in one forward pass of one image.

    A mechanism's record stores its tensors without the batch dimension and sets `kind`, `query_shape` (H, W) and
    `heads`; z (M, L, d), what the layer computed; v (M, S, d), the values of the source tokens. It answers `weights`,
    and where its keys are not the source tokens themselves `effective_matrix` and `value`. The trace adds `name`,
    `image_shape` and `stride` (image pixels for each cell of the query map).
    """

    kind: str
    query_shape: tuple[int, int]
    heads: int
    z: Float[Tensor, "M L d"]
    v: Float[Tensor, "M S d"]
    name: str = ""
    image_shape: tuple[int, int] | None = None
    stride: tuple[float, float] = (1.0, 1.0)
    exact: bool = True  # whether A_eff @ value == output in every head, up to rounding; else see `rest`
    words: str = ""  # the kind as a reader names it, where that is not the kind itself

    @property
    def kind_in_words(self) -> str:
        """The kind as a reader names it, such as "dynamic group"."""
        return self.words or self.kind.replace("_", " ")

    def weights(self, head: int = 0) -> Float[Tensor, "L N"]:
        """Attention of every query to the mechanism's own keys: rows after the softmax."""
        raise NotImplementedError

    def effective_matrix(self, head: int = 0) -> Float[Tensor, "L S"]:
        """A_eff (queries, source tokens) with out = A_eff @ V, see `exact`: by default the attention itself."""
        return self.weights(head)

    def value(self, head: int = 0) -> Float[Tensor, "S d"]:
        """The values of the source tokens that A_eff is applied to."""
        self.check_head(head)
        return self.v[head]

    def shares(self, head: int = 0) -> Float[Tensor, "L S"]:
        """How a query's attention falls on the source tokens, at least 0: by default A_eff, whose numbers are so.

        Rollout carries mass along it. Where tokens are merged with weights that may be negative, this is not A_eff.
        """
        return self.effective_matrix(head)

    def output(self, head: int = 0) -> Float[Tensor, "L d"]:
        """What the layer computed for this head, before the heads are concatenated."""
        self.check_head(head)
        return self.z[head]

    # What follows from it -----------------------------------------------------------------------------------------

    def rest(self, head: int = 0) -> float:
        """||output - A_eff value|| / ||output||: how much of this head's output A_eff does not explain."""
        output = self.output(head)
        return float((output - self.effective_matrix(head) @ self.value(head)).norm() / output.norm())

    def query(self, row: float, col: float) -> int:
        """The row-major index of the query whose cell holds image pixel (row, col)."""
        H, W = self.image_shape or self.query_shape
        for name, value, side in (("row", row, H), ("col", col, W)):
            if not -0.5 <= value <= side - 0.5:
                raise ValueError(f"{name}: expected an image pixel from 0 to {side - 1}, got {value}")
        i = min(int((row + 0.5) // self.stride[0]), self.query_shape[0] - 1)
        j = min(int((col + 0.5) // self.stride[1]), self.query_shape[1] - 1)
        return i * self.query_shape[1] + j

    def to_image(self, pixels: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Map pixels (row, col) of the query map to image pixels (x, y): (p + 1/2) stride - 1/2."""
        stride = torch.tensor(self.stride, dtype=pixels.dtype, device=pixels.device)
        return ((pixels + 0.5) * stride - 0.5).flip(-1)

    def cells(self) -> Float[Tensor, "L 2"]:
        """Image pixel (x, y) of the centre of every cell of the query map, row-major."""
        H, W = self.query_shape
        return self.to_image(torch.cartesian_prod(torch.arange(H), torch.arange(W)).reshape(-1, 2).float())

    def keys(self, row: float, col: float, head: int = 0) -> Keys:
        """What the query at image pixel (row, col) reads in one head: by default the cells with weight.

        Raises ValueError for a pixel outside the image or a head that is not there.
        """
        self.check_head(head)
        weight = self.effective_matrix(head)[self.query(row, col)][: self.query_shape[0] * self.query_shape[1]]
        read = weight.nonzero()[:, 0]
        return Keys(self.cells().to(weight)[read], weight[read])

    def region_routes(self) -> RegionRoutes | None:
        """The regions that each region of queries reads, where a mechanism chooses whole regions; else None."""
        return None

    def merged(self, head: int = 0) -> Int[Tensor, " S"] | None:
        """The number of the token that every cell of the query map became part of, where cells become fewer tokens.

        None where a head reads cells as they are, or points. A key of `keys` lies on the cells of its token.
        """
        return None

    def pooled(self, head: int = 0) -> Pooled | None:
        """The tokens that a head reads beside its cells, each of which stands for many cells; else None.

        They are the last keys of `keys`, in the order of their numbers.
        """
        return None

    def check_head(self, head: int) -> None:
        """Raise ValueError unless 0 <= head < heads."""
        if not isinstance(head, int) or not 0 <= head < self.heads:
            raise ValueError(f"head: expected 0 to {self.heads - 1}, got {head!r}")

    def __repr__(self) -> str:
        H, W = self.query_shape
        return f"<{self.kind} record {self.name}: {H} x {W} queries, {self.heads} heads>"


def overlap(fine: int, coarse: int, factor: float) -> Float[Tensor, "coarse fine"]:
    """Row c: how coarse cell c spreads over the fine cells it covers, each `1 / factor` of its side; rows sum to 1."""
    start = torch.arange(coarse)[:, None] * factor
    edges = torch.arange(fine)[None, :]
    covered = (torch.minimum(start + factor, edges + 1.0) - torch.maximum(start, edges.float())).clamp(min=0)
    return covered / covered.sum(dim=1, keepdim=True)


def spread(
    heat: Float[Tensor, "*maps h w"], shape: tuple[int, int], factor: tuple[float, float]
) -> Float[Tensor, "*maps H W"]:
    """Area resize of distributions to a finer map: every cell gives its mass to the cells it covers."""
    rows = overlap(shape[0], heat.shape[-2], factor[0]).to(heat)
    cols = overlap(shape[1], heat.shape[-1], factor[1]).to(heat)
    return torch.einsum("...ab,ai,bj->...ij", heat, rows, cols)


def roll_out(heat: Float[Tensor, "n L"], records: Sequence[Record]) -> Float[Tensor, "n S"]:
    """Carry mass on the cells of the last layer back to the cells of the first; each of the n rows sums to 1.

    From the last layer to the first: half the mass stays (the residual connection), half moves along the head mean
    of `Record.shares`; between stages a cell hands its mass to the cells it covers (area resize).
    """
    shape, stride = records[-1].query_shape, records[-1].stride
    for record in reversed(records):
        if record.query_shape != shape:
            factor = (stride[0] / record.stride[0], stride[1] / record.stride[1])
            heat = spread(heat.unflatten(1, shape), record.query_shape, factor).flatten(1)
            shape, stride = record.query_shape, record.stride
        n = heat.shape[1]
        mean = sum(record.shares(m)[:n, :n].to(heat) for m in range(record.heads)) / record.heads
        heat = 0.5 * heat + 0.5 * (heat @ mean)
        heat = heat / heat.sum(dim=1, keepdim=True)
    return heat


class Trace:
    """Every attention layer of one forward pass, by its path in `named_modules()`, in the order they ran.

    `image` (C, H, W) is what the model saw; `logits` what it answered.
    """

    def __init__(self, image: Float[Tensor, "C H W"], logits: Tensor, records: dict[str, Record]):
        self.image, self.logits, self._records = image, logits, records

    @property
    def layers(self) -> list[str]:
        """Names of the recorded layers, in order."""
        return list(self._records)

    def __getitem__(self, name: str) -> Record:
        if name not in self._records:
            raise KeyError(f"no layer {name!r}; there are: {', '.join(self.layers)}")
        return self._records[name]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def of_kind(self, kind: str) -> list[Record]:
        """The records of one mechanism, in order."""
        return [record for record in self if record.kind == kind]

    def rollout(self, row: float, col: float) -> Float[Tensor, "H W"]:
        """Where the network's last layer got what it knows about image pixel (row, col): a map that sums to 1.

        Abnar and Zuidema's attention rollout, on effective matrices so that it means the same for every mechanism: see
        `roll_out`. Raises ValueError for a pixel outside the image.
        """
        records = list(self)
        if not records:
            raise ValueError("this model has no recorded attention layer: nothing to roll out")
        first, last = records[0], records[-1]
        start = torch.zeros(1, last.query_shape[0] * last.query_shape[1])
        start[0, last.query(row, col)] = 1.0
        heat = roll_out(start, records)
        return spread(heat.reshape(first.query_shape), tuple(self.image.shape[-2:]), first.stride)


# ---------------------------------------------------------------------------------------------------------------------
# What a model takes
# ---------------------------------------------------------------------------------------------------------------------


def _settings(model: nn.Module, read: Callable[[nn.Module], object]) -> object:
    """What `read` finds in the outermost module that has it: wrappers such as DataParallel ask what they wrap."""
    return next((found for module in model.modules() if (found := read(module))), None)


def _size_of(module: nn.Module) -> tuple[int, int] | None:
    """The size of pictures that a module was made for or set to: timm's patch embedding knows, its default does not."""
    default = (getattr(module, "default_cfg", None) or {}).get("input_size", (3, None))[1:]
    for size in (getattr(module, "img_size", None), getattr(getattr(module, "patch_embed", None), "img_size", None)):
        sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
        if len(sides) == 2 and all(isinstance(side, int) for side in sides):
            return sides
    return tuple(default) if all(default) else None


def _first_convolution(module: nn.Module) -> int | None:
    return module.in_channels if isinstance(module, nn.Conv2d) else None


def _to_model(model: nn.Module, image: object) -> Float[Tensor, "1 C H W"]:
    """The image as the model takes it: size, channels and normalisation are the model's own where it has any."""
    from dynattn.data import MEAN, STD, to_input

    told = _settings(model, lambda module: getattr(module, "in_chans", None))
    guessed = _settings(model, _first_convolution) or 3
    if isinstance(image, Tensor) and image.is_floating_point():
        # Only the attribute is sure; the first convolution need not be the one that sees the image.
        given = image.shape[-3] if image.ndim >= 3 else 3
        return to_input(image, channels=told or (guessed if given == guessed else 3))
    config = _settings(model, lambda module: getattr(module, "default_cfg", None)) or {}
    channels = told or (guessed if guessed in (1, 4) else 3)
    size = _settings(model, _size_of)
    return to_input(image, size, channels=channels, mean=config.get("mean") or MEAN, std=config.get("std") or STD)


def _stage_strides(model: nn.Module) -> dict[str, float]:
    """The stride of each stage by the path of its module, as timm's `feature_info` tells it, wherever it stands."""
    strides = {}
    for path, module in model.named_modules():
        info = getattr(module, "feature_info", None)
        info = getattr(info, "info", info)
        for entry in info if isinstance(info, list | tuple) else ():  # a few models have a method of this name
            strides[f"{path}.{entry['module']}".lstrip(".")] = float(entry["reduction"])
    return strides


def _place(record: Record, name: str, image_shape: tuple[int, int], strides: dict[str, float]) -> None:
    """Tell a record its name and how its map lies over the image."""
    record.name, record.image_shape = name, image_shape
    stages = [path for path in strides if _inside(name, path)]
    stride = strides[max(stages, key=len)] if stages else None
    known = stride and all(ceil(side / stride) == n for side, n in zip(image_shape, record.query_shape, strict=True))
    H, W = record.query_shape
    record.stride = (stride, stride) if known else (image_shape[0] / H, image_shape[1] / W)


# ---------------------------------------------------------------------------------------------------------------------
# What is not recorded
# ---------------------------------------------------------------------------------------------------------------------


def _inside(path: str, outer: str) -> bool:
    """Whether a module's path is another's, or below it."""
    return not outer or path == outer or path.startswith(outer + ".")


def looks_like_attention(module: nn.Module) -> bool:
    """Whether a module is taken for attention: by its class's name (attention, attn), or by a child qkv or qk."""
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name or any(child in ("qkv", "qk") for child, _ in module.named_children())


def _unrecorded(ran: dict[str, nn.Module], recorded: dict[str, Record]) -> str:
    """What ran and looks like attention, but was not recorded, in words; "" if there is none.

    A module that holds a recorded one, or is part of it, is accounted for; of modules within each other the innermost
    is named.
    """
    missing: dict[str, list[str]] = {}
    for path, module in ran.items():
        accounted = any(_inside(path, name) or _inside(name, path) for name in recorded)
        if not accounted and not any(other != path and _inside(other, path) for other in ran):
            missing.setdefault(type(module).__name__, []).append(path or "the model itself")
    return ", ".join(
        f"{len(paths)} x {name} ({paths[0]}{', ...' * (len(paths) > 1)})" for name, paths in missing.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# The trace
# ---------------------------------------------------------------------------------------------------------------------


def _load_adapters() -> None:
    """Import every mechanism and every adapter, whatever there is: each registers what it can record."""
    for folder in ("dynattn.mechanisms", "dynattn.adapters"):
        for file in iter_modules(import_module(folder).__path__, f"{folder}."):
            import_module(file.name)


@contextmanager
def _watching(model: nn.Module, keeper: Callable[[nn.Module, Record], None]) -> Iterator[Watch]:
    """Everything that makes the modules of a model report, removed again whatever happens."""
    watch = Watch(keeper)
    try:
        for module in model.modules():
            paths = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
            attach = next((_adapters[path] for path in paths if path in _adapters), None)
            if attach is not None:
                attach(module, watch)
        yield watch
    finally:
        watch.remove()


_modes: dict[nn.Module, tuple[int, bool]] = {}  # how many hold a module in eval mode, and the mode that it had
_modes_lock = Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back in its own afterwards: a frozen layer of a training model stays frozen.

    Several threads may be inside with the same modules: the last one to leave brings the modes back.
    """
    modules = list(model.modules())
    with _modes_lock:
        for module in modules:
            holders, mode = _modes.get(module, (0, module.training))
            _modes[module] = (holders + 1, mode)
    try:
        with _modes_lock:
            model.eval()
        yield
    finally:
        with _modes_lock:
            for module in modules:
                holders, mode = _modes.pop(module)
                if holders > 1:
                    _modes[module] = (holders - 1, mode)
                else:
                    module.training = mode


def _itself(model: nn.Module) -> nn.Module:
    """The module that computes, where `torch.compile` or DataParallel stands around it: both would run a copy."""
    while isinstance(model, nn.DataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.DataParallel) else model._orig_mod
    return model


def trace(model: nn.Module, image: object) -> Trace:
    """Run `model` once on one image and record every attention layer.

    `image`: a path, bytes, binary file, PIL image, uint8 array or uint8 tensor, brought to the model's own size,
    channels and normalisation; or a normalised floating tensor (C, H, W) or (1, C, H, W), taken as it is. See
    `dynattn.data.to_input`. The model runs in eval mode, without gradients, and is left in the mode it had. Several
    threads may trace one model, or run it, at the same time: each trace records its own forward. (What another thread
    trains meanwhile sees eval mode.) A model inside `torch.compile(model)` runs without being compiled.

    Returns a `Trace`. Raises TypeError, ValueError when the image is not one, ValueError when no attention layer could
    be recorded. Warns of attention that ran and is not recorded, and of layers that ran several times: the last run is
    kept. Attention is told by `looks_like_attention`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    x = _to_model(model, image)
    parameter = next(model.parameters(), x)
    x = x.to(parameter.device, parameter.dtype)
    _load_adapters()
    names = {module: name for name, module in model.named_modules()}
    strides = _stage_strides(model)
    records: dict[str, Record] = {}
    ran: dict[str, nn.Module] = {}
    again: set[str] = set()

    def keeper(module: nn.Module, record: Record) -> None:
        name = names.get(module)
        if name is not None:
            _place(record, name, tuple(x.shape[-2:]), strides)
            again.update({name} & records.keys())
            records[name] = record

    def note(module: nn.Module, *_: object) -> None:
        ran[names[module]] = module

    with torch.no_grad(), evaluating(model), _watching(model, keeper) as watch, keeping(keeper):
        for module in filter(looks_like_attention, names):
            watch.after(module, note)
        logits = _itself(model)(x)

    missing = _unrecorded(ran, records)
    if not records:
        raise ValueError(
            f"model: no attention layer of {type(model).__name__} could be recorded; "
            + (f"this attention ran, and is of kinds that are not recorded: {missing}" if missing else "none ran")
        )
    if missing:
        warnings.warn(f"model: this attention ran and is not recorded: {missing}", stacklevel=2)
    if again:
        warnings.warn(
            f"model: {len(again)} layers ran several times in one forward, {sorted(again)[0]} first among them; "
            "the trace keeps the last run of each",
            stacklevel=2,
        )
    return Trace(x[0].float().cpu(), logits[0], records)
