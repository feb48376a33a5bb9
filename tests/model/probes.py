"""Comparisons of a small random model with the oracle, each giving one number: 1 is what passes.

Every part of the model is under some probe, in float32 or with all roundings (`_q`). Float32
results must agree everywhere; a rounding may fall the other way and change a few tokens, so that
rounded results must agree in most of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from fathom.engine.batch import Batch, Piece
from fathom.engine.engine import Engine, EngineConfig
from fathom.kernels import operation
from fathom.kernels.reference import mhc
from fathom.model import Cache, Transformer
from fathom.model.context import LayerSignals
from fathom.quant import fp4, fp8, kv_pack
from tests.model import oracle
from tests.model.oracle import Oracle
from tests.model.tiny import RANDOM_CONFIG, random_model, weights_of

# Two FP8 groups of 64 in an entry, two FP4 groups in an index key, a partial group of activations.
CONFIG = replace(
    RANDOM_CONFIG,
    hidden_size=160,
    head_dim=144,
    index_head_dim=64,
    num_hidden_layers=3,
    compress_ratios=(0, 4, 128),
    max_position_embeddings=2**20,
)
SWA, CSA, HCA = 0, 1, 2  # layers; the first routes by token id
TOKENS = 140  # one entry of 128 and 35 of 4 tokens
LONG = 264  # two entries of 128 tokens, as the second one's rotation needs
CHUNKS = (1, 7, 120, 3, 1, 1, 7)  # every kind of crossing of windows of 4, 16 and 128

RELATIVE = 5e-5  # float32 results: of their mean size
OFF = 1e-3  # rounded results: a token counts as off when it is further than this from the oracle
SHARE_OFF = 0.25  # and so many tokens may be

PROBES: dict[str, Callable[[], float]] = {}


def probe(function: Callable[[], float]) -> Callable[[], float]:
    PROBES[function.__name__] = function
    return function


# The two sides --------------------------------------------------------------------------------


@torch.no_grad()
def fresh(**options: bool) -> Transformer:
    """A random model whose weights are BF16 values, as stored ones are."""
    model = random_model(7, CONFIG, **options)
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    return model


@functools.cache
def subject(quantized: bool) -> Transformer:
    """The model under test."""
    model = fresh(quantized=quantized)
    formats = {
        name: "fp8"
        for name, module in model.named_modules()
        if hasattr(module, "weight_format") and not name.endswith("weights_proj")
    }
    model.set_weight_formats(formats)
    return model


@functools.cache
def reference(quantized: bool) -> Oracle:
    """The oracle with the same weights, read before any mistake can be planted."""
    return Oracle(CONFIG, weights_of(subject(quantized)), quantized, quantized)


@functools.cache
def token_ids(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, CONFIG.vocab_size, (1, LONG), generator=g)


@functools.cache
def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def streams(seq: int) -> torch.Tensor:
    return random(1, 1, LONG, CONFIG.hc_mult, CONFIG.hidden_size)[:, :seq]


@functools.cache
def expected_block(layer: int, quantized: bool, seq: int) -> np.ndarray:
    tokens = token_ids()[0, :seq].tolist()
    return reference(quantized).block(layer, streams(seq)[0].double().numpy(), tokens)


@functools.cache
def expected_logits(quantized: bool, seed: int = 0) -> np.ndarray:
    return reference(quantized).logits(token_ids(seed)[0, :TOKENS].tolist())


@functools.cache
def expected_stored_logits() -> np.ndarray:
    """From entries as the engine's slabs hold them."""
    stored = replace(reference(True), rounds_rotated=True)
    return stored.logits(token_ids()[0, :TOKENS].tolist())


# Distances ------------------------------------------------------------------------------------


def furthest(actual: torch.Tensor, expected: np.ndarray, allowed: float = RELATIVE) -> float:
    """Largest difference relative to the mean size, in units of what is allowed."""
    assert tuple(actual.shape) == expected.shape
    difference = np.abs(actual.double().numpy() - expected)
    return finite(difference.max() / np.abs(expected).mean() / allowed)


def most_rows(actual: torch.Tensor, expected: np.ndarray, allowed: float = SHARE_OFF) -> float:
    """Share of tokens that are off, in units of what is allowed."""
    assert tuple(actual.shape) == expected.shape
    difference = np.abs(actual.double().numpy() - expected).reshape(len(expected), -1)
    size = np.abs(expected).mean()
    return finite(float(np.mean(~(difference.max(axis=1) < OFF * size))) / allowed)


