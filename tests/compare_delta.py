"""Compares each Delta table with the snapshots of runs, row for row, in all readers that need no JVM.

uv run --no-project --with deltalake --with duckdb … tests/compare_delta.py DATA_FOLDER RUN...
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import duckdb
import polars
import pyarrow as pa
from deltalake import DeltaTable
from pyarrow import parquet

DELTA = Path(__file__).parent.parent / "integrations/delta.py"


def shown(value: Any) -> str:
    """The same text for the same value, whatever reader it comes from."""
    return str(value.astimezone(timezone.utc) if isinstance(value, datetime) else value)


def rows(table: pa.Table, columns: list[str]) -> list[tuple[str, ...]]:
    return sorted(tuple(shown(row[name]) for name in columns) for row in table.to_pylist())


def snapshot(folder: Path) -> pa.Table:
    """The rows of a snapshot's table, in the columns of its newest file."""
    files = sorted(folder.glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    schema = pa.schema([column.with_nullable(True) for column in parquet.read_schema(files[-1])])
    parts = [parquet.read_table(file) for file in files]
    return pa.concat_tables(parts, promote_options="permissive").select(schema.names).cast(schema)


def by_pandas(path: str, version: int, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(DeltaTable(path, version=version).to_pandas(), schema=schema, preserve_index=False)


def by_duckdb(path: str, version: int, _: pa.Schema) -> pa.Table:
    """As docs/delta.md says: the files of the version, with the names of the columns from Delta."""
    delta = DeltaTable(path, version=version)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        found = connection.read_parquet(delta.file_uris(), union_by_name=True)
        return found.select(", ".join(field.name for field in delta.schema().fields)).to_arrow_table()


READERS: dict[str, Callable[[str, int, pa.Schema], pa.Table]] = {
    "deltalake": lambda path, version, _: DeltaTable(path, version=version).to_pyarrow_table(),
    "pandas": by_pandas,
    "polars": lambda path, version, _: polars.scan_delta(path, version=version).collect().to_arrow(),
    "duckdb": by_duckdb,
}


def differences(data: Path, run_id: str) -> Iterator[str]:
    command = [sys.executable, str(DELTA), str(data), "--versions", run_id]
    versions = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(versions) == 16
    for name, version in versions.items():
        expected = snapshot(data / "snapshots" / run_id / name)
        columns = expected.schema.names
        for reader, read in READERS.items():
            found = read(str(data / "delta" / name), version, expected.schema)
            if found.schema.names != columns or rows(found, columns) != rows(expected, columns):
                yield f"{reader} reads {name} of {run_id}, version {version}, as {found}, not {expected}"
        count = DeltaTable(str(data / "delta" / name), version=version).count()
        if count != expected.num_rows:
            yield f"the statistics of {name} of {run_id} say {count} rows, not {expected.num_rows}"
        print(f"{run_id} {name}: version {version}, {expected.num_rows} rows")


if __name__ == "__main__":
    data_folder, *run_ids = sys.argv[1:]
    sys.exit("\n".join(line for run_id in run_ids for line in differences(Path(data_folder), run_id)) or None)
