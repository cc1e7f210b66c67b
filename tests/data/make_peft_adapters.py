"""Writes tests/data/peft_adapters/<PEFT's version>/<case>: adapters that PEFT itself saved, with inputs and outputs.

    for v in 0.16.0 0.17.1 0.19.1 0.21.2; do uv run --no-project --with peft==$v tests/data/make_peft_adapters.py; done

Old versions of PEFT need an old transformers (0.16: <4.54, 0.17: <4.57, 0.19: <5.1). The models are built from
integers, so the tests build the same ones.
"""

import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).parent / "peft_adapters"

# case -> fields of RandLoraConfig; r = 3 and sizes that it does not divide
CASES = {
    "dense": {"target_modules": ["up", "square", "down"]},
    "dense_drawn": {"target_modules": ["up", "square", "down"], "save_projection": False, "projection_prng_key": 7},
    "sparse": {"target_modules": ["up", "down"], "sparse": True},
    "sparse_drawn": {"target_modules": ["up", "down"], "sparse": True, "save_projection": False},
    "very_sparse": {"target_modules": ["up", "down"], "very_sparse": True},
    "very_sparse_drawn": {"target_modules": ["up", "down"], "very_sparse": True, "save_projection": False, "r": 4},
    # in and out dimensions of different layers: PEFT's bases are larger than any layer needs
    "one_way": {"target_modules": ["up", "conv"], "fan_in_fan_out": True},
    "one_way_drawn": {"target_modules": ["up", "conv"], "save_projection": False, "r": 5},
    "trained_beside": {"target_modules": r".*(up|down)", "modules_to_save": ["head"], "bias": "randlora_only"},
    "all_biases": {"target_modules": ["down"], "modules_to_save": ["head"], "bias": "all", "randlora_dropout": 0.5},
    "one_block": {"target_modules": ["mix"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "bf16": {"target_modules": ["up", "down"]},
    "bf16_uncast": {"target_modules": ["up", "down"]},
}


def numbers(*shape, seed=0):
    """Numbers in (-0.5, 0.5) that are the same everywhere."""
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + 1
    return (((k * 48271 + seed * 69621) % 2147483647 * 16807 % 4093 - 2046).float() / 4096).reshape(shape)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.mix(self.norm(x))


class TinyModel(nn.Module):
    """Every shape of layer: in < out, in = out, in > out, Conv1D, in a list of blocks, and a head."""

    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.up, self.square, self.down = nn.Linear(8, 13), nn.Linear(13, 13), nn.Linear(13, 7)
        self.body = nn.ModuleDict({"blocks": nn.ModuleList([Block(7), Block(7)])})
        self.conv, self.head = Conv1D(11, 7), nn.Linear(11, 3)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(numbers(*parameter.shape, seed=seed))

    def forward(self, x):
        x = self.down(self.square(torch.tanh(self.up(x))).relu())
        for block in self.body["blocks"]:
            x = block(x)
        return self.head(torch.tanh(self.conv(x)))


def make_model(case):
    return TinyModel().to(torch.bfloat16 if case.startswith("bf16") else torch.float32).eval()


def main():
    import peft
    from safetensors.torch import save_file

    for case, fields in CASES.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(
                make_model(case),
                peft.RandLoraConfig(**({"r": 3, "randlora_alpha": 6} | fields)),
                autocast_adapter_dtype=case != "bf16_uncast",
            )
        with torch.no_grad():
            for seed, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    parameter.add_(numbers(*parameter.shape, seed=100 + seed))
        folder = FOLDER / peft.__version__ / case
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(str(folder))
        # What PEFT makes of its own file: up to 0.20 it forgets to write trained biases.
        model = peft.PeftModel.from_pretrained(
            make_model(case), str(folder), autocast_adapter_dtype=case != "bf16_uncast"
        )
        x = numbers(5, 8, seed=1000).to(next(model.parameters()).dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model.eval()(x)
            with model.disable_adapter():
                assert (output - model(x)).abs().max() > 0.05, "the adapter does next to nothing"
        save_file({"input": x, "output": output}, str(folder / "sample.safetensors"))
        (folder / "README.md").unlink(missing_ok=True)
        (folder / "sample.safetensors").chmod(0o644)
        (folder / "adapter_model.safetensors").chmod(0o644)
        print(folder, sum(p.stat().st_size for p in folder.iterdir()))


if __name__ == "__main__":
    sys.exit(main())
