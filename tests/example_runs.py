"""What the tests of the scripts of examples/ share: a tiny new model, and a few rows."""

import json
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
TOKENIZER = REPOSITORY / "tokenization" / "python_stdlib"
TINY = (
    "d_model=32,d_kv=8,d_ff=48,num_layers=1,num_decoder_layers=1,num_heads=4,num_light_heads=2,num_heavy_heads=2,"
    "light_d_ff=24,heavy_d_ff=64"
)
NEW_MODEL = ["--size", "base", "--config_overrides", TINY, "--tokenizer_name", str(TOKENIZER)]
FAST = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--per_device_train_batch_size", "2"]
FAST += ["--gradient_accumulation_steps", "1"]

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
