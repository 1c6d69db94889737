"""A merge on a Ray cluster gives the bytes of threads, whatever dies meanwhile; a cluster that could not is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers_faults import llama_tensors, near, save_model
from helpers_methods import Case, plan_of
from helpers_stacks import place, source, stack
from models import output_of
from safetensors.torch import save_file

from mergekit_lfm import merge
from mergekit_lfm.api.contract import least_memory
from mergekit_lfm.api.engines import find_engine
from mergekit_lfm.engine import ray as engine_ray
from mergekit_lfm.engine.execute import execute
from mergekit_lfm.engine.nodes import Node, look_at_node, refuse_unlike, refuse_versions
from mergekit_lfm.engine.ray_cluster import OBJECTS, OURS
from mergekit_lfm.engine.sites import Engine, Site
from mergekit_lfm.engine.tasks import Executor, Result, Task
from mergekit_lfm.engine.worker import Options, Worker
from mergekit_lfm.errors import FormatError, PlanError
from mergekit_lfm.machine.accelerators import HOST
from mergekit_lfm.plan.make import make_plan
from mergekit_lfm.plan.plan import Plan
from mergekit_lfm.recipe.recipe import Recipe

LAYERS = 3
KILLS = 20 if "LONG_TESTS" in os.environ else 5  # of processes, and of the command
LOST_NODES = 5 if "LONG_TESTS" in os.environ else 2
METHODS: list[Case] = [
    ("linear", {}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "scope": "global"}),
    ("dare_linear", {"density": 0.4}),
    ("slerp", {}),
    ("regmean", {}),
]


class TwoNodes:
    """Ray with two nodes on this machine, each of one core."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._how: dict[str, Any] = {"num_cpus": 1, "object_store_memory": OBJECTS}
        head = {**self._how, "include_dashboard": False}
        self.cluster: Any = Cluster(initialize_head=True, connect=False, head_node_args=head)
        self.second = self.cluster.add_node(**self._how)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def lose_second(self) -> None:
        """Kill the processes of the second node."""
        self.cluster.remove_node(self.second, allow_graceful=False)

    def replace_second(self) -> None:
        """Start another second node."""
        self.second = self.cluster.add_node(**self._how)


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    """A cluster with which this process is connected."""
    ray: Any = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OURS, "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        two = TwoNodes()
        ray.init(address=two.address, log_to_driver=False, logging_level="ERROR")
        yield two
        ray.shutdown()
        two.cluster.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of three layers, and an adapter of the first."""
    folder = tmp_path_factory.mktemp("models")
    base = {name: x.bfloat16() for name, x in llama_tensors(0, layers=LAYERS).items()}
    for name, tensors in {"o": base, "a": near(base, 1)}.items():
        save_model(folder / name, tensors, shards=2)
    weight = base["model.layers.1.self_attn.q_proj.weight"]
    adapter, name = folder / "lora", "base_model.model.model.layers.1.self_attn.q_proj"
    adapter.mkdir()
    draw = torch.Generator().manual_seed(0)
    pair = {f"{name}.lora_A.weight": torch.randn(2, weight.shape[1], generator=draw)}
    save_file(
        pair | {f"{name}.lora_B.weight": torch.randn(weight.shape[0], 2, generator=draw)},
        adapter / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "o",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return folder


def other_plans(folder: Path) -> list[Plan]:
    """A model with an adapter in a merge, and layers that are stacked."""
    adapted = {"model": f"{folder / 'o'}+{folder / 'lora'}", "parameters": {"weight": 0.4}}
    linear = {
        "merge_method": "linear",
        "models": [adapted, {"model": str(folder / "a"), "parameters": {"weight": 0.6}}],
    }
    stacked = place(stack([source("o", 0, 2)], [source("a", 1, 3)]), folder)
    return [make_plan(Recipe.parse(recipe), block=1 << 10) for recipe in (linear, stacked)]


class Counted:
    """The engine, which notes the bytes of each task and of what comes back."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.tasks, self.results = engine, list[int](), list[int]()

    @contextmanager
    def __call__(self, plan: Plan) -> Iterator[Site]:
        with self.engine(plan) as site:

            @contextmanager
            def pool(worker: Worker, count: int) -> Iterator[Executor]:
                with site.pool(worker, count) as executor:

                    def counted(tasks: Iterable[Task]) -> Iterator[Result]:
                        tasks = [*tasks]
                        self.tasks += [len(pickle.dumps(task)) for task in tasks]
                        for result in executor(tasks):
                            self.results.append(len(pickle.dumps(result)))
                            yield result

                    yield counted

            yield replace(site, pool=pool)


