"""Large numbers as people write them."""

from __future__ import annotations


def giga(value: float) -> str:
    """In units of 1e9, with enough digits for tiny models.

    >>> giga(17_600_000_000), giga(2_345_678)
    ('17.6', '0.002346')
    """
    return f"{value / 1e9:.4g}"


def mega(value: float) -> str:
    """In millions.

    >>> mega(22_050_664)
    '22.05 M'
    """
    return f"{value / 1e6:.4g} M"


def mebi(value: float) -> str:
    """Bytes in MiB.

    >>> mebi(1_572_864)
    '1.5 MiB'
    """
    return f"{value / 2**20:.4g} MiB"
