"""Another adapter's numbers in layers of every kind, wherever they are kept, from PEFT's files, under compiled code."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.common import normal
from helpers.models import IDS, adapt, assert_unchanged, layers_of, net, randomize, snapshot, tiny_gpt2
from helpers.swapped import load, places, with_all, written

import randlora
from randlora import RandLoraModel

DATA = Path(__file__).resolve().parents[1] / "data"


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
    other = written(tmp_path / "other", 8, with_all)
    with torch.inference_mode():
        model = with_all(1).eval()
    for again in (False, True):
        with torch.inference_mode(again):
            randomize(model) if again else None
            model.hotswap(tmp_path / "other")
    with torch.no_grad():
        assert torch.equal(model(IDS), other(IDS))


def test_numbers_that_a_narrower_parameter_cannot_hold(tmp_path):
    other = adapt(net())
    with torch.no_grad():
        layers_of(other)["layers.1.up_proj"].randlora_gamma["default"].fill_(1e5)
    other.save_pretrained(tmp_path)
    model = adapt(net(torch.float32)).half()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"{tmp_path}: randlora_gamma of 'layers.1.up_proj' holds .* too large for torch.float16"
    ):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)


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
