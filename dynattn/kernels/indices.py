"""Checks of indices, before memory is read that is not ours."""

import torch
from torch import Tensor

from dynattn.kernels import operators
from dynattn.kernels.derivatives import transforming


def check(name: str, indices: Tensor, least: int, most: int) -> None:
    """Raise ValueError unless all indices are from `least` to `most`."""
    low, high = (int(beneath(bound)) for bound in torch.aminmax(beneath(indices)))
    if low < least or high > most:
        raise ValueError(f"{name}: expected values from {least} to {most}, got {low if low < least else high}")


def distinct(indices: Tensor, below: int) -> Tensor | bool:
    """Whether no row of (*batch, n), of values in [0, below), holds one twice: by a table where there is a kernel."""
    in_memory = not torch.compiler.is_compiling() and not transforming()
    if in_memory and operators.unavailable("numba", indices.device) is None:
        from dynattn.kernels.indices_numba import distinct_rows

        return bool(distinct_rows(indices.flatten(0, -2).contiguous().numpy(), below))
    return (indices.sort(dim=-1).values.diff(dim=-1) != 0).all()


def beneath(tensor: Tensor) -> Tensor:
    """The numbers themselves of a tensor that a transform of torch.func has wrapped: all of a batch, in some layout."""
    if transforming():
        while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
