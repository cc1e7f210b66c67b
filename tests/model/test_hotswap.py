"""Another adapter's numbers in the place of a loaded one's: the same tensors, the same code, none of it made anew."""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import WEIGHTS
from helpers.common import normal
from helpers.failing import calls_of, fail_at
from helpers.models import (
    IDS,
    adapt,
    add,
    assert_computes,
    assert_unchanged,
    layers_of,
    net,
    randomize,
    snapshot,
    tiny_gpt2,
)

import randlora
from randlora import RandLoraModel

DATA = Path(__file__).resolve().parents[1] / "data"


def with_all(seed, **settings):
    """An adapter with everything that a file can hold: a copy of a module, and biases."""
    model = adapt(net(), seed=seed, **{"modules_to_save": ["head"], "bias": "randlora_only", **settings})
    with torch.no_grad():
        for i, p in enumerate(p for n, p in model.named_parameters() if p.requires_grad and "randlora_" not in n):
            p.add_(normal(*p.shape, seed=50 * seed + i) * 0.3)
    return model


def written(folder, seed=8, make=adapt, **settings):
    model = (make(net(), seed=seed, **settings) if make is adapt else make(seed, **settings)).eval()
    model.save_pretrained(folder)
    return model


def places(model):
    """Which objects there are, and where their numbers are."""
    tensors = [*model.parameters(), *model.buffers()]
    return [id(module) for module in model.modules()], [(id(t), t.data_ptr(), t.requires_grad) for t in tensors]


def load(folder, model=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RandLoraModel.from_pretrained(net() if model is None else model, folder).eval()


# ---- what is replaced, and what stays --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "hadamard", "sparse"])
def test_the_numbers_of_another_file_in_the_same_tensors(tmp_path, kind):
    other = written(tmp_path / "other", 8, with_all, kind=kind)
    model = add(with_all(1, kind=kind), "b", 2, r=3, target_modules=["q_proj"]).eval()
    before, config, old, b = places(model), copy.deepcopy(model.peft_config), model(IDS), snapshot(model)[0]
    model.hotswap(tmp_path / "other")
    assert places(model) == before and model.peft_config == config and model.active_adapters == ["default"]
    assert torch.equal(model(IDS), other(IDS)) and (model(IDS) - old).abs().max() > 0.05
    assert all(torch.equal(b[name], value) for name, value in model.state_dict().items() if name.endswith(".b"))
    model.save_pretrained(tmp_path / "again", ["default"])
    assert torch.equal(load(tmp_path / "again")(IDS), other(IDS))
    model.set_adapter("b")
    model.hotswap(str(tmp_path / "other"), adapter_name="default")
    with pytest.raises(ValueError, match=r"other cannot take the place of adapter 'b': layers that are not in both"):
        model.hotswap(tmp_path / "other", "b")


def test_a_named_adapter_that_acts_beside_another(tmp_path):
    written(tmp_path, target_modules=["q_proj"])
    model = add(adapt(net()), "b", 2, target_modules=["q_proj"]).eval()
    model.set_adapter(["default", "b"])
    model.hotswap(tmp_path, "b")
    twin = load(tmp_path, net())
    for path, layer in layers_of(model, "b").items():
        assert torch.equal(layer.randlora_lambda["b"], layers_of(twin)[path].randlora_lambda["default"])
    assert_computes(model, ["default", "b"])


@pytest.mark.parametrize("alpha", [6, 0.75, -3, 7.1, 0.3])
def test_another_alpha_goes_into_lambda(tmp_path, alpha):
    """The adapter keeps its own, which compiled code and captured graphs hold as a number."""
    other = written(tmp_path / "other", randlora_alpha=alpha)
    model = adapt(net()).eval()
    model.hotswap(tmp_path / "other")
    exact = alpha in (6, 0.75, -3)  # a power of two times the model's, or its negative
    got, expected = model(IDS), other(IDS)
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if exact else 1e-12)
    assert model.peft_config["default"].randlora_alpha == 3
    assert all(layer.scaling["default"] == 3 / 4 for layer in layers_of(model).values())
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(IDS), got) and again.peft_config["default"].randlora_alpha == 3
    assert_computes(model, ["default"])


