"""systemd as the first process of namespaces of its own, on a copy of this machine's files that is gone with it.

The units of deploy/systemd are there, and two programs in /opt/xenios: this repository, with the tests' packages.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.integration.process import REPOSITORY

_ENTER = """set -e
mount --make-rprivate /
mkdir -p {folder}/changed {folder}/root
mount -t tmpfs tmpfs {folder}/changed
mkdir {folder}/changed/upper {folder}/changed/work
mount -t overlay overlay -o lowerdir=/,upperdir={folder}/changed/upper,workdir={folder}/changed/work {folder}/root
cd {folder}/root
mkdir -p opt/python opt/source opt/packages old
mount --bind {python} opt/python
mount --bind {source} opt/source
mount --bind {packages} opt/packages
mount -t proc proc proc
mount -t sysfs sysfs sys
if [ -e /sys/fs/cgroup/cgroup.procs ]; then mount -t cgroup2 cgroup sys/fs/cgroup; else
    mount -t tmpfs tmpfs sys/fs/cgroup; mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
mount -t tmpfs tmpfs dev
mkdir dev/pts dev/shm
for name in null zero full random urandom tty; do mknod -m 666 dev/$name c $(stat -c '0x%t 0x%T' /dev/$name); done
mount -t devpts devpts dev/pts -o newinstance,ptmxmode=0666
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs tmpfs run
mount -t tmpfs tmpfs tmp
ip link set lo up
rm -rf etc/systemd/system/*.wants
for name in systemd-sysctl systemd-modules-load systemd-udevd systemd-udev-trigger systemd-remount-fs; do
    ln -sf /dev/null etc/systemd/system/$name.service
done
cp {source}/deploy/systemd/xenios* etc/systemd/system/
cat > etc/systemd/system/test.target <<X
[Unit]
Requires=basic.target
After=basic.target
X
pivot_root . old
cd /
umount -l old
mount --make-rshared /
exec env -i container=other PATH=/usr/sbin:/usr/bin /lib/systemd/systemd --system --unit=test.target --log-target=console
"""
_PROGRAMS = """set -e
getent passwd xenios > /dev/null || useradd --system --home-dir /var/lib/xenios --shell /usr/sbin/nologin xenios
mkdir -p /etc/xenios
echo LD_LIBRARY_PATH=/opt/python/lib > /etc/xenios/xenios.env
export LD_LIBRARY_PATH=/opt/python/lib
for slot in a b; do
    /opt/python/bin/python3 -m venv --without-pip /opt/xenios/$slot
    printf '/opt/source\n/opt/source/plugins\n/opt/packages\n' > /opt/xenios/$slot/lib/python{version}/site-packages/x.pth
    printf '#!/opt/xenios/%s/bin/python\nimport sys\nfrom gateway.cli import main\nsys.exit(main())\n' $slot \
        > /opt/xenios/$slot/bin/xenios
    chmod 755 /opt/xenios/$slot/bin/xenios
done
ln -sfn a /opt/xenios/current
"""


@dataclass(frozen=True)
class Machine:
    pid: int

    def run(self, script: str, *, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Of bash, as root in there."""
        inside = ["nsenter", f"--target={self.pid}", "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"]
        env = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"]
        done = subprocess.run(
            [*inside, *env, "bash", "-c", script], capture_output=True, text=True, timeout=100, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    enter = _ENTER.format(
        folder=folder, source=REPOSITORY, python=sys.base_prefix, packages=sysconfig.get_path("purelib")
    )
    with (folder / "console.log").open("wb") as log:
        outside = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--cgroup", "--net", "bash", "-c", enter],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children")
        end = time.monotonic() + 60
        while True:
            first = children.read_text().split()
            # Until it has its own files, `systemctl` would ask this machine's systemd, and what is run would happen here.
            ready = "grep -q container=other /proc/1/environ && [ -d /opt/source ] && systemctl is-system-running"
            if first and "running" in Machine(int(first[0])).run(ready, check=False).stdout:
                break
            if outside.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"systemd did not come up: {(folder / 'console.log').read_text()[-2000:]}")
            time.sleep(0.2)  # noqa: TID251 - it asks another process
        machine = Machine(int(first[0]))
        machine.run(_PROGRAMS.replace("{version}", f"{sys.version_info.major}.{sys.version_info.minor}"))
        yield machine
    finally:
        outside.kill()  # and with it, by --kill-child, all that is in there
        outside.wait()
