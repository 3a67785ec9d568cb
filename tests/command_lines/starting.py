"""Starting from something: other runs' parameters, exports, frozen parts, low-rank updates, token ids; and looking into
data before training on them."""

import shutil

import numpy as np

from recollect.main import main

RECALL = "mqar.attention model.width=16 data.vocab_size=32 data.length=16 data.pairs=2 data.evaluation_examples=16"
RUN = "run.batch_size=4 run.steps=2 run.steps_per_call=2 run.compile_cache=off"
TASK = f"train {RECALL} {RUN} run.directory=new"
TEXT = f"train text.attention model.width=16 data.length=32 run.sample_every=0 {RUN} run.directory=new_text"

IN_ORDER = True
"""Lines use the runs that earlier ones write."""


def prepare(folder):
    source = f"train {RECALL} {RUN} run.checkpoint_every=1 run.steps_per_call=1 run.directory={folder / 'trained'}"
    assert main(source.split()) == 0
    assert main(["export", str(folder / "trained"), str(folder / "exported")]) == 0
    shutil.copytree(folder / "exported", folder / "cut")
    with (folder / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    shutil.copytree(folder / "trained", folder / "damaged")
    for path in (folder / "damaged" / "checkpoints").glob("*/digests.json"):
        path.unlink()
    (folder / "notes.txt").write_text("hello " * 500)
    ids = np.random.default_rng(0).integers(0, 64, 1000)
    (folder / "nano").mkdir()
    ids[:800].astype(np.uint16).tofile(folder / "nano" / "train.bin")
    ids[800:].astype(np.uint16).tofile(folder / "nano" / "val.bin")
    (folder / "unnamed").mkdir()
    for name in ("a.bin", "b.bin"):
        ids.astype(np.uint16).tofile(folder / "unnamed" / name)
    ids.astype(np.uint32).tofile(folder / "wide.bin")
    np.save(folder / "ids.npy", ids)
    np.save(folder / "matrix.npy", ids.reshape(10, 100))
    np.save(folder / "floats.npy", ids / 2)
    np.save(folder / "negative.npy", ids - 1)
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "odd.bin").write_bytes(b"abc")
    (folder / "empty.bin").write_bytes(b"")


