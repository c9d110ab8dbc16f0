"""The embedding that encoder, decoder and head share: one module under several names, tied, adapted and saved."""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.utils import logging

from .configuration_colt5 import CoLT5Config
from .kernel_backend import runs_eagerly
from .model_base import CoLT5PreTrainedModel, CoLT5Stack

logger = logging.get_logger(__name__)


def _tie_assigned_head(model: "CoLT5EmbeddingModel", incompatible_keys: Any) -> None:
    """After `load_state_dict(..., assign=True)`, which puts other parameters in place: a tied head, whose weight
    checkpoints lack, takes the new one of `shared`. Where that is missing as well, nothing was put in its place."""
    head = getattr(model, "lm_head", None)
    missing = [f".{key}" for key in incompatible_keys.missing_keys]
    if (
        head is not None
        and model.config.tie_word_embeddings
        and type(model.shared) is nn.Embedding
        and head.weight is not model.shared.weight
        and any(key.endswith(".lm_head.weight") for key in missing)
        and not any(key.endswith(".shared.weight") for key in missing)
    ):
        head.weight = model.shared.weight


def _forgive_other_names(model: "CoLT5EmbeddingModel", incompatible_keys: Any) -> None:
    """After `load_state_dict`: what an adapter of the embedding has got under the name `shared` is not missing under
    the others, which a saved adapter lacks. The embedding's own weight stays: `Trainer` looks for it there."""
    missing = incompatible_keys.missing_keys
    stacks = "|".join(model.stacks())
    shared = {key: re.sub(rf"(^|\.)(?:{stacks})\.embed_tokens\.(?!weight$)", r"\1shared.", key) for key in missing}
    missing[:] = [key for key, name in shared.items() if name == key or name in shared]


class CoLT5OtherName(nn.Module):
    """A placeholder in lists of modules for another name of the embedding; that name itself gives the embedding.

    It has no parts, so that what is done for each module or tensor of a list is done to the embedding once.
    """


