"""Figures drawn from summaries, run folders and benchmarks. matplotlib is imported only when one is drawn."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "caches": "accuracy_by_cost accuracy_by_depth",
        "curves": "learning_curves training_losses",
        "draw": "delete_figures draw_all formats_of",
        "generation": "decoding_by_context",
        "rates": "score_by_rate",
        "slices": "accuracy_by_slice accuracy_map",
        "style": "NothingToPlot",
        "state": "recall_vs_state throughput_vs_state",
    },
)
