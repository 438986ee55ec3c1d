"""Rules that users add to those of the contract, or change; in incremental runs: see test_incremental.py."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ENGINE, SMALL, one, open_tables
from pyspark.sql import SparkSession
from test_gate import refused

from data_pipeline import (
    BRONZE,
    TABLES,
    WARN,
    ConfigurationError,
    DataPipelineConfig,
    RunRecord,
    check_rules,
    choose_engine,
    html_report,
    inspect_source,
    list_files,
    metrics,
    open_source,
    read_rules,
    run_pipeline,
    tables,
)

Small = Callable[..., DataPipelineConfig]
# These take seconds on Spark, and the engine does not matter.
on_sail = pytest.mark.skipif(ENGINE != "sail", reason="Sail runs it")
EXAMPLE = Path(__file__).parent.parent / "docs/example"
AMOUNT_HUGE = """
- name: amount_huge
  violation: amount > 1000  -- of a sale
  severity: warn
  description: ask {the} shop"""
OTHERS = """
- name: at_three
  violation: |
    hour(timestamp) = 3
    -- nobody buys at that time
- name: payment_method_untidy
  severity: off
- name: timestamp_near_epoch
  severity: reject"""


def write_rules(folder: Path, text: str, table: str = "transactions") -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{table}.rules.yml").write_text(text)
    return str(folder)


def test_rules_of_a_run(small: Small, spark: SparkSession, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are counted and reject rows as built-in ones do. DuckDB counts what they must find."""
    caplog.set_level("INFO", logger="data_pipeline")
    config = small(**SMALL, rules=write_rules(tmp_path / "rules", AMOUNT_HUGE + OTHERS))
    record = run_pipeline(config, spark)
    own = {
        "timestamp_near_epoch": "reject",
        "payment_method_untidy": "off",
        "amount_huge": "warn",
        "at_three": "reject",
    }
    assert record.rules == {"transactions": own}
    assert f"transactions.rules.yml: {', '.join(f'{name} {severity}' for name, severity in own.items())}" in caplog.text

    with open_tables(config.root) as db:
        huge = one(db, "SELECT count(*) FROM bronze_transactions WHERE amount > 1000")
        at_three = one(db, "SELECT count(*) FROM bronze_transactions WHERE hour(timestamp) = 3")
        in_quarantine = "SELECT count(*) FROM quarantine_transactions WHERE list_contains(_reasons, '{}')"
        assert one(db, in_quarantine.format("at_three")) == at_three > 3
        assert one(db, in_quarantine.format("amount_huge")) == 0
        assert one(db, "SELECT count(*) FROM transactions_clean WHERE hour(timestamp) = 3") == 0
        assert one(db, "SELECT count(*) FROM transactions_clean WHERE amount > 1000") > 0
    violations = record.quality["transactions"].violations
    assert (violations["amount_huge"], violations["at_three"]) == (huge, at_three)
    assert violations["payment_method_untidy"] == 0, "it is off"
    assert f"amount_huge {huge}, at_three {at_three}" in caplog.text

    assert {"rule": "transactions: amount_huge", "rows": huge} in record.violated(warnings=True)
    assert {"rule": "transactions: at_three", "rows": at_three} in record.violated(warnings=False)
    assert RunRecord.from_json(record.to_json()).rules == record.rules
    page = html_report([record], record)
    assert "transactions.rules.yml: timestamp_near_epoch (reject), payment_method_untidy (off)," in page
    assert f'rule="amount_huge"}} {huge}.0' in metrics([record], record)


@on_sail
def test_rule_that_aborts(published: DataPipelineConfig, spark: SparkSession, tmp_path: Path) -> None:
    published.rules = write_rules(
        tmp_path / "rules",
        "- {name: at_three, violation: hour(timestamp) = 3, severity: abort}\n"
        "- {name: cheap, violation: amount < 900, description: '{no} sale'}",
    )
    record = refused(
        published, spark, r"GATE MISSED.*transactions\.at_three \(\d+ rows violate the rule at_three, which"
    )
    assert record["rules"] == {"transactions": {"at_three": "abort", "cheap": "reject"}}
    assert re.search(r"cheap [\d,]+ \(for example amount '.*'\): \{no\} sale", record["error"]["message"])


@on_sail
def test_rule_on_customers_orphans_their_orders(small: Small, spark: SparkSession, tmp_path: Path) -> None:
    rules = write_rules(tmp_path / "rules", "- {name: no_test, violation: '`Customer_ID` <= 100'}", "customers")
    record = run_pipeline(small(**SMALL, rules=rules, max_quarantine_rate=1.0), spark)
    assert record.quality["customers"].quarantined == 100
    with open_tables(record.data_dir) as db:
        of_these = one(db, "SELECT count(*) FROM bronze_transactions WHERE customer_id <= 100")
        unknown = "SELECT count(*) FROM quarantine_transactions WHERE list_contains(_reasons, 'customer_id_unknown')"
        assert one(db, f"{unknown} AND customer_id <= 100") == of_these > 0


