"""The checkpoint of this repository: it loads with and without the package, has its code, and does its job."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration, CoLT5Tokenizer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from annotate_types import annotate, load, read_source, score  # noqa: E402
from python_types.holes import hide, holes_of, holes_to_hide  # noqa: E402

FOLDER = ROOT / "checkpoints/python-types"
MODULE = """\
from pathlib import Path


def read_lines(path: Path, encoding: str = "utf-8") -> list[str]:
    return path.read_text(encoding=encoding).splitlines()


def count_lines(path, encoding="utf-8", skip_empty=False):
    return len([line for line in read_lines(path, encoding) if line or not skip_empty])
"""
CODE = """\
import torch
from torch import nn


class Head(nn.Module):
    def __init__(self, width:<extra_id_0> , bias:<extra_id_1> = True):
        super().__init__()
        self.out = nn.Linear(width, 1, bias=bias)

    def forward(self, hidden_states:<extra_id_2> ) -><extra_id_3> :
        return self.out(hidden_states)
"""


@pytest.fixture(scope="module")
def loaded():
    return load(FOLDER)


def test_it_loads_with_the_auto_classes(loaded):
    model = AutoModelForSeq2SeqLM.from_pretrained(FOLDER)
    assert type(model) is CoLT5ForConditionalGeneration and model.dtype == torch.bfloat16
    assert type(AutoTokenizer.from_pretrained(FOLDER)) is CoLT5Tokenizer
    assert model.config.routers_trained and sum(map(torch.numel, model.parameters())) < 16e6
    assert (FOLDER / "model.safetensors").stat().st_size <= 32_000_000
    assert model.generation_config.max_new_tokens == 1024


def test_its_code_is_the_packages_own(tmp_path):
    small = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 4}
    small |= {"num_light_heads": 1, "num_heavy_heads": 3, "light_d_ff": 8, "heavy_d_ff": 8}
    CoLT5ForConditionalGeneration(CoLT5Config(**small)).save_pretrained(tmp_path)
    CoLT5Tokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path)
    files = {file.name for file in tmp_path.glob("*.py")}
    linked = {file.name for file in FOLDER.glob("*.py")}
    cure = "cd checkpoints/python-types; ln -s ../../modeling_colt5/NAME.py for what is missing, rm what is too much"
    assert files == linked, f"missing: {sorted(files - linked)}, too much: {sorted(linked - files)}; {cure}"
    for name in files:
        assert (FOLDER / name).resolve() == ROOT / "modeling_colt5" / name
    assert json.loads((FOLDER / "config.json").read_text())["auto_map"] == CoLT5Config().to_dict()["auto_map"]


# a process that imports everything; that its code is the package's own, the test above says
@pytest.mark.slow
def test_it_loads_without_the_package(tmp_path):
    steps = f"""
import sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(FOLDER)!r}, trust_remote_code=True)
model = AutoModelForSeq2SeqLM.from_pretrained({str(FOLDER)!r}, trust_remote_code=True).eval()
print(tokenizer.decode(model.generate(**tokenizer({CODE!r}, return_tensors="pt"))[0]))
assert "modeling_colt5" not in sys.modules
"""
    environment = {"HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", steps]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    assert "<extra_id_0> int<extra_id_1> bool<extra_id_2> torch.Tensor<extra_id_3> torch.Tensor</s>" in result.stdout


def test_it_gives_types_that_stand_in_the_module(loaded, tmp_path):
    (tmp_path / "lines.py").write_text(MODULE)
    annotated = annotate(read_source(tmp_path / "lines.py"), *loaded)
    given = {annotation.hole.key: annotation.type for annotation in annotated.annotations}
    assert (given["path"], given["encoding"], given["skip_empty"]) == ("Path", "str", "bool")
    compile(annotated.text, "lines.py", "exec")


@pytest.mark.slow
def test_it_knows_this_repositorys_code_better_than_a_copy_by_name(loaded):
    # this package was not trained on
    table = json.loads((FOLDER / "baselines.json").read_text())["table"]
    right, copied, hidden = 0, 0, 0
    for name in ("run_budgets.py", "op_gelu.py", "model_outputs.py"):
        scored = score(read_source(ROOT / "modeling_colt5" / name), *loaded, table, 1.0)
        right, copied, hidden = right + scored.model, copied + scored.by_name, hidden + scored.hidden
    assert hidden >= 10 and right > copied


def test_its_routers_choose_what_is_asked_for(loaded):
    """One query in sixteen is routed; of the sentinels, whose types are asked for, some layer routes most."""
    model, tokenizer = loaded
    source = read_source(ROOT / "modeling_colt5/run_inputs.py")
    hidden = hide(source.text, holes_to_hide(holes_of(source.text))[::3])
    batch = tokenizer(hidden.text, return_tensors="pt")
    asked = torch.isin(batch["input_ids"][0], torch.tensor(tokenizer.get_sentinel_token_ids()))
    assert asked.sum() == len(hidden.holes) > 5
    with torch.no_grad():
        routing = model.get_encoder()(**batch, output_routing=True).routing
    shares = []
    for layer in routing:
        chosen = torch.zeros_like(asked)
        chosen[layer.query.indices[0][layer.query.valid[0]]] = True
        assert chosen.float().mean() < 0.08
        shares.append(chosen[asked].float().mean().item())
    assert max(shares) > 0.8