def test_a_merge_on_two_nodes_has_the_bytes_of_threads(nodes: TwoNodes, folder: Path, tmp_path: Path) -> None:
    plans = other_plans(folder)
    for number, case in enumerate(METHODS):
        (tmp_path / str(number)).mkdir()
        plans.append(plan_of(case, tmp_path / str(number)))
    engine = Counted(find_engine("ray", nodes.address))
    for number, plan in enumerate(plans):
        memory = 2 * least_memory(plan)
        execute(plan, tmp_path / f"threads-{number}", memory=memory, threads=2)
        execute(plan, tmp_path / f"ray-{number}", memory=memory, threads=1, engine=engine)
        assert output_of(tmp_path / f"ray-{number}") == output_of(tmp_path / f"threads-{number}")
    assert len(engine.tasks) > 60 and max(engine.tasks) < 1000


def test_an_error_on_a_node_ends_the_merge(nodes: TwoNodes, tmp_path: Path) -> None:
    recipe = plan_of(METHODS[0], tmp_path).recipe
    model = tmp_path / "m1" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-2] + b"\xc0\x7f")  # NaN in bfloat16
    plan = make_plan(recipe, block=256)
    with pytest.raises(FormatError, match="of m1 holds NaN or infinity"):
        execute(plan, tmp_path / "out", engine=find_engine("ray", nodes.address))
    assert not (tmp_path / "out").exists()


def test_a_budget_that_no_node_has_is_refused(nodes: TwoNodes, tmp_path: Path) -> None:
    plan = plan_of(METHODS[0], tmp_path)
    with pytest.raises(PlanError, match=r"a node of the cluster has .* for tasks"):
        execute(plan, tmp_path / "out", memory=1 << 50, engine=find_engine("ray", nodes.address))
    assert not (tmp_path / "out").exists()


def test_another_cluster_than_the_program_s_is_refused(nodes: TwoNodes, tmp_path: Path) -> None:
    plan = plan_of(METHODS[0], tmp_path)
    with pytest.raises(PlanError, match=f"connected to the Ray cluster {nodes.address}"):
        execute(plan, tmp_path / "out", engine=find_engine("ray", "127.0.0.1:1"))


def test_addresses_that_name_no_cluster(folder: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": str(folder / "o"), "parameters": {"weight": 1.0}}]}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"engine": "ray"}, "no address"),
        ({"engine": "ray", "ray_address": "auto"}, "anyone's cluster"),
        ({"ray_address": "local"}, "give --engine ray"),
        ({"engine": "rays"}, "did you mean ray"),
    ]
    for options, message in cases:
        with pytest.raises(PlanError, match=message):
            merge(recipe, tmp_path / "out", **options)


def test_an_address_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(METHODS[0], tmp_path)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for address, message in (("127.0.0.1:1", "ConnectionRefusedError"), ("head", "no host, or no port")):
        with pytest.raises(PlanError, match=f"no Ray cluster answers at {address}: .*{message}"):
            execute(plan, tmp_path / "out", engine=find_engine("ray", address))
    assert not (tmp_path / "out.partial").exists()


