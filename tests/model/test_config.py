"""Reading, checking and refusing configurations."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

from fathom.errors import ConfigError, UnsupportedModelError
from fathom.model.config import PRESETS, ModelConfig, RopeScaling

FLASH_FILE = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}
PRO_CHANGES = {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "index_topk": 1024,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
SPARSE, HEAVY = "compressed_sparse_attention", "heavily_compressed_attention"


def transformers_form(official: dict, layer_types: list[str], hashed: int) -> dict:
    """What transformers makes of an official file."""
    raw = {k: v for k, v in official.items() if k not in ("compress_ratios", "num_hash_layers")}
    yarn = {k: v for k, v in raw.pop("rope_scaling").items() if k != "type"}
    rest = official["num_hidden_layers"] - hashed
    return raw | {
        "layer_types": layer_types,
        "compress_rates": {SPARSE: 4, HEAVY: 128},
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * rest,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125},
            "compress": {"rope_type": "yarn", "rope_theta": 160000.0, "attention_factor": 1.0}
            | yarn,
        },
    }


def flash_in_transformers_form() -> dict:
    types = ["sliding_attention"] * 2 + [SPARSE, HEAVY] * 20 + [SPARSE]
    return transformers_form(FLASH_FILE, types, hashed=3)


def test_official_files_are_the_presets():
    assert ModelConfig.from_json(FLASH_FILE) == ModelConfig.preset("flash")
    assert ModelConfig.from_json(FLASH_FILE | PRO_CHANGES) == ModelConfig.preset("pro")


@pytest.mark.parametrize(
    ("name", "layers", "swa", "csa", "hca"),
    [("flash", 43, 2, 21, 20), ("pro", 61, 0, 30, 31), ("nano", 8, 2, 3, 3), ("micro", 6, 2, 2, 2)],
)
def test_layers_of_each_kind(name, layers, swa, csa, hca):
    ratios = ModelConfig.preset(name).compress_ratios
    assert [len(ratios), *(ratios.count(r) for r in (0, 4, 128))] == [layers, swa, csa, hca]
    # CSA sits on even indices, HCA on odd ones; only the first two layers may break that.
    assert all(i % 2 == (r == 128) for i, r in enumerate(ratios) if i >= 2)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="'base': choose one of flash, micro, nano, pro"):
        ModelConfig.preset("base")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_round_trip(name):
    config = ModelConfig.preset(name)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_writes_the_official_keys():
    written = ModelConfig.preset("flash").to_json()
    assert written == {k: v for k, v in FLASH_FILE.items() if k != "transformers_version"}


def test_written_file_says_what_is_not_quantised():
    config = dataclasses.replace(ModelConfig.preset("nano"), quantized=False, expert_dtype=None)
    written = config.to_json()
    assert "quantization_config" not in written
    assert "expert_dtype" not in written
    assert ModelConfig.from_json(written) == config


def test_reads_a_file_and_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(FLASH_FILE))
    for path in (tmp_path, tmp_path / "config.json", str(tmp_path)):
        assert ModelConfig.from_json(path) == ModelConfig.preset("flash")


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: No such file"):
        ModelConfig.from_json(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ModelConfig.from_json(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        ModelConfig.from_json(file)
    file.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object, not list"):
        ModelConfig.from_json(file)


def test_the_vectors_configurations(vectors):
    for file in sorted((vectors / "model" / "e2e").glob("*/config.json")):
        raw = json.loads(file.read_text())
        config = ModelConfig.from_json(file)
        assert list(config.compress_ratios) == raw["compress_ratios"][: raw["num_hidden_layers"]]
        assert config.quantized is ("quantization_config" in raw)
        assert config.expert_dtype == raw.get("expert_dtype")
        assert config.to_json() == raw


def test_missing_expert_dtype_leaves_the_choice_to_the_tensors():
    raw = {k: v for k, v in FLASH_FILE.items() if k != "expert_dtype"}
    assert ModelConfig.from_json(raw).expert_dtype is None


def test_reads_only_one_ratio_for_each_layer():
    ratios = FLASH_FILE["compress_ratios"]
    for tail in ([], [0], [0, 0, 0]):
        config = ModelConfig.from_json(FLASH_FILE | {"compress_ratios": ratios[:43] + tail})
        assert config.compress_ratios == tuple(ratios[:43])


# The form that transformers writes


def test_transformers_form_is_the_same_model():
    assert ModelConfig.from_json(flash_in_transformers_form()) == ModelConfig.preset("flash")


def test_transformers_form_without_yarn():
    raw = flash_in_transformers_form()
    raw["rope_parameters"]["compress"] = {"rope_type": "default", "rope_theta": 160000.0}
    assert ModelConfig.from_json(raw).rope_scaling is None


def test_transformers_form_with_one_set_of_rope_parameters():
    raw = flash_in_transformers_form()
    raw["rope_parameters"] = {"rope_type": "yarn", "factor": 8, "beta_fast": 32, "beta_slow": 1}
    raw["rope_parameters"]["original_max_position_embeddings"] = 1024
    config = ModelConfig.from_json(raw | {"rope_theta": 5000.0})
    assert config.rope_theta == 5000.0
    assert config.compress_rope_theta == 160000  # from the key beside it
    assert config.rope_scaling == RopeScaling(factor=8, original_max_position_embeddings=1024)


def test_transformers_form_never_guesses_the_compressed_base():
    raw = flash_in_transformers_form()
    del raw["compress_rope_theta"], raw["rope_parameters"]["compress"]["rope_theta"]
    with pytest.raises(ConfigError, match="lacks compress_rope_theta"):
        ModelConfig.from_json(raw)


def test_what_transformers_itself_saves(tmp_path):
    transformers = pytest.importorskip("transformers")
    # Copied in depth: transformers writes its own keys into the dictionaries it is given.
    official = copy.deepcopy(FLASH_FILE)
    del official["quantization_config"]
    transformers.DeepseekV4Config(**official).save_pretrained(tmp_path)
    assert "layer_types" in json.loads((tmp_path / "config.json").read_text())
    expected = dataclasses.replace(ModelConfig.preset("flash"), quantized=False)
    assert ModelConfig.from_json(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"layer_types": ["full_attention"] * 43},
            "layer_types has unknown entries: full_attention",
        ),
        ({"layer_types": 43}, "layer_types must be a list of names, not 43"),
        ({"mlp_layer_types": ["dense"] * 43}, "mlp_layer_types has unknown entries: dense"),
        ({"mlp_layer_types": ["moe", "hash_moe"]}, "has a hash_moe layer after a moe layer"),
        (
            {"compress_rates": {SPARSE: 8}},
            "compress_rates['compressed_sparse_attention'] must be 4",
        ),
        ({"compress_rates": [4]}, "compress_rates must be an object"),
        ({"rope_parameters": {"main": None}}, "rope_parameters must hold objects"),
    ],
)
def test_transformers_form_that_cannot_be_read(change, sentence):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(flash_in_transformers_form() | change)
    assert sentence in str(caught.value)


# Other models


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"dspark_block_size": 5, "dspark_markov_rank": 256},
            "this is a DeepSeek-V4 DSpark checkpoint (its config has dspark_block_size): its MTP "
            "block is replaced by a three-stage drafter that fathom does not implement. Use the "
            "launch checkpoint of the same model, which drafts with MTP.",
        ),
        *(
            (
                change,
                "this is a DeepSeek-V4.1 checkpoint: another architecture (single-pass mHC, "
                "cross-layer CSA, 32x32 weight blocks) that fathom does not implement. Use a "
                "DeepSeek-V4 checkpoint.",
            )
            for change in (
                {"quantization_config": {"weight_block_size": [32, 32]}},
                {"model_type": "deepseek_v4.1"},
                {"model_type": "deepseek_v41"},
                {"model_type": "deepseek_v4_1"},
                {"engram_layer_ids": [1]},
            )
        ),
        (
            {"model_type": "deepseek_v3"},
            "model_type is 'deepseek_v3': fathom runs DeepSeek-V4 ('deepseek_v4') only",
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
            "weight_block_size is [64, 64]: DeepSeek-V4 stores FP8 weights in blocks of [128, 128]",
        ),
        (
            {"quantization_config": {"quant_method": "awq"}},
            "quant_method is 'awq': fathom reads the released form ('fp8') or unquantised",
        ),
        *(
            ({key: value}, f"{key} is {value!r}, DeepSeek-V4 has")
            for key, value in {
                "scoring_func": "sigmoid",
                "topk_method": "greedy",
                "norm_topk_prob": False,
                "hidden_act": "gelu",
                "attention_bias": True,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
            }.items()
        ),
    ],
)
def test_refuses_other_models(change, sentence):
    with pytest.raises(UnsupportedModelError) as caught:
        ModelConfig.from_json(FLASH_FILE | change)
    assert sentence in str(caught.value)
    assert caught.value.code == "model_unsupported"


def test_a_block_size_may_be_a_tuple():
    quantization = FLASH_FILE["quantization_config"] | {"weight_block_size": (128, 128)}
    assert ModelConfig.from_json(FLASH_FILE | {"quantization_config": quantization}).quantized


# Values that cannot be used


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "compress_ratios"]
)
def test_missing_keys(key):
    with pytest.raises(ConfigError, match=f"config.json lacks {key}"):
        ModelConfig.from_json({k: v for k, v in FLASH_FILE.items() if k != key})


def test_missing_compressed_base():
    raw = {k: v for k, v in FLASH_FILE.items() if k != "compress_rope_theta"}
    with pytest.raises(
        ConfigError, match="lacks compress_rope_theta, which compressed layers need"
    ):
        ModelConfig.from_json(raw)
    # Without compressed layers it is not needed.
    ModelConfig.from_json(raw | {"compress_ratios": [0] * 44})


YARN = FLASH_FILE["rope_scaling"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": "4096"}, "hidden_size must be an integer, not '4096'"),
        ({"hidden_size": True}, "hidden_size must be an integer, not True"),
        ({"hidden_size": 4096.0}, "hidden_size must be an integer, not 4096.0"),
        ({"num_hidden_layers": "43"}, "num_hidden_layers must be an integer, not '43'"),
        ({"bos_token_id": None}, "bos_token_id must be an integer, not None"),
        ({"bos_token_id": -1}, "bos_token_id must not be negative, but is -1"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number, not '1e-6'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number, not nan"),
        ({"swiglu_limit": -1.0}, "swiglu_limit must not be negative, but is -1.0"),
        ({"rope_theta": False}, "rope_theta must be a number, not False"),
        ({"hc_mult": 0}, "hc_mult must be at least 1"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"sliding_window": 10**9}, "sliding_window must be at most 1048576"),
        ({"index_topk": 10**12}, "index_topk must be at most 1048576"),
        ({"n_routed_experts": 10**7}, "n_routed_experts must be at most 32768"),
        ({"hc_sinkhorn_iters": 10**9}, "hc_sinkhorn_iters must be at most 1000"),
        ({"max_position_embeddings": 10**400}, "max_position_embeddings must be at most 21474"),
        ({"rope_theta": 0}, "rope_theta must be greater than 1, but is 0"),
        ({"compress_rope_theta": 1.0}, "compress_rope_theta must be greater than 1, but is 1.0"),
        ({"compress_ratios": 4}, "compress_ratios must list one ratio for each of 43 layers"),
        (
            {"compress_ratios": [4] * 42},
            "compress_ratios must list one ratio for each of 43 layers",
        ),
        ({"compress_ratios": [8] * 43}, "compress_ratios may hold 0, 4 and 128, not [8"),
        ({"compress_ratios": [[4]] * 43}, "compress_ratios may hold 0, 4 and 128, not [[4]"),
        ({"compress_ratios": [4.0] * 43}, "compress_ratios may hold 0, 4 and 128, not [4.0"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim (63) must be even and at most head_dim (512)"),
        ({"qk_rope_head_dim": 514}, "qk_rope_head_dim (514) must be even and at most head_dim"),
        ({"index_head_dim": 96}, "index_head_dim must be a power of two: 96"),
        ({"index_head_dim": 32}, "index_head_dim must not be smaller than qk_rope_head_dim"),
        ({"o_groups": 7}, "o_groups must divide num_attention_heads * head_dim"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok exceeds n_routed_experts"),
        ({"n_shared_experts": 2}, "n_shared_experts must be 1, not 2"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers must be 0 or 1"),
        ({"num_hash_layers": 44}, "num_hash_layers exceeds num_hidden_layers"),
        ({"expert_dtype": "int4"}, "expert_dtype must be fp4, fp8 or bf16, not 'int4'"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object, not 'fp8'"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be null or of type yarn, not 'yarn'"),
        ({"rope_scaling": YARN | {"type": "linear"}}, "rope_scaling must be null or of type yarn"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "rope_scaling has mscale keys"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks beta_fast, beta_slow, factor"),
        ({"rope_scaling": YARN | {"factor": 0}}, "rope_scaling.factor must be a positive number"),
        ({"rope_scaling": YARN | {"beta_fast": "32"}}, "rope_scaling.beta_fast must be a positive"),
    ],
)
def test_unusable_values(change, sentence):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_json(FLASH_FILE | change)
    assert sentence in str(caught.value)
    assert not isinstance(caught.value, UnsupportedModelError)


def test_constructor_checks_the_number_of_ratios():
    with pytest.raises(ConfigError, match="compress_ratios has 2 entries for 43 layers"):
        ModelConfig(compress_ratios=(0, 0))


def test_derived_sizes():
    pro = ModelConfig.preset("pro")
    assert pro.group_width == 128 * 512 // 16
    assert pro.num_mtp_layers == 1
    assert dataclasses.replace(pro, num_nextn_predict_layers=0).num_mtp_layers == 0
