"""The architecture table: what a row says about a model family, and one row per `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

__all__ = ["ARCHITECTURES", "ENCODERS", "Architecture"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where the parts of a transformer live: module paths (never parameters), config attribute names, flags.

    `block`, `embed`, `final_norm`, `head` and `before_head` are paths from the model, `block` with one ``{}``
    for the layer; `mlp` ... `attn_out` are paths inside a block. ``"a|b"`` means the first of the two that
    exists.

    Attributes:
        model_type: `config.model_type` of the family.
        block: one transformer block; its output (see `fastedit.arch.block_output`) is the residual stream.
        mlp, attn: the modules whose output is added to the residual stream (see `post_norm`,
            `residual_inside`).
        mlp_in, mlp_gate: first linear(s) of the MLP; `mlp_gate` is None when it is not gated or `fused_gate`.
        mlp_out, attn_out: last linears; `mlp_out` is the matrix that locate-then-edit methods change.
        cross: attention of a decoder's block to the encoder, or None.
        embed, final_norm, head: token embedding, norm after the last block (None: no such module), output
            projection.
        before_head: modules between `final_norm` and `head`, in order.
        side: "decoder" or "encoder".
        parallel: attention and MLP read the same block input and are added together.
        post_norm: the outputs of `mlp` and `attn` are normalised before they are added to the residual
            stream.
        residual_inside: the outputs of `mlp` and `attn` already contain the residual; only the outputs of
            `mlp_out` and `attn_out` are what the layer adds.
        norm_after_add: the residual stream itself is normalised after each add (post-LN blocks).
        fused_gate: `mlp_in` holds the gate in its first half of output rows and the up projection in the
            second.
        flat_mlp: the MLP linears see [batch * tokens, width] instead of [batch, tokens, width].
        depth, width, softcap: names of config attributes; `softcap` None: logits are not capped.
        head_scale: factor on the input of `head`.
        adapt: called as ``adapt(row, config)`` by `resolve`; returns the row with what the config switches.
    """

    model_type: str
    block: str
    mlp: str
    mlp_in: str
    mlp_out: str
    attn: str
    attn_out: str
    embed: str
    head: str
    mlp_gate: str | None = None
    cross: str | None = None
    final_norm: str | None = None
    before_head: tuple[str, ...] = ()
    side: str = "decoder"
    parallel: bool = False
    post_norm: bool = False
    residual_inside: bool = False
    norm_after_add: bool = False
    fused_gate: bool = False
    flat_mlp: bool = False
    depth: str = "num_hidden_layers"
    width: str = "hidden_size"
    softcap: str | None = None
    head_scale: float = 1.0
    adapt: Callable[[Architecture, Any], Architecture] | None = None

    @property
    def normed_output(self) -> bool:
        """Whether a norm follows the MLP's last matrix, so that what it adds is not a term of the block's output."""
        return self.post_norm or self.norm_after_add

    def __post_init__(self) -> None:
        if self.block.count("{}") != 1:
            raise ValueError(
                f"Architecture.block: must contain exactly one '{{}}' for the layer, got {self.block!r}"
            )
        if self.side not in ("decoder", "encoder"):
            raise ValueError(f"Architecture.side: must be 'decoder' or 'encoder', got {self.side!r}")


def _gpt_neox(row: Architecture, config: Any) -> Architecture:
    return replace(row, parallel=bool(config.use_parallel_residual))


def _falcon(row: Architecture, config: Any) -> Architecture:
    # The new decoder architecture adds both outputs to the block input, whatever `parallel_attn` says.
    return replace(row, parallel=bool(config.parallel_attn or config.new_decoder_architecture))


def _opt(row: Architecture, config: Any) -> Architecture:
    # opt-350m normalises after each residual add, has no final norm, and projects to a narrower embedding.
    before = bool(config.do_layer_norm_before)
    has_norm = before and not getattr(config, "_remove_final_layer_norm", False)
    narrow = config.word_embed_proj_dim != config.hidden_size
    return replace(
        row,
        norm_after_add=not before,
        final_norm=row.final_norm if has_norm else None,
        before_head=("model.decoder.project_out",) if narrow else (),
    )


def _bloom(row: Architecture, config: Any) -> Architecture:
    if config.pretraining_tp > 1 and config.slow_but_exact:
        raise ValueError(
            f"config.slow_but_exact: must be False, this path bypasses the edited module "
            f"{row.mlp_out!r} (pretraining_tp={config.pretraining_tp})"
        )
    return row


def _t5(row: Architecture, config: Any) -> Architecture:
    if config.is_gated_act:
        mlp = row.mlp
        row = replace(row, mlp_in=f"{mlp}.wi_1", mlp_gate=f"{mlp}.wi_0")
    # T5 v1.0 shares the embedding with the head and scales what the head reads.
    scaled = bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))
    return replace(row, head_scale=config.d_model**-0.5 if scaled else 1.0)


