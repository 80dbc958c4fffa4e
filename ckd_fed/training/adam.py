"""Adam on a backbone's named parameters, in one pass over memory; of large tables over the rows that are read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from ckd_fed.training.drift import BETAS, EPS, FROM_STEP, Drift

_KEYS = ("step", "exp_avg", "exp_avg_sq")


class Adam:
    """Adam (Kingma, Ba, ICLR 2015, arXiv:1412.6980) with torch's fused kernel: bit by bit what ``torch.optim.Adam(fused=True)`` gives.

    torch's own class imports its compiler when it is made, which takes seconds and 70 MB; in a deployment every message has a fresh process.

    Of a table with a sparse gradient only the rows that have one are moved. The others are as many steps behind until they are read
    (:meth:`catch_up`) or all are wanted (:meth:`settle`), and are then moved by all those steps at once, see :mod:`ckd_fed.training.drift`: the
    same result up to rounding, for the work of a batch's rows and not of a table's.

    Args:
        module: whose parameters are trained. One that a step leaves without a gradient stays as it is.
        learning_rate: of every step.
        row_tables: names of parameters of which whoever trains reads no row without :meth:`catch_up`; sparse gradients of others are made dense.
    """

    def __init__(self, module: nn.Module, learning_rate: float, row_tables: Collection[str] = ()) -> None:
        self.learning_rate = learning_rate
        self._parameters = dict(module.named_parameters())
        self._row_tables = frozenset(row_tables)
        self._state: dict[str, dict[str, Tensor]] = {}
        self._behind: dict[str, _Behind] = {}

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
        given = {name: p for name, p in self._parameters.items() if p.grad is not None}
        whole: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        for name, parameter in given.items():
            if name not in self._state:
                zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                count = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self._state[name] = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
            gradient, state = parameter.grad, self._state[name]
            assert gradient is not None
            if gradient.is_sparse and name in self._row_tables and float(state["step"]) >= FROM_STEP:
                self._step_of_rows(name, parameter, gradient.coalesce(), state)
                continue
            self._settle(name)
            whole.append((parameter, gradient.to_dense() if gradient.is_sparse else gradient, state))
        self._update(whole)

    def _update(self, given: Sequence[tuple[Tensor, Tensor, dict[str, Tensor]]]) -> None:
        adam(
            [parameter for parameter, _, _ in given],
            [gradient for _, gradient, _ in given],
            [state["exp_avg"] for _, _, state in given],
            [state["exp_avg_sq"] for _, _, state in given],
            [],
            [state["step"] for _, _, state in given],
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=EPS,
            maximize=False,
        )

    def _step_of_rows(self, name: str, parameter: Tensor, gradient: Tensor, state: dict[str, Tensor]) -> None:
        if name not in self._behind:
            self._behind[name] = _Behind(self.learning_rate, int(state["step"]), len(parameter))
        behind, rows = self._behind[name], gradient.indices()[0]
        if not (behind.last[rows] == behind.drift.step).all():
            raise RuntimeError(f"rows of {name} were read while behind; call catch_up with them before a step reads them")
        tables = (parameter, state["exp_avg"], state["exp_avg_sq"])
        read = [table.index_select(0, rows) for table in tables]
        self._update([(read[0], gradient.values(), {"step": state["step"], "exp_avg": read[1], "exp_avg_sq": read[2]})])
        for table, new in zip(tables, read, strict=True):
            table.index_copy_(0, rows, new)
        behind.drift.advance()
        behind.last[rows] = behind.drift.step

    @torch.no_grad()
    def catch_up(self, read: Mapping[str, Tensor]) -> None:
        """Bring up to date the rows that the next step reads.

        Args:
            read: name of a table -> row numbers ``(n,)``, which may repeat. Tables that are not behind are passed over.
        """
        for name, index in read.items():
            if name not in self._behind:
                continue
            behind, rows = self._behind[name], index.unique()
            tables = (self._parameters[name], self._state[name]["exp_avg"], self._state[name]["exp_avg_sq"])
            current = [table.index_select(0, rows) for table in tables]
            behind.drift.apply(current[0], current[1], current[2], behind.last[rows])
            for table, new in zip(tables, current, strict=True):
                table.index_copy_(0, rows, new)
            behind.last[rows] = behind.drift.step

    def settle(self) -> None:
        """Bring all rows of all tables up to date. Parameters are those of the last step after it, until the next."""
        for name in list(self._behind):
            self._settle(name)

    @torch.no_grad()
    def _settle(self, name: str) -> None:
        behind = self._behind.pop(name, None)
        if behind is None:
            return
        tables = (self._parameters[name], self._state[name]["exp_avg"], self._state[name]["exp_avg_sq"])
        behind.drift.apply(tables[0], tables[1], tables[2], behind.last)

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


class _Behind:
    """A table of which rows may be behind: the step after which each is as it stands, ``(n,)``, and how to move it on."""

    def __init__(self, learning_rate: float, step: int, n_rows: int) -> None:
        self.drift = Drift(learning_rate, step)
        self.last = torch.full((n_rows,), step, dtype=torch.int64)
