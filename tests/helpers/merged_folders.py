"""Merged models in folders: what `to_merged` is compared with."""

import copy
import warnings

import torch

from helpers.models import adapt
from randlora.export import to_merged

HEADER = 8


def merged_model(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties
        return copy.deepcopy(model).merge_and_unload()


def assert_same(got, expected):
    assert sorted(got) == sorted(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name], tensor), name


def assert_loads_as(folder, expected, dtype=None):
    """Plain transformers makes of the folder the very same model."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = type(expected).from_pretrained(folder, torch_dtype=dtype or expected.dtype)
    assert_same(loaded.state_dict(), expected.state_dict())
    if loaded.config.model_type == "llama" and loaded.dtype == torch.float32:  # .to() casts buffers, too, for others
        ids = torch.tensor([[1, 5, 2]])
        assert torch.equal(loaded.eval()(ids).logits, expected.eval()(ids).logits)


def written_and_loaded(adapter, model, folder, expected, **settings):
    """``to_merged`` of the adapter's folder and of the model: where each is, after plain transformers has loaded it."""
    for given in (adapter, model):
        out = folder / type(given).__name__
        to_merged(given, out, **settings)
        assert_loads_as(out, expected)
        yield out


def saved(plain, folder, **settings):
    """The base's folder, the adapter's, and the adapted model."""
    base, adapter = folder / "base", folder / "adapter"
    plain.save_pretrained(base)
    plain.name_or_path = str(base)
    (base / "tokenizer.json").write_text("of the base")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes")
    (base / "pytorch_model.bin").write_bytes(b"weights")
    settings = {"target_modules": ["q_proj", "down_proj"]} | settings
    model = adapt(plain, **settings)
    for module in model.modules():
        if hasattr(module, "modules_to_save"):
            with torch.no_grad():
                for parameter in module.modules_to_save.parameters():
                    parameter.add_(0.25)
    model.save_pretrained(adapter)
    return base, adapter, model


def left(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("base", "adapter"))
