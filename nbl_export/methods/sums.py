"""Sums over the rows of one layer that add up exactly in any order, so that a resumed run has the bits of another.

    row x ─► (x - reference) / unit ─► products of a batch ─► rounded to whole numbers ─► added in float64

Float64 adds whole numbers up to 2^53 without rounding, so a sum does not depend on the order of its parts. Parts add
up to the same bits as an unsplit run. Units are powers of two, so converting sums back rounds nothing either. Reference
row and units come from the first rows of the text, and all parts share them (`Accumulator.clear`).

Products are float32 over at most `_BLOCK` rows. Three facts keep them as accurate as float64 (a test holds the fitted
maps to 1e-5):
  - A few tokens have a residual norm a hundred times the median ("massive activations"). Float64 multiplies their rows.
  - Rows are shifted by the reference row. The shift is undone in float64 at the end.
  - A whole number is worth 2^-24 of the square of a typical row's entry, far less than a float32 product loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from nbl_export.methods.lmmse import Moments
from nbl_export.model import processes

__all__ = ["REFERENCE_ROWS", "Accumulator", "Sums", "gram", "sums_bytes", "tensor_shapes", "total"]

REFERENCE_ROWS = 128
_BLOCK = 4096
_SYMMETRIC = ("xx", "yy")
_PARTS = 3  # column blocks of X'X
_FEW = 8  # rows that are summed in float32
_MASSIVE = 4.0  # a massive row's norm is above this many median norms
_STEPS = 2.0**12  # whole numbers in a typical entry: 2^53 / _STEPS^2 leaves 2^29 tokens of typical rows
_FINE = 2.0**12  # extra steps of the plain sums, which hold one factor instead of two


@dataclass(frozen=True)
class Sums:
    """Float64 sums over rows of one layer about a reference row. `moments` converts them to raw moments.

    Vectors are [D], products [D, D]. xx and yy are symmetric to the last bit, so half of them is stored.
    x_unit and y_unit are the powers of two in which entries are counted.
    """

    count: int
    x_ref: torch.Tensor
    y_ref: torch.Tensor
    x_unit: torch.Tensor
    y_unit: torch.Tensor
    x_sum: torch.Tensor
    y_sum: torch.Tensor
    xx: torch.Tensor  # X'X
    yx: torch.Tensor  # Y'X
    yy: torch.Tensor  # Y'Y

    @staticmethod
    def of(count: int, read: Callable[[str], torch.Tensor]) -> Sums:
        """From `tensors`, which `read` gives by name."""
        names = (field.name for field in fields(Sums) if field.name != "count")
        return Sums(count, **{n: _unpacked(read(f"{n}_upper")) if n in _SYMMETRIC else read(n) for n in names})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors by name; of symmetric sums, the rows of the upper triangle one after another."""
        held = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "count"}
        return {f"{n}_upper" if n in _SYMMETRIC else n: _upper(v) if n in _SYMMETRIC else v for n, v in held.items()}

    def moments(self) -> Moments:
        """Raw moments, about zero: sum (x + s)(y + t)' = X'Y + s Sy' + Sx t' + n s t' for the reference rows s, t."""
        n = self.count
        s = self.x_ref
        t = self.y_ref
        return Moments(
            n,
            x_sum=self.x_sum + n * s,
            y_sum=self.y_sum + n * t,
            xx=self.xx + torch.outer(s, self.x_sum) + torch.outer(self.x_sum, s) + n * torch.outer(s, s),
            yx=self.yx + torch.outer(t, self.x_sum) + torch.outer(self.y_sum, s) + n * torch.outer(t, s),
            yy=self.yy + torch.outer(t, self.y_sum) + torch.outer(self.y_sum, t) + n * torch.outer(t, t),
        )


