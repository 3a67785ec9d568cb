"""What can be set: fields, names of other codebases, classes, tuples, sweeps, runs to compare."""

from tests.evaluation.folders import write_run

PATTERN = "model.stages.0.pattern"


def prepare(folder):
    write_run(folder / "runs/a", rate=1e-3, accuracy=0.2)
    write_run(folder / "runs/b", rate=1e-2, accuracy=0.8)
    (write_run(folder / "runs/unfinished") / "result.json").unlink()
    (folder / "empty").mkdir()
    experiment = "from recollect.experiments.mqar import attention"
    study = (
        "from recollect.experiments.study import Study\n\n\ndef study() -> Study:\n    return Study((attention(),))\n"
    )
    (folder / "my study.py").write_text(f"{experiment}\n{study}")


def shown(overrides: str, text: str) -> tuple[str, int, str]:
    """A line that prints the fields of an experiment with overrides; `text` is among them."""
    return f"describe mqar.attention --config {overrides}", 0, text


def refused(override: str, text: str) -> tuple[str, int, str]:
    return f"train mqar.attention '{override}'", 2, text


LINES = [
    # every field
    shown("", "run.batch_size=64"),
    shown("", "sequences per step"),
    shown("optimizer.learning_rate=3e-4", "optimizer.learning_rate=0.0003"),
    shown("...heads=4", f"{PATTERN}.1.heads=4"),
    shown("model.mlp=SwiGLU model.mlp.hidden=96", "model.mlp.hidden=96"),
    shown("run.directory=runs/x", "run.directory=runs/x"),
    # classes and what they keep
    shown("optimizer=Muon", "optimizer: AdamW -> Muon: keeps learning_rate=0.003, decay_everything=True; defaults "),
    shown("optimizer=Lion", "optimizer.beta2=0.99 "),
    shown("optimizer=SGD optimizer.momentum=0.5", "optimizer.momentum=0.5"),
    shown("'optimizer=Adafactor(learning_rate=1e-2, factored_from=32)'", "optimizer.factored_from=32"),
    shown(f"{PATTERN}.1.heads=4 {PATTERN}.1=SlidingWindow", "Attention -> SlidingWindow: "),
    shown(f"'{PATTERN}.1=SlidingWindow(window=9, positions=Rotary)'", f"{PATTERN}.1.positions=Rotary"),
    # tuples
    shown(f"'{PATTERN}=(LinearAttention, SlidingWindow)'", f"{PATTERN}.1=SlidingWindow"),
    shown(f"'{PATTERN}=(Attention, BaseConvolution)'", f"{PATTERN}.1.kernel=3"),
    shown(f"'{PATTERN}=(Attention,)'", f"{PATTERN}.0=Attention"),
    shown(f"{PATTERN}.2=Attention", f"{PATTERN}.2=Attention"),
    shown("data.vocab_size=512 'data.extrapolation=(2,)'", "data.extrapolation=(2,)"),
    shown("'data.evaluation=(RecallSlice(length=64, pairs=4),)'", "data.evaluation.0.pairs=4"),
    shown("'model.stages=(Stage(pattern=(Attention,), repeats=3),)'", "model.stages.0.repeats=3"),
    # names of other codebases
    refused("lr=1e-3", "did you mean optimizer.learning_rate=1e-3?"),
    refused("batch_size=4", "did you mean run.batch_size=4?"),
    refused("steps=10", "did you mean run.steps=10?"),
    refused("max_steps=10", "did you mean run.steps=10?"),
    refused("epochs=10", "there are no epochs: batches are drawn until run.steps"),
    refused("d_model=32", "did you mean model.width=32?"),
    refused("n_embd=32", "did you mean model.width=32?"),
    refused("hidden_size=32", "did you mean model.width=32?"),
    refused("seq_len=32", "did you mean data.length=32?"),
    refused("block_size=32", "did you mean data.length=32?"),
    refused("n_layers=4", "did you mean model.stages.0.repeats=4?"),
    refused("num_hidden_layers=4", "did you mean model.stages.0.repeats=4?"),
    refused("n_heads=4", f"did you mean {PATTERN}.1.heads=4?"),
    refused("num_attention_heads=4", f"did you mean {PATTERN}.1.heads=4?"),
    refused("n_kv_heads=2", f"did you mean {PATTERN}.1.key_heads=2?"),
    refused("weight_decay=0", "did you mean optimizer.weight_decay=0?"),
    refused("wd=0", "did you mean optimizer.weight_decay=0?"),
    refused("dropout=0.1", f"did you mean {PATTERN}.1.dropout=0.1?"),
    refused("attn_pdrop=0.1", f"did you mean {PATTERN}.1.dropout=0.1?"),
    refused("embd_pdrop=0.1", "did you mean model.embedding_dropout=0.1 (of the embeddings)?"),
    refused("max_grad_norm=1", "did you mean optimizer.clip=1?"),
    refused("warmup_steps=10", "did you mean optimizer.warmup=10?"),
    refused("seed=1", "did you mean run.seed=1?"),
    refused("vocab=64", "did you mean data.vocab_size=64?"),
    refused("out_dir=x", "did you mean run.directory=x?"),
    refused("eval_every=5", "did you mean run.evaluate_every=5?"),
    refused("gradient_accumulation_steps=2", "did you mean run.accumulate=2?"),
    refused("optim=Lion", "did you mean optimizer=Lion?"),
    refused("run.lr=1", "did you mean optimizer.learning_rate=1?"),
    refused("...lr=1", "did you mean optimizer.learning_rate=1?"),
    # what a part has
    refused(
        "zzz=1",
        "it has name, task, model, data, optimizer, loss, run (`describe NAME --config` lists every field)",
    ),
    refused("data.lenght=32", "did you mean data.length=32? It has evaluation_examples, "),
    refused("modle.width=32", "did you mean model.width=32?"),
    refused("model.width.x=32", "it is a value, without fields"),
    refused(f"{PATTERN}.5=Attention", f"it has 2, and the next one is {PATTERN}.2"),
    refused(f"{PATTERN}=Attention", "a tuple is written (Attention,)"),
    refused(f"{PATTERN}=(Attention, Nothing)", "there is no config class named 'Nothing'"),
    # classes of the right family
    refused("optimizer=SDG", "did you mean SGD?; there are Adafactor, AdamW, Lion, Muon, SGD"),
    refused("optimizer=Attention", "Attention is no Optimizer; there are Adafactor, AdamW, Lion, Muon, SGD"),
    refused("optimizer=Optimizer", "Optimizer is a base of classes; there are Adafactor"),
    refused("data=MQARVariant", "MQARVariant is a base of classes; did you mean"),
    refused("optimizer=Lion(lr=1)", "did you mean optimizer.learning_rate=1?"),
    refused(f"{PATTERN}.1=AdamW", "AdamW is no MixerConfig; there are "),
    refused(f"{PATTERN}.1=Atention", "did you mean Attention"),
    refused("model.norm=None", "; there are LayerNorm, RMSNorm"),
    refused("model.mlp=RMSNorm", "; there are GELU"),
    refused("model.mlp=os:system", "a value that names code is refused"),
    refused("model.dtype=fp8", "must be float32 or bfloat16"),
    refused("name=../../x", "must be usable as the name of a folder"),
    # the override to blame, and the class that it put in
    ("train mqar.attention run.steps=10 run.steps=20 run.stepz=3", 2, "error: run.stepz=3: run (Run) has no field"),
    shown("run.steps=10 run.steps=20", "run.steps=20 replaces run.steps=10"),
    refused(
        f"{PATTERN}.1=SlidingWindow(windw=17)", f"(SlidingWindow) has no field 'windw'; did you mean {PATTERN}.1.window"
    ),
    ("train mqar.attention optimizer=Lion optimizer.epsilon=1", 2, "optimizer (Lion) has no field 'epsilon'"),
    # what a field takes
    refused("run.steps=1e3", "run.steps=1e3: must be a whole number such as 1900"),
    refused("...heads=x", "...heads=x: must be a whole number such as 1"),
    refused("optimizer.clip=x", "optimizer.clip=x: must be a number or None"),
    refused("run.tensorboard=maybe", "must be True or False"),
    refused("run.wandb=yes", "must be online or offline or None"),
    refused(f"{PATTERN}=LinearAttention", "=LinearAttention: a tuple is written (LinearAttention,); there are "),
    refused(
        f"{PATTERN}=(LinearAttention, SlidingWindow", "SlidingWindow: a bracket is not closed; a tuple is written ("
    ),
    refused(f"{PATTERN}.1=Attention(4)", "are written with their names, such as Attention(heads=4)"),
    refused(f"{PATTERN}.1=Attention(heads=4,heads=2)", "Attention(heads=4, heads=2): a field is set twice"),
    refused(f"{PATTERN}.1.positions=rope", "did you mean Rotary?"),
    refused(f"{PATTERN}.1=Based", "did you mean LinearAttention?"),
    refused("model.lora.rank=4", "model.lora is None; set model.lora=LoRA first"),
    refused("run.steps.x=4", "run.steps (int) has no field 'x'"),
    refused("model=MQAR", "MQAR is no LanguageModel; there are Autoencoder, LanguageModel"),
    refused("optimizer.betas=(0.9,0.95)", "did you mean optimizer.beta1=0.9 optimizer.beta2=0.95?"),
    refused("...nothere=2", "nothing in the experiment has a field 'nothere'; `describe"),
    # whole paths of values that classes refuse
    refused("run.seed=-1", "error: run.seed=-1: must be between 0 and"),
    refused("model.width=0", "error: model.width=0: must be at least 1"),
    refused("...seed=-1", "error: ...seed=-1: must be between 0 and"),
    refused("run.mesh.data=0", "error: run.mesh.data=0: an axis"),
    refused("optimizer.learning_rate=inf", "error: optimizer.learning_rate=inf: must be positive and finite"),
    refused(f"{PATTERN}=()", f"error: {PATTERN}=(): a stage needs at least one mixer"),
    # the program
    ("--version", 0, "recollect 0.1.0"),
    ("train", 2, "the following arguments are required: experiment (see `recollect --help`)"),
    ("train mqar.nothing", 2, "`recollect list` shows all"),
    ("train --help", 0, "usage: recollect train "),
    ("evaluate --help", 0, "for example data.evaluation_examples=128; "),
    ("generate --help", 0, "so many of the likeliest tokens only (default: all)"),
    # sweeps
    ("train mqar.attention --sweep optimizer.learning_rate", 2, "the form is path=v1,v2,..."),
    ("train mqar.attention --sweep lr=1e-3,1e-2", 2, "did you mean optimizer.learning_rate=1e-3?"),
    ("train mqar.attention --sweep run.seed=0,0", 2, "0 is there twice"),
    ("train mqar.attention --sweep run.seed=0,,1", 2, "a value is missing between two commas"),
    ("train mqar.attention --sweep name=a,b", 2, "name names a run; --out DIR names the folder of all"),
    ("train mqar.attention --sweep run.seed=0,1 --processes 2", 2, "start a sweep in one process"),
    (
        "compare mqar.small --sweep run.seed=0 --sweep ...seed=1",
        2,
        "...seed is swept twice",
    ),
    ("compare mqar.small --at-once 0", 2, "at least one process has to train"),
    ("compare mqar.small run.directory=x", 2, "--out DIR names the folder of all"),
    ("compare mqar.small --only mqar.windo", 2, "did you mean mqar.window"),
    ("compare atlas.tiny --only party", 2, "did you mean parity"),
    # runs that exist
    ("compare runs/a runs/b --out both", 0, "0.01 ↑"),
    ("compare 'runs/[ab]' --out both", 0, "lr 0.001  lr 0.01"),
    ("compare runs --out both", 0, "runs: 1 of 3 runs are not finished and are left out"),
    ("compare runs/nothing", 2, "runs/nothing names no folder: give run folders"),
    ("compare empty", 2, "empty holds no run: give run folders, folders that hold runs, or globs of them"),
    ("compare runs/unfinished", 2, "is not finished"),
    ("compare runs/a run.steps=3", 2, "run.steps=3 names no folder"),
    # commands that are suggested have quoted paths
    ("train 'my study.py'", 2, "no experiment: use `recollect compare 'my study.py'`"),
    ("train 'my study.py:study'", 2, "use `recollect compare 'my study.py:study' --only mqar.attention`"),
    # describe, bench
    ("describe mqar.attention --no-compile model.width=8", 0, "operations on cpu"),
    ("describe mqar.attention --no-compile --target h100", 2, "give one of the two"),
    ("bench --help", 0, "kernels"),
    ("bench nothing", 2, "there are kernels, device"),
]