def test_lambda_is_rounded_once_where_the_scalings_differ(tmp_path):
    other = written(tmp_path, randlora_alpha=7)
    model = adapt(net(torch.float32))
    model.hotswap(tmp_path)
    for path, layer in layers_of(model).items():
        lam = layers_of(other)[path].randlora_lambda["default"].detach()
        assert torch.equal(layer.randlora_lambda["default"], (lam * (7 / 3)).float())


@pytest.mark.parametrize("of_model, of_file", [(0, 3), (3, 0), (1e-300, 1e300), (1e300, 1e-300)])
def test_an_alpha_that_lambda_cannot_make_up_for_is_refused(tmp_path, of_model, of_file):
    written(tmp_path, randlora_alpha=of_file)
    model = adapt(net(), randlora_alpha=of_model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"was trained with randlora_alpha=\S+, and adapter 'default' has .* load_ada"):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)


def test_settings_of_training_stay_the_adapters_own(tmp_path):
    """Dropout is no part of what an adapter computes; the inference cache and autograd see that numbers are new."""
    other = written(tmp_path, randlora_dropout=0.5, num_bases=4)
    model = adapt(net(), randlora_dropout=0.25)
    loss = model(IDS).sum()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.hotswap(tmp_path)
    assert all(layer.randlora_dropout["default"].p == 0.25 for layer in layers_of(model).values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.eval()
    assert torch.equal(model(IDS), other(IDS))
    model(IDS).sum().backward()
    optimizer.step()
    assert not torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_open_inference_cache_notices(tmp_path, mode):
    other, model = written(tmp_path), adapt(net()).eval()
    with mode(), randlora.inference_cache() as scope:
        for _ in range(60):
            model(IDS)
        assert scope.nbytes
        model.hotswap(tmp_path)
        torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-12, atol=1e-12)


# ---- other layers, other places --------------------------------------------------------------------------------------


def test_layers_of_every_kind(tmp_path):
    """Conv1D; attention; a packed projection beside a Linear."""
    gpt2 = adapt(tiny_gpt2(), target_modules=["c_attn", "c_proj"], seed=8).eval()
    gpt2.save_pretrained(tmp_path / "gpt2")
    model = adapt(tiny_gpt2(), target_modules=["c_attn", "c_proj"]).eval()
    model.hotswap(tmp_path / "gpt2")
    assert torch.equal(model(IDS).logits, gpt2(IDS).logits)

    def attention(seed):
        torch.manual_seed(0)
        made = torch.nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dtype=torch.float64)
        return adapt(made, target_modules=["self_attn", "linear1"], seed=seed).eval()

    other, model, x = attention(8), attention(1), normal(2, 3, 12, dtype=torch.float64)
    other.save_pretrained(tmp_path / "attention")
    before = places(model)
    model.hotswap(tmp_path / "attention")
    assert torch.equal(model(x), other(x)) and places(model) == before


def test_fused_experts(tmp_path):
    from helpers.experts_cases import tiny

    def experts(seed):
        return adapt(tiny("Mixtral"), target_modules=[], seed=seed, target_parameters=["experts.gate_up_proj"]).eval()

    other, model = experts(8), experts(1)
    other.save_pretrained(tmp_path)
    before = places(model)
    model.hotswap(tmp_path)
    assert torch.equal(model(IDS).logits, other(IDS).logits) and places(model) == before


def test_quantised_layers(tmp_path):
    pytest.importorskip("torchao")
    from helpers.quantized_layers import make_base

    def quantised(seed):
        return adapt(torch.nn.Sequential(make_base("int8")), target_modules=["0"], seed=seed).eval()

    other, model, x = quantised(8), quantised(1), normal(3, 41)
    other.save_pretrained(tmp_path)
    model.hotswap(tmp_path)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("first", ["offloaded", "adapted"])
