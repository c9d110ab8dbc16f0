"""The models over pictures: padding, budgets, outputs, training, saving, pipeline, and bad input."""

import inspect

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from models import checkpoint_activations
from peft import LoraConfig, get_peft_model
from PIL import Image
from rounding import assert_same_but_for_rounding
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)
from vision import TINY, pad_pictures, tiny_vision_model

from modeling_colt5 import (
    CoLT5Config,
    CoLT5ForImageClassification,
    CoLT5ForSequenceClassification,
    CoLT5VisionConfig,
    CoLT5VisionModel,
    set_dense_start,
)
from modeling_colt5.dense_start import DenseStart, DenseStartCallback, shorten_pictures
from modeling_colt5.encoder_costs import encoder_flops, kept_values, light_pairs_of
from modeling_colt5.router_health import RouterHealthCallback

# sizes of which some are no multiple of the patch, one is smaller than a patch, and one is a single row of patches
SIZES = [(30, 42), (3, 2), (16, 8), (4, 41)]


def pictures(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, *size, dtype=dtype) for size in SIZES]


@pytest.mark.parametrize(
    "routing, pooling", [("learned", "attention"), ("learned", "mean"), ("even", "mean"), ("random", "mean"),
                         ("none", "attention")]
)  # fmt: skip
def test_a_picture_in_a_padded_batch_computes_what_it_computes_alone(routing, pooling):
    """Logits, gradients of the pixels, and the routed patches, whatever the padding holds."""
    torch.manual_seed(0)
    model = tiny_vision_model(dtype=torch.float64, routing=routing, classifier_pooling=pooling)
    alone = [picture.requires_grad_() for picture in pictures()]
    batch = pad_pictures([picture.detach() for picture in alone], 53, 50, fill=float("nan"))
    batch["pixel_values"].requires_grad_()
    together = model(**batch, output_routing=True)
    weight = torch.randn(model.config.num_labels, dtype=torch.float64)
    (together.logits @ weight).sum().backward()
    for i, picture in enumerate(alone):
        own = model(picture[None], output_routing=True)
        # one patch makes a head's routed attention trivial, and its gradient zero but for rounding
        torch.testing.assert_close(together.logits[i], own.logits[0], rtol=0, atol=1e-12)
        (own.logits @ weight).sum().backward()
        _, height, width = picture.shape
        gradient = batch["pixel_values"].grad[i]
        torch.testing.assert_close(gradient[:, :height, :width], picture.grad, rtol=0, atol=1e-12)
        assert not gradient[:, height:].any() and not gradient[:, :, width:].any()
        rows, columns = own.patch_mask.shape[1:]
        assert (rows, columns) == (-(-height // 4), -(-width // 4)) and own.patch_mask.all()
        assert together.patch_mask[i].sum() == rows * columns and together.patch_mask[i, :rows, :columns].all()
        for ours, theirs in zip(together.routing, own.routing, strict=True):
            for name in ("query", "key_value", "feed_forward"):
                in_batch, by_itself = getattr(ours, name), getattr(theirs, name)
                if routing == "none":
                    assert in_batch is None
                    continue
                used = in_batch.valid[i]
                place = in_batch.indices[i][used]
                across = together.patch_mask.shape[2]
                own_place = place // across * columns + place % across
                assert torch.equal(own_place, by_itself.indices[0][by_itself.valid[0]])


def test_budgets_are_of_each_pictures_patches():
    model = tiny_vision_model(routed_query_fraction=1 / 4)
    batch = pad_pictures(pictures(torch.float32), 44, 44)
    routing = model(**batch, output_routing=True).routing
    patches = [-(-height // 4) * -(-width // 4) for height, width in SIZES]
    assert routing[0].query.valid.sum(1).tolist() == [max(1, -(-count // 4)) for count in patches]
    model.set_routing_budget(query=1.0)
    routing = model(**batch, output_routing=True).routing
    assert routing[0].query.valid.sum(1).tolist() == patches


def test_a_size_between_patches_is_filled_up_with_zeros():
    torch.manual_seed(0)
    model = tiny_vision_model(dtype=torch.float64)
    picture = pictures()[0][None]
    filled = torch.nn.functional.pad(picture, (0, 2, 0, 2))
    torch.testing.assert_close(model(picture).logits, model(filled).logits, rtol=0, atol=1e-13)


def test_a_head_takes_the_mean_or_what_its_query_finds():
    """At a query of 0 attention is the mean; a long query along a state finds that state."""
    torch.manual_seed(0)
    model, by_mean = tiny_vision_model(), tiny_vision_model(classifier_pooling="mean")
    assert by_mean.attention_pooling is None
    by_mean.load_state_dict(model.state_dict(), strict=False)
    batch = pad_pictures(pictures(torch.float32), 30, 42)
    states = model.encoder(**batch).last_hidden_state
    assert not torch.allclose(model(**batch).logits, by_mean(**batch).logits, atol=1e-2)
    with torch.no_grad():
        model.attention_pooling.query.zero_()
        assert_same_but_for_rounding(model(**batch).logits, by_mean(**batch).logits)
        model.attention_pooling.query.copy_(1000 * states[0, 7])
        assert_same_but_for_rounding(model(**batch).logits[0], model.classification_head(states[0, 7]))
    with pytest.raises(StrictDataclassError, match="one of 'attention', 'mean'"):
        CoLT5VisionConfig(classifier_pooling="max")


def test_gradients_are_finite_differences():
    """Of the mean of the labels' scores, along a random direction of all weights; in float64, where no choice of
    patches changes within the step."""
    torch.manual_seed(0)
    model = tiny_vision_model(dtype=torch.float64, num_layers=1)
    picture = torch.randn(2, 3, 24, 20, dtype=torch.float64)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    direction = [torch.randn_like(weight) for weight in weights]
    score = model(picture).logits.square().sum()
    gradients = torch.autograd.grad(score, weights)
    along = sum((gradient * step).sum() for gradient, step in zip(gradients, direction, strict=True))

    @torch.no_grad()
    def moved(step: float) -> torch.Tensor:
        for weight, way in zip(weights, direction, strict=True):
            weight.add_(way, alpha=step)
        result = model(picture).logits.square().sum()
        for weight, way in zip(weights, direction, strict=True):
            weight.sub_(way, alpha=step)
        return result

    h = 1e-4
    # The norms take their statistics in fp32, whose rounding of 6e-8 is divided by h.
    torch.testing.assert_close((moved(h) - moved(-h)) / (2 * h), along, rtol=2e-3, atol=0)


def test_outputs_of_a_call():
    model = tiny_vision_model(attn_implementation="eager")
    batch = pad_pictures(pictures(torch.float32), 30, 42)
    labels = torch.tensor([0, 1, 2, 3])
    output = model(**batch, labels=labels, output_attentions=True, output_hidden_states=True, output_routing=True)
    assert_same_but_for_rounding(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    assert [state.shape for state in output.hidden_states] == [(4, 8 * 11, 32)] * 3
    assert [weights.shape for weights in output.attentions] == [(4, 2, 8, 11, 5, 5)] * 2
    assert output.heavy_attentions[0].shape[:2] == (4, 3)
    sums = output.attentions[0].sum((-1, -2))[output.patch_mask[:, None].expand(-1, 2, -1, -1)]
    assert_same_but_for_rounding(sums, torch.ones_like(sums))
    by_sdpa = tiny_vision_model()
    by_sdpa.load_state_dict(model.state_dict())
    assert_same_but_for_rounding(by_sdpa(**batch).logits, output.logits)
    as_tuple = by_sdpa(**batch, return_dict=False)
    assert_same_but_for_rounding(as_tuple[0], output.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_single(dtype):
    torch.manual_seed(0)
    # every patch is routed: no rounding changes the choice
    model = tiny_vision_model(
        routed_query_fraction=1.0, routed_key_value_fraction=1.0, routed_feed_forward_fraction=1.0
    )
    batch = pad_pictures(pictures(torch.float32), 30, 42)
    expected = model(**batch).logits
    half = model.to(dtype)(**batch).logits
    assert half.dtype == dtype
    # some hundred roundings of half precision, relative to logits of about 1
    torch.testing.assert_close(half.float(), expected, rtol=0, atol={torch.bfloat16: 0.1, torch.float16: 0.02}[dtype])


def test_checkpointed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    model = tiny_vision_model().train()
    batch = pad_pictures(pictures(torch.float32), 30, 42)
    found = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            checkpoint_activations(model)
        model.zero_grad()
        model(**batch, labels=torch.tensor([0, 1, 2, 3])).loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert_same_but_for_rounding(found[1], found[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_adapters_get_gradients_with_checkpointed_activations(use_reentrant):
    """Also of the re-entrant kind, which gives none to what comes after a frozen beginning."""
    batch = pad_pictures(pictures(torch.float32), 30, 42) | {"labels": torch.tensor([0, 1, 2, 3])}
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        base = tiny_vision_model().train()
        if is_checkpointed:
            checkpoint_activations(base, use_reentrant)
        lora = LoraConfig(r=2, target_modules=["q", "v", "wi_0", "wo"], modules_to_save=["classification_head"])
        model = get_peft_model(base, lora)
        model.enable_input_require_grads()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        model(**batch).loss.backward()
        adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        found.append(torch.cat([parameter.grad.flatten() for parameter in adapters]))
    assert found[0].any()
    assert_same_but_for_rounding(found[1], found[0])


def test_a_dense_start_routes_every_real_patch():
    model = tiny_vision_model().train()
    batch = pad_pictures(pictures(torch.float32), 30, 42)
    model.set_dense_start(0.5)
    output = model(**batch, output_routing=True)
    for layer in output.routing:
        assert torch.equal(layer.query.valid.sum(1), output.patch_mask.flatten(1).sum(1))
    output.logits.sum().backward()
    assert all(block.layer[1].router.weight.grad.any() for block in model.encoder.block)
    set_dense_start(model, None)
    assert model(**batch, output_routing=True).routing[0].query.valid.shape[1] < 8 * 11


def test_costs_follow_the_grid():
    """Light pairs counted one by one; of a square a dense pass costs what its routed one costs and more."""
    config = CoLT5VisionConfig(**TINY)
    side, r = 7, config.local_radius
    places = [(i, j) for i in range(side) for j in range(side)]
    near = sum(abs(a - c) <= r and abs(b - d) <= r for a, b in places for c, d in places)
    assert light_pairs_of(config, side * side) == near
    for cost in (encoder_flops, kept_values):
        assert cost(config, 64, dense=True) > cost(config, 64)
    # without kernels the weights of the windows are kept
    assert kept_values(config, 64, fused_attention=False) > kept_values(config, 64)


def test_shorter_pictures_are_cut_out_of_the_real_ones():
    torch.manual_seed(0)
    value = torch.arange(1.0, 1 + 20 * 12).view(1, 20, 12)
    batch = pad_pictures([value, value[:, :5, :5]], 20, 12) | {"labels": torch.tensor([1, 2])}
    starts = set()
    for _ in range(30):
        short = shorten_pictures(batch, 0.25)
        assert short["pixel_values"].shape == (2, 1, 10, 6) and short["pixel_mask"].shape == (2, 10, 6)
        assert torch.equal(short["labels"], batch["labels"])
        assert torch.equal(short["pixel_values"][:, 0] > 0, short["pixel_mask"].bool())
        first = int(short["pixel_values"][0, 0, 0, 0]) - 1
        top, left = divmod(first, 12)
        starts.add((top, left))
        assert torch.equal(short["pixel_values"][0], value[:, top : top + 10, left : left + 6])
        # the small picture is whole
        assert short["pixel_mask"][1].sum() == 25
    assert len(starts) > 10
    assert torch.equal(shorten_pictures({"pixel_values": value[None]}, 1.0)["pixel_values"], value[None])


def test_trainer_with_a_dense_start(tmp_path):
    """A few steps of Trainer on pictures of two sizes: finite losses, the dense start ends, routers are measured."""
    torch.manual_seed(0)
    model = tiny_vision_model()
    rows = [{"pixel_values": torch.randn(3, 24, 24), "labels": i % 5} for i in range(24)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=6,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
    trainer.add_callback(DenseStartCallback(DenseStart(closed=0.34, opening=0.34)))
    trainer.add_callback(RouterHealthCallback(trainer.log, interval=2))
    trainer.train()
    logs = trainer.state.log_history
    losses = [entry["loss"] for entry in logs if "loss" in entry]
    assert len(losses) == 6 and all(0 < loss < 10 for loss in losses)
    assert model.config.routers_trained and model.encoder.dense_start is None
    assert any("routers/0/query/overlap" in entry for entry in logs)
    # only the logits are collected
    assert trainer.predict(rows[:4]).predictions.shape == (4, 5)


def test_saved_models_and_processors_load_by_the_auto_classes(tmp_path):
    torch.manual_seed(0)
    model = tiny_vision_model()
    model.save_pretrained(tmp_path)
    model.config.image_processor().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is CoLT5VisionConfig
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert type(loaded) is CoLT5ForImageClassification
    batch = pad_pictures(pictures(torch.float32), 30, 42)
    assert_same_but_for_rounding(loaded(**batch).logits, model(**batch).logits)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert type(encoder) is CoLT5VisionModel
    states = encoder(**batch).last_hidden_state
    assert_same_but_for_rounding(states, model.encoder(**batch).last_hidden_state)
    # an encoder makes a classifier whose head alone is new
    encoder.save_pretrained(tmp_path / "encoder")
    _, report = AutoModelForImageClassification.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    heads = ("classification_head.", "attention_pooling.")
    assert report["missing_keys"] and all(name.startswith(heads) for name in report["missing_keys"])


@pytest.mark.skipif(
    getattr(AutoImageProcessor, "is_dummy", False), reason="AutoImageProcessor of Transformers 5.17 needs torchvision"
)
def test_processor_and_pipeline(tmp_path):
    """Pictures keep their size, colours become RGB; the pipeline's scores are the softmax of the model's logits."""
    torch.manual_seed(0)
    model = tiny_vision_model()
    model.save_pretrained(tmp_path)
    model.config.image_processor().save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    values = torch.randint(256, (30, 41, 3), dtype=torch.uint8)
    picture = Image.fromarray(values.numpy())
    batch = processor([picture, picture.resize((20, 50)), picture.convert("L")], return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 50, 41)
    assert batch["pixel_mask"].flatten(1).sum(1).tolist() == [30 * 41, 50 * 20, 30 * 41]
    expected = (values.permute(2, 0, 1) / 255 - 0.5) / 0.5
    torch.testing.assert_close(batch["pixel_values"][0, :, :30], expected)

    classify = pipeline("image-classification", model=str(tmp_path))
    (found,) = classify([picture], top_k=1)
    logits = model(**processor(picture, return_tensors="pt")).logits
    best = logits[0].detach().softmax(-1).max(0)
    assert found[0]["label"] == model.config.id2label[int(best.indices)]
    assert found[0]["score"] == pytest.approx(float(best.values), rel=1e-4)

    grey = tiny_vision_model(num_channels=1)
    one = grey.config.image_processor()(picture.convert("L"), return_tensors="pt")
    assert grey(**one).logits.shape == (1, 5)


BAD_PIXELS = [
    (torch.zeros(1, 1, 8, 8), ValueError, r"pixel_values has shape \(1, 1, 8, 8\).*num_channels .* is 3"),
    (torch.zeros(3, 8, 8), ValueError, "also for a single picture"),
    (torch.zeros(1, 3, 0, 8), ValueError, "at least one picture and one pixel"),
    (torch.zeros(0, 3, 8, 8), ValueError, "at least one picture and one pixel"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "torch.uint8; it must be floating point"),
    (None, TypeError, "pixel_values is NoneType"),
]


@pytest.mark.parametrize("pixels, error, message", BAD_PIXELS)
def test_bad_pictures_are_refused(pixels, error, message):
    with pytest.raises(error, match=message):
        tiny_vision_model()(pixels)


@pytest.mark.parametrize(
    "mask, message",
    [
        (
            torch.ones(2, 8, 9),
            r"pixel_mask has shape \(2, 8, 9\); it must be .*, here \(2, 8, 8\)",
        ),
        (torch.ones(2, 3, 8, 8), "pixel_mask has shape"),
        (torch.tensor([1, 0])[:, None, None].expand(2, 8, 8), r"no real pixel in the pictures \[1\]"),
    ],
)
def test_bad_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        tiny_vision_model()(torch.zeros(2, 3, 8, 8), pixel_mask=mask)


def test_a_processor_that_scales_makes_the_sizes_that_the_page_says():
    processor = CoLT5VisionConfig().image_processor(do_resize=True, size={"shortest_edge": 384})
    for size, scaled in (((1000, 800), (480, 384)), ((64, 96), (384, 576)), ((100, 1000), (64, 608))):
        pixels = processor(Image.new("RGB", size[::-1]), return_tensors="pt")["pixel_values"]
        assert pixels.shape[-2:] == scaled


def test_other_bad_input_is_refused():
    model = tiny_vision_model()
    pixels = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        model(pixels, labels=torch.zeros(3, dtype=torch.int64))
    for mask in (torch.ones(2, 8, 8).tolist(), torch.ones(2, 8, 8).numpy()):
        with pytest.raises(TypeError, match=r"pixel_mask is \w+; it must be a tensor, .*, here \(2, 8, 8\)"):
            model(pixels, pixel_mask=mask)
    with pytest.warns(UserWarning, match="the argument pixel_maks is not read; the nearest .* is pixel_mask"):
        model(pixels, pixel_maks=torch.ones(2, 8, 8))
    with pytest.raises(TypeError, match="config is a CoLT5Config; it must be a CoLT5VisionConfig"):
        CoLT5VisionModel(CoLT5Config())
    with pytest.raises(TypeError, match="config is a CoLT5VisionConfig; it must be a CoLT5Config"):
        CoLT5ForSequenceClassification(CoLT5VisionConfig())
    with pytest.raises(ValueError, match="model_type is 'vit'; it must be 'colt5_vision'"):
        CoLT5VisionConfig(model_type="vit")
    with pytest.raises(ValueError, match="model_type is 'colt5'; it must be 'colt5_vision'"):
        CoLT5VisionConfig.from_dict(CoLT5Config().to_dict())
    for field, value in (
        ("patch_size", 0),
        ("num_channels", -1),
        ("local_radius", -1),
        ("routing", "other"),
        ("num_labels", 0),
    ):
        with pytest.raises(StrictDataclassError, match=field):
            CoLT5VisionConfig(**{field: value})
    with pytest.raises(ValueError, match="cross_key_values is 4"):
        model.set_routing_budget(cross_key_values=4)


def test_forward_names_are_those_of_other_models_over_pictures():
    for model_class in (CoLT5VisionModel, CoLT5ForImageClassification):
        assert list(inspect.signature(model_class.forward).parameters)[1:3] == ["pixel_values", "pixel_mask"]
    assert CoLT5VisionModel.main_input_name == "pixel_values"
    assert tiny_vision_model()(**tiny_vision_model().dummy_inputs).logits.shape == (2, 5)
