"""What a model routes of a text, to look at: as a page, in a notebook, as figures, and as numbers."""

import argparse
import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from .routing_page import routing_page


@dataclass(frozen=True)
class RoutingView:
    """The routing of one text.

    In a notebook it shows itself; `save` writes the same page as a file. The figures are drawn on axes of Matplotlib:

        figure, axes = plt.subplots()
        view.plot_share(axes)

    Attributes:
        title: what stands above it.
        tokens: each token's part of the text; together they are the text, and the names of special tokens.
        pieces: what the tokenizer calls each.
        special: which of them stand for no text.
        weights: by the router's name, fp32 [layers, tokens]: each token's weight in the heavy branch, 0 where it was
            not routed. The routers of an encoder are "query", "key_value" and "feed_forward", with routed
            cross-attention also "cross", of the decoder's layers.
    """

    title: str
    tokens: list[str]
    pieces: list[str]
    special: list[bool]
    weights: dict[str, Tensor]

    def html(self) -> str:
        """The page: one HTML document that needs neither files nor the network."""
        rows = {name: weight.tolist() for name, weight in self.weights.items()}
        return routing_page(self.title, self.tokens, self.pieces, self.special, rows)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file; gives its path."""
        path = Path(path)
        path.write_text(self.html(), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        # a frame of its own: the page's style and script touch nothing else of the notebook
        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" width="100%" height="560" '
            f'style="border: 1px solid #d0d7de" title="{html.escape(self.title, quote=True)}"></iframe>'
        )

    def share_by_layer(self) -> dict[str, Tensor]:
        """The share of the tokens that each layer routes, by the router's name, fp32 [layers]."""
        return {name: weight.gt(0).float().mean(1) for name, weight in self.weights.items()}

    def share_by_position(self, router: str, parts: int = 64) -> Tensor:
        """The share of routed tokens in equal parts of the text, fp32 [layers, parts].

        Args:
            router: its name.
            parts: at most one for each token.

        Raises:
            ValueError: for a router that there is not, or fewer than one part.
        """
        if parts < 1:
            raise ValueError(f"parts is {parts}; it must be at least 1")
        routed = self._routed(router).float()
        pieces = routed.tensor_split(min(parts, routed.shape[1]), dim=1)
        return torch.stack([piece.mean(1) for piece in pieces], 1)

    def overlap(self, router: str) -> Tensor:
        """The share of a layer's routed tokens that another layer routes as well, fp32 [layers, layers].

        Args:
            router: its name.

        Raises:
            ValueError: for a router that there is not.
        """
        routed = self._routed(router).float()
        return routed @ routed.T / routed.sum(1, keepdim=True).clamp(min=1)

    def _routed(self, router: str) -> Tensor:
        if router not in self.weights:
            raise ValueError(f"router is {router!r}; this model has {', '.join(self.weights)}")
        return self.weights[router].gt(0)

    def plot_share(self, axes: Any, router: str | None = None) -> None:
        """Draw the share of routed tokens by layer and position, on axes of Matplotlib.

        Args:
            axes: to draw on.
            router: its name; None for the first.
        """
        router = router or next(iter(self.weights))
        share = self.share_by_position(router)
        layers = len(share)
        image = axes.imshow(
            share.numpy(),
            aspect="auto",
            origin="lower",
            vmin=0,
            vmax=1,
            extent=(0, len(self.tokens), 0.5, layers + 0.5),
        )
        axes.set(xlabel="position in tokens", ylabel="layer", title=f"share routed by {router}")
        axes.figure.colorbar(image, ax=axes)

    def plot_overlap(self, axes: Any, router: str | None = None) -> None:
        """Draw `overlap` of every two layers, on axes of Matplotlib.

        Args:
            axes: to draw on.
            router: its name; None for the first.
        """
        router = router or next(iter(self.weights))
        overlap = self.overlap(router)
        edges = (0.5, len(overlap) + 0.5, 0.5, len(overlap) + 0.5)
        image = axes.imshow(overlap.numpy(), origin="lower", vmin=0, vmax=1, extent=edges)
        axes.set(xlabel="is routed in this layer too", ylabel="routed in layer", title=f"overlap of {router}")
        axes.figure.colorbar(image, ax=axes)

    def plot_weights(self, axes: Any) -> None:
        """Draw how the weights of routed tokens are spread, for each router, on axes of Matplotlib."""
        for name, weight in self.weights.items():
            axes.hist(weight[weight > 0].tolist(), bins=50, range=(0, 1), histtype="step", label=name)
        axes.set(xlabel="weight", ylabel="routed tokens, all layers", title="weights of routed tokens")
        axes.legend()


