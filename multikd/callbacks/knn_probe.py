"""k-NN accuracy of the student during training: is it learning?"""

from __future__ import annotations

from multikd.callbacks.feature_probe import FeatureProbe, Labelled
from multikd.evaluation.knn import knn_predict


class KNNProbe(FeatureProbe):
    """Score the student by weighted k-NN after validation and log ``val/knn``.

    Needs ``data.bank`` (labelled images that vote) beside ``data.val`` (images that are scored).
    k = 20, cosine, temperature 0.07, as DINO and its successors evaluate.

    Args:
        k: neighbours that vote.
        temperature: of the votes' weights ``exp(cosine / temperature)``.
        every_n_epochs: in `fit`, score the validations of every n-th epoch only.
    """

    metric = "val/knn"

    def __init__(self, k: int = 20, temperature: float = 0.07, every_n_epochs: int = 1) -> None:
        if k < 1 or every_n_epochs < 1:
            raise ValueError(
                f"k and every_n_epochs must be 1 or more, received {k} and {every_n_epochs}"
            )
        super().__init__(every_n_epochs)
        self.k = k
        self.temperature = temperature

    def accuracy(self, found: Labelled) -> float:
        """Share of the queries whose neighbours vote rightly."""
        predicted = knn_predict(
            found.bank,
            found.bank_labels,
            found.queries,
            k=min(self.k, len(found.bank_labels)),
            temperature=self.temperature,
        )
        return float((predicted == found.query_labels).double().mean())
