"""The ServerApp: ``server.app:app``."""

from __future__ import annotations

import json
import time

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ckd_fed.config import resolve
from ckd_fed.data.locate import standin_notice
from ckd_fed.home import code_version, home
from ckd_fed.report.write import report_quietly
from ckd_fed.tracking.console import no_counterfactual_notice, write
from ckd_fed.tracking.record import Record, run_name
from ckd_fed.tracking.wandb_mirror import wandb_mirror
from server.enrolment import different_features, enrol
from server.exchange import Exchange
from server.federation import Federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from its run configuration; whatever goes wrong raises, so that Flower marks the run as failed."""
    started = time.monotonic()
    config = resolve(context.run_config)
    run = run_name(config, suffix=f"{context.run_id % 10**6:06d}")
    exchange = Exchange(grid, run, config)
    write(f"ckd_fed {code_version()}: run {run}, waiting for nodes (up to {config.federation.enrol_timeout:.0f} s)")
    plan = enrol(exchange, write)
    if plan.card.standin:
        config = resolve(context.run_config, standin=True)
        exchange = Exchange(grid, run, config)
    facts = {
        "split": plan.card.split,
        "standin": plan.card.standin,
        "modalities": list(plan.modalities),
        "student_workers": len(plan.students),
        "features": json.loads(plan.card.features),
        "flower_run_id": str(context.run_id),
        "code": code_version(),
        "nodes": plan.facts(),
    }
    record = Record(home(config) / "runs" / run, config, wandb_mirror(config, facts, write), write)
    try:
        record.start(plan.card.dataset, **facts)
        if plan.card.standin:
            write(standin_notice(config))
        for line in plan.describe():
            write(line)
        if not plan.card.counterfactual:
            write(no_counterfactual_notice(config.backbone))
        for modality in different_features(plan):
            write(f"NOTE: teacher {modality} holds other {modality} features than the student")
        result = Federation(exchange, plan, record).run()
        record.finish(result, time.monotonic() - started)
    except BaseException as error:
        record.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        if config.tracking.report:
            report_quietly(record.directory, write)
