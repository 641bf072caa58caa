"""Every name the platform file replaces exists where it is expected, and does what it is for."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import os
import pickle
import subprocess
import sys

import pytest
import torch

from megatron_tropd.parallel import checkpoint_writers, determinism, platform, torch_without_cuda

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where CUDA is present")
OURS = {platform.__name__, checkpoint_writers.__name__, torch_without_cuda.__name__}
NAMES = [(owner, name) for owner, names in platform.REPLACED.items() for name in names]


def _resolve(owner):
    """A module, or a class inside one."""
    try:
        return importlib.import_module(owner)
    except ModuleNotFoundError:
        module, _, attribute = owner.rpartition(".")
        return getattr(_resolve(module), attribute)


@pytest.mark.slow
def test_every_replaced_name_still_exists_upstream():
    """Asked of an unpatched interpreter: an upgrade that moves a name fails here, loudly."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tests.test_platform import NAMES, _resolve\n"
        "gone = [f'{owner}.{name}' for owner, name in NAMES if not hasattr(_resolve(owner), name)]\n"
        "sys.exit(f'gone: {gone}' if gone else 0)"
    )
    root = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, root], check=True, timeout=200)


@without_cuda
@pytest.mark.parametrize(("owner", "name"), NAMES, ids=[f"{o}.{n}" for o, n in NAMES])
def test_the_name_is_replaced_by_ours(owner, name):
    value = getattr(_resolve(owner), name)
    home = getattr(value, "__module__", None) or type(value).__module__
    wrapped = inspect.unwrap(value) is not value if callable(value) else False
    assert {home, type(value).__module__} & OURS or wrapped, value


@without_cuda
def test_device_literals_mean_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(2).cuda().device.type == "cpu"
    assert torch.ones(2).to("cuda", torch.float64).dtype == torch.float64
    assert torch.ones_like(torch.ones(2), device=torch.device("cuda", 0)).device.type == "cpu"
    assert torch.empty(2, pin_memory=True).device.type == "cpu"
    assert torch.cuda.current_device() == torch.device("cpu")


@without_cuda
def test_meta_device_contexts_still_work():
    """Replacing factories must not break ``torch.device("meta")``, which transformers loads through."""
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
        assert torch.arange(3).device.type == "meta"


@without_cuda
def test_only_the_optimizer_is_told_that_tensors_are_on_cuda():
    assert torch.ones(1).type() == "torch.FloatTensor"
    module = type(sys)("megatron.core.optimizer.probe")
    exec(compile("def ask(t):\n    return t.type()", "probe", "exec"), module.__dict__)
    assert module.ask(torch.ones(1)) == "torch.cuda.FloatTensor"


@without_cuda
def test_the_cuda_random_state_is_the_cpu_generator():
    from megatron.core.tensor_parallel import random

    state = random._get_cuda_rng_state()
    first = torch.rand(3)
    random._set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@without_cuda
def test_norm_under_sequence_parallelism_is_marked():
    from types import SimpleNamespace

    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    config = SimpleNamespace(
        sequence_parallel=True, layernorm_zero_centered_gamma=False, persist_layer_norm=False,
        memory_efficient_layer_norm=False, normalization="RMSNorm",
    )  # fmt: skip
    norm = WrappedTorchNorm(config=config, hidden_size=4)
    assert isinstance(norm, torch.nn.RMSNorm) and norm.weight.sequence_parallel
    assert config.sequence_parallel


@without_cuda
def test_checkpoint_writers_are_threads():
    import threading

    from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

    done = []
    for module in (filesystem_async, async_utils):
        process = module.mp.get_context("fork").Process(target=done.append, args=(1,), kwargs={})
        assert isinstance(process, threading.Thread)
        process.start()
        process.join()
    assert done == [1, 1]
    results = filesystem_async.mp.get_context("spawn").Manager().Queue()
    results.put(1)
    assert results.get() == 1


