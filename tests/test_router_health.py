"""The health of routers: numbers against numpy's, what reaches Trainer's logs, warnings, steps left as they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import pad, random_ids, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_colt5 import CoLT5ForCausalLM, CoLT5ForConditionalGeneration, CoLT5ForTokenClassification
from modeling_colt5.dense_start import DenseStart, DenseStartCallback
from modeling_colt5.router_health import RouterHealthCallback

NAMES = [f"{layer}/{router}" for layer in (0, 1) for router in ("query", "key_value", "feed_forward")]


def token_model(**fields: Any) -> CoLT5ForTokenClassification:
    torch.manual_seed(0)
    return CoLT5ForTokenClassification(tiny_config(num_labels=3, **fields))


def rows(number: int) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, 96, (number, 24), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row.tolist(), "labels": (row % 3).tolist()} for row in ids]


class Integration(TrainerCallback):
    """What an integration of Trainer's gets."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))

    def health(self) -> dict[int, dict[str, float]]:
        return {step: logs for step, logs in self.logs if any(name.startswith("routers/") for name in logs)}


def run(
    folder: Path, model: Any, *callbacks: TrainerCallback, health: dict[str, Any] | None = None, **fields: Any
) -> tuple[Integration, RouterHealthCallback | None]:
    arguments = TrainingArguments(
        str(folder),
        **{
            "max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
            "disable_tqdm": True, "save_strategy": "no", "logging_steps": 2,
        } | fields,
    )  # fmt: skip
    seen = Integration()
    trainer = Trainer(model, arguments, train_dataset=rows(40), callbacks=[seen, *callbacks])
    watcher = None if health is None else RouterHealthCallback(trainer.log, **health)
    if watcher is not None:
        trainer.add_callback(watcher)
    trainer.train()
    return seen, watcher


