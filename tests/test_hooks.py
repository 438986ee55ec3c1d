"""Commands of the user's before and after publishing: what they get, what they refuse, and how they end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENGINE
from pyspark.sql import SparkSession
from test_command import start
from test_gate import refused

import data_pipeline
from data_pipeline import (
    HOOK_VARIABLES,
    ConfigurationError,
    DataPipelineConfig,
    RunRecord,
    Store,
    alert,
    html_report,
    job_summary,
    load_config,
    metrics,
    parse_arguments,
    roll_back,
    run_command,
    run_pipeline,
)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level("INFO", logger="data_pipeline")
    yield caplog


def script(path: Path, text: str) -> str:
    """Writes a shell script that can be executed, and returns its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def lines(log: pytest.LogCaptureFixture, hook: str) -> list[str]:
    """The lines of the log that a hook has written."""
    return [message.removeprefix(f"{hook}: ") for message in log.messages if message.startswith(f"{hook}: ")]


def is_running(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pid: int) -> None:
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def test_hooks_of_a_run(
    published: DataPipelineConfig, spark: SparkSession, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """The commands run in their order, with the published data still the old one, then the new one."""
    store = Store(published.root)
    before = store.published()
    shown = script(
        tmp_path / "show it.sh",
        'echo "$1 $PIPELINE_RUN_ID $(basename $(readlink $PIPELINE_ROOT/current)) $PIPELINE_PYTHON"\n'
        "ls $PIPELINE_SNAPSHOT/gold\n"
        'cp "$PIPELINE_RECORD" "$2"',
    )
    published.before_publish = (f"'{shown}' first '{tmp_path}/before.json'", "sh -c 'echo $0 second'")
    failing = """sh -c 'echo a reason; echo "a % b <c>" >&2; exit 7'"""
    published.after_publish = (failing, f"'{shown}' after '{tmp_path}/after.json'")
    record = run_pipeline(published, spark)

    gold = sorted(os.listdir(store.path("gold")))
    heard = lines(log, "before_publish")
    assert heard == [
        f"'{shown}' first '{tmp_path}/before.json'",
        f"first {record.run_id} {before} {sys.executable}",
        *gold,
        "sh -c 'echo $0 second'",
        "sh second",
    ]
    assert lines(log, "after_publish")[:4] == [
        failing,
        "a reason",
        "a % b <c>",
        f"'{shown}' after '{tmp_path}/after.json'",
    ]
    assert f"after {record.run_id} {record.run_id} {sys.executable}" in lines(log, "after_publish")
    problem = f"a command of the hook after_publish failed: {failing}: a % b <c> (exit code 7)"
    assert (record.result, record.exit_code, store.published()) == ("succeeded", 0, record.run_id)
    assert [(ran["hook"], ran["failure"]) for ran in record.hooks] == [
        ("before_publish", ""),
        ("before_publish", ""),
        ("after_publish", "a % b <c> (exit code 7)"),
        ("after_publish", ""),
    ]
    assert record.anomalies[-1] == problem
    assert f"{problem}; the data is published nevertheless" in log.messages
    for name, result in {"before": "running", "after": "succeeded"}.items():
        so_far = RunRecord.from_json((tmp_path / f"{name}.json").read_text())
        assert (so_far.run_id, so_far.result, so_far.sha256) == (record.run_id, result, record.sha256)

    on_disk = store.runs.get(record.run_id)
    assert on_disk and on_disk.hooks == record.hooks
    assert problem in str(alert(record, [on_disk]))
    page = html_report([on_disk], on_disk)
    assert "⚠ after_publish: " in page and "a % b &lt;c&gt; (exit code 7)" in page
    assert "✓ before_publish: " in page
    assert 'hook_failures{data_dir="' + on_disk.data_dir + '",hook="after_publish"} 1.0' in metrics([on_disk], on_disk)
    assert 'hook="before_publish"} 0.0' in metrics([on_disk], on_disk)


@pytest.mark.skipif(ENGINE != "sail", reason="Sail runs it")
def test_hook_refuses_the_run(published: DataPipelineConfig, spark: SparkSession, tmp_path: Path) -> None:
    """As the gate does. The commands after it, and those after publishing, do not run."""
    published.alert_webhook = None
    published.before_publish = ("sh -c 'echo looking; echo 3 rows are odd; exit 1'", f"touch {tmp_path}/next")
    published.after_publish = (f"touch {tmp_path}/next",)
    reason = "before_publish failed: sh -c 'echo looking; echo 3 rows are odd; exit 1': 3 rows are odd (exit code 1)"
    message = f"HOOK REFUSED, nothing is published: a command of the hook {reason.replace('(', '.')[:90]}"
    values = refused(published, spark, message)
    assert not (tmp_path / "next").exists()
    store = Store(published.root)
    assert store.snapshots("_REFUSED") == [values["run_id"]]
    record = store.runs.get(values["run_id"])
    assert record and record.current_step == "before_publish"
    assert [ran["failure"] for ran in record.hooks] == ["3 rows are odd (exit code 1)"]
    for text in (record.error["message"] if record.error else "", str(alert(record, [record])), job_summary(record)):
        assert "3 rows are odd" in text
        assert "before" in text
    assert "3 rows are odd (exit code 1)" in html_report([record], None)
    assert 'hook="before_publish"} 1.0' in metrics([record], None)


def test_rollback_runs_the_hooks_after_publishing(
    published: DataPipelineConfig,
    first_run: tuple[DataPipelineConfig, RunRecord],
    tmp_path: Path,
    log: pytest.LogCaptureFixture,
) -> None:
    """Also if one of them is missing: a rollback is urgent."""
    published.before_publish = (f"touch {tmp_path}/before",)
    published.after_publish = (
        "/no/such/program",
        f"sh -c 'echo $PIPELINE_RUN_ID; cp $PIPELINE_RECORD {tmp_path}/record'",
    )
    run_id = first_run[1].run_id
    assert roll_back(Store(published.root), run_id, 0, published) == run_id
    assert run_id in lines(log, "after_publish")
    assert RunRecord.from_json((tmp_path / "record").read_text()).run_id == run_id
    assert "the hook after_publish failed: /no/such/program: " in log.text
    assert not (tmp_path / "before").exists()


@pytest.mark.parametrize(
    "command", ["/no/such/program", "no-such-program --flag", "''", "{tmp}", "{tmp}/not-executable", "~/hook.sh"]
)
def test_program_that_cannot_be_executed(command: str, published: DataPipelineConfig, tmp_path: Path) -> None:
    """It is found before there is a lock or a record."""
    script(tmp_path / "not-executable", "exit 0")
    (tmp_path / "not-executable").chmod(0o644)
    published.after_publish = ("true", command.format(tmp=tmp_path))
    runs = os.listdir(Store(published.root).path("runs"))
    with pytest.raises(ConfigurationError, match=r"after_publish: there is no program '.*' that can be executed"):
        run_pipeline(published)
    assert os.listdir(Store(published.root).path("runs")) == runs


def test_hooks_as_settings() -> None:
    """The flag may be repeated, the variable has a command a line, and the attribute is a sequence."""
    by_flag = load_config(parse_arguments(["--before-publish", "a 'b, c'", "--before-publish=d"]), {})
    by_variable = load_config(parse_arguments([]), {"PIPELINE_BEFORE_PUBLISH": "a 'b, c'\n\n  d\n"})
    by_attribute = DataPipelineConfig(before_publish=("a 'b, c'", "d"))
    assert by_flag == by_variable == by_attribute
    assert by_flag.before_publish == ("a 'b, c'", "d")
    assert json.loads(json.dumps(by_flag.redacted(), default=str))["before_publish"] == ["a 'b, c'", "d"]
    for wrong in ("a 'b", "", " \n"):
        with pytest.raises(ConfigurationError, match="--after-publish: after_publish must be commands, one a line"):
            load_config(parse_arguments([f"--after-publish={wrong}"]), {})


def test_variables_of_a_hook_are_no_settings() -> None:
    """In a hook the pipeline can be called. Elsewhere one of these names is a mistake, as any other would be."""
    variables = dict.fromkeys(HOOK_VARIABLES, "x")
    assert load_config(parse_arguments([]), variables) == DataPipelineConfig()
    with pytest.raises(ConfigurationError, match="unknown variable PIPELINE_ROOT"):
        load_config(parse_arguments([]), {"PIPELINE_ROOT": "/srv/shop"})
    with pytest.raises(ConfigurationError, match="unknown variable PIPELINE_SEEED"):
        load_config(parse_arguments([]), variables | {"PIPELINE_SEEED": "1"})


def test_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    """With the processes that it has started, and even if they ignore SIGTERM."""
    slow = script(tmp_path / "slow", f"sleep 60 & echo $! > {tmp_path}/pid; echo begun; wait")
    assert run_command("after_publish", slow, {}, 0.3) == "it took longer than 0.3 seconds (--hook-timeout)"
    wait_until_ended(int((tmp_path / "pid").read_text()))


def test_command_that_leaves_a_process_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That process keeps the output open. The run does not wait for it, and does not end it."""
    monkeypatch.setattr(data_pipeline, "STOP_WITHIN", 0.2)
    quick = script(tmp_path / "quick", f"sleep 60 & echo $! > {tmp_path}/pid; echo done")
    started = time.monotonic()
    assert run_command("after_publish", quick, {}, 30) == ""
    assert time.monotonic() - started < 10
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    os.kill(pid, signal.SIGKILL)


def test_output_of_any_bytes(log: pytest.LogCaptureFixture) -> None:
    assert run_command("before_publish", r"printf 'caf\351\r\n\n\000\n'", {}, 30) == ""
    assert lines(log, "before_publish")[0] == "caf\N{REPLACEMENT CHARACTER}"
    assert run_command("before_publish", "false", {}, 30) == "no output (exit code 1)"


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["before_publish", "after_publish"])
def test_interrupt_ends_the_hook(hook: str, tmp_path: Path) -> None:
    """Before publishing nothing is published; afterwards the run has succeeded."""
    waiting = script(
        tmp_path / "waiting", f"sleep 60 & echo $! > {tmp_path}/pid.next; mv {tmp_path}/pid.next {tmp_path}/pid; wait"
    )
    flag = f"--{hook.replace('_', '-')}"
    process = start(tmp_path, flag, waiting, "--num-customers=100", "--num-transactions=200")
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == (143 if hook == "before_publish" else 0)
    wait_until_ended(int((tmp_path / "pid").read_text()))
