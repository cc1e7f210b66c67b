"""Several adapters on one model, batches that mix them, and merging."""

import copy

import pytest
import torch
from helpers.common import normal, over
from torch.testing import assert_close

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import adapt, bases, both, config, layers, llama, logits, randomize, tokens, version  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402

FIRST = config("q_proj", "v_proj", "down_proj", r=8)
SECOND = config("q_proj", "v_proj")
OTHERS = {
    "rank": config("q_proj", "v_proj", "down_proj", r=4),
    "kind": config("q_proj", "v_proj", "down_proj", r=8, sparse=True),
    "targets": config("up_proj", "k_proj", r=8),
    "seed": config("q_proj", "v_proj", "down_proj", r=8, projection_prng_key=3),
    "everything": config("q_proj", "up_proj", r=3, very_sparse=True, projection_prng_key=3, save_projection=False),
}


def plain_alone(config, seed):
    return randomize(adapt(llama(), config, False), seed)


def with_second(second):
    """A model with the adapters default and other, and PEFT's models that have one of them each."""
    model = adapt(llama(), FIRST)
    model.add_adapter("other", copy.deepcopy(second))
    singles = {"default": plain_alone(FIRST, 100), "other": plain_alone(second, 200)}
    state = model.state_dict()
    for adapter, single in singles.items():
        for name, value in single.named_parameters():
            if name.endswith(".default") and "randlora_" in name:
                state[name.removesuffix("default") + adapter].copy_(value)
    return model, singles


@pytest.mark.parametrize("second", OTHERS)
def test_every_adapter_has_its_own_bases(second, tmp_path):
    """Facts 12 and 13: other rank, sparsity, targets, seed; each computes and loads as if it were alone."""
    model, singles = with_second(OTHERS[second])
    for adapter, single in singles.items():
        model.set_adapter(adapter)
        torch.testing.assert_close(logits(model), logits(single), rtol=1e-4, atol=1e-4)
        for a, b in zip(bases(model, adapter), bases(single), strict=True):
            assert torch.equal(a, b)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="other")
    torch.testing.assert_close(logits(again), logits(singles["other"]))


def test_equal_bases_are_held_once():
    model = adapt(llama(), FIRST)
    model.add_adapter("same", config("q_proj", "v_proj", "down_proj", r=8, randlora_alpha=3))
    model.add_adapter("other", copy.deepcopy(OTHERS["rank"]))
    assert all(a is b for a, b in zip(bases(model), bases(model, "same"), strict=True))
    assert not torch.equal(bases(model)[1][:, 0, :4], bases(model, "other")[1][:, 0])
    model.to(torch.bfloat16)
    assert all(a is b for a, b in zip(bases(model), bases(model, "same"), strict=True))


