"""The operators that a stored program may name: pure functions of tensors and numbers, listed one by one.

A list of names, not of namespaces: `aten` also holds operators that read files or print. Whatever is not here is
refused when a model is traced, when a program is written and when one is read.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

__all__ = ["name_of", "operator_named"]

_ATEN = """
__and__ __or__ __xor__
_adaptive_avg_pool2d _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine _fft_c2c
_fft_c2r _fft_r2c _log_softmax _softmax _to_copy _unsafe_view _weight_norm abs acos acosh adaptive_avg_pool1d
adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d add addbmm addcdiv
addcmul addmm addmv addr alias all alpha_dropout amax amin aminmax angle any arange argmax argmin argsort as_strided
asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bilinear binary_cross_entropy
bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bmm broadcast_tensors
broadcast_to bucketize cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im complex
concat concatenate conj conj_physical constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution copy cos cosh cosine_similarity cross cummax cummin cumprod cumsum
deg2rad detach diag diag_embed diagonal diff div divide dot dropout dsplit einsum elu embedding embedding_bag eq erf
erfc exp exp2 expand expand_as expm1 eye fake_quantize_per_channel_affine fake_quantize_per_tensor_affine
fake_quantize_per_tensor_affine_cachemask feature_alpha_dropout feature_dropout fft_fft fft_fft2 fft_ifft fft_irfft
fft_irfft2 fft_rfft fft_rfft2 fill flatten flip fliplr flipud floor floor_divide fmax fmin fmod frac full full_like
gather ge gelu glu greater greater_equal group_norm gru gt hann_window hardshrink hardsigmoid hardswish hardtanh
hstack hypot im2col imag index index_add index_copy index_fill index_put index_select instance_norm inverse isfinite
isinf isnan kron layer_norm le leaky_relu lerp less less_equal lgamma lift_fresh_copy linalg_inv linalg_norm
linalg_vector_norm linear log log10 log1p log2 log_sigmoid log_softmax logaddexp logical_and logical_not logical_or
logical_xor logit logsumexp lstm lt masked_fill masked_scatter masked_select matmul matrix_exp max max_pool1d
max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices maximum mean median meshgrid min minimum mish mm
moveaxis movedim mul multiply mv nan_to_num narrow native_group_norm native_layer_norm ne neg negative new_full
new_ones new_zeros nonzero norm not_equal numpy_T one_hot ones ones_like outer pad pairwise_distance permute
pixel_shuffle pixel_unshuffle polar pow prelu prod quantile rad2deg ravel real reciprocal reflection_pad1d
reflection_pad2d reflection_pad3d relu relu6 remainder renorm repeat repeat_interleave replication_pad1d
replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm rnn_relu rnn_tanh roll rot90
round rrelu rsqrt rsub scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted
select select_scatter selu sgn sigmoid sign silu sin sinc sinh slice slice_scatter softmax softplus softshrink sort
split split_with_sizes sqrt square squeeze stack std std_mean stft sub subtract sum swapaxes swapdims sym_numel
sym_size sym_storage_offset sym_stride t take take_along_dim tan tanh tensor_split tensordot threshold tile to topk
trace transpose trapezoid tril tril_indices triu triu_indices true_divide trunc type_as unbind unflatten unfold
unsafe_chunk unsafe_split unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d
upsample_nearest2d upsample_nearest3d upsample_trilinear3d var var_mean vdot view view_as view_as_complex view_as_real
vsplit where xlogy zeros zeros_like
"""
_QUANTIZED = """
quantize_per_tensor dequantize_per_tensor quantize_per_channel dequantize_per_channel quantize_per_token
dequantize_per_token quantize_per_channel_group dequantize_per_channel_group
"""
_OPERATOR = "getitem add sub mul floordiv truediv mod neg abs eq ne lt le gt ge and_ or_ not_"
_TORCH = "sym_max sym_min sym_float sym_int sym_not sym_ite sym_sqrt"

ATEN = frozenset(_ATEN.split())
QUANTIZED = frozenset(_QUANTIZED.split())
PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _OPERATOR.split()},
    **{f"torch.{name}": getattr(torch, name) for name in _TORCH.split() if hasattr(torch, name)},
}
_NAMES = {function: name for name, function in PYTHON.items()}


def name_of(target: Any) -> str | None:
    """The name under which an operator is stored ("aten.add.Tensor", "operator.getitem"), None if not on the list."""
    if not isinstance(target, OpOverload):
        return _NAMES.get(target) if callable(target) else None
    name = str(target)
    return name if operator_named(name) is target else None


def operator_named(name: str) -> Callable[..., Any] | None:
    """The operator of a name on the list, None for every other name; nothing that is not listed is even looked up."""
    if name in PYTHON:
        return PYTHON[name]
    parts = name.split(".")
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        return None
    namespace, packet_name, overload = parts
    allowed = {"aten": ATEN, "quantized_decomposed": QUANTIZED}.get(namespace, frozenset())
    if packet_name not in allowed:
        return None
    if namespace == "quantized_decomposed":
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the namespace
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    found = getattr(packet, overload, None) if isinstance(packet, OpOverloadPacket) else None
    pure = isinstance(found, OpOverload) and not found._schema.is_mutable
    return found if pure else None
