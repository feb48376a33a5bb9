"""A model's weights in their stored formats: what fits the machine, and what a GPU reads.

`Transformer` holds weights dequantised and computes everything differentiably. A `StoredModel`
keeps the bytes of the checkpoint (FP4 experts, FP8 matrices); matrices of the same input lie
stacked, so that each is one launch. fathom/model/stored_forward.py computes with it.

Paper: §2 (architecture), §3.4 (FP4 and FP8 inference).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fathom.errors import ConfigError
from fathom.model.config import CSA_RATIO, HCA_RATIO, ModelConfig
from fathom.model.layers import Linear
from fathom.model.moe import RoutedExperts
from fathom.model.stored_checks import check_fp4, check_fp8, check_table, get
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
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], ratio: int, where: str = ""
    ) -> StoredLayer:
        """From a block's tensors by their official names, without the `layers.N.` before them.

        tensors: each in the same shape and dtype as in the files; routed experts may also be
        stacked, [experts, rows, cols], as `ffn.experts.w1.weight`. Parts of one tensor here that
        already lie one behind the other are not copied. `where` is what errors put before a name.
        Raises CheckpointError for a tensor that is missing or holds what cannot be served as
        stored, such as a base checkpoint's.
        """

        def own(name: str) -> Tensor:
            return get(tensors, name, where)

        def quantised(*names: str) -> tuple[Tensor, Tensor]:
            return _quantised(tensors, names, where)

        def site(name: str) -> MixSite:
            return MixSite(
                fn=own(f"hc_{name}_fn"),
                base=own(f"hc_{name}_base"),
                scale=own(f"hc_{name}_scale"),
                norm=own(f"{name}_norm.weight"),
            )

        joined, compressor, index_compressor = NEIGHBOURS[ratio], None, None
        if ratio:
            compressor = (own("attn.compressor.ape"), own("attn.compressor.norm.weight"))
        if ratio == CSA_RATIO:
            name = "attn.indexer.compressor"
            index_compressor = (own(f"{name}.ape"), own(f"{name}.norm.weight"))
        low = quantised(*joined["low"])
        experts = tuple(_experts(tensors, w, where) for w in ("w1", "w3", "w2"))
        table = tensors.get("ffn.gate.tid2eid")
        if table is not None:
            check_table(f"{where}ffn.gate.tid2eid", table, len(own("ffn.gate.weight")))
        return cls(
            ratio=ratio,
            attn_site=site("attn"),
            ffn_site=site("ffn"),
            low=low,
            q_norm=own("attn.q_norm.weight"),
            kv_norm=own("attn.kv_norm.weight"),
            high=quantised(*joined["high"]),
            sink=own("attn.attn_sink"),
            wo_a=quantised("attn.wo_a"),
            wo_b=quantised("attn.wo_b"),
            gate=own("ffn.gate.weight"),
            routed=tuple(part for both in experts for part in both),
            shared=(*quantised(*joined["shared"]), *quantised("ffn.shared_experts.w2")),
            bias=tensors.get("ffn.gate.bias"),
            table=table,
            plain=_joined([own(f"{name}.weight") for name in joined["plain"]]) if ratio else None,
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


def _neighbours(ratio: int) -> dict[str, tuple[str, ...]]:
    compressed = ("attn.compressor.wkv", "attn.compressor.wgate") if ratio else ()
    high, index = ("attn.wq_b",), ()
    if ratio == CSA_RATIO:
        own = "attn.indexer"
        high += (f"{own}.wq_b",)
        index = (f"{own}.compressor.wkv", f"{own}.compressor.wgate", f"{own}.weights_proj")
    return {
        "low": ("attn.wq_a", "attn.wkv"),
        "high": high,
        "shared": ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
        "plain": compressed + index,
    }


# By compress ratio: matrices of the same input, which a layer holds as one, in this order.
NEIGHBOURS = {ratio: _neighbours(ratio) for ratio in (0, CSA_RATIO, HCA_RATIO)}


def _quantised(
    tensors: Mapping[str, Tensor], names: Sequence[str], where: str
) -> tuple[Tensor, Tensor]:
    """FP8 matrices as one: codes [rows, cols] and scales [tiles, tiles], uint8."""
    codes = [get(tensors, f"{name}.weight", where) for name in names]
    scales = [get(tensors, f"{name}.scale", where) for name in names]
    for name, code, scale in zip(names, codes, scales, strict=True):
        check_fp8(where + name, code, scale)
    return _joined([_bytes(code) for code in codes]), _joined([_bytes(scale) for scale in scales])


def _experts(tensors: Mapping[str, Tensor], leaf: str, where: str) -> tuple[Tensor, Tensor]:
    """One kind of the routed experts' matrices and scales, stacked: [experts, rows, cols] uint8."""
    found, name = [], f"ffn.experts.{leaf}"
    for part in ("weight", "scale"):
        stacked = tensors.get(f"{name}.{part}")
        if stacked is None:
            end, gate = f".{leaf}.{part}", get(tensors, "ffn.gate.weight", where)
            stacked = torch.stack(
                [get(tensors, f"ffn.experts.{e}{end}", where) for e in range(len(gate))]
            )
        found.append(stacked)
    check_fp4(where + name, *found)
    return _bytes(found[0]), _bytes(found[1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """parts: [rows, cols] each -> one below the other, where they lie if they already do so."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == end):
            return torch.cat(list(parts)).contiguous()
        end += part.nbytes
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


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
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str = "") -> MergeSite:
        """tensors: of the model, or of an MTP block without the `mtp.N.` before their names, in the
        same shape as in the files, such as fn [streams, streams * hidden].
        """
        parts = {p: get(tensors, f"hc_head_{p}", where) for p in ("fn", "base", "scale")}
        return cls(**parts, norm=get(tensors, "norm.weight", where))


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
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: str = "") -> StoredDraft:
        """tensors: the block's by their official names, without the `mtp.N.` before them, each in
        the same shape as in the files, such as e_proj [hidden, hidden]. Raises CheckpointError as
        StoredLayer.from_tensors.
        """
        return cls(
            layer=StoredLayer.from_tensors(tensors, 0, where),
            e_proj=_quantised(tensors, ["e_proj"], where),
            h_proj=_quantised(tensors, ["h_proj"], where),
            enorm=get(tensors, "enorm.weight", where),
            hnorm=get(tensors, "hnorm.weight", where),
            merge=MergeSite.from_tensors(tensors, where),
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
        cols]. Raises CheckpointError as StoredLayer.from_tensors.
        """
        blocks: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind in ("layers", "mtp"):
                number, _, own = rest.partition(".")
                blocks.setdefault(f"{kind}.{number}.", {})[own] = tensor
        return cls(
            config=config,
            embed=Table(get(tensors, "embed.weight", "")),
            layers=[
                StoredLayer.from_tensors(blocks.get(name, {}), ratio, name)
                for index, ratio in enumerate(config.compress_ratios)
                for name in (f"layers.{index}.",)
            ],
            merge=MergeSite.from_tensors(tensors),
            head=get(tensors, "head.weight", ""),
            mtp=[
                StoredDraft.from_tensors(blocks.get(name, {}), name)
                for index in range(config.num_mtp_layers)
                for name in (f"mtp.{index}.",)
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
