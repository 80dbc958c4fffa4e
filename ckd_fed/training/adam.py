"""Adam on a backbone's named parameters, in one pass over memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

_KEYS = ("step", "exp_avg", "exp_avg_sq")


class Adam:
    """Adam (Kingma, Ba, ICLR 2015, arXiv:1412.6980) with torch's fused kernel: bit by bit what ``torch.optim.Adam(fused=True)`` gives.

    torch's own class imports its compiler when it is made, which takes seconds and 70 MB; in a deployment every message has a fresh process.

    Args:
        module: whose parameters are trained. One that a step leaves without a gradient stays as it is.
        learning_rate: of every step.
    """

    def __init__(self, module: nn.Module, learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self._parameters = dict(module.named_parameters())
        self._state: dict[str, dict[str, Tensor]] = {}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        given = {name: p for name, p in self._parameters.items() if p.grad is not None}
        for name, parameter in given.items():
            if name not in self._state:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                count = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self._state[name] = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        state = [self._state[name] for name in given]
        adam(
            list(given.values()),
            [p.grad for p in given.values() if p.grad is not None],
            [s["exp_avg"] for s in state],
            [s["exp_avg_sq"] for s in state],
            [],
            [s["step"] for s in state],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def state(self) -> dict[str, Tensor]:
        """A copy on the CPU: ``<parameter>/exp_avg``, ``/exp_avg_sq`` and ``/step``. Empty before the first step."""
        return {f"{name}/{key}": self._state[name][key].to("cpu", copy=True) for name in self._parameters if name in self._state for key in _KEYS}

    def load_state(self, named: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state` gave.

        Raises:
            KeyError: a parameter's state lacks a part.
            ValueError: it is of another model, in which the parameter has another shape.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._parameters.items():
            if f"{name}/step" not in named:
                continue
            moments = {key: named[f"{name}/{key}"].to(parameter, copy=True) for key in ("exp_avg", "exp_avg_sq")}
            for key, moment in moments.items():
                if moment.shape != parameter.shape:
                    raise ValueError(f"{name}/{key} has shape {tuple(moment.shape)}, the parameter has {tuple(parameter.shape)}")
            found[name] = {"step": named[f"{name}/step"].to(parameter.device, torch.float32, copy=True), **moments}
        self._state = found
