"""16-bit loads and stores of the kernels: every pattern widens, and every number rounds, exactly as in PyTorch."""

import pytest
import torch
from helpers.common import HALVES, on_devices, over

from randlora.functional import unique_base


def through_the_kernel(values, dtype):
    """`values` as A with lambda = gamma = 1: loaded, multiplied by one, stored."""
    one = torch.ones(1, 1, device=values.device)
    return unique_base(values[None, None], one, one.expand(1, values.numel()), 1.0, dtype).flatten()


def assert_equal_with_nan(got, expected):
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    sign = ~expected.isnan()
    assert torch.equal(got.signbit()[sign], expected.signbit()[sign]), "the sign of a zero"


def every_pattern(dtype, device):
    return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)


@on_devices
@over("dtype", HALVES)
def test_every_pattern_widens(dtype, device):
    values = every_pattern(dtype, device)
    assert_equal_with_nan(through_the_kernel(values, torch.float32), values.float())
    assert_equal_with_nan(through_the_kernel(values, dtype), values)


@on_devices
@over("dtype", HALVES)
def test_rounding_to_nearest_even(dtype, device):
    """All numbers of the dtype, their midpoints, and the fp32 numbers next to both."""
    exact = every_pattern(dtype, device).float()
    exact = exact[exact.isfinite()].sort().values
    ties = (exact[1:].double() + exact[:-1].double()).div(2).float()
    top = torch.tensor([65519.0, 65520.0, 65536.0, 3.3961775e38, 3.4e38, torch.inf, torch.nan], device=device)
    around = torch.cat([exact, ties, top, -top])
    up, down = (torch.nextafter(around, torch.full_like(around, to)) for to in (torch.inf, -torch.inf))
    values = torch.cat([around, up, down])
    assert_equal_with_nan(through_the_kernel(values, dtype), values.to(dtype))


@on_devices
@over("dtype", HALVES)
def test_rounding_of_random_bits(dtype, device):
    bits = torch.randint(-(2**31), 2**31 - 1, (300_000,), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32).to(device)
    assert_equal_with_nan(through_the_kernel(values, dtype), values.to(dtype))


@on_devices
@over("dtype", HALVES)
@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 31])
def test_tails(count, dtype, device):
    """Numbers that do not fill a vector go another way through the kernel."""
    values = torch.linspace(-70000, 70000, count, device=device)
    assert_equal_with_nan(through_the_kernel(values, dtype), values.to(dtype))
