"""Hosts on one machine: network namespaces with a name and an sshd each, links between which can be cut and delayed.

All of it lives in namespaces of one process, its processes too: when that ends, however it ends, nothing is left. The
machine's own network, its sshd and its keys are not touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

SSHD = "/usr/sbin/sshd"
_NAMESPACES = [
    "unshare",
    "--net",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation=private",
]


def why_not() -> str | None:
    """Why there can be no hosts on this machine; None if there can."""
    programs = ["unshare", "nsenter", "ip", "ssh", "ssh-keygen"]
    missing = [name for name in programs if shutil.which(name) is None] + ([] if Path(SSHD).exists() else ["sshd"])
    if missing:
        return f"not installed: {', '.join(missing)}"
    if subprocess.run([*_NAMESPACES, "ip", "link", "add", "b0", "type", "bridge"], capture_output=True).returncode:
        return "namespaces are not permitted"
    return None


class Hosts:
    """Hosts `worker-1`, `worker-2`, ... at 10.0.0.1, 10.0.0.2, ..., and a network in which they reach each other.

    Args:
        folder: an empty folder for keys and configurations.
        number: number of hosts.
        private: a folder that each host sees as an empty one of its own.
    """

    def __init__(self, folder: Path, number: int, *, private: Path | None = None) -> None:
        self.folder, self.names = folder, [f"worker-{index}" for index in range(1, number + 1)]
        self._private = private
        self.ssh_config = folder / "ssh_config"
        self.hostfile = folder / "hostfile"

    def __enter__(self) -> Hosts:
        for name in ("host_key", "user_key"):
            key = self.folder / name
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self.hostfile.write_text("".join(f"{name} slots=1\n" for name in self.names))
        self.ssh_config.write_text(
            "".join(f"Host {name}\n  HostName 10.0.0.{index}\n" for index, name in enumerate(self.names, start=1))
            + f"Host *\n  User root\n  IdentityFile {self.folder}/user_key\n  IdentitiesOnly yes\n"
            f"  UserKnownHostsFile {self.folder}/known_hosts\n  StrictHostKeyChecking accept-new\n"
        )
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/user_key.pub\nPidFile none\n"
            "PasswordAuthentication no\nPermitRootLogin yes\nStrictModes no\nUsePAM no\n"
        )
        private = [] if self._private is None else [str(self._private)]
        self._server = subprocess.Popen(
            [*_NAMESPACES, sys.executable, __file__, str(self.folder), str(len(self.names)), *private],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        answer = self._server.stdout.readline()
        if answer != "ready\n":
            self.__exit__(None, None, None)
            raise RuntimeError(f"the hosts did not come up: {answer}")
        # unshare has forked; its child leads the namespaces.
        children = Path(f"/proc/{self._server.pid}/task/{self._server.pid}/children").read_text()
        self._inside = ["nsenter", "--target", children.split()[0], "--net", "--"]
        for name in self.names:
            self._wait_for(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in (self._server.stdin, self._server.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]
        try:
            self._server.wait(5.0)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command in the network of the hosts, on a machine of its own."""
        return subprocess.Popen([*self._inside, *command], text=True, **options)

    def on(self, name: str, command: str) -> str:
        """Output of a shell command on a host."""
        done = subprocess.run(
            [*self._inside, "ssh", "-F", str(self.ssh_config), name, command],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cut(self, name: str) -> None:
        """Let all that a host sends, and is sent, get lost."""
        self._tell(cut=name)

    def restore(self, name: str) -> None:
        """Undo a cut and a delay."""
        self._tell(restore=name)

    def delay(self, name: str, seconds: float) -> None:
        """Delay all that is sent to a host. A RuntimeError where the system cannot (the qdisc netem)."""
        self._tell(delay=name, seconds=seconds)

    def _tell(self, **order: Any) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if answer != "done\n":
            raise RuntimeError(answer or "the hosts are gone")

    def _wait_for(self, name: str) -> None:
        deadline_s = time.monotonic() + 120.0
        while True:
            try:
                assert self.on(name, "hostname") == f"{name}\n"
                return
            except AssertionError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.1)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, stdout=sys.stderr)


def _serve(folder: str, number: int, private: str | None) -> None:
    """Lead the namespaces: set the network up, start the hosts, and do as told until the test is gone."""
    os.environ.pop("SSH_CONNECTION", None)
    _call("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/sshd").mkdir()
    _call("ip", "link", "set", "lo", "up")
    _call("ip", "link", "add", "hub", "type", "bridge")
    _call("ip", "address", "add", "10.0.0.254/24", "dev", "hub")
    _call("ip", "link", "set", "hub", "up")
    mount = "" if private is None else f"mount -t tmpfs tmpfs '{private}' && "
    for index in range(1, number + 1):
        # The host waits for its end of the link.
        script = (
            f"hostname worker-{index} && ip link set lo up && {mount}"
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done && "
            f"ip address add 10.0.0.{index}/24 dev eth0 && ip link set eth0 up && "
            f"exec {SSHD} -D -e -f '{folder}/sshd_config'"
        )
        host = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--propagation=private", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=open(f"{folder}/sshd-{index}.log", "w"),  # noqa: SIM115
        )
        while os.readlink(f"/proc/{host.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)
        link = f"link-{index}"
        _call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        _call("ip", "link", "set", link, "master", "hub", "up")
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            _obey(order)
            print("done", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"{error}", flush=True)


def _obey(order: dict[str, Any]) -> None:
    if "cut" in order:
        _call("ip", "link", "set", _link(order["cut"]), "nomaster")
    elif "restore" in order:
        _call("ip", "link", "set", _link(order["restore"]), "master", "hub")
        subprocess.run(["tc", "qdisc", "del", "dev", _link(order["restore"]), "root"], stderr=subprocess.DEVNULL)
    else:
        delay = f"{order['seconds'] * 1000:.0f}ms"
        _call("tc", "qdisc", "add", "dev", _link(order["delay"]), "root", "netem", "delay", delay)


def _link(name: str) -> str:
    return f"link-{name.rpartition('-')[2]}"


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
