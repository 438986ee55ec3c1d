"""The real command, as a user types it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import data_pipeline
from data_pipeline import TABLES

SMALL = ["--num-customers", "50", "--num-transactions", "300", "--num-products", "10", "--as-of-date", "2026-03-04"]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - (INFO|WARNING|ERROR) - ")


def start(home: Path, *flags: str, **variables: str) -> subprocess.Popen[str]:
    """Starts the pipeline with `home` as the home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}
    return subprocess.Popen(
        [sys.executable, data_pipeline.__file__, *flags],
        env=kept | {"HOME": str(home)} | variables,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(home: Path, *flags: str, **variables: str) -> tuple[int, str]:
    """Runs the pipeline and returns its exit code and its log."""
    with start(home, *flags, **variables) as process:
        out, err = process.communicate(timeout=300)
    assert out == "", "the log goes to standard error"
    return process.returncode, err


def test_good_run(tmp_path: Path) -> None:
    code, log = run(tmp_path, *SMALL, PIPELINE_NUM_PRODUCTS="11", PIPELINE_SEED="5")
    assert code == 0, log
    assert all(LOG_LINE.match(line) for line in log.splitlines()), f"only our own lines:\n{log}"
    for table in TABLES:
        assert list((tmp_path / "pipeline-data" / table.layer / table.name).glob("*.parquet"))
    assert "bronze.products                          10 rows" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline-data"], "nothing else is left behind"


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for flags, message in (
        (["--num-custommers", "5"], "unknown argument --num-custommers; did you mean --num-customers"),
        (["--num-customers", "0"], "num_customers is 0, but num_transactions is 50000"),
        (["--data-dir", "/dev/null/x"], "cannot write to data_dir /dev/null/x"),
    ):
        code, log = run(tmp_path, *flags)
        assert code == 2
        assert log.count("\n") == 1
        assert message in log


def test_failure_in_the_middle(tmp_path: Path) -> None:
    (tmp_path / "pipeline-data").mkdir()
    (tmp_path / "pipeline-data" / "silver").write_text("in the way")
    code, log = run(tmp_path, *SMALL)
    assert code == 1
    assert "FAILED in silver.products_active" in log
    assert "Traceback (most recent call last):" in log
    assert "COMPLETED" not in log


def test_interrupted_run(tmp_path: Path) -> None:
    with start(tmp_path, *SMALL) as process:
        assert process.stderr is not None
        log = ""
        while "BRONZE LAYER" not in log:
            log += process.stderr.readline()
            assert process.poll() is None, log
        process.send_signal(signal.SIGINT)
        log += process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert "INTERRUPTED" in log
    assert "Traceback" not in log
