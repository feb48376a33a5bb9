"""The configuration of a DeepSeek-V4 model, under the key names of the released `config.json`.

Two spellings are read: the official one and the one that transformers writes (`layer_types`,
`mlp_layer_types`, `rope_parameters`). V4.1 and DSpark checkpoints share the model type and most
keys; they are recognised here, before anything else looks at their tensors, and refused.

Paper: §4.2.1 (model setups), table 1; §2.3 (which layers compress).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import ConfigError, UnsupportedModelError

SLIDING_WINDOW_RATIO = 0  # no compressed entries: sliding-window attention alone
CSA_RATIO = 4  # Compressed Sparse Attention: one entry for 4 tokens, chosen by the indexer
HCA_RATIO = 128  # Heavily Compressed Attention: one entry for 128 tokens, all of them visible


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN as the official `rope_scaling` states it (layers with compressed entries only)."""

    factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one model. Field names are those of the official `config.json`.

    `compress_ratios` holds one ratio per main layer (the official file appends one for the MTP
    block; it is always 0 there and dropped here). `expert_dtype` is None when the file does not
    say: the tensors then decide. Raises ConfigError for values that contradict each other.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096
    num_hidden_layers: int = 43
    num_attention_heads: int = 64
    head_dim: int = 512
    qk_rope_head_dim: int = 64
    q_lora_rank: int = 1024
    o_groups: int = 8
    o_lora_rank: int = 1024
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512
    sliding_window: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6
    moe_intermediate_size: int = 2048
    num_hash_layers: int = 3
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    compress_ratios: tuple[int, ...] = (0, 0) + (4, 128) * 20 + (4,)
    bos_token_id: int = 0
    eos_token_id: int = 1
    quantized: bool = True  # a `quantization_config` of the official kind is present
    expert_dtype: str | None = "fp4"

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def num_mtp_layers(self) -> int:
        """Number of MTP blocks stored beside the main layers (0 or 1)."""
        return self.num_nextn_predict_layers

    @property
    def group_width(self) -> int:
        """Concatenated head outputs that one output group multiplies: heads * head_dim / groups."""
        return self.num_attention_heads * self.head_dim // self.o_groups

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The preset `flash`, `pro`, `nano` or `micro`. Raises ConfigError for other names."""
        try:
            return PRESETS[name]
        except KeyError:
            raise ConfigError(
                f"no preset named {name!r}: choose one of {', '.join(sorted(PRESETS))}"
            ) from None

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> ModelConfig:
        """Read a `config.json` in either spelling: a path, a folder, or its parsed object.

        Raises ConfigError when the file cannot be read, a key is missing or a value is unusable,
        and UnsupportedModelError for V4.1, DSpark and other architectures.
        """
        raw = source if isinstance(source, dict) else _read_json(Path(source))
        _refuse_other_models(raw)
        return cls(**_official_fields(raw))

    def to_json(self) -> dict[str, Any]:
        """This configuration as the official `config.json` object."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        quantized, expert_dtype = fields.pop("quantized"), fields.pop("expert_dtype")
        scaling = fields.pop("rope_scaling")
        out: dict[str, Any] = {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            **fields,
            "num_key_value_heads": 1,
            "compress_ratios": [*self.compress_ratios, *[0] * self.num_mtp_layers],
            "rope_scaling": None if scaling is None else {"type": "yarn", **_as_dict(scaling)},
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "torch_dtype": "bfloat16",
        }
        if quantized:
            out["quantization_config"] = {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
            }
        if expert_dtype is not None:
            out["expert_dtype"] = expert_dtype
        return out


# Keys that select behaviour this architecture fixes: any other value would be computed wrongly.
_FIXED_KEYS: dict[str, Any] = {
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}

_LAYER_TYPE_RATIOS = {
    "sliding_attention": SLIDING_WINDOW_RATIO,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}


# No tensor's shape bounds these. Positions and entries are counted in 32 bits, experts in 16.
_MOST = {"n_routed_experts": 2**15, "index_topk": 2**20, "sliding_window": 2**20}
_MOST |= {"hc_sinkhorn_iters": 1000}
_MOST_OF_ANY = 2**31 - 2**16


def _as_dict(scaling: RopeScaling) -> dict[str, Any]:
    return {f.name: getattr(scaling, f.name) for f in dataclasses.fields(scaling)}