_gated = Architecture(
    model_type="llama",
    block="model.layers.{}",
    mlp="mlp",
    mlp_in="mlp.up_proj",
    mlp_gate="mlp.gate_proj",
    mlp_out="mlp.down_proj",
    attn="self_attn",
    attn_out="self_attn.o_proj",
    embed="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
)
_t5_decoder = Architecture(
    model_type="t5",
    block="decoder.block.{}",
    mlp="layer.2.DenseReluDense",
    mlp_in="layer.2.DenseReluDense.wi",
    mlp_out="layer.2.DenseReluDense.wo",
    attn="layer.0.SelfAttention",
    attn_out="layer.0.SelfAttention.o",
    cross="layer.1.EncDecAttention",
    embed="decoder.embed_tokens",
    final_norm="decoder.final_layer_norm",
    head="lm_head",
    side="decoder",
    depth="num_decoder_layers",
    adapt=_t5,
)
_rows = (
    Architecture(
        model_type="gpt2",
        block="transformer.h.{}",
        mlp="mlp",
        mlp_in="mlp.c_fc",
        mlp_out="mlp.c_proj",
        attn="attn",
        attn_out="attn.c_proj",
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
    ),
    Architecture(
        model_type="gptj",
        block="transformer.h.{}",
        mlp="mlp",
        mlp_in="mlp.fc_in",
        mlp_out="mlp.fc_out",
        attn="attn",
        attn_out="attn.out_proj",
        embed="transformer.wte",
        final_norm="transformer.ln_f",
        head="lm_head",
        parallel=True,
    ),
    Architecture(
        model_type="gpt_neox",
        block="gpt_neox.layers.{}",
        mlp="mlp",
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        attn="attention",
        attn_out="attention.dense",
        embed="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        # Released transformers 5 versions use either name for the output projection.
        head="lm_head|embed_out",
        parallel=True,
        adapt=_gpt_neox,
    ),
    Architecture(
        model_type="opt",
        block="model.decoder.layers.{}",
        # OPT has no MLP module: its second linear is the MLP's output, and it runs on [tokens, width].
        mlp="fc2",
        mlp_in="fc1",
        mlp_out="fc2",
        attn="self_attn",
        attn_out="self_attn.out_proj",
        embed="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        head="lm_head",
        flat_mlp=True,
        adapt=_opt,
    ),
    Architecture(
        model_type="bloom",
        block="transformer.h.{}",
        mlp="mlp",
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        attn="self_attention",
        attn_out="self_attention.dense",
        embed="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        head="lm_head",
        residual_inside=True,
        adapt=_bloom,
    ),
    Architecture(
        model_type="falcon",
        block="transformer.h.{}",
        mlp="mlp",
        mlp_in="mlp.dense_h_to_4h",
        mlp_out="mlp.dense_4h_to_h",
        attn="self_attention",
        attn_out="self_attention.dense",
        embed="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        head="lm_head",
        parallel=True,
        adapt=_falcon,
    ),
    _gated,
    replace(_gated, model_type="mistral"),
    replace(_gated, model_type="qwen2"),
    replace(_gated, model_type="qwen3"),
    replace(_gated, model_type="gemma"),
    replace(_gated, model_type="gemma2", post_norm=True, softcap="final_logit_softcapping"),
    replace(_gated, model_type="gemma3_text", post_norm=True, softcap="final_logit_softcapping"),
    Architecture(
        model_type="phi",
        block="model.layers.{}",
        mlp="mlp",
        mlp_in="mlp.fc1",
        mlp_out="mlp.fc2",
        attn="self_attn",
        attn_out="self_attn.dense",
        embed="model.embed_tokens",
        final_norm="model.final_layernorm",
        head="lm_head",
        parallel=True,
    ),
    # Phi-3 fuses gate and up into one matrix: rows [0, f) are the gate, rows [f, 2f) the up projection.
    replace(_gated, model_type="phi3", mlp_in="mlp.gate_up_proj", mlp_gate=None, fused_gate=True),
    _t5_decoder,
    Architecture(
        model_type="bert",
        block="bert.encoder.layer.{}",
        mlp="output",
        mlp_in="intermediate.dense",
        mlp_out="output.dense",
        attn="attention",
        attn_out="attention.output.dense",
        embed="bert.embeddings.word_embeddings",
        final_norm=None,
        head="cls.predictions.decoder",
        side="encoder",
        residual_inside=True,
        norm_after_add=True,
        before_head=("cls.predictions.transform",),
    ),
)
_t5_encoder = replace(
    _t5_decoder,
    block="encoder.block.{}",
    mlp="layer.1.DenseReluDense",
    mlp_in="layer.1.DenseReluDense.wi",
    mlp_out="layer.1.DenseReluDense.wo",
    cross=None,
    embed="encoder.embed_tokens",
    final_norm="encoder.final_layer_norm",
    side="encoder",
    depth="num_layers",
)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({row.model_type: row for row in _rows})
"""The known architectures by `model_type`; for encoder-decoder models, the decoder side."""

ENCODERS: Mapping[str, Architecture] = MappingProxyType({"t5": _t5_encoder})
"""The encoder side of the encoder-decoder rows (`resolve(model, side="encoder")`)."""
