#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["deltalake==1.6.6", "pyarrow==26.0.1"]
# ///
"""Keeps the published data as Delta tables: each published run is a version of each table that it changed.

    python data_pipeline.py --after-publish "uv run integrations/delta.py"    after each run and each rollback
    uv run integrations/delta.py ~/pipeline-data                              by hand, to catch up
    uv run integrations/delta.py ~/pipeline-data --versions RUN               which version of each table is that run

The tables are in <data folder>/delta/<layer>/<table>. Their files are hard links to those of the snapshots. Only the
difference to the published snapshot is committed, so runs may be left out or rolled back, and this may be killed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Schema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction, RemoveAction, create_table_with_add_actions
from pyarrow import parquet

LAYERS = ("bronze", "quarantine", "silver", "gold")  # gold last: a run that is found there is complete
CONFIGURATION = {"delta.logRetentionDuration": "interval 36500 days"}  # by default, history ends after 30 days
HARMLESS = ("OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES")  # operations that keep the rows


def tables(folder: Path) -> list[Path]:
    """Returns the tables in a folder of layers."""
    return [path for layer in LAYERS for path in sorted((folder / layer).glob("*"))]


def statistics(file: Path) -> str:
    """Returns Delta's statistics from the footer of a Parquet file: rows, nulls, and bounds of integers and dates."""
    footer = parquet.read_metadata(file)
    found: dict[str, Any] = {"numRecords": footer.num_rows, "minValues": {}, "maxValues": {}, "nullCount": {}}
    for number in range(footer.num_columns if footer.num_row_groups else 0):
        name = footer.schema.column(number).path
        groups = [footer.row_group(group).column(number).statistics for group in range(footer.num_row_groups)]
        if "." in name or not all(group and group.has_null_count for group in groups):
            continue
        found["nullCount"][name] = sum(group.null_count for group in groups)
        if all(group.has_min_max and type(group.min) in (int, date) for group in groups):
            found["minValues"][name] = min(group.min for group in groups)
            found["maxValues"][name] = max(group.max for group in groups)
    return json.dumps(found, default=str)


def link(file: Path, path: Path) -> AddAction:
    """Links a file of a snapshot into a Delta table, and returns the action that adds it."""
    if not path.exists():
        os.link(file, path)
    state = path.stat()
    return AddAction(path.name, state.st_size, {}, int(state.st_mtime * 1000), True, statistics(path))


def changes_of_others(table: Path) -> list[str]:
    """Describes the changes of rows since the last commit of this program."""
    commits = DeltaTable(str(table)).history() if DeltaTable.is_deltatable(str(table)) else []
    since = itertools.takewhile(lambda commit: "run_id" not in commit, commits)
    changes = [commit for commit in since if commit["operation"] not in HARMLESS]
    return [f"{table}, version {commit['version']} ({commit['operation']})" for commit in changes]


def synchronize(snapshot: Path, table: Path, run_id: str) -> bool:
    """Commits what differs between a table of a snapshot and a Delta table. Returns whether anything does."""
    files = {f"{run_id}-{file.name}": file for file in sorted(snapshot.glob("*.parquet"))}  # names recur between runs
    columns = parquet.read_schema(max(files.values(), key=lambda file: file.stat().st_mtime_ns))
    schema = Schema.from_arrow(pa.schema([pa.field(column.name, column.type) for column in columns]))
    commit = {"commit_properties": CommitProperties(custom_metadata={"run_id": run_id})}
    table.mkdir(parents=True, exist_ok=True)
    if not DeltaTable.is_deltatable(str(table)):
        added = [link(file, table / name) for name, file in files.items()]
        create_table_with_add_actions(str(table), schema, added, configuration=CONFIGURATION, **commit)
        return True
    delta = DeltaTable(str(table))
    # Overwriting also changes the schema. Files get new names, since Delta forbids to remove and add the same one.
    mode = "append" if delta.schema().to_json() == schema.to_json() else "overwrite"
    present = pa.table(delta.get_add_actions(flatten=True)).to_pylist() if mode == "append" else []
    sizes = {unquote(action["path"]): action["size_bytes"] for action in present}
    inodes = {(table / name).stat().st_ino: name for name in sizes if (table / name).exists()}
    wanted = {inodes.get(file.stat().st_ino, name): file for name, file in files.items()}
    actions = [link(file, table / name) for name, file in wanted.items() if name not in sizes]
    removed = [name for name in sizes if name not in wanted]
    actions += [RemoveAction(name, True, int(time.time() * 1000), sizes[name], {}) for name in removed]
    if actions:
        delta.create_write_transaction(actions, mode, schema, **commit)
    return bool(actions)


def versions(folder: Path, run_id: str) -> dict[str, int]:
    """Returns the version of each Delta table that a run has published. Raises ValueError if it was not committed."""
    histories = {str(path.relative_to(folder)): DeltaTable(str(path)).history() for path in tables(folder)}
    last = next(reversed(histories.values()), [])
    published = next((commit["timestamp"] for commit in last if commit.get("run_id") == run_id), None)
    if published is None:
        raise ValueError(f"run {run_id} is not in {folder}, or was only committed in part")
    # A table that a run has not changed has no commit of it.
    until = {
        name: [commit for commit in found if commit["timestamp"] <= published] for name, found in histories.items()
    }
    return {name: commits[0]["version"] for name, commits in until.items() if commits}


def main() -> str | None:
    """Does what the command line asks for. Returns what went wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    root = os.environ.get("PIPELINE_ROOT", "~/pipeline-data")
    parser.add_argument("data_dir", nargs="?", default=root, help="data folder (PIPELINE_ROOT, or ~/pipeline-data)")
    parser.add_argument("--versions", metavar="RUN", help="show the version of each table that is this run")
    parser.add_argument("--overwrite", action="store_true", help="also commit over rows that somebody else has changed")
    parser.add_argument("--vacuum", metavar="DAYS", type=int, help="remove the files of versions older than these days")
    arguments = parser.parse_args()
    data = Path(arguments.data_dir).expanduser()
    try:
        if arguments.versions:
            print(json.dumps(versions(data / "delta", arguments.versions), indent=1))
            return None
        snapshot = (data / "current").resolve(strict=True)
        targets = {path: data / "delta" / path.relative_to(snapshot) for path in tables(snapshot)}
        changed = [change for table in targets.values() for change in changes_of_others(table)]
        if changed and not arguments.overwrite:
            raise ValueError(f"somebody else has changed {'; '.join(changed)}: keep copies, then use --overwrite")
        for path, table in targets.items():
            if synchronize(path, table, snapshot.name):
                print(f"{path.relative_to(snapshot)}: version {DeltaTable(str(table)).version()}")
            if arguments.vacuum is not None:  # only a full one finds files that were linked and not committed
                hours = 24 * arguments.vacuum
                DeltaTable(str(table)).vacuum(hours, dry_run=False, enforce_retention_duration=False, full=True)
    except (OSError, ValueError, DeltaError) as error:
        return f"delta: {error}"
    return print(f"delta: all tables are run {snapshot.name}")


if __name__ == "__main__":
    sys.exit(main())
