"""The same as test_remote_code, over a Hub: push, load, one more round, delete, load."""

import json
import urllib.error
import urllib.request
import uuid

import hub_steps
import pytest


def ask(environment: dict[str, str], method: str, path: str, data: object = None) -> dict:
    """What the Hub's own interface answers, with no help of huggingface_hub."""
    request = urllib.request.Request(
        environment["HF_ENDPOINT"] + path,
        method=method,
        data=json.dumps(data).encode(),
        headers={"Authorization": f"Bearer {environment['HF_TOKEN']}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read() or b"{}")


# four processes that import everything anew; test_remote_code does the same from folders
@pytest.mark.slow
def test_repositories_go_round_with_and_without_the_package(hub_environment, tmp_path):
    def environment(home: str) -> dict[str, str]:
        return hub_environment | {"HF_HOME": str(tmp_path / home)}

    user = ask(hub_environment, "GET", "/api/whoami-v2")["name"]
    prefix = f"{user}/colt5-{uuid.uuid4().hex[:8]}"
    first, second, third = (f"{prefix}-{name}" for name in ("first", "second", "third"))
    alone = [f"{prefix}-{name}" for name in hub_steps.AUTO_CLASSES.values() if name != "CoLT5ForConditionalGeneration"]
    tokenizer_alone = f"{prefix}-CoLT5Tokenizer"

    by_package = hub_steps.run_step("push", prefix, environment=environment("pushes"))
    by_code = hub_steps.run_step(
        "code_only", first, third, *alone, tokenizer_alone, environment=environment("code only")
    )
    hub_steps.assert_equal(by_code, by_package)

    code = hub_steps.closure("modeling_colt5") | {"config.json", "model.safetensors"}
    tokenizer_files = hub_steps.closure("tokenization_colt5") | {"tokenizer.json", "tokenizer_config.json"}
    expected = dict.fromkeys((first, second, third), code | tokenizer_files | {"generation_config.json"})
    expected |= dict.fromkeys(alone, code) | {tokenizer_alone: tokenizer_files}
    expected[f"{prefix}-CoLT5ForCausalLM"] = code | {"generation_config.json"}
    for repository, files in expected.items():
        siblings = ask(hub_environment, "GET", f"/api/models/{repository}")["siblings"]
        assert {sibling["rfilename"] for sibling in siblings} - {".gitattributes", "README.md"} == files, repository

    user, _, name = first.partition("/")
    ask(hub_environment, "DELETE", "/api/repos/delete", {"organization": user, "name": name})
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(hub_environment, "GET", f"/api/models/{first}")
    later = hub_steps.run_step("next_round", second, third, environment=environment("next round"))
    for where, earlier in ((second, by_package), (third, by_code)):
        hub_steps.assert_equal({where: later[f"{where}/AutoModelForSeq2SeqLM"]}, {where: earlier["fine-tuned"]})
    hub_steps.assert_equal(
        {name.removeprefix(f"{second}/"): tensor for name, tensor in later.items() if name.startswith(second)},
        {name.removeprefix(f"{third}/"): tensor for name, tensor in later.items() if name.startswith(third)},
    )
