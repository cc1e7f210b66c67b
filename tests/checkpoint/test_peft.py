"""Adapter files in both directions with PEFT: what each one writes loads in the other and computes the same there.

tests/data/peft_adapters holds what PEFT 0.16 to 0.21 wrote (RandLoRA is in PEFT since 0.16); see make_peft_adapters.py.
"""

import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.models import adapt, net, randomize, snapshot
from safetensors.torch import load_file, save_file
from torch import nn

import randlora
from randlora.model.adapter_plan import plan_adapter

pytest.importorskip("transformers", reason="the models have a Conv1D")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DATA = Path(__file__).resolve().parents[1] / "data"
FOLDERS = sorted(p.parent for p in (DATA / "peft_adapters").glob("*/*/" + CONFIG))

_spec = importlib.util.spec_from_file_location("make_peft_adapters", DATA / "make_peft_adapters.py")
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


def load(folder, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return randlora.RandLoraModel.from_pretrained(model, folder).eval()


def load_in_peft(folder, model):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def assert_close(got, expected):
    assert got.dtype == expected.dtype
    tolerance = 1e-5 if got.dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def all_random(model):
    with torch.no_grad():
        for seed, p in enumerate(model.parameters()):
            if p.requires_grad:
                p.add_(made.numbers(*p.shape, seed=100 + seed))
    return model.eval()


# ---- PEFT wrote it ---------------------------------------------------------------------------------------------------


def test_the_versions_are_there():
    assert {p.parent.name for p in FOLDERS} == {"0.16.0", "0.17.1", "0.19.1", "0.21.2"}
    assert {p.name for p in FOLDERS} == set(made.CASES) and len(FOLDERS) == 4 * len(made.CASES)


def draws_16_bits_as_32():
    """As the PyTorch with which the files were written; 2.11 and before take other bits of the same random numbers."""
    half, single = (
        torch.empty(9, dtype=dtype).uniform_(generator=torch.Generator().manual_seed(1))
        for dtype in (torch.bfloat16, torch.float32)
    )
    return torch.equal(half, single.bfloat16())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_what_peft_wrote(folder):
    if folder.name in ("dense_drawn", "one_way_drawn") and not draws_16_bits_as_32():
        pytest.skip("dense bases that are not in the file depend on PyTorch's version (docs/peft.md)")
    sample = load_file(folder / "sample.safetensors")
    model = load(folder, made.make_model(folder.name))
    with torch.no_grad():
        assert_close(model(sample["input"]), sample["output"])
    assert (model.unload()(sample["input"]) - sample["output"]).abs().max() > 0.05


@pytest.mark.parametrize("case", ["sparse", "sparse_drawn", "trained_beside", "all_biases", "bf16_uncast"])
def test_written_again_by_us(case, tmp_path):
    """Theirs, loaded and saved here: both load it, also without its projections."""
    folder = DATA / "peft_adapters" / "0.21.2" / case
    sample = load_file(folder / "sample.safetensors")
    model = load(folder, made.make_model(case))
    model.save_pretrained(tmp_path, for_peft=True)
    with torch.no_grad():
        assert_close(load(tmp_path, made.make_model(case))(sample["input"]), sample["output"])
        assert_close(load_in_peft(tmp_path, made.make_model(case))(sample["input"]), sample["output"])


def test_warnings_say_what_cannot_be_known():
    folder = DATA / "peft_adapters" / "0.17.1"
    with pytest.warns(UserWarning, match="no projections, and nothing by which") as caught:
        randlora.RandLoraModel.from_pretrained(made.make_model(""), folder / "dense_drawn")
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(UserWarning, match="bias='all' but holds no biases") as caught:
        randlora.RandLoraModel.from_pretrained(made.make_model(""), folder / "all_biases")
    assert [w.filename for w in caught] == [__file__]


def test_bases_that_peft_drew_on_a_machine_without_bfloat16(tmp_path):
    """The config can say so by hand: nothing in PEFT's file does."""
    model = randlora.get_peft_model(
        made.make_model(""),
        randlora.RandLoraConfig(r=3, target_modules=["up", "down"], prng="peft-fp16", save_projection=False),
    )
    all_random(model).save_pretrained(tmp_path)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # loses the metadata, as if PEFT had written it
    config = json.loads((tmp_path / CONFIG).read_text()) | {"peft_type": "RANDLORA"}
    (tmp_path / CONFIG).write_text(json.dumps(config | {"prng": "peft-fp16"}))
    x = made.numbers(5, 8, seed=1000)
    again = load(tmp_path, made.make_model(""))
    assert_close(again(x).detach(), model(x).detach())
    assert again.model.up.bases["default"] is model.model.up.bases["default"]
    del config["prng"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert load(tmp_path, made.make_model("")).model.up.bases["default"].prng == "peft"


def test_copies_per_layer_are_not_read(tmp_path, monkeypatch):
    from randlora.checkpoint.weights import Weights

    got = []
    get = Weights.get
    monkeypatch.setattr(Weights, "get", lambda self, key: got.append(key) or get(self, key))
    load(DATA / "peft_adapters" / "0.21.2" / "dense", made.make_model(""))
    assert sorted(key for key in got if "randlora_A" in key or "randlora_B" in key) == [
        "base_model.randlora_A", "base_model.randlora_B",
    ]  # fmt: skip


def test_copies_per_layer_are_enough(tmp_path):
    folder = DATA / "peft_adapters" / "0.21.2" / "dense"
    tensors = load_file(folder / WEIGHTS)
    for name in ("A", "B"):
        del tensors[f"base_model.randlora_{name}"]
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text((folder / CONFIG).read_text())
    sample = load_file(folder / "sample.safetensors")
    with torch.no_grad():
        assert_close(load(tmp_path, made.make_model(""))(sample["input"]), sample["output"])


# ---- we wrote it -----------------------------------------------------------------------------------------------------

OURS = {
    **{name: fields | ({"prng": "peft"} if name.endswith("drawn") else {}) for name, fields in made.CASES.items()},
    "sign": {"target_modules": ["up", "down"], "kind": "sign"},
    "hadamard": {"target_modules": ["up", "down", "conv"], "kind": "hadamard"},
    "group_width": {"target_modules": ["up", "square"], "kind": "hadamard", "group_width": 1},
    "sparsity": {"target_modules": ["up", "conv"], "kind": "sparse", "sparsity": 2.5},
    "largest_seed": {"target_modules": ["up", "down"], "projection_prng_key": 2**64 - 1, "randlora_alpha": 6.5},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["square", "head"]},
    "everything": {"target_modules": "all-linear", "modules_to_save": ["norm"]},
    "drawn_and_written": {"target_modules": ["up", "down"], "prng": "peft", "sparse": True},
    "one_place": {"target_modules": ["mix"], "exclude_modules": r".*\.0\..*", "bias": "all"},
}


@pytest.mark.parametrize("case", OURS)
def test_what_we_wrote(case, tmp_path):
    fields = {"r": 3, "randlora_alpha": 6} | OURS[case]
    model = all_random(randlora.get_peft_model(made.make_model(case), randlora.RandLoraConfig(**fields)))
    model.save_pretrained(tmp_path, for_peft=True)
    x = made.numbers(5, 8, seed=1000).to(next(model.parameters()).dtype)
    theirs = load_in_peft(tmp_path, made.make_model(case))
    with torch.no_grad():
        assert_close(theirs(x), model(x))
        assert (made.make_model(case)(x) - model(x)).abs().max() > 0.03
    ours = {name for name in model.state_dict() if "lambda" in name}
    assert ours == {name.removeprefix("base_model.") for name in theirs.state_dict() if "lambda" in name}


@pytest.mark.parametrize("kind", ["sign", "hadamard"])
def test_the_config_has_no_key_that_peft_does_not_know(kind, tmp_path):
    """PEFT warns of every other; those that 0.16 does not know are not written either."""
    peft = pytest.importorskip("peft")
    adapt(net(), kind=kind, strategy="factored", exclude_modules=["layers.0.q_proj"]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    old = json.loads((DATA / "peft_adapters" / "0.16.0" / "dense" / CONFIG).read_text())
    assert written.keys() == old.keys() and written["peft_type"] == "RANDLORA"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftConfig.from_pretrained(str(tmp_path))


# ---- PEFT would misread it -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(9, 9)
        self.second = self.first

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (net, {"save_projection": False}, r"\(prng='philox'\) are not those that PEFT draws: it needs save_projection"),
        (net, {"save_projection": False, "prng": "peft-fp16"}, "are not those that PEFT draws"),
        (net, {"num_bases": 2}, "num_bases=2, where PEFT always takes 4 at layers.0.q_proj"),
        (
            Tied,
            {"target_modules": ["first"]},
            "first and second are one layer, of which PEFT would",
        ),
        (Attention, {"target_modules": ["attention"]}, "belongs to a torch.nn.MultiheadAttention, which PEFT"),
    ],
    ids=["philox", "fp16", "num_bases", "tied", "attention"],
)
def test_what_peft_would_misread(model, settings, reason, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = adapt(model(), **settings)
    with pytest.raises(ValueError, match=f"'default' cannot be written for PEFT: .*{reason}"):
        adapted.save_pretrained(tmp_path / "a", for_peft=True)
    assert not (tmp_path / "a").exists()
    adapted.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["peft_type"] == "RANDLORA_PHILOX"
    assert not any("randlora_A" in key for key in load_file(tmp_path / "a" / WEIGHTS))
    target = model()
    before = snapshot(target)
    with pytest.raises(KeyError, match="RANDLORA_PHILOX"):
        peft.PeftModel.from_pretrained(target, str(tmp_path / "a"))
    assert {k: v.shape for k, v in snapshot(target)[0].items()} == {k: v.shape for k, v in before[0].items()}
    load(tmp_path / "a", model())


def test_without_projections_on_request(tmp_path):
    adapted = adapt(net())
    adapted.save_pretrained(tmp_path, for_peft=False)
    assert not any("randlora_A" in key for key in load_file(tmp_path / WEIGHTS))
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "RANDLORA_PHILOX"
    adapted = adapt(net(), prng="peft")
    adapted.save_pretrained(tmp_path, for_peft=False)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "RANDLORA", "PEFT draws the same"


def test_given_bases_that_are_smaller_than_pefts(tmp_path):
    """Ours are sized by what layers need: for 8->13 with 13->7, PEFT allocates 13 columns and we need 8."""
    pytest.importorskip("peft")
    A, B = made.numbers(3, 1, 8, seed=1), made.numbers(13, 3, 3, seed=2)
    for larger in (False, True):
        if larger:
            A, B = made.numbers(3, 1, 20, seed=1), made.numbers(30, 7, 3, seed=2)
        config = randlora.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["up", "down"])
        model = made.make_model("")
        plan = plan_adapter(model, config, randlora.RandomBases.from_tensors(A, B))
        model = randomize(randlora.RandLoraModel.from_plan(model, plan)).eval()
        x = made.numbers(5, 8, seed=1000)
        if larger:
            model.save_pretrained(tmp_path, for_peft=True)
            assert_close(load_in_peft(tmp_path, made.make_model(""))(x), model(x).detach())
        else:
            with pytest.raises(ValueError, match=r"are smaller than PEFT's for these layers, \(13, 13, 5\)"):
                model.save_pretrained(tmp_path, for_peft=True)
            model.save_pretrained(tmp_path)
        assert_close(load(tmp_path, made.make_model(""))(x), model(x).detach())
