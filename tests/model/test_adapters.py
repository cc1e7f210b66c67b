"""Several adapters on one model: each computes what it would alone, whatever is done to the others."""

import gc

import pytest
import torch
from helpers.models import (
    IDS,
    WIDTH,
    adapt,
    add,
    assert_computes,
    assert_unchanged,
    layers_of,
    merged_by_hand,
    net,
    snapshot,
)
from torch.testing import assert_close

from randlora import RandLoraConfig, RandLoraModel

OTHERS = {
    "rank": {"r": 3},
    "larger_rank": {"r": 40},
    "kind": {"kind": "sign"},
    "hadamard": {"kind": "hadamard"},
    "very_sparse": {"very_sparse": True},
    "seed": {"projection_prng_key": 9},
    "pefts_bases": {"prng": "peft"},
    "number_of_bases": {"num_bases": 2},
    "alpha": {"randlora_alpha": 11},
    "fewer_targets": {"target_modules": ["v_proj"]},
    "other_and_larger_targets": {"target_modules": ["head", "up_proj"]},
    "everything_else": {"r": 5, "kind": "sparse", "projection_prng_key": 2**63, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("settings", OTHERS.values(), ids=OTHERS)
def test_side_by_side(settings):
    model = adapt(net())
    before = model(IDS)
    add(model, "b", 2, **settings)
    assert torch.equal(model(IDS), before)
    model.set_adapter("b")
    alone = adapt(net(), "b", 2, **settings)
    assert torch.equal(model(IDS), alone(IDS))
    assert_computes(model, ["b"])
    model.set_adapter(["default", "b"])
    assert_computes(model, ["default", "b"])
    model.merge_adapter(["b"])
    assert_computes(model, [], plain=merged_by_hand(net(), model, ["default", "b"]))
    model.unmerge_adapter()
    model.delete_adapter("b")
    assert torch.equal(model(IDS), before)
    assert torch.equal(model.merge_and_unload()(IDS), adapt(net()).merge_and_unload()(IDS))


def test_a_larger_layer_later():
    model = adapt(net(), target_modules=["q_proj"])
    before = model(IDS)
    bases = model.model.layers[0].q_proj.bases["default"]
    add(model, "b", 2, target_modules=["up_proj", "head"])
    assert model.model.layers[0].up_proj.bases["b"] is bases and bases.max_dim >= 22
    assert torch.equal(model(IDS), before)
    model.set_adapter("b")
    assert torch.equal(model(IDS), adapt(net(), "b", 2, target_modules=["up_proj", "head"])(IDS))


def test_very_sparse_adapters_of_other_sizes_keep_their_own_sparsity():
    config = RandLoraConfig(r=4, randlora_alpha=3, target_modules=["head"], very_sparse=True)
    model = adapt(net(), "default", very_sparse=True, target_modules=["q_proj"])
    model.add_adapter("b", config)  # min_dim 7, not 13
    sparsities = {n: layers_of(model, n).popitem()[1].bases[n].sparsity for n in ("default", "b")}
    assert sparsities == pytest.approx({"default": WIDTH**0.5, "b": 7**0.5})


def test_equal_bases_are_shared_and_freed():
    gc.collect()
    model = adapt(net(), projection_prng_key=77)
    add(model, "b", 2, projection_prng_key=77, randlora_alpha=1, target_modules=["head"])
    add(model, "c", 3, projection_prng_key=78)
    found = {id(layer.bases[name]) for layer in layers_of(model).values() for name in layer.bases}
    assert len(found) == 2
    model(IDS)
    bases = model.model.head.bases["b"]
    # max_dim 22, min_dim 13, n = 4, r = 4, float64; not PEFT's max over in and out apart
    assert bases.nbytes == 8 * (4 * 13 + 22 * 4 * 4)


# ---- which are active, which are trained ----


def trained(model):
    return {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}


def test_activation():
    model = adapt(net())
    add(model, "b", 2)
    assert model.active_adapters == ["default"] and model.active_adapter == "default" and trained(model) == {"default"}
    model.set_adapter("b")
    assert model.active_adapter == "b" and trained(model) == {"b"} and model.active_peft_config.r == 4
    model.set_adapter(["b", "default", "b"])
    assert model.active_adapter == ["b", "default"] and trained(model) == {"b", "default"}
    model.set_adapter("b", inference_mode=True)
    assert trained(model) == set()
    model.set_adapter([])
    assert torch.equal(model(IDS), net()(IDS))
    with pytest.raises(ValueError, match="no adapter is active"):
        _ = model.active_peft_config


@pytest.mark.parametrize("change", ["add", "delete", "weighted", "disable"])
@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_else_changes_what_is_trained(change, frozen):
    """PEFT keeps requires_grad of what was there; a frozen model must not start to train because one was added."""
    model = adapt(net())
    add(model, "b", 2)
    if frozen:
        model.set_adapter("default", inference_mode=True)
    else:
        model.model.layers[0].q_proj.randlora_lambda["default"].requires_grad_(False)
    before = [(p, p.requires_grad) for name, p in model.named_parameters() if not name.endswith(".b")]
    if change == "add":
        add(model, "c", 3, target_modules="all-linear")
    elif change == "delete":
        model.delete_adapter("b")
    elif change == "weighted":
        model.add_weighted_adapter(["default"], [2.0], "c")
    else:
        with model.disable_adapter():
            assert trained(model) == set()
    assert all(p.requires_grad == flag for p, flag in before)
    old = {id(p) for p, _ in before}
    assert not any(p.requires_grad for p in model.parameters() if id(p) not in old)


def test_all_that_is_trained_gets_gradients():
    """The bias of a module whose copy is saved is not called, and not trained: DDP would wait for its gradient."""
    model = adapt(net(), modules_to_save=["head"], bias="all")
    add(model, "b", 2)
    for name, used in (("default", "modules_to_save.default"), ("b", None), ("default", "modules_to_save.default")):
        model.set_adapter(name)
        model.zero_grad()
        model(IDS).sum().backward()
        wanted = {key for key, p in model.named_parameters() if p.requires_grad}
        assert wanted == {key for key, p in model.named_parameters() if p.grad is not None}
        assert {key for key in wanted if ".head." in key} == {
            f"model.head.{used}.{x}" for x in ("weight", "bias") if used
        }


def test_set_requires_grad():
    model = adapt(net(), modules_to_save=["head"])
    add(model, "b", 2)
    model.set_requires_grad(["default", "b"], False)
    assert trained(model) == set()
    model.set_requires_grad("b")
    assert trained(model) == {"b"} and model.active_adapters == ["default"]
    with pytest.raises(ValueError, match="no adapter named 'c'"):
        model.set_requires_grad("c")


def test_set_adapter_unmerges():
    model = adapt(net())
    add(model, "b", 2, target_modules=["head"])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="merged adapters are unmerged first"):
        model.set_adapter("b")
    assert_computes(model, ["b"])


def test_deleting():
    model = adapt(net())
    add(model, "b", 2, target_modules=["q_proj", "head"])
    add(model, "c", 3)
    model.delete_adapter("default")
    assert model.active_adapters == ["b"] and list(model.peft_config) == ["b", "c"] and trained(model) == {"b"}
    assert_computes(model, ["b"])
    assert not any("default" in key for key in model.state_dict())
    model.set_adapter(["b", "c"])
    model.delete_adapter("b")
    assert model.active_adapters == ["c"]
    assert_computes(model, ["c"])
    model.delete_adapter("c")
    assert model.active_adapters == [] and torch.equal(model(IDS), net()(IDS))
    add(model, "d", 4)
    assert model.active_adapters == ["d"]
    assert_computes(model, ["d"])
    assert model.unload().state_dict().keys() == net().state_dict().keys()


def test_deleting_while_none_is_active():
    model = adapt(net())
    add(model, "b", 2)
    model.set_adapter([])
    model.delete_adapter("default")
    assert model.active_adapters == [] and trained(model) == set()
    assert torch.equal(model(IDS), net()(IDS))


def test_deleting_a_merged_adapter():
    model = adapt(net())
    add(model, "b", 2)
    model.merge_adapter("b")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'b' is merged"):
        model.delete_adapter("b")
    assert_unchanged(model, before)
    model.delete_adapter("default")  # what is merged stays
    assert model.active_adapters == ["b"]
    assert_computes(model, [], plain=merged_by_hand(net(), model, ["b"]))


# ---- disabling ----


def test_disable():
    model = adapt(net())
    before = model(IDS)
    with model.disable_adapter():
        assert torch.equal(model(IDS), net()(IDS))
        with model.disable_adapter():
            pass
        assert torch.equal(model(IDS), net()(IDS))  # the inner one does not switch them on again
    assert torch.equal(model(IDS), before)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(model(IDS), before) and trained(model) == {"default"}


def test_disable_until_enabled():
    model = adapt(net())
    before = model(IDS)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    assert torch.equal(model(IDS), net()(IDS)) and trained(model) == set()
    model.enable_adapter_layers()
    assert torch.equal(model(IDS), before) and trained(model) == {"default"}


def test_changes_while_disabled():
    model = adapt(net())
    with model.disable_adapter():
        add(model, "b", 2, target_modules="all-linear")  # wraps the head, which had none
        model.set_adapter("b")
        assert torch.equal(model(IDS), net()(IDS)) and trained(model) == set()
    assert trained(model) == {"b"}
    assert_computes(model, ["b"])


def test_disable_while_merged():
    model = adapt(net())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(IDS), net()(IDS))
    assert_computes(model, ["default"])


