"""Run the command line in forked children of one warm interpreter, with faults injected into its system calls.

Starting Python and torch takes seconds, merging a tiny model milliseconds: a fork makes a hundred kills affordable.
A child counts its calls (reads, writes, syncs, renames, opens, locks, ...) and can die by SIGKILL at any one of them,
lose data that were never synced, meet any error at any of them, or read and write less than it asked for. Checkpoints
for such tests are made here as well.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import gc
import importlib
import io
import json
import math
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from models import output_of

if TYPE_CHECKING:
    import torch

WRITES = ("pwrite", "pwritev", "write", "copy_file_range", "sendfile")
SYNCS = ("fsync", "fdatasync")
NAMING = ("rename", "replace", "link", "symlink", "unlink", "mkdir", "rmdir", "chmod")
READS = ("preadv", "read")
CALLS = (*WRITES, *SYNCS, *NAMING, *READS, "ftruncate")
TIMEOUT_S = 60
# Modules that commands load when they run, besides those of the package.
OTHERS = ("_pyio", "encodings.utf_8_sig", "graphlib", "multiprocessing.synchronize", "torch.utils._device")
OPEN_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Call(NamedTuple):
    """A system call; the target is a path, or `from -> to`."""

    name: str
    nbytes: int
    offset: int
    target: str


def spare_syncs() -> None:
    """From here on, syncs of this process wait for no disk: no test cuts the power, and thousands would take minutes.

    They are made, fail and are counted as before; a power failure is simulated by those that are missing.
    """
    for name in SYNCS:
        setattr(os, name, os.fstat)  # which fails for what is not open


# ------------------------------------------------------------------ checkpoints


def dtype_code(tensor: torch.Tensor) -> str:
    """The name of the tensor's dtype in a safetensors header."""
    names = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
    return (names | {"uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3"})[
        str(tensor.dtype).removeprefix("torch.")
    ]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's elements in memory order."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_raw(path: Path, header: object, data: bytes, pad: int = 0) -> None:
    """A safetensors file from its parts, right or wrong; `pad` spaces follow the header."""
    text = json.dumps(header).encode() + b" " * pad
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], pad: int = 0) -> None:
    """A safetensors file with the tensors in the order given."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, tensor in tensors.items():
        raw = raw_bytes(tensor)
        offsets = [end, end + len(raw)]
        header[name] = {"dtype": dtype_code(tensor), "shape": list(tensor.shape), "data_offsets": offsets}
        parts.append(raw)
        end += len(raw)
    write_raw(path, header, b"".join(parts), pad)


def llama_tensors(seed: int, *, layers: int = 2, hidden: int = 32, vocab: int = 64) -> dict[str, torch.Tensor]:
    """Random float32 tensors with a Llama's names and the given sizes."""
    import torch

    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{part}_proj.weight": (hidden, hidden) for part in "qkvo"}
        shapes |= {prefix + f"mlp.{part}_proj.weight": (2 * hidden, hidden) for part in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (hidden, 2 * hidden)}
        shapes |= {prefix + f"{part}_layernorm.weight": (hidden,) for part in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: torch.randn(shape, generator=random) * 0.1 for name, shape in shapes.items()}


