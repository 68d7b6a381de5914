"""Muon (arXiv 2502.16982), fast on a CPU too: torch's own, but for how a step is worked out.

Shapes: K matrices of one shape, R rows, C columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Muon(torch.optim.Muon):
    """Step matrices along the nearest orthogonal matrix, scaled so that an entry moves as far as with AdamW.

    Options and state are those of `torch.optim.Muon`. Two things differ. Matrices of one shape are made orthogonal
    together. And on a CPU that is worked out in float32: torch takes bfloat16 everywhere, which a CPU without
    instructions for it works out many times more slowly.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody here gives a closure
        """Take one step."""
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for one in group["params"]:
                if one.grad is not None:
                    alike[one.shape, one.device].append(one)
            for matrices in alike.values():
                self._step_together(matrices, group)

    def _step_together(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """Take the step of matrices of one shape."""
        gradients = [one.grad for one in matrices if one.grad is not None]
        momenta = [self._momentum(one) for one in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        directions_KRC = orthogonalised(
            torch.stack(list(ahead)), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        # As far as AdamW would: the root mean square of its steps is about 0.2 of the rate (section 2.2 of the paper).
        rate = group["lr"] * 0.2 * max(matrices[0].shape) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(directions_KRC.unbind()), alpha=-rate)

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]  # type: ignore[no-any-return]


def orthogonalised(
    matrices_KRC: Tensor, coefficients: tuple[float, float, float], iterations: int, least_norm: float
) -> Tensor:
    """Return matrices of the same singular vectors whose singular values are near 1 (0.7 to 1.2): ``[K, R, C]``.

    Newton-Schulz iterations with Muon's polynomial ``a x + b x^3 + c x^5``; bfloat16 on a GPU, else float32.
    """
    a, b, c = coefficients
    tall = matrices_KRC.shape[1] > matrices_KRC.shape[2]
    x = matrices_KRC.bfloat16() if matrices_KRC.is_cuda else matrices_KRC
    x = x.mT if tall else x  # the products are then those of the short side
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(least_norm)  # singular values of at most 1
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices_KRC.dtype)
