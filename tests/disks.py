"""A small real disk that fails: an ext4 file system of its own, in a file, seen by the processes that are put there."""

import contextlib
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# linux/ext4.h: as if the power had gone, without what has not been flushed.
_SHUTDOWN, _WITHOUT_FLUSHING = 0x8004587D, 2
_MOUNT = 'mount -o loop,errors=remount-ro "$0" "$1"'
_ENTER = "import os, sys; os.execvp('nsenter', ['nsenter', '-m', '-t', *sys.argv[1:]])"


class Disk(NamedTuple):
    """A file system that is mounted at a path, in a namespace of its own: nobody else sees it, and nothing is left."""

    image: Path
    at: Path
    keeper: int
    """The process that keeps the namespace."""

    def enter(self, *arguments: str) -> list[str]:
        """Arguments of Python for `python *arguments` among those that see the disk."""
        return ["-c", _ENTER, str(self.keeper), sys.executable, *arguments]

    def seen(self, path: Path) -> Path:
        """The path by which everybody sees what those in the namespace see at `path`."""
        return Path(f"/proc/{self.keeper}/root{path}")

    def fill(self) -> None:
        """Takes all that is left."""
        with (self.seen(self.at) / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(b"\0" * 4096):
                pass

    def empty(self) -> None:
        """Gives it back."""
        (self.seen(self.at) / "ballast").unlink()

    def become_read_only(self) -> None:
        """The kernel finds an error in the file system, and refuses every write from now on, to open files too."""
        device = self.seen(self.at).stat().st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("a test\n")

    def lose_power(self) -> None:
        """Every access is an error from now on; only what was flushed will be there when it is back."""
        folder = os.open(self.seen(self.at), os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _WITHOUT_FLUSHING))
        finally:
            os.close(folder)

    def come_back(self) -> None:
        """After a repair, as at the next boot; nobody may be using it."""
        script = f'umount "$1" && e2fsck -fy "$0" > /dev/null; {_MOUNT}'
        self._inside("sh", "-c", script, str(self.image), str(self.at))

    def _inside(self, *command: str) -> None:
        subprocess.run(["nsenter", "-m", "-t", str(self.keeper), *command], check=True)


@contextlib.contextmanager
def small_disk(image: Path, at: Path, mib: int) -> Iterator[Disk]:
    """A disk of so many MiB, mounted at a new folder. Raises OSError where that cannot be: it takes root, and Linux."""
    at.mkdir()
    with image.open("wb") as file:
        file.truncate(mib << 20)
    script = f'mkfs.ext4 -q -F "$0" && {_MOUNT} && echo mounted && exec cat'
    command = ["unshare", "-m", "sh", "-c", script, str(image), str(at)]
    # It ends with its input, so with this process at the latest, and the mount with it.
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        told = keeper.stdout.readline().decode()
        if told != "mounted\n":
            keeper.stdin.close()
            raise OSError(None, f"no disk can be mounted: {told}")
        try:
            yield Disk(image, at, keeper.pid)
        finally:
            keeper.stdin.close()
