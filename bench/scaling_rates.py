"""What the scaling question calculates with: measured numbers read from bench/results, and assumed ones.

==================  ========  ================================================================================
number              is        where it comes from; where a measured one enters
==================  ========  ================================================================================
product, copy       measured  product_G_per_s and copy_GB_per_s in the GPU's model.csv; read from there
memory              measured  memory_GiB in the GPU's machine.json; read from there
passes              measured  nvidia-h200/model.csv: steps of Llama-3.2-3B, all linear layers, 8 x 1024 tokens.
                              Assumed for an H100; its own rows of :data:`LARGE` are read once they are there
host                measured  nvidia-h100-80gb-hbm3/model.csv: steps of Llama-3.2-3B, q and v, 4 x 210 tokens,
                              which the host decides. Assumed for an H200; likewise, :data:`SMALL`
NVLINK, INFINIBAND  assumed   the data sheets
LINK_PART           assumed   here, from nccl-tests: busbw of all_gather_perf and all_reduce_perf over the link
HOPS                assumed   here, from nccl-tests: the time of 8 bytes in all_reduce_perf over the hops
RESERVE             assumed   here: what nvidia-smi shows less torch.cuda.max_memory_allocated()
FORWARD_PASSES      assumed   here: ``python -m bench linear --pass forward,backward`` on a GPU
==================  ========  ================================================================================

:func:`of` tells of every number which it was for that GPU; the report prints it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from bench import records, scaling_model
from bench.scaling_model import DENSE, FROZEN, HADAMARD, LORA, Part

NODE = 8  # GPUs that NVLink joins

# Assumed. Bytes per second in one direction: NVLink 4 per GPU; InfiniBand NDR, 400 Gb/s, an adapter per GPU.
NVLINK, INFINIBAND = 450e9, 50e9
LINK_PART = 0.8  # assumed: of a link, what a large collective reaches
HOPS = {"node": 2e-6, "network": 6e-6}  # assumed: seconds per hop
RESERVE = 3 << 30  # assumed: CUDA's context, NCCL's buffers, what the allocator cannot use
FORWARD_PASSES = 1 / 3  # assumed: of the passes over activations of a step, the forward's part

FOLDERS = {"h100": "nvidia-h100-80gb-hbm3", "h200": "nvidia-h200"}
LARGE = {"model": "Llama-3.2-3B", "depth": "28/28", "targets": "all-linear", "batch": "8", "tokens": "1024"}
SMALL = {"model": "Llama-3.2-3B", "depth": "28/28", "targets": "q_proj v_proj", "batch": "4", "tokens": "210"}
LAYERS = 7  # of a block, that have adapters here
PROVIDERS = {
    FROZEN: "frozen", DENSE: "randlora", HADAMARD: "randlora hadamard", LORA: "PEFT LoRA, 16-bit",
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number of the calculation: whether it was measured, and where, or what was assumed."""

    name: str
    value: float
    unit: str
    measured: bool
    source: str


@dataclass(frozen=True)
class Rates:
    """Of one GPU.

    Attributes:
        product: multiply-adds per second of large bf16 products. copy: bytes per second, read and written ones.
        passes: method -> how many times the inputs and outputs of the adapted layers (of all layers: ``frozen``) are
            moved in a step, beside the products. host: method -> least seconds of a block's forward and backward.
        memory: bytes. numbers: all of these, with their sources.
    """

    name: str
    product: float
    copy: float
    passes: Mapping[str, float]
    host: Mapping[str, float]
    memory: int
    numbers: tuple[Number, ...]

    def forward_seconds(self, part: Part) -> float:
        return part.forward_multiply_adds / self.product + FORWARD_PASSES * self._moving(part)

    def backward_seconds(self, part: Part) -> float:
        return part.backward_multiply_adds / self.product + (1 - FORWARD_PASSES) * self._moving(part)

    def _moving(self, part: Part) -> float:
        return self.passes[part.method] * part.bytes / self.copy


