"""Other ways of routing in the router gym, and cross-attention that asks first: what docs/blocks.md reports.

    python benchmarks/router_variants.py --seconds 215 --lanes 6

A run is one of the gym's (router_gym.py) with a variant: fields of the configuration, or methods of the package that
are replaced while it lasts. Its line, with the variant's name, is added to results/router_variants.jsonl; no run that
has a line is done again. The runs that tell most come first.

Variants: "base", this project's routing. "straight_through", weights of 1 with the soft top-k's gradient. "line", the
settings of colt5-attention 0.11.2: straight-through, coordinate descent of 20 iterations with ε from 4 to 0.03.
"gumbel", Gumbel noise on the scores while training, ε = 0.7. "nulls", straight-through, a learned key and value that
every query of the heavy attention may read, and a learned vector for tokens that are not its queries. "shared" and
"asking", the task "cross" with more facts than cross-attention may read, one choice for all tokens of the decoder or
one for each. Lines of "asking_by_rank" are of an earlier way to ask, which is no longer here: two matrices of its own,
of rank 32, made the score instead of the attention's queries and keys (docs/cross_routing.md).
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import router_gym
import torch
from measure import RESULTS
from router_gym import Run, Settings, rounded
from router_tasks import Task
from torch import Tensor, nn
from transformers import HfArgumentParser

from modeling_colt5 import CoLT5Config, model_from_config
from modeling_colt5.model_encoder_layer import CoLT5LayerConditionalAttention, CoLT5RoutedAttention
from modeling_colt5.model_router import CoLT5Routing
from modeling_colt5.op_attention import routed_attention, routed_attention_reference
from modeling_colt5.op_routing import RoutedTokens, route
from modeling_colt5.run_plan import EncoderPlan

FILE = "router_variants.jsonl"
# of the task "cross": facts of an input, and what cross-attention may read of them
FACTS, READ = 32, 8


@dataclass(frozen=True)
class Variant:
    """How a run differs from the gym's.

    Attributes:
        fields: of the configuration.
        straight_through, noise, nulls: see this file's docstring.
        is_tight: whether the input has `FACTS` facts.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    straight_through: bool = False
    noise: bool = False
    nulls: bool = False
    is_tight: bool = False


LINE = {
    "soft_topk_solver": "coordinate_descent", "num_soft_topk_iterations": 20, "routing_epsilon": 0.03,
    "routing_epsilon_init": 4.0, "routing_epsilon_decay": 0.7,
}  # fmt: skip
VARIANTS = {
    "base": Variant(),
    "straight_through": Variant(straight_through=True),
    "line": Variant(LINE, straight_through=True),
    "gumbel": Variant({"routing_epsilon": 0.7}, noise=True),
    "nulls": Variant(straight_through=True, nulls=True),
    "shared": Variant({"routed_cross_key_values": READ}, is_tight=True),
    "asking": Variant({"routed_cross_key_values": READ, "asking_cross_routing": True}, is_tight=True),
}


