"""Changes in, history kept, changes out: deletes and versions that a database's log tells."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from compare_runs import differences
from conftest import ENGINE, THOROUGH, open_tables
from pyspark.sql import DataFrame
from test_incremental import Shop, shop, without_settings  # noqa: F401

import data_pipeline
from data_pipeline import (
    CHANGE_COLUMNS,
    CHANGED_TABLES,
    TABLES,
    BadFileError,
    NotPublishedError,
    RunRecord,
    Snapshot,
    Store,
    audit_again,
    customers_history,
    rank_versions,
    roll_back,
    unwrap_event,
)

Event = dict[str, Any]
START = datetime(2026, 1, 1)
# DuckDB needs pytz to return a time with a time zone.
PERIOD = "CAST(valid_from AS TIMESTAMP), CAST(valid_to AS TIMESTAMP)"
MODELS = {
    "customers": """
        -- columns customers: id, name, city
        SELECT id AS customer_id, name AS first_name, 'X' AS last_name, city, _deleted, _sequence, _changed_at,
            _delivery, _source_file, _source_row
        FROM customers""",
    "products": """
        -- columns products: sku, category
        SELECT sku AS product_id, 'N' AS product_name, category, 5 AS price, _deleted, _sequence, _changed_at,
            _delivery, _source_file, _source_row
        FROM products""",
    "transactions": """
        -- columns transactions: id, buyer, sku, total, placed, state
        SELECT id AS transaction_id, buyer AS customer_id, sku AS product_id, 1 AS quantity, total AS amount,
            timestamp_micros(CAST(placed AS BIGINT)) AS timestamp, 'card' AS payment_method, state AS status,
            _deleted, _sequence, _changed_at, _delivery, _source_file, _source_row
        FROM transactions""",
}
KEYS = {"customers": "id", "products": "sku", "transactions": "id"}


def milliseconds_of(moment: datetime) -> int:
    return int(moment.replace(tzinfo=timezone.utc).timestamp() * 1000)


def envelope(
    table: str, operation: str, row: Event | None, before: Event | None, position: int, moment: datetime
) -> Event:
    """An event of Debezium for PostgreSQL. With the default replica identity, `before` only has the key."""
    milliseconds = milliseconds_of(moment)
    source = {
        "version": "3.0.0.Final", "connector": "postgresql", "name": "shop", "ts_ms": milliseconds,
        "snapshot": "first" if operation == "r" else "false", "db": "shop", "sequence": f'[null,"{position}"]',
        "schema": "public", "table": table, "txId": position // 8, "lsn": position, "xmin": None,
    }  # fmt: skip
    return {"before": before, "after": row, "source": source, "op": operation, "ts_ms": milliseconds + 120}


POSTGRES = envelope("customers", "u", {"id": 17, "city": "Bonn"}, {"id": 17}, 1480, START)
MYSQL = POSTGRES | {"source": {"connector": "mysql", "ts_ms": 0, "file": "mysql-bin.000003", "pos": 484, "row": 0}}
VERSION = {"id": "17", "city": "Bonn", "_deleted": "false"}
EVENTS: dict[str, tuple[Any, Any]] = {
    "update": (POSTGRES, VERSION | {"_sequence": "1480", "_changed_at": "2026-01-01 00:00:00+00:00"}),
    "with schema": (
        {"schema": {"type": "struct"}, "payload": POSTGRES},
        VERSION | {"_sequence": "1480", "_changed_at": "2026-01-01 00:00:00+00:00"},
    ),
    "snapshot": (POSTGRES | {"op": "r"}, VERSION | {"_sequence": "1480", "_changed_at": None}),
    "delete": (
        POSTGRES | {"op": "d", "after": None},
        {"id": "17", "_deleted": "true", "_sequence": "1480", "_changed_at": "2026-01-01 00:00:00+00:00"},
    ),
    "MySQL": (MYSQL, VERSION | {"_sequence": str((3 << 32) + 484), "_changed_at": "1970-01-01 00:00:00+00:00"}),
    "message": (POSTGRES | {"op": "m", "message": {"prefix": "p"}}, None),
    "tombstone": ({"schema": None, "payload": None}, None),
    "no event": ({"op": "t", "source": "web", "id": 1}, {"op": "t", "source": "web", "id": "1"}),
    "event without a row": (
        {name: POSTGRES[name] for name in ("op", "source")},
        {"_deleted": "false", "_sequence": "1480", "_changed_at": "2026-01-01 00:00:00+00:00"},
    ),
}


@pytest.mark.parametrize("name", EVENTS)
def test_events(name: str) -> None:
    event, expected = EVENTS[name]
    assert unwrap_event(data_pipeline.parse_object(json.dumps(event)), ".") == expected


@THOROUGH
def test_event_of_an_impossible_time_is_malformed(shop: Shop) -> None:  # noqa: F811
    small_shop(shop)
    event = POSTGRES | {"source": {"connector": "postgresql", "ts_ms": 10**24}}
    (shop.source / "customers/1.jsonl").write_text(json.dumps(event) + "\n")
    assert shop.run().arrived["customers"].violations["record_malformed"] == 1


def test_truncate() -> None:
    with pytest.raises(BadFileError, match="source has truncated the table"):
        unwrap_event(data_pipeline.parse_object(json.dumps(POSTGRES | {"op": "t", "after": None})), ".")


def test_delete_without_its_key() -> None:
    with pytest.raises(BadFileError, match="a delete without a key in `before`: give the table a primary key"):
        unwrap_event(data_pipeline.parse_object(json.dumps(POSTGRES | {"op": "d", "before": None})), ".")


def day(number: int) -> datetime:
    return datetime(2026, 1, number)


def version(city: str | None, ingested: int, **values: Any) -> Event:
    """A record of customer 1: a delete if it has no city."""
    values = {"_deleted": city is None, "_delivery": ingested, "signup_date": date(2025, 6, 1), **values}
    return {"customer_id": 1, "first_name": "Ann", "city": city, "_ingested_at": day(ingested), **values}


SIGNUP = datetime(2025, 6, 1)
# Records of a customer, and the periods that they give: city, begin, end.
HISTORIES: dict[str, tuple[list[Event], list[tuple[str, datetime, datetime | None]]]] = {
    "received twice": (
        [version("Ulm", 10), version("Bonn", 12)], [("Ulm", SIGNUP, day(12)), ("Bonn", day(12), None)],
    ),
    "received together": ([version("Ulm", 10), version("Bonn", 10, _delivery=11)], [("Bonn", SIGNUP, None)]),
    "received together later": (
        [version("Ulm", 10), version("Kiel", 12), version("Bonn", 12, _delivery=13)],
        [("Ulm", SIGNUP, day(12)), ("Bonn", day(12), None)],
    ),
    "changes": (
        [version("Ulm", 20, _sequence=1, _changed_at=day(3)), version("Bonn", 20, _sequence=2, _changed_at=day(5))],
        [("Ulm", day(3), day(5)), ("Bonn", day(5), None)],
    ),
    "late version": (
        [version("Ulm", 20, _sequence=1, _changed_at=day(3)), version("Bonn", 20, _sequence=9, _changed_at=day(9)),
         version("Kiel", 21, _sequence=5, _changed_at=day(5))],
        [("Ulm", day(3), day(5)), ("Kiel", day(5), day(9)), ("Bonn", day(9), None)],
    ),
    "late first version, from a snapshot": (
        [version("Bonn", 20, _sequence=9, _changed_at=day(9)), version("Ulm", 21, _sequence=1)],
        [("Ulm", SIGNUP, day(9)), ("Bonn", day(9), None)],
    ),
    "snapshot again": (
        [version("Ulm", 20, _sequence=1), version("Ulm", 25, _sequence=3),
         version("Bonn", 20, _sequence=9, _changed_at=day(9))],
        [("Ulm", SIGNUP, day(9)), ("Bonn", day(9), None)],
    ),
    "nothing changes": (
        [version("Ulm", 20, _sequence=n, _changed_at=day(n)) for n in (3, 4, 5)], [("Ulm", day(3), None)],
    ),
    "there and back": (
        [version(city, 20, _sequence=n, _changed_at=day(n)) for n, city in ((3, "Ulm"), (4, "Bonn"), (5, "Ulm"))],
        [("Ulm", day(3), day(4)), ("Bonn", day(4), day(5)), ("Ulm", day(5), None)],
    ),
    "two changes at once": (
        [version(city, 20, _sequence=n, _changed_at=day(3)) for n, city in ((3, "Ulm"), (4, "Bonn"))],
        [("Bonn", day(3), None)],
    ),
    "delete": (
        [version("Ulm", 20, _sequence=1, _changed_at=day(3)), version(None, 20, _sequence=2, _changed_at=day(5))],
        [("Ulm", day(3), day(5))],
    ),
    "gap": (
        [version("Ulm", 20, _sequence=1, _changed_at=day(3)), version(None, 20, _sequence=2, _changed_at=day(5)),
         version(None, 20, _sequence=3, _changed_at=day(6)), version("Ulm", 20, _sequence=4, _changed_at=day(8))],
        [("Ulm", day(3), day(5)), ("Ulm", day(8), None)],
    ),
    "delete alone": ([version(None, 20, _sequence=2, _changed_at=day(5))], []),
    "repeated": (
        [version("Ulm", n, _sequence=1, _changed_at=day(3)) for n in (20, 21, 22)], [("Ulm", day(3), None)],
    ),
}  # fmt: skip


def test_history(frame: Callable[..., DataFrame]) -> None:
    """The periods of each case, with its records in any order."""
    table = TABLES["customers"]
    records = [
        record | {"customer_id": number, "last_name": "X"}
        for number, (versions, _) in enumerate(HISTORIES.values())
        for record in versions
    ]
    expected = [(name, city, begin, end) for name, (_, periods) in HISTORIES.items() for city, begin, end in periods]
    for order in (records, records[::-1]):
        rows = frame(" ".join(table.schema_in("bronze").split()), *order)
        found = customers_history(rows.where("false"), rank_versions(rows, table)).collect()
        periods = [
            (list(HISTORIES)[row["customer_id"]], row["city"], row["valid_from"], row["valid_to"])
            for row in sorted(found, key=lambda row: (row["customer_id"], row["valid_from"]))
        ]
        assert periods == expected
        assert all(row["is_current"] is (row["valid_to"] is None) for row in found)


def test_customer_received_once_has_one_version(frame: Callable[..., DataFrame]) -> None:
    table = TABLES["customers"]
    records = [version("Ulm", 9), version("Bonn", 9, _changed_at=day(3)), version("Kiel", 9, signup_date=None)]
    rows = frame(" ".join(table.schema_in("bronze").split()), *records)
    found = customers_history(rows, rank_versions(rows.where("false"), table)).collect()
    assert {(row["city"], row["valid_from"], row["valid_to"], row["is_current"]) for row in found} == {
        ("Ulm", SIGNUP, None, True), ("Bonn", day(3), None, True), ("Kiel", day(9), None, True),
    }  # fmt: skip


class Database:
    """A shop's database, and the events of its log."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.rows: dict[str, dict[Any, Event]] = {table: {} for table in KEYS}
        self.events: list[tuple[str, Event]] = []
        self.versions: dict[int, list[tuple[datetime, str | None]]] = {}  # of customers: since when, city
        self.now = START

    def change(self) -> None:
        """Inserts, updates or deletes a row."""
        table, choose = self.choose.choice([*KEYS, "transactions", "customers"]), self.choose
        key: Any = f"P{choose.randrange(3)}" if table == "products" else choose.randrange(1, 8)
        before = self.rows[table].pop(key, None)
        self.now += timedelta(hours=choose.choice([0, 1, 5]))
        row: Event | None = {
            "customers": {"id": key, "name": choose.choice("AB"), "city": choose.choice(["Ulm", "Bonn", "Kiel"])},
            "products": {"sku": key, "category": choose.choice("GH")},
            "transactions": {
                "id": key, "buyer": choose.randrange(1, 8), "sku": f"P{choose.randrange(3)}",
                "total": f"{choose.randrange(1, 9)}.00", "state": choose.choice(["completed", "completed", "pending"]),
                "placed": milliseconds_of(START + timedelta(days=choose.randrange(50))) * 1000,
            },
        }[table]  # fmt: skip
        if before and choose.random() < 0.3:
            row = None
        else:
            self.rows[table][key] = row or {}
        old = {KEYS[table]: key} if before else None
        operation = "d" if row is None else "u" if before else "c"
        self.events.append((table, envelope(table, operation, row, old, 1000 + 8 * len(self.events), self.now)))
        if table == "customers":
            text = f"{row['name']} {row['city']}" if row else None
            self.versions.setdefault(key, []).append((self.now, text))

    def history(self) -> list[tuple[int, str, datetime, datetime | None]]:
        """The periods of customers: customer, name and city, begin, end."""
        periods = []
        for key, versions in self.versions.items():
            at_once = dict(versions)  # the last one of those at the same time
            changes: list[tuple[datetime, str | None]] = []
            for moment, text in at_once.items():
                if text != (changes[-1][1] if changes else None):
                    changes.append((moment, text))
            ends = [moment for moment, _ in changes[1:]] + [None]
            periods += [(key, text, begin, end) for (begin, text), end in zip(changes, ends, strict=True) if text]
        return sorted(periods)

    def orders(self) -> list[tuple[str, Decimal]]:
        found = self.rows["transactions"].values()
        return sorted((str(row["id"]), Decimal(row["total"])) for row in found if row["state"] == "completed")


