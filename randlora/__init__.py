"""RandLoRA for PyTorch: full-rank adapters for frozen models (arXiv 2502.00987) at about the price of LoRA."""

from . import _load

_C = _load.load()  # registers torch.ops.randlora, or says what is missing

from . import export, functional  # noqa: E402
from .bases.random_bases import RandomBases  # noqa: E402
from .config import RandLoraConfig  # noqa: E402
from .estimation.estimate import Estimate, estimate  # noqa: E402
from .explanation import explain  # noqa: E402
from .layers.attention import MultiheadAttention, disable_fast_path  # noqa: E402
from .layers.experts import Experts  # noqa: E402
from .layers.kept_bases import keep_bases  # noqa: E402
from .layers.linear import Linear  # noqa: E402
from .layers.randlora_layer import RandLoraLayer  # noqa: E402
from .layers.update_cache import inference_cache  # noqa: E402
from .model.model import RandLoraModel, get_peft_model  # noqa: E402
from .ops.unique_base import UniqueBaseGrad  # noqa: E402
from .suggestion.suggest import Suggestion, suggest  # noqa: E402

__version__ = _C.build_info()["version"]

__all__ = [
    "Estimate",
    "Experts",
    "Linear",
    "MultiheadAttention",
    "RandLoraConfig",
    "RandLoraLayer",
    "RandLoraModel",
    "RandomBases",
    "Suggestion",
    "UniqueBaseGrad",
    "build_info",
    "disable_fast_path",
    "estimate",
    "explain",
    "export",
    "functional",
    "get_peft_model",
    "inference_cache",
    "keep_bases",
    "suggest",
]


def build_info() -> dict[str, str]:
    """What the compiled part was built from and found here.

    Keys: ``version``, ``torch`` (built against), ``cuda`` and ``cuda_archs`` (empty without CUDA), ``compiler``,
    ``cpu_capability`` (the CPU kernels in use: ``avx512``, ``avx2`` or ``portable``), ``backends`` (``cpu`` or
    ``cpu,cuda``).
    """
    info = dict(_C.build_info())
    info["backends"] = "cpu,cuda" if info["cuda"] else "cpu"
    return info
