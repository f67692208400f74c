"""Confine the current process on Linux, without privileges: no network, no writing but to files that are open already.

Two mechanisms of the kernel, each for what it can do. Neither can be undone by the process.

- seccomp: a filter of system calls. What is not in `ALLOWED` fails with EPERM: sockets, other programs and processes,
  signals to others, and opening any file for writing. A file that is open can be written to.
- Landlock: access to files by path. Only the given files can be read, and nothing can be made, renamed or removed.

Sources: Linux, Documentation/userspace-api/seccomp_filter.rst and landlock.rst; numbers from
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h (arm64).
"""

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

# --- Linux's constants ------------------------------------------------------------------------------------------------

PR_SET_NO_NEW_PRIVS = 38
SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC = 1, 1
SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446  # system calls, on every machine
LANDLOCK_CREATE_RULESET_VERSION, LANDLOCK_RULE_PATH_BENEATH = 1, 1
LANDLOCK_ACCESS_FS_READ_FILE = 1 << 2
LANDLOCK_FS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of rights on files that a version knows; 16 from 5 on
LANDLOCK_NET_RIGHTS = 2  # bind and connect, from version 4 on
LANDLOCK_SCOPES = 3  # abstract sockets and signals of processes that are not confined, from version 6 on
CLONE_THREAD, TCGETS = 0x00010000, 0x5401
# Copy a descriptor, read and set whether it is inherited, read its flags. Others can have a signal sent to any process.
HARMLESS_FCNTL = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CALLS = {  # machine: (number of the architecture, number of the call seccomp, numbers of the calls that are allowed)
    "x86_64": (0xC000003E, 317, {
        "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
        "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
        "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "sched_yield": 24, "mremap": 25,
        "mincore": 27, "madvise": 28, "dup": 32, "nanosleep": 35, "getpid": 39, "exit": 60, "uname": 63,
        "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getcwd": 79, "readlink": 89, "gettimeofday": 96,
        "getrusage": 98, "sysinfo": 99, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110,
        "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217,
        "set_tid_address": 218, "restart_syscall": 219, "fadvise64": 221, "clock_gettime": 228, "clock_getres": 229,
        "clock_nanosleep": 230, "exit_group": 231, "newfstatat": 262, "readlinkat": 267, "faccessat": 269, "ppoll": 271,
        "set_robust_list": 273, "getcpu": 309, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334,
        "faccessat2": 439,
        # with a condition on an argument, see `_conditions`
        "open": 2, "ioctl": 16, "clone": 56, "fcntl": 72, "tgkill": 234, "openat": 257, "prlimit64": 302,
        "clone3": 435,
    }),
    "aarch64": (0xC00000B7, 277, {
        "getcwd": 17, "dup": 23, "ftruncate": 46, "faccessat": 48, "close": 57, "getdents64": 61,
        "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "ppoll": 73,
        "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82, "fdatasync": 83, "exit": 93, "exit_group": 94,
        "set_tid_address": 96, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "clock_gettime": 113,
        "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124,
        "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139,
        "uname": 160, "getrusage": 165, "getcpu": 168, "gettimeofday": 169, "getpid": 172, "getppid": 173,
        "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214,
        "munmap": 215, "mremap": 216, "mmap": 222, "fadvise64": 223, "mprotect": 226, "mincore": 232, "madvise": 233,
        "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293, "faccessat2": 439,
        "fcntl": 25, "ioctl": 29, "openat": 56, "tgkill": 131, "clone": 220, "prlimit64": 261, "clone3": 435,
    }),
}  # fmt: skip
# Instructions of the filter, a small program: load a word of the call's description, compare, return.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, DENY = (RETURN, 0, 0, SECCOMP_RET_ALLOW), (RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM)
Instruction = tuple[int, int, int, int]  # code, instructions to skip if true, if false, constant


