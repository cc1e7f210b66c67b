"""The random bases A and B: fixed, shared by every layer, and reproducible from a few numbers.

With ``prng="philox"`` an element depends on its own indices and the seed only, so a store may grow, be sliced, or be
made anew on another device or in another dtype without changing a value. ``prng="peft"`` draws what PEFT draws, for
adapters that PEFT saved without their projections; such bases have one size.
"""

from __future__ import annotations

import math
import threading
import weakref

import torch
from torch import Tensor

from ..checks import require_dtype, require_float, require_int, require_size
from . import fingerprint, hadamard, patterns, peft_prng
from .copies import Ready, are_wanted_fake, canonical, make_sure, make_sure_pattern, register, renew_in_children
from .patterns import Pattern

KINDS = ("dense", "hadamard", "sparse", "very_sparse", "sign")
PEFT_KINDS = ("dense", "sparse", "very_sparse")
PRNGS = ("philox", "peft", "peft-fp16")

STREAM_A, STREAM_B = 0, 1


class RandomBases:
    """The pair of random bases that RandLoRA layers share (arXiv 2502.00987; PEFT's ``randlora_A`` / ``randlora_B``).

    Args:
        max_dim: rows of B, the largest ``max(in_features, out_features)`` it serves.
        min_dim: columns of A, the largest ``min(in_features, out_features)`` it serves.
        r: rank of one base, up to 65,536.
        kind: ``"dense"`` (uniform), ``"hadamard"`` (-1, +1: parts of Hadamard matrices with random signs, which have
            fast transforms and take no memory), ``"sparse"`` (-1, 0, +1 with 2/3 zeros), ``"very_sparse"``
            (1 - 1/sqrt(min_dim) zeros) or ``"sign"`` (-1, +1); unit variance each.
        seed: PEFT's ``projection_prng_key``, ``0 <= seed < 2**64``.
        num_bases: number of bases n; default ``ceil(min_dim / r)``, which makes the update full-rank.
        prng: ``"philox"`` (default); ``"peft"`` reproduces PEFT's own draw on machines with bfloat16, ``"peft-fp16"``
            that on machines without.
        dtype, device: of ``.A`` and ``.B``; default: torch's default dtype and the CPU. Layers ask for the dtype and
            device they compute in, and share one copy of each.
        sparsity: z of a ternary kind, P(+1) = P(-1) = 1/(2z); fixed when the store is made (``very_sparse``: default
            ``sqrt(min_dim)``), so that growing never changes a value.
        group_width: w of ``hadamard`` (:mod:`randlora.bases.hadamard`): 8, 4, 2 or 1, fixed when the store is made as
            well; default: the largest that costs a layer with `min_dim` and `num_bases` no rank.

    Values are generated at first use. ``copy.deepcopy`` returns the same object and pickles hold the definition only.

    Raises:
        ValueError, TypeError: for arguments outside the ranges above.
    """

    watched = True  # whether it is looked at if given tensors have been written to

    def __init__(
        self,
        max_dim: int,
        min_dim: int,
        r: int,
        kind: str = "dense",
        seed: int = 0,
        num_bases: int | None = None,
        prng: str = "philox",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        sparsity: float | None = None,
        group_width: int | None = None,
    ) -> None:
        self.r = require_size("r", r)
        self.min_dim = require_size("min_dim", min_dim, 2**31 - 1)
        self.max_dim = require_size("max_dim", max_dim, 2**31 - 1)
        if self.max_dim < self.min_dim:
            raise ValueError(f"max_dim must be at least min_dim = {min_dim}, got {max_dim}")
        default_bases = -(-self.min_dim // self.r)
        self.num_bases = default_bases if num_bases is None else require_size("num_bases", num_bases, 2**31 - 1)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if prng not in PRNGS:
            raise ValueError(f"prng must be one of {', '.join(PRNGS)}, got {prng!r}")
        if prng != "philox" and (kind not in PEFT_KINDS or sparsity is not None):
            raise ValueError(
                f"prng={prng!r} has the kinds dense, sparse and very_sparse with PEFT's own sparsity, "
                f"got kind={kind!r}, sparsity={sparsity}"
            )
        self.kind, self.prng = kind, prng
        self.seed = require_int("seed", seed, 0, 2**64 - 1)
        self.sparsity = sparsity_of(kind, self.min_dim, sparsity)
        self.group_width = group_width_of(kind, group_width)
        if kind == "hadamard" and group_width is None:
            self.group_width = hadamard.group_width([(self.min_dim, self.num_bases)], self.r)
        self.dtype = require_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        self.device = canonical(torch.device("cpu" if device is None else device))
        self.given: tuple[Tensor, Tensor] | None = None
        self._reset()

    @classmethod
    def from_tensors(cls, A: Tensor, B: Tensor) -> RandomBases:
        """Bases that exist already: ``A [r, 1, min_dim]`` and ``B [max_dim, num_bases, r]``, such as PEFT's buffers.

        The tensors are not copied, and the same tensors give the same object, so that layers share its casts. Bases are
        fixed: what writes to the tensors must move their version counters (``load_state_dict`` and ordinary in-place
        operations do, ``.data`` does not), and graphs of ``torch.compile`` keep the casts they were made with.
        """
        for name, t, shape in (
            ("randlora_A", A, "[r, 1, min_dim]"),
            ("randlora_B", B, "[max_dim, num_bases, r]"),
        ):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(t).__name__}")
            require_dtype(f"{name}'s dtype", t.dtype)
            if t.layout != torch.strided:
                raise TypeError(f"{name} must be a dense (strided) tensor, got one of layout {t.layout}")
            if t.dim() != 3 or t.numel() == 0:
                raise ValueError(f"{name} must have shape {shape}, got {list(t.shape)}")
        if A.dtype != B.dtype or A.device != B.device:
            raise ValueError(
                f"randlora_A and randlora_B must share dtype and device, got {A.dtype} on {A.device} and "
                f"{B.dtype} on {B.device}"
            )
        if A.shape[1] != 1 or B.shape[2] != A.shape[0]:
            raise ValueError(
                "randlora_A [r, 1, min_dim] and randlora_B [max_dim, num_bases, r] must agree in r, got "
                f"{list(A.shape)} and {list(B.shape)}"
            )
        with _given_lock:
            known = _given_bases.get((id(A), id(B)))
            if known is not None:
                return known
            self = cls.__new__(cls)
            self.r, self.min_dim, self.max_dim, self.num_bases = A.shape[0], A.shape[2], B.shape[0], B.shape[1]
            self.kind, self.prng, self.seed, self.sparsity, self.group_width = "given", "none", 0, None, None
            self.dtype, self.device = A.dtype, A.device
            self.given = (A, B)
            self._reset()
            _given_bases[id(A), id(B)] = self  # while it lives, so do the tensors and their ids
            return self

    # ---- values ----

    @property
    def A(self) -> Tensor:
        """``[r, 1, min_dim]``, unit variance, in ``dtype`` on ``device``."""
        return self._unit_variance(self.tensors()[0])

    @property
    def B(self) -> Tensor:
        """``[max_dim, num_bases, r]``, unit variance, in ``dtype`` on ``device``."""
        return self._unit_variance(self.tensors()[1])

    @property
    def scale(self) -> float:
        """What a product of the stored A and B lacks: z for ternary bases, which are stored as -1, 0, +1; else 1."""
        return 1.0 if self.sparsity is None or self.prng != "philox" else self.sparsity

    def tensors(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The stored A and B (see :attr:`scale`), one shared copy per dtype and device. Not to be written to."""
        self._drop_outdated()
        key = dtype or self.dtype, canonical(device or self.device)
        if (kept := self._kept(*key)) is not None:
            return kept
        name = make_sure(self._handle, *key)
        if name is None:
            return self.draw(*key)
        held = getattr(self._ready, name, None)
        return self.tensors(*key) if held is None else held  # none: another thread let the store grow in between

    def pattern(self, min_dim: int, device: torch.device | None = None) -> tuple[Pattern, float] | None:
        """Packed bases for a layer of this smaller dimension, with their :attr:`scale`; None for dense ones.

        They are kept in this form only (lists, planes, bits or signs: :mod:`randlora.bases.patterns`), unless
        :meth:`tensors` is called. Given bases are recognised where that makes them faster: the ternary ones that PEFT
        stores dense. Raises ValueError where `min_dim` is larger than the store's, which :meth:`require` lets grow.
        """
        if self.kind == "dense" and self.prng == "philox":
            return None
        self._drop_outdated()
        device = canonical(device or self.device)
        if (kept := self._kept("pattern", min_dim, device)) is not None:
            return kept
        if self.prng == "philox" and patterns.form_for(self.kind, self.sparsity, device) is None:
            return None
        if device.type == "meta" or (self.given is not None and self.given[0].is_meta):  # no values to look at
            return None
        name = make_sure_pattern(self._handle, device, min_dim)
        if name is None:
            return None
        found = getattr(self._ready, name, None)
        return self.pattern(min_dim, device) if found is None else found  # as in tensors()

    def _kept(self, *key):
        """What is ready under this key: the usual case, but for what is traced, in a few steps."""
        if torch.compiler.is_compiling() or are_wanted_fake():
            return None
        return getattr(self._ready, Ready.name(*key), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all copies that exist at the moment, packed ones included."""
        lists = sum(lists.nbytes for lists, _ in list(self._lists.values()))  # other threads may be adding to it
        return lists + sum(A.nbytes + B.nbytes for A, B in list(self._held.values()))

    def require(self, max_dim: int, min_dim: int, num_bases: int) -> None:
        """Make the store serve a layer of these dimensions: grows it, or raises ``ValueError`` where it cannot."""
        if max_dim <= self.max_dim and min_dim <= self.min_dim and num_bases <= self.num_bases:
            return
        if self.prng != "philox":
            raise ValueError(
                f"these bases (prng={self.prng!r}) have a fixed size and are too small: needed are randlora_A "
                f"[{self.r}, 1, {min_dim}] and randlora_B [{max_dim}, {num_bases}, {self.r}], got "
                f"[{self.r}, 1, {self.min_dim}] and [{self.max_dim}, {self.num_bases}, {self.r}]"
            )
        asked = (("max_dim", max_dim), ("min_dim", min_dim), ("num_bases", num_bases))
        max_dim, min_dim, num_bases = (require_size(name, value, 2**31 - 1) for name, value in asked)
        with self._lock:
            size = max(self.max_dim, max_dim), max(self.min_dim, min_dim), max(self.num_bases, num_bases)
            if size == (self.max_dim, self.min_dim, self.num_bases):
                return  # another thread was first
            # Before the size: who sees it may count on copies of it. The smaller ones are prefixes of the next ones.
            self._ready = Ready()
            self._held.clear()
            self._lists.clear()
            self.max_dim, self.min_dim, self.num_bases = size

    def to(self, *args, **kwargs) -> RandomBases:
        """The same bases with another default ``dtype`` and/or ``device``, given as for ``nn.Module.to``."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        other = self.__class__.__new__(self.__class__)
        with self._lock:  # of one size
            other.__dict__.update(self.__dict__)
        other.dtype = self.dtype if dtype is None else require_dtype("dtype", dtype)
        other.device = self.device if device is None else canonical(device)
        other._reset()
        return other

    # ---- identity ----

    def fingerprint(self, max_dim: int | None = None, min_dim: int | None = None, num_bases: int | None = None) -> str:
        """SHA-256 (hex) of the definition and of the values, for the whole store or a leading part of it.

        The values are generated on ``device`` in blocks and hashed in canonical form (float32, or int8 for bases of
        -1, 0 and +1; little endian, A before B), whatever ``dtype`` is: equal fingerprints mean equal bases.
        """
        self._drop_outdated()
        limits = self._size()
        asked = (max_dim, min_dim, num_bases)
        dims = tuple(
            limit if value is None else require_int(name, value, 1, limit)
            for (name, limit), value in zip(limits.items(), asked, strict=True)
        )
        if dims not in self._hashes:
            self._hashes[dims] = fingerprint.sha256(self, *dims)
        return self._hashes[dims]

    # ---- generation ----

    @property
    def signed_seed(self) -> int:
        """The seed as ops take it: their schemas carry signed 64-bit integers."""
        return self.seed - 2**64 if self.seed >= 2**63 else self.seed

    def fill(self, out: Tensor, stream: int, offsets: tuple[int, int, int]) -> Tensor:
        """The slice of the stored A (stream 0) or B (stream 1) that begins at `offsets` and has the shape of `out`."""
        if out.is_meta:  # a model without numbers still has shapes to compute
            return out
        if self.kind == "hadamard":
            hadamard.fill(self, out, stream, offsets)
        else:
            torch.ops.randlora.fill_bases_(out, self.signed_seed, stream, offsets, self.sparsity)
        return out

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A new copy of the stored A and B; :meth:`tensors` keeps one."""
        if self.given is not None:
            if any(t.is_meta for t in self.given) and device.type != "meta":
                raise ValueError(f"these bases were given on the meta device: they have no numbers for {device}")
            return tuple(t.to(device=device, dtype=dtype) for t in self.given)
        if self.prng != "philox":
            half = torch.bfloat16 if self.prng == "peft" else torch.float16
            A, B = peft_prng.draw(self.max_dim, self.min_dim, self.num_bases, self.r, self.seed, self.sparsity, half)
            return A.to(device=device, dtype=dtype), B.to(device=device, dtype=dtype)
        A = torch.empty((self.r, 1, self.min_dim), dtype=dtype, device=device)
        B = torch.empty((self.max_dim, self.num_bases, self.r), dtype=dtype, device=device)
        return self.fill(A, STREAM_A, (0, 0, 0)), self.fill(B, STREAM_B, (0, 0, 0))

    def _unit_variance(self, stored: Tensor) -> Tensor:
        return stored if self.scale == 1.0 else stored * math.sqrt(self.scale)

    # ---- housekeeping ----

    def _reset(self) -> None:
        self._held = self._own_copy()
        self._lists: dict[torch.device, tuple[patterns.Form, float]] = {}
        self._without_lists: set[torch.device] = set()  # where those not drawn here were looked at in vain
        self._ready = Ready()
        self._hashes: dict[tuple[int, int, int], str] = {}
        self._lock = threading.Lock()
        self._handle = register(self)
        self._version = self.version()

    def version(self) -> tuple:
        """Equal as long as the values are, as far as version counters tell: given tensors may be written to."""
        if self.given is None:
            return (self._handle,)
        return self._handle, *(None if t.is_inference() else t._version for t in self.given)

    def _drop_outdated(self) -> None:
        """Drops copies of given tensors that have been written to since."""
        if self.given is None or not self.watched or torch.compiler.is_compiling():
            return
        version = self.version()
        if version != self._version:
            with self._lock:
                self._ready, self._hashes = Ready(), {}
                self._held, self._lists, self._without_lists = self._own_copy(), {}, set()
                self._version = version

    def _own_copy(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]:
        """Given tensors are the copy in their own dtype."""
        return {} if self.given is None else {(self.given[0].dtype, canonical(self.given[0].device)): self.given}

    def _size(self) -> dict[str, int]:
        with self._lock:  # another thread may be letting it grow
            return {name: getattr(self, name) for name in ("max_dim", "min_dim", "num_bases")}

    def __deepcopy__(self, memo) -> RandomBases:
        return self

    def __reduce__(self):
        if self.given is not None:
            return RandomBases.from_tensors, self.given
        arguments = self._size()
        arguments |= {name: getattr(self, name) for name in ("r", "kind", "seed", "prng", "dtype", "device")}
        if self.prng == "philox" and self.kind in ("sparse", "very_sparse"):
            arguments["sparsity"] = self.sparsity
        if self.kind == "hadamard":
            arguments["group_width"] = self.group_width
        from .shared import is_shared, rebuild

        return rebuild, (arguments, is_shared(self))

    def __repr__(self) -> str:
        own = f"group_width={self.group_width}" if self.kind == "hadamard" else f"sparsity={self.sparsity}"
        return (
            f"RandomBases(max_dim={self.max_dim}, min_dim={self.min_dim}, r={self.r}, kind={self.kind!r}, "
            f"seed={self.seed}, num_bases={self.num_bases}, prng={self.prng!r}, {own})"
        )


def sparsity_of(kind: str, min_dim: int, sparsity: float | None) -> float | None:
    if sparsity is None:
        return {"sign": 1.0, "sparse": 3.0, "very_sparse": math.sqrt(min_dim)}.get(kind)
    if kind not in ("sparse", "very_sparse"):
        raise ValueError(f"kind={kind!r} has no free sparsity, got sparsity={sparsity}")
    return require_float("sparsity", sparsity, 1.0, 2.0**31)


def group_width_of(kind: str, group_width: int | None) -> int | None:
    """`group_width`, or ``ValueError`` if bases of this kind cannot have it. None: left open."""
    if group_width is None:
        return None
    if kind != "hadamard":
        raise ValueError(f"kind={kind!r} has no group width, got group_width={group_width}")
    if isinstance(group_width, bool) or group_width not in hadamard.WIDTHS:
        raise ValueError(f"group_width must be 8, 4, 2 or 1, got {group_width!r}")
    return int(group_width)


_given_bases: weakref.WeakValueDictionary[tuple[int, int], RandomBases] = weakref.WeakValueDictionary()
_given_lock = threading.Lock()


@renew_in_children
def _renew() -> None:
    global _given_lock
    _given_lock = threading.Lock()
