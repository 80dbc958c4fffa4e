"""A teacher whose workspace does not hold what the run has reached trains again up to there.

That happens to a hot spare that takes over, to a node whose disk was lost, and to one that missed rounds. Training is a function of split,
features, configuration and seed, so what comes out is the same teacher: bit for bit on CPUs of one kind with as many threads, and to
rounding that training carries on elsewhere: on other machines, and on any GPU, where sums are added in no fixed order.
"""

from __future__ import annotations

from ckd_fed.errors import ReplyError
from ckd_fed.evaluation.metrics import METRIC
from ckd_fed.training.fit import Fit
from ckd_fed.wire import Request
from clients.node import Node

TOLERANCE = 0.01  # of Recall@20, between the teacher that was lost and the one trained again where rounding differs


def catch_up(request: Request, node: Node, model: Fit, epoch: int) -> Fit:
    """A role's model at exactly an epoch: as it is, trained on, or trained from the start where it is beyond.

    What is reached is saved every few validations, so that a try that is cut short is not lost.

    Raises:
        ReplyError: training stops before that epoch here, so this node's data or code are not those of the teacher that was lost.
    """
    run, role = request.stamp.run, request.stamp.role
    if model.epoch > epoch:
        model = node.fresh(role)
    while model.epoch < epoch:
        before = model.epoch
        model.advance(min(request.config.teacher_round, epoch - model.epoch))
        if model.epoch == before:
            raise ReplyError(f"{role} stops by itself at epoch {before} on this node, the run has it at epoch {epoch}; its features differ")
        node.save(run, role, model)
    return model


def best_of(request: Request, node: Node) -> Fit:
    """A role's model with its best parameters in place.

    Raises:
        ReplyError: trained again, it is another model than the one the run knows.
    """
    run, role = request.stamp.run, request.stamp.role
    epoch, value = int(request.values["best-epoch"]), float(request.values["best"])
    model, state = node.fit(run, role, exact=False)
    if not model.best or model.stopping.best_epoch != epoch:
        model = catch_up(request, node, node.fit(run, role)[0], epoch)
        state = {}
        if model.stopping.best_epoch != epoch:  # other rounding moved the best by a few validations
            model.best = model.trainer.snapshot()
            model.stopping.best_epoch = epoch
            node.save(run, role, model)
    if abs(model.stopping.best - value) > TOLERANCE:
        raise ReplyError(
            f"{role} has a validation {METRIC} of {model.stopping.best:.4f} on this node, the run knows it with {value:.4f}; its features differ"
        )
    model.trainer.restore(model.best)
    node.keep(run, role, model, state)
    return model
