"""What a user may have meant by a field that is not there: names of other codebases, typing errors."""

from __future__ import annotations

import difflib

import chz

from recollect.configuration.base import Config
from recollect.configuration.names import nearest

MEANINGS = {
    "optimizer.learning_rate": "lr eta alpha peak_lr max_lr base_lr step_size",
    "optimizer.weight_decay": "wd l2 decay_rate weightdecay",
    "optimizer.warmup": "warmup_steps warmup_iters num_warmup_steps lr_warmup_steps warmup_tokens",
    "optimizer.decay_steps": "lr_decay_steps lr_decay_iters schedule_steps",
    "optimizer.clip": "grad_clip clip_grad max_grad_norm gradient_clipping clip_norm grad_norm_clip gradient_clip_val",
    "optimizer.schedule": "lr_schedule lr_scheduler scheduler lr_decay lr_scheduler_type decay_lr",
    "optimizer.final_fraction": "min_lr min_lr_ratio lr_min final_lr_fraction",
    "optimizer.beta1": "b1 adam_beta1 momentum",
    "optimizer.beta2": "b2 adam_beta2",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "optimizer": "optim opt optimiser",
    "run.steps": "max_steps num_steps n_steps iterations max_iters iters num_iterations train_steps total_steps "
    "num_train_steps training_steps",
    "run.batch_size": "bs batch batchsize global_batch_size train_batch_size per_device_train_batch_size "
    "micro_batch_size device_batch_size",
    "run.accumulate": "grad_accum grad_accum_steps gradient_accumulation gradient_accumulation_steps accumulation",
    "run.seed": "random_seed rng_seed rng",
    "run.directory": "out_dir output_dir save_dir log_dir logdir dir folder out run_dir workdir",
    "run.evaluate_every": "eval_every eval_interval eval_steps eval_iters validate_every val_every",
    "run.checkpoint_every": "save_every save_steps save_interval checkpoint_interval ckpt_every ckpt_interval",
    "run.log_every": "log_interval logging_steps log_steps print_every",
    "run.mesh.data": "gpus num_gpus n_gpus devices num_devices data_parallel dp",
    "run.mesh.fsdp": "fsdp_size zero",
    "run.mesh.tensor": "tp tensor_parallel model_parallel",
    "run.precision": "matmul_precision",
    "model.width": "d_model dmodel hidden_size n_embd dim embed_dim embedding_dim emb_dim hidden_dim model_dim d",
    "model.stages.0.repeats": "n_layers n_layer num_layers num_hidden_layers depth layers n_blocks num_blocks nlayers",
    "heads": "n_heads n_head num_heads num_attention_heads nheads nhead",
    "key_heads": "n_kv_heads kv_heads num_kv_heads num_key_value_heads kv_groups",
    "head_dim": "d_head head_size dim_head",
    "window": "window_size sliding_window attention_window",
    "kernel": "kernel_size conv_size d_conv",
    "feature_dim": "d_state state_dim feature_size",
    "model.embedding_dropout": "embd_pdrop embed_dropout resid_dropout",
    "dropout": "attn_pdrop attention_dropout attn_dropout attention_probs_dropout_prob",
    "model.dtype": "bf16 fp16 mixed_precision compute_dtype amp torch_dtype",
    "model.tied": "tie_embeddings tie_word_embeddings weight_tying tie_weights tied_embeddings",
    "model.remat": "gradient_checkpointing activation_checkpointing checkpointing rematerialize",
    "model.mlp.hidden": "d_ff ffn_dim intermediate_size mlp_hidden ff_dim ffn_hidden",
    "model.mlp.expansion": "mlp_ratio mlp_expansion expand",
    "model.mlp": "ffn feed_forward feedforward",
    "model.norm": "rmsnorm layernorm norm_type normalization",
    "data.length": "seq_len sequence_length seqlen seq_length context_length context block_size max_seq_len max_length "
    "ctx_len n_ctx context_size input_seq_len max_position_embeddings",
    "data.vocab_size": "vocab n_vocab vocabulary vocabulary_size padded_vocab_size",
    "data.pairs": "num_pairs n_pairs kv_pairs num_kv_pairs",
    "data.source": "dataset corpus data_dir train_data data_path text_file dataset_name",
    "data.evaluation_examples": "num_test_examples eval_examples test_examples n_eval",
}
"""Field, or name of a field wherever it stands -> names that other codebases have for it."""

