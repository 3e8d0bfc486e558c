"""Numbers about samples, each beside what real held-out data scores."""

from sfumato.metrics.copies import Copies
from sfumato.metrics.distances import (
    Moments,
    density_coverage,
    frechet,
    kernel_distance,
    memorisation,
    moments,
    nearest,
    precision_recall,
    psnr,
    ssim,
)
from sfumato.metrics.features import (
    Extractor,
    Images,
    NamedExtractor,
    Reference,
    cached_network,
    classifier_extractor,
    extract,
    find_inception,
    inception_extractor,
    pick,
    reference,
)
from sfumato.metrics.images import Report, Samples, image_report, label_accuracy, reconstruction_report
from sfumato.metrics.plausible import plausible
from sfumato.metrics.points import measured_space
from sfumato.metrics.table import c2st, downstream, table_report
from sfumato.metrics.trees import find_trees

__all__ = [
    "Copies",
    "Extractor",
    "Images",
    "Moments",
    "NamedExtractor",
    "Reference",
    "Report",
    "Samples",
    "c2st",
    "cached_network",
    "classifier_extractor",
    "density_coverage",
    "downstream",
    "extract",
    "find_inception",
    "find_trees",
    "frechet",
    "image_report",
    "inception_extractor",
    "kernel_distance",
    "label_accuracy",
    "measured_space",
    "memorisation",
    "moments",
    "nearest",
    "pick",
    "plausible",
    "precision_recall",
    "psnr",
    "reconstruction_report",
    "reference",
    "ssim",
    "table_report",
]
