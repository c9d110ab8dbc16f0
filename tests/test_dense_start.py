"""The dense start: its weights and their gradient, its schedule, shorter inputs, and runs of Trainer with it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import pad, random_ids, tiny_config, tiny_model
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modeling_colt5 import (
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForQuestionAnswering,
    CoLT5ForTokenClassification,
    CoLT5Tokenizer,
    CoLT5VisionConfig,
)
from modeling_colt5.denoising import DataCollatorForDenoising, SpanCorruption, chunk_documents
from modeling_colt5.dense_start import (
    DenseStart,
    DenseStartCallback,
    DenseStartCosts,
    ShortenDenoising,
    length_of,
    shorten,
    shorten_documents,
)
from modeling_colt5.model_router import CoLT5Router
from modeling_colt5.op_routing import dense_start_weights
from modeling_colt5.run_budgets import DENSE_SHARE, dense_start_budget

ROOT = Path(__file__).resolve().parents[1]


def training_model(model_class: Any = CoLT5EncoderModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    return tiny_model(model_class, **fields).train()


def routed(model: CoLT5EncoderModel, **inputs: torch.Tensor) -> Any:
    return model.encoder(**inputs, output_routing=True).routing


def test_budget_goes_in_equal_factors_from_dense_to_the_configured_one() -> None:
    lengths = torch.tensor([100, 40])
    budgets = [
        dense_start_budget(lengths, (1 / 16, 1 / 8), 9 / 8, torch.tensor(p)) for p in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    torch.testing.assert_close(budgets[0], DENSE_SHARE * lengths.repeat(2).float())
    torch.testing.assert_close(budgets[-1], 9 / 8 * torch.tensor([100 / 16, 40 / 16, 100 / 8, 40 / 8]))
    factors = torch.stack(budgets[1:]) / torch.stack(budgets[:-1])
    torch.testing.assert_close(factors, factors[:1].expand(4, -1))


def test_weights_have_the_derivative_of_a_constant_threshold() -> None:
    threshold, epsilon = 0.3, 0.7
    scores = torch.tensor([[-1.0, 0.0, 0.2]], requires_grad=True)

    def weights_at(scores: torch.Tensor) -> torch.Tensor:
        return ((scores.detach().double() - threshold) / epsilon).exp()

    weights = weights_at(scores)
    got = dense_start_weights(weights.float(), scores, epsilon, torch.tensor(0.5))
    torch.testing.assert_close(got, weights.float())
    (gradient,) = torch.autograd.grad(got.sum(), scores)
    step = 1e-6
    expected = (weights_at(scores.double() + step) - weights_at(scores.double() - step)) / (2 * step)
    torch.testing.assert_close(gradient, expected.float())


def test_saturated_weights_have_a_gradient_and_closed_ones_none() -> None:
    scores = torch.tensor([[5.0, 1.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 0.5]])
    (gradient,) = torch.autograd.grad(dense_start_weights(weights, scores, 2.0, torch.tensor(0.1)).sum(), scores)
    torch.testing.assert_close(gradient, weights / 2)
    (gradient,) = torch.autograd.grad(dense_start_weights(weights, scores, 2.0, torch.tensor(0.0)).sum(), scores)
    assert not gradient.any()


# the interpreter takes two seconds a layer; test_kernels_agree_with_pytorch has the kernels' gradients too
@pytest.mark.parametrize(
    ("backend", "progress"),
    [
        *(("torch", progress) for progress in (0.0, 0.5, 1.0)),
        ("triton", 0.5),
        *(pytest.param("triton", progress, marks=pytest.mark.slow) for progress in (0.0, 1.0)),
    ],
)
def test_every_token_is_routed_and_weights_sum_to_the_soft_budget(
    backend: str, progress: float, device: torch.device
) -> None:
    model = training_model(kernel_backend=backend, num_layers=1 if backend == "triton" else 2).to(device)
    model.set_dense_start(progress)
    batch = {name: tensor.to(device) for name, tensor in pad([random_ids(30), random_ids(17)]).items()}
    lengths = torch.tensor([30, 17], device=device)
    config = model.config
    for layer in routed(model, **batch):
        for name, tokens in (
            ("query", layer.query),
            ("key_value", layer.key_value),
            ("feed_forward", layer.feed_forward),
        ):
            torch.testing.assert_close(tokens.valid.sum(1), lengths)
            final = getattr(config, f"routed_{name}_fraction") * config.soft_topk_ratio
            share = DENSE_SHARE * (final / DENSE_SHARE) ** progress
            # the sum of 30 weights of fp32
            torch.testing.assert_close(tokens.weights.sum(1), lengths * share, rtol=1e-4, atol=1e-4)


def test_kernels_agree_with_pytorch(device: torch.device) -> None:
    results = {}
    for backend in ("torch", "triton"):
        # the interpreter takes some five seconds a layer
        model = training_model(kernel_backend=backend, num_layers=1).to(device)
        model.set_dense_start(0.4)
        batch = pad([random_ids_seeded(30), random_ids_seeded(17)])
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        out = model(**batch).last_hidden_state * batch["attention_mask"][..., None]
        torch.manual_seed(1)
        (out * torch.randn_like(out)).sum().backward()
        results[backend] = [out, *(parameter.grad for parameter in model.parameters())]
    for ours, theirs in zip(results["triton"], results["torch"], strict=True):
        # sums in another order, through two sublayers
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def random_ids_seeded(length: int) -> torch.Tensor:
    return torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(length))


def test_padding_changes_nothing() -> None:
    model = training_model()
    model.set_dense_start(0.5)
    row = random_ids(17)
    alone = model(row[None]).last_hidden_state
    for side in ("left", "right"):
        both = model(**pad([row, random_ids(30)], side=side)).last_hidden_state[0]
        both = both[:17] if side == "right" else both[-17:]
        # another batch, another order of sums
        torch.testing.assert_close(both, alone[0], rtol=1e-4, atol=1e-4)


def test_routers_are_constant_while_closed_and_learn_while_opening() -> None:
    model = training_model()
    for progress, learns in ((0.0, False), (0.3, True)):
        model.set_dense_start(progress)
        model.zero_grad()
        out = model(random_ids(2, 30)).last_hidden_state
        (out * torch.randn_like(out)).sum().backward()
        routers = [module for module in model.modules() if isinstance(module, CoLT5Router)]
        assert routers
        for router in routers:
            assert bool(router.weight.grad.any()) is learns


def test_evaluation_is_the_papers_routing_throughout() -> None:
    model, ids = training_model(), random_ids(2, 30)
    fresh = copy.deepcopy(model).eval()(ids).last_hidden_state
    model.set_dense_start(0.0)
    torch.testing.assert_close(model.eval()(ids).last_hidden_state, fresh)
    assert not torch.allclose(model.train()(ids).last_hidden_state, fresh)
    model.set_dense_start(None)
    torch.testing.assert_close(model.train()(ids).last_hidden_state, fresh)


def test_nothing_of_it_is_saved(tmp_path: Path) -> None:
    model = training_model()
    before = model.config.to_dict()
    model.set_dense_start(0.2)
    assert model.config.to_dict() == before
    model.save_pretrained(tmp_path)
    loaded = CoLT5EncoderModel.from_pretrained(tmp_path)
    assert loaded.encoder.dense_start is None


def test_bad_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="progress is 1.5"):
        training_model().set_dense_start(1.5)
    with pytest.raises(ValueError, match="routing='even'"):
        training_model(routing="even").set_dense_start(0.0)
    for fields, message in (
        ({"closed": 1.0}, "closed is 1.0"),
        ({"opening": 0.0}, "opening is 0.0"),
        ({"closed": 0.6, "opening": 0.4}, "closed \\+ opening is 1.0"),
        ({"input_share": 0.0}, "input_share is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DenseStart(**fields)


def test_schedule() -> None:
    schedule = DenseStart(closed=0.5, opening=0.1)
    at = [schedule.progress(step, 100) for step in range(100)]
    assert at[:51] == [0.0] * 51
    torch.testing.assert_close(torch.tensor(at[50:60]), torch.arange(10) / 10)
    assert at[60:] == [None] * 40
    # runs of a few steps: nothing is divided by zero, and the last step of all is the paper's
    for steps in range(1, 12):
        few = [schedule.progress(step, steps) for step in range(steps)]
        assert all(progress is None or 0 <= progress < 1 for progress in few)
    assert [DenseStart(closed=0.1, opening=0.2).progress(step, 10) for step in (1, 2, 3)] == [0.0, 0.5, None]


def test_costs_are_said_before_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = DenseStartCallback(DenseStart(0.5, 0.1, 1.0), input_length=2048)
    trainer(tmp_path, token_model(), callback).train()
    costs = DenseStartCosts.of(tiny_config(), 2048, 1.0, fused_attention=False)
    assert costs.memory > 1.5
    said = "\n".join(caplog.messages)
    assert "until step 6 of 10" in said and f"{costs.flops:.2f} times" in said
    assert f"input_share={costs.largest_share} keeps it at 1.5" in said


def test_costs_are_said_after_the_first_step_for_its_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, token_model(), DenseStartCallback(DenseStart(0.5, 0.1, 0.5))).train()
    costs = DenseStartCosts.of(tiny_config(), 16, 0.5, fused_attention=False)
    (said,) = (message for message in caplog.messages if message.startswith("Dense start"))
    assert "For inputs of 16 tokens" in said and f"{costs.flops:.2f} times" in said


def test_length_of_inputs_is_that_of_tokens_or_patches() -> None:
    ids = {"input_ids": random_ids(2, 9)}
    assert length_of(ids, tiny_config()) == 9 == length_of({"inputs_embeds": torch.zeros(2, 9, 4)}, tiny_config())
    assert length_of({"labels": ids["input_ids"]}, tiny_config()) is None
    assert length_of({"pixel_values": torch.zeros(2, 3, 33, 16)}, CoLT5VisionConfig()) == 3


def test_a_callback_shortens_for_the_model_of_its_run(tmp_path: Path) -> None:
    callback = DenseStartCallback(SCHEDULE)
    control = TrainerControl()
    batch = {"input_ids": random_ids(2, 16), "labels": random_ids(2, 16)}
    for model_class, labels in ((CoLT5ForTokenClassification, 8), (CoLT5ForConditionalGeneration, 16)):
        model = training_model(model_class)
        callback.on_train_begin(None, TrainerState(max_steps=10), control, model=model)  # type: ignore[arg-type]
        _, short = callback._shorten_inputs(model, (), batch)  # type: ignore[misc]
        assert short["labels"].shape == (2, labels)
        callback.on_train_end(None, TrainerState(), control)  # type: ignore[arg-type]


@pytest.mark.slow
def test_frozen_routers_get_no_dense_start(tmp_path: Path) -> None:
    model, seen = token_model(), Seen()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("router" not in name)
    trainer(tmp_path, model, DenseStartCallback(SCHEDULE), seen).train()
    assert seen.progress == [None] * 10 and not model.config.routers_trained


def test_shorter_targets_are_averaged_over_what_is_left() -> None:
    """Trainer divides the summed loss by its count of labels, which it takes before anything is cut."""
    model = training_model(CoLT5ForTokenClassification, num_labels=3)
    ids = random_ids(2, 16)
    whole = {"input_ids": ids, "labels": ids % 3, "num_items_in_batch": torch.tensor(32)}
    expected = model(**shorten({"input_ids": ids, "labels": ids % 3}, 0.5)).loss
    callback = DenseStartCallback(SCHEDULE, shorten)
    callback.on_train_begin(None, TrainerState(max_steps=10), TrainerControl(), model=model)  # type: ignore[arg-type]
    torch.testing.assert_close(model(**whole).loss, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_shorter_inputs_begin_at_the_first_real_token(side: str) -> None:
    rows = [random_ids(20), random_ids(9)]
    batch: dict[str, Any] = pad(rows, side=side)
    batch["labels"] = batch["input_ids"] * 10
    short = shorten(batch, 1 / 4)
    for row, ids, mask, labels in zip(rows, short["input_ids"], short["attention_mask"], short["labels"], strict=True):
        assert ids.tolist() == row[:5].tolist() and mask.all() and labels.tolist() == (row[:5] * 10).tolist()
    assert batch["input_ids"].shape == (2, 20)


def test_answers_stay_in_shorter_inputs_with_their_question() -> None:
    length, share = 40, 1 / 4
    rows = [random_ids(40), random_ids(31)]
    for side in ("left", "right"):
        batch: dict[str, Any] = pad(rows, side=side)
        mask = batch["attention_mask"]
        for first in range(31):
            for tokens in (1, 3):
                last = min(first + tokens - 1, 30)
                begin = mask.ne(0).int().argmax(1)
                batch |= {"start_positions": begin + first, "end_positions": begin + last}
                short = shorten(batch, share)
                assert short["input_ids"].shape == (2, length * share)
                for row, ids, real, start, end in zip(
                    rows,
                    short["input_ids"],
                    short["attention_mask"],
                    short["start_positions"],
                    short["end_positions"],
                    strict=True,
                ):
                    # the question is at the beginning
                    assert ids[:5].tolist() == row[:5].tolist()
                    if first >= 5 or last < 10:
                        assert ids[start : end + 1].tolist() == row[first : last + 1].tolist()
                        assert real[start : end + 1].all()
    # longer than what stays: its beginning does
    batch |= {"start_positions": torch.tensor([7, 7]), "end_positions": torch.tensor([30, 30])}
    short = shorten(batch, share)
    assert [ids[start].item() for ids, start in zip(short["input_ids"], short["start_positions"], strict=True)] == [
        row[7].item() for row in (batch["input_ids"])
    ]
    assert short["end_positions"].tolist() == [9, 9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_that_the_loss_leaves_out_stay_so(side: str) -> None:
    """Beyond the input, or in padding: the loss is that of the answers that there are."""
    model = training_model(CoLT5ForQuestionAnswering)
    batch: dict[str, Any] = pad([random_ids(40), random_ids(31), random_ids(20)], side=side)
    begin = batch["attention_mask"].ne(0).int().argmax(1)
    padding = 5 if side == "left" else 25
    batch["start_positions"] = torch.stack([begin[0] + 2, torch.tensor(40), torch.tensor(padding)])
    batch["end_positions"] = torch.stack([begin[0] + 3, torch.tensor(40), torch.tensor(padding)])
    short = shorten(batch, 1 / 4)
    assert short["start_positions"].tolist() == [2, 10, 10] and short["end_positions"].tolist() == [3, 10, 10]
    alone = {name: value[:1] for name, value in short.items()}
    torch.testing.assert_close(model(**short).loss, model(**alone).loss)
    # those without an answer are cut as without positions
    plain = shorten({name: batch[name] for name in ("input_ids", "attention_mask")}, 1 / 4)
    assert torch.equal(short["input_ids"], plain["input_ids"])


def test_labels_of_classes_are_not_cut() -> None:
    """Several classes are right at a time, and there are as many classes as tokens."""
    labels = torch.ones(2, 8)
    short = shorten({"input_ids": random_ids(2, 8), "labels": labels}, 1 / 4)
    assert short["input_ids"].shape == (2, 2) and short["labels"] is labels


def test_targets_of_documents_stay_whole() -> None:
    batch = {
        "inputs_embeds": torch.randn(2, 10, 4),
        "labels": random_ids(2, 10),
        "decoder_input_ids": random_ids(2, 10),
    }
    short = shorten_documents(batch, 0.55)
    assert short["inputs_embeds"].shape == (2, 6, 4)
    assert short["labels"] is batch["labels"] and short["decoder_input_ids"] is batch["decoder_input_ids"]


@pytest.fixture
def denoising() -> tuple[dict[str, torch.Tensor], ShortenDenoising]:
    """Three rows of span corruption of running text, and what shortens them."""
    tokenizer = CoLT5Tokenizer.from_pretrained(ROOT / "tokenization/python_stdlib")
    collator = DataCollatorForDenoising(tokenizer, 256, denoiser=SpanCorruption(), seed=0)
    tokens = torch.randint(100, 4000, (2000,)).numpy()
    rows = [chunk for _, chunk in zip(range(3), chunk_documents([{"input_ids": tokens}], collator), strict=False)]
    return dict(collator(rows)), ShortenDenoising(collator.sentinels)


def spans(tokens: list[int], sentinels: tuple[int, ...]) -> dict[int, list[int]]:
    """A target's spans by their sentinels; what comes before the first is left out."""
    found: dict[int, list[int]] = {}
    for token in tokens:
        if token in sentinels:
            found[token] = current = []
        elif found and token >= 0:
            current.append(token)
    return found


