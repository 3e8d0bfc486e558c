"""Conditioners: what is known of an item -> what the network is told. Null conditions and dropout live only here."""

from sfumato.conditioners.base import CONDITIONERS, ClassLabels, Conditioner, Unconditional, make_conditioner

__all__ = ["CONDITIONERS", "ClassLabels", "Conditioner", "Unconditional", "make_conditioner"]
