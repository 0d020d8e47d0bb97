"""System calls that a program is refused: ways to hold memory that no limit counts, and, without a network
namespace, every socket. Inherited by whatever the program starts, and never lifted.

Source: seccomp(2), and the kernel's system call tables. Linux on x86-64 and arm64; elsewhere there is no filter.
"""

import ctypes
import os
import struct
import sys

from sheepfold.evaluation.code import namespaces

_CALLS = {  # name -> number on x86-64, on arm64
    "socket": (41, 198),
    "memfd_create": (319, 279),  # files in memory, outside any folder
    "memfd_secret": (447, 447),
    "shmget": (29, 194),  # memory that outlives its process
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "io_uring_setup": (425, 425),  # does what a filter refuses
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, architecture as the kernel names it
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # refused calls say "Operation not permitted"
_SET_FILTER, _FILTER_MODE = 22, 2
_OTHER_ABI = 0x40000000  # x32 numbers on x86-64 name the same calls again


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


def works() -> bool:
    """Return whether this system takes the filter, found out by a process that sets it and asks for a socket."""
    if sys.platform != "linux" or os.uname().machine not in _MACHINES:
        return False
    child = os.fork()
    if not child:
        try:
            namespaces.no_new_privileges()
            refuse(sockets=True)
            refused = ctypes.CDLL(None, use_errno=True).socket(1, 1, 0) == -1
            os._exit(0 if refused else 1)
        except OSError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refuse(sockets: bool) -> None:
    """Refuse these calls to this process and its descendants for good; needs `no_new_privileges`. Raises OSError."""
    column, architecture = _MACHINES[os.uname().machine]
    numbers = [both[column] for name, both in _CALLS.items() if sockets or name != "socket"]
    steps = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    tests = [(_IF_AT_LEAST, _OTHER_ABI), *((_IF_EQUAL, number) for number in numbers)]
    # A hit jumps over the tests that are left and over the answer for those that hit nothing.
    steps += [(code, len(tests) - place, 0, value) for place, (code, value) in enumerate(tests)]
    steps += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    namespaces.control(_SET_FILTER, _FILTER_MODE, ctypes.byref(program))
