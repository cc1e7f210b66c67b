"""Layers with ternary bases: what they keep, share and recognise, whatever the form."""

import pytest
import torch
from helpers.common import (
    assert_same_bits,
    make_bases,
    make_layer,
    normal,
    on_devices,
    over,
)
from helpers.counted import SavedBytes
from helpers.layer_op import gradients
from helpers.ternary import FORMS

import randlora
from randlora.bases.patterns import StoredBits, StoredLists, StoredPlanes

forms = pytest.mark.parametrize("form", FORMS)


def layer_of(form, in_features=96, out_features=130, r=8, **arguments):
    return make_layer(
        in_features, out_features, r, bases=make_bases(in_features, out_features, r, **FORMS[form]), **arguments
    )


@forms
@over("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_layer_keeps_its_input_and_never_expands_its_bases(form, dtype, dropout):
    layer = layer_of(form, dtype=dtype, randlora_dropout=dropout)
    x = normal(64, 96, dtype=dtype).requires_grad_()
    bases = layer.bases["default"]
    layer(x)  # makes the pattern
    with SavedBytes([*layer.parameters(), *bases.pattern(96)[0]]) as saved:
        y = layer(x)
    y.sum().backward()
    assert saved.bytes == x.nbytes
    assert not bases.copies.dense and layer.get_delta_weight("default").shape == (130, 96) and not bases.copies.dense


@on_devices
@pytest.mark.parametrize(("kind", "limit"), [("sparse", 4.3), ("very_sparse", 0.8), ("sign", 2.2)])
def test_bytes_of_the_bases(kind, limit, device):
    """In MiB. Dense bases of this size take 64 in fp32; PEFT stores these the same way. No lists on CUDA."""
    if device == "cuda" and kind == "very_sparse":
        limit = 4.3
    bases = randlora.RandomBases(4096, 4096, 32, kind, device=device)
    bases.pattern(4096)
    assert 0.2 * limit < bases.nbytes / 2**20 <= limit


@pytest.mark.parametrize(
    "sparsity, form, planes",
    [(1.0, StoredBits, 1), (2.4, StoredBits, 2), (2.5, StoredPlanes, 2), (9.9, StoredPlanes, 2)],
)
def test_which_form_is_taken(sparsity, form, planes):
    bases = randlora.RandomBases(64, 48, 4, "sparse", sparsity=sparsity)
    pattern, _ = bases.pattern(48)
    assert type(bases.copies.packed[torch.device("cpu")][0]) is form and pattern[-1].shape == (48, planes, 4)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert randlora.bases.patterns.form_of(sparsity, cuda) is StoredBits
    assert [randlora.bases.patterns.form_of(10.0, device) for device in (cpu, cuda)] == [StoredLists, StoredBits]
    assert randlora.RandomBases(64, 48, 4).pattern(48) is None


@forms
def test_layers_of_several_sizes_share_one_pattern(form):
    bases = randlora.RandomBases(64, 48, 4, **FORMS[form])
    layers = [make_layer(i, o, 4, bases=bases) for i, o in ((48, 64), (20, 33), (64, 16))]
    x = [normal(5, layer.in_features) for layer in layers]
    y = [layer(t) for layer, t in zip(layers, x, strict=True)]
    nbytes = bases.nbytes
    layers.append(make_layer(100, 80, 4, bases=bases))  # the store grows, and keeps its values
    layers[-1](normal(3, 100))
    assert bases.nbytes > nbytes
    for layer, t, before in zip(layers, x, y, strict=False):
        torch.testing.assert_close(layer(t), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["lists", "planes"])
def test_pefts_ternary_bases_are_recognised(form, values):
    """PEFT stores them dense in fp32 and divided by their standard deviation."""
    drawn = randlora.RandomBases(130, 96, 8, **FORMS[form]).draw(torch.float32, torch.device("cpu"))
    A, B = ((t / t.std()).to(values) for t in drawn)
    layer = make_layer(96, 130, 8, randlora_A=A, randlora_B=B)
    x = normal(7, 96)
    exact = x.double() @ (
        layer.weight.double()
        + randlora.functional.delta_weight(
            A.double(), B.double(), layer.randlora_lambda["default"].double(), layer.randlora_gamma["default"].double(),
            layer.scaling["default"], 96, 130,
        )
    ).T + layer.bias.double()  # fmt: skip
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-5, atol=2e-5)
    pattern = layer.pattern("default")
    assert len(pattern) == (5 if form == "lists" else 3)
    assert make_layer(96, 130, 8).pattern("default") is None


@pytest.mark.parametrize("form", ["bits", "sign"])
def test_given_bases_stay_dense_where_packing_saves_nothing(form):
    A, B = (1.7 * t for t in randlora.RandomBases(130, 96, 8, **FORMS[form]).draw(torch.float32, torch.device("cpu")))
    assert make_layer(96, 130, 8, randlora_A=A, randlora_B=B).pattern("default") is None
    # PEFT's own draw is not kept: where it is bits, it is packed, and the scale is that of its values.
    made, scale = randlora.bases.patterns.of_tensors(A, B, held=False)
    assert type(made) is StoredBits and made.tensors.b_planes.shape[1] == (1 if form == "sign" else 2)
    torch.testing.assert_close(scale, 1.7**2, rtol=1e-6, atol=0)
    got = torch.ops.randlora.packed_expand(made.of(96), 12, 96, 130, torch.float32)
    assert_same_bits(got[0] * A.abs().max(), A)
    assert_same_bits((got[1].t() * B.abs().max()).contiguous(), B.flatten(1))
    mixed, _ = randlora.bases.patterns.of_tensors(A * (A > 0), B, held=False)
    assert type(mixed) is StoredBits and mixed.tensors.b_planes.shape[1] == 2


@forms
def test_compile_autocast_inference_and_merge(form):
    torch._dynamo.reset()
    layer = layer_of(form)
    x = normal(12, 96).requires_grad_()
    expected = layer(x)
    inputs = (x, *layer.randlora_lambda.values(), *layer.randlora_gamma.values())
    wanted = gradients(expected, inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        gradients(got, (x, *layer.randlora_lambda.values(), *layer.randlora_gamma.values())), wanted, strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert (low - expected).norm() < 0.01 * expected.norm()
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        before = layer.weight.clone()
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        layer.unmerge()
    assert_same_bits(layer.weight, before)


def test_explain_knows_the_forms(capsys):
    for form in ("lists", "planes", "sign"):
        text = randlora.explain(layer_of(form, 512, 512, 32), 4096)
        assert "<- chosen" in text and "factored" in text
    assert capsys.readouterr().out