@pytest.mark.parametrize("padded", ["no", "right", "left"])
def test_shorter_denoising_reads_a_stretch_and_asks_for_its_spans(
    denoising: tuple[dict[str, torch.Tensor], ShortenDenoising], padded: str
) -> None:
    batch, shorten = denoising
    batch = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    if padded != "no":
        empty = {"input_ids": torch.zeros(3, 64, dtype=torch.int64), "attention_mask": torch.zeros(3, 64).long()}
        for name, part in empty.items():
            whole = (batch[name], part) if padded == "right" else (part, batch[name])
            batch[name] = torch.cat(whole, 1)
    share = 64 / batch["input_ids"].shape[1]
    short = shorten(batch, share)
    assert short["input_ids"].shape == (3, 64) and short["attention_mask"].all()
    for row in range(3):
        ids, whole = short["input_ids"][row].tolist(), batch["input_ids"][row].tolist()
        assert any(whole[at : at + 64] == ids for at in range(len(whole)))
        seen = [token for token in ids if token in shorten.sentinels]
        asked = spans(short["labels"][row].tolist(), shorten.sentinels)
        all_asked = spans(batch["labels"][row].tolist(), shorten.sentinels)
        assert seen and list(asked) == seen
        assert asked == {sentinel: all_asked[sentinel] for sentinel in seen}
        # the target begins with the stretch's first span
        assert short["labels"][row, 0] == seen[0]
        # neither the other rows nor padding decide what is read of one
        alone = shorten({name: part[row : row + 1] for name, part in batch.items()}, share)
        assert torch.equal(alone["input_ids"][0], short["input_ids"][row])


