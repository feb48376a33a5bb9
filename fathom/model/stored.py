"""A model's weights in their stored formats: what fits the machine, and what a GPU reads.

`Transformer` holds weights dequantised and computes everything differentiably. A `StoredModel`
keeps the bytes of the checkpoint (FP4 experts, FP8 matrices); matrices of the same input lie
stacked, so that each is one launch. fathom/model/stored_forward.py computes with it.

Paper: §2 (architecture), §3.4 (FP4 and FP8 inference).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from fathom.errors import ConfigError
from fathom.model.config import CSA_RATIO, ModelConfig
from fathom.model.layers import Linear
from fathom.model.moe import RoutedExperts
from fathom.model.transformer import Transformer
from fathom.quant import fp4, fp8

Tensor = torch.Tensor


@dataclass(slots=True, kw_only=True)
class MixSite:
    """One mHC site and the norm behind it.

    fn: [cols, streams * hidden], base: [cols], scale: [3] float32; norm: [hidden].
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor


@dataclass(slots=True, kw_only=True)
class StoredLayer:
    """One block as stored; codes and scales are uint8, as in the files.

    low: wq_a over wkv; high: wq_b, over the indexer's wq_b; plain: the compressor's wkv, wgate,
    then the indexer compressor's wkv, wgate, then weights_proj, BF16; compressor,
    index_compressor: (ape, norm); routed: w1, scale, w3, scale, w2, scale; shared: w1 over w3,
    scale, w2, scale.
    """

    ratio: int
    attn_site: MixSite
    ffn_site: MixSite
    low: tuple[Tensor, Tensor]
    q_norm: Tensor
    kv_norm: Tensor
    high: tuple[Tensor, Tensor]
    sink: Tensor
    wo_a: tuple[Tensor, Tensor]
    wo_b: tuple[Tensor, Tensor]
    gate: Tensor
    routed: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    bias: Tensor | None = None
    table: Tensor | None = None
    plain: Tensor | None = None
    compressor: tuple[Tensor, Tensor] | None = None
    index_compressor: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], ratio: int) -> StoredLayer:
        """From a block's tensors by their official names, without the `layers.N.` before them.

        tensors: each in the same shape and dtype as in the files; routed experts may also be
        stacked, [experts, rows, cols], as `ffn.experts.w1.weight`.
        """
        get = tensors.__getitem__

        def quantised(*names: str) -> tuple[Tensor, Tensor]:
            return (
                torch.cat([_bytes(get(f"{name}.weight")) for name in names]).contiguous(),
                torch.cat([_bytes(get(f"{name}.scale")) for name in names]).contiguous(),
            )

        def site(name: str) -> MixSite:
            return MixSite(
                fn=get(f"hc_{name}_fn"),
                base=get(f"hc_{name}_base"),
                scale=get(f"hc_{name}_scale"),
                norm=get(f"{name}_norm.weight"),
            )

        plain, compressor, index_compressor = [], None, None
        if ratio:
            plain = [get(f"attn.compressor.{part}.weight") for part in ("wkv", "wgate")]
            compressor = (get("attn.compressor.ape"), get("attn.compressor.norm.weight"))
        if ratio == CSA_RATIO:
            own = "attn.indexer.compressor"
            plain += [get(f"{own}.{part}.weight") for part in ("wkv", "wgate")]
            plain.append(get("attn.indexer.weights_proj.weight"))
            index_compressor = (get(f"{own}.ape"), get(f"{own}.norm.weight"))
        return cls(
            ratio=ratio,
            attn_site=site("attn"),
            ffn_site=site("ffn"),
            low=quantised("attn.wq_a", "attn.wkv"),
            q_norm=get("attn.q_norm.weight"),
            kv_norm=get("attn.kv_norm.weight"),
            high=quantised("attn.wq_b", *(["attn.indexer.wq_b"] if ratio == CSA_RATIO else [])),
            sink=get("attn.attn_sink"),
            wo_a=quantised("attn.wo_a"),
            wo_b=quantised("attn.wo_b"),
            gate=get("ffn.gate.weight"),
            routed=tuple(
                _experts(tensors, f"{w}.{part}")
                for w in ("w1", "w3", "w2")
                for part in ("weight", "scale")
            ),
            shared=(
                *quantised("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
                *quantised("ffn.shared_experts.w2"),
            ),
            bias=tensors.get("ffn.gate.bias"),
            table=tensors.get("ffn.gate.tid2eid"),
            plain=torch.cat(plain).contiguous() if plain else None,
            compressor=compressor,
            index_compressor=index_compressor,
        )

    def num_bytes(self) -> int:
        """Bytes of all weights."""
        total = 0
        for tensor in self._tensors():
            total += tensor.numel() * tensor.element_size()
        return total

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, MixSite):
                value = (value.fn, value.base, value.scale, value.norm)
            values = value if isinstance(value, tuple) else (value,)
            found += [v for v in values if isinstance(v, Tensor)]
        return found