def _read_json(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {file}: {e.strerror or e}") from e
    except ValueError as e:
        raise ConfigError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _refuse_other_models(raw: dict[str, Any]) -> None:
    dspark = sorted(k for k in raw if k.startswith("dspark_"))
    if dspark:
        raise UnsupportedModelError(
            "this is a DeepSeek-V4 DSpark checkpoint (its config has "
            f"{dspark[0]}): its MTP block is replaced by a three-stage drafter that fathom does "
            "not implement. Use the launch checkpoint of the same model, which drafts with MTP."
        )
    quantization = raw.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise ConfigError(f"quantization_config must be an object, not {quantization!r}")
    block = quantization.get("weight_block_size")
    block = list(block) if isinstance(block, tuple) else block
    model_type = raw.get("model_type", "deepseek_v4")
    is_v41 = str(model_type).replace(".", "_").startswith(("deepseek_v4_1", "deepseek_v41"))
    if is_v41 or block == [32, 32] or any(k.startswith("engram") for k in raw):
        raise UnsupportedModelError(
            "this is a DeepSeek-V4.1 checkpoint: another architecture (single-pass mHC, "
            "cross-layer CSA, 32x32 weight blocks) that fathom does not implement. Use a "
            "DeepSeek-V4 checkpoint."
        )
    if model_type != "deepseek_v4":
        raise UnsupportedModelError(
            f"model_type is {model_type!r}: fathom runs DeepSeek-V4 ('deepseek_v4') only"
        )
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise UnsupportedModelError(
            f"quant_method is {method!r}: fathom reads the released form ('fp8') or unquantised"
        )
    if block is not None and block != [128, 128]:
        raise UnsupportedModelError(
            f"weight_block_size is {block}: DeepSeek-V4 stores FP8 weights in blocks of [128, 128]"
        )
    for key, expected in _FIXED_KEYS.items():
        if raw.get(key, expected) != expected:
            raise UnsupportedModelError(
                f"{key} is {raw[key]!r}, DeepSeek-V4 has {expected!r}: this is another architecture"
            )


def _official_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """The constructor arguments that a raw object of either spelling states."""
    raw = _from_transformers(raw)
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    fields = {k: v for k, v in raw.items() if k in names and k != "rope_scaling"}
    required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "compress_ratios")
    missing = [k for k in required if k not in fields]
    if missing:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    ratios, layers = fields["compress_ratios"], fields["num_hidden_layers"]
    if not _is_integer(layers):
        raise ConfigError(f"num_hidden_layers must be an integer, not {layers!r}")
    if not isinstance(ratios, list | tuple) or len(ratios) < layers:
        raise ConfigError(f"compress_ratios must list one ratio for each of {layers} layers")
    fields["compress_ratios"] = tuple(ratios[:layers])
    # The shipped value is 160000, but defaults elsewhere differ: never guess it.
    if any(fields["compress_ratios"]) and "compress_rope_theta" not in fields:
        raise ConfigError("config.json lacks compress_rope_theta, which compressed layers need")
    fields["quantized"] = bool(raw.get("quantization_config"))
    fields["expert_dtype"] = raw.get("expert_dtype")
    fields["rope_scaling"] = _rope_scaling(raw.get("rope_scaling"))
    return fields


def _rope_scaling(raw: Any) -> RopeScaling | None:
    if raw is None:
        return None
    if not isinstance(raw, dict) or raw.get("type", raw.get("rope_type")) != "yarn":
        raise ConfigError(f"rope_scaling must be null or of type yarn, not {raw!r}")
    if "mscale" in raw or "mscale_all_dim" in raw:
        raise ConfigError("rope_scaling has mscale keys: DeepSeek-V4 would ignore them")
    known = {f.name for f in dataclasses.fields(RopeScaling)}
    missing = sorted(known - raw.keys())
    if missing:
        raise ConfigError(f"rope_scaling lacks {', '.join(missing)}")
    return RopeScaling(**{k: raw[k] for k in known})


def _from_transformers(raw: dict[str, Any]) -> dict[str, Any]:
    """Undo what transformers rewrites; an official object passes through unchanged."""
    if "layer_types" not in raw and "rope_parameters" not in raw and "mlp_layer_types" not in raw:
        return raw
    out = dict(raw)
    if "layer_types" in raw:
        _check_names(raw, "layer_types", _LAYER_TYPE_RATIOS.keys())
        rates = raw.get("compress_rates") or {}
        if not isinstance(rates, dict):
            raise ConfigError(f"compress_rates must be an object, not {rates!r}")
        for layer_type, ratio in _LAYER_TYPE_RATIOS.items():
            if rates.get(layer_type, ratio) != ratio:
                raise ConfigError(f"compress_rates[{layer_type!r}] must be {ratio}")
        out["compress_ratios"] = [_LAYER_TYPE_RATIOS[t] for t in raw["layer_types"]]
    if "mlp_layer_types" in raw:
        kinds = _check_names(raw, "mlp_layer_types", {"hash_moe", "moe"})
        out["num_hash_layers"] = kinds.count("hash_moe")
        if "hash_moe" in kinds[out["num_hash_layers"] :]:
            raise ConfigError("mlp_layer_types has a hash_moe layer after a moe layer")
    parameters = raw.get("rope_parameters")
    if isinstance(parameters, dict):
        main = parameters.get("main", parameters)
        compress = parameters.get("compress", parameters)
        if not isinstance(main, dict) or not isinstance(compress, dict):
            raise ConfigError(f"rope_parameters must hold objects, not {parameters!r}")
        out["rope_theta"] = main.get("rope_theta", raw.get("rope_theta", 10000.0))
        out["compress_rope_theta"] = compress.get("rope_theta", raw.get("compress_rope_theta"))
        if out["compress_rope_theta"] is None:
            del out["compress_rope_theta"]
        yarn = compress.get("rope_type", compress.get("type")) == "yarn"
        known = {f.name for f in dataclasses.fields(RopeScaling)}
        out["rope_scaling"] = (
            {"type": "yarn", **{k: v for k, v in compress.items() if k in known}} if yarn else None
        )
    return out


