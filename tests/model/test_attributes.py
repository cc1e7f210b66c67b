"""Attributes set on the wrapper reach the wrapped model if it has them; and what trainers hand to save_pretrained."""

import copy
import functools
import pickle

import pytest
import torch
from helpers.checkpoints import CARD, CONFIG, WEIGHTS, assert_same_numbers, load
from helpers.models import IDS, adapt, add, net, randomize, tiny_llama
from torch import nn

import randlora


class Settable(type(net())):
    """With attributes of all sorts."""

    plain_class_attribute = 1

    def __init__(self):
        super().__init__()
        self.plain, self._private = 1, 1
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))
        self._stored = 1
        self.peft_config = "of the base"  # as transformers' models have one once PEFT was there

    @property
    def with_setter(self):
        return self._stored

    @with_setter.setter
    def with_setter(self, value):
        self._stored = value

    @property
    def read_only(self):
        return 1

    def forward(self, ids):
        return super().forward(ids) * self.scale + self.shift + self.plain - 1


def wrapped():
    model = Settable()
    model.load_state_dict(net().float().state_dict(), strict=False)
    return adapt(model)


@pytest.mark.parametrize("name", ["plain", "plain_class_attribute", "with_setter", "method"])
def test_set_in_the_wrapped_model(name):
    model = wrapped()
    if name == "method":
        model.model.method = lambda: 0
    setattr(model, name, 7)
    assert getattr(model.model, name) == getattr(model, name) == 7 and name not in vars(model)
    if name != "plain_class_attribute":
        assert Settable.plain_class_attribute == 1
    again = pickle.loads(pickle.dumps(copy.deepcopy(model))) if name != "method" else copy.deepcopy(model)
    setattr(again, name, 8)
    assert getattr(again.model, name) == 8 and getattr(model, name) == 7


def test_parameters_buffers_and_modules():
    model = wrapped()
    model.scale, model.shift = nn.Parameter(torch.tensor(3.0)), torch.tensor(2.0)
    model.head = nn.Linear(13, 7)
    keys = set(model.state_dict())
    assert {"model.scale", "model.shift", "model.head.weight"} <= keys and not {"scale", "shift", "head.weight"} & keys
    assert torch.equal(model(IDS), model.model(IDS)) and model.model.head is model.head
    model.embed.weight = nn.Parameter(torch.zeros(19, 13))
    del model.plain
    assert not hasattr(model.model, "plain")
    with pytest.raises(AttributeError, match="plain"):
        del model.plain
    with pytest.raises(AttributeError, match=r"read_only|no setter"):
        model.read_only = 3


def test_what_is_the_wrappers_own():
    """What it has, what nobody has, and private names, by which other libraries hook into one object."""
    model = wrapped()
    assert model.model.peft_config == "of the base" and list(model.peft_config) == ["default"]
    model._private, model.unknown, model.forward = 5, 6, model.forward
    assert model.model._private == 1 and not hasattr(model.model, "unknown") and "forward" not in vars(model.model)
    assert (model._private, model.unknown) == (5, 6)
    del model._private, model.unknown
    assert model._private == 1 and not hasattr(model, "unknown")
    model.train()
    model.training = False
    assert model.model.training
    inner = copy.deepcopy(model.model)
    model.model = inner
    assert model.model is inner and model.get_base_model() is inner
    with pytest.raises(AttributeError, match=r"active_adapters|no setter"):
        model.active_adapters = []


def test_generation_config_is_used():
    transformers = pytest.importorskip("transformers")
    model = randlora.get_peft_model(tiny_llama(), {"r": 2, "target_modules": ["q_proj"]}).eval()
    ids = IDS[:, :3]
    config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    model.generation_config = config
    assert model.model.generation_config is config
    assert model.generate(ids).shape == (4, 6)
    model.generation_config.max_new_tokens = 5
    assert model.generate(ids).shape == (4, 8)
    model.config.use_cache = False
    assert model.model.config.use_cache is False
    model.config = copy.deepcopy(model.config)
    model.config.use_cache = True
    assert model.model.config.use_cache is True
    model.name_or_path = "elsewhere"
    assert model.model.name_or_path == "elsewhere"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [
    {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]},
], ids=str)  # fmt: skip
def test_resizing_does_not_lose_adapters(settings, tied):
    model = adapt(tiny_llama(tie_word_embeddings=tied), **settings)
    before = model(IDS).logits
    with pytest.raises(ValueError, match="would lose what adapters have there"):
        model.resize_token_embeddings(25)
    assert torch.equal(model(IDS).logits, before) and model.config.vocab_size == before.shape[-1]


def test_resizing():
    model = adapt(tiny_llama())
    assert model.resize_token_embeddings(25).weight.shape[0] == 25 == model(IDS).logits.shape[-1]
    assert all("randlora" in name for name, p in model.named_parameters() if p.requires_grad)


