r"""Fine-tune a CoLT5 encoder to embed texts, by contrast, through sentence-transformers; score it by retrieval.

    python examples/embeddings.py --model_name_or_path my-colt5 --train_file pairs.jsonl \
        --validation_file held_out.jsonl --query_column query --document_column document --output_dir embeddings

A row holds a query and the document that answers it; the other documents of a batch are what they are told from.
Without files the task is made from what is installed: of every function and class of Python's standard library the
first sentence of its docstring is the query, and its code without the docstring the document. Whole modules are held
out.
The folder that is written loads with `SentenceTransformer`. All options of `TrainingArguments` work.
"""

import ast
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from data import DataArguments, check_rows, describe, hold_out, load_rows, lost_tokens, map_rows
from datasets import Dataset, DatasetDict
from model_arguments import (
    ModelArguments,
    RouterArguments,
    check_model,
    load_model,
    load_tokenizer,
    parse_arguments,
    watch_routers,
)
from run_costs import warn_of_few_steps
from run_record import keep_record
from safetensors.torch import save_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from sklearn.feature_extraction.text import TfidfVectorizer
from small_model import modules_of
from sources import check_least
from training_defaults import CHECKPOINTING, TimeLeft, TrainingDefaults, run_script
from transformers import (
    AutoModelForTextEncoding,
    PreTrainedTokenizerBase,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_colt5.router_health import RouterHealthCallback

# one module in so many is held out, chosen by its place in the order of names
HELD_OUT = 8
# a query says something, and code is more than a heading
LEAST_WORDS, LEAST_CHARACTERS = 4, 120


@dataclass
class TaskArguments(DataArguments):
    """Columns and lengths."""

    query_column: str = field(default="query", metadata={"help": "the column of the query"})
    document_column: str = field(default="document", metadata={"help": "the column of the document"})
    max_length: int = field(default=4096, metadata={"help": "tokens of a text at most"})
    rows_of_a_pass: int = field(
        default=8, metadata={"help": "texts that are kept for a backward pass at a time; a batch may be larger"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # a token of text, and the end
        check_least(2, max_length=self.max_length)
        check_least(1, rows_of_a_pass=self.rows_of_a_pass)


@dataclass
class RunArguments(TrainingDefaults, SentenceTransformerTrainingArguments):
    """Trainer's arguments, with the defaults of these scripts."""

    # the more documents a batch has, the more a query is told from
    per_device_train_batch_size: int = field(default=64, metadata={"help": "pairs of a batch on each device"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "passes of a step"})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": f"see {CHECKPOINTING}; not decided here: lower --rows_of_a_pass first"}
    )
    dry_run: bool = field(default=False, metadata={"help": "not here: there is no formula for training by contrast"})


@dataclass
class WholeTextRouterArguments(RouterArguments):
    """How the routers are trained, and watched. The dense start reads texts whole, since a query's beginning may fit
    several documents."""

    dense_start_input_share: float = field(
        default=1.0, metadata={"help": "the share of every input that both read: here 1, texts are read whole"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_start_input_share != 1:
            raise ValueError(
                f"dense_start_input_share is {self.dense_start_input_share}; embeddings read texts whole: it must be 1"
            )


class DocumentsHealth(RouterHealthCallback):
    """Logs what the routers do on the first documents: queries are too short to choose from, and sentence-transformers
    calls the encoder without its hooks, so that its batches are not seen.

    Args:
        log, interval: as of `RouterHealthCallback`.
        documents: the encoder's keywords.
    """

    def __init__(self, log: Callable[[dict[str, float]], None], interval: int, documents: dict[str, torch.Tensor]):
        super().__init__(log, interval)
        self.documents = documents

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Find the routers, and give the encoder the documents, which are kept as the run's first batch."""
        encoder = model[0].auto_model
        super().on_train_begin(args, state, control, encoder, **kwargs)
        was_training = encoder.training
        encoder.train()
        with torch.no_grad():
            encoder(**{name: tensor.to(encoder.device) for name, tensor in self.documents.items()})
        encoder.train(was_training)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Measure the encoder."""
        super().on_step_end(args, state, control, model[0].auto_model, **kwargs)


def say_what_is_cut(
    rows: DatasetDict, task: TaskArguments, tokenizer: PreTrainedTokenizerBase, training: RunArguments
) -> None:
    """Say how much of queries and documents does not fit into `max_length`: sentence-transformers cuts in silence."""
    for column, what in ((task.query_column, "queries"), (task.document_column, "documents")):

        def tokenize(batch: dict[str, list[str]], column: str = column, what: str = what) -> Any:
            inputs = tokenizer(batch[column], max_length=task.max_length, truncation=True)
            inputs[f"lost_{what}"] = lost_tokens(inputs)
            return inputs

        map_rows(rows, tokenize, training)


def documented_code(source: str) -> Iterator[tuple[str, str]]:
    """The first sentence of the docstring, and the code without it, of each function and class of a module.

    Args:
        source: of the module, of which the top level counts; what is no Python gives nothing.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        query = " ".join(docstring.split("\n\n")[0].split()).split(". ")[0]
        node.body = node.body[1:] or [ast.Pass()]
        code = ast.unparse(node)
        if len(query.split()) >= LEAST_WORDS and len(code) >= LEAST_CHARACTERS:
            yield query, code


def local_pairs(folder: Path, query_column: str, document_column: str) -> DatasetDict:
    """The task of a folder of modules: pairs of the splits "train" and "validation", of different modules, without
    queries and documents that stand there twice.

    Args:
        folder: of modules, such as the standard library; tests and installed packages in it are left out.
        query_column, document_column: what the columns are called.
    """
    files = modules_of(folder)
    places = {name: i for i, name in enumerate(sorted({path.relative_to(folder).parts[0] for path in files}))}
    seen: set[str] = set()
    rows: dict[str, list[dict[str, str]]] = {"train": [], "validation": []}
    for path in files:
        split = "validation" if places[path.relative_to(folder).parts[0]] % HELD_OUT == 0 else "train"
        for query, code in documented_code(path.read_text(encoding="utf-8", errors="replace")):
            if not {query, code} & seen:
                seen |= {query, code}
                rows[split].append({query_column: query, document_column: code})
    return DatasetDict({split: Dataset.from_list(part) for split, part in rows.items() if part})


def retrieval(queries: list[str], documents: list[str], name: str) -> InformationRetrievalEvaluator:
    """The score of finding each query's document, which has the same place, among all of them."""
    return InformationRetrievalEvaluator(
        dict(zip(map(str, range(len(queries))), queries, strict=True)),
        dict(zip(map(str, range(len(documents))), documents, strict=True)),
        {str(i): {str(i)} for i in range(len(queries))},
        mrr_at_k=[10],
        ndcg_at_k=[10],
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[10],
        map_at_k=[100],
        write_csv=False,
        name=name,
    )


def words_score(queries: list[str], documents: list[str]) -> float:
    """The mean reciprocal rank of the first ten by common words (TF-IDF): what an embedding should be above."""
    # names in code are words with underscores and capitals between them
    vectorizer = TfidfVectorizer(token_pattern=r"[A-Za-z][a-z]+|[A-Z]+|\d+", sublinear_tf=True)
    matrix = vectorizer.fit_transform(documents)
    likeness = (vectorizer.transform(queries) @ matrix.T).toarray()
    own = np.diag(likeness)[:, None]
    # of equals the mean rank
    ranks = 1 + (likeness > own).sum(1) + ((likeness == own).sum(1) - 1) / 2
    return float(np.where(ranks <= 10, 1 / ranks, 0).mean())


def prepare(argv: list[str] | None = None) -> Callable[[], dict[str, float]]:
    """Check the rows, load the model; gives what trains, scores and saves."""
    kinds = (ModelArguments, WholeTextRouterArguments, TaskArguments, RunArguments)
    model_arguments, routers, task, training = parse_arguments(kinds, __doc__, argv)
    if training.dry_run:
        raise ValueError("dry_run has no formula for training by contrast: try a few steps with --max_steps 5")
    check_model(model_arguments)
    set_seed(training.seed)
    if task.train_file is None and task.validation_file is None and task.dataset_name is None:
        rows = local_pairs(Path(sysconfig.get_paths()["stdlib"]), task.query_column, task.document_column)
        limits = {"train": task.max_train_samples, "validation": task.max_eval_samples}
        rows = DatasetDict(
            {split: part.select(range(min(limits[split] or len(part), len(part)))) for split, part in rows.items()}
        )
    else:
        rows = load_rows(task, task.document_column)
    for split, part in rows.items():
        check_rows(part, split, {task.query_column: str, task.document_column: str})
    if "validation" not in rows and not task.validation_share:
        raise ValueError(
            "embeddings are scored by retrieval: give --validation_file with pairs that are held out, or "
            "--validation_share 0.1 to hold out a tenth of the training pairs"
        )
    rows = hold_out(rows, task.validation_share)
    texts = [list(rows["validation"][column]) for column in (task.query_column, task.document_column)]

    tokenizer = load_tokenizer(model_arguments)
    say_what_is_cut(rows, task, tokenizer, training)
    encoder = load_model(model_arguments, AutoModelForTextEncoding, tokenizer)
    with TemporaryDirectory() as folder:
        # each process for itself, where `encoder.save_pretrained` writes in the first one alone
        encoder.config.save_pretrained(folder)
        save_file(dict(encoder.named_parameters()), Path(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        model = SentenceTransformer(folder, device=str(training.device))
    model.max_seq_length = task.max_length

    evaluator = retrieval(*texts, "held_out")
    training.decide_evaluation(True, "train" in rows, "held_out_cosine_mrr@10", greater=True)
    optimizer = training.make_optimizer(model, is_new=model_arguments.size is not None)
    pairs = rows.get("train")
    trainer = SentenceTransformerTrainer(
        model,
        training,
        train_dataset=None if pairs is None else pairs.select_columns([task.query_column, task.document_column]),
        evaluator=evaluator,
        loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=task.rows_of_a_pass),
        optimizers=(optimizer, None),
        callbacks=[TimeLeft()],
    )
    if pairs is not None:
        first = pairs[:8][task.document_column]
        length = {"max_length": task.max_length, "truncation": True, "padding": True}
        documents = tokenizer(first, return_tensors="pt", **length)
        watch_routers(trainer, routers, task.max_length, health=partial(DocumentsHealth, documents=dict(documents)))
        warn_of_few_steps(trainer)
    data = describe(task) or "functions and classes of Python's standard library, with their docstrings"

    def start() -> dict[str, float]:
        scores = {}
        if pairs is not None:
            scores["before"] = evaluator(model)
            trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        scores["eval"] = evaluator(model)
        trainer.save_model()
        metrics = {
            f"{when}_{name}": float(found[f"held_out_cosine_{name}"])
            for when, found in scores.items()
            for name in ("mrr@10", "recall@10")
        }
        metrics |= {"words_mrr@10": words_score(*texts), "queries": float(len(texts[0]))}
        keep_record(trainer, metrics, "embeddings", data, task.dataset_name, model_arguments.model_name_or_path)
        return metrics

    return start


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Check the rows, train, score, save; gives the metrics."""
    return prepare(argv)()


if __name__ == "__main__":
    run_script(prepare)