LINES = [
    # run.initialize
    (f"{TASK} run.initialize=trained", 0, "begins with the parameters of trained, step 2"),
    (f"{TASK}_step run.initialize=trained:1", 0, "begins with the parameters of trained:1, step 1"),
    (f"{TASK}_export run.initialize=exported", 0, "begins with the parameters of exported, step 2"),
    (
        f"{TASK}_words run.initialize=trained data.vocab_size=40 run.initialize_mismatch=vocabulary",
        0,
        "kept: 32 of 40",
    ),
    (f"{TASK}_any run.initialize=trained model.tied=False run.initialize_mismatch=any", 0, "drawn afresh: head.kernel"),
    (f"{TASK}_1 run.initialize=trained:9", 2, "has no checkpoint of step 9; there are 1, 2"),
    (f"{TASK}_1 run.initialize=trainde", 2, "trainde is not there; give a run or an export"),
    (f"{TASK}_1 run.initialize=trained/checkpoints", 2, "is neither a run's folder (checkpoints/) nor an export"),
    (f"{TASK}_1 run.initialize={'x' * 300}", 2, "cannot be read (File name too long)"),
    (f"{TASK}_1 run.initialize=notes.txt", 2, "is neither a run's folder (checkpoints/) nor an export"),
    (f"{TASK}_1 run.initialize=exported:2", 2, "is an export, which has one step; leave :2 out"),
    (f"{TASK}_1 run.initialize=cut", 2, "it was cut off"),
    (f"{TASK}_1 run.initialize=damaged", 2, "is damaged: it has no digests.json"),
    (f"{TASK}_1 run.initialize=trained data.vocab_size=40", 2, "run.initialize_mismatch=vocabulary"),
    (f"{TASK}_1 run.initialize=trained model.tied=False", 2, "run.initialize_mismatch=any"),
    (f"{TASK}_1 run.initialize=trained model.width=32", 2, "embedding is (32, 16) there, (32, 32) here"),
    (f"{TASK}_1 run.initialize=trained run.initialize_mismatch=some", 2, "vocabulary"),
    ("evaluate trained:1", 0, '"step": 1'),
    ("evaluate trained:9", 2, "trained has no checkpoint of step 9; there are 1, 2"),
    ("export trained:1 step_1", 0, "exported: step_1/model.safetensors"),
    ("evaluate notes.txt", 2, "there is no run folder notes.txt: it is a file"),
    ("import notes.txt out", 2, "notes.txt is a file; import reads a folder of Hugging Face's"),
    ("import nowhere out", 2, "nowhere is not there; import reads a folder of Hugging Face's"),
    ("prepare notes.txt notes.txt", 2, "notes.txt is a file; `recollect prepare SOURCE OUT` writes the folder OUT"),
    # Frozen parts
    (f"describe {RECALL} optimizer.frozen=embedding,stack.stages.0.0", 0, "trainable"),
    (
        f"{TASK}_frozen run.initialize=trained optimizer.frozen=stack",
        0,
        "on cpu, 544 of them trained, 2 steps",
    ),
    (
        f"{TASK}_1 optimizer.frozen=embeding",
        2,
        "optimizer.frozen=embeding: matches no parameter; did you mean embedding",
    ),
    (f"{TASK}_1 optimizer.frozen=query", 2, "did you mean *.query"),
    (f"{TASK}_1 optimizer.frozen=*", 2, "leaves no parameter to train; name fewer"),
    (f"{TASK}_1 optimizer.forzen=embedding", 2, "did you mean optimizer.frozen=embedding"),
    # Low-rank updates
    (f"{TASK}_lora run.initialize=trained model.lora=LoRA model.lora.rank=2", 0, "drawn afresh: lora.stack"),
    ("export new_lora plain", 0, "exported: plain/model.safetensors"),
    (
        "export new_lora plain",
        2,
        "plain is not empty; choose another folder, or --overwrite (overwrite=True) to replace",
    ),
    ("export new_lora plain --overwrite", 0, "exported: plain/model.safetensors"),
    (f"describe {RECALL} model.lora=LoRA model.lora.rank=2 model.lora.layers=*.query,*.value", 0, "lora"),
    (f"{TASK}_1 model.lora=LoRA model.lora.rank=0", 2, "rank=0: must be at least 1"),
    (f"{TASK}_1 model.lora=LoRA model.lora.alpha=-1", 2, "must be positive"),
    (f"{TASK}_1 model.lora=LoRA model.lora.layers=*.qurey", 2, "*.query"),
    (f"{TASK}_1 model.lora=LoRa", 2, "LoRA"),
    # Token ids
    (f"{TEXT} data.source=nano", 0, "bits_per_token"),
    ("inspect wide.bin token_type=uint32", 0, "train: 1 documents, 950 tokens"),
    ("inspect ids.npy data.end_token=7 --count 1", 0, "tokens per document: min"),
    (f"{TEXT}_1 data.source=wide.bin", 2, "data.token_type=uint32"),
    (f"{TEXT}_1 data.source=odd.bin", 2, "3 bytes are not whole ids of uint16; data.token_type names another type"),
    (f"{TEXT}_1 data.source=empty.bin", 2, "holds 0 ids; at least two are needed"),
    (f"{TEXT}_1 data.source=none.bin", 2, "no such file; .npy and .bin are files of token ids"),
    (f"{TEXT}_1 data.source={'x' * 300}.bin", 2, "cannot be read (File name too long)"),
    (f"{TEXT}_1 data.source=matrix.npy", 2, "array.reshape(-1)"),
    (f"{TEXT}_1 data.source=floats.npy", 2, "token ids are a vector of integers"),
    (f"{TEXT}_1 data.source=negative.npy", 2, "holds the id -1"),
    (f"{TEXT}_1 data.source=objects.npy", 2, "without running code"),
    (f"{TEXT}_1 data.source=nano data.vocabulary_size=10", 2, "the vocabulary must be larger than that"),
    (f"{TEXT}_1 data.source=nano data.end_token=64", 2, "leave it out to read one document"),
    (f"{TEXT}_1 data.source=nano data.token_type=uint8", 2, "uint16"),
    (f"{TEXT}_1 data.source=notes.txt data.end_token=3", 2, "is no file of token ids (.npy, .bin)"),
    (f"{TEXT}_1 data.source=unnamed", 2, "if these are token ids, give the file itself, or name it train.bin"),
    (f"{TEXT}_1 data.source=nano data.tokenizer=bytes", 2, "holds token ids of another tokenizer, as bytes"),
    ("evaluate new_text data.source=notes.txt", 2, "is text, and the run reads token ids of an unknown tokenizer"),
    ("prepare nano out", 2, "token ids need no preparation; train with data.source=nano"),
    ("generate new_text --prompt x", 2, "data.tokenizer=FILE names theirs"),
    # inspect
    ("inspect notes.txt", 0, "tokenizer bytes, 257 ids"),
    ("inspect trained --count 1", 0, "labels per example: 2 each"),
    ("inspect MQAR length=16 pairs=2", 0, "[->"),
    ("inspect mqar.based data.pairs=4 --count 0", 0, "MQAR: 256 ids"),
    ("inspect mqar.basde", 2, "did you mean mqar.based"),
    ("inspect MQRA", 2, "did you mean MQAR"),
    ("inspect MQAR --count -1", 2, "--count -1: must not be negative"),
    ("inspect MQAR pair=2", 2, "did you mean pairs"),
    ("inspect mqar.small", 2, "compare"),
]
