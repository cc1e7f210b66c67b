"""Adapters as LoRA: what PEFT computes with the folder, against the adapter and against the truncated update."""

import copy
import json
import re

import pytest
import torch
from helpers import pages
from helpers.common import KINDS, over, reference_update
from helpers.models import IDS, adapt, add, assert_unchanged, layers_of, net, snapshot, tiny_gpt2, tiny_llama
from safetensors.torch import load_file
from torch import nn

import randlora
from randlora.export import lora, to_lora

BOTH = ("layers.0.up_proj", "layers.1.down_proj")  # in < out and in > out


def written(folder):
    return load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())


def with_lora(plain, folder):
    """What plain PEFT makes of a folder, in eval mode."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()


def assert_same(model, plain, folder, tolerance=1e-12, ids=IDS):
    with torch.no_grad():
        a, b = (getattr(y, "logits", y) for y in (model(ids), with_lora(plain, folder)(ids)))
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert (a - getattr(plain(ids), "logits", plain(ids))).abs().max() > 1e-3


def product(tensors, config, name):
    A, B = (tensors[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
    assert len(A) == config["rank_pattern"].get(name, config["r"]) == B.shape[1]
    return B @ A


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{"num_bases": 2}, {"num_bases": 3, "r": 5}, {}], ids=str)
def test_exact(kind, settings, tmp_path):
    plain = net()
    model = adapt(net(), kind=kind, **settings)
    before = snapshot(model)
    result = to_lora(model, tmp_path, dtype=torch.float64)
    assert_unchanged(model, before)
    assert_same(model.eval(), plain, tmp_path)
    tensors, config = written(tmp_path)
    r, n = settings.get("r", 4), settings.get("num_bases")
    assert config["r"] == config["lora_alpha"] == result["rank"] == (13 if n is None or n * r > 13 else n * r)
    assert result["exact"] and result["error"] < 1e-14
    for row in result["layers"]:
        layer = layers_of(model)[row["name"]]
        expected = reference_update(layer, "default")
        torch.testing.assert_close(product(tensors, config, row["name"]), expected, rtol=1e-13, atol=1e-13)
        assert (row["in_features"], row["out_features"]) == (layer.in_features, layer.out_features)
        assert row["exact"] and row["rank"] == row["update_rank"] and 0 <= row["error"] < 1e-14


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_bases", [1, 3, None], ids=str)
def test_truncated(kind, num_bases, tmp_path):
    """The best approximation of each update, padded where a layer has less rank; measured errors are those."""
    model = adapt(net(), kind=kind, num_bases=num_bases)
    result = to_lora(model, tmp_path, rank=5, dtype=torch.float64)
    tensors, config = written(tmp_path)
    assert config["r"] == 5 and not config["rank_pattern"]
    total = lost = 0
    for row in result["layers"]:
        expected = reference_update(layers_of(model)[row["name"]], "default")
        U, S, V = torch.linalg.svd(expected)
        best = (U[:, :5] * S[:5]) @ V[:5]
        torch.testing.assert_close(product(tensors, config, row["name"]), best, rtol=0, atol=1e-11 * S[0].item())
        error = (S[5:].norm() / S.norm()).item()
        assert row["error"] == pytest.approx(error, rel=1e-9, abs=1e-14)
        assert row["energy"] == pytest.approx(1 - error**2, abs=1e-12)
        assert row["exact"] == (num_bases == 1) and row["rank"] == (4 if num_bases == 1 else 5)
        total, lost = total + S.square().sum(), lost + S[5:].square().sum()
    assert result["error"] == pytest.approx((lost / total).sqrt().item(), abs=1e-12)
    assert result["exact"] == (num_bases == 1)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("num_bases", [3, None], ids=str)
def test_energy(per_layer, num_bases, tmp_path):
    model = adapt(net(), num_bases=num_bases)
    result = to_lora(model, tmp_path, energy=0.9, per_layer=per_layer, dtype=torch.float64)
    tensors, config = written(tmp_path)
    needed = {}
    for row in result["layers"]:
        expected = reference_update(layers_of(model)[row["name"]], "default")
        S = torch.linalg.svdvals(expected)
        kept = S.square().cumsum(0) / S.square().sum()
        needed[row["name"]] = int((kept < 0.9).sum()) + 1
        rank = row["rank"]
        assert row["energy"] == pytest.approx(kept[rank - 1].item(), abs=1e-12) and row["energy"] >= 0.9
        error = (product(tensors, config, row["name"]) - expected).norm() / expected.norm()
        assert row["error"] == pytest.approx(error.item(), abs=1e-12)
    most = max(needed.values())
    assert len(set(needed.values())) > 1
    found = {row["name"]: row["rank"] for row in result["layers"]}
    assert found == (needed if per_layer else dict.fromkeys(needed, most))
    assert config["r"] == config["lora_alpha"] == result["rank"] == most
    expected = {name: rank for name, rank in needed.items() if rank != most} if per_layer else {}
    assert config["rank_pattern"] == config["alpha_pattern"] == expected
    peft_model = with_lora(net(), tmp_path)
    for name in needed:
        layer = peft_model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(
            layer.get_delta_weight("default"), product(tensors, config, name), rtol=1e-12, atol=1e-12
        )
    # All of it is what the update has.
    result = to_lora(model, tmp_path / "all", energy=1.0, per_layer=True, dtype=torch.float64)
    assert all(row["rank"] == row["update_rank"] for row in result["layers"]) and result["exact"]


def test_one_rank_for_all_is_padded_with_zeros(tmp_path):
    model = adapt(net(), num_bases=1)
    result = to_lora(model, tmp_path, rank=7, dtype=torch.float64)
    tensors, config = written(tmp_path)
    assert config["r"] == 7 and {row["rank"] for row in result["layers"]} == {4}
    assert all(
        tensor.shape["B" in name] == 7 for name, tensor in tensors.items() if (tensor.shape[0] == 7) != ("B" in name)
    )
    assert_same(model.eval(), net(), tmp_path)
    assert any("rank=4" in note for note in result["notes"])
    assert to_lora(model, tmp_path / "narrow", rank=7, per_layer=True)["rank"] == 4


@over("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, tmp_path):
    """16-bit numbers keep their range: factors are balanced. The error is that of what is written."""
    model = adapt(net(torch.float32), num_bases=2, randlora_alpha=4e-6)
    result = to_lora(model, tmp_path, dtype=dtype)
    tensors, config = written(tmp_path)
    assert {t.dtype for t in tensors.values()} == {dtype} and result["dtype"] == str(dtype)[6:]
    assert result["file_bytes"] == sum(t.nbytes for t in tensors.values())
    eps = torch.finfo(dtype).eps
    for row in result["layers"]:
        expected = layers_of(model)[row["name"]].get_delta_weight("default").double()
        assert expected.abs().max() < 1e-5
        error = ((product(tensors, config, row["name"]) - expected).norm() / expected.norm()).item()
        assert error < 1.5 * eps and row["error"] == pytest.approx(error, rel=1e-3, abs=2e-7)
        A, B = (tensors[f"base_model.model.{row['name']}.lora_{which}.weight"].float() for which in "AB")
        assert (B.abs().amax(dim=0).log2() - A.abs().amax(dim=1).log2()).abs().max() <= 2.1


def test_what_does_not_fit_into_16_bits(tmp_path):
    model = adapt(net(torch.float32), num_bases=2)
    with torch.no_grad():
        layers_of(model)[BOTH[0]].randlora_lambda["default"].mul_(1e12)
    with pytest.raises(ValueError, match=r"up_proj.*does not fit into torch.float16.*dtype"):
        to_lora(model, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    assert to_lora(model, tmp_path / "out", dtype=torch.bfloat16)["exact"]


def test_models_of_transformers(tmp_path):
    """Llama with an output head of its own, and GPT-2, whose layers have weights ``[in, out]``."""
    cases = {
        "llama": (tiny_llama(), ["q_proj", "down_proj", "lm_head"]),
        "gpt2": (tiny_gpt2(), ["c_attn", "c_fc", "c_proj"]),
    }
    for name, (plain, targets) in cases.items():
        plain = plain.double()
        for more in ({}, {"rank": 3}):
            model = adapt(copy.deepcopy(plain), target_modules=targets, num_bases=2).eval()
            folder = tmp_path / f"{name}{len(more)}"
            result = to_lora(model, folder, dtype=torch.float64, inputs={"input_ids": IDS}, **more)
            _, config = written(folder)
            assert config["fan_in_fan_out"] == (name == "gpt2")
            assert sorted(config["target_modules"]) == sorted(targets)
            with torch.no_grad():
                a, b = model(IDS).logits, with_lora(plain, folder)(IDS).logits
            assert result["logits"]["largest_difference"] == pytest.approx((a - b).abs().max().item(), abs=1e-12)
            assert result["logits"]["largest"] == pytest.approx(a.abs().max().item())
            assert result["logits"]["same_largest"] == (a.argmax(-1) == b.argmax(-1)).double().mean()
            assert (result["logits"]["largest_difference"] < 1e-12) == result["exact"] == (not more)


def test_what_is_trained_beside(tmp_path):
    """Biases and modules to save, dropout and task type, as PEFT writes and loads them."""
    for bias in ("randlora_only", "all"):
        model = adapt(
            net(), num_bases=2, bias=bias, modules_to_save=["head"], randlora_dropout=0.25, task_type="TOKEN_CLS"
        )
        with torch.no_grad():
            for i, parameter in enumerate(p for n, p in model.named_parameters() if p.requires_grad and "bias" in n):
                parameter.add_(0.1 * (i + 1))
            model.model.head.modules_to_save["default"].weight.mul_(1.5)
        folder = tmp_path / bias
        result = to_lora(model, folder, dtype=torch.float64)
        tensors, config = written(folder)
        assert config["bias"] == {"randlora_only": "lora_only", "all": "all"}[bias]
        assert config["modules_to_save"] == ["head"] and config["lora_dropout"] == 0.25
        assert config["task_type"] == "TOKEN_CLS"
        assert "base_model.model.head.weight" in tensors
        assert ("base_model.model.layers.0.q_proj.base_layer.bias" in tensors) and len(tensors) == 16 + 6 + 2
        config["task_type"] = None  # PEFT's class for it wants a model of transformers
        (folder / "adapter_config.json").write_text(json.dumps(config))
        assert_same(model.eval(), net(), folder)
        assert any("modules_to_save" in note for note in result["notes"]) and any("bias" in n for n in result["notes"])


def test_target_modules_are_exact(tmp_path):
    """Last names where they mean these layers only; else whole names, or a pattern, also where some are left out."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = net(), nn.Sequential(net())

        def forward(self, ids):
            return self.inner(ids) + self.outer(ids)

    plain = Twice()
    cases = [
        (["q_proj"], {}, ["q_proj"]),
        (["q_proj", "up_proj"], {"exclude_modules": ["up_proj"]}, ["q_proj"]),
        (["q_proj"], {"layers_to_transform": [1], "layers_pattern": "layers"},
         ["inner.layers.1.q_proj", "outer.0.layers.1.q_proj"]),
        (r"inner\.layers\.0\.q_proj", {}, ["inner.layers.0.q_proj"]),
    ]  # fmt: skip
    for i, (targets, more, expected) in enumerate(cases):
        model = adapt(copy.deepcopy(plain), target_modules=targets, num_bases=1, **more).eval()
        to_lora(model, tmp_path / str(i), dtype=torch.float64)
        assert written(tmp_path / str(i))[1]["target_modules"] == expected
        assert_same(model, plain, tmp_path / str(i))

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.more = net().layers, net()

        def forward(self, ids):
            x = self.more.embed(ids)
            return self.layers[1](self.layers[0](x)) @ x.new_ones(13, 1) + self.more(ids)

    # "layers.0.q_proj" is the end of "more.layers.0.q_proj", too.
    plain = Nested()
    model = adapt(copy.deepcopy(plain), target_modules=r"layers\.\d\.q_proj", num_bases=1).eval()
    to_lora(model, tmp_path / "nested", dtype=torch.float64)
    assert written(tmp_path / "nested")[1]["target_modules"] == r"(?:layers\.0\.q_proj|layers\.1\.q_proj)"
    assert_same(model, plain, tmp_path / "nested")
    model = adapt(copy.deepcopy(plain), target_modules=["q_proj"]).eval()
    result = to_lora(model, tmp_path / "ranks", energy=0.8, per_layer=True, dtype=torch.float64)
    peft_model = with_lora(plain, tmp_path / "ranks")
    for row in result["layers"]:
        assert peft_model.get_submodule(f"base_model.model.{row['name']}").r["default"] == row["rank"]


