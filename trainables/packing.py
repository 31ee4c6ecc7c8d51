"""How examples of several trials lie in one forward pass: end to end, each trial's together, padded in attention only.

Whatever mixes tokens or features works on one trial's tokens at a time, in shapes that its own examples give. That is
why a trial computes the same bits whoever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from trainables import lora

ATTENTION = "winnow_packed"
"""The name under which transformers knows ``attend``."""


class GroupWeights(NamedTuple):
    """An adapter's weights in the layers of one group, in the type that a pass computes in: views, made once."""

    a: torch.Tensor
    """[n * r, d_in]: the A of all n layers, one below the other, since all are given the same input."""
    b_t: Sequence[torch.Tensor]
    """Of each layer its B turned over, [r, d_out]: products are slow where r is the side that lies in memory."""


class Adapter(NamedTuple):
    """One trial's LoRA weights as a pass needs them, group by group."""

    weights: Sequence[GroupWeights]
    gradients: Sequence[GroupWeights] | None
    """Where a backward pass adds to, in 32 bits; None in evaluation."""
    r: int
    scale: float
    dropout: float
    key: tuple[int, ...]
    """Of the dropout masks: seed, step and micro-batch."""


class Part(NamedTuple):
    """One trial's tokens in a pass, in ``rows`` examples of at most ``width`` tokens."""

    adapter: Adapter
    rows: int
    width: int
    next_ids: torch.Tensor
    """[M], what follows each of its tokens whose next one is learned."""


@dataclass(frozen=True)
class Pack:
    """One forward pass over N tokens, which lie trial by trial; in attention in P places, examples padded by trial."""

    input_ids: torch.Tensor
    """[N]"""
    positions: torch.Tensor
    """[N], each example from 0."""
    predicting: torch.Tensor
    """The tokens whose next one is learned."""
    gather: torch.Tensor
    """[P], the token that stands at each place; padding repeats its own example's first."""
    scatter: torch.Tensor
    """[N], the place of each token."""
    parts: tuple[Part, ...]
    tokens: list[int]
    """Of each part, and likewise:"""
    places: list[int]
    learned: list[int]
    anchor: torch.Tensor
    """Of no size; requires a gradient where the pass learns, so that autograd records it from the first adapter on."""


class Example(NamedTuple):
    input_ids: torch.Tensor
    """[T]"""
    labels: torch.Tensor
    """[T], -100 where nothing is learned."""


def pack(batches: Sequence[tuple[Adapter, Sequence[Example]]], device: torch.device) -> Pack:
    """Lay out one batch of examples for each of several adapters."""
    rows = [example for _, examples in batches for example in examples]
    counts = [len(examples) for _, examples in batches]
    first_rows = numpy.cumsum([0, *counts[:-1]])
    lengths = numpy.array([len(example.input_ids) for example in rows])
    widths = numpy.maximum.reduceat(lengths, first_rows)
    ends, padded = lengths.cumsum(), numpy.repeat(widths, counts)
    starts, tokens = ends - lengths, numpy.add.reduceat(lengths, first_rows)
    positions = numpy.arange(ends[-1]) - numpy.repeat(starts, lengths)
    scatter = numpy.repeat(padded.cumsum() - padded, lengths) + positions
    gather = numpy.repeat(starts, padded)
    gather[scatter] = numpy.arange(ends[-1])
    following = torch.cat([example.labels for example in rows]).roll(-1).numpy()
    following[ends - 1] = -100
    predicting = numpy.flatnonzero(following != -100)
    learned = numpy.diff(numpy.searchsorted(predicting, tokens.cumsum()), prepend=0).tolist()
    next_ids = _on(device, following[predicting]).split(learned)
    shapes = zip((adapter for adapter, _ in batches), counts, widths.tolist(), next_ids, strict=True)
    parts = tuple(Part(*shape) for shape in shapes)
    return Pack(
        input_ids=torch.cat([example.input_ids for example in rows]).to(device),
        positions=_on(device, positions),
        predicting=_on(device, predicting),
        gather=_on(device, gather),
        scatter=_on(device, scatter),
        parts=parts,
        tokens=tokens.tolist(),
        places=(widths * counts).tolist(),
        learned=learned,
        anchor=torch.empty(0, requires_grad=any(part.adapter.gradients for part in parts)),
    )


