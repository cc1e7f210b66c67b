"""Models whose weights accelerate keeps elsewhere; importing it skips where accelerate is not installed."""

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

ways = pytest.mark.parametrize("way", ["cpu", "disk", "map"])


def offloaded(model, way, folder):
    """`model` offloaded: all of it, or by a device map the parts that are not first."""
    if way == "cpu":
        return accelerate.cpu_offload(model, torch.device("cpu"))
    if way == "disk":
        return accelerate.disk_offload(model, str(folder), torch.device("cpu"))
    inner = getattr(model, "model", model)
    prefix = "" if inner is model else "model."
    names = ["embed", *(f"layers.{i}" for i in range(len(inner.layers))), "head"]
    return accelerate.dispatch_model(
        model, {prefix + name: "disk" if i > 1 else "cpu" for i, name in enumerate(names)}, offload_dir=str(folder)
    )
