"""The forms of patterns, and that C++ and Python mean the same by them."""

import re
from pathlib import Path

import pytest
import torch
from helpers.ternary import ALL_FORMS, draw

from randlora.ops import pattern as forms

HEADER = Path(__file__).parents[2] / "csrc" / "pattern.h"
PREDICATES = ("is_lists", "is_planes", "is_bits", "is_signs", "is_seed")


def test_names_and_numbers_are_those_of_the_header():
    text = HEADER.read_text()
    found = {int(size): name for name, size in re.findall(r"bool (is_\w+)\(.*pattern\.size\(\) == (\d)", text)}
    assert sorted(found.values()) == sorted(PREDICATES)
    for size, form in forms.FORMS.items():
        struct = re.search(rf"struct {form.__name__} {{\s*const at::Tensor ?(.*?);", text, re.DOTALL)
        assert re.findall(r"\w+", struct[1]) == list(form._fields)
        assert [name for name in PREDICATES if getattr(forms, name)([None] * size)] == [found[size]]
        assert forms.is_packed([None] * size) == (found[size] in ("is_planes", "is_bits"))


@pytest.mark.parametrize("form", ALL_FORMS)
def test_a_pattern_has_one_form(form):
    pattern, _ = draw((24, 41, 5), form)[-1].pattern(24)
    assert [getattr(forms, name)(pattern) for name in PREDICATES].count(True) == 1
    tensors = forms.FORMS[len(pattern)](*pattern)
    assert all(a is b for a, b in zip(tensors, pattern, strict=True))


@pytest.mark.parametrize("count", [6, 7])
def test_other_numbers_of_tensors_are_refused(count):
    tensors = [torch.zeros(1, dtype=torch.int32)] * count
    with pytest.raises(ValueError, match=f"pattern must be 5 lists, .* got {count}"):
        forms.require_form(tensors)
    with pytest.raises(ValueError, match=f"pattern must be 5 lists, .* got {count}"):
        torch.ops.randlora.check_pattern(tensors)
