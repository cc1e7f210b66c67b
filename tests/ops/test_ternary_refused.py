"""Patterns of ternary bases that the ops refuse, with the part that is wrong and why."""

import pytest
import torch
from helpers.ternary import draw

import randlora
from randlora.functional import linear

BAD = {
    "too few": (lambda p: p[:4], ValueError, "pattern must be"),
    "dtype": (lambda p: [p[0].long(), *p[1:]], TypeError, "int32"),
    "shape": (lambda p: [p[0][:, None], *p[1:]], ValueError, "vectors"),
    "starts": (lambda p: [p[0], p[1][:-1], *p[2:]], ValueError, "a_starts must have"),
    "bases": (lambda p: [*p[:3], p[3][:9], p[4]], ValueError, "b_starts must have"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_patterns(case):
    change, error, message = BAD[case]
    _, _, _, lam, gamma, bases = draw((24, 41, 5), "lists")
    with pytest.raises(error, match=message):
        torch.ops.randlora.sparse_update(change(list(bases.pattern(24)[0])), lam, gamma, 41, 1.0, None, torch.float32)


BAD_PLANES = {
    "starts": (lambda p: [p[0][:-1], *p[1:]], ValueError, "a_starts must have shape"),
    "planes": (lambda p: [*p[:2], p[2][:3]], ValueError, "b_planes must have shape"),
    "dtype": (lambda p: [*p[:2], p[2].int()], TypeError, "int16"),
    "one plane": (lambda p: [*p[:2], p[2][:, :1].contiguous()], ValueError, "b_planes must have shape"),
}
BAD_BITS = {
    "rows": (lambda p: [p[0][:-1], p[1]], ValueError, "a_planes must have shape"),
    "more rows": (lambda p: [torch.cat((p[0], p[0])), p[1]], ValueError, "a_planes must have r = 5 rows"),
    "words": (lambda p: [p[0][:, :, :1].contiguous(), p[1]], ValueError, "a_planes must have shape"),
    "planes": (lambda p: [p[0][:, :1].contiguous(), p[1]], ValueError, "b_planes must have shape"),
    "dtype": (lambda p: [p[0].int(), p[1]], TypeError, "a_planes must be int16"),
    "layout": (lambda p: [p[0], p[1].flip(0).transpose(0, 2)], ValueError, "pattern must be contiguous"),
}


@pytest.mark.parametrize("form, case", [("planes", c) for c in BAD_PLANES] + [("bits", c) for c in BAD_BITS])
def test_bad_planes(form, case):
    change, error, message = (BAD_PLANES if form == "planes" else BAD_BITS)[case]
    x, _, _, lam, gamma, bases = draw((24, 41, 5), form)
    pattern = change(list(bases.pattern(24)[0]))
    with pytest.raises(error, match=message):
        torch.ops.randlora.sparse_update(pattern, lam, gamma, 41, 1.0, None, torch.float32)
    with pytest.raises(error, match=message):
        linear(x, None, None, None, None, lam, gamma, 1.0, out_features=41, strategy="factored", pattern=pattern)


@pytest.mark.parametrize("first, rows", [(-1, 2), (0, 6), (5, 1), (0, 0), (6, None)])
def test_rows_outside_of_A(first, rows):
    pattern = randlora.RandomBases(41, 24, 5, "sign").pattern(24)[0]
    with pytest.raises(ValueError, match=r"rows must lie in \[0, r\) = \[0, 5\)"):
        torch.ops.randlora.packed_expand(pattern, 5, 24, 41, torch.float32, first, rows)
