"""The shop's own report vouches for the published figures: each difference refuses the run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import THOROUGH, open_tables
from pyspark.sql import SparkSession
from test_gate import started_run

from data_pipeline import (
    ConfigurationError,
    DataPipelineConfig,
    NotPublishedError,
    RunRecord,
    Store,
    check_controls,
    html_report,
    job_summary,
    open_source,
    read_controls,
    run_pipeline,
)

ORDERS = """transaction_id,order_id,customer_id,product_id,quantity,amount,timestamp,payment_method,status
1001/1,1001,1,A,1,10.00,2026-01-05 10:00:00,Cash,completed
1001/2,1001,1,B,2,20.50,2026-01-05 10:00:00,Cash,completed
1002,,,C,1,30.00,2026-01-31 23:59:59,card,completed
1003,,7,A,1,5.25,2026-02-01 00:00:00,card,completed
1003R,,7,A,-1,-5.25,2026-02-03 00:00:00,card,returned
1004,,7,A,1,99.00,2026-02-04 00:00:00,card,cancelled
"""


@pytest.fixture
def shop(small: Callable[..., DataPipelineConfig], tmp_path: Path) -> Callable[..., DataPipelineConfig]:
    """A shop of a few orders, with these control totals."""

    def make(controls: str, **values: Any) -> DataPipelineConfig:
        files = {"transactions.csv": ORDERS, "customers.csv": "customer_id\n1\n", "products.csv": "product_id\nA\n"}
        for name, text in {**files, "controls.csv": controls}.items():
            (tmp_path / name).write_text(text)
        data = {"data_dir": str(tmp_path / "data"), "source_dir": str(tmp_path), "settle_seconds": 0}
        return small(**data | values)

    return make


@THOROUGH
def test_figures_that_agree_are_published_and_shown(
    shop: Callable[..., DataPipelineConfig], spark: SparkSession
) -> None:
    """The lines of an order are one order; a month and its days; returns in either sign; a month without any order."""
    controls = (
        "period,orders,revenue,returns\n2026-01,2,60.50,0\n2026-01-05,1,30.50,\n2026-02,,5.25,-5.25\n2025-12,0,0,0\n"
    )
    config = shop(controls)
    first = run_pipeline(config, spark)
    assert first.controls is not None
    assert first.controls == {
        "figures": ["orders", "revenue", "returns"], "first": "2025-12", "last": "2026-02", "since": first.started_at,
    }  # fmt: skip
    assert (first.orders, first.revenue, first.returns, first.refunds, first.net_revenue) == (
        3, Decimal("65.75"), 1, Decimal("5.25"), Decimal("60.50"),
    )  # fmt: skip
    zeros = {"orders": 0, "revenue": 0, "refunds": 0}
    assert first.weeks == (
        [
            {"week": date(2026, 1, 5), "orders": 1, "revenue": Decimal("30.50"), "refunds": 0},
            {"week": "2026-01-12", **zeros},
            {"week": "2026-01-19", **zeros},
            {"week": date(2026, 1, 26), "orders": 2, "revenue": Decimal("35.25"), "refunds": 0},
            {"week": date(2026, 2, 2), "orders": 0, "revenue": 0, "refunds": Decimal("5.25")},
        ],
        None,
    )
    later = started_run(
        config, spark, dataclasses.replace(first, started_at="2099-01-01T00:00:00+00:00", controls=None)
    )
    check_controls(later, open_source(config).controls)
    assert later.record.controls == first.controls, "they have agreed since the first run"
    read_back = Store(first.data_dir).runs.get(first.run_id)
    assert isinstance(read_back, RunRecord)
    page = re.sub(r"<[^>]+>", "", html_report([read_back], read_back))
    assert "Orders, revenue, returns agree with the shop's own report from 2025-12 to 2026-02" in page
    assert "agree with the shop's own report from 2025-12 to 2026-02." in job_summary(read_back)
    with open_tables(first.data_dir) as db:
        found = db.sql("SELECT customer_id, full_name, total_orders, total_spent, is_inferred FROM customers_enriched")
        assert found.order("customer_id").fetchall() == [
            (0, "Unknown", 1, Decimal("30.00"), True),
            (1, "Unknown", 1, Decimal("30.50"), False),
            (7, "Unknown", 1, Decimal("5.25"), True),
        ]


@THOROUGH
def test_each_figure_that_differs_is_named(shop: Callable[..., DataPipelineConfig], spark: SparkSession) -> None:
    """Also where nothing is there for a period; a tolerance is a share of the shop's figure."""
    config = shop("Period;Revenue;Orders;Returns\n2026-01;60.51;3;\n2026-02;5.25;1;6\n2026-03-01;0.01;;\n")
    with pytest.raises(NotPublishedError) as failure:
        run_pipeline(config, spark)
    assert failure.value.exit_code == 3
    message = str(failure.value)
    assert message.startswith("CONTROL TOTALS DIFFER, nothing is published: ")
    differences = re.findall(r"(\S+ \w+): (\S+) in controls.csv, (\S+) in the tables", message)
    assert sorted(differences) == [
        ("2026-01 orders", "3", "2"), ("2026-01 revenue", "60.51", "60.50"), ("2026-02 returns", "6", "5.25"),
        ("2026-03-01 revenue", "0.01", "0"),
    ]  # fmt: skip
    store = Store(config.root)
    [(_, record)] = store.runs.all()
    assert isinstance(record, RunRecord) and store.published() is None
    refused = started_run(config, spark, record)
    controls = [("2026-01", "revenue", Decimal("61.00"))]
    config.control_tolerance = 0.008
    with pytest.raises(NotPublishedError, match="CONTROL TOTALS DIFFER"):
        check_controls(refused, controls)
    config.control_tolerance = 0.009
    check_controls(refused, controls)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("period,revenue\nJanuary,1\n", "row 1 is January, 1: give a period such as 2026-01"),
        ('period,revenue\n2026-01,1\n2026-02,"1,000.00"\n', "row 2 is 2026-02, 1,000.00: "),
        ("period,revenue\n2026-01,1,000.00\n", "row 1 is 2026-01, 1, ['000.00']: "),
        ("period,revenue\n2026-01,\n", "row 1 is 2026-01, : "),
        ("revenue,period\n1\n", "row 1 is , 1: "),
        (
            "period,revenue,retruns\n2026-01,1,2\n",
            "has the columns period, revenue, retruns and 1 rows: it needs period",
        ),
        ("month,revenue\n2026-01,1\n", "has the columns month, revenue and 1 rows"),
        ("period,revenue\n", "has the columns period, revenue and 0 rows"),
        ("", "has the columns none and 0 rows"),
        ("period,revenue,Revenue\n2026-01,1,2\n", "cannot be read: two columns are called revenue"),
    ],
)
def test_controls_that_cannot_be_read_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "controls.csv").write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        read_controls(str(tmp_path / "controls.csv"), DataPipelineConfig())


