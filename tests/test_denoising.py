"""Denoising: nothing lost or doubled, exact lengths, T5's span distribution, the same for any worker count."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from modeling_colt5.denoising import (
    ChunkedDocuments,
    DataCollatorForDenoising,
    MixtureOfDenoisers,
    PrefixLM,
    SpanCorruption,
    chunk_documents,
)
from modeling_colt5.tokenization_colt5 import CoLT5Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz:()#_<>0123456789"
UL2 = MixtureOfDenoisers().denoisers


def make_tokenizer(extra_ids=100):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0 - 0.01 * i) for i, letter in enumerate(LETTERS)]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
    return CoLT5Tokenizer(vocab=pieces, extra_ids=extra_ids, mode_tokens=True)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    return CoLT5Tokenizer.from_pretrained(Path(__file__).parents[1] / "tokenization/python_stdlib")


def random_tokens(length, seed=0):
    """Ordinary pieces of the test vocabulary, eos among them as between packed documents."""
    tokens = np.random.default_rng(seed).integers(3, 3 + len(LETTERS), length)
    return np.where(tokens == 3, 1, tokens)


def recover(inputs, target, tokenizer, mode=None):
    """Undo the corruption by reading alone: put each sentinel's span of the target back into the input."""
    inputs, target = list(inputs), list(target)
    sentinels = tokenizer.get_sentinel_token_ids()
    if mode is not None:
        assert inputs.pop(0) == tokenizer.get_mode_token_ids()[mode]
    assert inputs.pop() == target.pop() == tokenizer.eos_token_id
    in_order = [token for token in inputs if token in sentinels]
    assert in_order == [token for token in target if token in sentinels] == sentinels[: len(in_order)]
    spans = {}
    for token in target:
        if token in sentinels:
            spans[token] = []
            span = spans[token]
        else:
            span.append(token)
    assert all(spans.values()), "a sentinel stands for at least one token"
    recovered = []
    for token in inputs:
        recovered += spans[token] if token in sentinels else [token]
    return recovered


@pytest.mark.parametrize("denoiser", [*UL2, SpanCorruption(), SpanCorruption(0.5, 1), SpanCorruption(0.9, 20)])
def test_every_token_is_recoverable(denoiser, tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 400, denoiser=denoiser)
    full = collator.plans[0].raw
    for length in (*range(1, 12), 63, 64, 65, full - 1, full):
        for seed in range(3):
            tokens = random_tokens(length, seed)
            inputs, target = collator.corrupt(tokens)
            assert recover(inputs, target, tokenizer, denoiser.mode) == tokens.tolist(), (length, seed)
            assert len(inputs) <= 400 and len(target) <= collator.target_length


@pytest.mark.parametrize("target_length", [None, 60])
def test_every_token_is_recoverable_in_a_batch_of_the_mixture(target_length, tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 128, target_length, MixtureOfDenoisers())
    tokens = random_tokens(20_000)
    modes = {number: mode for mode, number in tokenizer.get_mode_token_ids().items()}
    recovered = []
    for chunk in chunk_documents([{"input_ids": tokens}], collator):
        batch = {name: tensor[0] for name, tensor in collator([chunk]).items()}
        inputs = batch["input_ids"][batch["attention_mask"].bool()].tolist()
        target = batch["labels"][batch["labels"] != -100].tolist()
        recovered += recover(inputs, target, tokenizer, modes[inputs[0]])
    assert recovered == [*tokens.tolist(), *([] if tokens[-1] == 1 else [1])]


@pytest.mark.parametrize("denoiser", [*UL2, SpanCorruption(), SpanCorruption(0.3, 2.5), PrefixLM()])
def test_inputs_are_exactly_full(denoiser, tokenizer):
    for input_length in (*range(16, 80), 512, 1000, 4096):
        collator = DataCollatorForDenoising(tokenizer, input_length, denoiser=denoiser)
        plan = collator.plans[0]
        inputs, target = collator.corrupt(random_tokens(plan.raw))
        assert (len(inputs), len(target)) == (input_length, plan.target) == (plan.input, collator.target_length)


