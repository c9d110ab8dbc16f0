"""Writes the paper's sizes as folders that `AutoConfig.from_pretrained` loads."""

import argparse
import json
import sys
from pathlib import Path

from transformers import GenerationConfig

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

from modeling_colt5.configuration_colt5 import SIZES, CoLT5BaseConfig, CoLT5Config  # noqa: E402


def write_preset(size: str, folder: Path) -> None:
    """Write `config.json` and `generation_config.json` of a size, without the version of Transformers that wrote them.

    Args:
        size: "base", "large" or "xl".
        folder: where to; made if need be.
    """
    config = CoLT5Config.from_size(size)
    config.architectures = ["CoLT5ForConditionalGeneration"]
    generation_config = GenerationConfig(
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        decoder_start_token_id=config.decoder_start_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # the model's own fields, all of them and nothing else: the rest are defaults of the Transformers at hand
    fields = {"model_type", "architectures", "is_encoder_decoder"}
    fields.update(CoLT5BaseConfig.__annotations__, CoLT5Config.__annotations__)
    contents = {
        "config.json": {key: value for key, value in config.to_dict().items() if key in fields},
        "generation_config.json": generation_config.to_diff_dict(),
    }
    for name, content in contents.items():
        content.pop("transformers_version", None)
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Write all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the folders go (this script's folder)")
    folder = parser.parse_args().folder
    for size in SIZES:
        write_preset(size, folder / size)
        print(folder / size)


if __name__ == "__main__":
    main()
