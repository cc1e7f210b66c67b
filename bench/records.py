"""The CSV files under bench/results/<machine>/: one row per provider and case, with all that the number depends on.

A new row replaces the old row of the same key where it stands, and says so. Files are written whole and moved into
place: stopping in the middle loses nothing.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.measure import Comparison

RESULTS = ROOT / "bench" / "results"

# Of every question; its own columns come before these.
RUN_KEY = ("provider", "device", "threads", "pages", "mode")

EVERYTHING = "every provider"  # the provider of a row that says why a case could not be set up; other rows end it


class Book:
    """The records of one question on this machine.

    Args:
        question: names the file.
        case: the columns that tell this question's cases apart; with `RUN_KEY` they make a row's key.
        options: what `measure.parse` returned.
    """

    def __init__(self, question: str, case: Sequence[str], options: Any) -> None:
        self.key = (*case, *RUN_KEY)
        self.device = options.device
        self.run = {
            "device": torch.device(options.device).type,
            "threads": options.threads,
            "pages": "2 MB" if options.huge_pages else "default",
            "mode": "quick" if options.quick else "full",
        }
        self.environment = {"command": options.command} | environment(options.device)
        folder = machine_folder(options.results, self.environment)
        self.path = folder / f"{question}.csv"
        (folder / "machine.json").write_text(json.dumps(machine(options.device), indent=2) + "\n")

    def add(self, case: Mapping[str, Any], comparison: Comparison, extra: Mapping[str, Mapping[str, Any]]) -> None:
        """Record a case. `extra`: provider -> further columns. Providers without samples or a reason are left alone."""
        rows = {}
        for name, timing in comparison.timings.items():
            if not timing.samples and not timing.failed:
                continue
            rows[name] = {
                "median_ms": _digits(1e3 * timing.median),
                "fastest_ms": _digits(1e3 * min(timing.samples, default=math.nan)),
                "q20_ms": _digits(1e3 * timing.quantile(0.2)) if timing.samples else "",
                "q80_ms": _digits(1e3 * timing.quantile(0.8)) if timing.samples else "",
                "baseline": comparison.baseline,
                "times_faster": _digits(comparison.ratio(name)),
                "samples": len(timing.samples),
                "calls_per_sample": timing.calls,
                "relative_error": _digits(timing.error),
                "failed": timing.failed,
                **extra.get(name, {}),
                "load": _digits(comparison.load),
            }
        self.put(case, rows, comparison.interrupted)

    def put(self, case: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], interrupted: bool = False) -> None:
        """Record rows without times, or whatever :meth:`add` has found. `found`: provider -> columns."""
        rows = [{**case, "provider": name, **self.run, **row, **self.environment} for name, row in found.items()]
        missing = {column for row in rows for column in self.key if column not in row}
        if missing:
            raise ValueError(f"{self.path.name}: a row needs all of {self.key}, this one lacks {sorted(missing)}")
        if rows:
            _merge(self.path, rows, self.key, interrupted)


def machine_folder(results: Path, about: Mapping[str, str]) -> Path:
    """Where results of this machine go. `about`: of :func:`environment`."""
    # Machines of one name may differ in what they can do, and then in which kernels run.
    name = about["gpu"] or f"{about['cpu']} {about['cpu_capability']} {os.cpu_count()} cores"
    folder = results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def put_beside(options: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """`rows` as ``<machine>/kernels/<name>.csv``, apart from the tables of times that REPORT.md is made from."""
    folder = machine_folder(options.results, environment(options.device)) / "kernels"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.csv"
    write(path, dict.fromkeys(key for row in rows for key in row), rows)
    return path


def write(path: Path, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """A CSV, whole and moved into place; what a row does not say stays empty."""
    partial = path.with_suffix(".csv.part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _merge(path: Path, rows: list[dict[str, Any]], key: Sequence[str], interrupted: bool) -> None:
    table = read(path) if path.exists() else []
    if old := [row for row in table if any(column not in row for column in key)]:
        # Nobody can tell which case they are: a program of another day told fewer things apart.
        print(f"  drops {len(old)} rows of {path.name} (of {old[0]['date']}): they do not say all of {', '.join(key)}")
        table = [row for row in table if row not in old]
    places = {tuple(row[k] for k in key): i for i, row in enumerate(table)}
    for row in rows:
        row = {column: str(value) for column, value in row.items()}
        i = places.get(tuple(row[k] for k in key))
        if i is None:
            places[tuple(row[k] for k in key)] = len(table)
            table.append(row)
            continue
        old = table[i]
        if interrupted and int(row["samples"]) < int(old["samples"] or 0):
            print(f"  keeps {row['provider']}: {_said(old)} ({old['date']}, {old['samples']} samples)")
        else:
            print(f"  replaces {row['provider']}: {_said(old)} ({old['date']}, {old['commit']}) by {_said(row)}")
            table[i] = row
    done = {tuple(str(row[k]) for k in key if k != "provider") for row in rows if row["provider"] != EVERYTHING}
    table = [
        row
        for row in table
        if row["provider"] != EVERYTHING or tuple(row[k] for k in key if k != "provider") not in done
    ]
    write(path, columns(table), table)


def columns(table: list[dict[str, str]]) -> list[str]:
    """All columns there are, in the newest row's order, others before those of :func:`environment`."""
    newest = list(table[-1])
    other = dict.fromkeys(column for row in table for column in row if column not in newest)
    at = newest.index("date") if "date" in newest else len(newest)
    return [*newest[:at], *other, *newest[at:]]


def _said(row: Mapping[str, str]) -> str:
    """What a row says, in short."""
    if row.get("failed"):
        return f'"{row["failed"]}"'
    if row.get("median_ms"):
        return f"{row['median_ms']} ms"
    peak = row.get("peak_total_bytes")
    return f"a peak of {int(peak) / 2**20:.1f} MiB" if peak else "nothing"


def _digits(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


# ---- what the numbers depend on ----


def environment(device: str) -> dict[str, str]:
    """Columns of every row."""
    import randlora

    on_gpu = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "commit": _commit(),
        "randlora": randlora.__version__,
        "torch": torch.__version__,
        "peft": _version("peft"),
        "cpu": _cpu_model(),
        "cpu_capability": randlora.build_info()["cpu_capability"],
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "",
        "driver": _nvidia_smi("driver_version") if on_gpu else "",
        "clock": _nvidia_smi("clocks.sm") if on_gpu else "",
    }


def machine(device: str) -> dict[str, Any]:
    """The description that lies beside the results."""
    import randlora

    gpu = torch.cuda.get_device_properties(device) if torch.device(device).type == "cuda" else None
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "transparent_hugepages": pages.read_text().strip() if pages.exists() else "unknown",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "gpu": gpu
        and {"name": gpu.name, "memory_GiB": gpu.total_memory >> 30, "processors": gpu.multi_processor_count},
        "randlora": randlora.build_info(),
        "torch_cuda": torch.version.cuda,
    }


def _commit() -> str:
    """BENCH_COMMIT, as a copy of a checkout may have the git of another time; or of the checkout, with a "+" where what
    is compiled or imported has changed since.
    """
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    try:
        head = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
        return head + ("+" if _output("git", "-C", str(ROOT), "status", "--porcelain", "csrc", "randlora") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _nvidia_smi(field: str) -> str:
    try:
        return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
