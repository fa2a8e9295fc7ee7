"""Text into a token store with its salient spans; what each took is noted beside the store."""

from pathlib import Path

from realm_fast.config import Config
from realm_fast.corpus import build_corpus
from realm_fast.masking import SalientSpans, prepare_spans, spans_path
from realm_fast.run_folder import corpus_stages_path, record_stage
from realm_fast.token_store import TokenStore


def prepare_corpus(
    config: Config, out: Path, *, with_spans: bool = True, progress: bool = False
) -> tuple[TokenStore, SalientSpans | None]:
    """Builds the token store `out`, or opens it, and finds the spans that the masking needs.

    Returns:
        The store, and its spans; None where the masking strategy needs none or with_spans is False.
    """
    notes = corpus_stages_path(out)
    if out.exists():
        store = build_corpus(config.corpus, out, progress=progress)  # for its checks
    else:
        with record_stage(notes, "corpus") as details:
            store = build_corpus(config.corpus, out, progress=progress)
            details |= {"blocks": len(store)}
    if not with_spans or config.masking.strategy != "salient_span":
        return store, None
    if spans_path(store, config.masking.entity_tagger).exists():
        return store, prepare_spans(store, config.masking, progress=progress)
    with record_stage(notes, "salient spans") as details:
        spans = prepare_spans(store, config.masking, progress=progress)
        assert spans is not None
        details |= {"spans": spans.num_spans}
    return store, spans