def test_active_together_and_deleted():
    model, singles = with_second(OTHERS["everything"])
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(5, 24)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    parts = [s.base_model.model.model.layers[0].self_attn.q_proj for s in singles.values()]
    expected = sum(part(x) for part in parts) - layer.base_layer(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.merge_adapter(["other"])  # the other one acts beside it; PEFT drops it
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()

    model.delete_adapter("default")
    assert list(model.base_model.randlora_A) == ["other"] and model.active_adapters == ["other"]
    torch.testing.assert_close(logits(model), logits(singles["other"]), rtol=1e-4, atol=1e-4)
    with integration.enable():
        model.add_adapter("default", config("q_proj", r=2))
    assert bases(model)[0].shape == (2, 1, 24)
    model.set_adapter("default")
    assert not torch.equal(logits(randomize(model, 11)), logits(llama()))


def test_added_again_under_the_same_name():
    model = adapt(llama(), FIRST)
    model.add_adapter("kept", copy.deepcopy(FIRST))
    with pytest.raises(ValueError, match="already"):
        model.base_model.inject_adapter(model.base_model.model, "default")
    model.delete_adapter("default")
    model.add_adapter("default", copy.deepcopy(OTHERS["everything"]))
    model.set_adapter("default")
    model.delete_adapter("kept")
    single = adapt(llama(), OTHERS["everything"], False)
    assert all(torch.equal(a, b) for a, b in zip(bases(model), bases(single), strict=True))
    torch.testing.assert_close(logits(randomize(model)), logits(single), rtol=1e-4, atol=1e-4)
    assert not any("randlora_A" in name for name in model.state_dict())


def test_a_failing_adapter_leaves_nothing():
    model = adapt(layers(a=(8, 6), b=(6, 4)), config("a", r=2))
    for wrong, message in (
        (config("nothing"), "'nothing'.* not found|No layers types compatible"),
        (config("b", r=0), "r must be at least 1, got 0"),
        (config("b", bias="all"), r"only (1|one) adapter"),
    ):
        if wrong.bias == "all":
            model.base_model.peft_config["default"].bias = "all"
        with pytest.raises(ValueError, match=message):
            model.add_adapter("other", wrong)
        assert list(model.base_model.randlora_A) == list(model.base_model.randlora_B) == ["default"]


def test_mixed_batch():
    """Fact 14: every sample goes through its own adapter."""
    model, singles = with_second(OTHERS["everything"])
    model.eval()
    ids = tokens(batch=5)
    names = ["other", "__base__", "default", "other", "default"]
    alone = {"__base__": logits(llama(), ids), **{n: logits(single, ids) for n, single in singles.items()}}
    expected = torch.stack([alone[name][i] for i, name in enumerate(names)])
    torch.testing.assert_close(logits(model, ids, adapter_names=names), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, ids), alone["default"], rtol=1e-4, atol=1e-4)
    generated = model.generate(
        input_ids=ids, adapter_names=names, max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0
    )
    for i, name in enumerate(names):
        single = singles.get(name) or llama()
        one = single.eval().generate(
            input_ids=ids[i : i + 1], max_new_tokens=3, do_sample=False, num_beams=2, pad_token_id=0
        )
        assert torch.equal(generated[i : i + 1], one)
    for wrong, message in ((["default"] * 2, "one name per sample"), (["nobody"] * 5, "nobody")):
        with pytest.raises(ValueError, match=message):
            logits(model, ids, adapter_names=wrong)
    torch.testing.assert_close(logits(model, ids), alone["default"], rtol=1e-4, atol=1e-4)


# ---- merging ----


def adapted_weights(model):
    return {n: m.base_layer.weight.clone() for n, m in model.named_modules() if hasattr(m, "randlora_lambda")}


@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_merge_and_unmerge(dtype):
    """Fact 16: 16-bit weights come back bit for bit; merged they are W + dW, rounded once."""
    model = adapt(llama(dtype), FIRST)
    before, output = adapted_weights(model), logits(model).float()
    model.merge_adapter(safe_merge=True)
    for name, module in model.named_modules():
        if hasattr(module, "randlora_lambda"):
            exact = before[name].double() + module.get_delta_weight("default").double()
            assert torch.equal(module.base_layer.weight, exact.to(torch.float32).to(dtype)) or dtype == torch.float32
            torch.testing.assert_close(module.base_layer.weight.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype]
    torch.testing.assert_close(logits(model).float(), output, rtol=tolerance, atol=tolerance)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in adapted_weights(model).items())


def test_merge_like_peft():
    theirs = adapt(llama(), FIRST, False)
    ours = integration.accelerate(copy.deepcopy(theirs))
    for name, module in theirs.named_modules():
        if hasattr(module, "randlora_lambda"):
            other = ours.get_submodule(name)
            torch.testing.assert_close(other.get_delta_weight("default"), module.get_delta_weight("default"))
            for a, b in zip(other.get_scaled_bases("default"), module.get_scaled_bases("default"), strict=True):
                torch.testing.assert_close(a, b)
    plain = logits(theirs)
    for merged in (theirs.merge_and_unload(), ours.merge_and_unload(safe_merge=True)):
        assert (
            type(merged).__name__ == "LlamaForCausalLM"
            and type(merged.model.layers[0].mlp.down_proj) is torch.nn.Linear
        )
        torch.testing.assert_close(logits(merged), plain, rtol=1e-4, atol=1e-4)


