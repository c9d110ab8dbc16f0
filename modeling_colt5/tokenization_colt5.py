"""T5's tokenizer for long documents: a long `model_max_length`, ordered sentinels, UL2's mode tokens."""

import json
from typing import Any

from tokenizers import AddedToken, Regex, decoders
from transformers import T5Tokenizer

# The encoder has no limit of positions: this number bounds `truncation=True` without a `max_length` alone. It is four
# times the longest input of the paper's main results (16k).
DEFAULT_MODEL_MAX_LENGTH = 65_536

# The paper writes [R], [S] and [X], and its published checkpoints write these. The paper's forms are ordinary text in
# source code (`Generic[S]`), where they would turn into mode tokens.
UL2_MODE_TOKENS = {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}


def _check_vocabulary(vocab: Any, unk_token: str) -> None:
    """Refuse a vocabulary that T5's tokenizer would read as another one.

    Raises:
        TypeError, ValueError: as of `CoLT5Tokenizer`.
    """
    if vocab is None:
        return
    if isinstance(vocab, dict | str):
        raise TypeError(
            f"vocab is a {type(vocab).__name__}; it must be a list of Unigram's pieces with their scores. A model may "
            "keep a tokenizer of another kind (BPE, words, bytes): load that with AutoTokenizer"
        )
    for number, piece in enumerate(vocab):
        if isinstance(piece, str) or len(piece) != 2:
            raise TypeError(f"vocab has {piece!r} at {number}; each entry must be a piece and its score, ('▁a', -2.5)")
    if len(vocab) < 3 or vocab[2][0] != unk_token:
        raise ValueError(
            f"vocab has {[piece for piece, _ in vocab[:3]]} as its first pieces; the third must be the unknown token "
            f"{unk_token!r}, as in T5's vocabularies. Load a tokenizer with another order with AutoTokenizer"
        )