def finite(distance: float) -> float:
    return float("inf") if np.isnan(distance) else float(distance)


# Blocks, logits, MTP --------------------------------------------------------------------------


def block(layer: int, quantized: bool, seq: int = TOKENS) -> float:
    model, tokens = subject(quantized), token_ids()[:, :seq]
    out = model.layers[layer](streams(seq), tokens, model.context(tokens))[0]
    distance = most_rows if quantized else furthest
    return distance(out, expected_block(layer, quantized, seq))


@probe
def block_swa() -> float:
    return block(SWA, False)


@probe
def block_csa() -> float:
    return block(CSA, False)


@probe
def block_hca() -> float:
    return block(HCA, False, LONG)


@probe
def block_swa_q() -> float:
    return block(SWA, True)


@probe
def block_csa_q() -> float:
    return block(CSA, True)


@probe
def block_hca_q() -> float:
    return block(HCA, True, LONG)


@probe
def logits() -> float:
    return furthest(subject(False)(token_ids()[:, :TOKENS])[0], expected_logits(False))


@probe
def logits_q() -> float:
    return most_rows(subject(True)(token_ids()[:, :TOKENS])[0], expected_logits(True))


@functools.cache
def expected_mtp(quantized: bool) -> np.ndarray:
    tokens = token_ids(1)[0, :TOKENS].tolist()
    return reference(quantized).mtp(streams(TOKENS)[0].double().numpy(), tokens)[0]


def mtp_block(quantized: bool) -> torch.Tensor:
    model = subject(quantized)
    return model.head(model.mtp_hidden(streams(TOKENS), token_ids(1)[:, :TOKENS]))[0]


@probe
def mtp() -> float:
    return furthest(mtp_block(False), expected_mtp(False))


@probe
def mtp_q() -> float:
    return most_rows(mtp_block(True), expected_mtp(True))


@functools.cache
def expected_mtp_logits() -> np.ndarray:
    tokens = token_ids()[0, :TOKENS].tolist()
    return reference(False).mtp(reference(False).streams(tokens)[:-1], tokens[1:])[0]


@probe
def mtp_fed() -> float:
    """Which streams and tokens the MTP block is given."""
    return furthest(subject(False).mtp_logits(token_ids()[:, :TOKENS])[0], expected_mtp_logits())


# The indexer ----------------------------------------------------------------------------------


@functools.cache
def expected_scores(quantized: bool) -> np.ndarray:
    p, own = "layers.1.attn", reference(quantized)
    xs, qrs = (t[0].double().numpy() for t in indexer_inputs())
    keys = own.index_keys(p, list(xs))
    return np.stack(
        [own.index_scores(p, x, qr, t, keys) for t, (x, qr) in enumerate(zip(xs, qrs, strict=True))]
    )


def indexer_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return random(2, 1, TOKENS, CONFIG.hidden_size), random(3, 1, TOKENS, CONFIG.q_lora_rank)


def index_scores(quantized: bool) -> torch.Tensor:
    model = subject(quantized)
    context = model.context(token_ids()[:, :TOKENS])
    return model.layers[CSA].attn.indexer(*indexer_inputs(), context, None)[0]


@probe
def scores() -> float:
    return furthest(index_scores(False), expected_scores(False))


@probe
def scores_q() -> float:
    return most_rows(index_scores(True), expected_scores(True))


@functools.cache
def undecided() -> Transformer:
    """A model whose index scores are all exactly zero."""
    model = fresh()
    model.layers[CSA].attn.indexer.weights_proj.weight.detach().zero_()
    return model


@functools.cache
def expected_undecided() -> np.ndarray:
    tokens = token_ids()[0, :TOKENS].tolist()
    return Oracle(CONFIG, weights_of(undecided())).logits(tokens)


@probe
def tied_prefill() -> float:
    return furthest(undecided()(token_ids()[:, :TOKENS])[0], expected_undecided())


@probe
def tied_steps() -> float:
    return furthest(decoded(undecided()), expected_undecided())