def test_merge_with_adapters_on_other_layers():
    model, _ = with_second(OTHERS["targets"])
    before = adapted_weights(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.merge_adapter(["other"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"other.*merged"):
        model.delete_adapter("other")
    with model.disable_adapter():  # unmerges, as in PEFT
        torch.testing.assert_close(logits(model), logits(llama()))
    assert all(torch.equal(weight, before[name]) for name, weight in adapted_weights(model).items())
    torch.testing.assert_close(logits(model.unload()), logits(llama()))


def test_safe_merge_and_nan():
    model = adapt(llama(), FIRST)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    with torch.no_grad():
        layer.randlora_lambda["default"][0, 0] = torch.nan
    before = layer.base_layer.weight.clone()
    plain = adapt(llama(), FIRST, False)
    plain.load_state_dict(model.state_dict(), strict=False)
    words = []
    for broken in (plain, model):
        with pytest.raises(ValueError, match="NaN") as raised:
            broken.merge_adapter(safe_merge=True)
        words.append(str(raised.value))
    assert words[1].startswith(words[0]), "scripts may look for PEFT's words"
    assert torch.equal(layer.base_layer.weight, before)


def test_every_name_that_peft_takes_for_an_adapter():
    """PEFT keeps bases as attributes by the adapter's name: what randlora adds there must not be in the way."""
    model = adapt(layers(a=(12, 9)), config("a", r=3))
    store, theirs = bases_of(model), bases_of(adapt(layers(a=(12, 9)), config("a", r=3), False))
    public = {name for name in {*dir(store), *vars(store)} if not name.startswith("_")}
    assert public <= {*dir(theirs), *vars(theirs)}
    for name in ("kind", "owner", "pair", "share"):
        assert_close(adapt(layers(a=(12, 9)), config("a", r=3), adapter_name=name)(normal(2, 12)), model(normal(2, 12)))


def bases_of(model):
    return model.base_model.randlora_A


def views(thing, name):
    """Everything public that has an entry for an adapter `name`, by attribute."""
    for attribute in dir(thing):
        value = None if attribute.startswith("_") else getattr(thing, attribute, None)
        if hasattr(value, "keys") and hasattr(value, "__contains__") and name in value:
            yield attribute, value


@pytest.mark.parametrize("whose", ["PEFT's", "ours"])
def test_a_deleted_adapter_is_nowhere(whose):
    """Also not in what was asked for before it was deleted; earlier versions of PEFT leave it in dicts of their own."""

    def deleted(model, config):
        """What has a deleted adapter still, and the model."""
        model.add_adapter("stays", config)
        found = [(attribute, value) for m in (model, *model.modules()) for attribute, value in views(m, "gone")]
        layer = next(module for module in model.modules() if hasattr(module, "randlora_lambda"))
        held = getattr(layer, "bases", None)
        model.delete_adapter("gone")
        return {name for name, value in found if "gone" in value}, {name for name, _ in found}, held

    plain, _, _ = deleted(adapt(llama(), SECOND, False, adapter_name="gone"), copy.deepcopy(SECOND))
    if whose == "ours":
        second = randlora.RandLoraConfig(r=5, target_modules=["q_proj", "v_proj"])
        model = randlora.get_peft_model(llama(), copy.deepcopy(second), adapter_name="gone")
    else:
        second, model = SECOND, adapt(llama(), SECOND, adapter_name="gone")
    left, seen, held = deleted(model, copy.deepcopy(second))
    assert {"bases", "num_bases", "r", "scaling", "randlora_lambda", "randlora_A"} <= seen
    assert left <= (plain if whose == "PEFT's" else set())
    assert list(held) == ["stays"] and len(held) == 1 and held["stays"] is dict(held)["stays"]
    with pytest.raises(KeyError):
        held["gone"]


def test_a_merged_adapter_is_not_deleted():
    """In PEFT's words, which it has from 0.21 on."""
    theirs, ours = both(layers(up=(5, 9), down=(9, 4)), config("up", "down"))
    words = []
    for model in (theirs, ours) if version >= (0, 21) else (ours,):
        model.add_adapter("other", config("up", "down"))
        model.merge_adapter(["default"])
        before = model(torch.ones(2, 5))
        with pytest.raises(ValueError) as raised:
            model.delete_adapter("default")
        words.append(str(raised.value))
        assert torch.equal(model(torch.ones(2, 5)), before)
        model.delete_adapter("other")
        model.unmerge_adapter()
        model.delete_adapter("default")
    assert set(words) == {"Cannot delete adapter(s) ['default'] while they are merged. Please unmerge them first."}
