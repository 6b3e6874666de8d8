"""Response distillation: the student's class probabilities follow those of an ensemble.

Hinton, Vinyals & Dean 2015 (arXiv 1503.02531); decoupled: Zhao et al. 2022 (arXiv 2203.08679).
Shapes: B images, K classes, T teachers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multikd.functional import full_precision, in_own_dtype, where_images, without_autocast
from multikd.losses.classes import ClassMap, read_class_map
from multikd.losses.term import Targets, TeacherTerm, chosen_teachers, nothing, nothing_of
from multikd.types import Batch, StudentOutput, TokenFeatures

if TYPE_CHECKING:
    from multikd.students import StudentEncoder
    from multikd.teachers import Teacher


class ResponseTerm(TeacherTerm):
    """``α·τ²·KL(p ‖ softmax(z_s/τ)) + (1−α)·CE(z_s, label)``, ``p = Σ w_t·softmax(z_t/(τ·T_t))``.

    Labels enter here through ``alpha``, as in the paper; an image without one has the first part
    alone. (``LabelLoss`` beside a term with ``alpha: 1`` is the same sum with weights of one's
    own, and has smoothing and robust losses.) Weights of teachers that did not run in a step are
    shared out among the others.

    Where label spaces differ, a teacher has a file that maps its classes to the student's
    (``ClassMap``), or the student gets a second classifier on its summary, which learns that
    teacher's classes and is not exported (``own_heads``).

    Args:
        weight: of this term.
        temperature: τ of both sides, above 0.
        alpha: share of the teachers, in [0, 1]; 1 reads no labels.
        teachers: teacher → weight, at least 0; null: all teachers with weight 1.
        temperatures: teacher → T_t, which calibrates its logits (`multikd teachers calibrate`).
        decoupled: split the divergence in that of the label's class against the rest, and that
            among the rest, with weights of their own. An image without a label is split at the
            ensemble's most probable class.
        target_weight: of the first part (α of the paper), with ``decoupled``.
        nontarget_weight: of the second (β of the paper), with ``decoupled``.
        mappings: teacher → file that maps its classes to the student's.
        own_heads: teachers whose classes the student learns with a classifier of their own.

    Raises:
        ValueError: a temperature that is not above 0, a share or weight out of range.
    """

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 4.0,
        alpha: float = 1.0,
        teachers: dict[str, float] | None = None,
        temperatures: dict[str, float] | None = None,
        decoupled: bool = False,
        target_weight: float = 1.0,
        nontarget_weight: float = 8.0,
        mappings: dict[str, str] | None = None,
        own_heads: list[str] | None = None,
    ) -> None:
        super().__init__(weight)
        check_temperature("temperature", temperature)
        for name, value in (temperatures or {}).items():
            check_temperature(f"the temperature of teacher {name!r}", value)
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(
                f"alpha is the teachers' share and must be in [0, 1], received {alpha}"
            )
        weights = dict(teachers or {})
        if any(not 0.0 <= w < float("inf") for w in weights.values()) or (
            weights and sum(weights.values()) <= 0
        ):
            raise ValueError(
                f"the weights of teachers must be 0 or more and not all 0, received {weights}"
            )
        if any(not 0.0 <= w < float("inf") for w in (target_weight, nontarget_weight)):
            raise ValueError(
                "target_weight and nontarget_weight must be 0 or more and finite, received "
                f"{target_weight} and {nontarget_weight}"
            )
        self.temperature = temperature
        self.alpha = alpha
        self.weights = weights if teachers is not None else None
        self.temperatures = dict(temperatures or {})
        self.decoupled = decoupled
        self.target_weight = target_weight
        self.nontarget_weight = nontarget_weight
        self.mappings = dict(mappings or {})
        self.own_heads = tuple(own_heads or ())
        self.names: tuple[str, ...] = ()
        self.maps = nn.ModuleDict()
        self.heads = nn.ModuleDict()

    def bind(self, name: str, student: StudentEncoder, teachers: Mapping[str, Teacher]) -> None:
        """See ``Term``.

        Raises:
            ValueError: a teacher without logits, or one of other classes than the student without
                a mapping or a head of its own.
        """
        self.names = chosen_teachers(name, self.weights, teachers)
        if self.weights is None:
            self.weights = dict.fromkeys(self.names, 1.0)
        for setting in (self.temperatures, self.mappings, self.own_heads):
            chosen_teachers(name, [*setting, *self.names], dict.fromkeys(self.names))
        shared = [n for n in self.names if n not in self.own_heads]
        self.uses_logits = bool(shared) or self.alpha < 1
        for teacher in self.names:
            classes = teachers[teacher].num_classes
            if not classes:
                raise ValueError(
                    f"term {name!r} compares class probabilities, and teacher {teacher!r} "
                    f"({teachers[teacher].spec.name}) has no classifier: fit one with `multikd "
                    "teachers fit-head` and set the teacher's head to its file, or name the "
                    f"teachers that have one in model.terms.{name}.teachers"
                )
            if teacher in self.own_heads:
                width = student.feature_widths.summary
                if width is None:
                    raise ValueError(
                        f"term {name!r} puts a classifier for teacher {teacher!r} on the student's "
                        f"summary, and {student.spec.name} has none: use mappings"
                    )
                self.heads[teacher] = nn.Linear(width, classes)
            elif teacher in self.mappings:
                if student.num_classes:
                    self.maps[teacher] = read_class_map(
                        self.mappings[teacher], classes, student.num_classes
                    )
            elif student.num_classes and classes != student.num_classes:
                raise ValueError(
                    f"teacher {teacher!r} has {classes} classes and the student "
                    f"{student.num_classes}: give term {name!r} a file that maps them "
                    f"(mappings: {{{teacher}: FILE}}), or a classifier for this teacher "
                    f"(own_heads: [{teacher}])"
                )

    def reads(self, output: StudentOutput) -> list[Tensor]:
        """See ``Term``."""
        final = output.features
        parts = [final.logits if self.uses_logits else None]
        parts += [final.summary if self.heads else None]
        return [part for part in parts if part is not None]

    @property
    def reads_labels(self) -> bool:
        """See ``Term``."""
        return self.alpha < 1

    @property
    def logits_of(self) -> tuple[str, ...]:
        """See ``Term``."""
        return self.names

    def forward(
        self, output: StudentOutput, batch: Batch, targets: Targets | None = None
    ) -> Tensor:
        """See ``TeacherTerm``.

        Raises:
            ValueError: if the student has no classifier, or a teacher gave no logits.
        """
        found = dict(targets or {})
        features = output.features
        present = [name for name in self.names if name in found]
        weights = cast(dict[str, float], self.weights)
        total = sum(weights[name] for name in present)
        read = [features.logits] if self.uses_logits else []
        read += [features.summary] if self.heads else []
        inputs = [tensor for tensor in read if tensor is not None]
        if not inputs or len(inputs) < len(read):
            raise ValueError(
                "ResponseTerm needs class logits, but the student has no classifier: "
                "set student.init_args.num_classes to the number of classes"
            )
        with without_autocast(inputs[0].device):
            loss = nothing(*(full_precision(tensor) for tensor in inputs))
            if self.heads:
                loss = loss + nothing_of(self.heads, loss)
            shared = [n for n in present if n not in self.own_heads and weights[n] > 0]
            if shared:
                student = full_precision(cast(Tensor, features.logits))
                p = ensemble_probabilities(
                    [self.calibrated(n, found[n]) for n in shared],
                    [weights[n] for n in shared],
                    self.temperature,
                )
                share = sum(weights[n] for n in shared) / total
                loss = loss + share * self.divergence(p, student, batch.labels)
            for name in present:
                if name in self.own_heads and weights[name] > 0:
                    p = ensemble_probabilities(
                        [self.calibrated(name, found[name])], [1.0], self.temperature
                    )
                    head = cast(nn.Linear, self.heads[name])
                    logits = in_own_dtype(head, cast(Tensor, features.summary))
                    none = torch.full_like(batch.labels, -1)  # labels are of other classes
                    loss = loss + weights[name] / total * self.divergence(p, logits, none)
            loss = self.alpha * loss
            if self.alpha < 1:
                logits = full_precision(cast(Tensor, features.logits))
                labelled = batch.labels >= 0
                ce = F.cross_entropy(
                    where_images(labelled, logits), batch.labels.clamp(min=0), reduction="none"
                )
                loss = loss + (1 - self.alpha) * torch.where(labelled, ce, 0.0)
            return loss

    def calibrated(self, name: str, target: TokenFeatures) -> Tensor:
        """A teacher's logits over the student's classes, ``(B, K)``, divided by its T.

        Raises:
            ValueError: it gave none.
        """
        if target.logits is None:
            raise ValueError(
                f"teacher {name!r} gave no logits: fit it a classifier with `multikd teachers "
                "fit-head`, or leave it out of the term's teachers"
            )
        logits = full_precision(target.logits) / self.temperatures.get(name, 1.0)
        return (
            cast(ClassMap, self.maps[name])(logits, self.temperature)
            if name in self.maps
            else logits
        )

    def divergence(self, p: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
        """``τ²`` times the divergence of each image."""
        tau = self.temperature
        if not self.decoupled:
            return tau**2 * response_divergence(p, logits, tau)
        classes = torch.where(labels >= 0, labels, p.argmax(dim=1))
        target, rest = decoupled_divergence(p, logits, classes, tau)
        return tau**2 * (self.target_weight * target + self.nontarget_weight * rest)


def ensemble_probabilities(
    logits: Sequence[Tensor], weights: Sequence[float], temperature: float
) -> Tensor:
    """``Σ_t w_t·softmax(z_t/τ) / Σ_t w_t``: the mean of probabilities, not of logits.

    Args:
        logits: T times ``(B, K)``, calibrated.
        weights: of the teachers, 0 or more and not all 0.
        temperature: τ.

    Returns:
        ``(B, K)`` float32 (float64 for float64 logits) without a gradient.

    Raises:
        ValueError: logits of different shapes, or none.
    """
    if not logits or len({z.shape for z in logits}) > 1:
        raise ValueError(
            "an ensemble needs logits (B, K) of one shape from each teacher, received "
            f"{[tuple(z.shape) for z in logits]}"
        )
    parts = [
        w / sum(weights) * torch.softmax(full_precision(z.detach()) / temperature, dim=1)
        for z, w in zip(logits, weights, strict=True)
    ]
    return torch.stack(parts).sum(0)


def response_divergence(p: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``KL(p ‖ softmax(z/τ))`` in nats: ``(B, K)``, ``(B, K)`` → ``(B,)``, ≥ 0.

    Without the factor τ² that keeps gradients in scale.
    """
    log_q = torch.log_softmax(logits / temperature, dim=1)
    divergence: Tensor = (torch.special.xlogy(p, p) - p * log_q).sum(1)
    return divergence