def land_events(shop: Shop, night: int, events: Sequence[tuple[str, Event]]) -> None:  # noqa: F811
    for table in KEYS:
        lines = [json.dumps(event) for of_table, event in events if of_table == table]
        if lines or night == 0:
            (shop.source / table).mkdir(exist_ok=True)
            (shop.source / table / f"{night}.jsonl").write_text("\n".join([*lines, "null", ""]))
            (shop.source / f"{table}.sql").write_text(MODELS[table])


def nights_of(choose: random.Random, events: Sequence[tuple[str, Event]], nights: int) -> list[list[tuple[str, Event]]]:
    """The events in any order, spread over nights; some come twice."""
    deliveries: list[list[tuple[str, Event]]] = [[] for _ in range(nights)]
    for event in choose.sample(events, len(events)):
        for _ in range(choose.choice([1, 1, 1, 2])):
            choose.choice(deliveries).append(event)
    return deliveries


@pytest.mark.slow
@THOROUGH
@pytest.mark.parametrize("seed", range(int(os.environ.get("HISTORIES", "2"))))
def test_events_in_any_order_give_the_tables_of_the_database(shop: Shop, seed: int, tmp_path: Path) -> None:  # noqa: F811
    """Each night equals a full refresh, and its changes lead from the night before to it."""
    choose = random.Random(seed)
    database = Database(choose)
    for _ in range(80):
        database.change()
    kept: dict[str, Path] = {}
    for night, events in enumerate(nights_of(choose, database.events, int(os.environ.get("NIGHTS", "3")))):
        land_events(shop, night, events)
        record = shop.run(verify_incremental=True, changes=True)
        for layer, table in CHANGED_TABLES:
            apply_changes(kept, table, Path(shop.config.root, "changes"), tmp_path / "kept")
            assert rows_of(kept[table.name]) == rows_of(Path(shop.config.root, layer, table.name)), table.name
    assert shop.rows("SELECT transaction_id, amount FROM transactions_clean ORDER BY 1") == database.orders()
    received = shop.rows("SELECT customer_id FROM customers_enriched WHERE NOT is_inferred ORDER BY 1")
    assert [key for (key,) in received] == sorted(database.rows["customers"])
    history = shop.rows(f"SELECT customer_id, first_name || ' ' || city, {PERIOD} FROM customers_history")
    assert sorted(history) == database.history()
    deleted = {table: quality.deleted for table, quality in record.quality.items()}
    seen: dict[str, set[Any]] = {table: set() for table in KEYS}
    for of_table, event in database.events:
        seen[of_table].add((event["after"] or event["before"])[KEYS[of_table]])
    assert deleted == {table: len(seen[table] - database.rows[table].keys()) for table in KEYS}
    # The same events in their order, in one night.
    ordered = Shop(dataclasses.replace(shop.config, data_dir=str(tmp_path / "ordered")), shop.spark)
    shutil.rmtree(shop.source)
    shop.source.mkdir()
    land_events(shop, 0, database.events)
    ordered.run()
    layers = ("silver", "gold")
    assert [line for line in differences(shop.config.root, ordered.config.root) if line.startswith(layers)] == []