def near(base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """A stand-in for a fine-tune: the base plus small noise; integer tensors stay as they are."""
    import torch

    random = torch.Generator().manual_seed(seed)
    noise = {n: torch.randn(t.shape, generator=random) * 0.02 for n, t in base.items()}
    return {n: (t + noise[n]).to(t.dtype) if t.is_floating_point() else t.clone() for n, t in base.items()}


def save_model(folder: Path, tensors: Mapping[str, torch.Tensor], *, shards: int = 1, pad: int = 0) -> Path:
    """A checkpoint folder: weights in `shards` files, an index if there are several, a config and a tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    cuts = [len(names) * i // shards for i in range(shards + 1)]
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map: dict[str, str] = {}
    for i, file in enumerate(files):
        part = {name: tensors[name] for name in names[cuts[i] : cuts[i + 1]]}
        write_tensors(folder / file, part, pad)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def snapshot(folder: Path, *, times: bool = False) -> dict[str, tuple[object, ...]]:
    """Every file under the folder with its mode and bytes, and on request its time of change."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        stat = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = (stat.st_mode, content, stat.st_mtime_ns if times else 0)
    return found


def output_snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """The snapshot of an output, as if it had another name."""
    contents = output_of(folder)
    return {name: (mode, contents.get(name)) for name, (mode, *_) in snapshot(folder).items()}


# ------------------------------------------------------------------ in the test: asking for a run


@dataclass(frozen=True)
class Ran:
    """The result of a run; `code` is negative for a signal, `calls` are in the order in which they were made."""

    code: int
    out: str
    err: str
    calls: tuple[Call, ...]

    def count(self, *names: str, where: str = "") -> int:
        """The number of calls of these names with `where` in their target."""
        return sum(call.name in names and where in call.target for call in self.calls)

    def bytes_of_weights(self) -> int:
        """Bytes written into weight files, header lengths apart."""
        written = [call.nbytes for call in self.calls if call.name in WRITES and ".safetensors" in call.target]
        return sum(n for n in written if n > 8)


class Forks:
    """A warm interpreter from which each run of the command line is forked."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, *arguments: object, cwd: Path, **fault: object) -> Ran:
        """`merge ARGUMENTS` in the folder, with a fault (keywords of `Fault`) if any."""
        return self._run("merge", arguments, cwd, fault)

    def command(self, *arguments: object, cwd: Path, **fault: object) -> Ran:
        """The same for `mergekit-lfm ARGUMENTS`."""
        return self._run("mergekit-lfm", arguments, cwd, fault)

    def _run(self, program: str, arguments: Iterable[object], cwd: Path, fault: Mapping[str, object]) -> Ran:
        assert self._server.stdin and self._server.stdout
        request = {"arguments": [str(a) for a in arguments], "cwd": str(cwd), "program": program, "fault": fault}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        reply = json.loads(self._server.stdout.readline())
        return Ran(reply["code"], reply["out"], reply["err"], tuple(Call(*call) for call in reply["calls"]))


@contextmanager
def warm_interpreter(*modules: str, **environment: str) -> Iterator[Forks]:
    """Start the interpreter, which loads more modules for its children, and end it with the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])} | environment
    command = [sys.executable, __file__, *modules]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as server:
        yield Forks(server)


# ------------------------------------------------------------------ in the child: faults


@dataclass
class Fault:
    """A fault. Calls are numbered from 1; a name or path matches any part of the target."""

    kill_at: int = 0
    signal: int = signal.SIGKILL
    torn: bool = False  # the call that kills has written half of its bytes
    lose_unsynced: bool = False  # bytes of weights that no sync covered are damaged, as when the power fails
    kill_after_s: float = 0
    fail: str = ""  # from the nth time on this call raises `error`; with error 0 it kills, the nth time
    nth: int = 1
    times: int = 0  # so many times only, if not 0
    where: str = ""
    error: int = errno.ENOSPC
    short: bool = False  # every read and write handles half of its bytes, as the system may
    alarms: bool = False  # signals arrive all the time, and interrupt calls
    reads: bool = False  # opens and reads through Python's files are calls, too
    shorten: str = ""  # instead, the nth time, this file loses its second half
    deny: str = ""  # opening such a path is refused
    free: int = -1  # the free space that the file system claims
    umask: int = -1
    sync_bytes: int = 0  # bytes between syncs, in place of the engine's hundreds of megabytes; statistics keep all sums


def describe(name: str, args: tuple[Any, ...], folder: int | None = None) -> Call:
    """A description of a call: its bytes, offset and the path it acts on, in an open folder if that is given."""
    nbytes = offset = 0
    handle = args[0]
    if name in ("pwrite", "write"):
        nbytes = memoryview(args[1]).nbytes
    elif name in ("pwritev", "preadv"):
        nbytes = sum(memoryview(part).nbytes for part in args[1])
    elif name == "copy_file_range":
        handle, nbytes, offset = args[1], args[2], args[4] if len(args) > 4 else 0
    elif name == "sendfile":
        nbytes = args[3]
    elif name == "read":
        nbytes = args[1]
    if name in ("pwrite", "pwritev", "preadv"):
        offset = args[2]
    if name in ("rename", "replace", "link", "symlink"):
        return Call(name, 0, 0, f"{os.fspath(args[0])} -> {os.fspath(args[1])}")
    if isinstance(handle, int):
        return Call(name, nbytes, offset, str(Path(f"/proc/self/fd/{handle}").readlink()))
    place = Path.cwd() if folder is None else Path(f"/proc/self/fd/{folder}").readlink()
    return Call(name, nbytes, offset, str(place / handle))


