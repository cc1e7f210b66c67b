"""What was measured. Written by ``python -m bench.quality.evidence``, not by hand; a test compares it."""

from __future__ import annotations

from .evidence import Row

ROWS: tuple[Row, ...] = ()
