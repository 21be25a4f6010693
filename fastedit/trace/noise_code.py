"""The published code's short names of noise rules, as a command line takes them."""

from __future__ import annotations

from typing import Any

__all__ = ["noise_fields"]

_RULE = (
    "be s or sN (N standard deviations of the subjects' embeddings), a number (that scale itself), uN (uniform up to "
    "N), m (Gaussian with the mean and covariance of a corpus) or tN (the same with Student's t, N > 2 degrees)"
)


def noise_fields(code: str, *, name: str = "noise") -> dict[str, Any]:
    """Fields of `fastedit.trace.Noise` for a short name: ``s3``, ``0.1``, ``u0.2``, ``m``, ``t4``.

    Raises ValueError naming ``name`` for another text; whether a number is in range is for `Noise` to say.

        >>> noise_fields("u0.2")
        {'distribution': 'uniform', 'scale': 0.2}
    """
    code = code.strip()
    if code == "m":
        return {"distribution": "multivariate"}
    try:
        if code.startswith("s"):
            return {"sigmas": float(code[1:]) if len(code) > 1 else 1.0}
        if code.startswith("t"):
            return {"distribution": "student", "degrees": float(code[1:])}
        if code.startswith("u"):
            return {"distribution": "uniform", "scale": float(code[1:])}
        return {"scale": float(code)}
    except ValueError:
        raise ValueError(f"{name} must {_RULE}, got {code!r}") from None
