"""Storage named by a URI: a real HDFS, in which each run leaves its snapshot."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from compare_runs import differences
from conftest import ENGINE
from mini_hdfs import mini_hdfs
from pyspark.sql import SparkSession

from data_pipeline import (
    DataPipelineConfig,
    NotPublishedError,
    PipelineError,
    RunRecord,
    Store,
    roll_back,
    run_pipeline,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(ENGINE == "sail", reason="Sail's own client of HDFS is not tested"),
    pytest.mark.skipif(not shutil.which("mvn"), reason="Maven brings Hadoop's mini cluster"),
]


@pytest.fixture(scope="module")
def hdfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mini_hdfs(tmp_path_factory.mktemp("hdfs")) as uri:
        yield uri


def test_runs_leave_their_snapshots_on_hdfs(
    hdfs: str, report: RunRecord, small: Callable[..., DataPipelineConfig], spark: SparkSession, tmp_path: Path
) -> None:
    root = f"{hdfs}/shop"
    java: Any = spark.sparkContext._jvm
    to_path = java.org.apache.hadoop.fs.Path
    files = to_path(root).getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())

    def folders(folder: str) -> list[str]:
        return sorted(status.getPath().getName() for status in files.listStatus(to_path(folder)))

    first = run_pipeline(small(data_dir=root), spark)
    assert first.data_dir == f"{root}/snapshots/{first.run_id}"
    assert spark.read.parquet(f"{first.data_dir}/gold/category_analytics").count() == 8
    files.copyToLocalFile(to_path(first.data_dir), to_path(f"file://{tmp_path}/copy"))
    assert differences(report.data_dir, tmp_path / "copy") == []

    with pytest.raises(NotPublishedError, match=f"the refused snapshot is in {root}/snapshots/"):
        run_pipeline(small(data_dir=root, max_quarantine_rate=0.01), spark)
    [refused] = set(folders(f"{root}/snapshots")) - {first.run_id}
    assert folders(f"{root}/snapshots/{refused}") == ["bronze", "quarantine"]
    assert folders(first.data_dir) == ["bronze", "gold", "quarantine", "silver"]
    assert folders(root) == ["snapshots"]

    with pytest.raises(PipelineError, match="has no link to switch"):
        roll_back(Store(root), "", 0.0)


def test_landed_files_become_tables_on_hdfs(
    hdfs: str, small: Callable[..., DataPipelineConfig], spark: SparkSession, tmp_path: Path
) -> None:
    """The files are read on this machine; the tables are those of a local run."""
    example = Path(__file__).parent.parent / "docs/example"
    values = {"source_dir": str(example), "as_of_date": "2026-02-28", "settle_seconds": 0, "max_quarantine_rate": 0.5}
    there, here = (run_pipeline(small(**folder, **values), spark) for folder in ({"data_dir": f"{hdfs}/landed"}, {}))
    java: Any = spark.sparkContext._jvm
    to_path = java.org.apache.hadoop.fs.Path
    files = to_path(there.data_dir).getFileSystem(spark.sparkContext._jsc.hadoopConfiguration())
    files.copyToLocalFile(to_path(there.data_dir), to_path(f"file://{tmp_path}/copy"))
    assert differences(here.data_dir, tmp_path / "copy") == []
