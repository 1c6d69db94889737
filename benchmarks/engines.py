"""One merge by threads, by Ray, and by parts, each a run of its own, beside copying the same bytes.

    python benchmarks/engines.py                # three models of 2.2 GB: 14 GB of disk, ten minutes
    python benchmarks/engines.py --size 0.01    # a smoke test

Makes the checkpoints of merge_vs_copy.py. Its floor, in the same run, reads the inputs, discards them, and copies as
many bytes as the output, with as many threads and an fsync. `ray` is a cluster of this machine, started for the run
and stopped after it; `parts` are as many runs of one thread at a time. Numbers are medians; `ratio` is (run - start-up)
/ floor, where start-up is the same run on one tiny tensor. `through Ray` is what is pickled for it: the plan for each
process, the tasks, and their results; `tasks` the number of these, in the same work and in 10,000 others, which merge
nothing, and their time.
"""

from __future__ import annotations

import argparse
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from merge_vs_copy import floor, heading, inputs, make_checkpoints, make_tiny, prepare, write_recipes

from mergekit_lfm import plan_merge
from mergekit_lfm.api.engines import find_engine
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.engine.sites import Engine, Site
from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Worker
from mergekit_lfm.machine.resources import default_threads
from mergekit_lfm.machine.sizes import format_size
from mergekit_lfm.plan.plan import Plan

ENGINES = ("threads", "ray", "parts")
METHODS = ("linear", "ties")


def run(folder: Path, method: str, engine: str, threads: int) -> float:
    """Seconds of a merge, of all its processes."""
    command = [sys.executable, "-m", "mergekit_lfm", "merge", f"{method}.yaml", "out", "--quiet", "--compile", "never"]
    options = [["--threads", str(threads)]]
    if engine == "ray":
        options = [["--engine", "ray", "--ray-address", "local", "--threads", str(threads)]]
    if engine == "parts":
        options = [["--threads", "1", "--partition", f"{i + 1}/{threads}"] for i in range(threads)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    prepare(folder, method)
    started = time.monotonic()
    runs = [
        subprocess.Popen([*command, *each], cwd=folder, env=environment, stdout=subprocess.DEVNULL) for each in options
    ]
    if [code for each in runs if (code := each.wait())]:
        raise SystemExit(f"{method} by {engine} has failed")
    return time.monotonic() - started


class Counted:
    """An engine, and the bytes that it pickles: of the worker, the largest task, all tasks, and their results."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.worker, self.tasks, self.results = engine, 0, list[int](), 0

    @contextmanager
    def __call__(self, plan: Plan) -> Iterator[Site]:
        with self.engine(plan) as site:

            @contextmanager
            def pool(worker: Worker, count: int) -> Iterator[Executor]:
                self.worker = len(pickle.dumps(worker))
                with site.pool(worker, count) as executor:

                    def counted(tasks: Iterable[Task]) -> Iterator[Result]:
                        tasks = [*tasks]
                        self.tasks += [len(pickle.dumps(task)) for task in tasks]
                        for result in executor(tasks):
                            self.results += len(pickle.dumps(result))
                            yield result

                    yield counted

            yield replace(site, pool=pool)


def traffic(folder: Path, method: str, threads: int) -> str:
    """The bytes that go through Ray, for each merged GB, in words."""
    prepare(folder, method)
    plan = plan_merge(folder / f"{method}.yaml", folder / "out").result.plan
    counted = Counted(find_engine("threads", None))
    execute(plan, folder / "out", threads=threads, engine=counted, compile="never")
    nbytes = counted.worker * threads + sum(counted.tasks) + counted.results
    each = nbytes / (plan.bytes_written / 1e9)
    return (
        f"{method}: {format_size(nbytes)} through Ray, {format_size(int(each))} for each merged GB: the plan "
        f"{format_size(counted.worker)}, {len(counted.tasks)} tasks of at most {max(counted.tasks)} bytes"
    )


def overhead(threads: int) -> str:
    """The time of 10,000 tasks that do nothing, in words."""
    from mergekit_lfm.engine import ray as engine_ray
    from mergekit_lfm.engine.ray_cluster import connected, import_ray

    ray = import_ray()
    with connected(ray, None):
        idle = ray.remote(_nothing)
        ray.get([idle.remote([]) for _ in range(threads)])
        calls = [*engine_ray._together([None] * 10_000, threads)]  # type: ignore[list-item]
        started = time.monotonic()
        ray.get([idle.remote(call.tasks) for call in calls])
        return f"10,000 tasks that do nothing, in {len(calls)} calls: {time.monotonic() - started:.1f} s"


def _nothing(tasks: Sequence[object]) -> list[object]:
    return [*tasks]


def main() -> None:
    """Make missing checkpoints, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="part of 1.1 billion parameters [default: 1]")
    parser.add_argument("--threads", type=int, default=default_threads(), help="[default: the cores]")
    parser.add_argument("--repeats", type=int, default=3, help="[default: 3]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="engines_") as temporary:
        folder, tiny = Path(temporary) / "models", Path(temporary) / "tiny"
        make_checkpoints(folder, options.size)
        make_tiny(tiny)
        for each in (folder, tiny):
            write_recipes(each)
        print(heading(folder, options.threads, options.repeats, ["--compile never"]) + "\n")
        print("| method | engine | inputs | run s | start-up s | floor s | ratio |\n|---|---|--:|--:|--:|--:|--:|")
        for method in METHODS:
            floors = list[float]()
            runs, starts = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
            for _ in range(options.repeats):
                prepare(folder, method)
                floors.append(floor(folder, method, options.threads))
                for engine in ENGINES:
                    runs[engine].append(run(folder, method, engine, options.threads))
                    starts[engine].append(run(tiny, method, engine, options.threads))
            least = statistics.median(floors)
            for engine in ENGINES:
                seconds, start = statistics.median(runs[engine]), statistics.median(starts[engine])
                cells = f"{seconds:.2f} | {start:.2f} | {least:.2f} | {(seconds - start) / least:.2f}"
                print(f"| {method} | {engine} | {len(inputs(method))} | {cells} |", flush=True)
        print()
        for method in METHODS:
            print(traffic(folder, method, options.threads))
        print(overhead(options.threads))


if __name__ == "__main__":
    main()