@probe
def ties() -> float:
    """Equal scores are chosen in the order of the entries, in a prefill as in a decode step."""
    attention = subject(False).layers[CSA].attn
    wrong = 0
    for count in range(1, TOKENS // 4 + 1):
        equal = torch.zeros(1, 1, count)
        chosen = attention.indexer.select(equal, torch.ones(1, 1, count, dtype=torch.bool))
        wrong += chosen[0, 0].tolist() != list(range(min(count, CONFIG.index_topk)))
    return float(wrong)


# Sequences ------------------------------------------------------------------------------------


def fed(
    model: Transformer, tokens: torch.Tensor, sizes: tuple[int, ...], cache: Cache | None = None
) -> torch.Tensor:
    """Logits of tokens given in chunks."""
    cache = model.new_cache(len(tokens)) if cache is None else cache
    return torch.cat([model(piece, cache) for piece in tokens.split(list(sizes), 1)], 1)


@probe
def chunks() -> float:
    out = fed(subject(False), token_ids()[:, :TOKENS], CHUNKS)
    return furthest(out[0], expected_logits(False))


@probe
def steps() -> float:
    out = fed(subject(False), token_ids()[:, :TOKENS], (1,) * TOKENS)
    return furthest(out[0], expected_logits(False))


@probe
def second_sequence() -> float:
    """A sequence computed after another one, which was longer and stopped within its windows."""
    model = subject(False)
    fed(model, token_ids(5)[:, :TOKENS], (70, 69, 1))
    return furthest(fed(model, token_ids()[:, :TOKENS], (1, 139))[0], expected_logits(False))


@probe
def second_row() -> float:
    """Two sequences of one batch."""
    tokens = torch.cat((token_ids(5), token_ids()))[:, :TOKENS]
    return furthest(fed(subject(False), tokens, CHUNKS)[1], expected_logits(False))


@probe
def rejected_drafts() -> float:
    """At several offsets within windows, tokens are fed and taken back before the right ones."""
    model, tokens = subject(False), token_ids()[:, :TOKENS]
    cache, out = model.new_cache(), []
    stops = (0, 3, 5, 6, 11, 16, 60, 125, 126, 127, 130, TOKENS)
    for start, stop in itertools.pairwise(stops):
        kept = cache.clone()
        fed(model, token_ids(5)[:, start : start + 6], (2, 4), cache)
        cache = kept
        out.append(model(tokens[:, start:stop], cache))
    return furthest(torch.cat(out, 1)[0], expected_logits(False))


def compiled_rows(model: Transformer) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A sequence in the engine's compiled rows: (position, tokens [seq]) -> logits [seq, vocab]."""
    engine = Engine(model, EngineConfig(max_sequences=1, cache_tokens=512))
    assert type(engine.runner).__name__ == "CompiledRunner"
    engine.memory.tables[0] = torch.arange(engine.memory.tables.shape[1])

    def feed(start: int, tokens: torch.Tensor) -> torch.Tensor:
        engine.runner.forward(Batch.of([Piece(slot=0, start=start, tokens=tokens.tolist())]))
        return torch.from_numpy(engine.runner.logits(list(range(len(tokens))))[1].copy())

    return feed


def decoded(model: Transformer) -> torch.Tensor:
    """Logits of one compiled step per token."""
    feed, tokens = compiled_rows(model), token_ids()[0, :TOKENS]
    return torch.cat([feed(i, tokens[i : i + 1]) for i in range(TOKENS)])


@probe
def rejected_decodes() -> float:
    """Tokens are fed to the compiled rows and taken back before the right ones."""
    feed, tokens, wrong = compiled_rows(subject(False)), token_ids()[0, :TOKENS], token_ids(5)[0]
    rows = []
    for i in range(TOKENS):
        if i % 3 == 2 or i > 120:
            feed(i, wrong[i : i + 5])
        rows.append(feed(i, tokens[i : i + 1]))
    return furthest(torch.cat(rows), expected_logits(False))


@probe
def packed_documents() -> float:
    """A document behind another one in the same row, from a multiple of 128 on."""
    model, row = subject(False), torch.zeros(1, 128 + TOKENS, dtype=torch.int64)
    row[:, :128], row[:, 128:] = token_ids(5)[:, :128], token_ids()[:, :TOKENS]
    documents = torch.zeros_like(row)
    documents[:, 128:] = 1
    out = model.streams(row, context=model.context(row, documents=documents))
    return furthest(model.head(model.hidden(out))[0, 128:], expected_logits(False))


@probe
def taught() -> float:
    """A pass that collects what a trainer needs computes the same."""
    model, tokens = subject(False), token_ids()[:, :TOKENS]
    out = model.streams(tokens, signals=[LayerSignals() for _ in model.layers])
    return furthest(model.head(model.hidden(out))[0], expected_logits(False))


@probe
def decode() -> float:
    return furthest(decoded(subject(False)), expected_logits(False))


@probe
def decode_q() -> float:
    # One more kind of rounding than elsewhere may fall the other way.
    return most_rows(decoded(subject(True)), expected_stored_logits(), 0.3)


# Single operations ----------------------------------------------------------------------------


@probe
def far_positions() -> float:
    """Angles before, across and far beyond the original context; float32 phases suffice."""
    worst = 0.0
    for compressed in (False, True):
        freq = oracle.frequencies(CONFIG, compressed)
        for start in (0, 8187, 65533, 300_000):
            cache = subject(False).new_cache()
            cache.length = start
            context = subject(False).context(token_ids()[:, :9], cache)
            pairs = [(context.rotation(compressed), range(start, start + 9))]
            if compressed:
                for ratio in (4, 128):
                    places = range(
                        start // ratio * ratio, start // ratio * ratio + 9 * ratio, ratio
                    )
                    pairs.append((context.entry_rotation(ratio, start // ratio, 9), places))
            for (cos, sin), positions in pairs:
                phase = (np.array(positions, np.float32)[:, None] * freq).astype(np.float64)
                found = torch.stack((cos, sin)).double().numpy()
                worst = max(worst, np.abs(found - [np.cos(phase), np.sin(phase)]).max())
    return finite(worst / 0.03)


@probe
def mhc_extremes() -> float:
    """Weights so small that their eps counts, and mixing matrices that are far from balanced."""
    config = CONFIG
    rows, n, wide = 9, config.hc_mult, config.hc_mult * config.hidden_size
    x = random(4, rows, n, config.hidden_size)
    fn = random(5, n * (n + 2), wide) * wide**-0.5
    base = torch.cat((torch.full((2 * n,), -12.0), 12 * random(6, n * n)))
    scale = torch.tensor([0.9, 0.8, 1.1])
    constants = (config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps)
    mixes = mhc.mixing_logits(x[None], fn, config.rms_norm_eps)
    found = [*mhc.mixing_weights(mixes, base, scale, *constants[:2])]
    found[0] = operation("mhc_pre")(x[None], fn, base, scale, *constants)[0]
    head = (fn[:n], base[:n], scale[:1])
    found.append(operation("mhc_head")(x[None], *head, config.hc_eps, config.rms_norm_eps))
    worst = 0.0
    for row in range(rows):
        own = x[row].double().numpy()
        inputs = [t.double().numpy() for t in (fn, base, scale)]
        expected = [*oracle.mhc_read(own, *inputs, config)]
        expected.append(oracle.mhc_head(own, *(t.double().numpy() for t in head), config))
        for actual, wanted in zip(found, expected, strict=True):
            worst = max(worst, furthest(actual[0, row], np.asarray(wanted), 1e-3))
    return worst


@probe
def roundings() -> float:
    """Exact: ordinary values, ties of both formats, groups of zeros, tiny and huge values."""
    rows = [random(8, 64) * 2.0**e for e in (-40, -20, -12, 0, 5, 90)]
    rows += [
        torch.zeros(64),
        torch.full((64,), 448.0),
        torch.linspace(-6, 6, 64).mul(8).round() / 8,
    ]
    rows += [torch.arange(64) * 7.0, 2.0**-9 * torch.arange(64) / 2 + torch.eye(64)[0] * 448]
    x = torch.stack(rows)
    own = x.double().numpy()
    wanted = {
        "fp8": np.stack([oracle.fp8(row, 128) for row in own]),
        "fp8 in groups of 64": np.stack([oracle.fp8(row, 64) for row in own]),
        "fp4": np.stack([oracle.fp4(row) for row in own]),
    }
    # Entries whose groups of 64 differ so much that one scale for both would lose the smaller.
    wide = random(9, 4, CONFIG.head_dim).clone()
    wide[:, :64] *= 2.0**-12
    wanted["entries"] = np.stack([reference(True).stored(row) for row in wide.double().numpy()])
    found = {
        "entries": kv_pack.simulate_kv(wide, CONFIG.qk_rope_head_dim),
        "fp8": fp8.simulate(x, 128),
        "fp8 in groups of 64": fp8.simulate(x, 64),
        "fp4": fp4.simulate(x),
    }
    return float(sum((found[k].double().numpy() != wanted[k]).sum() for k in wanted))
