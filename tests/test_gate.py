"""Runs whose data is refused, that fail, or that are killed: what was published stays."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compare_runs import differences
from conftest import ENGINE, SMALL, THOROUGH, one, open_tables
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from test_command import start

import data_pipeline
from data_pipeline import (
    TABLES,
    DataPipelineConfig,
    NotPublishedError,
    PipelineError,
    Run,
    RunRecord,
    Separated,
    Snapshot,
    Store,
    audit,
    check_gate,
    choose_engine,
    key_rules,
    open_source,
    run_pipeline,
    tables,
)

KILLS = int(os.environ.get("KILLS", "1"))


@pytest.fixture
def finished(
    published: DataPipelineConfig, first_run: tuple[DataPipelineConfig, RunRecord], spark: SparkSession
) -> Any:
    """That run, with its tables written: it can be damaged and audited."""
    return started_run(published, spark, copy.deepcopy(first_run[1]))


def started_run(config: DataPipelineConfig, spark: SparkSession, record: RunRecord) -> Run:
    engine = choose_engine(config, open_source(config), spark)
    engine.start(os.devnull)
    return Run(config, engine, Snapshot(Store(config.root), record.run_id), record)


def record_of_last_run(config: DataPipelineConfig) -> dict[str, Any]:
    *_, path = sorted(Path(config.root, "runs").glob("*.json"))
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def refused(config: DataPipelineConfig, spark: SparkSession, match: str) -> dict[str, Any]:
    """A run that is refused: nothing is published, and its snapshot is kept for a look. Returns its record."""
    store = Store(config.root)
    before = store.published()
    with pytest.raises(NotPublishedError, match=match) as failure:
        run_pipeline(config, spark)
    assert failure.value.exit_code == 3
    assert store.published() == before
    record = record_of_last_run(config)
    assert (record["result"], record["exit_code"]) == ("refused", 3)
    assert Path(store.path("snapshots", record["run_id"], "bronze", "transactions")).is_dir()
    return record


def receive(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[DataFrame], DataFrame]) -> None:
    """Lets bronze receive a table with a change."""

    generate = getattr(data_pipeline, f"generate_{name}")
    monkeypatch.setattr(data_pipeline, f"generate_{name}", lambda spark, config: change(generate(spark, config)))


def test_gate(
    published: DataPipelineConfig,
    spark: SparkSession,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Too many rejected rows, and a rule of which one row is too many."""
    wrong_unit = F.timestamp_seconds(F.unix_timestamp("timestamp") / 1000)
    chosen = F.col("transaction_id") == "TXN_0000007"
    receive(
        monkeypatch,
        "transactions",
        lambda rows: rows.withColumn("timestamp", F.when(chosen, wrong_unit).otherwise(F.col("timestamp"))),
    )
    published.defect_rate = 0.2
    caplog.set_level("INFO", logger="data_pipeline")
    record = refused(
        published,
        spark,
        r"GATE MISSED, nothing is published: transactions\.timestamp_near_epoch \(1 rows violate .*, which aborts a "
        r"run \(for example timestamp '1970.*'\): .*\), "
        r"transactions\.max_quarantine_rate \(165 of 1,000 rows are quarantined, 16\.50%, and --max-quarantine-rate "
        r"allows 5\.00%: amount_not_positive 37 \(for example amount '0\.00'\): .*; transaction_id_conflict 36 \(for "
        r"example transaction_id 'TXN_0000054'\): rows of this key contradict .*; amount_missing 19 \(.*snapshots",
    )
    at_once, too_many = record["gate_failures"]
    assert (at_once["rule"], at_once["rows"]) == ("timestamp_near_epoch", 1)
    assert [json.loads(example)["transaction_id"] for example in at_once["examples"]] == ["TXN_0000007"]
    assert (too_many["table"], too_many["rows"], len(too_many["examples"])) == ("transactions", 165, 3)
    for example in too_many["examples"]:
        assert json.loads(example)["_reasons"]
        assert example in caplog.text
    assert "silver.transactions_clean" not in record["rows"]


