"""`ray_cluster.yaml` and `rayjob.yaml`: valid for Ray, safe, and large enough for the preset that they are for."""

import shlex
import tomllib
from functools import partial
from pathlib import Path

import pytest
import ray
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from cluster.bundles import REWARD, bundles_of, what_is_missing
from cluster.cli import app
from cluster.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
PRESET = ROOT / "configs" / "qwen3-4b-2x8-gpus.yaml"


def launcher():
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


def job():
    return yaml.safe_load((ROOT / "rayjob.yaml").read_text())["spec"]


def node_types():
    """Of the launcher's file: resources, fewest and most nodes of each type."""
    prepared = prepare_config(launcher())
    validate_config(prepared)
    return prepared["available_node_types"]


def groups():
    """Of the RayJob, in the form of the launcher's node types."""
    return {
        group["groupName"]: {
            "resources": {
                name: int(group["rayStartParams"][parameter])
                for name, parameter in (("CPU", "num-cpus"), ("GPU", "num-gpus"))
                if parameter in group["rayStartParams"]
            },
            "min_workers": group["minReplicas"],
            "max_workers": group["maxReplicas"],
        }
        for group in job()["rayClusterSpec"]["workerGroupSpecs"]
    }


def entrypoint(*more):
    """The settings of the RayJob's command, read by the command line."""
    program, *arguments = shlex.split(job()["entrypoint"].replace("/opt/gream", str(ROOT)))
    assert program == "gream"
    result = CliRunner().invoke(app, [*arguments, *more, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0
    return Settings.model_validate(yaml.safe_load(result.stdout))


def test_the_launchers_file_passes_rays_schema():
    node_types()
    with pytest.raises(ValidationError, match="max_wokers"):
        validate_config(prepare_config({**launcher(), "max_wokers": 3}))


@pytest.mark.parametrize("types", [node_types, groups])
@pytest.mark.parametrize("settings", [lambda: load_settings(PRESET), entrypoint])
def test_the_nodes_hold_the_preset(types, settings):
    wanted = settings()
    train = bundles_of(wanted.cluster, engines=wanted.cluster.rollout_engines, learner_ranks=wanted.train.ranks)
    supervised = bundles_of(wanted.cluster, engines=0, learner_ranks=wanted.sft.ranks)
    nodes = {name: [kind["resources"]] * kind["max_workers"] for name, kind in types().items()}
    for bundles in (train, supervised):
        assert not what_is_missing(bundles, [node for kind in nodes.values() for node in kind])
    assert "16 GPUs together, and there are 8" in what_is_missing(train, nodes["learner"] + nodes["reward"])


def test_the_autoscaler_starts_the_nodes_of_the_job():
    config, settings = launcher(), entrypoint()
    cluster = settings.cluster
    bundles = bundles_of(
        cluster, engines=cluster.rollout_engines, learner_ranks=settings.train.ranks,
        reward_workers=cluster.reward_workers,
    )  # fmt: skip
    assert REWARD in [bundle.processes[0].kind for bundle in bundles]
    started, unmet = get_nodes_for(
        node_types(), {config["head_node_type"]: 1}, config["head_node_type"], config["max_workers"],
        [bundle.resources for bundle in bundles],
        partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({})),
    )  # fmt: skip
    assert not unmet
    assert sum(count for name, count in started.items() if name in ("learner", "rollout")) == 2
    assert started["reward"] == 1, "the GPU nodes' CPUs are the bundles'"
    assert settings.cluster.wait_for_nodes_seconds > 600, "nodes take minutes"


def test_nodes_get_the_whole_project_and_the_pins():
    config = launcher()
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    mounted = {local for local in config["file_mounts"].values() if not local.startswith("~")}
    assert mounted >= {*project["tool"]["setuptools"]["packages"], "pyproject.toml", "requirements"}
    assert mounted >= {project["project"]["readme"], *project["project"]["license-files"]}
    assert [local for local in mounted if not (ROOT / local).exists()] == []
    assert any("requirements/cpu.lock" in command for command in config["setup_commands"])


def test_clusters_want_a_token_and_show_their_dashboard_to_the_head_alone():
    config = launcher()
    *_, head = config["head_start_ray_commands"]
    *_, worker = config["worker_start_ray_commands"]
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert any(remote == "~/.ray/auth_token" for remote in config["file_mounts"])
    assert job()["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert job()["rayClusterSpec"]["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_a_stopped_job_has_time_for_its_step_and_its_state():
    needed = entrypoint().cluster.stop_seconds
    *_, start = launcher()["head_start_ray_commands"]
    (container,) = job()["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    for seconds in (
        dict(word.split("=", 1) for word in start.split() if word.startswith("RAY_JOB"))["RAY_JOB_STOP_WAIT_TIME_S"],
        environment["RAY_JOB_STOP_WAIT_TIME_S"],
    ):
        assert int(seconds) >= 2 * needed


def test_the_rayjob_is_the_launchers_cluster():
    manifest = yaml.safe_load((ROOT / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    cluster = manifest["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"] is True
    kept = ("resources", "min_workers", "max_workers")
    types = {name: {key: kind[key] for key in kept} for name, kind in node_types().items()}
    assert types.pop("head")["resources"] == {"CPU": int(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"])}
    assert groups() == types
    for group in cluster["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        limits, offered = container["resources"]["limits"], groups()[group["groupName"]]["resources"]
        assert int(limits.get("nvidia.com/gpu", 0)) == offered.get("GPU", 0)
        assert int(limits["cpu"]) >= offered["CPU"]


def test_the_entrypoint_keeps_everything_on_the_shared_volume():
    settings = entrypoint()
    (mount,) = job()["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMounts"]
    paths = [settings.run_folder, settings.data.items, settings.data.interactions, settings.model.checkpoint]
    assert [path for path in paths if not str(path).startswith(mount["mountPath"] + "/")] == []
