"""Fine-tuning with Trainer, Seq2SeqTrainer, PEFT and Accelerate: the losses, gradients and weights it must give."""

import fnmatch
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import checkpoint_activations, pad, random_ids, tiny_config, tiny_model
from peft import AutoPeftModelForSeq2SeqLM, LoraConfig, PeftModel, TaskType, get_peft_model
from rounding import assert_trained_alike
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import Dataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from vision import tiny_vision_model

from modeling_colt5 import (
    CoLT5Config,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForImageClassification,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5Model,
)

# fp32 gradients of size 1e-3 to 1, summed in another order
TOLERANCE = 1e-5
HEADS = [
    CoLT5ForConditionalGeneration,
    CoLT5ForSequenceClassification,
    CoLT5ForTokenClassification,
    CoLT5ForQuestionAnswering,
]


class Examples(Dataset):
    """Documents of several lengths with targets of several lengths; `kind` is what the labels are for."""

    def __init__(self, kind: type[nn.Module], size: int = 8):
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for index in range(size):
            ids = torch.randint(3, 96, (12 + 5 * (index % 4),), generator=generator)
            if kind is CoLT5ForConditionalGeneration:
                labels = {"labels": torch.randint(3, 96, (1 + 3 * index % 7,), generator=generator)}
            elif kind is CoLT5ForTokenClassification:
                labels = {"labels": ids % 2}
                labels["labels"][: 2 * index] = -100
            elif kind is CoLT5ForSequenceClassification:
                labels = {"labels": ids[0] % 2}
            else:
                labels = {"start_positions": torch.tensor(index % 5), "end_positions": torch.tensor(6 + index % 5)}
            self.rows.append({"input_ids": ids, **labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right, labels with -100."""
    batch = pad([row["input_ids"] for row in rows])
    for name in rows[0].keys() - {"input_ids"}:
        values = [row[name] for row in rows]
        if values[0].dim() == 0:
            batch[name] = torch.stack(values)
        else:
            batch[name] = nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-100)
    return batch


def arguments(folder: Path, **kwargs: Any) -> dict[str, Any]:
    """Training arguments for a run without chance and without reports."""
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "logging_steps": 1}
    steps = {"per_device_train_batch_size": 2, "max_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    # one step of plain descent writes the gradient into the weights
    descent = {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    return {"output_dir": str(folder), **quiet, **steps, **descent, **kwargs}


def train(trainer_class: type[Trainer], args: TrainingArguments, model: nn.Module, **kwargs: Any) -> Trainer:
    trainer = trainer_class(model=model, args=args, data_collator=collate, **kwargs)
    trainer.train()
    return trainer


def step_gradients(before: nn.Module, after: nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of a single step of descent with rate 0.1."""
    start = dict(before.named_parameters())
    return {name: (start[name] - parameter).detach() / 0.1 for name, parameter in after.named_parameters()}


# three seconds each; the others' losses are averaged by the same count as the first one's
@pytest.mark.parametrize(
    "model_class",
    [
        pytest.param(
            head,
            marks=() if head is CoLT5ForConditionalGeneration else pytest.mark.slow,
        )
        for head in HEADS
    ],
)
def test_gradient_accumulation_equals_one_batch(model_class: type[nn.Module], tmp_path: Path) -> None:
    """Four batches of two, with unequal numbers of labels, against one batch of eight."""
    initial = tiny_model(model_class)
    losses, gradients = [], []
    for batch_size in (8, 2):
        model = model_class(initial.config)
        model.load_state_dict(initial.state_dict())
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 8 // batch_size}
        args = TrainingArguments(**arguments(tmp_path, **sizes))
        trainer = train(Trainer, args, model, train_dataset=Examples(model_class))
        losses.append(trainer.state.log_history[0]["loss"])
        gradients.append(step_gradients(initial, trainer.model))
    # the independent value: a plain forward over all eight
    batch = collate([row for row in Examples(model_class)])
    initial.train()
    loss = initial(**batch).loss
    loss.backward()
    # Trainer rounds its log to four places
    assert losses == pytest.approx([loss.item()] * 2, abs=1e-4)
    for name, parameter in initial.named_parameters():
        for found in gradients:
            # the weight before and after, each rounded to fp32, over a rate of 0.1
            atol = TOLERANCE * max(1.0, float(initial.state_dict()[name].abs().max()))
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=atol, msg=name)


def test_label_smoothing(tmp_path: Path) -> None:
    """The smoothed loss from its definition: mean over labels of (1 − ε)·nll + ε·mean over the vocabulary."""
    model = tiny_model()
    batch = collate([row for row in Examples(CoLT5ForConditionalGeneration)])
    with torch.no_grad():
        logprobs = model(**batch).logits.log_softmax(-1)
    real = batch["labels"] != -100
    nll = -logprobs.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0]
    expected = (0.8 * nll - 0.2 * logprobs.mean(-1))[real].mean().item()
    options = {"label_smoothing_factor": 0.2, "per_device_train_batch_size": 8}
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, **options))

    # the smoother takes the labels away: the collator has to shift them, as DataCollatorForSeq2Seq does
    def shifted(rows):
        batch = collate(rows)
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}

    data = Examples(CoLT5ForConditionalGeneration)
    trainer = Seq2SeqTrainer(model=model, args=args, data_collator=shifted, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)


