"""Whether the installed PEFT and randlora agree: a tiny model, adapted by each, and everything that a user meets.

For versions of PEFT that nobody has tested, and for ``python -m randlora check-peft``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import peft
import torch
from peft.tuners.randlora import model as peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..peft import switched
from .bases import RANK_AXIS
from .model import accelerate

# float64 throughout: whatever else the user has set, rounding is no difference then.
DTYPE, TOLERANCE = torch.float64, 1e-8
SHAPES = {"up": (5, 11), "down": (11, 4), "square": (4, 4)}  # in, out: each orientation, with sizes of its own
CONFIG = {"r": 3, "randlora_alpha": 5, "target_modules": list(SHAPES), "modules_to_save": ["head"]}


class Differs(Exception):
    """What one comparison has found."""


def compare() -> dict[str, str | None]:
    """What was compared: None where PEFT's own code and randlora's agree, else what differs or was raised.

    Nothing of the process is left changed: random numbers, defaults of torch, whether randlora is enabled.
    """
    found: dict[str, str | None] = {}
    with _as_found():
        pair = _Pair()
        for what, question in QUESTIONS.items():
            try:
                question(pair)
                found[what] = None
            except Differs as difference:
                found[what] = str(difference)
            except Exception as error:  # of whatever a version that nobody has seen may do
                found[what] = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
    return found


@contextmanager
def _as_found() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        # The models are on the CPU: no other generator is used, and none is to be started.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        yield


# ---- what is compared ----


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(*SHAPES["up"]), nn.Linear(*SHAPES["down"], bias=False)
        self.square, self.head = Conv1D(4, 4), nn.Linear(4, 2)
        _fill(self, seed=1)
        self.to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.square(self.down(self.up(x).tanh())))


def _fill(model: nn.Module, seed: int, part: str = "") -> None:
    """Random numbers for the parameters with `part` in their names, the same for the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if part in name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def _inputs(features: int) -> Tensor:
    return torch.randn(3, features, generator=torch.Generator().manual_seed(features), dtype=DTYPE)


class _Pair:
    """The same model, adapted by PEFT alone and with randlora enabled."""

    @cached_property
    def prng(self) -> str:
        """How PEFT draws on this machine."""
        drawn = peft_model._kaiming_init((1, 1, 1), torch.Generator().manual_seed(0))
        return "peft-fp16" if drawn.dtype == torch.float16 else "peft"

    def switched(self, on: bool) -> Any:
        return switched(on, self.prng)

    def fresh(self, on: bool, **arguments: Any) -> Any:
        with self.switched(on):
            return peft.get_peft_model(_Model(), _config(**arguments))

    def trained(self, on: bool, **arguments: Any) -> Any:
        """With random lambda, gamma and head."""
        model = self.fresh(on, **arguments)
        for part in ("randlora_lambda", "randlora_gamma", "modules_to_save"):
            _fill(model, seed=2, part=part)
        return model

    @cached_property
    def models(self) -> tuple[Any, Any]:
        """PEFT's and randlora's. Nothing changes them."""
        return self.trained(False), self.trained(True)

    def state_dict(self, on: bool, model: Any = None) -> dict[str, Tensor]:
        with self.switched(on):
            return peft.get_peft_model_state_dict(self.models[on] if model is None else model)


def _config(**arguments: Any) -> Any:
    return peft.RandLoraConfig(**{**CONFIG, **arguments})


def _layers(model: Any) -> dict[str, Any]:
    return {name: model.get_submodule(f"base_model.model.{name}") for name in SHAPES}


