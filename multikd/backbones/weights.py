"""Reading weight files, and fitting them to a timm model with one clear sentence on failure."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from multikd.backbones.unpickle import first_line, read_torch_file

_log = logging.getLogger(__name__)

# Where training programs put the weights inside a checkpoint, averaged ones first.
_WRAPPERS = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model", "student")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a ``.safetensors`` or torch file (``weights_only``: nothing is executed).

    A folder that ``multikd export`` wrote stands for the weights in it.

    Raises:
        ValueError: no such file, not a weight file, or one that needs unpickling of objects.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():  # an exported folder
        path = path / "model.safetensors"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {str(path)!r}: give the path of a weight file")
    return tensors_of(read_weight_file(path), path)


def read_weight_file(path: Path) -> Any:
    """Everything in a ``.safetensors`` or torch file; nothing is executed.

    Raises:
        ValueError: not a weight file, or one that needs unpickling of objects.
    """
    if path.suffix != ".safetensors":
        return read_torch_file(path)
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except Exception as error:
        raise ValueError(
            f"{path} is no readable weight file ({first_line(error)}): expected .safetensors "
            "or a torch state dict"
        ) from error


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name of what a weight file holds, under whatever key they are.

    Raises:
        ValueError: there are none.
    """
    for _ in range(2):  # {"model": {"state_dict": …}} occurs in the wild
        inner = next((w for w in _WRAPPERS if _is_mapping(content, w)), None)
        if inner is None:
            break
        content = content[inner]
    if isinstance(content, Mapping):
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise ValueError(f"{path} holds no tensors by name: expected a state dict")


def _is_mapping(content: Any, key: str) -> bool:
    return isinstance(content, Mapping) and isinstance(content.get(key), Mapping)


def strip_prefix(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Tensors under the prefix that explains most of ``names`` (``module.``, ``student.model.``…).

    Raises:
        ValueError: two prefixes explain equally many names, so that the choice is not ours.
    """
    names = list(names)
    wanted, anchors = set(names), names[:1] + names[-2:-1]
    prefixes = {""} | {
        key[: -len(anchor)] for key in tensors for anchor in anchors if key.endswith("." + anchor)
    }
    score = {p: sum(k[len(p) :] in wanted for k in tensors if k.startswith(p)) for p in prefixes}
    best = max(score.values())
    winners = sorted(p for p, s in score.items() if s == best)
    if best == 0:
        return dict(tensors)  # foreign names: the family's own converter may know them
    if len(winners) > 1:
        raise ValueError(
            f"the checkpoint holds several fitting models, under {winners}: "
            "save the one that is meant into a file of its own"
        )
    prefix = winners[0]
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier layers of a timm model, as its pretrained_cfg gives them."""
    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str, adapt_classifier: bool = False
) -> None:
    """Load ``tensors`` into a timm model, strictly, in place.

    The family's own converter in timm (position embeddings of another size, foreign key names)
    is applied where names or shapes differ. A classifier of another size is left as it was
    initialised, or, with ``adapt_classifier``, the model's is rebuilt to the file's size (none
    when the file has none).

    Raises:
        ValueError: a tensor is missing, left over or of another shape; names the first.
    """
    found = strip_prefix(tensors, model.state_dict())
    heads = classifier_names(model)
    if adapt_classifier and heads:
        weight = found.get(f"{heads[0]}.weight")
        classes = 0 if weight is None else weight.shape[0]
        if classes != getattr(model, "num_classes", 0):
            model.reset_classifier(classes)  # type: ignore[operator]
    if not _fits(model, found):
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                found = dict(convert(dict(found), model))
            except Exception as error:
                # The converters assume their own family; ours is the sentence that follows.
                _log.debug("checkpoint_filter_fn refused %s: %s", source, error)
    own = model.state_dict()
    is_head = {f"{head}.{kind}" for head in heads for kind in ("weight", "bias")}
    for key in is_head:
        if key in found and (key not in own or own[key].shape != found[key].shape):
            _log.info("%s: %s does not fit this model's classifier, left out", source, key)
            del found[key]
    for key, tensor in own.items():
        if key not in found:
            if key in is_head or key.endswith("num_batches_tracked"):
                continue
            raise ValueError(
                f"{source} does not fit {type(model).__name__}: it lacks {key!r} "
                f"{tuple(tensor.shape)}; is it the right architecture?"
            )
        if found[key].shape != tensor.shape:
            raise ValueError(
                f"{source} does not fit {type(model).__name__}: {key!r} is "
                f"{tuple(found[key].shape)} in the file and {tuple(tensor.shape)} in the model; "
                "check architecture, patch size and image size"
            )
    extra = next((key for key in found if key not in own), None)
    if extra is not None:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {extra!r} has no place in the model; "
            "is it the right architecture?"
        )
    model.load_state_dict(found, strict=False)  # what is absent was judged above


def _fits(model: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return all(key in tensors and tensors[key].shape == value.shape for key, value in own.items())
