"""A real Slurm on this machine: a head and two nodes, each in namespaces of its own, as far apart as machines are.

Every machine has its own network address, host name, process tree, and a scratch folder that no other one sees; the
rest of the file system is shared between them, as a home on NFS is. All of it descends from one process: when that one
ends, the kernel ends everything in it, and nothing of it was ever visible outside: no port, no interface, no /etc file.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SLURM = ROOT / "slurm"
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge iproute2 openssh-server pdsh shellcheck"
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
NODES = ("node1", "node2")
ADDRESS = {"head": "10.77.0.1", "node1": "10.77.0.11", "node2": "10.77.0.12"}
CPUS = 16  # of a node; more than there are, so that several jobs fit

CONF = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job may start again after cred_expire seconds; two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=12
TCPTimeout=3
KillWait=40
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=2,sched_min_interval=100000
NodeName={nodes} CPUs={cpus} RealMemory=4000 State=UNKNOWN
PartitionName=train Nodes={nodes} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO GraceTime=60 PriorityTier=1
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be made here; None where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=path_with_sbin()) is None]
    if absent:
        return f"Slurm is not complete ({', '.join(absent)} not found): {INSTALL}"
    if subprocess.run(["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "true"], check=False).returncode:
        return "namespaces of its own need root (in a container: --privileged)"
    return None


def path_with_sbin() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def wait_for(condition: Callable[[], Any], what: str, seconds: float, every: float = 0.25) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not after {seconds} s")
        time.sleep(every)
    return found


@dataclass
class Machine:
    """Namespaces held by one process; what runs in them dies with it."""

    name: str
    pid: int

    def enter(self, *command: str, cwd: Path | None = None) -> list[str]:
        """The command as run on this machine; the folder is entered there, as its mounts are others."""
        separate = ["nsenter", f"--target={self.pid}", "--pid", "--net", "--mount", "--uts", "--wd=/", "--"]
        return [*separate, "sh", "-c", 'cd "$0" && exec "$@"', str(cwd or "/"), *command]

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.enter(*command), text=True, check=True, **options)


def boot(name: str, log: Path, parent: Machine | None = None) -> Machine:
    """Start a machine; its first process reaps what others leave, and waits."""
    separate = ["unshare", "--fork", "--kill-child", "--pid", "--mount-proc", "--mount", "--net", "--uts"]
    command = [*separate, "bash", "-c", f"hostname {name}; ip link set lo up; sleep infinity & wait"]
    with log.open("ab") as output:
        outer = subprocess.Popen(
            parent.enter(*command) if parent else command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def inner() -> int | None:  # nsenter forks once to enter the process tree, unshare once to start another
        with contextlib.suppress(psutil.Error):  # one that ends while it is looked at
            tree = psutil.Process(outer.pid).children(recursive=True)
            return next((p.ppid() for p in tree if p.cmdline()[:1] == ["sleep"]), None)  # the machine has its name
        return None

    return Machine(name, wait_for(inner, f"{name} starts", 120, every=0.05))


@dataclass
class Job:
    """A submitted job. Its logs are in the folder it was submitted from."""

    cluster: Cluster
    id: str
    cwd: Path

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        shown = self.cluster.client("scontrol", "show", "job", "--oneliner", self.id).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def wait(self, seconds: float = 600) -> str:
        """The state it ends in."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE")
        try:
            wait_for(lambda: self.state in over, f"job {self.id} ends", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.facts()}\n{self.logs()}") from None
        return self.state

    def log(self, name: str = "") -> str:
        """The job's own log, or one of a node (`node1`)."""
        files = sorted(self.cwd.glob(f"*-{self.id}/{name}.log" if name else f"*-{self.id}.log"))
        return "".join(file.read_text(encoding="utf-8", errors="replace") for file in files)

    def logs(self) -> str:
        """The end of every log."""
        return "\n".join(
            f"--- {file.name}\n{file.read_text(encoding='utf-8', errors='replace')[-3000:]}"
            for file in (*self.cwd.glob(f"*-{self.id}.log"), *sorted(self.cwd.glob(f"*-{self.id}/*.log")))
        )