def test_predict_with_generate(tmp_path: Path) -> None:
    model = tiny_model(output_routing=True)
    options = {"predict_with_generate": True, "per_device_eval_batch_size": 4, "generation_max_length": 6}
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, **options))
    data = Examples(CoLT5ForConditionalGeneration)
    trainer = Seq2SeqTrainer(model=model, args=args, data_collator=collate, eval_dataset=data)
    predictions = trainer.predict(data).predictions
    batch = pad([row["input_ids"] for row in data])
    expected = model.generate(**batch, max_length=6)
    assert (predictions[:, : expected.shape[1]] == expected.numpy()).all()


@pytest.mark.parametrize("model_class", HEADS)
def test_evaluation_with_routing_in_the_output(model_class: type[nn.Module], tmp_path: Path) -> None:
    """Routing is ragged over batches and no prediction: evaluation leaves it aside and keeps the logits."""
    model = tiny_model(model_class, output_routing=True)
    options = {"per_device_eval_batch_size": 3}
    args = TrainingArguments(**arguments(tmp_path, **options))
    data = Examples(model_class)
    trainer = Trainer(model=model, args=args, data_collator=collate, eval_dataset=data)
    found = trainer.predict(data)
    predictions = found.predictions
    shape = predictions[0].shape if isinstance(predictions, tuple) else predictions.shape
    assert shape[0] == len(data)
    assert torch.isfinite(torch.tensor(found.metrics["test_loss"]))


