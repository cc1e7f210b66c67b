"""prng="peft" and "peft-fp16": bit for bit the bases that PEFT itself draws."""

import pytest
import torch
from helpers.common import FLOATS, over

from randlora import RandomBases

peft = pytest.importorskip("peft")
from peft.tuners.randlora import model as peft_model  # noqa: E402

FLAGS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
# Name and (in, out) of the layers of a model, and the sizes that PEFT finds for it.
MODELS = {
    "square": ({"q": (40, 40)}, 40, 40),
    "mlp": ({"up": (24, 50), "down": (50, 24)}, 50, 50),
    "tall": ({"q": (41, 24)}, 41, 24),
}


def peft_bases(layers, kind, r, seed, **arguments):
    """What PEFT draws for a model with these layers."""
    model = torch.nn.ModuleDict({name: torch.nn.Linear(*shape) for name, shape in layers.items()})
    config = peft.RandLoraConfig(r=r, target_modules=list(layers), projection_prng_key=seed, **FLAGS[kind])
    store = peft.get_peft_model(model, config, **arguments).base_model
    return store.randlora_A["default"], store.randlora_B["default"]


@pytest.mark.parametrize("bf16", [True, False], ids=["peft", "peft-fp16"])
@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("model", MODELS)
def test_values_of_peft(model, kind, bf16, monkeypatch):
    """PEFT draws dense bases in bf16, or in fp16 where it finds no bf16: other numbers (fact 15)."""
    monkeypatch.setattr(peft_model, "is_bf16_available", lambda *_, **__: bf16)
    layers, max_dim, min_dim = MODELS[model]
    for r, seed in ((5, 0), (7, 42), (32, 2**40 + 1)):
        theirs = peft_bases(layers, kind, r, seed, autocast_adapter_dtype=False)
        ours = RandomBases(max_dim, min_dim, r, kind=kind, seed=seed, prng="peft" if bf16 else "peft-fp16")
        for got, expected in zip(ours.to(theirs[0].dtype).tensors(), theirs, strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        for got, expected in zip((ours.A, ours.B), peft_bases(layers, kind, r, seed), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, expected), "PEFT's default: cast to fp32"
        assert ours.scale == 1


def test_bf16_and_fp16_draws_differ():
    one, other = (RandomBases(40, 40, 5, prng=prng) for prng in ("peft", "peft-fp16"))
    assert (one.B - other.B).abs().max() > 1
    assert one.fingerprint() != other.fingerprint() != RandomBases(40, 40, 5).fingerprint()


@over("dtype", FLOATS)
def test_dtypes_are_casts_of_one_draw(dtype):
    bases = RandomBases(41, 24, 5, prng="peft")
    for cast, own in zip(bases.tensors(dtype), bases.tensors(torch.bfloat16), strict=True):
        assert cast.dtype == dtype and torch.equal(cast, own.to(dtype))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    RandomBases(41, 24, 5, prng="peft").tensors()
    RandomBases(41, 24, 5).tensors()
    assert torch.equal(torch.rand(3), expected)


def test_very_sparse_density_is_pefts():
    """Fact 17: 1 - 1/sqrt(D) zeros in both, not the documented 1 - 2/sqrt(D)."""
    theirs = peft_bases({"q": (400, 400)}, "very_sparse", 16, 3)[1]
    ours = RandomBases(400, 400, 16, kind="very_sparse", seed=3).B
    for values in (theirs, ours):
        assert abs((values == 0).double().mean().item() - 0.95) < 5 * (0.05 * 0.95 / values.numel()) ** 0.5