@dataclass
class Arguments:
    """What to do."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS), metadata={"help": " ".join(VARIANTS)})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "all variants with each in turn"})
    budgets: list[int] = field(default_factory=lambda: [64, 16], metadata={"help": "one query among so many tokens"})
    length: int = field(default=2048, metadata={"help": "tokens of an input"})
    steps: int = field(default=2000, metadata={"help": "steps of a run"})
    seconds: float = field(default=float("inf"), metadata={"help": "begin no further run after these"})
    lanes: int = field(default=4, metadata={"help": "runs at a time on the GPU; on a CPU one"})
    out: Path = field(default=RESULTS, metadata={"help": "folder of the results"})


def selecting(variant: Variant) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """What stands in for `CoLT5Routing.forward`; a dense start stays as it is."""

    def forward(
        self: nn.Module, scores: Tensor, budget: Tensor, capacity: int, mask: Tensor | None, settings: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        is_dense = settings.get("soft_budget") is not None
        if variant.noise and self.training and not is_dense:
            uniform = torch.rand_like(scores, dtype=torch.float32).clamp(1e-9, 1 - 1e-7)
            scores = scores - (-uniform.log()).log()
        routed = route(scores, budget, capacity, mask=mask, **settings)
        weights = routed.weights
        if variant.straight_through and not is_dense:
            weights = torch.where(routed.valid, weights + (1 - weights).detach(), 0)
        return routed.indices, weights, routed.valid

    return forward


class NullAttention(CoLT5RoutedAttention):
    """A learned key and value beside the routed ones, as if far before all of them."""

    def __init__(self, d_model: int, d_kv: int, num_heads: int, **more: Any):
        super().__init__(d_model, d_kv, num_heads, **more)
        self.null = nn.Parameter(torch.randn(2, num_heads, d_kv) * d_model**-0.5)

    def forward(
        self,
        query_states: Tensor,
        key_value_states: Tensor,
        bias_table: Tensor,
        queries: RoutedTokens,
        keys: RoutedTokens,
        plan: EncoderPlan,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """As of the class that this one stands in for, without dropout, which the gym has none of."""
        query = self.split_heads(self.q(query_states))
        key, value = (self.split_heads(part(key_value_states)) for part in (self.k, self.v))
        null_key, null_value = (part.to(key.dtype).expand(len(key), 1, -1, -1) for part in self.null)
        places = nn.functional.pad(keys.indices, (1, 0), value=-(10**6))
        valid = nn.functional.pad(keys.valid, (1, 0), value=True)
        key, value = torch.cat([null_key, key], 1), torch.cat([null_value, value], 1)
        inputs = (query, key, value, bias_table, queries.indices, places, valid)
        if plan.implementation.fuses_attention:
            return self.o(routed_attention(*inputs, 0.0).flatten(-2)), None
        attend = partial(self.attend, implementation=plan.implementation.attention)
        return self.o(routed_attention_reference(*inputs, attend)[0].flatten(-2)), None


class NullLayer(CoLT5LayerConditionalAttention):
    """A learned vector for tokens without a heavy part."""

    def __init__(self, d_model: int, d_kv: int, num_light_heads: int, num_heavy_heads: int, **more: Any):
        super().__init__(d_model, d_kv, num_light_heads, num_heavy_heads, **more)
        self.heavy_attention = NullAttention(d_model, d_kv, num_heavy_heads, dropout_rate=more["dropout_rate"])
        self.null_query = nn.Parameter(torch.zeros(d_model))

    def forward(
        self, hidden_states: Tensor, *more: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, RoutedTokens | None, RoutedTokens | None]:
        """As of the class that this one stands in for."""
        output, light, heavy, queries, keys = super().forward(hidden_states, *more)
        assert queries is not None
        routed = torch.zeros(output.shape[:2], dtype=torch.bool, device=output.device)
        routed = routed.scatter(1, queries.indices, queries.valid)
        return output + self.null_query.to(output.dtype) * ~routed[..., None], light, heavy, queries, keys


def train(name: str, run: Run, settings: Settings, device: torch.device) -> dict[str, Any]:
    """Do a run of a variant; its line of the results."""
    variant, make_config, task_of = VARIANTS[name], router_gym.make_config, router_gym.task_of

    def own_config(run: Run, settings: Settings) -> CoLT5Config:
        own = make_config(run, settings).to_dict() | variant.fields
        del own["auto_map"]
        return CoLT5Config.from_dict(own)

    with contextlib.ExitStack() as stack:

        def replace(where: Any, attribute: str, by: Any) -> None:
            stack.enter_context(mock.patch.object(where, attribute, by))

        replace(router_gym, "make_config", own_config)
        if variant.is_tight:
            replace(router_gym, "task_of", lambda run: Task(run.task, FACTS))
        if variant.straight_through or variant.noise:
            replace(CoLT5Routing, "forward", selecting(variant))
        if variant.nulls:
            replace(model_from_config, "CoLT5LayerConditionalAttention", NullLayer)
        line = router_gym.train(run, settings, device)
    assert router_gym.task_of is task_of
    # the curve without what routers did on the way
    curve = [{key: point[key] for key in ("step", "accuracy", "loss")} for point in line["curve"]]
    return rounded({"variant": name} | line | {"curve": curve})


def jobs(arguments: Arguments) -> list[tuple[str, Run]]:
    """All runs that are asked for, the most telling first."""
    of_encoders = (
        ("base", "marked", "learned"), ("straight_through", "marked", "learned"), ("line", "facts", "as_shipped"),
        ("gumbel", "facts", "as_shipped"), ("nulls", "marked", "learned"),
    )  # fmt: skip
    listed = []
    for seed in arguments.seeds:
        for budget in arguments.budgets:
            listed += [(*job, 1 / budget, seed) for job in of_encoders]
        listed += [(name, "cross", "learned", 1 / 16, seed) for name in ("shared", "asking")]
    return [
        (name, Run(task, arm, arguments.length, fraction, seed, arguments.steps))
        for name, task, arm, fraction, seed in listed
        if name in arguments.variants
    ]


def missing_jobs(arguments: Arguments, settings: Settings) -> list[tuple[str, Run]]:
    """Those of them that have no line."""
    path = arguments.out / FILE
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    names, same = list(Run.__dataclass_fields__), json.loads(json.dumps(asdict(settings)))
    done = [(line["variant"], *(line[name] for name in names)) for line in lines if line["settings"] == same]
    return [job for job in jobs(arguments) if (job[0], *rounded(asdict(job[1])).values()) not in done]


def work(lane: int, listed: list[tuple[str, Run]], taken: Any, settings: Settings, out: Path, deadline: float) -> None:
    """One lane's process: take the next run until there is none, or no time."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    while time.time() < deadline:
        with taken.get_lock():
            number = taken.value
            taken.value += 1
        if number >= len(listed):
            return
        line = train(*listed[number], settings, device)
        with taken.get_lock(), (out / FILE).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{listed[number]}: {line['accuracy']:.3f} in {line['seconds']:.0f} s", flush=True)


def main(argv: list[str] | None = None, settings: Settings | None = None) -> None:
    """Do the runs that are missing."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    if unknown := set(arguments.variants) - set(VARIANTS):
        raise ValueError(f"variants has {', '.join(sorted(unknown))}; there are {', '.join(VARIANTS)}")
    settings, deadline = settings or Settings(), time.time() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    listed = missing_jobs(arguments, settings)
    lanes = min(len(listed), arguments.lanes if torch.cuda.is_available() else 1)
    taken = torch.multiprocessing.get_context("spawn").Value("i", 0)
    shared = (listed, taken, settings, arguments.out, deadline)
    if lanes == 1:
        work(0, *shared)
    elif lanes > 1:
        torch.multiprocessing.spawn(work, shared, nprocs=lanes)


if __name__ == "__main__":
    main(sys.argv[1:])
