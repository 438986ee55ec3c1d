from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest
from compare_runs import differences
from conftest import THOROUGH, one, open_tables
from pyspark.sql import SparkSession

from data_pipeline import TABLES, DataPipelineConfig, RunRecord, Store, run_pipeline, tables

GOLD = [table.name for table in tables("gold")]


def test_layout(report: RunRecord) -> None:
    for table in TABLES.values():
        files = list(Path(report.data_dir, table.layer, table.name).glob("*.parquet"))
        assert len(files) == 1 if table.layer == "gold" else files
    assert report.data_dir.startswith("/")


def test_report_counts_what_was_written(db: duckdb.DuckDBPyConnection, report: RunRecord) -> None:
    for name, rows in report.rows.items():
        layer, table = name.split(".")
        view = f"{layer}_{table}" if layer in ("bronze", "quarantine") else table
        assert one(db, f"SELECT count(*) FROM {view}") == rows
    assert len(report.rows) == len(TABLES) + 3


def test_every_row_is_accounted_for(db: duckdb.DuckDBPyConnection, report: RunRecord) -> None:
    for table, quality in report.quality.items():
        assert quality.received == one(db, f"SELECT count(*) FROM bronze_{table}")
        assert quality.quarantined == one(db, f"SELECT count(*) FROM quarantine_{table}")
        assert quality.received == quality.accepted + quality.quarantined + quality.duplicates
        assert quality.unreconciled == 0
    assert report.quality["customers"].accepted == one(db, "SELECT count(*) FROM customers_enriched")
    assert report.quality["transactions"].accepted >= one(db, "SELECT count(*) FROM transactions_clean")
    assert report.quality["transactions"].quarantined > 0


def test_reasons_in_quarantine_are_those_reported(db: duckdb.DuckDBPyConnection, report: RunRecord) -> None:
    reasons = db.sql("SELECT unnest(_reasons), count(*) FROM quarantine_transactions GROUP BY 1").fetchall()
    counted = {rule: rows for rule, rows in report.quality["transactions"].violations.items() if rows}
    assert counted.pop("payment_method_untidy") > 0, "a warning, which quarantine does not know"
    assert dict(reasons) == counted


def test_revenue_is_the_same_to_the_cent_everywhere(db: duckdb.DuckDBPyConnection) -> None:
    revenue = one(db, "SELECT sum(total_spent) FROM customers_enriched")
    assert revenue > 0
    for column, table in (
        ("amount", "transactions_clean"),
        ("total_revenue", "category_analytics"),
        ("total_amount", "payment_analytics"),
        ("total_revenue", "device_analytics"),
        ("segment_revenue", "customer_analytics"),
    ):
        assert one(db, f"SELECT sum({column}) FROM {table}") == revenue, table


def test_keys_are_unique_and_never_null(db: duckdb.DuckDBPyConnection) -> None:
    for table in (*tables("silver"), *tables("gold")):
        key = ", ".join(table.key)
        nulls = " OR ".join(f"{column} IS NULL" for column in table.key)
        assert one(db, f"SELECT count(*) FROM (SELECT DISTINCT {key} FROM {table.name})") == one(
            db, f"SELECT count(*) FROM {table.name}"
        )
        assert one(db, f"SELECT count(*) FROM {table.name} WHERE {nulls}") == 0


def test_foreign_keys_resolve(db: duckdb.DuckDBPyConnection) -> None:
    clean = "SELECT count(*) FROM transactions_clean WHERE"
    assert one(db, f"{clean} customer_id NOT IN (SELECT customer_id FROM customers_enriched)") == 0
    assert one(db, f"{clean} product_id NOT IN (SELECT product_id FROM bronze_products)") == 0
    assert one(db, f"{clean} product_category IS NULL") == 0


