"""What a model routes of a text or a picture, to look at: as a page, in a notebook, as figures, and as numbers."""

import argparse
import html
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from transformers.image_utils import load_image

from .routing_page import picture_page, routing_page

# A page shows a picture with at most so many pixels to a side.
LARGEST_SIDE = 1024


class _View(ABC):
    """What the views of texts and of pictures share.

    Attributes:
        title: what stands above it.
        weights: by the router's name, fp32 [layers, tokens or patches].
    """

    title: str
    weights: dict[str, Tensor]

    @abstractmethod
    def html(self) -> str:
        """The page: one HTML document that needs neither files nor the network."""

    def _rows(self) -> dict[str, list[list[float]]]:
        return {name: weight.tolist() for name, weight in self.weights.items()}

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


@dataclass(frozen=True)
class RoutingView(_View):
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
        return routing_page(self.title, self.tokens, self.pieces, self.special, self._rows())

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


@dataclass(frozen=True)
class PictureRoutingView(_View):
    """The routing of one picture. It is shown and saved as a `RoutingView` is.

    Attributes:
        title: what stands above it.
        picture: uint8 [height, width, 3], what the model read, filled up to whole patches; from black for its least
            number to white for its largest.
        grid: rows and columns of patches.
        weights: by the router's name, "query", "key_value" and "feed_forward", fp32 [layers, rows * columns]: each
            patch's weight in the heavy branch, row by row, 0 where it was not routed.
    """

    title: str
    picture: Tensor
    grid: tuple[int, int]
    weights: dict[str, Tensor]

    def html(self) -> str:
        height, width = self.picture.shape[:2]
        smaller = min(1, LARGEST_SIDE / max(height, width))
        size = max(1, round(height * smaller)), max(1, round(width * smaller))
        pixels = self.picture
        if smaller < 1:
            pixels = F.interpolate(pixels.movedim(-1, 0)[None].float(), size, mode="area")[0].movedim(0, -1).byte()
        return picture_page(self.title, pixels.numpy().tobytes(), size, self.grid, self._rows())

    def plot_picture(self, axes: Any, router: str | None = None, layer: int | None = None) -> None:
        """Draw the picture with its routed patches shaded, on axes of Matplotlib.

        Args:
            axes: to draw on.
            router: its name; None for the first.
            layer: counted from 0, for the weights of that layer; None for the share of the layers that route a patch.

        Raises:
            ValueError: for a router or a layer that there is not.
        """
        router = router or next(iter(self.weights))
        routed = self._routed(router)
        if layer is not None and not 0 <= layer < len(routed):
            raise ValueError(f"layer is {layer}; it must be from 0 to {len(routed) - 1}, or None for all")
        shade = routed.float().mean(0) if layer is None else self.weights[router][layer]
        height, width = self.picture.shape[:2]
        extent = (0, width, height, 0)
        axes.imshow(self.picture.numpy(), extent=extent)
        shade = shade.view(self.grid)
        image = axes.imshow(
            shade.numpy(), extent=extent, vmin=0, vmax=1, alpha=shade.gt(0).float().mul(0.6).numpy(), cmap="viridis"
        )
        where = "all layers" if layer is None else f"layer {layer + 1}"
        axes.set(xlabel="pixels", ylabel="pixels", title=f"routed by {router}, {where}")
        axes.figure.colorbar(image, ax=axes)


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


def _by_router(layers: Any, n: int) -> dict[str, Tensor]:
    """By the router's name, [layers, n]; nothing where layers route nothing."""
    return {
        name: torch.stack([_per_token(layer[name], n) for layer in layers])
        for name in ("query", "key_value", "feed_forward")
        if getattr(layers[0], name) is not None
    }