def test_offloaded_models(tmp_path, first):
    from helpers.offloading import offloaded

    other = written(tmp_path)
    model = adapt(offloaded(net(), "cpu", None)) if first == "offloaded" else offloaded(adapt(net()), "cpu", None)
    model.eval().hotswap(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-12, atol=1e-12)


def test_an_offloaded_copy_of_a_module_is_refused(tmp_path):
    """Its hook would bring the old numbers in at the next call."""
    from helpers.offloading import offloaded

    from randlora.checkpoint.restoring import restore

    written(tmp_path, 8, with_all, bias="none")
    model = offloaded(with_all(1, bias="none").eval(), "cpu", None)
    with torch.no_grad():
        before = model(IDS)
        for replace in (model.hotswap, lambda folder: restore(model, folder)):
            with pytest.raises(ValueError, match=r"copy of .head. that is offloaded, .*remove_hook_from"):
                replace(tmp_path)
            assert torch.equal(model(IDS), before)


def test_the_meta_device(tmp_path):
    """A base model without numbers is no hindrance; an adapter without them is."""
    other, elsewhere = written(tmp_path / "a"), written(tmp_path / "b", 9)
    model = RandLoraModel.from_pretrained(net().to("meta"), tmp_path / "a")
    model.hotswap(tmp_path / "b")
    for path, layer in layers_of(model).items():
        twin = layers_of(elsewhere)[path]
        assert torch.equal(layer.get_delta_weight("default"), twin.get_delta_weight("default"))
    model = other.to("meta")
    with pytest.raises(ValueError, match=r"randlora_lambda\['default'\] is on the meta device: it has no numbers to"):
        model.hotswap(tmp_path / "b")


def test_numbers_of_inference_mode(tmp_path):
    other = written(tmp_path)
    with torch.inference_mode():
        model = adapt(net()).eval()
        model.hotswap(tmp_path)
        assert torch.equal(model(IDS), other(IDS))


# ---- files of PEFT ---------------------------------------------------------------------------------------------------


def peft_cases():
    pytest.importorskip("transformers", reason="the models have a Conv1D")
    spec = importlib.util.spec_from_file_location("make_peft_adapters", DATA / "make_peft_adapters.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize("case", ["dense", "sparse", "trained_beside", "all_biases"])
@pytest.mark.parametrize("bases", ["of a file", "drawn"])
def test_files_of_peft(case, bases):
    """Whose bases are in the file, or drawn as PEFT draws them: the same values."""
    made, folder = peft_cases(), DATA / "peft_adapters" / "0.21.2" / case
    model, expected = load(folder, made.make_model(case)), load(folder, made.make_model(case))
    if bases == "drawn":
        config = dict(made.CASES[case], r=3, prng="peft", randlora_alpha=10)
        model = randlora.get_peft_model(made.make_model(case), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * p.requires_grad)
    randomize(model)
    x = made.numbers(5, 8, seed=1000)
    assert not torch.equal(model(x), expected(x))
    model.hotswap(folder)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)


def test_files_of_peft_that_lack_biases():
    """PEFT before 0.21 writes none, so that those of the adapter that is replaced would stay."""
    made, folder = peft_cases(), DATA / "peft_adapters"
    model = load(folder / "0.21.2" / "all_biases", made.make_model(""))
    before = snapshot(model)
    with (
        pytest.warns(UserWarning, match="holds no biases"),
        pytest.raises(ValueError, match=r"0.17.1.*has no body.blocks.0.mix.bias, which adapter 'default' trains"),
    ):
        model.hotswap(folder / "0.17.1" / "all_biases")
    assert_unchanged(model, before)


