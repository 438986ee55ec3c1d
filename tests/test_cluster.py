"""A real cluster: Spark's own master and workers, on loopback, with machines that die and disks that are not shared."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from compare_runs import differences
from conftest import AS_OF, ENGINE, SMALL
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from test_command import start
from test_gate import receive, record_of_last_run

import data_pipeline
from data_pipeline import (
    DataPipelineConfig,
    NotPublishedError,
    PipelineError,
    Run,
    RunRecord,
    Snapshot,
    Spark,
    Store,
    audit,
    check_cluster,
    choose_engine,
    open_source,
    preflight,
    run_pipeline,
)

pytestmark = pytest.mark.skipif(ENGINE == "sail", reason="Sail runs within one process")

# What the run that all others are compared with was told.
FLAGS = (*(f"--{name.replace('_', '-')}={rows}" for name, rows in SMALL.items()), f"--as-of-date={AS_OF}")
# Programs of a minute: the thorough compiler takes longer than it saves, and with it several of them share two cores.
QUICK = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


class Cluster:
    """A master and its workers; all processes of such a machine are one group, and die together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.page = free_port(), free_port()
        self.machines: dict[str, subprocess.Popen[bytes]] = {}
        self.start("master", "master.Master", "--port", str(self.port), "--webui-port", str(self.page))

    @property
    def url(self) -> str:
        return f"spark://127.0.0.1:{self.port}"

    @property
    def flags(self) -> tuple[str, ...]:
        return (*FLAGS, f"--spark-master={self.url}", "--driver-host=127.0.0.1", "--cluster-timeout=120")

    def start(self, name: str, program: str, *arguments: str, within: tuple[str, ...] = ()) -> None:
        home = data_pipeline.spark_home()
        java = data_pipeline.java_home(data_pipeline.spark_version(home))
        command = (*within, str(home / "bin/spark-class"), f"org.apache.spark.deploy.{program}", "--host", "127.0.0.1")
        with open(self.folder / f"{name}.log", "wb") as log:
            self.machines[name] = subprocess.Popen(
                [*command, *arguments],
                env=os.environ
                | {"SPARK_HOME": str(home), "JAVA_HOME": str(java), "SPARK_DAEMON_MEMORY": "256m"}
                | {"JDK_JAVA_OPTIONS": QUICK},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def add_workers(self, within: Mapping[str, tuple[str, ...]]) -> None:
        """Starts workers of one core, each within another command where one is named, and waits for all of them."""
        for name, command in within.items():
            size = ("--cores", "1", "--memory", "1g", "--webui-port", "0")
            self.start(name, "worker.Worker", *size, "--work-dir", str(self.folder / name), self.url, within=command)
        for _ in range(120):
            time.sleep(0.5)
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{self.page}/json/", timeout=5) as page,
            ):
                if json.load(page)["aliveworkers"] == len(within):
                    return
        raise AssertionError(f"not all workers are there; see the logs in {self.folder}")

    def kill(self, *names: str) -> None:
        for name in names:
            machine = self.machines.pop(name)
            os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()


