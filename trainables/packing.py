"""How the examples of several trials lie in one forward pass: end to end, no padding, each trial's tokens together.

Whatever mixes tokens or features works on one trial's tokens at a time, in shapes that its own examples give. That is
why a trial computes the same bits whoever its neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from trainables import lora
from trainables.lora import Pair

ATTENTION = "winnow_packed"
"""The name under which transformers knows ``attend``."""


class LayerWeights(NamedTuple):
    """One layer of an adapter in the type that a pass computes in: views, made once a trial, since each costs time."""

    a: torch.Tensor
    """[r, d_in]"""
    b: torch.Tensor
    """[d_out, r]"""
    a_t: torch.Tensor
    b_t: torch.Tensor


class Adapter(NamedTuple):
    """One trial's LoRA weights as a pass needs them, in the order of the packed layers."""

    weights: Sequence[LayerWeights]
    gradients: Sequence[Pair] | None
    """Where the backward pass adds to; None in evaluation."""
    scale: float
    dropout: float
    key: tuple[int, ...]
    """Of the dropout masks: seed, step and micro-batch."""


@dataclass(frozen=True)
class Part:
    """One trial's tokens in a pass: ``start`` to ``end`` of all, in ``rows`` examples of at most ``width`` tokens."""

    adapter: Adapter
    start: int
    end: int
    rows: int
    width: int
    gather: torch.Tensor
    """[rows * width], the token that stands at each place of the padded rectangle; padding repeats the first."""
    scatter: torch.Tensor
    """[end - start], the place of each token in that rectangle."""
    predicting: torch.Tensor
    """[M], the tokens (of the part) whose next token is learned."""
    next_ids: torch.Tensor
    """[M], those next tokens."""


@dataclass(frozen=True)
class Pack:
    """One forward pass over N tokens."""

    input_ids: torch.Tensor
    """[N]"""
    positions: torch.Tensor
    """[N], each example from 0."""
    parts: tuple[Part, ...]
    sizes: list[int]
    """Tokens of each part."""
    anchor: torch.Tensor
    """Of no size; requires a gradient where the pass learns, so that autograd records it from the first adapter on."""


class Example(NamedTuple):
    input_ids: torch.Tensor
    """[T]"""
    labels: torch.Tensor
    """[T], -100 where nothing is learned."""


def pack(batches: Sequence[tuple[Adapter, Sequence[Example]]], device: torch.device) -> Pack:
    """Lay out one batch of examples for each of several adapters."""
    parts, start = [], 0
    for adapter, examples in batches:
        parts.append(_part(adapter, examples, start, device))
        start = parts[-1].end
    rows = [example for _, examples in batches for example in examples]
    return Pack(
        torch.cat([row.input_ids for row in rows]).to(device),
        torch.cat([torch.arange(len(row.input_ids)) for row in rows]).to(device),
        tuple(parts),
        [part.end - part.start for part in parts],
        torch.empty(0, requires_grad=any(part.adapter.gradients for part in parts)),
    )


def _part(adapter: Adapter, examples: Sequence[Example], start: int, device: torch.device) -> Part:
    lengths = torch.tensor([len(example.input_ids) for example in examples])
    tokens, width = int(lengths.sum()), int(lengths.max())
    real = (torch.arange(width) < lengths[:, None]).flatten()
    scatter = real.nonzero().flatten()
    gather = torch.zeros(len(examples) * width, dtype=torch.long)
    gather[scatter] = torch.arange(tokens)
    following = torch.cat([functional.pad(example.labels[1:], (0, 1), value=-100) for example in examples])
    predicting = (following != -100).nonzero().flatten()
    return Part(
        adapter,
        start,
        start + tokens,
        len(examples),
        width,
        gather.to(device),
        scatter.to(device),
        predicting.to(device),
        following[predicting].to(device),
    )


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
    found = []
    for part, *own in zip(pack.parts, *(tensor[0].split(pack.sizes, 1) for tensor in (query, key, value)), strict=True):
        q, k, v = (_Rectangle.apply(tensor, part) for tensor in own)
        grouped = q.shape[1] != k.shape[1]
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        found.append(_Tokens.apply(seen, part))
    return torch.cat(found).unsqueeze(0), None


class _Rectangle(torch.autograd.Function):
    """[H, T, D] to the part's [rows, H, width, D]. Its gradient is a gather too, where autograd's would add rows up."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, part: Part) -> torch.Tensor:
        ctx.part = part
        return tokens.index_select(1, part.gather).unflatten(1, (part.rows, part.width)).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        return outer[0].transpose(0, 1).flatten(1, 2).index_select(1, ctx.part.scatter), None


class _Tokens(torch.autograd.Function):
    """The part's [rows, H, width, D] to [T, H, D]."""

    @staticmethod
    def forward(ctx: Any, rectangle: torch.Tensor, part: Part) -> torch.Tensor:
        ctx.part = part
        return rectangle.transpose(1, 2).flatten(0, 1).index_select(0, part.scatter)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None]:
        part, tokens = ctx.part, outer[0]
        padded = tokens.new_zeros(part.rows * part.width, *tokens.shape[1:]).index_copy_(0, part.scatter, tokens)
        return padded.unflatten(0, (part.rows, part.width)).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)


