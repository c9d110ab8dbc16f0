"""What every test stands on: Triton's interpreter without CUDA, no network, a seed, a device."""

import gc
import importlib.util
import ipaddress
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

# Python looks through all objects for circles again and again while a million of them come in with the libraries, and
# none goes. On again when the tests are collected.
gc.disable()

import torch  # noqa: E402
from interpreter_speed import make_interpreter_fast  # noqa: E402

if not torch.cuda.is_available():
    # Triton reads it when a kernel is decorated, so before any test module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in ("default", "avx2"):
    # where PyTorch is told to do without AVX-512 and oneDNN is not, attention in bf16 asks for a missing kernel
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")

# huggingface_hub reads these once, when it is imported. A home of its own for each process: no test sees the user's
# token or cache, and two workers never write the same module of remote code.
HOME = tempfile.mkdtemp(prefix="colt5-tests-")
os.environ.update(
    HF_HOME=HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_XET="1",
)

if "OMP_NUM_THREADS" in os.environ:
    # left alone, PyTorch takes no more threads than there are cores
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
else:
    WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // WORKERS)))


def find_code_once() -> None:
    """Have each save copy every file of the package's code once, and look for these files once in a process.

    Transformers reads all files again at every save, and copies one as often as others import it, which takes a
    quarter of a second.
    """
    # not before the settings above are made
    from transformers import dynamic_module_utils

    find = dynamic_module_utils.get_relative_import_files
    package = Path(__file__).parents[1] / "modeling_colt5"
    found: dict[Path, list[str]] = {}

    def find_once(file: str | os.PathLike) -> list[str]:
        if Path(file).parent != package:
            return find(file)
        if Path(file) not in found:
            found[Path(file)] = list(dict.fromkeys(find(file)))
        return found[Path(file)]

    dynamic_module_utils.get_relative_import_files = find_once


def pytest_configure(config: pytest.Config) -> None:
    find_code_once()
    # PEFT asks by the name that Transformers has since deprecated, wherever a model gets an adapter; no code here does
    message = "`is_gradient_checkpointing` is deprecated"
    config.addinivalue_line("filterwarnings", f"ignore:{message}:FutureWarning:transformers.modeling_utils")
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        make_interpreter_fast()


def pytest_unconfigure(config: pytest.Config) -> None:
    # compiled libraries complain of what is left when Python ends
    gc.unfreeze()
    shutil.rmtree(HOME, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def leave_data_sets_unnamed() -> None:
    """Give what Datasets maps a name by chance, where the test files have imported it.

    The name is a hash of the function, and with it of a whole vocabulary, for which it takes half a second. By it
    another run finds what this one has stored, and no two tests here read the same file.
    """
    if "datasets" in sys.modules:
        from datasets import arrow_dataset, fingerprint

        arrow_dataset.update_fingerprint = lambda *arguments: fingerprint.generate_random_fingerprint()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leave what was imported and collected out of Python's searches for circles: it stays until the end."""
    leave_data_sets_unnamed()
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out slow tests where a run has no time left for them: CI says until when one may begin."""
    until = os.environ.get("COLT5_SLOW_TESTS_BEGIN_UNTIL")
    if until is not None and time.time() > float(until) and item.get_closest_marker("slow"):
        pytest.skip("no time left on this machine")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers alone and in any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def caches_of_the_package() -> None:
    """Every test's models get this package's caches: a copy of the code that an earlier test has loaded has put its
    own in their place, with which no straight lines run."""
    own = sys.modules.get("modeling_colt5.run_causal_cache")
    if own is not None:
        from transformers import cache_utils

        cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[own.LAYER_TYPE] = own.CoLT5DynamicRoutedLayer
        cache_utils.STATIC_LAYER_TYPE_MAPPING[own.LAYER_TYPE] = own.CoLT5StaticRoutedLayer


@pytest.fixture
def device() -> torch.device:
    """The fastest device here: CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def loopback_only() -> None:
    """A connection to anything but this machine is an error, whatever library asks for it."""
    connect = socket.socket.connect

    def checked_connect(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
                raise RuntimeError(f"a test asked for the network: {address}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", checked_connect)
        yield


@pytest.fixture
def hub_environment(tmp_path: os.PathLike) -> dict[str, str]:
    """Environment variables for a process that talks to the loopback Hub and to nothing else.

    The Hub's address comes from COLT5_TEST_HUB_ENDPOINT, which CI sets; the test is skipped without it.
    """
    endpoint = os.environ.get("COLT5_TEST_HUB_ENDPOINT")
    if not endpoint:
        pytest.skip("needs a loopback Hub: COLT5_TEST_HUB_ENDPOINT is not set")
    return {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_HUB_OFFLINE": "0",
        # ten seconds otherwise, which a busy machine's Hub may take
        "HF_HUB_DOWNLOAD_TIMEOUT": "120",
        "HF_HUB_ETAG_TIMEOUT": "120",
        "HF_TOKEN": "hf_any_token_will_do_on_the_loopback_hub",
    }


@pytest.fixture
def float64_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm's statistic in the model's dtype; it is in fp32 otherwise, as in T5, which would blur float64 tests."""
    from modeling_colt5 import op_norm

    monkeypatch.setattr(op_norm, "mean_square", lambda hidden_states: hidden_states.pow(2).mean(-1))


class Messages(logging.Handler):
    """Collects what Transformers logs at WARNING and above."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record):
        self.text += record.getMessage() + "\n"


@pytest.fixture
def messages():
    handler = Messages()
    logger = logging.getLogger("transformers")
    # a script that another test has run may have asked for less
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