def test_padding_does_not_move_the_stretch(denoising: tuple[dict[str, torch.Tensor], ShortenDenoising]) -> None:
    batch, shorten = denoising
    expected = shorten({name: batch[name] for name in ("input_ids", "labels")}, 1 / 4)["input_ids"]
    zeros = torch.zeros(3, 64, dtype=torch.int64)
    for order in (1, -1):
        padded = {name: torch.cat((batch[name], zeros)[::order], 1) for name in ("input_ids", "attention_mask")}
        assert torch.equal(shorten(padded | {"labels": batch["labels"]}, 1 / 5)["input_ids"], expected)


def test_stretches_lie_everywhere_alike() -> None:
    ids, spare = torch.randint(3, 30_000, (4000, 40), generator=torch.Generator().manual_seed(0)), 20
    ids[:, 0] = torch.arange(4000) + 30_000
    short = ShortenDenoising((1,))({"input_ids": ids, "labels": torch.zeros(4000, 1).long()}, 0.5)["input_ids"]
    starts = (ids[:, : spare + 1] == short[:, :1]).int().argmax(1)
    # 190 draws a place, whose standard deviation is 13.5 where all are as likely
    assert (torch.bincount(starts, minlength=spare + 1) - 4000 / (spare + 1)).abs().max() < 5 * 13.5