@pytest.mark.parametrize("input_length", [64, 114, 512, 1024])
def test_lengths_are_t5s(input_length, tokenizer):
    # Raffel et al.'s preprocessor counts up to the first raw length whose input would be too long
    def t5_input_and_target(raw):
        noise = round(raw * 0.15)
        spans = round(noise / 3)
        return raw - noise + spans + 1, noise + spans + 1

    raw = 10
    while t5_input_and_target(raw + 1)[0] <= input_length:
        raw += 1
    plan = DataCollatorForDenoising(tokenizer, input_length).plans[0]
    assert (plan.raw, plan.target) == (raw, t5_input_and_target(raw)[1])


@pytest.mark.parametrize("input_length", [256, 4096])
def test_a_short_target_lowers_the_density_and_cuts_nothing(input_length, tokenizer):
    length = input_length // 4
    collator = DataCollatorForDenoising(tokenizer, input_length, length, MixtureOfDenoisers())
    assert collator.target_length == length
    limited = 0
    for denoiser, plan in zip(collator.denoisers, collator.plans, strict=True):
        assert plan.input == input_length and plan.target <= length
        if plan.noise < round(plan.raw * denoiser.noise_density):
            # one more masked token would need one more place, or two with a new span
            assert plan.target >= length - 1
            limited += 1
    # S at 0.25 and the three X at 0.5 mask more than a quarter of the input, the rest less
    assert limited == 4


def test_all_ways_to_cut_are_equally_likely():
    # 10 masked tokens in 4 spans: C(9, 3) = 84 ways, and 12 unmasked: C(11, 3) = 165 ways
    denoiser, generator = SpanCorruption(), np.random.default_rng(0)
    counts = {"masked": Counter(), "unmasked": Counter()}
    draws = 84 * 60
    for _ in range(draws):
        mask = denoiser.mask(22, 10, 4, generator)
        assert mask.shape == (22,) and mask.sum() == 10
        edges = np.flatnonzero(np.diff(mask)) + 1
        lengths = np.diff([0, *edges, 22])
        assert len(lengths) == 8 and not mask[0]
        counts["unmasked"][tuple(lengths[0::2])] += 1
        counts["masked"][tuple(lengths[1::2])] += 1
    for kind, ways in (("masked", 84), ("unmasked", 165)):
        assert len(counts[kind]) == ways
        expected = draws / ways
        statistic = sum((count - expected) ** 2 / expected for count in counts[kind].values())
        # chi-square with ways - 1 degrees of freedom: mean ways - 1, variance 2 (ways - 1); five deviations
        assert abs(statistic - (ways - 1)) < 5 * math.sqrt(2 * (ways - 1))


@pytest.mark.parametrize("denoiser", [d for d in UL2 if isinstance(d, SpanCorruption)])
def test_rates_and_mean_span_lengths(denoiser, tokenizer):
    collator = DataCollatorForDenoising(make_tokenizer(1200), 4096, denoiser=denoiser)
    plan = collator.plans[0]
    # rounding to whole tokens and whole spans
    assert abs(plan.noise - denoiser.noise_density * plan.raw) <= 0.5
    assert abs(plan.spans - plan.noise / denoiser.mean_span_length) <= 0.5
    inputs, target = collator.corrupt(random_tokens(plan.raw))
    sentinels = collator.tokenizer.get_sentinel_token_ids()
    assert np.isin(inputs, sentinels).sum() == np.isin(target, sentinels).sum() == plan.spans
    assert len(target) - plan.spans - 1 == plan.noise


