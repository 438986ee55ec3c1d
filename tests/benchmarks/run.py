"""Measures the pipeline against what one would use instead, and writes RESULTS.md, results.svg and results.json.

    python tests/benchmarks/run.py                     the sizes default and 5m, five rounds each
    python tests/benchmarks/run.py --sizes 50m         one size; the others stay as they were measured
    python tests/benchmarks/run.py --draw              measures nothing: writes the table and the picture again

First it verifies that all programs do the same work: from the same bronze they have to make the same tables, row for
row, and from bronze of their own the same accounts. Then it measures whole processes, from their start to their end,
after one round to warm up, in rounds in which every program has its turn. It needs Linux, and
`pip install -r tests/benchmarks/requirements.txt`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
from peer import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests"))

from compare_runs import differences, rows

from data_pipeline import BRONZE, ENVIRONMENT_PREFIX, GOLD, MILLION, DataPipelineConfig, preflight, tables

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
# The same data whenever it is measured.
AS_OF_DATE = date(2026, 1, 31)
PR_SET_CHILD_SUBREAPER = 36


class Size(NamedTuple):
    """How much data, and in how many rounds it is measured where not in as many as asked for."""

    customers: int
    transactions: int
    products: int
    rounds: int | None = None

    def flags(self) -> list[str]:
        """The size as flags of a program."""
        return [
            part for name, rows in self._asdict().items() if name != "rounds" for part in (f"--num-{name}", str(rows))
        ]


SIZES = {
    "default": Size(10_000, 50_000, 200),
    "5m": Size(1_000_000, 5_000_000, 20_000),
    "50m": Size(1_000_000, 50_000_000, 20_000, rounds=1),
}


class Program(NamedTuple):
    """A program to measure, the sizes that it does in bearable time, and what it is started with besides them."""

    script: str
    sizes: tuple[str, ...] = ("default",)
    flags: tuple[str, ...] = ()
    environment: Mapping[str, str] = {}
    takes_data: bool = True

    def command(self, data_dir: Path, size: Size, *more: str) -> list[str]:
        """The command that makes the data of that size in `data_dir`."""
        command = [sys.executable, str(HERE / self.script), *self.flags]
        where = ["--data-dir", str(data_dir), "--as-of-date", str(AS_OF_DATE)]
        return [*command, *where, *size.flags(), *more] if self.takes_data else command


PIPELINE = "pipeline"
# A variant of the pipeline is one more line, with its flags or environment.
PROGRAMS = {
    PIPELINE: Program("../../data_pipeline.py", ("default", "5m", "50m")),
    "sail": Program("../../data_pipeline.py", ("default", "5m"), ("--engine", "sail")),
    "floor": Program("floor.py", takes_data=False),
    "straightforward": Program("straightforward.py"),
    "duckdb": Program("duckdb_peer.py", ("default", "5m", "50m")),
    "polars": Program("polars_peer.py", ("default", "5m")),
}


class Target(NamedTuple):
    """How many times the median wall time of another a program's may be, at a size."""

    program: str
    size: str
    other: str
    other_size: str
    at_most: float


TARGETS = (
    Target(PIPELINE, "default", "floor", "default", 1.3),
    Target(PIPELINE, "default", "straightforward", "default", 0.37),
    Target(PIPELINE, "5m", "duckdb", "5m", 4.5),
    Target(PIPELINE, "50m", PIPELINE, "5m", 8.0),
    Target("sail", "default", "floor", "default", 0.2),
    Target("sail", "5m", "duckdb", "5m", 1.3),
)


class Measured(NamedTuple):
    """One run: wall and CPU time in seconds, with all its processes; the rest in bytes."""

    seconds: float
    cpu_seconds: float
    java_memory: int
    other_memory: int
    written: int


class BenchmarkError(Exception):
    """A program failed, or did other work than the pipeline."""


# ── Measure ──────────────────────────────────────────────────────────────────────────────────────────────────────


