from __future__ import annotations

import dataclasses
import math
import os
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest

import data_pipeline
from data_pipeline import (
    ConfigurationError,
    DataPipelineConfig,
    check_config,
    choose_engine,
    load_config,
    open_source,
    parse_arguments,
    partition_count,
)


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session of other tests does not decide what the configuration means."""
    monkeypatch.setattr(data_pipeline, "running_session", lambda: None)


def check(config: DataPipelineConfig) -> None:
    """Checks what is checked before a run touches anything."""
    check_config(config)
    choose_engine(config, open_source(config))


def test_defaults() -> None:
    config = DataPipelineConfig()
    assert (config.num_customers, config.num_transactions, config.num_products) == (10_000, 50_000, 200)
    assert config.as_of_date == datetime.now(timezone.utc).date()
    assert config.root == str(Path("~/pipeline-data").expanduser())
    check(config)


def test_attributes_are_assigned_as_people_are_used_to() -> None:
    config = DataPipelineConfig()
    config.num_customers = 100_000
    config.as_of_date = "2024-02-29"  # type: ignore[assignment]
    assert config.num_customers == 100_000
    assert config.as_of_date == date(2024, 2, 29)


def test_mistyped_attribute_names_the_nearest() -> None:
    config = DataPipelineConfig()
    with pytest.raises(AttributeError, match="num_customer; did you mean num_customers"):
        config.num_customer = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_customers", -1, "num_customers must be a whole number from 0 to 1000000000000, not -1"),
        ("num_products", 10**23, "num_products must be a whole number from 0 to 1000000000000, not 1"),
        ("num_products", 2**63 - 1, "num_products must be a whole number from 0 to 1000000000000, not 9"),
        ("num_transactions", 10**23, "from 0 to 1000000000000"),
        ("data_dir", "a\nb", r"data_dir must be a text without line breaks, not 'a\\nb'"),
        ("num_customers", "many", "a whole number"),
        ("num_customers", 1.5, "a whole number"),
        ("num_customers", True, "a whole number"),
        ("num_customers", None, "a whole number"),
        ("defect_rate", 0.6, "defect_rate must be a number from 0.0 to 0.5, not 0.6"),
        ("defect_rate", "nan", "from 0.0 to 0.5"),
        ("as_of_date", "04.03.2026", "must be a date such as 2026-01-31 from 2000-01-01 up, not '04.03.2026'"),
        ("as_of_date", "1999-12-31", "from 2000-01-01"),
        ("history_days", 0, "from 1 to 3650"),
        ("gold_above", "NaN", "at most two decimals"),
        ("gold_above", "Infinity", "at most two decimals"),
        ("gold_above", "0.001", "at most two decimals"),
        ("data_dir", b"/x", "a text"),
        ("log_level", "LOUD", "one of DEBUG, INFO, WARNING, ERROR"),
        ("data_dir", " ", "a text"),
        ("app_name", None, "a text"),
        ("seed", 2**63, "seed"),
        ("shuffle_partitions", 0, "from 1 to 100000"),
    ],
)
def test_bad_value(field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        setattr(DataPipelineConfig(), field, value)


@pytest.mark.parametrize(
    "master",
    ["local", "local[*]", "local[2,3]", "yarn", "spark://host:7077", "spark://a:7077,[::1]:7078", "k8s://https://host"],
)
def test_master_from_the_environment(master: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(DataPipelineConfig(spark_master=master))
    with pytest.raises(ConfigurationError, match="spark_master must be"):
        check(DataPipelineConfig(spark_master=f"{master} x"))
    monkeypatch.setenv("SPARK_MASTER", master)
    config = DataPipelineConfig()
    assert data_pipeline.choose_engine(config, data_pipeline.open_source(config)).master == master


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_customers": 0}, "num_customers is 0, but num_transactions is 50000"),
        ({"num_products": 0}, "num_products is 0"),
        ({"spark_master": "foo"}, "spark_master must be"),
        ({"spark_master": "local[*"}, "spark_master must be"),
        ({"spark_master": "spark://host"}, "spark_master must be"),
        ({"spark_master": "spark://host:7077", "engine": "sail"}, "engine sail runs within this process"),
        ({"gold_above": 400}, "thresholds must rise"),
        ({"as_of_date": datetime.now(timezone.utc).date() + timedelta(days=2)}, "lies in the future"),
        ({"data_dir": "$NO_SUCH_VARIABLE/data"}, r"\$NO_SUCH_VARIABLE, which does not exist"),
        ({"data_dir": "~no-such-user/data"}, r"data_dir names ~no.*, which does not exist"),
        ({"data_dir": "/data/{a,b}"}, "must not contain '{'"),
        ({"source_dir": "/no/such/folder"}, "there is no folder /no/such/folder"),
        ({"source_dir": "$NO_SUCH_VARIABLE"}, r"source_dir names \$NO_SUCH_VARIABLE, which does not exist"),
        ({"source_delimiter": ",,"}, "source_delimiter must be one ASCII character, or tab"),
        ({"source_encoding": "utf-7000"}, "source_encoding must be an encoding such as utf-8"),
        ({"source_time_zone": "Mars/North"}, "source_time_zone must be a time zone such as Europe/Berlin"),
        ({"payment_methods": "paypal;visa"}, "payment_methods must be names separated by commas"),
    ],
)
def test_values_that_do_not_fit(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check(dataclasses.replace(DataPipelineConfig(), **values))  # type: ignore[arg-type]


def test_data_dir_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP", "corner")
    config = DataPipelineConfig()
    config.data_dir = "~/$SHOP/data"
    assert config.root == os.path.expanduser("~/corner/data")
    monkeypatch.setenv("SHOP", "a\nb")
    with pytest.raises(ConfigurationError, match=r"data_dir must not contain '\\n', which Spark misreads"):
        config.root  # noqa: B018
    config.data_dir = "s3a://bucket/shop/"
    assert config.root == "s3a://bucket/shop"
    config.data_dir = "file:/srv/shop"
    assert config.root == "file:/srv/shop"


def test_flag_beats_variable_beats_default() -> None:
    environment = {"PIPELINE_NUM_CUSTOMERS": "2", "PIPELINE_NUM_PRODUCTS": "2"}
    result = load_config(parse_arguments(["--num-customers", "3"]), environment)
    assert (result.num_customers, result.num_products, result.num_transactions) == (3, 2, 50_000)


def test_every_field_is_a_flag_and_a_variable() -> None:
    given = {
        "app_name": "x", "data_dir": "/x", "num_customers": "1", "num_transactions": "2", "num_products": "3",
        "seed": "4", "as_of_date": "2024-01-31", "history_days": "5", "defect_rate": "0.25", "silver_above": "6.50",
        "gold_above": "7", "premium_above": "8", "shuffle_partitions": "9", "spark_master": "local[3]",
        "engine": "Sail", "log_level": "debug", "max_quarantine_rate": "0.1", "keep_snapshots": "2", "keep_runs": "9",
        "lock_timeout": "1.5", "report_title": "My shop",
        "fast_start": "No", "alert_webhook": "https://x.example/y", "anomaly_factor": "2.5",
        "executor_memory": "4G", "executor_cores": "2", "driver_host": "10.0.0.5", "cluster_timeout": "60",
        "source_dir": "/y", "models": "/z", "source_delimiter": "tab", "source_quote": "'",
        "source_encoding": "Latin-1", "source_decimal": ",", "source_time_zone": "Europe/Berlin",
        "settle_seconds": "0", "on_bad_file": "Quarantine", "payment_methods": "PayPal, Cash on-Delivery,überweisung",
        "orphans": "Keep", "currency": "eur", "control_tolerance": "0.01", "incremental": "yes", "full_refresh": "no",
        "reload": "true", "accept_missing_files": "1", "reread": "transactions/2026/*", "verify_incremental": "False",
        "changes": "yes",
        "before_publish": "check 'a b'", "after_publish": "tell", "hook_timeout": "30", "rules": "/r",
    }  # fmt: skip
    assert set(given) == {field.name for field in dataclasses.fields(DataPipelineConfig)}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    by_flag = load_config(parse_arguments(flags), {})
    assert by_flag == load_config(
        parse_arguments([]), {f"PIPELINE_{name.upper()}": value for name, value in given.items()}
    )
    assert by_flag.silver_above == Decimal("6.50")
    assert by_flag.log_level == "DEBUG"
    assert by_flag.fast_start is False
    assert (by_flag.source_delimiter, by_flag.source_encoding) == ("\t", "iso8859-1")
    assert (by_flag.orphans, by_flag.currency) == ("keep", "EUR")
    assert by_flag.payment_methods == ("paypal", "cash_on_delivery", "überweisung")


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--num-customer", "1"], {}, "unknown argument --num-customer; did you mean --num-customers"),
        (["--seed"], {}, "--seed: expected one argument"),
        (["5"], {}, "unknown argument 5"),
        (["--seed", "x"], {}, "--seed: seed must be a whole number"),
        ([], {"PIPELINE_SEEED": "1"}, "unknown variable PIPELINE_SEEED; did you mean PIPELINE_SEED"),
        ([], {"PIPELINE_FAST_START": "maybe"}, "PIPELINE_FAST_START: fast_start must be true or false, not 'maybe'"),
        ([], {"PIPELINE_SEED": ""}, "PIPELINE_SEED: seed must be a whole number"),
    ],
)
def test_bad_command_line(flags: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_config(parse_arguments(flags), environment)


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_partitions_grow_with_the_rows(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert partition_count(0) == partition_count(60_000) == 1
    # Every core is busy, but none with next to nothing.
    assert partition_count(1_000_000) == min(cores, 5)
    # Files of a good size, and as many for each core.
    assert partition_count(600_000_000) == math.ceil(100 / cores) * cores
