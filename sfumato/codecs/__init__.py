"""Codecs: data to latents of zero mean and unit variance, and back."""

from sfumato.codecs.base import Codec

__all__ = ["Codec"]