def rows_of(folder: Path) -> list[Any]:
    """The rows of a table, as text."""
    with duckdb.connect() as db:
        rows = db.sql(f"SELECT CAST(COLUMNS(*) AS VARCHAR) FROM read_parquet('{folder}/*.parquet')").fetchall()
        return sorted(rows, key=str)


def apply_changes(kept: dict[str, Path], table: data_pipeline.Table, changes: Path, folder: Path) -> None:
    """Applies the changes of a run to a copy of a table, as a reader would: by the key."""
    target = folder / table.name / str(len(list((folder / table.name).glob("*"))))
    target.mkdir(parents=True)
    new = f"read_parquet('{changes / table.name}/*.parquet')"
    old = f"read_parquet('{kept[table.name]}/*.parquet')" if table.name in kept else None
    key = " AND ".join(f"old.{name} IS NOT DISTINCT FROM new.{name}" for name in table.key)
    rows = f"SELECT * EXCLUDE _change_type FROM {new} WHERE _change_type IN ('insert', 'update_postimage')"
    if old:
        rows += f" UNION ALL FROM {old} AS old WHERE NOT EXISTS (FROM {new} AS new WHERE {key})"
    duckdb.sql(f"COPY ({rows}) TO '{target}/0.parquet' (FORMAT parquet)")
    kept[table.name] = target


