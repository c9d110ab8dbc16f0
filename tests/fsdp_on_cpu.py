"""Run a script with FSDP2 on the CPU: `accelerate launch --config_file fsdp2.yaml fsdp_on_cpu.py SCRIPT ...`.

Accelerate sets FSDP up where there are accelerators only. This tells it that there is one, and changes nothing else.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import accelerate.accelerator
import accelerate.state
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule

make_state = accelerate.state.AcceleratorState.__init__
prepare_model = accelerate.accelerator.fsdp2_prepare_model


def make_state_with_fsdp(state: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    make_state(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        # as the branch for accelerators ends: both states say FSDP
        accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = fsdp_plugin


def prepare_and_tell(accelerator: Any, model: nn.Module) -> nn.Module:
    model = prepare_model(accelerator, model)
    if accelerator.is_main_process:
        print("sharded:", *sorted(type(part).__name__ for part in model.modules() if isinstance(part, FSDPModule)))
    return model


if __name__ == "__main__":
    accelerate.state.AcceleratorState.__init__ = make_state_with_fsdp
    accelerate.accelerator.fsdp2_prepare_model = prepare_and_tell
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