@cache
def of(gpu: str) -> Rates:
    """Raises ``KeyError`` for a GPU that is not among :data:`FOLDERS`."""
    folder = records.RESULTS / FOLDERS[gpu]
    own = next(row for row in records.read(folder / "model.csv") if row["dtype"] == "bfloat16")
    product, copy = 1e9 * float(own["product_G_per_s"]), 1e9 * float(own["copy_GB_per_s"])
    about = json.loads((folder / "machine.json").read_text())["gpu"]
    GiB = about["memory_GiB"]
    numbers = [
        Number("product", product / 1e12, "T multiply-adds/s in bf16", True, f"{folder.name}/model.csv"),
        Number("copy", copy / 1e9, "GB/s", True, f"{folder.name}/model.csv"),
        Number("memory", GiB, "GiB", True, f"{folder.name}/machine.json"),
    ]
    passes, host = {}, {}
    for method, value, measured, source in _passes(gpu):
        passes[method] = value
        numbers.append(Number(f"passes, {method}", value, "", measured, source))
    for method, value, measured, source in _host(gpu):
        host[method] = value
        numbers.append(Number(f"host, {method}", 1e3 * value, "ms a block", measured, source))
    numbers += [
        Number("NVLINK", NVLINK / 1e9, "GB/s a direction and GPU", False, "NVLink 4"),
        Number("INFINIBAND", INFINIBAND / 1e9, "GB/s a direction and GPU", False, "NDR, an adapter per GPU"),
        Number("LINK_PART", LINK_PART, "", False, "to be measured: nccl-tests"),
        *(Number(f"HOPS, {where}", 1e6 * value, "us", False, "to be measured: nccl-tests")
          for where, value in HOPS.items()),
        Number("RESERVE", RESERVE / 2**30, "GiB", False, "to be measured: nvidia-smi"),
        Number("FORWARD_PASSES", FORWARD_PASSES, "", False, "to be measured: python -m bench linear"),
    ]  # fmt: skip
    return Rates(about["name"], product, copy, passes, host, GiB << 30, tuple(numbers))


def _measured(gpu: str, case: Mapping[str, str]) -> tuple[dict[str, dict[str, str]], bool, str]:
    """Rows of a case by method: this GPU's, or another's; whether they are its own; and the file."""
    for name in (gpu, *(other for other in FOLDERS if other != gpu)):
        path = records.RESULTS / FOLDERS[name] / "model.csv"
        rows = {row["provider"]: row for row in records.read(path) if all(row[k] == v for k, v in case.items())}
        if all(provider in rows for provider in PROVIDERS.values()):
            found = {method: rows[provider] for method, provider in PROVIDERS.items()}
            return found, name == gpu, f"{path.parent.name}/model.csv"
    raise LookupError(f"no model.csv has all of {', '.join(PROVIDERS.values())} for {dict(case)}")


def _passes(gpu: str) -> Iterator[tuple[str, float, bool, str]]:
    """Of each method: what a step took beside its products, over what moving its inputs and outputs once takes."""
    rows, own, file = _measured(gpu, LARGE)
    tokens, sequence = int(LARGE["batch"]) * int(LARGE["tokens"]), int(LARGE["tokens"])
    model = scaling_model.describe(LARGE["model"], tokens, sequence, int(rows[FROZEN]["r"]))
    seconds = {method: float(row["median_ms"]) / 1e3 for method, row in rows.items()}
    for method, row in rows.items():
        product, copy = 1e9 * float(row["product_G_per_s"]), 1e9 * float(row["copy_GB_per_s"])
        blocks = model.block_work if method == FROZEN else model.adapters[method].work
        parts = [(model.depth, blocks), (1, model.ends_work)] if method == FROZEN else [(model.depth, blocks)]
        products = sum(times * (p.forward_multiply_adds + p.backward_multiply_adds) for times, p in parts) / product
        moving = sum(times * part.bytes for times, part in parts) / copy
        beyond = seconds[method] - (0 if method == FROZEN else seconds[FROZEN])
        yield method, (beyond - products) / moving, own, file


def _host(gpu: str) -> Iterator[tuple[str, float, bool, str]]:
    """Of each method: seconds a block, with an adapter on all of its layers."""
    rows, own, file = _measured(gpu, SMALL)
    model = scaling_model.MODELS[SMALL["model"]]
    depth, layers = model.full.depth, len(SMALL["targets"].split())
    frozen = float(rows[FROZEN]["median_ms"]) / 1e3
    for method, row in rows.items():
        adapter = (float(row["median_ms"]) / 1e3 - frozen) / layers * LAYERS
        yield method, (frozen + adapter) / depth, own, file