def test_controls_of_a_spreadsheet(tmp_path: Path) -> None:
    commas = DataPipelineConfig(source_decimal=",")
    (tmp_path / "controls.csv").write_text("\ufeffPeriod;Revenue\r\n2026-01;1000,50\r\n", newline="")
    assert read_controls(str(tmp_path / "controls.csv"), commas) == [("2026-01", "revenue", Decimal("1000.50"))]
    assert read_controls(str(tmp_path / "none.csv"), commas) == []
    (tmp_path / "controls.csv").write_text("period;revenue\n'2026-01';'1,5'\n")
    quoted = read_controls(str(tmp_path / "controls.csv"), DataPipelineConfig(source_decimal=",", source_quote="'"))
    assert quoted == [("2026-01", "revenue", Decimal("1.5"))]
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigurationError, match=r"folder\.csv cannot be read: .*Is a directory"):
        read_controls(str(tmp_path / "folder.csv"), commas)
    (tmp_path / "controls.csv").write_text("period;revenue\n2026-01;1000.50\n")
    with pytest.raises(ConfigurationError, match=r"row 1 is 2026-01, 1000\.50: "):
        read_controls(str(tmp_path / "controls.csv"), commas)
    (tmp_path / "controls.csv").write_text("period\trevenue\r\n2026-01\t5\r\n", encoding="utf-16", newline="")
    assert read_controls(str(tmp_path / "controls.csv"), DataPipelineConfig()) == [("2026-01", "revenue", Decimal(5))]
    (tmp_path / "controls.csv").write_bytes(b"period,revenue\n\xff\n")
    with pytest.raises(ConfigurationError, match=r"controls\.csv cannot be read: .*; save it as CSV in UTF-8"):
        read_controls(str(tmp_path / "controls.csv"), DataPipelineConfig())
