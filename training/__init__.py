"""From an experiment to a run's folder. `training/train.py` is the loop of one run; the rest stands around it.

`recollect.training.train.train` trains an experiment.
"""

from recollect.configuration.base import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "experiment": "Experiment Mesh Run",
        "loss": "Loss",
        "adafactor": "Adafactor",
        "lion": "Lion",
        "muon": "Muon",
        "sgd": "SGD",
        "optimizer": "AdamW",
        "checkpoint.load": "SavedRun evaluate_run open_run open_text_run",
        "recovery.loss_spikes": "Spikes",
        "recovery.replay": "replay",
        "run_folder": "RunFolder",
        "run_state": "RunState run_directory",
        "step": "Program member_values program_for",
        "sweeps.population": "train_members train_population",
        "sweeps.study": "run_study",
    },
)