def test_a_stretch_behind_a_row_begins_earlier(
    denoising: tuple[dict[str, torch.Tensor], ShortenDenoising],
) -> None:
    batch, shorten = denoising
    short = shorten.stretch(batch, 1 / 4, torch.full((3,), 1000))
    assert torch.equal(short["input_ids"], batch["input_ids"][:, -64:])


def test_a_mode_token_opens_the_stretch_as_well() -> None:
    ids = torch.arange(10, 50).expand(2, -1).clone()
    ids[0, 0] = 7
    labels = torch.tensor([[90, 5, 91, 6, 1], [90, 5, 91, 6, 1]])
    short = ShortenDenoising((90, 91), openings=(7, 8)).stretch(
        {"input_ids": ids, "labels": labels}, 1 / 4, torch.tensor([20, 20])
    )
    assert short["input_ids"].tolist() == [[7, *range(31, 40)], [*range(30, 40)]]


def test_denoising_without_a_sentinel_asks_for_less() -> None:
    labels = torch.tensor([[7, 7, 7, 7, 7, 7, 7, 1], [7, 7, 7, 1, -100, -100, -100, -100]])
    short = ShortenDenoising((90, 91))({"input_ids": random_ids(2, 16) % 80 + 3, "labels": labels}, 1 / 4)
    assert short["labels"].ne(-100).sum(1).tolist() == [2, 1]