def test_masked_places_are_spread_over_the_text(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 512)
    raw, draws = collator.plans[0].raw, 2000
    generator = np.random.default_rng(0)
    plan = collator.plans[0]
    rate = sum(collator.denoisers[0].mask(raw, plan.noise, plan.spans, generator) for _ in range(draws)) / draws
    # away from the ends every place is masked as often as the density says; five deviations of a mean of draws
    assert np.abs(rate[60:-60] - plan.noise / raw).max() < 5 * math.sqrt(0.15 * 0.85 / draws)


def test_prefix_lm_masks_the_end(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 512, denoiser=PrefixLM(0.25))
    tokens = random_tokens(collator.plans[0].raw)
    inputs, target = collator.corrupt(tokens)
    first_sentinel = tokenizer.get_sentinel_token_ids()[0]
    cut = len(tokens) - round(0.25 * len(tokens))
    assert inputs.tolist() == [*tokens[:cut], first_sentinel, 1]
    assert target.tolist() == [first_sentinel, *tokens[cut:], 1]


def test_long_inputs_never_run_out_of_sentinels(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 16_384)
    plan = collator.plans[0]
    assert plan.spans == 100 and abs(plan.noise - 0.15 * plan.raw) <= 0.5
    tokens = random_tokens(plan.raw)
    inputs, target = collator.corrupt(tokens)
    assert recover(inputs, target, tokenizer) == tokens.tolist()
    assert len(inputs) == 16_384


@pytest.mark.parametrize("weights", [None, [1, 2, 3, 1, 1, 1, 1]])
def test_the_mixture_draws_by_weight(weights, tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 128, denoiser=MixtureOfDenoisers(UL2, weights))
    tokens = random_tokens(400_000)
    names = {plan.raw: index for index, plan in enumerate(collator.plans)}
    assert len(names) == 7, "at this length each denoiser is known by its raw length"
    drawn = [len(chunk["input_ids"]) for chunk in chunk_documents([{"input_ids": tokens}], collator)][:-1]
    shares = np.array(weights or [1] * 7) / sum(weights or [1] * 7)
    for raw, index in names.items():
        share = shares[index]
        # binomial, five deviations
        assert abs(drawn.count(raw) / len(drawn) - share) < 5 * math.sqrt(share * (1 - share) / len(drawn))


def documents(count=60):
    generator = np.random.default_rng(1)
    return ["".join(generator.choice(list("abcdefgh "), generator.integers(1, 900))) + "x" for _ in range(count)]


@pytest.mark.parametrize("denoiser", [SpanCorruption(), MixtureOfDenoisers()])
def test_chunks_hold_every_token_once_and_fill_every_input(denoiser, tokenizer):
    texts = documents()
    collator = DataCollatorForDenoising(tokenizer, 128, denoiser=denoiser)
    chunks = list(chunk_documents(texts, collator))
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert stream.count(tokenizer.eos_token_id) == len(texts)
    assert np.concatenate([chunk["input_ids"] for chunk in chunks]).tolist() == stream
    batch = collator(chunks)
    assert batch["attention_mask"][:-1].all(), "only the last chunk may leave padding"
    assert (batch["attention_mask"] == (batch["input_ids"] != tokenizer.pad_token_id)).all()
    assert batch["input_ids"].shape == (len(chunks), 128)
    assert batch["labels"].shape == (len(chunks), collator.target_length)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_an_example_depends_on_its_tokens_and_the_seed_alone(tokenizer):
    make = lambda seed: DataCollatorForDenoising(tokenizer, 128, denoiser=MixtureOfDenoisers(), seed=seed)  # noqa: E731
    chunks = list(chunk_documents(documents(), make(0)))
    together, backwards = make(0)(chunks), make(0)(chunks[::-1])
    for name in together:
        assert together[name].equal(backwards[name].flip(0))
        assert together[name][5].equal(make(0)([chunks[5]])[name][0])
    other = list(chunk_documents(documents(), make(1)))
    assert [len(c["input_ids"]) for c in other] != [len(c["input_ids"]) for c in chunks]
    span_corruption = [DataCollatorForDenoising(tokenizer, 128, seed=seed) for seed in (0, 1)]
    chunk = next(chunk_documents(documents(), span_corruption[0]))
    first, second = (collator([chunk])["input_ids"] for collator in span_corruption)
    assert not first.equal(second)