class PeakMemory(threading.Thread):
    """Samples the most memory, in bytes, that a process below this one has had: of Java, and of the others."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.java = self.others = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Samples until the end."""
        own_command = Path("/proc/self/cmdline").read_bytes()
        while not self.ended.wait(0.2):
            for process in descendants("self"):
                # Any process may end before it is read; one that has not become another program yet is still ours.
                with contextlib.suppress(OSError):
                    if (process / "cmdline").read_bytes() != own_command:
                        self.sample(process)

    def sample(self, process: Path) -> None:
        """Takes a process into account."""
        # Not its name: that of a thread goes on to the process that the thread starts.
        program = (process / "exe").readlink().name
        fields = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
        # Of a process that has just ended there is no such field.
        peak = int(fields.get("VmHWM", "0").split()[0]) * 1024
        if program == "java":
            self.java = max(self.java, peak)
        else:
            self.others = max(self.others, peak)


def descendants(process: str) -> Iterator[Path]:
    """The folders in /proc of the processes below a process."""
    for children in Path("/proc", process, "task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                yield Path("/proc", child)
                yield from descendants(child)


def execute(program: Program, data_dir: Path, size: Size, *more: str) -> Measured:
    """Runs a program to its end, and that of what it leaves behind.

    Raises:
        BenchmarkError: the program failed.
    """
    log_file = data_dir.with_suffix(".log")
    # What an earlier program wrote is not to be written to disk at this one's expense.
    os.sync()
    memory, before, started = PeakMemory(), resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    memory.start()
    with open(log_file, "wb") as output:
        command, environment = program.command(data_dir, size, *more), {**os.environ, **program.environment}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    seconds = time.perf_counter() - started
    # A JVM outlives its Python by a moment; this process has adopted it then.
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    memory.ended.set()
    memory.join()
    if code:
        last_lines = "\n".join(log_file.read_text(errors="replace").splitlines()[-20:])
        raise BenchmarkError(f"{program.script} ended with exit code {code}:\n{last_lines}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Measured(
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        java_memory=memory.java,
        other_memory=memory.others,
        written=sum(file.stat().st_size for file in data_dir.rglob("*.parquet")),
    )


def measure(size: str, rounds: int, scratch: Path) -> dict[str, list[Measured]]:
    """Measures all programs that do a size, in `rounds`; where there are several, after another one to warm up."""
    programs = {name: program for name, program in PROGRAMS.items() if size in program.sizes}
    found: dict[str, list[Measured]] = {name: [] for name in programs}
    scratch.mkdir()
    for turn in range(0 if rounds > 1 else 1, rounds + 1):
        for name, program in programs.items():
            data_dir = scratch / name
            measured = execute(program, data_dir, SIZES[size])
            shutil.rmtree(data_dir, ignore_errors=True)
            log(f"{size}, {f'round {turn} of {rounds}' if turn else 'warm-up'}: {name} {measured.seconds:.1f} s")
            if turn:
                found[name].append(measured)
    return found


# ── Verify ───────────────────────────────────────────────────────────────────────────────────────────────────────


def verify(names: Iterable[str], scratch: Path) -> None:
    """Checks that programs do the pipeline's work: the same tables from its bronze, the same counts from their own.

    Raises:
        BenchmarkError: a program does other work, or fails.
    """
    size, expected = SIZES["default"], scratch / PIPELINE
    execute(PROGRAMS[PIPELINE], expected, size)
    for name, program in PROGRAMS.items():
        if name == PIPELINE or name not in names or not program.takes_data:
            continue
        log(f"verifying {name}")
        # A variant of the pipeline makes the same bronze itself.
        generated, refined = scratch / f"{name}-generated", scratch / f"{name}-refined"
        execute(program, generated, size)
        if program.script == PROGRAMS[PIPELINE].script:
            refined = generated
        else:
            execute(program, refined, size, "--bronze", str(expected / BRONZE))
        found = [*differences(expected, refined), *other_order(expected, refined)]
        if accounts(refined) != accounts(expected):
            found.append(f"accounts: {accounts(refined)} instead of {accounts(expected)}")
        if (made := accounts(generated)["quality"]) != (wanted := accounts(expected)["quality"]):
            found.append(f"defects: {made} instead of {wanted}")
        if found:
            raise BenchmarkError(f"{name} does not do the pipeline's work:\n" + "\n".join(found))


def other_order(one: Path, other: Path) -> Iterator[str]:
    """A line per table of gold whose rows are in another order."""
    with duckdb.connect() as db:
        for table in (f"{GOLD}/{table.name}" for table in tables(GOLD)):
            if db.sql(f"FROM {rows(one, table)}").fetchall() != db.sql(f"FROM {rows(other, table)}").fetchall():
                yield f"{table}: other rows, or in another order"


def record(root: Path) -> dict[str, Any]:
    """The only run record of a data folder."""
    [path] = (root / "runs").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def accounts(root: Path) -> dict[str, Any]:
    """What has to be the same in every program's run record: not distinct values, of which some are approximate."""
    found = record(root)
    for column in (column for table in found["profile"].values() for column in table.values()):
        del column["distinct"], column["distinct_is_exact"]
        for bound in ("min", "max"):
            column[bound] = str(column[bound]).lower()  # a truth value is written True or true
    for quality in found["quality"].values():
        del quality["silver"]  # what the pipeline's audit expects
    return {name: found[name] for name in ("rows", "quality", "profile")}


# ── Report ───────────────────────────────────────────────────────────────────────────────────────────────────────


def surroundings(scratch: Path) -> dict[str, str]:
    """What was measured on what: the versions by the pipeline's own run record, and the machine."""
    versions = record(scratch / PIPELINE)["versions"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "pipeline": (versions["pipeline"] or "unknown")[:10],
        **{name: versions[name] for name in ("python", "spark", "java")},
        **{name: importlib.metadata.version(name) for name in ("pysail", "duckdb", "polars")},
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}",
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
    }


