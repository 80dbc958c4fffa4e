"""The ServerApp: ``server.app:app``."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ckd_fed.tracking.console import write
from server.session import run_federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation from its run configuration; whatever goes wrong raises, so that Flower marks the run as failed."""
    run_federation(grid, context.run_config, context.run_id, write)
