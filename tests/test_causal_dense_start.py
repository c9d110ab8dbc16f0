"""The dense start of causally routed decoders: a walk over tokens in float64, causality, kernels, `Trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import pad, random_ids, tiny_config
from torch import nn
from transformers import DynamicCache, Trainer, TrainingArguments

from modeling_colt5 import (
    CoLT5CausalConditionalAttention,
    CoLT5CausalConditionalFeedForward,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    set_dense_start,
    soft_topk,
)
from modeling_colt5.dense_start import DenseStart, DenseStartCallback, DenseStartCosts
from modeling_colt5.op_gates import dense_gates
from modeling_colt5.op_pools import routed_pools

WINDOW = 8


def training_model(kind: type = CoLT5ForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    causal = {"causal_attention": "routed", "causal_feed_forward": "routed", "causal_window": WINDOW}
    return kind(tiny_config(**causal | {"num_heavy_heads": 4, "causal_routed_keys": 12} | fields)).train()


def size(length: int, budget: int, progress: float) -> float:
    """The sum of the weights of `length` tokens: 0.9 of them at first, the soft top-k of the budget at last."""
    first, last = 0.9 * length, 9 / 8 * min(budget, length)
    return first * (last / first) ** progress


def threshold(scores: torch.Tensor, k: float) -> torch.Tensor:
    """t of the soft top-k, out of its smallest weight exp(s - t)."""
    weights = soft_topk(scores, k)
    lowest = scores.argmin()
    return scores[lowest] - weights[lowest].log()


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_gates_give_every_token_the_weight_that_the_window_before_says(progress: float) -> None:
    torch.manual_seed(0)
    scores, budget = torch.randn(2, 3, WINDOW, dtype=torch.float64), 2
    k = size(WINDOW, budget, progress)
    total = torch.tensor([3 * WINDOW, WINDOW + 5])
    gates = dense_gates(scores, total, torch.tensor(k, dtype=torch.float64), 1.0, torch.tensor(progress))
    for row, length in enumerate(total.tolist()):
        for token in range(3 * WINDOW):
            window, slot = divmod(token, WINDOW)
            expected = 0.0
            if token < length:
                expected = k / WINDOW
                if window > 0:
                    exponent = scores[row, window, slot] - threshold(scores[row, window - 1], k)
                    expected = exponent.clamp(max=0).exp().item()
            assert gates.weights[row, window, slot].item() == pytest.approx(expected, abs=1e-9)
            assert bool(gates.routed[row, window, slot]) is (token < length)
    assert gates.tokens.valid.sum() == total.sum()


def test_no_weight_is_above_one_where_the_budget_is_all_tokens() -> None:
    k = torch.tensor(9 / 8 * WINDOW)
    total = torch.tensor([2 * WINDOW])
    gates = dense_gates(torch.randn(1, 2, WINDOW), total, k, 1.0, torch.tensor(1.0))
    assert torch.equal(gates.weights, torch.ones(1, 2, WINDOW))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_pools_hold_all_earlier_windows(backend: str, progress: float, device: torch.device) -> None:
    torch.manual_seed(0)
    windows, budget = 3, 12
    length = windows * WINDOW
    scores = torch.randn(2, length).to(device).requires_grad_()
    sizes = [size(window * WINDOW, budget, progress) if window else 0.0 for window in range(windows + 1)]
    k = torch.tensor(sizes, device=device)
    pools = routed_pools(
        scores, WINDOW, length, None, dense_start=(k.repeat(2), torch.tensor(progress, device=device)), epsilon=1.0,
        soft_topk_ratio=9 / 8, kernel_backend=backend,
    )  # fmt: skip
    for row in range(2):
        for window in range(windows + 1):
            before = window * WINDOW
            tokens = [part[row, window] for part in (pools.tokens.indices, pools.tokens.weights, pools.tokens.valid)]
            assert tokens[0][tokens[2]].tolist() == list(range(before))
            if before:
                expected = soft_topk(scores[row, :before].detach().double(), k[window].item()).float()
                # fp32 scores, and coordinates of an optimum move as little as they do
                torch.testing.assert_close(tokens[1][tokens[2]], expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(pools.tokens.weights.sum(), scores)
    # the threshold is a constant: each weight's derivative is itself, summed over the pools that hold the token
    weights = pools.tokens.weights.masked_fill(~pools.tokens.valid, 0)
    expected = torch.zeros(2, length, device=device).scatter_add_(
        1, pools.tokens.indices.clamp(max=length - 1).flatten(1), weights.detach().flatten(1)
    )
    torch.testing.assert_close(gradient, expected * (progress > 0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("progress", [0.0, 0.6])
def test_no_output_depends_on_a_later_token(progress: float) -> None:
    model = training_model(dtype=torch.float64)
    model.set_dense_start(progress)
    ids = random_ids(1, 30)
    changed = ids.clone()
    changed[0, 19:] = random_ids(11)
    first, second = (model(input_ids=row).logits[0] for row in (ids, changed))
    # float64: a processor may round otherwise where other numbers stand beside a token's
    torch.testing.assert_close(first[:19], second[:19], rtol=0, atol=1e-12)
    assert (first[19:] - second[19:]).abs().max() > 1e-3


def test_every_token_gets_a_heavy_part_from_all_before() -> None:
    """The first token reaches the last one's output over more windows than the pools' budget has tokens."""
    model = training_model(causal_routed_keys=2, routed_query_fraction=0.1, local_radius=2, num_decoder_layers=1)
    ids = random_ids(1, 40)
    for progress, reaches in ((0.0, True), (None, False)):
        model.set_dense_start(progress)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, -1].sum(), embeds)
        touched = gradient[0, : 40 - WINDOW].abs().sum(-1) > 0
        assert bool(touched.all()) is reaches


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    model = training_model()
    model.set_dense_start(0.5)
    rows = [random_ids(17), random_ids(30)]
    batch = pad(rows, side=side)
    together = model(**batch).logits
    for row, mask, logits in zip(rows, batch["attention_mask"], together, strict=True):
        alone = model(input_ids=row[None]).logits[0]
        # fp32 sums of rows of another length
        torch.testing.assert_close(logits[mask.bool()], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_kernels_agree_with_pytorch(device: torch.device) -> None:
    model, found = training_model(num_decoder_layers=1).to(device), []
    model.set_dense_start(0.4)
    batch = {name: tensor.to(device) for name, tensor in pad([random_ids(12), random_ids(9)]).items()}
    for backend in ("torch", "triton"):
        model.config.kernel_backend = backend
        logits = model(**batch).logits
        loss = (logits.float().log_softmax(-1)[..., 5] * batch["attention_mask"]).sum()
        found.append([logits * batch["attention_mask"][..., None], *torch.autograd.grad(loss, model.parameters())])
    for expected, ours in zip(*found, strict=True):
        # fp32 sums in another order, of gradients that add up over all tokens and are some units large
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_routers_are_constant_while_closed_and_learn_while_opening() -> None:
    for model in (training_model(), training_model(CoLT5ForConditionalGeneration)):
        inputs = {"input_ids": random_ids(2, 30), "labels": random_ids(2, 30)}
        for progress, learns in ((0.0, False), (0.3, True)):
            model.set_dense_start(progress)
            model.zero_grad()
            model(**inputs).loss.backward()
            for name, parameter in model.named_parameters():
                assert bool(parameter.grad.any()) is (learns or "router" not in name), name


def test_evaluation_and_caches_are_the_papers() -> None:
    model = training_model()
    ids = random_ids(1, 20)
    expected = model.eval()(input_ids=ids).logits
    model.set_dense_start(0.0)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 23)
    assert model.train()(input_ids=ids, use_cache=True).cache is None
    with pytest.raises(ValueError, match="cache is given during a dense start"):
        model(input_ids=ids, cache=DynamicCache(config=model.config))


def test_models_without_causal_routers_are_refused() -> None:
    model = training_model(causal_attention="full", causal_feed_forward="dense")
    with pytest.raises(ValueError, match="no learned routers"):
        model.set_dense_start(0.0)


@pytest.mark.parametrize("kind", [CoLT5CausalConditionalAttention, CoLT5CausalConditionalFeedForward])
def test_stand_alone_modules_have_it(kind: type) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"heavy_d_ff": 64, "light_d_ff": 32}
    if kind is CoLT5CausalConditionalAttention:
        sizes = {"num_light_heads": 2, "num_heavy_heads": 2, "d_kv": 8, "local_radius": 4}
    module = nn.Sequential(kind(32, causal_window=WINDOW, **sizes)).train()
    states = torch.randn(1, 30, 32)
    set_dense_start(module, 0.5)
    _, routing = module[0](states, output_routing=True)
    weights = routing if isinstance(routing, torch.Tensor) else routing.query
    assert (weights > 0).sum() == 30
    with pytest.raises(ValueError, match="cache is given during a dense start"):
        module[0](states, cache=module[0].make_cache())


def test_run_of_trainer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, seen = training_model(num_decoder_layers=1), []
    ids = random_ids(6, 32).tolist()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    callback = DenseStartCallback(DenseStart(closed=0.3, opening=0.2, input_share=0.5), input_length=32)
    run = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])  # type: ignore[arg-type]
    model.decoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.shape[1]))
    run.train()
    assert seen == [16] * 5 + [32] * 5
    assert model.config.routers_trained
    # what `DenseStartCosts` says of causal models, whose formulas test_causal_costs.py compares with PyTorch
    costs = DenseStartCosts.of(model.config, 32, 0.5, fused_attention=False, causal=True)
    assert f"{costs.flops:.2f} times the decoder's operations of a later step" in caplog.text
