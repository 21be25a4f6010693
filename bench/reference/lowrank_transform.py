"""The editor networks of MEND and MALMEN, module by module, as the published programs run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reference.row_moments import welford_
from torch import Tensor

__all__ = ["Layer", "Statistics", "malmen_blocks", "mend_module", "mend_network"]


@dataclass
class Layer:
    """V [r, d], U [d, r], bias [d]; scale, shift [L, d], a row for each module of the group."""

    V: Tensor
    U: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor


@dataclass
class Statistics:
    """Running mean and summed squares of the inputs u and of the gradients v, and how many rows made them."""

    count: int
    u_mean: Tensor
    u_s: Tensor
    v_mean: Tensor
    v_s: Tensor


def mend_network(z: Tensor, layers: Sequence[Layer], module: int) -> Tensor:
    """z' = clamp(s (U V z + b) + h, 0) + z, layer after layer, on the rows [n, d] of one module."""
    for layer in layers:
        pre = (layer.U @ (layer.V @ z.T)).T
        pre = pre + layer.bias
        pre = layer.scale[module] * pre + layer.shift[module]
        z = pre.clamp(min=0) + z
    return z


def malmen_blocks(z: Tensor, layers: Sequence[Layer], module: int) -> Tensor:
    """z' = z + s clamp(z A B + b, 0) + h, with A = V^T and B = U^T."""
    for layer in layers:
        z = (
            z
            + layer.scale[module] * (z @ layer.V.T @ layer.U.T + layer.bias).clamp(min=0)
            + layer.shift[module]
        )
    return z


def mend_module(
    u: Tensor, v: Tensor, statistics: Statistics, layers: Sequence[Layer], module: int, *, training: bool
) -> tuple[Tensor, Tensor]:
    """The whole transform of one module: when training its rows enter the statistics one by one; then normalise,
    concatenate, network, split."""
    u, v = u.to(layers[0].V.dtype), v.to(layers[0].V.dtype)
    s = statistics
    if training:
        count = welford_(s.count, s.u_mean, s.u_s, u)
        welford_(s.count, s.v_mean, s.v_s, v)
        s.count = count
    u_std, v_std = (s.u_s / (s.count - 1)) ** 0.5, (s.v_s / (s.count - 1)) ** 0.5
    z = torch.cat([(u - s.u_mean) / (u_std + 1e-7), (v - s.v_mean) / (v_std + 1e-7)], -1)
    z = mend_network(z, layers, module)
    return z[:, : u.shape[1]], z[:, u.shape[1] :]
