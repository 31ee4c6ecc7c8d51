"""How examples of several trials lie in one forward pass: end to end, each trial's together, padded in attention only.

On a CPU whatever mixes tokens or features works on one trial's tokens at a time, in shapes that its own examples give.
That is why a trial computes the same bits whoever its neighbours are. On a GPU trials share such calls, for as few of
them as can be, and its last bits may depend on theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy
import torch
from torch.nn import functional
from transformers import AttentionInterface

from trainables.adapters import Adapter, Stack, alike, mask_columns, sent, stacked
from trainables.contract import CannotPack

ATTENTION = "winnow_packed"
"""The name under which transformers knows ``attend``."""
_NOT_DONE = ("softcap", "s_aux", "position_bias")
"""What some of transformers' models hand to their attention, and ``attend`` does not do."""


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
    next_ids: tuple[torch.Tensor, ...]
    """Of each trial [M], what follows each of its tokens whose next one is learned."""
    adapters: tuple[Adapter | Stack, ...]
    """Of one trial each, or of several whose tokens lie one after the other."""
    tokens: list[int]
    """That each of ``adapters`` works on."""
    rectangles: list[tuple[int, int]]
    """Examples, and the places that each of them has, of every call of attention."""
    at_once: bool
    """Whether a frozen weight is multiplied with all tokens in one call."""
    anchor: torch.Tensor
    """Of no size; requires a gradient where the pass learns, so that autograd records it from the first adapter on."""

    def hand_out(self) -> None:
        """After the backward pass: to each trial what is not in its gradient yet."""
        for adapter in self.adapters:
            if isinstance(adapter, Stack):
                adapter.hand_out()


class Example(NamedTuple):
    input_ids: torch.Tensor
    """[T]"""
    labels: torch.Tensor
    """[T], -100 where nothing is learned."""


def pack(batches: Sequence[tuple[Adapter, Sequence[Example]]], device: torch.device, at_once: bool = False) -> Pack:
    """Lay out one batch of examples for each of several adapters.

    Args:
        at_once: do for several trials in one call what can be; for that they have to come in ``stacking_order``.
    """
    rows = [example for _, examples in batches for example in examples]
    counts = [len(examples) for _, examples in batches]
    first_rows = numpy.cumsum([0, *counts[:-1]])
    lengths = numpy.array([len(example.input_ids) for example in rows])
    rectangles = _rectangles(counts, numpy.maximum.reduceat(lengths, first_rows).tolist(), at_once)
    padded = numpy.concatenate([numpy.full(*rectangle) for rectangle in rectangles])
    ends = lengths.cumsum()
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
    own, shares = [adapter for adapter, _ in batches], tokens.tolist()
    apart = ((adapter.alone(share), share) for adapter, share in zip(own, shares, strict=True))
    shared = stacked(own, shares) if at_once else list(apart)
    return Pack(
        input_ids=sent(torch.cat([example.input_ids for example in rows]), device),
        positions=_on(device, positions),
        predicting=_on(device, predicting),
        gather=_on(device, gather),
        scatter=_on(device, scatter),
        next_ids=tuple(next_ids),
        adapters=tuple(adapter for adapter, _ in shared),
        tokens=[count for _, count in shared],
        rectangles=rectangles,
        at_once=at_once,
        anchor=torch.empty(0, requires_grad=any(adapter.gradient is not None for adapter in own)),
    )


def _rectangles(counts: list[int], widths: list[int], at_once: bool) -> list[tuple[int, int]]:
    """Each trial's examples, as wide as its longest, by themselves or with neighbours' that are about as wide."""
    together = alike(counts, widths) if at_once else ([place] for place in range(len(counts)))
    return [(sum(counts[k] for k in own), max(widths[k] for k in own)) for own in together]


def _on(device: torch.device, array: Any) -> torch.Tensor:
    return sent(torch.from_numpy(array), device)