# ---- what is refused, and what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 5}, "r must be 4, got 5"),
        ({"bias": "randlora_only"}, "bias must be none, got randlora_only"),
        ({"num_bases": 2}, "num_bases at 'layers.0.q_proj' must be 4, got 2"),
        ({"target_modules": ["q_proj"]}, r"layers that are not in both must be \[\], got \['layers.0.down_proj'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save that are not in both must be \[\], got \['head'\]"),
        ({"projection_prng_key": 7}, "bases must be RandomBases.*got RandomBases"),
        ({"kind": "hadamard"}, "bases must be RandomBases"),
        ({"prng": "peft"}, "bases must be RandomBases"),
    ],
)
def test_another_kind_of_adapter_is_refused_and_nothing_is_changed(tmp_path, settings, message):
    adapt(net(), seed=8, **settings).save_pretrained(tmp_path)
    model = adapt(net())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot take .* 'default': {message}.* with load_adapter\(\)"):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)


def test_names_files_and_merged_adapters(tmp_path):
    written(tmp_path, save_projection=False)
    model = add(adapt(net()), "b", 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no adapter named 'c'; it has: default, b"):
        model.hotswap(tmp_path, "c")
    with pytest.raises(ValueError, match="none"):
        model.hotswap(tmp_path / "none")
    weights = tmp_path / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{weights} is damaged"):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)
    weights.write_bytes(data)
    model.merge_adapter(["b"])
    merged = snapshot(model)
    with pytest.raises(ValueError, match=r"adapter 'b' is merged.*: call unmerge_adapter\(\) first"):
        model.hotswap(tmp_path, "b")
    with pytest.raises(ValueError, match=r"has merged adapters: call unmerge_adapter\(\) first"):
        model.hotswap(tmp_path)
    assert_unchanged(model, merged)
    model.unmerge_adapter()
    model.hotswap(tmp_path, "b")
    assert_computes(model, ["default"])


def test_biases_that_only_other_adapters_layers_have(tmp_path):
    """They are trained with this adapter, and are in no file of another model's: they would stay as they are."""
    written(tmp_path, 8, with_all)
    model = add(with_all(1, target_modules=["q_proj"]), "b", 2, target_modules=["up_proj"])
    model.set_adapter("default")
    assert model.model.layers[0].up_proj.bias.requires_grad
    written(tmp_path / "q", 8, with_all, target_modules=["q_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q has no layers.0.up_proj.bias, which adapter 'default' trains"):
        model.hotswap(tmp_path / "q")
    assert_unchanged(model, before)


def test_what_fails_in_the_middle_is_undone(tmp_path):
    written(tmp_path, 8, with_all, randlora_alpha=7)
    model = with_all(1)
    total = calls_of(model.hotswap, tmp_path)
    model = with_all(1)
    before, there = snapshot(model), places(model)
    failed = 0
    for k in range(total - 300, total, 17):
        if fail_at(k, model.hotswap, tmp_path) is not None:
            failed += 1
            assert_unchanged(model, before)
            assert places(model) == there
        else:
            model = with_all(1)
            before, there = snapshot(model), places(model)
    assert failed > 10


# ---- compiled code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_compiled_code_runs_on_with_the_new_numbers(tmp_path, kind):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    others = [written(tmp_path / str(i), 8 + i, with_all, kind=kind, randlora_alpha=3 << i) for i in range(3)]
    model = with_all(1, kind=kind).eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        before = compiled(IDS)
        for i, other in enumerate(others):
            compiled.hotswap(tmp_path / str(i))
            torch.testing.assert_close(compiled(IDS), other(IDS), rtol=1e-12, atol=1e-12)
            assert (compiled(IDS) - before).abs().max() > 0.05
    assert counter.frame_count == 1


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_a_captured_cuda_graph_computes_with_the_new_numbers(tmp_path, kind):
    for i in range(3):
        written(tmp_path / str(i), 8 + i, with_all, kind=kind, randlora_alpha=3 << i)
    model, ids = with_all(1, kind=kind).eval().cuda(), IDS.cuda()
    before = places(model)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(ids)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = model(ids)
        for i in range(3):
            model.hotswap(tmp_path / str(i))
            graph.replay()
            expected = load(tmp_path / str(i))(IDS)
            torch.testing.assert_close(output.cpu(), expected, rtol=1e-10, atol=1e-10)
    assert places(model) == before