def _experts(tensors: Mapping[str, Tensor], part: str) -> Tensor:
    """One kind of the routed experts' tensors, stacked: [experts, rows, cols] uint8."""
    stacked = tensors.get(f"ffn.experts.{part}")
    if stacked is not None:
        return _bytes(stacked)
    count = sum(name.endswith(f".{part}") for name in tensors if name.startswith("ffn.experts."))
    return torch.stack([_bytes(tensors[f"ffn.experts.{e}.{part}"]) for e in range(count)])


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


@dataclass(slots=True, kw_only=True)
class MergeSite:
    """The final merge of the streams and the norm behind it.

    fn: [streams, streams * hidden], base: [streams], scale: [1] float32; norm: [hidden].
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm: Tensor

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> MergeSite:
        """tensors: of the model, or of an MTP block without the `mtp.N.` before their names, in the
        same shape as in the files, such as fn [streams, streams * hidden].
        """
        parts = {part: tensors[f"hc_head_{part}"] for part in ("fn", "base", "scale")}
        return cls(**parts, norm=tensors["norm.weight"])


@dataclass(slots=True, kw_only=True)
class StoredDraft:
    """The MTP block as stored: its projections, its layer (of ratio 0) and its own merge."""

    layer: StoredLayer
    e_proj: tuple[Tensor, Tensor]
    h_proj: tuple[Tensor, Tensor]
    enorm: Tensor
    hnorm: Tensor
    merge: MergeSite

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> StoredDraft:
        """tensors: the block's by their official names, without the `mtp.N.` before them, each in
        the same shape as in the files, such as e_proj [hidden, hidden].
        """
        projections = {
            name: (_bytes(tensors[f"{name}.weight"]), _bytes(tensors[f"{name}.scale"]))
            for name in ("e_proj", "h_proj")
        }
        return cls(
            layer=StoredLayer.from_tensors(tensors, 0),
            enorm=tensors["enorm.weight"],
            hnorm=tensors["hnorm.weight"],
            merge=MergeSite.from_tensors(tensors),
            **projections,
        )


@dataclass(slots=True)
class Table:
    """A matrix that rows are looked up in; weight: [vocab, hidden]."""

    weight: Tensor


@dataclass(slots=True, kw_only=True)
class StoredModel:
    """A whole model as stored, for inference: what the engine needs of a `Transformer`.

    embed: [vocab, hidden] in the arithmetic's dtype; head: [vocab, hidden].
    """

    config: ModelConfig
    embed: Table
    layers: list[StoredLayer]
    merge: MergeSite
    head: Tensor
    mtp: list[StoredDraft] = field(default_factory=list)
    quantized: bool = True

    @classmethod
    def from_tensors(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> StoredModel:
        """From all tensors of a checkpoint by their official names, on one device.

        tensors: each in the same shape as in the files; experts may be stacked, [experts, rows,
        cols].
        """

        def block(name: str) -> dict[str, Tensor]:
            return {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}

        return cls(
            config=config,
            embed=Table(tensors["embed.weight"]),
            layers=[
                StoredLayer.from_tensors(block(f"layers.{index}."), ratio)
                for index, ratio in enumerate(config.compress_ratios)
            ],
            merge=MergeSite.from_tensors(tensors),
            head=tensors["head.weight"],
            mtp=[
                StoredDraft.from_tensors(block(f"mtp.{index}."))
                for index in range(config.num_mtp_layers)
            ],
        )

    @classmethod
    def of(cls, model: Transformer) -> StoredModel:
        """A Transformer's weights in the formats that it says they have.

        Raises ConfigError for a weight that its format cannot hold.
        """
        return cls.from_tensors(model.config, stored_tensors(model))

    @property
    def dtype(self) -> torch.dtype:
        """The arithmetic of activations."""
        return self.embed.weight.dtype

    def eval(self) -> StoredModel:
        """Itself: there is nothing to switch off."""
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by a name of its own, such as .embed.weight: [vocab, hidden]."""
        found: dict[str, Tensor] = {}
        _collect(self, "", found)
        return found


