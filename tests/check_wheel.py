"""Checks a wheel that is installed where there is nothing but it, its dependencies and the PyTorch it was built for.

python -I tests/check_wheel.py
"""

import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

import randlora

KINDS = ("dense", "hadamard", "sparse", "very_sparse", "sign")


def check_metadata():
    assert Path(randlora.__file__).is_relative_to(sys.prefix), f"{randlora.__file__} is not that of the environment"
    assert metadata.version("randlora") == randlora.__version__ == randlora.build_info()["version"]
    minor = ".".join(torch.__version__.split(".")[:2])
    required = next(text for text in metadata.requires("randlora") if text.startswith("torch"))
    assert required == f"torch=={minor}.*", f"built against torch {minor}, the wheel requires {required}"


def check_kind(kind, folder):
    """The layers' outputs are those of the merged weights in float64; training, saving and loading keep that so."""
    torch.manual_seed(0)

    def base():
        torch.manual_seed(1)
        return torch.nn.Sequential(torch.nn.Linear(13, 37), torch.nn.Tanh(), torch.nn.Linear(37, 11)).double()

    config = randlora.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["0", "2"], kind=kind)
    model = randlora.get_peft_model(base(), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(7, 13, dtype=torch.float64)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = model(x).square().mean()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(x)
        assert after.square().mean() < before
        model.save_pretrained(folder)
        loaded = randlora.RandLoraModel.from_pretrained(base(), folder)
        torch.testing.assert_close(loaded(x), after)
        assert (after - base()(x)).abs().max() > 0.1
        torch.testing.assert_close(model.merge_and_unload()(x), after, rtol=1e-5, atol=1e-5)


def main():
    check_metadata()
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            check_kind(kind, folder)
    print(f"randlora {randlora.__version__} works:", ", ".join(f"{k} {v}" for k, v in randlora.build_info().items()))


if __name__ == "__main__":
    main()