def tensor_shapes(size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `Sums.tensors` for rows of D = `size` numbers."""
    vectors = dict.fromkeys(("x_ref", "y_ref", "x_unit", "y_unit", "x_sum", "y_sum"), (size,))
    half = (size * (size + 1) // 2,)
    return {**vectors, "xx_upper": half, "yx": (size, size), "yy_upper": half}


def _upper(square_DD: torch.Tensor) -> torch.Tensor:
    return square_DD[torch.ones_like(square_DD, dtype=torch.bool).triu()]


def _unpacked(upper: torch.Tensor) -> torch.Tensor:
    """The symmetric matrix whose upper triangle has these rows, one after another."""
    size = math.isqrt(2 * len(upper))
    square = upper.new_zeros(size, size)
    square[torch.ones_like(square, dtype=torch.bool).triu()] = upper
    return mirrored(square)


def sums_bytes(size: int) -> int:
    """Bytes of an `Accumulator` for rows of D = `size` numbers."""
    return 8 * 3 * size * size


class Accumulator:
    """Collects `Sums` of one layer. The first rows give the reference and the units."""

    def __init__(self) -> None:
        self.count = 0
        self._has_reference = self.only_refers = False

    def update(self, x_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        """Add rows X [N, D] and Y [N, D], float32, on any device."""
        norms = x_ND.norm(dim=1)
        massive = norms > _MASSIVE * norms.median()
        if not self._has_reference:
            self._refer(x_ND[:REFERENCE_ROWS], y_ND[:REFERENCE_ROWS], massive[:REFERENCE_ROWS])
        if self.only_refers:
            return
        if not self.count:
            self._begin()
        self.count += x_ND.shape[0]
        x_ND = (x_ND - self._x_ref).mul_(self._x_scale)
        y_ND = (y_ND - self._y_ref).mul_(self._y_scale)
        apart = massive.nonzero().flatten()
        if len(apart):
            self._add(x_ND[apart].double(), y_ND[apart].double())
            for rows in (x_ND, y_ND):
                rows.index_fill_(0, apart, 0.0)  # zero rows add nothing, and keep the other rows in place
        for x, y in zip(x_ND.split(_BLOCK), y_ND.split(_BLOCK), strict=True):
            self._add(x, y)

    def _add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._x_sum += (total(x) * _FINE).round_() / _FINE
        self._y_sum += (total(y) * _FINE).round_() / _FINE
        self._xx += gram(x).round_()
        self._yx += (y.T @ x).round_()
        self._yy += gram(y).round_()

    def _refer(self, x_ND: torch.Tensor, y_ND: torch.Tensor, massive: torch.Tensor) -> None:
        x_ref = x_ND[~massive].mean(0)
        y_ref = y_ND[~massive].mean(0)
        self.start(x_ref, y_ref, _unit(x_ND - x_ref), _unit(y_ND - y_ref))

    def start(self, x_ref: torch.Tensor, y_ref: torch.Tensor, x_unit: torch.Tensor, y_unit: torch.Tensor) -> None:
        """Set reference rows and units, and begin at zero."""
        self._x_ref = x_ref.float()
        self._y_ref = y_ref.float()
        self._x_unit = x_unit.double()
        self._y_unit = y_unit.double()
        self._x_scale = (_STEPS / x_unit).float()
        self._y_scale = (_STEPS / y_unit).float()
        self._has_reference = True
        self.clear()

    def clear(self) -> None:
        """Forget the rows and free their sums, but keep reference and units."""
        self.count = 0
        self._xx = self._yx = self._yy = self._x_ref.new_zeros(0)

    def _begin(self) -> None:
        size = len(self._x_ref)
        self._x_sum, self._y_sum, self._xx, self._yx, self._yy = (
            torch.zeros(shape, dtype=torch.float64, device=self._x_ref.device)
            for shape in 2 * ((size,),) + 3 * ((size, size),)
        )

    def share_reference(self) -> None:
        """Give all processes the reference rows and units of rank 0; the others begin at zero."""
        references = (self._x_ref, self._y_ref, self._x_unit, self._y_unit)
        shared = [processes.from_first(value.clone()) for value in references]
        if not processes.is_rank0():
            self.start(*shared)

    def meet(self) -> None:
        """Give rank 0 the rows of all processes; the others begin at zero."""
        if not self.count:
            self._begin()
        count = torch.tensor([self.count], dtype=torch.float64, device=self._x_ref.device)
        for value in (count, self._x_sum, self._y_sum, self._xx, self._yx, self._yy):
            processes.all_reduce_sum(value)
        self.count = int(count.item())
        if not processes.is_rank0():
            self.clear()

    def sums(self) -> Sums:
        """The sums so far, on the CPU."""
        x = self._x_unit / _STEPS
        y = self._y_unit / _STEPS
        values = {
            "x_ref": self._x_ref.double(),
            "y_ref": self._y_ref.double(),
            "x_unit": self._x_unit,
            "y_unit": self._y_unit,
            "x_sum": self._x_sum * x,
            "y_sum": self._y_sum * y,
            "xx": mirrored(self._xx * torch.outer(x, x)),
            "yx": self._yx * torch.outer(y, x),
            "yy": mirrored(self._yy * torch.outer(y, y)),
        }
        return Sums(self.count, **{name: value.cpu() for name, value in values.items()})

    def restore(self, sums: Sums, device: torch.device | str = "cpu") -> None:
        """Restore the state that gave these sums: the same sums come after the same further rows."""
        self.start(*(getattr(sums, n).to(device) for n in ("x_ref", "y_ref", "x_unit", "y_unit")))
        self.count = sums.count
        x = self._x_unit / _STEPS
        y = self._y_unit / _STEPS
        self._x_sum = sums.x_sum.to(device) / x
        self._y_sum = sums.y_sum.to(device) / y
        self._xx = sums.xx.to(device) / torch.outer(x, x)
        self._yx = sums.yx.to(device) / torch.outer(y, x)
        self._yy = sums.yy.to(device) / torch.outer(y, y)


def mirrored(square_DD: torch.Tensor) -> torch.Tensor:
    """The matrix with its upper triangle in place of the lower one; a product leaves last bits that differ."""
    return square_DD.triu_().add_(square_DD.triu(1).T)


def gram(rows_ND: torch.Tensor) -> torch.Tensor:
    """X'X [D, D]. A third of X'X is copied from its mirror image instead of multiplied."""
    made = rows_ND.new_empty(rows_ND.shape[1], rows_ND.shape[1])
    begin = 0
    for part in rows_ND.tensor_split(_PARTS, dim=1):
        end = begin + part.shape[1]
        made[begin:end, begin:] = part.T @ rows_ND[:, begin:]
        made[end:, begin:end] = made[begin:end, end:].T
        begin = end
    return made


def total(rows_ND: torch.Tensor) -> torch.Tensor:
    """Sum over rows [D] in float64. Groups of `_FEW` rows are first summed in their own type."""
    whole = len(rows_ND) // _FEW * _FEW
    few = rows_ND[:whole].unflatten(0, (-1, _FEW)).sum(1) if whole else rows_ND[:0]
    return few.sum(0, dtype=torch.float64) + rows_ND[whole:].sum(0, dtype=torch.float64)


def _unit(x_ND: torch.Tensor) -> torch.Tensor:
    """The power of two at or above each column's root mean square; 1 if the root mean square is unusable."""
    rms = x_ND.double().square().mean(0).sqrt()
    usable = torch.isfinite(rms) & (rms > 2.0**-60) & (rms < 2.0**60)
    return torch.where(usable, torch.exp2(torch.ceil(torch.log2(torch.where(usable, rms, 1.0)))), 1.0)