def confine(readable: Sequence[Path]) -> list[str]:
    """Confine this process, which must not have threads; return the names of the mechanisms that hold it from now on.

    Args:
        readable: files that may still be opened for reading; only Landlock can tell these from others.
    """
    if not sys.platform.startswith("linux") or len(os.listdir("/proc/self/task")) != 1:  # noqa: PTH208
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return []
    held = ["Landlock"] if _restrict_paths(libc, readable) else []  # before seccomp, which would forbid it
    return [*held, *(["seccomp"] if _restrict_calls(libc) else [])]


def _restrict_paths(libc: ctypes.CDLL, readable: Sequence[Path]) -> bool:
    """Allow this process to read these files and nothing else; return whether the kernel can do that."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
    if version < 1:
        return False
    rights = (1 << LANDLOCK_FS_RIGHTS.get(version, 16)) - 1
    network = (1 << LANDLOCK_NET_RIGHTS) - 1
    parts = (rights, network, LANDLOCK_SCOPES)[: 3 if version >= 6 else 2 if version >= 4 else 1]
    attributes = struct.pack(f"{len(parts)}Q", *parts)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    if rules < 0:
        return False
    try:
        for path in readable:
            opened = os.open(path, os.O_PATH)
            try:
                rule = struct.pack("=Qi", LANDLOCK_ACCESS_FS_READ_FILE, opened)
                if libc.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0):
                    return False
            finally:
                os.close(opened)
        return not libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _restrict_calls(libc: ctypes.CDLL) -> bool:
    """Install the filter of system calls; return whether the kernel and the machine can do that."""
    known = CALLS.get(platform.machine())
    if known is None or sys.byteorder != "little":
        return False
    architecture, seccomp, calls = known
    program = [LOAD_ARCHITECTURE, (EQUAL, 1, 0, architecture), DENY, LOAD_NUMBER, (AT_LEAST, 0, 1, 1 << 30), DENY]
    conditions = _conditions()
    for name, number in calls.items():
        allowed = conditions.get(name, [ALLOW])
        program += [(EQUAL, 0, len(allowed), number), *allowed]
    program.append(DENY)
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *one) for one in program))
    header = struct.pack("@HP", len(program), ctypes.addressof(code))
    return not libc.syscall(seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, header)


LOAD_NUMBER: Instruction = (LOAD, 0, 0, 0)  # offsets in struct seccomp_data
LOAD_ARCHITECTURE: Instruction = (LOAD, 0, 0, 4)


def _load_argument(number: int, high: bool = False) -> Instruction:
    return (LOAD, 0, 0, 16 + 8 * number + 4 * high)


def _conditions() -> dict[str, list[Instruction]]:
    """Return for each call that is allowed under a condition what decides, at the end of which it returns."""
    count = len(HARMLESS_FCNTL)
    harmless = [(EQUAL, count - i, 0, command) for i, command in enumerate(HARMLESS_FCNTL)]  # skip to ALLOW
    no_writing: list[Instruction] = [(ANY_BIT, 0, 1, WRITING), DENY, ALLOW]
    return {
        "open": [_load_argument(1), *no_writing],
        "openat": [_load_argument(2), *no_writing],
        "fcntl": [_load_argument(1), *harmless, DENY, ALLOW],
        "ioctl": [_load_argument(1), (EQUAL, 1, 0, TCGETS), DENY, ALLOW],  # whether a file is a terminal
        "clone": [_load_argument(0), (ANY_BIT, 1, 0, CLONE_THREAD), DENY, ALLOW],  # a thread, not a process
        "clone3": [(RETURN, 0, 0, SECCOMP_RET_ERRNO | errno.ENOSYS)],  # the C library then calls clone
        "tgkill": [_load_argument(0), (EQUAL, 1, 0, os.getpid()), DENY, ALLOW],  # a signal to itself: abort()
        "prlimit64": [  # ask for a limit, not set one
            _load_argument(2), (EQUAL, 1, 0, 0), DENY, _load_argument(2, high=True), (EQUAL, 1, 0, 0), DENY, ALLOW,
        ],
    }  # fmt: skip
