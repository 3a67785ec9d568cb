"""Metrics, and tables and plots drawn from finished run folders. Plots import matplotlib only when one is drawn."""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "curves": "LearningCurve TrainingCurve learning_curve training_curve",
        "intervals": "mean_interval ratio_interval share_interval",
        "matrix": "format_matrix",
        "metrics": "METRICS Metric",
        "ngram_baselines": "Bigram NgramTable fit_bigram recall_hits",
        "plots": "accuracy_by_slice accuracy_map draw_all learning_curves recall_vs_state score_by_rate "
        "throughput_vs_state training_losses",
        "results": "RunResult find_runs load_run load_runs",
        "study_results": "summarise_study write_study_results",
        "summaries": "RatePoint Summary best_setting by_learning_rate group_by_label group_by_task summarise",
        "table": "format_table write_csv",
        "text_slices": "evaluate_text",
    },
)