@pytest.mark.parametrize("table", GOLD)
def test_gold_equals_its_recomputation_from_bronze(table: str, db: duckdb.DuckDBPyConnection) -> None:
    if not db.sql("SELECT 1 FROM duckdb_tables() WHERE table_name = 'sale'").fetchall():
        db.execute(Path(__file__).with_name("gold_from_bronze.sql").read_text())
    ours, expected = f"SELECT * FROM {table}", f"SELECT * FROM expected_{table}"
    assert one(db, f"SELECT count(*) FROM ({ours})") > 1
    assert db.sql(f"({ours}) EXCEPT ALL ({expected})").fetchall() == []
    assert db.sql(f"({expected}) EXCEPT ALL ({ours})").fetchall() == []


def test_gold_is_sorted_for_its_reader(db: duckdb.DuckDBPyConnection) -> None:
    segments = [row[0] for row in db.sql("SELECT customer_segment FROM customer_analytics").fetchall()]
    assert list(dict.fromkeys(segments)) == ["Premium", "Gold", "Silver", "Bronze"]
    revenue = [row[0] for row in db.sql("SELECT total_revenue FROM category_analytics").fetchall()]
    assert revenue == sorted(revenue, reverse=True)


@THOROUGH
def test_second_run_gives_the_same_data(published: DataPipelineConfig, spark: SparkSession) -> None:
    """By the session of the process, in a thread where it is not the active one; it is left running, as it was set.

    Neither the partitions matter nor what the session is set to: ANSI mode, and timestamps without a zone.
    """
    first = Store(published.root).published()
    ansi = spark.conf.get("spark.sql.ansi.enabled") or "false"
    settings = {"spark.sql.ansi.enabled": str(ansi != "true").lower(), "spark.sql.timestampType": "TIMESTAMP_NTZ"}
    for name, value in settings.items():
        spark.conf.set(name, value)
    published.shuffle_partitions = 3
    try:
        with ThreadPoolExecutor(1) as other_thread:
            second = other_thread.submit(run_pipeline, published).result()
        assert {name: spark.conf.get(name) for name in settings} == settings
    finally:
        spark.conf.set("spark.sql.ansi.enabled", ansi)
        spark.conf.set("spark.sql.timestampType", "TIMESTAMP_LTZ")
    assert second.result == "succeeded"
    snapshots = Path(published.root, "snapshots")
    assert differences(snapshots / str(first), snapshots / second.run_id) == []
    assert Store(published.root).published() == second.run_id > str(first)
    assert spark.range(3).count() == 3
    assert not [table.name for table in spark.catalog.listTables() if table.name.startswith("transactions_clean")]


@pytest.mark.parametrize(
    ("customers", "transactions", "products"),
    [(0, 0, 0), pytest.param(20, 0, 5, marks=THOROUGH), pytest.param(1, 50, 1, marks=THOROUGH)],
)
def test_empty_tables(
    customers: int, transactions: int, products: int, spark: SparkSession, small: Callable[..., DataPipelineConfig]
) -> None:
    config = small(num_customers=customers, num_transactions=transactions, num_products=products)
    report = run_pipeline(config, spark)
    assert report.rows["bronze.transactions"] == transactions
    assert report.rows["silver.customers_enriched"] == customers
    with open_tables(report.data_dir) as db:
        for table in GOLD:
            assert one(db, f"SELECT count(*) FROM {table}") == report.rows[f"gold.{table}"]
        assert one(db, "SELECT coalesce(sum(customer_count), 0) FROM customer_analytics") == customers


def test_log_tells_the_story(logged_run: tuple[RunRecord, str], config: DataPipelineConfig) -> None:
    _, log = logged_run
    positions = [
        log.index(line)
        for line in (
            "STARTING DATA PIPELINE EXECUTION",
            "BRONZE LAYER: Raw Data Ingestion",
            "/bronze/customers (2,000 rows, ",
            "SILVER LAYER: Data Cleansing and Enrichment",
            "transactions: 10,000 received = ",
            "✓ Saved transactions_clean to: ",
            "GOLD LAYER: Business Aggregations",
            "AUDIT: rows, keys and revenue add up",
            "PIPELINE EXECUTION COMPLETED SUCCESSFULLY",
            f"The data lies in {config.root}",
        )
    ]
    assert positions == sorted(positions)
