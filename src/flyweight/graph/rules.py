"""Which rule an operator follows; where there is none, what comes in stays whole, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from flyweight.graph import rules_layers, rules_products, rules_values
from flyweight.graph.calls import Call, Result

__all__ = ["FUNCTIONS", "MODULES"]

POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Softplus, nn.Mish, nn.Hardsigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
UNARY = """
abs acos acosh alias alpha_dropout asin asinh atan atanh ceil celu clamp clamp_max clamp_min clip clone contiguous cos
cosh deg2rad detach dropout elu erf erfc exp exp2 expm1 feature_alpha_dropout feature_dropout floor frac gelu hardshrink
hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lift_fresh_copy log log10 log1p log2 log_sigmoid
logical_not logit mish nan_to_num neg negative pow rad2deg reciprocal relu relu6 round rrelu rsqrt selu sgn sigmoid sign
silu sin sinh softplus softshrink sqrt square tan tanh threshold to _to_copy trunc type_as zeros_like ones_like full_like
bitwise_not fill
"""
ELEMENTWISE = """
add sub mul div rsub subtract multiply divide true_divide floor_divide maximum minimum fmax fmin pow where masked_fill
lerp addcmul addcdiv eq ne lt le gt ge less greater less_equal greater_equal not_equal logical_and logical_or logical_xor
bitwise_and bitwise_or bitwise_xor atan2 fmod remainder logaddexp hypot xlogy
"""
MOVED = """
view reshape _unsafe_view flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis unsqueeze squeeze
expand expand_as broadcast_to repeat tile repeat_interleave split split_with_sizes unsafe_split chunk unsafe_chunk
unbind narrow pixel_shuffle pixel_unshuffle flip view_as reshape_as numpy_T ravel
"""
REDUCED = "mean sum amax amin max min argmax argmin var std median logsumexp prod any all norm linalg_vector_norm count_nonzero"
ALONG = "softmax log_softmax _softmax _log_softmax cumsum cumprod sort argsort"
POOLS = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
max_pool3d_with_indices _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
"""
PADS = """
constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d
"""

Rule = Callable[[Call], Result]
MODULES: Mapping[type[nn.Module], Rule] = {
    **dict.fromkeys(POINTWISE_MODULES, rules_values.unary),
    **dict.fromkeys(POOL_MODULES, rules_values.spatial),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), rules_layers.channel_norm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), rules_layers.convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), rules_layers.transposed),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), rules_values.along),
    nn.Linear: rules_layers.linear,
    nn.Embedding: rules_layers.embedding,
    nn.GroupNorm: rules_layers.group_norm,
    nn.LayerNorm: rules_layers.layer_norm,
    nn.Flatten: rules_values.flatten,
}
FUNCTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY.split(), rules_values.unary),
    **dict.fromkeys(ELEMENTWISE.split(), rules_values.elementwise),
    **dict.fromkeys(MOVED.split(), rules_values.moved),
    **dict.fromkeys(REDUCED.split(), rules_values.reduced),
    **dict.fromkeys(ALONG.split(), rules_values.along),
    **dict.fromkeys(POOLS.split(), rules_values.spatial),
    **dict.fromkeys(PADS.split(), rules_values.padded),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), rules_values.joined),
    **dict.fromkeys(("matmul", "bmm"), rules_products.matmul),
    **dict.fromkeys(("slice", "select", "roll", "index_select"), rules_values.picked),
    "channel_shuffle": rules_values.shuffled,
    "glu": rules_values.glu,
    "layer_norm": rules_layers.layer_norm,
    "instance_norm": rules_layers.instance_norm,
    "prelu": rules_layers.prelu,
    "scaled_dot_product_attention": rules_products.attention,
    "einsum": rules_products.einsum,
}
