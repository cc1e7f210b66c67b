"""An op fuzzer: right arguments must give right numbers, wrong ones an error in words, and neither may touch memory.

    python -m helpers.op_fuzz --seconds 60 --seed 0 --log case.txt    in tests/; what tests/ops/test_fuzz.py starts
    python -m helpers.op_fuzz --only 123                              one case again

A case follows from its number alone. It is written to the log before the op is called, so that it is known where the
process ends by a signal. Tensors lie between margins that are looked at after every call; what ops allocate themselves
is watched by AddressSanitizer in `make asan`.
"""

import argparse
import contextlib
import resource
import sys
import time

import torch

from helpers.op_arguments import MAKERS, Draw, Memory

INTEGERS = (0, 1, -1, 2, 7, 63, 64, 2**15, 2**16 + 1, 2**31 - 1, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**63))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16,
          torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)  # fmt: skip
WRITTEN_TO = ("out", "into_narrow", "into_wide")
EXPECTED = (ValueError, TypeError, RuntimeError, MemoryError)  # NotImplementedError is a RuntimeError


def wrong_contents(d, t):
    """Integers of another order or size, or numbers that are not finite, in some places."""
    t = t.clone(memory_format=torch.contiguous_format)
    flat = t.view(-1)
    if t.dtype == torch.bool:
        return ~t
    if t.dtype.is_floating_point or t.dtype.is_complex:
        flat[d.int(0, len(flat) - 1)] = d.of((float("nan"), float("inf"), -1e30))
        return t
    if d.chance(0.3):
        return flat[torch.randperm(len(flat), generator=d.rng)].view(t.shape)
    limits = torch.iinfo(t.dtype)
    for _ in range(d.int(1, 3)):
        at = d.int(0, len(flat) - 1)
        value = d.of((*INTEGERS, int(flat[at]) + d.int(-3, 3), int(flat[d.int(0, len(flat) - 1)])))
        flat[at] = min(max(value, limits.min), limits.max)
    return t


def other_size(d, t):
    """One axis shorter, longer or gone, or one more."""
    if not t.dim() or d.chance(0.1):
        return t[None]
    axis = d.int(0, t.dim() - 1)
    size = d.of((0, 1, t.shape[axis] - 1, t.shape[axis] + 1, 2 * t.shape[axis], d.int(0, 70)))
    if d.chance(0.1):
        return t.select(axis, 0) if t.shape[axis] else t.flatten()
    if max(size, 0) <= t.shape[axis]:
        return t.narrow(axis, 0, max(size, 0)).contiguous()
    return torch.cat([t, t.new_zeros((*t.shape[:axis], size - t.shape[axis], *t.shape[axis + 1 :]))], axis)


def other_tensor(d, t):
    """What is wrong with a tensor: (name, tensor)."""
    if t.is_meta or t.layout != torch.strided:
        return "", t
    name = d.of(
        ("size", "size", "size", "contents", "contents", "dtype", "swapped", "expanded", "meta", "sparse", "grad")
    )
    if name == "contents" and t.numel() and t.dtype != torch.bool:
        return name, wrong_contents(d, t)
    if name == "dtype":
        return name, t.to(d.of(DTYPES))
    if name == "swapped" and t.dim() > 1:
        return name, t.transpose(0, 1)
    if name == "expanded" and t.numel():
        axis = d.int(0, t.dim())
        return name, t[:1].expand(t.shape) if t.dim() and axis < t.dim() else t[None].expand(3, *t.shape)
    if name == "meta":
        return name, t.to("meta")
    if name == "sparse" and t.dim():
        return name, t.to_sparse()
    if name == "grad" and t.dtype.is_floating_point:
        return name, t.detach().clone().requires_grad_()
    return "size", other_size(d, t)


