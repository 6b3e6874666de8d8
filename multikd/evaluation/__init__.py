"""Scores of frozen encoders: features out of a loader, probes on top, and how sure they are."""

from multikd.evaluation.extract import ExtractedFeatures, extract_features
from multikd.evaluation.few_labels import FewLabels
from multikd.evaluation.few_shot import FewShot
from multikd.evaluation.intervals import (
    Accuracy,
    PairedInterval,
    accuracy_interval,
    paired_interval,
)
from multikd.evaluation.knn import Neighbours, knn_predict, knn_scores, nearest_neighbours
from multikd.evaluation.knn_task import KNN
from multikd.evaluation.linear import LogisticFit, logistic_regression
from multikd.evaluation.linear_task import LinearProbe, MultiLabelProbe

__all__ = [
    "KNN",
    "Accuracy",
    "ExtractedFeatures",
    "FewLabels",
    "FewShot",
    "LinearProbe",
    "LogisticFit",
    "MultiLabelProbe",
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
