"""Adapter files: what is saved comes back, bit for bit, with the bases that it was trained with."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import CARD, CONFIG, WEIGHTS, assert_same_numbers, bases_of, described, keys_of, load
from helpers.common import over, run_python
from helpers.models import IDS, adapt, add, assert_computes, layers_of, net, numbered, randomize, snapshot
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import randlora
from randlora.bases import peft_prng

# ---- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="dense"),
        pytest.param({"kind": "sparse", "projection_prng_key": 2**64 - 1}, id="sparse-largest-seed"),
        pytest.param({"kind": "sparse", "sparsity": 2.5}, id="sparsity"),
        pytest.param({"very_sparse": True, "r": 3}, id="very_sparse"),
        pytest.param({"kind": "sign", "target_modules": "all-linear"}, id="sign"),
        pytest.param({"kind": "hadamard", "target_modules": "all-linear"}, id="hadamard"),
        pytest.param(
            {"kind": "hadamard", "group_width": 2, "r": 3, "projection_prng_key": 2**63 + 1}, id="group_width"
        ),
        pytest.param({"num_bases": 2, "randlora_alpha": 2.7}, id="num_bases"),
        pytest.param({"prng": "peft", "projection_prng_key": 5}, id="peft"),
        pytest.param({"prng": "peft-fp16", "very_sparse": True}, id="peft-fp16"),
        pytest.param({"r": 50, "target_modules": r".*\.1\..*"}, id="r-larger-than-layers"),
        pytest.param({"target_modules": ["up_proj"], "layers_to_transform": [1]}, id="one-layer"),
    ],
)
@pytest.mark.parametrize("save_projection", [True, False])
def test_round_trip(tmp_path, settings, save_projection):
    model = adapt(net(), save_projection=save_projection, **settings)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_numbers(model, again)
    assert_computes(again, ["default"])
    assert again.peft_config["default"].strategy == "auto"
    other = load(tmp_path)
    assert (
        next(iter(layers_of(other).values())).bases["default"] is next(iter(layers_of(again).values())).bases["default"]
    )


def test_settings_of_ours_come_back(tmp_path):
    model = adapt(net(), strategy="factored", randlora_dropout=0.25, kind="sign", num_bases=3)
    model.save_pretrained(tmp_path)
    config = randlora.RandLoraConfig.from_pretrained(tmp_path)
    assert (config.strategy, config.randlora_dropout, config.kind, config.num_bases) == ("factored", 0.25, "sign", 3)
    layer = next(iter(layers_of(load(tmp_path)).values()))
    assert layer.strategy == "factored" and layer.randlora_dropout["default"].p == 0.25


def test_several_adapters_have_folders_of_their_own(tmp_path):
    model = adapt(net())
    add(model, "b", 2, r=3, kind="sparse", target_modules=["up_proj"])
    add(model, "c", 3, projection_prng_key=9, save_projection=False)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, CARD, "b", "c"}
    again = load(tmp_path)
    again.load_adapter(tmp_path / "b", "b")
    again.load_adapter(str(tmp_path / "c"), "other")
    for name, there in (("default", "default"), ("b", "b"), ("c", "other")):
        assert_same_numbers(model, again, name, there)
    again.set_adapter(["b", "other"])
    assert_computes(again, ["b", "other"])
    model.save_pretrained(tmp_path / "one", selected_adapters=["c"])
    assert {p.name for p in (tmp_path / "one").iterdir()} == {CARD, "c"}
    with pytest.raises(ValueError, match="no adapter named 'd'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["d"])
    assert not (tmp_path / "none").exists()


def test_saved_while_merged_or_disabled(tmp_path):
    model = adapt(net())
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_adapter()
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    before = (tmp_path / "before" / WEIGHTS).read_bytes()
    assert all((tmp_path / name / WEIGHTS).read_bytes() == before for name in ("merged", "disabled"))


@over("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_models(tmp_path, dtype):
    model = adapt(net(dtype))
    model.save_pretrained(tmp_path)
    assert_same_numbers(model, load(tmp_path, net(dtype)))
    assert_same_numbers(model, load(tmp_path, net(torch.float32)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(12, 2, batch_first=True, add_bias_kv=True), nn.LayerNorm(12)
        self.out = nn.Linear(12, 5)

    def forward(self, x):
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]))


@pytest.mark.parametrize("targets", [["attention"], ["attention.out_proj"], "all-linear"], ids=str)
@pytest.mark.parametrize("bias", ["none", "all", "randlora_only"])
def test_multihead_attention(tmp_path, targets, bias):
    plain = numbered(Attention().double())
    x = torch.linspace(-1, 1, 72, dtype=torch.float64).reshape(2, 3, 12)
    config = randlora.RandLoraConfig(r=5, randlora_alpha=4, target_modules=targets, bias=bias)
    model = randomize(randlora.get_peft_model(numbered(Attention().double()), config))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name.rpartition(".")[2].startswith("bias") and p.requires_grad:
                p.add_(0.2 * torch.cos(torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape) + i))
    model.eval().save_pretrained(tmp_path)
    again = load(tmp_path, numbered(Attention().double()))
    torch.testing.assert_close(again(x), model(x), rtol=1e-12, atol=1e-12)
    assert (model(x) - plain(x)).abs().max() > 0.01
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "RANDLORA_PHILOX"
    assert not any("randlora_A" in key for key in keys_of(tmp_path)), "PEFT refuses it: no one needs them"


def test_biases_and_modules_to_save(tmp_path):
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["head", "layers.1.up_proj"], "bias": "all"}
    model = adapt(net(), **settings)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad and "randlora" not in name:
                p.add_(0.1 * i)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, is_trainable=True)
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    assert (net()(IDS) - model(IDS)).abs().max() > 0.1
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in again.named_parameters() if p.requires_grad} == trained
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("whose", ["ours", "peft's"])
@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_a_bias_that_an_adapted_layer_shares(bias, whose, tmp_path):
    """Its first name need not be that of the layer; PEFT writes it by every name."""

    def plain():
        model = net()
        model.bias = model.head.bias  # comes first in named_parameters()
        return model

    config = {"r": 4, "target_modules": ["head", "q_proj"], "bias": bias}
    if whose == "ours":
        model = randlora.get_peft_model(plain(), randlora.RandLoraConfig(**config))
    else:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(plain(), peft.RandLoraConfig(**config))
    head = model.get_base_model().head.base_layer
    assert head.bias.requires_grad
    with torch.no_grad():
        head.bias.add_(0.5)
    model.save_pretrained(tmp_path)
    back = randlora.RandLoraModel.from_pretrained(plain(), tmp_path)
    assert (
        torch.equal(back.model.head.base_layer.bias, head.bias) and back.model.bias is back.model.head.base_layer.bias
    )
    back.hotswap(tmp_path)


def test_biases_of_another_adapters_layers(tmp_path):
    """bias="randlora_only" trains those too, so they are saved under the names that they have without it."""
    model = adapt(net(), target_modules=["q_proj"], bias="randlora_only")
    add(model, "b", 2, target_modules=["up_proj"])
    model.set_adapter("default")
    with torch.no_grad():
        model.model.layers[0].up_proj.base_layer.bias.add_(1)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    torch.testing.assert_close(load(tmp_path)(IDS), model(IDS), rtol=1e-12, atol=1e-12)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(9, 9), nn.LayerNorm(9)
        self.second = self.first
        self.third = nn.Linear(9, 9)
        self.third.weight = self.first.weight
        self.head = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
        self.head[1].weight = self.head[0].weight

    def forward(self, x):
        return self.head(self.norm(self.third(self.second(self.first(x)))))


def test_tied_modules_and_parameters(tmp_path):
    config = randlora.RandLoraConfig(r=4, randlora_alpha=2, target_modules=["first"], modules_to_save=["norm", "head"])
    model = randomize(randlora.get_peft_model(numbered(Tied()), config))
    x = torch.linspace(-1, 1, 18).reshape(2, 9)
    model.eval().save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path, numbered(Tied()))(x), model(x))


def test_names_that_a_suffix_does_not_tell_apart(tmp_path):
    """exclude_modules is not PEFT's: the file names the layers, in a pattern if a list would match others too."""
    model = adapt(net(), target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.q_proj"])
    model.save_pretrained(tmp_path)
    assert layers_of(load(tmp_path)).keys() == layers_of(model).keys()
    assert isinstance(json.loads((tmp_path / CONFIG).read_text())["target_modules"], list)

    nested = nn.Sequential()
    nested.proj, nested.part = nn.Linear(6, 6), nn.Sequential()
    nested.part.proj = nn.Linear(6, 6)
    config = randlora.RandLoraConfig(r=2, target_modules=["proj"], exclude_modules=["part.proj"])
    model = randlora.get_peft_model(nested, config)
    model.save_pretrained(tmp_path)
    nested = model.unload()
    assert list(layers_of(load(tmp_path, nested))) == ["proj"]


# ---- bases -----------------------------------------------------------------------------------------------------------


def test_bases_from_a_file_are_written_and_shared(tmp_path):
    """Whatever save_projection says: they cannot be made again."""
    model = adapt(net(), prng="peft", save_projection=True)
    model.save_pretrained(tmp_path / "a")
    with safe_open(tmp_path / "a" / WEIGHTS, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["base_model.randlora_B"] *= 1.25  # nobody's draw
    (stripped := tmp_path / "b").mkdir()
    save_file(tensors, stripped / WEIGHTS)
    (stripped / CONFIG).write_text((tmp_path / "a" / CONFIG).read_text())
    given = load(stripped)
    bases = bases_of(given)
    assert bases.prng == "none" and torch.equal(bases.B, tensors["base_model.randlora_B"])
    given.peft_config["default"].save_projection = False
    given.save_pretrained(tmp_path / "c")
    again = load(tmp_path / "c")
    assert_same_numbers(given, again)
    assert bases_of(again) is bases, "equal tensors are kept once"
    given.load_adapter(tmp_path / "c", "twice")
    assert bases_of(given, "twice") is bases


def test_bases_do_not_alias_the_file(tmp_path):
    """safetensors gives views of the file: one written over in place would change, or end, the process."""
    model = adapt(net(), prng="peft")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    tensors["base_model.randlora_A"] *= 2
    save_file(tensors, tmp_path / WEIGHTS)  # without metadata: these bases it is
    bases = bases_of(load(tmp_path))
    assert torch.equal(bases.A, tensors["base_model.randlora_A"])
    with open(tmp_path / WEIGHTS, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    assert torch.equal(bases.A, tensors["base_model.randlora_A"])


def test_a_fingerprint_that_does_not_match(tmp_path, monkeypatch):
    # A seed of its own, and no model alive that has its bases: those that a process has made are not made again.
    adapt(net(), save_projection=False, projection_prng_key=4711).save_pretrained(tmp_path)
    gc.collect()
    original = randlora.RandomBases.fill

    def other(self, out, stream, offsets):
        original(self, out, stream, offsets)
        return out.neg_() if stream == 1 else out

    model = net()
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(randlora.RandomBases, "fill", other)
        with pytest.raises(ValueError, match="are not those that it was trained with"):
            load(tmp_path, model)
    assert snapshot(model)[1:] == before[1:]
    load(tmp_path, model)


def test_what_pefts_bases_depend_on_is_said(tmp_path, monkeypatch):
    """Not of philox, which depends on nothing."""
    adapt(net(), save_projection=False, prng="peft", projection_prng_key=4711).save_pretrained(tmp_path)
    gc.collect()
    draw = peft_prng.draw

    def other(*args):
        A, B = draw(*args)
        return -A, B

    monkeypatch.setattr(peft_prng, "draw", other)
    with pytest.raises(ValueError, match=r"trained with .* differ between PyTorch up to 2\.11 and later"):
        load(tmp_path, net())


def test_drawn_bases_that_cannot_be_drawn_again_are_read(tmp_path, monkeypatch):
    """torch may change its generator; the file holds what it gave."""
    model = adapt(net(), prng="peft")
    model.save_pretrained(tmp_path)
    A, B = bases_of(model).tensors(torch.float32)
    del model

    draw = peft_prng.draw
    monkeypatch.setattr(peft_prng, "draw", lambda *a, **k: tuple(-t for t in draw(*a, **k)))
    bases = bases_of(load(tmp_path))
    assert bases.prng == "none" and torch.equal(bases.A, A) and torch.equal(bases.B, B)


def test_another_process_with_other_settings(tmp_path):
    """Threads, default dtype and hash seed change neither the bases made there nor the bytes written there."""
    settings = {"save_projection": False, "r": 3, "kind": "sparse", "modules_to_save": ["head"]}
    model = adapt(net(), target_modules={"q_proj", "up_proj", "v_proj"}, **settings)
    model.save_pretrained(tmp_path / "here")
    code = f"""
import json, sys, torch
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
torch.set_num_threads(3)
torch.set_default_dtype(torch.float16)
import randlora
from helpers.models import net
model = randlora.RandLoraModel.from_pretrained(net(), "here")
bases = model.model.layers[0].q_proj.bases["default"]
print(json.dumps([t.tolist() for t in bases.to(torch.float32).tensors()]))
model.save_pretrained("there")
"""
    M, m, n = described(tmp_path / "here")["dims"]
    A, B = bases_of(model).to(torch.float32).tensors()
    made = run_python(code, tmp_path, PYTHONHASHSEED="7")
    assert made == [A[..., :m].tolist(), B[:M, :n].tolist()]
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


# ---- what cannot be saved --------------------------------------------------------------------------------------------


def test_layers_that_differ_from_the_config_are_not_saved(tmp_path):
    model = adapt(net())
    layer = model.model.layers[1].up_proj
    for attribute, value in (
        ("scaling", 0.5),
        ("r", 5),
        ("num_bases", 2),
        ("bases", randlora.RandomBases(22, 13, 4, seed=3)),
    ):
        kept = getattr(layer, attribute)["default"]
        getattr(layer, attribute)["default"] = value
        with pytest.raises(ValueError, match=r"'default' cannot be saved as one: .*'layers.1.up_proj'"):
            model.save_pretrained(tmp_path / "adapter")
        getattr(layer, attribute)["default"] = kept
    model.peft_config["default"].projection_prng_key = 1
    with pytest.raises(ValueError, match="its config says"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_an_error_writes_nothing(tmp_path):
    model = adapt(net())
    add(model, "b", 2, num_bases=1)
    with pytest.raises(ValueError, match="'b' cannot be written for PEFT"):
        model.save_pretrained(tmp_path / "adapter", for_peft=True)
    assert not (tmp_path / "adapter").exists()