def seconds(results: Mapping[str, Any], size: str, program: str) -> list[float]:
    """The wall times in seconds, sorted; none where that was not measured."""
    runs = results.get(size, {}).get("programs", {}).get(program, [])
    return sorted(run["seconds"] for run in runs)


def ratio(results: Mapping[str, Any], program: str, size: str, other: str, other_size: str) -> float | None:
    """A program's median wall time divided by another; None where one of them was not measured."""
    ours, theirs = seconds(results, size, program), seconds(results, other_size, other)
    return statistics.median(ours) / statistics.median(theirs) if ours and theirs else None


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; all columns but the first are aligned to the right."""
    yield f"| {' | '.join(columns)} |"
    yield "|---" + "|---:" * (len(columns) - 1) + "|"
    yield from (f"| {' | '.join(line)} |" for line in lines)
    yield ""


def target_lines(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for program, size, other, other_size, at_most in TARGETS:
        found = ratio(results, program, size, other, other_size)
        verdict = "not measured" if found is None else "met" if found <= at_most else "not met"
        what = f"{program}, {size} ÷ {other}, {other_size}"
        yield what, f"≤ {at_most}", "" if found is None else f"{found:.2f}", verdict


def program_lines(results: Mapping[str, Any], size: str) -> Iterator[tuple[str, ...]]:
    for name, runs in results[size]["programs"].items():
        times = seconds(results, size, name)
        cpu, java, others, written = (
            statistics.median(run[field] for run in runs)
            for field in ("cpu_seconds", "java_memory", "other_memory", "written")
        )
        megabytes = (f"{peak / MILLION:,.0f}" if peak else "" for peak in (java, others))
        yield (
            name,
            f"{statistics.median(times):.2f}",
            f"{times[0]:.2f}–{times[-1]:.2f}",
            f"{ratio(results, PIPELINE, size, name, size):.2f}",
            f"{cpu:.1f}",
            *megabytes,
            f"{written / MILLION:,.1f}",
        )


def report(results: Mapping[str, Any]) -> Iterator[str]:
    """RESULTS.md, line by line."""
    yield "# Results of the benchmark\n"
    yield "Written by `python tests/benchmarks/run.py`, whose first lines say what it measures and how.\n"
    yield "![The wall times of all programs, by size](results.svg)\n"
    yield "## Targets\n"
    yield "The medians of the wall times, divided:\n"
    yield from table(("", "target", "measured", ""), target_lines(results))
    for size in results:
        yield f"## {described(size)}\n"
        yield from table(
            (
                "program",
                "wall time, s",
                "least–most",
                f"{PIPELINE} ÷ program",
                "CPU, s",
                "Java, MB",
                "Python, MB",
                "Parquet, MB",
            ),
            program_lines(results, size),
        )
        rounds = max(map(len, results[size]["programs"].values()))
        surroundings = "; ".join(f"{name} {value}" for name, value in results[size]["surroundings"].items())
        yield f"Rounds {rounds}; {surroundings}.\n"


def described(size: str) -> str:
    """A size in words."""
    customers, transactions, products, _ = SIZES[size]
    return f"{size}: {customers:,} customers, {transactions:,} transactions, {products:,} products"


def picture(results: Mapping[str, Any]) -> Iterator[str]:
    """The median wall times as bars, in SVG; a line spans the least and the most. Each size has a scale of its own."""
    line, left, width = 24, 130, 480
    lines = sum(2 + len(results[size]["programs"]) for size in results)
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {lines * line}" font-family="sans-serif">'
    # Grey and blue that can be read on white and on black: a picture is not told what page it is on.
    yield "<style>text { fill: #757d87; font-size: 13px } line { stroke: #757d87; stroke-width: 2 }"
    yield "rect { fill: #9aa2ab } .ours { fill: #3b82f6 }</style>"
    y = 0
    for size in results:
        y += line
        yield f'<text x="0" y="{y}" font-weight="bold">{described(size)}: wall time in seconds</text>'
        times = {name: seconds(results, size, name) for name in results[size]["programs"]}
        scale = width / max(found[-1] for found in times.values())
        for name, found in times.items():
            y += line
            least, middle, most = (left + scale * value for value in (found[0], statistics.median(found), found[-1]))
            kind = ' class="ours"' if name.startswith(PIPELINE) else ""
            yield f'<text x="{left - 8}" y="{y}" text-anchor="end">{name}</text>'
            yield f'<rect x="{left}" y="{y - 13}" width="{middle - left:.1f}" height="16"{kind}/>'
            yield f'<line x1="{least:.1f}" x2="{most:.1f}" y1="{y - 5}" y2="{y - 5}"/>'
            yield f'<text x="{max(middle, most) + 8:.1f}" y="{y}">{statistics.median(found):.1f}</text>'
        y += line
    yield "</svg>"


def draw(results: Mapping[str, Any]) -> None:
    """Writes the table and the picture."""
    (HERE / "RESULTS.md").write_text("\n".join(report(results)), encoding="utf-8")
    (HERE / "results.svg").write_text("\n".join(picture(results)) + "\n", encoding="utf-8")


def log(line: str) -> None:
    """Says how far it is."""
    print(f"{datetime.now(timezone.utc):%H:%M:%S} {line}", flush=True)


def compare(sizes: Sequence[str], rounds: int, scratch: Path) -> None:
    """Verifies, measures the sizes, and puts them in the place of what was measured of them before.

    Raises:
        BenchmarkError: a program failed, or does other work than the pipeline.
    """
    for variable in [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]:
        del os.environ[variable]
    # Leads all programs to the Java that the pipeline would find for itself.
    preflight(DataPipelineConfig(data_dir=str(scratch / "preflight")))
    os.environ["PYSPARK_PYTHON"] = sys.executable
    # So that the CPU time of orphans, as a JVM is at the end, is counted too.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    verify([name for name, program in PROGRAMS.items() if {*sizes} & {*program.sizes}], scratch)
    for size in sizes:
        programs = measure(size, SIZES[size].rounds or rounds, scratch / size)
        runs = {name: [measured._asdict() for measured in found] for name, found in programs.items()}
        measured = {"surroundings": surroundings(scratch), "programs": runs}
        results = load() | {size: measured}
        RESULTS.write_text(json.dumps({name: results[name] for name in SIZES if name in results}, indent=1) + "\n")
        draw(load())


def load() -> dict[str, Any]:
    """All that was measured so far, by size."""
    results: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return results


def main() -> int:
    """Verifies, measures and reports; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", default="default,5m", help=f"which of {', '.join(SIZES)} (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often each program is measured (default: %(default)s)"
    )
    parser.add_argument("--scratch", type=Path, help="folder for the data, up to 10 GB (default: a temporary one)")
    parser.add_argument("--draw", action="store_true", help="measure nothing: write the table and the picture again")
    flags = parser.parse_args()
    sizes = flags.sizes.split(",")
    if unknown := set(sizes) - set(SIZES):
        parser.error(f"--sizes: there is no {', '.join(unknown)}; there are {', '.join(SIZES)}")
    if flags.rounds < 1:
        parser.error(f"--rounds must be 1 or more, not {flags.rounds}")
    if flags.draw:
        draw(load())
        return 0
    with tempfile.TemporaryDirectory(dir=flags.scratch) as scratch:
        try:
            compare(sizes, flags.rounds, Path(scratch))
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
