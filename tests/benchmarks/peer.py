"""What the peers share: flags, the data folder, and the accounts that they give as the pipeline gives them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from data_pipeline import (
    ABORT,
    BRONZE,
    ConfigurationError,
    DataPipelineConfig,
    NotPublishedError,
    PipelineError,
    Quality,
    Rule,
    Store,
    Table,
    check_config,
    describe_profile,
    key_rules,
    tables,
)

FLAGS = ("data_dir", "num_customers", "num_transactions", "num_products", "seed", "as_of_date")


class ColumnProfile(NamedTuple):
    """A column of bronze: its values, about how many are distinct, the least and the greatest as text."""

    values: int
    distinct: int
    min: str | None
    max: str | None


class Audited(NamedTuple):
    """What a written table holds: keys are counted in silver and gold, revenue where the table has one."""

    rows: int
    keys: int | None
    revenue: Decimal | None


class Peer(ABC):
    """A run of the pipeline's work by other means: its configuration, its folder and its accounts."""

    def __init__(self, config: DataPipelineConfig) -> None:
        self.config = config
        self.root = Path(config.root)
        self.run_id = Store(config.root).next_run_id()
        self.ingested_at = datetime.now(timezone.utc).replace(microsecond=0)
        self.rows: dict[str, int] = {}
        self.quality: dict[str, Quality] = {}
        self.profile: dict[str, dict[str, dict[str, Any]]] = {}

    @abstractmethod
    def bronze(self) -> None:
        """Generates bronze and writes it."""

    @abstractmethod
    def silver(self) -> None:
        """Divides bronze, writes quarantine, minds the gate, and writes silver."""

    @abstractmethod
    def gold(self) -> None:
        """Writes gold."""

    @abstractmethod
    def read_back(self) -> Mapping[str, Audited]:
        """Reads every value of every written table."""

    def path(self, layer: str, name: str) -> Path:
        """The folder of a table."""
        return self.root / layer / name

    def wrote(self, layer: str, name: str, rows: int) -> None:
        """Notes the rows of a table."""
        self.rows[f"{layer}.{name}"] = rows
        log(f"saved {layer}.{name} ({rows:,} rows)")

    def account(self, table: Table, quality: Quality, profile: Mapping[str, ColumnProfile], repeated: int) -> None:
        """Notes what became of a bronze table's rows, and its profile; `repeated` is how many keys came again."""
        rows = self.rows.setdefault(f"{BRONZE}.{table.name}", quality.received)
        self.quality[table.name] = quality
        self.profile[table.name] = described = {
            name: {
                "rows": rows,
                "nulls": rows - column.values,
                "completeness": 100.0 * column.values / rows if rows else 100.0,
                "distinct": column.distinct,
                "distinct_is_exact": False,
                "min": column.min,
                "max": column.max,
            }
            for name, column in profile.items()
        }
        described[table.key[0]]["duplicates"] = repeated
        for line in (*describe_profile(table.name, described), *quality.describe(table.name)):
            log(line)

    def gate(self) -> None:
        """Raises NotPublishedError when too many rows were refused or a gate rule is broken."""
        for table in tables(BRONZE):
            quality = self.quality[table.name]
            broken = any(quality.violations[rule.name] for rule in table.rules if rule.severity == ABORT)
            if broken or quality.quarantined > self.config.max_quarantine_rate * quality.received:
                raise NotPublishedError(f"GATE MISSED: {quality.describe(table.name)}")

    def audit(self) -> None:
        """Raises NotPublishedError where what is read back is not what was written, or does not add up."""
        found = self.read_back()
        wrong = [f"{name}: rows unaccounted for" for name, quality in self.quality.items() if quality.unreconciled]
        wrong += [f"{name}: {table}" for name, table in found.items() if table.rows != self.rows[name]]
        wrong += [f"{name}: {table}" for name, table in found.items() if table.keys not in (None, table.rows)]
        revenues = {table.revenue for table in found.values()} - {None}
        if wrong or len(revenues) > 1:
            raise NotPublishedError(f"AUDIT FAILED: {wrong}, revenues {revenues}")
        log("audit: rows, keys and revenue add up")

    def save_record(self) -> None:
        """Writes the accounts where the pipeline writes its run record, and in its form."""
        quality = {name: dataclasses.asdict(found) for name, found in self.quality.items()}
        record = {"rows": self.rows, "quality": quality, "profile": self.profile}
        path = self.root / "runs" / f"{self.run_id}.json"
        path.parent.mkdir()
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")