MakeCluster = Callable[..., Cluster]


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Makes clusters with workers of the given names."""
    made: list[Cluster] = []

    def make(*workers: str, **within: tuple[str, ...]) -> Cluster:
        made.append(Cluster(tmp_path))
        made[-1].add_workers(dict.fromkeys(workers, ()) | within)
        return made[-1]

    yield make
    for cluster in made:
        cluster.kill(*cluster.machines)


def run(
    home: Path, cluster: Cluster, *flags: str, killing: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[int, str]:
    """Runs the pipeline on a cluster, some machines of which die when a text is first in the log."""
    waiting, log = dict(killing or {}), ""
    with start(home, *cluster.flags, *flags) as process:
        assert process.stderr
        too_long = threading.Timer(300, process.kill)
        too_long.start()
        for line in process.stderr:
            log += line
            for text in [text for text in waiting if text in line]:
                cluster.kill(*waiting.pop(text))
        too_long.cancel()
        assert not waiting, log
    return process.returncode, log


def folder(home: Path) -> Path:
    return home / "pipeline-data"


@pytest.mark.slow
def test_cluster_gives_the_tables_of_a_local_run(
    make_cluster: MakeCluster, first_run: tuple[DataPipelineConfig, RunRecord], tmp_path: Path
) -> None:
    """By spark-submit; and by a run that survives a worker and the master.

    What the dead worker held of silver is computed again; executors work on without a master.
    """
    cluster = make_cluster("one", "two")
    submitted, surviving = tmp_path / "submitted", tmp_path / "surviving"
    for home in (submitted, surviving):
        home.mkdir()
    submit = ("--master", cluster.url, "--conf", "spark.driver.host=127.0.0.1", "--executor-cores", "1")
    with start(
        submitted,
        *FLAGS,
        program=(*submit, data_pipeline.__file__),
        interpreter=str(data_pipeline.spark_home() / "bin/spark-submit"),
        PYSPARK_PYTHON=sys.executable,
    ) as process:
        # spark-submit sends all that Python writes to its standard output.
        log, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert f"Executors on {cluster.url}: 2\n" in log
    assert differences(first_run[1].data_dir, folder(submitted)) == []
    assert not list(folder(submitted).glob("snapshots/*/probe"))

    deaths = {"/quarantine/": ("one",), "GOLD LAYER": ("master",)}
    code, log = run(surviving, cluster, "--shuffle-partitions=4", killing=deaths)
    assert code == 0, log
    assert f"Executors on {cluster.url}: 2\n" in log
    assert differences(first_run[1].data_dir, folder(surviving)) == []


@pytest.mark.slow
def test_nothing_to_run_on(make_cluster: MakeCluster, published: DataPipelineConfig, tmp_path: Path) -> None:
    """No machine has room, or none is left in the middle of silver: a clear end, and what was published stays."""
    folder(tmp_path).symlink_to(published.root)
    before = os.readlink(folder(tmp_path) / "current")
    cluster = make_cluster("one")
    dead = {"SILVER LAYER": ("master", "one")}
    never: dict[str, tuple[str, ...]] = {}
    cases = ("--executor-memory=99g", never, "start of the executors:", 5), ("--seed=42", dead, "", 12)
    for flag, killing, where, timeout in cases:
        code, log = run(tmp_path, cluster, flag, f"--cluster-timeout={timeout}", killing=killing)
        assert (code, log.count("ERROR")) == (2, 1), log
        assert f"{cluster.url} left the run without an executor for {timeout} s, in {where}" in log
        assert os.readlink(folder(tmp_path) / "current") == before
        assert record_of_last_run(published)["result"] == "failed"
        assert len(list(folder(tmp_path).glob("snapshots/*"))) == 1


@pytest.mark.parametrize("lost", [False, True])
def test_audit_blames_the_data_only_while_there_are_machines(
    lost: bool, config: DataPipelineConfig, report: RunRecord, spark: SparkSession
) -> None:
    record = dataclasses.replace(report, run_id="19991231T235959Z-0000", seconds={}, started_after={})
    engine = Spark(config, 0, spark)
    engine.spark, engine.shares_storage = spark, True
    run = Run(config, engine, Snapshot(Store(config.root), record.run_id), record)
    died = (
        "Job aborted due to stage failure: … ExecutorLostFailure (executor 8 exited caused by one of the running tasks)"
    )
    assert engine.is_infrastructure_failure(RuntimeError(died))
    if lost:
        engine.lost = "left the run without an executor for 5 s"
    with pytest.raises(AnalysisException if lost else NotPublishedError):
        audit(run)


@pytest.mark.slow
def test_disks_that_are_not_shared(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """One of two workers has a disk of its own where the data folder is."""
    folder(tmp_path).mkdir()
    alone = ("unshare", "--map-root-user", "--mount")
    if not shutil.which("unshare") or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("a disk of its own takes namespaces, which this machine does not allow")
    mounting = ("sh", "-c", f"mount -t tmpfs none '{folder(tmp_path)}' && exec \"$@\"", "sh")
    cluster = make_cluster("one", two=(*alone, *mounting))

    code, log = run(tmp_path, cluster)
    assert (code, log.count("ERROR")) == (2, 1), log
    assert "is not shared: the executors wrote 10,000 rows there, and 5,000 of them are on this machine" in log
    assert list(folder(tmp_path).glob("snapshots/*")) == []


def test_probe_leaves_nothing(
    config: DataPipelineConfig, report: RunRecord, spark: SparkSession, tmp_path: Path
) -> None:
    engine = choose_engine(config, open_source(config), spark)
    with contextlib.closing(engine):
        engine.start(os.devnull)
        check_cluster(engine, Snapshot(Store(f"{tmp_path}/data"), report.run_id))
    assert list(tmp_path.glob("data/snapshots/*")) == [tmp_path / "data/snapshots" / report.run_id]
    assert list(tmp_path.glob("data/snapshots/*/*")) == []


def test_no_master(small: Callable[..., DataPipelineConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pipeline, "running_session", lambda: None)
    one, other = f"127.0.0.1:{free_port()}", f"localhost:{free_port()}"
    refused = f"no Spark master at {one} .*refused.* at {other} .*refused.*: start it, or choose another"
    with pytest.raises(PipelineError, match=refused):
        preflight(small(spark_master=f"spark://{one},{other}"))


@pytest.mark.slow
@pytest.mark.parametrize("by_flag", [True, False])
def test_driver_host_of_another_machine(by_flag: bool, tmp_path: Path) -> None:
    """Whoever names the master: a flag, or Spark's own settings."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        master = f"spark://127.0.0.1:{server.getsockname()[1]}"
        flags = (*FLAGS, "--driver-host=192.0.2.99", *([f"--spark-master={master}"] if by_flag else []))
        submit = "pyspark-shell" if by_flag else f"--master {master} pyspark-shell"
        with start(tmp_path, *flags, PYSPARK_SUBMIT_ARGS=submit) as process:
            log = process.communicate(timeout=300)[1]
    assert (process.returncode, log.count("ERROR")) == (2, 1), log
    assert f"Spark does not start{f' on {master}' if by_flag else ''}: java.net.BindException" in log
    assert "--driver-host or SPARK_LOCAL_IP must be an address of this machine; Spark's own log: " in log


