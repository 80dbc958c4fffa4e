"""The training loop of teachers and students."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from ckd_fed.backbones.base import Backbone, Embeddings, Triples, View
from ckd_fed.backbones.inverted import distinct
from ckd_fed.data.dataset import Dataset
from ckd_fed.data.interactions import Interactions
from ckd_fed.data.triples import StepTriples, TripleStream, derive_key
from ckd_fed.distillation.objective import DistillationObjective, ObjectiveOutput
from ckd_fed.errors import TooLittleMemoryError, TrainingError
from ckd_fed.evaluation.calibration import Calibration, calibrate, calibration_views, combine, view_name
from ckd_fed.evaluation.metrics import METRIC, RankingMetrics
from ckd_fed.evaluation.per_user import rank_users
from ckd_fed.evaluation.ranking import evaluate
from ckd_fed.evaluation.tested import Tested, UserTest, add_warm_and_cold, user_test
from ckd_fed.training.adam import Adam
from ckd_fed.training.allocator import give_back_freed_memory
from ckd_fed.training.balancing import Balancing
from ckd_fed.training.batches import Packed, batches
from ckd_fed.training.captured import Captured, CudaRecorder, Recorder
from ckd_fed.training.means import Means, Numbers, Values


class Trainer:
    """Trains one backbone step by step with Adam, and validates it.

    Without sheets of margins the backbone's own loss is minimised (a teacher or a plain student); with them the distillation
    objective is.

    Args:
        backbone: what is trained; lives on its device already.
        dataset: interactions for sampling and validation.
        stream: the triples; K = 0 for a teacher or plain student.
        learning_rate: of Adam.
        epoch_rate: of the parameters that have one gradient an epoch (``Backbone.epoch_parameters``); by default the same.
        objective: of a distilled student; None trains on the backbone's own loss.
        ks: cut-offs of the metrics.
        share: (w, W): this worker's share of every epoch's steps.
        balancing: of a plain student; None for none.
        validation_users: for how many users at most a validation ranks, drawn by the run's seed and the data; 0 for all.
        threads: that torch works with whenever this trainer does, which may be others in another trainer of the same process; 0 for as
            many as it finds.
        cuda_graphs: whether steps are recorded and replayed, see :mod:`ckd_fed.training.captured`; has no effect on a CPU, for a backbone whose
            steps are not the same every time, and with a balancing that draws or looks at gradients.

    Attributes:
        validation: the held-out interactions that a validation goes by.
    """

    def __init__(
        self,
        backbone: Backbone,
        dataset: Dataset,
        stream: TripleStream,
        *,
        learning_rate: float,
        epoch_rate: float | None = None,
        objective: DistillationObjective | None = None,
        ks: Sequence[int] = (10, 20),
        share: tuple[int, int] = (0, 1),
        balancing: Balancing | None = None,
        validation_users: int = 0,
        threads: int = 0,
        cuda_graphs: bool = False,
    ) -> None:
        self.backbone = backbone
        self.dataset = dataset
        self.stream = stream
        self.objective = objective
        self.ks = tuple(ks)
        self.share = share
        rates = dict.fromkeys(backbone.epoch_parameters, learning_rate if epoch_rate is None else epoch_rate)
        self.optimizer = Adam(backbone, learning_rate, backbone.row_tables, rates)
        self.balancing = balancing or Balancing()
        drawn_by = derive_key("ckd-validation-1", stream.seed, dataset.fingerprint) & 0x7FFFFFFFFFFFFFFF
        self.validation = dataset.val.of_sampled_users(validation_users, drawn_by)
        self.threads = threads
        static = backbone.static_steps and self.balancing.static_steps
        self._recorder: Recorder | None = CudaRecorder(self.device) if cuda_graphs and static and self.device.type == "cuda" else None
        self._take_threads()

    def _take_threads(self) -> None:
        if self.threads:
            torch.set_num_threads(self.threads)

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def records_steps(self) -> bool:
        """Whether steps are recorded and replayed."""
        return self._recorder is not None

    def train_epoch(
        self,
        epoch: int,
        sheets: Mapping[str, np.ndarray] | None = None,
        steps: Sequence[StepTriples] | None = None,
        into: Means | None = None,
    ) -> Values:
        """Train one epoch (this worker's share of its steps).

        Args:
            epoch: counts from 0; decides the triples.
            sheets: modality -> margins of this epoch's steps, ``(steps, B + K)``; needed exactly if there is an objective.
            steps: the epoch's triples where the caller has them already.
            into: means over several epochs, to which this one's steps are added.

        Returns:
            Means over the steps: ``loss/total`` and its terms; with distillation, per modality m ``effect/m``, ``weight/m``,
            ``specific/m`` and ``generic/m``, over the samples that its teacher was asked about (the least effect and weight 0 where that
            is none); without effects and weights where scores do not depend on features.

        Raises:
            TrainingError: a loss is not finite, or a step takes more memory than there is.
        """
        if (self.objective is None) != (sheets is None):
            raise ValueError("sheets of margins are needed exactly if there is a distillation objective")
        self._take_threads()
        like = next(self.backbone.parameters())
        means = Means()
        self.backbone.train()
        self.backbone.start_epoch(epoch, self._generator(epoch))
        self.balancing.start_epoch(self._generator(epoch, "ckd-balancing-1"))
        at_once = nullcontext() if self.balancing.reads_gradients else self.optimizer.in_backward()
        step = self.step if self._recorder is None else Captured(self.step, self._recorder)
        try:
            drawn = self.stream.steps(epoch, self.share) if steps is None else steps
            with at_once:
                for packed in batches(drawn, sheets, self.dataset.masks, like.device, like.dtype):
                    means.update(step(packed))
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            sizes = {"training.batch-size": self.stream.batch_size, "distillation.batch-size": self.stream.kd_batch_size}
            lower = " or ".join(f"{key}={size}" for key, size in sizes.items() if size)
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise TooLittleMemoryError(f"there is not enough memory for a step: {reason}; lower {lower}") from error
        finally:
            self.optimizer.settle()
            self.optimizer.zero_grad()
        values = means.compute()
        _check_finite(values, epoch)
        if into is not None:
            into.merge(means)
        return values

    def step(self, packed: Packed) -> Numbers:
        """One step of the optimiser within an epoch, and its numbers."""
        ranking, distillation, margins = packed.batch()
        self._catch_up(ranking, distillation)
        if self.objective is None or distillation is None:
            output = self.balancing.loss(self.backbone, ranking)
        else:
            output = self.objective(self.backbone, ranking, distillation, margins)
        output.loss.backward()
        self.balancing.step(self.backbone, self.optimizer)
        self.optimizer.zero_grad()  # at once: the next step's forward pass has their memory
        return _numbers(output, counterfactual=self.backbone.scores_use_features)

    def _catch_up(self, ranking: Triples, distillation: Triples | None) -> None:
        """Bring the rows that a step reads up to date, in tables that the optimiser moves row by row."""
        if not self.optimizer.behind:
            return
        batches = [ranking] if distillation is None else [ranking, distillation]
        users, items = [b.users for b in batches], [part for b in batches for part in (b.first, b.second)]
        rows = {"users": distinct(torch.cat(users)), "items": distinct(torch.cat(items))}
        self.optimizer.catch_up({name: rows[of] for name, of in self.backbone.row_tables.items()})

    def _generator(self, epoch: int, purpose: str = "ckd-epoch-1") -> torch.Generator:
        """The epoch's own randomness: the same for all workers and after a resume."""
        return torch.Generator().manual_seed(derive_key(purpose, self.stream.seed, epoch) & 0x7FFFFFFFFFFFFFFF)

    def rank(self, held_out: Interactions, view: View | None = None, share: tuple[int, int] = (0, 1)) -> RankingMetrics:
        """Ranking metrics of one view, by default the joint one, over a share of the users."""
        view = self.backbone.joint if view is None else view
        return evaluate(self.embeddings([view])[view], self.dataset.train, held_out, self.ks, share)

    def diagnose(self, held_out: Interactions, share: tuple[int, int] = (0, 1)) -> RankingMetrics:
        """Joint metrics by their name, and each modality's ``only m`` metrics as ``only/m/<metric>``; one pass for all views, where views
        share work.

        A backbone whose scores do not depend on features has no ``only m`` metrics: they would be the joint ones.
        """
        return self._rank_views(lambda joint: evaluate(joint, self.dataset.train, held_out, self.ks, share), held_out, share)

    def _rank_views(self, rank_joint: Callable[[Embeddings], RankingMetrics], held_out: Interactions, share: tuple[int, int]) -> RankingMetrics:
        """As :meth:`diagnose`, with another way to the metrics of the joint view's tables."""
        only = self.backbone.diagnosed
        together = {} if self.backbone.views_are_cheap else self.embeddings([self.backbone.joint, *only.values()])

        def tables(view: View) -> Embeddings:
            return together[view] if together else self.embeddings([view])[view]

        metrics = rank_joint(tables(self.backbone.joint))
        for modality, view in only.items():
            metrics.add(f"only/{modality}/", evaluate(tables(view), self.dataset.train, held_out, self.ks, share))
        return metrics

    def read_out(self, held_out: Interactions, share: tuple[int, int] = (0, 1)) -> tuple[RankingMetrics, Values]:
        """As :meth:`diagnose`, and ranked by the calibrated sum of the views as ``calibrated/<metric>``.

        The fit goes by likelihood. Where the ranking that it gives has a lower Recall@20 on validation than the best single view, that
        view is ranked by instead, so that calibration never chooses what validation speaks against.

        Returns:
            The metrics; and what was chosen on validation: ``readout/weight/<view>``, the fitted weights of the views (``joint``,
            ``only m``), and ``readout/val/<view>``, the validation Recall@20 of each and of ``calibrated``.
        """
        metrics = self.diagnose(held_out, share)
        return metrics, self._add_calibrated(metrics, held_out, share)

    def _add_calibrated(self, metrics: RankingMetrics, held_out: Interactions, share: tuple[int, int]) -> Values:
        backbone, train, val = self.backbone, self.dataset.train, self.validation
        tables = self.embeddings(calibration_views(backbone))
        fit = calibrate(tables, train, val)
        recalls = {view: evaluate(table, train, val, self.ks).compute().get(METRIC, 0.0) for view, table in tables.items()}
        best = max(recalls, key=recalls.__getitem__)
        calibrated = combine(tables, fit.weights)
        reached = evaluate(calibrated, train, val, self.ks).compute().get(METRIC, 0.0)
        if reached < recalls[best]:
            fit, calibrated, reached = Calibration({best: 1.0}, fit.log_likelihood), tables[best], recalls[best]
        metrics.add("calibrated/", evaluate(calibrated, train, held_out, self.ks, share))
        chosen = {f"readout/weight/{name}": weight for name, weight in fit.named(backbone).items()}
        chosen.update({f"readout/val/{view_name(backbone, view)}": recall for view, recall in recalls.items()})
        return {**chosen, "readout/val/calibrated": reached}

    def test(self, model: str, share: tuple[int, int] = (0, 1), *, calibrated: bool = False) -> Tested:
        """The test that a run ends with. Every view is ranked once.

        Args:
            model: its name in the groups' rows.
            share: (w, W): which of the users.
            calibrated: also read it out, see :meth:`read_out`, unless it is a teacher, which has one modality and one view.
        """
        train, test = self.dataset.train, self.dataset.test
        by_user: list[UserTest] = []

        def rank_joint(joint: Embeddings) -> RankingMetrics:
            rankings = rank_users(joint, train, test, max(self.ks), share)
            by_user.append(user_test(model, rankings, train, test, self.ks))
            metrics = rankings.means(self.ks)
            add_warm_and_cold(metrics, joint, train, test, share)
            return metrics

        metrics = self._rank_views(rank_joint, test, share)
        chosen = self._add_calibrated(metrics, test, share) if calibrated and len(self.backbone.modalities) > 1 else {}
        return Tested(metrics, chosen, by_user[0])

    def embeddings(self, views: Sequence[View]) -> dict[View, Embeddings]:
        """Detached tables of some views, for ranking."""
        self._take_threads()
        self.backbone.eval()
        give_back_freed_memory()
        return self.backbone.ranking_embeddings(views)

    def joint_tables(self) -> Embeddings:
        """A teacher's detached joint tables, from which its margins are taken."""
        return self.embeddings([self.backbone.joint])[self.backbone.joint]

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all parameters, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.backbone.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters saved by :meth:`snapshot`."""
        self.backbone.load_state_dict(dict(state))


def _of_memory(error: Exception) -> bool:
    """Whether an error is that of an allocation, which torch's CPU allocator tells by its text alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _check_finite(values: Values, epoch: int) -> None:
    """Raises :class:`TrainingError` for a mean that is not finite: a part of the loss rather than their total."""
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if wrong:
        name = next((one for one in wrong if one != "loss/total"), wrong[0])
        remedy = "lower training.learning-rate or check the features' scale"
        if all(one in ("loss/total", "loss/kd") or one.startswith(("generic/", "specific/")) for one in wrong):
            remedy += ", or lower distillation.rho or raise distillation.temperature"
        raise TrainingError(f"{name} became {values[name]} in epoch {epoch + 1}; {remedy}")


def _numbers(output: ObjectiveOutput, *, counterfactual: bool) -> Numbers:
    """A step's numbers with their names and weights; effects and weights of modalities only where they mean anything."""
    names = ["loss/total", *(f"loss/{name}" for name in output.terms)]
    numbers = torch.stack([output.loss, *output.terms.values()]).detach()
    if output.distilled is None:
        return Numbers(names, numbers, None)
    with torch.no_grad():
        more, means, shares = output.distilled.means(counterfactual=counterfactual)
    weights = None if shares is None else torch.cat([torch.ones_like(numbers, dtype=torch.double), shares])
    return Numbers([*names, *more], torch.cat([numbers, means]), weights)
