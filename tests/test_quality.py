from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from conftest import THOROUGH
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

import data_pipeline
from data_pipeline import (
    ABORT,
    ORPHAN,
    REJECT,
    TABLES,
    WARN,
    DataPipelineConfig,
    FailingKeys,
    Rule,
    Table,
    duplicate_keys,
    flag_rows,
    grouped_keys,
    key_rules,
    named_columns,
    names,
    nullify_values,
    orphan_keys,
    rows_without_keys,
    with_outcome,
)

Frame = Callable[..., DataFrame]

BRONZE = names("bronze")
GOOD: dict[str, dict[str, Any]] = {
    "customers": {
        "customer_id": 1,
        "first_name": "Ann",
        "last_name": "Lee",
        "email": "ann@example.com",
        "age": 40,
        "city": "Ulm",
        "signup_date": date(2025, 1, 1),
    },
    "products": {
        "product_id": "PROD_0001",
        "product_name": "Lamp",
        "category": "Home & Garden",
        "price": Decimal("9.99"),
        "stock_quantity": 5,
        "supplier": "Ford LLC",
        "weight_kg": 1.5,
        "created_date": date(2024, 1, 1),
        "is_active": True,
    },
    "transactions": {
        "transaction_id": "TXN_0000001",
        "customer_id": 1,
        "product_id": "PROD_0001",
        "quantity": 1,
        "amount": Decimal("9.99"),
        "timestamp": datetime(2026, 3, 4, 23, 59, 59),
        "payment_method": "paypal",
        "status": "completed",
        "device": "mobile",
        "browser": "Safari",
        "location": "Ulm",
        "order_id": None,
        "currency": "EUR",
    },
}
# For each rule that is not about a missing value: values that break it, and values at the border that do not.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "email_malformed": (
        ["ann", "ann@example", "a b@example.com", "ann@@example.com", "ann@example.com\n", ""],
        ["a.b+c@x-y.example.co"],
    ),
    "age_impossible": ([-1, 121], [0, 120]),
    "signup_date_in_future": ([date(2026, 3, 5)], [date(2026, 3, 4)]),
    "product_id_scientific": (["1.23E+11", "1,23e+11", "5E+15"], ["1.23E11", "E+11", "PROD-1.5E+3", "1.23E+11 x"]),
    "transaction_id_scientific": (["1.23E+11"], ["123000000000"]),
    "order_id_scientific": (["1.23E+11"], ["#1001"]),
    "currency_other": (["USD", " usd"], ["EUR", " eur ", "Eur"]),
    "price_not_positive": ([Decimal("0.00"), Decimal("-0.01")], [Decimal("0.01")]),
    "stock_quantity_negative": ([-1], [0]),
    "weight_kg_not_positive": ([0.0, -1.0, float("nan")], [0.01]),
    "quantity_not_positive": ([0, -1], [1]),
    "amount_not_positive": ([Decimal("0.00"), Decimal("-9.99")], [Decimal("0.01")]),
    "timestamp_in_future": ([datetime(2026, 3, 5)], [datetime(2026, 3, 4, 23, 59, 59)]),
    "timestamp_near_epoch": ([datetime(1970, 1, 21, 12)], [datetime(1971, 1, 1)]),
    "payment_method_unknown": (["seashells", ""], ["paypal", " Credit  Card", "APPLE-PAY"]),
    "payment_method_untidy": ([" paypal", "PayPal", "credit card"], ["credit_card"]),
    "status_unknown": (["lost", "Completed"], ["pending", "refunded", "returned"]),
}


def received(frame: Frame, table: Table, *changes: dict[str, Any]) -> DataFrame:
    """The good row of a table with each of the changes."""
    rows = [GOOD[table.name] | change for change in changes]
    return frame(" ".join(table.schema_in("bronze").split()), *rows)