@dataclass
class Current:
    """The pack that is passing; all layers of an engine look here for it."""

    pack: Pack | None = None


class PackedLinear(torch.nn.Module):
    """A frozen linear layer, 4-bit or not, with every adapter of the current pack.

    Args:
        place: of its pair among an adapter's; None for a layer that adapters leave alone.
        at_once: multiply the frozen weight with all trials' tokens in one call: fewer launches on a GPU, but then the
            last bits of a trial may depend on how many tokens its neighbours have.
    """

    def __init__(self, layer: torch.nn.Linear, place: int | None, current: Current, at_once: bool = False) -> None:
        super().__init__()
        self.layer, self.place, self.current, self.at_once = layer, place, current, at_once
        self.dequantisations = 0
        self.keeps = False
        self._kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, N, d_in], to [1, N, d_out]."""
        pack = self.current.pack
        assert pack is not None
        return _AdaptedLinear.apply(x, pack.anchor, self, pack)  # type: ignore[no-any-return]

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


class _AdaptedLinear(torch.autograd.Function):
    """y = x W' + b + scale * drop(x) A' B', trial by trial; gradients of A and B go straight to their owner's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004  has autograd record a layer whose input needs no gradient
        linear: PackedLinear,
        pack: Pack,
    ) -> torch.Tensor:
        flat, across = x[0], linear.weight(x.dtype).t()
        y, low_rank = flat.new_empty(len(flat), across.shape[1]), []
        if linear.at_once:
            torch.mm(flat, across, out=y)
        for part, own, out in zip(pack.parts, *_shares(pack, flat, y), strict=True):
            if not linear.at_once:
                torch.mm(own, across, out=out)
            if linear.place is not None:
                layer = part.adapter.weights[linear.place]
                low_rank.append(torch.mm(_dropped(own, part, linear.place), layer.a_t))
                out.addmm_(low_rank[-1], layer.b_t, alpha=part.adapter.scale)
        if linear.layer.bias is not None:
            y += linear.layer.bias
        ctx.save_for_backward(x, *low_rank)
        ctx.linear, ctx.pack = linear, pack
        return y.unsqueeze(0)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        linear, pack, (x, *low_rank) = ctx.linear, ctx.pack, ctx.saved_tensors
        flat, dy = x[0], outer[0][0]
        dx = torch.empty_like(flat) if ctx.needs_input_grad[0] else None
        onward: Sequence[torch.Tensor | None] = [None] * len(pack.parts)
        if dx is not None:
            weight, (onward,) = linear.weight(x.dtype), _shares(pack, dx)
            if linear.at_once:
                torch.mm(dy, weight, out=dx)
        own = _shares(pack, flat, dy)
        for k, (part, own_x, own_dy, own_dx) in enumerate(zip(pack.parts, *own, onward, strict=True)):
            if own_dx is not None and not linear.at_once:
                torch.mm(own_dy, weight, out=own_dx)
            if linear.place is not None:
                _adapter_gradients(part, linear.place, own_x, low_rank[k], own_dy, own_dx)
        return dx.unsqueeze(0) if dx is not None else None, None, None, None


def _shares(pack: Pack, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Each of [N, d] by trial; ``Tensor.split`` does the same and asks more questions first."""
    return [torch.split_with_sizes(tensor, pack.sizes) for tensor in tensors]


def _adapter_gradients(
    part: Part, place: int, x: torch.Tensor, h: torch.Tensor, dy: torch.Tensor, dx: torch.Tensor | None
) -> None:
    """Adds one trial's gradients of A and B to its own, and what its adapter passes on to ``dx``, where it is wanted.

    Args:
        h: [T, r], the adapter's inner features from the forward pass.
    """
    adapter = part.adapter
    assert adapter.gradients is not None
    layer, (da, db), scale = adapter.weights[place], adapter.gradients[place], adapter.scale
    dh = torch.mm(dy, layer.b)
    _accumulate(db, dy.t(), h, scale)
    _accumulate(da, dh.t(), _dropped(x, part, place), scale)
    if dx is None:
        return
    if adapter.dropout:
        dx.addcmul_(torch.mm(dh, layer.a), _mask(x, part, place), value=scale)
    else:
        dx.addmm_(dh, layer.a, alpha=scale)


def _accumulate(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """``total += scale * left right``; the total is in 32 bits, the product in what the pass computes in."""
    if total.dtype is left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:
        total.add_(torch.mm(left, right), alpha=scale)


def _dropped(x: torch.Tensor, part: Part, place: int) -> torch.Tensor:
    """The adapter's input: with LoRA's dropout in training, as it is in evaluation."""
    return x * _mask(x, part, place) if part.adapter.dropout and part.adapter.gradients else x


def _mask(x: torch.Tensor, part: Part, place: int) -> torch.Tensor:
    """Drawn again in the backward pass rather than kept: its key gives the same one."""
    keep = 1 - part.adapter.dropout
    drawn = torch.rand(x.shape, generator=lora.generator(x.device, *part.adapter.key, place), device=x.device)
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
