"""Codecs: data to latents of zero mean and unit variance, and back."""

from sfumato.codecs.base import Codec
from sfumato.codecs.image import ImageCodec
from sfumato.codecs.table import TableCodec

__all__ = ["Codec", "ImageCodec", "TableCodec"]