@pytest.mark.parametrize("name", BRONZE)
def test_rules(name: str, frame: Frame, small: Callable[..., DataPipelineConfig]) -> None:
    """Each rule with rows that violate it and rows that do not, as versions and as deletes, in one query."""
    table, config = TABLES[name], small(currency="EUR")
    cases = [(rule, *case) for rule in table.rules for case in cases_of(rule, table)]
    cases += [(rule, change | {"_deleted": True}, bad and rule.checks_deletes) for rule, change, bad in cases]
    rows = [GOOD[name] | change | {"case": number} for number, (_, change, _) in enumerate(cases)]
    received_rows = frame(f"{' '.join(table.schema_in('bronze').split())}, case INT", *rows)
    verdicts = received_rows.select(
        "case", *named_columns({rule.name: rule.is_violated(config) for rule in table.rules})
    ).collect()
    assert sorted(verdict["case"] for verdict in verdicts) == [*range(len(cases))]
    for verdict in verdicts:
        rule, change, violated = cases[verdict["case"]]
        assert verdict[rule.name] is violated, f"{rule.name} of {change!r}"


def cases_of(rule: Rule, table: Table) -> Iterator[tuple[dict[str, Any], bool]]:
    """Changes to the good row, and whether they violate the rule."""
    name, good = rule.column, GOOD[table.name].get(rule.column)
    no_record, malformed, other = (
        {name: None, "_rescued_data": json.dumps({key: "x"})} for key in ("_record", name, "colour")
    )
    yield {}, False
    yield no_record, rule.name == "record_malformed"
    if rule.name.endswith("_missing"):
        blank = [" "] if isinstance(good, str) and name != "email" else []
        yield from (({name: value}, True) for value in (None, *blank))
        yield other, True
        if not isinstance(good, str):
            yield malformed, False
    elif rule.name.endswith("_malformed") and rule.name not in VALUES:
        yield malformed, rule.name != "record_malformed"
        yield other, False
        yield {name: None}, False
    else:
        violating, passing = VALUES[rule.name]
        yield from (({name: value}, True) for value in violating)
        yield from (({name: value}, False) for value in (*passing, None))


@pytest.mark.parametrize("name", BRONZE)
def test_a_delete_needs_its_key_alone(name: str) -> None:
    table = TABLES[name]
    checked = {rule.column for rule in table.rules if rule.checks_deletes}
    assert checked == {*table.key, "_rescued_data", "_deleted"}


def test_every_rule_is_about_a_column_of_its_table() -> None:
    for table in map(TABLES.__getitem__, BRONZE):
        columns = dict(table.columns("bronze"))
        assert all(rule.column in columns for rule in table.rules)
        assert len({rule.name for rule in table.rules}) == len(table.rules) > 0


class Split(NamedTuple):
    kept: DataFrame
    quarantined: DataFrame


def split_of(
    frame: Frame, config: DataPipelineConfig, name: str, *changes: dict[str, Any], **parents: DataFrame
) -> Split:
    """What becomes of some rows of a table; their parents are the good customer and the good product."""
    table = TABLES[name]
    rows = received(frame, table, *changes)
    known = {key: received(frame, TABLES[parent], {}) for key, parent in table.foreign_keys.items()} | parents
    keys = failing_keys(rows, table, known)
    rules = [*table.rules, *(rule for rule in key_rules(table) if rule.violation in {found.flag for found in keys})]
    flagged = flag_rows(rows, keys, rules, config).cache()
    is_set_aside = "(_rejected OR _duplicate_key OR _deleted IS TRUE)"
    set_aside = with_outcome(flagged.where(is_set_aside), table, rules, config).cache()
    single = flagged.where(f"NOT {is_set_aside}").select(*rows.columns, F.lit(1).alias("_versions"))
    latest = set_aside.where("_outcome = 'kept'").select(*rows.columns, "_versions")
    rejected = set_aside.where("_outcome = 'rejected'").select(*rows.columns, "_reasons")
    return Split(nullify_values(single.unionByName(latest), table.rules, config), rejected)


