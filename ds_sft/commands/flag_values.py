"""Values of flags: whole numbers, and numbers with their units."""

from __future__ import annotations

import argparse
import re

UNITS = {
    "": 1.0,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def count_or_none(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


def size(text: str) -> float:
    """A number with a unit: 80GB and 80GiB differ as they should."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGTP]?I?)B?(?:/S)?", text.strip().upper())
    if not found or found[1].count(".") > 1 or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 such as 80GB, 24GiB or 150T")
    return float(found[1]) * UNITS[found[2]]


def with_unit(text: str, unit: str = "GB") -> float:
    """A size or a rate: 80 alone would be 80 bytes."""
    if text.strip()[-1:].isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number with its unit, such as {text.strip()}{unit}")
    return size(text)


def flops(text: str) -> float:
    """400TFLOP/s, 400 TFLOPS, 400T and 4e14 are one rate; 400 alone would be nobody's."""
    rate = re.sub(r"FLOPS?(/S)?$", "", text.strip().upper()).strip()
    plain = re.fullmatch(r"\d+(\.\d+)?(E\+?\d+)?", rate)
    if plain and float(rate) >= UNITS["G"]:
        return float(rate)
    if plain:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number with its unit, such as {rate}T")
    return size(rate)