def _on(device: torch.device, array: Any) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def attend(
    module: Any,  # noqa: ARG001  transformers names its arguments
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001
    scaling: float | None = None,
    pack: Pack | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example; padding comes last in a row, so no token ever sees it.

    Args:
        query: [1, H, N, D]; ``key`` and ``value`` may have fewer heads.

    Returns:
        [1, N, H, D]
    """
    assert pack is not None
    rectangles = (_Padded.apply(tensor[0], pack).split(pack.places, 1) for tensor in (query, key, value))
    grouped, found = query.shape[1] != key.shape[1], []
    for part, *own in zip(pack.parts, *rectangles, strict=True):
        q, k, v = (tensor.unflatten(1, (part.rows, part.width)).transpose(0, 1) for tensor in own)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        found.append(seen.transpose(1, 2).flatten(0, 1))
    return _Unpadded.apply(torch.cat(found), pack).unsqueeze(0), None


class _Padded(torch.autograd.Function):
    """[H, N, D] to [H, P, D]. Its gradient is a gather too, where autograd's would add rows up."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, pack: Pack) -> torch.Tensor:
        ctx.pack = pack
        return tokens.index_select(1, pack.gather)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return outer[0].index_select(1, ctx.pack.scatter), None


class _Unpadded(torch.autograd.Function):
    """[P, H, D] to [N, H, D]; what is padding gets a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, places: torch.Tensor, pack: Pack) -> torch.Tensor:
        ctx.pack = pack
        return places.index_select(0, pack.scatter)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        pack, tokens = ctx.pack, outer[0]
        places = tokens.new_zeros(len(pack.gather), *tokens.shape[1:])
        return places.index_copy_(0, pack.scatter, tokens), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


@dataclass
class Current:
    """The pack that is passing; all layers of an engine look here for it."""

    pack: Pack | None = None


class PackedLinear(torch.nn.Module):
    """A frozen linear layer, 4-bit or not, with every adapter of the current pack; its group does the work."""

    def __init__(self, layer: torch.nn.Linear, group: Group) -> None:
        super().__init__()
        self.layer, self.group, self.member = layer, group, len(group.layers)
        group.layers.append(self)
        self.dequantisations = 0
        self.keeps = False
        self._kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, N, d_in], to [1, N, d_out]."""
        return self.group.output(x, self.member)

    def keep(self, keeps: bool) -> None:
        """Whether the dequantised weight stays from pass to pass: the same bits, for its memory."""
        self.keeps, self._kept = keeps, None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """[d_out, d_in]; one dequantisation serves all adapters of a pass."""
        if self._kept is not None:
            return self._kept
        weight = self.layer.weight
        state = getattr(weight, "quant_state", None)
        if state is None:
            return weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        self.dequantisations += 1
        whole = dequantize_4bit(weight.data, state).to(dtype)
        self._kept = whole if self.keeps else None
        return whole


class Group:
    """Layers that the model gives one input, as q, k and v, or a layer alone: one node of autograd's graph.

    What an adapter does to their input is then one product for all of them, where each alone is narrow and slow.

    Args:
        at_once: multiply a frozen weight with all trials' tokens in one call: fewer launches on a GPU, but then the
            last bits of a trial may depend on how many tokens its neighbours have.
        place: of its weights in an adapter; None where adapters leave all of its layers alone.
        adapted: of each layer that adapters have, which of ``layers`` it is, and its place among all that they have.
    """

    def __init__(self, current: Current, at_once: bool, place: int | None, adapted: list[tuple[int, int]]) -> None:
        self.current, self.at_once, self.place, self.adapted = current, at_once, place, adapted
        self.layers: list[PackedLinear] = []
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    def output(self, x: torch.Tensor, member: int) -> torch.Tensor:
        """Of one layer; the first that is asked for an ``x`` computes all, which a model asks for next."""
        if x is not self._input or member not in self._outputs:
            pack = self.current.pack
            assert pack is not None
            self._input, self._outputs = x, dict(enumerate(_AdaptedLinears.apply(x, pack.anchor, self, pack)))
        found = self._outputs.pop(member)
        if not self._outputs:
            self._input = None
        return found

    def weights(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Of each layer, [d_out, d_in]; one after the other, so that a GPU need not hold them all dequantised."""
        return (layer.weight(dtype) for layer in self.layers)


class _AdaptedLinears(torch.autograd.Function):
    """y = x W' + b + scale * drop(x) A' B' in each layer of a group, trial by trial.

    Gradients of A and B go straight to their owner's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004  has autograd record a layer whose input needs no gradient
        group: Group,
        pack: Pack,
    ) -> tuple[torch.Tensor, ...]:
        flat, inner = x[0], []
        outputs = [flat.new_empty(len(flat), layer.layer.out_features) for layer in group.layers]
        if group.at_once:
            _multiply(flat, group.weights(x.dtype), outputs)
        else:
            weights = list(group.weights(x.dtype))
        for part, own, *out in zip(pack.parts, *_shares(pack, flat, *outputs), strict=True):
            if not group.at_once:
                _multiply(own, weights, out)
            if group.place is not None:
                inner.append(_adapt(part, group, own, out))
        for layer, y in zip(group.layers, outputs, strict=True):
            if layer.layer.bias is not None:
                y += layer.layer.bias
        ctx.save_for_backward(x, *inner)
        ctx.group, ctx.pack = group, pack
        return tuple(y.unsqueeze(0) for y in outputs)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        group, pack, (x, *inner) = ctx.group, ctx.pack, ctx.saved_tensors
        flat, dys = x[0], [dy[0] for dy in outer]
        dx = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        onward: Sequence[torch.Tensor | None] = [None] * len(pack.parts)
        if dx is not None:
            (onward,) = _shares(pack, dx)
            if group.at_once:
                _sum_products(dys, group.weights(x.dtype), dx)
            else:
                weights = list(group.weights(x.dtype))
        for k, (part, own_dx, own_x, *own_dys) in enumerate(
            zip(pack.parts, onward, *_shares(pack, flat, *dys), strict=True)
        ):
            if own_dx is not None and not group.at_once:
                _sum_products(own_dys, weights, own_dx)
            if group.place is not None:
                _adapter_gradients(part, group, own_x, inner[k], own_dys, own_dx)
        return dx.unsqueeze(0) if dx is not None else None, None, None, None


def _multiply(x: torch.Tensor, weights: Iterable[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    """``y = x W'`` of each layer."""
    for weight, y in zip(weights, outputs, strict=True):
        torch.mm(x, weight.t(), out=y)


def _sum_products(dys: Sequence[torch.Tensor], weights: Iterable[torch.Tensor], dx: torch.Tensor) -> None:
    """``dx = dy W``, summed over the layers."""
    for k, (dy, weight) in enumerate(zip(dys, weights, strict=True)):
        if k:
            dx.addmm_(dy, weight)
        else:
            torch.mm(dy, weight, out=dx)


def _shares(pack: Pack, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each of [N, d] by trial; ``Tensor.split`` does the same and asks more questions first."""
    return [torch.split_with_sizes(tensor, pack.tokens) for tensor in tensors]


def _adapt(part: Part, group: Group, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adds what one trial's adapter makes of ``x`` to the group's outputs.

    Returns:
        [n * r, T], the adapter's inner features, those of one layer below those of another.
    """
    adapter, layers = part.adapter, group.adapted
    weights = adapter.weights[group.place]  # type: ignore[index]
    if adapter.dropout and adapter.gradients:
        inner = x.new_empty(len(weights.a), len(x))
        for (_, place), h, a in zip(layers, _by_layer(inner, layers), _by_layer(weights.a, layers), strict=True):
            torch.mm(a, (x * _mask(x, adapter, place)).t(), out=h)
    else:
        inner = torch.mm(weights.a, x.t())
    for (member, _), h, b_t in zip(layers, _by_layer(inner, layers), weights.b_t, strict=True):
        outputs[member].addmm_(h.t(), b_t, alpha=adapter.scale)
    return inner


def _adapter_gradients(
    part: Part,
    group: Group,
    x: torch.Tensor,
    inner: torch.Tensor,
    dys: Sequence[torch.Tensor],
    dx: torch.Tensor | None,
) -> None:
    """Adds one trial's gradients of A and B to its own, and to ``dx``, where wanted, what its adapter passes on."""
    adapter, layers = part.adapter, group.adapted
    weights, scale = adapter.weights[group.place], adapter.scale  # type: ignore[index]
    gradients = adapter.gradients[group.place]  # type: ignore[index]
    d_inner = torch.empty_like(inner)
    hs, dhs = _by_layer(inner, layers), _by_layer(d_inner, layers)
    for (member, _), h, dh, b_t, db_t in zip(layers, hs, dhs, weights.b_t, gradients.b_t, strict=True):
        torch.mm(b_t, dys[member].t(), out=dh)
        _accumulate(db_t, h, dys[member], scale)
    if not adapter.dropout:
        _accumulate(gradients.a, d_inner, x, scale)
        if dx is not None:
            dx.addmm_(d_inner.t(), weights.a, alpha=scale)
        return
    own = zip(layers, dhs, _by_layer(weights.a, layers), _by_layer(gradients.a, layers), strict=True)
    for (_, place), dh, a, da in own:
        mask = _mask(x, adapter, place)
        _accumulate(da, dh, x * mask, scale)
        if dx is not None:
            dx.addcmul_(torch.mm(dh.t(), a), mask, value=scale)


def _by_layer(stacked: torch.Tensor, layers: Sequence[Any]) -> Sequence[torch.Tensor]:
    return (stacked,) if len(layers) == 1 else stacked.chunk(len(layers))


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """``total += scale * left right``; the total is in 32 bits, the product in what the pass computes in."""
    if total.dtype is left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(torch.mm(left, right), alpha=scale)


def _mask(x: torch.Tensor, adapter: Adapter, place: int) -> torch.Tensor:
    """LoRA's dropout of one layer. Drawn again in the backward pass rather than kept: its key gives the same one."""
    keep = 1 - adapter.dropout
    drawn = torch.rand(x.shape, generator=lora.generator(x.device, *adapter.key, place), device=x.device)
    return (drawn < keep).to(x.dtype) / keep


class HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of a frozen head over [M, d] hidden states, a chunk of logits at a time."""

    CHUNK = 2048

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), HeadLoss.CHUNK):
            part = slice(start, start + HeadLoss.CHUNK)
            log_p = (hidden[part] @ weight.t()).float().log_softmax(-1)
            total -= log_p.gather(1, next_ids[part, None]).sum()
            if gradient is not None:
                d_logits = log_p.exp_()
                d_logits[torch.arange(len(d_logits), device=hidden.device), next_ids[part]] -= 1
                gradient[part] = d_logits.to(hidden.dtype) @ weight
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.gradient * outer[0], None, None
