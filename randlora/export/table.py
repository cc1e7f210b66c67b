"""What an export to LoRA tells: a dict of numbers that prints as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tables import aligned

MIB = 1 << 20


class LoraExport(dict):
    """The result of :func:`randlora.export.to_lora`: a dict fit for ``json``; ``str()`` is a table."""

    def __str__(self) -> str:
        lines = [
            f"adapter {self['adapter']!r} as LoRA of rank {self['rank']}, {len(self['layers'])} layers, "
            f"{self['dtype']}, {_size(self['file_bytes'])}",
            "",
            *aligned(_rows(self), left=1),
            "",
        ]
        if "logits" in self:
            logits = self["logits"]
            lines += [
                f"on the inputs: outputs differ by {logits['largest_difference']:.3g} at most, and go up to "
                f"{logits['largest']:.3g}; {logits['same_largest']:.1%} of the places have the same argmax",
                "",
            ]
        return "\n".join([*lines, *(f"- {note}" for note in self["notes"])])

    def as_markdown(self) -> str:
        """The same for a model card: what is lost, in a line."""
        lost = "nothing but rounding is lost" if self["exact"] else f"{self['energy']:.2%} of its energy is kept"
        return f"rank {self['rank']}; {lost} (relative error {self['error']:.2g})"


def _rows(result: Mapping[str, Any]) -> list[list[str]]:
    head = ["layer", "in", "out", "rank of the update", "rank", "energy kept", "relative error"]
    rows = [[
        layer["name"], f"{layer['in_features']}", f"{layer['out_features']}", f"{layer['update_rank']}",
        f"{layer['rank']}", _share(layer["energy"], layer["exact"]), f"{layer['error']:.2g}",
    ] for layer in result["layers"]]  # fmt: skip
    rows.append(["all", "", "", "", "", _share(result["energy"], result["exact"]), f"{result['error']:.2g}"])
    return [head, *rows]


def _size(number: int) -> str:
    return f"{number / MIB:,.1f} MiB" if number >= MIB else f"{number / 1024:,.1f} KiB"


def _share(energy: float, exact: bool) -> str:
    return "exact" if exact else f"{100 * energy:.2f}%"


def notes_of(
    result: Mapping[str, Any], settings: Mapping[str, Any], energy: float | None, zero: bool = False
) -> list[str]:
    """What is lost, and what servers take and refuse: what was read in vLLM and llama.cpp's converter."""
    notes, largest = [], result["rank"]
    needed = max(layer["rank"] for layer in result["layers"])
    if zero:
        notes.append("all updates are zero: this adapter was not trained")
    elif not result["exact"]:
        notes.append("energy: the share of the squares of an update's numbers; error: |dW - BA| / |dW|, as written")
    if needed < largest:
        notes.append(f"no layer needs more than rank {needed}: rank={needed} gives the same in a smaller file")
    if energy is not None and result["dtype"] in ("bfloat16", "float16"):
        notes.append("ranks were chosen before numbers were rounded to 16 bits, energy and errors were measured after")
    served = next((rank for rank in VLLM_RANKS if rank >= largest), None)
    if served is None:
        notes.append(f"vLLM serves ranks up to {VLLM_RANKS[-1]}, this is {largest}: give a smaller rank")
    else:
        notes.append(f"vLLM: serve it with --enable-lora --max-lora-rank {served}")
    if settings["modules_to_save"]:
        names = ", ".join(settings["modules_to_save"])
        if set(settings["modules_to_save"]) <= set(VLLM_HEADS):
            notes.append(f"vLLM takes modules_to_save ({names}) from 0.31 on, for models that classify")
        else:
            notes.append(f"vLLM refuses modules_to_save ({names}): merge the adapter into the model for it")
    if settings["bias"] != "none":
        notes.append(f"vLLM refuses bias={settings['bias']!r}: merge the adapter into the model for it")
    if settings["rank_pattern"]:
        notes.append(
            "llama.cpp takes one lora_alpha for all layers and would scale those of other ranks: per_layer=False"
        )
    return notes


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
VLLM_HEADS = ("score", "classifier")  # modules to save that it has a place for
