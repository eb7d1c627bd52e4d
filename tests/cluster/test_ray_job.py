"""Jobs submitted to a cluster that was started by `ray start`, as docs/cluster.md tells it."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from small_tables import write_tables
from train_runs import TrainRun, command_of

from item_index.semantic_ids import SemanticIdIndex

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 300
# What a checkout holds beside the project, each with a file that must not travel.
STAY_HERE = ["runs", "data", "models", ".venv", ".git"]
# What the train stage runs as a job: the command itself, what sends its journal, its actors.
TRAINING = ["gream train", "cluster.journal_sender", "ray::RolloutEngine", "ray::LearnerRank", "ray::RewardWorker"]


def wait_until(condition, failure):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, failure()
        time.sleep(0.2)


def free_port():
    """A port that neither Ray's workers (10002-19999) nor outgoing connections take."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as listener:
            if listener.connect_ex(("127.0.0.1", port)):
                return port


class Head:
    """A head node on the loopback interface that wants a token, and the commands that are given to it."""

    def __init__(self, source):
        self.folder = Path(tempfile.mkdtemp(prefix="head-"))  # Ray's sockets need a short path
        self.source = source
        token = self.folder / "token"
        token.write_text("0123456789abcdef" * 4)
        token.chmod(0o600)
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
        self.client = {**outside, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.port, dashboard, self.agent_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        self.agent = f"http://127.0.0.1:{self.agent_port}/api/job_agent/jobs/none"
        command = [
            BIN / "ray", "start", "--head", "--block", f"--port={self.port}", "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={self.folder / 'ray'}",
            f"--dashboard-agent-listen-port={self.agent_port}", "--num-cpus=2", "--disable-usage-stats",
            f"--object-store-memory={128 * 2**20}",
        ]  # fmt: skip
        environment = self.client | {
            "PATH": f"{BIN}{os.pathsep}{outside['PATH']}", "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "RAY_worker_niceness": "0",
        }  # fmt: skip
        self.log = self.folder / "start.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.family = [psutil.Process(self.process.pid)]

    def wait_until_up(self):
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, f"the head ended: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"the head did not start: {self.log.read_text()}"
            try:
                if self.request(self.token) == 200 and self.request(self.token, self.agent):  # the agent takes jobs
                    return
            except OSError:
                pass
            time.sleep(0.5)

    @property
    def token(self):
        return (self.folder / "token").read_text()

    def request(self, token, url=None, method="GET"):
        """The status of a request, for the list of jobs unless another is named."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(url or f"{self.url}/api/jobs/", headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def job(self, *arguments, environment=None):
        """`ray job ...` from the project's folder."""
        verb, *rest = arguments
        return subprocess.run(
            [BIN / "ray", "job", verb, "--address", self.url, *rest], cwd=self.source, env=environment or self.client,
            capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip

    def submit(self, *entrypoint):
        return self.job("submit", "--working-dir", ".", "--", *entrypoint)

    def processes(self):
        with suppress(psutil.NoSuchProcess):  # the head has ended by itself
            self.family += [
                process
                for process in psutil.Process(self.process.pid).children(recursive=True)
                if process not in self.family
            ]
        return self.family

    def running(self, part):
        """Processes of the head with this in their command line."""
        return [process for process in self.processes() if part in command_of(process)]

    def close(self):
        """End the head as Ctrl-C does; the processes of it that are still there."""
        family = self.processes()
        self.process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=PATIENCE)
        for process in alive:
            process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        return alive


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head, and a checkout that it is given jobs from."""
    source = tmp_path_factory.mktemp("checkout")
    shutil.copytree(
        ROOT, source, dirs_exist_ok=True,
        ignore=lambda folder, names: {
            name for name in names if name == "__pycache__" or name.endswith(("_cache", ".egg-info"))
            or (Path(folder) == ROOT and name in {*STAY_HERE, "tests", "build", "mlruns", ".hypothesis"})
        },
    )  # fmt: skip
    for name in STAY_HERE:
        (source / name).mkdir()
        (source / name / "large").write_bytes(b"0" * 1024)
    head = Head(source)
    try:
        head.wait_until_up()
        yield head
    finally:
        alive = head.close()
    assert alive == []


def test_who_has_no_token_gets_nothing(head):
    assert (head.request(None), head.request("0" * 64), head.request(head.token)) == (401, 403, 200)
    stranger = {key: value for key, value in head.client.items() if not key.startswith("RAY_")}
    stranger["HOME"] = str(head.source)  # a token may lie in the home folder
    refused = head.job("submit", "--", "true", environment=stranger)
    assert refused.returncode != 0
    assert "Authentication required" in refused.stdout + refused.stderr
    connection = subprocess.run(
        [BIN / "python", "-c", f"import ray; ray.init('127.0.0.1:{head.port}')"], env=stranger, cwd=head.source,
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert connection.returncode != 0
    assert "token" in connection.stderr


def test_the_dashboard_listens_on_the_loopback_interface_alone_and_its_agent_wants_the_token(head):
    """Ray's own ports between the nodes, the agent's among them, listen for other machines: hence the token."""
    listening = {
        connection.laddr
        for process in head.processes()
        if process.is_running()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    dashboard = int(head.url.rpartition(":")[2])
    assert {address.ip for address in listening if address.port == dashboard} == {"127.0.0.1"}
    agents = [address.ip for address in listening if address.port == head.agent_port]
    assert agents
    for ip in agents:
        job = f"http://{ip}:{head.agent_port}/api/job_agent/jobs/none"
        statuses = [head.request(token, job, "DELETE") for token in (None, "0" * 64, head.token)]
        assert statuses[:2] == [401, 403]
        assert statuses[2] not in (401, 403)


def test_a_job_runs_the_submitted_code_and_leaves_the_rest_behind(head):
    (head.source / "configs" / "mine.yaml").write_text("seed: 1234\n")
    show = "find . -maxdepth 1 -printf '%f\\n'; python -c 'import cluster.cli, os; print(cluster.cli.__file__)'"
    result = head.submit("sh", "-c", f"gream run --config configs/mine.yaml train.steps=7 --dry-run; {show}")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    begin = next(row for row, line in enumerate(lines) if line.startswith("run_folder:"))
    end = lines.index(".", begin)
    settings = yaml.safe_load("\n".join(lines[begin:end]))
    assert (settings["seed"], settings["train"]["steps"]) == (1234, 7)
    files = set(lines[end:])
    assert files >= {"cluster", "actors", "configs", "pyproject.toml"}
    assert files.isdisjoint(STAY_HERE)
    assert any(line.endswith("cluster/cli.py") and "working_dir_files" in line for line in lines)


def test_a_stage_runs_on_workers_of_the_cluster(head, tmp_path):
    overrides = write_tables(tmp_path / "tables")
    run = tmp_path / "run"
    result = head.submit("gream", "index", *overrides, f"run_folder={run}", "index.distributed=true")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "succeeded" in result.stdout
    assert len(SemanticIdIndex.load(run / "index")) == 24


def test_bad_input_fails_the_job_and_says_why(head):
    result = head.submit("gream", "train", "train.stepz=7")
    assert result.returncode == 1
    assert "the nearest one is 'train.steps'" in result.stdout
    assert "failed with exit code 2" in result.stdout


def test_a_stopped_job_may_finish_its_step(head):
    step = (
        "import time; from cluster.stopping import finishing_steps\n"
        "with finishing_steps(60) as stop:\n"
        "    print('step begun')\n"
        "    while stop.number is None: time.sleep(0.1)\n"
        "    time.sleep(6); print('state written')\n"  # twice what Ray gives a job by default
    )
    submitted = head.job(
        "submit", "--working-dir", ".", "--no-wait", "--submission-id=stops", "--", "python", "-c", step
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: "step begun\n" in head.job("logs", "stops").stdout, lambda: head.job("logs", "stops").stdout)
    stopped = head.job("stop", "stops")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert "state written" in head.job("logs", "stops").stdout
    assert "STOPPED" in head.job("status", "stops").stdout.upper()


def test_a_stopped_training_leaves_a_state_to_go_on_from_and_no_process(head, supervised, tmp_path):
    shutil.copy(ROOT / "tests" / "reward_functions.py", head.source)  # travels with the job, as a user's own would
    training = TrainRun(supervised, tmp_path, "train.steps=3")
    command = ["gream", "train", *training.overrides]
    submitted = head.job("submit", "--working-dir", ".", "--no-wait", "--submission-id=train", "--", *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    wait_until(lambda: training.reached(1), lambda: head.job("logs", "train").stdout)
    (learner,) = head.running("ray::LearnerRank")
    learner.suspend()  # the command for the stop takes longer than a step
    assert [part for part in TRAINING if not head.running(part)] == []
    stopped = head.job("stop", "train", "--no-wait")
    learner.resume()
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr

    def left():
        return [part for part in TRAINING if head.running(part)]

    wait_until(lambda: not left(), left)
    wait_until(lambda: "STOPPED" in head.job("status", "train").stdout.upper(), lambda: head.job("status", "train"))
    assert [run.info.status for run in training.tracked()] == ["KILLED", "KILLED"]
    logs = head.job("logs", "train").stdout
    (step,) = re.findall(r"stopped after step (\d+); give the same command again", logs)
    assert (training.folder_of(int(step)) / "manifest.json").exists(), "the step was finished and its state written"
    again = head.submit(*command)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"goes on after step {step}" in again.stdout
    assert [run.info.status for run in training.tracked()] == ["FINISHED", "FINISHED"]
