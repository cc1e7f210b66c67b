"""Texts with labels: Python's own docstrings, or a CSV / JSON-lines file."""

import ast
import csv
import json
import random
import sys
import sysconfig
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user asked for: shown as one sentence, without a traceback."""


@dataclass
class Texts:
    texts: list[str]
    labels: list[int]

    def __len__(self):
        return len(self.texts)

    def take(self, rows):
        return Texts([self.texts[i] for i in rows], [self.labels[i] for i in rows])


@dataclass
class Task:
    """What is classified: `label` names the classes in titles, `names[i]` is class i."""

    description: str
    names: list[str]
    train: Texts
    validation: Texts
    test: Texts

    @property
    def majority(self):
        """Test accuracy of always answering the most frequent training class."""
        common = Counter(self.train.labels).most_common(1)[0][0]
        return self.test.labels.count(common) / len(self.test)


def docstring_rows(classes=20):
    """(docstring, top-level module) for the `classes` modules of the standard library that have most of them.

    The files are parsed, never imported. A docstring that occurs in several modules has no answer and is left out;
    one that is repeated inside a module counts once, so that no test text was seen in training.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}  # the last two are programs
    modules = defaultdict(set)  # docstring -> modules; dicts keep the order of the sorted paths
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if skipped.intersection(parts):
            continue
        module = parts[0].removesuffix(".py")
        for text in _docstrings(path):
            modules[" ".join(text.split())].add(module)
    rows = [(text, owners.pop()) for text, owners in modules.items() if len(owners) == 1]
    sizes = Counter(module for _, module in rows)
    if len(sizes) < classes:
        raise UserError(f"no Python sources found in {root}: pass a file with --data instead")
    largest = {module for module, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:classes]}
    return [row for row in rows if row[1] in largest]


def _docstrings(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the standard library are not the user's business
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and deliberately broken files
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and text.strip():
                yield text


def file_rows(path, text_column, label_column):
    """(text, label) rows of a CSV or JSON-lines file; rows in which either is empty are left out."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file not found: {path}")
    readers = {".csv": _read_csv, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines, ".json": _read_json_lines}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path.name}: expected a .csv or .jsonl file")
    rows = []
    try:
        for where, record in readers[path.suffix.lower()](path):
            for column in (text_column, label_column):
                if column not in record:
                    have = ", ".join(str(name) for name in record)
                    raise UserError(f"{path.name}, {where}: there is no column '{column}' (it has: {have})")
            text, label = (str("" if record[c] is None else record[c]).strip() for c in (text_column, label_column))
            if text and label:
                rows.append((text, label))
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except csv.Error as error:
        raise UserError(f"{path.name} is not a readable CSV file: {error}") from error
    if not rows:
        raise UserError(f"{path.name} has no row with both a text and a label")
    return rows


def _read_csv(path):
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts above 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        for record in reader:
            record.pop(None, None)  # surplus fields have no name
            yield f"line {reader.line_num}", record


def _read_json_lines(path):
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path.name}, line {number}: not a JSON object ({error.msg})") from error
            if not isinstance(record, dict):
                raise UserError(f"{path.name}, line {number}: not a JSON object")
            yield f"line {number}", record


TWEETS = (8000, 1000, 3000)  # for training, validation and testing: what minutes are enough for


def load_task(seed, data=None, test_data=None, text_column="text", label_column="label", task="docstrings"):
    """Split into train, validation and test: 70/10/20 %, or 90/10 % where the test set is a file of its own.

    Without `data` the task is "docstrings" or "tweets", of which a part is taken, each class in its share.
    """
    if test_data and not data:
        raise UserError(f"--test-data needs --data: the {task} have a test set of their own")
    shares = (0.7, 0.1, 0.2)
    if data:
        rows = file_rows(data, text_column, label_column)
        description = f"'{label_column}' of {Path(data).name}"
    elif task == "tweets":
        from tweet_data import tweet_rows

        rows = tweet_rows()
        shares = (*(size / len(rows) for size in TWEETS), 1 - sum(TWEETS) / len(rows))
        description = "what a tweet says of an airline, of driverless cars or of Apple, as people judged it"
    else:
        rows = docstring_rows()
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        description = f"which module of Python {version}'s standard library a docstring comes from"
    names = sorted({label for _, label in rows})
    if len(names) < 2:
        raise UserError(f"there is one label only ('{names[0]}'): nothing to classify")
    everything = _texts(rows, names, data)
    if test_data:
        train, validation = split(everything, names, (0.9, 0.1), seed)
        test = _texts(file_rows(test_data, text_column, label_column), names, test_data)
    else:
        train, validation, test = split(everything, names, shares, seed)[:3]
    return Task(description, names, train, validation, test)


def _texts(rows, names, path):
    index = {name: i for i, name in enumerate(names)}
    for _, label in rows:
        if label not in index:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise UserError(f"{Path(path).name}: unknown label '{label}' (the training data has: {known})")
    return Texts([text for text, _ in rows], [index[label] for _, label in rows])


def split(data, names, shares, seed):
    """Stratified: every part holds every class, at least once, in its share."""
    by_class = defaultdict(list)
    for row, label in enumerate(data.labels):
        by_class[label].append(row)
    generator, parts = random.Random(seed), [[] for _ in shares]
    for label in sorted(by_class):
        rows = by_class[label]
        if len(rows) < len(shares):
            raise UserError(f"label '{names[label]}' has {len(rows)} example(s); every label needs {len(shares)}")
        generator.shuffle(rows)
        start = 0
        for part, share in reversed(list(zip(parts, shares, strict=True))):
            size = max(1, round(share * len(rows))) if part is not parts[0] else len(rows) - start
            part.extend(rows[start : start + size])
            start += size
    return [data.take(sorted(part)) for part in parts]