# ---- trained beside them ----


def test_modules_to_save_of_several_adapters():
    model = adapt(net(), modules_to_save=["head"])
    add(model, "b", 2, modules_to_save=["head"], target_modules=["q_proj"])
    add(model, "c", 3)
    with torch.no_grad():
        for i, name in enumerate(["default", "b"]):
            model.model.head.modules_to_save[name].bias.add_(i + 1)
    for name, shift in (("default", 1), ("b", 2), ("c", 0)):
        model.set_adapter(name)
        assert_close(model(IDS), merged_by_hand(net(), model, [name])(IDS) + shift)
    model.set_adapter(["b", "c"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="default and b cannot act together: both have a copy of 'head'"):
        model.set_adapter(["default", "b"])
    assert_unchanged(model, before)
    model.delete_adapter("b")
    assert list(model.model.head.modules_to_save) == ["default"]
    with pytest.raises(ValueError, match="'head', which another adapter has among its modules_to_save"):
        model.add_adapter("d", RandLoraConfig(r=2, target_modules=["head"]))


def test_modules_to_save_that_contain_adapted_layers():
    model = adapt(net())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers\.0' contains layers that another adapter adapts"):
        model.add_adapter("b", RandLoraConfig(r=2, target_modules=["head"], modules_to_save=["0"]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("modules", [None, ["head"], ["embed", "head"]])
@pytest.mark.parametrize("bias", ["none", "all", "randlora_only"])
@pytest.mark.parametrize("of_first", [True, False])
def test_what_is_trained_is_used(of_first, bias, modules):
    """DistributedDataParallel waits for the gradients of everything that requires one."""
    first, second = (
        {"bias": bias, "modules_to_save": modules},
        {"target_modules": ["q_proj", "head"][: 1 + (not modules)]},
    )
    model = adapt(net(), **(first if of_first else second))
    add(model, "b", 2, **(second if of_first else first))
    for names in ("default", "b", ["default", "b"], "default"):
        model.set_adapter(names)
        model.zero_grad(set_to_none=True)
        model(IDS).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
        of_head = {name.removeprefix("model.head.") for name in trained if name.endswith("bias") and ".head." in name}
        act = names if isinstance(names, list) else [names]
        if modules and ("default" if of_first else "b") in act:
            assert of_head == {f"modules_to_save.{'default' if of_first else 'b'}.bias"}


def test_only_one_adapter_trains_biases():
    model = adapt(net(), bias="all")
    add(model, "b", 2)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="bias='randlora_only': the biases are the base model's, and adapter 'default'"
    ):
        add(model, "c", 3, bias="randlora_only")
    assert_unchanged(model, before)
    model.set_adapter("b")
    assert trained(model) == {"b"}
    model.set_adapter("default")
    assert trained(model) == {"default", "bias"}
    model.delete_adapter("default")
    assert trained(model) == {"b"}


# ---- names and files ----


@pytest.mark.parametrize("name", ["default", "", "a.b", "a/b", "__base__", "keys", "training", None, 3], ids=repr)
def test_bad_names(name):
    model = adapt(net())
    before = snapshot(model)
    with pytest.raises((TypeError, ValueError), match=r"adapter_name|already has an adapter"):
        model.add_adapter(name, RandLoraConfig(r=2, target_modules=["q_proj"]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["weight", "base_layer", "model", "b-1", "größer", "randlora_lambda"])
def test_odd_names(name, tmp_path):
    model = add(adapt(net()), name, 2)
    model.set_adapter(name)
    assert_computes(model, [name])
    model.save_pretrained(tmp_path)
    assert torch.equal(RandLoraModel.from_pretrained(net(), tmp_path / name, name)(IDS), model(IDS))


def test_an_adapter_on_merged_layers_is_refused():
    model = adapt(net())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"'layers\.0\.q_proj' has merged adapters: call unmerge_adapter"):
        model.add_adapter("b", RandLoraConfig(r=2, target_modules=["q_proj"]))
    assert_unchanged(model, before)
    add(model, "b", 2, target_modules=["head"])  # the head is not merged, and the others stay so
    assert model.model.layers[0].q_proj.merged
    model.merge_adapter("b")
    assert_computes(model, [], plain=merged_by_hand(net(), model, ["default", "b"]))


def test_loading_leaves_what_is_trained_alone(tmp_path):
    model = adapt(net(), seed=5)
    model.save_pretrained(tmp_path)
    loaded = RandLoraModel.from_pretrained(net(), tmp_path)
    assert trained(loaded) == set() and not loaded.training and not any(m.training for m in loaded.modules())
    loaded.load_adapter(tmp_path, "b")
    assert trained(loaded) == set() and loaded.active_adapters == ["default"]
    loaded.set_adapter("b")
    assert trained(loaded) == {"b"} and torch.equal(loaded(IDS), model(IDS))
    again = RandLoraModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert trained(again) == {"default"} and again.training
    model.load_adapter(tmp_path, "b", is_trainable=True)
    assert trained(model) == {"default"}
    model.delete_adapter("default")
    model.delete_adapter("b")
    model.load_adapter(tmp_path, "c")
    assert model.active_adapters == ["c"] and trained(model) == set()
