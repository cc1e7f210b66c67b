"""A model of transformers from its config alone."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn


def model_of_config(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a ``config.json`` describes, on the meta device: shapes without numbers.

    Args:
        name: a folder, or an id of the Hugging Face hub. dtype: of its weights; default: what the config says.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no such config, or it describes no model of transformers.
    """
    config = transformers_config(name)
    cls = _class_of(config)
    try:
        with torch.device("meta"):
            model: nn.Module = cls.from_config(config) if cls.__name__.startswith("AutoModel") else cls(config)
    except Exception as error:  # whatever a class makes of the config
        raise ValueError(f"no model can be made of the config of {name!r}: {first_line(error)}") from error
    said = vars(config).get("dtype", vars(config).get("torch_dtype"))  # the first since transformers 4.56
    return model.to(dtype or (said if isinstance(said, torch.dtype) else torch.float32))


def load_model(name: str) -> nn.Module:
    """The same model with its weights, in the dtype that its config says, on the CPU.

    Raises:
        ImportError, ValueError: as :func:`model_of_config`, and for weights that cannot be loaded.
    """
    cls = _class_of(transformers_config(name))
    try:
        model: nn.Module = cls.from_pretrained(name, torch_dtype="auto")
    except Exception as error:  # of transformers, huggingface_hub or the network
        raise ValueError(f"the model {name!r} cannot be loaded: {first_line(error)}") from error
    return model


def transformers_config(name: str) -> Any:
    """The config of a model, as transformers reads it. Raises as :func:`model_of_config`."""
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"the folder {name!r} has no config.json")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("it takes transformers to build a model: pip install transformers") from error
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # of transformers, huggingface_hub or the network
        where = "" if os.path.isdir(name) else "; it is no folder here, and the hub could not give it"
        raise ValueError(f"no config for {name!r}{where}: {first_line(error)}") from error


def _class_of(config: Any) -> Any:
    """The class that a config names, or the one of the library that fits it best."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return named or (transformers.AutoModelForCausalLM if causal else transformers.AutoModel)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
