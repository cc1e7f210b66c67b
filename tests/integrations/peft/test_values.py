"""PEFT's RandLoRA and the accelerated one: the same bases, outputs, gradients and training runs; less memory."""

import copy

import pytest
import torch
from helpers.common import assert_no_worse_than_plain, normal, over, reference_dW

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import KINDS, adapt, bases, both, config, conv1d, layers, llama, logits, tokens  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402

SHAPES = {"wide": (24, 41), "tall": (41, 24), "square": (33, 33), "large": (144, 170), "large tall": (170, 144)}
FORMS = {"dense": None, "sparse": 3, "very_sparse": 5}  # lengths of the patterns of large layers: planes, lists
MODES = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.float32, True)}


def model_of(shape, dtype):
    if shape == "conv1d":
        return conv1d(41, 24, dtype)
    return layers(dtype, layer=SHAPES[shape])


def run(model, x, g, autocast):
    """Output and the gradients of x, lambda and gamma."""
    layer, x = model.base_model.model.layer, x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    parameters = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    return y.detach(), *torch.autograd.grad(y, (x, *parameters), g.to(y.dtype))


def exact_run(model, x, g):
    layer = model.base_model.model.layer
    values = [x, layer.randlora_lambda["default"], layer.randlora_gamma["default"]]
    x, lam, gamma = (t.detach().double().requires_grad_() for t in values)
    weight, bias = (t.detach().double() for t in (layer.get_base_layer().weight, layer.get_base_layer().bias))
    A, B = (t.double() for t in bases(model))
    dW = reference_dW(A, B, lam, gamma, layer.scaling["default"], layer.in_features, layer.out_features)
    y = torch.nn.functional.linear(x, dW + (weight.T if layer.fan_in_fan_out else weight), bias)
    return y.detach(), *torch.autograd.grad(y, (x, lam, gamma), g.double())


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["upcast", "as_is"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [*SHAPES, "conv1d"])
def test_outputs_and_gradients(shape, mode, kind, autocast_adapter_dtype):
    """Errors against float64 are at most twice PEFT's.

    On a bf16 model PEFT computes the update in fp32, here it is computed in bf16. There the gradients of lambda and
    gamma are compared with those that PEFT computes in bf16, under autocast.
    """
    dtype, autocast = MODES[mode]
    arguments = {"autocast_adapter_dtype": autocast_adapter_dtype}
    theirs, ours = both(model_of(shape, dtype), config("layer", **KINDS[kind]), **arguments)
    layer = ours.base_model.model.layer
    if "large" in shape:
        pattern = layer.pattern("default")
        assert (pattern and len(pattern)) == FORMS[kind]
    x, g = normal(7, layer.in_features, seed=9, dtype=dtype), normal(7, layer.out_features, seed=10, dtype=dtype)
    exact, got, plain = exact_run(theirs, x, g), run(ours, x, g, autocast), run(theirs, x, g, autocast)
    if mode == "bf16":
        plain = *plain[:2], *run(theirs, x, g, True)[2:]
    for a, b, c in zip(got, plain, exact, strict=True):
        assert_no_worse_than_plain(a, b, c)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["upcast", "as_is"])
@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("kind", KINDS)
def test_bases(kind, dtype, autocast_adapter_dtype):
    """Those that PEFT has, for layers of different shapes, in the dtype of the weights."""
    model = layers(dtype, up=(24, 50), down=(50, 41))
    for r, seed in ((5, 0), (7, 42)):
        arguments = {"r": r, "projection_prng_key": seed, **KINDS[kind]}
        theirs, ours = both(model, config("up", "down", **arguments), autocast_adapter_dtype=autocast_adapter_dtype)
        for a, b in zip(bases(theirs), bases(ours), strict=True):
            assert b.dtype == dtype and torch.equal(a, b.to(a.dtype))
            assert a.dtype == (torch.float32 if autocast_adapter_dtype else dtype)


def test_bases_on_a_machine_without_bf16(monkeypatch):
    """Fact 15: PEFT draws other numbers there; here they are the same, and PEFT's are to be had on request."""
    from peft.tuners.randlora import model as peft_model

    model = layers(layer=(24, 41))
    usual = bases(adapt(model, config("layer")))
    monkeypatch.setattr(peft_model, "is_bf16_available", lambda *_, **__: False)
    theirs, ours = (bases(m) for m in both(model, config("layer")))
    assert not torch.equal(theirs[1], usual[1]) and torch.equal(ours[1], usual[1])
    with integration.enable(prng="peft-fp16"):
        requested = bases(peft.get_peft_model(copy.deepcopy(model), config("layer")))
    for a, b in zip(theirs, requested, strict=True):
        assert torch.equal(a, b)