def log(line: str) -> None:
    """Prints a line with the time of day, in UTC."""
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {line}", flush=True)


def profiled(table: Table) -> list[str]:
    """The columns of a bronze table that have a profile."""
    return [name for name, _ in table.columns()]


def reference_rules(table: Table) -> list[Rule]:
    """A rule per foreign key, over a column `_<key>_known` that a peer joins."""
    unknown = "{0} IS NOT NULL AND _{0}_known IS NULL"
    rules = (rule for rule in key_rules(table) if rule.column in table.foreign_keys)
    return [rule._replace(violation=unknown.format(rule.column)) for rule in rules]


def rejecting_rules(table: Table, config: DataPipelineConfig) -> list[Rule]:
    """The rules whose breach refuses a row."""
    return [rule for rule in (*table.rules, *reference_rules(table)) if rule.rejects(config)]


def conflict_reasons(table: Table) -> list[str]:
    """The reason to refuse records of one key that are no versions of one another; none where a table has no such."""
    return [rule.name for rule in key_rules(table) if rule.column in table.key]


def clears(table: Table) -> list[Rule]:
    """The rules whose breach clears a value."""
    return [rule for rule in table.rules if rule.nullify]


def parameters(rule: Rule, config: DataPipelineConfig) -> str:
    """The rule's condition, with the values of the configuration."""
    condition = rule.violation
    for name, value in config.rule_values.items():
        if name in condition and value is None:
            return "false"
        condition = condition.replace(name, value or "")
    return condition


def delivery(config: DataPipelineConfig) -> int:
    """The number of the generator's delivery."""
    return int(f"{config.as_of_date:%Y%m%d}")


def salt(seed: int, name: str) -> int:
    """63 bits that stand for a draw of this name."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()) >> 1


def weighted(words: Iterable[Any]) -> list[Any]:
    """Each word as often as its weight, where there are weights, says."""
    if isinstance(words, Mapping):
        return [word for word, weight in words.items() for _ in range(weight)]
    return list(words)


def _arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for field in dataclasses.fields(DataPipelineConfig):
        if field.name in FLAGS:
            flag, kind = "--" + field.name.replace("_", "-"), str(field.type).upper()
            parser.add_argument(flag, required=field.name == "data_dir", metavar=kind, help=field.metadata["help"])
    parser.add_argument("--bronze", type=Path, metavar="PATH", help="take the bronze tables in PATH, generate none")
    return parser.parse_args()


def _configure(flags: argparse.Namespace) -> DataPipelineConfig:
    config = DataPipelineConfig(**{name: value for name in FLAGS if (value := getattr(flags, name)) is not None})
    check_config(config)
    root = Path(config.root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigurationError(f"data_dir {root} is not an empty folder: choose another")
    for table in tables(BRONZE):
        if flags.bronze and not any((flags.bronze / table.name).glob("*.parquet")):
            raise ConfigurationError(f"--bronze: no Parquet files in {flags.bronze / table.name}")
    root.mkdir(parents=True, exist_ok=True)
    if flags.bronze:
        (root / BRONZE).symlink_to(flags.bronze.resolve())
    return config


def main(kind: type[Peer]) -> int:
    """Runs a peer from the command line and returns the exit code."""
    started = time.perf_counter()
    flags = _arguments((sys.modules[kind.__module__].__doc__ or "").partition("\n")[0])
    try:
        peer = kind(_configure(flags))
        if not flags.bronze:
            peer.bronze()
        peer.silver()
        peer.gold()
        peer.audit()
    except PipelineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    peer.save_record()
    log(f"{time.perf_counter() - started:.1f} s in all")
    return 0
