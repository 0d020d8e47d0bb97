"""A private system for one program, out of Linux namespaces; the guard's process is its first process.

    guard ─ unshare user, pid, network, mount, ipc, uts ─ fork ─ process 1: a root of its own, then the program
                                                                  /usr, /lib, ... and the toolchain   read-only
                                                                  /proc of this namespace, five devices
                                                                  /program, its folder, in memory, of bounded size

Needs no privilege and no helper program, but Linux 5.14 or newer that lets its users make user namespaces. Process 1
keeps its capabilities inside; the program has another user id and none, so it can neither mount, signal nor trace.
Sources: user_namespaces(7), mount_setattr(2), pivot_root(2).
"""

import ctypes
import os
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PROGRAM_ID = 1000
"""The program's user and group inside the namespace."""
WORK = "/program"
"""The program's folder inside; /tmp is the same place."""

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
SETTINGS = ("/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ssl/openssl.cnf")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NEW_MOUNTS, _NEW_IPC, _NEW_UTS = 0x00020000, 0x08000000, 0x04000000
_BIND, _RECURSIVE, _PRIVATE, _NO_SETUID, _NO_DEVICES, _NO_EXEC = 4096, 16384, 1 << 18, 2, 4, 8
_DETACH = 2
_MOUNT_SETATTR = 442  # one number on every architecture
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}
_SET_DEATH_SIGNAL, _NO_NEW_PRIVILEGES, _SUBREAPER = 1, 38, 36


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def enter(root: Path, reads: Iterable[str], folder_mib: int) -> bool:
    """Return in a child that is process 1 of a private system; the caller's process waits for it and exits with it.

    root: an empty folder to build on. reads: further folders to show, read-only. Returns whether the program can have
    a user id that nobody else has (else it shares its user's, which then has no other process in the namespace).
    Raises OSError where the kernel refuses, always in the caller's process or with the child's exit.
    """
    distinct = _unshare()
    child = os.fork()
    if child:
        _follow(child)
    die_with_parent()
    _build(root, reads, folder_mib)
    _pivot(root)
    # Another user namespace would give the program capabilities back, and with them more of the kernel to attack.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    return distinct


def _unshare() -> bool:
    """Unshare; a helper left outside writes the id maps, since root may map a second id only from there."""
    ready, go = os.pipe()
    helper = os.fork()
    if not helper:
        os.close(go)
        os.read(ready, 1)
        os._exit(_map_ids(os.getppid()))
    os.close(ready)
    try:
        flags = _NEW_USER | _NEW_PID | _NEW_NET | _NEW_MOUNTS | _NEW_IPC | _NEW_UTS
        _check(_libc().unshare(flags), "unshare")
    finally:
        os.close(go)
        status = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if status not in (0, 1):
        raise PermissionError(f"user namespace: the id maps could not be written ({os.strerror(status - 2)})")
    return status == 0


def _map_ids(process: int) -> int:
    """Map the ids of a process; 0: the program's is a fresh one, 1: it is the caller's own, 2 + errno: neither."""
    folder = Path(f"/proc/{process}")
    # As root, RLIMIT_NPROC binds nobody: the program gets an id that no account and no other run has.
    fresh = 0x7ABC0000 + process
    try:
        for name in ("gid_map", "uid_map"):
            (folder / name).write_text(f"0 0 1\n{PROGRAM_ID} {fresh} 1\n")
        return 0
    except OSError:
        pass  # an ordinary user, or root of a container: only the own id can be mapped
    try:
        (folder / "setgroups").write_text("deny")
        (folder / "gid_map").write_text(f"{PROGRAM_ID} {os.getegid()} 1\n")
        (folder / "uid_map").write_text(f"{PROGRAM_ID} {os.geteuid()} 1\n")
        return 1
    except OSError as error:
        return 2 + (error.errno or 0)


def _build(root: Path, reads: Iterable[str], folder_mib: int) -> None:
    """Mount the private root over `root`: nothing of the machine is in it but what is named here."""
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NO_SETUID | _NO_DEVICES, "size=1m,mode=755")
    java = (str(path) for path in Path("/etc").glob("java-*"))
    for place in dict.fromkeys([*SYSTEM, *SETTINGS, *java, *reads]):
        _show(root, Path(place))
    for device in DEVICES:
        _bind(root, Path(device))
    _mount("proc", _made(root, "/proc"), "proc", _NO_SETUID | _NO_DEVICES | _NO_EXEC)
    options = f"size={folder_mib}m,nr_inodes=4096,mode=700"
    _mount("tmpfs", _made(root, WORK), "tmpfs", _NO_SETUID | _NO_DEVICES, options)
    if not (root / "tmp").exists():  # unless a tool lives there
        (root / "tmp").symlink_to(WORK)
    _read_only(root, recursive=False)


def _show(root: Path, place: Path) -> None:
    target = Path(f"{root}{place}")
    if not place.exists() or target.is_symlink():
        return
    if place.is_symlink():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(place.readlink())
    elif not any(Path(f"{root}{parent}").is_mount() for parent in [place, *place.parents[:-1]]):
        _read_only(_bind(root, place), recursive=True)


def _bind(root: Path, place: Path) -> Path:
    if place.is_dir():
        target = _made(root, str(place))
    else:
        target = _made(root, str(place.parent)) / place.name
        target.touch()
    _mount(place, target, "", _BIND | _RECURSIVE)
    return target


def _made(root: Path, place: str) -> Path:
    target = Path(f"{root}{place}")
    target.mkdir(parents=True, exist_ok=True)
    return target


def _pivot(root: Path) -> None:
    machine = os.uname().machine
    number = _PIVOT_ROOT.get(machine)
    if number is None:
        raise OSError(f"pivot_root: its number on {machine} is not known here")
    os.chdir(root)
    _check(_libc().syscall(number, b".", b"."), "pivot_root")
    _check(_libc().umount2(b".", _DETACH), "umount")
    os.chdir("/")


def _mount(source: str | Path, target: str | Path, kind: str, flags: int, options: str = "") -> None:
    arguments = [os.fsencode(word) or None for word in (source, target, kind)]
    result = _libc().mount(*arguments, ctypes.c_ulong(flags), os.fsencode(options) or None)
    _check(result, f"mount {source} on {target}")


def _read_only(target: Path, recursive: bool) -> None:
    # mount_setattr keeps the flags that a user namespace may not clear; a remount has to repeat each of them.
    attributes = _MountAttributes(set=1 | 2 | 4)  # read-only, no set-user-id programs, no devices
    flags = 0x8000 if recursive else 0
    size = ctypes.sizeof(attributes)
    result = _libc().syscall(_MOUNT_SETATTR, -100, os.fsencode(target), flags, ctypes.byref(attributes), size)
    _check(result, f"mount_setattr {target}")


def control(option: int, value: int, pointer: Any = None) -> None:
    """Set one of prctl(2)'s options of this process (Linux). Raises OSError."""
    _check(_libc().prctl(option, ctypes.c_ulong(value), pointer, None, None), f"prctl {option}")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends (Linux)."""
    control(_SET_DEATH_SIGNAL, signal.SIGKILL)


def no_new_privileges() -> None:
    """Make set-user-id programs ordinary ones from here on (Linux)."""
    control(_NO_NEW_PRIVILEGES, 1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that it can be found (Linux)."""
    control(_SUBREAPER, 1)


def _follow(child: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