@pytest.mark.slow
def test_bad_input_is_joined_by_shuffle_and_its_skew_split(
    small: Callable[..., DataPipelineConfig], spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad input, as if it were large: most rows are of one unknown customer, and half of the keys are repeated."""

    def bad(rows: DataFrame) -> DataFrame:
        number = F.pmod(F.xxhash64("transaction_id"), F.lit(10))
        most = rows.withColumn(
            "customer_id", F.when(number < 7, F.lit(-1).cast("bigint")).otherwise(F.col("customer_id"))
        )
        return most.unionByName(most.where(number % 2 == 0))

    receive(monkeypatch, "transactions", bad)
    config = small(max_quarantine_rate=1.0)
    expected = run_pipeline(config, spark)
    assert expected.quality["transactions"].quarantined > 7_000
    assert expected.quality["transactions"].duplicates > 1_000

    monkeypatch.setattr(data_pipeline, "SMALL_RUN", 0)
    monkeypatch.setattr(data_pipeline, "partition_count", lambda *_: 4)
    large = {
        "spark.sql.autoBroadcastJoinThreshold": "-1",
        "spark.sql.adaptive.advisoryPartitionSizeInBytes": "8k",
        "spark.sql.adaptive.skewJoin.skewedPartitionFactor": "1",
        "spark.sql.adaptive.skewJoin.skewedPartitionThresholdInBytes": "16k",
    }
    for key, value in large.items():
        spark.conf.set(key, value)
    try:
        record = run_pipeline(small(max_quarantine_rate=1.0, shuffle_partitions=5), spark)
    finally:
        for key in large:
            spark.conf.unset(key)
    assert differences(expected.data_dir, record.data_dir) == []
    executions = spark._jsparkSession.sharedState().statusStore().executionsList()
    plans = [executions.apply(n).physicalPlanDescription() for n in range(executions.size())]
    mine = "\n".join(plan for plan in plans if record.run_id in plan)
    assert "SortMergeJoin(skew=true)" in mine
    assert "Broadcast" not in mine
