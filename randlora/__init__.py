"""RandLoRA: full-rank adaptation of frozen models (arXiv 2502.00987), as cheap as LoRA."""

from . import _load

_C = _load.load()  # registers torch.ops.randlora, or says what is missing

from . import functional  # noqa: E402
from .attention import MultiheadAttention  # noqa: E402
from .bases import RandomBases  # noqa: E402
from .cache import inference_cache  # noqa: E402
from .config import RandLoraConfig  # noqa: E402
from .estimate import Estimate, estimate  # noqa: E402
from .explanation import explain  # noqa: E402
from .layer import RandLoraLayer  # noqa: E402
from .linear import Linear  # noqa: E402
from .model import RandLoraModel, get_peft_model  # noqa: E402
from .ops import UniqueBaseGrad  # noqa: E402

__version__ = _C.build_info()["version"]

__all__ = [
    "Estimate",
    "Linear",
    "MultiheadAttention",
    "RandLoraConfig",
    "RandLoraLayer",
    "RandLoraModel",
    "RandomBases",
    "UniqueBaseGrad",
    "build_info",
    "estimate",
    "explain",
    "functional",
    "get_peft_model",
    "inference_cache",
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