def other_value(d, value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return d.of((*INTEGERS, value - 1, value + 1, 2 * value))
    if isinstance(value, float):
        return d.of((0.0, -1.0, 1.0, 0.999999, 1e-300, 1e308, float("nan"), float("inf"), float("-inf")))
    if isinstance(value, str):
        return d.of(("factored", "materialized", "merged", "", "auto", "\0"))
    if isinstance(value, torch.dtype):
        return d.of(DTYPES)
    if value is None:
        return d.of((None, torch.ones(d.int(0, 9)), 1.0, 3))
    raise AssertionError(f"no idea what is wrong about {value!r}")


def make_wrong(d, call):
    """One argument of the call, or an element of a list, is replaced."""
    name = d.of(list(call.arguments))
    if call.arguments.get("pattern") and d.chance(0.5):
        name = "pattern"
    value = call.arguments[name]
    if isinstance(value, list) and d.chance(0.15):
        value = list(value)
        if value and d.chance(0.5):
            value.pop(d.int(0, len(value) - 1))
        else:
            value.insert(d.int(0, len(value)), value[0] if value else torch.ones(3) if name == "pattern" else 3)
        what = "length"
    elif isinstance(value, list) and value:
        at = d.int(0, len(value) - 1)
        what, new = (
            other_tensor(d, value[at]) if isinstance(value[at], torch.Tensor) else ("", other_value(d, value[at]))
        )
        value, name = [*value[:at], new, *value[at + 1 :]], f"{name}"
        what = f"[{at}] {what}"
    elif isinstance(value, list):
        return
    elif isinstance(value, torch.Tensor):
        what, value = ("None", None) if d.chance(0.05) else other_tensor(d, value)
    else:
        what, value = "", other_value(d, value)
    call.arguments[name] = value
    call.wrong.append(f"{name} {what}".strip())


def compare(call, results):
    if call.expected == "dropout":
        x, p = call.arguments["x"], call.arguments["p"]
        kept = results != 0
        torch.testing.assert_close(results[kept].double(), x[kept].double() / (1 - p), rtol=call.tolerance, atol=0)
        return
    for got, wanted, squares in zip(results, call.expected, call.squares or call.expected, strict=True):
        if wanted is None:
            assert got.numel() == 0, "a gradient that nobody asked for"
            continue
        assert got.shape == wanted.shape, (got.shape, wanted.shape)
        size = wanted.abs().max() + 1e-6 if wanted.numel() else 1.0
        if call.squares and wanted.numel():
            size = max(size, squares.max().sqrt())
        error = ((got.double() - wanted).abs().max() / size).item() if wanted.numel() else 0.0
        assert error <= call.tolerance, f"{call.op} is off by {error}"


def run(number, log=None):
    """One case: what came of it, "right" or the name of an exception."""
    d = Draw(number)
    call = d.of(MAKERS)(d)
    for _ in range(d.of((0, 1, 1, 1, 2))):
        if "meta" not in "".join(call.wrong):  # what goes to the fake kernels is wrong enough
            make_wrong(d, call)
    memory = Memory()

    def guard(name, value):
        if isinstance(value, torch.Tensor):
            return memory.guard(value, writable=name in WRITTEN_TO)
        return [guard(name, v) for v in value] if isinstance(value, list) else value

    arguments = {name: guard(name, value) for name, value in call.arguments.items()}
    text = f"case {number}: {call}"
    if log is not None:
        log.seek(0)
        log.truncate()
        log.write(text + "\n")
        log.flush()
    try:
        results = getattr(torch.ops.randlora, call.op)(**arguments)
        outcome = "right" if not call.wrong else "taken"
        if written := [arguments[name] for name in WRITTEN_TO if arguments.get(name) is not None]:
            results = [*(results or ()), *written]
        if not call.wrong:
            compare(call, [results] if isinstance(results, torch.Tensor) and call.expected != "dropout" else results)
    except EXPECTED as error:
        outcome = type(error).__name__
        assert call.wrong, f"refused right arguments: {error}\n{text}"
        assert "INTERNAL ASSERT" not in str(error), f"{error}\n{text}"
        assert str(error).strip(), f"an error without words\n{text}"
    except AssertionError as error:
        raise AssertionError(f"{error}\n{text}") from error
    try:
        memory.check()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{text}") from error
    return call.op, outcome


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first case; the others follow")
    parser.add_argument("--only", type=int, help="this case alone")
    parser.add_argument("--log", help="a file that holds the case being tried")
    parser.add_argument("--memory", type=float, default=8.0, help="GiB of address space, 0 for no limit")
    options = parser.parse_args()
    if options.memory:  # a size that is too large ends in an error, not in the machine's last page
        limit = int(options.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if options.only is not None:
        print(*run(options.only, sys.stdout if sys.stdout.seekable() else None))
        return
    outcomes, number, end = {}, options.seed, time.monotonic() + options.seconds
    with open(options.log, "w") if options.log else contextlib.nullcontext() as log:
        while time.monotonic() < end:
            outcome = run(number, log)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
            number += 1
    print(f"cases {options.seed} to {number - 1}")
    for (op, outcome), count in sorted(outcomes.items()):
        print(f"{op:24} {outcome:20} {count}")


if __name__ == "__main__":
    main()