def attend(
    module: Any,  # noqa: ARG001  transformers names its arguments
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,  # noqa: ARG001
    scaling: float | None = None,
    pack: Pack | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each example; padding comes last in a row, so no token ever sees it.

    Args:
        query: [1, H, N, D]; ``key`` and ``value`` may have fewer heads.
        dropout: of attention itself; has to be none.
        sliding_window: tokens that one sees; has to be all of an example.

    Returns:
        [1, N, H, D]

    Raises:
        CannotPack: the model asks for what this does not do.
    """
    assert pack is not None
    if asked := ["dropout"] * bool(dropout) + [name for name in _NOT_DONE if more.get(name) is not None]:
        raise CannotPack(f"the base's attention has {' and '.join(asked)}")
    widest = max(width for _, width in pack.rectangles)
    if sliding_window is not None and sliding_window < widest:
        raise CannotPack(f"the base's attention sees {sliding_window} tokens back, and an example has {widest}")
    places = [rows * width for rows, width in pack.rectangles]
    padded = (_Padded.apply(tensor[0], pack).split(places, 1) for tensor in (query, key, value))
    grouped, found = query.shape[1] != key.shape[1], []
    for rectangle, *own in zip(pack.rectangles, *padded, strict=True):
        q, k, v = (tensor.unflatten(1, rectangle).transpose(0, 1) for tensor in own)
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        found.append(seen.transpose(1, 2).flatten(0, 1))
    whole = torch.cat(found) if len(found) > 1 else found[0]
    return _Unpadded.apply(whole, pack).unsqueeze(0), None


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


AttentionInterface.register(ATTENTION, attend)  # and no mask by this name: then transformers makes none


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
        place: of its weights in an adapter; None where adapters leave all of its layers alone.
        adapted: of each layer that adapters have, which of ``layers`` it is, and its place among all that they have.
    """

    def __init__(self, current: Current, place: int | None, adapted: list[tuple[int, int]]) -> None:
        self.current, self.place, self.adapted = current, place, adapted
        self.layers: list[PackedLinear] = []
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}

    @cached_property
    def columns(self) -> list[torch.Tensor]:
        """Of each layer that adapters have, for their masks; made for the first that has dropout."""
        own = [(place, self.layers[member].layer) for member, place in self.adapted]
        return [mask_columns(place, layer.in_features, layer.weight.device) for place, layer in own]

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

    def forget(self) -> None:
        """What a pass that broke off has left: outputs that nobody asks for hold all that was computed before them."""
        self._input, self._outputs = None, {}

    def weights(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """Of each layer, [d_out, d_in]; one after the other, so that a GPU need not hold them all dequantised."""
        return (layer.weight(dtype) for layer in self.layers)


class _AdaptedLinears(torch.autograd.Function):
    """y = x W' + b + scale * (mask * x) A' B' in each layer of a group, for one trial or one stack after the other.

    Gradients of A and B go straight to their owner's, or to their stack's.
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
        if pack.at_once:
            _multiply(flat, group.weights(x.dtype), outputs)
        else:
            weights = list(group.weights(x.dtype))
        for adapter, own, *out in zip(pack.adapters, *_shares(pack, flat, *outputs), strict=True):
            if not pack.at_once:
                _multiply(own, weights, out)
            if group.place is not None:
                inner.append(adapter.adapt(group, own, out))
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
        onward: Sequence[torch.Tensor | None] = [None] * len(pack.adapters)
        if dx is not None:
            (onward,) = _shares(pack, dx)
            if pack.at_once:
                _sum_products(dys, group.weights(x.dtype), dx)
            else:
                weights = list(group.weights(x.dtype))
        for k, (adapter, own_dx, own_x, *own_dys) in enumerate(
            zip(pack.adapters, onward, *_shares(pack, flat, *dys), strict=True)
        ):
            if own_dx is not None and not pack.at_once:
                _sum_products(own_dys, weights, own_dx)
            if group.place is not None:
                adapter.learn(group, own_x, inner[k], own_dys, own_dx)
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
    """Each of [N, d] by whose it is; ``Tensor.split`` does the same and asks more questions first."""
    return [torch.split_with_sizes(tensor, pack.tokens) for tensor in tensors]


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
