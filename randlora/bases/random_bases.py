"""The random bases A and B: fixed, shared by every layer, and reproducible from a few numbers.

With ``prng="philox"`` an element depends on its own indices and the seed only, so a store may grow, be sliced, or be
made anew on another device or in another dtype without changing a value. ``prng="peft"`` draws what PEFT draws, for
adapters that PEFT saved without their projections; such bases have one size.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..checks import require_dtype, require_int, require_size
from ..private_torch import parse_to
from . import fingerprint, parts, patterns
from .copies import Copies, canonical, renew_in_children
from .definition import Definition
from .parts import Part
from .patterns import Form, Pattern


class RandomBases(Definition):
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
        keep: False: dense bases are made anew in every pass of a layer; see the attribute :attr:`keep`.

    Values are generated at first use. ``copy.deepcopy`` returns the same object and pickles hold the definition only.

    Raises:
        ValueError, TypeError: for arguments outside the ranges above.
    """

    watched = True  # whether every use looks if given tensors have been written to meanwhile

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
        keep: bool = True,
    ) -> None:
        super().__init__(max_dim, min_dim, r, kind, seed, num_bases, prng, sparsity, group_width)
        self.dtype = require_dtype("dtype", torch.get_default_dtype() if dtype is None else dtype)
        self.device = canonical(torch.device("cpu" if device is None else device))
        self.given: tuple[Tensor, Tensor] | None = None
        self._keep = True
        self._drop_copies()
        self.keep = keep

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
            made = _given_bases[id(A), id(B)] = cls.around(A, B)  # while it lives, so do the tensors and their ids
            return made

    @classmethod
    def around(cls, A: Tensor, B: Tensor) -> RandomBases:
        """As :meth:`from_tensors`, of tensors that fit, but another object with casts of its own at every call."""
        self = cls.__new__(cls)
        self.r, self.min_dim, self.max_dim, self.num_bases = A.shape[0], A.shape[2], B.shape[0], B.shape[1]
        self.kind, self.prng, self.seed, self.sparsity, self.group_width = "given", "none", 0, None, None
        self.dtype, self.device = A.dtype, A.device
        self.given = (A, B)
        self._keep = True
        self._drop_copies()
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

    def tensors(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The stored A and B (see :attr:`scale`), one shared copy per dtype and device. Not to be written to.

        Where :attr:`keep` is False they are made anew at every call.
        """
        self._drop_outdated()
        key = dtype or self.dtype, canonical(device or self.device)
        if not self._keep:
            return self.draw(*key)
        found = self.copies.kept(*key)
        if found is None:
            found = self.copies.tensors(*key)
        return self.draw(*key) if found is None else found

    def part(self, part: Part) -> tuple[Tensor, Tensor]:
        """Some rows of the stored B and columns of the stored A; kept and shared like :meth:`tensors`."""
        self._drop_outdated()
        if not self._keep:
            return self.draw_part(part)
        found = self.copies.kept(*part)
        if found is None:
            found = self.copies.part(part)
        return self.draw_part(part) if found is None else found

    def pattern(self, min_dim: int, device: torch.device | None = None) -> tuple[Pattern, float] | None:
        """Packed bases for a layer of this smaller dimension, with their :attr:`scale`; None for dense ones.

        They are kept in this form only (lists, planes, bits or signs: :mod:`randlora.bases.patterns`), unless
        :meth:`tensors` is called. Dense ones have one, their seed, where :attr:`keep` is False. Given bases are
        recognised where that makes them faster: the ternary ones that PEFT stores dense. Raises ``ValueError`` where
        `min_dim` is larger than the bases': call :meth:`require` first.
        """
        if self._keep and self.kind == "dense" and self.prng == "philox":
            return None
        self._drop_outdated()
        device = canonical(device or self.device)
        kept: tuple[Pattern, float] | None = self.copies.kept("pattern", min_dim, device)
        if kept is not None:
            return kept
        if self.prng == "philox" and patterns.form_for(self.kind, self.sparsity, device, self._keep) is None:
            return None
        if device.type == "meta" or (self.given is not None and self.given[0].is_meta):  # no values to look at
            return None
        return self.copies.pattern(min_dim, device)

    @property
    def keep(self) -> bool:
        """Whether dense bases stay in memory between calls: True, unless it is set.

        False: nothing is kept but the seed. Every pass of a layer makes the part of A and B that it needs, the same
        bits, and frees it when it is done. This is no part of the definition: it is not saved, pickled or hashed.
        :func:`randlora.keep_bases` sets it for a model.

        Raises ``ValueError`` for bases that would not gain by it, or cannot be made from indices.
        """
        return self._keep

    @keep.setter
    def keep(self, keep: bool) -> None:
        if keep not in (True, False):
            raise TypeError(f"keep must be True or False, got {keep!r}")
        if not keep and (reason := self.why_kept()):
            raise ValueError(reason)
        with self.copies.lock:
            if keep != self._keep:
                self._keep = bool(keep)
                self.copies.clear()

    def why_kept(self) -> str | None:
        """Why :attr:`keep` cannot be False; None where it can."""
        if self.given is not None or self.prng != "philox":
            drawn = "were given as tensors" if self.given is not None else f"are drawn by prng={self.prng!r}"
            return f"these bases {drawn}: they cannot be made again a part at a time, and so must be kept"
        if self.kind == "dense":
            return None
        return (
            f"bases of kind={self.kind!r} are kept in two bits per number or less, next to nothing beside dense ones: "
            "there is nothing to gain by making them anew"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all copies that exist at the moment, packed ones included."""
        return self.copies.nbytes

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
        with self.copies.lock:
            size = max(self.max_dim, max_dim), max(self.min_dim, min_dim), max(self.num_bases, num_bases)
            if size == (self.max_dim, self.min_dim, self.num_bases):
                return  # another thread was first
            # Before the size is set: who reads the new size, without the lock, must find no copies of the old one.
            self.copies.clear()
            self.max_dim, self.min_dim, self.num_bases = size

    def to(self, *args: Any, **kwargs: Any) -> RandomBases:
        """The same bases with another default ``dtype`` and/or ``device``, given as for ``nn.Module.to``."""
        device, dtype, *_ = parse_to(*args, **kwargs)
        other = self.__class__.__new__(self.__class__)
        with self.copies.lock:  # all three numbers of one size
            other.__dict__.update(self.__dict__)
        other.dtype = self.dtype if dtype is None else require_dtype("dtype", dtype)
        other.device = self.device if device is None else canonical(device)
        other._drop_copies()
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
        M, m, n = (
            limit if value is None else require_int(name, value, 1, limit)
            for (name, limit), value in zip(limits.items(), asked, strict=True)
        )
        if (M, m, n) not in self._hashes:
            self._hashes[M, m, n] = fingerprint.sha256(self, M, m, n, self.device)
        return self._hashes[M, m, n]

    # ---- generation ----

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A new copy of the stored A and B; :meth:`tensors` keeps one."""
        if self.given is None:
            return super().draw(dtype, device)
        if any(t.is_meta for t in self.given) and device.type != "meta":
            raise ValueError(f"these bases were given on the meta device: they have no numbers for {device}")
        A, B = (t.to(device=device, dtype=dtype) for t in self.given)
        return A, B

    def draw_part(self, part: Part) -> tuple[Tensor, Tensor]:
        """A new copy of a part, contiguous; of given tensors a view where that is the same."""
        return parts.draw(self, self.given, part)

    def pack(self, device: torch.device) -> tuple[Form, float] | None:
        """A new copy in packed form, with its :attr:`scale`, if there is such a form; :meth:`pattern` keeps one."""
        if self.prng == "philox":
            return patterns.make(self, device), self.scale
        A, B = self.draw(torch.float32, device) if self.given is None else self.given
        return patterns.of_tensors(A.to(device), B.to(device), held=self.given is not None)

    def _unit_variance(self, stored: Tensor) -> Tensor:
        return stored if self.scale == 1.0 else stored * math.sqrt(self.scale)

    # ---- housekeeping ----

    def _drop_copies(self) -> None:
        self.copies = Copies(self, self.given)
        self._hashes: dict[tuple[int, int, int], str] = {}
        self._version = self.version()

    def version(self) -> tuple:
        """Equal as long as the values are, as far as version counters tell: given tensors may be written to."""
        if self.given is None:
            return (self.copies.handle,)
        return self.copies.handle, *(None if t.is_inference() else t._version for t in self.given)

    def _drop_outdated(self) -> None:
        """Drops copies of given tensors that have been written to since."""
        if self.given is None or not self.watched or torch.compiler.is_compiling():
            return
        version = self.version()
        if version != self._version:
            with self.copies.lock:
                self.copies.clear()
                self._hashes, self._version = {}, version

    def _size(self) -> dict[str, int]:
        with self.copies.lock:  # as another thread may be in the midst of require()
            return {name: getattr(self, name) for name in ("max_dim", "min_dim", "num_bases")}

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomBases:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self.given is not None:
            return RandomBases.from_tensors, self.given
        arguments: dict[str, Any] = dict(self._size())
        arguments |= {name: getattr(self, name) for name in ("r", "kind", "seed", "prng", "dtype", "device")}
        if self.prng == "philox" and self.kind in ("sparse", "very_sparse"):
            arguments["sparsity"] = self.sparsity
        if self.kind == "hadamard":
            arguments["group_width"] = self.group_width
        return _remake, (arguments,)

    def __repr__(self) -> str:
        own = f"group_width={self.group_width}" if self.kind == "hadamard" else f"sparsity={self.sparsity}"
        return (
            f"RandomBases(max_dim={self.max_dim}, min_dim={self.min_dim}, r={self.r}, kind={self.kind!r}, "
            f"seed={self.seed}, num_bases={self.num_bases}, prng={self.prng!r}, {own})"
        )


def _remake(arguments: dict) -> RandomBases:
    return RandomBases(**arguments)


_given_bases: weakref.WeakValueDictionary[tuple[int, int], RandomBases] = weakref.WeakValueDictionary()
_given_lock = threading.Lock()


@renew_in_children
def _renew() -> None:
    global _given_lock
    _given_lock = threading.Lock()
