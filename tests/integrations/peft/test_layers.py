"""What surrounds a layer: torch's fused encoder, other devices, hooks, base layers of users' own, randlora's tools."""

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import adapt, both, config, layers  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402


@pytest.mark.parametrize("how", ["enabled", "accelerate"])
def test_torchs_fused_encoder(how):
    """In eval mode torch's encoder reads the weights of its layers: PEFT's adapters are left out silently."""
    torch.manual_seed(0)
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True), 2)
    theirs, ours = both(encoder, config("linear1", "linear2"))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = theirs(x)
        assert not torch.allclose(theirs.eval()(x), expected, atol=0.1)
        if how == "accelerate":
            ours = integration.accelerate(theirs)
        torch.testing.assert_close(ours.eval()(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.unload()(x), encoder.eval()(x))
    assert vars(ours.base_model.model.layers[0])["activation_relu_or_gelu"] == 1


def test_randloras_own_tools():
    model = adapt(layers(layer=(24, 41)), config("layer", r=8))
    layer, x = model.base_model.model.layer, torch.randn(7, 24)
    outputs = []
    for strategy in ("auto", "factored", "materialized", "merged"):
        layer.strategy = strategy
        outputs.append(model(x))
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-3)
    assert "3 bases of rank 8, 600 tokens" in randlora.explain(layer, 600) and layer.num_bases == {"default": 3}
    with pytest.raises((TypeError, ValueError), match="adapted already"):
        randlora.Linear(layer)


def test_other_devices_get_one_copy_of_the_bases():
    """PEFT copies them at every step of every layer on another device (fact 6)."""
    model = adapt(layers(a=(24, 41), b=(41, 24)), config("a", "b"))
    pairs = [getattr(model.base_model.model, name)._pair("default") for name in "ab"]
    first, second = (pair.tensors(torch.float32, torch.device("meta")) for pair in pairs)
    assert first[0].is_meta and first[0] is second[0] and first[1] is second[1]


@pytest.mark.cuda
def test_layers_on_two_devices():
    model = adapt(layers(a=(24, 41), b=(41, 24)), config("a", "b"))
    x = torch.randn(3, 24)
    inner = model.base_model.model
    expected = inner.b(inner.a(x))
    inner.b.to("cuda")
    for _ in range(2):
        torch.testing.assert_close(inner.b(inner.a(x).cuda()).cpu(), expected, rtol=1e-4, atol=1e-3)
    pair = inner.b._pair("default")
    assert sorted(device.type for _, device in pair.bases._held) == ["cpu", "cuda"]


def test_hooks_of_accelerate():
    """accelerate moves weights of ``device_map`` models in a forward that it puts on the base layer: call that."""
    hooks = pytest.importorskip("accelerate.hooks")
    theirs, ours = both(layers(layer=(24, 41)), config("layer"))
    x, outputs = torch.randn(3, 24), []

    class Scale(hooks.ModelHook):
        def post_forward(self, module, output):
            return 3 * output

    for model in (theirs, ours):
        hooks.add_hook_to_module(model.base_model.model.layer.base_layer, Scale())
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_base_layers_with_arguments_of_their_own():
    class Shifted(torch.nn.Linear):
        def forward(self, x, shift=0.0):
            return super().forward(x) + shift

    model = torch.nn.ModuleDict({"layer": Shifted(24, 41)})
    theirs, ours = (adapted.base_model.model["layer"] for adapted in both(model, config("layer")))
    x = torch.randn(3, 24)
    assert type(ours.base_layer) is Shifted
    torch.testing.assert_close(ours(x, shift=2.0), theirs(x, shift=2.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x, 2.0), ours(x) + 2, rtol=1e-4, atol=1e-4)
