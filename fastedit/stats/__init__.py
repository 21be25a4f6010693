"""Second moments of keys: collected in one pass over a corpus, resumable, stored with where they came from.

moments = collect_statistics(model, tokenizer, arch, read_corpus("corpus.txt"), layers=[3, 4, 5], directory="stats")
StatisticsStore("stats").get("transformer.h.3.mlp.c_proj", model=model).cholesky()
"""

from __future__ import annotations

from fastedit.stats.cache import StatisticsStore
from fastedit.stats.collect import collect_statistics
from fastedit.stats.corpus import Corpus, read_corpus
from fastedit.stats.moment import SecondMoment, merge
from fastedit.stats.progress import CollectProgress
from fastedit.stats.provenance import Provenance, model_fingerprint

__all__ = [
    "CollectProgress",
    "Corpus",
    "Provenance",
    "SecondMoment",
    "StatisticsStore",
    "collect_statistics",
    "merge",
    "model_fingerprint",
    "read_corpus",
]
