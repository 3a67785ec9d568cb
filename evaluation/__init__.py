"""Metrics, and tables and plots drawn from finished run folders. Plots import matplotlib only when one is drawn."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "curves": "LearningCurve TrainingCurve learning_curve training_curve",
        "ngram_baselines": "Bigram NgramTable fit_bigram recall_hits",
        "plots": "accuracy_by_slice learning_curves recall_vs_state",
        "results": "RunResult Summary best_setting group_by_label load_run load_runs summarise",
        "table": "format_table write_csv",
        "text_slices": "evaluate_text",
    },
)
