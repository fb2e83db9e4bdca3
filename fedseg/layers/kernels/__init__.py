"""Bi-WKV, the linear attention of RWKV networks on images, in several implementations of one definition.

Sources: Duan et al., "Vision-RWKV", arXiv 2403.02308; Jiang et al., "RWKV-UNet", arXiv 2501.08458. For each batch and
channel, with `w = decay / T` and `u = first / T`, T the number of tokens,

            sum_{i != t} exp(k_i - w (|t-i| - 1)) v_i  +  exp(k_t + u) v_t
    y_t  =  --------------------------------------------------------------
            sum_{i != t} exp(k_i - w (|t-i| - 1))      +  exp(k_t + u)

The published CUDA kernels compute something else: their weights are off by a factor of `exp(-w)` here and there, and they
take at most 1024 tokens. This is the published equation, for any number of tokens, on any device.

Time and memory are linear in tokens. One shift per batch and channel, by the largest key, is enough against overflow: each
sum runs over all tokens, and the decay over the whole sequence is only `decay`.
"""

from fedseg.layers.kernels.choice import IMPLEMENTATIONS, chosen, use_implementation
from fedseg.layers.kernels.operator import bi_wkv

__all__ = ["IMPLEMENTATIONS", "bi_wkv", "chosen", "use_implementation"]
