"""`ModelConfig`: what a model is, read from and written to the published `config.json`."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Self

from llada_jax.config import presets, rope

# Values of `model_type` that name this architecture: the published one, dFactory's for
# checkpoints with merged experts, and dllm's for its copy of LLaDA2.1.
MODEL_TYPES = ("llada2_moe", "llada2_moe_veomni", "llada21_moe")

# The autoregressive models that LLaDA2 is converted from, Ling and Ring 2.0: the same network and
# tensors (their public modeling_bailing_moe_v2.py), a causal mask, and no mask token. Some of their
# configs carry the model type of the first Ling, another network, so the class decides there.
PARENT_MODEL_TYPES = ("bailing_moe_v2",)
PARENT_ARCHITECTURE, PARENT_SHARED_MODEL_TYPE = "BailingMoeV2ForCausalLM", "bailing_moe"

# What a checkpoint's architecture does not say: which ids its vocabulary gives these parts.
SPECIAL_ID_FIELDS = ("mask_token_id", "eos_token_ids", "pad_token_id")

# Keys without which a config is refused. The reference's own defaults for these (biases on,
# rope_theta 10000, vocab_size 30592, ...) belong to no published checkpoint.
ESSENTIAL_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
    "pad_token_id",
    "use_bias",
    "use_qkv_bias",
    "tie_word_embeddings",
    "num_experts",
    "num_experts_per_tok",
    "num_shared_experts",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
    "first_k_dense_replace",
    "routed_scaling_factor",
)

# Published keys that may only have these values: others name something we do not compute.
SUPPORTED_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "router_dtype": ("fp32", "float32"),
    "norm_topk_prob": (True,),
    "moe_router_enable_expert_bias": (True,),
    "use_rmsnorm": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "using_split_qkv_in_self_attention": (False,),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, 0.0),
}

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a LLaDA2 mixture-of-experts model.

    Attributes:
      vocab_size: rows of the embedding and of the head.
      hidden_size: width of the residual stream.
      intermediate_size: inner width of the dense layers' MLP.
      num_hidden_layers: layers, dense and mixture-of-experts together.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; divides `num_attention_heads`.
      head_dim: channels per head.
      rms_norm_eps: epsilon of every RMS norm.
      rope_theta: base of the rotary frequencies.
      partial_rotary_factor: share of `head_dim` that is rotated (its first channels).
      rope_scaling: frequency stretching, or None.
      max_position_embeddings: longest context in tokens the checkpoint was made for.
      pad_token_id: id that pads (in this family also the end-of-text id).
      mask_token_id: id of [MASK]; None if neither the config nor its neighbours tell.
      eos_token_ids: ids that end a text; may be empty where unknown.
      tie_word_embeddings: whether the head is the embedding table.
      use_bias: whether the attention output projection has a bias.
      use_qkv_bias: whether the q, k and v projections have biases.
      use_qk_norm: whether q and k are RMS-normed per head before rotation.
      num_experts: routed experts per layer.
      num_experts_per_tok: experts that each token is sent to.
      num_shared_experts: experts that see every token, fused into one MLP; 0 means none.
      moe_intermediate_size: inner width of one expert.
      n_group: groups of experts for group-limited routing; divides `num_experts`.
      topk_group: groups a token may choose experts from.
      first_k_dense_replace: leading layers that have a dense MLP.
      routed_scaling_factor: factor on the routed experts' weights.
      block_size: tokens per diffusion block.
      expert_capacity: experts admitted per block by LLaDA2.2's block routing; 0 means
        group-limited routing (2.0 and 2.1).
      initializer_range: standard deviation of fresh weights.
      dtype: dtype of weights and activations, as the published `torch_dtype`.
      hf_json: the config.json this was read from, so that nothing is lost on the way back.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    max_position_embeddings: int
    pad_token_id: int
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    n_group: int
    topk_group: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    rope_scaling: rope.RopeScaling | None = None
    mask_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    use_bias: bool = False
    use_qkv_bias: bool = False
    use_qk_norm: bool = True
    block_size: int = 32
    expert_capacity: int = 0
    initializer_range: float = 0.02
    dtype: str = "bfloat16"
    hf_json: str = dataclasses.field(default="{}", repr=False)

    def __post_init__(self) -> None:
        positive = [
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim"),
            *("max_position_embeddings", "block_size", "n_group", "topk_group"),
        ]
        if self.num_moe_layers:
            positive += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
        for name in positive:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} must be a whole number >= 1")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}: {value!r} must be a number > 0")
        if not 0 <= self.first_k_dense_replace <= self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace: {self.first_k_dense_replace} must lie between 0 and "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ValueError(
                f"partial_rotary_factor: {self.partial_rotary_factor} of head_dim {self.head_dim} "
                f"gives {self.rotary_dim} rotated channels; an even number from 2 to head_dim "
                "is needed"
            )
        if self.num_moe_layers:
            self._check_experts()
        if self.expert_capacity:
            raise ValueError(
                f"expert_capacity: {self.expert_capacity} asks for LLaDA2.2's block routing, which "
                "is not supported yet; LLaDA2.0 and 2.1 checkpoints are"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not one of {DTYPES}")
        for name, ids in (
            ("pad_token_id", (self.pad_token_id,)),
            ("mask_token_id", () if self.mask_token_id is None else (self.mask_token_id,)),
            ("eos_token_ids", self.eos_token_ids),
        ):
            for i in ids:
                if not isinstance(i, int) or not 0 <= i < self.vocab_size:
                    raise ValueError(f"{name}: {i!r} is no id below vocab_size {self.vocab_size}")
        if self.mask_token_id is not None and self.mask_token_id in self.eos_token_ids:
            raise ValueError(
                f"mask_token_id: {self.mask_token_id} is also one of eos_token_ids "
                f"{self.eos_token_ids}; the mask cannot end a text"
            )

    def _check_experts(self) -> None:
        if self.num_experts % self.n_group:
            raise ValueError(
                f"n_group: {self.n_group} does not divide num_experts {self.num_experts}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group: {self.topk_group} is more than n_group {self.n_group}")
        reachable = self.topk_group * self.num_experts // self.n_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok: {self.num_experts_per_tok} is more than the {reachable} "
                f"experts of topk_group {self.topk_group} groups"
            )
        if self.num_shared_experts < 0:
            raise ValueError(f"num_shared_experts: {self.num_shared_experts} must be >= 0")

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def is_autoregressive(self) -> bool:
        """Whether the config.json names an autoregressive parent: it was never trained on masks."""
        return _is_parent(json.loads(self.hf_json))

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def as_llada2(self) -> Self:
        """The same network, whose config.json will name LLaDA2 where it named a parent.

        Nothing else of a parent's config.json is kept: it names code that computes causal
        attention (`auto_map`).
        """
        return self.replace(hf_json="{}") if self.is_autoregressive else self

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a published config.json.

        Args:
          config: the parsed JSON object.

        Raises:
          ValueError: an essential key is missing, two keys contradict each other, or a key has a
            value that names something unsupported. The message starts with the key's name.
        """
        _check_model_type(config)
        missing = [key for key in ESSENTIAL_KEYS if key not in config]
        if _is_parent(config) and "use_qk_norm" not in config:
            missing.append("use_qk_norm")  # off by default there, on by default in LLaDA2
        if "partial_rotary_factor" not in config and "rotary_dim" not in config:
            missing.append("partial_rotary_factor")
        if missing:
            raise ValueError(
                f"{missing[0]}: missing from config.json (missing in all: {missing}); the "
                "reference's defaults for these fit no published checkpoint, so add the keys"
            )
        for key, allowed in SUPPORTED_VALUES.items():
            if key in config and config[key] not in allowed:
                raise ValueError(
                    f"{key}: {config[key]!r} is not supported; expected one of {allowed}"
                )
        if config.get("num_nextn_predict_layers"):
            raise ValueError(
                f"num_nextn_predict_layers: {config['num_nextn_predict_layers']!r} layers that "
                "predict tokens further on (MTP) are not supported, and LLaDA2 has none; take the "
                "checkpoint without them, or remove their tensors and set this key to 0"
            )
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim")
        if head_dim is None:
            if not heads or config["hidden_size"] % heads:
                raise ValueError(
                    f"head_dim: missing, and num_attention_heads {heads} does not divide "
                    f"hidden_size {config['hidden_size']}"
                )
            head_dim = config["hidden_size"] // heads
        rotary_dim = config.get("rotary_dim")
        factor = config.get("partial_rotary_factor")
        if factor is None:
            factor = rotary_dim / head_dim
        if rotary_dim is not None and rotary_dim != int(head_dim * factor):
            raise ValueError(
                f"rotary_dim: {rotary_dim} contradicts partial_rotary_factor {factor} of head_dim "
                f"{head_dim}"
            )
        eos = config.get("eos_token_id")
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
        optional = {
            key: config[key]
            for key in ("use_qk_norm", "block_size", "expert_capacity", "initializer_range")
            if config.get(key) is not None
        }
        renamed = {"use_bias", "use_qkv_bias", "tie_word_embeddings", "num_shared_experts"}
        return cls(
            **{key: config[key] for key in ESSENTIAL_KEYS if key not in renamed},
            **{key: _boolean(config, key) for key in renamed - {"num_shared_experts"}},
            num_shared_experts=config["num_shared_experts"] or 0,
            head_dim=head_dim,
            partial_rotary_factor=factor,
            rope_scaling=rope.RopeScaling.from_hf(config.get("rope_scaling")),
            mask_token_id=config.get("mask_token_id"),
            eos_token_ids=eos_ids,
            dtype=str(dtype).removeprefix("torch."),
            hf_json=json.dumps(dict(config)),
            **optional,
        )

    def to_hf(self) -> dict[str, Any]:
        """The published config.json of this architecture.

        Starts from the JSON object this config was read from, so that keys we do not read come
        back as they were, and writes each field that no longer agrees with it.
        """
        out = json.loads(self.hf_json) or dict(presets.HF_CONSTANTS)
        known = dataclasses.asdict(type(self).from_hf(out)) if "vocab_size" in out else {}
        for field in dataclasses.fields(self):
            name = field.name
            if name == "hf_json" or (name in known and known[name] == self._plain(name)):
                continue
            value = self._plain(name)
            if name == "eos_token_ids":
                if value:
                    out["eos_token_id"] = value[0] if len(value) == 1 else list(value)
                else:
                    out.pop("eos_token_id", None)
            elif name == "mask_token_id":
                if value is not None:
                    out[name] = value
            elif name == "rope_scaling":
                out[name] = rope.to_hf(self.rope_scaling)
            elif name == "dtype":
                out["dtype" if "dtype" in out and "torch_dtype" not in out else "torch_dtype"] = (
                    value
                )
            elif name in ("block_size", "expert_capacity") and name not in out:
                if value != field.default:
                    out[name] = value
            else:
                out[name] = value
        if "rotary_dim" in out:
            out["rotary_dim"] = self.rotary_dim
        return out

    def _plain(self, name: str) -> Any:
        value = getattr(self, name)
        return dataclasses.asdict(value) if isinstance(value, rope.RopeScaling) else value

    @classmethod
    def preset(cls, name: str) -> Self:
        """The architecture of a published model: one of `presets.PRESETS`.

        The 2.1 twins have the shapes of the 2.0 models; they are names of their own because their
        checkpoints, and the decoding they were trained for, differ.
        """
        if name not in presets.PRESETS:
            raise ValueError(f"preset {name!r} is not one of {sorted(presets.PRESETS)}")
        return cls.from_hf({**presets.HF_CONSTANTS, **presets.PRESETS[name]})


def _is_parent(config: Mapping[str, Any]) -> bool:
    model_type, architectures = config.get("model_type"), config.get("architectures")
    return model_type in PARENT_MODEL_TYPES or (
        model_type == PARENT_SHARED_MODEL_TYPE and architectures == [PARENT_ARCHITECTURE]
    )


def _check_model_type(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type in MODEL_TYPES or _is_parent(config):
        return
    known = f"this library reads {MODEL_TYPES + PARENT_MODEL_TYPES}"
    if model_type == PARENT_SHARED_MODEL_TYPE:
        raise ValueError(
            f"model_type: {model_type!r} is supported for architectures [{PARENT_ARCHITECTURE!r}] "
            f"only, this config has {config.get('architectures')!r}; {known}"
        )
    raise ValueError(f"model_type: {model_type!r} is not supported; {known}")


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    if not isinstance(config[key], bool):
        raise ValueError(f"{key}: {config[key]!r} must be true or false")
    return config[key]
