"""``RandLoraConfig``: what an adapter is, with PEFT's fields, defaults and JSON form."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .bases.definition import KINDS, PEFT_KINDS, PRNGS, group_width_of
from .checkpoint.hub import find_folder
from .checkpoint.layout import CONFIG_NAME, DAMAGE, OWN_PEFT_TYPE, PEFT_TYPE, WEIGHTS_NAME, open_adapter, settings_of
from .checkpoint.replace import write_text
from .checks import require_float, require_int, require_size
from .expressions import Expression
from .layers.initial import AUTO, Auto, require_alpha
from .planner import STRATEGIES

ALL_LINEAR = "all-linear"
BIASES = ("none", "all", "randlora_only")
TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION", "QUESTION_ANS", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS")


@dataclass
class RandLoraConfig:
    """Settings of one adapter (PEFT: ``RandLoraConfig``).

    Args:
        r: rank of one base, up to 65,536. A lower rank means more bases and more trained numbers.
        randlora_alpha: the update is scaled by ``randlora_alpha / r``. ``"auto"``: a number that follows from r and the
            sizes of the layers, and gamma starts in each layer such that one learning rate fits every rank, width,
            number of bases and kind (:mod:`randlora.layers.initial`). The adapter's config and its files have the
            number, so that PEFT reads them.
        randlora_dropout: dropout probability on the update's input.
        target_modules: which layers to adapt: a list of names (a whole name or its last components), a regular
            expression for whole names, ``"all-linear"`` (every supported layer but the output head), or None for the
            defaults of known architectures, which are taken from PEFT.
        projection_prng_key: seed of the bases, ``0 <= key < 2**64``.
        save_projection: write the bases into the file. They are not needed to load it here; PEFT needs them.
        sparse, very_sparse: ternary bases; the same as ``kind="sparse"`` and ``kind="very_sparse"``.
        fan_in_fan_out: kept for PEFT; the layout is taken from the layer's type.
        bias: which biases are trained: ``"none"``, ``"all"``, or ``"randlora_only"`` (those of adapted layers).
        modules_to_save: names of further modules to train in full and to save with the adapter.
        init_weights: True: the update starts at zero. False: lambda random, gamma ``1 / max_dim``, whatever alpha is.
        layers_to_transform: indices of the layers to adapt, with `target_modules` a list or ``"all-linear"``.
        layers_pattern: name or names of the module list that these indices count in.
        exclude_modules: names or a regular expression of what to leave out.
        num_bases: number n of bases, default ``ceil(min_dim / r)`` per layer, which makes the update full-rank.
        prng: ``"philox"``, or ``"peft"`` for the bases that PEFT draws (see :class:`randlora.RandomBases`).
        strategy: how layers compute, see :class:`randlora.Linear`.
        kind: ``"dense"``, ``"hadamard"``, ``"sparse"``, ``"very_sparse"`` or ``"sign"``; default: by `sparse` and
            `very_sparse`, and ``"dense"`` with neither.
        sparsity: z of a ternary kind, P(+1) = P(-1) = 1/(2z); default 3, and sqrt(min_dim) where very sparse.
        group_width: of ``hadamard``: 8, 4, 2 or 1; default: the largest that costs no layer rank
            (:class:`randlora.RandomBases`).
        target_parameters: names, or their last components, of parameters that hold the weights of fused experts, such
            as ``["experts.gate_up_proj", "experts.down_proj"]``. Beside `target_modules`, which may be ``[]`` then.
        task_type, peft_type, auto_mapping, peft_version, base_model_name_or_path, revision, inference_mode: PEFT's.

    Raises:
        TypeError, ValueError: for values outside these ranges or that contradict each other.
    """

    r: int = 32
    randlora_alpha: float | Auto = 640
    randlora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    num_bases: int | None = None
    prng: str = "philox"
    strategy: str = "auto"
    kind: str | None = None
    sparsity: float | None = None
    group_width: int | None = None
    task_type: str | None = None
    peft_type: str = PEFT_TYPE
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    target_parameters: list[str] | None = None

    def __post_init__(self) -> None:
        self.r = require_size("r", self.r)
        alpha = require_alpha(self.randlora_alpha)
        if not isinstance(self.randlora_alpha, int):  # JSON has no numbers of NumPy, and PEFT's default is 640
            self.randlora_alpha = alpha
        self.randlora_dropout = require_float("randlora_dropout", self.randlora_dropout, 0.0, 1.0)
        self.projection_prng_key = require_int("projection_prng_key", self.projection_prng_key, 0, 2**64 - 1)
        if self.num_bases is not None:
            self.num_bases = require_size("num_bases", self.num_bases)
        for name in ("save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name, known in (("bias", BIASES), ("prng", PRNGS), ("strategy", ("auto", *STRATEGIES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        self.peft_type = _own_type(self.peft_type)
        self.task_type = getattr(self.task_type, "value", self.task_type)
        if self.task_type is not None and self.task_type not in TASKS:
            raise ValueError(f"task_type must be None or one of {', '.join(TASKS)}, got {self.task_type!r}")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "target_parameters"):
            setattr(self, name, _names(name, getattr(self, name), name in ("modules_to_save", "target_parameters")))
        self.target_parameters = self.target_parameters or None
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            _check_patterns(name, getattr(self, name))
        self._check_layers()
        self._check_kind()

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if isinstance(layers, str) or not isinstance(layers, (int, Iterable, type(None))):
            raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {layers!r}")
        layers = [layers] if isinstance(layers, int) else list(layers or ())
        # PEFT takes an empty list for all layers.
        self.layers_to_transform = [require_int("layers_to_transform", i, 0) for i in layers] or None
        if self.layers_to_transform:
            if isinstance(self.target_modules, str) and self.target_modules.lower() != ALL_LINEAR:
                raise ValueError(
                    f"layers_to_transform goes with target_modules as a list or {ALL_LINEAR!r}, got the regular "
                    f"expression {self.target_modules!r}: say it there"
                )
        elif self.layers_pattern:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, got None")

    def _check_kind(self) -> None:
        # PEFT takes very_sparse where both are set.
        flags = "very_sparse" if self.very_sparse else "sparse" if self.sparse else None
        if self.kind is None:
            self.kind = flags or "dense"
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if flags not in (None, self.kind):
            raise ValueError(f"kind={self.kind!r} contradicts {flags}=True")
        self.sparse, self.very_sparse = self.kind == "sparse", self.kind == "very_sparse"
        if self.sparsity is not None:
            if self.kind not in ("sparse", "very_sparse"):
                raise ValueError(f"kind={self.kind!r} has no free sparsity, got sparsity={self.sparsity}")
            self.sparsity = require_float("sparsity", self.sparsity, 1.0, 2.0**31)
        self.group_width = group_width_of(self.kind, self.group_width)
        own = self.kind not in PEFT_KINDS or self.sparsity is not None or self.num_bases is not None
        if self.prng != "philox" and own:
            raise ValueError(
                f"prng={self.prng!r} has PEFT's kinds, sparsity and number of bases only, got kind={self.kind!r}, "
                f"sparsity={self.sparsity}, num_bases={self.num_bases}"
            )

    @property
    def is_prompt_learning(self) -> bool:
        """PEFT asks every config for it first: here it is told that this is none of its own."""
        raise TypeError(
            "this is a randlora.RandLoraConfig, of which PEFT knows no kind, prng or strategy: give it to "
            "randlora.get_peft_model, or peft.RandLoraConfig to PEFT. An adapter of linear layers that is saved with "
            "its projections loads in PEFT, and with randlora.integrations.peft enabled it computes as fast as here"
        )

    @property
    def scaling(self) -> float:
        """``randlora_alpha / r``. Raises ``ValueError`` while that is ``"auto"``."""
        if isinstance(self.randlora_alpha, str):
            raise ValueError(
                f"randlora_alpha={AUTO!r} becomes a number where a model is adapted, in the model's own config, "
                "model.peft_config[adapter_name]: take that one"
            )
        return self.randlora_alpha / self.r

    # ---- JSON ----

    def to_dict(self) -> dict[str, Any]:
        """PEFT's keys, prng, and of ours those others that differ from their default; ``"auto"`` as it stands."""
        values = asdict(self)
        if values["kind"] in PEFT_KINDS:
            values["kind"] = None  # the flags say it
        for field in fields(self):
            if field.name in _OWN and values[field.name] == _default(field):
                del values[field.name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RandLoraConfig:
        """From PEFT's or our JSON; keys that are not known here are named in a ``ValueError`` unless they are empty."""
        known = {field.name for field in fields(cls)}
        values = dict(values)
        _own_type(values.get("peft_type", PEFT_TYPE))  # before the keys, which are another method's then
        if values.get("layers_to_transform") is None:
            values.pop("layers_pattern", None)  # PEFT ignores it then
        unknown = {name: value for name, value in values.items() if name not in known}
        if extra := sorted(name for name, value in unknown.items() if value not in (None, False, [], {}, "")):
            meant = [close for name in extra for close in difflib.get_close_matches(name, known, 1)]
            raise ValueError(
                f"{', '.join(extra)}: not known to this version of randlora"
                + (f"; did you mean {' and '.join(meant)}?" if meant else "")
            )
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def of(cls, config: Any) -> RandLoraConfig:
        """`config` itself, or one made of PEFT's ``RandLoraConfig`` or of a dict."""
        if isinstance(config, cls):
            return config
        if isinstance(config, Mapping):
            return cls.from_dict(config)
        if hasattr(config, "to_dict") and hasattr(config, "peft_type"):
            # Drawn as PEFT draws them: a config made for PEFT means PEFT's bases.
            return cls.from_dict({"prng": "peft"} | config.to_dict() | {"peft_version": None})
        raise TypeError(f"config must be a randlora.RandLoraConfig, PEFT's, or a dict, got {type(config).__name__}")

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write ``adapter_config.json`` into `folder`, which is made if it is missing.

        Raises:
            ValueError: ``randlora_alpha="auto"``, which is no number yet. OSError: it cannot be written.
        """
        _ = self.scaling
        write_text(Path(folder) / CONFIG_NAME, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> RandLoraConfig:
        """Read ``adapter_config.json`` from `folder`. Raises ``ValueError`` that names the file and what is wrong."""
        folder = find_folder(folder)
        with open_adapter(folder) as (_, described, given):
            return config_of_files(folder, described, given)


def config_of_files(folder: Path, described: dict[str, Any] | None, given: dict[str, Any] | None) -> RandLoraConfig:
    """The config that the files of the adapter in `folder` hold: see :func:`randlora.checkpoint.layout.settings_of`."""
    settings = settings_of(folder, described, given)
    try:
        config = RandLoraConfig.from_dict(settings)
    except DAMAGE as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    if config.randlora_alpha == AUTO:
        raise ValueError(f"{folder / CONFIG_NAME}: randlora_alpha must be a number in a file, got {AUTO!r}")
    if described is not None and config.kind == "hadamard" and config.group_width is None:
        raise ValueError(f"{folder / WEIGHTS_NAME} does not say the group_width of its hadamard bases: it is damaged")
    return config


# Not prng: a file without it is PEFT's, and means PEFT's bases.
_OWN = ("num_bases", "strategy", "kind", "sparsity", "group_width", "exclude_modules", "target_parameters")


def _default(field: Field[Any]) -> Any:
    return None if field.default is MISSING else field.default


def _own_type(peft_type: Any) -> str:
    got = str(getattr(peft_type, "value", peft_type))
    if got not in (PEFT_TYPE, OWN_PEFT_TYPE):
        raise ValueError(f"peft_type must be {PEFT_TYPE}, got {got!r}: this is another method's adapter")
    return PEFT_TYPE


def _check_patterns(name: str, value: list[str] | str | None) -> None:
    # Of these only layers_pattern takes regular expressions in a list.
    for pattern in [value] if isinstance(value, str) else value if value and name == "layers_pattern" else ():
        Expression(name, pattern)


def _names(name: str, value: Any, only_list: bool) -> list[str] | str | None:
    if value is None or (isinstance(value, str) and not only_list):
        return value
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) and v for v in value):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    what = "a list of names" if only_list else "a list of names or a string"
    raise TypeError(f"{name} must be {what}, got {value!r}")
