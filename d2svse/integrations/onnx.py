"""Export both encoders as graphs that run without this library: `torch.export`, and ONNX (the extra `[onnx]`)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from d2svse.files.folder import FolderKind, written_folder
from d2svse.models.decoder import ContextDecoder
from d2svse.models.gru import GRUModel
from d2svse.models.metric_attention import METRIC_ATTENTION
from d2svse.models.pooling import GeneralizedPooling
from d2svse.similarity.use import evaluating

if TYPE_CHECKING:
    from d2svse.models import D2SVSE

IMAGE_ENCODER, TEXT_ENCODER = "image_encoder", "text_encoder"
OUTPUTS = ["embeddings", "tokens"]
AXES = {
    IMAGE_ENCODER: {"pixel_values": {0: "batch"}},
    TEXT_ENCODER: {"input_ids": {0: "batch", 1: "length"}, "attention_mask": {0: "batch", 1: "length"}},
}
NEEDED = ("onnx", "onnxscript")
GRAPHS = (f"{IMAGE_ENCODER}.onnx", f"{TEXT_ENCODER}.onnx")
EXPORTED = FolderKind("d2svse export", GRAPHS[0])


class ImageGraph(nn.Module):
    """Image encoder: `pixel_values (batch, channels, height, width)` float32 to embeddings and tokens.

    Args:
        model: the model.
    """

    def __init__(self, model: D2SVSE) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of `D2SVSE.image_vectors` and the tokens `(batch, length, embed_dim)`, in float32."""
        return _outputs(self.model, "image", self.model.image_encoder(pixel_values.to(self.model.dtype)))


class TextGraph(nn.Module):
    """Text encoder: `input_ids` and `attention_mask`, both `(batch, length)` int64, to embeddings and words.

    Args:
        model: the model.
        dense: skip the context decoder, as for dense captions.
    """

    def __init__(self, model: D2SVSE, dense: bool = False) -> None:
        super().__init__()
        self.model, self.dense = model, dense

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors of `D2SVSE.text_vectors` and the words `(batch, length, embed_dim)`, in float32.

        Tokens that the context decoder appends follow the words; they are real in every row.
        """
        features = self.model.text_encoder(input_ids, attention_mask)
        return _outputs(self.model, "text", features if self.dense else self.model.fuse(features))


class TabledPooling(nn.Module):
    """A `GeneralizedPooling` with its coefficients in a table.

    The coefficients depend on the number of real tokens alone, so a table replaces the recurrent
    network, which a graph cannot run over an unknown length.

    Args:
        pooling: the pooling.
        lengths: numbers of real tokens in the table. It starts at 1 if `forward` gets a mask;
            without a mask `forward` uses the last one.
    """

    table: Tensor

    def __init__(self, pooling: GeneralizedPooling, lengths: range) -> None:
        super().__init__()
        self.register_buffer("table", pooling.coefficients(list(lengths)).detach().float())

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool the tokens of each row.

        Args:
            tokens: `(batch, length, dim)`.
            mask: True where a token is real, `(batch, length)` bool; None if all tokens are real.

        Returns:
            `(batch, dim)` float32.
        """
        values = tokens.transpose(1, 2).float()
        if mask is None:
            return values.sort(dim=-1, descending=True).values @ self.table[-1]
        counts = mask.sum(1)
        values = values.masked_fill(~mask[:, None, :], -torch.inf).sort(dim=-1, descending=True).values
        real = torch.arange(mask.shape[1], device=mask.device) < counts[:, None]
        coefficients = self.table[counts[:, None] - 1, torch.arange(mask.shape[1], device=mask.device)]
        return (values.masked_fill(~real[:, None, :], 0) @ coefficients.unsqueeze(-1)).squeeze(-1)