@on_sail
def test_rules_are_inspected(small: Small, tmp_path: Path, spark: SparkSession) -> None:
    """They lie beside the models, and are no source."""
    source = tmp_path / "exports"
    shutil.copytree(EXAMPLE, source)
    write_rules(source, "- {name: of_lamp, violation: product_id = 'LAMP', description: look}")
    lines = "\n".join(inspect_source(small(source_dir=str(source), settle_seconds=0)))
    assert "  of_lamp: " in lines and "are rejected (for example product_id 'LAMP', transactions/" in lines
    assert ": look" in lines
    assert not [file.path for file in list_files(str(source)) if "rules" in file.path]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {name: x, violation: amout > 3}", "the rule 'x' reads amout, which transactions .*; did you mean amount?"),
        ("- {name: x, violation: t.amount > 3}", "the rule 'x' reads t.amount"),
        ("- {name: x, violation: 'timestamp > :today'}", "reads :today"),
        ("- {name: x, violation: amount >}", "the rule 'x' cannot be parsed: .*Line 1"),
        ("- {name: x, violation: a) OR (b}", "the rule 'x' cannot be parsed"),
        ("- {name: x, violation: ''}", "the rule 'x' cannot be parsed"),
        ("- {name: x, violation: timestamp < now()}", "must depend on one row alone, not on NOW"),
        ("- {name: x, violation: sum(amount) > 3}", "not on SUM"),
        ("- {name: x, violation: amount > (SELECT 1)}", "not on \\(?SELECT 1"),
        ("- {name: x, violation: amount > 3; SELECT 1}", "not on SELECT 1"),
        ("- {name: x, violation: current_date = timestamp}", "not on CURRENT_DATE"),
        ("- {name: [x], violation: amount > 3}", "needs another name"),
        ("- {name: x, violation: rand() < 0.5}", "not on RAND"),
        ("- {name: x, violation: row_number() OVER (ORDER BY amount) > 1}", "not on ROW_NUMBER"),
        ("- {name: x, violation: [amount]}", "needs a violation"),
        ("- {name: payment_untidy, severity: off}", "needs a violation; did you mean payment_method_untidy?"),
        ("- {name: x, violation: amount > 3, severity: fatal}", "severity 'fatal': choose reject, warn, abort or off"),
        ("- {name: payment_method_untidy}", "has the severity ''"),
        ("- {name: amount_missing, severity: off}", "cannot be off: silver needs it"),
        ("- {name: record_malformed, severity: warn}", "cannot be warn: silver needs it"),
        ("- {name: product_id_missing, severity: warn}", "see --orphans"),
        ("- {name: amount_missing, violation: amount > 3}", "needs another name"),
        ("- {name: accepted, violation: amount > 3}", "needs another name"),
        ("- {name: transactions_clean, violation: amount > 3}", "needs another name"),
        ("- {name: transaction_id_conflict, violation: amount > 3}", "needs another name"),
        ("- {name: Big Amount, violation: amount > 3}", "needs another name"),
        ("- {violation: amount > 3}", "the rule '' needs another name"),
        ("- {name: x, violation: 'true'}\n- {name: x, violation: 'false'}", None),
        (
            "- name: x\n  violation: amount > 3\n  name: y\n  violation: amount > 4",
            "has a rule with a field twice: begin each",
        ),
        ("- {name: x, violation: amount > 3, severty: warn}", "the rule 'x' may have a name, violation, severity"),
        ("name: x\nviolation: amount > 3", "is no list of rules: begin each with '- name:'"),
        ("- amount > 3", "is no list of rules"),
        ("", "is no list of rules"),
        ("- {name: x\n- y", "cannot read the rules .*line 2"),
    ],
)
def test_rules_that_cannot_be_used(text: str, message: str | None, tmp_path: Path) -> None:
    """They are found before there is an engine. The message has the path."""
    config = DataPipelineConfig(rules=write_rules(tmp_path, text), data_dir=str(tmp_path / "data"))
    with pytest.raises(ConfigurationError, match=message or "needs another name") as failure:
        open_source(config)
    assert f"{tmp_path}/transactions.rules.yml" in str(failure.value)
    assert "\n" not in str(failure.value)
    assert not os.path.exists(config.root)


def test_folder_of_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there are no rules in .*: name a folder with a file transactions"):
        read_rules(DataPipelineConfig(rules=str(tmp_path)))
    for name in ("transaction.rules.yml", "transactions.rules.yaml"):
        (tmp_path / name).touch()
        with pytest.raises(ConfigurationError, match=f"{name} is for no table: call it customers.rules.yml or"):
            read_rules(DataPipelineConfig(rules=str(tmp_path)))
        (tmp_path / name).unlink()
    assert read_rules(DataPipelineConfig()) == {table.name: table for table in tables(BRONZE)}


@pytest.mark.parametrize(
    ("violation", "message"),
    [
        ("no_such_function(amount)", "'x' cannot be used: .*no_such_function"),
        ("device", "the rule 'x' cannot be used"),
        ("amount + quantity", "the rule 'x' cannot be used"),
    ],
)
def test_rules_that_the_engine_refuses(
    violation: str, message: str, small: Small, spark: SparkSession, tmp_path: Path
) -> None:
    config = small(rules=write_rules(tmp_path, f"- {{name: x, violation: '{violation}'}}"))
    source = open_source(config)
    engine = choose_engine(config, source, spark)
    engine.start(os.devnull)
    with pytest.raises(ConfigurationError, match=message):
        check_rules(engine, source.tables)


def test_changed_rule_keeps_its_place(tmp_path: Path) -> None:
    rules = write_rules(tmp_path, "- {name: status_unknown, severity: warn, description: the shop has its own}")
    changed = read_rules(DataPipelineConfig(rules=rules))["transactions"].rules
    assert [rule.name for rule in changed] == [rule.name for rule in TABLES["transactions"].rules]
    [before] = [rule for rule in TABLES["transactions"].rules if rule.name == "status_unknown"]
    own = before._replace(severity=WARN, advice="the shop has its own", is_own=True)
    assert {*changed} - {*TABLES["transactions"].rules} == {own}