@pytest.mark.parametrize("rule", ["timestamp_near_epoch", "max_quarantine_rate"])
def test_gate_is_missed_by_each_alone(rule: str, finished: Any) -> None:
    """By the counts of a run that passed."""
    source, quality = open_source(finished.config), finished.record.quality["transactions"]
    valid = finished.read("silver", TABLES["transactions_clean"])
    cleaned = {"transactions": Separated(valid, valid, valid, valid, quality, quality)}
    check_gate(finished, source, cleaned)
    if rule == "timestamp_near_epoch":
        quality.violations[rule] = 1
    else:
        finished.config.max_quarantine_rate = 0.001
    with pytest.raises(
        NotPublishedError,
        match=f"GATE MISSED, nothing is published: transactions.{rule} [^)]*(aborts a run: .*;|example amount)",
    ):
        check_gate(finished, source, cleaned)
    assert [failure["rule"] for failure in finished.record.gate_failures] == [rule]


@THOROUGH
def test_empty_source(published: DataPipelineConfig, spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    receive(monkeypatch, "transactions", lambda rows: rows.limit(0))
    refused(published, spark, "transactions.received")


@THOROUGH
@pytest.mark.parametrize(
    ("function", "lost", "message"),
    [
        (
            "rows_without_keys",
            "transaction_id = 'TXN_0000003'",
            "silver.transactions_clean: .* rows, but .* are expected from bronze",
        ),
        ("with_outcome", "_outcome = 'rejected' AND amount IS NULL", "transactions: 2 of 1,000 .* unaccounted for"),
        pytest.param(
            "with_outcome",
            "_outcome = 'duplicate'",
            "silver.transactions_clean: .* rows, but .* are expected from bronze",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_lost_rows(
    published: DataPipelineConfig,
    spark: SparkSession,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    lost: str,
    message: str,
) -> None:
    """A valid row, rejected rows or duplicates that no table or count has: the audit misses them."""
    real = getattr(data_pipeline, function)

    def losing(rows: DataFrame, *rest: Any) -> Any:
        is_transaction = "transaction_id" in rows.columns
        return real(rows, *rest).where(f"NOT ({lost})") if is_transaction else real(rows, *rest)

    monkeypatch.setattr(data_pipeline, function, losing)
    refused(published, spark, f"AUDIT FAILED.*{message}")


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def double(file: Path) -> None:
    shutil.copy(file, file.with_name(f"copy-{file.name}"))


def scramble(file: Path) -> None:
    """Overwrites the first values; footer and size stay as they are."""
    file.with_name(f".{file.name}.crc").unlink(missing_ok=True)
    with file.open("r+b") as damaged:
        damaged.seek(4)
        damaged.write(b"\x7f" * (file.stat().st_size // 3))


def folder(finished: Any, table: str) -> Path:
    return Path(finished.snapshot.path(table))


@pytest.mark.parametrize(
    ("table", "damage", "message"),
    [
        ("silver/transactions_clean", Path.unlink, "silver.transactions_clean: 846 rows were written, 0 are there"),
        ("gold/device_analytics", truncate, "the snapshot cannot be read: gold.device_analytics: "),
        ("bronze/customers", scramble, "the snapshot cannot be read: bronze.customers: "),
        ("bronze/products", double, "bronze.products: 20 rows were written, 40 are there"),
        ("quarantine/transactions", Path.unlink, "quarantine.transactions: 16 rows were written, 0 are there"),
    ],
)
def test_damage_is_found_at_the_audit(table: str, damage: Callable[[Path], None], message: str, finished: Any) -> None:
    audit(finished)
    for file in folder(finished, table).glob("*.parquet"):
        damage(file)
    with pytest.raises(NotPublishedError, match=f"AUDIT FAILED, nothing is published: .*{message}"):
        audit(finished)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        (
            "silver/customers_enriched",
            lambda rows: rows.where("customer_id <> 1").union(rows.where("customer_id = 2")),
            "silver.customers_enriched: 1 repeated keys",
        ),
        (
            "gold/payment_analytics",
            lambda rows: rows.withColumn("total_amount", F.expr("CAST(total_amount + 0.01 AS DECIMAL(20,2))")),
            "revenue differs: .*gold.payment_analytics",
        ),
    ],
)
def test_wrong_table_is_found_at_the_audit(
    table: str, change: Callable[[DataFrame], DataFrame], message: str, finished: Any, spark: SparkSession
) -> None:
    path = folder(finished, table)
    written = spark.read.parquet(f"file://{path}")
    changed = spark.createDataFrame(change(written).collect(), written.schema)
    changed.write.mode("overwrite").parquet(f"file://{path}")
    with pytest.raises(NotPublishedError, match=f"AUDIT FAILED, nothing is published: .*{message}"):
        audit(finished)


@pytest.mark.usefixtures("no_layers")
def test_reader_of_the_old_snapshot_goes_on(
    published: DataPipelineConfig, report: RunRecord, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a run, whose tables are those of another one, publishes them in the place of what is read."""
    other = Path(report.data_dir, "current")
    monkeypatch.setattr(
        data_pipeline, "ingest_bronze", lambda run, _: shutil.copytree(other, run.snapshot.path(), dirs_exist_ok=True)
    )
    old = Path(published.root, "gold").resolve()
    reading = spark.read.parquet(f"file://{old}/customer_analytics")
    before = reading.collect()
    run_pipeline(published, spark)
    assert reading.collect() == before
    new = spark.read.parquet(f"file://{published.root}/gold/customer_analytics").collect()
    assert new != before


def test_record_of_a_run(published: DataPipelineConfig) -> None:
    record = record_of_last_run(published)
    assert set(record) == {field.name for field in dataclasses.fields(data_pipeline.RunRecord)}
    assert (record["schema_version"], record["result"], record["exit_code"], record["error"]) == (
        2,
        "succeeded",
        0,
        None,
    )
    assert record["config"]["as_of_date"] == "2026-03-04"
    assert set(record["versions"]) == {"pipeline", "python", "spark", "java", "sail"}
    assert record["versions"]["spark"][:2] in ("3.", "4.")
    if ENGINE == "spark":
        assert int(record["versions"]["java"].split(".")[0]) >= 8
    for name, rows in record["rows"].items():
        folder = Path(published.root, *name.split("."))
        assert record["bytes"][name] == sum(file.stat().st_size for file in folder.glob("*.parquet")) > 0
        assert record["seconds"][name] > 0
        assert rows >= 0
    assert sum(record["seconds"][layer] for layer in ("bronze", "silver", "gold", "audit")) < record["seconds"]["total"]
    for table in tables("bronze"):
        rules = {rule.name for rule in (*table.rules, *key_rules(table))}
        assert set(record["quality"][table.name]["violations"]) == rules


def test_profile(published: DataPipelineConfig) -> None:
    profile = record_of_last_run(published)["profile"]
    with open_tables(published.root) as db:
        for table in tables("bronze"):
            columns = [name for name, _ in table.columns()]
            assert list(profile[table.name]) == columns
            rows = one(db, f"SELECT count(*) FROM bronze_{table.name}")
            for name in columns:
                found = profile[table.name][name]
                nulls, distinct = db.sql(
                    f"SELECT count(*) - count({name}), count(DISTINCT {name}) FROM bronze_{table.name}"
                ).fetchall()[0]
                assert (found["rows"], found["nulls"]) == (rows, nulls)
                assert found["completeness"] == pytest.approx(100 - 100 * nulls / rows)
                assert (found["distinct"], found["distinct_is_exact"]) == (distinct, True)
        amount = db.sql("SELECT min(amount)::VARCHAR, max(amount)::VARCHAR FROM bronze_transactions").fetchall()[0]
        assert (profile["transactions"]["amount"]["min"], profile["transactions"]["amount"]["max"]) == amount
        repeated = "SELECT count(*) - count(DISTINCT transaction_id) FROM bronze_transactions"
        assert profile["transactions"]["transaction_id"]["duplicates"] == one(db, repeated) > 0


@pytest.mark.slow
def test_storage_without_links(
    first_run: tuple[DataPipelineConfig, RunRecord],
    spark: SparkSession,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = DataPipelineConfig(engine=ENGINE, data_dir=f"file://{tmp_path}/lake", as_of_date="2026-03-04", **SMALL)  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, logger="data_pipeline"):
        run_id = run_pipeline(config, spark).run_id
    assert "lake has no lock: do not start two runs at once. Each run receives everything" in caplog.text
    assert [entry.name for entry in (tmp_path / "lake").iterdir()] == ["snapshots"]
    assert f"The data lies in {config.root}/snapshots/{run_id}" in caplog.text
    assert differences(tmp_path / "lake" / "snapshots" / run_id, first_run[1].data_dir) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB of its own."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", tmp_path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a disk here")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@THOROUGH
@pytest.mark.skipif(ENGINE != "spark", reason="Sail keeps rows on this disk before there is a quarantine")
def test_disk_that_fills_up(
    small_disk: Path, published: DataPipelineConfig, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Store(published.root).published()
    real = data_pipeline.clean

    def clean(run: Run, bronze: Any, affected: Any) -> Any:
        with pytest.raises(OSError, match="No space left"), open(small_disk / "ballast", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return real(run, bronze, affected)

    monkeypatch.setattr(data_pipeline, "clean", clean)
    with pytest.raises(PipelineError, match=r"the disk of .* is full \(No space left on device, in quarantine\.\w+\)"):
        run_pipeline(published, spark)
    store = Store(published.root)
    assert store.published() == first
    assert store.snapshots() == [first]
    with open_tables(published.root) as db:
        assert one(db, "SELECT sum(total_spent) FROM customers_enriched") > 0


def test_disk_that_is_read_only(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(PipelineError, match=r"cannot write to data_dir: Read-only file system"):
        data_pipeline.preflight(DataPipelineConfig(engine=ENGINE, data_dir=str(small_disk / "data")))


def check_whole(root: Path) -> None:
    """What a reader of the published data relies on: all layers are of one run, and add up."""
    snapshot = (root / "current").resolve()
    assert {(root / layer).resolve().parent for layer in data_pipeline.LAYERS} == {snapshot}
    with open_tables(snapshot) as db:
        runs = {
            one(db, f"SELECT any_value(_run_id) FROM {name}")
            for name in ("bronze_customers", "bronze_products", "bronze_transactions", "quarantine_transactions")
        }
        assert runs == {snapshot.name}
        revenues = {
            one(db, f"SELECT sum({column}) FROM {table}")
            for table, column in (
                ("transactions_clean", "amount"),
                ("customers_enriched", "total_spent"),
                ("category_analytics", "total_revenue"),
                ("payment_analytics", "total_amount"),
                ("device_analytics", "total_revenue"),
                ("customer_analytics", "segment_revenue"),
            )
        }
        assert len(revenues) == 1


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Kills a run and its Java at once, so that neither cleans up."""
    children = [
        pid for task in Path(f"/proc/{process.pid}/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """SIGKILL at random moments of real runs: `KILLS=20 pytest tests/test_gate.py -m slow` is the full test."""
    root = tmp_path / "pipeline-data"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    started = time.monotonic()
    temporary = str(tmp_path / "tmp")
    os.mkdir(temporary)
    with start(tmp_path, *flags, TMPDIR=temporary) as process:
        process.communicate()
        assert process.returncode == 0
    duration = time.monotonic() - started
    check_whole(root)
    for kill in range(KILLS):
        # The later half more often: there the tables are written and published.
        moment = duration * random.Random(kill).triangular(0.1, 1.05, 0.9)
        with start(tmp_path, *flags, f"--seed={kill}", TMPDIR=temporary) as process:
            try:
                process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                kill_with_children(process)
                process.communicate()
        check_whole(root)
    with start(tmp_path, *flags, "--lock-timeout=30", TMPDIR=temporary) as process:
        process.communicate()
        assert process.returncode == 0
    check_whole(root)
    store = Store(str(root))
    audited = set(store.snapshots(data_pipeline.AUDITED))
    assert set(store.snapshots()) == audited, "the leftovers of the killed runs are gone"
    assert os.listdir(temporary) == [], "so are Java's and Spark's own files"
    assert {record.result for _, record in store.runs.all() if isinstance(record, RunRecord)} <= {"succeeded", "killed"}
