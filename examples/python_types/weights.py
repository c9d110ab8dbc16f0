"""A model's weights in bf16, in files of at most 16 MB with its configuration in each: what a run writes."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import CONFIG_NAME

from modeling_colt5 import CoLT5Config, CoLT5ForConditionalGeneration

MOST_BYTES = 16_000_000


def save_weights(model: CoLT5ForConditionalGeneration, folder: Path, about: dict[str, Any]) -> None:
    """Write the weights over those of an earlier time; each file whole or not at all.

    Args:
        model: its parameters are rounded to bf16.
        folder: gets `weights-1.safetensors`, `weights-2.safetensors`, ...
        about: what is known of the run; the same in all files, by which they are known to belong together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    # a tied head is no parameter of its own
    for name, parameter in model.named_parameters():
        rounded = parameter.detach().to("cpu", torch.bfloat16)
        if size + rounded.nbytes > MOST_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = rounded
        size += rounded.nbytes
    metadata = {"config": model.config.to_json_string(), "about": json.dumps(about), "parts": str(len(parts))}
    for number, part in enumerate(parts, 1):
        unfinished = folder / f"weights-{number}.unfinished"
        save_file(part, unfinished, {**metadata, "format": "pt"})
        os.replace(unfinished, folder / f"weights-{number}.safetensors")


def load_weights(folder: Path) -> tuple[CoLT5ForConditionalGeneration, dict[str, Any]]:
    """The model in fp32, in evaluation mode, and what is known of its run.

    Args:
        folder: of a run, or a checkpoint that `save_pretrained` wrote, of whose run nothing is known.

    Raises:
        ValueError: if there are no weights, some are missing, or they are of two times.
    """
    if (folder / CONFIG_NAME).exists():
        return CoLT5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), {}
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no weights; train.py writes weights-1.safetensors there")
    weights: dict[str, Tensor] = {}
    all_metadata = []
    for file in files:
        with safe_open(file, "pt") as part:
            all_metadata.append(part.metadata())
            weights |= {name: part.get_tensor(name).float() for name in part.keys()}  # noqa: SIM118
    metadata = all_metadata[0]
    if any(other != metadata for other in all_metadata) or int(metadata["parts"]) != len(files):
        raise ValueError(f"the files of weights in {folder} are not of one saving; copy all {metadata['parts']} anew")
    model = CoLT5ForConditionalGeneration(CoLT5Config.from_dict(json.loads(metadata["config"])))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    absent = set(missing) - {name for name in model.state_dict() if name not in dict(model.named_parameters())}
    if absent or unexpected:
        raise ValueError(f"weights in {folder} lack {sorted(absent)} and have {sorted(unexpected)} too many")
    return model.eval(), json.loads(metadata["about"])
