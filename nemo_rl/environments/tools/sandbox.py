"""The process that runs Python code of a model; `python_tool` starts and kills it.

This file is run as a script and imports the standard library only. It reads the code from standard input and restricts
itself before it runs it. It never lifts a restriction, so the code cannot either:

* Resource limits: CPU time, address space, size of files, open files.
* Landlock: files outside the interpreter and the scratch directory can be neither read nor written, and no memory or
  variables of other processes under /proc.
* seccomp: no sockets, no further processes or threads, no other program, no signals to other processes, no change of
  owners, modes and times of files, and no memory that the limit does not count. Calls that are denied fail with EPERM.
* Capabilities: none, also for root.

One line on the status pipe tells the parent that all of this is in force, or what failed.
"""

from __future__ import annotations

import ctypes
import json
import linecache
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types

# System call -> numbers on x86_64 and aarch64 (None: does not exist there), from the kernel's tables.
# fmt: off
DENIED: dict[str, tuple[int | None, int | None]] = {
    # Processes, threads, programs.
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435),
    "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268),
    # Network, and io_uring, which opens sockets by itself.
    "socket": (41, 198), "io_uring_setup": (425, 425),
    # Other processes.
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "ptrace": (101, 117), "kcmp": (312, 272),
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "setpriority": (141, 140), "ioprio_set": (251, 30), "sched_setaffinity": (203, 122),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "migrate_pages": (256, 238), "move_pages": (279, 239),
    # Files: what Landlock does not cover.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452),
    "chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54),
    "setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7), "setxattrat": (463, 463),
    "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88),
    "truncate": (76, 45), "file_setattr": (469, 469),
    # Memory that RLIMIT_AS does not count, and objects that outlive the process.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219),
    # Rarely needed parts of the kernel.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}
# fmt: on
# Numbers on both machines, position and mask of an argument, its values, and whether they are allowed or denied.
CONDITIONAL: tuple[tuple[tuple[int, int], int, int, tuple[int, ...], bool], ...] = (
    ((302, 261), 0, 0xFFFFFFFF, (0,), True),  # prlimit64: of the process itself
    ((53, 199), 1, 0xF, (1,), True),  # socketpair: streams, which have no other addresses
    ((72, 25), 1, 0xFFFFFFFF, (8, 15), False),  # fcntl: F_SETOWN and F_SETOWN_EX send signals
    ((16, 29), 1, 0xFFFFFFFF, (0x8901, 0x8902), False),  # ioctl: FIOSETOWN and SIOCSPGRP, too
)
# Name in `platform.machine()` -> its column in `DENIED`, and its AUDIT_ARCH number.
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32_BIT = 0x40000000  # the second table of x86_64

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATE, _IOCTL = 1 << 14, 1 << 15
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# Number of access rights that Landlock's versions 1 to 5 know. Later versions have more, which are not used.
_NUM_RIGHTS = (13, 14, 15, 15, 16)
_SYSTEM_DIRECTORIES = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.prctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong)


class _SandboxError(Exception):
    """A restriction could not be put in force."""


def _check(result: int, what: str) -> int:
    if result < 0:
        raise _SandboxError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources(cpu_s: int, memory_mb: int, file_mb: int) -> None:
    """Limit CPU time, address space beyond the present one, file size and open files."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    for kind, soft, hard in (
        (resource.RLIMIT_CPU, cpu_s, cpu_s + 1),
        (resource.RLIMIT_AS, in_use + memory_mb * 2**20, in_use + memory_mb * 2**20),
        (resource.RLIMIT_FSIZE, file_mb * 2**20, file_mb * 2**20),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        resource.setrlimit(kind, (soft, hard))


def drop_privileges() -> None:
    """Give up all capabilities, and end with the parent."""
    _check(_libc.prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    _check(_libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    header = struct.pack("II", 0x20080522, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def landlock_version() -> int:
    """Return the version of Landlock that the kernel has; less than 1 if it has none, or a container forbids it."""
    version: int = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    return version


def restrict_files(scratch: str) -> None:
    """Allow reading the interpreter and the system's libraries, and everything below `scratch`; deny the rest."""
    version = landlock_version()
    if version < 1:
        raise _SandboxError("this kernel has no Landlock")
    rights = (1 << _NUM_RIGHTS[min(version, len(_NUM_RIGHTS)) - 1]) - 1
    size = ctypes.c_size_t(8)
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, struct.pack("Q", rights), size, 0), "landlock_create_ruleset")

    def allow(path: str, access: int) -> None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        if not os.path.isdir(path):
            access &= _OF_FILES
        rule = struct.pack("=Qi", access & rights, descriptor)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(descriptor)

    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    for path in {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *packages, *_SYSTEM_DIRECTORIES}:
        allow(path, _READ)
    for path in _DEVICES:
        allow(path, _READ_FILE | _WRITE_FILE)
    allow(scratch, rights & ~_IOCTL)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def restrict_system_calls() -> None:
    """Install the seccomp filter that `DENIED` describes."""
    column, architecture = MACHINES[platform.machine()]
    # BPF_LD|BPF_W|BPF_ABS, BPF_ALU|BPF_AND|BPF_K, BPF_JMP|BPF_JEQ|BPF_K, BPF_JMP|BPF_JGE|BPF_K, BPF_RET|BPF_K
    load, mask, equal, at_least, result = 0x20, 0x54, 0x15, 0x35, 0x06
    allowed, denied, killed = 0x7FFF0000, 0x00050001, 0x80000000  # allow; errno EPERM; kill the process
    program = [
        (load, 0, 0, 4),  # architecture
        (equal, 1, 0, architecture),
        (result, 0, 0, killed),
        (load, 0, 0, 0),  # number of the system call
        (at_least, 0, 1, _X32_BIT),
        (result, 0, 0, denied),
    ]
    for numbers in DENIED.values():
        number = numbers[column]
        if number is not None:
            program += [(equal, 0, 1, number), (result, 0, 0, denied)]
    for pair, argument, bits, values, allows in CONDITIONAL:
        tests = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits)]
        for value in values:
            tests += [(equal, 0, 1, value), (result, 0, 0, allowed if allows else denied)]
        tests.append((result, 0, 0, denied if allows else allowed))
        program += [(equal, 0, len(tests), pair[column]), *tests]
    program.append((result, 0, 0, allowed))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    _check(_libc.prctl(22, 2, filter_, 0, 0), "seccomp")


def run(code: str) -> None:
    """Run `code` as the module `__main__`; print a traceback if it raises."""
    name = "code.py"
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = module
    sys.argv = [name]
    linecache.cache[name] = (len(code), None, f"{code}\n".splitlines(keepends=True), name)
    try:
        exec(compile(code, name, "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        trace = error.__traceback__
        traceback.print_exception(type(error), error, trace and trace.tb_next)
        sys.stdout.flush()
        raise SystemExit(1) from None


def main(status: int, cpu_s: int, memory_mb: int, file_mb: int, protect_files: bool) -> None:
    """Restrict this process, report on the descriptor `status`, then run the code from standard input."""
    code = sys.stdin.buffer.read().decode(errors="replace")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    try:
        limit_resources(cpu_s, memory_mb, file_mb)
        drop_privileges()
        if protect_files:
            restrict_files(os.getcwd())
        restrict_system_calls()
    except (_SandboxError, OSError, ValueError) as error:
        os.write(status, str(error).encode())
        raise SystemExit(1) from None
    os.write(status, b"ready")
    os.close(status)
    run(code)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