def _encoder_weights(model: Any, batch: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    config = model.config
    if config.is_encoder_decoder and config.routed_cross_key_values is not None:
        if config.decoder_start_token_id is None:
            raise ValueError(
                "decoder_start_token_id of the model's configuration is None; it must be a token, from which the "
                "decoder begins: what its cross-attention reads is shown too"
            )
        start = batch["input_ids"].new_full((1, 1), config.decoder_start_token_id)
        output = model(**batch, decoder_input_ids=start, output_routing=True)
        layers, cross = output.encoder_routing, output.cross_routing
    else:
        layers, cross = model.encoder(**batch, output_routing=True).routing, ()
    found = _by_router(layers, n)
    if cross:
        by_router = [torch.stack([_per_token(routed, n) for routed in layer]).amax(0) for layer in cross]
        found["cross"] = torch.stack(by_router)
    return found


def _text_view(model: Any, tokenizer: Any, text: str, title: str | None) -> RoutingView:
    encoded = tokenizer(
        text, return_tensors="pt", return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False
    )
    offsets = encoded["offset_mapping"][0].tolist()
    special = [bool(flag) for flag in encoded["special_tokens_mask"][0].tolist()]
    ids = encoded["input_ids"]
    batch = {name: encoded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    weights = (_encoder_weights if hasattr(model, "encoder") else _causal_weights)(model, batch, ids.shape[1])
    pieces = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    tokens, end = [], 0
    for piece, (_, stop), is_special in zip(pieces, offsets, special, strict=True):
        # what stands between two tokens, such as a second space, goes with the later one
        tokens.append(piece if is_special else text[end:stop])
        end = max(end, stop)
    if title is None:
        title = f"{type(model).__name__}: {ids.shape[1]:,} tokens, {max(map(len, weights.values()), default=0)} layers"
    return RoutingView(title, tokens, pieces, special, weights)


def _picture_view(model: Any, processor: Any, picture: Any, title: str | None) -> PictureRoutingView:
    batch = processor(picture, return_tensors="pt")
    pixels = batch["pixel_values"]
    if len(pixels) != 1:
        raise ValueError(f"document is {len(pixels)} pictures; it must be one")
    inputs = {name: batch[name].to(model.device) for name in ("pixel_values", "pixel_mask") if name in batch}
    output = model(**inputs, output_routing=True)
    rows, columns = output.patch_mask.shape[1:]
    weights = _by_router(output.routing, rows * columns)
    size = model.config.patch_size
    height, width = pixels.shape[-2:]
    seen = F.pad(pixels[0].float().cpu(), (0, columns * size - width, 0, rows * size - height))
    least, most = seen.aminmax()
    seen = (seen - least) / (most - least).clamp(min=1e-9) * 255
    if len(seen) != 3:
        # no colours that a screen has
        seen = seen.mean(0, keepdim=True).expand(3, -1, -1)
    title = title or f"{type(model).__name__}: {rows} × {columns} patches, {len(output.routing)} layers"
    return PictureRoutingView(title, seen.round().byte().movedim(0, -1).contiguous(), (rows, columns), weights)


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


def show_routing(model: Any, processor: Any, document: Any, title: str | None = None) -> Any:
    """What a model's routers choose of a text or of a picture.

        show_routing(model, tokenizer, text)                      # in a notebook
        show_routing(model, tokenizer, text).save("routing.html")
        show_routing(model, image_processor, picture)

    Args:
        model: a CoLT5 model with an encoder, whose routing is shown, a causal one with causally routed layers, or one
            over pictures.
        processor: the model's tokenizer, which must be of the library `tokenizers` to tell where its tokens stand in
            the text, or its image processor.
        document: the text, or a picture as the image processor takes it; it is read whole. What a decoder's routed
            cross-attention reads of it is shown too: with `asking_cross_routing`, where each token of the decoder
            chooses, what its first one does.
        title: what stands above it; None for the model's kind and the number of tokens or patches.

    Returns:
        A `RoutingView`, or of a picture a `PictureRoutingView`.

    Raises:
        TypeError: for a text that is no string, or a processor of another kind than the model's.
        ValueError: for a model that routes nothing, or one with routed cross-attention and no start token, or several
            pictures.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in ("colt5", "colt5_vision"):
        raise ValueError(f"model is a {type(model).__name__}, which routes nothing; it must be a CoLT5 model")
    if kind == "colt5" and not isinstance(document, str):
        raise TypeError(f"document is a {type(document).__name__}; it must be a string")
    if kind == "colt5" and not getattr(processor, "is_fast", False):
        raise TypeError(
            f"processor is a {type(processor).__name__}; for a text it must be a tokenizer that tells where its "
            "tokens stand in the text, one of the library tokenizers (is_fast)"
        )
    if kind == "colt5_vision" and "pixel_values" not in getattr(processor, "model_input_names", ()):
        raise TypeError(
            f"processor is a {type(processor).__name__}; for a picture it must be an image processor, such as "
            "model.config.image_processor()"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            view = (_text_view if kind == "colt5" else _picture_view)(model, processor, document, title)
    finally:
        model.train(was_training)
    if not view.weights:
        settings = "routing" if hasattr(model, "encoder") else "causal_attention or causal_feed_forward"
        raise ValueError(
            f"model is a {type(model).__name__} whose layers route nothing; set {settings} of its configuration"
        )
    return view


def main(argv: list[str] | None = None) -> None:
    """The command `colt5-show-routing`: reads a text or a picture with a model, and writes the page."""
    parser = argparse.ArgumentParser(prog="colt5-show-routing", description=__doc__)
    parser.add_argument("model", help="a folder or Hub id of a CoLT5 model with its tokenizer or image processor")
    parser.add_argument("document", type=Path, help="a text file; for a model over pictures a picture")
    parser.add_argument("--out", type=Path, default=Path("routing.html"), help="the page to write")
    parser.add_argument("--title", help="what stands above it")
    options = parser.parse_args(argv)
    try:
        config = AutoConfig.from_pretrained(options.model)
        document: Any
        if config.model_type == "colt5_vision":
            document = load_image(str(options.document)).convert("RGB" if config.num_channels == 3 else "L")
            processor = AutoImageProcessor.from_pretrained(options.model)
            auto_class: Any = AutoModelForImageClassification
        else:
            document = options.document.read_text(encoding="utf-8", errors="replace")
            processor = AutoTokenizer.from_pretrained(options.model)
            auto_class = AutoModel
        kinds = {"CoLT5ForConditionalGeneration": AutoModelForSeq2SeqLM, "CoLT5ForCausalLM": AutoModelForCausalLM}
        architecture = (config.architectures or [""])[0]
        model = kinds.get(architecture, auto_class).from_pretrained(options.model)
        view = show_routing(model, processor, document, options.title)
        print(f"wrote {view.save(options.out)}: {view.title}")
    except (OSError, TypeError, ValueError) as error:
        # other libraries wrap their messages
        parser.error(" ".join(str(error).split()))