class Seen(TrainerCallback):
    """What a step's routers did, read from the model between forward and the optimizer's step."""

    def __init__(self) -> None:
        self.progress: list[float | None] = []
        self.lengths: list[int] = []

    def watch(self, model: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if model.training:
            self.lengths.append(kwargs["input_ids"].shape[1])
            start = model.encoder.dense_start
            self.progress.append(None if start is None else round(float(start), 3))


def rows(number: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 96, (number, 16), generator=generator)
    return [{"input_ids": row.tolist(), "labels": (row % 3).tolist()} for row in ids]


def trainer(
    folder: Path, model: Any, callback: DenseStartCallback, seen: Seen | None = None, **fields: Any
) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=10, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="steps", save_steps=3, eval_strategy="steps", eval_steps=4, logging_steps=1,
        **fields,
    )  # fmt: skip
    run = Trainer(model, arguments, train_dataset=rows(20), eval_dataset=rows(4), callbacks=[callback])
    if seen is not None:
        run.add_callback(HookedAfter(model, seen))
    return run


class HookedAfter(TrainerCallback):
    """Watches the model's calls with a hook that comes after the dense start's own."""

    def __init__(self, model: torch.nn.Module, seen: Seen):
        self.model, self.seen = model, seen

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.model.register_forward_pre_hook(self.seen.watch, with_kwargs=True)


