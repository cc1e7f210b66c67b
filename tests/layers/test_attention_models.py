"""randlora.MultiheadAttention in a ViT block and in torch's encoders with their fused inference."""

import contextlib
import copy

import pytest
import torch
from helpers.attention_cases import E, L, N, adapt, make_base, make_inputs, make_masks, merged_by_hand
from helpers.common import normal, over, randomize
from torch import nn

import randlora
from randlora.layers.attention import MultiheadAttention, disable_fast_path, restore_fast_path

# ---- in a model ----


class Block(nn.Module):
    """As in torchvision's ViT and in open_clip."""

    def __init__(self, batch_first=True, dtype=torch.float32):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(E, dtype=dtype), nn.LayerNorm(E, dtype=dtype)
        self.attn = make_base(dtype=dtype, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(E, 41, dtype=dtype), nn.GELU(), nn.Linear(41, E, dtype=dtype))

    def forward(self, x, mask=None):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.norm2(x))


def make_block(**settings):
    torch.manual_seed(0)
    block = Block(**settings).requires_grad_(False)
    block.attn = adapt(block.attn)
    return block


def trained(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def test_a_block_trains_its_adapters_alone():
    block = make_block()
    assert len(trained(block)) == 8 and all("randlora_" in name for name in trained(block))
    x, target = normal(N, L, E), normal(N, L, E, seed=1)
    optimizer = torch.optim.Adam(trained(block).values(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad.abs().max() > 0 for p in trained(block).values())


@over("dtype", (torch.bfloat16, torch.float16, torch.float64))
def test_to_dtype(dtype):
    block, x = make_block().to(dtype), normal(N, L, E)
    y, exact = block(x.to(dtype)), make_block()(x)
    assert y.dtype == dtype
    assert ((y - exact).norm() / exact.norm()).item() < max(4 * torch.finfo(dtype).eps, 1e-5)


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    base = make_base(dtype=torch.float32, add_bias_kv=True)
    adapted = adapt(base)
    plain = copy.deepcopy(base)
    with torch.no_grad():
        for name, weight in merged_by_hand(base, adapted).items():
            plain.get_parameter(name).copy_(weight)
    inputs = make_inputs(base, dtype=torch.float32)
    arguments = {"need_weights": need_weights, "attn_mask": make_masks(L)["2d"]["attn_mask"]}
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = adapted(*inputs, **arguments), plain(*inputs, **arguments)
    exact = plain(*inputs, **arguments)[0]
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    assert (got[0] - exact).norm() <= 2 * (expected[0] - exact).norm()
    if need_weights:
        assert got[1].dtype == expected[1].dtype
    names, parameters = zip(*trained(adapted).items(), strict=True)
    assert {*names} - {"bias_k", "bias_v"} == {name for name in names if "randlora_" in name} and len(names) == 10
    gradients, exact = (
        torch.autograd.grad(y.float().square().sum(), parameters) for y in (got[0], adapted(*inputs, **arguments)[0])
    )
    for name, a, b in zip(names, gradients, exact, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm(), name


@pytest.mark.parametrize("batch_first", [True, False])
def test_compiled_in_one_graph(batch_first):
    block = make_block(batch_first=batch_first)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = normal(L, L, E).requires_grad_()
    mask = torch.ones(L, L, dtype=torch.bool).triu(1)
    wanted = [x, *trained(block).values()]
    expected = torch.autograd.grad(block(x, mask).square().sum(), wanted)
    got = torch.autograd.grad(compiled(x, mask).square().sum(), wanted)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    block = make_block(dtype=torch.float64)
    x = normal(N, L, E, dtype=torch.float64).requires_grad_()
    wanted = list(trained(block).values())

    def gradients(y):
        block.zero_grad()
        x.grad = None
        y.square().sum().backward()
        return [p.grad.clone() for p in (x, *wanted)]

    expected = gradients(block(x))
    got = gradients(torch.utils.checkpoint.checkpoint(block, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---- torch's encoders ----


def make_encoder(layers=2, attention=True, linear1=True, **settings):
    """A TransformerEncoder whose second layer is adapted, and the same with the updates merged by hand."""
    torch.manual_seed(0)
    settings = {"activation": "gelu", "batch_first": True, "dropout": 0.0, "dtype": torch.float64} | settings
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 4, 41, **settings), layers).eval()
    with torch.no_grad():
        for i, p in enumerate(plain.parameters()):
            p.add_(normal(*p.shape, seed=i), alpha=0.1)
    adapted, merged = copy.deepcopy(plain), copy.deepcopy(plain)
    layer, by_hand = adapted.layers[1], merged.layers[1]
    with torch.no_grad():
        if attention:
            layer.self_attn = adapt(layer.self_attn)
            for name, weight in merged_by_hand(by_hand.self_attn, layer.self_attn).items():
                by_hand.self_attn.get_parameter(name).copy_(weight)
        if linear1:
            layer.linear1 = randomize(randlora.Linear(layer.linear1, r=5, randlora_alpha=2))
            by_hand.linear1.weight += layer.linear1.get_delta_weight("default")
    return plain, adapted, merged


def fast_path(monkeypatch):
    """A list that grows when torch takes a fused path."""
    calls = []
    for name in ("_transformer_encoder_layer_fwd", "_nested_tensor_from_mask"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, real=real, name=name, **k: calls.append(name) or real(*a, **k))
    return calls


PADDING = make_masks(L)["padding"]["key_padding_mask"]
parts = pytest.mark.parametrize(
    "adapted_parts",
    [{"attention": False}, {"linear1": False}, {}],
    ids=["linear1", "attention", "both"],
)


@parts
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:The PyTorch API of nested tensors")
def test_encoders_compute_the_adapted_result(adapted_parts, norm_first, monkeypatch):
    plain, adapted, merged = make_encoder(norm_first=norm_first, **adapted_parts)
    disable_fast_path(adapted)
    x = normal(N, PADDING.shape[1], E, dtype=torch.float64)
    real = ~PADDING  # an encoder with nested tensors gives zeros at padded positions
    calls = fast_path(monkeypatch)
    for padding in (None, PADDING):
        with torch.no_grad():
            got, expected, before = (m(x, src_key_padding_mask=padding) for m in (adapted, merged, plain))
        torch.testing.assert_close(got[real], expected[real], rtol=1e-10, atol=1e-10)
        assert (got - before)[real].abs().max() > 0.05
        with torch.no_grad():
            for layer, by_hand in zip(adapted.layers, merged.layers, strict=True):
                got, expected = (m(x, src_key_padding_mask=padding) for m in (layer, by_hand))
                torch.testing.assert_close(got[real], expected[real], rtol=1e-10, atol=1e-10)
    assert "_transformer_encoder_layer_fwd" in calls, "torch's own layers still take their fused path"


@pytest.mark.upstream
def test_without_the_switch_torch_ignores_an_adapted_linear():
    """What the switch is for."""
    plain, adapted, _ = make_encoder(attention=False)
    x = normal(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), plain(x), rtol=1e-10, atol=1e-10)


def test_without_the_switch_adapted_attention_acts():
    """It is never ignored; what torch would do with nested tensors is refused."""
    _, adapted, merged = make_encoder(linear1=False)
    x = normal(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(adapted(x), merged(x), rtol=1e-10, atol=1e-10)
        x = normal(N, PADDING.shape[1], E, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"no nested tensors.*disable_fast_path"):
            adapted(x, src_key_padding_mask=PADDING)


@parts
def test_the_switch_is_reversible(adapted_parts, monkeypatch):
    plain, adapted, _ = make_encoder(**adapted_parts)
    model = nn.ModuleDict({"encoder": adapted, "other": plain})
    before = [(vars(m)["use_nested_tensor"], *(x.activation_relu_or_gelu for x in m.layers)) for m in (adapted, plain)]
    disable_fast_path(model), disable_fast_path(model)
    assert not adapted.use_nested_tensor and plain.use_nested_tensor
    assert [x.activation_relu_or_gelu for x in (*adapted.layers, *plain.layers)] == [2, 0, 2, 2]
    assert not copy.deepcopy(model)["encoder"].use_nested_tensor
    restore_fast_path(model)
    assert not adapted.use_nested_tensor, "adapted layers are still there"
    layer = adapted.layers[1]
    if isinstance(layer.self_attn, MultiheadAttention):
        layer.self_attn = layer.self_attn.unwrap()
    if isinstance(layer.linear1, randlora.Linear):
        layer.linear1 = layer.linear1.get_base_layer()
    restore_fast_path(copy.deepcopy(model)), restore_fast_path(model)
    after = [(vars(m)["use_nested_tensor"], *(x.activation_relu_or_gelu for x in m.layers)) for m in (adapted, plain)]
    assert after == before
    assert [vars(a).keys() for a in adapted.modules()] == [vars(a).keys() for a in plain.modules()]
    calls = fast_path(monkeypatch)
    x = normal(N, L, E, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(adapted(x), plain(x)) and len(calls) == 4


def test_an_encoder_made_from_an_adapted_layer():
    _, adapted, merged = make_encoder(linear1=False)
    with pytest.warns(UserWarning, match="use_nested_tensor is False because"):
        encoder = nn.TransformerEncoder(adapted.layers[1], 1).eval()
    x = normal(N, PADDING.shape[1], E, dtype=torch.float64)
    with torch.no_grad():
        got, expected = encoder(x, src_key_padding_mask=PADDING), merged.layers[1](x, src_key_padding_mask=PADDING)
    torch.testing.assert_close(got[~PADDING], expected[~PADDING], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformers_with_decoders(batch_first):
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": batch_first, "dtype": torch.float64}
    with pytest.warns(UserWarning, match="enable_nested_tensor") if not batch_first else contextlib.nullcontext():
        plain = nn.Transformer(E, 4, 1, 1, 41, **settings).eval()
    adapted = copy.deepcopy(plain)
    for layer, by_hand in ((adapted.encoder.layers[0], plain.encoder.layers[0]),
                           (adapted.decoder.layers[0], plain.decoder.layers[0])):  # fmt: skip
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                base = getattr(by_hand, name)
                setattr(layer, name, adapt(base))
                with torch.no_grad():
                    for parameter, weight in merged_by_hand(base, getattr(layer, name)).items():
                        base.get_parameter(parameter).copy_(weight)
    disable_fast_path(adapted)
    source, target = normal(N, L, E, dtype=torch.float64), normal(N, L + 1, E, seed=1, dtype=torch.float64)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    mask = nn.Transformer.generate_square_subsequent_mask(L + 1, dtype=torch.float64)
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            got, expected = (m(source, target, tgt_mask=mask, tgt_is_causal=True) for m in (adapted, plain))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
