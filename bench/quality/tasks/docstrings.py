"""The demo's task: which module of the standard library does a docstring come from? Of the 20 with most."""

from __future__ import annotations

from typing import Any

from text_data import load_task

from bench.quality.tasks import cache as caches
from bench.quality.tasks import texts
from bench.quality.tasks.classification import Classification

NAME = "docstrings"


def make(*, quick: bool = False, cache: str | None = None) -> Classification:
    data = caches.data(NAME, cache, build)
    limits = {"validation": 200, "test": 400} if quick else {}
    return Classification(
        NAME, data, longest=48 if quick else 96, size=32, steps=60 if quick else 250, limits=limits,
        kept=200 if quick else 500, cache=cache,
    )  # fmt: skip


def build() -> dict[str, Any]:
    found = load_task(texts.SEED)
    parts = {"train": found.train, "validation": found.validation, "test": found.test}
    # of longer ones the model reads the beginning only
    return {"names": found.names} | {
        name: {"texts": [text[:600] for text in part.texts], "labels": part.labels} for name, part in parts.items()
    }
