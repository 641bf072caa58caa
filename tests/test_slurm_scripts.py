"""examples/slurm: the job scripts really train, with stand-ins for srun and scontrol that run everything on this machine.

Two nodes are two torchruns that meet at a port, over gloo.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tests.ranks import free_port
from tests.sglang_helpers import KEYS, PYTHON, needs_sglang
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import command_of, wait_for_steps
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parent.parent
SLURM = ROOT / "examples" / "slurm"
PAPER = ROOT / "examples" / "paper"
SCRIPTS = [*sorted(SLURM.iterdir()), PAPER / "row.sbatch", PAPER / "common.sh"]
JOBS = [path for path in SCRIPTS if path.suffix == ".sbatch"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(path):
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=30)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_directives_come_before_the_first_command(path):
    """Slurm stops to read them there, and says nothing."""
    text = path.read_text()
    commands = [number for number, line in enumerate(text.splitlines()) if line and not line.startswith("#")]
    directives = [number for number, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    assert len(directives) >= 8 and max(directives) < min(commands)
    assert {"--nodes", "--ntasks-per-node", "--cpus-per-task"} <= set(re.findall(r"^#SBATCH (--[\w-]+)", text, re.M))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _environment(tmp_path, nodes, **more):
    """What Slurm gives to a batch script, and what the user does; nothing else of this process's but its paths."""
    return {
        "PATH": f"{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONWARNINGS": "ignore",
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": ",".join(nodes), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "2", "PYTHON": sys.executable, "MASTER_PORT": str(free_port()),
        "CONFIG": str(tmp_path / "run.yaml"), "RUN_DIR": str(tmp_path / "run"), **more,
    }  # fmt: skip


def _write_config(tmp_path, world, **changes):
    argv = flags(world, tmp_path / "unused", **{"train_iters": 2, "run_dir": None, **changes})
    pairs = dict(zip(argv[::2], argv[1::2], strict=True))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({name[2:]: yaml.safe_load(v) for name, v in pairs.items()}))


class Job:
    """A job script that runs as Slurm runs it: a copy, in a directory of its own."""

    def __init__(self, name, tmp_path, environment, *argv):
        spool = tmp_path / "spool"
        spool.mkdir(exist_ok=True)
        copy = spool / "slurm_script"
        copy.write_bytes((SLURM / name).read_bytes())  # a whole path stays as it is
        self._log = (tmp_path / "job.log").open("w+")
        self._process = subprocess.Popen(
            ["bash", str(copy), *argv], cwd=spool, env=environment, stdout=self._log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        self.pid, self.poll = self._process.pid, self._process.poll

    def wait(self, timeout=240):
        """(exit code, output)."""
        code = self._process.wait(timeout)
        self._log.seek(0)
        return code, self._log.read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            family = psutil.Process(self.pid).children(recursive=True)
            for process in [psutil.Process(self.pid), *family]:
                _kill(process)
            self._process.wait(30)
        self._log.close()


def _kill(process):
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _steps(run_dir):
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes", "ranks_per_node"),
    [
        ("one_node.sbatch", ["localhost"], 2),
        pytest.param("several_nodes.sbatch", ["localhost", "127.0.0.1"], 1, marks=pytest.mark.thorough),
    ],
)
def test_a_job_trains(world, tmp_path, name, nodes, ranks_per_node):
    _write_config(tmp_path, world, tensor_model_parallel_size=2)
    environment = _environment(tmp_path, nodes, GPUS_PER_NODE=str(ranks_per_node))
    with Job(name, tmp_path, environment, "--train-iters", "3") as job:
        code, output = job.wait()
    run_dir = tmp_path / "run"
    assert code == 0, output[-4000:]
    assert _steps(run_dir) == [1, 2, 3], "flags after the script's name win"
    assert (run_dir / "hf_export" / "model.safetensors").exists()
    assert json.loads((run_dir / "heartbeat.json").read_text())["phase"] == "ended"
    reports = sorted(path.name for path in (run_dir / "launch").glob("doctor-*"))
    assert reports == sorted(f"doctor-4711-0-{node}.txt" for node in nodes)
    assert not list((run_dir / "launch").glob("error-*"))


