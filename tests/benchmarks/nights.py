"""Times incremental runs against full refreshes over the same landed files: python nights.py ENGINE ORDERS NIGHTS.

It lands ORDERS orders of two years as CSV, and then a night's orders, 0.1 % of them, NIGHTS times. Each night is run
incrementally; every fifth one is also computed by `--full-refresh` and `--reload`, each in a copy of the data folder.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

import duckdb

PIPELINE = Path(__file__).resolve().parents[2] / "data_pipeline.py"
FIRST = date(2026, 1, 31)
CUSTOMER = "'Ada' AS first_name, 'X' AS last_name, 'Ulm' AS city, DATE '2024-01-01' AS signup_date"
PRODUCT = (
    "'Lamp' AS product_name, 'C' || id % 9 AS category, 5 AS price, 7 AS stock_quantity, 'S' AS supplier, "
    "DATE '2024-01-01' AS created_date, true AS is_active"
)


def land(folder: Path, name: str, sql: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    duckdb.sql(f"COPY ({sql}) TO '{folder / name}.csv' (HEADER)")


def orders(first: int, last: int, begin: str, days: int, orders_in_all: int) -> str:
    return f"""
        SELECT 'T' || id AS transaction_id, 1 + hash(id) % {orders_in_all // 5} AS customer_id,
            'P' || (1 + hash(id, 1) % 2000) AS product_id, 1 + hash(id, 2) % 3 AS quantity,
            (1 + hash(id, 3) % 20000) / 100 AS amount,
            strftime(TIMESTAMP '{begin}' + to_seconds(CAST(hash(id, 4) % ({days} * 86400) AS BIGINT)),
                '%Y-%m-%d %H:%M:%S') AS timestamp,
            'paypal' AS payment_method, CASE hash(id, 5) % 50 WHEN 0 THEN 'pending' ELSE 'completed' END AS status,
            'mobile' AS device, 'Safari' AS browser, 'Ulm' AS location
        FROM range({first}, {last}) AS ids(id)"""


def seconds(engine: str, source: Path, data: Path, as_of: date, *flags: str) -> float:
    command = [sys.executable, str(PIPELINE), "--engine", engine, "--quiet", "--settle-seconds", "0"]
    command += ["--source-dir", str(source), "--data-dir", str(data), "--as-of-date", str(as_of), *flags]
    began = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PIPELINE_KEEP_SNAPSHOTS": "2"})
    return time.perf_counter() - began


def beside(engine: str, source: Path, data: Path, as_of: date, flag: str) -> float:
    """Times a run in a copy of the data folder. The copy has hard links, as the snapshots have."""
    copy = data.with_name("copy")
    subprocess.run(["cp", "-al", data, copy], check=True)
    try:
        return seconds(engine, source, copy, as_of, flag)
    finally:
        shutil.rmtree(copy)


def main(engine: str, number: int, nights: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, data, night = Path(folder, "exports"), Path(folder, "data"), number // 1000
        land(
            source / "customers",
            "1",
            f"SELECT id AS customer_id, {CUSTOMER} FROM range(1, {number // 5 + 1}) AS ids(id)",
        )
        land(source / "products", "1", f"SELECT 'P' || id AS product_id, {PRODUCT} FROM range(1, 2001) AS ids(id)")
        for part in range(10):
            first, last = part * number // 10, (part + 1) * number // 10
            land(source / "transactions", f"{part}", orders(first, last, "2024-02-01", 730, number))
        print(f"{engine}, {number:,} orders; first run {seconds(engine, source, data, FIRST):.1f} s", flush=True)
        took: dict[str, list[float]] = {"incremental": [], "--full-refresh": [], "--reload": []}
        for count in range(1, nights + 1):
            as_of = FIRST + timedelta(days=count)
            first = number + count * night
            land(source / "transactions", f"night{count}", orders(first, first + night, str(as_of), 1, number))
            if count % 5 == 1:
                for flag in ("--full-refresh", "--reload"):
                    took[flag].append(beside(engine, source, data, as_of, flag))
            before = shutil.disk_usage(folder).free
            took["incremental"].append(seconds(engine, source, data, as_of))
            room = before - shutil.disk_usage(folder).free
            print(f"night {count}: {took['incremental'][-1]:.2f} s, {room / 1e6:.0f} MB", flush=True)
        medians = {kind: statistics.median(times) for kind, times in took.items()}
        print({kind: round(median, 2) for kind, median in medians.items()})
        for kind in ("--full-refresh", "--reload"):
            print(f"incremental ÷ {kind}: {medians['incremental'] / medians[kind]:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
