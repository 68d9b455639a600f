"""Figures as text, the same way everywhere in the report."""

from __future__ import annotations

import re

from deploy.manifest import Interval

ABSENT = "–"
TYPE_NAMES = {"half": "float16", "float": "float32", "fp16": "float16", "fp32": "float32", "bf16": "bfloat16"}


def count(number: int) -> str:
    """1234 → `1,234`."""
    return f"{number:,}"


def percent(share: float) -> str:
    """0.912 → `91.2 %`; a share just short of all or nothing is never rounded to it."""
    if 0.9995 <= share < 1:
        return "> 99.9 %"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{share * 100:.1f} %"


def points(difference: float) -> str:
    """-0.002 → `0.2 points`: the size of a difference between two shares."""
    return "less than 0.1 points" if abs(difference) < 0.0005 else f"{abs(difference) * 100:.1f} points"


def significant(value: float) -> str:
    """3.2 → `3.20`: at least three significant digits, never in exponent form."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".split("e")[1])  # after rounding: 0.9999 has the exponent of 1.00
    return f"{value:,.{max(2 - exponent, 0)}f}"


def milliseconds(value: float) -> str:
    """3.2 → `3.20 ms`."""
    return f"{significant(value)} ms"


def milliseconds_interval(interval: Interval) -> str:
    """`3.20 ms [3.10, 3.31]`."""
    return f"{milliseconds(interval.value)} [{significant(interval.low)}, {significant(interval.high)}]"


def times(ratio: float) -> str:
    """6.4 → `6.40×`."""
    return f"{significant(ratio)}×"


def times_interval(interval: Interval) -> str:
    """`1.32× [1.28, 1.36]`."""
    return f"{times(interval.value)} [{significant(interval.low)}, {significant(interval.high)}]"


def size(number: int) -> str:
    """Bytes in decimal units: 1234567 → `1.23 MB`."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= 0.9995 * factor:  # 999,999 B are 1.00 MB, not 1,000 kB
            return f"{significant(number / factor)} {unit}"
    return f"{number} B"


def scale(value: float | None) -> str:
    """A quantization scale with four digits, or a dash."""
    return ABSENT if value is None else f"{value:.4g}"


def scale_range(low: float | None, high: float | None) -> str:
    """The smallest and largest scale of a weight; one figure where they are the same."""
    if low == high:
        return scale(low)
    return f"{scale(low)} – {scale(high)}"


def short_hash(digest: str) -> str:
    """Return the first twelve digits of a SHA-256."""
    return digest[:12]


def unbroken(text: str) -> str:
    """Tie units to their figures, and the ends of an interval to each other, with no-break spaces."""
    return re.sub(r"(?<=\d) (?=(?:%|ms|B|kB|MB|GB)(?!\w))|(?<=\d,) (?=[\d.]+\])", "\u00a0", text)


def type_name(name: str) -> str:
    """Return a compiler's type in ONNX's words: `Half×Int8` → `float16×int8`."""
    return "×".join(TYPE_NAMES.get(part, part) for part in name.lower().split("×"))