# ---- save_pretrained -------------------------------------------------------------------------------------------------


def test_another_process_writes(tmp_path):
    model = adapt(net())
    model.save_pretrained(tmp_path / "a" / "b", is_main_process=False)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        model.save_pretrained(tmp_path, ["x"], is_main_process=False)


def test_pickles_are_refused(tmp_path):
    for is_main_process in (True, False):  # in all processes alike
        with pytest.raises(ValueError, match=r"safe_serialization must be True: .*not pickles"):
            adapt(net()).save_pretrained(tmp_path, safe_serialization=False, is_main_process=is_main_process)
    adapt(net()).save_pretrained(tmp_path, safe_serialization=True)
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, CARD}


REFUSED = {
    "save_embedding_layers": (True, ValueError, "Name the embeddings in modules_to_save"),
    "path_initial_model_for_weight_conversion": ("a", ValueError, "must be None, got 'a': RandLoRA's initialisation"),
    "variant": ("fp16", ValueError, "must be None, got 'fp16': an adapter's files have one name each"),
    "selected_adapters": (True, TypeError, "must be a list of names, got a bool: give safe_serialization by its name"),
    "commit_message": ("m", TypeError, "does not know commit_message, unless push_to_hub=True"),
    "new": (1, TypeError, r"save_pretrained\(\) does not know new"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_here_is_refused(tmp_path, name):
    value, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        adapt(net()).save_pretrained(tmp_path / "a", **{name: value})
    assert not (tmp_path / "a").exists()


def test_what_transformers_and_peft_hand_over(tmp_path):
    model = adapt(net())
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(
        tmp_path / "theirs", save_embedding_layers="auto", path_initial_model_for_weight_conversion=None,
        max_shard_size="5GB", variant=None, token="t", save_peft_format=True, save_original_format=False,
        push_to_hub=False,
    )  # fmt: skip
    for name in (CONFIG, WEIGHTS, CARD):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()


def test_functions_that_save(tmp_path):
    model = adapt(net())
    for i, function in enumerate((None, torch.save, functools.partial(torch.save, pickle_protocol=4))):
        model.save_pretrained(tmp_path / str(i), save_function=function)
        assert_same_numbers(load(tmp_path / str(i)), model)
    for function in (lambda *_: None, print, functools.partial(print)):
        with pytest.raises(ValueError, match=r"save_function=.* would not be called"):
            model.save_pretrained(tmp_path / "none", save_function=function)
    assert not (tmp_path / "none").exists()


def test_as_accelerate_documents_it(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(adapt(net(), modules_to_save=["head"], bias="all"))
    accelerator.unwrap_model(model).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    assert_same_numbers(load(tmp_path), accelerator.unwrap_model(model))


WRAPPINGS = {
    "plain": lambda key: key,
    "DistributedDataParallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_numbers_of_a_state_dict(tmp_path, wrapping):
    """Not those of the model, which may hold a part of them only; in one file what another model has in memory."""
    model = add(adapt(net(), modules_to_save=["head"], bias="all"), "b", 3, kind="sign")
    other = add(adapt(net(), modules_to_save=["head"], bias="all", seed=8), "b", 9, kind="sign")
    with torch.no_grad():
        other.model.head.modules_to_save["default"].weight.mul_(2)
        other.model.layers[0].down_proj.base_layer.bias.mul_(3)
        other.model.head.original_module.bias.mul_(5)
    state = {WRAPPINGS[wrapping](key): value for key, value in other.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    other.save_pretrained(tmp_path / "own")
    for name in (".", "b"):
        assert (tmp_path / "given" / name / WEIGHTS).read_bytes() == (tmp_path / "own" / name / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, key: state.pop(key), "state_dict has no model.layers.0.q_proj.randlora_gamma.default"),
        (
            lambda state, key: state.update({key: torch.ones(2, 3)}),
            r"of shape \[2, 3\], where this model's is \[4, 13\]",
        ),
        (lambda state, key: state.update({key: torch.full((4, 13), torch.nan)}), "gamma.default holds NaN"),
        (
            lambda state, key: state.update({key: torch.ones(4, 13, dtype=torch.int64)}),
            "must be floating-point numbers",
        ),
        (lambda state, key: state.update({key: torch.ones(4, 13, device="meta")}), "on the meta device"),
        (lambda state, key: state.update({key: 3}), "must be a tensor, got int"),
    ],
)
def test_a_state_dict_that_does_not_fit(tmp_path, change, message):
    model = adapt(net())
    state = model.state_dict()
    change(state, "model.layers.0.q_proj.randlora_gamma.default")
    with pytest.raises(ValueError, match=f"adapter 'default' cannot be saved: .*{message}"):
        model.save_pretrained(tmp_path / "adapter", state_dict=state)
    assert not (tmp_path / "adapter").exists()
    randomize(model)