@dataclass
class Cluster:
    """A head, where one submits, and two nodes."""

    folder: Path  # shared by all machines
    head: Machine
    nodes: dict[str, Machine] = field(default_factory=dict)

    @property
    def scratch(self) -> Path:
        """A folder with the same name and other contents on every machine."""
        return self.folder / "scratch"

    def scratch_of(self, name: str) -> Path:
        """The same, seen from outside."""
        return self.folder / f"scratch-{name}"

    def environment(self) -> dict[str, str]:
        own = {"PATH": path_with_sbin(), "SLURM_CONF": str(self.folder / "slurm.conf"), "PYTHON": sys.executable}
        return {**os.environ, "OMP_NUM_THREADS": "1", **own}

    def client(
        self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm's on the head."""
        done = subprocess.run(
            self.head.enter(*command, cwd=cwd), env={**self.environment(), **(env or {})}, text=True,
            capture_output=True, check=False, timeout=300,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done

    def sbatch(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> Job:
        return Job(self, self.client("sbatch", "--parsable", *words, cwd=cwd, env=env).stdout.strip(), cwd)

    def add_node(self, name: str) -> None:
        """Boot a node, plug it in, start its slurmd."""
        node = boot(name, self.folder / f"{name}.out", self.head)
        self.nodes[name] = node
        port = f"to-{name}"
        self.head.run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self._seen(node))
        self.head.run("ip", "link", "set", port, "master", "switch", "up")
        node.run("ip", "address", "add", f"{ADDRESS[name]}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")
        self.scratch_of(name).mkdir(exist_ok=True)
        node.run("mount", "--bind", str(self.scratch_of(name)), str(self.scratch))
        self.daemon(node, "slurmd", "-D", "-N", name)

    def _seen(self, node: Machine) -> str:
        """The node's first process as the head counts processes."""
        numbers = Path(f"/proc/{node.pid}/status").read_text()
        return re.findall(r"^NSpid:(.*)$", numbers, re.M)[0].split()[1]

    def kill_node(self, name: str) -> None:
        """As a power cut does: slurmd, steps and network are gone at once."""
        node = self.nodes.pop(name)
        os.kill(node.pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(node.pid), f"{name} is gone", 120)

    def mend(self) -> None:
        """Replace nodes that were killed."""
        for name in NODES:
            if name not in self.nodes:
                self.add_node(name)

    def start_sshd(self) -> None:
        """Let the head and the nodes log into the nodes by ssh, with keys and settings of their own."""
        for name in ("host_key", "user_key"):
            if not (self.folder / name).exists():
                words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
                subprocess.run(words, check=True)
        client = f"IdentityFile {self.folder}/user_key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\n"
        (self.folder / "ssh_config").write_text(f"{client}LogLevel ERROR\n")
        server = f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\nPidFile none\n"
        (self.folder / "sshd_config").write_text(f"{server}UsePAM no\nStrictModes no\nPermitRootLogin yes\n")
        for machine in (self.head, *self.nodes.values()):
            machine.run("mount", "--bind", str(self.folder / "ssh_config"), "/etc/ssh/ssh_config")
        for node in self.nodes.values():
            node.run("mount", "-t", "tmpfs", "none", "/run")
            node.run("mkdir", "/run/sshd")
            self.daemon(node, "/usr/sbin/sshd", "-D", "-e", "-f", str(self.folder / "sshd_config"))
            address = ADDRESS[node.name]
            wait_for(lambda a=address: self.answers(a, 22), f"sshd of {node.name} answers", 120)  # type: ignore[misc]

    def answers(self, address: str, port: int) -> bool:
        """Whether the head reaches a port."""
        code = f"import socket; socket.create_connection(({address!r}, {port}), 2)"
        return self.client(sys.executable, "-c", code, check=False).returncode == 0

    def daemon(self, machine: Machine, *command: str) -> None:
        with (self.folder / f"{Path(command[0]).name}-{machine.name}.out").open("ab") as log:
            subprocess.Popen(
                machine.enter(*command), env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def idle(self) -> bool:
        """Whether all nodes wait for work."""
        done = self.client("sinfo", "--noheader", "--partition=train", "--format=%T", check=False)
        return done.returncode == 0 and done.stdout.split() == ["idle"]


@contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Bring a cluster up in a folder, and down again with all that ran on it."""
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, nodes="node[1-2]", cpus=CPUS))
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in ADDRESS.items()))
    for name in ("state", "scratch", "scratch-head"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    head = boot("head", folder / "head.out")
    try:
        cluster = Cluster(folder, head)
        head.run("mount", "--bind", str(folder / "hosts"), "/etc/hosts")
        head.run("ip", "link", "add", "switch", "type", "bridge")
        head.run("ip", "address", "add", f"{ADDRESS['head']}/24", "dev", "switch")
        head.run("ip", "link", "set", "switch", "up")
        files = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        munge = [f"--{option}={folder}/munge.{option.split('-')[0]}" for option in files]
        cluster.daemon(head, "munged", "--foreground", "--force", *munge)
        wait_for((folder / "munge.socket").exists, "munged listens", 120)
        cluster.daemon(head, "slurmctld", "-D")
        for name in NODES:
            cluster.add_node(name)
        wait_for(cluster.idle, "the nodes are idle", 300)
        yield cluster
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(head.pid, signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(head.pid), "the cluster is gone", 120)
