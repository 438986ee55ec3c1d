"""The real command, as a user types it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import ENGINE, THOROUGH, at_close
from pyspark.sql import SparkSession
from test_alert import Receiver, receiver  # noqa: F401 - a fixture

import data_pipeline
from data_pipeline import TABLES

SMALL = ["--num-customers", "50", "--num-transactions", "300", "--num-products", "10", "--as-of-date", "2026-03-04"]
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - (INFO|WARNING|ERROR) - ")


def start(
    home: Path,
    *flags: str,
    program: tuple[str, ...] = (data_pipeline.__file__,),
    interpreter: str = sys.executable,
    **variables: str,
) -> subprocess.Popen[str]:
    """Starts the pipeline with `home` as the home folder."""
    # A session of Sail in this process leaves a mark in the environment.
    others = ("PIPELINE_", "GITHUB_", "SPARK_CONNECT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    return subprocess.Popen(
        [interpreter, *program, *flags],
        env=kept | {"HOME": str(home), "PIPELINE_FAST_START": "no", "PIPELINE_ENGINE": ENGINE} | variables,
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(home: Path, *flags: str, **options: Any) -> tuple[int, str]:
    """Runs the pipeline and returns its exit code and its log."""
    with start(home, *flags, **options) as process:
        out, err = process.communicate(timeout=300)
    assert out == "", "the log goes to standard error"
    return process.returncode, err


def test_good_run(tmp_path: Path) -> None:
    code, log = run(tmp_path, *SMALL, PIPELINE_NUM_PRODUCTS="11", PIPELINE_SEED="5")
    assert code == 0, log
    assert all(LOG_LINE.match(line) for line in log.splitlines()), f"only our own lines:\n{log}"
    assert "[1/" not in log, "progress is for a terminal"
    for table in TABLES.values():
        assert list((tmp_path / "pipeline-data" / table.layer / table.name).glob("*.parquet"))
    assert "bronze.products                          10 rows" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipeline-data"], "nothing else is left behind"


@pytest.mark.slow
@THOROUGH
@pytest.mark.skipif(ENGINE != "spark", reason="settings of Spark")
def test_timestamps_have_a_zone_whatever_spark_defaults_say(tmp_path: Path) -> None:
    """The schemas are read by that setting where threads of Python share those of Java, as they do here."""
    (tmp_path / "spark-defaults.conf").write_text("spark.sql.timestampType TIMESTAMP_NTZ\n")
    code, log = run(tmp_path, *SMALL, SPARK_CONF_DIR=str(tmp_path), PYSPARK_PIN_THREAD="false")
    assert code == 0, log
    files = f"{tmp_path}/pipeline-data/bronze/transactions/*.parquet"
    types = duckdb.connect().execute(f"SELECT DISTINCT typeof(timestamp) FROM '{files}'").fetchall()
    assert types == [("TIMESTAMP WITH TIME ZONE",)]


def test_log_is_in_utc(tmp_path: Path) -> None:
    _, log = run(tmp_path, "--num-customers", "0", TZ="Asia/Tokyo")
    logged = datetime.strptime(log[:19], "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)
    assert abs(logged - datetime.now(timezone.utc)) < timedelta(minutes=5)


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    for flags, message in (
        (["--num-custommers", "5"], "unknown argument --num-custommers; did you mean --num-customers"),
        (["--num-customers", "0"], "num_customers is 0, but num_transactions is 50000"),
        (["--data-dir", "/dev/null/x"], "cannot write to data_dir: Not a directory: /dev/null/x"),
    ):
        code, log = run(tmp_path, *flags)
        assert code == 2
        assert log.count("\n") == 1
        assert message in log


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&- >&- <&-"])
def test_run_without_standard_error(closed: str, tmp_path: Path) -> None:
    line = f'exec "{sys.executable}" "{data_pipeline.__file__}" "$@" {closed}'
    with start(tmp_path, line, "-", *SMALL, interpreter="/bin/sh", program=("-c",)) as process:
        process.communicate(timeout=300)
    assert process.returncode == 0
    assert (tmp_path / "pipeline-data" / "report.html").exists()
    assert b"\x00" not in (tmp_path / "pipeline-data" / ".lock").read_bytes()


@pytest.fixture
def run_here(
    tmp_path: Path, spark: SparkSession, caplog: pytest.LogCaptureFixture
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs the command within this process, on the session of the tests; returns its exit code and its log."""
    # A command that was interrupted ignores signals from then on: its process is about to end, but this one is not.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    caplog.set_level("INFO", logger="data_pipeline")

    def run(*flags: str) -> tuple[int, str]:
        code = data_pipeline.main([*SMALL, "--data-dir", str(tmp_path / "pipeline-data"), "--engine", ENGINE, *flags])
        return code, caplog.text

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_failure_in_the_middle(
    tmp_path: Path, run_here: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_pipeline, "products_active", lambda products: products.select("no_such_column"))
    saved: list[str] = []
    runs = tmp_path / "pipeline-data" / "runs"
    at_close(monkeypatch, lambda: saved.extend(json.loads(path.read_text())["result"] for path in runs.glob("*.json")))
    code, log = run_here()
    assert code == 1
    assert "FAILED in silver.products_active" in log
    assert "Traceback (most recent call last):" in log
    assert "no_such_column" in log
    assert "COMPLETED" not in log
    assert not (tmp_path / "pipeline-data" / "silver").exists()
    assert saved == ["failed"], "before the engine stops"
    [record] = runs.glob("*.json")
    content = json.loads(record.read_text())
    assert (content["result"], content["exit_code"], content["current_step"]) == ("failed", 1, "silver.products_active")
    assert "no_such_column" in content["error"]["traceback"]
    assert content["rows"]["bronze.customers"] == 50
    assert list((tmp_path / "pipeline-data" / "snapshots").iterdir()) == [], "what it had written is removed"


