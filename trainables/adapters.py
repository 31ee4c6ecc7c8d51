"""What adapters add to a layer in a pass, and learn from it: one trial's by itself, or those of one rank together.

By itself a trial computes the same bits whoever its neighbours are. On a GPU what a pass waits for is the number of
calls: together they take as many as one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy
import torch

from trainables import lora
from trainables.lora import Target

_COLUMNS = 0x636F6C73
"""Before a layer's place, and no trial's seed: what keys its columns in dropout's masks."""

_MOST_PLACES = 1.5
"""For each that trials by themselves take: where they differ more in length, what is padded costs more than calls."""


class GroupWeights(NamedTuple):
    """An adapter's weights in the layers of one group, in the type that a pass computes in: views, made once.

    Those of K trials of one rank have K in front of every shape.
    """

    a: torch.Tensor
    """[n * r, d_in]: the A of all n layers, one below the other, since all are given the same input."""
    b_t: Sequence[torch.Tensor]
    """Of each layer its B turned over, [r, d_out]: products are slow where r is the side that lies in memory."""


def grouped(vector: torch.Tensor, layers: Sequence[Target], r: int) -> list[GroupWeights]:
    """[..., P], all weights of an adapter, as a pass sees it: of each group of layers first every A, then every B."""
    found, start = [], 0
    for group in lora.groups(layers):
        shapes = [(len(group) * r, group[0].d_in), *((r, layer.d_out) for layer in group)]
        views = []
        for shape in shapes:
            size = shape[0] * shape[1]
            views.append(vector.narrow(-1, start, size).unflatten(-1, shape))
            start += size
        found.append(GroupWeights(views[0], views[1:]))
    return found


class Layers(Protocol):
    """A group of layers that are given one input, as adapters see it."""

    place: int | None
    """Of its weights in an adapter; None where adapters leave all of its layers alone."""
    adapted: list[tuple[int, int]]
    """Of each layer that adapters have, which of the group it is, and its place among all that they have."""
    columns: Sequence[torch.Tensor]
    """Of each layer that adapters have, as ``mask_columns``."""