def shorten(name: str, args: tuple[Any, ...], nbytes: int) -> tuple[Any, ...]:
    """The arguments of the same call for half of its bytes, at least one."""
    half = max(1, nbytes // 2)
    if name in ("pwrite", "write"):
        return args[0], memoryview(args[1]).cast("B")[:half], *args[2:]
    if name in ("preadv", "pwritev"):
        return args[0], [memoryview(args[1][0]).cast("B")[:half]], *args[2:]
    at = {"read": 1, "copy_file_range": 2, "sendfile": 3}[name]
    return *args[:at], half, *args[at + 1 :]


class Injector:
    """Wraps the system calls of this process; every call is written to the trace before it is made.

    Python's own files are those of its pure version, which read and write by `os`.
    """

    def __init__(self, fault: Fault, trace: IO[str]) -> None:
        self._fault, self._trace = fault, trace
        self._lock = threading.RLock()
        self._count = self._matching = 0
        self._unsynced: dict[str, list[tuple[int, int]]] = {}

    def install(self) -> None:
        """From here on, calls are counted and may fail."""
        from mergekit_lfm.store import durable

        self._pwrite = os.pwrite
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        fcntl.flock = self._wrap("flock", fcntl.flock)
        durable._fallocate = self._wrap_fallocate(durable._fallocate)
        builtins.open = io.open = importlib.import_module("_pyio").open
        sys.addaudithook(self._opened)
        if self._fault.alarms:
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
        if self._fault.free >= 0:
            free = self._fault.free
            blocks = {"f_bavail": free // 4096, "f_bfree": free // 4096, "f_frsize": 4096, "f_bsize": 4096}
            os.statvfs = lambda _path: SimpleNamespace(**blocks, f_blocks=1 << 40)  # type: ignore[assignment,return-value]
            usage = SimpleNamespace(total=1 << 50, used=1 << 50, free=free)
            shutil.disk_usage = lambda _path: usage  # type: ignore[assignment,return-value]

    def _wrap(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if (isinstance(args[0], int) and args[0] < 3) or (name == "read" and not self._fault.reads):
                return original(*args, **kwargs)
            what = describe(name, args, kwargs.get("dir_fd"))
            half: Callable[[], object] = lambda: None  # noqa: E731
            if name in ("pwrite", "write"):
                half = lambda: original(*shorten(name, args, what.nbytes))  # noqa: E731
            self._step(what, half)
            if self._fault.short and name in (*READS, *WRITES) and what.nbytes:
                args = shorten(name, args, what.nbytes)
            result = original(*args, **kwargs)
            with self._lock:
                if name in SYNCS:
                    self._unsynced.pop(what.target, None)
                elif name in WRITES and what.target.endswith(".safetensors"):
                    self._unsynced.setdefault(what.target, []).append((what.offset, what.nbytes))
            return result

        return call

    def _wrap_fallocate(self, original: Any) -> Any:
        """The same for the one call by ctypes, which returns its errors."""

        def call(fd: int, *rest: Any) -> Any:
            try:
                self._step(describe("fallocate", (fd,)), lambda: None)
            except OSError as error:
                ctypes.set_errno(error.errno or 0)
                return -1
            return original(fd, *rest)

        return call

    def _opened(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or isinstance(args[0], int) or args[0] is None:
            return
        path = str(Path.cwd() / os.fsdecode(args[0]))
        if self._fault.deny and self._fault.deny in path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        if (args[2] & OPEN_TO_WRITE or self._fault.reads) and not path.startswith(("/proc", "/dev")):
            self._step(Call("open", 0, 0, path), lambda: None)

    def _step(self, call: Call, half: Callable[[], object]) -> None:
        fault = self._fault
        with self._lock:
            self._count += 1
            self._trace.write("\t".join(map(str, call)) + "\n")
            self._trace.flush()
            if self._count == fault.kill_at:
                if fault.torn:
                    half()
                if fault.lose_unsynced:
                    self._damage()
                os.kill(os.getpid(), fault.signal)
            if call.name == fault.fail and fault.where in call.target:
                self._matching += 1
                self._fail(call)

    def _fail(self, call: Call) -> None:
        fault = self._fault
        if fault.shorten:
            if self._matching == fault.nth:
                os.truncate(fault.shorten, Path(fault.shorten).stat().st_size // 2)
        elif not fault.error:
            if self._matching == fault.nth:
                os.kill(os.getpid(), fault.signal)
        elif fault.nth <= self._matching < fault.nth + (fault.times or sys.maxsize):
            named = (call.target.split(" -> ")[0],) if call.name in ("open", *NAMING) else ()
            raise OSError(fault.error, os.strerror(fault.error), *named)

    def _damage(self) -> None:
        for path, ranges in self._unsynced.items():
            with suppress(FileNotFoundError), Path(path).open("r+b") as file:
                for offset, nbytes in ranges:
                    self._pwrite(file.fileno(), b"\xa5" * nbytes, offset)


def child(request: dict[str, Any], folder: Path) -> int:
    """One run, in the forked process."""
    fault = Fault(**request["fault"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    sys.argv = [request["program"], *request["arguments"]]
    programs: dict[str, click.Command] = {"merge": merge, "mergekit-lfm": main}
    if fault.sync_bytes:
        writer.SYNC_BYTES = fault.sync_bytes
        if collecting := sys.modules.get("mergekit_lfm.collect.run"):
            vars(collecting)["Pauses"] = partial(collecting.Pauses, every_s=0, saving_share=math.inf)
        job.SMALL = 256  # the larger ones of these models have reads of their own
    with (folder / "calls").open("w") as trace:
        if fault.umask >= 0:
            os.umask(fault.umask)
        Injector(fault, trace).install()
        code: object = 0
        try:
            programs[request["program"]]()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def wait(pid: int, kill_after_s: float, sent: int) -> int:
    """The child's exit code, or minus the signal that ended it; when its time is up it is sent this signal, once."""
    start = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        taken = time.monotonic() - start
        if taken > TIMEOUT_S:
            os.kill(pid, signal.SIGKILL)
        elif kill_after_s and taken > kill_after_s:
            os.kill(pid, sent)
            kill_after_s = 0
        time.sleep(0.001)


def serve(requests: Iterable[str], replies: IO[str]) -> None:
    """Answers each line with the outcome of a forked run."""
    for line in requests:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for stream in ("out", "err", "calls"):  # the child may be killed before it opens them
                (folder / stream).touch()
            pid = os.fork()
            if not pid:
                os._exit(child(request, folder))
            fault = Fault(**request["fault"])
            code = wait(pid, fault.kill_after_s, fault.signal)
            calls = [row.split("\t", 3) for row in (folder / "calls").read_text().splitlines()]
            rows = [(name, int(nbytes), int(offset), target) for name, nbytes, offset, target in calls]
            texts = {kind: (folder / kind).read_text() for kind in ("out", "err")}
            replies.write(json.dumps({"code": code, "calls": rows, **texts}) + "\n")
            replies.flush()


if __name__ == "__main__":
    import click
    import torch

    import mergekit_lfm
    from mergekit_lfm.commands.app import main
    from mergekit_lfm.commands.merge import merge
    from mergekit_lfm.output import writer
    from mergekit_lfm.plan import job

    ours = [found.name for found in pkgutil.walk_packages(mergekit_lfm.__path__, "mergekit_lfm.")]
    for module in [*ours, *OTHERS, *sys.argv[1:]]:  # loaded once, for all children
        if not module.endswith(".__main__") and ".native" not in module:  # the latter need Triton
            importlib.import_module(module)
    torch.set_num_threads(1)
    spare_syncs()
    gc.collect()
    gc.freeze()  # or each child's collector would write to, and so copy, every page of this process
    with os.fdopen(os.dup(1), "w") as answers:
        serve(sys.stdin, answers)