class StopAfter(TrainerCallback):
    """Ends training after a step, as a lost machine would."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
def test_resume_gives_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    """With dropout and AdamW, so that the state of optimiser and generator matters."""
    initial = tiny_model(dropout_rate=0.1)
    data = Examples(CoLT5ForConditionalGeneration)
    runs = {}
    for name in ("whole", "resumed"):
        options = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "seed": 5}
        folder = tmp_path / name
        args = Seq2SeqTrainingArguments(**arguments(folder, **options, save_steps=3))
        model = CoLT5ForConditionalGeneration(initial.config)
        model.load_state_dict(initial.state_dict())
        callbacks = [StopAfter(3)] if name == "resumed" else []
        trainer = train(Seq2SeqTrainer, args, model, train_dataset=data, callbacks=callbacks)
        if name == "resumed":
            assert trainer.state.global_step == 3
            fresh = CoLT5ForConditionalGeneration(initial.config)
            trainer = Seq2SeqTrainer(model=fresh, args=args, data_collator=collate, train_dataset=data)
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
        assert trainer.state.global_step == 6
        runs[name] = trainer.model
    resumed, whole = (dict(runs[name].named_parameters()) for name in ("resumed", "whole"))
    assert_trained_alike(resumed, whole, learning_rate=1e-2)


def test_training_warns_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    options = {"gradient_accumulation_steps": 2, "max_steps": 2}
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, **options, predict_with_generate=True))
    data = Examples(CoLT5ForConditionalGeneration)
    with caplog.at_level(logging.WARNING):
        trainer = train(Seq2SeqTrainer, args, tiny_model(), train_dataset=data, eval_dataset=data)
        trainer.evaluate()
        trainer.save_model()
        CoLT5ForConditionalGeneration.from_pretrained(tmp_path)
    transformers_logging.disable_propagation()
    messages = [record.getMessage() for record in caplog.records] + [str(warning.message) for warning in recwarn]
    # of the CPU, not of the model
    ours = [message for message in messages if "pin_memory" not in message]
    assert ours == []


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("model_class", HEADS)
def test_gradient_checkpointing(model_class: type[nn.Module], use_reentrant: bool) -> None:
    model = tiny_model(model_class, dropout_rate=0.1).train()
    batch = collate([row for row in Examples(model_class)])

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    expected = gradients()
    checkpoint_activations(model, use_reentrant)
    calls = []
    model.encoder.block[0].layer[0].register_forward_hook(lambda *_: calls.append(1))
    found = gradients()
    # otherwise nothing was computed twice
    assert len(calls) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=TOLERANCE, msg=name)


# each kind of checkpointing with one model, and each model with one kind; the other two take five seconds
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_class", "use_reentrant"),
    [
        (CoLT5ForConditionalGeneration, False),
        (CoLT5ForSequenceClassification, True),
        (CoLT5ForConditionalGeneration, True),
        (CoLT5ForSequenceClassification, False),
    ],
)
def test_lora_with_gradient_checkpointing(model_class: type[nn.Module], use_reentrant: bool, tmp_path: Path) -> None:
    tiny_model(model_class).save_pretrained(tmp_path / "base")
    # the adapter remembers where its base came from
    base = model_class.from_pretrained(tmp_path / "base")
    checkpoint_activations(base, use_reentrant)
    seq2seq = model_class is CoLT5ForConditionalGeneration
    task = TaskType.SEQ_2_SEQ_LM if seq2seq else TaskType.SEQ_CLS
    head = None if seq2seq else ["classification_head"]
    targets = ["q", "v", "wi_0", "wo"]
    lora = LoraConfig(task_type=task, r=2, lora_alpha=4, target_modules=targets, modules_to_save=head)
    model = get_peft_model(base, lora)
    # without it no gradient passes the frozen embedding under the re-entrant kind
    base.enable_input_require_grads()
    options = {"max_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    args = TrainingArguments(**arguments(tmp_path / "run", **options))
    trainer = train(Trainer, args, model.train(), train_dataset=Examples(model_class))
    changed = {name for name, parameter in trainer.model.named_parameters() if "lora_B" in name and parameter.any()}
    for part in ("light_attention.q", "heavy_attention.v", "heavy_feed_forward.wo", "light_feed_forward.wi_0"):
        assert any(part in name for name in changed), part

    model.save_pretrained(tmp_path / "adapter")
    base = model_class.from_pretrained(tmp_path / "base")
    # PEFT puts what it loads on a GPU where there is one
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", torch_device="cpu").eval()
    batch = collate([row for row in Examples(model_class)])
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=0, atol=TOLERANCE)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=TOLERANCE)
    if seq2seq:
        automatic = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
        ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(automatic.generate(**ids, max_new_tokens=4), model.generate(**ids, max_new_tokens=4))


# Dynamo and AOTAutograd trace a layer and a decoder's: ten seconds
@pytest.mark.slow
def test_trainer_compiles_one_graph_and_never_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, over batches of one shape and other tokens, lengths and numbers of labels."""
    data = []
    for index, length in enumerate((30, 24, 30, 17, 12, 30, 29, 7)):
        ids = random_ids(length)
        labels = torch.full((6,), -100)
        labels[: 1 + index % 6] = ids[: 1 + index % 6]
        data.append({name: row[0] for name, row in pad([ids], length=30).items()} | {"labels": labels})

    def train(**options: Any) -> float:
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=2,
            max_steps=4,
            bf16=True,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **options,
        )
        torch.manual_seed(0)
        model = tiny_model(num_layers=1, num_decoder_layers=1)
        return Trainer(model, arguments, train_dataset=data).train().training_loss

    expected = train()
    # Trainer tells Accelerate in the environment, which must be as before afterwards
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch._dynamo.reset()
    counters.clear()
    loss = train(torch_compile=True, torch_compile_backend="aot_eager")
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert counters["frames"] == {"total": 1, "ok": 1}
    # bf16: the compiler rounds elsewhere, and few tokens change sides
    assert loss == pytest.approx(expected, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [{}, {"causal_attention": "routed", "causal_feed_forward": "routed"}])