@pytest.mark.slow
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
    [path] = (tmp_path / "pipeline-data" / "runs").glob("*.json")
    record = json.loads(path.read_text())
    assert (record["result"], record["exit_code"]) == ("interrupted", 130)


@pytest.mark.skipif(ENGINE != "sail", reason="Sail's server replaces the handler of SIGINT")
@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_interrupt_while_sail_starts(tmp_path: Path, seconds: float) -> None:
    with start(tmp_path, *SMALL) as process:
        assert process.stderr is not None
        while "Run " not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


def processes_of(home: Path) -> list[int]:
    """The processes that have `home` as their home folder."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"HOME={home}\0".encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
        except OSError:  # another user's, or it has just ended
            continue
    return found


def wait_until_all_have_ended(home: Path) -> None:
    deadline = time.monotonic() + 15
    while left := processes_of(home):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.skipif(ENGINE != "spark", reason="Sail has no JVM")
def test_interrupt_while_java_starts_leaves_no_java(tmp_path: Path) -> None:
    with start(tmp_path, *SMALL) as process:
        while len(processes_of(tmp_path)) == 1:
            assert process.poll() is None
            time.sleep(0.02)
        for _ in range(50):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 130
    assert log.count("INTERRUPTED") == 1
    assert "Traceback" not in log
    wait_until_all_have_ended(tmp_path)


@pytest.mark.slow
def test_terminated_run_reports_itself_within_seven_seconds(tmp_path: Path, receiver: Receiver) -> None:  # noqa: F811
    """As systemd and the runner of GitHub Actions stop it: by SIGTERM, to Java too, and once more before they kill."""
    receiver.delay = 0.5
    size = ("--num-customers", "20000", "--num-transactions", "900000")
    with start(tmp_path, *size, PIPELINE_ALERT_WEBHOOK=receiver.url) as process:
        assert process.stderr is not None
        log = ""
        while "BRONZE LAYER" not in log:
            log += process.stderr.readline()
            assert process.poll() is None, log
        time.sleep(1)
        for pid in processes_of(tmp_path):
            os.kill(pid, signal.SIGTERM)
        stopped = time.monotonic()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        [path] = (tmp_path / "pipeline-data" / "runs").glob("*.json")
        while not receiver.received:
            assert time.monotonic() - stopped < 7
            time.sleep(0.1)
        record = json.loads(path.read_text())
        assert (record["result"], record["exit_code"]) == ("interrupted", 143)
        assert "interrupted</b>" in (tmp_path / "pipeline-data" / "report.html").read_text(encoding="utf-8")
        assert 'result="interrupted"} 1.0' in (tmp_path / "pipeline-data" / "metrics.prom").read_text()
        log += process.stderr.read()
        assert process.wait(timeout=60) == 143
    assert log.count("INTERRUPTED in bronze") == 1
    assert "stopped by SIGTERM" in log
    assert "Traceback" not in log
    [alert] = receiver.received
    assert "interrupted in bronze" in alert["text"] and "stopped by SIGTERM" in alert["text"]
    wait_until_all_have_ended(tmp_path)


STOPPED_EARLY = """
import os, signal, sys, data_pipeline
data_pipeline.preflight = lambda *_: os.kill(os.getpid(), signal.{signal})
sys.exit(data_pipeline.main())
"""


INTERRUPTED_IMPORT = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
"""