SCHEDULE = DenseStart(closed=0.3, opening=0.2, input_share=0.5)


def token_model() -> CoLT5ForTokenClassification:
    torch.manual_seed(0)
    return CoLT5ForTokenClassification(tiny_config(num_labels=3))


def test_run_of_trainer(tmp_path: Path) -> None:
    model, seen = token_model(), Seen()
    run = trainer(tmp_path / "run", model, DenseStartCallback(SCHEDULE), seen)
    run.train()
    assert seen.progress == [0.0, 0.0, 0.0, 0.0, 0.5, None, None, None, None, None]
    assert seen.lengths == [8] * 5 + [16] * 5
    assert model.config.routers_trained and model.encoder.dense_start is None
    # a checkpoint of the dense start has the configured budgets, and says that the routers are not trained yet
    for step, trained in ((3, False), (6, True)):
        saved = CoLT5ForTokenClassification.from_pretrained(tmp_path / f"run/checkpoint-{step}").config
        assert saved.routers_trained is trained
        assert saved.routed_query_fraction == tiny_config().routed_query_fraction

    # the trained model is left as it is, unless it is asked for
    for always in (False, True):
        again, seen = copy.deepcopy(model), Seen()
        run = trainer(tmp_path / "again", again, DenseStartCallback(SCHEDULE, always=always), seen)
        run.args.max_steps = 1
        run.train()
        assert (seen.progress[0] is not None) is always