def test_a_training_step_repeats_bit_for_bit(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own operations are asked to be deterministic; ours always are."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sizes = {"d_model": 256, "d_kv": 32, "d_ff": 256, "light_d_ff": 256, "heavy_d_ff": 1024, "local_radius": 63}
    with torch.device("cuda"):
        model = CoLT5ForConditionalGeneration(tiny_config(**sizes, **fields, dropout_rate=0.1)).train()
        ids, labels = random_ids(2, 3000), random_ids(2, 700)
        mask = torch.ones_like(ids)
        mask[1, 2000:] = 0
    gradients = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            torch.manual_seed(0)
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            loss.backward()
            gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    finally:
        torch.use_deterministic_algorithms(False)
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", HEADS)
def test_autocast(model_class: type[nn.Module], dtype: torch.dtype) -> None:
    """Finite, close to fp32, and every gradient there, with rows that are mostly padding."""
    model = tiny_model(model_class)
    batch = collate([row for row in Examples(model_class)])
    expected = model(**batch)
    with torch.autocast("cpu", dtype=dtype):
        output = model(**batch)
    output.loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    # bf16 has 8 bits: 2^-8 for each of some twenty products; a token on the edge of the routed set may change sides
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_class", HEADS)
def test_half_precision(model_class: type[nn.Module], dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(model_class).save_pretrained(tmp_path)
    model = model_class.from_pretrained(tmp_path, dtype=dtype)
    batch = collate([row for row in Examples(model_class)])
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("model_class", [*HEADS, CoLT5Model, CoLT5EncoderModel])
def test_fsdp_plan_names_modules(model_class: type[nn.Module]) -> None:
    """Every block is wrapped, and no pattern is left over but the decoder's in a model without one."""
    config: CoLT5Config = tiny_config()
    model = model_class(config)
    names = [name for name, _ in model.named_modules()]
    matched = {
        pattern: [
            name for name in names if fnmatch.fnmatchcase(name, pattern) and name.count(".") == pattern.count(".")
        ]
        for pattern in config.base_model_fsdp_plan
    }
    encoder_only = not hasattr(model, "decoder")
    assert {pattern for pattern, found in matched.items() if not found} == (
        {"decoder.block.*", "decoder.final_layer_norm"} if encoder_only else set()
    )
    assert len(matched["encoder.block.*"]) == config.num_layers
    assert encoder_only or len(matched["decoder.block.*"]) == config.num_decoder_layers


@pytest.mark.parametrize("routed", [None, 4])
@pytest.mark.parametrize(
    "model_class", [*HEADS, CoLT5Model, CoLT5EncoderModel, CoLT5ForCausalLM, CoLT5ForImageClassification]
)
def test_what_is_not_split_is_what_there_is(model_class: type[nn.Module], routed: int | None) -> None:
    """FSDP by the launch file wraps the modules of these names, and refuses a name that is not there."""
    if model_class is CoLT5ForImageClassification:
        model = tiny_vision_model()
    else:
        model = tiny_model(model_class, routed_cross_key_values=routed)
    expected = {type(stack.block[0]).__name__ for stack in model.modules() if hasattr(stack, "block")}
    if routed and model_class in (CoLT5Model, CoLT5ForConditionalGeneration):
        expected.add("CoLT5CrossRouting")
    assert set(model._no_split_modules) == expected