def test_interrupt_during_imports(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text(INTERRUPTED_IMPORT)
    assert run(tmp_path, PYTHONPATH=str(tmp_path)) == (130, "")


def inline_metadata() -> dict[str, Any]:
    """The metadata at the head of the module, as PEP 723 reads it."""
    text = Path(data_pipeline.__file__).read_text(encoding="utf-8")
    [block] = re.findall(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text)
    return tomllib.loads("".join(line[2:] for line in block.splitlines(keepends=True)))


def test_inline_metadata_equals_the_requirements() -> None:
    path = Path(data_pipeline.__file__).with_name("requirements.txt")
    required = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    assert inline_metadata()["dependencies"] == [line for line in required if line]
    version = inline_metadata()["requires-python"].removeprefix(">=")
    assert f"sys.version_info < ({version.replace('.', ', ')})" in Path(data_pipeline.__file__).read_text()


@pytest.mark.slow
@pytest.mark.skipif(ENGINE != "spark", reason="its packages are those of Spark")
def test_uv_installs_and_runs_the_pipeline(tmp_path: Path) -> None:
    uv = ("-m", "uv", "run", "--no-python-downloads", "--python", sys.executable)
    cache = {"UV_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    code, log = run(tmp_path, *SMALL, program=(*uv, data_pipeline.__file__), **cache)
    assert code == 0, log
    assert "Spark 3.5" in log
    assert (tmp_path / "home" / "pipeline-data" / "report.html").exists()


def test_signal_before_there_is_a_record(tmp_path: Path, receiver: Receiver) -> None:  # noqa: F811
    variables = {"PYTHONPATH": str(Path(data_pipeline.__file__).parent), "PIPELINE_ALERT_WEBHOOK": receiver.url}
    for name, expected in (("SIGINT", 130), ("SIGTERM", 143)):
        code, log = run(tmp_path, program=("-c", STOPPED_EARLY.format(signal=name)), **variables)
        assert code == expected
        assert log.count("\n") == 1
        assert log.endswith(f"INTERRUPTED before the run began: stopped by {name}\n")
    [alert] = receiver.received
    assert alert["text"].startswith("❌ No run of the data pipeline on ")
    assert alert["text"].endswith(": stopped by SIGTERM")


@pytest.mark.usefixtures("no_layers")
def test_interrupt_while_publishing_leaves_the_result_of_what_is_published(
    tmp_path: Path, run_here: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def interrupted(source: str, target: str) -> None:
        replace(source, target)
        if str(target).endswith("/current"):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(os, "replace", interrupted)
    code, log = run_here()
    assert code == 0, log
    assert re.search(r"WARNING .* Stopped after the data was published: stopped by SIGTERM\n", log)
    assert "INTERRUPTED" not in log
    [record] = (tmp_path / "pipeline-data" / "runs").glob("*.json")
    assert json.loads(record.read_text())["result"] == "succeeded"
    assert (tmp_path / "pipeline-data" / "current").resolve().name == record.stem


@pytest.mark.usefixtures("no_layers")
def test_interrupt_after_publishing_changes_nothing(
    tmp_path: Path, run_here: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_report = data_pipeline.save_report

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        save_report(*arguments)

    monkeypatch.setattr(data_pipeline, "save_report", interrupted)
    code, log = run_here()
    assert code == 0, log
    assert (tmp_path / "pipeline-data" / "report.html").exists()


def test_github_actions_is_told_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("what an earlier step wrote\n")
    flags = ("--spark-master", "50%\nspark")
    with start(tmp_path, *flags, GITHUB_ACTIONS="true", GITHUB_STEP_SUMMARY=str(page)) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    choices = "local[*], yarn, or a URL such as spark://host:7077"
    expected = f"::error::--spark-master: spark_master must be {choices}, not '50%25\\\\nspark'\n"
    assert out == expected.replace("\\\\", "\\"), "one command, of one line"
    assert page.read_text().startswith("what an earlier step wrote\n## ❌ Nothing was run\n")