def failing_keys(rows: DataFrame, table: Table, parents: dict[str, DataFrame]) -> list[FailingKeys]:
    checks = [("_duplicate_key", table.key), *((f"_{key}_unknown", (key,)) for key in parents)]
    queries = [duplicate_keys(rows, table.key), *(orphan_keys(rows, parents[key], key) for key in parents)]
    numbered = [query.select(F.lit(n).alias("number"), "key_hash", "rows") for n, query in enumerate(queries)]
    found = grouped_keys(functools.reduce(DataFrame.unionAll, numbered))
    return [FailingKeys(*checks[number], count, surplus, hashes) for number, count, surplus, hashes in found]


@pytest.mark.parametrize("few", [1_000, 0])
def test_rows_are_flagged_by_few_and_by_many_keys(
    few: int, frame: Frame, config: DataPipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the literals of few hashes, and by a join with many, the verdicts are the same."""
    monkeypatch.setattr(data_pipeline, "FEW_KEYS", few)
    table = TABLES["transactions"]
    twice = {"transaction_id": "T2", "quantity": 2}
    changes = ({"transaction_id": None}, {"transaction_id": "T3", "customer_id": 9}, {"transaction_id": "T4"})
    rows = received(frame, table, twice, twice, *changes, {"transaction_id": "T5", "customer_id": None})
    parents = {key: received(frame, TABLES[parent], {}) for key, parent in table.foreign_keys.items()}
    duplicates, customers = keys = sorted(failing_keys(rows, table, parents), key=lambda keys: -keys.rows)
    assert (duplicates.flag, duplicates.rows, duplicates.surplus) == ("_duplicate_key", 2, 1)
    assert (customers.flag, customers.rows) == ("_customer_id_unknown", 1)
    flagged = flag_rows(rows, keys, [*table.rules, key_rules(table)[0]], config)
    assert flagged.columns == [*rows.columns, "_duplicate_key", "_customer_id_unknown", "_rejected"]
    verdicts = {row["transaction_id"]: tuple(row)[-3:] for row in flagged.collect()}
    left = [row["transaction_id"] for row in rows_without_keys(rows, keys).collect()]
    assert sorted(left, key=str) == sorted((key for key, (*flags, _) in verdicts.items() if not any(flags)), key=str)
    assert verdicts == {
        "T2": (True, False, False), None: (False, False, True), "T3": (False, True, True),
        "T4": (False, False, False), "T5": (False, False, True),
    }  # fmt: skip


@THOROUGH
def test_refused_row_carries_every_reason(frame: Frame, config: DataPipelineConfig) -> None:
    change = {"amount": None, "quantity": 0, "customer_id": 99, "product_id": None, "payment_method": " PAYPAL"}
    no_key = {"transaction_id": None}
    kept, quarantined = split_of(
        frame, config, "transactions", change, {"transaction_id": "TXN_0000002"}, no_key, no_key
    )
    assert [row["transaction_id"] for row in kept.collect()] == ["TXN_0000002"]
    *without_key, row = sorted(quarantined.collect(), key=lambda row: row["transaction_id"] or "")
    assert [row["_reasons"] for row in without_key] == [["transaction_id_missing"]] * 2
    assert row["_reasons"] == ["product_id_missing", "amount_missing", "quantity_not_positive", "customer_id_unknown"]
    assert row["payment_method"] == " PAYPAL", "quarantine holds the row as it was received"


@THOROUGH
def test_customer_is_kept_without_the_values_that_are_impossible(frame: Frame, config: DataPipelineConfig) -> None:
    """Without its key it is rejected; and so is an order of a customer who is rejected."""
    change = {"customer_id": 2, "email": "nobody", "age": 200, "signup_date": date(2030, 1, 1)}
    no_name, no_key = {"customer_id": 4, "last_name": None}, {"customer_id": None}
    customers, quarantined = split_of(frame, config, "customers", {}, change, no_name, no_key, no_key)
    reasons = sorted(row["_reasons"] for row in quarantined.collect())
    assert reasons == [["customer_id_missing"]] * 2
    _, row, nameless = sorted(customers.collect(), key=lambda row: row["customer_id"])
    assert (nameless["first_name"], nameless["last_name"]) == ("Ann", None)
    assert (row["customer_id"], row["first_name"], row["city"]) == (2, "Ann", "Ulm")
    assert (row["email"], row["age"], row["signup_date"]) == (None, None, None)
    changes = ({"customer_id": 3}, {"transaction_id": "TXN_0000002"})
    kept, quarantined = split_of(frame, config, "transactions", *changes, customer_id=customers)
    assert [row["customer_id"] for row in kept.collect()] == [1]
    assert [row["_reasons"] for row in quarantined.collect()] == [["customer_id_unknown"]]


@THOROUGH
def test_product_without_key_is_refused(frame: Frame, config: DataPipelineConfig) -> None:
    no_key = {"product_id": None}
    kept, quarantined = split_of(frame, config, "products", no_key, no_key, {})
    assert kept.count() == 1
    assert [row["_reasons"] for row in quarantined.collect()] == [["product_id_missing"]] * 2


def early(**change: Any) -> dict[str, Any]:
    return {"timestamp": datetime(2026, 3, 1), **change}


def late(**change: Any) -> dict[str, Any]:
    return {"timestamp": datetime(2026, 3, 2), **change}


# Records of a key; status and time of the latest one, and how many different ones there are.
RECORDS = {
    "TXN_0000001": ([late(status="pending"), early(status="completed")], ("pending", datetime(2026, 3, 2), 2)),
    "TXN_0000002": ([early(status="completed"), early(status="refunded")], ("refunded", datetime(2026, 3, 1), 2)),
    "TXN_0000003": ([early(status="pending"), early(status="completed")], ("completed", datetime(2026, 3, 1), 2)),
    "TXN_0000004": ([early(), early(), early()], ("completed", datetime(2026, 3, 1), 1)),
    # A record that is refused is no rival.
    "TXN_0000005": ([late(amount=None), early()], ("completed", datetime(2026, 3, 1), 1)),
    "TXN_0000006": ([early()], ("completed", datetime(2026, 3, 1), 1)),
}


@THOROUGH
def test_latest_record_of_a_key_wins(frame: Frame, config: DataPipelineConfig) -> None:
    records = [{"transaction_id": key, **change} for key, (changes, _) in RECORDS.items() for change in changes]
    for order in (records, records[::-1]):
        kept, quarantined = split_of(frame, config, "transactions", *order)
        found = {row["transaction_id"]: row for row in kept.collect()}
        rows = {key: (row["status"], row["timestamp"], row["_versions"]) for key, row in found.items()}
        assert rows == {key: winner for key, (_, winner) in RECORDS.items()}
        assert [row["_reasons"] for row in quarantined.collect()] == [["amount_missing"]]


@THOROUGH
def test_tie_of_customers_is_broken_by_the_remaining_columns(frame: Frame, config: DataPipelineConfig) -> None:
    """An attribute differs there, not a sum: the customer's orders must not be lost."""
    ties = [{"age": age, "city": city} for age, city in ((2, None), (3, "Ulm"), (3, "Bonn"))]
    kept, quarantined = split_of(frame, config, "customers", *ties)
    [row] = kept.collect()
    assert (row["age"], row["city"], quarantined.count()) == (3, "Ulm", 0)


OTHER = {"product_id": "PROD_0002"}
KEY_ALONE = dict.fromkeys(GOOD["transactions"].keys() - {"transaction_id"}) | {"_deleted": True}
# Records of one order: for each whether it is rejected as a conflict; and the status of the winner, if there is one.
CONFLICTS: dict[str, tuple[list[tuple[dict[str, Any], bool]], str | None]] = {
    "lines of an order": ([({}, True), (OTHER, True), ({}, True)], None),
    "lines in two files": ([({"_delivery": 1}, True), ({**OTHER, "_delivery": 2}, True)], None),
    "lines on two days": ([(early(), True), (late(**OTHER), True)], None),
    "a line without a product": ([({}, True), ({"product_id": None}, True)], None),
    "lines of one product": ([({"quantity": 2}, True), ({"quantity": 3}, True)], None),
    "two latest records": (
        [(early(), False), (late(amount=Decimal("5.00")), True), (late(amount=Decimal("6.00")), True)], None,
    ),
    "older records that differ": ([(early(quantity=2), False), (early(quantity=3), False), (late(), False)],
                                  "completed"),
    "later delivery": ([({"quantity": 2, "_delivery": 1}, False), ({"quantity": 3, "_delivery": 2}, False)],
                       "completed"),
    "repetition": ([({"_source_row": 1}, False), ({"_source_row": 2}, False)], "completed"),
    "status": ([({"status": "pending"}, False), ({"status": "returned"}, False)], "returned"),
    "other line is rejected": ([({**OTHER, "amount": None}, False), ({}, False)], "completed"),
    "sequence, other product": ([({"_sequence": 1}, False), ({**OTHER, "_sequence": 2}, False)], "completed"),
    "sequence before timestamp": (
        [(late(_sequence=1), False), (early(_sequence=2, status="pending"), False)], "pending",
    ),
    "sequence after none": ([(late(), False), (early(_sequence=1, status="pending", **OTHER), False)], "pending"),
    "equal sequence, other values": (
        [({"_sequence": 1, "_delivery": 1}, True), (late(_sequence=1, _delivery=2), True)], None,
    ),
    "equal sequence, repeated": ([({"_sequence": 1}, False), ({"_sequence": 1, "_delivery": 2}, False)], "completed"),
    "changed at": (
        [(early(status="pending", _changed_at=datetime(2026, 3, 2)), False),
         (late(_changed_at=datetime(2026, 3, 1)), False)], "pending",
    ),
    "delete": ([({}, False), (KEY_ALONE, False)], None),
    "delete without a version": ([(KEY_ALONE, False)], None),
    "delete of order lines": ([({}, False), (OTHER, False), (KEY_ALONE, False)], None),
    "delete of equal sequence": ([({"_sequence": 1}, False), ({**KEY_ALONE, "_sequence": 1}, False)], None),
    "deletes with and without values": (
        [({"_deleted": True, "_sequence": 1}, False), ({**KEY_ALONE, "_sequence": 1}, False)], None,
    ),
    "delete of an older version": ([({"_sequence": 2}, False), ({**KEY_ALONE, "_sequence": 1}, False)], "completed"),
    "version after a delete": ([({"_deleted": True, "_delivery": 1}, False), ({"_delivery": 2}, False)], "completed"),
    "delete in a later file": ([({"_delivery": 1}, False), ({"_deleted": True, "_delivery": 2}, False)], None),
}  # fmt: skip


def test_records_of_a_key_that_are_no_versions_are_in_conflict(
    frame: Frame, small: Callable[..., DataPipelineConfig]
) -> None:
    config = small(orphans="keep")
    records = [
        {"transaction_id": name, "_source_row": number, **change}
        for name, (changes, _) in CONFLICTS.items()
        for number, (change, _) in enumerate(changes)
    ]
    for order in (records, records[::-1]):
        kept, quarantined = split_of(frame, config, "transactions", *order)
        reasons = {
            (row["transaction_id"], row["_source_row"])
            for row in quarantined.collect()
            if row["_reasons"] == ["transaction_id_conflict"]
        }
        assert reasons == {
            (name, change.get("_source_row", number))
            for name, (changes, _) in CONFLICTS.items()
            for number, (change, rejected) in enumerate(changes)
            if rejected
        }
        assert {row["transaction_id"]: row["status"] for row in kept.collect()} == {
            name: status for name, (_, status) in CONFLICTS.items() if status
        }


@THOROUGH
def test_orphans_are_rejected_or_kept(frame: Frame, small: Callable[..., DataPipelineConfig]) -> None:
    """They are counted either way."""
    changes: list[dict[str, Any]] = [
        {"transaction_id": "T1", "customer_id": None}, {"transaction_id": "T2", "customer_id": 9},
        {"transaction_id": "T3", "product_id": " "}, {"transaction_id": "T4", "product_id": "gone"},
    ]  # fmt: skip
    kept, quarantined = split_of(frame, small(orphans="keep"), "transactions", {}, *changes)
    assert (kept.count(), quarantined.count()) == (5, 0)
    kept, quarantined = split_of(frame, small(orphans="reject"), "transactions", {}, *changes)
    assert [row["transaction_id"] for row in kept.collect()] == ["TXN_0000001"]
    assert sorted((row["transaction_id"], row["_reasons"]) for row in quarantined.collect()) == [
        ("T1", ["customer_id_missing"]), ("T2", ["customer_id_unknown"]),
        ("T3", ["product_id_missing", "product_id_unknown"]), ("T4", ["product_id_unknown"]),
    ]  # fmt: skip


def test_orphans_are_kept_from_landed_files_unless_it_is_said(small: Callable[..., DataPipelineConfig]) -> None:
    found = {
        (source, orphans): small(source_dir=source, orphans=orphans).keeps_orphans
        for source in (None, "/exports")
        for orphans in (None, "keep", "reject")
    }
    assert [case for case, kept in found.items() if kept] == [
        (None, "keep"), ("/exports", None), ("/exports", "keep"),
    ]  # fmt: skip


@THOROUGH
def test_negative_quantity_and_amount_together_are_a_return(frame: Frame, config: DataPipelineConfig) -> None:
    def order(name: str, quantity: int, amount: str) -> dict[str, Any]:
        return {"transaction_id": name, "quantity": quantity, "amount": Decimal(amount)}

    kept, quarantined = split_of(
        frame, config, "transactions", order("T1", -1, "-9.99"), order("T2", 1, "-9.99"), order("T3", -1, "9.99")
    )
    assert [row["transaction_id"] for row in kept.collect()] == ["T1"]
    assert {row["transaction_id"]: row["_reasons"] for row in quarantined.collect()} == {
        "T2": ["amount_not_positive"], "T3": ["quantity_not_positive"],
    }  # fmt: skip


def test_any_payment_method_is_accepted_from_landed_files_unless_some_are_named(
    frame: Frame, small: Callable[..., DataPipelineConfig]
) -> None:
    [rule] = [rule for rule in TABLES["transactions"].rules if rule.name == "payment_method_unknown"]
    cases: list[dict[str, Any]] = [
        {}, {"source_dir": "/exports"}, {"payment_methods": "cash"},
        {"source_dir": "/exports", "payment_methods": "paypal"},
    ]  # fmt: skip
    verdicts = {str(number): rule.is_violated(small(**values)) for number, values in enumerate(cases)}
    [row] = (
        received(frame, TABLES["transactions"], {"payment_method": "Cash"}).select(*named_columns(verdicts)).collect()
    )
    assert tuple(row) == (True, False, False, True)


def test_only_warnings_clear_values() -> None:
    rules: list[Rule] = [rule for table in BRONZE for rule in TABLES[table].rules]
    assert {rule.severity for rule in rules} == {REJECT, WARN, ABORT, ORPHAN}
    assert {rule.severity for rule in rules if rule.nullify} == {WARN}
    assert [rule.name for rule in key_rules(TABLES["transactions"])] == [
        "customer_id_unknown", "product_id_unknown", "transaction_id_conflict",
    ]  # fmt: skip
    assert not key_rules(TABLES["customers"])