class OnnxGRU(nn.Module):
    """A GRU of one layer and direction as ONNX's operator, whose length is free; only a graph of ONNX can run it.

    Args:
        gru: the GRU, batch first.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor

    def __init__(self, gru: nn.GRU) -> None:
        super().__init__()
        self.hidden_size = gru.hidden_size
        gates: dict[str, Tensor] = {}
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            reset, update, new = getattr(gru, f"{name}_l0").detach().chunk(3)
            gates[name] = torch.cat([update, reset, new])[None]  # the order of ONNX
        self.register_buffer("weight_ih", gates["weight_ih"])
        self.register_buffer("weight_hh", gates["weight_hh"])
        self.register_buffer("bias", torch.cat([gates["bias_ih"], gates["bias_hh"]], 1))

    def forward(self, words: Tensor) -> tuple[Tensor]:
        """Return the outputs, `(batch, length, hidden_size)`, of words `(batch, length, width)`."""
        outputs = torch.onnx.ops.symbolic(
            "GRU",
            (words.transpose(0, 1), self.weight_ih, self.weight_hh, self.bias),
            {"hidden_size": self.hidden_size, "linear_before_reset": 1},
            dtype=words.dtype,
            shape=(words.shape[1], 1, words.shape[0], self.hidden_size),
        )
        return (outputs[:, 0].transpose(0, 1),)


def export_programs(model: D2SVSE, dense: bool = False, *, for_onnx: bool = False) -> dict[str, ExportedProgram]:
    """Trace both encoders with `torch.export`.

    The batch size is free, and so is the length of texts up to the processor's limit. Images have
    the size that the processor makes. The programs share the weights of the model.

    Args:
        model: the model, with its processor.
        dense: the texts are dense captions: skip the context decoder.
        for_onnx: let a GRU be an operator of ONNX; torch cannot run the program then.

    Returns:
        "image_encoder", which takes `pixel_values`, and "text_encoder", which takes `input_ids` and
        `attention_mask`. Each returns embeddings `(batch, width)` and tokens
        `(batch, length, embed_dim)`. Embeddings are those of `image_vectors` and `text_vectors`:
        L2-normalised, and multiplied by the metric of a bilinear similarity.

    Raises:
        ValueError: if the model has no processor, or its text backbone is a GRU and the programs are not for ONNX.
    """
    if isinstance(model.text_encoder.backbone, GRUModel) and not for_onnx:
        raise ValueError("torch.export fixes the length of the texts of a GRU; export the model to ONNX")
    if model.processor is None:
        raise ValueError("the model has no processor, which decides the size of images; set model.processor")
    pixels = model.processor.example().to(model.device, model.dtype)
    longest, decoder = model.processor.max_length, model.decoder
    if isinstance(decoder, ContextDecoder) and decoder.position_embeddings is not None:
        longest = min(longest, decoder.position_embeddings.num_embeddings - len(decoder.tokens))
    ids = torch.ones(2, min(8, longest), dtype=torch.long, device=model.device)
    sizes = {"batch": Dim.DYNAMIC, "length": Dim.DYNAMIC(max=longest)}
    graphs: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        IMAGE_ENCODER: (ImageGraph(model), (torch.cat([pixels, pixels]).float(),)),
        TEXT_ENCODER: (TextGraph(model, dense), (ids, ids.clone())),
    }
    programs = {}
    with torch.no_grad(), evaluating(model), _ready_for_export(model, pixels, longest):
        for name, (graph, inputs) in graphs.items():
            shapes = {key: {axis: sizes[size] for axis, size in axes.items()} for key, axes in AXES[name].items()}
            programs[name] = torch.export.export(graph, inputs, dynamic_shapes=shapes)
    return programs


def export_onnx(model: D2SVSE, folder: str | os.PathLike[str], dense: bool = False) -> None:
    """Write `image_encoder.onnx`, `text_encoder.onnx` and the processor to a folder.

    Files of an earlier export are replaced, other files stay. See `export_programs` for the names of
    inputs and outputs.

    Args:
        model: the model, with its processor.
        folder: the folder to write.
        dense: the texts are dense captions: skip the context decoder.

    Raises:
        ImportError: if a package of the extra `[onnx]` is missing.
        ValueError: if the model has no processor, or is in bfloat16.
        FileExistsError: if the folder exists and no export wrote it.
    """
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"the export to ONNX needs {package}; install it with pip install 'd2svse[onnx]'")
    if model.dtype == torch.bfloat16:
        raise ValueError("runtimes of ONNX do not run bfloat16; export with float32 or float16 (--dtype)")
    with written_folder(folder, EXPORTED) as aside:
        for name, program in export_programs(model, dense, for_onnx=True).items():
            graph = torch.onnx.export(program, output_names=OUTPUTS, dynamic_shapes=AXES[name], verbose=False)
            assert graph is not None
            graph.save(aside / f"{name}.onnx")
        assert model.processor is not None
        model.processor.save_pretrained(aside)


def _outputs(model: D2SVSE, side: Any, features: Any) -> tuple[Tensor, Tensor]:
    return model.similarity_fn.pooled_vectors(side, features.pooled), features.tokens.float()


@contextmanager
def _ready_for_export(model: D2SVSE, pixels: Tensor, longest: int) -> Iterator[None]:
    """Prepare a model in eval mode for tracing inside the block: tables for poolings, and plain attention."""
    image_tokens = model.image_encoder.backbone_tokens(pixels).shape[1]
    lengths: dict[Any, range] = {
        # Regions may be padding, so that an image has any number of them.
        model.image_encoder: range(
            1 if hasattr(model.image_encoder.backbone, "real_tokens") else image_tokens, image_tokens + 1
        ),
        model.text_encoder: range(1, longest + 1),
    }
    if isinstance(model.decoder, ContextDecoder):
        count = len(model.decoder.tokens)
        lengths[model.decoder] = range(count, count + 1) if count else range(1, longest + 1)
    backbones: list[Any] = [model.image_encoder.backbone, model.text_encoder.backbone]
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for backbone in backbones:
            attention = backbone.config._attn_implementation
            stack.callback(backbone.set_attn_implementation, attention)
            if attention != METRIC_ATTENTION:
                backbone.set_attn_implementation("eager")
        for part, counts in lengths.items():
            pooling = getattr(part, "pooling", None)  # native ones have none
            if isinstance(pooling, GeneralizedPooling):
                stack.callback(setattr, part, "pooling", pooling)
                part.pooling = TabledPooling(pooling, counts)
        gru = model.text_encoder.backbone
        for name in ("forward_gru", "backward_gru") if isinstance(gru, GRUModel) else ():
            stack.callback(setattr, gru, name, getattr(gru, name))
            setattr(gru, name, OnnxGRU(getattr(gru, name)))
        yield