# two runs; that Trainer's resuming is exact is in test_training.py
@pytest.mark.slow
def test_resumed_run_ends_as_the_whole_one(tmp_path: Path) -> None:
    whole = token_model()
    trainer(tmp_path / "whole", whole, DenseStartCallback(SCHEDULE)).train()
    # broken off within the opening: after step 3 comes progress 0, then 0.5
    resumed = token_model()
    run = trainer(tmp_path / "resumed", resumed, DenseStartCallback(SCHEDULE))
    run.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        # the same sums, perhaps at other addresses in memory
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_accumulated_steps_are_those_of_larger_batches(tmp_path: Path) -> None:
    models = []
    for batch_size, parts in ((2, 1), (1, 2)):
        model = token_model()
        run = trainer(tmp_path / str(parts), model, DenseStartCallback(SCHEDULE), gradient_accumulation_steps=parts)
        run.args.per_device_train_batch_size = run._train_batch_size = batch_size
        run.train()
        models.append(model)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # gradients are summed in another order, and AdamW divides by their size
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (CoLT5ForTokenClassification, {"routing": "none"}),
        (CoLT5ForTokenClassification, {"routing": "even"}),
        (CoLT5ForCausalLM, {"causal_attention": "full"}),
    ],
)
def test_model_without_routers_is_refused(model_class: Any, fields: dict[str, str], tmp_path: Path) -> None:
    model = model_class(tiny_config(**fields))
    with pytest.raises(ValueError, match="no learned routers"):
        trainer(tmp_path, model, DenseStartCallback()).train()


@pytest.mark.slow
def test_encoder_decoder_reads_short_documents_and_whole_targets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(tiny_config())
    callback = DenseStartCallback(SCHEDULE)
    seen: list[tuple[int, int]] = []
    run = trainer(tmp_path, model, callback)
    model.register_forward_hook(
        lambda module, args, kwargs, out: (
            seen.append((out.encoder_last_hidden_state.shape[1], out.logits.shape[1])) if module.training else None
        ),
        with_kwargs=True,
    )
    run.train()
    assert seen == [(8, 16)] * 5 + [(16, 16)] * 5


# a graph compiles for seconds, and Transformers' own tracing guards none of this
@pytest.mark.slow
def test_compiled_models_compile_once_for_the_dense_start_and_once_after() -> None:
    model = training_model(CoLT5ForTokenClassification, num_labels=3)
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    callback = DenseStartCallback(DenseStart(closed=0.3, opening=0.3, input_share=0.5))
    state, control, ids = TrainerState(max_steps=10), TrainerControl(), random_ids(2, 16)
    callback.on_train_begin(None, state, control, model=model)  # type: ignore[arg-type]
    compiled = torch.compile(model, backend=count)
    numbers, lengths = [], []
    for step in range(10):
        state.global_step = step
        callback.on_step_begin(None, state, control)  # type: ignore[arg-type]
        out = compiled(input_ids=ids, labels=ids % 3)
        out.loss.backward()
        numbers.append(len(graphs))
        lengths.append(out.logits.shape[1])
    assert lengths == [8] * 6 + [16] * 4
    assert numbers[0] == numbers[5] and numbers[6] == numbers[9] <= 2 * numbers[0]
