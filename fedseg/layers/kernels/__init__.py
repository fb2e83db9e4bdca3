"""Compiled operators, built on first use."""

from fedseg.layers.kernels.exported import bi_wkv_plain as bi_wkv

__all__ = ["bi_wkv"]
