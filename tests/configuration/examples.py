"""Experiment-like configs that the configuration tests share: nested tuples, optional parts, every kind of field."""

from recollect.data.synthetics import MQAR, RecallSlice
from recollect.layers import Landmark, LinearAttention
from recollect.layers.modules.feature_maps import Hedgehog, Identity, Relu
from recollect.layers.modules.mlp import GELU, SwiGLU
from recollect.layers.modules.norms import LayerNorm
from recollect.layers.modules.positions import LearnedPositions, Rotary
from recollect.models import LanguageModel, Stage, repeat
from recollect.training.experiment import Experiment, Mesh, Run
from recollect.training.optimizer import AdamW, GroupRate


def mixed() -> Experiment:
    """Two stages; LinearAttention with a non-default map, Landmark, a SwiGLU."""
    first = Stage(pattern=(LinearAttention(heads=2, feature_map=Relu(epsilon=1e-3)), Landmark(block=4)), repeats=2)
    return Experiment(
        name="mixed",
        model=LanguageModel(width=32, stages=(first, Stage(pattern=(LinearAttention(),))), mlp=SwiGLU(hidden=8)),
        data=MQAR(vocab_size=256),
    )


EXAMPLES = {
    "mixed": mixed(),
    "defaults": Experiment(
        name="defaults", model=LanguageModel(stages=repeat(LinearAttention(), depth=1)), data=MQAR()
    ),
    "everything set": Experiment(
        name='odd "name" \\ with:signs.and é',
        model=LanguageModel(
            width=48,
            stages=repeat(
                LinearAttention(
                    heads=3,
                    feature_dim=5,
                    feature_map=Identity(),
                    normalise=False,
                    decay="retnet",
                    output_norm=True,
                    positions=Rotary(),
                ),
                LinearAttention(feature_map=Hedgehog()),
                Landmark(
                    heads=4, key_heads=2, positions=Rotary(fraction=0.5, layout="interleaved", base=500.0), retrieve=3
                ),
                depth=5,
            ),
            norm=LayerNorm(bias=False, epsilon=1e-3),
            mlp=GELU(bias=True, expansion=2.5),
            positions=LearnedPositions(maximum=4096),
            tied=False,
            embedding_dropout=0.1,
            dtype="bfloat16",
            remat="dots",
            unroll=True,
        ),
        data=MQAR(
            mixture=(RecallSlice(length=64, pairs=4, weight=0.25), RecallSlice(length=128, pairs=8)), filler="zero"
        ),
        optimizer=AdamW(clip=1.0, warmup=3, schedule="constant", groups=(GroupRate(group="default", factor=1e-300),)),
        run=Run(directory="runs/a b", stop_at_accuracy=0.99, mesh=Mesh(data=2), seed=2**31 - 1, tensorboard=True),
    ),
}
