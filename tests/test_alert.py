"""Who is told when: the webhook against a real server, good and bad, and what counts as an anomaly."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import io
import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

import data_pipeline
from data_pipeline import (
    ConfigurationError,
    DataPipelineConfig,
    NotPublishedError,
    PipelineError,
    RunRecord,
    alert,
    anomalies,
    run_pipeline,
    send_alert,
)

SECRET = "T0P-SECRET"  # noqa: S105 - of a URL that only the tests know


class Receiver(http.server.ThreadingHTTPServer):
    """A webhook that keeps what it is sent, and answers as it is told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.received: list[dict[str, str]] = []
        self.status, self.delay = 200, 0.0
        self.url = f"http://127.0.0.1:{self.server_port}/hooks/{SECRET}"


class Answer(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"
        self.server.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        # Byte by byte, so that no single wait is long.
        for character in f"HTTP/1.0 {self.server.status} \r\nContent-Length: 0\r\n\r\n":
            time.sleep(self.server.delay)
            with contextlib.suppress(OSError):  # who did not want to wait has gone
                self.wfile.write(character.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="data_pipeline")
    return caplog


def test_text_is_sent_as_slack_reads_it(receiver: Receiver, log: pytest.LogCaptureFixture) -> None:
    send_alert(receiver.url, '❌ "quoted"\nsecond line')
    assert receiver.received == [{"text": '❌ "quoted"\nsecond line'}]
    assert log.text == ""


@pytest.mark.parametrize("fault", ["status", "gone", "nonsense"])
def test_receiver_that_fails(receiver: Receiver, fault: str) -> None:
    url = receiver.url
    if fault == "status":
        receiver.status = 500
    elif fault == "gone":
        receiver.shutdown()
        receiver.server_close()
    else:
        url = f"http://[{SECRET}/x y"
    started = time.monotonic()
    with pytest.raises(PipelineError, match="the alert was not delivered: ") as failure:
        send_alert(url, "text", timeout=1.0)
    assert time.monotonic() - started < 3
    assert SECRET not in str(failure.value)


def test_receiver_that_never_answers() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        started = time.monotonic()
        with pytest.raises(PipelineError, match=r"no answer|timed out") as failure:
            send_alert(f"http://127.0.0.1:{deaf.getsockname()[1]}/{SECRET}", "text", timeout=0.5)
    assert time.monotonic() - started < 3
    assert SECRET not in str(failure.value)


@pytest.mark.slow
def test_runs_that_tell(
    published: DataPipelineConfig,
    first_run: tuple[DataPipelineConfig, RunRecord],
    spark: SparkSession,
    receiver: Receiver,
    log: pytest.LogCaptureFixture,
) -> None:
    """Refused and recovered runs tell, and one that looks odd does everywhere; no record or log has the secret."""
    config = published
    for n in range(2):
        run_id = f"2020010{n + 1}T000000Z-0000"
        data_pipeline.Store(config.root).runs.save(as_read(first_run[1], run_id=run_id))
    config.alert_webhook = receiver.url
    config.max_quarantine_rate = 0.0
    receiver.status = 500
    with pytest.raises(NotPublishedError):
        run_pipeline(config, spark)
    [refused] = receiver.received
    assert refused["text"].startswith("❌ EcommerceDataPipeline refused in gate: GATE MISSED")
    config.max_quarantine_rate = 0.05
    config.num_transactions = 100
    receiver.status = 200
    record = run_pipeline(config, spark)
    [_, recovered] = receiver.received
    assert "✅ has recovered: the run before was refused" in recovered["text"]
    assert record.run_id in recovered["text"]
    line = "bronze.transactions: 100 rows, against 1,000 rows in the last 3 runs"
    assert line in record.anomalies
    assert line in [found.getMessage() for found in log.records if found.levelname == "WARNING"]
    assert f"⚠ {line}" in Path(config.data_dir, "report.html").read_text(encoding="utf-8")
    assert line.replace("_", r"\_") in data_pipeline.job_summary(record)
    assert f"⚠️ {line}" in recovered["text"]
    assert f'data_pipeline_anomalies{{data_dir="{config.data_dir}"}} {len(record.anomalies)}.0' in (
        Path(config.data_dir, "metrics.prom").read_text()
    )
    assert SECRET not in log.text + repr(config)
    for file in Path(config.data_dir).rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


def test_command_that_cannot_run_tells(receiver: Receiver, tmp_path: Path) -> None:
    """Also where no run could start, and the URL is not shown when it is wrong."""

    def command(url: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, data_pipeline.__file__, "--data-dir", str(tmp_path / "data"), "--num-customers", "0"],
            env={**os.environ, "PIPELINE_ALERT_WEBHOOK": url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    done = command(receiver.url)
    assert done.returncode == 2
    [sent] = receiver.received
    assert sent["text"].startswith("❌ No run of the data pipeline on ")
    assert "num_customers is 0" in sent["text"]
    assert SECRET not in done.stderr
    done = command(f"ftp://{SECRET}")
    assert done.returncode == 2
    assert "PIPELINE_ALERT_WEBHOOK: alert_webhook must be a URL that begins with https:// or http://\n" in done.stderr
    assert SECRET not in done.stderr


@pytest.mark.parametrize("url", ["http://host:99999/x", "http://[::1", "http://host/a b", "https://", "http://h:x/"])
def test_unusable_webhook_is_found_at_the_start(url: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"^alert_webhook must be a URL that begins with https:// or http://\Z"
    ):
        DataPipelineConfig(alert_webhook=url)


def test_alert_that_is_a_test(receiver: Receiver, tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    command = ["--test-alert", "--data-dir", str(tmp_path / "data")]
    assert data_pipeline.main([*command, "--alert-webhook", receiver.url]) == 0
    [sent] = receiver.received
    assert sent["text"].startswith("EcommerceDataPipeline: a test alert from ")
    receiver.status = 404
    assert data_pipeline.main([*command, "--alert-webhook", receiver.url]) == 2
    assert "the alert was not delivered: HTTP Error 404" in log.text
    assert len(receiver.received) == 2, "a failed test is no failed run"
    receiver.shutdown()
    receiver.server_close()
    assert data_pipeline.main([*command, "--alert-webhook", receiver.url]) == 2
    assert "the alert was not delivered: <urlopen error [Errno 111] Connection refused>" in log.text
    assert data_pipeline.main(command) == 2
    assert "there is no webhook to test: set PIPELINE_ALERT_WEBHOOK" in log.text
    assert SECRET not in log.text
    assert not (tmp_path / "data").exists()


def as_read(record: RunRecord, **changes: Any) -> RunRecord:
    return RunRecord.from_json(json.dumps(json.loads(record.to_json()) | changes))


def test_anomalies(report: RunRecord) -> None:
    usual = [as_read(report, run_id=f"2026010{n}T000000Z-0000") for n in range(1, 6)]
    assert anomalies(report, usual, factor=3.0) == []

    few = dataclasses.replace(report, rows=report.rows | {"silver.transactions_clean": 100})
    [line] = anomalies(few, usual, factor=3.0)
    usually = f"{report.rows['silver.transactions_clean']:,}"
    assert line == f"silver.transactions_clean: 100 rows, against {usually} rows in the last 5 runs"
    assert anomalies(few, usual[:2], factor=3.0) == [], "two runs are no history"
    assert anomalies(few, [dataclasses.replace(run, result="failed") for run in usual], factor=3.0) == [], (
        "only good runs count"
    )

    quality = dataclasses.replace(report.quality["transactions"], quarantined=2_000)
    refused = dataclasses.replace(report, quality=report.quality | {"transactions": quality})
    [line] = anomalies(refused, usual, factor=3.0)
    assert line.startswith("transactions: 20.00% of the rows quarantined, against 1.64% of the rows quarantined in ")
    assert anomalies(refused, usual, factor=100.0) == []
    # One wild run among the last does not move the median.
    assert anomalies(report, [*usual, as_read(few)], factor=1.5) == []


def test_arrivals_are_compared_with_nights_that_had_some(report: RunRecord) -> None:
    def night(received: int) -> RunRecord:
        arrived = {"transactions": dataclasses.replace(report.quality["transactions"], received=received)}
        return dataclasses.replace(report, kind="incremental", arrived=arrived)

    usual = [night(received) for received in (0, 900, 0, 0, 1_100, 0)]
    assert anomalies(night(1_000), usual, factor=3.0) == []
    assert anomalies(night(0), usual, factor=3.0) == []
    [line] = [line for line in anomalies(night(100), usual, factor=3.0) if "arrived" in line]
    assert line == "bronze.transactions: 100 rows arrived, against 1,000 rows arrived in the last 2 runs"
    [line] = [line for line in anomalies(night(0), usual[1:2] * 3, factor=3.0) if "arrived" in line]
    assert line == "bronze.transactions: 0 rows arrived, against 900 rows arrived in the last 3 runs"


def test_report_that_fails_costs_no_alert(
    small: Callable[..., DataPipelineConfig],
    spark: SparkSession,
    receiver: Receiver,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nor the metrics and the page of GitHub Actions; it is a warning, and the refused run is refused all the same."""
    page = tmp_path / "page.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))
    config = small(
        num_customers=50, num_transactions=500, num_products=10, alert_webhook=receiver.url, max_quarantine_rate=0.0
    )

    def fail(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_pipeline, "html_report", fail)
    with pytest.raises(NotPublishedError):
        run_pipeline(config, spark)
    assert len(receiver.received) == 1
    assert "report.html was not updated" in log.text
    assert 'result="refused"} 1.0' in Path(config.data_dir, "metrics.prom").read_text()
    text = page.read_text()
    assert text.startswith("## ⛔ Pipeline run ")
    assert "| transactions | max\\_quarantine\\_rate | 7 |" in text
    assert "**NotPublishedError** in gate: GATE MISSED" in text
    assert "mermaid" not in text, "there is no gold to show"


def test_records_that_cannot_be_read_cost_no_alert(
    report: RunRecord,
    receiver: Receiver,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(_: Any) -> list[RunRecord]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(data_pipeline.RunRecords, "history", fail)
    failed = dataclasses.replace(report, result="failed")
    data_pipeline.notify(failed, data_pipeline.Store(str(tmp_path)), DataPipelineConfig(alert_webhook=receiver.url))
    assert len(receiver.received) == 1
    [line] = log.messages
    assert line == "The records of the runs cannot be read: [Errno 5] Input/output error"


def test_rollback_after_a_kill_is_told(report: RunRecord, tmp_path: Path) -> None:
    """A run was killed once it was published; the report then shows the one before, and metrics that it was killed."""
    store = data_pipeline.Store(str(tmp_path))
    os.makedirs(store.path("runs"))
    killed: dict[str, Any] = {"result": "running", "seconds": {}, "finished_at": None}
    runs: dict[str, dict[str, Any]] = {
        "20260101T000000Z-0000": {},
        "20260102T000000Z-0000": killed,
        "20260103T000000Z-0000": killed | {"quality": {}, "rows": {}},
    }
    for run_id, changes in runs.items():
        store.runs.save(as_read(report, run_id=run_id, bytes={}, **changes))
        if run_id < "20260103":
            shutil.copytree(Path(report.data_dir, "current"), store.path("snapshots", run_id))
            store.switch_to(run_id)
    assert data_pipeline.main(["--rollback", "--data-dir", str(tmp_path)]) == 0
    assert store.published() == "20260101T000000Z-0000"
    assert [run.result for run in store.runs.history()] == ["succeeded", "succeeded", "killed"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"killed</b> · as of \S+ · run 20260103", page)
    assert "Published is run 20260101T000000Z-0000" in page
    assert 'result="killed"} 1.0' in (tmp_path / "metrics.prom").read_text()


def test_alert_of_a_run(report: RunRecord) -> None:
    good, bad = (
        as_read(report, run_id="20200101T000000Z-0000"),
        as_read(report, run_id="20200101T000000Z-0000", result="killed"),
    )
    assert alert(report, [good]) is None
    assert "has recovered: the run before was killed" in (alert(report, [bad]) or "")
    odd = alert(dataclasses.replace(report, anomalies=["few rows"]), [good]) or ""
    assert "⚠️ few rows" in odd and "recovered" not in odd
    error = {"type": "E", "message": "first\nsecond", "traceback": ""}
    failed = dataclasses.replace(report, result="failed", current_step="gold.x", error=error)
    assert "failed in gold.x: first (run" in (alert(failed, [good]) or "")
    assert alert(dataclasses.replace(report, result="interrupted"), [good]) is None, "who stopped it knows"


def terminal(*arguments: str, **environment: str) -> str:
    """What the command writes to standard error where that is a terminal."""
    leader, follower = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TERM")}
    process = subprocess.Popen(
        [sys.executable, data_pipeline.__file__, *arguments],
        env={**kept, "TERM": "xterm", **environment},
        stdin=follower,
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    written = b""
    while True:
        try:
            part = os.read(leader, 65_536)
        except OSError:  # how Linux ends it
            break
        if not part:
            break
        written += part
    os.close(leader)
    assert process.wait(300) is not None
    return written.decode()


class Terminal(io.StringIO):
    """A standard error that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_terminal(
    tmp_path: Path,
    spark: SparkSession,
    config: DataPipelineConfig,
    receiver: Receiver,
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run shows its progress; and a good one that follows no bad one sends no alert."""
    size = ["--num-customers", "50", "--num-transactions", "200", "--num-products", "10", "--engine", config.engine]
    stderr = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(logging.root, "handlers", [])
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        assert data_pipeline.main([*size, "--data-dir", str(tmp_path), "--alert-webhook", receiver.url]) == 0
    shown = stderr.getvalue()
    assert receiver.received == []
    for number, table in enumerate(data_pipeline.TABLES.values(), start=1):
        assert f"[{number}/{len(data_pipeline.TABLES)}] {table.layer}.{table.name} …" in shown
    assert "\033" not in shown, "only warnings and errors are in colour"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_terminal_without_colour(tmp_path: Path, environment: dict[str, str]) -> None:
    shown = terminal("--data-dir", str(tmp_path), "--num-products", "0", **environment)
    assert "ERROR - num_products is 0" in shown
    assert "\033" not in shown
    coloured = terminal("--data-dir", str(tmp_path), "--num-products", "0")
    assert coloured.startswith("\033[31m") and "num_products is 0" in coloured


def test_quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = data_pipeline.logger.level
    try:
        assert data_pipeline.main(["--quiet", "--list-runs", "--data-dir", str(tmp_path)]) == 0
        assert not data_pipeline.logger.isEnabledFor(logging.INFO)
        assert data_pipeline.logger.isEnabledFor(logging.WARNING)
    finally:
        data_pipeline.logger.setLevel(level)
    assert capfd.readouterr().err == ""
