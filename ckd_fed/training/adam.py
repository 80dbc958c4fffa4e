"""Adam on a backbone's named parameters, in one pass over memory; of large tables over the rows that are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ckd_fed.kernels import kernels
from ckd_fed.training.behind import Behind, behind_of
from ckd_fed.training.drift import BETAS, EPS, FROM_STEP
from ckd_fed.training.fused import Moved, fused_adam

_KEYS = ("step", "exp_avg", "exp_avg_sq")
_LARGE = 1 << 17  # numbers of a parameter that is worth a call of its own: half a megabyte in float32


class Adam:
    """Adam (Kingma, Ba, ICLR 2015, arXiv:1412.6980) with torch's fused kernel: bit by bit what ``torch.optim.Adam(fused=True)`` gives.

    On a CPU large tables are moved by a kernel of our own, which writes the parameters so that no core waits for another, see ``adam.c``. It rounds
    alike where the compiler knows the processor, but for the last few numbers of each thread's part, where torch's has another formula.

    torch's own class imports its compiler when it is made, which takes seconds and 70 MB; in a deployment every message has a fresh process.

    Of a table with a sparse gradient only the rows that have one are moved. The others are as many steps behind until they are read
    (:meth:`catch_up`) or all are wanted (:meth:`settle`), and are then moved by all those steps at once, see :mod:`ckd_fed.training.drift`: the
    same result up to rounding, for the work of a batch's rows and not of a table's.

    Args:
        module: whose parameters are trained. One that a step leaves without a gradient stays as it is.
        learning_rate: of every step.
        row_tables: names of parameters of which whoever trains reads no row without :meth:`catch_up`; sparse gradients of others are made dense.
        rates: learning rates of some parameters of their own, by name; of none of the row tables.

    Raises:
        ValueError: of one of the row tables.
    """

    def __init__(self, module: nn.Module, learning_rate: float, row_tables: Collection[str] = (), rates: Mapping[str, float] | None = None) -> None:
        self.learning_rate = learning_rate
        self._rates = dict(rates or {})
        if both := sorted(set(self._rates) & set(row_tables)):
            raise ValueError(f"{', '.join(both)}: a table that is moved row by row has no learning rate of its own")
        self._parameters = dict(module.named_parameters())
        self._row_tables = frozenset(row_tables)
        self._state: dict[str, dict[str, Tensor]] = {}
        self._behind: dict[str, Behind] = {}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @property
    def behind(self) -> frozenset[str]:
        """Names of the tables of which rows may be behind."""
        return frozenset(self._behind)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient.

        Raises:
            RuntimeError: rows with a gradient were behind when they were read.
        """
        self._step({name: p for name, p in self._parameters.items() if p.grad is not None})

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Within it, on a CPU, a large parameter moves as soon as the backward pass has its gradient, which is then dropped; :meth:`step` moves
        the others.

        The same bits, but a gradient is read while it is in the cache, and never do all lie side by side. Not for whoever looks at gradients
        after the backward pass, or takes several passes to a step.
        """
        large = {name: p for name, p in self._parameters.items() if p.device.type == "cpu" and p.numel() >= _LARGE}
        hooks = [p.register_post_accumulate_grad_hook(partial(self._move_at_once, name)) for name, p in large.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _move_at_once(self, name: str, parameter: Tensor) -> None:
        self._step({name: parameter})
        parameter.grad = None

    def _step(self, given: Mapping[str, Tensor]) -> None:
        whole: dict[float, list[Moved]] = {}  # by learning rate
        for name, parameter in given.items():
            if name not in self._state:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                count = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self._state[name] = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            gradient, state = parameter.grad, self._state[name]
            assert gradient is not None
            if gradient.is_sparse and name in self._row_tables and float(state["step"]) >= FROM_STEP:
                self._step_of_rows(name, parameter, gradient, state)
                continue
            self._settle(name)
            rate = self._rates.get(name, self.learning_rate)
            dense = gradient.to_dense() if gradient.is_sparse else gradient
            whole.setdefault(rate, []).append((parameter, dense, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        for rate, updates in whole.items():
            others = [update for update in updates if not self._compiled(*update, rate)]
            if others:
                fused_adam(others, rate)

    @staticmethod
    def _compiled(parameter: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rate: float) -> bool:
        """Whether the update was one for the compiled kernel, which then made it."""
        compiled, tables = kernels(), (parameter, gradient, exp_avg, exp_avg_sq)
        if (
            compiled is None
            or parameter.numel() < _LARGE
            or not all(table.device.type == "cpu" and table.dtype == torch.float32 and table.is_contiguous() for table in tables)
        ):
            return False
        compiled.adam(parameter, gradient, (exp_avg, exp_avg_sq), float(step.add_(1)), rate, BETAS, EPS)
        torch.autograd.graph.increment_version(parameter)  # so that a backward pass that still needs what it was says so
        return True

    def _step_of_rows(self, name: str, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        if name not in self._behind:
            tables = parameter.detach(), state["exp_avg"], state["exp_avg_sq"]
            self._behind[name] = behind_of(self.learning_rate, int(state["step"]), tables)
        behind = self._behind[name]
        if behind.caught_up(gradient._indices()[0]):
            gradient._coalesced_(True)  # they are ascending and each once, of which autograd keeps no note
        gradient = gradient.coalesce()
        if not behind.take(gradient.indices()[0], gradient.values(), state["step"]):
            raise RuntimeError(f"rows of {name} were read while behind; call catch_up with them before a step reads them")
        torch.autograd.graph.increment_version(parameter)

    @torch.no_grad()
    def catch_up(self, read: Mapping[str, Tensor]) -> None:
        """Bring up to date the rows that the next step reads.

        Args:
            read: name of a table -> row numbers ``(n,)``, ascending and each once. Tables that are not behind are passed over.
        """
        for name, rows in read.items():
            if name in self._behind:
                self._behind[name].catch_up(rows)

    def settle(self) -> None:
        """Bring all rows of all tables up to date. Parameters are those of the last step after it, until the next."""
        for name in list(self._behind):
            self._settle(name)

    @torch.no_grad()
    def _settle(self, name: str) -> None:
        behind = self._behind.pop(name, None)
        if behind is not None:
            behind.settle()

    def state(self) -> dict[str, Tensor]:
        """A copy on the CPU: ``<parameter>/exp_avg``, ``/exp_avg_sq`` and ``/step``. Empty before the first step."""
        self.settle()
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
        self._behind = {}
