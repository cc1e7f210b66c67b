"""Which learning rate is best, over rank, width and kind? The rule of ``randlora_alpha="auto"``, measured.

Results: ``bench/results/<machine>/settings.csv`` and pictures beside it.
"""

from __future__ import annotations


def main(argv: list[str] | None = None) -> int:
    from bench.settings.cli import main

    return main(argv)
