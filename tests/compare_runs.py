"""Compares the tables of two or more data folders, row for row: python tests/compare_runs.py FOLDER FOLDER..."""

import sys
from pathlib import Path

import duckdb

LAYERS = ("bronze", "silver", "gold", "quarantine")


def tables(root: str | Path) -> list[str]:
    return sorted(f"{layer}/{table.name}" for layer in LAYERS for table in Path(root, layer).iterdir())


def rows(root: str | Path, table: str) -> str:
    """The rows of a table, without the columns that differ from run to run."""
    columns = "COLUMNS(lambda c: c NOT IN ('_ingested_at', '_run_id'))"
    return f"(SELECT {columns} FROM read_parquet('{root}/{table}/*.parquet'))"


def differences(one: str | Path, other: str | Path) -> list[str]:
    """A line per table that differs in its columns, types or rows."""
    found = []
    if tables(one) != tables(other):
        return [f"different tables: {tables(one)} and {tables(other)}"]
    with duckdb.connect() as db:
        for table in tables(one):
            left, right = rows(one, table), rows(other, table)
            if db.sql(f"DESCRIBE {left}").fetchall() != db.sql(f"DESCRIBE {right}").fetchall():
                found.append(f"{table}: different columns")
                continue
            only_left, only_right = (
                db.sql(f"SELECT count(*) FROM (FROM {a} EXCEPT ALL FROM {b})").fetchall()[0][0]
                for a, b in ((left, right), (right, left))
            )
            if only_left or only_right:
                found.append(f"{table}: {only_left} rows only in {one}, {only_right} only in {other}")
    return found


if __name__ == "__main__":
    first, *others = sys.argv[1:]
    problems = [problem for other in others for problem in differences(first, other)]
    print("\n".join(problems) or f"the {len(tables(first))} tables of {len(others) + 1} folders are the same")
    sys.exit(bool(problems))
