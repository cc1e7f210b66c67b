"""Texts that lie on the machine: sources are parsed, never imported."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import text_data
from tqdm import tqdm

SEED = 0  # of every split and choice: data do not change with a run's seed
STANDARD = "the standard library"
SKIPPED = {"test", "tests", "testing", "_vendor", "vendor", "vendored", "_vendored", "third_party", "site-packages",
           "dist-packages", "idlelib", "lib2to3", "node_modules"}  # fmt: skip


def choose(rows: list, count: int) -> list:
    """At most `count` of them, always the same, in their order."""
    if len(rows) <= count:
        return list(rows)
    return [rows[i] for i in sorted(random.Random(SEED).sample(range(len(rows)), count))]


# ---- sentences: what the model was pretrained for ----


def sentence_pairs(count: int) -> list[list[str]]:
    """(first sentence, the others) of docstrings of the standard library: of modules that no task trains on."""
    classes = {module for _, module in text_data.docstring_rows()}
    rows = text_data.docstring_rows(classes=60)
    pairs: dict[str, str] = {}
    for text, module in rows:
        found = re.match(r"(.+?[.!?])\s+(?=[A-Z])(.+)$", text)
        if module not in classes and found and len(found[1].split()) >= 5 and len(found[2].split()) >= 8:
            pairs.setdefault(found[1][:300], found[2][:400])
    unique = {rest: first for first, rest in pairs.items()}
    return choose([[first, rest] for rest, first in unique.items()], count)


# ---- functions: docstring and body ----


def function_pairs() -> tuple[dict[str, list[list[str]]], dict[str, int]]:
    """package -> (first paragraph of a docstring, body of its function), and how many were left out for what reason.

    Neither a docstring nor a body occurs twice, in whatever packages: the first one, in the order of the paths, stays.
    """
    files = list(_sources())
    pairs: dict[str, list[list[str]]] = defaultdict(list)
    seen: set[str] = set()
    counts: Counter[str] = Counter()
    for package, path in tqdm(files, desc="functions with docstrings", leave=False, mininterval=1):
        for docstring, body in _functions(path):
            counts["functions with a docstring"] += 1
            reason = _unfit(docstring, body)
            if reason is None and (docstring.lower() in seen or body in seen):
                reason = "seen before"
            if reason is not None:
                counts[reason] += 1
                continue
            seen.update((docstring.lower(), body))
            pairs[package].append([docstring[:300], body[:450]])
    return dict(pairs), dict(counts)


def _sources() -> Iterator[tuple[str, Path]]:
    """(top-level name, file): installed packages after the standard library, which counts as one package."""
    library = Path(sysconfig.get_path("stdlib"))
    roots = [library, *dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).parts
            if not SKIPPED.intersection(parts) and not parts[-1].startswith("test_"):
                yield (STANDARD if root == library else parts[0].removesuffix(".py")), path


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in others' sources
            tree = ast.parse(text)
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if docstring and node.body[1].lineno > (node.body[0].end_lineno or 0):
            body = lines[node.body[1].lineno - 1 : node.end_lineno]
            yield " ".join(docstring.strip().split("\n\n")[0].split()), "\n".join(line.strip() for line in body)


def _unfit(docstring: str, body: str) -> str | None:
    if len(docstring.split()) < 5 or ">>>" in docstring or not docstring.isascii():
        return "docstring of less than five words, or not of words"
    if len(body) < 80 or body.count("\n") < 2 or not body.isascii():
        return "body of less than three lines"
    return None


def parts_of(pairs: dict[str, list[list[str]]]) -> dict[str, list[str]]:
    """ "train", "validation", "test" -> packages: each has a part of its own, so what is held out is others' code.

    The four with the most pairs train, and of the others, by size, every third and fourth. The standard library is
    held out, for tests: what a model still can do is measured on its docstrings.
    """
    names = sorted(pairs.keys() - {STANDARD}, key=lambda name: (-len(pairs[name]), name))
    parts: dict[str, list[str]] = {
        "train": names[:4],
        "validation": [],
        "test": [STANDARD] if STANDARD in pairs else [],
    }
    for index, name in enumerate(names[4:]):
        parts[("validation", "test", "train", "train")[index % 4]].append(name)
    return parts


def spread(pairs: dict[str, list[list[str]]], packages: Iterable[str], most: int, count: int) -> list[list[str]]:
    """`count` pairs of these packages, at most `most` of each."""
    return choose([pair for package in packages for pair in choose(pairs[package], most)], count)