def _per_token(routed: Any, n: int) -> Tensor:
    """The weights of a `RoutedTokens` of one row, [1, slots], by token: [n]."""
    weights = torch.zeros(n)
    slots = routed.valid[0].cpu()
    return weights.index_put_((routed.indices[0].cpu()[slots],), routed.weights[0].float().cpu()[slots])


def _per_causal_token(pools: Any, n: int) -> Tensor:
    """The largest weight of each token in any window's pool, [n]."""
    valid = pools.valid[0].cpu()
    weights = torch.zeros(n)
    return weights.scatter_reduce_(0, pools.indices[0].cpu()[valid], pools.weights[0].float().cpu()[valid], "amax")


def _encoder_weights(model: Any, batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    config = model.config
    if config.is_encoder_decoder and config.routed_cross_key_values is not None:
        start = batch["input_ids"].new_full((1, 1), config.decoder_start_token_id)
        output = model(**batch, decoder_input_ids=start, output_routing=True)
        layers, cross = output.encoder_routing, output.cross_routing
    else:
        layers, cross = model.encoder(**batch, output_routing=True).routing, ()
    found = {
        name: torch.stack([_per_token(layer[name], n) for layer in layers])
        for name in ("query", "key_value", "feed_forward")
    }
    if cross:
        by_router = [torch.stack([_per_token(routed, n) for routed in layer]).amax(0) for layer in cross]
        found["cross"] = torch.stack(by_router)
    return found


def _causal_weights(model: Any, batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    layers = model(**batch, output_routing=True, logits_to_keep=1, use_cache=False).routing
    found: dict[str, list[Tensor]] = {}
    for layer in layers or ():
        for name in ("query", "feed_forward"):
            if layer[name] is not None:
                found.setdefault(name, []).append(layer[name][0].float().cpu())
        if layer.key_value is not None:
            found.setdefault("key_value", []).append(_per_causal_token(layer.key_value, n))
    return {name: torch.stack(weights) for name, weights in found.items()}


def show_routing(model: Any, tokenizer: Any, text: str, title: str | None = None) -> RoutingView:
    """What a model's routers choose of a text.

        show_routing(model, tokenizer, text)                      # in a notebook
        show_routing(model, tokenizer, text).save("routing.html")

    Args:
        model: a CoLT5 model with an encoder, whose routing is shown, or a causal one with causally routed layers.
        tokenizer: the model's.
        text: the document; it is read whole.
        title: what stands above it; None for the model's kind and the number of tokens.

    Raises:
        TypeError: for a text that is no string.
        ValueError: for a model that routes nothing.
    """
    if not isinstance(text, str):
        raise TypeError(f"text is a {type(text).__name__}; it must be a string")
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "colt5":
        raise ValueError(f"model is a {type(model).__name__}, which routes nothing; it must be a CoLT5 model")
    encoded = tokenizer(
        text, return_tensors="pt", return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    offsets = encoded["offset_mapping"][0].tolist()
    special = [bool(flag) for flag in encoded["special_tokens_mask"][0].tolist()]
    ids = encoded["input_ids"]
    n = ids.shape[1]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batch = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
            weights = (_encoder_weights if hasattr(model, "encoder") else _causal_weights)(model, batch, n)
    finally:
        model.train(was_training)
    if not weights:
        raise ValueError(
            f"model is a {type(model).__name__} whose layers route nothing; set causal_attention or "
            "causal_feed_forward of its configuration"
        )
    pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    tokens, end = [], 0
    for piece, (_, stop), is_special in zip(pieces, offsets, special, strict=True):
        # what stands between two tokens, such as a second space, goes with the later one
        tokens.append(piece if is_special else text[end:stop])
        end = max(end, stop)
    if title is None:
        title = f"{type(model).__name__}: {n:,} tokens, {max(map(len, weights.values()))} layers"
    return RoutingView(title, tokens, pieces, special, weights)


def main(argv: list[str] | None = None) -> None:
    """The command `colt5-show-routing`: reads a text with a model, and writes the page."""
    parser = argparse.ArgumentParser(prog="colt5-show-routing", description=__doc__)
    parser.add_argument("model", help="a folder or Hub id of a CoLT5 model with its tokenizer")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--out", type=Path, default=Path("routing.html"), help="the page to write")
    parser.add_argument("--title", help="what stands above it")
    options = parser.parse_args(argv)
    try:
        text = options.text.read_text(encoding="utf-8", errors="replace")
        architecture = (AutoConfig.from_pretrained(options.model).architectures or [""])[0]
        kinds = {"CoLT5ForConditionalGeneration": AutoModelForSeq2SeqLM, "CoLT5ForCausalLM": AutoModelForCausalLM}
        model = kinds.get(architecture, AutoModel).from_pretrained(options.model)
        view = show_routing(model, AutoTokenizer.from_pretrained(options.model), text, options.title)
        print(f"wrote {view.save(options.out)}: {view.title}")
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