@pytest.mark.slow
@pytest.mark.thorough
def test_a_table_of_the_paper_goes_on_as_jobs_of_two_nodes(world, tmp_path):
    """run_table.sh, train.sh and the trainer on two ranks, ended at the first checkpoint; then the same with row.sbatch."""
    words = ["bash", str(PAPER / "run_table.sh"), "5", "--smoke", "--out", str(tmp_path), "--rows", "tropd_clip"]
    flags = ["--", "--train-iters", "12"]
    environment = _environment(tmp_path, ["localhost", "127.0.0.1"], GPUS_PER_NODE="1", SMALL_WORLD=str(world))
    run_dir = tmp_path / "table5" / "skywork-math" / "tropd_clip" / "seed-1" / "run"
    with subprocess.Popen([*words, *flags], env=environment, stdout=subprocess.DEVNULL) as job:
        wait_for((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").exists, job, timeout=120)
        job.terminate()
        assert job.wait(timeout=60) == 1
    assert 0 < len(_steps(run_dir)) < 12 and not (run_dir / "hf_export").exists()
    done = subprocess.run(
        [*words, "--launch", f"bash {PAPER / 'row.sbatch'}", *flags], env=environment, timeout=240, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "1 of 1 rows are done" in done.stdout, done.stdout[-4000:]
    assert "step 1/12" not in done.stdout and _steps(run_dir) == list(range(1, 13))
    assert (run_dir / "hf_export" / "model.safetensors").exists() and len(list(run_dir.glob("launch/doctor-*"))) == 2
    text = (run_dir / "config.yaml").read_text()
    assert "objective: tropd_clip" in text and "guidance-beta: 0.001" in text and "seed: 1\n" in text


def test_a_row_on_several_nodes_has_servers_with_keys_on_each(tmp_path):
    """An interpreter that only makes the recipe: what is left of the job are the words for srun."""
    stub, log = tmp_path / "python", tmp_path / "srun.log"
    stub.write_text(f'#!/bin/sh\ncase "$1" in *paper_recipe.py) exec {sys.executable} "$@" ;; esac\n')
    stub.chmod(0o755)
    more = {"PROMPTS": "p.jsonl", "PYTHON": str(stub), "SRUN_LOG": str(log), "GPUS_PER_NODE": "8"}
    environment = _environment(tmp_path, ["a", "b"], **more)
    words = ["--setting", "qwen3", "--row", "opd", "--out", str(tmp_path / "row"), "--seed", "3"]
    with Job(PAPER / "row.sbatch", tmp_path, environment, *words) as job:
        code, output = job.wait(60)
    assert code == 1 and "KEY_FILE: set it to a YAML file" in output and not log.exists()
    with Job(PAPER / "row.sbatch", tmp_path, {**environment, "KEY_FILE": "keys.yaml"}, *words) as job:
        code, output = job.wait(60)
    assert code == 0, output
    _, train = log.read_text().splitlines()
    assert train.endswith("train_node.sh --rollout-num-engines-per-node 8 --sglang-key-file keys.yaml --seed 3")


@pytest.mark.slow
@pytest.mark.thorough
def test_a_node_that_is_lost_ends_the_job_and_the_same_command_resumes(world, tmp_path):
    nodes, run_dir = ["localhost", "127.0.0.1"], tmp_path / "run"
    _write_config(tmp_path, world, tensor_model_parallel_size=2, save_interval=2, train_iters=40)
    with Job("several_nodes.sbatch", tmp_path, _environment(tmp_path, nodes, GPUS_PER_NODE="1")) as job:
        wait_for_steps(run_dir / "metrics.jsonl", 3, job)
        second = _torchrun_of(job, "1")
        for process in [*second.children(recursive=True), second]:
            with contextlib.suppress(psutil.NoSuchProcess):  # its end ends others
                process.kill()
        code, output = job.wait(timeout=90)
    assert code not in (0, 2, 17, 18), output[-4000:]
    assert f"job 4711 ends with exit code {code}" in output
    again = {**_environment(tmp_path, nodes, GPUS_PER_NODE="1"), "SLURM_RESTART_COUNT": "1"}
    with Job("several_nodes.sbatch", tmp_path, again, "--train-iters", "10") as job:
        code, output = job.wait()
    assert code == 0, output[-4000:]
    assert _steps(run_dir) == list(range(1, 11)), "steps are missing or twice"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "requeue", "nodes"),
    [
        (lambda job: os.kill(job.pid, signal.SIGUSR1), "1", ["localhost", "127.0.0.1"]),  # Slurm's --signal=B:USR1@300
        pytest.param(lambda job: _torchrun_of(job).terminate(), "1", ["localhost"], marks=pytest.mark.thorough),
        pytest.param(lambda job: os.kill(job.pid, signal.SIGUSR1), "0", ["localhost"], marks=pytest.mark.thorough),
    ],
    ids=["time nearly up", "preempted", "no requeue"],
)
def test_a_job_that_must_end_saves_and_is_queued_again(world, tmp_path, act, requeue, nodes):
    run_dir = tmp_path / "run"
    _write_config(tmp_path, world, tensor_model_parallel_size=2, train_iters=10000)
    environment = _environment(tmp_path, nodes, GPUS_PER_NODE=str(2 // len(nodes)), REQUEUE=requeue)
    name = "one_node.sbatch" if len(nodes) == 1 else "several_nodes.sbatch"
    with Job(name, tmp_path, environment) as job:
        done = wait_for_steps(run_dir / "metrics.jsonl", 2, job)
        act(job)
        code, output = job.wait(timeout=120)
    assert code == 75 and "Stopped by " in output, output[-4000:]
    requeued = run_dir / "requeued"
    assert (requeued.read_text() if requeued.exists() else "") == ("4711\n" if requeue == "1" else "")
    saved = int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    assert _steps(run_dir) == list(range(1, saved + 1)) and saved >= done
    again = {**environment, "SLURM_RESTART_COUNT": "1"}
    with Job(name, tmp_path, again, "--train-iters", str(saved + 1)) as job:
        code, output = job.wait()
    assert code == 0 and _steps(run_dir) == list(range(1, saved + 2)), output[-4000:]


def _torchrun_of(job, node_rank=None):
    for process in psutil.Process(job.pid).children(recursive=True):
        words = command_of(process)
        if "torch.distributed.run" in words and (
            node_rank is None or words[words.index("--node-rank") + 1] == node_rank
        ):
            return process
    raise AssertionError(f"no torchrun of node {node_rank}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nodes", "changes", "expected", "message"),
    [
        ("one_node.sbatch", ["localhost"], {"lr": -1.0}, 2, "--lr -1.0 must be positive"),
        pytest.param(
            "several_nodes.sbatch",
            ["localhost", "127.0.0.1"],
            {"spike_grad_norm": 1e-30},
            18,
            "gradient norm",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_the_exit_code_is_that_of_the_rank(world, tmp_path, name, nodes, changes, expected, message):
    _write_config(tmp_path, world, **changes)
    with Job(name, tmp_path, _environment(tmp_path, nodes, GPUS_PER_NODE="1")) as job:
        code, output = job.wait()
    assert code == expected and message in output, output[-4000:]


def test_a_job_that_lacks_a_setting_says_which(tmp_path):
    for missing in ("CONFIG", "RUN_DIR"):
        environment = _environment(tmp_path, ["localhost"])
        del environment[missing]
        with Job("one_node.sbatch", tmp_path, environment) as job:
            code, output = job.wait(30)
        assert code == 1 and f"{missing}: set it to" in output


@pytest.mark.slow
def test_a_node_on_which_no_run_can_work_ends_the_job(tmp_path):
    """The interpreter is one without torch."""
    bad = tmp_path / "python"
    bad.write_text("#!/bin/sh\nexit 1\n")
    bad.chmod(0o755)
    more = {"PYTHON": str(bad), "SRUN_FLAGS": "--container-image=a", "SRUN_LOG": str(tmp_path / "srun.log")}
    with Job("one_node.sbatch", tmp_path, _environment(tmp_path, ["localhost"], **more)) as job:
        code, output = job.wait(60)
    assert code == 2 and "the doctor found" in output
    assert "--container-image=a bash" in (tmp_path / "srun.log").read_text(), "SRUN_FLAGS went nowhere"


@pytest.mark.slow
@pytest.mark.parametrize("engine_nodes", ["0", "2"])
def test_some_nodes_must_train_and_some_must_write(tmp_path, engine_nodes):
    more = {"KEY_FILE": "k", "STUDENT": "s", "ENGINE_NODES": engine_nodes}
    with Job("engines_on_own_nodes.sbatch", tmp_path, _environment(tmp_path, ["a", "b"], **more)) as job:
        code, output = job.wait(30)
    assert code == 2 and f"ENGINE_NODES is {engine_nodes}; the job has 2 nodes" in output


def _servers_of(job):
    """Servers that the job started; the shell that makes their log becomes one a moment later."""
    family = psutil.Process(job.pid).children(recursive=True)
    return [p for p in family if (words := command_of(p)) and "python" in words[0] and "server/launch.py" in str(words)]


@pytest.mark.slow
@needs_sglang
@pytest.mark.thorough
def test_engines_on_a_node_of_their_own(world, tmp_path):
    """A real server on the second node, with keys, which ends with the job; no log shows a key."""
    _write_config(tmp_path, world)
    keys = tmp_path / "keys.yaml"
    keys.touch(0o600)
    keys.write_text(f"api-key: {KEYS.api}\nadmin-api-key: {KEYS.admin}\n")
    port = free_port()
    environment = _environment(
        tmp_path, ["localhost", "127.0.0.1"], GPUS_PER_NODE="1", KEY_FILE=str(keys), STUDENT=str(world / "student"),
        SGLANG_PYTHON=str(PYTHON), ENGINE_PORT=str(port), SGLANG_USE_CPU_ENGINE="1",
        ENGINE_FLAGS="--dtype float32 --device cpu --attention-backend torch_native --sampling-backend pytorch "
        "--grammar-backend none --cuda-graph-backend-decode disabled --cuda-graph-backend-prefill disabled "
        "--disable-overlap-schedule --sleep-on-idle --mem-fraction-static 0.2 --max-total-tokens 2048 "
        "--max-running-requests 16",
    )  # fmt: skip
    with Job("engines_on_own_nodes.sbatch", tmp_path, environment) as job:
        wait_for(lambda: _servers_of(job), job, timeout=60)
        (server,) = _servers_of(job)
        assert KEYS.admin not in str(server.cmdline())
        code, output = job.wait(400)
    assert code == 0, output[-4000:]
    assert _steps(tmp_path / "run") == [1, 2]
    _, alive = psutil.wait_procs([server], timeout=30)
    for process in alive:
        _kill(process)
    assert not alive, "the server outlives the job"
    (log,) = (tmp_path / "run" / "engines").iterdir()
    assert not log.stat().st_mode & 0o077 and "fired up" in log.read_text()
    everything = output + "".join(path.read_text() for path in (log, *(tmp_path / "run" / "launch").iterdir()))
    assert KEYS.api not in everything and KEYS.admin not in everything
