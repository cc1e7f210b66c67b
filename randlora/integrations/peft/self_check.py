"""Whether the installed PEFT and randlora agree: a tiny model, adapted by each, and everything that a user meets.

For versions of PEFT that nobody has tested, and for ``python -m randlora check-peft``.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import peft
import torch
from torch import Tensor

from .bases import RANK_AXIS
from .model import accelerate
from .tiny_pair import (
    DTYPE,
    SHAPES,
    Differs,
    Pair,
    TinyModel,
    config,
    fill,
    inputs,
    layers_of,
    require_all_close,
    require_close,
    require_same,
    require_same_names,
    without_bases,
)


def compare() -> dict[str, str | None]:
    """What was compared: None where PEFT's own code and randlora's agree, else what differs or was raised.

    Nothing of the process is left changed: random numbers, defaults of torch, whether randlora is enabled.
    """
    found: dict[str, str | None] = {}
    with _as_found():
        pair = Pair()
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


def _bases(arguments: Mapping[str, Any]) -> Callable[[Pair], None]:
    def question(pair: Pair) -> None:
        theirs, ours = (pair.fresh(on, **arguments).base_model for on in (False, True))
        for kind in RANK_AXIS:
            require_close(kind, getattr(theirs, kind)["default"], getattr(ours, kind)["default"], 0)

    return question


def _parameters(pair: Pair) -> None:
    """Before the first step, with what is trained."""
    theirs, ours = (dict(pair.fresh(on).named_parameters()) for on in (False, True))
    require_same_names("names", theirs, ours)
    for name, parameter in theirs.items():
        require_same(f"dtype of {name}", parameter.dtype, ours[name].dtype)
        require_same(f"requires_grad of {name}", parameter.requires_grad, ours[name].requires_grad)
        require_close(name, parameter, ours[name], 0)


def _outputs(pair: Pair) -> None:
    theirs, ours = pair.models
    x = inputs(SHAPES["up"][0])
    with torch.no_grad():
        for (name, a), b in zip(layers_of(theirs).items(), layers_of(ours).values(), strict=True):
            y = inputs(SHAPES[name][0])
            require_same(f"dtype of layer {name}", a(y).dtype, b(y).dtype)
            require_close(f"layer {name}", a(y), b(y))
        require_close("the model", theirs(x), ours(x))
        with theirs.disable_adapter(), ours.disable_adapter():
            require_close("with adapters disabled, the model", theirs(x), ours(x))
        for kind in ("sparse", "very_sparse"):
            theirs, ours = (pair.trained(on, **{kind: True}) for on in (False, True))
            require_close(f"the model with {kind} bases", theirs(x), ours(x))


def _gradients(pair: Pair) -> None:
    def gradients(model: Any) -> dict[str, Tensor]:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        x = inputs(SHAPES["up"][0]).requires_grad_()
        y = model(x)
        found = torch.autograd.grad((y * torch.arange(1.0, 3.0, dtype=DTYPE)).sum(), (x, *trained.values()))
        return dict(zip(["the input", *trained], found, strict=True))

    theirs, ours = map(gradients, pair.models)
    require_all_close(theirs, ours)


def _updates(pair: Pair) -> None:
    theirs, ours = map(layers_of, pair.models)
    with torch.no_grad():
        for name in SHAPES:
            require_close(f"layer {name}", *(layers[name].get_delta_weight("default") for layers in (theirs, ours)))


def _merging(pair: Pair) -> None:
    models = pair.trained(False), pair.trained(True)
    x = inputs(SHAPES["up"][0])
    for what, call in (("merged", "merge_adapter"), ("unmerged", "unmerge_adapter")):
        for model in models:
            getattr(model, call)()
        theirs, ours = map(layers_of, models)
        for name in SHAPES:
            require_close(
                f"{what}, weight of {name}", *(layer[name].get_base_layer().weight for layer in (theirs, ours))
            )
        with torch.no_grad():
            require_close(f"{what}, the model", *(model(x) for model in models))
    theirs, ours = (dict(model.merge_and_unload().named_parameters()) for model in models)
    require_all_close(theirs, ours)


def _conversion(pair: Pair) -> None:
    theirs, before = pair.trained(False), pair.models[0]
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        x = inputs(SHAPES["up"][0])
        require_close("the model", before(x), accelerate(theirs)(x))
    for name, parameter in theirs.named_parameters():
        require_same(f"{name} is the same object", True, parameter is parameters[name])


def _several_adapters(pair: Pair) -> None:
    models = pair.trained(False), pair.trained(True)
    x = inputs(SHAPES["up"][0])

    def look(when: str) -> None:
        theirs, ours = models
        require_same(f"{when}, active adapters", *(list(model.base_model.active_adapters) for model in models))
        require_same_names(f"{when}, names", *([name for name, _ in model.named_parameters()] for model in models))
        trained = ([name for name, p in model.named_parameters() if p.requires_grad] for model in models)
        require_same_names(f"{when}, what is trained", *trained)
        with torch.no_grad():
            require_close(f"{when}, the model", theirs(x), ours(x))

    for model, on in zip(models, (False, True), strict=True):
        with pair.switched(on):
            model.add_adapter("second", config())
        fill(model, seed=3, part="second")
    look("with a second adapter")
    for model in models:
        model.set_adapter("second")
    look("with the second adapter active")
    for model in models:
        model.delete_adapter("second")
        model.set_adapter("default")
    look("after the second adapter was deleted")


def _state_dicts(pair: Pair) -> None:
    theirs, ours = (pair.state_dict(on) for on in (False, True))
    require_all_close(without_bases(theirs), without_bases(ours), 0)
    # PEFT up to 0.21 has the bases once per layer as well.
    for kind in RANK_AXIS:
        name = f"base_model.{kind}"
        require_same(f"{name} is there", name in theirs, name in ours)
        for key in theirs:
            if key.endswith(kind):
                require_close(key, theirs[key], ours[name], 0)
    fresh = pair.fresh(True)
    with pair.switched(True):
        peft.set_peft_model_state_dict(fresh, dict(theirs))  # some versions change the dict
    try:
        require_all_close(without_bases(theirs), without_bases(pair.state_dict(True, fresh)), 0)
    except Differs as difference:
        raise Differs(f"PEFT's, loaded into randlora's model: {difference}") from None


def _files(writer: bool, reader: bool) -> Callable[[Pair], None]:
    def question(pair: Pair) -> None:
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
                    read = peft.PeftModel.from_pretrained(TinyModel(), folder)
            said = "with" if projections else "without"
            require_all_close(
                without_bases(pair.state_dict(writer, written)), without_bases(pair.state_dict(reader, read)), 0
            )
            with torch.no_grad():
                x = inputs(SHAPES["up"][0])
                require_close(f"the model from a file {said} projections", written(x), read(x))

    return question


QUESTIONS: dict[str, Callable[[Pair], None]] = {
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
