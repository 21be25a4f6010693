"""The ceilings that benches are read against: of this order of magnitude, of the level in force, errors by name."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("native_cpu")


def test_peak_of_every_level(cpu_level: str) -> None:
    from fastedit import _cpu

    single, double = _cpu.peak("fma_f32", 0.01), _cpu.peak("fma_f64", 0.01)
    assert 1e9 < double < single < 1e12
    if cpu_level == "amx":
        assert single < _cpu.peak("amx_bf16", 0.01) < 1e14
    else:
        with pytest.raises(ValueError, match=f"kind 'amx_bf16' needs the level amx.* has {cpu_level}"):
            _cpu.peak("amx_bf16", 0.01)


def test_bandwidth() -> None:
    from fastedit import _cpu

    assert 1e8 < _cpu.bandwidth() < 1e13


def test_bad_input_names_the_argument() -> None:
    from fastedit import _cpu

    with pytest.raises(ValueError, match="kind must be 'amx_bf16', 'fma_f32' or 'fma_f64', got 'fma'"):
        _cpu.peak("fma", 0.01)
    with pytest.raises(ValueError, match="seconds must be positive"):
        _cpu.peak("fma_f32", 0.0)
