"""A DAG for Airflow that runs the pipeline each night; docs/schedulers.md describes it."""

import json
import subprocess
from datetime import datetime, timedelta
from pathlib import Path

from airflow.sdk import dag, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

PROJECT = Path.home() / "data-pipeline"  # where the pipeline is installed
COMMAND = [PROJECT / ".venv/bin/python", PROJECT / "data_pipeline.py", "--incremental"]
RUNS = Path.home() / "pipeline-data" / "runs"


@dag(
    schedule="0 3 * * *",
    start_date=datetime(2026, 1, 1),
    max_active_runs=1,
    default_args={"retries": 3, "retry_delay": timedelta(minutes=15)},
)
def data_pipeline():
    """Runs the pipeline; tasks that follow `run` get the id of the run."""

    @task
    def run() -> str:
        code = subprocess.run(COMMAND, check=False).returncode
        if code in (2, 3):  # bad input or refused data: the same would happen again
            raise AirflowFailException(f"exit code {code}: see the log")
        if code:  # another run has the lock, or an unexpected failure
            raise AirflowException(f"exit code {code}")
        record = json.loads(max(RUNS.glob("*.json")).read_text())
        if record["kind"] == "unchanged":
            raise AirflowSkipException("nothing had arrived")
        return record["run_id"]

    run()


data_pipeline()
