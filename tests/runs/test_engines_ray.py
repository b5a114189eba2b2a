"""What a task asks Ray for: the resources that the user names, those of the cluster, and nothing that no node has."""

from __future__ import annotations

import contextvars
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import pytest
from support.running import duel

from toolkit.errors import RecipeError
from toolkit.models.remote_code import remote_code, remote_code_allowed
from toolkit.progress import Reporter
from toolkit.runs.engines import RayEngine, Task, TaskResources, engine_of, task_resources

GIB = 1 << 30
CPU_NODE = {"CPU": 8.0, "memory": 30.0 * GIB}
GPU_NODE = {"CPU": 16.0, "GPU": 4.0, "memory": 100.0 * GIB}


@pytest.mark.parametrize(
    ("resources", "nodes", "options"),
    [
        (TaskResources(), [CPU_NODE], {"num_cpus": 2, "num_gpus": 0}),
        (TaskResources(), [{"CPU": 1.0}], {"num_cpus": 1, "num_gpus": 0}),
        (TaskResources(), [CPU_NODE, GPU_NODE], {"num_cpus": 1, "num_gpus": 1}),
        (TaskResources(cpus=4), [GPU_NODE], {"num_cpus": 4, "num_gpus": 1}),
        (TaskResources(gpus=0), [CPU_NODE, GPU_NODE], {"num_cpus": 2, "num_gpus": 0}),
        (TaskResources(gpus=0.5), [GPU_NODE], {"num_cpus": 1, "num_gpus": 0.5}),
        (TaskResources(cpus=3, gpus=2, memory_gib=20), [GPU_NODE], {"num_cpus": 3, "num_gpus": 2, "memory": 20 * GIB}),
    ],
)
def test_what_a_task_asks_for(resources: TaskResources, nodes: list[dict[str, float]], options: dict[str, Any]) -> None:
    assert resources.of_ray(nodes) == options


@pytest.mark.parametrize(
    ("resources", "what"),
    [
        (TaskResources(cpus=17), "no node of the Ray cluster has 17 CPUs"),
        (TaskResources(gpus=1, memory_gib=101), "and 101 GiB"),
        (TaskResources(gpus=5), "5 GPUs"),
        (TaskResources(cpus=12, gpus=0, memory_gib=101), "12 CPUs, 0 GPUs"),
        (TaskResources(gpus=1.5), "neither whole ones nor a share"),
    ],
)
def test_what_no_node_has_is_refused_and_not_waited_for(resources: TaskResources, what: str) -> None:
    """One node has to have all of it."""
    with pytest.raises(RecipeError, match=what) as caught:
        resources.of_ray([CPU_NODE, GPU_NODE])
    assert caught.value.fix


def test_resources_have_names_and_belong_to_ray() -> None:
    assert task_resources({"gpus": 1, "memory_gib": 16}) == TaskResources(None, 1, 16)
    with pytest.raises(RecipeError, match="no resource 'gpu'") as caught:
        task_resources({"gpu": 1})
    assert "gpus" in caught.value.fix
    with pytest.raises(RecipeError, match="-1"):
        task_resources({"cpus": -1})
    for command in ("sweep", "study"):
        recipe = "smoke" if command == "sweep" else "study-tiny"
        assert "--engine ray" in duel(command, recipe, "--ray-cpus", "1", check=2).stderr
    done = duel("study", "--table", "table.parquet", "--ray-memory", "4", check=2)
    assert "--ray-memory is for a RECIPE" in done.stderr


def assigned(reporter: Reporter) -> dict[str, float]:
    """What Ray set aside for the task that calls this."""
    import ray

    return dict(ray.get_runtime_context().get_assigned_resources())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_sets_aside_what_a_task_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("a task", assigned, ())
    with engine_of("ray", resources=TaskResources(cpus=1, memory_gib=0.25)) as engine:
        [outcome] = engine.run("ask", [task], Reporter(quiet=True))
    assert outcome.value == {"CPU": 1.0, "memory": 0.25 * GIB}
    with pytest.raises(RecipeError, match="no node"), engine_of("ray", resources=TaskResources(cpus=10_000)):
        pass


class OneWorker:
    """As much of Ray as the engine uses: each task runs where nothing is set that the caller has set."""

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": CPU_NODE}]

    def remote(self, function: Callable[..., Any]) -> Any:
        start = types.SimpleNamespace(remote=lambda *arguments: contextvars.Context().run(function, *arguments))
        return types.SimpleNamespace(options=lambda **_: start)

    def wait(self, running: list[Any]) -> tuple[list[Any], list[Any]]:
        return running[:1], running[1:]

    def get(self, done: Any) -> Any:
        return done


def allowed_there(reporter: Reporter) -> bool:
    return remote_code_allowed()


@pytest.mark.parametrize("allowed", [True, False])
def test_a_worker_runs_the_code_of_models_where_the_study_may(allowed: bool) -> None:
    engine = RayEngine(OneWorker(), TaskResources())
    with remote_code(allowed):
        [outcome] = engine.run("here", [Task("one", allowed_there, ())], Reporter(quiet=True))
    assert outcome.value is allowed and not outcome.died
