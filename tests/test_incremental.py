"""Incremental runs: what has arrived, proven equal to a full refresh over the same bronze."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from compare_runs import differences
from conftest import ENGINE, THOROUGH, open_tables
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

import data_pipeline
from data_pipeline import (
    Base,
    ConfigurationError,
    DataPipelineConfig,
    LandedFiles,
    NotPublishedError,
    PipelineError,
    Received,
    Run,
    RunRecord,
    Store,
    audit_again,
    open_source,
    roll_back,
    run_pipeline,
)

Small = Callable[..., DataPipelineConfig]
FIRST = date(2026, 3, 1)
# `NIGHTS=30 HISTORIES=50` is more than the checks have time for.
HEADERS = {
    "customers": "customer_id,first_name,last_name,city,signup_date",
    "products": "product_id,product_name,category,price,stock_quantity,supplier,created_date,is_active",
    "transactions": "transaction_id,customer_id,product_id,quantity,amount,timestamp,payment_method,status",
}


def customer(choose: random.Random) -> str:
    key = choose.choice(["", *"123456"]) if choose.random() < 0.2 else choose.choice("12345")
    return f"{key},{choose.choice('AB')},X,Ulm,2025-01-0{choose.randrange(1, 4)}"


def product(choose: random.Random) -> str:
    key = choose.choice(["P1", "P2", "P3", "P4", ""])
    return f"{key},N,{choose.choice('HG')},5,{choose.choice(['5', '0', ''])},S,2024-01-0{choose.randrange(1, 6)},true"


def order(choose: random.Random) -> str:
    key = "" if choose.random() < 0.1 else f"T{choose.randrange(1, 30)}"
    quantity, amount = choose.choice([("1", "3.00")] * 5 + [("2", "4.00"), ("-1", "-3.00"), ("1", "-1.00"), ("1", "")])
    moment = datetime(2026, 1, 20) + timedelta(days=choose.randrange(0, 46), minutes=choose.randrange(0, 3))
    status = choose.choice(["completed"] * 5 + ["pending", "refunded", "lost"])
    # The same product for most records of an order: otherwise all are conflicts.
    item = f"P{hash(key) % 4 + 1}" if choose.random() < 0.9 else choose.choice(["P1", "P9", ""])
    return f"{key},{choose.choice(['1', '2', '3', '6', ''])},{item},{quantity},{amount},{moment},paypal,{status}"


RECORDS = {"customers": customer, "products": product, "transactions": order}


class Shop:
    """A folder of exports, and the data folder of the runs that read it."""

    def __init__(self, config: DataPipelineConfig, spark: SparkSession) -> None:
        self.config = config
        self.spark = spark
        self.source = Path(str(config.source_dir))

    def land(self, table: str, name: str, *records: str) -> Path:
        path = self.source / table / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([HEADERS[table], *records, ""]))
        return path

    def run(self, days: int = 0, **values: Any) -> RunRecord:
        config = dataclasses.replace(self.config, as_of_date=FIRST + timedelta(days=days), **values)
        return run_pipeline(config, self.spark)

    def rows(self, sql: str) -> list[Any]:
        with open_tables(self.config.root) as db:
            return db.sql(sql).fetchall()


@pytest.fixture
def shop(small: Small, spark: SparkSession, tmp_path: Path) -> Shop:
    (tmp_path / "exports").mkdir()
    return Shop(new_config(small, tmp_path), spark)


def new_config(small: Small, folder: Path) -> DataPipelineConfig:
    return small(
        data_dir=str(folder / "data"), source_dir=str(folder / "exports"), settle_seconds=0, max_quarantine_rate=1.0
    )


def first_night(shop: Shop) -> RunRecord:
    shop.land("customers", "1", "1,Ada,X,Ulm,2025-01-01", "2,Bob,X,Ulm,2025-01-01")
    shop.land("products", "1", "P1,N,H,5,5,S,2024-01-01,true", "P2,N,G,5,5,S,2024-01-01,true")
    shop.land(
        "transactions", "1",
        "T1,1,P1,1,3.00,2026-01-20 10:00:00,paypal,completed", "T2,2,P2,1,4.00,2026-02-20 10:00:00,paypal,completed",
        "T3,9,P9,1,5.00,2026-02-21 10:00:00,paypal,completed", "T4,1,P1,1,6.00,2026-03-02 10:00:00,paypal,completed",
    )  # fmt: skip
    return shop.run()


def history(shop: Shop, seed: int) -> Iterator[RunRecord]:
    """Runs four nights of random deliveries, each of which is compared with a full refresh."""
    choose, day = random.Random(seed), 0
    shop.config.orphans = choose.choice(["keep", "reject"])
    landed: list[Path] = []
    for night in range(4):
        for table, make in RECORDS.items():
            if night == 0 or choose.random() < 0.7:
                most = 25 if table == "transactions" else 5
                records = [make(choose) for _ in range(choose.randrange(1, most))]
                landed.append(shop.land(table, str(night), *records))
        values: dict[str, Any] = {}
        if night and choose.random() < 0.3:  # a delivery that is repeated, with another order of its records
            path = choose.choice(landed)
            if path.exists():
                _, *records = path.read_text().splitlines()
                shop.land(path.parent.name, f"{night}-again", *reversed(records))
        if night and choose.random() < 0.3:  # an export that overwrites its file
            path = choose.choice(landed)
            shop.land(path.parent.name, path.stem, *(RECORDS[path.parent.name](choose) for _ in range(5)))
        if night and choose.random() < 0.3:
            choose.choice(landed).unlink(missing_ok=True)
        if night and choose.random() < 0.3 and (present := [path for path in landed[:3] if path.exists()]):
            values["reread"] = str(choose.choice(present).relative_to(shop.source))
        yield shop.run(day, verify_incremental=True, **values)
        day += choose.randrange(0, 3)


def check_history(small: Small, spark: SparkSession, folder: Path, seed: int) -> list[str]:
    """Runs a history, and compares its last night with a full refresh once more, by DuckDB. Returns kinds of runs."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "exports").mkdir(parents=True)
    shop = Shop(new_config(small, folder), spark)
    records = list(history(shop, seed))
    shutil.copytree(shop.config.root, folder / "full", symlinks=True)
    as_of = date.fromisoformat(str(records[-1].config["as_of_date"]))
    full = dataclasses.replace(shop.config, data_dir=str(folder / "full"), as_of_date=as_of, full_refresh=True)
    refreshed = run_pipeline(full, spark)
    assert differences(shop.config.root, full.root) == []
    assert refreshed.quality == records[-1].quality
    for name in ("rows", "revenue", "orders", "returns", "refunds", "previews", "summaries"):
        if records[-1].kind == "incremental":
            assert getattr(refreshed, name) == getattr(records[-1], name), name
    return [record.kind for record in records]


