"""Image and text encoders: a transformers backbone, a projection into the joint space and a pooling."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from d2svse.features import Features
from d2svse.hub.folder import loading
from d2svse.hub.weights import check_finite, check_size, local_files, weight_files
from d2svse.images.regions import region_shape
from d2svse.models.dual_encoders import KINDS, Tower, load_dual_encoder, pool_each, pool_tower
from d2svse.models.pooling import ClsPooling, build_pooling
from d2svse.models.regions import RegionsConfig, RegionsModel
from d2svse.similarity.use import evaluating

logger = logging.getLogger(__name__)

MASKED_AUTOENCODER = "vit_mae"
NAFLEX = "siglip2_vision_model"
HEADS = ("vision_use_head", "use_head")  # options of vision configurations for an attention head after all tokens
PROBE_SIZE = 64  # pixels
UNUSED_WEIGHTS = ("pooler", "mask_token", "position_ids", "relative_position_index", ".head.")


class ImageEncoder(nn.Module):
    """Encode pixels as `Features`: backbone, linear projection of every token, pooling.

    Args:
        config: configuration of a vision backbone.
        embed_dim: width of the joint space.
        pooling: a name in `POOLINGS`.
        backbone: a loaded backbone; by default one with random weights, made from `config`.
        tower: the vision side of a dual encoder, with its own pooling and projection; `embed_dim`, `pooling`,
            `backbone` and `projection` have no effect with it.
        projection: "linear", or "mlp" or "residual_mlp" to add a `ResidualMLP`.
        merging: side of the squares of patches whose tokens are averaged into one; 1 averages none.

    Raises:
        ValueError: if `pooling` is "cls" and the backbone has no class token.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        embed_dim: int,
        pooling: str = "gpo",
        backbone: PreTrainedModel | None = None,
        tower: Tower | None = None,
        projection: str = "linear",
        merging: int = 1,
    ) -> None:
        super().__init__()
        self.native_pool, self.merging = None if tower is None else tower.pool, merging
        self.projection: Any
        self.mlp: ResidualMLP | None = None
        if tower is not None:
            self.backbone, self.projection = tower.backbone, tower.projection
            self._interpolates = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
            return
        self.backbone = make_backbone(config) if backbone is None else backbone
        if config.model_type == MASKED_AUTOENCODER:
            self.backbone.config.mask_ratio = 0.0  # otherwise each call drops other patches, most of them
        class_tokens = ("cls_token", "class_embedding")
        named = [name for name, _ in self.backbone.named_parameters() if not name.startswith("head.")]
        if pooling == "cls" and not any(name.endswith(class_tokens) for name in named):
            raise ValueError(f"a {config.model_type} backbone has no class token to pool; use gpo, esa, mean or max")
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self.projection = nn.Linear(token_width(config), embed_dim)
        if projection != "linear":
            self.mlp = ResidualMLP(token_width(config), embed_dim, batch_norm=projection == "residual_mlp")
        self.pooling = build_pooling(pooling, embed_dim)

    def forward(self, pixel_values: Tensor, token_mask: Tensor | None = None) -> Features:
        """Encode images.

        Args:
            pixel_values: `(batch, channels, height, width)`. Position embeddings are interpolated
                if the size differs from the backbone's. For region features `(batch, n_regions, width)`.
            token_mask: True for tokens of the backbone to keep, `(batch, length)` bool (token
                dropping in training); None keeps all.

        Returns:
            `pooled (batch, embed_dim)`, `tokens (batch, length, embed_dim)` and the mask.

        Raises:
            ValueError: if the shape of the mask differs from that of the tokens.
        """
        real_tokens = getattr(self.backbone, "real_tokens", None)
        if real_tokens is not None:
            real = real_tokens(pixel_values)
            kept = real if token_mask is None else real & token_mask
            token_mask = torch.where(kept.any(1, keepdim=True), kept, real)
        return self.from_backbone_tokens(self.backbone_tokens(pixel_values), token_mask)

    def from_backbone_tokens(self, hidden: Tensor, token_mask: Tensor | None = None) -> Features:
        """Project and pool the tokens of the backbone; see `forward` for the result and the error.

        Args:
            hidden: output of `backbone_tokens`, `(batch, length, hidden_size)`.
            token_mask: see `forward`.
        """
        if self.native_pool is None:
            weight = self.projection.weight  # a method in a quantized layer, which takes what the backbone gives
            hidden = hidden.to(weight.dtype if isinstance(weight, Tensor) else self.backbone.dtype)
            tokens = self.projection(hidden)
            if self.mlp is not None:
                tokens = tokens + self.mlp(hidden)
        else:
            hidden = hidden.to(self.backbone.dtype)
            tokens = self.projection(pool_each(self.native_pool, self.backbone, hidden))
        if token_mask is not None and token_mask.shape != tokens.shape[:2]:
            raise ValueError(f"token_mask must be {tuple(tokens.shape[:2])}, got {tuple(token_mask.shape)}")
        if self.native_pool is None:
            pooled = self.pooling(tokens, token_mask)
        else:
            pooled = self.projection(pool_tower(self.native_pool, self.backbone, hidden))
        return Features(pooled, tokens, token_mask)

    def backbone_tokens(self, pixel_values: Tensor) -> Tensor:
        """Return the backbone's last hidden state as a sequence, `(batch, length, hidden_size)`; a grid is flattened.

        With `merging`, the tokens of each square of patches are averaged. Squares at the edges may be smaller.

        Args:
            pixel_values: `(batch, channels, height, width)`.

        Raises:
            ValueError: if tokens are merged, and the patches of the backbone's configuration do not make up the last
                tokens of its sequence.
        """
        hidden = self.backbone_output(pixel_values).last_hidden_state
        if self.merging == 1:
            return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
        if hidden.ndim == 4:
            return self._merged(hidden)
        patch = image_size(self.backbone.config, "patch_size")
        grid = [side // (size or side) for side, size in zip(pixel_values.shape[-2:], patch, strict=True)]
        special = hidden.shape[1] - grid[0] * grid[1]
        if not patch[0] or special < 0:
            kind = self.backbone.config.model_type
            raise ValueError(f"image_token_merging: a {kind} backbone has no grid of patches")
        patches = hidden[:, special:].transpose(1, 2).unflatten(2, grid)
        return torch.cat([hidden[:, :special], self._merged(patches)], 1)

    def _merged(self, grid: Tensor) -> Tensor:
        """Average squares of `(batch, width, rows, columns)`, and return them as a sequence."""
        side = self.merging
        means = F.avg_pool2d(grid, side, ceil_mode=True, count_include_pad=False)
        return means.flatten(2).transpose(1, 2)

    def backbone_output(self, pixel_values: Tensor, **arguments: Any) -> Any:
        """Return the output of the backbone.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            **arguments: further arguments of the backbone's `forward`.
        """
        if self._interpolates and list(pixel_values.shape[-2:]) != image_size(self.backbone.config):
            arguments["interpolate_pos_encoding"] = True
        if self.backbone.config.model_type == MASKED_AUTOENCODER:  # it sorts its patches by this noise
            patch = image_size(self.backbone.config, "patch_size")
            count = (pixel_values.shape[-2] // patch[0]) * (pixel_values.shape[-1] // patch[1])
            arguments["noise"] = torch.arange(count, device=pixel_values.device).expand(len(pixel_values), -1)
        return self.backbone(pixel_values=pixel_values.to(self.backbone.dtype), **arguments)

    @torch.no_grad()
    def count_tokens(self, height: int, width: int) -> int:
        """Return the number of tokens, special ones included, for an image of `height` × `width` pixels."""
        channels = getattr(self.backbone.config, "num_channels", 3)
        with evaluating(self.backbone):  # otherwise a batch norm would learn from the empty image
            tokens = self.backbone_tokens(torch.zeros(1, channels, height, width, device=self.backbone.device))
        return tokens.shape[1]


class ResidualMLP(nn.Module):
    """MLP that is added to the projection of tokens: linear, norm, ReLU, linear.

    The published model has a batch norm. In training it counts every position, padding included, as the published code
    does.

    Args:
        input_dim: width of the backbone's tokens.
        embed_dim: width of the joint space; the hidden layer is half as wide.
        batch_norm: use a batch norm; otherwise a layer norm, with which padding and other texts have no effect.
    """

    def __init__(self, input_dim: int, embed_dim: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(input_dim, embed_dim // 2)
        self.norm = (nn.BatchNorm1d if batch_norm else nn.LayerNorm)(embed_dim // 2)
        self.outer = nn.Linear(embed_dim // 2, embed_dim)

    def forward(self, words: Tensor) -> Tensor:
        """Map `(batch, length, input_dim)` to `(batch, length, embed_dim)`."""
        hidden = self.norm(self.inner(words).flatten(0, 1)).relu()
        return self.outer(hidden).unflatten(0, words.shape[:2])


class TextEncoder(nn.Module):
    """Encode token ids as `Features`: backbone, projection of every word, pooling, layer norm.

    The layer norm acts on the pooled vector, as in the published model. Special tokens such as
    [CLS] and [SEP] count as words.

    Args:
        config: configuration of a text backbone.
        embed_dim: width of the joint space.
        pooling: a name in `POOLINGS`.
        projection: "linear", or "mlp" or "residual_mlp" to add a `ResidualMLP`.
        backbone: a loaded backbone; by default one with random weights, made from `config`.
        tower: the text side of a dual encoder, with its own pooling and projection; `embed_dim`, `pooling`,
            `projection` and `backbone` have no effect with it.
        dropout: of the backbone's output, in training.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        embed_dim: int,
        pooling: str = "gpo",
        projection: str = "linear",
        backbone: PreTrainedModel | None = None,
        tower: Tower | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.native_pool = None if tower is None else tower.pool
        self.projection: Any
        self.fixed_length = tower is not None and tower.fixed_length  # padding counts
        self.mlp: ResidualMLP | None = None
        if tower is not None:
            self.backbone, self.projection = tower.backbone, tower.projection
            return
        self.backbone = make_backbone(config) if backbone is None else backbone
        self.projection = nn.Linear(token_width(config), embed_dim)
        if projection != "linear":
            self.mlp = ResidualMLP(token_width(config), embed_dim, batch_norm=projection == "residual_mlp")
        self.pooling = build_pooling(pooling, embed_dim)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Features:
        """Encode texts.

        Args:
            input_ids: `(batch, length)` int64.
            attention_mask: `(batch, length)`, non-zero where a token is real; None if all are real.

        Returns:
            `pooled (batch, embed_dim)`, `tokens (batch, length, embed_dim)` and the bool mask.
        """
        return self.from_backbone_tokens(self.backbone_tokens(input_ids, attention_mask), input_ids, attention_mask)

    def from_backbone_tokens(
        self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None = None
    ) -> Features:
        """Project and pool the tokens of the backbone; see `forward` for the result.

        Args:
            hidden: output of `backbone_tokens`, `(batch, length, hidden_size)`.
            input_ids: see `forward`; only read for the pooling of a dual encoder.
            attention_mask: see `forward`.
        """
        mask = None if attention_mask is None else attention_mask.bool()
        if self.native_pool is None:
            return self.pool(self.words(hidden), mask)
        pooled = self.projection(pool_tower(self.native_pool, self.backbone, hidden, input_ids, mask))
        return Features(pooled, self.projection(pool_each(self.native_pool, self.backbone, hidden)), mask)

    def from_stored_tokens(self, tokens: Sequence[Tensor]) -> Features:
        """Project and pool stored tokens of the backbone; not for the pooling of a dual encoder.

        Args:
            tokens: output of `backbone_tokens` for each text, without padding, `(length, hidden_size)` each.

        Returns:
            `pooled (batch, embed_dim)`, `tokens (batch, longest, embed_dim)` and the bool mask.
        """
        weight = self.layer_norm.weight
        hidden = pad_sequence(list(tokens), batch_first=True).to(weight.device, weight.dtype)
        lengths = torch.tensor([len(one) for one in tokens])
        mask = torch.arange(hidden.shape[1]) < lengths[:, None]
        return self.from_backbone_tokens(hidden, None, mask.to(weight.device))

    def backbone_tokens(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the backbone's last hidden state, `(batch, length, hidden_size)`.

        Args:
            input_ids: `(batch, length)` int64.
            attention_mask: `(batch, length)`, non-zero where a token is real; None if all are real.
        """
        seen = None if self.fixed_length else attention_mask
        return self.backbone(input_ids=input_ids, attention_mask=seen).last_hidden_state

    def words(self, hidden: Tensor) -> Tensor:
        """Return the projected words, `(batch, length, embed_dim)`, of the backbone's last hidden state."""
        hidden = self.dropout(hidden)
        words = self.projection(hidden)
        return words if self.mlp is None else words + self.mlp(hidden)

    def pool(self, words: Tensor, mask: Tensor | None = None) -> Features:
        """Pool words and apply the layer norm.

        Args:
            words: `(batch, length, embed_dim)`.
            mask: True where a word is real, `(batch, length)` bool; None if all words are real.
        """
        return Features(self.layer_norm(self.pooling(words, mask).to(self.layer_norm.weight.dtype)), words, mask)


def make_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a backbone with random weights and without a pooling head, which is never used.

    Raises:
        ValueError: if transformers has no base model for the configuration.
    """
    model_class = _backbone_class(config)
    return model_class(config, **_no_pooler(model_class))


def load_backbone(name: str, part: str) -> PreTrainedModel:
    """Load a pretrained backbone from the Hub or a folder, in float32. Code in the folder is never run.

    Args:
        name: Hub id or folder. A two-sided model such as CLIP gives the side that `part` names.
            A region file (.npy) gives a vision backbone for its features.
        part: "vision_config" or "text_config".

    Raises:
        ValueError: if weights are missing, have another shape, or are not finite; if the model needs its own code,
            refers to a file outside its folder, or is larger than its weights.
    """
    if name.endswith(".npy"):
        count, width = region_shape(name)
        return RegionsModel(RegionsConfig(hidden_size=width, num_regions=count))
    folder = local_files(name)
    with loading(name):
        whole = AutoConfig.from_pretrained(name, trust_remote_code=False)
        config = getattr(whole, part, None) or whole
        for head in HEADS:
            if hasattr(config, head):
                setattr(config, head, False)  # never used here
        if whole.model_type in KINDS:  # a tower loads only with the whole model: its own class has other weight names
            dual: Any = load_dual_encoder(name)
            tower = (dual.vision_model if part == "vision_config" else dual.text_model).state_dict()
            backbone = make_backbone(config)
            own = {key: key if key in tower else key.split(".", 1)[1] for key in backbone.state_dict()}  # OWL-ViT's
            backbone.load_state_dict({key: tower[inner] for key, inner in own.items()})
            backbone.name_or_path = backbone.config.name_or_path = name
            return backbone
        model_class = _backbone_class(config)
        files = weight_files(folder, name)
        check_size(lambda: model_class(config), files, name)
        backbone, info = model_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below in one sentence
            trust_remote_code=False,
            **_no_pooler(model_class),
        )
    odd = [entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]]
    if odd:
        raise ValueError(
            f"{name}: the shape of the weight {min(odd)} differs from config.json ({len(odd)} weights differ)"
        )
    missing = [key for key in info["missing_keys"] if not any(part in key for part in UNUSED_WEIGHTS)]
    if missing:
        count, found = sum(1 for _ in backbone.parameters()), sorted(info["unexpected_keys"])
        instead = f"; the file holds {found[0]} and others instead" if found else ""
        raise ValueError(
            f"{name}: {len(missing)} of the {config.model_type} backbone's {count} weights are missing, such as "
            f"{min(missing)}{instead}; they would be random, so use other weights"
        )
    if config.model_type == MASKED_AUTOENCODER:
        logger.warning("%s masks random patches; masking is turned off and all patches are encoded in order", name)
        backbone.config.mask_ratio = 0.0  # as in a model that was saved and loaded
    check_finite(backbone, files, name)
    return backbone


@torch.no_grad()
def check_text_backbone(encoder: TextEncoder) -> None:
    """Check that padding does not change the tokens of a text, and that "cls" pooling can distinguish texts.

    In a left-to-right backbone the first token sees no other.

    Raises:
        ValueError: if padding changes tokens, or texts with the same first token id have the same first token.
    """
    if encoder.native_pool is not None:
        return
    backbone = encoder.backbone
    kind = backbone.config.model_type
    size = embedding_count(backbone) or 10
    ids = torch.tensor([[3, 5, 6, 4], [3, 7, 8, 4]], device=backbone.device) % size
    padding = torch.full_like(ids, getattr(backbone.config, "pad_token_id", None) or 0)
    padded, mask = torch.cat([ids, padding], 1), torch.cat([torch.ones_like(ids), torch.zeros_like(ids)], 1)
    with evaluating(backbone):
        alone = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        together = backbone(input_ids=padded, attention_mask=mask).last_hidden_state[:, :4]
    if (alone - together).norm() > 1e-3 * alone.norm():
        raise ValueError(
            f"a {kind} backbone lets padding change the tokens of a text, so that scores would depend on the batch; "
            "use another text backbone"
        )
    if isinstance(encoder.pooling, ClsPooling) and torch.allclose(alone[0, 0], alone[1, 0], rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"text_pooling cls: a {kind} backbone reads from left to right, so its first token "
            "is the same for all texts; use gpo, esa, mean or max"
        )


def embedding_count(backbone: PreTrainedModel) -> int | None:
    """Return the number of token ids with an embedding in a text backbone; None if it has no embedding table."""
    try:
        embeddings: Any = backbone.get_input_embeddings()
    except NotImplementedError:
        return None
    weight = getattr(embeddings, "weight", None)
    return len(weight) if isinstance(weight, Tensor) else None


def token_width(config: PreTrainedConfig) -> int:
    """Return the width of a backbone's tokens: `hidden_size`; without it a vision backbone is built and run to see.

    Raises:
        ValueError: if there is no such field and the backbone gives no tokens.
    """
    # The text side of AltCLIP ends with a projection.
    width = getattr(config, "project_dim" if config.model_type == "altclip_text_model" else "hidden_size", None)
    if isinstance(width, int):
        return width
    height, across = (side or PROBE_SIZE for side in image_size(config))
    try:
        with torch.device("meta"), torch.no_grad():  # no memory, and no time for numbers
            pixels = torch.zeros(1, getattr(config, "num_channels", 3), height, across)
            tokens = make_backbone(config).eval()(pixel_values=pixels).last_hidden_state
    except (AttributeError, TypeError):
        raise ValueError(
            f"a {config.model_type} backbone gives no last_hidden_state for pixels, and its configuration has no "
            "hidden_size; expected a backbone with a sequence or a grid of tokens"
        ) from None
    return int(tokens.shape[1] if tokens.ndim == 4 else tokens.shape[2])


def image_size(config: PreTrainedConfig, name: str = "image_size") -> list[int]:
    """Return the `[height, width]` in a vision configuration, in pixels; `[0, 0]` if it has no such field."""
    size = getattr(config, name, None) or 0
    return [size, size] if isinstance(size, int) else list(size)


def _backbone_class(config: PreTrainedConfig) -> Any:
    kind = config.model_type
    if kind == NAFLEX:
        raise ValueError(
            f"a {kind} backbone takes images of any shape (NaFlex), which is not supported; SigLIP 2 of a fixed size "
            "has the type siglip"
        )
    # The names are those of transformers: T5Config and T5EncoderModel, SiglipTextConfig and SiglipTextModel.
    name = type(config).__name__.removesuffix("Config")
    encoder = getattr(transformers, f"{name}EncoderModel", None)
    if encoder is not None and isinstance(getattr(config, "hidden_size", None), int):
        return encoder  # a saved encoder has no is_encoder_decoder in its configuration
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"a {kind} model has an encoder and a decoder; use a model with an encoder only")
    if type(config) in MODEL_MAPPING:
        classes = MODEL_MAPPING[type(config)]
        return classes[0] if isinstance(classes, tuple) else classes
    found = getattr(transformers, f"{name}Model", None)
    if found is None:
        raise ValueError(f"transformers has no base model for a {type(config).__name__}")
    return found


def _no_pooler(model_class: type[PreTrainedModel]) -> dict[str, bool]:
    takes_it = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if takes_it else {}
