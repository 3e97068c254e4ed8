"""Numbers as people read them; the same number always gives the same text."""

import math
from collections.abc import Iterable, Sequence


def percent(fraction: float, *, decimals: int = 2) -> str:
    """Return a fraction as a percentage with a fixed number of decimals.

    >>> percent(0.9812)
    '98.12%'
    """
    return "not a number" if math.isnan(fraction) else f"{100 * fraction:.{decimals}f}%"


def share(fraction: float) -> str:
    """Return a fraction as a percentage in at most three digits, more where it is nearly a whole number of percent.

    >>> [share(fraction) for fraction in (0.9, 0.1294, 0.00521, 1.153)]
    ['90%', '12.9%', '0.52%', '115%']
    """
    if math.isnan(fraction):
        return "not a number"
    size = abs(100 * fraction)
    text = f"{100 * fraction:.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text}%"


def sparsity_text(sparsity: float) -> str:
    """Return a sparsity as a percentage, never rounded up to 100%.

    >>> [sparsity_text(sparsity) for sparsity in (0.0, 0.9, 0.975, 0.99996)]
    ['0%', '90%', '97.5%', '99.996%']
    """
    decimals = 2 if sparsity < 0.999 else 4
    text = f"{100 * sparsity:.{decimals}f}".rstrip("0").rstrip(".")
    return f"{text}%"


def count(number: int) -> str:
    """Return a whole number with its thousands set apart.

    >>> count(25502912)
    '25,502,912'
    """
    return f"{number:,}"


def size(byte_count: float) -> str:
    """Return a number of bytes in decimal units.

    >>> [size(byte_count) for byte_count in (12, 25_600, 102_300_000)]
    ['12 B', '25.6 kB', '102 MB']
    """
    return _scaled(byte_count, ("B", "kB", "MB", "GB", "TB"))


def flops(number: float) -> str:
    """Return a number of floating-point operations.

    >>> [flops(number) for number in (0, 999_700, 8_212_000_000)]
    ['0 FLOPs', '1 MFLOPs', '8.21 GFLOPs']
    """
    return _scaled(number, tuple(f"{prefix}FLOPs" for prefix in ("", "k", "M", "G", "T", "P", "E", "Z")))


def loss_text(loss: float) -> str:
    """Return a loss in four digits."""
    return f"{loss:.4g}"


def seconds_text(seconds: float) -> str:
    """Return a duration in the two largest units.

    >>> [seconds_text(seconds) for seconds in (41.26, 83, 7384)]
    ['41.3 s', '1 min 23 s', '2 h 3 min']
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, its first column set to the left.

    >>> print(markdown_table(["method", "seeds"], [["a|b", "3"]]), end="")
    | method | seeds |
    | --- | ---: |
    | a&#124;b | 3 |
    """
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units:
        text = f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2}f}"
        if float(text) < 1000 or unit == units[-1]:
            break
        number /= 1000
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