@pytest.mark.slow
def test_deterministic_mode_asks_every_library_and_keeps_what_is_set():
    code = (
        "import os, torch\n"
        "from megatron_tropd.parallel import determinism\n"
        "determinism.make_deterministic()\n"
        "assert torch.are_deterministic_algorithms_enabled()\n"
        "assert torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "found = {name: os.environ[name] for name in determinism.ENVIRONMENT}\n"
        "assert found == {**determinism.ENVIRONMENT, 'NCCL_ALGO': 'Tree'}, found\n"
    )
    environment = {**os.environ, "NCCL_ALGO": "Tree"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


def test_a_training_step_is_strict_about_determinism_only_where_it_is_asked_for():
    before = torch.get_deterministic_debug_mode()
    with determinism.deterministic_kernels(False):
        assert torch.get_deterministic_debug_mode() == before
    with pytest.raises(KeyError), determinism.deterministic_kernels(True):
        assert torch.get_deterministic_debug_mode() == 2  # raises; 1 only warns
        raise KeyError
    assert torch.get_deterministic_debug_mode() == before


def test_a_pickled_tensor_names_no_function_of_megatron():
    """SGLang's servers admit torch's."""
    import megatron.core  # noqa: F401  (0.19 replaces the function when it is imported)

    pickled = pickle.dumps({"weight": torch.arange(3.0)})
    assert b"torch.storage" in pickled and b"megatron" not in pickled
    assert torch.equal(pickle.loads(pickled)["weight"], torch.arange(3.0))  # noqa: S301  (its own)


def test_gradients_of_the_norm_are_those_megatron_takes():
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    names = ("get_grads_for_grad_norm", "get_main_grads_for_grad_norm")
    assert any(hasattr(MegatronOptimizer, name) for name in names)


def test_settings_are_written_into_the_groups_of_any_optimizers_state():
    groups = [{"max_lr": 1.0, "params": [0]}, {"max_lr": 2.0, "wd_mult": 0.0, "params": [1]}]
    nested = {"optimizer": {"param_groups": copy.deepcopy(groups), "state": {0: {"max_lr": "a tensor's"}}}}
    chained = [copy.deepcopy(nested), {"param_groups": copy.deepcopy(groups)}]
    for state in (nested, chained, {"0": chained}):
        platform.set_in_param_groups(state, {"max_lr": 5.0, "eps": 1e-8})
    assert nested["optimizer"]["param_groups"] == [
        {"max_lr": 5.0, "params": [0]}, {"max_lr": 5.0, "wd_mult": 0.0, "params": [1]}
    ]  # fmt: skip
    assert nested["optimizer"]["state"] == {0: {"max_lr": "a tensor's"}}
    assert [group["max_lr"] for group in chained[1]["param_groups"]] == [5.0, 5.0]


def test_the_common_state_is_written_where_megatron_did_not(tmp_path):
    platform.write_common_state(tmp_path, {"cursor": 3})
    platform.write_common_state(tmp_path, {"cursor": 4})  # Megatron's own is kept
    assert torch.load(tmp_path / platform.COMMON_FILE, weights_only=True) == {"cursor": 3}


def test_what_is_left_out_of_the_log_is_only_that(caplog):
    for name, fragment in platform.LEFT_OUT.items():
        logging.getLogger(name).warning(f"... {fragment} ...")
        logging.getLogger(name).warning(f"something else of {name}")
    assert [record.message for record in caplog.records] == [f"something else of {name}" for name in platform.LEFT_OUT]


def test_a_failed_writer_says_why(tmp_path):
    """megatron-core 0.19 lets the last writer return its error and then names only the error's type."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    if platform.megatron_version() < (0, 19):
        pytest.skip("before 0.19 every writer has a queue")
    bucket = (tmp_path / "nowhere" / "file", "key", ([], []))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        FileSystemWriterAsync.write_preloaded_data(
            [], local_proc_idx=0, write_bucket=bucket, results_queue=None, count_queue=None, use_fsync=True
        )


@pytest.mark.slow
def test_install_changes_nothing_where_cuda_is_present():
    code = (
        "import torch\n"
        "torch.cuda.is_available = lambda: True\n"
        "before = (torch.empty, torch.Tensor.to, torch.cuda.synchronize)\n"
        "from megatron_tropd.parallel import platform\n"
        "platform.install()\n"
        "assert before == (torch.empty, torch.Tensor.to, torch.cuda.synchronize)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
