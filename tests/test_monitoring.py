"""What Prometheus makes of the metrics: promtool's checks, the alert rules, and every query of the dashboard."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pytest
from conftest import one
from pyspark.sql import SparkSession
from test_cluster import free_port

import data_pipeline
from data_pipeline import RESULTS, DataPipelineConfig, NotPublishedError, PipelineError, RunRecord, run_pipeline

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


@contextlib.contextmanager
def prometheus_of(folders: Sequence[str], folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes the metrics of the runs into these data folders; the address of its API."""
    root = os.path.commonpath(folders)
    handler = functools.partial(Files, directory=root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    scraped = [
        {
            "job_name": data_dir,
            "metrics_path": os.path.normpath(f"/{os.path.relpath(data_dir, root)}/metrics.prom"),
            "static_configs": [{"targets": [f"127.0.0.1:{server.server_port}"]}],
        }
        for data_dir in folders
    ]
    settings = {"global": {"scrape_interval": "1s"}, "scrape_configs": scraped}
    (folder / "prometheus.yml").write_text(json.dumps(settings))
    address = f"127.0.0.1:{free_port()}"
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
        while len(query(f"http://{address}", "data_pipeline_run_duration_seconds")) < len(folders):
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.3)
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(30)
        log.close()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def prometheus(
    report: RunRecord, config: DataPipelineConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    with prometheus_of([config.data_dir], tmp_path_factory.mktemp("prometheus")) as address:
        yield address


def query(address: str, expression: str) -> list[dict[str, Any]]:
    try:
        url = f"{address}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(url) as answer:  # noqa: S310 - our own server
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
            return found
    except OSError:  # not up yet
        return []


def panels(data_dir: str = ".*") -> dict[str, list[str]]:
    """The queries of the dashboard, by the title of the panel, for one data folder."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    return {
        panel["title"]: [target["expr"].replace("$data_dir", data_dir) for target in panel["targets"]]
        for panel in dashboard["panels"]
    }


def test_every_panel_shows_something(prometheus: str) -> None:
    for title, queries in panels().items():
        assert any(query(prometheus, expression) for expression in queries), f"{title}: nothing for {queries}"


@pytest.fixture
def shops(
    small: Callable[..., DataPipelineConfig], spark: SparkSession, tmp_path: Path
) -> dict[str, DataPipelineConfig]:
    """Real runs of every kind, on landed files, each into a data folder of its own and on the same first run."""
    source = tmp_path / "source"
    shutil.copytree(MONITORING.parent / "docs" / "example", source)
    found = {
        kind: small(
            source_dir=str(source), data_dir=str(tmp_path / kind), settle_seconds=0, max_quarantine_rate=0.5,
            as_of_date="2026-03-01", after_publish="/bin/false",
        )
        for kind in ("full", "incremental", "unchanged", "refused", "failed")
    }  # fmt: skip
    run_pipeline(found["full"], spark)
    for kind in ("incremental", "unchanged", "refused", "failed"):
        shutil.copytree(found["full"].data_dir, found[kind].data_dir, symlinks=True)
    run_pipeline(found["unchanged"], spark)
    order = json.loads((source / "transactions/2026-02-28.jsonl").read_text().splitlines()[0])
    (source / "transactions/2026-03-01.jsonl").write_text(json.dumps(order | {"order": "A-9"}) + "\n")
    run_pipeline(found["incremental"], spark)
    found["refused"].max_quarantine_rate = 0
    with pytest.raises(NotPublishedError):
        run_pipeline(found["refused"], spark)
    model = (source / "transactions.sql").read_text()
    (source / "transactions.sql").write_text(model.replace("order AS", "CAST(raise_error('no') AS STRING) AS"))
    with pytest.raises(PipelineError):
        run_pipeline(found["failed"], spark)
    return found


@pytest.mark.integration
def test_every_panel_shows_every_kind_of_run(shops: dict[str, DataPipelineConfig], tmp_path: Path) -> None:
    empty = {expression for queries in panels().values() for expression in queries}
    with prometheus_of([config.data_dir for config in shops.values()], tmp_path) as address:
        for kind, config in shops.items():
            [result] = query(address, f'data_pipeline_last_run_result{{data_dir="{config.data_dir}"}} == 1')
            [shown] = query(address, f'data_pipeline_last_run_kind{{data_dir="{config.data_dir}"}} == 1')
            assert kind in (result["metric"]["result"], shown["metric"]["kind"])
            for (title, queries), general in zip(panels(config.data_dir).items(), panels().values(), strict=True):
                answered = [bool(query(address, expression)) for expression in queries]
                assert any(answered), f"{title}: nothing after a run of the kind {kind}"
                empty -= {expression for expression, found in zip(general, answered, strict=True) if found}
            [hooks] = query(address, panels(config.data_dir)["Hooks that failed"][0])
            assert int(hooks["value"][1]) == (kind in ("full", "incremental")), "the others run no hook"
    assert not empty, "queries that no run answers"


@pytest.mark.integration
def test_dashboard_fits_the_schema_of_grafana(tmp_path: Path) -> None:
    """The compiler of TypeScript checks each field, option and value."""
    packages = ["@grafana/schema@13.2.3", "typescript@7.0.2"]
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), *packages]
    subprocess.run(install, check=True, timeout=300)
    shutil.copy(Path(__file__).parent / "grafana_dashboard.ts", tmp_path)
    dashboard = (MONITORING / "dashboard.json").read_text()

    def check(text: str) -> str:
        head = 'import type { Shape } from "./grafana_dashboard";\nexport const dashboard: Shape ='
        (tmp_path / "dashboard.ts").write_text(f"{head} {text};\n")
        options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "esnext", "--moduleResolution", "bundler"]
        command = ["node_modules/.bin/tsc", *options, "--target", "es2022", "dashboard.ts"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    assert check(dashboard) == ""
    for right, wrong in {'"stat"': '"stats"', '"unit"': '"units"', '"absolute"': '"abs"', '"h": 4': '"h": "4"'}.items():
        assert "error TS" in check(dashboard.replace(right, wrong, 1)), wrong


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
