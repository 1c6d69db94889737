"""Settings of every test: one thread, no network, no terminal colours, a cache of its own, Triton's interpreter.

The workers of a run share one cache and the results that take long to make: the first that asks for one makes it.
"""

import atexit
import os
import shutil
import signal
import sys
import tempfile

# Set before torch is imported, and inherited by the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of hundreds of processes would compile the package anew
sys.dont_write_bytecode = False  # nor does pytest rewrite all tests for every worker of every run
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the cache of the process that started it
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] + "/inductor"
    os.environ["TRITON_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] + "/triton"
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A shell ignores Ctrl-C in what it starts in the background, nohup a hang-up; children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the processor, slowly; Triton reads this on import

import fcntl  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from helpers_faults import Forks, spare_syncs, warm_interpreter  # noqa: E402
from helpers_hub import hub, xet_hub  # noqa: E402, F401  # fixtures of several modules
from helpers_lora import trio  # noqa: E402, F401
from helpers_s3 import s3, s3_server  # noqa: E402, F401

spare_syncs()

# Modules that take long, with about the seconds of their slow tests: a worker would end with one of them, alone.
LONG = {
    "test_fused": 200,
    "test_llamas": 120,
    "test_edit_fixture": 120,
    "test_published": 110,
    "test_kill_resume": 90,
    "test_adapters": 90,
    "test_faults": 60,
    "test_digits": 50,
    "test_benchmarks": 40,
    "test_kills": 40,
    "test_collect_runs": 30,
    "test_merge_statistics": 20,
    "test_fuzz": 20,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long modules, spread over the workers: each starts with an equal share of the list."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    hands, seconds = [list[pytest.Item]() for _ in range(workers)], [0] * workers
    for module in sorted(LONG, key=lambda name: -LONG[name]):
        least = seconds.index(min(seconds))
        hands[least] += [item for item in items if item.path.stem == module]
        seconds[least] += LONG[module]
    rest = [item for item in items if item.path.stem not in LONG]
    share = len(items) // workers
    for hand in hands[:-1]:
        missing = max(0, share - len(hand))
        hand += rest[:missing]
        del rest[:missing]
    items[:] = [item for hand in (*hands, rest) for item in hand]


@pytest.fixture(scope="session")
def cli() -> Iterator[Forks]:
    """`merge` in forks of an interpreter that has everything loaded."""
    with warm_interpreter() as forks:
        yield forks


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make(folder)` fills in one worker, for the others to read."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        folder, making = root / f"made-{name}", root / f"making-{name}"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(making, ignore_errors=True)
                making.mkdir()
                make(making)
                making.rename(folder)
        return folder

    return folder_of
