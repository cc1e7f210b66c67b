"""bench/fit.py: what bases can fit, on targets small enough to know it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import fit  # noqa: E402


@pytest.mark.parametrize("spectrum", fit.SPECTRA)
def test_targets_have_their_spectrum(spectrum):
    wanted = fit.target(spectrum, 24, 3)
    values = torch.linalg.svdvals(wanted)
    expected = fit.SPECTRA[spectrum](torch.arange(1.0, 25.0))
    torch.testing.assert_close(values / values[0], expected / expected[0], rtol=1e-4, atol=1e-5)
    assert wanted.square().mean().item() == pytest.approx(1, rel=1e-5)
    energies = expected.square()
    assert fit.lowest(wanted, 5) == pytest.approx((energies[5:].sum() / energies.sum()).item(), abs=1e-4)


@pytest.mark.parametrize("kind", [*fit.KINDS, fit.LORA])
def test_what_is_fitted_is_told(kind):
    """Never more than there is, and never better than the numbers that are trained allow; more steps leave less."""
    wanted = fit.target("1 / i", 32, 0)
    few, numbers = fit.fit(kind, wanted, 8, 2, 0)
    many, same = fit.fit(kind, wanted, 8, 200, 0)
    assert numbers == same and 0 < many < few and many < 1
    if kind == fit.LORA:
        assert many >= fit.lowest(wanted, numbers // 64) - 1e-5
    else:
        assert numbers == 4 * (8 + 32)


def test_the_script_records_and_draws(tmp_path, capsys):
    arguments = ["--quick", "--dim", "16", "--rank", "4", "--steps", "5", "--results", str(tmp_path)]
    assert fit.main(arguments) == 0
    (path,) = tmp_path.glob("*/fit.csv")
    rows = fit.records.read(path)
    assert {row["provider"] for row in rows} == {*fit.KINDS, fit.LORA}
    assert {row["spectrum"] for row in rows} == set(fit.SPECTRA) and all(float(row["energy_left"]) > 0 for row in rows)
    assert list(path.parent.glob("fit-*.png"))
    assert "hadamard" in capsys.readouterr().out