def decoupled_divergence(
    p: Tensor, logits: Tensor, classes: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two parts of decoupled distillation (arXiv 2203.08679, equation 7).

    Args:
        p: ``(B, K)`` the teachers' probabilities at τ.
        logits: ``(B, K)`` of the student.
        classes: int64 ``(B,)`` target classes.
        temperature: τ.

    Returns:
        The divergence of (target, rest), and that among the other classes, each ``(B,)``.
        ``KL = first + (1 − p_target) · second``.
    """
    index = classes.unsqueeze(1)
    mask = torch.zeros_like(p, dtype=torch.bool).scatter(1, index, True)
    scaled = logits / temperature
    log_q = torch.log_softmax(scaled, dim=1)
    others = log_q.masked_fill(mask, float("-inf"))
    p_target = p.gather(1, index).squeeze(1)
    p_rest = p.masked_fill(mask, 0.0).sum(1)
    first = (
        torch.special.xlogy(p_target, p_target)
        + torch.special.xlogy(p_rest, p_rest)
        - p_target * log_q.gather(1, index).squeeze(1)
        - p_rest * torch.logsumexp(others, dim=1)
    )
    tiny = torch.finfo(p.dtype).tiny
    p_hat = p.masked_fill(mask, 0.0) / p_rest.clamp(min=tiny).unsqueeze(1)
    log_q_hat = torch.log_softmax(others, dim=1).masked_fill(mask, 0.0)
    second = (torch.special.xlogy(p_hat, p_hat) - p_hat * log_q_hat).sum(1)
    return first, second


def check_temperature(what: str, value: float) -> None:
    """Refuse what softmax can't be divided by."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{what} must be above 0, received {value}: 1 leaves logits as they are")
