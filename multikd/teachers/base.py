"""A teacher: an encoder frozen for good.

The encoder is deliberately **not** a registered submodule. So its weights are in no state dict, no
optimiser, no EMA copy, no DDP broadcast and no FSDP shard, and a strict load of the module that
holds teachers misses nothing; only moves between devices are passed on to it.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from multikd.functional import without_autocast
from multikd.teachers.encoder import BackboneEncoder, ImageEncoder
from multikd.teachers.fingerprint import weight_digest
from multikd.teachers.folding import fold_batch_norms
from multikd.teachers.head import ClassifierHead, read_head
from multikd.teachers.mosaic import compose, decompose
from multikd.teachers.packing import pack_linears
from multikd.teachers.registry import load_encoder
from multikd.teachers.resized import resized
from multikd.types import Encoder, EncoderSpec, Grid, TokenFeatures, Widths

ResizePolicy = Literal["own", "grid", "none"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Teacher(nn.Module):
    """A frozen encoder: eval whatever ``train()`` says, no autograd, its own dtype and input size.

    Args:
        encoder: a name that ``load_encoder`` knows (``timm:…``, ``open_clip:…``, ``packaged:…``,
            ``exported:…``, an import path), or an encoder module; a module is taken over.
        image_size: side of the images it sees (with ``resize="own"``); None takes its own.
        resize: ``own`` resizes to its image size (bicubic, antialiased); ``grid`` resizes by
            teacher patch / student patch, so that both grids agree; ``none`` leaves images.
        align_corners: resize as DUNE does: the corner pixels' centres stay, no antialiasing.
        dtype: of weights and features; ``auto`` is bfloat16 on CUDA and float32 elsewhere.
        mean: overrides the encoder's own.
        std: overrides the encoder's own.
        licence: overrides the recorded one.
        checkpoint: a local weight file, for encoders given by name.
        channels_last: memory layout; None decides for it where there are many convolutions.
        mosaic: k: k × k images are shown as one of the teacher's size (each k times smaller), and
            its patches are cut apart again; there is no summary then. For teachers that take large
            images only (SAM), at 1/k² of the cost.
        fold: fold batch norms into convolutions; None does so for the encoders of this package.
        compile: ``torch.compile`` the encoder; the first batch of each size then takes a minute.
        pack: on a CPU, take bias and GELU into oneDNN's matrix products (``teachers.packing``);
            None does so for the encoders of this package that are not compiled.
        head: a file of `multikd teachers fit-head`: a linear classifier on the summary, which
            gives the logits in place of the encoder's own.
        temperature: logits are divided by it (`multikd teachers calibrate`), above 0.
        bias: and this is added to them then, one number for each class.

    Raises:
        ValueError: the encoder can't be built, or settings exclude one another.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        image_size: int | None = None,
        resize: ResizePolicy = "own",
        align_corners: bool = False,
        dtype: DtypeName = "auto",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        licence: str | None = None,
        checkpoint: str | None = None,
        channels_last: bool | None = None,
        fold: bool | None = None,
        mosaic: int = 1,
        compile: bool = False,
        pack: bool | None = None,
        head: str | None = None,
        temperature: float = 1.0,
        bias: list[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < temperature < float("inf"):
            raise ValueError(
                f"temperature must be above 0, received {temperature}: 1 leaves logits as they are"
            )
        if resize not in ("own", "grid", "none"):
            raise ValueError(f"resize must be 'own', 'grid' or 'none', received {resize!r}")
        if align_corners and resize == "none":
            raise ValueError(
                "align_corners says how images are resized, and resize is 'none': set resize to "
                "'own' or 'grid', or leave align_corners out"
            )
        if dtype != "auto" and dtype not in _DTYPES:
            raise ValueError(
                f"dtype must be 'auto' or one of {sorted(_DTYPES)}, received {dtype!r}"
            )
        if mosaic < 1:
            raise ValueError(f"mosaic must be 1 or more images a side, received {mosaic}")
        if isinstance(encoder, str):
            built: object = load_encoder(encoder, checkpoint, image_size=image_size)
        elif checkpoint is not None:
            raise ValueError("checkpoint goes with an encoder given by name; load the module first")
        else:
            built = encoder
        module = _checked(built)
        spec = cast(Encoder, module).spec
        own = isinstance(module, ImageEncoder)
        if mean is not None or std is not None:
            if not isinstance(module, ImageEncoder):
                raise ValueError(
                    f"{spec.name} normalises its input itself: set mean and std there, not here"
                )
            module.set_normalization(mean or spec.mean, std or spec.std)
        if image_size is not None and spec.image_size != (image_size, image_size):
            if spec.fixed_size:
                raise ValueError(
                    f"{spec.name} takes images of {spec.image_size} px only, received "
                    f"image_size={image_size}"
                )
            module.spec = dataclasses.replace(spec, image_size=(image_size, image_size))  # type: ignore[assignment]
        if licence is not None:
            module.spec = dataclasses.replace(  # type: ignore[assignment]
                cast(Encoder, module).spec, licence=licence
            )
        if mosaic > 1:
            self._check_mosaic(cast(Encoder, module).spec, mosaic)
            # Its own classifier reads the summary, which a mosaic has none of.
            module.spec = dataclasses.replace(  # type: ignore[assignment]
                cast(Encoder, module).spec, num_classes=0
            )
        self.mosaic = mosaic
        self._head: ClassifierHead | None = None
        if head is not None:
            # Of vectors as `summary_vectors` gives them: a summary, else the mean of the patches.
            widths = self._widths(cast(Encoder, module).spec)
            width = widths.patches if widths.summary is None else widths.summary
            self._head = read_head(head, width, spec.name)
            module.spec = dataclasses.replace(  # type: ignore[assignment]
                cast(Encoder, module).spec, num_classes=self._head.num_classes
            )
        self.temperature = temperature
        self._bias = None if bias is None else torch.tensor(bias, dtype=torch.float32)
        classes = cast(Encoder, module).spec.num_classes
        if (temperature != 1.0 or bias is not None) and not classes:
            raise ValueError(
                f"{spec.name} gives no logits that temperature and bias could calibrate: fit a "
                "classifier with `multikd teachers fit-head` and set head to its file"
            )
        if bias is not None and len(bias) != classes:
            raise ValueError(
                f"bias must hold one number for each of {classes} classes, received {len(bias)}"
            )
        self.resize: ResizePolicy = resize
        self.align_corners = align_corners
        self.dtype_name: DtypeName = dtype
        self._borrowed = False
        self._digest: str | None = None
        module.eval().requires_grad_(False)
        # Past nn.Module's registration, on purpose (see the module's docstring).
        object.__setattr__(self, "_encoder", module)
        folds = (fold is None and own) or bool(fold)
        norms = folds and any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
        real = not any(p.is_meta for p in module.parameters())
        # Of the weights as they were given: folding changes them, and what was rounded to float16
        # would be rounded twice.
        if real and (norms or dtype == "float16"):
            self._digest = weight_digest(module)
        if folds:
            fold_batch_norms(module, self.spec.image_size)
            module.requires_grad_(False)
        convolutions = sum(isinstance(m, nn.Conv2d) for m in module.modules())
        self.channels_last = convolutions > 8 if channels_last is None else channels_last
        if self.channels_last:
            module.to(memory_format=torch.channels_last)
        self._place(lambda tensor: tensor)
        if (pack is None and own and not compile) or pack:
            pack_linears(module)
        if compile:
            module.compile()
        self.training = False

    # ------------------------------------------------------------------ what it is

    @property
    def encoder(self) -> nn.Module:
        """The frozen encoder (not a registered submodule)."""
        return cast(nn.Module, self.__dict__["_encoder"])

    @property
    def spec(self) -> EncoderSpec:
        """Widths, patch size, image size, normalisation and licence."""
        return cast(Encoder, self.encoder).spec

    @property
    def widths(self) -> Widths:
        """Widths of summary and patches (of patches alone with a mosaic)."""
        return self._widths(self.spec)

    def _widths(self, spec: EncoderSpec) -> Widths:
        return spec.widths if self.mosaic == 1 else Widths(None, spec.widths.patches)

    @property
    def num_classes(self) -> int:
        """Classes of its classifier, 0 without one."""
        return self.spec.num_classes

    @property
    def head(self) -> ClassifierHead | None:
        """The classifier of a file, where it has one."""
        return self._head

    @property
    def num_parameters(self) -> int:
        """Parameters of the encoder (of a folded one, after folding)."""
        return sum(p.numel() for p in self.encoder.parameters())

    def fingerprint(self) -> str:
        """SHA-256 over weights and preprocessing, the same on every device and dtype."""
        if self._digest is None:
            self._digest = weight_digest(self.encoder)
        spec = self.spec
        facts = (spec.image_size, spec.patch_size, spec.mean, spec.std, self.resize, spec.widths)
        tiles = "" if self.mosaic == 1 else f"|mosaic {self.mosaic}"
        tiles += "|aligned corners" if self.align_corners else ""
        tiles += "" if self._head is None else f"|head {self._head.digest()}"
        if self.temperature != 1.0 or self._bias is not None:
            bias = None if self._bias is None else self._bias.tolist()
            tiles += f"|logits / {self.temperature!r} + {bias!r}"
        return hashlib.sha256(f"{self._digest}|{facts!r}{tiles}".encode()).hexdigest()

    @staticmethod
    def _check_mosaic(spec: EncoderSpec, mosaic: int) -> None:
        if spec.widths.patches is None:
            raise ValueError(f"{spec.name} has no patches to cut out of a mosaic: set mosaic to 1")
        if any(side % (mosaic * spec.patch_size) for side in spec.image_size):
            raise ValueError(
                f"{spec.name} takes images of {spec.image_size} px in patches of "
                f"{spec.patch_size} px, which {mosaic} images a side do not divide: choose "
                "another mosaic or image_size"
            )

    # ------------------------------------------------------------------ running it

    def input_size(self, image_size: Grid, student_patch: int | None = None) -> Grid:
        """The size to which images of ``image_size`` are brought for this teacher.

        With a mosaic, that of each image in it.

        Raises:
            ValueError: with ``resize="grid"``, no student patch is known, the image is smaller
                than it, or the teacher takes no other size.
        """
        if self.resize == "none":
            return image_size
        if self.resize == "own":
            height, width = self.spec.image_size
            return (height // self.mosaic, width // self.mosaic)
        if not student_patch or min(image_size) < student_patch:
            raise ValueError(
                f"{self.spec.name} resizes to the student's grid and needs a student patch of at "
                f"most {min(image_size)} px, received {student_patch}"
            )
        patch = self.spec.patch_size
        size = (image_size[0] // student_patch * patch, image_size[1] // student_patch * patch)
        whole = (size[0] * self.mosaic, size[1] * self.mosaic)
        if self.spec.fixed_size and whole != self.spec.image_size:
            raise ValueError(
                f"{self.spec.name} takes {self.spec.image_size} px only, and the student's grid "
                f"needs {size} px: use resize='own'"
            )
        return size

    def resize_images(self, images: Tensor, student_patch: int | None = None) -> Tensor:
        """Float images ``(B, 3, H, W)`` in [0, 1] in this teacher's size.

        Within ``shared_sizes`` made once for all teachers of one size.
        """
        size = self.input_size((images.shape[2], images.shape[3]), student_patch)
        return resized(images, size, self.align_corners)

    def grid_for(self, image_size: Grid, student_patch: int | None = None) -> Grid | None:
        """The patch grid that images of ``image_size`` give here, after resizing."""
        if self.widths.patches is None:
            return None
        size = self.input_size(image_size, student_patch)
        if self.mosaic > 1:
            patch = self.spec.patch_size
            if size[0] % patch or size[1] % patch:
                raise ValueError(
                    f"images of {size} px in a mosaic are no whole patches of {patch} px for "
                    f"{self.spec.name}: use resize='own' or 'grid'"
                )
            whole = (size[0] * self.mosaic, size[1] * self.mosaic)
            grid = self.encoder.grid_for(whole) if isinstance(self.encoder, ImageEncoder) else None
            h, w = grid or (whole[0] // patch, whole[1] // patch)
            return (h // self.mosaic, w // self.mosaic)
        if isinstance(self.encoder, ImageEncoder):
            return self.encoder.grid_for(size)
        return (size[0] // self.spec.patch_size, size[1] // self.spec.patch_size)

    # no_grad, not inference_mode: an inference tensor saved by the loss breaks its backward.
    @torch.no_grad()
    def forward(self, images: Tensor, student_patch: int | None = None) -> TokenFeatures:
        """Features in the teacher's dtype, outside autograd.

        Args:
            images: float ``(B, 3, H, W)`` in [0, 1], not normalised.
            student_patch: pixels per patch of the student, needed with ``resize="grid"``.

        Raises:
            ValueError: images of another shape or dtype, or on another device.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                "a teacher needs float images (B, 3, H, W) in [0, 1], received "
                f"{tuple(images.shape)} {images.dtype}: divide uint8 by 255 first"
            )
        device = next((p.device for p in self.encoder.parameters()), images.device)
        if device != images.device:
            raise ValueError(
                f"{self.spec.name} is on {device} and the images are on {images.device}: move the "
                "module that holds the teacher (a copy of a teacher stays with its original)"
            )
        own = isinstance(self.encoder, ImageEncoder)
        dtype = self._dtype_on(device)
        # Of our encoders the weights are cast; a user's module is run under autocast instead.
        mixed = not own and dtype != torch.float32
        with torch.autocast(device.type, dtype=dtype) if mixed else without_autocast(device):
            pixels = self.resize_images(images, student_patch).float()
            count = len(pixels)
            if self.mosaic > 1:
                pixels = compose(pixels, self.mosaic)
            if self.channels_last:
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            features: TokenFeatures = self.encoder(pixels)
            if self.mosaic > 1:
                features = decompose(features, self.mosaic, count)
            return self._classified(features)

    def _classified(self, features: TokenFeatures) -> TokenFeatures:
        """With the head's logits, where there is one, and calibrated."""
        if self._head is None and self._bias is None and self.temperature == 1.0:
            return features
        logits = features.logits
        if self._head is not None:
            summary, patches = features.summary, features.patches
            if summary is None and patches is not None:
                summary = patches.float().mean(dim=1)
            logits = None if summary is None else self._head(summary)
        if logits is not None:
            logits = logits.float() / self.temperature
            logits = logits if self._bias is None else logits + self._bias
        return dataclasses.replace(features, logits=logits)

    def ask_layers(self, indices: Sequence[int]) -> list[tuple[int, Widths]]:
        """From now on ``forward`` also gives these blocks or stages, as ``layers``.

        Args:
            indices: of the encoder's blocks or stages, negative from the end.

        Returns:
            Number from 0 on, and widths, of each index.

        Raises:
            ValueError: the encoder gives no intermediate features, or an index is out of range.
        """
        if not isinstance(self.encoder, BackboneEncoder) or self.mosaic > 1:
            raise ValueError(
                f"{self.spec.name} gives no intermediate layers (timm encoders without a mosaic "
                "do): set layer to null for its final patches"
            )
        return self.encoder.ask_layers(indices)

    # ------------------------------------------------------------------ staying frozen and apart

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if self.dtype_name != "auto":
            return _DTYPES[self.dtype_name]
        return torch.bfloat16 if device.type == "cuda" else torch.float32

    def _place(self, move: Callable[[Tensor], Tensor]) -> None:
        """Move the encoder's tensors, and give them this teacher's dtype whatever ``move`` says."""

        def placed(tensor: Tensor) -> Tensor:
            moved = move(tensor)
            if not tensor.is_floating_point() or not isinstance(self.encoder, ImageEncoder):
                same = tensor.dtype == moved.dtype
                return moved if same else tensor.to(moved.device)
            return tensor.to(moved.device, self._dtype_on(moved.device))

        self.encoder._apply(placed)  # type: ignore[no-untyped-call]
        if self._head is not None:
            self._head.to(move(self._head.bias).device)
        if self._bias is not None:
            self._bias = self._bias.to(move(self._bias).device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        if not self._borrowed:
            self._place(fn)
        return self

    def stay(self) -> None:
        """Do not follow the module to its device: here this teacher is not run."""
        self._borrowed = True

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever ``mode`` is."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Teacher:
        """Stay frozen, whatever is asked."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        """A copy that shares the frozen encoder; moving the copy does not move the encoder."""
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for key, value in self.__dict__.items():
            clone.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
        clone._borrowed = True
        return clone

    def extra_repr(self) -> str:
        """Name, widths and resizing."""
        return f"{self.spec.name}, {self.widths}, resize={self.resize}, dtype={self.dtype_name}"


def _checked(encoder: object) -> nn.Module:
    if not isinstance(encoder, nn.Module) or not isinstance(
        getattr(encoder, "spec", None), EncoderSpec
    ):
        raise ValueError(
            f"an encoder is a torch module with a .spec (multikd.types.EncoderSpec), received "
            f"{type(encoder).__name__}; a timm model goes in as BackboneEncoder(model, name=…)"
        )
    return encoder