def _collect(part: object, name: str, found: dict[str, Tensor]) -> None:
    if isinstance(part, Tensor):
        found[name] = part
    elif isinstance(part, list | tuple):
        for index, item in enumerate(part):
            _collect(item, f"{name}.{index}", found)
    else:
        for slot in getattr(part, "__slots__", ()):
            _collect(getattr(part, slot), f"{name}.{slot}", found)


def unstorable(model: Transformer) -> str | None:
    """Why a Transformer cannot be a StoredModel, or None: FP8 matrices and FP4 experts, all with
    power-of-two scales, are what its operations know.
    """
    if not model.quantized:
        return "the model is not quantised"
    for name, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            wanted = "fp4"
        elif isinstance(module, Linear):
            wanted = "bf16" if name.endswith("weights_proj") else "fp8"
        else:
            continue
        if module.weight_format != wanted:
            return f"{name} is stored as {module.weight_format}, not {wanted}"
        if any(buffer is not None for buffer in module.buffers(recurse=False)):
            return f"{name} has float32 scales"
    return None


@torch.no_grad()
def stored_tensors(model: Transformer) -> dict[str, Tensor]:
    """A Transformer's tensors as a checkpoint of its formats has them, experts stacked: [experts,
    rows, cols].

    Raises ConfigError for a weight that its format cannot hold.
    """
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.weight_format == "fp8":
            codes, scale = fp8.quantize_weight(module.effective_weight())
            _check(name, fp8.dequantize_weight(codes, scale), module.effective_weight())
            tensors |= {f"{name}.weight": codes, f"{name}.scale": scale}
        elif isinstance(module, RoutedExperts):
            for leaf in ("w1", "w2", "w3"):
                weight = tensors.pop(f"{name}.{leaf}")
                codes, scale = fp4.quantize(weight)
                if not module.simulate_weight:
                    _check(f"{name}.{leaf}", fp4.dequantize(codes, scale), weight)
                tensors |= {f"{name}.{leaf}.weight": codes, f"{name}.{leaf}.scale": scale}
    narrow = [
        name
        for name in tensors
        if name == "head.weight" or name.endswith(("wgate.weight", "compressor.wkv.weight"))
        or name.endswith(("ffn.gate.weight", "weights_proj.weight"))
    ]  # fmt: skip
    # Float32 in the model, BF16 in files: as long as nothing is lost.
    if all(torch.equal(tensors[name].bfloat16().float(), tensors[name].float()) for name in narrow):
        tensors |= {name: tensors[name].bfloat16() for name in narrow}
    return tensors


def _check(name: str, stored: Tensor, weight: Tensor) -> None:
    if not torch.equal(stored.float(), weight.float()):
        raise ConfigError(
            f"{name} has values that its stored format cannot hold: save the model and load it "
            "again, or set its weight formats with simulate"
        )
