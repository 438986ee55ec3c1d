"""What all tests share: one Spark session, one small run, and DuckDB to look at its tables with."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pyspark.sql import DataFrame, SparkSession

import data_pipeline
from data_pipeline import LAYERS, DataPipelineConfig, RunRecord, create_spark_session, logger, preflight, run_pipeline

# A shell starts what runs in its background with SIGINT ignored, and programs that the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

AS_OF = date(2026, 3, 4)
# What the session of the tests runs on; `ENGINE=sail pytest` runs them on the other engine.
ENGINE = os.environ.get("ENGINE", "spark")
# A whole run takes seconds on Spark. `THOROUGH=yes` runs on it what otherwise only runs on Sail.
THOROUGH = pytest.mark.skipif(
    ENGINE == "spark" and not os.environ.get("THOROUGH"), reason="would take too long on Spark"
)
SMALL = {"num_customers": 200, "num_transactions": 1_000, "num_products": 20}


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DataPipelineConfig]:
    """Makes the configuration of a small run; each one gets a data folder of its own."""

    def make(**values: Any) -> DataPipelineConfig:
        defaults: dict[str, Any] = {
            "data_dir": str(tmp_path_factory.mktemp("data")),
            "num_customers": 2_000,
            "num_transactions": 10_000,
            "num_products": 100,
            "as_of_date": AS_OF,
            "engine": ENGINE,
            "shuffle_partitions": 2,
            "fast_start": False,
        }
        return DataPipelineConfig(**defaults | values)

    return make


@pytest.fixture(scope="session")
def spark(small: Callable[..., DataPipelineConfig]) -> Iterator[SparkSession]:
    for variable in [name for name in os.environ if name.startswith(("PIPELINE_", "GITHUB_"))]:
        del os.environ[variable]
    config = small(spark_master="local[2]")
    preflight(config)
    options = os.environ.get("SPARK_SUBMIT_OPTS", "")
    with pytest.MonkeyPatch.context() as patch:
        # On two cores the threads of the default collector compete with those of the tests. A run generates more code
        # than the 100 classes that Spark keeps by default: each run would compile it again.
        options += " -XX:+UseSerialGC -Dspark.sql.codegen.cache.maxEntries=5000"
        patch.setenv("SPARK_SUBMIT_OPTS", options)
        session = create_spark_session(config)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def config(small: Callable[..., DataPipelineConfig]) -> DataPipelineConfig:
    """The configuration of the run that most tests look at."""
    return small()


@pytest.fixture(scope="session")
def logged_run(spark: SparkSession, config: DataPipelineConfig) -> tuple[RunRecord, str]:
    """That run's record and log."""
    handler, level = logging.StreamHandler(io.StringIO()), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        return run_pipeline(config, spark), handler.stream.getvalue()
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def report(logged_run: tuple[RunRecord, str]) -> RunRecord:
    return logged_run[0]


@pytest.fixture(scope="session")
def first_run(spark: SparkSession, small: Callable[..., DataPipelineConfig]) -> tuple[DataPipelineConfig, RunRecord]:
    """A smaller run, of which tests that publish, refuse or damage something get a copy."""
    config = small(**SMALL)
    return config, run_pipeline(config, spark)


@pytest.fixture
def published(first_run: tuple[DataPipelineConfig, RunRecord], tmp_path: Path) -> DataPipelineConfig:
    """The configuration of that run, published in a data folder of its own; it can be changed."""
    shutil.copytree(first_run[0].root, tmp_path / "data", symlinks=True)
    return dataclasses.replace(first_run[0], data_dir=str(tmp_path / "data"))


@pytest.fixture(scope="session")
def db(report: RunRecord) -> Iterator[duckdb.DuckDBPyConnection]:
    """The tables of the run; those of bronze and quarantine are called `bronze_customers` and so on."""
    with open_tables(report.data_dir) as connection:
        yield connection


@pytest.fixture
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without tables: only the order of what happens around them matters."""
    layers = ("clean", "check_gate", "build_silver", "build_gold", "audit", "check_controls", "summarize")
    for name in (*layers, "warn_of_anomalies"):
        monkeypatch.setattr(data_pipeline, name, lambda *_: None)
    monkeypatch.setattr(data_pipeline, "ingest_bronze", lambda run, _: os.makedirs(run.snapshot.path()))
    monkeypatch.setattr(data_pipeline, "find_affected", lambda *_: None)


def at_close(monkeypatch: pytest.MonkeyPatch, callback: Callable[[], None]) -> None:
    """Has the engine call something when it closes."""
    real = data_pipeline.Engine.start

    def start(engine: data_pipeline.Engine, *arguments: str) -> None:
        real(engine, *arguments)
        engine._started.callback(callback)

    monkeypatch.setattr(data_pipeline.Engine, "start", start)


def open_tables(root: str | Path) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    for table in (table for layer in LAYERS for table in Path(root, layer).iterdir()):
        layer = table.parent.name
        name = f"{layer}_{table.name}" if layer in ("bronze", "quarantine") else table.name
        connection.execute(f"CREATE VIEW {name} AS FROM read_parquet('{table}/*.parquet')")
    return connection


def one(db: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The only value that a query gives."""
    [[value]] = db.sql(query).fetchall()
    return value


@pytest.fixture(scope="session")
def frame(spark: SparkSession) -> Callable[..., DataFrame]:
    """Makes a DataFrame of a declared schema from rows that name only some of its columns."""

    def make(schema: str, *rows: dict[str, Any]) -> DataFrame:
        names = [column.split()[0] for column in schema.split(", ")]
        assert not {name for row in rows for name in row} - set(names), "a row has a column that the schema lacks"
        return spark.createDataFrame([tuple(row.get(name) for name in names) for row in rows], schema)

    return make