def train(model, steps, optimizer=None, first=0):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        ids = tokens(seed=step % 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


@over("dtype", (torch.float32, torch.bfloat16))
def test_a_run_may_change_over(dtype):
    """Half a run with PEFT, the other half accelerated with the same optimizer: the losses of a run with PEFT alone."""
    targets = "q_proj", "v_proj", "up_proj", "down_proj"
    model = peft.get_peft_model(llama(dtype), config(*targets))
    whole, _ = train(copy.deepcopy(model), 10)
    half, optimizer = train(model, 5)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert integration.accelerate(model) is model
    assert all(a is b for a, b in zip(parameters, (p for p in model.parameters() if p.requires_grad), strict=True))
    rest, _ = train(model, 5, optimizer, first=5)
    assert half == whole[:5] and whole[0] - whole[-1] > 0.3, "the loss must fall for the comparison to say something"
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(torch.tensor(rest), torch.tensor(whole[5:]), rtol=0, atol=tolerance)


def saved_storages(call):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call().sum()
    return kept


@pytest.mark.parametrize(
    "dtype, autocast",  # autocast of bf16 inputs is the case without
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
    ids=["float32", "float32-autocast", "bfloat16"],
)
def test_kept_for_backward(dtype, autocast):
    """q, k and v on one input keep that input, the parameters and the shared bases; PEFT keeps more."""
    model = layers(dtype, q=(24, 41), k=(24, 20), v=(24, 24))
    x, sizes = normal(64, 24, dtype=dtype).requires_grad_(), []
    for adapted in both(model, config("q", "k", "v")):
        inner = adapted.base_model.model

        def call(inner=inner):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return sum(getattr(inner, name)(x).sum(dtype=torch.float32) for name in "qkv")

        call()  # the casts of the bases are made once
        kept = saved_storages(call)
        known = {t.untyped_storage().data_ptr() for t in (*adapted.parameters(), *adapted.buffers())}
        sizes.append(sum(size for pointer, size in kept.items() if pointer not in known))
    theirs, ours = sizes
    copies = 24 * 5 * 5 * 4 + 41 * 5 * 5 * 4  # at most one cast of the bases, shared by the three layers
    assert ours - x.nbytes <= (copies if autocast else 0)
    assert theirs - ours > x.nbytes


def test_one_copy_of_the_bases_per_dtype():
    model = adapt(llama(torch.bfloat16), config("q_proj", "down_proj"))
    with torch.no_grad():
        for _ in range(2):
            logits(model)
    found = {id(t) for m in model.modules() if hasattr(m, "bases") for b in m.bases.values() for t in b.tensors()}
    held = {id(b): b.nbytes for m in model.modules() if hasattr(m, "bases") for b in m.bases.values()}
    assert found == {id(t) for t in bases(model)} and list(held.values()) == [sum(t.nbytes for t in bases(model))]


@pytest.mark.parametrize("kind", KINDS)
def test_ternary_bases_are_exact_in_16_bits(kind):
    """c of PEFT's (-c, 0, c) is no bf16 number: cast, it would make the whole update wrong by up to half a percent.

    For where no pattern serves: on CUDA, and for strategies that lists do not know.
    """
    model = adapt(layers(layer=(24, 41)), config("layer", **KINDS[kind]))
    pair = model.base_model.model.layer._pair("default")
    A, B, factor = pair.tensors(torch.bfloat16, torch.device("cpu"))
    product = torch.einsum("kj,oik->oij", *(t.double().squeeze(1) if t is A else t.double() for t in (A, B))) * factor
    exact = torch.einsum("kj,oik->oij", pair.A.double().squeeze(1), pair.B.double())
    assert A.dtype == B.dtype == torch.bfloat16
    torch.testing.assert_close(product, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind):
    """Fact 18: the gradient of every sample by itself, which PEFT's autograd function cannot give."""
    theirs, ours = both(layers(layer=(24, 41)), config("layer", **KINDS[kind]))
    x, g, results = normal(3, 24, seed=9), normal(3, 41, seed=10), []

    def gradient(layer, values, x, g):
        def loss(values):
            return (torch.func.functional_call(layer, values, x) * g).sum()

        return torch.func.grad(loss)(values)

    for model in (theirs, ours):
        layer = model.base_model.model.layer
        values = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
        if model is theirs:
            with pytest.raises(RuntimeError, match="setup_context"):
                gradient(layer, values, x, g)
            continue
        results = torch.func.vmap(lambda x, g: gradient(layer, values, x, g))(x, g)  # noqa: B023
    assert {name: tuple(t.shape) for name, t in results.items()} == {n: (3, *v.shape) for n, v in values.items()}
    expected = run(theirs, x, g, False)[2:]
    for name, total in zip(("randlora_lambda.default", "randlora_gamma.default"), expected, strict=True):
        torch.testing.assert_close(results[name].sum(0), total, rtol=1e-4, atol=1e-4)


def test_bases_that_peft_holds_are_kept():
    """They are its buffers, and need not be those of any seed."""
    model = adapt(model_of("wide", torch.float32), config("layer"))
    with pytest.raises(ValueError, match="the bases of adapter 'default' stay as they are: these bases were given"):
        randlora.keep_bases(model, False)
