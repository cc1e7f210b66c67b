"""Text that lies on every machine with PyTorch: Python sources to pretrain on, C++ headers to adapt to.

Both are cleaned alike. Licence headers go, as do generated files and near-duplicates: a file of whose lines most were
seen before is left out, so that nothing held out is a copy of what is trained on. Files, never parts of them, are held
out. What is kept is the ids of a byte-level BPE that is trained on the Python part, a few megabytes in all.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from bench.quality.tasks import cache as caches

VOCABULARY = 4096
END = "<|end of file|>"  # id 0, after every file
NAME = "language.npz.xz"
SPLITS = ("pretraining", "kept", "train", "validation", "test")

PRETRAINING_BYTES = {"standard library": 9_000_000, "torch": 12_000_000}
KEPT_BYTES = 200_000  # of each of both
ADAPTATION_BYTES = {"train": 2_400_000, "validation": 300_000, "test": 300_000}
QUICK_DIVISOR = 8

_TABLES = {"encodings", "pydoc_data", "lib2to3", "idlelib", "test", "tests", "site-packages", "dist-packages"}
_LICENCE = re.compile(r"copyright|licen[cs]e|spdx-|all rights reserved", re.IGNORECASE)
_LEADING_COMMENTS = {
    ".py": re.compile(r"(?:[ \t]*(?:#[^\n]*)?\n)+"),
    ".h": re.compile(r"(?:\s*(?:/\*.*?\*/|//[^\n]*\n))+", re.DOTALL),
}


class Corpus:
    """Ids by split, as uint16 tensors, and the tokenizer's JSON.

    Attributes:
        ids: split -> ``[tokens]``, files one after the other with :data:`END` after each.
        tokenizer: what ``tokenizers.Tokenizer.from_str`` takes.
        fingerprint: SHA-256 of both, in hex.
    """

    def __init__(self, ids: dict[str, np.ndarray], tokenizer: str) -> None:
        self.ids = {split: np.ascontiguousarray(ids[split], dtype=np.uint16) for split in SPLITS}
        self.tokenizer = tokenizer
        digest = hashlib.sha256(tokenizer.encode())
        for split in SPLITS:
            digest.update(f"{split} {self.ids[split].size} ".encode() + self.ids[split].astype("<u2").tobytes())
        self.fingerprint = digest.hexdigest()

    def write(self, path: Path) -> None:
        arrays = io.BytesIO()
        np.savez(arrays, tokenizer=np.frombuffer(self.tokenizer.encode(), dtype=np.uint8), **self.ids)
        caches.write(path, lambda partial: partial.write_bytes(lzma.compress(arrays.getvalue(), preset=6)))

    @classmethod
    def read(cls, path: Path) -> Corpus:
        with np.load(io.BytesIO(lzma.decompress(path.read_bytes()))) as arrays:
            return cls({split: arrays[split] for split in SPLITS}, arrays["tokenizer"].tobytes().decode())


def corpus(*, quick: bool = False, cache: Path | None = None) -> Corpus:
    """The corpus in `cache`, or one made of what lies on this machine, and written there.

    `quick`: an eighth of what is trained on. It comes from the whole corpus where `cache` has that, so that a prepared
    folder serves both.
    """
    path = None if cache is None else cache / NAME
    if path is not None and path.exists():
        whole = Corpus.read(path)
        return _part(whole) if quick else whole
    made = build(1)
    if path is not None:
        made.write(path)
    return _part(made) if quick else made


def _part(whole: Corpus) -> Corpus:
    trained = ("pretraining", "train")
    return Corpus(
        {s: ids[: ids.size // QUICK_DIVISOR] if s in trained else ids for s, ids in whole.ids.items()}, whole.tokenizer
    )


def build(divisor: int = 1) -> Corpus:
    """The corpus from this machine's files; `divisor` of the sizes is for tests."""
    library, package = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent
    folders = {"standard library": library, "torch": package}
    seen: set[bytes] = set()
    texts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for name, size in PRETRAINING_BYTES.items():
        files = fresh(cleaned(python_files(folders[name]), ".py"), seen)
        texts["kept"] += _until(files, KEPT_BYTES // divisor)
        texts["pretraining"] += _until(files, size // divisor)
    files = fresh(cleaned(headers(package / "include"), ".h"), seen)
    for split in ("test", "validation", "train"):
        texts[split] = _until(files, ADAPTATION_BYTES[split] // divisor)
    if missing := [split for split in SPLITS if not texts[split]]:
        raise FileNotFoundError(f"no text for {', '.join(missing)}: is there source code in {library} and {package}?")
    return encoded(texts)


def encoded(texts: dict[str, list[str]]) -> Corpus:
    """Texts by split as ids of a byte-level BPE that is trained on the "pretraining" ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts["pretraining"], trainer)
    end = tokenizer.token_to_id(END)

    def ids(split: str) -> np.ndarray:
        parts = (np.array([*found.ids, end], dtype=np.uint16) for found in tokenizer.encode_batch(texts[split]))
        return np.concatenate(list(parts))

    return Corpus({split: ids(split) for split in SPLITS}, json.dumps(json.loads(tokenizer.to_str())))


# ---- files ----


def python_files(folder: Path) -> list[Path]:
    """Python files below `folder`, in an order that has nothing to do with their places; no tests, no tables."""
    return _shuffled(folder, (".py",), lambda place: place.name in _TABLES)


def headers(folder: Path) -> list[Path]:
    """C++ headers below `folder` in such an order, without ATen/ops: thousands of small generated ones."""
    return _shuffled(folder, (".h", ".hpp", ".cuh"), lambda place: place.parts == ("ATen", "ops"))


def _shuffled(folder: Path, endings: tuple[str, ...], without: Callable[[Path], bool]) -> list[Path]:
    """By the hash of the place below `folder`, the same everywhere; folders `without` are not entered."""
    found = []
    for path, folders, names in os.walk(folder):
        place = Path(path).relative_to(folder)
        folders[:] = [name for name in folders if not without(place / name)]
        found += [place / name for name in names if name.endswith(endings)]
    return [folder / place for place in sorted(found, key=lambda p: hashlib.sha256(p.as_posix().encode()).digest())]


def cleaned(paths: Iterable[Path], language: str) -> Iterator[str]:
    """Their texts without licence headers; none that are generated, no text, very short or very long."""
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if "generated" in text[:1000].lower():
            continue
        text = without_licence(text, language)
        if 300 <= len(text) <= 300_000:
            yield text


def without_licence(text: str, language: str) -> str:
    """`text` without the comments that it begins with, where these speak of a licence; ends with one newline."""
    leading = _LEADING_COMMENTS[language].match(text)
    if leading and _LICENCE.search(leading.group()):
        text = text[leading.end() :]
    return text.strip() + "\n"


def fresh(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Those of whose lines (of at least 12 characters) less than half were `seen`, which grows by all lines."""
    for text in texts:
        lines = {hashlib.blake2b(line.encode(), digest_size=8).digest() for line in _long(text)}
        known = len(lines & seen)
        seen |= lines
        if lines and 2 * known < len(lines):
            yield text


def _long(text: str) -> Iterator[str]:
    return (line for line in map(str.strip, text.splitlines()) if len(line) >= 12)


def _until(texts: Iterator[str], size: int) -> list[str]:
    """As many texts as have `size` characters together; the iterator goes on behind them."""
    taken, total = [], 0
    for text in texts:
        taken.append(text)
        total += len(text)
        if total >= size:
            break
    return taken