def test_without_the_extra_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(METHODS[0], tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlanError, match=r'pip install "mergekit_lfm\[ray\]"'):
        execute(plan, tmp_path / "out", engine=find_engine("ray", "127.0.0.1:1"))


def test_a_merge_by_threads_does_not_import_ray(folder: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": str(folder / "o"), "parameters": {"weight": 1.0}}]}
    program = (
        f"import sys; from mergekit_lfm import merge; merge({recipe!r}, {str(tmp_path / 'out')!r}, compile='never')"
    )
    program += "; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_nodes_that_differ_are_refused(tmp_path: Path) -> None:
    here = {"mergekit_lfm": "1.2", "torch": "2.13.0"}
    refuse_versions(here, [("one", here)])
    with pytest.raises(PlanError, match=r"node two has torch 2\.12\.0, this machine 2\.13\.0"):
        refuse_versions(here, [("one", here), ("two", {**here, "torch": "2.12.0"})])
    with pytest.raises(PlanError, match=r"node two has mergekit_lfm none, this machine 1\.2"):
        refuse_versions(here, [("two", {"torch": "2.13.0"})])
    for name in ("linear", "slerp"):
        (tmp_path / name).mkdir()
    linear, slerp = (plan_of((name, {}), tmp_path / name) for name in ("linear", "slerp"))
    unlike = [Node("one", 1, "AVX2", ()), Node("two", 1, "AVX512", ())]
    refuse_unlike(unlike, linear)
    with pytest.raises(PlanError, match="one has AVX2, two has AVX512; set ATEN_CPU_CAPABILITY"):
        refuse_unlike(unlike, slerp)
    seen = look_at_node(tmp_path, linear.inputs)
    refuse_unlike([seen], linear)
    (tmp_path / "linear" / "m1" / "model.safetensors").unlink()
    with pytest.raises(PlanError, match=rf"node {seen.name} does not see .*m1/model\.safetensors"):
        refuse_unlike([look_at_node(tmp_path, linear.inputs)], linear)
    with pytest.raises(PlanError, match="run the command from a folder that all nodes share"):
        look_at_node(tmp_path / "nowhere", ())


class PretendedRay:
    """Ray that ends calls in an order that a test gives; None is a minute in which no call ends."""

    exceptions = SimpleNamespace(RayTaskError=KeyError, RayError=OSError)

    def __init__(self, order: Sequence[int | None]) -> None:
        self.order, self.calls, self.cancelled, self.now = [*order], list[Any](), list[int](), 0.0

    def monotonic(self) -> float:
        return self.now

    def remote(self, _: object) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._call))

    def _call(self, _: object, tasks: Sequence[Any], *, sync: bool) -> int:
        assert sync
        self.calls.append(tasks)
        return len(self.calls)  # its number, from 1

    def put(self, _: object) -> None:
        pass

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def wait(self, flying: list[int], timeout: float) -> tuple[list[int], list[int]]:
        number = self.order.pop(0)
        assert timeout > 0 and (number is None or number in flying)
        self.now += 60 if number is None else 0
        return ([] if number is None else [number]), flying

    def get(self, number: int) -> list[Any]:
        return [*self.calls[number - 1]]

    def cancel(self, number: int, *, force: bool) -> None:
        assert force
        self.cancelled.append(number)


def test_a_task_that_takes_long_is_also_given_to_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(METHODS[0], tmp_path)
    options = Options.of(HOST, 1 << 20, 2, "error", "never")
    for order, cancelled in (([1, 2, 3, None, 5], [4]), ([1, 2, 3, None, 4], [5])):
        ray = PretendedRay(order)
        pool = engine_ray._Pool(ray, 2, 1 << 30, sync=True)
        monkeypatch.setattr("mergekit_lfm.engine.ray.time", SimpleNamespace(monotonic=ray.monotonic))
        with Worker(plan, None, options) as worker, pool(worker, 2) as executor:
            tasks: list[Any] = [1, 2, 3, 4]
            assert sorted(cast("Any", executor(tasks))) == tasks  # the fourth goes out again, as the fifth call
        assert (len(ray.calls), ray.cancelled, ray.order) == (5, cancelled, [])


