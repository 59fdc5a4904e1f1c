"""Recording attention: one forward pass, every attention layer kept, one vocabulary for all mechanisms.

A mechanism calls `keep(self, record)` in its forward when `recording()`. This file knows no mechanism: a record is any
subclass of `Record` that answers `weights`, `keys` and `effective_matrix`; `trace` finds where it stands in the model
and in the image. Models of timm are recorded through adapters, which mechanisms register with `adapter`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import ceil
from pkgutil import iter_modules

import torch
from jaxtyping import Float
from torch import Tensor, nn

_keepers: list[Callable[[nn.Module, "Record"], None]] = []
_adapters: dict[str, Callable] = {}


def recording() -> bool:
    """Whether a trace is being taken. A mechanism builds its record only then."""
    return bool(_keepers)


def keep(module: nn.Module, record: "Record") -> None:
    """Hand the record of one forward of `module` to the trace that is being taken."""
    for keeper in _keepers:
        keeper(module, record)


def adapter(class_path: str) -> Callable:
    """Register how another library's module is recorded.

    The decorated function gets (module, keep) and returns hook handles, which are removed after the trace.
    """

    def register(attach: Callable) -> Callable:
        _adapters[class_path] = attach
        return attach

    return register


@dataclass(frozen=True)
class Keys:
    """What one query reads: positions and their attention weights.

    xy (n, 2): image pixels as (x, y), centres at integers. weight (n,): at least 0, sums to 1 for a softmax.
    """

    xy: Float[Tensor, "n 2"]
    weight: Float[Tensor, " n"]


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


def spread(heat: Float[Tensor, "h w"], shape: tuple[int, int], factor: tuple[float, float]) -> Float[Tensor, "H W"]:
    """Area resize of a distribution to a finer map: every cell gives its mass to the cells it covers."""
    rows = overlap(shape[0], heat.shape[0], factor[0]).to(heat)
    cols = overlap(shape[1], heat.shape[1], factor[1]).to(heat)
    return torch.einsum("ab,ai,bj->ij", heat, rows, cols)


class Trace:
    """Every attention layer of one forward pass, by its path in `named_modules()`, in the order they ran.

    `image` (3, H, W) is what the model saw; `logits` what it answered.
    """

    def __init__(self, image: Float[Tensor, "3 H W"], logits: Tensor, records: dict[str, Record]):
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

        From the last layer to the first: half the mass stays (the residual connection), half moves along the head mean
        of the effective matrices; between stages a cell hands its mass to the cells it covers (area resize).
        Abnar and Zuidema's attention rollout, on effective matrices so that it means the same for every mechanism.
        Raises ValueError for a pixel outside the image.
        """
        if not self._records:
            raise ValueError("this model has no recorded attention layer: nothing to roll out")
        records = list(self._records.values())[::-1]
        last = records[0]
        heat = torch.zeros(last.query_shape[0] * last.query_shape[1])
        heat[last.query(row, col)] = 1.0
        shape, stride = last.query_shape, last.stride
        for record in records:
            if record.query_shape != shape:
                factor = (stride[0] / record.stride[0], stride[1] / record.stride[1])
                heat = spread(heat.reshape(shape), record.query_shape, factor).flatten()
                shape, stride = record.query_shape, record.stride
            mean = torch.stack([record.effective_matrix(m) for m in range(record.heads)]).mean(dim=0)
            heat = 0.5 * heat + 0.5 * (heat @ mean[: heat.numel(), : heat.numel()].to(heat))
            heat = heat / heat.sum()
        return spread(heat.reshape(shape), tuple(self.image.shape[-2:]), stride)


def _is_normalised(image: object) -> bool:
    """Whether an image is a tensor that is taken as it is, and no picture."""
    return isinstance(image, Tensor) and image.is_floating_point()


def _input_size(model: nn.Module) -> int | tuple[int, int] | None:
    """The size that pictures are brought to: ours in `img_size`, timm's in `default_cfg`; None keeps the picture's."""
    size = getattr(model, "img_size", None) or getattr(model, "default_cfg", {}).get("input_size", (3, None))[1:]
    return size if isinstance(size, int) or (size and all(size)) else None


def _stage_strides(model: nn.Module) -> dict[str, float]:
    """The stride of each stage by the path of its module, as timm's `feature_info` tells it."""
    info = getattr(model, "feature_info", None) or []
    info = getattr(info, "info", info)
    return {entry["module"]: float(entry["reduction"]) for entry in info}


def _place(record: Record, name: str, image_shape: tuple[int, int], strides: dict[str, float]) -> None:
    """Tell a record its name and how its map lies over the image."""
    record.name, record.image_shape = name, image_shape
    stages = [path for path in strides if name == path or name.startswith(path + ".")]
    stride = strides[max(stages, key=len)] if stages else None
    known = stride and all(ceil(side / stride) == n for side, n in zip(image_shape, record.query_shape, strict=True))
    H, W = record.query_shape
    record.stride = (stride, stride) if known else (image_shape[0] / H, image_shape[1] / W)


def _load_adapters() -> None:
    """Import every mechanism, whatever there is: each registers its adapters when it is imported."""
    for file in iter_modules(import_module("dynattn.mechanisms").__path__, "dynattn.mechanisms."):
        import_module(file.name)


@contextmanager
def _hooks(model: nn.Module, keeper: Callable) -> Iterator[None]:
    """Everything that makes the modules of a model report, removed again whatever happens."""
    handles = []
    try:
        for module in model.modules():
            paths = (f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__)
            attach = next((_adapters[path] for path in paths if path in _adapters), None)
            if attach is not None:
                handles += attach(module, keeper)
        _keepers.append(keeper)
        yield
    finally:
        if keeper in _keepers:
            _keepers.remove(keeper)
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back in its own afterwards: a frozen layer of a training model stays frozen."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def trace(model: nn.Module, image: object) -> Trace:
    """Run `model` once on one image and record every attention layer.

    `image`: a path, PIL image or uint8 array, brought to the model's own input size; or a normalised tensor (3, H, W)
    or (1, 3, H, W), taken as it is. The model runs in eval mode, without gradients, and is left in the mode it had.
    Returns a `Trace`. Raises TypeError, ValueError when the image is not one.
    """
    from dynattn.data import to_input

    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch module, got {type(model).__name__}")
    x = to_input(image, None if _is_normalised(image) else _input_size(model))
    parameter = next(model.parameters(), x)
    x = x.to(parameter.device, parameter.dtype)
    _load_adapters()
    names = {module: name for name, module in model.named_modules()}
    records: dict[str, Record] = {}
    strides = _stage_strides(model)

    def keeper(module: nn.Module, record: Record) -> None:
        name = names.get(module)
        if name is not None:
            _place(record, name, tuple(x.shape[-2:]), strides)
            records[name] = record

    with evaluating(model), _hooks(model, keeper):
        logits = model(x)
    return Trace(x[0].float().cpu(), logits[0], records)
