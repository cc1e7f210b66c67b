"""A model of transformers from its config alone."""

from __future__ import annotations

import os

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
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"the folder {name!r} has no config.json")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("it takes transformers to build a model: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # of transformers, huggingface_hub or the network
        where = "" if os.path.isdir(name) else "; it is no folder here, and the hub could not give it"
        raise ValueError(f"no config for {name!r}{where}: {_first_line(error)}") from error
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    model: torch.nn.Module
    try:
        with torch.device("meta"):
            if cls is not None:
                model = cls(config)
            elif type(config) in transformers.AutoModelForCausalLM._model_mapping:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = transformers.AutoModel.from_config(config)
    except Exception as error:  # whatever a class makes of the config
        raise ValueError(f"no model can be made of the config of {name!r}: {_first_line(error)}") from error
    said = vars(config).get("dtype", vars(config).get("torch_dtype"))  # the first since transformers 4.56
    return model.to(dtype or (said if isinstance(said, torch.dtype) else torch.float32))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
