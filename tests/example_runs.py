"""What the tests of the scripts of examples/ share: a tiny new model, and a few rows."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TOKENIZER = REPOSITORY / "tokenization" / "python_stdlib"
TINY = (
    "d_model=32,d_kv=8,d_ff=48,num_layers=1,num_decoder_layers=1,num_heads=4,num_light_heads=2,num_heavy_heads=2,"
    "light_d_ff=24,heavy_d_ff=64"
)
NEW_MODEL = ["--size", "base", "--config_overrides", TINY, "--tokenizer_name", str(TOKENIZER)]
FAST = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--per_device_train_batch_size", "2"]
FAST += ["--gradient_accumulation_steps", "1"]
# nbclient gives a kernel one minute to start, and what a cell shows four seconds to come after it: then it goes on
# without, and a busy machine's cells have shown nothing
PATIENT = {"timeout": 900, "startup_timeout": 300, "iopub_timeout": 300, "raise_on_iopub_timeout": True}

# a T5 for that tokenizer
TINY_T5 = {
    "vocab_size": 8192,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def run_processes(command: list[object], seconds: float = 900, **options: Any) -> str:
    """Run a command that starts others to its end; what it printed.

    The limit is for processes that hang, not for slow machines: each of them imports everything, and beside other work
    the longest of these commands has taken four minutes.

    `subprocess.run` ends the first process alone. Those that wait for each other would stay, hold open what the tests'
    own output goes to, and let whoever reads that wait as well.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([str(part) for part in command], start_new_session=True, **pipes, **options)
    late = ""
    try:
        printed, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = f"not done within {seconds} seconds\n"
        # launchers end what they have started when they are asked to end; others' processes are of the same group
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        printed, errors = process.communicate()
    assert process.returncode == 0 and not late, late + printed + errors
    return printed


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def seq2seq_arguments(tmp_path: Path, rows: list[dict]) -> list[str]:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return [*NEW_MODEL, *FAST, "--train_file", file, "--validation_file", file, "--output_dir", str(tmp_path / "out")]


ROWS = [
    {"document": f"def f{i}(x):\n    return x + {i}\n" * 20, "summary": f"adds {i}", "query": f"What does f{i} do?"}
    for i in range(4)
]
