"""The dashboards as code: they fit the contract, and show the figures of gold in the real programs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import open_tables
from pyspark.sql import SparkSession
from test_cluster import free_port
from test_docs import BLOCKS, PROJECT
from test_report_page import BROWSER, SCREENSHOTS

from data_pipeline import GOLD, DataPipelineConfig, RunRecord, run_pipeline, tables

SUPERSET = PROJECT / "monitoring" / "superset"


def assets(kind: str) -> list[dict[str, Any]]:
    found = [yaml.safe_load(path.read_text()) for path in sorted((SUPERSET / kind).rglob("*.yaml"))]
    assert found
    return found


DATASETS = {dataset["uuid"]: dataset for dataset in assets("datasets")}
CHARTS = {chart["uuid"]: chart for chart in assets("charts")}


def test_datasets_are_the_gold_tables_of_the_contract() -> None:
    found = {
        dataset["table_name"]: [(column["column_name"], column["type"].lower()) for column in dataset["columns"]]
        for dataset in DATASETS.values()
    }
    contract = {
        table.name: [(name, kind.replace("string", "varchar")) for name, kind in table.columns()]
        for table in tables(GOLD)
    }
    assert found == contract
    views = re.findall(
        r"VIEW (\w+) AS FROM '~/pipeline-data/gold/\1/\*\.parquet';", (SUPERSET / "gold.sql").read_text()
    )
    assert views == list(contract)


def test_charts_use_what_their_dataset_has() -> None:
    for chart in CHARTS.values():
        dataset, params = DATASETS[chart["dataset_uuid"]], chart["params"]
        metrics = {metric["metric_name"] for metric in dataset["metrics"]}
        columns = {column["column_name"] for column in dataset["columns"]}
        assert {*params.get("metrics", []), params.get("metric")} - {None} <= metrics, chart["slice_name"]
        assert {*params.get("groupby", []), params.get("x_axis")} - {None} <= columns, chart["slice_name"]
    [dashboard] = assets("dashboards")
    places = [place for place in dashboard["position"].values() if isinstance(place, dict)]
    shown = {place["meta"]["uuid"]: place["meta"]["sliceName"] for place in places if place["type"] == "CHART"}
    assert shown == {uuid: chart["slice_name"] for uuid, chart in CHARTS.items()}
    [database] = assets("databases")
    assert {dataset["database_uuid"] for dataset in DATASETS.values()} == {database["uuid"]}


def run_block(page: str, number: int, home: Path, **variables: str) -> subprocess.Popen[str]:
    """Runs a block of a page as its reader does, with this home folder; the output is in a file named by the number."""
    texts = [block.text for block in BLOCKS if (block.page, block.language) == (page, "bash")]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "SUPERSET_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (home / f"{number}.log").open("w") as log:
        return subprocess.Popen(
            ["bash", "-ec", texts[number].replace("8088", variables.pop("PORT", "8088"))],
            cwd=PROJECT,
            env=kept | {"HOME": str(home), "PATH": path} | variables,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )


@pytest.fixture(scope="module")
def superset(report: RunRecord, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Superset with the imported dashboard; the home folder, and the address."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(report.data_dir, home / "pipeline-data", symlinks=True)

    def run(number: int) -> None:
        assert run_block("dashboards.md", number, home).wait(900) == 0, (home / f"{number}.log").read_text()[-3000:]

    for number in (0, 1, 2):
        run(number)
    with contextlib.closing(sqlite3.connect(home / "superset/superset.db")) as db, db:
        db.execute("UPDATE slices SET slice_name = 'other'")
        db.execute("UPDATE sql_metrics SET expression = 'count(*)'")
    run(2)  # the import can be repeated, and corrects this
    port = str(free_port())
    server = run_block("dashboards.md", 3, home, PORT=port)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            assert server.poll() is None and time.monotonic() < deadline, (home / "3.log").read_text()
            time.sleep(0.5)
        yield home, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture(scope="module")
def browser_of_admin(superset: tuple[Path, str]) -> Iterator[Any]:
    """A page of a browser that has logged in."""
    if not BROWSER:
        pytest.skip("needs Chromium (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        # The page logs its events as an anonymous visitor; a late answer would end the session that has begun since.
        page.route("**/superset/log/**", lambda route: route.abort())
        page.goto(f"{superset[1]}/login/")
        page.fill("#username", "admin")
        page.fill("#password", "change-me")
        page.keyboard.press("Enter")
        page.wait_for_url(lambda url: "login" not in url, timeout=60_000)
        yield page
        browser.close()


# What each chart shows, computed from silver: its labels and its figures.
EXPECTED = {
    "Revenue": "SELECT sum(amount) FROM transactions_clean",
    "Order lines": "SELECT count(*) FROM transactions_clean",
    "Customers": "SELECT count(*) FROM customers_enriched",
    "Stock value": "SELECT sum(inventory_value) FROM products_active",
    "Revenue by category": "SELECT product_category, sum(amount) FROM transactions_clean GROUP BY 1",
    "Revenue by payment method": """
        SELECT payment_method, sum(amount), sum(amount)::DOUBLE / (SELECT sum(amount) FROM transactions_clean)
        FROM transactions_clean GROUP BY 1""",
    "Revenue by customer segment": "SELECT customer_segment, sum(total_spent) FROM customers_enriched GROUP BY 1",
    "Leading cities": "SELECT city, sum(total_spent) FROM customers_enriched GROUP BY 1 ORDER BY 2 DESC LIMIT 10",
    "Devices and browsers": "SELECT device, browser, sum(amount), count(*) FROM transactions_clean GROUP BY 1, 2",
    "Stock by category and supplier": """
        SELECT category, supplier, sum(inventory_value), sum(stock_quantity), count(*) FROM products_active
        GROUP BY 1, 2""",
}


def rows_of(answers: list[list[Any]]) -> list[list[Any]]:
    """The rows in one order, with numbers of one type."""
    numbers = (int, float, Decimal)
    rows = [[round(float(value), 2) if isinstance(value, numbers) else value for value in row] for row in answers]
    return sorted(rows, key=str)


def shown_figures(page: Any, address: str) -> dict[str, list[list[Any]]]:
    """Opens the dashboard, and returns what each chart of it has received, by its name."""
    answers = []
    page.on("response", lambda answer: answers.append(answer) if "/api/v1/chart/data" in answer.url else None)
    page.goto(f"{address}/superset/dashboard/shop/?standalone=2&show_filters=0")
    for _ in range(120):
        if len(answers) < len(EXPECTED):
            page.wait_for_timeout(500)
    page.wait_for_timeout(3_000)  # the charts are drawn
    names = {
        chart["id"]: chart["slice_name"]
        for chart in page.request.get(f"{address}/api/v1/dashboard/shop/charts").json()["result"]
    }
    found = {}
    for answer in answers:
        assert answer.status == 200, answer.text()
        [number] = re.findall(r"slice_id%22%3A(\d+)", answer.url)
        [result] = answer.json()["result"]
        found[names[int(number)]] = rows_of([list(row.values()) for row in result["data"]])
    return found


def expected_figures(home: Path) -> dict[str, list[list[Any]]]:
    with open_tables(home / "pipeline-data") as db:
        return {name: rows_of([list(row) for row in db.sql(query).fetchall()]) for name, query in EXPECTED.items()}


@pytest.mark.integration
def test_charts_show_the_figures_of_the_last_run(
    superset: tuple[Path, str], browser_of_admin: Any, config: DataPipelineConfig, spark: SparkSession
) -> None:
    home, address = superset
    first = expected_figures(home)
    assert shown_figures(browser_of_admin, address) == first
    if SCREENSHOTS:
        browser_of_admin.set_viewport_size({"width": 1280, "height": 1500})
        browser_of_admin.screenshot(path=Path(SCREENSHOTS, "superset.png"), full_page=True)
    run_pipeline(dataclasses.replace(config, data_dir=str(home / "pipeline-data"), seed=7), spark)
    second = expected_figures(home)
    assert second["Revenue"] != first["Revenue"]
    assert shown_figures(browser_of_admin, address) == second, "a new run shows without another step"