def processes_of_ray() -> list[int]:
    """The processes that do tasks of Ray on this machine."""
    found = list[int]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().startswith(b"ray::_do"):
                found.append(int(path.parent.name))
    return found


def parent_of(pid: int) -> int | None:
    """The process that started a process of Ray, one for each node; None if it has ended."""
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return None


@contextmanager
def beside(action: Callable[[random.Random], None], draw: random.Random, pause_s: float) -> Iterator[None]:
    """Do something again and again, after pauses at random, while the block runs."""
    over = threading.Event()

    def act() -> None:
        while not over.wait(draw.uniform(0, pause_s)):
            action(draw)

    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("case", [METHODS[2], METHODS[5]], ids=["ties", "regmean"])
def test_processes_killed_at_random_moments_change_nothing(case: Case, nodes: TwoNodes, tmp_path: Path) -> None:
    plan, killed, nodes_at_work = plan_of(case, tmp_path), list[int](), set[int]()
    execute(plan, tmp_path / "threads", threads=2)

    def kill(draw: random.Random) -> None:
        if found := processes_of_ray():
            nodes_at_work.update(parent for each in found if (parent := parent_of(each)))
            with suppress(ProcessLookupError):
                os.kill(draw.choice(found), signal.SIGKILL)
                killed.append(1)

    number = 0
    while len(killed) < KILLS:
        with beside(kill, random.Random(number), 0.5):
            execute(plan, tmp_path / f"out-{number}", memory=2 * least_memory(plan), engine=ray_of(nodes))
        assert output_of(tmp_path / f"out-{number}") == output_of(tmp_path / "threads")
        number += 1
        assert number < 200
    assert len(nodes_at_work) == 2


def ray_of(nodes: TwoNodes) -> Engine:
    """The engine on the two nodes."""
    return find_engine("ray", nodes.address)


@pytest.mark.slow
def test_a_lost_node_changes_nothing(nodes: TwoNodes, tmp_path: Path) -> None:
    plan = plan_of(METHODS[2], tmp_path)
    execute(plan, tmp_path / "threads", threads=2)
    for number in range(LOST_NODES):
        lose = threading.Timer(random.Random(number).uniform(0, 2), nodes.lose_second)
        lose.start()
        execute(plan, tmp_path / f"out-{number}", memory=2 * least_memory(plan), engine=ray_of(nodes))
        lose.join()
        nodes.replace_second()
        assert output_of(tmp_path / f"out-{number}") == output_of(tmp_path / "threads")


@pytest.mark.slow
def test_a_killed_driver_goes_on(nodes: TwoNodes, folder: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "ties",
        "base_model": str(folder / "o"),
        "models": [{"model": str(folder / "a")}],
        "parameters": {"weight": 0.5, "density": 0.3, "scope": "global"},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    merge(tmp_path / "recipe.yaml", tmp_path / "threads" / "out", threads=2)
    expected = output_of(tmp_path / "threads" / "out")
    command = [sys.executable, "-m", "mergekit_lfm.commands", "merge", str(tmp_path / "recipe.yaml")]
    command += [str(tmp_path / "ray" / "out"), "--engine", "ray", "--ray-address", nodes.address]
    draw, killed = random.Random(0), 0
    while killed < KILLS:
        started = subprocess.Popen(command)
        time.sleep(draw.uniform(2, 8))
        if started.poll() is not None:
            assert started.returncode == 0
            assert output_of(tmp_path / "ray" / "out") == expected
            (tmp_path / "ray" / "out").rename(tmp_path / f"done-{killed}-{time.monotonic_ns()}")
            continue
        started.kill()
        started.wait()
        killed += 1
    assert subprocess.run(command, check=False).returncode == 0
    assert output_of(tmp_path / "ray" / "out") == expected