class CoLT5Tokenizer(T5Tokenizer):
    """T5's Unigram tokenizer; for every T5 vocabulary it gives the ids that `T5Tokenizer` gives.

    What differs from `T5Tokenizer`:

    - `model_max_length` is 65,536 tokens, also for a folder saved by another class (T5's own folders say 512,
      which cuts long documents silently). A value given to `from_pretrained`, or saved by this class, is kept.
    - The sentinels come in order: `<extra_id_0>` first.
    - `mode_tokens=True` appends UL2's three mode tokens (Tay et al. 2022, §3.1.2) after the sentinels, in the form
      of UL2's checkpoints: `[NLU]` (R), `[S2S]` (S), `[NLG]` (X), each one token here. On T5's vocabulary they take
      the ids 32100 to 32102, within the 32128 rows of T5's embedding. Saved and loaded with the tokenizer.
    - A vocabulary that holds newlines and runs of spaces as tokens (T5's does not; see the recipe in
      `tokenization/`) decodes to the text's own layout: no space is put after such a token.

    Args:
        vocab: pieces with their scores (log probabilities) in order of id, sentinels included: pad 0, eos 1, unk 2.
            `None` makes a vocabulary of special tokens alone. `from_pretrained` fills it from `tokenizer.json`, or
            from `spiece.model` where the packages sentencepiece and protobuf are installed.
        mode_tokens: whether the vocabulary holds UL2's mode tokens.
        model_max_length: tokens kept by `truncation=True` when no `max_length` is given.
        extra_special_tokens: special tokens beside eos, unk and pad; by default the `extra_ids` sentinels.
        kwargs: `T5Tokenizer`'s, among them `extra_ids` (number of sentinels, 100).

    Raises:
        TypeError: for a vocabulary of another kind than Unigram's, or pieces without scores.
        ValueError: for a vocabulary whose unknown token is not at 2, where T5's tokenizer looks for it.
    """

    def __init__(
        self,
        vocab: list[tuple[str, float]] | None = None,
        *,
        mode_tokens: bool = False,
        model_max_length: int = DEFAULT_MODEL_MAX_LENGTH,
        extra_special_tokens: list[str | AddedToken] | None = None,
        extra_ids: int = 100,
        **kwargs: Any,
    ):
        if extra_special_tokens is None:
            extra_special_tokens = [f"<extra_id_{i}>" for i in range(extra_ids)]
        if mode_tokens:
            present = {str(token) for token in extra_special_tokens}
            missing = [token for token in UL2_MODE_TOKENS.values() if token not in present]
            extra_special_tokens = [*extra_special_tokens, *missing]
        _check_vocabulary(vocab, str(kwargs.get("unk_token", "<unk>")))
        super().__init__(
            vocab=vocab,
            mode_tokens=mode_tokens,
            model_max_length=model_max_length,
            extra_special_tokens=extra_special_tokens,
            extra_ids=extra_ids,
            **kwargs,
        )
        self.mode_tokens = mode_tokens
        if "\n" in self.get_vocab():
            # Pieces never hold a real space, so a space, tab or newline before "▁" ends a layout token. Elsewhere this
            # decodes as T5's Metaspace does.
            self._tokenizer.decoder = decoders.Sequence(
                [
                    decoders.Fuse(),
                    decoders.Replace(Regex(r"^▁|(?<=[\n\t ])▁"), ""),
                    decoders.Replace("▁", " "),
                ]
            )

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: dict[str, str | None], *args: Any, **kwargs: Any
    ) -> "CoLT5Tokenizer":
        """Load as the base class does, without taking over another class's `model_max_length`.

        Raises:
            OSError: where there is no vocabulary; the base class would make one of special tokens alone.
        """
        if resolved_vocab_files.get("tokenizer_file") is None and resolved_vocab_files.get("vocab_file") is None:
            raise OSError(
                f"{args[0]} has no tokenizer: neither tokenizer.json nor spiece.model is there. Save one with the "
                "model (tokenizer.save_pretrained), or load it from where the vocabulary is"
            )
        config_file = resolved_vocab_files.get("tokenizer_config_file")
        if config_file is not None and "model_max_length" not in kwargs:
            with open(config_file, encoding="utf-8") as file:
                saved_by = json.load(file).get("tokenizer_class")
            if saved_by != cls.__name__:
                kwargs["model_max_length"] = DEFAULT_MODEL_MAX_LENGTH
        return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)

    def _eventual_warn_about_too_long_sequence(self, *args: Any, **kwargs: Any) -> None:
        """Say nothing: the base class announces indexing errors, but a model without positions takes any length."""

    @classmethod
    def convert_from_spm_model(cls, vocab: list[tuple[str, float]], extra_ids: int = 100, **kwargs: Any) -> dict:
        """Append the sentinels to the pieces of a `spiece.model`, the last sentinel first, as T5 does.

        The base class uses T5's order for a class named `T5Tokenizer` only, and calls this for other classes.
        """
        # Sentencepiece's control symbols (pad, eos) are named tokens already.
        kwargs.pop("additional_special_tokens", None)
        sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]
        return {**kwargs, "vocab": [*vocab, *sentinels], "extra_ids": extra_ids}

    def get_sentinel_tokens(self) -> list[str]:
        """The sentinels in order of number: `<extra_id_0>` first."""
        return [f"<extra_id_{i}>" for i in range(self._extra_ids)]

    def get_sentinel_token_ids(self) -> list[int]:
        """The sentinels' ids in order of number; T5's fall by one from the end of the vocabulary.

        Raises:
            ValueError: `extra_ids` is larger than the number of sentinels in the vocabulary.
        """
        vocabulary, sentinels = self.get_vocab(), self.get_sentinel_tokens()
        for number, sentinel in enumerate(sentinels):
            # a saved vocabulary stays as it is, whatever extra_ids it is loaded with; unk would stand for this one
            if sentinel not in vocabulary:
                raise ValueError(
                    f"extra_ids is {len(sentinels)}, but the vocabulary has {number} sentinels: {sentinel} is not in "
                    f"it. Load the tokenizer with extra_ids={number}, or add them: "
                    "add_tokens(tokenizer.get_sentinel_tokens(), special_tokens=True)"
                )
        return [vocabulary[sentinel] for sentinel in sentinels]

    def get_mode_token_ids(self) -> dict[str, int]:
        """The ids of UL2's mode tokens by denoiser, `{"R": …, "S": …, "X": …}`.

        Raises:
            ValueError: the tokenizer was made without `mode_tokens=True`.
        """
        if not self.mode_tokens:
            raise ValueError("this tokenizer has no mode tokens: load it with mode_tokens=True")
        return {name: self.convert_tokens_to_ids(token) for name, token in UL2_MODE_TOKENS.items()}


# A saved copy carries this file and the `auto_map` entry, and so does whatever that copy saves in turn.
CoLT5Tokenizer.register_for_auto_class("AutoTokenizer")
