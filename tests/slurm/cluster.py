"""A real SLURM on this machine, in namespaces of its own, with slurmdbd, MariaDB and munge.

It lives in a mount and a PID namespace: /etc/slurm is private to it, so a SLURM that the machine
runs already is neither seen nor touched, several may run side by side, and when the namespace's
first process is killed everything that it started is gone. Declared are four CPUs, two GPUs (device
files that nobody opens) and 16 GB of memory. Memory limits are enforced by cgroups where they can
be written, else by SLURM's own polling; time limits by SLURM.

    python tests/slurm/cluster.py COMMAND...      runs a command in such a cluster
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "sacctmgr", "mariadbd", "unshare")
INSTALL = (
    "apt-get install --no-install-recommends munge slurm-client slurmctld slurmd slurmdbd "
    "mariadb-server"
)
CPUS, GPUS, MEMORY_MB = 4, 2, 16_000
MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
CONFIG = """\
ClusterName=ballast
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ctld_port}
SlurmdPort={d_port}
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin={task_plugin}
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
MinJobAge=300
KillWait=3
UnkillableStepTimeout=30
SlurmdTimeout=20
FirstJobId={first_job}
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
{acct_params}
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd_port}
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment
StateSaveLocation={root}/ctld
SlurmdSpoolDir={root}/d
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.log
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=1-0 State=UP
PartitionName=long Nodes={host} MaxTime=INFINITE State=UP
"""
GRES = "NodeName={host} Name=gpu File={root}/gpu[0-1]\n"
CGROUP = "CgroupPlugin=cgroup/v1\nConstrainRAMSpace=yes\nConstrainSwapSpace=no\n"
ACCOUNTING = """\
AuthType=auth/munge
DbdHost=localhost
DbdPort={dbd_port}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql_port}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile={root}/log/slurmdbd.log
PidFile={root}/slurmdbd.pid
"""


class Unavailable(Exception):
    """A SLURM cannot be started here; the message says why, and what to install."""


def why_not() -> str | None:
    """Why a SLURM cannot be started here, or None."""
    if os.geteuid() != 0:
        return "starting a SLURM needs root"
    missing = [name for name in PROGRAMS if not _which(name)]
    if missing:
        return f"not installed: {', '.join(missing)}; on Debian: {INSTALL}"
    probe = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


def _which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _cgroups_writable() -> bool:
    """Whether memory can be limited by cgroups of version 1, as SLURM 22.05 does it."""
    probe = MEMORY_CGROUP / f"ballast-probe-{os.getpid()}"
    try:
        probe.mkdir()
        (probe / "memory.limit_in_bytes").write_text("1000000000")
        probe.rmdir()
    except OSError:
        return False
    return True


class Cluster:
    """A running SLURM; every command goes into its namespaces."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.by_cgroup = _cgroups_writable()
        ctld, slurmd, dbd, sql = _free_ports(4)
        self._values = {
            "host": socket.gethostname().split(".")[0],
            "root": root,
            "ctld_port": ctld,
            "d_port": slurmd,
            "dbd_port": dbd,
            "sql_port": sql,
            "cpus": CPUS,
            "gpus": GPUS,
            "memory": MEMORY_MB,
            # Names of cgroups are made of it, and clusters side by side share them.
            "first_job": random.randrange(1, 9000) * 100,
            "task_plugin": "task/cgroup" if self.by_cgroup else "task/none",
            "acct_params": "" if self.by_cgroup else "JobAcctGatherParams=OverMemoryKill",
        }
        self._init: subprocess.Popen | None = None

    # -- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start everything and wait for the node. Raises Unavailable with what failed."""
        self.root.chmod(0o755)
        for name in ("etc", "ctld", "d", "log", "db", "munge"):
            (self.root / name).mkdir()
        self._write_configuration()
        for number in range(GPUS):
            os.mknod(self.root / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
        # At their usual places: SLURM's plugins and Snakemake's look for them nowhere else.
        binds = []
        for own, place in (("etc", "/etc/slurm"), ("munge", "/run/munge")):
            Path(place).mkdir(parents=True, exist_ok=True)
            binds.append(f"mount --bind {self.root}/{own} {place}")
        own = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._init = subprocess.Popen(
            # A shell that waits, so that what loses its parent here is reaped.
            [*own, "sh", "-c", " && ".join([*binds, "while sleep 1; do :; done"])],
            stdout=subprocess.DEVNULL,
        )
        self._until(lambda: self.run("test", "-e", "/etc/slurm/ours", check=False) is not None, 5)
        self._start_munge()
        self._start_accounting()
        self.start_slurmctld()
        self.start_slurmd()
        self._until(self.idle, 30)

    def stop(self) -> None:
        """End everything that the cluster started, the jobs too."""
        if self._init:
            for child in _children(self._init.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, 9)
            self._init.kill()
            self._init.wait()
        shutil.rmtree(self.root, ignore_errors=True)

    def _write_configuration(self) -> None:
        etc = self.root / "etc"
        (etc / "ours").touch()
        (etc / "slurm.conf").write_text(CONFIG.format(**self._values))
        (etc / "gres.conf").write_text(GRES.format(**self._values))
        (etc / "cgroup.conf").write_text(CGROUP if self.by_cgroup else "CgroupPlugin=disabled\n")
        (etc / "slurmdbd.conf").write_text(ACCOUNTING.format(**self._values))
        (etc / "slurmdbd.conf").chmod(0o600)

    def _start_munge(self) -> None:
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = {
            "socket": "munge/munge.socket.2",
            "key-file": "munge.key",
            "pid-file": "munged.pid",
        }
        places |= {"log-file": "log/munged.log", "seed-file": "munged.seed"}
        self.run("munged", "--force", *(f"--{k}={self.root}/{v}" for k, v in places.items()))

    def _start_accounting(self) -> None:
        database = self.root / "db"
        self.run(
            "mariadb-install-db", "--no-defaults", f"--datadir={database}", "--user=root",
            "--auth-root-authentication-method=socket", "--skip-test-db",
        )  # fmt: skip
        self.spawn(
            "mariadbd", "--no-defaults", f"--datadir={database}", "--user=root",
            f"--socket={self.root}/sql.socket", f"--port={self._values['sql_port']}",
            "--bind-address=127.0.0.1", f"--pid-file={self.root}/sql.pid",
            "--innodb-buffer-pool-size=64M", "--innodb-log-file-size=16M",
            log="mariadb.log",
        )  # fmt: skip
        client = ["mariadb", "--no-defaults", f"--socket={self.root}/sql.socket"]
        self._until(lambda: self.run(*client, "-e", "select 1", check=False) is not None, 30)
        for host in ("localhost", "127.0.0.1"):
            grant = f"grant all on slurm_acct_db.* to slurm@'{host}' identified by 'slurm'"
            self.run(*client, "-e", grant)
        self.run("slurmdbd")
        add = ["sacctmgr", "-i", "add"]
        self._until(lambda: self.run(*add, "cluster", "ballast", check=False) is not None, 30)
        self.run(*add, "account", "lab", "Description=lab", "Organization=lab")
        self.run(*add, "user", "root", "account=lab")

    # -- daemons ---------------------------------------------------------------------------------

    def start_slurmctld(self) -> None:
        self.run("slurmctld")
        self._until(lambda: self.run("scontrol", "ping", check=False) is not None, 30)

    def stop_slurmctld(self) -> None:
        """Stop slurmctld as an administrator does: it saves its state."""
        pid = (self.root / "slurmctld.pid").read_text().strip()
        self.run("scontrol", "shutdown", "slurmctld")
        self._until(lambda: self.run("kill", "-0", pid, check=False) is None, 30)

    def start_slurmd(self) -> None:
        self.run("slurmd")

    def kill_slurmd(self) -> None:
        """Kill slurmd at once; the jobs' own stepd processes live on."""
        pid = (self.root / "slurmd.pid").read_text().strip()
        self.run("kill", "-9", pid)
        self._until(lambda: self.run("kill", "-0", pid, check=False) is None, 30)

    def idle(self) -> bool:
        return (self.run("sinfo", "-h", "-o", "%T", check=False) or "").split()[:1] == ["idle"]

    # -- commands --------------------------------------------------------------------------------

    def inside(self, *command: str, folder: Path | None = None) -> list[str]:
        """A command as one that runs in the cluster's namespaces, in a folder (here by default)."""
        [pid] = _children(self._init.pid)
        enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "--"]
        # Not nsenter's --wd: that folder would still be the one of the mounts outside.
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder or Path.cwd()), *command]

    def run(self, *command: str, check: bool = True) -> str | None:
        """Output of a command in the cluster; None if it failed and check is off."""
        try:
            entering = self.inside(*command)
        except ValueError:  # the namespace's first process is not there yet
            if check:
                raise
            return None
        path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        done = subprocess.run(
            entering, capture_output=True, text=True, env=os.environ | path, timeout=120
        )
        if done.returncode and check:
            raise Unavailable(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return None if done.returncode else done.stdout

    def spawn(self, *command: str, log: str) -> None:
        """Start a daemon that does not go to the background by itself."""
        path = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
        with (self.root / "log" / log).open("w") as file:
            subprocess.Popen(self.inside(*command), stdout=file, stderr=file, env=os.environ | path)

    def sacct(self, *fields: str, steps: bool = False) -> list[dict[str, str]]:
        """Rows of sacct, oldest first, with these fields and JobID, State and Comment."""
        columns = ["JobID", "State", "Comment", *fields]
        options = [] if steps else ["-X"]
        text = self.run("sacct", *options, "-P", "-n", "-S", "now-1day", "-o", ",".join(columns))
        return [dict(zip(columns, line.split("|"), strict=True)) for line in text.splitlines()]

    def log(self, name: str) -> str:
        return (self.root / "log" / name).read_text(errors="replace")

    def _until(self, ready: object, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                tail = "".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}\n"
                    for path in sorted((self.root / "log").glob("*.log"))
                )
                raise Unavailable(f"SLURM did not come up in {seconds} s\n{tail}")
            time.sleep(0.2)


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A cluster for the time of a block. Raises Unavailable where there can be none."""
    reason = why_not()
    if reason:
        raise Unavailable(reason)
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="ballast-slurm-")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with running() as cluster:
            print(f"SLURM is up, its logs are in {cluster.root}/log", file=sys.stderr)
            return subprocess.run(cluster.inside(*sys.argv[1:])).returncode
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
