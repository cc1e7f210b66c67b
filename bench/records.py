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
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bench import ROOT
from bench.measure import Comparison

RESULTS = ROOT / "bench" / "results"

# Of every question; its own columns come before these.
RUN_KEY = ("provider", "device", "threads", "pages", "mode")


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
        self.environment = environment(options.device)
        name = self.environment["gpu"] or f"{self.environment['cpu']} {os.cpu_count()} cores"
        folder = options.results / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{question}.csv"
        (folder / "machine.json").write_text(json.dumps(machine(options.device), indent=2) + "\n")

    def add(self, case: Mapping[str, Any], comparison: Comparison, extra: Mapping[str, Mapping[str, Any]]) -> None:
        """Record a case. `extra`: provider -> further columns. Providers without samples or a reason are left alone."""
        rows = []
        for name, timing in comparison.timings.items():
            if not timing.samples and not timing.failed:
                continue
            measured = {
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
            }
            surroundings = {"load": _digits(comparison.load)} | self.environment
            rows.append({**case, "provider": name, **self.run, **measured, **extra.get(name, {}), **surroundings})
        _merge(self.path, rows, self.key, comparison.interrupted)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _merge(path: Path, rows: list[dict[str, Any]], key: Sequence[str], interrupted: bool) -> None:
    table = read(path) if path.exists() else []
    places = {tuple(row.get(k, "") for k in key): i for i, row in enumerate(table)}
    for row in rows:
        row = {column: str(value) for column, value in row.items()}
        i = places.get(tuple(row[k] for k in key))
        if i is None:
            table.append(row)
            continue
        old = table[i]
        if interrupted and int(row["samples"]) < int(old["samples"]):
            print(f"  keeps {row['provider']}: {old['median_ms']} ms ({old['date']}, {old['samples']} samples)")
        else:
            print(
                f"  replaces {row['provider']}: {old['median_ms']} ms ({old['date']}, {old['commit']}) by "
                f"{row['median_ms']} ms"
            )
            table[i] = row
    columns = list(dict.fromkeys(column for row in reversed(table) for column in row))
    partial = path.with_suffix(".csv.part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    partial.replace(path)


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
    """Of the checkout; "+" where what is compiled or imported has changed since."""
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
