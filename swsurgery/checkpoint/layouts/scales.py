"""Describe which block of elements shares a scale, from the shapes of the weight and of the scales."""

from __future__ import annotations

from swsurgery.checkpoint.layouts.blocks import Blocks, ColumnOrder, StoredNumbers, make_shape_error
from swsurgery.checkpoint.layouts.cells import CannotTell
from swsurgery.checkpoint.layouts.module import ModuleTensor
from swsurgery.checkpoint.layouts.schemes import Scheme


def make_blocks(
    scheme: Scheme,
    tensor: ModuleTensor,
    shape: tuple[int, int],
    order: ColumnOrder | None = None,
    exponents: bool = False,
) -> Blocks:
    """Describe the blocks of a weight of `shape` [rows, cols]. `tensor` stores their scales or zero points.

    Raises CannotTell if the tensor has another shape than the scheme needs.
    """
    count, block = measure_blocks(scheme, shape)
    allowed = [count]
    if count[1] == 1:
        allowed.append(count[:1])
    if scheme.strategy == "tensor":
        allowed.append(())
    if tensor.shape not in allowed:
        raise make_shape_error(tensor, f"a weight of shape {list(shape)} with {scheme.describe()}")
    return Blocks(StoredNumbers(tensor, count[1], exponents), shape[0], *block, order)


def measure_blocks(scheme: Scheme, shape: tuple[int, int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return the numbers of blocks in a column and in a row, and the height and width of a block."""
    rows, cols = shape
    height, width = {"tensor": (rows, cols), "channel": (1, cols)}.get(scheme.strategy, scheme.block)
    return (-(-rows // height), -(-cols // width)), (height, width)


def require_float(tensor: ModuleTensor) -> None:
    """Raise CannotTell if a scale has no floating-point dtype."""
    if tensor.info.dtype.kind != "float":
        what = f"the scale {tensor.name} is stored as {tensor.dtype}, which is not a floating-point dtype"
        raise CannotTell(what)


def require_dtype(tensor: ModuleTensor, *dtypes: str) -> None:
    """Raise CannotTell if a tensor has none of the dtypes."""
    if tensor.dtype not in dtypes:
        raise CannotTell(f"{tensor.name} is stored as {tensor.dtype} instead of {' or '.join(dtypes)}")
