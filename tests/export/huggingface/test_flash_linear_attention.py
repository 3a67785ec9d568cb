"""Layouts of flash-linear-attention beside its definitions, in NumPy: what its classes compute from config.json and the
tensors of an export, token by token (fla/layers and the naive functions of fla/ops there; equations: the mixers' files
here)."""

import json

import chz
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from recollect.configuration import UserError
from recollect.export.huggingface import Facts, export_huggingface, import_huggingface
from recollect.layers import RWKV7
from recollect.models import FunctionalModel, repeat
from tests.export.huggingface.cases import FLASH, parameters

TOKENS = np.random.default_rng(3).integers(0, 257, 9)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.maximum(x, -700)))


def silu(x):
    return x * sigmoid(x)


def rms(x, gain, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * gain


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def rotated(x, base):
    """Pairs of the halves' dimensions, turned; x (t, h, k)."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)


def recurrent(q, k, v, log_decay=0.0, beta=None):
    """S_t = exp(g) S + k (x) u, u = v or beta (v - S k), o = S q / sqrt(k); arguments (t, h, ...)."""
    q, k = (y.repeat(v.shape[1] // y.shape[1], 1) for y in (q, k))
    decay = np.broadcast_to(np.exp(log_decay), k.shape)
    state, outputs = np.zeros((*k.shape[1:], v.shape[2])), []
    for t in range(len(v)):
        state = state * decay[t][..., None]
        update = v[t]
        if beta is not None:
            update = beta[t][:, None] * (v[t] - np.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][..., None] * update[:, None]
        outputs.append(np.einsum("hk,hkv->hv", q[t], state) / np.sqrt(k.shape[2]))
    return np.stack(outputs)


class Layer:
    """One layer's `attn`."""

    def __init__(self, config, weights, number):
        self.config, self.epsilon, self.kind = config, config["norm_eps"], config["model_type"]
        self.weights, self.place = weights, f"model.layers.{number}.attn."

    def get(self, name):
        return self.weights[self.place + name]

    def linear(self, name, x):
        y = x @ self.get(f"{name}.weight").T
        bias = self.weights.get(f"{self.place}{name}.bias")
        return y if bias is None else y + bias

    def projected(self, letter, x, activates=False):
        y = self.linear(f"{letter}_proj", x)
        if self.config["use_short_conv"]:
            taps = self.get(f"{letter}_conv1d.weight")[:, 0].T  # the current token's last
            padded = np.concatenate([np.zeros((len(taps) - 1, y.shape[1])), y])
            y = sum(taps[j] * padded[j : j + len(y)] for j in range(len(taps)))
        return silu(y) if activates or self.config["use_short_conv"] else y

    def low_rank(self, name, x):
        return self.linear(f"{name}.1", self.linear(f"{name}.0", x))

    def softmax(self, x, spec):
        heads, t = spec["num_heads"], len(x)
        q = rotated(self.linear("q_proj", x).reshape(t, heads, -1), spec["rope_theta"])
        k = rotated(self.linear("k_proj", x).reshape(t, spec["num_kv_heads"], -1), spec["rope_theta"])
        v = self.linear("v_proj", x).reshape(t, spec["num_kv_heads"], -1)
        k, v = (y.repeat(heads // spec["num_kv_heads"], 1) for y in (k, v))
        scores = np.einsum("thk,shk->hts", q, k) / np.sqrt(q.shape[-1])
        back = np.arange(t)[:, None] - np.arange(t)
        seen = (back >= 0) & (back < (spec["window_size"] or t))
        weights = np.where(seen, np.exp(scores), 0)
        o = np.einsum("hts,shv->thv", weights / weights.sum(-1, keepdims=True), v)
        return self.linear("o_proj", o.reshape(t, -1))

    def __call__(self, x):
        t, config, heads = len(x), self.config, self.config["num_heads"]
        delta = self.kind in ("delta_net", "gated_deltanet", "kda")
        if self.kind == "hgrn2":
            forget = self.linear("f_proj", x)
            g, k = -np.log1p(np.exp(-forget)), 1 - sigmoid(forget)
            parts = (y.reshape(t, heads, -1) for y in (silu(self.linear("q_proj", x)), k, self.linear("i_proj", x)))
            o = recurrent(*parts, g.reshape(t, heads, -1))
            return self.linear("o_proj", rms(o.reshape(t, -1), self.get("g_norm.weight"), self.epsilon))
        q, k = (self.projected(letter, x, delta).reshape(t, heads, -1) for letter in "qk")
        heads = config.get("num_v_heads", heads)
        v = self.projected("v", x, delta).reshape(t, heads, -1)
        decay, beta = 0.0, None
        if delta:
            q, k = unit(q), unit(k)
            beta = sigmoid(self.linear("b_proj", x)) * (2 if config["allow_neg_eigval"] else 1)
        if self.kind == "gla":
            decay = -np.log1p(np.exp(-self.low_rank("gk_proj", x))).reshape(t, heads, -1) / 16
        elif self.kind == "retnet":
            q, k = rotated(q, 1e4), rotated(k, 1e4)
            decay = np.log(1 - 2.0 ** (-5 - np.arange(heads)))[:, None]
        elif self.kind == "gated_deltanet":
            step = np.log1p(np.exp(self.linear("a_proj", x) + self.get("dt_bias")))
            decay = (-np.exp(self.get("A_log")) * step)[..., None]
        elif self.kind == "kda":
            logits = (self.low_rank("f_proj", x) + self.get("dt_bias")).reshape(t, heads, -1)
            decay = config["lower_bound"] * sigmoid(np.exp(self.get("A_log"))[:, None] * logits)
        o = recurrent(q, k, v, decay, beta)
        gate = self.low_rank("g_proj", x) if self.kind == "kda" else self.linear("g_proj", x)
        norm = "o_norm.weight" if delta else "g_norm_swish_gate.weight"
        gate = (sigmoid if self.kind == "kda" else silu)(gate).reshape(o.shape)
        return self.linear("o_proj", (rms(o, self.get(norm), self.epsilon) * gate).reshape(t, -1))


class TimeMixing:
    """RWKV-7's `attn` of all layers, which share the first one's values."""

    def __init__(self, config, weights):
        self.weights, self.heads, self.epsilon = weights, config["num_heads"], config["head_dim"] * config["norm_eps"]

    def __call__(self, x, number):
        def get(name):
            return self.weights[f"model.layers.{number}.attn.{name}"]

        def low_rank(name, x, activation=lambda y: y):
            y = activation(x @ get(f"{name}_lora.lora.0.weight").T) @ get(f"{name}_lora.lora.2.weight").T
            return y if name == "g" else y + get(f"{name}_lora.lora.2.bias")

        def heads(y):
            return y.reshape(len(x), self.heads, -1)

        before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
        mixed = {letter: x + (before - x) * get(f"x_{letter}")[0, 0] for letter in "rwkvag"}
        r, k, v = (mixed[letter] @ get(f"{letter}_proj.weight").T for letter in "rkv")
        if number == 0:
            self.first_v = v
        else:
            v = v + (self.first_v - v) * sigmoid(low_rank("v", mixed["v"]))
        a = sigmoid(low_rank("a", mixed["a"]))
        decay = np.exp(-np.exp(-0.5) * sigmoid(low_rank("w", mixed["w"], np.tanh)))
        kk = unit(heads(k * get("k_k")))
        r, k, v, a, decay = map(heads, (r, k * (1 + (a - 1) * get("k_a")), v, a, decay))
        state, outputs = np.zeros((self.heads, k.shape[2], v.shape[2])), []
        for t in range(len(x)):
            read = np.einsum("hk,hkv->hv", kk[t], state)
            state = state * decay[t][..., None] - (kk[t] * a[t])[..., None] * read[:, None]
            state = state + k[t][..., None] * v[t][:, None]
            outputs.append(np.einsum("hk,hkv->hv", r[t], state))
        o = np.stack(outputs)
        o = (o - o.mean(-1, keepdims=True)) / np.sqrt(o.var(-1, keepdims=True) + self.epsilon)
        o = o.reshape(len(x), -1) * get("g_norm.weight") + get("g_norm.bias")
        o = heads(o) + (r * k * get("r_k")).sum(-1, keepdims=True) * v
        return (o.reshape(len(x), -1) * low_rank("g", mixed["g"], sigmoid)) @ get("o_proj.weight").T


def rwkv7_logits(config, weights):
    """Logits of TOKENS as the library's RWKV-7 defines them."""
    mixing, x = TimeMixing(config, weights), weights["model.embeddings.weight"][TOKENS]

    def normed(name, x):
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["norm_eps"])
        return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for number in range(config["num_hidden_layers"]):
        place = f"model.layers.{number}"
        x = x + mixing(normed(f"{place}.attn_norm", x), number)
        y = normed(f"{place}.ffn_norm", x)
        y = y + (np.concatenate([np.zeros_like(y[:1]), y[:-1]]) - y) * weights[f"{place}.ffn.x_k"]
        y = np.maximum(y @ weights[f"{place}.ffn.key.weight"].T, 0) ** 2
        x = x + y @ weights[f"{place}.ffn.value.weight"].T
    return normed("model.norm", x) @ weights["model.embeddings.weight"].T


def logits_of(folder):
    """Logits of TOKENS as the library defines them."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}
    if config["model_type"] == "rwkv7":
        return rwkv7_logits(config, weights)
    x, epsilon = weights["model.embeddings.weight"][TOKENS], config["norm_eps"]
    spec = config.get("attn") or {"layers": []}
    for number in range(config["num_hidden_layers"]):
        place = f"model.layers.{number}."
        layer, y = Layer(config, weights, number), rms(x, weights[place + "attn_norm.weight"], epsilon)
        x = x + (layer.softmax(y, spec) if number in spec["layers"] else layer(y))
        y = rms(x, weights[place + "mlp_norm.weight"], epsilon)
        gate, up = (y @ weights[f"{place}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (silu(gate) * up) @ weights[place + "mlp.down_proj.weight"].T
    x = rms(x, weights["model.norm.weight"], epsilon)
    return x @ weights["model.embeddings.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


@pytest.mark.parametrize("name", FLASH)
def test_the_library_would_compute_the_same(name, tmp_path):
    params = parameters(FLASH[name])
    export_huggingface(params, FLASH[name], tmp_path / "out", facts=Facts("toy"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == name and "import fla" in (tmp_path / "out" / "README.md").read_text()
    model = FunctionalModel(FLASH[name], 257)
    here = jax.jit(lambda params, tokens: model.bind(params)(tokens))(params, jnp.asarray(TOKENS, jnp.int32)[None])
    np.testing.assert_allclose(here[0], logits_of(tmp_path / "out"), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("gla", {"norm_eps": 1e-6}, "norm_eps=1e-06: the heads' norms have 1e-05 here"),
        ("gla", {"expand_k": 0.51, "num_heads": 3}, "expand_k: 16 dimensions do not divide among num_heads=3"),
        ("retnet", {"feature_map": "relu"}, "feature_map='relu': this project has None only"),
        ("hgrn2", {"use_lower_bound": True}, "use_lower_bound=True: this project has False only"),
        ("delta_net", {"attn": {"layers": [7], "num_heads": 4}}, "layers must be numbers of layers, from 0 to 1"),
        ("kda", {"lower_bound": 5.0}, "lower_bound=5.0: must be a negative number"),
        ("rwkv7", {"norm_first": True}, "norm_first=True: this project has False only"),
        ("rwkv7", {"a_low_rank_dim": 16}, "decay_low_rank_dim=32: ranks are equal here"),
    ],
)
def test_a_config_that_says_what_is_not_here(name, fields, reason, tmp_path):
    export_huggingface(parameters(FLASH[name]), FLASH[name], tmp_path / "out", facts=Facts("toy"))
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UserError, match=reason):
        import_huggingface(tmp_path / "out")


def test_rwkv7_without_values_of_the_first_layer(tmp_path):
    """It computes the same, comes back, and a file that mixes anything in is refused."""
    model = chz.replace(FLASH["rwkv7"], stages=repeat(RWKV7(), depth=2))
    params = parameters(model)
    export_huggingface(params, model, tmp_path / "out", facts=Facts("toy"))
    functional = FunctionalModel(model, 257)
    here = jax.jit(lambda params, tokens: functional.bind(params)(tokens))(params, jnp.asarray(TOKENS, jnp.int32)[None])
    np.testing.assert_allclose(here[0], logits_of(tmp_path / "out"), atol=1e-4)
    assert [mixer.value_residual for mixer in import_huggingface(tmp_path / "out")[1].mixers] == [False, False]
    path = tmp_path / "out" / "model.safetensors"
    for name in ("layers.1.attn.v_lora.lora.2.bias", "layers.0.ffn.x_k"):
        save_file({**load_file(path), f"model.{name}": np.full(32, 0.5, np.float32)}, path)
        with pytest.raises(UserError, match=f"{name} is not what stands for leaving it out"):
            import_huggingface(tmp_path / "out")
