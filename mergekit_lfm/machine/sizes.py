"""Sizes in bytes as people write them. Decimal (5GB is 5e9 bytes) unless written with an i (3GiB is 3 * 2**30)."""

import re

from mergekit_lfm.errors import PlanError

EXPECTED = "a size such as 50KB, 5GB (5e9 bytes), 3GiB, or a number of bytes"
_PREFIXES = "KMGT"
_FACTORS = {
    "": 1,
    **{prefix.lower(): 1000**power for power, prefix in enumerate(_PREFIXES, 1)},
    **{f"{prefix.lower()}i": 1024**power for power, prefix in enumerate(_PREFIXES, 1)},
}
_UNITS = {"": 1} | {f"{unit}{b}": factor for unit, factor in _FACTORS.items() if unit for b in ("", "b")}


def parse_size(text: str | int) -> int:
    """The bytes in "50KB", "1.5 GB", "5G", "3GiB" or "1000000", at least 1; upper and lower case are the same.

    The B may be left out. "5B" is refused: it is five bytes, or five billion as in mergekit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    factor = _UNITS.get(match[2]) if match else None
    size = round(float(match[1]) * factor) if match and factor else 0
    if size < 1:
        words = {"found": repr(str(text)), "expected": EXPECTED}
        if match and match[2] == "b":
            words["cure"] = f"billions of bytes are {match[1]}GB"
        raise PlanError("found {found}, expected {expected}" + ("; {cure}" if "cure" in words else ""), **words)
    return size


def format_size(nbytes: float) -> str:
    """nbytes with three digits and a decimal unit: "512 B", "1.23 GB"."""
    if nbytes < 1000:
        return f"{nbytes:.0f} B"
    for prefix in _PREFIXES:
        nbytes /= 1000
        if nbytes < 999.5 or prefix == _PREFIXES[-1]:
            break
    number = f"{nbytes:#.3g}".rstrip(".") if nbytes < 999.5 else f"{nbytes:.0f}"
    return f"{number} {prefix}B"