class CoLT5EmbeddingModel(CoLT5PreTrainedModel):
    """What all models but the stacks share: the embedding, one module called `shared` here and `embed_tokens` in each
    stack.

    One module, not several that share a weight: FSDP2 takes a weight for one group of modules only, and a hook
    (NEFTune's) then sees the calls of all stacks. To replace it under one of its names, as adapters do, replaces it
    under all of them.
    """

    all_tied_weights_keys: dict[str, str]

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        # The annotation is the wide one because adapters put other modules in its place.
        self.shared: nn.Module = nn.Embedding(config.vocab_size, config.d_model)
        self.register_load_state_dict_post_hook(_tie_assigned_head)
        self.register_load_state_dict_post_hook(_forgive_other_names)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in every CoLT5 model. Where the head is tied in the checkpoint and is not to be tied here, it begins as a
        copy of the embedding."""
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        is_untied = "lm_head.weight" in info["missing_keys"] and not model.config.tie_word_embeddings
        if is_untied and pretrained_model_name_or_path is not None:
            # of an adapter's folder this is the folder of its model
            saved, _ = PreTrainedConfig.get_config_dict(model.name_or_path, **kwargs)
            if saved.get("tie_word_embeddings") and not model.lm_head.weight.is_meta:
                with torch.no_grad():
                    model.lm_head.weight.copy_(model.shared.weight)
                info["missing_keys"].remove("lm_head.weight")
                logger.warning(
                    "lm_head.weight is not new: the checkpoint ties it to the embedding, and it begins as a copy of "
                    "that, because tie_word_embeddings is False here"
                )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """As in every model. A head that is no longer tied is saved with a weight of its own; the model stays as it
        is, since an optimizer may hold its weights."""
        if self._is_still_shared():
            state_dict = dict(self.state_dict() if state_dict is None else state_dict)
            if "shared.weight" in state_dict:
                state_dict["lm_head.weight"] = state_dict["shared.weight"].clone()
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """As in every model. A head that is no longer tied gets a weight of its own, with the same numbers."""
        result = super().tie_weights(*args, **kwargs)
        if self._is_still_shared():
            weight = self.lm_head.weight
            self.lm_head.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        return result

    def _is_still_shared(self) -> bool:
        """Whether the head has the embedding's weight, and the configuration says no longer that it is tied."""
        head, weight = getattr(self, "lm_head", None), getattr(self.shared, "weight", None)
        return type(head) is nn.Linear and head.weight is weight and not self.config.tie_word_embeddings

    def stacks(self) -> dict[str, CoLT5Stack]:
        """Encoder and decoder by name, those that there are."""
        return {name: stack for name, stack in self.named_children() if isinstance(stack, CoLT5Stack)}

    def share_embedding(self) -> None:
        """Make `shared` the embedding of all stacks, now and whenever one of them gets another."""
        for stack in self.stacks().values():
            stack.share_embedding_with(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "shared":
            self.share_embedding()
        if name in ("shared", "lm_head"):
            self._part_from_adapted()

    def _part_from_adapted(self) -> None:
        """Give a tied head a weight of its own while it or the embedding is an adapter, and the common one again once
        neither is and they are still equal. Merging adds to a weight in place: in a common one, to both."""
        head = getattr(self, "lm_head", None)
        if head is None or not self.config.tie_word_embeddings:
            return
        if type(self.shared) is nn.Embedding and type(head) is nn.Linear:
            one, other = self.shared.weight, head.weight
            has_data = runs_eagerly() and not (one.is_meta or other.is_meta)
            if one is not other and has_data and one.shape == other.shape and torch.equal(one, other):
                head.weight = one
            return
        inner = next((part for part in head.modules() if type(part) is nn.Linear), None)
        if inner is not None and any(inner.weight is weight for weight in self.shared.parameters()):
            # PEFT can make adapters without data, and then takes the data of every parameter that is
            # registered meanwhile. This one is the model's and has to keep it.
            inner._parameters["weight"] = nn.Parameter(inner.weight.detach().clone(), inner.weight.requires_grad)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """PyTorch's, where the embedding is `shared`, and then its names in the stacks, by which adapters look for it.

        Its tensors have one place and are listed with it alone: `torch.func.functional_call` puts another tensor into
        every place that it finds here and then the old one, which must not be the tensor that it has just put there.
        """
        memo = set() if memo is None else memo
        is_new = self not in memo
        start = f"{prefix}." if prefix else ""
        others = [f"{start}{name}.embed_tokens" for name in self.stacks()]
        within = tuple(f"{name}." for name in others)
        listed = super().named_modules(memo, prefix, remove_duplicate)
        if remove_duplicate and next(iter(self._modules), None) == "shared":
            # What comes first is not listed again. Trainer asks for all parameters several times in each step, and to
            # compare each name takes longer than the list.
            yield from listed
        else:
            yield from (
                (name, module) for name, module in listed if name not in others and not name.startswith(within)
            )
        if is_new:
            yield from ((name, CoLT5OtherName()) for name in others)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.share_embedding()

    @property
    def _tied_weights_keys(self) -> dict[str, str] | None:
        if not (hasattr(self, "lm_head") and self.config.tie_word_embeddings):
            return None
        # The stacks' names are a pattern, because PEFT would tie the modules that it finds by name, and these are
        # `shared` itself.
        return {"lm_head.weight": "shared.weight", r"(en|de)coder\.embed_tokens\.weight": "shared.weight"}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The names of `shared.weight` beside this one: the stacks' always, the head's where it is tied."""
        names = [f"{name}.embed_tokens.weight" for name in self.stacks()]
        if self._tied_weights_keys:
            names.append("lm_head.weight")
        return dict.fromkeys(names, "shared.weight")

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        """As in Transformers, for the head alone: a mark on a stack's embedding would also mark `shared`, which would
        then not be initialised where a checkpoint has no embedding."""
        tied = self.all_tied_weights_keys
        self.all_tied_weights_keys = {name: source for name, source in tied.items() if "embed_tokens" not in name}
        super().mark_tied_weights_as_initialized(loading_info)
        self.all_tied_weights_keys = tied

    @property
    def _keys_to_ignore_on_save(self) -> set[str]:
        """The other names of `shared.weight`. A checkpoint that lacks exactly these lacks nothing, as `Trainer` sees
        it; and a state dict that FSDP2 gathers has copies in place of one tensor under several names."""
        names = {f"{name}.embed_tokens.weight" for name in self.stacks()}
        head = getattr(self, "lm_head", None)
        is_shared = getattr(head, "weight", None) is getattr(self.shared, "weight", self.shared)
        if head is not None and is_shared and not self._is_still_shared():
            names.add("lm_head.weight")
        return names

    @_keys_to_ignore_on_save.setter
    def _keys_to_ignore_on_save(self, names: Any) -> None:
        # Transformers sets what it has just read, which need not be kept: the names depend on what is tied when they
        # are asked for.
        pass

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of all stacks."""
        return self.shared

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the embedding in all stacks."""
        self.shared = new_embeddings
