"""What a quantization is: the choices that solvers, formats and checkpoints share.

Imports nothing heavy, so that a command line can be checked before PyTorch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Method = Literal["awq", "gptq"]
Quality = Literal["fast", "default", "best"]
ActOrderGroups = Literal["static", "dynamic"]

METHODS: dict[Method, str] = {"awq": "AWQ", "gptq": "GPTQ"}  # as people write them
WHOLE_ROW = -1  # the group size that stands for all input channels of a row


def _float16() -> tuple[torch.dtype, ...]:
    import torch

    return (torch.float16,)


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a weight becomes an integer: `w ~ (q - zero) * scale`, with `q` in `[0, qmax]`.

    bits: of an integer.
    group_size: input channels that share a scale, as asked for; `WHOLE_ROW` (-1) for all of a row.
    symmetric: zero points are all at the middle, `2^(bits-1)`.
    zero_min: the smallest zero point that the file holds for every reader (1 in the `gptq` format, which
        stores `zero - 1`).
    scale_dtypes: a stored scale survives a cast to each of these in turn, so that a reader that computes in
        either of them sees the scale for which weights were rounded. Float16 alone by default.
    """

    bits: int
    group_size: int
    symmetric: bool
    zero_min: int = 0
    scale_dtypes: tuple[torch.dtype, ...] = field(default_factory=_float16)

    @property
    def qmax(self) -> int:
        """The largest integer, `2^bits - 1`."""
        return int(2**self.bits - 1)

    @property
    def middle(self) -> int:
        """The zero point of a symmetric group, `2^(bits-1)`."""
        return int(2 ** (self.bits - 1))

    def group_width(self, in_features: int) -> int:
        """Input channels of a group in a row of `in_features`."""
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def groups(self, in_features: int) -> int:
        """Groups in a row of `in_features`, which the group size divides."""
        return in_features // self.group_width(in_features)
