"""Attention of many responses to one prompt and to themselves, without a mask and without copies of the prompt.

A response's token attends to P prompt tokens, all of which it sees, and to its own response up to itself. The softmax
over both is put together from the two parts: with o and l the output and the log-sum-exp of each part,

    l = log(exp(l_prompt) + exp(l_own))        o = exp(l_prompt - l) o_prompt + exp(l_own - l) o_own

The kernels' backward passes rebuild the probabilities as exp(score - l) and take the rest from the output, so with the
merged o and l each gives the exact gradients of its part. On the CPU the parts are torch's flash kernels; elsewhere the
same attention is one call with a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

if TYPE_CHECKING:
    from learner.packed_attention import RowBucket

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def shared_prefix_attention(
    query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, prompt_key_HPD: Tensor, prompt_value_HPD: Tensor,
    responses: RowBucket, scaling: float | None,
) -> Tensor:  # fmt: skip
    """[tokens, heads, D] for the response tokens, which `responses` lays out; keys and values may have fewer heads."""
    scale = query_HTD.shape[-1] ** -0.5 if scaling is None else scaling
    if query_HTD.device.type == "cpu":
        return _SharedPrefix.apply(query_HTD, key_HTD, value_HTD, prompt_key_HPD, prompt_value_HPD, responses, scale)
    return masked_shared_prefix_attention(
        query_HTD, key_HTD, value_HTD, prompt_key_HPD, prompt_value_HPD, responses, scale
    )


def masked_shared_prefix_attention(
    query_HTD: Tensor, key_HTD: Tensor, value_HTD: Tensor, prompt_key_HPD: Tensor, prompt_value_HPD: Tensor,
    responses: RowBucket, scale: float,
) -> Tensor:  # fmt: skip
    """The same by a batch of responses, each with the prompt's keys and values before its own, and a mask."""
    rows, longest, prompt = responses.rows, responses.longest, prompt_key_HPD.shape[1]
    keys, values = (
        torch.cat([shared.expand(rows, -1, -1, -1), responses.padded(own)], dim=2)
        for shared, own in ((prompt_key_HPD, key_HTD), (prompt_value_HPD, value_HTD))
    )
    mask = torch.ones(longest, longest, dtype=torch.bool, device=query_HTD.device).tril()
    attended = scaled_dot_product_attention(
        responses.padded(query_HTD), keys, values, attn_mask=pad(mask, (prompt, 0), value=True), scale=scale,
        enable_gqa=query_HTD.shape[0] != key_HTD.shape[0],
    )  # fmt: skip
    return responses.flat(attended)


class _SharedPrefix(torch.autograd.Function):
    """Both parts by the flash kernels, merged. Axes: H query heads, G key heads, T response tokens, P prompt tokens."""

    @staticmethod
    def forward(
        ctx: Any, query_HTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, prompt_key_GPD: Tensor,
        prompt_value_GPD: Tensor, responses: RowBucket, scale: float,
    ) -> Tensor:  # fmt: skip
        heads, groups = query_HTD.shape[0], key_GTD.shape[0]
        prompt_out, prompt_sum = _flash(
            _by_key_head(query_HTD, groups), prompt_key_GPD[None], prompt_value_GPD[None], 0.0, False, scale=scale
        )
        own_out, own_sum = _flash(
            responses.padded(query_HTD), *(_repeated(responses.padded(own), heads) for own in (key_GTD, value_GTD)),
            0.0, True, scale=scale,
        )  # fmt: skip
        prompt_out_HTD, prompt_sum_HT = prompt_out.reshape(query_HTD.shape), prompt_sum.reshape(query_HTD.shape[:2])
        own_out_HTD = responses.flat(own_out).transpose(0, 1)
        own_sum_HT = responses.flat(own_sum[..., None])[..., 0].transpose(0, 1)
        sum_HT = torch.logaddexp(prompt_sum_HT, own_sum_HT)
        out_HTD = own_out_HTD * (own_sum_HT - sum_HT).exp()[..., None].to(own_out.dtype)
        out_HTD += prompt_out_HTD * (prompt_sum_HT - sum_HT).exp()[..., None].to(own_out.dtype)
        ctx.save_for_backward(query_HTD, key_GTD, value_GTD, prompt_key_GPD, prompt_value_GPD, out_HTD, sum_HT)
        ctx.responses, ctx.scale = responses, scale
        return out_HTD.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_HTD, key_GTD, value_GTD, prompt_key_GPD, prompt_value_GPD, out_HTD, sum_HT = ctx.saved_tensors
        responses, scale = ctx.responses, ctx.scale
        heads, groups = query_HTD.shape[0], key_GTD.shape[0]
        gradient_HTD = gradients[0].transpose(0, 1)
        query, key, value = _flash_backward(
            _by_key_head(gradient_HTD, groups), _by_key_head(query_HTD, groups), prompt_key_GPD[None],
            prompt_value_GPD[None], _by_key_head(out_HTD, groups), sum_HT.reshape(1, groups, -1), 0.0, False,
            scale=scale,
        )  # fmt: skip
        # In padding the gradient is zero and the log-sum-exp infinite: its probabilities are zero.
        own_query, own_key, own_value = _flash_backward(
            _zero_padded(gradient_HTD, responses), responses.padded(query_HTD),
            *(_repeated(responses.padded(own), heads) for own in (key_GTD, value_GTD)),
            _zero_padded(out_HTD, responses), _zero_padded(sum_HT[..., None], responses, float("inf"))[..., 0], 0.0,
            True, scale=scale,
        )  # fmt: skip
        query_gradient = query.reshape(query_HTD.shape) + responses.flat(own_query).transpose(0, 1)
        own = [responses.flat(_summed(states, groups)).transpose(0, 1) for states in (own_key, own_value)]
        return query_gradient, *own, key[0], value[0], None, None


def _by_key_head(states_HTD: Tensor, groups: int) -> Tensor:
    """[1, G, H / G x T, D]: the query heads of a key head one after the other, as so many queries."""
    return states_HTD.reshape(1, groups, -1, states_HTD.shape[-1])


def _repeated(states_RGLD: Tensor, heads: int) -> Tensor:
    """[R, H, L, D]: every key head as often as it has query heads."""
    groups = states_RGLD.shape[1]
    return states_RGLD if groups == heads else states_RGLD.repeat_interleave(heads // groups, dim=1)


def _summed(states_RHLD: Tensor, groups: int) -> Tensor:
    """[R, G, L, D]: the sum over the query heads of each key head."""
    rows, heads, longest, size = states_RHLD.shape
    return states_RHLD if groups == heads else states_RHLD.reshape(rows, groups, -1, longest, size).sum(dim=2)


def _zero_padded(states_HTD: Tensor, responses: RowBucket, padding: float = 0.0) -> Tensor:
    """[R, H, L, D] with a constant in padding."""
    if responses.keep is None:
        return responses.padded(states_HTD)
    heads, _, size = states_HTD.shape
    filled = states_HTD.new_full((responses.rows * responses.longest, heads, size), padding)
    filled[responses.keep] = states_HTD.transpose(0, 1)
    return filled.reshape(responses.rows, responses.longest, heads, size).transpose(1, 2)