class Mask:
    """Which features LoRA's dropout keeps of the tokens of one trial, or of several that lie one after the other.

    No stream of draws but a hash: each token has a random word, each feature of a layer another one, and their product
    decides. Nothing but a trial's own key and its tokens' places says what is kept, a few calls do it for all trials,
    and the backward pass makes the same mask again, so that none is kept. The products of odd words are the family of
    Dietzfelbinger et al., "A Reliable Randomized Algorithm for the Closest-Pair Problem", 1997, by their upper bits.

    Args:
        tokens: of each trial.
    """

    def __init__(self, adapters: Sequence[Adapter], tokens: Sequence[int]) -> None:
        device = adapters[0].vector.device
        words = [_odd_words(adapter.key, count) for adapter, count in zip(adapters, tokens, strict=True)]
        self._words = sent(torch.from_numpy(numpy.concatenate(words)), device)[:, None]
        bounds = [min(round((1 - adapter.dropout) * 2**32), 2**32 - 1) - 2**31 for adapter in adapters]
        self._bounds: torch.Tensor | int = bounds[0]
        if len(set(bounds)) > 1:
            own = numpy.array(bounds, numpy.int32)
            self._bounds = sent(torch.from_numpy(numpy.repeat(own, tokens)), device)[:, None]

    def of(self, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[N, d_in], 1 where a feature is kept; the adapter's scale makes up for what is not.

        Args:
            columns: [d_in], the layer's.
        """
        return (self._words * columns).lt_(self._bounds).to(dtype)  # in place: a CPU is slow with one bit a byte


def mask_columns(place: int, d_in: int, device: torch.device) -> torch.Tensor:
    """[d_in], the words of a layer's features, by the layer's place among all that adapters have."""
    return torch.from_numpy(_odd_words((_COLUMNS, place), d_in)).to(device)


def _odd_words(key: Sequence[int], count: int) -> numpy.ndarray:
    """Numbers of 32 bits, as torch multiplies them, that depend on ``key`` alone."""
    return (numpy.random.default_rng(key).integers(0, 2**32, count, numpy.uint32) | 1).view(numpy.int32)


class Adapter(NamedTuple):
    """One trial's LoRA weights as a pass needs them."""

    vector: torch.Tensor
    """[P], all of its weights, in the type that passes compute in."""
    gradient: torch.Tensor | None
    """[P], where a backward pass adds to, in 32 bits; None in evaluation."""
    weights: Sequence[GroupWeights]
    gradients: Sequence[GroupWeights]
    """Of every group, views into ``vector`` and ``gradient``; the latter of no use in evaluation."""
    layers: Sequence[Target]
    r: int
    scale: float
    """By which all that it adds is multiplied; of what dropout keeps, too."""
    dropout: float
    """0 in evaluation."""
    key: Sequence[int]
    """Of dropout's masks in this pass."""
    mask: Mask | None = None
    """Where it has dropout and works by itself."""

    def alone(self, tokens: int) -> Adapter:
        """As it works by itself on so many tokens."""
        return self._replace(mask=Mask([self], [tokens])) if self.dropout else self

    def adapt(self, group: Layers, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Adds what the adapter makes of ``x``, its trial's [T, d_in], to the group's outputs.

        Returns:
            [n * r, T], the adapter's inner features, those of one layer below those of another.
        """
        assert group.place is not None
        weights, layers = self.weights[group.place], group.adapted
        if self.mask:
            inner = x.new_empty(len(weights.a), len(x))
            own = zip(group.columns, _by_layer(inner, layers), _by_layer(weights.a, layers), strict=True)
            for columns, h, a in own:
                torch.mm(a, self.mask.of(columns, x.dtype).mul_(x).t(), out=h)
        else:
            inner = torch.mm(weights.a, x.t())
        for (member, _), h, b_t in zip(layers, _by_layer(inner, layers), weights.b_t, strict=True):
            outputs[member].addmm_(h.t(), b_t, alpha=self.scale)
        return inner

    def learn(
        self,
        group: Layers,
        x: torch.Tensor,
        inner: torch.Tensor,
        dys: Sequence[torch.Tensor],
        dx: torch.Tensor | None,
    ) -> None:
        """Adds the gradients of A and B to the trial's own, and to ``dx``, where wanted, what its adapter passes on."""
        assert group.place is not None
        weights, gradients, layers = self.weights[group.place], self.gradients[group.place], group.adapted
        d_inner = torch.empty_like(inner)
        hs, dhs = _by_layer(inner, layers), _by_layer(d_inner, layers)
        for (member, _), h, dh, b_t, db_t in zip(layers, hs, dhs, weights.b_t, gradients.b_t, strict=True):
            torch.mm(b_t, dys[member].t(), out=dh)
            self._accumulate(db_t, h, dys[member])
        if not self.mask:
            self._accumulate(gradients.a, d_inner, x)
            if dx is not None:
                dx.addmm_(d_inner.t(), weights.a, alpha=self.scale)
            return
        own = zip(group.columns, dhs, _by_layer(weights.a, layers), _by_layer(gradients.a, layers), strict=True)
        for columns, dh, a, da in own:
            mask = self.mask.of(columns, x.dtype)
            self._accumulate(da, dh, x * mask)
            if dx is not None:
                dx.addcmul_(torch.mm(dh.t(), a), mask, value=self.scale)

    def _accumulate(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """``total += scale * left right``; the total is in 32 bits, the product in what the pass computes in."""
        if total.dtype is left.dtype:
            total.addmm_(left, right, alpha=self.scale)
        else:
            total.add_(torch.mm(left, right), alpha=self.scale)


class Stack:
    """K trials of one rank whose tokens lie one after the other: each product is one call for all of them.

    In these products every trial has T places, as many as the longest has tokens; what is left over holds zeros, which
    add nothing to a gradient.

    Args:
        tokens: of each trial.
    """

    def __init__(self, adapters: Sequence[Adapter], tokens: Sequence[int]) -> None:
        first = adapters[0]
        self.adapters, self.tokens = adapters, list(tokens)
        device = first.vector.device
        self.weights = grouped(torch.stack([adapter.vector for adapter in adapters]), first.layers, first.r)
        self.sums: torch.Tensor | None = None
        self.gradients: list[GroupWeights] = []
        if first.gradient is not None:
            self.sums = first.gradient.new_zeros(len(adapters), len(first.gradient))
            self.gradients = grouped(self.sums, first.layers, first.r)
        # in 32 bits whatever a pass computes in: 16 would make a trial's alpha another one here than by itself
        self.scales = sent(torch.tensor([adapter.scale for adapter in adapters]), device)[:, None, None]
        self.mask = Mask(adapters, tokens) if first.dropout else None
        self.shape = (len(adapters), max(tokens))
        self.places = _places(tokens, device) if min(tokens) < max(tokens) else None

    def adapt(self, group: Layers, x: torch.Tensor, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """As ``Adapter.adapt``, with ``x`` all trials' [N, d_in].

        Returns:
            [K, T, n * r], the inner features times each trial's scale.
        """
        assert group.place is not None
        weights, layers = self.weights[group.place], group.adapted
        if self.mask:
            mask, by_layer = self.mask, zip(group.columns, _by_layer(weights.a, layers, 1), strict=True)
            inner = torch.cat(
                [torch.bmm(self._spread(mask.of(columns, x.dtype).mul_(x)), a.mT) for columns, a in by_layer], -1
            )
        else:
            inner = torch.bmm(self._spread(x), weights.a.mT)
        inner *= self.scales
        for (member, _), h, b_t in zip(layers, _by_layer(inner, layers, 2), weights.b_t, strict=True):
            self._add(outputs[member], h, b_t)
        return inner

    def learn(
        self,
        group: Layers,
        x: torch.Tensor,
        inner: torch.Tensor,
        dys: Sequence[torch.Tensor],
        dx: torch.Tensor | None,
    ) -> None:
        """As ``Adapter.learn``; ``hand_out`` gives the gradients to their trials."""
        assert group.place is not None
        weights, gradients, layers = self.weights[group.place], self.gradients[group.place], group.adapted
        found = []
        for (member, _), h, b_t, db_t in zip(
            layers, _by_layer(inner, layers, 2), weights.b_t, gradients.b_t, strict=True
        ):
            dy = self._spread(dys[member])
            found.append(torch.bmm(dy, b_t.mT).mul_(self.scales))
            db_t += torch.bmm(h.mT, dy)
        if not self.mask:
            d_inner = torch.cat(found, -1)
            gradients.a.add_(torch.bmm(d_inner.mT, self._spread(x)))
            if dx is not None:
                self._add(dx, d_inner, weights.a)
            return
        own = zip(group.columns, found, _by_layer(weights.a, layers, 1), _by_layer(gradients.a, layers, 1), strict=True)
        for columns, dh, a, da in own:
            mask = self.mask.of(columns, x.dtype)
            da += torch.bmm(dh.mT, self._spread(x * mask))
            if dx is not None:
                dx.addcmul_(self._joined(torch.bmm(dh, a)), mask)

    def hand_out(self) -> None:
        """Adds what a backward pass found to the trials' own gradients."""
        if self.sums is not None:
            torch._foreach_add_([one.gradient for one in self.adapters if one.gradient is not None], [*self.sums])

    def _spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, d] to [K, T, d]."""
        if self.places is None:
            return tokens.unflatten(0, self.shape)
        whole = tokens.new_zeros(self.shape[0] * self.shape[1], tokens.shape[1])
        return whole.index_copy_(0, self.places, tokens).unflatten(0, self.shape)

    def _joined(self, spread: torch.Tensor) -> torch.Tensor:
        """[K, T, d] to [N, d]."""
        whole = spread.flatten(0, 1)
        return whole if self.places is None else whole.index_select(0, self.places)

    def _add(self, total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """``total += left right`` of every trial; total: [N, d]."""
        if self.places is None:
            total.unflatten(0, self.shape).baddbmm_(left, right)
        else:
            total.add_(self._joined(torch.bmm(left, right)))


def stacked(adapters: Sequence[Adapter], tokens: Sequence[int]) -> list[tuple[Adapter | Stack, int]]:
    """Neighbours of one rank and of about one length together, and how many tokens they have."""
    found: list[tuple[Adapter | Stack, int]] = []
    pairs = list(zip(adapters, tokens, strict=True))
    for _, same in itertools.groupby(pairs, key=lambda pair: _kind(pair[0])):
        members, counts = zip(*same, strict=True)
        for places in alike([1] * len(counts), counts):
            own, together = [counts[k] for k in places], [members[k] for k in places]
            found.append((Stack(together, own) if len(own) > 1 else together[0].alone(*own), sum(own)))
    return found


def stacked_bytes(layers: Sequence[Target], r: int, hidden: int, blocks: int, itemsize: int) -> tuple[float, float]:
    """What a token of a pass takes more, at most, where trials are padded to go together.

    Args:
        hidden: features of a token between a model's ``blocks``.

    Returns:
        bytes that a product needs while it lasts: of the widest layer what is spread, what comes of it, and that joined
        again; and bytes that are kept for the backward pass: query, key, value and answer of each block's attention,
        and the adapters' inner features.
    """
    product = (2 * _MOST_PLACES + 1) * max(max(layer.d_in, layer.d_out) for layer in layers)
    kept = (_MOST_PLACES - 1) * (4 * hidden * blocks + r * len(layers))
    return product * itemsize, kept * itemsize


def stacking_order(adapter: Adapter, tokens: int) -> tuple[bool, int, int]:
    """By which trials have to lie in a pass for ``stacked`` to find them beside each other."""
    return (*_kind(adapter), tokens)


def alike(rows: Sequence[int], widths: Sequence[int]) -> Iterator[list[int]]:
    """Places of neighbours that may be padded to the widest of them.

    Args:
        rows: of each neighbour, how many it has of its width.
    """
    together: list[int] = []
    for place in range(len(rows)):
        own = [*together, place]
        needed = sum(rows[k] for k in own) * max(widths[k] for k in own)
        if needed > _MOST_PLACES * sum(rows[k] * widths[k] for k in own):
            yield together
            together = []
        together.append(place)
    yield together


def _kind(adapter: Adapter) -> tuple[bool, int]:
    """What trials of one stack have in common."""
    return bool(adapter.dropout), adapter.r


def _places(tokens: Sequence[int], device: torch.device) -> torch.Tensor:
    """Of each token of trials that have T places each, one trial after the other."""
    lengths = numpy.array(tokens)
    starts = numpy.arange(len(lengths)) * lengths.max() - (lengths.cumsum() - lengths)
    return sent(torch.from_numpy(numpy.arange(lengths.sum()) + numpy.repeat(starts, lengths)), device)


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor``, of this machine's memory, on ``device``; a GPU is not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _by_layer(whole: torch.Tensor, layers: Sequence[object], dimension: int = 0) -> Sequence[torch.Tensor]:
    return (whole,) if len(layers) == 1 else whole.chunk(len(layers), dimension)
