"""Conditioners: labels to the condition `Cond` of the network. Null conditions and dropout exist only here."""

from sfumato.conditioners.labels import CONDITIONERS, ClassLabels, Conditioner, Unconditional, make_conditioner

__all__ = ["CONDITIONERS", "ClassLabels", "Conditioner", "Unconditional", "make_conditioner"]
