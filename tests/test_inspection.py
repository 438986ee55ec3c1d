"""DuckDB and the engine of the session give the same answers on the same snapshot."""

from __future__ import annotations

import copy
import dataclasses
import os
import signal
import threading
import time
from typing import Any

import duckdb
import pytest
from conftest import one
from pyspark.sql import SparkSession
from test_gate import started_run

import data_pipeline
from data_pipeline import (
    SNAPSHOT_TABLES,
    DataPipelineConfig,
    Run,
    RunRecord,
    answer_by_duckdb,
    answer_queries,
    audit,
    audit_query,
    example_rows,
    profile,
    summarize,
    tables,
)


@pytest.fixture
def run(config: DataPipelineConfig, spark: SparkSession, report: RunRecord) -> Run:
    return started_run(config, spark, copy.deepcopy(report))


@pytest.fixture
def by_engine(monkeypatch: pytest.MonkeyPatch, run: Run) -> Run:
    """A run of which the engine answers all queries: its tables are too large for DuckDB."""

    def fail(*_: Any) -> None:
        raise AssertionError("DuckDB was asked")

    monkeypatch.setattr(data_pipeline, "DUCKDB_ROWS", -1)
    monkeypatch.setattr(data_pipeline, "answer_by_duckdb", fail)
    return run


def test_audit_of_the_engine(by_engine: Run, report: RunRecord) -> None:
    """Its figures are those of DuckDB, with which the audit passes, and finds missing rows."""
    queries = {(layer, table): audit_query(layer, table) for layer, table in SNAPSHOT_TABLES}
    from_files = answer_by_duckdb(by_engine.snapshot, queries)
    from_engine = answer_queries(by_engine, queries)
    assert set(from_files) == set(from_engine)
    for key, [row] in from_engine.items():
        [expected] = from_files[key]
        assert list(row.values()) == list(expected.values()), key

    by_engine.record.revenue = None
    by_engine.record.sha256 = {}
    audit(by_engine)
    assert (by_engine.record.revenue, by_engine.record.sha256) == (report.revenue, report.sha256)
    by_engine.record.rows["silver.products_active"] += 1
    with pytest.raises(data_pipeline.NotPublishedError, match=r"silver\.products_active: .* rows were written"):
        audit(by_engine)


def test_summaries_are_the_same(by_engine: Run, report: RunRecord) -> None:
    by_engine.record.previews, by_engine.record.summaries = {}, {}
    summarize(by_engine)
    assert by_engine.record.previews == report.previews
    assert by_engine.record.summaries == report.summaries
    assert by_engine.engine.spark.catalog.listTables() == [], "no view is left in the session"


def test_profile_is_the_same_but_for_distinct_values(by_engine: Run, report: RunRecord) -> None:
    by_engine.record.profile = {}
    profile(by_engine, tables("bronze"))
    for table in tables("bronze"):
        for name, found in by_engine.record.profile[table.name].items():
            expected = dict(report.profile[table.name][name])
            assert expected.pop("distinct_is_exact") and not found.pop("distinct_is_exact")
            assert found.pop("distinct") == pytest.approx(expected.pop("distinct"), rel=0.15)
            expected.pop("duplicates", None)  # of the key, from the search for them
            assert found == expected


def test_examples_are_the_same(by_engine: Run, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in tables("bronze"):
        for where in ("true", "array_contains(_reasons, 'amount_missing')"):
            answers = example_rows(by_engine, table, where)
            with monkeypatch.context() as undone:
                undone.setattr(data_pipeline, "DUCKDB_ROWS", 1_000_000)
                undone.setattr(data_pipeline, "answer_by_duckdb", answer_by_duckdb)
                assert example_rows(run, table, where) == answers
            assert len(answers) == (3 if table.name == "transactions" else 0)


def test_who_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    orders, customers = "SELECT 1 FROM bronze.transactions", "SELECT 1 FROM bronze.customers"
    assert data_pipeline.is_read_by_duckdb(run, orders)
    with monkeypatch.context() as patch:
        patch.setattr(data_pipeline, "DUCKDB_ROWS", run.record.rows["bronze.transactions"] - 1)
        assert not data_pipeline.is_read_by_duckdb(run, orders)
        assert data_pipeline.is_read_by_duckdb(run, customers)
    monkeypatch.setattr(run.engine, "shares_storage", True)
    assert not data_pipeline.is_read_by_duckdb(run, customers), "a cluster"


def test_folder_with_quotes(run: Run, config: DataPipelineConfig, tmp_path: Any) -> None:
    odd = tmp_path / 'it\'s "a" folder; --'
    (odd / "snapshots").mkdir(parents=True)
    (odd / "snapshots" / run.record.run_id).symlink_to(run.snapshot.path())
    snapshot = data_pipeline.Snapshot(data_pipeline.Store(str(odd)), run.record.run_id)
    [row] = answer_by_duckdb(snapshot, {0: "SELECT count(*) AS n FROM gold.device_analytics"})[0]
    assert row["n"] == run.record.rows["gold.device_analytics"]


def test_interrupt_ends_the_queries(run: Run) -> None:
    """One that takes a minute, so that the signal comes while the main thread waits."""
    sales = "silver.transactions_clean"
    query = f"SELECT count(*) FROM {sales} a, {sales} b, range(500) c WHERE a.amount * b.amount > c.range"
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        answer_by_duckdb(run.snapshot, {0: query})
    assert time.monotonic() - started < 5


def test_report_says_whether_distinct_values_are_exact(report: RunRecord, db: duckdb.DuckDBPyConnection) -> None:
    exact = one(db, "SELECT count(DISTINCT customer_id) FROM bronze_transactions")
    assert report.profile["transactions"]["customer_id"]["distinct"] == exact
    assert '<th scope="col">distinct</th>' in data_pipeline.html_report([report], report)
    about = copy.deepcopy(report.profile)
    for column in about["customers"].values():
        column["distinct_is_exact"] = False
    page = data_pipeline.html_report([dataclasses.replace(report, profile=about)], report)
    assert '<th scope="col">distinct, about</th>' in page