CLASSES = {
    "Attention": "mha gqa mqa softmax selfattention multiheadattention causalselfattention full",
    "SlidingWindow": "local localattention swa slidingwindowattention window",
    "LinearAttention": "based taylor linear",
    "Mamba2": "mamba ssd ssm",
    "Hyena": "hyenaoperator",
    "Retention": "retnet",
    "MLSTM": "xlstm lstm",
    "GatedLinearAttention": "gla",
    "LatentAttention": "mla",
    "RWKV7": "rwkv",
    "Rotary": "rope rotaryembedding rotary_embedding",
    "LearnedPositions": "learned absolute wpe",
    "RelativeBias": "t5",
    "RMSNorm": "rms",
    "LayerNorm": "ln",
    "AdamW": "adam",
}
"""Config class -> names that other codebases have for it, in lower case."""

_CLASS_OF = {name: cls for cls, names in CLASSES.items() for name in names.split()}

ABSENT = {
    "there are no epochs: batches are drawn until run.steps, so set run.steps": "epochs max_epochs num_epochs epoch "
    "num_train_epochs n_epochs",
}
"""What to do instead -> names of other codebases for what does not exist here."""

_ABSENT = {name: text for text, names in ABSENT.items() for name in names.split()}

NOTES = {"model.embedding_dropout": "of the embeddings"}
"""What a suggested field is, where its name does not say it."""

_FIELD_OF = {name: field for field, names in MEANINGS.items() for name in names.split()}
_MOST = 4


def suggestion(config: Config, path: str, value: str) -> str:
    """Returns a did-you-mean ending with whole overrides, empty where nothing is close.

    Args:
      path: of the override, which has no such field.
    """
    paths = list(chz.beta_to_blueprint_values(config))
    above, missing = _first_unknown(path, paths)
    if missing.lower() in _ABSENT:
        return f"; {_ABSENT[missing.lower()]}"
    if missing == "betas" and len(betas := value.strip("()[]").split(",")) == 2 and "optimizer.beta2" in paths:
        return f"; did you mean optimizer.beta1={betas[0].strip()} optimizer.beta2={betas[1].strip()}?"
    places = (
        _places(paths, missing, above)
        or _places(paths, _FIELD_OF.get(missing.lower().replace("-", "_"), ""), above)
        or _nearest(paths, path, missing, above)
    )
    if len(places) > _MOST:
        name = places[0].rpartition(".")[2]
        places = [f"...{name}"] if all(place.endswith(f".{name}") for place in places) else places[:_MOST]
    meant = (f"{place}={value}{f' ({NOTES[place]})' if place in NOTES else ''}" for place in places)
    return "; did you mean " + " or ".join(meant) + "?" if places else ""


def class_hint(text: str, names: list[str]) -> str:
    """Returns a did-you-mean ending with classes of `names`, empty where nothing is close."""
    meant = _CLASS_OF.get(text.lower().replace("-", "_"))
    return f"; did you mean {meant}?" if meant in names else nearest(text, names)


def _first_unknown(path: str, paths: list[str]) -> tuple[str, str]:
    """Returns the first part of a path that no path of the config has at this place (else the last part), after what
    stands before it."""
    parts = path.split(".")
    beginnings = [".".join(parts[: end + 1]) for end in range(len(parts) - 1)]
    unknown = (not any(f"{known}.".startswith(f"{beginning}.") for known in paths) for beginning in beginnings)
    index = next((index for index, is_unknown in enumerate(unknown) if is_unknown), len(beginnings))
    return ".".join(parts[:index]), parts[index]


def _places(paths: list[str], name: str, above: str) -> list[str]:
    """Returns the paths that end in `name`: those below `above` where there are any, else all."""
    if not name:
        return []
    places = [path for path in paths if path == name or path.endswith(f".{name}")]
    return (
        [path for path in places if path.startswith(f"{above}.")]
        if above and any(path.startswith(f"{above}.") for path in places)
        else places
    )


def _nearest(paths: list[str], path: str, name: str, above: str) -> list[str]:
    """Returns up to three fields whose names look like `name`, those right below `above` before those of elsewhere."""
    below = [known for known in paths if known.startswith(f"{above}." if above else "")]
    siblings = dict.fromkeys(known[len(above) :].lstrip(".").split(".")[0] for known in below)
    rest = path[len(above) :].lstrip(".")[len(name) :]
    close = difflib.get_close_matches(name.lower(), list(siblings), n=3, cutoff=0.5 if above else 0.6)
    if close:
        return [f"{above}.{match}{rest}".lstrip(".") for match in close]
    everywhere = {known.rpartition(".")[2]: known for known in reversed(paths)}
    return [everywhere[match] for match in difflib.get_close_matches(name.lower(), list(everywhere), n=1, cutoff=0.7)]