def test_names_that_are_patterns_of_others(tmp_path):
    """PEFT takes the keys of rank_pattern for patterns: "a.1" is one of "ax1"."""
    plain = nn.ModuleDict({"a": nn.ModuleDict({"1": nn.Linear(6, 6)}), "ax1": nn.Linear(6, 6)})
    model = adapt(copy.deepcopy(plain), target_modules=["a.1", "ax1"], r=2, num_bases=2)
    with torch.no_grad():
        model.model["a"]["1"].randlora_lambda["default"].zero_()[0, 0] = 1.0
    result = to_lora(model, tmp_path, energy=0.99999, per_layer=True)
    ranks = {row["name"]: row["rank"] for row in result["layers"]}
    assert ranks == {"a.1": 1, "ax1": 4}
    loaded = with_lora(plain, tmp_path)
    assert ranks == {path: loaded.get_submodule(f"base_model.model.{path}").r["default"] for path in ranks}


def test_of_several_adapters_one(tmp_path):
    model = add(adapt(net(), num_bases=2), "other", 5, num_bases=1, target_modules=["q_proj"])
    result = to_lora(model, tmp_path, adapter="other", dtype=torch.float64, inputs=IDS)
    assert result["adapter"] == "other" and [row["name"] for row in result["layers"]] == [
        "layers.0.q_proj", "layers.1.q_proj"
    ]  # fmt: skip
    assert result["logits"]["largest_difference"] < 1e-12 and model.active_adapters == ["default"]
    model.set_adapter("other")
    assert_same(model.eval(), net(), tmp_path)
    with pytest.raises(ValueError, match="no adapter named 'third'"):
        to_lora(model, tmp_path / "x", adapter="third")
    # What is merged, and where the base weights are, does not matter to A and B.
    model.merge_adapter()
    to_lora(model, tmp_path / "merged", adapter="other", dtype=torch.float64)
    first, second = (written(folder)[0] for folder in (tmp_path, tmp_path / "merged"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match=r"merged.*unmerge_adapter"):
        to_lora(model, tmp_path / "x", adapter="other", inputs=IDS)
    assert not (tmp_path / "x").exists()


def test_same_bytes_again(tmp_path):
    for folder in "ab":
        to_lora(adapt(net(torch.float32)), tmp_path / folder, rank=3)
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_autocast_rounds_nothing(tmp_path):
    model = adapt(net(torch.float32))
    for i, asked in enumerate(({"rank": 3}, {"energy": 0.9}, {"rank": 13})):
        expected = to_lora(model, tmp_path / f"{i}", **asked)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert to_lora(model, tmp_path / f"{i} in 16 bits", **asked) == expected
            assert torch.is_autocast_enabled("cpu")
        first, second = (tmp_path / folder / "adapter_model.safetensors" for folder in (f"{i}", f"{i} in 16 bits"))
        assert first.read_bytes() == second.read_bytes()


def test_models_made_in_inference_mode(tmp_path):
    expected = to_lora(adapt(net(torch.float32)), tmp_path / "a", rank=3)
    with torch.inference_mode():
        model = adapt(net(torch.float32))
    assert to_lora(model, tmp_path / "b", rank=3) == expected


def test_update_of_zero(tmp_path):
    model = randlora.get_peft_model(net(), randlora.RandLoraConfig(r=4, target_modules=["q_proj"]))
    for i, asked in enumerate(({"rank": 2}, {"energy": 0.9}, {})):
        result = to_lora(model, tmp_path / str(i), **asked)
        assert result["error"] == 0 and result["energy"] == 1
        tensors, config = written(tmp_path / str(i))
        assert not any(product(tensors, config, row["name"]).any() for row in result["layers"])


def test_the_update_of_one_layer_is_in_memory(tmp_path, monkeypatch):
    import weakref

    alive, most = [], []
    made = lora.LayerUpdate.__init__

    def count(self, *arguments):
        made(self, *arguments)
        alive.append(weakref.ref(self))
        most.append(sum(update() is not None for update in alive))

    monkeypatch.setattr(lora.LayerUpdate, "__init__", count)
    to_lora(adapt(net()), tmp_path, energy=0.9)
    assert len(most) == 16 and max(most) == 1


def test_compiled(tmp_path):
    compiled = adapt(net(), num_bases=2)
    to_lora(compiled, tmp_path / "a")
    compiled.model = torch.compile(compiled.model, backend="eager")
    to_lora(compiled, tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_offloaded(tmp_path):
    from helpers.offloading import offloaded

    model = adapt(net(), num_bases=2)
    expected = to_lora(model, tmp_path / "a", dtype=torch.float64, inputs=IDS)
    model = offloaded(model, "cpu", tmp_path)
    found = to_lora(model, tmp_path / "b", dtype=torch.float64, inputs=IDS)
    # Weights that lie elsewhere in memory may be multiplied in another order.
    assert found["logits"] == {name: pytest.approx(value, abs=1e-12) for name, value in expected["logits"].items()}
    assert {**found, "logits": None} == {**expected, "logits": None}
    assert any(p.is_meta for p in model.parameters()) and expected["logits"]["largest_difference"] < 1e-12
    first, second = (written(tmp_path / folder)[0] for folder in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- the documentation's numbers ----


def test_the_table_of_what_num_bases_trains(tmp_path):
    """docs/export.md: numbers of one layer, 4096 x 4096, and the file that a small one gives."""
    page = pages.text_of("docs/export.md")
    rows = [
        [float(cell.split()[0].replace(",", "")) for cell in line.strip("| ").split("|")]
        for line in page.splitlines()
        if re.match(r"\| \d+ \| \d+ \| \d+ \|", line)
    ]
    assert len(rows) == 6
    for r, n, rank, trained, of_lora, same, mebibytes in rows:
        d, r, n = 4096, int(r), int(n)
        with torch.device("meta"):
            layer = randlora.Linear(nn.Linear(d, d), r=r, num_bases=n, bases=randlora.RandomBases(1, 1, r))
        assert trained == sum(p.numel() for p in layer.parameters() if p.requires_grad)
        assert rank == n * r and of_lora == 2 * d * rank and same == round(trained / (2 * d), 1)
        assert mebibytes == 2 * of_lora / 2**20