def _same(what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise Differs(f"{what}: {theirs} in PEFT, {ours} in randlora")


def _same_names(what: str, theirs: Iterable[str], ours: Iterable[str]) -> None:
    theirs, ours = list(theirs), list(ours)
    if differing := sorted(set(theirs).symmetric_difference(ours)):
        where = "PEFT" if differing[0] in theirs else "randlora"
        raise Differs(f"{what}: only {where} has {differing[0]}")
    if theirs != ours:
        raise Differs(f"{what}: in another order")


def _close(what: str, theirs: Tensor, ours: Tensor, tolerance: float = TOLERANCE) -> None:
    _same(f"shape of {what}", tuple(theirs.shape), tuple(ours.shape))
    scale = theirs.abs().max().double().item() or 1.0
    error = (ours.double() - theirs.double()).abs().max().item() / scale
    if not error <= tolerance:  # NaN is none either
        raise Differs(f"{what}: {error:.1e} apart, relative to the largest number")


def _all_close(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    _same_names("names", sorted(theirs), sorted(ours))
    for name in theirs:
        _close(name, theirs[name], ours[name], tolerance)


def _bases(arguments: Mapping[str, Any]) -> Callable[[_Pair], None]:
    def question(pair: _Pair) -> None:
        theirs, ours = (pair.fresh(on, **arguments).base_model for on in (False, True))
        for kind in RANK_AXIS:
            _close(kind, getattr(theirs, kind)["default"], getattr(ours, kind)["default"], 0)

    return question


def _parameters(pair: _Pair) -> None:
    """Before the first step, with what is trained."""
    theirs, ours = (dict(pair.fresh(on).named_parameters()) for on in (False, True))
    _same_names("names", theirs, ours)
    for name, parameter in theirs.items():
        _same(f"dtype of {name}", parameter.dtype, ours[name].dtype)
        _same(f"requires_grad of {name}", parameter.requires_grad, ours[name].requires_grad)
        _close(name, parameter, ours[name], 0)


def _outputs(pair: _Pair) -> None:
    theirs, ours = pair.models
    with torch.no_grad():
        for (name, a), b in zip(_layers(theirs).items(), _layers(ours).values(), strict=True):
            x = _inputs(SHAPES[name][0])
            _same(f"dtype of layer {name}", a(x).dtype, b(x).dtype)
            _close(f"layer {name}", a(x), b(x))
        x = _inputs(SHAPES["up"][0])
        _close("the model", theirs(x), ours(x))
        with theirs.disable_adapter(), ours.disable_adapter():
            _close("with adapters disabled, the model", theirs(x), ours(x))


def _gradients(pair: _Pair) -> None:
    found = []
    for model in pair.models:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        x = _inputs(SHAPES["up"][0]).requires_grad_()
        y = model(x)
        gradients = torch.autograd.grad((y * torch.arange(1.0, 3.0, dtype=DTYPE)).sum(), (x, *trained.values()))
        found.append(dict(zip(["the input", *trained], gradients, strict=True)))
    _all_close(*found)


def _updates(pair: _Pair) -> None:
    theirs, ours = map(_layers, pair.models)
    with torch.no_grad():
        for name in SHAPES:
            _close(f"layer {name}", *(layers[name].get_delta_weight("default") for layers in (theirs, ours)))


def _merging(pair: _Pair) -> None:
    models = pair.trained(False), pair.trained(True)
    x = _inputs(SHAPES["up"][0])
    for what, call in (("merged", "merge_adapter"), ("unmerged", "unmerge_adapter")):
        for model in models:
            getattr(model, call)()
        theirs, ours = map(_layers, models)
        for name in SHAPES:
            _close(f"{what}, weight of {name}", *(layer[name].get_base_layer().weight for layer in (theirs, ours)))
        with torch.no_grad():
            _close(f"{what}, the model", *(model(x) for model in models))
    theirs, ours = (dict(model.merge_and_unload().named_parameters()) for model in models)
    _all_close(theirs, ours)


def _conversion(pair: _Pair) -> None:
    theirs, before = pair.trained(False), pair.models[0]
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        x = _inputs(SHAPES["up"][0])
        _close("the model", before(x), accelerate(theirs)(x))
    _same("parameters", {n: id(p) for n, p in parameters.items()}, {n: id(p) for n, p in theirs.named_parameters()})


def _several_adapters(pair: _Pair) -> None:
    models = pair.trained(False), pair.trained(True)
    x = _inputs(SHAPES["up"][0])

    def look(when: str) -> None:
        theirs, ours = models
        _same(f"{when}, active adapters", *(list(model.base_model.active_adapters) for model in models))
        _same_names(f"{when}, names", *([name for name, _ in model.named_parameters()] for model in models))
        trained = ([name for name, p in model.named_parameters() if p.requires_grad] for model in models)
        _same_names(f"{when}, what is trained", *trained)
        with torch.no_grad():
            _close(f"{when}, the model", theirs(x), ours(x))

    for model, on in zip(models, (False, True), strict=True):
        with pair.switched(on):
            model.add_adapter("second", _config())
        _fill(model, seed=3, part="second")
    look("with a second adapter")
    for model in models:
        model.set_adapter("second")
    look("with the second adapter active")
    for model in models:
        model.delete_adapter("second")
        model.set_adapter("default")
    look("after the second adapter was deleted")


def _trained(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(tuple(RANK_AXIS))}


def _state_dicts(pair: _Pair) -> None:
    theirs, ours = (pair.state_dict(on) for on in (False, True))
    _all_close(_trained(theirs), _trained(ours), 0)
    # PEFT up to 0.21 has the bases once per layer as well.
    for kind in RANK_AXIS:
        name = f"base_model.{kind}"
        _same(f"{name} is there", name in theirs, name in ours)
        for key in theirs:
            if key.endswith(kind):
                _close(key, theirs[key], ours[name], 0)
    fresh = pair.fresh(True)
    with pair.switched(True):
        peft.set_peft_model_state_dict(fresh, dict(theirs))  # some versions change the dict
    try:
        _all_close(_trained(theirs), _trained(pair.state_dict(True, fresh)), 0)
    except Differs as difference:
        raise Differs(f"PEFT's, loaded into randlora's model: {difference}") from None


def _files(writer: bool, reader: bool) -> Callable[[_Pair], None]:
    def question(pair: _Pair) -> None:
        for projections in (True, False):
            written = pair.trained(writer, save_projection=projections)
            if projections:  # others than its seed gives
                for kind in RANK_AXIS:
                    store = getattr(written.base_model, kind)
                    store["default"] = store["default"] * 1.5
            with tempfile.TemporaryDirectory() as folder:
                with pair.switched(writer):
                    written.save_pretrained(folder)
                with pair.switched(reader):
                    read = peft.PeftModel.from_pretrained(_Model(), folder)
            said = "with" if projections else "without"
            states = pair.state_dict(writer, written), pair.state_dict(reader, read)
            _all_close(*map(_trained, states), 0)
            with torch.no_grad():
                x = _inputs(SHAPES["up"][0])
                _close(f"the model from a file {said} projections", written(x), read(x))

    return question


QUESTIONS: dict[str, Callable[[_Pair], None]] = {
    "bases, dense": _bases({}),
    "bases, sparse": _bases({"sparse": True}),
    "bases, very_sparse": _bases({"very_sparse": True}),
    "parameters": _parameters,
    "outputs": _outputs,
    "gradients": _gradients,
    "updates": _updates,
    "merging": _merging,
    "accelerate(model)": _conversion,
    "several adapters": _several_adapters,
    "state dicts": _state_dicts,
    "PEFT's file, read by randlora": _files(False, True),
    "randlora's file, read by PEFT": _files(True, False),
}
