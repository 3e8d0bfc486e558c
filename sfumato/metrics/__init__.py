"""Metrics of samples that any modality can use: feature distances, near-duplicates, cached features."""

from sfumato.metrics.distances import (
    Moments,
    density_coverage,
    frechet,
    kernel_distance,
    memorisation,
    moments,
    nearest_distances,
    precision_recall,
)
from sfumato.metrics.duplicates import NearDuplicates
from sfumato.metrics.features import (
    Extractor,
    ItemSet,
    NamedExtractor,
    Reference,
    cached_network,
    classifier_extractor,
    extract,
    random_indices,
    reference,
)

__all__ = [
    "Extractor",
    "ItemSet",
    "Moments",
    "NamedExtractor",
    "NearDuplicates",
    "Reference",
    "cached_network",
    "classifier_extractor",
    "density_coverage",
    "extract",
    "frechet",
    "kernel_distance",
    "memorisation",
    "moments",
    "nearest_distances",
    "precision_recall",
    "random_indices",
    "reference",
]