def _check_names(raw: dict[str, Any], key: str, known: Collection[str]) -> list[str]:
    names = raw[key]
    if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{key} must be a list of names, not {names!r}")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ConfigError(f"{key} has unknown entries: {', '.join(unknown)}")
    return list(names)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def _validate(c: ModelConfig) -> None:
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if f.type == "int" and not _is_integer(value):
            raise ConfigError(f"{f.name} must be an integer, not {value!r}")
        if f.type == "float" and not _is_number(value):
            raise ConfigError(f"{f.name} must be a number, not {value!r}")
        if f.type in ("int", "float") and value < 0:
            raise ConfigError(f"{f.name} must not be negative, but is {value}")
        if f.type == "int" and value > (most := _MOST.get(f.name, _MOST_OF_ANY)):
            raise ConfigError(f"{f.name} must be at most {most}")
    if c.rope_scaling is not None:
        for name, value in _as_dict(c.rope_scaling).items():
            if not _is_number(value) or value <= 0:
                raise ConfigError(f"rope_scaling.{name} must be a positive number, not {value!r}")
    for name in ("rope_theta", "compress_rope_theta"):
        if getattr(c, name) <= 1:
            raise ConfigError(f"{name} must be greater than 1, but is {getattr(c, name)}")
    positive = (
        "vocab_size hidden_size num_hidden_layers num_attention_heads head_dim qk_rope_head_dim "
        "q_lora_rank o_groups o_lora_rank index_n_heads index_head_dim index_topk sliding_window "
        "n_routed_experts num_experts_per_tok moe_intermediate_size hc_mult hc_sinkhorn_iters"
    ).split()
    for name in positive:
        if getattr(c, name) < 1:
            raise ConfigError(f"{name} must be at least 1")
    if len(c.compress_ratios) != c.num_hidden_layers:
        raise ConfigError(
            f"compress_ratios has {len(c.compress_ratios)} entries for {c.num_hidden_layers} layers"
        )
    known = (SLIDING_WINDOW_RATIO, CSA_RATIO, HCA_RATIO)
    bad = [r for r in c.compress_ratios if not _is_integer(r) or r not in known]
    if bad:
        raise ConfigError(f"compress_ratios may hold 0, 4 and 128, not {bad}")
    if c.qk_rope_head_dim % 2 or c.qk_rope_head_dim > c.head_dim:
        raise ConfigError(
            f"qk_rope_head_dim ({c.qk_rope_head_dim}) must be even and at most head_dim "
            f"({c.head_dim})"
        )
    if CSA_RATIO in c.compress_ratios:
        if c.index_head_dim & (c.index_head_dim - 1):
            raise ConfigError(f"index_head_dim must be a power of two: {c.index_head_dim}")
        if c.index_head_dim < c.qk_rope_head_dim:
            raise ConfigError("index_head_dim must not be smaller than qk_rope_head_dim")
    if (c.num_attention_heads * c.head_dim) % c.o_groups:
        raise ConfigError("o_groups must divide num_attention_heads * head_dim")
    if c.num_experts_per_tok > c.n_routed_experts:
        raise ConfigError("num_experts_per_tok exceeds n_routed_experts")
    if c.n_shared_experts != 1:
        raise ConfigError(f"n_shared_experts must be 1, not {c.n_shared_experts}")
    if c.num_nextn_predict_layers not in (0, 1):
        raise ConfigError("num_nextn_predict_layers must be 0 or 1: V4 launched with one MTP block")
    if c.num_hash_layers > c.num_hidden_layers:
        raise ConfigError("num_hash_layers exceeds num_hidden_layers")
    if c.expert_dtype not in (None, "fp4", "fp8", "bf16"):
        raise ConfigError(f"expert_dtype must be fp4, fp8 or bf16, not {c.expert_dtype!r}")


PRESETS: dict[str, ModelConfig] = {
    "flash": ModelConfig(),
    "pro": ModelConfig(
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
        compress_ratios=(128, 128) + (4, 128) * 29 + (4,),
    ),
    # Trained by `recipes/nano`: head_dim 96 = 64 + 32 keeps one whole 64-wide FP8 group per entry.
    "nano": ModelConfig(
        vocab_size=2048,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        head_dim=96,
        qk_rope_head_dim=32,
        q_lora_rank=128,
        o_groups=2,
        o_lora_rank=128,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=128,
        sliding_window=64,
        n_routed_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        num_hash_layers=2,
        routed_scaling_factor=1.5,
        rope_scaling=RopeScaling(original_max_position_embeddings=65536),
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
    ),
    "micro": ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        head_dim=96,
        qk_rope_head_dim=32,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=64,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=64,
        sliding_window=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_hash_layers=2,
        routed_scaling_factor=1.5,
        rope_scaling=RopeScaling(original_max_position_embeddings=65536),
        compress_ratios=(0, 0, 4, 128, 4, 128),
    ),
}
