"""Sequences of PEFT's operations do with randlora what they do without it: outputs, errors, and which parameters train.

Where PEFT is known to be wrong, what it should have done is done to its model by hand, in a function named after it.
"""

import contextlib
import copy
import warnings

import pytest
import torch
from helpers.common import normal

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
hypothesis = pytest.importorskip("hypothesis")
from helpers.peft_models import config, layers, randomize, version  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from peft.utils.other import ModulesToSaveWrapper  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

pytestmark = pytest.mark.skipif(version < (0, 21), reason="earlier versions have more defects of their own")

NAMES = ("default", "b", "c")
X = normal(4, 8, seed=9)


class Both:
    """PEFT's model and the accelerated one, and what a sequence does to them."""

    def __init__(self, targets, saved):
        self.models = []
        for accelerated in (False, True):
            model = layers(x=(8, 8), y=(8, 8), z=(8, 8), head=(8, 3))  # equal sizes: PEFT's bases are then everyone's
            with integration.enable() if accelerated else contextlib.nullcontext():
                self.models.append(peft.get_peft_model(model, self.config(targets, saved)))
        self.number()

    @staticmethod
    def config(targets, saved):
        return config(*targets, r=3, modules_to_save=["head"] if saved else None)

    def number(self):
        """Parameters by their names, so that both models have the same ones."""
        for model in self.models:
            randomize(model)
            for name, parameter in model.named_parameters():
                if ".modules_to_save." in name:
                    parameter.data.copy_(normal(*parameter.shape, seed=sum(map(ord, name))))

    def do(self, operation):
        """`operation` on both: the same result, or errors of the same class. Returns whether there was an error."""
        results = []
        for model in self.models:
            try:
                results.append(operation(model))
            except Exception as error:
                results.append(error)
        theirs, ours = results
        assert type(ours) is type(theirs), (ours, theirs)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        elif not isinstance(theirs, Exception):
            assert ours == theirs
        return isinstance(theirs, Exception)

    def compare(self):
        self.do(lambda model: (model.active_adapters, list(model.peft_config)))
        self.do(trained)
        self.do(lambda model: [module.merged_adapters for module in adapted(model)])
        self.do(lambda model: [sorted(module.scaling) for module in adapted(model)])
        ours = self.models[1]
        assert set(ours.base_model.randlora_A) == set(ours.base_model.randlora_B) == set(ours.peft_config)
        for layer in adapted(ours):
            assert set(layer.bases) == set(layer.num_bases) == set(layer.r) == set(layer.randlora_lambda)
        if not self.partly_merged():
            self.do(output)

    def partly_merged(self):
        """PEFT leaves active adapters out of layers that others are merged into, and inactive ones in."""
        return any(set(m.merged_adapters) not in (set(), set(m.active_adapters)) for m in adapted(self.models[0]))


def adapted(model):
    return [module for module in model.modules() if hasattr(module, "randlora_lambda")]


def output(model):
    with torch.no_grad():
        return model(X)


def trained(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# ---- what PEFT should have done ----


def frozen_stays_frozen(model, before, active):
    """Leaving ``disable_adapter`` makes all active adapters trainable."""
    if model.active_adapters == active:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in before)


def saved_modules_follow(model):
    """Deleting the active adapter leaves a module to save that it has no copy of without the next one's."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            wanted = [name for name in model.active_adapters if name in module.modules_to_save]
            if wanted != module.active_adapters:
                module.set_adapter(wanted)


# ---- the operations ----


def add(both, name, targets, saved):
    both.do(lambda model: model.add_adapter(name, both.config(targets, saved)))
    both.number()


def add_nothing(both, name):
    both.do(lambda model: model.add_adapter(name, config("nothing", r=3)))


def activate(both, name):
    both.do(lambda model: model.set_adapter(name))


def activate_several(both, names):
    known = set(both.models[0].peft_config)
    both.do(lambda model: model.base_model.set_adapter([name for name in names if name in known]))


def delete(both, name):
    if set(both.models[0].peft_config) == {name}:  # PEFT cannot add another adapter then
        return
    both.do(lambda model: model.delete_adapter(name))
    saved_modules_follow(both.models[0])


def merge(both, names, safe):
    both.do(lambda model: model.merge_adapter(names, safe_merge=safe))


def unmerge(both):
    both.do(lambda model: model.unmerge_adapter())


def disable(both, inside):
    def run(model):
        before, active = trained(model), model.active_adapters
        with model.disable_adapter():
            result = output(model)
            if inside is not None:
                model.set_requires_grad(inside, True)
            made_trainable = trained(model)
        frozen_stays_frozen(model, {*before, *made_trainable}, active)
        return result

    both.do(run)


def require_grad(both, name, flag):
    both.do(lambda model: model.set_requires_grad(name, flag))


def mixed(both, names):
    """PEFT ignores the names (for RandLoRA): each row of its model's is computed with its own adapter."""
    theirs, ours = both.models
    known = set(theirs.peft_config) | {"__base__"}
    merged = any(m.merged for m in adapted(ours))
    if merged or not set(names) <= known:
        with pytest.raises(ValueError, match="merged" if merged else "adapter"):
            ours(X, adapter_names=list(names))
        return
    expected = []
    single = copy.deepcopy(theirs)
    for row, name in zip(X, names, strict=True):
        if name != "__base__":
            single.base_model.set_adapter([name])
            saved_modules_follow(single.base_model)
        with single.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            expected.append(output_of(single, row[None]))
    torch.testing.assert_close(ours(X, adapter_names=list(names)), torch.cat(expected), rtol=1e-3, atol=1e-3)


def output_of(model, x):
    with torch.no_grad():
        return model(x)


def reload(both):
    """A state dict of one model, loaded by the other."""
    theirs, ours = both.models
    for name in theirs.peft_config:
        state = peft.get_peft_model_state_dict(ours, adapter_name=name)
        peft.set_peft_model_state_dict(theirs, state, adapter_name=name)
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        peft.set_peft_model_state_dict(ours, state, adapter_name=name)


def unload(both, merged, safe):
    """On copies: the model goes on."""

    def run(model):
        model = copy.deepcopy(model)
        plain = model.merge_and_unload(safe_merge=safe) if merged else model.unload()
        assert not adapted(plain) and not any(isinstance(m, ModulesToSaveWrapper) for m in plain.modules())
        return output(plain)

    if not both.partly_merged():
        both.do(run)


one = st.sampled_from(NAMES)
some = st.lists(one, min_size=1, max_size=2, unique=True)
targets = st.lists(st.sampled_from("xyz"), min_size=1, max_size=3, unique=True)
flag = st.booleans()
row = st.sampled_from((*NAMES, "__base__"))
OPERATIONS = {
    add: (one, targets, flag), add_nothing: (one,), activate: (one,), activate_several: (some,), delete: (one,),
    merge: (st.none() | some, flag), unmerge: (), disable: (st.none() | one,), require_grad: (one, flag),
    mixed: (st.lists(row, min_size=4, max_size=4),), reload: (), unload: (flag, flag),
}  # fmt: skip
operations = st.lists(
    st.one_of([st.tuples(st.just(function), *arguments) for function, arguments in OPERATIONS.items()]), max_size=8
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(targets, flag, st.lists(st.tuples(st.just(add), one, targets, flag), max_size=2), operations)
def test_sequences(first, saved, added, operations):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = Both(first, saved)
        both.compare()
        for function, *arguments in (*added, *operations):
            function(both, *arguments)
            both.compare()
