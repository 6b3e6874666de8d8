"""Scores of frozen encoders: features out of a loader, probes on top, and how sure they are."""

from multikd.evaluation.extract import ExtractedFeatures, extract_features
from multikd.evaluation.intervals import (
    Accuracy,
    PairedInterval,
    accuracy_interval,
    paired_interval,
)
from multikd.evaluation.knn import Neighbours, knn_predict, knn_scores, nearest_neighbours
from multikd.evaluation.linear import LogisticFit, logistic_regression

__all__ = [
    "Accuracy",
    "ExtractedFeatures",
    "LogisticFit",
    "Neighbours",
    "PairedInterval",
    "accuracy_interval",
    "extract_features",
    "knn_predict",
    "knn_scores",
    "logistic_regression",
    "nearest_neighbours",
    "paired_interval",
]
