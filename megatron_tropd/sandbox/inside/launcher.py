"""Started by path in the process that is to be confined: confines it, then runs the program in it.

Arguments: the descriptor on which to say ``ready`` or what failed, the program's file, the parent's process id, the
limits as ``NAME=soft:hard`` with commas, the seccomp filter and the attributes of the Landlock ruleset in hexadecimal
(empty: the machine has none), the flags of landlock_restrict_self, the rights in the working directory, those where it
may read, and the paths where it may; a ``+`` before one puts it on the import path too.

Every program pays for what is imported here, so it is little, and nothing of the package.
"""

import sys

del sys.path[0]  # the folder of this file

import builtins  # noqa: E402
import ctypes  # noqa: E402
import importlib.machinery  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import site  # noqa: E402
import types  # noqa: E402

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS, _SECCOMP_MODE_FILTER = 1, 22, 38, 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_CAPABILITIES_V3 = 0x20080522
_SIGKILL = 9  # the module signal takes 4 ms to import
_SELF = 0x7FFFFFF1  # system_calls.SELF
_LIBRARIES = "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache"
_DEVICES = "/dev/null", "/dev/zero", "/dev/urandom"
_FILE_RIGHTS = 0b110  # write and read: what a rule on a file that is no directory may have

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(what: str, status: int) -> int:
    if status < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return status


def _prctl(what: str, option: int, value: "int | ctypes.Array[ctypes.c_char]", extra: object = 0) -> None:
    arguments = (ctypes.c_ulong(value), extra) if isinstance(value, int) else (value, extra)
    _checked(what, _libc.prctl(option, *arguments, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    _checked("capset", _libc.capset(header, (ctypes.c_uint32 * 6)()))


def _die_with(parent: int) -> None:
    _prctl("PR_SET_PDEATHSIG", _PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _limit(limits: str) -> None:
    for limit in limits.split(","):
        name, _, values = limit.partition("=")
        soft, hard = map(int, values.split(":"))
        number = getattr(resource, f"RLIMIT_{name}")
        allowed = resource.getrlimit(number)[1]  # only root could raise it
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(number, (soft, hard))


def _system_call(what: str, number: int, *arguments: object) -> int:
    return _checked(what, _libc.syscall(ctypes.c_long(number), *arguments))


class _PathBeneath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _restrict_files(attributes: bytes, flags: int, rules: "dict[str, int]") -> None:
    ruleset = _system_call(
        "landlock_create_ruleset", _LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0
    )
    handled = int.from_bytes(attributes[:8], "little")
    for path, rights in rules.items():
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if not os.path.isdir(path):
            rights &= _FILE_RIGHTS
        rule = _PathBeneath(rights & handled, place)
        _system_call("landlock_add_rule", _LANDLOCK_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0)
        os.close(place)
    _system_call("landlock_restrict_self", _LANDLOCK_RESTRICT_SELF, ruleset, flags)
    os.close(ruleset)


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _restrict_calls(instructions: bytes) -> None:
    this, self_ = os.getpid().to_bytes(4, "little"), _SELF.to_bytes(4, "little")
    parts = (instructions[at : at + 8] for at in range(0, len(instructions), 8))
    own = b"".join(part[:4] + (this if part[4:] == self_ else part[4:]) for part in parts)
    program = _Filter(len(own) // 8, own)
    _prctl("PR_SET_SECCOMP", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _confine(program: str, arguments: "list[str]") -> None:
    parent, limits, calls, ruleset, flags, own_rights, read_rights, *paths = arguments
    _drop_capabilities()
    _die_with(int(parent))
    _prctl("PR_SET_NO_NEW_PRIVS", _PR_SET_NO_NEW_PRIVS, 1)
    _limit(limits)
    own = [*sys.path, os.path.join(sys.base_exec_prefix, "lib"), *_LIBRARIES, program]
    sys.path += [path[1:] for path in paths if path.startswith("+")]
    if ruleset:
        rules = dict.fromkeys([*own, *(path.lstrip("+") for path in paths), *_DEVICES], int(read_rights))
        rules |= {"/dev/null": _FILE_RIGHTS, os.getcwd(): int(own_rights)}
        _restrict_files(bytes.fromhex(ruleset), int(flags), rules)
    if calls:
        _restrict_calls(bytes.fromhex(calls))


def _run(program: str) -> None:
    """Run the program as ``python PROGRAM`` would, with tracebacks that begin in it."""
    site.setquit()  # exit() and quit(), which -S leaves out
    sys.argv = [program]
    sys.path.insert(0, os.getcwd())
    main = types.ModuleType("__main__")
    vars(main).update(__file__=program, __builtins__=builtins)
    sys.modules["__main__"] = main
    try:
        importlib.machinery.SourceFileLoader("__main__", program).exec_module(main)
    except MemoryError:
        pass  # out of this block first, which holds the frames of the program
    except Exception as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != program:
            trace = trace.tb_next
        error.__traceback__ = trace
        sys.excepthook(type(error), error, trace)
        sys.exit(1)
    else:
        return
    vars(main).clear()  # the end of the interpreter needs memory too
    os.write(2, b"MemoryError\n")
    sys.exit(1)


def main() -> None:
    """Confine this process, say so, and run the program."""
    status, program, *arguments = sys.argv[1:]
    try:
        _confine(program, arguments)
    except (OSError, ValueError) as error:
        os.write(int(status), str(error).encode())
        os._exit(1)
    os.write(int(status), b"ready")
    os.closerange(3, int(status) + 1)
    _run(program)


main()