def keep(states: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    """A hook that keeps a norm's normalised states."""

    def hook(module: torch.nn.Module, args: Any, out: tuple[torch.Tensor, ...]) -> None:
        states[name] = out[0].detach()

    return hook


@pytest.mark.parametrize("side", ["left", "right"])
def test_numbers_are_those_of_numpy(side: str) -> None:
    """Two measurements of padded rows, the routers moved in between."""
    model = token_model().train()
    batch: dict[str, torch.Tensor] = pad([random_ids(24) % 7 + 3, random_ids(17) % 7 + 3], side=side)
    watcher = RouterHealthCallback(lambda numbers: None, unrouted_steps=1)
    watcher._encoder, watcher._batch = model.encoder, batch
    before: dict[str, np.ndarray] = {}
    mask, ids = batch["attention_mask"].bool().numpy(), batch["input_ids"].numpy()
    last_routed: dict[str, dict[int, int]] = {name: {} for name in NAMES}
    for step in (1, 2):
        model.eval()
        with torch.no_grad():
            routing = model(**batch, output_routing=True).routing
            states: dict[str, torch.Tensor] = {}
            for number, block in enumerate(model.encoder.block):
                for part, sublayer in zip(("attention", "feed_forward"), block.layer, strict=True):
                    sublayer.layer_norm.register_forward_hook(keep(states, f"{number}/{part}"))
            model(**batch)
            for block in model.encoder.block:
                for sublayer in block.layer:
                    sublayer.layer_norm._forward_hooks.clear()
        model.train()
        numbers = watcher.measure(model, step)
        assert model.training
        for name, router in watcher.routers().items():
            layer, kind = name.split("/")
            tokens = routing[int(layer)][kind]
            normed = states[f"{layer}/{'feed_forward' if kind == 'feed_forward' else 'attention'}"]
            scores = (normed.double() @ router.weight.detach().double()).numpy()[mask]
            chosen = np.zeros_like(mask)
            for row, (index, valid) in enumerate(zip(tokens.indices.numpy(), tokens.valid.numpy(), strict=True)):
                chosen[row, index[valid]] = True

            def entropy(types: np.ndarray) -> float:
                shares = np.unique(types, return_counts=True)[1] / len(types)
                return -(shares * np.log(shares)).sum()

            own = f"routers/{name}"
            # fp32 beside float64
            assert numbers[f"{own}/score_std"] == pytest.approx(scores.std(), rel=1e-4)
            assert numbers[f"{own}/entropy"] == pytest.approx(entropy(ids[chosen]) / entropy(ids[mask]), rel=1e-4)
            weights = tokens.weights.numpy()[tokens.valid.numpy()]
            assert numbers[f"{own}/saturated"] == pytest.approx((weights > 0.9999).mean())
            types, counts = np.unique(ids[mask], return_counts=True)
            frequent = types[counts * chosen.sum() >= mask.sum()]
            for token in frequent:
                if token in ids[chosen] or token not in last_routed[name]:
                    last_routed[name][token] = step
            assert numbers[f"{own}/unrouted_types"] == sum(step - last_routed[name][token] >= 1 for token in frequent)
            if step == 2:
                overlap = (chosen & before[name]).sum() / before[name].sum()
                assert numbers[f"{own}/overlap"] == pytest.approx(overlap)
            before[name] = chosen
            with torch.no_grad():
                router.weight.copy_(torch.randn_like(router.weight))


class Waits(TorchDispatchMode):
    """Counts the operations for which the host would wait for a GPU, as it needs values or a shape they decide."""

    NAMES = ("_local_scalar_dense", "nonzero", "_unique2", "index.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in self.NAMES)
        return func(*args, **kwargs or {})


def test_the_host_does_not_wait_for_each_router(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for layers in (1, 3):
        model = token_model(num_layers=layers)
        watcher = RouterHealthCallback(lambda numbers: None)
        watcher._encoder, watcher._batch = model.encoder, pad([random_ids(24), random_ids(17)])
        choices = watcher._choices(model)
        monkeypatch.setattr(watcher, "_choices", lambda model, choices=choices: choices)
        for step in (1, 2):
            with Waits() as waits:
                watcher.measure(model, step)
            counts.append(waits.count)
    # `tolist` of a tensor on the CPU is no operation
    assert counts == [0] * 4


def test_numbers_reach_the_logs_of_integrations_beside_the_losses(tmp_path: Path) -> None:
    seen, _ = run(tmp_path, token_model(), health={"interval": 2})
    health = seen.health()
    assert list(health) == [2, 4, 6]
    for step, logs in health.items():
        for name in NAMES:
            own = {key.rsplit("/", 1)[1] for key in logs if key.startswith(f"routers/{name}/")}
            expected = {"saturated", "score_std", "entropy", "unrouted_types", "gradient_norm"}
            assert own == expected | ({"overlap"} if step > 2 else set())
            assert logs[f"routers/{name}/gradient_norm"] > 0
    # nothing of what Trainer logs itself is lost
    assert [step for step, logs in seen.logs if "loss" in logs] == [2, 4, 6]


def seq2seq_model(**fields: Any) -> CoLT5ForConditionalGeneration:
    torch.manual_seed(0)
    return CoLT5ForConditionalGeneration(tiny_config(**fields))


@pytest.mark.parametrize("routers", [1, 2])
def test_cross_attentions_routers_are_measured(tmp_path: Path, routers: int) -> None:
    model = seq2seq_model(routed_cross_key_values=5, num_cross_routers=routers)
    watcher = RouterHealthCallback(lambda numbers: None)
    watcher.on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]
    watcher._first_step.close()
    batch: dict[str, torch.Tensor] = pad([random_ids(24) % 7 + 3, random_ids(17) % 7 + 3])
    watcher._batch = batch | {"labels": random_ids(2, 6)}
    watcher.measure(model, 1)
    chosen = {name: record.chosen for name, record in watcher.records.items()}
    layers = model.eval()(**batch, decoder_input_ids=random_ids(2, 6), output_routing=True).cross_routing
    names = [f"{layer}/cross{own}" for layer in (0, 1, 2) for own in ([""] if routers == 1 else ["_0", "_1"])]
    assert list(chosen) == [*NAMES, *names]
    for name, tokens in zip(names, [tokens for layer in layers for tokens in layer], strict=True):
        for row, places in enumerate(tokens.indices.tolist()):
            assert chosen[name][row].nonzero()[:, 0].tolist() == places
    # and in a run their gradients reach the logs
    seen, _ = run(tmp_path, model, health={"interval": 1}, max_steps=1)
    assert all(seen.health()[1][f"routers/{name}/gradient_norm"] > 0 for name in names)


CAUSAL: dict[str, Any] = {
    "causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": 8, "causal_routed_keys": 4,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("routers", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_layers_are_measured(side: str, routers: int) -> None:
    """Their numbers are those of the weights that the model gives, and of scores in float64."""
    torch.manual_seed(0)
    model = CoLT5ForCausalLM(tiny_config(**CAUSAL, num_causal_key_value_routers=routers)).train()
    watcher = RouterHealthCallback(lambda numbers: None)
    watcher.on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]
    watcher._first_step.close()
    batch: dict[str, torch.Tensor] = pad([random_ids(24) % 7 + 3, random_ids(17) % 7 + 3], side=side)
    watcher._batch = batch
    numbers = watcher.measure(model, 1)
    states: dict[str, torch.Tensor] = {}
    blocks = next(part for part in model.modules() if hasattr(part, "block")).block
    for number, block in enumerate(blocks):
        for part, layer in zip(("attention", "feed_forward"), block.layer, strict=True):
            layer.layer_norm.register_forward_hook(keep(states, f"{number}/{part}"))
    with torch.no_grad():
        routing = model.eval()(**batch, output_routing=True).routing
    mask, ids = batch["attention_mask"].bool().numpy(), batch["input_ids"].numpy()

    def check(own: str, part: str, router: torch.nn.Module, chosen: np.ndarray, weights: np.ndarray) -> None:
        scores = (states[part].double() @ router.weight.detach().double()).numpy()[mask]
        # fp32 beside float64
        assert numbers[f"routers/{own}/score_std"] == pytest.approx(scores.std(), rel=1e-4)
        assert numbers[f"routers/{own}/saturated"] == pytest.approx((weights > 0.9999).mean(), abs=1e-6)
        assert (watcher.records[own].chosen.numpy() == chosen).all() and chosen.any() and not chosen[~mask].any()
        types = {int(token) for token in ids[chosen]}
        assert (numbers[f"routers/{own}/entropy"] > 0) == (len(types) > 1)

    assert len(numbers) == len(blocks) * (2 + routers) * 4
    for number, (block, layer) in enumerate(zip(blocks, routing, strict=True)):
        for kind, own, router, part in (
            ("query", "causal_query", block.layer[0].query_router, "attention"),
            ("feed_forward", "causal_feed_forward", block.layer[1].router, "feed_forward"),
        ):
            weights = layer[kind].numpy()
            check(f"{number}/{own}", f"{number}/{part}", router, weights > 0, weights[weights > 0])
        for group, router in enumerate(block.layer[0].key_value_routers):
            pools = layer.key_value
            ranks, weights, valid = (part[:, group].numpy() for part in (pools.indices, pools.weights, pools.valid))
            chosen, read = np.zeros_like(mask), []
            for row, real in enumerate(mask):
                # a row has no pool behind its end; a rank counts its real tokens
                own_pools = slice(int(real.sum()) // CAUSAL["causal_window"] + 1)
                used = valid[row, own_pools]
                chosen[row, real.nonzero()[0][ranks[row, own_pools][used]]] = True
                read.append(weights[row, own_pools][used])
            own = f"{number}/causal_key_value" + (f"_{group}" if routers > 1 else "")
            check(own, f"{number}/attention", router, chosen, np.concatenate(read))


def test_a_decoders_tokens_are_those_of_its_labels() -> None:
    """Where a batch has no others: each router has the numbers that it has with the ids that the labels stand for."""
    torch.manual_seed(0)
    model = seq2seq_model(**CAUSAL).train()
    ids, labels = random_ids(2, 20), random_ids(2, 17)
    measured = []
    for more in ({}, {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels)}):
        watcher = RouterHealthCallback(lambda numbers: None)
        watcher.on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]
        watcher._first_step.close()
        watcher._batch = {"input_ids": ids, "labels": labels} | more
        measured.append(watcher.measure(model, 1))
    assert measured[0].keys() == measured[1].keys()
    kinds = ("query", "key_value", "feed_forward")
    assert {f"routers/0/causal_{kind}/entropy" for kind in kinds} <= measured[0].keys()
    causal = [name for name in measured[0] if "causal" in name]
    assert [measured[0][name] for name in causal] == pytest.approx([measured[1][name] for name in causal])


@pytest.mark.slow
def test_causal_layers_numbers_reach_the_logs(tmp_path: Path) -> None:
    """Of a language model, and of a decoder behind a routed encoder, whose routers are measured beside its own."""
    torch.manual_seed(0)
    kinds = ("query", "key_value", "feed_forward")
    causal = [f"{layer}/causal_{kind}" for layer in range(3) for kind in kinds]
    for model, names in (
        (CoLT5ForCausalLM(tiny_config(**CAUSAL)), causal),
        (seq2seq_model(**CAUSAL, routed_cross_key_values=5), [*NAMES, "0/cross", "1/cross", "2/cross", *causal]),
    ):
        seen, _ = run(tmp_path, model, health={"interval": 1}, max_steps=1)
        logs = seen.health()[1]
        assert {key.split("/", 1)[1].rsplit("/", 1)[0] for key in logs if key.startswith("routers/")} == set(names)
        assert all(logs[f"routers/{name}/gradient_norm"] > 0 for name in names)


def test_routers_whose_budget_holds_all_tokens_are_not_dead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their weights are all 1, without a gradient, and what they choose does not change: nothing is wrong."""
    fractions = [f"routed_{name}_fraction" for name in ("query", "key_value", "feed_forward")]
    everything = {"routed_cross_key_values": 24} | dict.fromkeys(fractions, 1.0)
    seen, _ = run(tmp_path, seq2seq_model(**everything), health={"interval": 1, "patience": 2}, max_steps=4)
    numbers = seen.health()[4]
    for name in [*NAMES, "0/cross"]:
        assert numbers[f"routers/{name}/overlap"] == numbers[f"routers/{name}/saturated"] == 1
        assert numbers[f"routers/{name}/gradient_norm"] == 0
    assert not [message for message in caplog.messages if message.startswith("Routers")]


@pytest.mark.slow
def test_gradient_norms_are_those_of_all_accumulated_batches(tmp_path: Path) -> None:
    norms = []
    for batch, parts in ((2, 1), (1, 2)):
        fields = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "max_steps": 1}
        seen, _ = run(tmp_path, token_model(), health={"interval": 1}, **fields)
        norms.append([seen.health()[1][f"routers/{name}/gradient_norm"] for name in NAMES])
    # sums in another order
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_training_goes_on_as_without(tmp_path: Path) -> None:
    models = [token_model(dropout_rate=0.1) for _ in range(2)]
    schedule = DenseStart(closed=0.3, opening=0.2, input_share=0.5)
    for model, health in zip(models, (None, {"interval": 2}), strict=True):
        seen, watcher = run(tmp_path, model, DenseStartCallback(schedule), health=health)
    # also in the dense start, whose closed part has no gradient, the whole inputs are read
    assert watcher is not None and list(seen.health()) == [2, 4, 6]
    assert seen.health()[2]["routers/0/query/gradient_norm"] == 0
    assert watcher.records["0/query"].chosen.shape == (2, 24)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # the same sums, perhaps at other addresses in memory
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_routers_without_a_gradient_are_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = token_model()
    # the first layer's queries stay; at so small a temperature all weights of the others would be 1 as well
    model.encoder.block[0].layer[0].query_router.weight.register_hook(torch.zeros_like)
    run(tmp_path, model, health={"interval": 1, "patience": 2}, max_steps=4)
    said = [message for message in caplog.messages if message.startswith("Routers")]
    assert len(said) == 1 and "0/query never learned" in said[0] and "dense start" in said[0]


def test_low_temperature_is_named_as_the_cause(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, token_model(routing_epsilon=1e-3), health={"interval": 1, "patience": 2}, max_steps=3)
    (said,) = [message for message in caplog.messages if message.startswith("Routers")]
    assert "routing_epsilon is 0.001" in said


def test_models_without_routers_are_left_alone(tmp_path: Path) -> None:
    seen, _ = run(tmp_path, token_model(routing="even"), health={"interval": 1}, max_steps=2)
    assert seen.health() == {}


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="interval is 0"):
        RouterHealthCallback(print, interval=0)
