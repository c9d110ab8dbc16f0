"""CoLT5Tokenizer: T5's ids, long inputs, sentinels in order, mode tokens, and copies that carry their code."""

import argparse
import ast
import copy
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from transformers import AutoTokenizer, T5Tokenizer

from modeling_colt5 import CoLT5Config
from modeling_colt5.tokenization_colt5 import UL2_MODE_TOKENS, CoLT5Tokenizer

TEXTS = [
    "the cat sat on the mat",
    "  the\n\n\tcat   sat ",
    "the <extra_id_0> sat <extra_id_1> mat <extra_id_99>",
    "cat</s> the <pad> mat",
    "unknown: ж 猫 ﬁ ½",
    "def f(x):\n    return x  # twice\n",
    "",
    "at" * 2000,
]

# [pad, eos, unk, pieces...] in T5's order. scores fall with the piece's rarity, as a trainer's do
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
PIECES += [(piece, -3.0 - 0.1 * i) for i, piece in enumerate(["▁the", "▁cat", "at", "▁sat", "▁on", "▁m", "▁return"])]
PIECES += [(letter, -6.0 - 0.1 * i) for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz:()#")]
SENTINELS = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A folder as T5's are: tokenizer.json, and a tokenizer_config.json of T5Tokenizer with T5's 512 tokens."""
    folder = tmp_path_factory.mktemp("t5")
    T5Tokenizer(vocab=PIECES + SENTINELS, model_max_length=512).save_pretrained(folder)
    return folder


def assert_same_ids(ours, theirs):
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        ids = theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids), text
    assert ours(*TEXTS[:2])["input_ids"] == theirs(*TEXTS[:2])["input_ids"]
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2)


def test_ids_are_t5s_on_a_tokenizer_json(t5_folder):
    assert_same_ids(CoLT5Tokenizer.from_pretrained(t5_folder), T5Tokenizer.from_pretrained(t5_folder))


def test_ids_are_t5s_on_a_sentencepiece_model(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a final mat and a hat"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=18,
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    os.remove(tmp_path / "spiece.vocab")
    ours, theirs = CoLT5Tokenizer.from_pretrained(tmp_path), T5Tokenizer.from_pretrained(tmp_path)
    assert_same_ids(ours, theirs)
    assert len(ours) == 118
    # the normaliser came along: NFKC turns the ligature into two letters
    assert ours.tokenize("ﬁ") == ours.tokenize("fi")
    ours.save_pretrained(tmp_path / "again")
    assert_same_ids(CoLT5Tokenizer.from_pretrained(tmp_path / "again"), theirs)


@pytest.mark.skipif("COLT5_T5_TOKENIZER" not in os.environ, reason="COLT5_T5_TOKENIZER names no T5 tokenizer folder")
@pytest.mark.parametrize("file", [None, "tokenizer.json", "spiece.model"])
def test_ids_are_t5s_on_t5s_own_vocabulary(file, tmp_path):
    folder = os.environ["COLT5_T5_TOKENIZER"]
    theirs = T5Tokenizer.from_pretrained(folder)
    if file is not None:
        if file == "spiece.model":
            pytest.importorskip("sentencepiece")
            pytest.importorskip("google.protobuf")
        shutil.copy(os.path.join(folder, file), tmp_path)
        folder = tmp_path
    ours = CoLT5Tokenizer.from_pretrained(folder)
    assert_same_ids(ours, theirs)
    # from the T5 papers' checkpoints: 32,000 pieces, then <extra_id_99> to <extra_id_0>
    assert (len(ours), ours.get_sentinel_token_ids()[0], ours.get_sentinel_token_ids()[99]) == (32100, 32099, 32000)
    with_modes = CoLT5Tokenizer.from_pretrained(folder, mode_tokens=True)
    assert with_modes.get_mode_token_ids() == {"R": 32100, "S": 32101, "X": 32102}


def test_long_text_is_not_cut(t5_folder, tmp_path):
    text = "cat " * 3000
    assert len(T5Tokenizer.from_pretrained(t5_folder)(text, truncation=True)["input_ids"]) == 512
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder)
    assert len(tokenizer(text, truncation=True)["input_ids"]) == 3001
    assert tokenizer.model_max_length == CoLT5Tokenizer().model_max_length == 65_536


def test_a_chosen_maximum_is_kept(t5_folder, tmp_path):
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder, model_max_length=512)
    assert tokenizer.model_max_length == 512
    tokenizer.save_pretrained(tmp_path)
    assert CoLT5Tokenizer.from_pretrained(tmp_path).model_max_length == 512
    assert CoLT5Tokenizer.from_pretrained(tmp_path, model_max_length=1024).model_max_length == 1024


def test_sentinels_come_in_order(t5_folder):
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder, mode_tokens=True)
    assert tokenizer.get_sentinel_tokens() == [f"<extra_id_{i}>" for i in range(100)]
    first = len(PIECES) + 99
    assert tokenizer.get_sentinel_token_ids() == list(range(first, first - 100, -1))
    assert tokenizer("<extra_id_7>", add_special_tokens=False)["input_ids"] == [first - 7]


def test_the_number_of_sentinels_is_an_argument(tmp_path):
    tokenizer = CoLT5Tokenizer(vocab=PIECES + SENTINELS[-4:], extra_ids=4)
    assert len(tokenizer) == len(PIECES) + 4
    tokenizer.save_pretrained(tmp_path)
    again = CoLT5Tokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.get_sentinel_tokens() == [f"<extra_id_{i}>" for i in range(4)]
    # more than the saved vocabulary has would all be unk
    more = CoLT5Tokenizer.from_pretrained(tmp_path, extra_ids=6)
    with pytest.raises(ValueError, match="extra_ids is 6, but the vocabulary has 4 sentinels: <extra_id_4> is not"):
        more.get_sentinel_token_ids()
    assert more.add_tokens(more.get_sentinel_tokens(), special_tokens=True) == 2
    first = len(PIECES)
    assert more.get_sentinel_token_ids() == [first + 3, first + 2, first + 1, first, first + 4, first + 5]


@pytest.mark.parametrize("piece", ["▁a", ("▁a",), ("▁a", -2.0, 1)])
def test_pieces_without_a_score_are_refused(piece):
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    with pytest.raises(TypeError, match=r"vocab has .*▁a.* at 3; each entry must be a piece and its score"):
        CoLT5Tokenizer(vocab=[*scored, piece])


def test_mode_tokens_are_one_token_each_and_survive(t5_folder, tmp_path):
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder, mode_tokens=True)
    size = len(PIECES) + 100
    assert tokenizer.get_mode_token_ids() == {"R": size, "S": size + 1, "X": size + 2}
    assert tokenizer("[S2S] the cat")["input_ids"] == [
        size + 1,
        *CoLT5Tokenizer.from_pretrained(t5_folder)("the cat")["input_ids"],
    ]
    # skipped in decoding, as special tokens are
    assert tokenizer.decode(tokenizer("[NLG] the cat")["input_ids"], skip_special_tokens=True).strip() == "the cat"
    tokenizer.save_pretrained(tmp_path)
    again = CoLT5Tokenizer.from_pretrained(tmp_path)
    assert again.mode_tokens and again.get_mode_token_ids() == tokenizer.get_mode_token_ids()
    # T5's class reads the folder too, with the same ids
    assert_same_ids(again, T5Tokenizer.from_pretrained(tmp_path))


def test_without_mode_tokens_there_are_none(t5_folder):
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder)
    assert not set(UL2_MODE_TOKENS.values()) & set(tokenizer.get_vocab())
    with pytest.raises(ValueError, match="mode_tokens=True"):
        tokenizer.get_mode_token_ids()


def test_save_load_copy_and_pickle_keep_everything(t5_folder, tmp_path):
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder, mode_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = CoLT5Tokenizer.from_pretrained(tmp_path)
    for other in (loaded, copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert_same_ids(other, tokenizer)
        assert other.get_mode_token_ids() == tokenizer.get_mode_token_ids()
        assert other.get_sentinel_token_ids() == tokenizer.get_sentinel_token_ids()
        assert other.model_max_length == tokenizer.model_max_length
        assert other.all_special_tokens == tokenizer.all_special_tokens


def test_layout_tokens_decode_to_the_texts_layout():
    pieces = [*PIECES, ("\n", 0.0), ("\n    ", 0.0), ("  ", 0.0), *SENTINELS]
    tokenizer = CoLT5Tokenizer(vocab=pieces)
    tokenizer.add_tokens(["\n", "\n    ", "  "])
    text = "def f(x):\n    return x  # the cat\n\nsat on"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(pieces), "the layout tokens are the vocabulary's own"


RELOAD = """
import json, sys
from transformers import AutoTokenizer

assert "modeling_colt5" not in sys.modules
source, target, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
assert "modeling_colt5" not in sys.modules
if target:
    tokenizer.save_pretrained(target)
print(json.dumps([type(tokenizer).__module__, tokenizer(text)["input_ids"], tokenizer.get_mode_token_ids()]))
"""


# two processes that import everything
@pytest.mark.slow
def test_saved_copies_carry_their_code_for_two_rounds(t5_folder, tmp_path):
    tokenizer = CoLT5Tokenizer.from_pretrained(t5_folder, mode_tokens=True)
    first, second = tmp_path / "first", tmp_path / "second"
    tokenizer.save_pretrained(first)
    config = json.loads((first / "tokenizer_config.json").read_text())
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_colt5.CoLT5Tokenizer", None]}

    text = "[NLU] the cat <extra_id_3>"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for source, target in ((first, second), (second, "")):
        environment["HF_HOME"] = str(tmp_path / f"home_{source.name}")
        run = subprocess.run(
            [sys.executable, "-c", RELOAD, source, target, text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        module, ids, modes = json.loads(run.stdout.splitlines()[-1])
        assert module.startswith("transformers_modules.")
        assert ids == tokenizer(text)["input_ids"]
        assert modes == tokenizer.get_mode_token_ids()
        shutil.rmtree(source)


def test_auto_tokenizer_gives_the_packages_class(t5_folder, tmp_path):
    # importing the package registers the tokenizer: no config.json and no trusted code are needed
    CoLT5Tokenizer.from_pretrained(t5_folder).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is CoLT5Tokenizer
    assert tokenizer.model_max_length == 65_536
    (tmp_path / "tokenization_colt5.py").unlink()
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is CoLT5Tokenizer


TOKENIZATION = Path(__file__).parents[1] / "tokenization"


@pytest.fixture(scope="module")
def script():
    """`tokenization/` is no package: its script is loaded from its path."""
    pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    spec = importlib.util.spec_from_file_location("train_vocabulary", TOKENIZATION / "train_vocabulary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_small_vocabulary_is_of_t5s_form():
    folder = TOKENIZATION / "python_stdlib"
    tokenizer = CoLT5Tokenizer.from_pretrained(folder)
    assert type(AutoTokenizer.from_pretrained(folder)) is CoLT5Tokenizer
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.get_sentinel_token_ids() == list(range(8099, 7999, -1))
    assert tokenizer.get_mode_token_ids() == {"R": 8100, "S": 8101, "X": 8102}
    assert (len(tokenizer), tokenizer.model_max_length) == (8103, 65_536)
    theirs = T5Tokenizer.from_pretrained(folder)
    assert theirs.get_vocab() == tokenizer.get_vocab()
    for text in (*TEXTS, Path(textwrap.__file__).read_text(encoding="utf-8")):
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 600_000


@pytest.mark.parametrize("module", [textwrap, argparse, json.decoder])
def test_the_small_vocabulary_keeps_python_source(module):
    tokenizer = CoLT5Tokenizer.from_pretrained(TOKENIZATION / "python_stdlib")
    source = Path(module.__file__).read_text(encoding="utf-8")
    ids = tokenizer(source, verbose=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert ast.dump(ast.parse(decoded)) == ast.dump(ast.parse(source))
    # a vocabulary of single letters would have 1 or 2 characters a token
    assert len(source) / len(ids) > 3


@pytest.mark.parametrize("keep_whitespace", [False, True])
def test_training_gives_t5s_form_and_the_same_file_twice(script, keep_whitespace, tmp_path):
    text = tmp_path / "text.py"
    text.write_text(Path(textwrap.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--vocab_size", "400", "--extra_ids", "7", "--mode_tokens"]
    options += ["--keep_whitespace"] if keep_whitespace else []
    for name in ("first", "second"):
        script.main([str(tmp_path / name), "--files", str(text), *options])
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    tokenizer = CoLT5Tokenizer.from_pretrained(tmp_path / "first")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.get_sentinel_token_ids() == list(range(406, 399, -1))
    assert tokenizer.get_mode_token_ids() == {"R": 407, "S": 408, "X": 409}
    snippet = "def f(x):\n    return x  # ﬁ\n"
    expected = snippet.replace("ﬁ", "fi")
    assert tokenizer.decode(tokenizer(snippet)["input_ids"], skip_special_tokens=True) == (
        expected if keep_whitespace else " ".join(expected.split())
    )
    theirs = T5Tokenizer.from_pretrained(tmp_path / "first")
    assert all(tokenizer(text)["input_ids"] == theirs(text)["input_ids"] for text in TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab_size", "60"], "vocab_size is 60; it must be at least 98, for any text$"),
        (["--vocab_size", "-1"], "vocab_size is -1; it must be at least 98"),
        (["--vocab_size", "60", "--keep_whitespace"], "at least 171, for any text, 73 layout tokens among them"),
        (["--vocab_size", "170", "--keep_whitespace"], "vocab_size is 170; it must be at least 171"),
        (["--extra_ids", "-1"], "extra_ids is -1; it must be at least 0"),
        (["--character_coverage", "0.9"], "character_coverage is 0.9; it must be from 0.98 to 1"),
        (["--character_coverage", "nan"], "character_coverage is nan"),
        (["--vocab_size", "5000"], r"Vocabulary size too high \(5000\). Please set it to a value <= \d+.$"),
        (["--vocab_size", "5000", "--keep_whitespace"], r"too high \(4927\).* without the 73 layout tokens"),
    ],
)
def test_what_cannot_be_trained_is_one_line(script, options, message, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox\n" * 9, encoding="utf-8")
    with pytest.raises(SystemExit, match=message) as error:
        script.main([str(tmp_path / "out"), "--files", str(text), *options])
    assert str(error.value).startswith("train_vocabulary.py: ") and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep_whitespace", [False, True])
def test_the_least_size_is_the_least_that_can_be_trained(script, keep_whitespace):
    """Of text of no other characters. One less is refused before sentencepiece would refuse it."""
    least = 98 + 73 * keep_whitespace
    tokenizer = script.train(["abc"] * 9, least, keep_whitespace=keep_whitespace, extra_ids=0)
    assert len(tokenizer) == least
    with pytest.raises(ValueError, match=f"vocab_size is {least - 1}"):
        script.train(["abc"] * 9, least - 1, keep_whitespace=keep_whitespace, extra_ids=0)


def test_files_that_are_not_there_are_named(script, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(SystemExit, match=r"^train_vocabulary.py: --files has .*none.txt, .*, where no file is$"):
        script.main(
            [str(tmp_path / "out"), "--files", *(str(tmp_path / name) for name in ("empty.txt", "none.txt", ""))]
        )
    with pytest.raises(SystemExit, match="there is no text to train on"):
        script.main([str(tmp_path / "out"), "--files", str(tmp_path / "empty.txt")])


@pytest.mark.slow
def test_the_standard_library_is_found(script):
    files = script.standard_library()
    root = Path(textwrap.__file__).parent
    parts = [file.relative_to(root).parts for file in files]
    assert {("textwrap.py",), ("argparse.py",), ("json", "decoder.py")} <= set(parts)
    assert not any({"site-packages", "test"} & set(part) for part in parts)
    assert parts == sorted(parts)


def test_a_folder_without_a_vocabulary_is_refused(tmp_path):
    """Transformers would give a tokenizer of special tokens alone, to which every word is unknown."""
    CoLT5Config().save_pretrained(tmp_path)
    for load in (AutoTokenizer.from_pretrained, CoLT5Tokenizer.from_pretrained):
        with pytest.raises(OSError, match="no tokenizer: neither tokenizer.json nor spiece.model"):
            load(tmp_path)