def small_shop(shop: Shop) -> RunRecord:  # noqa: F811
    row = {"id": 1, "buyer": 7, "sku": "P1", "total": "5.00", "state": "completed", "placed": 1_769_940_000_000_000}
    events = [
        ("customers", envelope("customers", "c", {"id": 7, "name": "Ann", "city": "Ulm"}, None, 1, START)),
        ("products", envelope("products", "c", {"sku": "P1", "category": "H"}, None, 2, START)),
        *(("transactions", envelope("orders", "c", row | {"id": n}, None, 3 + n, START)) for n in (1, 2)),
    ]
    land_events(shop, 0, events)
    return shop.run(changes=True)


def delete_of(table: str, key: Event, position: int) -> tuple[str, Event]:
    return table, envelope(table, "d", None, key, position, START + timedelta(days=3))


def test_delete_arrives(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:  # noqa: F811
    """Of an order and of a customer: the other order becomes that of an unknown customer, or is rejected."""
    caplog.set_level("INFO")
    first = small_shop(shop)
    assert (first.orders, first.revenue) == (2, Decimal("10.00"))
    assert "transactions/0.jsonl: 1 tombstones and messages are ignored" in caplog.text
    land_events(shop, 1, [delete_of("transactions", {"id": 2}, 9), delete_of("customers", {"id": 7}, 10)])
    # On Spark, test_incremental.py verifies a night.
    record = shop.run(changes=True, verify_incremental=ENGINE == "sail")
    assert (record.kind, record.orders, record.revenue) == ("incremental", 1, Decimal("5.00"))
    assert {name: quality.deleted for name, quality in record.quality.items()} == {
        "customers": 1, "products": 0, "transactions": 1,
    }  # fmt: skip
    assert "transactions: 3 received = 1 accepted + 0 quarantined + 1 duplicates removed" in caplog.text
    assert "(1 of them superseded versions) + 1 deleted; rules broken:" in caplog.text
    assert record.quality["transactions"].violations["customer_id_unknown"] == 2, "the delete itself does not count"
    assert shop.rows("SELECT customer_id, is_inferred, total_orders FROM customers_enriched") == [(7, True, 1)]
    assert shop.rows(f"SELECT city, {PERIOD} FROM customers_history") == [("Ulm", START, START + timedelta(days=3))]
    changes = rows_of(Path(shop.config.root, "changes/transactions_clean"))
    assert [row[:3] for row in changes] == [("delete", "2", "7")]
    store = Store(shop.config.root)
    audit_again(store, record.run_id)
    roll_back(store, first.run_id, 0)
    back = json.loads(Path(shop.config.root, "changes/_changes.json").read_text())
    assert (back["from_run"], back["to_run"]) == (record.run_id, first.run_id)
    assert back["rows"]["transactions_clean"] == {"insert": 1}
    assert back["rows"]["customers_enriched"] == {"update_postimage": 1, "update_preimage": 1}


@THOROUGH
def test_truncate_is_refused(shop: Shop) -> None:  # noqa: F811
    first = small_shop(shop)
    land_events(shop, 1, [("products", POSTGRES | {"op": "t", "after": None, "before": None})])
    message = r"products/1\.jsonl cannot be read, nothing is published: it says that the source has truncated .*"
    with pytest.raises(NotPublishedError, match=message + "land a new snapshot of it, .*, and run with --reload"):
        shop.run()
    assert Store(shop.config.root).published() == first.run_id


@THOROUGH
def test_delete_flag_that_cannot_be_read_is_rejected(shop: Shop) -> None:  # noqa: F811
    small_shop(shop)
    model = MODELS["transactions"].replace("_deleted,", "'D' AS _deleted,")
    (shop.source / "transactions.sql").write_text(model)
    land = shop.source / "transactions/1.jsonl"
    land.write_text((shop.source / "transactions/0.jsonl").read_text().replace('"id": 1,', '"id": 3,'))
    record = shop.run()
    assert record.arrived["transactions"].violations["change_malformed"] == 2
    assert record.orders == 2


@THOROUGH
def test_changes_that_do_not_give_the_new_rows_are_refused(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    first = small_shop(shop)
    land_events(shop, 1, [delete_of("transactions", {"id": 2}, 9)])
    real = data_pipeline.ask_duckdb

    def lose_a_row(connection: duckdb.DuckDBPyConnection, sql: str) -> Any:
        lost = "COPY (FROM changes WHERE transaction_id <> '2' "
        return real(connection, sql.replace("COPY (FROM changes ", lost) if "transaction_id" in sql else sql)

    monkeypatch.setattr(data_pipeline, "ask_duckdb", lose_a_row)
    with pytest.raises(NotPublishedError, match="the changes of transactions_clean do not give its rows"):
        shop.run(changes=True)
    assert Store(shop.config.root).published() == first.run_id


@THOROUGH
def test_overlapping_versions_fail_the_audit(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    real = data_pipeline.customers_history

    def overlapping(*arguments: Any) -> DataFrame:
        rows = real(*arguments)
        day_before = "valid_from - INTERVAL 1 DAY AS valid_from"
        others = [name for name in rows.columns if name not in ("valid_from", "is_current", "valid_to")]
        earlier = rows.selectExpr(*others, day_before, "valid_from + INTERVAL 1 DAY AS valid_to", "false AS is_current")
        return rows.unionByName(earlier)

    monkeypatch.setattr(data_pipeline, "customers_history", overlapping)
    with pytest.raises(NotPublishedError, match=r"silver.customers_history: 1 versions overlap the next one"):
        small_shop(shop)


@THOROUGH
def test_snapshot_without_history_and_change_columns(shop: Shop) -> None:  # noqa: F811
    """The snapshot of an earlier version is built upon."""
    record = small_shop(shop)
    store = Store(shop.config.root)
    snapshot = Snapshot(store, record.run_id)
    shutil.rmtree(snapshot.path("silver/customers_history"))
    record.sha256 = {name: text for name, text in record.sha256.items() if "customers_history" not in name}
    store.runs.save(record)
    for file in snapshot.files("bronze", "customers"):
        older = pq.read_table(file).drop_columns([*CHANGE_COLUMNS])
        os.unlink(file)
        pq.write_table(older, file)
    land_events(shop, 1, [delete_of("transactions", {"id": 2}, 9)])
    assert shop.run(verify_incremental=True).orders == 1
    assert shop.rows("SELECT is_current FROM customers_history") == [(True,)]


@pytest.mark.slow
@THOROUGH
def test_commands_of_the_docs(tmp_path: Path) -> None:
    """And the SQL of the docs that finds the city of an order at its time."""
    project = Path(data_pipeline.__file__).parent
    text = (project / "docs/changes.md").read_text()
    blocks = re.findall(r"run by: tests/test_changes.py -->\n```bash\n(.*?)```", text, re.DOTALL)
    script = "".join(blocks).replace("data_pipeline.py", data_pipeline.__file__)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace(".venv/bin/python", sys.executable)], cwd=tmp_path,
        capture_output=True, text=True, check=False,
        env=without_settings() | {"HOME": str(tmp_path), "PIPELINE_ENGINE": ENGINE, "PIPELINE_SETTLE_SECONDS": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    changes = json.loads((tmp_path / "cdc-data/changes/_changes.json").read_text())
    assert changes["rows"]["transactions_clean"] == {"update_postimage": 1, "update_preimage": 1}
    assert "update_postimage" in done.stdout
    [query] = re.findall(
        r"```sql\n(SELECT orders\.transaction_id.*?)```", (project / "docs/tables.md").read_text(), re.DOTALL
    )
    with open_tables(tmp_path / "cdc-data") as db:
        assert db.sql("SELECT customer_id, city FROM customers_enriched").fetchall() == [(17, "Bonn")]
        assert db.sql(f"SELECT * EXCLUDE timestamp FROM ({query})").fetchall() == [("1", "Ulm")]
        assert db.sql("SELECT amount FROM transactions_clean").fetchall() == [(Decimal("119.70"),)]


FLATTENED = [
    {"id": 17, "first_name": "Ada", "last_name": "B", "city": "Ulm", "__deleted": "false", "__op": "c",
     "__source_lsn": 5, "__source_ts_ms": 1767225600000},
    {"id": 17, "first_name": "Ada", "last_name": "B", "city": "Bonn", "__deleted": "false", "__op": "u",
     "__source_lsn": 7, "__source_ts_ms": 1767312000000},
    {"id": 18, "first_name": "Bo", "last_name": "K", "city": "Kiel", "__deleted": "true", "__op": "d",
     "__source_lsn": 9, "__source_ts_ms": 1767312000000},
]  # fmt: skip
FULL_LOAD = "id,first_name,last_name,city,signup_date\n17,Ada,B,Ulm,2026-01-01\n18,Bo,K,Kiel,2026-01-01\n"
DMS = """Op,dms_time,id,first_name,last_name,city,signup_date
U,2026-01-02 00:00:00.000000,17,Ada,B,Rome,2026-01-01
D,2026-01-02 00:00:00.000000,17,Ada,B,Rome,2026-01-01
I,2026-01-02 00:00:00.000000,17,Ada,B,Bonn,2026-01-01
D,2026-01-02 00:00:00.000001,18,Bo,K,Kiel,2026-01-01
"""


@THOROUGH
@pytest.mark.parametrize("system", ["flattened", "dms"])
def test_models_of_the_docs(system: str, shop: Shop) -> None:  # noqa: F811
    """Customer 17 has moved from Ulm to Bonn, customer 18 is deleted."""
    small_shop(shop)
    text = (Path(data_pipeline.__file__).parent / "docs/changes.md").read_text()
    models = re.findall(r"```sql\n(.*?)```", text, re.DOTALL)
    [model] = [model for model in models if ("Op = 'D'" in model) == (system == "dms")]
    (shop.source / "customers.sql").write_text(model)
    shutil.rmtree(shop.source / "customers")
    if system == "dms":
        (shop.source / "customers").mkdir()
        (shop.source / "customers/LOAD00000001.csv").write_text(FULL_LOAD)
        (shop.source / "customers/20260102-000000000.csv").write_text(DMS)
    else:
        lines = [json.dumps(event) for event in FLATTENED]
        (shop.source / "customers.jsonl").write_text("\n".join([*lines, "null", ""]))
    record = shop.run(reload=True, accept_missing_files=True)
    assert (record.quality["customers"].accepted, record.quality["customers"].deleted) == (1, 1)
    assert shop.rows("SELECT city FROM customers_enriched WHERE customer_id = 17") == [("Bonn",)]
    moved = datetime(2026, 1, 2)
    assert shop.rows(f"SELECT city, {PERIOD} FROM customers_history WHERE customer_id = 17 ORDER BY 2") == [
        ("Ulm", START, moved), ("Bonn", moved, None),
    ]  # fmt: skip
