"""The members of one sample, taken out of the bytes of a tar file.

Strict and small: only what momo's shards hold (plain files with short ASCII names in POSIX ustar headers) is read, far
faster than `tarfile` does it. Anything else is refused, but for extended headers of other records than name and size
(times, owners), which are passed over.
"""

from __future__ import annotations

_BLOCK = 512
_PLAIN = (ord("0"), 0)
_EXTENDED = ord("x")


def split_sample(raw: bytes | memoryview) -> tuple[str, dict[str, memoryview]]:
    """Separates the members of one sample.

    Args:
        raw: Bytes from the first header to the end of the last member's padding.

    Returns:
        The key, and the content of each member by what follows the key's dot.

    Raises:
        ValueError: The bytes are no sample: a damaged or foreign header, two keys, or an early end.
    """
    view = memoryview(raw)
    members: dict[str, memoryview] = {}
    sample_key = ""
    position, end = 0, len(view)
    while position < end:
        header = view[position : position + _BLOCK].tobytes()
        name, size = _read_header(header)
        first = position + _BLOCK
        position = first + -(-size // _BLOCK) * _BLOCK
        if position > end:
            raise ValueError(f"{name} has {size} bytes and the sample ends before")
        if header[156] == _EXTENDED:
            _refuse_moved(view[first : first + size].tobytes())
            continue
        key, _, suffix = name.partition(".")
        if not key or not suffix or suffix in members or (members and key != sample_key):
            raise ValueError(f"a member {name} in a sample {sample_key or '(first member)'}")
        sample_key = key
        members[suffix] = view[first : first + size]
    return sample_key, members


def _refuse_moved(records: bytes) -> None:
    if b" path=" in records or b" size=" in records:
        raise ValueError("a tar member with its name or size in an extended header, expected a plain file")


def _read_header(header: bytes) -> tuple[str, int]:
    """Returns name and size (POSIX.1-1988 ustar; a size beyond 8 GiB in base 256 as GNU tar writes it)."""
    if len(header) < _BLOCK or header[257:262] != b"ustar":
        raise ValueError("no tar header where one belongs")
    kind = header[156]
    if (kind not in _PLAIN and kind != _EXTENDED) or header[345]:
        raise ValueError(f"a tar member of type {header[156:157]!r} or with a long name, expected a plain file")
    name = header[:100].rstrip(b"\0")
    if not name or b"\0" in name or (b"/" in name and kind != _EXTENDED) or not name.isascii():
        raise ValueError(f"a member's name is {name!r}, expected ASCII without slash")
    field = header[124:136]
    if field[0] == 0x80:
        return name.decode(), int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit():
        raise ValueError(f"a member's size is {field!r}, expected octal digits")
    return name.decode(), int(digits, 8)
