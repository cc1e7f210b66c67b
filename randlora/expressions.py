"""Regular expressions of configs, which may come from a file of unknown origin: matching ends, whatever they are."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import regex

SECONDS = 5.0  # for all names that are matched with one expression
# re takes any other brace for itself, regex some for approximate matching.
_BRACE = re.compile(r"(?<!\\)(?:\\\\)*\{(?!\d+,?\d*\}|,\d+\})")


class Expression:
    """A regular expression in the syntax of ``re``.

    Matching is regex's: ``re`` cannot be stopped and holds up all other threads meanwhile.

    Args:
        setting: the name of the setting that it comes from, for messages.
        extended: what is matched in place of `pattern`, which is part of it.

    Raises:
        ValueError: `pattern` is not valid, nested too deeply, or has braces that are no counts.
    """

    def __init__(self, setting: str, pattern: str, extended: str | None = None) -> None:
        self._said = f"{setting}={pattern if len(pattern) < 200 else pattern[:200] + '...'!r}"
        try:
            re.compile(pattern)
            if _BRACE.search(pattern):
                raise ValueError(
                    f"{self._said} has a brace that is no count like {{2,3}}: write \\{{ for the character"
                )
            self._compiled = regex.compile(pattern if extended is None else extended)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
            raise ValueError(f"{self._said} is not a regular expression: {error}") from error
        self._left = SECONDS

    def fullmatch(self, name: str) -> regex.Match | None:
        """As ``re.fullmatch``; ``ValueError`` once the names took more than ``SECONDS`` together."""
        return self._run(self._compiled.fullmatch, name)

    def match(self, name: str) -> regex.Match | None:
        """As ``re.match``; errors as :meth:`fullmatch`."""
        return self._run(self._compiled.match, name)

    def _run(self, method: Callable[..., regex.Match | None], name: str) -> regex.Match | None:
        started = time.monotonic()
        try:
            return method(name, timeout=max(self._left, 1e-3), concurrent=True)
        except (TimeoutError, MemoryError):
            raise ValueError(
                f"{self._said} takes more than {SECONDS:g} seconds to match names like {name!r}: repetitions inside "
                "repetitions, or alternatives that match the same, make it try all combinations"
            ) from None
        finally:
            self._left -= time.monotonic() - started