def epoch(dataset, collator, num_workers):
    return list(DataLoader(dataset, batch_size=4, num_workers=num_workers, collate_fn=collator))


def assert_same_epochs(dataset, collator):
    alone = epoch(dataset, collator, 0)
    assert len(alone) > 8
    for num_workers in (1, 2):
        batches = epoch(dataset, collator, num_workers)
        assert len(batches) == len(alone)
        for batch, expected in zip(batches, alone, strict=True):
            assert all(batch[name].equal(expected[name]) for name in expected)
    return alone


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 128, denoiser=MixtureOfDenoisers())
    assert_same_epochs(ChunkedDocuments(documents(), collator, batch_size=4), collator)
    assert_same_epochs(list(chunk_documents(documents(), collator)), collator)


def test_without_the_batch_size_workers_give_the_same_examples_in_another_order(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 128)
    dataset = ChunkedDocuments(documents(), collator)
    alone, shared = (
        sorted(row.tolist() for batch in epoch(dataset, collator, workers) for row in batch["input_ids"])
        for workers in (0, 2)
    )
    assert alone == shared


def test_local_files_streamed_by_datasets(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = documents()
    # several shards: a plain loop in a worker would read only some of them
    for shard in range(3):
        rows = [json.dumps({"body": text, "id": i}) for i, text in enumerate(texts[shard::3])]
        (tmp_path / f"{shard}.jsonl").write_text("\n".join(rows))
    files = [str(tmp_path / f"{shard}.jsonl") for shard in range(3)]
    collator = DataCollatorForDenoising(tokenizer, 128)
    in_memory = [text for shard in range(3) for text in texts[shard::3]]
    expected = list(chunk_documents(in_memory, collator))
    for streaming in (True, False):
        rows = datasets.load_dataset(
            "json", data_files=files, split="train", streaming=streaming, cache_dir=str(tmp_path / "cache")
        )
        chunks = list(chunk_documents(rows, collator, text_column="body"))
        assert len(chunks) == len(expected)
        assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(chunks, expected, strict=True))
        if streaming:
            assert_same_epochs(ChunkedDocuments(rows, collator, text_column="body", batch_size=4), collator)


