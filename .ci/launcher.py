"""The start of schedulezero.pyz: unpack it once for each user, and run from there.

Python caches no bytecode for what it imports from an archive: every start would compile the
program again, and keep the memory that took. Unpacked, it starts as fast as the plain file.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import sys
import zlib

if sys.version_info < (3, 11):  # noqa: UP036 - whoever has one that is older shall be told
    sys.exit(f"schedulezero: this is Python {sys.version.split()[0]}; it needs 3.11 or newer")

NAME_RULE = re.compile(r"[0-9a-f]{8}-[0-9a-f]+(\..+)?")  # with a suffix while it is made or removed


def open_program(archive: str) -> str:
    """The directory with what is in the archive, which stays while this process lives."""
    with open(archive, "rb") as file:
        content = file.read()
    name = f"{zlib.crc32(content):08x}-{len(content):x}"
    refusals = []
    for place in places():
        try:
            own(place)
            path, is_new = os.path.join(place, name), False
            while not claim(path):
                unpack(archive, path)
                is_new = True
        except OSError as error:
            refusals.append(f"{error.filename or place}: {error.strerror}")
            continue
        if is_new:
            prune(place, name)
            for refusal in refusals:
                print(f"schedulezero: {refusal}; unpacked to {place} instead", file=sys.stderr)
        return path
    sys.exit(
        f"schedulezero: nowhere to unpack to: {'; '.join(refusals)}. "
        "Set XDG_CACHE_HOME to a directory that you can write to."
    )


def places() -> list[str]:
    """Where it may be unpacked, the best first: systemd's place, the user's, a temporary one."""
    given = os.environ.get("CACHE_DIRECTORY", "").split(":")[0]
    caches = [given, os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")]
    temporary = os.environ.get("TMPDIR") or "/tmp"
    return [
        *(os.path.join(cache, "schedulezero") for cache in caches if os.path.isabs(cache)),
        os.path.join(temporary, f"schedulezero-{os.geteuid()}"),
    ]


def own(place: str) -> None:
    """Make the directory; OSError if somebody else could put a program of theirs into it."""
    os.makedirs(place, mode=0o700, exist_ok=True)
    found = os.lstat(place)
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not is_ours or found.st_mode & 0o022:
        raise PermissionError(1, "others can write to it", place)


def claim(path: str) -> bool:
    """Keep a directory from being removed for as long as this process and its forks live; False
    if it is not there.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    fcntl.flock(fd, fcntl.LOCK_SH)
    if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(fd)):
        return True
    os.close(fd)
    return False


def unpack(archive: str, path: str) -> None:
    """Put the archive's content at `path`, all of it or nothing, also if the power fails."""
    import shutil
    import tempfile
    import zipfile

    part = tempfile.mkdtemp(prefix=os.path.basename(path) + ".", dir=os.path.dirname(path))
    fd = os.open(part, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        zipfile.ZipFile(archive).extractall(part)
        os.sync()
        os.rename(part, path)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        if not os.path.isdir(path):  # otherwise somebody was faster
            raise
    finally:
        os.close(fd)


def prune(place: str, name: str) -> None:
    """Remove other versions that nobody runs any more, and what a killed process left half done."""
    import shutil

    for other in os.listdir(place):
        if other == name or not NAME_RULE.fullmatch(other):
            continue
        path = os.path.join(place, other)
        doomed = f"{path}.{os.getpid()}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(path, doomed)  # half removed, it must not have a name that can be claimed
            shutil.rmtree(doomed, ignore_errors=True)
        except OSError:  # somebody runs it, or removes it too
            continue
        finally:
            os.close(fd)


def main() -> int:
    sys.path[0] = open_program(os.path.dirname(os.path.abspath(__file__)))
    try:
        import schedulezero
    except ModuleNotFoundError as error:
        if error.name != "zmq":
            raise
        sys.exit("schedulezero: it needs pyzmq: apt install python3-zmq, or pip install pyzmq")
    return schedulezero.main()


if __name__ == "__main__":
    sys.exit(main())
