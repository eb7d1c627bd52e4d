"""`serve deploy` on a Ray cluster of two nodes: load brings a replica, versions come and go back, a node is lost."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from served import PATIENCE, change_weights, lists_by_version, load
from train_runs import ROOT, command_of

from benchmarks.local_nodes import LocalNodes
from benchmarks.serving_subjects import free_port

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
BODY = {"user_id": 1, "seed": 3, "chains": 1}


class Deployed:
    """The application of ray_serve.yaml with a small run, deployed by Serve's own command."""

    def __init__(self, folder):
        self.folder, self.nodes = folder, LocalNodes([2, 2], namespaces=False, dashboard=True)
        self.port = free_port()
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers={"Authorization": "Bearer deployed"}, timeout=PATIENCE
        )

    def deploy(self, run):
        file = yaml.safe_load((ROOT / "ray_serve.yaml").read_text())
        file["http_options"]["port"] = self.port
        file["proxy_location"] = "HeadOnly"  # both nodes have one loopback interface
        replicas = ("api.minimum=2", "direct.minimum=2", "reasoning.maximum=2")
        file["applications"][0]["args"] = {
            "run": str(run),
            "overrides": [
                "serving.checkpoint=sft", "serving.key_variable=GREAM_KEYS", "serving.reasoning.ongoing_requests=2",
                *(f"serving.{one}" for one in replicas),
            ],
        }  # fmt: skip
        (self.folder / "serve.yaml").write_text(yaml.safe_dump(file))
        command = [Path(sys.executable).with_name("serve"), "deploy", self.folder / "serve.yaml", "-a", self.nodes.jobs]
        subprocess.run(
            self.nodes.command(*command), env=self.nodes.environment, check=True, cwd=self.folder, timeout=PATIENCE
        )

    def wait_for(self, condition):
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, "waited too long"
            time.sleep(0.5)

    def versions(self):
        """Of both modes; None while the service does not answer."""
        try:
            answer = self.client.get("/readyz")
        except httpx.TransportError:
            return None
        return answer.json() if answer.status_code == 200 else None

    def is_rolled_out(self):
        """Whether all replicas are there and of the version that was deployed last, by what `serve status` asks."""
        token = self.nodes.environment["RAY_AUTH_TOKEN"]
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.get(f"{self.nodes.jobs}/api/serve/applications/", headers=headers, timeout=PATIENCE)
        return answer.json()["applications"]["gream"]["status"] == "RUNNING"

    def replicas(self, name):
        """Processes of a deployment's replicas, by the number of their node."""
        return [
            (number, process)
            for number, node in self.nodes.nodes
            for process in psutil.Process(node.pid).children(recursive=True)
            if f"ServeReplica:gream:{name}" in command_of(process)
        ]


@pytest.fixture(scope="module")
def runs(supervised, tmp_path_factory):
    """Two run folders whose checkpoints differ."""
    folder = tmp_path_factory.mktemp("versions")
    for name in ("first", "second"):
        shutil.copytree(supervised[0], folder / name)
    change_weights(folder / "second" / "sft" / "checkpoint")
    return folder / "first", folder / "second"


@pytest.fixture(scope="module")
def deployed(runs, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GREAM_KEYS", "deployed")  # of the nodes, which the replicas read
        deployed = Deployed(tmp_path_factory.mktemp("deployed"))
    try:
        deployed.deploy(runs[0])
        deployed.wait_for(lambda: deployed.versions() and deployed.is_rolled_out())
        yield deployed
    finally:
        deployed.nodes.close()


def test_both_modes_answer_those_who_have_a_key(deployed):
    for mode in ("direct", "reasoning"):
        answer = deployed.client.post("/v1/recommend", json={**BODY, "mode": mode})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["items"]) == 10
    assert httpx.post(f"{deployed.client.base_url}/v1/recommend", json=BODY).status_code == 401


def test_load_brings_another_replica(deployed):
    assert len(deployed.replicas("ReasoningRecommender")) == 1
    with load(deployed.client, clients=8, **BODY | {"mode": "reasoning", "chains": 16}) as answers:
        deployed.wait_for(lambda: len(deployed.replicas("ReasoningRecommender")) == 2)
    assert {answer.status_code for answer in answers} == {200}


def test_a_version_comes_and_goes_back_without_a_failed_request(deployed, runs):
    first = deployed.versions()
    with load(deployed.client, clients=1, **BODY) as answers:
        deployed.deploy(runs[1])
        deployed.wait_for(lambda: (deployed.versions() or first)["direct"] != first["direct"])
        deployed.wait_for(deployed.is_rolled_out)
        second = deployed.versions()
        assert second["direct"] == second["reasoning"] != first["reasoning"]
        deployed.deploy(runs[0])
        deployed.wait_for(lambda: (deployed.versions() or second)["direct"] == first["direct"])
        deployed.wait_for(deployed.is_rolled_out)
        assert deployed.versions() == first
    assert {answer.status_code for answer in answers} == {200}
    lists = lists_by_version(answers)
    assert len(lists) == 2
    assert all(len(different) == 1 for different in lists.values())


def test_what_a_lost_node_had_is_answered_by_the_other(deployed):
    assert 1 in {node for node, _ in deployed.replicas("")}, "Serve has put no replica on the node that is lost"
    before = deployed.client.post("/v1/recommend", json=BODY)
    with load(deployed.client, **BODY) as answers:
        deployed.wait_for(lambda: len(answers) > 3)
        deployed.nodes.lose(1)
        lost = len(answers)
        deployed.wait_for(lambda: sum(answer.status_code == 200 for answer in answers[lost:]) > 20)
    # 500: an interface's replica on that node had the request under way.
    assert {answer.status_code for answer in answers} <= {200, 429, 500, 503}
    assert lists_by_version(one for one in answers if one.status_code == 200) == lists_by_version([before])
    reasoning = {**BODY, "mode": "reasoning"}
    deployed.wait_for(lambda: deployed.client.post("/v1/recommend", json=reasoning).status_code == 200)
