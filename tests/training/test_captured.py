"""Steps that are recorded and replayed: what makes that possible, and that nothing but time changes by it."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ckd_fed.backbones import BACKBONES
from ckd_fed.backbones.item_graph import Neighbours
from ckd_fed.config import resolve
from ckd_fed.training.batches import batches
from ckd_fed.training.build import build_trainer
from ckd_fed.training.captured import EAGER

B, K = 16, 40
STATIC = sorted(set(BACKBONES) - {"bm3"})  # BM3 draws in every step, on the CPU
CONFIG = {
    "training.batch-size": B, "distillation.batch-size": K, "training.learning-rate": 0.01, "training.threads": 1, "training.device": "cpu",
    "training.cuda-graphs": True, "distillation.rho": 1.0, "model.embedding-dim": 4,
}  # fmt: skip


@pytest.fixture
def dataset(make_dataset):
    return make_dataset(n_users=40, n_items=60, n_modalities=3)


@pytest.fixture
def build(dataset):
    """A student's trainer; with ``lacking``, of data in which a third of the items have no text."""

    def make(backbone, *, distilled=True, lacking=False, device="cpu", **more):
        shares = {"data.missing": "text:0.33"} if lacking else {}
        config = resolve({**CONFIG, **shares, "backbone": backbone, **more}, {})
        return build_trainer(config, dataset, "student", distilled=distilled, device=torch.device(device))

    return make


def sheets_of(trainer, n):
    """Made-up margins of n steps' teachers; None where nobody teaches."""
    rng = np.random.default_rng(0)
    if trainer.objective is None:
        return None
    return {m: rng.normal(size=(n, B + K)).astype(np.float32) for m in trainer.dataset.modalities}


class Operations(TorchDispatchMode):
    """Which operations of torch are called, and which of them touch memory of the CPU.

    On the meta device, which has shapes and no numbers, whatever depends on numbers fails. It has no products with sparse matrices, so these are
    answered here.
    """

    def __init__(self):
        super().__init__()
        self.called, self.on_cpu = [], []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = operation.overloadpacket.__name__
        if not any(x.layout == torch.sparse_csr for x in tensors):
            result = operation(*args, **kwargs)
        elif name == "sparse_sampled_addmm":
            result = args[0]
        elif name in ("addmm", "mm"):
            *_, matrix, dense = [x for x in args if isinstance(x, torch.Tensor)]
            result = kwargs.get("out", dense.new_empty((matrix.shape[0], dense.shape[1])))
        else:
            result = operation(*args, **kwargs)
        touched = [*tensors, *(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))]
        self.called.append((str(operation), tuple(tuple(x.shape) for x in tensors)))
        if any(x.device.type == "cpu" for x in touched):
            self.on_cpu.append(str(operation))
        return result


def some_neighbours(features, k, present=None):
    return Neighbours(torch.zeros(len(features), k, dtype=torch.long, device=features.device), features[:, :1].expand(-1, k))


def operations_of_steps(trainer, n):
    """Those of each of an epoch's first n steps."""
    triples = trainer.stream.epoch(0)[:n]
    trainer.backbone.train()
    trainer.backbone.start_epoch(0, torch.Generator().manual_seed(0))
    found = []
    for packed in batches(triples, sheets_of(trainer, n), trainer.dataset.masks, trainer.device, torch.float32):
        with Operations() as operations:
            trainer.step(packed)
        found.append(operations)
    return found


@pytest.mark.parametrize("lacking", [False, True], ids=["all have text", "some lack text"])
@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "plain"])
@pytest.mark.parametrize("backbone", STATIC)
def test_after_the_first_steps_a_device_needs_nothing_of_the_host(build, monkeypatch, backbone, distilled, lacking):
    """On another device than a CPU: no numbers are read, no shape depends on one, and nothing is uploaded."""
    if backbone in ("lattice", "micro"):  # an epoch's first step searches, and waits for what it finds
        monkeypatch.setattr(f"ckd_fed.backbones.{backbone}.nearest", some_neighbours)
    options = {"model.edge-dropout": 0.0} if backbone == "freedom" else {}  # which is drawn between the steps, from real edges
    trainer = build(backbone, distilled=distilled, lacking=lacking, device="meta", **options)
    if not trainer.backbone.static_steps:
        assert (backbone, lacking) == ("freedom", True)
        return
    steps = operations_of_steps(trainer, EAGER + 3)
    recorded, *replayed = steps[EAGER:]
    assert len(recorded.called) > 80
    assert recorded.on_cpu == []
    for step in replayed:
        assert step.called == recorded.called


def test_what_draws_in_a_step_says_so(build):
    trainer = build("bm3", device="meta")
    assert not trainer.backbone.static_steps
    assert all(step.on_cpu for step in operations_of_steps(trainer, EAGER + 1))


class Again:
    """A recorder for the CPU, whose replay does the same work on the same memory again."""

    def __init__(self):
        self.ran, self.recorded, self.replayed = 0, 0, 0

    def run(self, work):
        self.ran += 1
        return work()

    def record(self, work):
        self.recorded += 1
        there = None

        def replay():
            nonlocal there
            self.replayed += 1
            numbers = work()
            if there is None:
                there = numbers
            else:  # as a graph, which writes where it wrote before
                there.values.copy_(numbers.values)
                if there.weights is not None:
                    there.weights.copy_(numbers.weights)
            return there

        return replay


@pytest.mark.parametrize("lacking", [False, True], ids=["all have text", "some lack text"])
@pytest.mark.parametrize("distilled", [True, False], ids=["distilled", "plain"])
@pytest.mark.parametrize("backbone", STATIC)
def test_replayed_epochs_are_the_same_epochs(build, backbone, distilled, lacking):
    ours, theirs = (build(backbone, distilled=distilled, lacking=lacking) for _ in range(2))
    recorder = theirs._recorder = Again()
    n = len(ours.stream.epoch(0))
    assert n > EAGER + 2
    for epoch in range(2):
        sheets = sheets_of(ours, n)
        assert theirs.train_epoch(epoch, sheets) == ours.train_epoch(epoch, sheets)
    assert (recorder.ran, recorder.recorded, recorder.replayed) == (2 * EAGER, 2, 2 * (n - EAGER))
    moved = ours.snapshot()
    for name, parameter in theirs.snapshot().items():
        assert torch.equal(parameter, moved[name]), name


def test_an_epoch_of_few_steps_records_nothing(build):
    trainer = build("vbpr", distilled=False)
    recorder = trainer._recorder = Again()
    trainer.train_epoch(0, None, trainer.stream.epoch(0)[:EAGER])
    assert (recorder.ran, recorder.recorded) == (EAGER, 0)


def test_a_cpu_records_nothing(build):
    assert not build("vbpr").records_steps


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_a_gpu_replays_and_never_waits(build, backbone):
    plain, recorded = (build(backbone, device="cuda", **{"training.cuda-graphs": graphs}) for graphs in (False, True))
    assert not plain.records_steps
    assert recorded.records_steps == recorded.backbone.static_steps
    sheets = sheets_of(plain, len(plain.stream.epoch(0)))
    for epoch in range(2):
        ours, theirs = plain.train_epoch(epoch, sheets), recorded.train_epoch(epoch, sheets)
        assert theirs == pytest.approx(ours, rel=1e-3, abs=1e-5)
    packed = next(batches(plain.stream.epoch(0), sheets, plain.dataset.masks, plain.device, torch.float32))
    if plain.backbone.static_steps:
        torch.cuda.set_sync_debug_mode("error")
        try:
            plain.step(packed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