def test_repeating_goes_on_without_a_break(tokenizer):
    texts = documents(3)
    collator = DataCollatorForDenoising(tokenizer, 128)
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    chunks = chunk_documents(texts, collator, repeat=True)
    tokens = np.concatenate([next(chunks)["input_ids"] for _ in range(3 * len(stream) // 100)])
    assert len(tokens) > 2 * len(stream), "more than two epochs"
    assert tokens.tolist() == [stream[i % len(stream)] for i in range(len(tokens))]


def test_text_that_spells_a_sentinel_stays_text(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 64)
    (chunk,) = chunk_documents(["ab <extra_id_0> cd"], collator)
    assert not set(chunk["input_ids"]) & set(tokenizer.get_sentinel_token_ids())
    assert tokenizer.decode(chunk["input_ids"]) == "ab <extra_id _0> cd</s>"


@pytest.mark.parametrize(
    "spelling",
    ["</s>", "<pad>", "<unk>", "[NLU]", "[S2S]", "<extra_id_7>", "＜/s＞", "<ｐad>", "＜unk>", "<extra_id＿7>"],
)
@pytest.mark.parametrize("text", ["{}", "a = '{}'  # wide： ＞\n    b", "x<{0}{0}>", "é 　{} \x1c{}"])
def test_text_that_spells_a_special_token_stays_text(spelling, text, shipped):
    """Also in wide letters, which the vocabulary's rules make narrow; a special token is only at a text's end."""
    collator = DataCollatorForDenoising(shipped, 256, denoiser=SpanCorruption(mode="R"))
    (chunk,) = chunk_documents([text.format(spelling, spelling)], collator)
    *ids, end = chunk["input_ids"].tolist()
    assert end == shipped.eos_token_id
    # what the vocabulary has no piece for is <unk> with and without the spelling
    unknown = shipped(text.format("", ""))["input_ids"].count(shipped.unk_token_id)
    assert [i for i in ids if i in shipped.all_special_ids] == [shipped.unk_token_id] * unknown
    # all of its letters are there
    read = "".join(shipped.decode([i for i in ids if i != shipped.unk_token_id]).split())
    plain = "".join(shipped.backend_tokenizer.normalizer.normalize_str(text.format(spelling, spelling)).split())
    assert read == plain.replace("é", "")


@pytest.mark.parametrize("text", ["def f(x):\n    return x  # 　ﬁ ＞", "a > b < c [x] /s pad", "\tñ\n\n  日本　語"])
def test_other_text_is_tokenized_as_it_is(text, shipped):
    (chunk,) = chunk_documents([text], DataCollatorForDenoising(shipped, 256))
    assert chunk["input_ids"].tolist() == shipped(text)["input_ids"]


def test_empty_texts_are_skipped_and_bad_ones_named(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 64)
    assert list(chunk_documents(["", " \n", {"text": ""}, {"input_ids": []}], collator)) == []
    (chunk,) = chunk_documents(["", "ab", {"text": "ba"}, {"input_ids": [4]}], collator)
    assert chunk["input_ids"].tolist() == [*tokenizer("ab")["input_ids"], *tokenizer("ba")["input_ids"], 4, 1]
    with pytest.raises(TypeError, match="document 1 is NoneType"):
        list(chunk_documents(["ab", None], collator))
    with pytest.raises(TypeError, match="'text' of document 0 is int"):
        list(chunk_documents([{"text": 3}], collator))
    with pytest.raises(TypeError, match="read again"):
        next(chunk_documents(iter(["ab"]), collator, repeat=True))
    with pytest.raises(ValueError, match="no text"):
        next(chunk_documents([""], collator, repeat=True))
    # a single one would be read character by character, or key by key
    for single in ("ab", b"ab", {"text": "ab"}):
        for read in (
            lambda given: next(chunk_documents(given, collator)),
            lambda given: ChunkedDocuments(given, collator),
        ):
            with pytest.raises(TypeError, match="documents is a .* put a single one into a list"):
                read(single)
    with pytest.raises(TypeError, match="read again"):
        ChunkedDocuments(iter(["ab"]), collator, repeat=True)


@pytest.mark.parametrize(
    ("input_ids", "error", "match"),
    [
        ([[4, 5]], ValueError, r"have shape \(1, 2\); they must be one row"),
        ([[4, 5], [6]], ValueError, "must be one row"),
        (4, ValueError, r"have shape \(\); they must be one row"),
        ([4.5, 5.0], TypeError, "are float64; they must be integers"),
        (["a"], TypeError, "must be integers"),
        (None, ValueError, "must be one row"),
        ([4, -100], ValueError, "hold -100; they must be at least 0"),
        (
            torch.tensor([4, 47, 5]),
            ValueError,
            "hold the sentinel <extra_id_99>, which only the collator may put there",
        ),
    ],
)
def test_ready_tokens_that_cannot_be_are_refused_with_the_documents_number(input_ids, error, match, tokenizer):
    chunks = chunk_documents(["ab", {"input_ids": input_ids}], DataCollatorForDenoising(tokenizer, 64))
    with pytest.raises(error, match=f"input_ids of document 1 {match}" if match[0] != "m" else match):
        list(chunks)


def test_ready_tokens_may_be_a_list_an_array_or_a_tensor(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 64)
    rows = [[4, 5], np.array([4, 5], dtype=np.uint16), torch.tensor([4, 5], dtype=torch.int32), []]
    (chunk,) = chunk_documents([{"input_ids": row} for row in rows], collator)
    assert chunk["input_ids"].tolist() == [4, 5, 1] * 3


def test_a_chunk_that_does_not_fit_is_refused(tokenizer):
    collator = DataCollatorForDenoising(tokenizer, 64)
    raw = collator.plans[0].raw
    with pytest.raises(ValueError, match=f"{raw + 1} tokens.* holds {raw} "):
        collator([{"input_ids": random_tokens(raw + 1)}])
    with pytest.raises(ValueError, match="holds sentinels"):
        collator([{"input_ids": tokenizer("a <extra_id_3>")["input_ids"]}])
    with pytest.raises(ValueError, match="one row"):
        collator([{"input_ids": []}])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SpanCorruption(0), "noise_density"),
        (lambda: SpanCorruption(1.0), "noise_density"),
        (lambda: SpanCorruption(float("nan")), "noise_density"),
        (lambda: SpanCorruption(0.15, 0.5), "mean_span_length"),
        (lambda: SpanCorruption(0.15, math.inf), "mean_span_length"),
        (lambda: SpanCorruption(0.8, 2), "fewer"),
        (lambda: SpanCorruption(mode="Q"), "mode"),
        (lambda: PrefixLM(0), "noise_density"),
        (lambda: MixtureOfDenoisers(()), "at least one"),
        (lambda: MixtureOfDenoisers(weights=[1, 2]), "2 weights for 7"),
        (lambda: MixtureOfDenoisers((SpanCorruption(),), [0]), "positive"),
        (lambda: DataCollatorForDenoising(make_tokenizer(), 4), "input_length is 4"),
        (lambda: DataCollatorForDenoising(make_tokenizer(), 64, 3), "target_length 3"),
        (lambda: DataCollatorForDenoising(make_tokenizer(), 64, seed=-1), "seed is -1"),
        (lambda: DataCollatorForDenoising(make_tokenizer(0), 64), "no sentinels"),
        (lambda: DataCollatorForDenoising(CoLT5Tokenizer(), 64, denoiser=MixtureOfDenoisers()), "mode_tokens=True"),
        (lambda: ChunkedDocuments([], DataCollatorForDenoising(make_tokenizer(), 64), batch_size=0), "batch_size"),
    ],
)
def test_impossible_values_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input_length": 64.5}, "input_length is 64.5"),
        ({"input_length": 64, "target_length": 20.0}, "target_length is 20.0"),
        ({"input_length": None}, "input_length is None"),
        ({"input_length": True}, "input_length is True"),
        ({"input_length": 64, "seed": "1"}, "seed is '1'"),
        ({"input_length": 64, "seed": None}, "seed is None"),
        ({"input_length": 64, "denoiser": [SpanCorruption()]}, "denoiser is a list"),
    ],
)
def test_arguments_of_another_type_are_refused(given, match):
    with pytest.raises(TypeError, match=match):
        DataCollatorForDenoising(make_tokenizer(), **given)


def test_other_kinds_in_a_mixture_or_as_batch_size_are_refused():
    for denoisers in (SpanCorruption(), ["R"], [MixtureOfDenoisers()]):
        with pytest.raises(TypeError, match="denoisers is .* sequence of SpanCorruption and PrefixLM"):
            MixtureOfDenoisers(denoisers)
    with pytest.raises(TypeError, match="batch_size is 1.5"):
        ChunkedDocuments([], DataCollatorForDenoising(make_tokenizer(), 64), batch_size=1.5)


def test_numpys_integers_are_integers(tokenizer):
    numbers = {"input_length": np.int64(64), "target_length": np.int32(20), "seed": np.uint8(3)}
    chunk = {"input_ids": random_tokens(40)}
    batch = DataCollatorForDenoising(tokenizer, **numbers)([chunk])
    expected = DataCollatorForDenoising(tokenizer, 64, 20, seed=3)([chunk])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
