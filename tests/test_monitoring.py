"""What Prometheus makes of the metrics: promtool's checks, the alert rules, and every query of the dashboard."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import one

import data_pipeline
from data_pipeline import RESULTS, DataPipelineConfig, RunRecord

MONITORING = Path(data_pipeline.__file__).parent / "monitoring"

pytestmark = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs Prometheus (Debian: apt install prometheus)"
)


def promtool(*arguments: str, stdin: str = "") -> None:
    done = subprocess.run(["promtool", *arguments], input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_are_well_formed(report: RunRecord, config: DataPipelineConfig) -> None:
    promtool("check", "metrics", stdin=Path(config.data_dir, "metrics.prom").read_text())


def test_names_with_quotes_are_well_formed(report: RunRecord) -> None:
    """Names that users choose: the data folder, and a landed source."""
    odd = 'my "best"\\\nshop'
    delivery = {odd: {"files": 1, "rows": 2, "bytes": 3, "left_out": []}}
    run = dataclasses.replace(report, data_dir=odd, delivery=delivery)
    text = data_pipeline.metrics([run], None)
    promtool("check", "metrics", stdin=text)
    name = r"my \"best\"\\\nshop"
    assert f'data_pipeline_delivery_rows{{data_dir="{name}",source="{name}"}} 2.0\n' in text


def test_alert_rules() -> None:
    promtool("check", "rules", str(MONITORING / "alerts.yml"))
    promtool("test", "rules", str(MONITORING / "alerts_test.yml"))


def test_every_alert_rule_is_proven() -> None:
    rules, tests = ((MONITORING / name).read_text() for name in ("alerts.yml", "alerts_test.yml"))
    names = [line.split(": ")[1] for line in rules.splitlines() if "- alert:" in line]
    assert len(names) > 5
    for name in names:
        assert f"alertname: {name}\n        exp_alerts:\n          -" in tests, f"no test in which {name} fires"
        assert f"alertname: {name}, exp_alerts: []" in tests, f"no test in which {name} is silent"


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves metrics.prom as node_exporter does."""

    def guess_type(self, path: Any) -> str:
        return "text/plain; version=0.0.4"

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def prometheus(
    report: RunRecord, config: DataPipelineConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A Prometheus that scrapes the metrics of a real run; the address of its API."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=config.data_dir))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("prometheus")
    target = f"127.0.0.1:{server.server_port}"
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s"},
                "scrape_configs": [
                    {
                        "job_name": "textfile",
                        "metrics_path": "/metrics.prom",
                        "static_configs": [{"targets": [target]}],
                    }
                ],
            }
        )
    )
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as free:
        address = f"127.0.0.1:{free.server_port}"
    command = [
        "prometheus",
        "--config.file=prometheus.yml",
        "--storage.tsdb.path=data",
        f"--web.listen-address={address}",
    ]
    log = (folder / "log").open("w")
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not query(f"http://{address}", "data_pipeline_run_duration_seconds"):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.3)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()
        server.shutdown()
        server.server_close()


def query(address: str, expression: str) -> list[dict[str, Any]]:
    try:
        url = f"{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - our own server
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except OSError:  # not up yet
        return []


def test_every_panel_shows_something(prometheus: str) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    queries = [
        (panel["title"], target["expr"].replace("$data_dir", ".*"))
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]
    # Nothing is odd about a first run, and a panel may well say so.
    for title, expression in queries:
        assert query(prometheus, expression), f"{title}: nothing for {expression}"


def test_metrics_equal_the_tables(prometheus: str, report: RunRecord, db: duckdb.DuckDBPyConnection) -> None:
    def value(expression: str) -> float:
        [found] = query(prometheus, expression)
        return float(found["value"][1])

    assert value('data_pipeline_revenue{currency="USD"}') == float(
        one(db, "SELECT sum(amount) FROM transactions_clean")
    )
    assert value("sum(data_pipeline_last_run_result)") == 1
    assert value("count(data_pipeline_last_run_result)") == len(RESULTS)
    assert value('data_pipeline_last_run_result{result="succeeded"}') == 1
    for table in ("customers", "transactions"):
        refused, received = (one(db, f"SELECT count(*) FROM {layer}_{table}") for layer in ("quarantine", "bronze"))
        assert value(f'data_pipeline_quarantine_ratio{{table="{table}"}}') == pytest.approx(refused / received)
        assert value(f'data_pipeline_table_rows{{layer="bronze", table="{table}"}}') == received
    missing = one(db, "SELECT count(*) FROM bronze_transactions WHERE amount IS NULL")
    assert value('data_pipeline_rule_failing_rows{rule="amount_missing"}') == missing > 0
    assert value("data_pipeline_run_duration_seconds") == pytest.approx(report.seconds["total"])
