"""Files of a cache folder: written whole and moved into place, so that processes at work at once may share it."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """`fill` writes a file of another name in the same folder, which then takes the place of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        fill(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def data(name: str, cache: str | None, build: Callable[[], Any]) -> Any:
    """What ``<cache>/<name>.json.gz`` holds, or what `build` gives, which is then written there.

    Raises ValueError where the file is damaged, or of another version of this code.
    """
    if cache is None:
        return build()
    path = Path(cache) / f"{name}.json.gz"
    if path.is_file():
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and it will be made anew") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"{path} was written by another version of this code: delete it, and it will be made anew")
        return found["data"]
    result = build()
    text = json.dumps({"format": FORMAT, "data": result}, ensure_ascii=False, separators=(",", ":"))
    # without a time in its head: the same data make the same file
    write(path, lambda new: new.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0)))
    return result


def digest(*parts: Any) -> str:
    """SHA-256, in hex, of numbers, texts, lists and dicts."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