@pytest.mark.slow
@THOROUGH
@settings(
    max_examples=int(os.environ.get("HISTORIES", "1")), deadline=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(seed=st.integers(min_value=1, max_value=10**6))
def test_any_history_equals_a_full_refresh(small: Small, spark: SparkSession, tmp_path: Path, seed: int) -> None:
    assert "incremental" in check_history(small, spark, tmp_path, seed)


# What each clause is about, on top of the first night: a delivery that would be computed wrongly without the clause.
CLAUSES: dict[str, dict[str, str]] = {
    "arrived": {"transactions": "T1,1,P1,1,3.00,2026-01-20 11:00:00,paypal,refunded"},
    "quarantine": {},
    "customers": {"customers": "9,New,X,Ulm,2025-01-01"},
    "products": {"products": "P2,N,H,5,5,S,2024-01-02,true"},
}


@pytest.mark.parametrize("clause", [pytest.param(clause, marks=THOROUGH) for clause in CLAUSES])
def test_no_clause_of_affected_can_be_left_out(clause: str, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    first_night(shop)
    for table, line in CLAUSES[clause].items():
        shop.land(table, "2", line)
    real = data_pipeline.affected_rows

    def without(run: Run, base: Base, bronze: dict[str, Received]) -> dict[str, DataFrame]:
        rows = real(run, base, bronze)
        del rows[clause]
        return rows

    published = Store(shop.config.root).published()
    with monkeypatch.context() as patch:
        patch.setattr(data_pipeline, "affected_rows", without)
        with pytest.raises(NotPublishedError, match=r"VERIFICATION FAILED, nothing is published: .* differ") as failure:
            shop.run(days=2, verify_incremental=True)
    assert failure.value.exit_code == 3
    assert Store(shop.config.root).published() == published
    record = shop.run(days=2, verify_incremental=True)
    assert (record.kind, record.result) == ("incremental", "succeeded")


@pytest.mark.slow
def test_figures_of_a_night(shop: Shop) -> None:
    """Worked out by hand: T1 and T2 are 7.00; T3 is of unknown parents, 5.00; T4 is still in the future, 6.00."""
    first = first_night(shop)
    assert (str(first.revenue), first.kind) == ("12.00", "full")
    assert first.quality["transactions"].violations["timestamp_in_future"] == 1
    shop.land("customers", "2", "9,Cy,X,Bonn,2025-01-01")
    shop.land("products", "2", "P2,N,H,5,5,S,2024-01-02,true")
    shop.land(
        "transactions", "2",
        "T1,1,P1,1,3.00,2026-01-20 11:00:00,paypal,refunded", "T5,2,P1,1,7.00,2026-03-01 10:00:00,paypal,completed",
    )  # fmt: skip
    night = shop.run(days=1, verify_incremental=True)
    # 12.00 - T1 3.00 + T4 6.00 + T5 7.00
    assert (str(night.revenue), night.kind, night.affected_keys) == ("22.00", "incremental", 5)
    quality = night.quality["transactions"]
    assert (quality.received, quality.accepted, quality.quarantined, quality.duplicates) == (6, 5, 0, 1)
    arrived = night.arrived["transactions"]
    assert (arrived.received, arrived.accepted, arrived.quarantined, arrived.duplicates) == (2, 2, 0, 0)
    assert {name: found.received for name, found in night.arrived.items()} == {
        "customers": 1, "products": 1, "transactions": 2,
    }  # fmt: skip
    assert shop.rows("SELECT transaction_id, product_category FROM transactions_clean ORDER BY 1") == [
        ("T2", "H"), ("T3", "Unknown"), ("T4", "H"), ("T5", "H"),
    ]  # fmt: skip
    assert shop.rows("SELECT first_name, is_inferred FROM customers_enriched WHERE customer_id = 9") == [("Cy", False)]
    # Rows keep the run that has received them.
    assert shop.rows("SELECT _run_id, count(*) FROM bronze_transactions GROUP BY 1 ORDER BY 1") == [
        (first.run_id, 4), (night.run_id, 2),
    ]  # fmt: skip
    deliveries = shop.rows("SELECT max(_delivery) FILTER (_run_id = $$" + first.run_id + "$$) < min(_delivery) FILTER "
                           "(_run_id = $$" + night.run_id + "$$) FROM bronze_transactions")  # fmt: skip
    assert deliveries == [(True,)]


def months(config: DataPipelineConfig) -> dict[str, int]:
    """The number of links to the file of each month."""
    folder = Path(config.root, "silver/transactions_clean")
    return {path.name[:7]: path.stat().st_nlink for path in sorted(folder.glob("*.parquet"))}


@THOROUGH
def test_months_without_an_affected_order_are_linked(shop: Shop) -> None:
    first_night(shop)
    assert months(shop.config) == {"2026-01": 1, "2026-02": 1}
    shop.land("transactions", "2", "T2,2,P2,1,4.00,2026-02-20 11:00:00,paypal,refunded")
    record = shop.run()
    assert months(shop.config) == {"2026-01": 2, "2026-02": 1}
    assert record.months == {"written": 1, "linked": 1}
    # Nothing is left of a month that has become empty.
    shop.land("transactions", "3", "T1,1,P1,1,3.00,2026-01-20 12:00:00,paypal,cancelled")
    shop.run()
    assert months(shop.config) == {"2026-02": 2}
    files = Path(shop.config.root, "current/").rglob("*.parquet")
    assert {path.stat().st_mode & 0o777 for path in files} == {0o444}
    # Snapshots that expire do not take away the files that others link.
    for night in range(4, 8):
        shop.land("transactions", str(night), f"T{night * 10},1,P1,1,1.00,2026-02-0{night} 10:00:00,paypal,completed")
        shop.run(keep_snapshots=1)
    assert len(Store(shop.config.root).snapshots()) == 1
    assert shop.rows("SELECT sum(amount) FROM transactions_clean")[0][0] == 9


@THOROUGH
def test_nothing_arrived(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    first = first_night(shop)
    monkeypatch.setattr(data_pipeline.Engine, "start", None)  # no engine is needed
    record = shop.run()
    assert (record.kind, record.result, record.received) == ("unchanged", "succeeded", 0)
    assert (record.revenue, record.rows) == (first.revenue, first.rows)
    assert Store(shop.config.root).published() == first.run_id
    assert f"run {record.run_id}" in Path(shop.config.root, "report.html").read_text()
    assert "data_pipeline_last_success_timestamp_seconds" in Path(shop.config.root, "metrics.prom").read_text()


@THOROUGH
def test_file_that_is_touched_copied_overwritten_or_gone(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first_night(shop)
    orders = shop.source / "transactions/1.csv"
    os.utime(orders)
    assert shop.run().kind == "unchanged"
    shutil.copy(orders, orders.with_name("copy.csv"))
    assert shop.run().rows["bronze.transactions"] == 4
    assert "transactions/copy.csv is left out: it has the same content as transactions/1.csv" in caplog.text
    caplog.clear()
    assert shop.run().kind == "unchanged", "the copy is known too"
    shop.land("transactions", "1", "T9,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    record = shop.run()
    assert record.rows["bronze.transactions"] == 5, "an export that overwrites its file is a new delivery"
    assert "transactions/1.csv has other content than run" in caplog.text
    orders.unlink()
    orders.with_name("copy.csv").unlink()
    shop.land("transactions", "2", "T8,1,P1,1,8.00,2026-02-01 10:00:00,paypal,completed")
    record = shop.run()
    assert record.rows["bronze.transactions"] == 6
    assert "Files that were read before and are gone: transactions/1.csv, transactions/copy.csv" in caplog.text
    with pytest.raises(
        NotPublishedError, match=r"would lose the rows of .*: transactions/1\.csv, transactions/copy"
    ) as e:
        shop.run(reload=True)
    assert e.value.exit_code == 3
    assert shop.run(reload=True, accept_missing_files=True).rows["bronze.transactions"] == 1


@THOROUGH
def test_reread_replaces_what_a_file_gave(shop: Shop) -> None:
    first_night(shop)
    shop.land("transactions", "2", "T9,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    shop.run()
    shop.land("transactions", "1", "T1,1,P1,1,30.00,2026-01-20 10:00:00,paypal,completed")
    record = shop.run(reread="transactions/1*", verify_incremental=True)
    assert record.kind == "incremental"
    assert shop.rows("SELECT transaction_id, amount FROM transactions_clean ORDER BY 1") == [("T1", 30), ("T9", 9)]
    assert record.quality["transactions"].received == 2
    with pytest.raises(ConfigurationError, match="reread names no file"):
        shop.run(reread="orders/*")
    (shop.source / "transactions/1.csv").write_text("x\n1\n")
    with pytest.raises(NotPublishedError, match=r"transactions/1\.csv cannot be read, nothing is published"):
        shop.run(reread="transactions/1*", on_bad_file="quarantine")


@THOROUGH
def test_file_that_gets_its_old_content_again_is_the_latest_version(shop: Shop) -> None:
    first_night(shop)
    lines = [f"T1,1,P1,1,{amount},2026-01-20 10:00:00,paypal,completed" for amount in ("3.50", "4.50", "3.50")]
    for line in lines:
        shop.land("transactions", "changing", line)
        shop.run()
    assert shop.rows("SELECT amount FROM transactions_clean WHERE transaction_id = 'T1'") == [(Decimal("3.50"),)]


@THOROUGH
def test_files_that_were_moved_away_count_for_the_engine(shop: Shop) -> None:
    first = first_night(shop)
    for path in shop.source.rglob("*.csv"):
        path.unlink()
    source, _, engine = data_pipeline.preflight(shop.config, shop.spark)
    assert sum(source.expected_rows.values()) < engine.expected_rows == first.received


@THOROUGH
def test_rollback_gives_back_what_had_arrived(shop: Shop) -> None:
    first = first_night(shop)
    shop.land("transactions", "2", "T9,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    night = shop.run()
    audit_again(store := Store(shop.config.root), night.run_id)
    roll_back(store, first.run_id, 0)
    again = shop.run()
    assert (again.kind, again.rows, again.revenue) == ("incremental", night.rows, night.revenue)


@THOROUGH
def test_run_that_fails_changes_nothing(shop: Shop) -> None:
    first = first_night(shop)
    shop.land("transactions", "2", "T9,1,P1,1,9.00,2026-02-01 10:00:00,paypal,lost")
    with pytest.raises(
        NotPublishedError,
        match=r"1 of 1 rows that arrived are .*, transactions/2",
    ):
        shop.run(max_quarantine_rate=0.5)
    assert Store(shop.config.root).published() == first.run_id
    assert shop.run().arrived["transactions"].quarantined == 1


@THOROUGH
def test_other_settings_rules_and_dates_compute_every_key(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    first_night(shop)
    caplog.set_level("INFO")
    assert shop.run(orphans="reject").kind == "full"
    assert "Full refresh of all keys: changed settings: orphans" in caplog.text
    assert shop.rows("SELECT transaction_id FROM transactions_clean ORDER BY 1") == [("T1",), ("T2",)]
    shop.run(days=1, orphans="reject")
    assert shop.run(orphans="reject").kind == "full"
    assert "Full refresh of all keys: the as-of date has moved back from 2026-03-02" in caplog.text
    (shop.source / "transactions.sql").write_text("SELECT * FROM transactions -- as they are")
    assert shop.run(orphans="reject").kind == "full"
    assert "Full refresh of all keys: the models have changed" in caplog.text
    (shop.source / "controls.csv").write_text("period,orders\n2026-01,2\n")
    with pytest.raises(NotPublishedError, match=r"2026-01 orders: 2 in controls\.csv, 1 in the tables"):
        shop.run(orphans="reject")
    (shop.source / "controls.csv").unlink()
    state = Path(shop.config.root, "current/_state.json")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"pipeline": "another"}))
    assert shop.run(orphans="reject").kind == "full"
    assert "Full refresh of all keys: the pipeline is another version" in caplog.text


@pytest.mark.slow
@THOROUGH
def test_rules_in_incremental_runs(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """Another rule is a full refresh, by itself; so is another day, if a rule reads the as-of date."""
    caplog.set_level("INFO", logger="data_pipeline")
    rules = shop.source / "transactions.rules.yml"
    kept = "SELECT transaction_id FROM transactions_clean ORDER BY 1"
    rules.write_text("- {name: dear, violation: amount > 4}")
    first = first_night(shop)
    assert first.quality["transactions"].violations["dear"] == 2
    assert shop.rows(kept) == [("T1",), ("T2",)]
    assert shop.run().kind == "unchanged"
    shop.land("transactions", "2", "T5,1,P1,1,2.00,2026-03-01 10:00:00,paypal,completed",
              "T6,1,P1,1,9.00,2026-03-01 11:00:00,paypal,completed")  # fmt: skip
    night = shop.run(days=1, verify_incremental=True)
    assert (night.kind, night.arrived["transactions"].violations["dear"]) == ("incremental", 1)
    assert night.quality["transactions"].violations["dear"] == 3
    assert night.rules == {"transactions": {"dear": "reject"}}
    assert shop.rows(kept) == [("T1",), ("T2",), ("T5",)]

    rules.write_text("- {name: dear, violation: amount > 4, severity: warn}")
    assert shop.run(days=1).kind == "full"
    assert "Full refresh of all keys: changed settings: rules" in caplog.text
    assert shop.rows(kept) == [("T1",), ("T2",), ("T3",), ("T4",), ("T5",), ("T6",)]
    rules.unlink()
    assert shop.run(days=1).rules == {}

    rules.write_text("- {name: old, violation: 'to_date(timestamp) < :as_of_date - INTERVAL 40 DAYS'}")
    shop.run(days=1)  # 2026-03-02: T1, of 2026-01-20, is 41 days old; T2, of 2026-02-20, is not
    assert shop.rows(kept) == [("T2",), ("T3",), ("T4",), ("T5",), ("T6",)]
    caplog.clear()
    assert shop.run(days=31).kind == "full"  # 2026-04-01: T2 is 40 days old
    assert "Full refresh of all keys: changed settings: rules" in caplog.text
    assert ("T2",) in shop.rows(kept)
    shop.run(days=32)
    assert shop.rows(kept) == [("T3",), ("T4",), ("T5",), ("T6",)]

    rules.write_text("- {name: old, violation: amount > 1, severity: abort}")
    with pytest.raises(NotPublishedError, match=r"transactions\.old \(6 rows violate"):
        shop.run(days=32)


def test_settings_that_change_tables_are_compared() -> None:
    others = {
        "app_name", "data_dir", "num_customers", "num_transactions", "num_products", "seed", "as_of_date", "source_dir",
        "models", "settle_seconds", "on_bad_file", "incremental", "full_refresh", "reload", "accept_missing_files",
        "reread", "verify_incremental", "changes", "history_days", "defect_rate", "shuffle_partitions", "engine",
        "spark_master",
        "executor_memory", "executor_cores", "driver_host", "cluster_timeout", "max_quarantine_rate",
        "control_tolerance", "keep_snapshots", "keep_runs", "lock_timeout", "fast_start", "alert_webhook",
        "anomaly_factor", "report_title", "log_level", "before_publish", "after_publish", "hook_timeout",
        "rules",  # of which the state has the content
    }  # fmt: skip
    fields = {field.name for field in dataclasses.fields(DataPipelineConfig)}
    assert fields - others == {*data_pipeline.TABLE_SETTINGS}, "does a new setting change the tables?"


@THOROUGH
def test_other_source_needs_a_reload(shop: Shop, small: Small, spark: SparkSession) -> None:
    first_night(shop)
    generated = small(data_dir=shop.config.data_dir, num_customers=10, num_products=5, num_transactions=20)
    with pytest.raises(
        ConfigurationError,
        match=r"the published data is from another source .* than this run's \(generated data\): .* with --reload",
    ) as failure:
        run_pipeline(generated, spark)
    assert failure.value.exit_code == 2
    assert run_pipeline(dataclasses.replace(generated, reload=True), spark).kind == "full"
    with pytest.raises(ConfigurationError, match="another source"):
        shop.run()


@pytest.mark.slow
@THOROUGH
def test_days_of_generated_data(small: Small, spark: SparkSession) -> None:
    sizes = {"num_customers": 400, "num_transactions": 4_000, "num_products": 50, "history_days": 40}
    config = small(**sizes, incremental=True, as_of_date=FIRST)
    first = run_pipeline(config, spark)
    assert (first.kind, first.quality["transactions"].received) == ("full", 4_000)
    config.as_of_date, config.verify_incremental = FIRST + timedelta(days=2), True
    days = run_pipeline(config, spark)
    assert days.kind == "incremental"
    # 100 orders and 10 customers a day, as the first delivery has on average.
    arrived = {name: found.received for name, found in days.arrived.items()}
    assert arrived["customers"] == 20
    with open_tables(config.root) as db:
        new = f"FROM bronze_transactions WHERE _run_id = '{days.run_id}' AND transaction_id NOT IN (SELECT "
        new += f"transaction_id FROM bronze_transactions WHERE _run_id = '{first.run_id}')"
        [(orders, on_time, late)] = db.sql(
            f"SELECT count(DISTINCT transaction_id), count(*) FILTER (timestamp > '2026-03-02'), "
            f"count(*) FILTER (timestamp BETWEEN '2026-02-20' AND '2026-03-02') {new}"
        ).fetchall()
        assert 190 <= orders <= 200, "few repeat the record before, which is a defect"
        assert late >= 1
        assert on_time + late <= 200
        assert arrived["transactions"] > 200, "older orders change their status"
        [(changed,)] = db.sql(
            "SELECT count(*) FROM bronze_transactions AS new JOIN bronze_transactions AS old USING (transaction_id) "
            f"WHERE new._run_id = '{days.run_id}' AND old._run_id = '{first.run_id}' AND new.status <> old.status "
            "AND new.timestamp = old.timestamp"
        ).fetchall()
        assert changed == arrived["transactions"] - 200
        [(prices,)] = db.sql(
            "SELECT count(*) FROM bronze_products AS new JOIN bronze_products AS old USING (product_id) "
            f"WHERE new._run_id = '{days.run_id}' AND old._run_id = '{first.run_id}'"
        ).fetchall()
        assert prices == arrived["products"] >= 1
        defects = 200 * config.defect_rate
        assert days.arrived["transactions"].quarantined + days.arrived["transactions"].duplicates <= 2 * defects
    # The same days give the same records.
    again = small(**sizes, incremental=True, as_of_date=FIRST)
    run_pipeline(again, spark)
    again.as_of_date = config.as_of_date
    run_pipeline(again, spark)
    assert differences(config.root, again.root) == []
    assert run_pipeline(dataclasses.replace(config, seed=7), spark).kind == "full", "the data begins anew"


@THOROUGH
def test_tables_of_models_that_join_are_compared(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (shop.source / "transactions.sql").write_text(
        "SELECT o.transaction_id, o.customer_id, o.product_id, o.quantity, o.amount, o.timestamp, p.method AS "
        "payment_method, o.status FROM transactions AS o LEFT JOIN payments AS p ON p.id = o.transaction_id"
    )
    payments = shop.source / "payments.csv"
    payments.write_text("id,method\nT1,paypal\n")
    first_night(shop)
    # T2 is paid later: its row is another one. T9 is new. The other rows stay as they are.
    payments.write_text("id,method\nT1,paypal\nT2,cash\n")
    shop.land("transactions", "2", "T9,1,P1,1,9.00,2026-02-01 10:00:00,,completed")
    record = shop.run(verify_incremental=True)
    assert record.kind == "incremental"
    assert "transactions is received whole" in caplog.text
    assert shop.rows("SELECT transaction_id, payment_method FROM transactions_clean ORDER BY 1") == [
        ("T1", "paypal"), ("T2", "cash"), ("T3", "unknown"), ("T9", "unknown"),
    ]  # fmt: skip
    assert record.arrived["transactions"].received == 2
    assert record.quality["transactions"].received == 5
    orders = shop.source / "transactions/1.csv"
    orders.rename(orders.with_name("first.csv"))
    shop.land("transactions", "first.copy", *orders.with_name("first.csv").read_text().splitlines()[1:])
    again = shop.run(verify_incremental=True)
    assert again.rows["bronze.transactions"] == record.rows["bronze.transactions"], "it was renamed and copied"
    payments.unlink()
    shop.land("transactions", "3", "T10,1,P1,1,9.00,2026-02-01 10:00:00,,completed")
    with pytest.raises(NotPublishedError, match=r"needs all files of payments, .* gone: payments\.csv; put"):
        shop.run()


@pytest.mark.parametrize(
    ("sql", "is_piecewise"),
    [
        ("SELECT * FROM orders WHERE a > 1", True),
        ("SELECT DISTINCT customer FROM orders", True),
        ("SELECT explode(items) FROM orders", True),
        ("SELECT a, sum(b) FROM orders GROUP BY a", False),
        ("SELECT max(a) FROM orders", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM orders", False),
        ("SELECT * FROM orders JOIN items USING (id)", False),
        ("SELECT * FROM orders UNION ALL SELECT * FROM orders", False),
        ("SELECT * FROM orders LIMIT 3", False),
        ("SELECT * FROM orders WHERE id IN (SELECT id FROM items)", False),
    ],
)
def test_models_that_files_can_be_read_by_one_after_the_other(sql: str, is_piecewise: bool) -> None:
    assert data_pipeline.parse_model("transactions", sql).is_piecewise == is_piecewise


@THOROUGH
def test_new_file_under_the_name_of_no_table_is_named(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    first_night(shop)
    (shop.source / "transactons.csv").write_text("x\n1\n")
    assert isinstance(open_source(shop.config), LandedFiles)
    assert "no model and no table uses transactons.csv" in caplog.text


@pytest.mark.slow
@THOROUGH
def test_nights_and_kills(shop: Shop, spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run after a killed one gives the tables that it would have given. Nights do not become slower."""
    first_night(shop)
    choose, seconds = random.Random(3), []
    nights = int(os.environ.get("NIGHTS", "4"))
    for night in range(1, nights + 1):
        shop.land("transactions", f"night{night}", *(order(choose) for _ in range(20)))
        if night % 3:
            command = [sys.executable, data_pipeline.__file__, "--engine", ENGINE, "--quiet", "--settle-seconds", "0"]
            command += ["--source-dir", str(shop.source), "--data-dir", shop.config.root, "--max-quarantine-rate", "1"]
            command += ["--as-of-date", str(FIRST)]
            process = subprocess.Popen(command, start_new_session=True, env=without_settings())
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(choose.uniform(0.3, 3.5))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        record = shop.run()
        seconds.append(record.seconds["total"])
        assert record.result == "succeeded"
    assert record.quality["transactions"].received == 4 + nights * 20
    shutil.copytree(shop.config.root, shop.source.parent / "full", symlinks=True)
    config = dataclasses.replace(shop.config, data_dir=str(shop.source.parent / "full"), full_refresh=True)
    assert run_pipeline(dataclasses.replace(config, as_of_date=FIRST), spark).quality == record.quality
    assert differences(shop.config.root, config.root) == []
    print(f"first nights {seconds[:5]}, last nights {seconds[-5:]}")


def without_settings() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}
    return kept | {"PIPELINE_FAST_START": "no"}


@pytest.mark.slow
@THOROUGH
def test_commands_of_the_docs(tmp_path: Path) -> None:
    project = Path(data_pipeline.__file__).parent
    text = (project / "docs/incremental.md").read_text()
    [script] = re.findall(r"run by: tests/test_incremental.py -->\n```bash\n(.*?)```", text, re.DOTALL)
    (tmp_path / "docs").symlink_to(project / "docs")
    script = script.replace(".venv/bin/python data_pipeline.py", f"{sys.executable} {data_pipeline.__file__}")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=without_settings() | {"HOME": str(tmp_path), "PIPELINE_ENGINE": ENGINE},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "VERIFICATION: all tables equal those of a full refresh" in done.stderr
    assert "Nothing has arrived since run" in done.stderr
    runs = [record for _, record in Store(str(tmp_path / "shop-data")).runs.all()]
    assert [run.kind for run in runs if isinstance(run, RunRecord)] == ["full", "incremental", "unchanged"]
    with open_tables(tmp_path / "shop-data") as db:
        orders = db.sql("SELECT transaction_id FROM transactions_clean ORDER BY 1").fetchall()
    assert orders == [("A-1",), ("A-4",), ("A-5",), ("A-7",)]


@THOROUGH
@pytest.mark.parametrize("system", ["olist", "uci"])
def test_exports_of_systems_in_two_nights(system: str, shop: Shop, tmp_path: Path) -> None:
    """The samples of the ready models, of which half of the records arrive a night later."""
    samples = Path(data_pipeline.READY_MODELS, system, "sample")
    late: dict[Path, bytes] = {}
    for path in (path for path in samples.iterdir() if path.is_file()):
        if path.suffix == ".csv":
            late[shop.source / path.name] = path.read_bytes()
            with open(path, encoding="utf-8-sig", newline="") as file:
                head, *rows = csv.reader(file)
            with open(shop.source / path.name, "w", newline="") as file:
                csv.writer(file).writerows([head, *rows[: max(len(rows) // 2, 1)]])
        else:
            shutil.copy(path, shop.source)
    values: dict[str, Any] = {"models": system, "orphans": "keep", "as_of_date": date(2026, 11, 1)}
    shop.config = dataclasses.replace(shop.config, **values)
    run_pipeline(shop.config, shop.spark)
    for path, content in late.items():
        path.write_bytes(content)
    record = run_pipeline(dataclasses.replace(shop.config, verify_incremental=True), shop.spark)
    assert record.kind == "incremental"
    # A file that was overwritten has all rows of the old one: the tables are those of the whole export.
    whole = dataclasses.replace(shop.config, data_dir=str(tmp_path / "whole"))
    expected = run_pipeline(whole, shop.spark)
    assert (record.revenue, record.orders, record.returns) == (expected.revenue, expected.orders, expected.returns)


@THOROUGH
def test_bronze_of_an_older_schema_has_nulls(shop: Shop) -> None:
    first_night(shop)
    [file] = Path(shop.config.root, "bronze/transactions").glob("*.parquet")
    older = pq.read_table(file).drop_columns(["currency", "order_id"])
    file.unlink()
    pq.write_table(older, file)
    shop.land("transactions", "2", "T9,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    assert shop.run(verify_incremental=True).kind == "incremental"
    rows = shop.rows("SELECT count(*), count(order_id) FROM transactions_clean")
    assert rows == [(4, 0)]


@THOROUGH
@pytest.mark.parametrize("lost", ["snapshots/*/bronze/transactions/*.parquet", "runs/*.json"])
def test_published_run_that_lacks_a_file(shop: Shop, lost: str) -> None:
    first_night(shop)
    [file] = Path(shop.config.root).glob(lost)
    file.unlink()
    with pytest.raises(PipelineError, match=rf"since {file.relative_to(shop.config.root)} is missing .*--reload"):
        shop.run(days=1)
    assert shop.run(reload=True).orders == 3


@THOROUGH
def test_renamed_file_is_known(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    first_night(shop)
    (shop.source / "transactions/1.csv").rename(shop.source / "transactions/first.csv")
    assert shop.run().rows["bronze.transactions"] == 4
    assert "transactions/first.csv is transactions/1.csv, renamed" in caplog.text
    caplog.clear()
    assert shop.run().kind == "unchanged"
    assert "1.csv" not in caplog.text, "nothing is gone"
    shop.land("transactions", "first", "T1,1,P1,1,30.00,2026-01-20 10:00:00,paypal,completed")
    shop.land("transactions", "2", "T9,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    shop.run(reread="transactions/first.csv", verify_incremental=True)
    assert shop.rows("SELECT transaction_id, amount FROM transactions_clean ORDER BY 1") == [("T1", 30), ("T9", 9)]
    assert shop.run(reload=True).rows["bronze.transactions"] == 2


@THOROUGH
def test_reload_after_a_file_was_renamed(shop: Shop) -> None:
    first = first_night(shop)
    (shop.source / "transactions/1.csv").rename(shop.source / "transactions/january.csv")
    assert shop.run(reload=True).rows == first.rows


@THOROUGH
def test_file_that_is_read_again_keeps_its_place(shop: Shop) -> None:
    first_night(shop)
    shop.land("customers", "2", "1,Ada,X,Berlin,2025-01-01")
    shop.run()
    shop.land("customers", "1", "1,Ada,X,Ulm,2025-01-01", "2,Bert,X,Ulm,2025-01-01")
    shop.run(reread="customers/1.csv", verify_incremental=True)
    customers = shop.rows("SELECT first_name, city FROM customers_enriched WHERE customer_id IN (1, 2) ORDER BY 1")
    assert customers == [("Ada", "Berlin"), ("Bert", "Ulm")], "the later file is still the later one"


@THOROUGH
def test_rejected_currency_that_becomes_valid(shop: Shop) -> None:
    shop.config.currency = "EUR"
    first_night(shop)
    path = shop.land("transactions", "2")
    header = HEADERS["transactions"] + ",currency"
    euros, dollars = (f"T{key},1,P1,1,8.00,2026-02-01 10:00:00,paypal,completed,{key}" for key in ("EUR", "USD"))
    path.write_text(f"{header}\n{euros}\n{dollars}\n")
    assert shop.run().quality["transactions"].violations["currency_other"] == 1
    shop.config.currency = None
    with pytest.raises(NotPublishedError, match="in several currencies, EUR 1, USD 1"):
        shop.run()
    shop.config.currency = "USD"
    assert shop.run().quality["transactions"].violations["currency_other"] == 1


@THOROUGH
def test_the_only_file_of_orders_is_read_again_in_another_currency(shop: Shop) -> None:
    first_night(shop)
    path = shop.land("transactions", "1")
    line = "T1,1,P1,1,8.00,2026-02-01 10:00:00,paypal,completed"
    for currency in ("EUR", "USD"):
        path.write_text(f"{HEADERS['transactions']},currency\n{line},{currency}\n")
        assert shop.run(reread="transactions/1.csv", verify_incremental=True).currency == currency
    second = shop.land("transactions", "2")
    second.write_text(f"{HEADERS['transactions']},currency\n{line.replace('T1', 'T2')},EUR\n")
    with pytest.raises(NotPublishedError, match="in several currencies, EUR 1, USD published"):
        shop.run()


@THOROUGH
def test_reload_does_not_lose_the_rows_of_a_file_that_has_become_bad(shop: Shop) -> None:
    first_night(shop)
    (shop.source / "transactions/1.csv").write_text("x\n1\n")
    with pytest.raises(NotPublishedError, match=r"1\.csv cannot be read.*its published rows would be lost otherwise"):
        shop.run(reload=True, on_bad_file="quarantine")


@THOROUGH
def test_column_that_a_file_of_the_night_lacks(shop: Shop) -> None:
    first_night(shop)
    named = shop.land("transactions", "2", "T20,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    named.write_text(named.read_text().replace("customer_id", "Buyer"))
    line = (
        "transactions/2.csv lacks the columns customer_id, which transactions/1.csv had; it has the new columns buyer: "
        "was one renamed?"
    )
    assert shop.run().anomalies == [line]
    shop.land("transactions", "3", "T21,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    assert shop.run().anomalies == ["transactions/3.csv lacks the columns buyer, which transactions/2.csv had; " + (
        "it has the new columns customer_id: was one renamed?"
    )]  # fmt: skip


@THOROUGH
def test_model_that_reads_a_source_without_files(shop: Shop) -> None:
    first = first_night(shop)
    (shop.source / "transactions.sql").write_text("SELECT * FROM orders")
    shop.land("transactions", "2", "T20,1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
    with pytest.raises(ConfigurationError, match=r"the model transactions\.sql reads orders; land orders\.csv"):
        shop.run()
    assert Store(shop.config.root).published() == first.run_id


@THOROUGH
def test_full_refresh_is_no_anomaly(shop: Shop) -> None:
    first_night(shop)
    for night in range(4):
        shop.land("transactions", f"n{night}", f"T{night + 20},1,P1,1,9.00,2026-02-01 10:00:00,paypal,completed")
        assert shop.run().anomalies == []
    assert shop.run(full_refresh=True).anomalies == []
    assert shop.run(reload=True).anomalies == []
