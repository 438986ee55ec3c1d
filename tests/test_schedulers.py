"""The examples for schedulers, run by the real programs: what each makes of the exit codes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENGINE
from test_dashboards import run_block
from test_docs import PROJECT

pytestmark = pytest.mark.integration

SETTINGS = {"ENGINE": ENGINE, "NUM_TRANSACTIONS": "1000", "NUM_CUSTOMERS": "200", "FAST_START": "no"}
REFUSED, BAD = {"MAX_QUARANTINE_RATE": "0", "SEED": "7"}, {"NUM_PRODUCTS": "0"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with the pipeline installed."""
    project = tmp_path / "data-pipeline"
    project.mkdir()
    for name in ("data_pipeline.py", "monitoring"):
        (project / name).symlink_to(PROJECT / name)
    (project / ".venv").symlink_to(sys.prefix)
    return tmp_path


@contextlib.contextmanager
def locked(home: Path, number: int) -> Iterator[None]:
    """Holds the lock of the data folder, as another run does, until the log of the block has the exit code."""
    log = home / f"{number}.log"
    log.unlink()
    with (home / "pipeline-data/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def release() -> None:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and not (log.exists() and "exit code 4" in log.read_text()):
                time.sleep(0.2)
            fcntl.flock(lock, fcntl.LOCK_UN)

        waiting = threading.Thread(target=release)
        waiting.start()
        yield
        waiting.join()


def run(home: Path, number: int, **settings: str) -> tuple[int, str]:
    """Runs a block of docs/schedulers.md with settings of the pipeline; returns exit code and output."""
    variables = {f"PIPELINE_{name}": value for name, value in {**SETTINGS, **settings}.items()}
    process = run_block("schedulers.md", number, home, **variables)
    try:
        code = process.wait(600)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code, (home / f"{number}.log").read_text()


def published(home: Path) -> str:
    return (home / "pipeline-data/current").resolve().name


def retry_soon(path: Path, text: str, other: str) -> None:
    """Shortens the time between two attempts."""
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, other))


def test_airflow(home: Path) -> None:
    def state() -> tuple[str, int]:
        with contextlib.closing(sqlite3.connect(home / "airflow/airflow.db")) as db:
            query = "SELECT state, try_number FROM task_instance ORDER BY start_date DESC LIMIT 1"
            found: tuple[str, int] = db.execute(query).fetchone()
            return found

    assert run(home, 0)[0] == 0
    code, log = run(home, 1)
    assert (code, state()) == (0, ("success", 1)), log[-3000:]
    first = published(home)
    assert "PIPELINE EXECUTION COMPLETED SUCCESSFULLY" in log
    assert f"Returned value was: {first}" in log
    run(home, 1)
    assert state() == ("skipped", 1), "nothing had arrived"
    for settings, reason in ((REFUSED, "exit code 3"), (BAD, "exit code 2")):
        code, log = run(home, 1, **settings)
        assert code != 0
        assert reason in log
        assert state() == ("failed", 1), "no retry"
    assert published(home) == first
    retry_soon(home / "airflow/dags/airflow_dag.py", "timedelta(minutes=15)", "timedelta(seconds=2)")
    with locked(home, 1):
        code, log = run(home, 1, SEED="8")
    assert "exit code 4" in log
    assert code == 0, log[-3000:]
    assert state()[0] == "success" and state()[1] > 1
    assert published(home) > first


def test_dagster(home: Path) -> None:
    assert run(home, 2)[0] == 0
    code, log = run(home, 3)
    assert code == 0, log[-3000:]
    assert "PIPELINE EXECUTION COMPLETED SUCCESSFULLY" in log
    assert 'Yielded output "result"' in log
    first = published(home)
    code, log = run(home, 3)
    assert code == 0
    assert 'Yielded output "result"' not in log, "nothing had arrived, so what follows is skipped"
    for settings, reason in ((REFUSED, "exit code 3"), (BAD, "exit code 2")):
        code, log = run(home, 3, **settings)
        assert code != 0
        assert reason in log and "STEP_UP_FOR_RETRY" not in log
    assert published(home) == first
    retry_soon(home / "dagster/dagster_job.py", "15 * 60", "2")
    with locked(home, 3):
        code, log = run(home, 3, SEED="8")
    assert code == 0, log[-3000:]
    assert "exit code 4" in log and "STEP_UP_FOR_RETRY" in log
    assert published(home) > first


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd(home: Path) -> None:
    """The program prints a line for an unknown setting or value, but only fails if the command is missing."""
    service = home / ".config/systemd/user/data-pipeline.service"
    variables = {"HOME": str(home), "XDG_RUNTIME_DIR": str(home)}

    def verify(text: str) -> str:
        service.write_text(text)
        command = ["systemd-analyze", "--user", "verify", str(service)]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False).stderr

    process = run_block("schedulers.md", 4, home, **variables)
    assert (process.wait(60), (home / "4.log").read_text()) == (0, "")
    text = service.read_text()
    assert verify(text) == ""
    for right, wrong in {"15min": "15mn", "Restart=": "Restrat=", "=2 3": "=two", "Type=oneshot": "Type=once"}.items():
        assert "data-pipeline.service:" in verify(text.replace(right, wrong)), wrong
    (home / "data-pipeline/.venv").unlink()
    assert "is not executable" in verify(text)
