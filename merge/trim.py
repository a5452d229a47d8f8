"""The exact magnitude at which a tensor or a whole model is trimmed, found without holding the model.

A float32 without its sign is ordered as its bits are. So the k-th largest magnitude is found by counting: one pass
over the model counts the upper 16 of the 31 bits, a second one counts the lower 15 of the values that share the
upper bits of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from momo.errors import MergeError

_LOW_BITS = 15
_LOW_BINS = 1 << _LOW_BITS
_HIGH_BINS = 1 << 16
_INFINITY_BIN = 0x7F800000 >> _LOW_BITS
_CHUNK = 524_288


def kept_count(count: int, density: float) -> int:
    """Returns how many of `count` entries a density keeps: the nearest whole number, half upwards, at least one.

    Args:
        count: Number of entries; of none, none are kept.
        density: Fraction that is kept, above 0 and at most 1.

    Raises:
        MergeError: The density is out of its range.
    """
    if not 0 < density <= 1:
        raise MergeError("the density is out of range", seen=density, rule="above 0 and at most 1; 1 keeps all")
    return min(count, max(1, math.floor(density * count + 0.5)))


def magnitude_threshold(pieces: Callable[[], Iterable[torch.Tensor]], count: int, keep: int) -> float:
    """Returns the keep-th largest magnitude of a model that comes in pieces.

    Keeping the entries whose float32 magnitude is not below it keeps `keep` entries, and more only where several
    equal the threshold. Any cutting into pieces, any order and any number of threads give the same value.

    Args:
        pieces: Called twice; yields every entry of the model once, as float tensors of any shape. Other dtypes are
            rounded to float32.
        count: Number of entries over all pieces.
        keep: Rank of the wanted magnitude, 1 (the largest) to `count`.

    Returns:
        A float32 magnitude as a Python float.

    Raises:
        MergeError: `keep` is out of range, the pieces do not hold `count` entries, or an entry is NaN or infinite.
    """
    if not 1 <= keep <= count:
        raise MergeError("the number of entries to keep is out of range", seen=keep, rule=f"1 to {count}")
    upper = torch.zeros(_HIGH_BINS, dtype=torch.int64)
    for bits in _magnitude_bits(pieces()):
        upper += torch.bincount(bits.bitwise_right_shift_(_LOW_BITS), minlength=_HIGH_BINS)
    if upper[_INFINITY_BIN:].any():
        raise MergeError("an entry to trim is NaN or infinite", rule="only finite magnitudes can be compared")
    _check_count(upper, count)
    prefix, rank = _bin_of_rank(upper, keep)
    lower = torch.zeros(_LOW_BINS + 2, dtype=torch.int64)
    for bits in _magnitude_bits(pieces()):
        # The first and the last bin take what lies below and above the prefix.
        bits.sub_(prefix << _LOW_BITS).clamp_(-1, _LOW_BINS).add_(1)
        lower += torch.bincount(bits, minlength=_LOW_BINS + 2)
    _check_count(lower, count)
    suffix, _ = _bin_of_rank(lower[1:-1], rank)
    return torch.tensor(prefix << _LOW_BITS | suffix, dtype=torch.int32).view(torch.float32).item()


def _magnitude_bits(pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the bits of the float32 magnitudes as int32, in chunks of one buffer that the caller may change."""
    buffer = torch.empty(_CHUNK, dtype=torch.int32)
    for piece in pieces:
        values = piece.detach().reshape(-1)
        for first in range(0, len(values), _CHUNK):
            bits = values[first : first + _CHUNK].float().view(torch.int32)
            yield torch.bitwise_and(bits, 0x7FFFFFFF, out=buffer[: len(bits)])


def _bin_of_rank(counts: torch.Tensor, rank: int) -> tuple[int, int]:
    """Returns the bin that holds the rank-th largest value, and the value's rank inside it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    above = int(from_top[place - 1]) if place else 0
    return len(counts) - 1 - place, rank - above


def _check_count(counts: torch.Tensor, count: int) -> None:
    seen = int(counts.sum())
    if seen != count:
        raise MergeError(
            "the pieces of the model do not add up", seen=f"{seen} entries", rule=f"{count} entries in every pass"
        )
