"""The doctor: this machine as it is, and facts of machines that are not at hand."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement

from megatron_tropd.doctor import __main__ as command
from megatron_tropd.doctor import (
    answer,
    child,
    examine,
    gpus,
    host,
    network,
    packages,
    sandbox,
    sglang,
    variables,
    versions,
)
from megatron_tropd.doctor.examine import Machine
from megatron_tropd.doctor.gpus import Gpu, GpuFacts
from megatron_tropd.doctor.host import HostFacts
from megatron_tropd.doctor.kernels import CompilerFacts
from megatron_tropd.doctor.network import NetworkFacts
from megatron_tropd.doctor.packages import Imported, PackageFacts
from megatron_tropd.doctor.sandbox import SandboxFacts
from megatron_tropd.doctor.sglang import SGLangFacts
from megatron_tropd.doctor.variables import VariableFacts

ROOT = Path(__file__).resolve().parent.parent
GIB = 1 << 30
UNLIMITED = resource.RLIM_INFINITY
H100 = Gpu(name="NVIDIA H100 80GB HBM3", memory_bytes=80 * GIB, capability=(9, 0))

CPU_MACHINE = Machine(
    packages=PackageFacts(
        python=(3, 11, 7),
        versions=dict.fromkeys((*versions.REQUIRED, *packages.OPTIONAL), "1.0"),
        imported={
            "megatron-core": Imported(version="0.16.1"),
            "transformers": Imported(version=versions.TRANSFORMERS),
        },
        pypi_apex=False,
    ),
    gpus=GpuFacts(
        torch=f"{versions.TORCH}+cpu", varlen=True, nccl_built=False, driver_loaded=False, device_files=False, hidden=False
    ),
    compiler=CompilerFacts(compiler=True, headers=True),
    host=HostFacts(
        cpus=8, memory_bytes=32 * GIB, shm_bytes=16 * GIB, shm_free_bytes=16 * GIB, open_files=65536,
        locked_memory=8 << 20, processes=UNLIMITED, disk_free_bytes=500 * GIB,
    ),
    network=NetworkFacts(
        name="box", addresses=("10.0.0.4",), has_port=True, interfaces=("lo", "eth0"), infiniband=(), verbs=False
    ),
    sglang=SGLangFacts(python="/sgl/bin/python", given=True, sglang=versions.SGLANG, torch=versions.TORCH),
    sandbox=SandboxFacts(missing=()),
    variables=VariableFacts(values={"PATH": "/bin"}),
)  # fmt: skip

H100_NODE = replace(
    CPU_MACHINE,
    packages=replace(
        CPU_MACHINE.packages,
        python=(3, 12, 3),
        imported={
            "megatron-core": Imported(version="0.19.2+0a1b2c3d4"),
            "transformers": Imported(version=versions.TRANSFORMERS),
            "triton": Imported(version="3.8.0"),
            "transformer-engine": Imported(version="2.9.0"),
        },
    ),
    gpus=GpuFacts(
        torch=versions.TORCH, cuda="13.0", varlen=True, nccl_built=True, gpus=(H100,) * 8,
        arch_list=("sm_80", "sm_90", "sm_100"), nccl="2.29.3", driver="580.95.05", used_bytes=(500 << 20,) * 8,
        nvlink=True, driver_loaded=True, device_files=True, hidden=False,
    ),
    host=replace(CPU_MACHINE.host, cpus=192, memory_bytes=2000 * GIB, locked_memory=UNLIMITED),
    network=replace(CPU_MACHINE.network, infiniband=("mlx5_0", "mlx5_1"), verbs=True),
    variables=VariableFacts(values={"CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "8"}),
)  # fmt: skip


def with_facts(machine, subject, **changes):
    return replace(machine, **{subject: replace(getattr(machine, subject), **changes)})


def marked(machine):
    """(state, name) of every finding that is not ok."""
    return {(f.state, f.name) for f in examine.judge(machine) if f.state != "ok"}


def only(machine, name):
    (finding,) = [f for f in examine.judge(machine) if f.name == name and f.state != "ok"]
    return finding


def exit_code(machine, monkeypatch, *flags):
    monkeypatch.setattr(examine, "probe", lambda _python: machine)
    monkeypatch.setenv("COLUMNS", "120")  # a narrower terminal would break lines elsewhere
    return command.main(flags)


def test_an_h100_node_and_a_cpu_machine_can_run(monkeypatch, capsys):
    assert not marked(H100_NODE)
    assert marked(CPU_MACHINE) == {("note", "GPUs")}
    assert exit_code(H100_NODE, monkeypatch) == 0
    text = capsys.readouterr().out
    assert "8 x NVIDIA H100 80GB HBM3, 80 GiB, capability 9.0" in text and text.endswith("\n0 problems, 0 notes\n")
    assert exit_code(CPU_MACHINE, monkeypatch) == 0
    assert capsys.readouterr().out.endswith("\n0 problems, 1 note\n")


SMALL_SHM = {"shm_bytes": 64 << 20, "shm_free_bytes": 64 << 20}
NO_DRIVER = {"gpus": (), "reason": "The NVIDIA driver on your system is too old (found version 11040)."}


@pytest.mark.parametrize(
    ("machine", "subject", "changes", "state", "name", "advice"),
    [
        (H100_NODE, "host", SMALL_SHM, "problem", "/dev/shm", "--shm-size"),
        (with_facts(H100_NODE, "gpus", gpus=(H100,)), "host", SMALL_SHM, "note", "/dev/shm", "--shm-size"),
        (CPU_MACHINE, "host", SMALL_SHM, "note", "/dev/shm", "--update-weight-transport planned-shared or bytes"),
        (H100_NODE, "gpus", NO_DRIVER, "problem", "GPUs", "Update the driver"),
        (H100_NODE, "gpus", {**NO_DRIVER, "device_files": False}, "problem", "GPUs", "docker run --gpus all"),
        (H100_NODE, "gpus", {**NO_DRIVER, "hidden": True}, "note", "GPUs", "unset CUDA_VISIBLE_DEVICES"),
        (CPU_MACHINE, "gpus", {"device_files": True}, "problem", "GPUs", "Install a CUDA build"),
        (H100_NODE, "gpus", {"gpus": (), "end": "no answer in 90 s"}, "problem", "GPUs", "nvidia-smi"),
        (H100_NODE, "gpus", {"torch": "", "end": "exit code 1"}, "problem", "torch", "pip install torch=="),
        (H100_NODE, "gpus", {"torch": "2.5.1"}, "problem", "torch", "needs 2.6 or newer"),
        (H100_NODE, "gpus", {"torch": "2.12.0a0+nv"}, "note", "torch", versions.TORCH),
        (H100_NODE, "gpus", {"arch_list": ("sm_50", "sm_100", "compute_100")}, "problem", "kernels of torch", "build"),
        (H100_NODE, "gpus", {"nccl_built": False}, "problem", "NCCL", "NCCL"),
        (H100_NODE, "gpus", {"no_peer": ((0, 4),)}, "note", "links of GPUs", "--tensor-model-parallel-size"),
        (H100_NODE, "gpus", {"nvlink": False}, "note", "links of GPUs", "--pipeline-model-parallel-size"),
        (H100_NODE, "gpus", {"used_bytes": (0, 30 * GIB)}, "note", "memory in use", "nvidia-smi"),
        (H100_NODE, "gpus", {"gpus": (H100, replace(H100, name="A"))}, "note", "GPUs", "CUDA_VISIBLE_DEVICES"),
        (H100_NODE, "gpus", {"gpus": (replace(H100, capability=(7, 5)),), "arch_list": ("sm_75",)},
         "note", "bf16", "--bf16"),
        (H100_NODE, "packages", {"pypi_apex": True}, "note", "apex", "pip uninstall apex"),
        (H100_NODE, "packages", {"python": (3, 14, 0)}, "note", "Python", "3.11, 3.12, 3.13"),
        (H100_NODE, "packages", {"python": (3, 11, 9)}, "note", "megatron-core", "pip install megatron-core==0.16.1"),
        (H100_NODE, "packages", {"versions": dict.fromkeys(packages.OPTIONAL, "1")}, "problem", "other requirements",
         "pip install huggingface_hub"),
        (CPU_MACHINE, "packages", {"versions": dict.fromkeys((*versions.REQUIRED, "tensorboard", "wandb"), "1")},
         "note", "langdetect", "pip install 'megatron-tropd[instructions]'"),
        (H100_NODE, "compiler", {"compiler": False}, "problem", "Triton", "apt-get install gcc"),
        (H100_NODE, "host", {"cpus": 8}, "note", "CPUs", "--cpus"),
        (H100_NODE, "host", {"memory_bytes": 256 * GIB}, "note", "memory", "--teacher-offload"),
        (H100_NODE, "host", {"open_files": 1024}, "note", "open files", "ulimit -n"),
        (H100_NODE, "host", {"processes": 1024}, "note", "processes", "ulimit -u"),
        (H100_NODE, "host", {"locked_memory": 64 << 10}, "note", "locked memory", "--ulimit memlock=-1"),
        (H100_NODE, "host", {"disk_free_bytes": GIB}, "note", "disk", "--run-dir"),
        (CPU_MACHINE, "network", {"addresses": (), "why": "timed out"}, "problem", "host name", "--local-addr"),
        (CPU_MACHINE, "network", {"addresses": ("127.0.1.1", "::1")}, "note", "host name", "GLOO_SOCKET_IFNAME"),
        (CPU_MACHINE, "network", {"has_port": False}, "problem", "loopback", "ip link set lo up"),
        (H100_NODE, "network", {"infiniband": ()}, "note", "InfiniBand", "TCP"),
        (H100_NODE, "network", {"verbs": False}, "note", "InfiniBand", "--device=/dev/infiniband"),
        (H100_NODE, "sandbox", {"missing": ("There is no Landlock.",)}, "note", "generated code", "docs/sandbox.md"),
        (H100_NODE, "sglang", {"sglang": None, "given": False}, "note", "sglang", "--sglang-python"),
        (H100_NODE, "sglang", {"sglang": None}, "problem", "sglang", versions.SGLANG),
        (H100_NODE, "sglang", {"end": "cannot be run"}, "problem", "interpreter", "--sglang-python"),
        (H100_NODE, "sglang", {"sglang": "0.4.1"}, "note", "sglang", f"pip install sglang=={versions.SGLANG}"),
        (H100_NODE, "sglang", {"torch": "2.9.1"}, "note", "torch of the servers", "--update-weight-transport bytes"),
        (H100_NODE, "variables", {"values": {}}, "note", "CUDA_DEVICE_MAX_CONNECTIONS", "--sequence-parallel"),
        (CPU_MACHINE, "variables", {"values": {"GLOO_SOCKET_IFNAME": "ib7"}}, "problem", "GLOO_SOCKET_IFNAME", "eth0"),
        (CPU_MACHINE, "variables", {"values": {"OMP_NUM_THREADS": "9"}}, "note", "OMP_NUM_THREADS", "8 cores"),
        (CPU_MACHINE, "variables", {"values": {"OMP_NUM_THREADS": "all"}}, "note", "OMP_NUM_THREADS", "number"),
        (CPU_MACHINE, "variables", {"values": {"HF_HUB_OFFLINE": "1"}}, "note", "HF_HUB_OFFLINE", "cache"),
    ],
)  # fmt: skip
def test_what_a_fact_means(machine, subject, changes, state, name, advice, monkeypatch):
    sick = with_facts(machine, subject, **changes)
    finding = only(sick, name)
    assert finding.state == state and advice in finding.advice
    assert exit_code(sick, monkeypatch) == any(mark == "problem" for mark, _ in marked(sick))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_DEBUG", "INFO"), ("NCCL_P2P_DISABLE", "1"), ("NCCL_SHM_DISABLE", "1"), ("NCCL_IB_DISABLE", "1"),
        ("CUDA_LAUNCH_BLOCKING", "1"), ("TORCHDYNAMO_DISABLE", "1"), ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"),
        ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments:True"),
    ],
)  # fmt: skip
def test_variables_that_cost_something_on_gpus(name, value):
    on_gpus = with_facts(H100_NODE, "variables", values={"CUDA_DEVICE_MAX_CONNECTIONS": "1", name: value})
    assert marked(on_gpus) == {("note", name)}
    everywhere = {("note", name)} if name == "TORCH_DISTRIBUTED_DEBUG" else set()
    assert marked(with_facts(CPU_MACHINE, "variables", values={name: value})) == {("note", "GPUs")} | everywhere
    off = {"1": "0", "INFO": "WARN"}.get(value, "")
    calm = with_facts(H100_NODE, "variables", values={"CUDA_DEVICE_MAX_CONNECTIONS": "1", name: off})
    assert not marked(calm)


@pytest.mark.parametrize(
    ("package", "name", "missing_state"),
    [
        ("megatron-core", "megatron-core", "problem"), ("transformers", "transformers", "problem"),
        ("transformer-engine", "Transformer Engine", "note"), ("triton", "Triton", "note"),
    ],
)  # fmt: skip
def test_packages_that_are_missing_or_broken(package, name, missing_state):
    imported = dict(H100_NODE.packages.imported)
    broken = with_facts(
        H100_NODE, "packages", imported={**imported, package: Imported(error="OSError: undefined symbol")}
    )
    assert only(broken, name).state == "problem" and "undefined symbol" in only(broken, name).found
    del imported[package]
    assert marked(with_facts(H100_NODE, "packages", imported=imported)) == {(missing_state, name)}


def test_attention_without_transformer_engine():
    imported = {name: it for name, it in H100_NODE.packages.imported.items() if name != "transformer-engine"}
    old = with_facts(with_facts(H100_NODE, "packages", imported=imported), "gpus", varlen=False)
    assert marked(old) == {("note", "Transformer Engine"), ("note", "variable-length attention")}


def test_the_tested_versions_are_those_of_the_requirements():
    pins = (ROOT / "requirements" / "runtime.txt").read_text(encoding="utf-8")
    lines = [Requirement(line.partition("#")[0]) for line in pins.splitlines() if not line.startswith("#")]
    for (major, minor), megatron in versions.MEGATRON_OF_PYTHON.items():
        here = {"python_version": f"{major}.{minor}"}
        wanted = {r.name: str(r.specifier) for r in lines if r.marker is None or r.marker.evaluate(here)}
        assert wanted["megatron-core"] == f"=={megatron}"
        assert wanted["torch"] == f"=={versions.TORCH}" and wanted["transformers"] == f"=={versions.TRANSFORMERS}"
    assert f" sglang=={versions.SGLANG} " in (ROOT / "Makefile").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in project["dependencies"]]
    assert set(names) == set(versions.REQUIRED)
    assert {extra for extra, _ in packages.OPTIONAL.values()} <= set(project["optional-dependencies"])
    assert project["requires-python"].startswith(">=" + ".".join(map(str, versions.OLDEST_PYTHON)))
    oldest_torch = ".".join(map(str, versions.OLDEST_TORCH))
    assert any(re.match(rf"torch>={oldest_torch}\b", requirement) for requirement in project["dependencies"])


def test_json(monkeypatch, capsys):
    sick = with_facts(with_facts(H100_NODE, "host", **SMALL_SHM), "gpus", nvlink=False)
    assert exit_code(sick, monkeypatch, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["problems"] == said["notes"] == 1
    assert {(f["state"], f["name"]) for f in said["findings"] if f["state"] != "ok"} == marked(sick)
    assert all(set(f) == {"subject", "name", "found", "state", "advice"} for f in said["findings"])


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_and_flags_stay_whole(width):
    sick = with_facts(CPU_MACHINE, "host", **SMALL_SHM)
    lines = command.table(examine.judge(sick), width).splitlines()
    assert max(map(len, lines)) <= width
    assert any("--update-weight-transport" in line for line in lines)


def explode(*_arguments, **_more):
    raise ZeroDivisionError("bang")


@pytest.mark.parametrize("module", [packages, gpus, host, network, sglang, sandbox, variables])
@pytest.mark.parametrize("name", ["probe", "judge"])
def test_a_part_that_raises_is_reported(module, name, monkeypatch, capsys):
    monkeypatch.setattr(child, "ask", lambda *_words: child.Output())
    monkeypatch.setattr(module, name, explode)
    assert command.main([]) == 1
    text = capsys.readouterr().out
    assert "this check failed: ZeroDivisionError: bang" in " ".join(text.split())
    assert text.count("ZeroDivisionError") == 1 and "\nHost\n" in text and "\nSGLang\n" in text


def test_a_fact_that_cannot_be_read_hides_no_other(monkeypatch):
    monkeypatch.setattr(host, "_memory", explode)
    facts = host.probe()
    assert facts.memory_bytes is None and facts.cpus and facts.disk_free_bytes
    (finding,) = facts.failed
    assert (finding.name, finding.state) == ("memory", "problem") and "bang" in finding.found


def test_no_thread_can_be_started(monkeypatch):
    def none(_workers):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(child, "ask", lambda *_words: child.Output())
    monkeypatch.setattr(examine, "ThreadPoolExecutor", none)
    assert examine.probe("").host.cpus


def test_children_that_end_early():
    def run(program, deadline_s=30.0):
        return child.run([sys.executable, "-c", program], deadline_s=deadline_s)

    said = "import json, os, sys; print('noise'); print(json.dumps({'a': 1}), flush=True); "
    killed = run(said + "os.kill(os.getpid(), 11)")
    assert killed.answers() == {"a": 1} and killed.end.startswith("ended by signal 11")
    raised = run(said + "raise ValueError('why')")
    assert raised.answers() == {"a": 1} and raised.end == "exit code 1: ValueError: why"
    start = time.monotonic()
    hangs = run(said + "import time; time.sleep(60)", deadline_s=3)
    assert hangs.answers() == {"a": 1} and hangs.end == "no answer in 3 s" and time.monotonic() - start < 30
    assert child.run(["/nowhere/python"], deadline_s=1).end == "cannot be run: No such file or directory"


def test_a_package_that_kills_its_process_hides_no_other(tmp_path, monkeypatch):
    """Not a stub: the child really imports it and dies."""
    (tmp_path / "killer.py").write_text("import os\nos.abort()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packages, "_IMPORTS", {"first": "json", "bad": "killer", "last": "string", "none": "no_module"})
    imported = packages.probe().imported
    assert set(imported) == {"first", "bad", "last"}
    assert "signal 6" in imported["bad"].error and not imported["first"].error and not imported["last"].error


SMI = {
    "--query-gpu=driver_version,memory.used": "580.95.05, 512\n580.95.05, [N/A]\n",
    "topo": "\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X \n\nLegend:\n  NV#  = Connection\n",
}


def test_what_torch_and_nvidia_smi_say_of_gpus(monkeypatch, capsys):
    """torch.cuda and nvidia-smi are stand-ins here: there is no GPU."""
    properties = SimpleNamespace(name=H100.name, total_memory=H100.memory_bytes, major=9, minor=0)
    stand_ins = {
        "device_count": 2,
        "get_device_properties": properties,
        "get_arch_list": ["sm_90"],
        "can_device_access_peer": False,
        "nccl.version": (2, 29, 3),
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    answer._gpus()
    said = child.Output(text='{"torch": "2.13.0", "cuda": "13.0"}\n' + capsys.readouterr().out)
    monkeypatch.setattr(child, "ask", lambda *_words: said)
    monkeypatch.setattr(child, "run", lambda words, **_: child.Output(text=SMI[words[1]]))
    facts = gpus.probe()
    assert facts.gpus == (H100, H100) and facts.arch_list == ("sm_90",) and facts.no_peer == ((0, 1), (1, 0))
    assert (facts.nccl, facts.driver, facts.used_bytes, facts.nvlink) == ("2.29.3", "580.95.05", (512 << 20, 0), True)


def _doctor(*flags, **environment):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    words = [sys.executable, "-m", "megatron_tropd.doctor", *flags]
    return subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_this_machine_can_run():
    done = _doctor()
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert re.search(r"\n0 problems, \d+ notes?\n$", done.stdout)
    assert re.search(r"ok +megatron-core +[\d.]+(\+\w+)?\n", done.stdout)


@pytest.mark.slow
def test_a_wrong_sglang_python_is_a_problem():
    done = _doctor("--json", "--sglang-python", "nowhere/python")
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said["problems"] == 1
    (finding,) = [f for f in said["findings"] if f["state"] == "problem"]
    assert finding["found"] == f"{ROOT}/nowhere/python: cannot be run: No such file or directory"
